// What the products with rounded weights share: rounding activations, and sums of products of bytes.

#ifndef MMCHAT_PRODUCTS_H
#define MMCHAT_PRODUCTS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

#if defined(HAVE_AVX2) && (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))
#define HAVE_VNNI 1
#endif

#if defined(HAVE_VNNI) && defined(__AVX512VNNI__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAVE_AMX 1
#endif

#define BLOCK 64  // activations that share a scale

#define INLINE static inline __attribute__((always_inline))

// Of one token, in blocks of BLOCK with a scale each. split: the even elements of a block come before
// the odd ones. sum: of each `group` of activations, unless that is 0.
INLINE void round_token(const float *x, int64_t K, int64_t group, int split, int8_t *q,
                        float *scale, float *sum) {
    if (group) memset(sum, 0, sizeof(float) * (K / group));
    for (int64_t b = 0; b < K / BLOCK; b++) {
        const float *in = x + b * BLOCK;
        int8_t *out = q + b * BLOCK;
        // of the bits without sign, which order as the sizes do: NaN is the largest and is seen, and
        // rounding 14,336 activations takes 8 us, where a maximum of floats took 26
        uint32_t most = 0;
        for (int i = 0; i < BLOCK; i++) {
            uint32_t bits;
            memcpy(&bits, in + i, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const int finite = most < 0x7f800000;
        float largest;
        memcpy(&largest, &most, 4);
        float step = finite ? largest / 127.0f : NAN;  // NaN or infinite: y is NaN
        float inverse = finite && step >= FLT_MIN ? 127.0f / largest : 0.0f;  // finite too
        int8_t rounded[BLOCK];
        for (int i = 0; i < BLOCK; i++)
            rounded[i] = finite ? (int8_t)(int)nearbyintf(in[i] * inverse) : 1;
        scale[b] = step;
        for (int i = 0; i < BLOCK / 2 && split; i++) {
            out[i] = rounded[2 * i];
            out[BLOCK / 2 + i] = rounded[2 * i + 1];
        }
        if (!split) memcpy(out, rounded, BLOCK);
        const int64_t each = group < BLOCK ? group : BLOCK;
        for (int64_t from = 0; from < BLOCK && group; from += each) {
            int total = 0;
            for (int64_t i = 0; i < each; i++) total += rounded[from + i];
            sum[(b * BLOCK + from) / group] += step * (float)total;
        }
    }
}

#ifdef HAVE_AVX2
INLINE float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE __m256 widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

INLINE __m256 bf16_lanes(const uint16_t *bits) {
    return widen_bf16(_mm_loadu_si128((const __m128i *)bits));
}

// a: unsigned, b: signed; sums of four neighbouring products, added to c. With plain AVX2 two products
// must fit int16 together, which |b| <= 127 and a <= 127 ensure, or else panels.h.
INLINE __m256i dot4(__m256i c, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(c, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(c, a, b);
#else
    __m256i pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// Of int16: sums of two neighbouring products, added to c.
INLINE __m256i dot2(__m256i c, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(c, a, b);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(c, a, b);
#else
    return _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
#endif
}

// Likewise for a of 15 at most. Eight additions may follow each other; levels_sum then has the sums
// of four, which without VNNI were two halves of int16.
INLINE __m256i add_levels(__m256i c, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return dot4(c, a, b);
#else
    return _mm256_add_epi16(c, _mm256_maddubs_epi16(a, b));
#endif
}

INLINE __m256i levels_sum(__m256i c) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    return c;
#else
    return _mm256_madd_epi16(c, _mm256_set1_epi16(1));
#endif
}

// Additions stay in order. Compilers make trees of them, for which there are too few registers.
#define KEEP(v) __asm__("" : "+x"(v))

INLINE __m256i repeated(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
#endif

#endif
