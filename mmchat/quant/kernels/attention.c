// softmax(query · keyᵀ) · value for the next token, whose keys and values stream from memory once.
//
//   query       float    [B, G, R, D], scaled: R query heads share a key head
//   key, value  [B, G, N, D] of bfloat16, or of int8 with a float scale behind each D; the N lie
//               side by side, heads and batches where the strides say, in bytes;
//               mmchat_attend_rows: N differs from row to row
//   mask        uint8_t  [B, N] by its stride, 0 for what may not be seen; or NULL
//   out         float    [B, G, R, D]; zeros where nothing may be seen
//
// D is a multiple of 16, at most LARGEST_HEAD. The positions are cut into spans, the same for any
// number of threads, each with a softmax of its own (Dao et al. 2022); then the spans are joined.
// bfloat16 sits in pairs, so queries are split into even and odd elements once, as in linear.c.
// Scales of int8 are no part of the sums: those of keys multiply scores, those of values weights.

#include <stdlib.h>

#include "bfloat16.h"
#include "products.h"

// BLOCK of products.h: positions whose scores are held at once
#define SPAN 512          // positions of one task
#define LARGEST16 32767.0f
#define QUERIES 4         // queries that share one read of a key
#define LARGEST_HEAD 256

typedef struct {
    float most[QUERIES], total[QUERIES];  // of the scores so far: the largest, the sum of exp
    float out[QUERIES][LARGEST_HEAD];     // not divided by the total yet; in the order of `place`
} State;

// Queries beside keys in int8. Where integers are multiplied they have 16 bits: so little is lost
// that sums, which are exact, are as good as of floats.
typedef struct {
    int16_t q[QUERIES * LARGEST_HEAD];
    float step[QUERIES];
} Rounded;

// Bytes of one key or value.
INLINE int64_t row_bytes(int64_t D, const int is_int8) {
    return is_int8 ? D + (int64_t)sizeof(float) : 2 * D;
}

// Which of 16 elements is the i-th of the first or second half that is held.
INLINE int place(int half, int i, const int is_int8) {
    return is_int8 ? 8 * half + i : 2 * i + half;
}

INLINE float element(const uint8_t *row, int64_t d, const int is_int8) {
    return is_int8 ? ((const int8_t *)row)[d] : bf16_to_float(((const uint16_t *)row)[d]);
}

// exp(x) for x <= 0 by 2^n · 2^f: a Taylor polynomial for |f| <= 1/2, off by 2e-7 of the value.
#define EXP_COEFFICIENTS                                                                           \
    { 1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1 }
#define LOG2E 1.44269504f
#define LEAST -126.0f     // of the exponent of 2; what is smaller is taken for it

#ifdef HAVE_NEON
#include "attention_neon.h"
#endif

#ifdef HAVE_AVX2
INLINE __m256 exp_lanes(__m256 x) {
    static const float c[] = EXP_COEFFICIENTS;
    // with a NaN the second operand is the result
    __m256 t = _mm256_max_ps(_mm256_set1_ps(LEAST), _mm256_mul_ps(x, _mm256_set1_ps(LOG2E)));
    __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 f = _mm256_sub_ps(t, n), p = _mm256_set1_ps(c[0]);
    for (int i = 1; i < 7; i++) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

// Lets bytes come into the cache that are needed soon.
INLINE void ask_for(const uint8_t *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        _mm_prefetch((const char *)from + at, _MM_HINT_T0);
}

INLINE __m256 even_lanes(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}

INLINE __m256 odd_lanes(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}

// Scores of two positions: lanes 0..3 are the queries at the first, 4..7 at the second.
INLINE __m256 two_scores(const float *q, const uint16_t *key, const int64_t D) {
    __m256 acc[2][QUERIES];
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < QUERIES; r++) acc[i][r] = _mm256_setzero_ps();
    for (int64_t d = 0; d < D; d += 16)
        for (int i = 0; i < 2; i++) {
            __m256i pairs = _mm256_loadu_si256((const __m256i *)(key + i * D + d));
            __m256 even = even_lanes(pairs), odd = odd_lanes(pairs);
            for (int r = 0; r < QUERIES; r++) {
                acc[i][r] = _mm256_fmadd_ps(even, _mm256_loadu_ps(q + r * D + d), acc[i][r]);
                acc[i][r] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(q + r * D + d + 8), acc[i][r]);
            }
        }
    __m256 sums[2];
    for (int i = 0; i < 2; i++)
        sums[i] = _mm256_hadd_ps(_mm256_hadd_ps(acc[i][0], acc[i][1]),
                                 _mm256_hadd_ps(acc[i][2], acc[i][3]));
    return _mm256_add_ps(_mm256_permute2f128_ps(sums[0], sums[1], 0x20),
                         _mm256_permute2f128_ps(sums[0], sums[1], 0x31));
}

