// The CPU-bound workloads of cpu.c and engine.c: user code that allocates little and
// calls no kernel. Each gives a checksum.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static uint32_t state;
static uint32_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static unsigned sieve(void) {
    static unsigned char composite[2000000];
    unsigned primes = 0;
    for (int round = 0; round < 10; round++) {
        memset(composite, 0, sizeof composite);
        primes = 0;
        for (unsigned i = 2; i < sizeof composite; i++) {
            if (composite[i]) continue;
            primes++;
            for (unsigned j = i + i; j < sizeof composite; j += i) composite[j] = 1;
        }
    }
    return primes;
}

static int compare(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static unsigned sort(void) {
    static uint32_t numbers[300000];
    const int count = sizeof numbers / sizeof *numbers;
    unsigned sum = 0;
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < count; i++) numbers[i] = next_random();
        qsort(numbers, count, sizeof *numbers, compare);
        for (int i = 0; i < count; i++) sum = sum * 31 + numbers[i];
    }
    return sum;
}

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

// The shape of SHA-256's compression; the constants are made, not the standard's.
static void compress(uint32_t *h, const unsigned char *block) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t e = v[4], a = v[0];
        uint32_t t = v[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + 0x9e3779b9u * (i + 1) + w[i];
        uint32_t u = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t;
        v[0] = t + u;
    }
    for (int i = 0; i < 8; i++) h[i] += v[i];
}

static unsigned sha256(void) {
    static unsigned char data[65536];
    uint32_t h[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int round = 0; round < 200; round++)
        for (unsigned i = 0; i < sizeof data; i += 64) compress(h, data + i);
    return h[0];
}

static unsigned matmul(void) {
    enum { N = 256 };
    static double a[N][N];
    double sum = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) a[i][j] = (i * j % 17) + 0.5;
    for (int round = 0; round < 4; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                double dot = 0;
                for (int k = 0; k < N; k++) dot += a[i][k] * a[k][j];
                sum += dot;
            }
    return (unsigned)(sum / 1e6);
}

__attribute__((noinline)) static unsigned fibonacci(unsigned n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
static unsigned fib(void) { return fibonacci(36); }

struct node {
    struct node *left, *right;
    uint32_t key;
};

static unsigned tree(void) {
    unsigned sum = 0;
    for (int round = 0; round < 3; round++) {
        struct node *root = NULL;
        for (int i = 0; i < 100000; i++) {
            uint32_t key = next_random();
            struct node **at = &root;
            while (*at) at = key < (*at)->key ? &(*at)->left : &(*at)->right;
            struct node *leaf = calloc(1, sizeof *leaf);
            if (!leaf) abort();
            leaf->key = key;
            *at = leaf;
            sum += key;
        }
    }
    return sum;
}
