// The VNNI instructions that the kernels use, in plain C, for processors that lack them.
//
// Compile with -mavx2 -mfma -include of this file, and -DEMULATE_AVX512_VNNI or -DEMULATE_AVX_VNNI.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// VPDPBUSD (Intel SDM, volume 2): unsigned bytes of a times signed bytes of b, four neighbouring
// products added to c without saturation, not even in between.
static inline __m256i emulated_dpbusd(__m256i c, __m256i a, __m256i b) {
    uint32_t sums[8];
    uint8_t left[32];
    int8_t right[32];
    memcpy(sums, &c, 32), memcpy(left, &a, 32), memcpy(right, &b, 32);
    for (int i = 0; i < 32; i++) sums[i / 4] += (uint32_t)((int)left[i] * right[i]);
    memcpy(&c, sums, 32);
    return c;
}

// VPDPWSSD: signed words, two neighbouring products added to c without saturation.
static inline __m256i emulated_dpwssd(__m256i c, __m256i a, __m256i b) {
    uint32_t sums[8];
    int16_t left[16], right[16];
    memcpy(sums, &c, 32), memcpy(left, &a, 32), memcpy(right, &b, 32);
    for (int i = 0; i < 16; i++) sums[i / 2] += (uint32_t)((int)left[i] * right[i]);
    memcpy(&c, sums, 32);
    return c;
}

// VPDPBUSD of 64 bytes. The type is there without the instructions.
static inline __m512i emulated_wide_dpbusd(__m512i c, __m512i a, __m512i b) {
    __m256i sums[2], left[2], right[2];
    memcpy(sums, &c, 64), memcpy(left, &a, 64), memcpy(right, &b, 64);
    for (int i = 0; i < 2; i++) sums[i] = emulated_dpbusd(sums[i], left[i], right[i]);
    memcpy(&c, sums, 64);
    return c;
}

// The macros come after immintrin.h, which would take them for permission to use the instructions.
#undef __AVX512VNNI__
#undef __AVX512VL__
#undef __AVXVNNI__
#undef _mm256_dpbusd_epi32
#undef _mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_epi32
#undef _mm256_dpwssd_avx_epi32
#ifdef EMULATE_AVX512_VNNI
#define __AVX512VNNI__ 1
#define __AVX512VL__ 1
#define _mm256_dpbusd_epi32 emulated_dpbusd
#define _mm512_dpbusd_epi32 emulated_wide_dpbusd
#define _mm256_dpwssd_epi32 emulated_dpwssd
#endif
#ifdef EMULATE_AVX_VNNI
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
#endif
