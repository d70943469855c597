// The rows of `bench engine`: the same binary natively and as PID 1 of a guest.
//
// usage: engine ROW               (natively; $BENCH_ROOT is the interpreters' root)
// As PID 1 the row is what follows "bench.row=" in the kernel's command line, and the
// interpreters' root is the first disk.
//
// Prints "BEGIN row" and "END row wall_ms cpu_ms status", with a rest around both, so that
// who reads them can take the machine's CPU time in between. "SKIP row why" otherwise.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "workloads.h"

#define REST_US 40000

static const char *self = "/proc/self/exe";
static volatile unsigned sink;

static double cpu_ms(void) {
    struct rusage own, children;
    getrusage(RUSAGE_SELF, &own);
    getrusage(RUSAGE_CHILDREN, &children);
    double sum = 0;
    for (const struct rusage *u = &own;; u = &children) {
        sum += (u->ru_utime.tv_sec + u->ru_stime.tv_sec) * 1e3 + (u->ru_utime.tv_usec + u->ru_stime.tv_usec) / 1e3;
        if (u == &children) return sum;
    }
}

/* --- libc */

static const unsigned sizes[] = {7, 16, 33, 64, 200, 512, 1000, 4000, 16000, 60000};
#define SIZES (sizeof sizes / sizeof *sizes)

static unsigned copies(void) {
    static char from[70000], to[70000];
    for (int i = 0; i < 16000; i++)
        for (unsigned k = 0; k < SIZES; k++) {
            memcpy(to + (i & 63), from + (i >> 6 & 63), sizes[k]);
            __asm__ volatile("" ::: "memory");
        }
    return to[5];
}

static unsigned sets(void) {
    static char to[70000];
    for (int i = 0; i < 30000; i++)
        for (unsigned k = 0; k < SIZES; k++) {
            memset(to + (i & 63), i, sizes[k]);
            __asm__ volatile("" ::: "memory");
        }
    return to[5];
}

static unsigned lengths(void) {
    static char text[70000];
    unsigned sum = 0;
    memset(text, 'x', sizeof text - 1);
    for (unsigned k = 0; k < SIZES; k++) {
        text[sizes[k] + 64] = 0;
        for (int i = 0; i < 30000; i++) {
            sum += strlen(text + (i & 63));
            __asm__ volatile("" ::: "memory");
        }
        text[sizes[k] + 64] = 'x';
    }
    return sum;
}

/* --- kernel */

static unsigned syscalls(void) {
    for (int i = 0; i < 800000; i++) syscall(SYS_getppid);
    return 0;
}

static unsigned page_faults(void) {
    const size_t len = 8 << 20;
    for (int round = 0; round < 50; round++) {
        char *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) return 1;
        madvise(at, len, MADV_NOHUGEPAGE);
        for (size_t i = 0; i < len; i += 4096) at[i] = 1;
        munmap(at, len);
    }
    return 0;
}

static int wait_for(pid_t child) {
    int status = -1;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static unsigned fork_exec(void) {
    for (int i = 0; i < 400; i++) {
        pid_t child = fork();
        if (child == 0) {
            execl(self, "engine", "nothing", NULL);
            _exit(127);
        }
        if (child < 0 || wait_for(child) != 0) return 1;
    }
    return 0;
}

static unsigned ping_pong(void) {
    int there[2], back[2];
    char byte = 1;
    if (pipe(there) || pipe(back)) return 1;
    pid_t child = fork();
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1) _exit(1);
        _exit(0);
    }
    for (int i = 0; i < 30000; i++)
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1) return 1;
    close(there[1]);
    return wait_for(child);
}

/* --- AVX2 */

