// Keeps all processors of a machine busy with what goes wrong between processors, and checks it: a wake-up that is lost, a clock that
// goes back from one processor to the next, a page that one still sees after another unmapped it, a counter that loses an increment.
//
//   soak SECONDS      prints one line a kind of work and exits 0; the first thing that is wrong is printed and ends it with 1

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_bool over;
static atomic_ulong progress[6];
static const char *const work[6] = {"wake-ups by condition", "wake-ups by pipe", "clock readings", "pages unmapped", "forks", "increments"};

static void wrong(const char *what)
{
    printf("wrong: %s\n", what);
    fflush(stdout);
    _exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Two threads hand a turn to and fro.
static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static int turn;

static void *by_condition(void *mine)
{
    int me = (int)(intptr_t)mine;
    while (!over) {
        pthread_mutex_lock(&turn_lock);
        while (turn != me && !over)
            pthread_cond_wait(&turn_changed, &turn_lock);
        turn = !me;
        pthread_cond_broadcast(&turn_changed);
        pthread_mutex_unlock(&turn_lock);
        progress[0]++;
    }
    return NULL;
}

static void *by_pipe(void *unused)
{
    int there[2], back[2];
    char byte = 1;
    if (pipe(there) || pipe(back))
        wrong("no pipe");
    pid_t child = fork();
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                break;
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    while (!over) {
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            wrong("a pipe ended");
        progress[1]++;
    }
    close(there[1]);
    waitpid(child, NULL, 0);
    return unused;
}

// No reading is before one that another processor has published.
static atomic_ulong latest;

static void *clock_reader(void *unused)
{
    int processors = (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (unsigned n = 0; !over; n++) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(n % processors, &one);
        sched_setaffinity(0, sizeof one, &one);
        for (int i = 0; i < 2000; i++) {
            uint64_t seen = latest, time = now();
            if (time < seen) {
                printf("clock: %lu ns back\n", (unsigned long)(seen - time));
                wrong("the clock went back");
            }
            while (seen < time && !atomic_compare_exchange_weak(&latest, &seen, time)) {
            }
        }
        progress[2] += 2000;
    }
    return unused;
}

// After munmap no thread reads the page any more.
static _Thread_local sigjmp_buf after_fault;
static volatile char *_Atomic shared;
static atomic_ulong unmapped, seen_by_reader;

static void on_fault(int number)
{
    (void)number;
    siglongjmp(after_fault, 1);
}

static void *page_reader(void *unused)
{
    volatile unsigned long seen = 0;
    while (!over) {
        unsigned long round = unmapped;
        volatile char *page = shared;
        if (page && round != seen && round % 2 == 1) {
            // The page of this round is gone since before `unmapped` said so.
            if (sigsetjmp(after_fault, 1) == 0) {
                char byte = *page;
                (void)byte;
                if (unmapped == round)
                    wrong("a page was read after it was unmapped");
            }
            seen = round;
            seen_by_reader = round;
        } else if (page && sigsetjmp(after_fault, 1) == 0) {
            char byte = *page; // puts it into this processor's TLB
            (void)byte;
        }
    }
    return unused;
}

static void *page_writer(void *unused)
{
    char *place = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    while (!over) {
        if (mmap(place, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != place)
            wrong("no memory");
        *place = 1;
        shared = place;
        sched_yield();
        if (mprotect(place, 4096, PROT_NONE))
            wrong("mprotect failed");
        unsigned long round = ++unmapped;
        while (seen_by_reader != round && !over)
            sched_yield();
        ++unmapped;
        progress[3]++;
    }
    return unused;
}

static void *forker(void *unused)
{
    while (!over) {
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(42);
        if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 42)
            wrong("a child was lost");
        progress[4]++;
        usleep(1000); // timers too
    }
    return unused;
}

// Across a cache line, where the bus is locked.
static char unaligned[128] __attribute__((aligned(64)));
static atomic_ulong asked;

static void *incrementer(void *unused)
{
    unsigned long *counter = (unsigned long *)(unaligned + 60);
    while (!over) {
        for (int i = 0; i < 1000; i++)
            __asm__ volatile("lock incq %0" : "+m"(*counter)::"cc");
        asked += 1000;
        progress[5] += 1000;
    }
    return unused;
}

int main(int argc, char **argv)
{
    void *(*const kinds[])(void *) = {by_condition, by_condition, by_pipe, clock_reader, clock_reader, page_reader, page_writer, forker, incrementer, incrementer};
    enum { THREADS = sizeof kinds / sizeof *kinds };
    pthread_t threads[THREADS];
    unsigned long before[6] = {0};
    int seconds = argc > 1 ? atoi(argv[1]) : 20;

    signal(SIGSEGV, on_fault);
    for (intptr_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, kinds[i], (void *)i))
            wrong("no thread");
    for (int left = seconds; left > 0;) {
        // A lost wake-up: a kind of work that stands still for ten seconds.
        int step = left < 10 ? left : 10;
        sleep(step);
        left -= step;
        for (int i = 0; i < 6; i++) {
            if (step == 10 && progress[i] == before[i]) {
                printf("stands still: %s\n", work[i]);
                wrong("no progress in ten seconds");
            }
            before[i] = progress[i];
        }
    }
    over = true;
    pthread_mutex_lock(&turn_lock);
    pthread_cond_broadcast(&turn_changed);
    pthread_mutex_unlock(&turn_lock);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (*(unsigned long *)(unaligned + 60) != asked)
        wrong("an increment was lost");
    for (int i = 0; i < 6; i++)
        printf("%s: %lu\n", work[i], progress[i]);
    return 0;
}
