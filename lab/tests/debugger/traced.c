// Traces its own child as a debugger would: single steps, breakpoints and watchpoints
// in debug registers, INT3. Says what is wrong, or "debugger: ok".
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile long watched, other;
static char filled[64];

__attribute__((noinline)) static void target(void) { other += 1; }

// Stops at each label in turn.
void counted(void), counted_end(void), trap(void);

static void child(void)
{
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    // 1 MOV, 1 LEA, 1 MOV, 5 elements of STOSB, 1 SYSCALL, 1 NOP: see `steps`.
    asm volatile(".globl counted, counted_end\n"
                 "int3\n"
                 "counted: mov $5, %%ecx\n lea %0, %%rdi\n mov $39, %%eax\n rep stosb\n"
                 "syscall\n nop\n counted_end: int3"
                 : "+m"(filled)::"rax", "rcx", "rdi", "r11", "memory");
    for (int i = 0; i < 3; i++)
        target();
    watched = 1;
    other = watched;
    asm volatile(".globl trap\n trap: int3" ::: "memory");
    _exit(7);
}

static pid_t pid;
static int line;

static void fail(const char *what, long got, long wanted)
{
    printf("debugger: line %d: %s is %#lx, not %#lx\n", line, what, got, wanted);
    exit(1);
}

static void is(const char *what, long got, long wanted)
{
    if (got != wanted)
        fail(what, got, wanted);
}

#define IS(what, got, wanted) (line = __LINE__, is(what, got, wanted))

static long user(size_t offset)
{
    errno = 0;
    return ptrace(PTRACE_PEEKUSER, pid, offset, 0);
}

static long rip(void) { return user(offsetof(struct user_regs_struct, rip)); }

static long debug(int n) { return user(offsetof(struct user, u_debugreg[n])); }

static void set_debug(int n, long value)
{
    long done = ptrace(PTRACE_POKEUSER, pid, offsetof(struct user, u_debugreg[n]), value);
    IS("a debug register's write", done, 0);
}

static void go(int how, int signal)
{
    int status;
    ptrace(how, pid, 0, 0);
    waitpid(pid, &status, 0);
    IS("the stop", WIFSTOPPED(status) ? WSTOPSIG(status) : -status, signal);
}

static void run_to_debug(long bit)
{
    set_debug(6, 0);
    go(PTRACE_CONT, SIGTRAP);
    IS("DR6", debug(6) & 0x400f, bit);
}

int main(void)
{
    int status;
    setvbuf(stdout, 0, _IONBF, 0);
    pid = fork();
    if (pid == 0)
        child();
    waitpid(pid, &status, 0);
    IS("the first stop", WSTOPSIG(status), SIGSTOP);

    go(PTRACE_CONT, SIGTRAP);
    IS("RIP behind INT3", rip(), (long)counted);
    int steps = 0;
    while (rip() != (long)counted_end) {
        go(PTRACE_SINGLESTEP, SIGTRAP);
        if (++steps > 100)
            break;
    }
    IS("the number of steps", steps, 10);
    go(PTRACE_CONT, SIGTRAP);

    set_debug(0, (long)target);
    set_debug(7, 1);
    for (int i = 0; i < 3; i++) {
        run_to_debug(1);
        IS("RIP at the breakpoint", rip(), (long)target);
        IS("calls", ptrace(PTRACE_PEEKDATA, pid, &other, 0), i);
    }
    set_debug(7, 0);

    set_debug(1, (long)&watched);
    set_debug(7, 1L << 2 | 1L << 20 | 2L << 22); // 8 bytes, writes
    run_to_debug(2);
    IS("the watched word", ptrace(PTRACE_PEEKDATA, pid, &watched, 0), 1);
    set_debug(7, 1L << 2 | 3L << 20 | 3L << 22); // 4 bytes, any access
    run_to_debug(2);
    set_debug(7, 0);

    go(PTRACE_CONT, SIGTRAP);
    IS("RIP behind INT3", rip(), (long)trap + 1);
    for (int i = 0; i < 500; i++) {
        ptrace(PTRACE_SINGLESTEP, pid, 0, 0);
        waitpid(pid, &status, 0);
        if (WIFEXITED(status))
            break;
        IS("a step to the end", WSTOPSIG(status), SIGTRAP);
    }
    IS("the end", WIFEXITED(status) ? WEXITSTATUS(status) : -1, 7);
    puts("debugger: ok");
    return 0;
}
