// The tiles of linear.c for ARM, with plain NEON and, where the compiler may use them, its dot
// products (dotprod) and its products of 2 by 2 (i8mm). Included by linear.c, whose names it uses.
//
// Products of whole numbers come to the same sums with each. bfloat16 weights meet float
// activations: the bfloat16 instructions would round the activations as well. Nothing is asked for
// ahead here, and no size was tuned: none of this has been timed on an ARM processor.

#ifndef MMCHAT_LINEAR_NEON_H
#define MMCHAT_LINEAR_NEON_H

// Four sums of products of bytes, added to c. Without dotprod two products must fit int16, which
// -128 <= a <= 127 and |b| <= 127 ensure.
INLINE int32x4_t neon_dot(int32x4_t c, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(c, a, b);
#else
    int16x8_t pairs = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(c, vmlal_s8(pairs, vget_high_s8(a), vget_high_s8(b)));
#endif
}

#ifdef __ARM_FEATURE_MATMUL_INT8
// 16 bytes of two rows against 16 of two tokens, added to the lanes of c: row 0 with token 0 and 1,
// then row 1 with them.
INLINE int32x4_t neon_two_by_two(int32x4_t c, int8x16_t row0, int8x16_t row1, int8x16_t token0,
                                 int8x16_t token1) {
    int64x2_t a0 = vreinterpretq_s64_s8(row0), a1 = vreinterpretq_s64_s8(row1);
    int64x2_t b0 = vreinterpretq_s64_s8(token0), b1 = vreinterpretq_s64_s8(token1);
    c = vmmlaq_s32(c, vreinterpretq_s8_s64(vzip1q_s64(a0, a1)),
                   vreinterpretq_s8_s64(vzip1q_s64(b0, b1)));
    return vmmlaq_s32(c, vreinterpretq_s8_s64(vzip2q_s64(a0, a1)),
                      vreinterpretq_s8_s64(vzip2q_s64(b0, b1)));
}

INLINE float32x4_t neon_four(float a, float b, float c, float d) {
    const float lanes[4] = {a, b, c, d};
    return vld1q_f32(lanes);
}
#endif

