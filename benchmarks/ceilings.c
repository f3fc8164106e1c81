// What one core can do at best: products of 8-bit numbers, operands in the nearest cache.
#include <stdint.h>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
typedef __m512i Vector;
#define DOT(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#define REGISTER "v"
#elif defined(__AVXVNNI__)
#include <immintrin.h>
typedef __m256i Vector;
#define DOT(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#define REGISTER "x"
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i Vector;
#define DOT(sum, a, b) \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
#define REGISTER "x"
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
typedef int32x4_t Vector;
#define DOT(sum, a, b) vdotq_s32(sum, (int8x16_t)(a), (int8x16_t)(b))
#define REGISTER "w"
#else
#error "no instructions for 8-bit products are known here"
#endif
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define KEEP(x) __asm__ volatile("" : "+" REGISTER(x));
#define BEGIN(i) Vector sum##i = memory[i];
#define ADD(i) sum##i = DOT(sum##i, a, memory[i]); KEEP(sum##i)

Vector memory[12];  // not static: the compiler must not know that these are zeros

// Multiply and add `count` times, into enough sums to hide how long one takes. Returns the
// operations: a product and an addition for each pair of numbers.
double dots(long count) {
    Vector a = memory[0];
    EACH(BEGIN)
    for (long n = 0; n < count; n++) {
        KEEP(a)
        EACH(ADD)
    }
    return 2.0 * sizeof(Vector) * 12 * count;
}