__attribute__((target("avx2,fma"))) static unsigned vectors(void) {
    static float a[8192], b[8192];
    for (int i = 0; i < 8192; i++) a[i] = i * 0.5f, b[i] = 8192 - i;
    __m256 sum = _mm256_setzero_ps();
    __m256i bits = _mm256_setzero_si256();
    for (int round = 0; round < 60000; round++)
        for (int i = 0; i < 8192; i += 16) {
            __m256 x = _mm256_loadu_ps(a + i), y = _mm256_loadu_ps(b + i);
            sum = _mm256_fmadd_ps(x, y, sum);
            bits = _mm256_add_epi32(bits, _mm256_castps_si256(_mm256_loadu_ps(a + i + 8)));
            _mm256_storeu_ps(b + i + 8, _mm256_max_ps(x, y));
        }
    return _mm256_extract_epi32(bits, 3) + (unsigned)_mm256_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) static unsigned vector_matmul(void) {
    enum { N = 256 };
    static float a[N][N], b[N][N], c[N][N];
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) a[i][j] = i * j % 17 + 0.5f, b[i][j] = i + j % 13;
    for (int round = 0; round < 30; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j += 32) {
                __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
                for (int k = 0; k < N; k++) {
                    __m256 x = _mm256_broadcast_ss(&a[i][k]);
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) sum[v] = _mm256_fmadd_ps(x, _mm256_loadu_ps(&b[k][j + 8 * v]), sum[v]);
                }
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) _mm256_storeu_ps(&c[i][j + 8 * v], sum[v]);
            }
    return (unsigned)c[17][93];
}

/* --- programs */

static char *const *environment = (char *const[]){"PATH=/usr/bin:/bin", "HOME=/tmp", "PYTHONHASHSEED=0", NULL};
static const char *root;

/// Runs a program without output; its exit status.
static unsigned program(char *const *argv, int rooted) {
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(null, 1);
        if (rooted && (!root || chroot(root) || chdir("/bench"))) _exit(126);
        execve(argv[0], argv, environment);
        _exit(127);
    }
    return wait_for(child);
}

static int make_text(void) {
    FILE *f = fopen("text", "w");
    if (!f) return 1;
    state = 12345;
    for (int line = 0; line < 20000; line++) {
        for (int word = 0; word < 8; word++) fprintf(f, "%x%s ", next_random() % 4096, word & 1 ? "alpha" : "of");
        fputs("\n", f);
    }
    return fclose(f);
}

static int make_tree(void) {
    char name[64];
    mkdir("tree", 0755);
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "tree/d%d", i);
        mkdir(name, 0755);
        for (int k = 0; k < 60; k++) {
            snprintf(name, sizeof name, "tree/d%d/file%d", i, k);
            close(open(name, O_CREAT | O_WRONLY, 0644));
        }
    }
    return 0;
}

#define BUSYBOX "/bin/busybox"

struct row {
    const char *name;
    unsigned (*run)(void);
    int (*prepare)(void);
    /// In the interpreters' root?
    int rooted;
    char *const argv[7];
};

static const struct row rows[] = {
    {"sieve", sieve},
    {"sha256", sha256},
    {"matmul", matmul},
    {"qsort", sort},
    {"tree", tree},
    {"fib", fib},
    {"memcpy", copies},
    {"memset", sets},
    {"strlen", lengths},
    {"syscall", syscalls},
    {"page-fault", page_faults},
    {"fork-exec", fork_exec},
    {"pipe", ping_pong},
    {"avx2", vectors},
    {"avx2-matmul", vector_matmul},
    {"bb-gzip", NULL, make_text, 0, {BUSYBOX, "gzip", "-c", "text"}},
    {"bb-sha256sum", NULL, make_text, 0, {BUSYBOX, "sha256sum", "text", "text", "text", "text", NULL}},
    {"bb-sort", NULL, make_text, 0, {BUSYBOX, "sort", "text"}},
    {"bb-find", NULL, make_tree, 0, {BUSYBOX, "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do busybox find tree -name '*7' -size -1; done"}},
    {"bb-forks", NULL, NULL, 0, {BUSYBOX, "sh", "-c", "i=0; while [ $i -lt 300 ]; do /bin/busybox true; i=$((i+1)); done"}},
    {"sh", NULL, NULL, 0, {BUSYBOX, "sh", "-c", "i=0; s=0; while [ $i -lt 30000 ]; do i=$((i+1)); s=$((s^i)); done"}},
    {"awk", NULL, NULL, 0, {BUSYBOX, "awk", "BEGIN{for(i=0;i<120000;i++){s+=i%7;t[i%100]=t[i%50]+length(s \"x\")};print s,t[3]}"}},
    {"python", NULL, NULL, 1, {"/usr/bin/python3", "mix.py"}},
    {"perl", NULL, NULL, 1, {"/usr/bin/perl", "mix.pl"}},
    {"lua", NULL, NULL, 1, {"/usr/bin/lua5.4", "mix.lua"}},
    {"node-loop", NULL, NULL, 1, {"/usr/bin/node", "mix.js"}},
    {"node-start", NULL, NULL, 1, {"/usr/bin/node", "-e", "0"}},
    {"java-loop", NULL, NULL, 1, {"/usr/bin/java", "-Xmx128m", "-cp", ".", "Mix"}},
    {"java-start", NULL, NULL, 1, {"/usr/bin/java", "-Xmx128m", "-cp", ".", "Mix", "0"}},
};