// out += probabilities · value for 16 elements of each query; p: [n, QUERIES]
INLINE void add_values(const float *p, const uint16_t *value, int64_t n, int64_t D,
                       const float *shrink, State *state, int64_t d) {
    __m256 acc[QUERIES][2];
    for (int r = 0; r < QUERIES; r++)
        for (int i = 0; i < 2; i++)
            acc[r][i] = _mm256_mul_ps(_mm256_loadu_ps(state->out[r] + d + 8 * i),
                                      _mm256_broadcast_ss(shrink + r));
    for (int64_t j = 0; j < n; j++) {
        __m256i pairs = _mm256_loadu_si256((const __m256i *)(value + j * D + d));
        __m256 even = even_lanes(pairs), odd = odd_lanes(pairs);
        for (int r = 0; r < QUERIES; r++) {
            __m256 share = _mm256_broadcast_ss(p + j * QUERIES + r);
            acc[r][0] = _mm256_fmadd_ps(share, even, acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(share, odd, acc[r][1]);
        }
    }
    for (int r = 0; r < QUERIES; r++)
        for (int i = 0; i < 2; i++) _mm256_storeu_ps(state->out[r] + d + 8 * i, acc[r][i]);
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define HAVE_512 1
#endif

// The step of 16-bit numbers of which `most` is the largest, and its inverse; NaN stays.
INLINE float step16(float most, float *inverse) {
    float step = most <= FLT_MAX ? most / LARGEST16 : NAN;
    *inverse = step >= FLT_MIN ? LARGEST16 / most : 0;
    return step;
}

// Queries [QUERIES, D] in int16, each with its step.
INLINE void round_queries(const float *q, const int64_t D, Rounded *out) {
    for (int r = 0; r < QUERIES; r++) {
        uint32_t most = 0;  // of the bits without sign, as in round_token
        for (int64_t d = 0; d < D; d++) {
            uint32_t bits;
            memcpy(&bits, q + r * D + d, 4);
            bits &= 0x7fffffff;
            most = bits > most ? bits : most;
        }
        float largest, inverse;
        memcpy(&largest, &most, 4);
        out->step[r] = step16(largest, &inverse);
        for (int64_t d = 0; d < D; d++)
            out->q[r * D + d] = inverse ? (int16_t)nearbyintf(q[r * D + d] * inverse) : 0;
    }
}

// two_scores of keys in int8, without their scales: the sums are exact.
INLINE __m256 two_int8_scores(const Rounded *q, const uint8_t *key, const int64_t D) {
    __m256i acc[2][QUERIES], sums[2];
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < QUERIES; r++) acc[i][r] = _mm256_setzero_si256();
    int64_t d = 0;
#ifdef HAVE_512
    __m512i wide[2][QUERIES];
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < QUERIES; r++) wide[i][r] = _mm512_setzero_si512();
    for (; d + 32 <= D; d += 32)
        for (int i = 0; i < 2; i++) {
            const __m256i *at = (const __m256i *)(key + i * row_bytes(D, 1) + d);
            __m512i k = _mm512_cvtepi8_epi16(_mm256_loadu_si256(at));
            for (int r = 0; r < QUERIES; r++) {
                __m512i two = _mm512_loadu_si512(q->q + r * D + d);
                wide[i][r] = _mm512_dpwssd_epi32(wide[i][r], k, two);
            }
        }
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < QUERIES; r++)
            acc[i][r] = _mm256_add_epi32(_mm512_castsi512_si256(wide[i][r]),
                                         _mm512_extracti64x4_epi64(wide[i][r], 1));
#endif
    for (; d < D; d += 16)
        for (int i = 0; i < 2; i++) {
            const __m128i *at = (const __m128i *)(key + i * row_bytes(D, 1) + d);
            __m256i k = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
            for (int r = 0; r < QUERIES; r++) {
                __m256i two = _mm256_loadu_si256((const __m256i *)(q->q + r * D + d));
                acc[i][r] = dot2(acc[i][r], k, two);
            }
        }
    for (int i = 0; i < 2; i++)
        sums[i] = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[i][0], acc[i][1]),
                                    _mm256_hadd_epi32(acc[i][2], acc[i][3]));
    __m256i both = _mm256_add_epi32(_mm256_permute2x128_si256(sums[0], sums[1], 0x20),
                                    _mm256_permute2x128_si256(sums[0], sums[1], 0x31));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(both), _mm256_broadcast_ps((const __m128 *)q->step));
}

