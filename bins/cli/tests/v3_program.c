/* Uses what x86-64-v3 has, compiled for it: prints a digest of each part. */
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static uint64_t mix(uint64_t hash, const void *from, size_t len) {
    const unsigned char *bytes = from;
    for (size_t i = 0; i < len; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static float a[64][64], b[64][64], c[64][64];

/* Vectorized and fused by the compiler. */
static void multiply(void) {
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 64; j++) {
            a[i][j] = (float)(i * 7 + j) / 3;
            b[i][j] = (float)(i - j * 5) / 7;
            c[i][j] = 0;
        }
    for (int i = 0; i < 64; i++)
        for (int k = 0; k < 64; k++)
            for (int j = 0; j < 64; j++)
                c[i][j] += a[i][k] * b[k][j];
}

static uint64_t gather(void) {
    static int table[1024];
    for (int i = 0; i < 1024; i++)
        table[i] = i * i;
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 200; i++) {
        __m256i index = _mm256_setr_epi32(i, i + 17, 3 * i, 1023 - i, 512, i ^ 5, 2 * i, 7);
        sum = _mm256_add_epi32(sum, _mm256_i32gather_epi32(table, index, 4));
        __m256i mask = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(100));
        sum = _mm256_xor_si256(sum, _mm256_maskload_epi32(table + i, mask));
    }
    return mix(1, &sum, sizeof sum);
}

static uint64_t bits(void) {
    uint64_t hash = 1;
    for (uint64_t i = 1; i < 2000; i++) {
        uint64_t x = i * 0x9e3779b97f4a7c15u, high;
        uint64_t all[] = {_pdep_u64(x, ~i), _pext_u64(~x, i * 3), _bzhi_u64(x, i & 63),
                          _lzcnt_u64(i),    _tzcnt_u64(i),        _andn_u64(i, x),
                          _blsi_u64(x),     _blsr_u64(x),         _mulx_u64(x, ~x, (void *)&high),
                          high,             __builtin_bswap64(x), x << (i & 63)};
        hash = mix(hash, all, sizeof all);
    }
    return hash;
}

static uint64_t halves(void) {
    uint64_t hash = 1;
    for (int i = 0; i < 500; i++) {
        __m128i half = _mm256_cvtps_ph(_mm256_set1_ps((float)i / 9), 0);
        __m256 back = _mm256_cvtph_ps(half);
        hash = mix(hash, &back, sizeof back);
    }
    return hash;
}

/* The C library picks its AVX2 versions by what CPUID shows. */
static uint64_t strings(void) {
    static char from[9000], to[9000];
    uint64_t hash = 1;
    for (int i = 0; i < 9000; i++)
        from[i] = (char)(1 + i % 250);
    for (size_t len = 0; len < 8000; len += 1 + len / 9) {
        for (size_t at = 0; at < 64; at += 7) {
            memset(to, (int)len, sizeof to);
            memcpy(to + at, from + 64 - at, len);
            memmove(to + at + 3, to + at, len);
            to[at + len + 3] = 0;
            uint64_t all[] = {strlen(to + at), strnlen(to, len), (uint64_t)(memcmp(to, from, len) > 0),
                              (uint64_t)((char *)memchr(to, 0, sizeof to) - to),
                              (uint64_t)(strcmp(to + at, from) > 0)};
            hash = mix(mix(hash, all, sizeof all), to, sizeof to);
        }
    }
    return hash;
}

/* Threads on one CPU: every switch saves and loads what they have in registers. */
static void *spin(void *seed) {
    __m256i sum = _mm256_set1_epi64x((long)seed);
    for (int i = 0; i < 10000000; i++) {
        __m256i rolled = _mm256_or_si256(_mm256_slli_epi64(sum, 5), _mm256_srli_epi64(sum, 59));
        sum = _mm256_add_epi64(rolled, _mm256_set1_epi64x(i));
    }
    return (void *)mix(1, &sum, sizeof sum);
}

int main(void) {
    multiply();
    printf("matrix %016lx\n", mix(1, c, sizeof c));
    printf("gather %016lx\n", gather());
    printf("bits %016lx\n", bits());
    printf("halves %016lx\n", halves());
    printf("strings %016lx\n", strings());
    pthread_t threads[4];
    for (long i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, spin, (void *)i);
    for (int i = 0; i < 4; i++) {
        void *hash;
        pthread_join(threads[i], &hash);
        printf("thread %016lx\n", (uint64_t)hash);
    }
    return 0;
}
