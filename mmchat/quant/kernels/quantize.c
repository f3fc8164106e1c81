// Rounding weights to int8 and int4, and widening them back.
//
// The formats are those of linear.c. For int4 each group tries several ranges: the whole one loses
// precision to the outliers, a narrower one clips them. For each, the scale and the zero are then
// fitted to the rounded values by least squares, rounded to bfloat16, and the range with the
// smallest squared error is kept.
//
// A step below FLT_MIN has no finite inverse; what it would tell apart is rounded to one level.
// NaN or infinity among the weights that share a scale makes that scale or zero NaN or infinite, and
// so what is computed with it; no whole number is ever made of either.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "bfloat16.h"

#define RANGES 8          // the whole range and narrower ones
#define NARROWER 0.05f    // each of them is this share of the range smaller
#define REFITS 3          // rounds of rounding again to what was fitted

#define INLINE static inline __attribute__((always_inline))

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN, which rounding may carry to zero
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// w: float [rows, K] -> q: int8 [rows, K], scale: float [rows]
void mmchat_quantize_int8(const float *w, int8_t *q, float *scale, int64_t rows, int64_t K,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n++) {
        const float *in = w + n * K;
        uint32_t most = 0;  // of the bits without sign, which order as the sizes do
#pragma omp simd reduction(max : most)
        for (int64_t k = 0; k < K; k++) {
            uint32_t bits;
            memcpy(&bits, in + k, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        const int finite = most < 0x7f800000;
        float largest;
        memcpy(&largest, &most, 4);
        float step = largest / 127.0f, inverse = step >= FLT_MIN ? 127.0f / largest : 0;
        scale[n] = step;
        for (int64_t k = 0; k < K; k++)
            q[n * K + k] = finite ? (int8_t)nearbyintf(in[k] * inverse) : 0;
    }
}

// Groups that are fitted side by side, a lane of a register each
#if defined(__AVX512F__)
#define GROUPS 16
#elif defined(__AVX2__)
#define GROUPS 8
#else
#define GROUPS 4
#endif

typedef float Each __attribute__((vector_size(4 * GROUPS)));  // a number of each group
typedef int32_t Which __attribute__((vector_size(4 * GROUPS)));

INLINE Each where(Which which, Each then, Each otherwise) {
    return (Each)((which & (Which)then) | (~which & (Which)otherwise));
}

INLINE Each in_bf16(Each value) {
    for (int g = 0; g < GROUPS; g++) value[g] = bf16_to_float(to_bf16(value[g]));
    return value;
}

// 0..15
INLINE Each levels_of(Each w, Each low, Each inverse) {
    const float whole = 12582912.0f;  // 1.5 · 2^23: a float of that size has no fraction
    const Each none = {0}, most = none + 15.0f;
    Each level = (w - low) * inverse;
#ifdef __AVX512F__
    level = (Each)_mm512_min_ps(_mm512_max_ps((__m512)level, (__m512)none), (__m512)most);
#elif defined(__AVX2__)
    level = (Each)_mm256_min_ps(_mm256_max_ps((__m256)level, (__m256)none), (__m256)most);
#else
    level = (Each)((level > none) & (Which)level);  // NaN is not
    level = where(level < most, level, most);
#endif
    return (level + whole) - whole;
}

typedef struct {
    Each low, inverse, scale, zero, error;  // error: squared; scale and zero are of bfloat16
} Fit;

// Round to w = low + level · step, then fit scale and zero to the levels. w: [group]
INLINE Fit fit(const Each *w, const int group, Each sum_w, Each low, Each step) {
    const Each none = {0};
    const Each inverse = where(step >= FLT_MIN, 1.0f / step, none);
    Each levels[128], sum_q = none, sum_qq = none, sum_qw = none, error = none;
#pragma GCC unroll 4
    for (int i = 0; i < group; i++) {
        const Each q = levels[i] = levels_of(w[i], low, inverse) - 8.0f;
        sum_q += q;
        sum_qq += q * q;
        sum_qw += q * w[i];
    }
    const Each spread = sum_qq - sum_q * sum_q / (float)group;
    const Each best = (sum_qw - sum_q * sum_w / (float)group) / spread;
    const Each scale = in_bf16(where(spread > none, best, step));
    const Each zero = in_bf16((sum_w - scale * sum_q) / (float)group);
#pragma GCC unroll 4
    for (int i = 0; i < group; i++) {
        const Each off = w[i] - levels[i] * scale - zero;
        error += off * off;
    }
    return (Fit){low, inverse, scale, zero, error};
}

// Keep of each group the better fit; whether any has become better.
INLINE int keep_better(Fit *kept, const Fit *tried) {
    const Which better = tried->error < kept->error;
    int any = 0;
    for (int g = 0; g < GROUPS; g++) any |= better[g];
    kept->low = where(better, tried->low, kept->low);
    kept->inverse = where(better, tried->inverse, kept->inverse);
    kept->scale = where(better, tried->scale, kept->scale);
    kept->zero = where(better, tried->zero, kept->zero);
    kept->error = where(better, tried->error, kept->error);
    return any;
}

INLINE Fit best_fit(const Each *w, const int group) {
    Each low = w[0], high = w[0], sum = {0};
    for (int i = 0; i < group; i++) {
        low = where(w[i] < low, w[i], low);
        high = where(w[i] > high, w[i], high);
        sum += w[i];
    }
    Fit kept = fit(w, group, sum, low, (high - low) / 15.0f);
    for (int r = 1; r < RANGES; r++) {
        const Each cut = (float)r * NARROWER * (high - low) / 2.0f;
        const Fit tried = fit(w, group, sum, low + cut, (high - low - 2.0f * cut) / 15.0f);
        keep_better(&kept, &tried);
    }
    for (int r = 0; r < REFITS; r++) {
        const Fit tried = fit(w, group, sum, kept.zero - 8.0f * kept.scale, kept.scale);
        if (!keep_better(&kept, &tried)) break;  // the next would be the same
    }
    return kept;
}

// The groups from `first` on, of `count`; lanes beyond the last one have it again.
INLINE void quantize_groups(const float *from, const int group, uint8_t *q, uint16_t *scale,
                            uint16_t *zero, int64_t first, int64_t count) {
    Each w[128];
    int64_t at[GROUPS];
    uint8_t levels[GROUPS][128];
    for (int g = 0; g < GROUPS; g++) {
        at[g] = first + g < count ? first + g : count - 1;
        for (int i = 0; i < group; i++) ((float *)w)[GROUPS * i + g] = from[at[g] * group + i];
    }
    const Fit kept = best_fit(w, group);
    for (int i = 0; i < group; i++) {
        const Which level = __builtin_convertvector(levels_of(w[i], kept.low, kept.inverse), Which);
        for (int g = 0; g < GROUPS; g++) levels[g][i] = (uint8_t)level[g];
    }
    for (int g = 0; g < GROUPS; g++) {
        const uint8_t *in = levels[g];
        uint8_t *to = q + at[g] * group / 2;
        for (int i = 0; i < group / 2; i++) to[i] = (uint8_t)(in[2 * i] | in[2 * i + 1] << 4);
        scale[at[g]] = to_bf16(kept.scale[g]), zero[at[g]] = to_bf16(kept.zero[g]);
    }
}

// w: float [rows, K] -> q: uint8 [rows, K/2], scale, zero: bfloat16 [rows, K/group]
void mmchat_quantize_int4(const float *w, uint8_t *q, uint16_t *scale, uint16_t *zero,
                          int64_t rows, int64_t K, int64_t group, int threads) {
    const int64_t count = rows * K / group;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < count; g += GROUPS) {
        if (group == 32) quantize_groups(w, 32, q, scale, zero, g, count);
        if (group == 64) quantize_groups(w, 64, q, scale, zero, g, count);
        if (group == 128) quantize_groups(w, 128, q, scale, zero, g, count);
    }
}