// Weights [n, QUERIES] of values, their scales in them, as pairs of int16 for two positions each,
// [BLOCK / 2, QUERIES]. What follows the n is written. step: [QUERIES].
INLINE void round_weights(float *p, int64_t n, int32_t *pairs, float *step) {
    float most[QUERIES], inverse[QUERIES];
    if (n % 2) memset(p + n * QUERIES, 0, QUERIES * sizeof(float));
    // of the bits, which order as the weights do: NaN is the largest
    __m256i two = _mm256_setzero_si256();
    for (int64_t j = 0; j < n; j += 2)
        two = _mm256_max_epu32(two, _mm256_loadu_si256((const __m256i *)(p + j * QUERIES)));
    __m128i one = _mm_max_epu32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_ps(most, _mm_castsi128_ps(one));
    for (int r = 0; r < QUERIES; r++) step[r] = step16(most[r], inverse + r);
    const __m256 by = _mm256_broadcast_ps((const __m128 *)inverse);
    const __m256 is_finite = _mm256_cmp_ps(by, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    for (int64_t j = 0; j < n; j += 2) {
        __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(p + j * QUERIES), by);
        __m256i q = _mm256_cvtps_epi32(_mm256_and_ps(scaled, is_finite));
        __m128i second = _mm_slli_epi32(_mm256_extracti128_si256(q, 1), 16);
        __m128i joined = _mm_or_si128(_mm256_castsi256_si128(q), second);
        _mm_storeu_si128((__m128i *)(pairs + j / 2 * QUERIES), joined);
    }
}

// out = out · shrink + sums · step, of `count` times 8 elements.
INLINE void add_sums(const __m256i *sums, int count, float step, float shrink, float *out) {
    for (int i = 0; i < count; i++) {
        __m256 old = _mm256_mul_ps(_mm256_loadu_ps(out + 8 * i), _mm256_set1_ps(shrink));
        __m256 sum = _mm256_cvtepi32_ps(sums[i]);
        _mm256_storeu_ps(out + 8 * i, _mm256_fmadd_ps(sum, _mm256_set1_ps(step), old));
    }
}

#ifdef HAVE_512
// add_int8_values of 32 elements.
INLINE void add_wide_values(const int32_t *pairs, const float *step, const uint8_t *value,
                            int64_t n, const int64_t D, const float *shrink, State *state,
                            int64_t d) {
    const int64_t row = row_bytes(D, 1);
    __m512i acc[QUERIES][2];
    for (int r = 0; r < QUERIES; r++)
        for (int i = 0; i < 2; i++) acc[r][i] = _mm512_setzero_si512();
    for (int64_t j = 0; j < n; j += 2) {
        const uint8_t *at = value + j * row + d, *next = j + 1 < n ? at + row : at;
        __m256i a = _mm256_loadu_si256((const __m256i *)at);
        __m256i b = _mm256_loadu_si256((const __m256i *)next);
        // elements 0..7 and 16..23, then the others
        const __m512i v[2] = {_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b)),
                              _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b))};
        for (int r = 0; r < QUERIES; r++) {
            __m512i two = _mm512_set1_epi32(pairs[j / 2 * QUERIES + r]);
            for (int i = 0; i < 2; i++) acc[r][i] = _mm512_dpwssd_epi32(acc[r][i], v[i], two);
        }
    }
    for (int r = 0; r < QUERIES; r++) {
        __m256i sums[4];
        for (int i = 0; i < 2; i++) {
            sums[i] = _mm512_castsi512_si256(acc[r][i]);
            sums[2 + i] = _mm512_extracti64x4_epi64(acc[r][i], 1);
        }
        add_sums(sums, 4, step[r], shrink[r], state->out[r] + d);
    }
}
#endif

