# Scalars, hashes, arrays, regular expressions and subs.
use strict;
use warnings;
my $scale = shift // 1;
my ($sum, %count) = (0);
sub step { my ($x) = @_; return ($x * 1103515245 + 12345) % 2147483648 }
my $x = 42;
for my $i (1 .. 500000 * $scale) {
    $x = step($x);
    $sum += $x & 0xff;
    $count{ $x % 1000 }++;
}
my $text = join ' ', map { "word$_" } 1 .. 2000;
for my $i (1 .. 40 * $scale) {
    while ($text =~ /(\w+?)(\d+)/g) { $sum += length($1) + $2 }
    my @words = sort { $a cmp $b } split / /, $text;
    $sum += @words;
}
print "$sum ", scalar(keys %count), "\n";
