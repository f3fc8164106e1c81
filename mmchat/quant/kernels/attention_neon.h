// The parts of attention.c for ARM: one position fills a NEON register, a lane for each of the
// QUERIES. Included by attention.c, whose names it uses. None of this has been timed.

#ifndef MMCHAT_ATTENTION_NEON_H
#define MMCHAT_ATTENTION_NEON_H

INLINE float32x4_t neon_exp(float32x4_t x) {
    static const float c[] = EXP_COEFFICIENTS;
    // the larger of a NaN and a number is NaN
    float32x4_t t = vmaxq_f32(vdupq_n_f32(LEAST), vmulq_n_f32(x, LOG2E));
    float32x4_t n = vrndnq_f32(t), f = vsubq_f32(t, n), p = vdupq_n_f32(c[0]);
    for (int i = 1; i < 7; i++) p = vfmaq_f32(vdupq_n_f32(c[i]), p, f);
    int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
}

// The 16 elements from d on, in four quarters.
INLINE void neon_load16(const uint8_t *row, int64_t d, const int is_int8, float32x4_t lanes[4]) {
    if (is_int8) {
        int8x16_t bytes = vld1q_s8((const int8_t *)row + d);
        int16x8_t half[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};
        for (int i = 0; i < 2; i++) {
            lanes[2 * i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(half[i])));
            lanes[2 * i + 1] = vcvtq_f32_s32(vmovl_high_s16(half[i]));
        }
    } else {
        for (int i = 0; i < 2; i++) {
            uint16x8_t pairs = vld1q_u16((const uint16_t *)row + d + 8 * i);
            lanes[i] = even_lanes(pairs), lanes[2 + i] = odd_lanes(pairs);
        }
    }
}

INLINE void neon_scores(const float *q, const uint8_t *key, int64_t n, const int64_t D,
                        const int is_int8, float *scores) {
    for (int64_t j = 0; j < n; j++) {
        float32x4_t acc[QUERIES][2];
        for (int r = 0; r < QUERIES; r++) acc[r][0] = acc[r][1] = vdupq_n_f32(0);
        for (int64_t d = 0; d < D; d += 16) {
            float32x4_t lanes[4];
            neon_load16(key + j * row_bytes(D, is_int8), d, is_int8, lanes);
            for (int r = 0; r < QUERIES; r++)
                for (int i = 0; i < 4; i++) {
                    float32x4_t at = vld1q_f32(q + r * D + d + 4 * i);
                    acc[r][i / 2] = vfmaq_f32(acc[r][i / 2], lanes[i], at);
                }
        }
        float32x4_t sum[QUERIES];
        for (int r = 0; r < QUERIES; r++) sum[r] = vaddq_f32(acc[r][0], acc[r][1]);
        vst1q_f32(scores + j * QUERIES,
                  vpaddq_f32(vpaddq_f32(sum[0], sum[1]), vpaddq_f32(sum[2], sum[3])));
    }
}

// The largest score of each query so far; a NaN is none of them, as with fmaxf.
INLINE void neon_most(const float *scores, int64_t n, float *most) {
    float32x4_t found = vld1q_f32(most);
    for (int64_t j = 0; j < n; j++) found = vmaxnmq_f32(found, vld1q_f32(scores + j * QUERIES));
    vst1q_f32(most, found);
}

// scores -> exp(score - zero), 0 where a score is -inf, and their sum for each query
INLINE void neon_shares(float *scores, int64_t n, const float *zero, float *total) {
    float32x4_t from = vld1q_f32(zero), sum = vdupq_n_f32(0);
    for (int64_t j = 0; j < n; j++) {
        float32x4_t score = vld1q_f32(scores + j * QUERIES);
        uint32x4_t unseen = vceqq_f32(score, vdupq_n_f32(-INFINITY));
        uint32x4_t p = vreinterpretq_u32_f32(neon_exp(vsubq_f32(score, from)));
        float32x4_t share = vreinterpretq_f32_u32(vbicq_u32(p, unseen));
        sum = vaddq_f32(sum, share);
        vst1q_f32(scores + j * QUERIES, share);
    }
    vst1q_f32(total, sum);
}

// out = out · shrink + shares · value, 16 elements of each query at a time; p: [n, QUERIES]
INLINE void neon_values(const float *p, const uint8_t *value, int64_t n, const int64_t D,
                        const int is_int8, const float *shrink, State *state) {
    for (int64_t d = 0; d < D; d += 16) {
        float32x4_t acc[QUERIES][4];
        for (int r = 0; r < QUERIES; r++)
            for (int i = 0; i < 4; i++)
                acc[r][i] = vmulq_n_f32(vld1q_f32(state->out[r] + d + 4 * i), shrink[r]);
        for (int64_t j = 0; j < n; j++) {
            float32x4_t lanes[4];
            neon_load16(value + j * row_bytes(D, is_int8), d, is_int8, lanes);
            for (int r = 0; r < QUERIES; r++)
                for (int i = 0; i < 4; i++)
                    acc[r][i] = vfmaq_n_f32(acc[r][i], lanes[i], p[j * QUERIES + r]);
        }
        for (int r = 0; r < QUERIES; r++)
            for (int i = 0; i < 4; i++) vst1q_f32(state->out[r] + d + 4 * i, acc[r][i]);
    }
}

#endif
