# gcc: compiles one program at each level, and what it makes is equal byte by byte; the programs run.
#
# packages: gcc libc6-dev
# memory: 512M
# limit: 60
cd /tmp
cat >program.c <<'C'
#include <complex.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 88172645463325252ull;
static uint64_t next(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}
static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}
static void *worker(void *sum)
{
    for (int i = 0; i < 100000; i++)
        __atomic_fetch_add((uint64_t *)sum, i, __ATOMIC_SEQ_CST);
    return NULL;
}
int main(void)
{
    enum { N = 200000 };
    uint64_t *numbers = malloc(N * sizeof *numbers), hash = 0, sum = 0;
    for (int i = 0; i < N; i++)
        numbers[i] = next();
    qsort(numbers, N, sizeof *numbers, compare);
    for (int i = 0; i < N; i++)
        hash = (hash ^ numbers[i]) * 0x100000001b3;
    double series = 0;
    long double longer = 0;
    for (int i = 1; i < 100000; i++)
        series += sin(i) / i, longer += logl(i) / ((long double)i * i);
    double complex z = 0, c = -0.4 + 0.6 * I;
    int turns = 0;
    while (turns < 1000 && cabs(z) < 2)
        z = z * z + c, turns++;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, worker, &sum);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    jmp_buf mark;
    volatile int jumps = 0;
    if (setjmp(mark) < 5)
        longjmp(mark, ++jumps);
    __int128 wide = (__int128)hash * numbers[7] / 1000003;
    printf("%016lx %.17g %.20Lg %d %lu %d %016lx\n", hash, series, longer, turns, sum, jumps, (uint64_t)wide);
    return 0;
}
C
# $1 level: what gcc makes of the program
made() {
    name=$(echo "$1" | tr -d ' =')
    # shellcheck disable=SC2086 # several options
    gcc $1 -S -o "program$name.s" program.c && echo "$1: $(sha256sum <"program$name.s" | cut -c1-16)"
}
# $1 level: what the program prints
printed() {
    # shellcheck disable=SC2086 # several options
    gcc $1 -o program program.c -lm -pthread && echo "$1 prints $(./program)"
}
made -O2
printed -O2
[ "$1" = quick ] && exit
for level in -O0 -O1 -O3 -Os '-O3 -march=x86-64-v2 -ffast-math' '-O2 -fsanitize=undefined'; do
    made "$level"
done
for level in -O0 -O1 '-O3 -march=x86-64-v2'; do
    printed "$level"
done