static void run(const char *name) {
    const struct row *row = rows, *end = rows + sizeof rows / sizeof *rows;
    while (row < end && strcmp(row->name, name)) row++;
    if (row == end) {
        printf("SKIP %s unknown\n", name);
        return;
    }
    if ((row->run == vectors || row->run == vector_matmul) && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) {
        printf("SKIP %s no AVX in this model\n", name);
        return;
    }
    if (row->rooted && !root) {
        printf("SKIP %s no image\n", name);
        return;
    }
    if (row->prepare && row->prepare()) {
        printf("SKIP %s no input: %s\n", name, strerror(errno));
        return;
    }
    state = 12345;
    printf("BEGIN %s\n", name);
    usleep(REST_US);
    double wall = now_ms(), cpu = cpu_ms();
    unsigned status = 0;
    if (row->run)
        sink = row->run();
    else
        status = program(row->argv, row->rooted);
    wall = now_ms() - wall;
    cpu = cpu_ms() - cpu;
    printf("END %s %.3f %.3f %u\n", name, wall, cpu, status);
    usleep(REST_US);
}

/// As PID 1: what programs expect of a system. The row's name.
static const char *begin_machine(void) {
    static char line[4096];
    mkdir("/proc", 0755);
    mkdir("/dev", 0755);
    mkdir("/tmp", 01777);
    mkdir("/root", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    if (mount("/dev/vda", "/root", "erofs", MS_RDONLY, NULL) == 0) {
        mount("proc", "/root/proc", "proc", 0, NULL);
        mount("dev", "/root/dev", "devtmpfs", 0, NULL);
        mount("tmp", "/root/tmp", "tmpfs", 0, NULL);
        root = "/root";
    }
    symlink("/bin/busybox", "/bin/sh");
    chdir("/tmp");
    FILE *f = fopen("/proc/cmdline", "r");
    if (!f || !fgets(line, sizeof line, f)) return "none";
    char *row = strstr(line, "bench.row=");
    if (!row) return "none";
    row += strlen("bench.row=");
    row[strcspn(row, " \n")] = 0;
    return row;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "nothing") == 0) return 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    root = getenv("BENCH_ROOT");
    int machine = getpid() == 1 && !getenv("BENCH_NATIVE");
    if (machine) {
        run(begin_machine());
        sync();
        reboot(RB_AUTOBOOT);
        for (;;) pause();
    }
    if (root) {
        char path[4096];
        snprintf(path, sizeof path, "%s/proc", root);
        mount("proc", path, "proc", 0, NULL);
        snprintf(path, sizeof path, "%s/dev", root);
        mount("/dev", path, NULL, MS_BIND | MS_REC, NULL);
    }
    for (int i = 1; i < argc; i++) run(argv[i]);
    return 0;
}