// out += weights · value for 16 elements of each query, of values in int8.
INLINE void add_int8_values(const int32_t *pairs, const float *step, const uint8_t *value,
                            int64_t n, const int64_t D, const float *shrink, State *state,
                            int64_t d) {
    const int64_t row = row_bytes(D, 1);
    __m256i acc[QUERIES][2];
    for (int r = 0; r < QUERIES; r++)
        for (int i = 0; i < 2; i++) acc[r][i] = _mm256_setzero_si256();
    for (int64_t j = 0; j < n; j += 2) {
        const uint8_t *at = value + j * row + d, *next = j + 1 < n ? at + row : at;
        __m128i a = _mm_loadu_si128((const __m128i *)at);
        __m128i b = _mm_loadu_si128((const __m128i *)next);
        const __m256i v[2] = {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)),
                              _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b))};
        for (int r = 0; r < QUERIES; r++) {
            __m256i two = _mm256_set1_epi32(pairs[j / 2 * QUERIES + r]);
            for (int i = 0; i < 2; i++) acc[r][i] = dot2(acc[r][i], v[i], two);
        }
    }
    for (int r = 0; r < QUERIES; r++)
        add_sums(acc[r], 2, step[r], shrink[r], state->out[r] + d);
}
#endif

// Scores of n positions for QUERIES queries: [n, QUERIES]. The values of the block are asked for
// meanwhile, and the keys of the next one while the values are read.
INLINE void block_scores(const float *q, const Rounded *rounded, const uint8_t *key,
                         const uint8_t *value, int64_t n, const int64_t D, const int is_int8,
                         float *scores) {
    const int64_t row = row_bytes(D, is_int8);
    int64_t j = 0;
    (void)rounded, (void)value;  // where there is no AVX2
#ifdef HAVE_AVX2
    for (; j + 2 <= n; j += 2) {
        ask_for(value + j * row, 2 * row);
        __m256 two = is_int8 ? two_int8_scores(rounded, key + j * row, D)
                             : two_scores(q, (const uint16_t *)(key + j * row), D);
        _mm256_storeu_ps(scores + j * QUERIES, two);
    }
#elif defined(HAVE_NEON)
    neon_scores(q, key, n, D, is_int8, scores);
    j = n;
#endif
    for (; j < n; j++)
        for (int r = 0; r < QUERIES; r++) {
            float sum = 0;
            for (int64_t d = 0; d < D; d += 16)
                for (int i = 0; i < 8; i++)
                    sum += element(key + j * row, d + place(0, i, is_int8), is_int8)
                               * q[r * D + d + i]
                           + element(key + j * row, d + place(1, i, is_int8), is_int8)
                                 * q[r * D + d + 8 + i];
            scores[j * QUERIES + r] = sum;
        }
}

// Multiplies what belongs to n keys or values of int8, [n, QUERIES], with their scales.
INLINE void by_scales(float *numbers, const uint8_t *rows, int64_t n, const int64_t D) {
    for (int64_t j = 0; j < n; j++) {
        float scale;
        memcpy(&scale, rows + j * row_bytes(D, 1) + D, sizeof scale);
        for (int r = 0; r < QUERIES; r++) numbers[j * QUERIES + r] *= scale;
    }
}

