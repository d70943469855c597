# gdb: breakpoints, single steps, hardware watchpoints, signals and threads of a program that it debugs.
#
# packages: gdb gcc libc6-dev
# memory: 512M
# limit: 300
cd /tmp
cat >program.c <<'C'
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int watched, quiet[4];
long wide;
static int add(int a, int b)
{
    int sum = a + b;
    return sum;
}
static int deeper(int depth)
{
    if (depth == 0)
        return add(40, 2);
    return deeper(depth - 1) + 1;
}
static void changes(void)
{
    for (int i = 0; i < 3; i++) {
        quiet[i] = i;
        watched += 10 + i;
    }
    quiet[3] = watched;
    wide = 0x1122334455667788;
    ((char *)&wide)[5] = 0x5a;
}

/* Every instruction behind odd is stepped over. */
extern char odd[], odd_end[];
static const char from[] = "abc";
static char to[4];
static void instructions(void)
{
    long a = 0x1111, c = 3;
    const char *source = from;
    char *target = to;
    __asm__ volatile(
        "odd: rep movsb\n"
        "     mov $39, %%eax\n"
        "     mov $0x7fff0001, %%ebx\n"
        "     syscall\n"
        "     mov $0x5555, %%eax\n"
        "     pushf\n"
        "     pop %%rdx\n"
        "     movq %%rbx, %%xmm3\n"
        "     fldpi\n"
        "     fstp %%st(0)\n"
        "     cpuid\n"
        "     rdtsc\n"
        "     xor %%eax, %%eax\n"
        "     call 1f\n"
        "     jmp 2f\n"
        "1:   ret\n"
        "2:   stc\n"
        "     sbb %%rax, %%rax\n"
        "     mov %%ss, %%ecx\n"
        "     mov %%ecx, %%ss\n"
        "     nop\n"
        "odd_end: nop\n"
        : "+a"(a), "+c"(c), "+S"(source), "+D"(target)
        :
        : "rbx", "rdx", "r11", "xmm3", "memory", "cc");
}

static pthread_barrier_t together;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t passed = PTHREAD_COND_INITIALIZER;
static long turn = 1, shared;
static void on_turn(long me)
{
    shared += me * 100;
    turn = me + 1;
}
static void *worker(void *number)
{
    long me = (long)number;
    pthread_barrier_wait(&together);
    pthread_mutex_lock(&lock);
    while (turn != me)
        pthread_cond_wait(&passed, &lock);
    on_turn(me);
    pthread_cond_broadcast(&passed);
    pthread_mutex_unlock(&lock);
    return NULL;
}
static void threads(void)
{
    pthread_t ids[2];
    pthread_barrier_init(&together, NULL, 2);
    for (long i = 0; i < 2; i++)
        pthread_create(&ids[i], NULL, worker, (void *)(i + 1));
    for (int i = 0; i < 2; i++)
        pthread_join(ids[i], NULL);
    printf("shared %ld\n", shared);
}

static volatile int go;
static int waits(void)
{
    while (!go)
        continue;
    return go;
}

int main(int count, char **words)
{
    volatile int zero = 0;
    const char *what = count > 1 ? words[1] : "";
    if (!strcmp(what, "calls"))
        printf("deeper %d\n", deeper(3));
    else if (!strcmp(what, "changes"))
        changes(), printf("watched %d\n", watched);
    else if (!strcmp(what, "instructions"))
        instructions(), printf("copied %s\n", to);
    else if (!strcmp(what, "threads"))
        threads();
    else if (!strcmp(what, "store"))
        *(int *)0x123450 = 1;
    else if (!strcmp(what, "noncanonical"))
        *(volatile int *)0x8000000000000000;
    else if (!strcmp(what, "jump"))
        ((void (*)(void))0x4567890)();
    else if (!strcmp(what, "divide"))
        printf("%d\n", 5 / zero);
    else if (!strcmp(what, "ud2"))
        __asm__ volatile("ud2");
    else if (!strcmp(what, "int3"))
        __asm__ volatile("int3");
    else if (!strcmp(what, "waits"))
        return waits();
    fflush(stdout);
    return 7;
}
C
# Code stands at fixed addresses; those of stacks and libraries are not printed.
gcc -g -O0 -no-pie -fcf-protection=none -w -o program program.c -pthread