INLINE void neon_int8_tile(const int rows, const int tokens, int64_t apart, const int8_t *w,
                           const float *wscale, const int8_t *q, const float *xscale, float *y,
                           int64_t N, int64_t K) {
    const int64_t blocks = K / BLOCK;
#ifdef __ARM_FEATURE_MATMUL_INT8
    if (rows % 2 == 0 && tokens % 2 == 0) {
        float32x4_t acc[ROWS / 2][TOKENS / 2];
        for (int r = 0; r < rows / 2; r++)
            for (int t = 0; t < tokens / 2; t++) acc[r][t] = vdupq_n_f32(0);
        for (int64_t b = 0; b < blocks; b++)
            for (int r = 0; r < rows / 2; r++) {
                const int8_t *w0 = w + 2 * r * apart * K + b * BLOCK, *w1 = w0 + apart * K;
                for (int t = 0; t < tokens / 2; t++) {
                    const int8_t *x0 = q + 2 * t * K + b * BLOCK, *x1 = x0 + K;
                    int32x4_t dot = vdupq_n_s32(0);
                    for (int i = 0; i < BLOCK; i += 16)
                        dot = neon_two_by_two(dot, vld1q_s8(w0 + i), vld1q_s8(w1 + i),
                                              vld1q_s8(x0 + i), vld1q_s8(x1 + i));
                    const float *s0 = xscale + 2 * t * blocks + b, *s1 = s0 + blocks;
                    acc[r][t] = vfmaq_f32(acc[r][t], vcvtq_f32_s32(dot),
                                          neon_four(*s0, *s1, *s0, *s1));
                }
            }
        for (int r = 0; r < rows / 2; r++)
            for (int t = 0; t < tokens / 2; t++) {
                float *at = y + 2 * t * N + 2 * r * apart;
                const float s0 = wscale[2 * r * apart], s1 = wscale[(2 * r + 1) * apart];
                at[0] = vgetq_lane_f32(acc[r][t], 0) * s0;
                at[N] = vgetq_lane_f32(acc[r][t], 1) * s0;
                at[apart] = vgetq_lane_f32(acc[r][t], 2) * s1;
                at[N + apart] = vgetq_lane_f32(acc[r][t], 3) * s1;
            }
        return;
    }
#endif
    float32x4_t acc[ROWS][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = vdupq_n_f32(0);
    for (int64_t b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) {
            const int8_t *at = w + r * apart * K + b * BLOCK;
            for (int t = 0; t < tokens; t++) {
                const int8_t *x = q + t * K + b * BLOCK;
                int32x4_t dot = vdupq_n_s32(0);
                for (int i = 0; i < BLOCK; i += 16)
                    dot = neon_dot(dot, vld1q_s8(at + i), vld1q_s8(x + i));
                acc[r][t] = vfmaq_n_f32(acc[r][t], vcvtq_f32_s32(dot), xscale[t * blocks + b]);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            y[t * N + r * apart] = vaddvq_f32(acc[r][t]) * wscale[r * apart];
}

// The first groups of int4_steps, four at a time; *done: how many.
INLINE float neon_int4_steps(const int group, const uint16_t *scale, const uint16_t *zero,
                             const float *xscale, const float *sum, float *steps, int64_t groups,
                             int64_t *done) {
    float32x4_t offsets = vdupq_n_f32(0);
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) {
        float32x4_t s = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(scale + g), 16));
        float32x4_t z = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(zero + g), 16));
        offsets = vfmaq_f32(offsets, vfmsq_n_f32(z, s, 8), vld1q_f32(sum + g));
        if (group == 32) {
            float32x2_t x = vld1_f32(xscale + g / 2);
            s = vmulq_f32(s, vcombine_f32(vdup_lane_f32(x, 0), vdup_lane_f32(x, 1)));
        } else if (group == 64) {
            s = vmulq_f32(s, vld1q_f32(xscale + g));
        }
        vst1q_f32(steps + g, s);
    }
    *done = g;
    return vaddvq_f32(offsets);
}

// The scale of 32 elements, the first of which is `at`, of one row and one token.
INLINE float neon_int4_step(const int group, const float *steps, const float *xscale, int64_t at) {
    const float step = steps[at / group];
    return group == 128 ? step * xscale[at / BLOCK] : step;
}

