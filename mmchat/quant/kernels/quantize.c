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

typedef struct {
    float levels[128];     // 0..15
    uint16_t scale, zero;  // bfloat16
    float error;           // squared
} Fit;

// Round a group to w = low + level · step, then fit scale and zero to the levels.
INLINE void fit(const float *w, const int group, float low, float step, Fit *out) {
    float inverse = step >= FLT_MIN ? 1.0f / step : 0, sum_q = 0, sum_w = 0, sum_qq = 0, sum_qw = 0;
    float *levels = out->levels;
#pragma omp simd reduction(+ : sum_q, sum_w, sum_qq, sum_qw)
    for (int i = 0; i < group; i++) {
        float level = (w[i] - low) * inverse;
        level = level > 0.0f ? level : 0.0f;  // NaN is not
        level = level < 15.0f ? level : 15.0f;
        level = rintf(level);
        levels[i] = level;
        float q = level - 8.0f;
        sum_q += q;
        sum_w += w[i];
        sum_qq += q * q;
        sum_qw += q * w[i];
    }
    float spread = sum_qq - sum_q * sum_q / group;
    float best = spread > 0 ? (sum_qw - sum_q * sum_w / group) / spread : step;
    out->scale = to_bf16(best);
    best = bf16_to_float(out->scale);
    out->zero = to_bf16((sum_w - best * sum_q) / group);
    float offset = bf16_to_float(out->zero), error = 0;
#pragma omp simd reduction(+ : error)
    for (int i = 0; i < group; i++) {
        float off = w[i] - (levels[i] - 8.0f) * best - offset;
        error += off * off;
    }
    out->error = error;
}

INLINE void quantize_group(const float *w, const int group, uint8_t *q, uint16_t *scale,
                           uint16_t *zero) {
    float low = w[0], high = w[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int i = 0; i < group; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    Fit fits[2], *kept = &fits[0], *tried = &fits[1];
    fit(w, group, low, (high - low) / 15.0f, kept);
    for (int r = 1; r < RANGES + REFITS; r++) {
        if (r < RANGES) {
            float cut = r * NARROWER * (high - low) / 2;
            fit(w, group, low + cut, (high - low - 2 * cut) / 15.0f, tried);
        } else {
            float step = bf16_to_float(kept->scale);
            fit(w, group, bf16_to_float(kept->zero) - 8.0f * step, step, tried);
        }
        if (tried->error < kept->error) {
            Fit *worse = kept;
            kept = tried, tried = worse;
        }
    }
    for (int i = 0; i < group / 2; i++)
        q[i] = (uint8_t)((uint8_t)kept->levels[2 * i] | (uint8_t)kept->levels[2 * i + 1] << 4);
    *scale = kept->scale, *zero = kept->zero;
}

// w: float [rows, K] -> q: uint8 [rows, K/2], scale, zero: bfloat16 [rows, K/group]
void mmchat_quantize_int4(const float *w, uint8_t *q, uint16_t *scale, uint16_t *zero,
                          int64_t rows, int64_t K, int64_t group, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < rows * K / group; g++) {
        const float *in = w + g * group;
        uint8_t *out = q + g * group / 2;
        if (group == 32) quantize_group(in, 32, out, scale + g, zero + g);
        if (group == 64) quantize_group(in, 64, out, scale + g, zero + g);
        if (group == 128) quantize_group(in, 128, out, scale + g, zero + g);
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