# Standard input: what gdb does; the others: its arguments
debug() {
    cat >commands
    gdb -nx -q -batch -iex 'set debuginfod enabled off' -iex 'set auto-load safe-path /' \
        -ex 'set print thread-events off' -ex 'set width 0' -x commands "$@" ./program 2>gdb.err |
        sed -E '/^(Using host libthread_db|\[Thread debugging using|\[Switching to|$)/d
            s/Thread 0x[0-9a-f]+ \(LWP [0-9]+\)/Thread T/; s/process [0-9]+/process P/
            s/0x(0000)?7ff[0-9a-f]{9}/HIGH/g; s/^(  [0-9]+ +Thread T "program").*/\1 is elsewhere/'
    # An error ends what gdb does, so that the rest lacks.
    cat gdb.err >&2
}

debug <<'GDB'
echo == calls, and steps over them\n
set args calls
break add
run
backtrace
info registers rip
info args
step
print sum
next
stepi
x/i $pc
stepi
finish
finish
up
info locals
delete
print add(1000, 337)
print $_exitcode
catch syscall write
continue
continue
delete
continue
print $_exitcode

echo == stores that are watched\n
set args changes
break main
run
delete
watch watched
continue
info watchpoints
backtrace 1
continue
continue
delete
watch *((char *)&wide + 5)
continue
continue
delete
rwatch watched
continue
delete
continue

echo == breakpoints of the hardware\n
break main
run
delete
hbreak changes
info breakpoints
continue
backtrace
awatch quiet[1]
watch watched if watched > 20
rwatch quiet[3]
info watchpoints
continue
continue
continue
delete
kill

echo == instruction by instruction\n
set args instructions
break *&odd
run
delete
info registers rcx
set $steps = 0
while $pc < (unsigned long)&odd_end
  stepi
  x/i $pc
  set $steps = $steps + 1
end
print $steps
print (char *)to
info registers rax eflags
print/x $xmm3.v2_int64[0]
set $xmm3.v4_int32[1] = 77
stepi
print $xmm3.v4_int32[1]
continue

echo == threads\n
set args threads
break on_turn
run
info threads
backtrace 2
watch shared
continue
next
next
continue
continue
delete
continue

echo == faults\n
set args store
run
backtrace
print $_siginfo.si_signo
print $_siginfo.si_code
print $_siginfo._sifields._sigfault.si_addr
x/i $pc
continue
set args noncanonical
run
print $_siginfo.si_code
print $_siginfo._sifields._sigfault.si_addr
x/i $pc
kill
set args jump
run
backtrace
print $_siginfo.si_code
print $_siginfo._sifields._sigfault.si_addr
kill
set args divide
run
print $_siginfo.si_signo
print $_siginfo.si_code
print $_siginfo._sifields._sigfault.si_addr == $pc
x/i $pc
kill
set args ud2
run
print $_siginfo.si_signo
print $_siginfo.si_code
print $_siginfo._sifields._sigfault.si_addr == $pc
kill
set args int3
run
print $_siginfo.si_code
x/i $pc
continue
GDB
[ "$1" = quick ] && exit

# Without the hardware's help gdb takes every step itself.
debug <<'GDB'
set can-use-hw-watchpoints 0
echo == every step\n
set args changes
break changes
run
watch watched if watched > 20
continue
continue
delete
continue
GDB

echo '== a process that runs'
./program waits &
debug -p $! <<'GDB' | sed 's/.*waits ().*/in waits/; s/^103.*/the loop/; s/^104.*/the loop/'
backtrace
watch go
set var go = 5
finish
detach
GDB
wait $! || echo "exit $?"