// scores [n, QUERIES] -> exp(score - most); shrink: what earlier sums are multiplied with.
INLINE void block_softmax(float *scores, int64_t n, State *state, float *shrink) {
    float most[QUERIES], zero[QUERIES], total[QUERIES] = {0};
    memcpy(most, state->most, sizeof most);
    int64_t j = 0;
#ifdef HAVE_AVX2
    __m256 two = _mm256_broadcast_ps((const __m128 *)most);
    for (; j + 2 <= n; j += 2) two = _mm256_max_ps(two, _mm256_loadu_ps(scores + j * QUERIES));
    _mm_storeu_ps(most, _mm_max_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
#elif defined(HAVE_NEON)
    neon_most(scores, n, most);
    j = n;
#endif
    for (; j < n; j++)
        for (int r = 0; r < QUERIES; r++) most[r] = fmaxf(most[r], scores[j * QUERIES + r]);
    for (int r = 0; r < QUERIES; r++) {
        shrink[r] = state->most[r] == most[r] ? 1 : expf(state->most[r] - most[r]);
        state->most[r] = most[r];
        zero[r] = isinf(most[r]) ? 0 : most[r];  // where nothing is seen yet: exp(-inf - 0)
    }
    j = 0;
#ifdef HAVE_AVX2
    __m256 from = _mm256_broadcast_ps((const __m128 *)zero), sum = _mm256_setzero_ps();
    for (; j + 2 <= n; j += 2) {
        __m256 score = _mm256_loadu_ps(scores + j * QUERIES);
        __m256 seen = _mm256_cmp_ps(score, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m256 p = _mm256_and_ps(exp_lanes(_mm256_sub_ps(score, from)), seen);
        sum = _mm256_add_ps(sum, p);
        _mm256_storeu_ps(scores + j * QUERIES, p);
    }
    _mm_storeu_ps(total, _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
#elif defined(HAVE_NEON)
    neon_shares(scores, n, zero, total);
    j = n;
#endif
    for (; j < n; j++)
        for (int r = 0; r < QUERIES; r++)
            total[r] += scores[j * QUERIES + r] = expf(scores[j * QUERIES + r] - zero[r]);
    for (int r = 0; r < QUERIES; r++) state->total[r] = state->total[r] * shrink[r] + total[r];
}

INLINE void block_values(float *p, const uint8_t *key, const uint8_t *value, int64_t n,
                         const int64_t D, const int is_int8, const float *shrink, State *state) {
    const int64_t row = row_bytes(D, is_int8);
    (void)key, (void)row;
#ifdef HAVE_AVX2
    const int64_t share = n * row * 16 / D;  // of the next keys
    int32_t pairs[BLOCK / 2 * QUERIES];
    float step[QUERIES];
    if (is_int8) round_weights(p, n, pairs, step);
    for (int64_t d = 0; d < D; d += 16) {
        ask_for(key + n * row + d / 16 * share, share);
#ifdef HAVE_512
        if (is_int8 && D % 32 == 0) {
            if (d % 32 == 0) add_wide_values(pairs, step, value, n, D, shrink, state, d);
            continue;
        }
#endif
        if (is_int8) add_int8_values(pairs, step, value, n, D, shrink, state, d);
        else add_values(p, (const uint16_t *)value, n, D, shrink, state, d);
    }
#elif defined(HAVE_NEON)
    neon_values(p, value, n, D, is_int8, shrink, state);
#else
    for (int r = 0; r < QUERIES; r++)
        for (int64_t d = 0; d < D; d++) state->out[r][d] *= shrink[r];
    for (int64_t j = 0; j < n; j++)
        for (int r = 0; r < QUERIES; r++)
            for (int64_t d = 0; d < D; d += 16)
                for (int h = 0; h < 2; h++)
                    for (int i = 0; i < 8; i++)
                        state->out[r][d + 8 * h + i] +=
                            p[j * QUERIES + r]
                            * element(value + j * row, d + place(h, i, is_int8), is_int8);
#endif
}

// One span of one head against QUERIES queries.
INLINE void span(const float *q, const uint8_t *key, const uint8_t *value, const uint8_t *mask,
                 int64_t n, const int64_t D, const int is_int8, State *state) {
    float scores[BLOCK * QUERIES], shrink[QUERIES];
    Rounded rounded;
#ifdef HAVE_AVX2
    if (is_int8) round_queries(q, D, &rounded);
#endif
    for (int r = 0; r < QUERIES; r++) state->most[r] = -INFINITY, state->total[r] = 0;
    memset(state->out, 0, sizeof state->out);
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t count = n - begin < BLOCK ? n - begin : BLOCK, at = begin * row_bytes(D, is_int8);
        block_scores(q, &rounded, key + at, value + at, count, D, is_int8, scores);
        if (is_int8) by_scales(scores, key + at, count, D);
        for (int64_t j = 0; j < count && mask; j++)
            for (int r = 0; r < QUERIES && !mask[begin + j]; r++)
                scores[j * QUERIES + r] = -INFINITY;
        block_softmax(scores, count, state, shrink);
        if (is_int8) by_scales(scores, value + at, count, D);
        block_values(scores, key + at, value + at, count, D, is_int8, shrink, state);
    }
}

// Joins the spans of QUERIES queries and writes the first `queries` of them in their own order.
static void join(State *states, int64_t spans, int64_t queries, int64_t D, int is_int8,
                 float *out) {
    for (int64_t r = 0; r < queries; r++) {
        float most = -INFINITY, total = 0;
        for (int64_t s = 0; s < spans; s++) most = fmaxf(most, states[s].most[r]);
        float sums[LARGEST_HEAD] = {0};
        for (int64_t s = 0; s < spans; s++) {
            if (!(states[s].total[r] != 0)) continue;  // nothing was seen; NaN goes on
            float share = expf(states[s].most[r] - most);
            total += share * states[s].total[r];
            for (int64_t d = 0; d < D; d++) sums[d] += share * states[s].out[r][d];
        }
        float inverse = total != 0 ? 1 / total : 0;
        for (int64_t d = 0; d < D; d += 16)
            for (int i = 0; i < 16; i++)
                out[r * D + d + place(i / 8, i % 8, is_int8)] = sums[d + i] * inverse;
    }
}

// The keys and values of one row.
typedef struct {
    const uint8_t *key, *value;
    int64_t length, head_stride;  // in bytes
} Row;

// Returns 0, or 1 when there is no memory.
static int attend(const float *query, const Row *rows, const uint8_t *mask, float *out, int64_t B,
                  int64_t G, int64_t R, int64_t D, int64_t mask_stride, int is_int8,
                  int threads) {
    int64_t longest = 0;
    for (int64_t b = 0; b < B; b++) longest = rows[b].length > longest ? rows[b].length : longest;
    const int64_t tiles = (R + QUERIES - 1) / QUERIES, spans = (longest + SPAN - 1) / SPAN;
    const int64_t tasks = B * G * spans;
    // rows differ in length, so their tasks are dealt out; those of one row stay side by side
    const int64_t chunk = B > 1 ? 1 : (tasks + threads - 1) / threads;
    // zeroed: the last tile of a head may lack queries, and is computed whole
    float *split = calloc((size_t)(B * G * tiles * QUERIES * D), sizeof(float));
    State *states = malloc(sizeof(State) * (size_t)(B * G * tiles * spans));
    if (split && states) {
        for (int64_t h = 0; h < B * G; h++)
            for (int64_t r = 0; r < R; r++) {
                const float *from = query + (h * R + r) * D;
                float *to = split + (h * tiles * QUERIES + r) * D;
                for (int64_t d = 0; d < D; d += 16)
                    for (int i = 0; i < 16; i++)
                        to[d + i] = from[d + place(i / 8, i % 8, is_int8)];
            }
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static, chunk)
            for (int64_t task = 0; task < tasks; task++) {
                int64_t s = task % spans, h = task / spans, b = h / G, first = s * SPAN;
                const Row *row = rows + b;
                if (first >= row->length) continue;
                int64_t n = row->length - first < SPAN ? row->length - first : SPAN;
                int64_t at = h % G * row->head_stride + first * row_bytes(D, is_int8);
                const uint8_t *key = row->key + at, *value = row->value + at;
                const uint8_t *seen = mask ? mask + b * mask_stride + first : NULL;
                for (int64_t t = 0; t < tiles; t++) {
                    const float *q = split + (h * tiles + t) * QUERIES * D;
                    State *state = states + (h * tiles + t) * spans + s;
                    // constants for the compiler: the width of the heads of 11B and 90B, and
                    // what the numbers are
                    if (D == 128 && is_int8) span(q, key, value, seen, n, 128, 1, state);
                    else if (D == 128) span(q, key, value, seen, n, 128, 0, state);
                    else if (is_int8) span(q, key, value, seen, n, D, 1, state);
                    else span(q, key, value, seen, n, D, 0, state);
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < B * G * tiles; i++) {
                int64_t h = i / tiles, r = i % tiles * QUERIES;
                int64_t queries = R - r < QUERIES ? R - r : QUERIES;
                int64_t used = (rows[h / G].length + SPAN - 1) / SPAN;
                join(states + i * spans, used, queries, D, is_int8, out + (h * R + r) * D);
            }
        }
    }
    int failed = !split || !states;
    free(split), free(states);
    return failed;
}

// Rows of one length, whose keys and values lie at one distance. Returns as `attend`.
int mmchat_attend(const float *query, const uint8_t *key, const uint8_t *value,
                  const uint8_t *mask, float *out, int64_t B, int64_t G, int64_t R, int64_t N,
                  int64_t D, int64_t batch_stride, int64_t head_stride, int64_t mask_stride,
                  int64_t is_int8, int threads) {
    Row *rows = malloc(sizeof(Row) * (size_t)B);
    for (int64_t b = 0; rows && b < B; b++)
        rows[b] = (Row){key + b * batch_stride, value + b * batch_stride, N, head_stride};
    int failed =
        !rows || attend(query, rows, mask, out, B, G, R, D, mask_stride, is_int8 != 0, threads);
    free(rows);
    return failed;
}

// Rows of any lengths, wherever they lie: `rows` is [B]. Returns as `attend`.
int mmchat_attend_rows(const float *query, const Row *rows, float *out, int64_t B, int64_t G,
                       int64_t R, int64_t D, int64_t is_int8, int threads) {
    return attend(query, rows, NULL, out, B, G, R, D, 0, is_int8 != 0, threads);
}