// Without the offsets of the groups. 16 bytes hold 32 elements, which share a scale.
INLINE void neon_int4_tile(const int rows, const int tokens, int64_t apart, const int group,
                           const uint8_t *w, const int8_t *q, const float *xscale,
                           const float *steps, float (*offset)[TOKENS], float *y, int64_t N,
                           int64_t K) {
    const int64_t blocks = K / BLOCK, groups = K / group;
    const int together = group == 32 ? 1 : 2;  // halves of a block whose sums are one
    const uint8x16_t low = vdupq_n_u8(0x0f);
#ifdef __ARM_FEATURE_MATMUL_INT8
    if (rows == 2 && tokens % 2 == 0) {
        float32x4_t acc[TOKENS / 2];
        for (int t = 0; t < tokens / 2; t++) acc[t] = vdupq_n_f32(0);
        for (int64_t k = 0; k < K; k += 32 * together)
            for (int t = 0; t < tokens / 2; t++) {
                int32x4_t dot = vdupq_n_s32(0);
                for (int half = 0; half < together; half++) {
                    const int64_t from = k + 32 * half;
                    uint8x16_t w0 = vld1q_u8(w + from / 2), w1 = vld1q_u8(w + (apart * K + from) / 2);
                    const int8_t *x0 = q + 2 * t * K + from / BLOCK * BLOCK + from % BLOCK / 2;
                    const int8_t *x1 = x0 + K;
                    dot = neon_two_by_two(dot, vreinterpretq_s8_u8(vandq_u8(w0, low)),
                                          vreinterpretq_s8_u8(vandq_u8(w1, low)), vld1q_s8(x0),
                                          vld1q_s8(x1));
                    dot = neon_two_by_two(dot, vreinterpretq_s8_u8(vshrq_n_u8(w0, 4)),
                                          vreinterpretq_s8_u8(vshrq_n_u8(w1, 4)),
                                          vld1q_s8(x0 + BLOCK / 2), vld1q_s8(x1 + BLOCK / 2));
                }
                float step[2][2];
                for (int r = 0; r < 2; r++)
                    for (int i = 0; i < 2; i++)
                        step[r][i] = neon_int4_step(group,
                                                    steps + (r * tokens + 2 * t + i) * groups,
                                                    xscale + (2 * t + i) * blocks, k);
                acc[t] = vfmaq_f32(acc[t], vcvtq_f32_s32(dot),
                                   neon_four(step[0][0], step[0][1], step[1][0], step[1][1]));
            }
        for (int t = 0; t < tokens / 2; t++) {
            float *at = y + 2 * t * N;
            at[0] = vgetq_lane_f32(acc[t], 0) + offset[0][2 * t];
            at[N] = vgetq_lane_f32(acc[t], 1) + offset[0][2 * t + 1];
            at[apart] = vgetq_lane_f32(acc[t], 2) + offset[1][2 * t];
            at[N + apart] = vgetq_lane_f32(acc[t], 3) + offset[1][2 * t + 1];
        }
        return;
    }
#endif
    float32x4_t acc[ROWS_INT4][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = vdupq_n_f32(0);
    for (int64_t k = 0; k < K; k += 32 * together)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++) {
                int32x4_t dot = vdupq_n_s32(0);
                for (int half = 0; half < together; half++) {
                    const int64_t from = k + 32 * half;
                    uint8x16_t both = vld1q_u8(w + (r * apart * K + from) / 2);
                    const int8_t *x = q + t * K + from / BLOCK * BLOCK + from % BLOCK / 2;
                    dot = neon_dot(dot, vreinterpretq_s8_u8(vandq_u8(both, low)), vld1q_s8(x));
                    dot = neon_dot(dot, vreinterpretq_s8_u8(vshrq_n_u8(both, 4)),
                                   vld1q_s8(x + BLOCK / 2));
                }
                acc[r][t] = vfmaq_n_f32(acc[r][t], vcvtq_f32_s32(dot),
                                        neon_int4_step(group, steps + (r * tokens + t) * groups,
                                                       xscale + t * blocks, k));
            }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            y[t * N + r * apart] = vaddvq_f32(acc[r][t]) + offset[r][t];
}

// Even and odd elements have sums of their own, which hides how long an addition takes.
INLINE void neon_bf16_tile(const int rows, const int tokens, int64_t apart, const uint16_t *w,
                           const float *x, float *y, int64_t N, int64_t K) {
    float32x4_t acc[ROWS][TOKENS][2];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t][0] = acc[r][t][1] = vdupq_n_f32(0);
    for (int64_t k = 0; k < K; k += 16)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 8; i += 4) {
                uint16x8_t pairs = vld1q_u16(w + r * apart * K + k + 2 * i);
                float32x4_t even = even_lanes(pairs), odd = odd_lanes(pairs);
                for (int t = 0; t < tokens; t++) {
                    const float *at = x + t * K + k + i;
                    acc[r][t][0] = vfmaq_f32(acc[r][t][0], even, vld1q_f32(at));
                    acc[r][t][1] = vfmaq_f32(acc[r][t][1], odd, vld1q_f32(at + 8));
                }
            }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            y[t * N + r * apart] = vaddvq_f32(vaddq_f32(acc[r][t][0], acc[r][t][1]));
}

#endif