// Weights as bfloat16 [rows, K], for a matrix product of many tokens.

void mmchat_widen_int8(const int8_t *q, const float *scale, uint16_t *w, int64_t rows, int64_t K,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n++)
        for (int64_t k = 0; k < K; k++) w[n * K + k] = to_bf16((float)q[n * K + k] * scale[n]);
}

INLINE void widen_group(const uint8_t *q, uint16_t scale, uint16_t zero, uint16_t *w,
                        int64_t group) {
    float s = bf16_to_float(scale), z = bf16_to_float(zero);
    for (int64_t i = 0; i < group / 2; i++) {
        w[2 * i] = to_bf16((float)((q[i] & 15) - 8) * s + z);
        w[2 * i + 1] = to_bf16((float)((q[i] >> 4) - 8) * s + z);
    }
}

void mmchat_widen_int4(const uint8_t *q, const uint16_t *scale, const uint16_t *zero, uint16_t *w,
                       int64_t rows, int64_t K, int64_t group, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < rows * K / group; g++)
        widen_group(q + g * group / 2, scale[g], zero[g], w + g * group, group);
}

// q: packed, as linear.c has it; rows are a multiple of 8.
void mmchat_widen_packed_int4(const uint8_t *q, uint16_t *w, int64_t rows, int64_t K,
                              int64_t group, int threads) {
    const int64_t groups = K / group;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < rows; n += 8)
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *in = q + (n / 8 * groups + g) * (32 + 4 * group);
            for (int r = 0; r < 8; r++) {
                uint8_t row[64];
                uint16_t scale, zero;
                memcpy(&scale, in + 2 * r, 2), memcpy(&zero, in + 16 + 2 * r, 2);
                for (int64_t i = 0; i < group / 8; i++)
                    memcpy(row + 4 * i, in + 32 + 32 * i + 4 * r, 4);
                widen_group(row, scale, zero, w + (n + r) * K + g * group, group);
            }
        }
}
