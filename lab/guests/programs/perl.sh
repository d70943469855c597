# Perl: hashes, regular expressions, sorting, numbers, and processes by fork and pipe.
#
# packages: perl
# memory: 256M
# limit: 60
cd /tmp
cat >program.pl <<'PERL'
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use List::Util qw(sum reduce);
use POSIX qw(floor fmod);
$| = 1;

my (%count, $text);
$text .= "line $_: " . join(' ', map { chr(97 + ($_ * $_ + 7 * $_) % 26) x (1 + $_ % 5) } $_ .. $_ + 9) . "\n" for 1 .. 5000;
$count{$1}++ while $text =~ /\b([a-z]+)\b/g;
print "words ", scalar(keys %count), " ", sha256_hex(join ',', map { "$_=$count{$_}" } sort keys %count), "\n";
(my $changed = $text) =~ s/(\w)(\w*)/uc($1) . reverse($2)/ge;
print "changed ", sha256_hex($changed), "\n";
my @sorted = sort { $a->[1] <=> $b->[1] || $a->[0] cmp $b->[0] } map { ["k$_", $_ * 7919 % 10007] } 1 .. 30000;
print "sorted ", sha256_hex(join ',', map { $_->[0] } @sorted), "\n";
my $numbers = 0;
$numbers += sin($_) * log($_) / sqrt($_) + fmod($_, 1.7) - floor($_ / 3) for 1 .. 200000;
printf "numbers %.17g\n", $numbers;
my ($a, $b) = (0, 1);
($a, $b) = ($b, ($a + $b) % 1000000007) for 1 .. 300000;
print "fibonacci $a\n";
print "closures ", sum(map { my $n = $_; (sub { $n * $_[0] })->(3) } 1 .. 50000), "\n";
print "packed ", sha256_hex(join '', map { pack 'NnCdq', $_, $_ & 65535, $_ & 255, $_ / 3, -$_ } 1 .. 20000), "\n";
my @answers;
for my $child (1 .. 20) {
    my $process = open(my $pipe, '-|') // die "fork: $!";
    if (!$process) { print reduce { ($a * 31 + $b) % 65521 } 1 .. 1000 * $child; exit $child }
    push @answers, scalar <$pipe>;
    close $pipe;
    push @answers, $? >> 8;
}
print "children @answers\n";
my $signals = 0;
local $SIG{ALRM} = sub { $signals++ };
for (1 .. 3) { alarm 1; select undef, undef, undef, 3 }
print "signals $signals\n";
print eval { my $zero = 0; 1 / $zero } // "caught: $@";
PERL
perl program.pl
