// softmax(query · keyᵀ) · value for the next token, whose keys and values stream from memory once.
//
//   query       float    [B, G, R, D], scaled: R query heads share a key head
//   key, value  uint16_t [B, G, N, D] bfloat16; rows of D lie side by side, heads and batches
//               where the strides say, in elements; mmchat_attend_rows: N differs from row to row
//   mask        uint8_t  [B, N] by its stride, 0 for what may not be seen; or NULL
//   out         float    [B, G, R, D]; zeros where nothing may be seen
//
// D is a multiple of 16, at most LARGEST_HEAD. The positions are cut into spans, the same for any
// number of threads, each with a softmax of its own (Dao et al. 2022); then the spans are joined.
// bfloat16 sits in pairs, so queries are split into even and odd elements once, as in linear.c.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

#define SPAN 512          // positions of one task
#define BLOCK 64          // positions whose scores are held at once
#define QUERIES 4         // queries that share one read of a key
#define LARGEST_HEAD 256
#define AHEAD 1024        // bytes that are asked for before they are needed

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    float most[QUERIES], total[QUERIES];  // of the scores so far: the largest, the sum of exp
    float out[QUERIES][LARGEST_HEAD];     // not divided by the total yet; even and odd elements
} State;

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
#endif

// Scores of n positions for QUERIES queries: [n, QUERIES]. The values of the block, which are read
// in columns later on, are asked for meanwhile.
INLINE void block_scores(const float *q, const uint16_t *key, const uint16_t *value, int64_t n,
                         const int64_t D, float *scores) {
    int64_t j = 0;
#ifdef HAVE_AVX2
    for (; j + 2 <= n; j += 2) {
        for (int64_t d = 0; d < 2 * D; d += 32) {
            _mm_prefetch((const char *)(key + j * D + d) + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)(value + j * D + d), _MM_HINT_T0);
        }
        _mm256_storeu_ps(scores + j * QUERIES, two_scores(q, key + j * D, D));
    }
#elif defined(HAVE_NEON)
    (void)value;
    neon_scores(q, key, n, D, scores);
    j = n;
#endif
    for (; j < n; j++)
        for (int r = 0; r < QUERIES; r++) {
            float sum = 0;
            for (int64_t d = 0; d < D; d += 16)
                for (int i = 0; i < 8; i++)
                    sum += bf16_to_float(key[j * D + d + 2 * i]) * q[r * D + d + i]
                           + bf16_to_float(key[j * D + d + 2 * i + 1]) * q[r * D + d + 8 + i];
            scores[j * QUERIES + r] = sum;
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

INLINE void block_values(const float *p, const uint16_t *value, int64_t n, const int64_t D,
                         const float *shrink, State *state) {
#ifdef HAVE_AVX2
    for (int64_t d = 0; d < D; d += 16) add_values(p, value, n, D, shrink, state, d);
#elif defined(HAVE_NEON)
    neon_values(p, value, n, D, shrink, state);
#else
    for (int r = 0; r < QUERIES; r++)
        for (int64_t d = 0; d < D; d++) state->out[r][d] *= shrink[r];
    for (int64_t j = 0; j < n; j++)
        for (int r = 0; r < QUERIES; r++)
            for (int64_t d = 0; d < D; d += 16)
                for (int i = 0; i < 8; i++) {
                    state->out[r][d + i] +=
                        p[j * QUERIES + r] * bf16_to_float(value[j * D + d + 2 * i]);
                    state->out[r][d + 8 + i] +=
                        p[j * QUERIES + r] * bf16_to_float(value[j * D + d + 2 * i + 1]);
                }
#endif
}

// One span of one head against QUERIES queries.
INLINE void span(const float *q, const uint16_t *key, const uint16_t *value, const uint8_t *mask,
                 int64_t n, const int64_t D, State *state) {
    float scores[BLOCK * QUERIES], shrink[QUERIES];
    for (int r = 0; r < QUERIES; r++) state->most[r] = -INFINITY, state->total[r] = 0;
    memset(state->out, 0, sizeof state->out);
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t count = n - begin < BLOCK ? n - begin : BLOCK;
        block_scores(q, key + begin * D, value + begin * D, count, D, scores);
        for (int64_t j = 0; j < count && mask; j++)
            for (int r = 0; r < QUERIES && !mask[begin + j]; r++)
                scores[j * QUERIES + r] = -INFINITY;
        block_softmax(scores, count, state, shrink);
        block_values(scores, value + begin * D, count, D, shrink, state);
    }
}

// Joins the spans of QUERIES queries and writes the first `queries` of them in their own order.
static void join(State *states, int64_t spans, int64_t queries, int64_t D, float *out) {
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
            for (int i = 0; i < 8; i++) {
                out[r * D + d + 2 * i] = sums[d + i] * inverse;
                out[r * D + d + 2 * i + 1] = sums[d + 8 + i] * inverse;
            }
    }
}

// The keys and values of one row.
typedef struct {
    const uint16_t *key, *value;
    int64_t length, head_stride;
} Row;

// Returns 0, or 1 when there is no memory.
static int attend(const float *query, const Row *rows, const uint8_t *mask, float *out, int64_t B,
                  int64_t G, int64_t R, int64_t D, int64_t mask_stride, int threads) {
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
                    for (int i = 0; i < 8; i++)
                        to[d + i] = from[d + 2 * i], to[d + 8 + i] = from[d + 2 * i + 1];
            }
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static, chunk)
            for (int64_t task = 0; task < tasks; task++) {
                int64_t s = task % spans, h = task / spans, b = h / G, first = s * SPAN;
                const Row *row = rows + b;
                if (first >= row->length) continue;
                int64_t n = row->length - first < SPAN ? row->length - first : SPAN;
                int64_t at = h % G * row->head_stride + first * D;
                const uint16_t *key = row->key + at, *value = row->value + at;
                const uint8_t *seen = mask ? mask + b * mask_stride + first : NULL;
                for (int64_t t = 0; t < tiles; t++) {
                    const float *q = split + (h * tiles + t) * QUERIES * D;
                    State *state = states + (h * tiles + t) * spans + s;
                    // a constant for the compiler: the width of the heads of 11B and 90B
                    if (D == 128) span(q, key, value, seen, n, 128, state);
                    else span(q, key, value, seen, n, D, state);
                }
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < B * G * tiles; i++) {
                int64_t h = i / tiles, r = i % tiles * QUERIES;
                int64_t queries = R - r < QUERIES ? R - r : QUERIES;
                int64_t used = (rows[h / G].length + SPAN - 1) / SPAN;
                join(states + i * spans, used, queries, D, out + (h * R + r) * D);
            }
        }
    }
    int failed = !split || !states;
    free(split), free(states);
    return failed;
}

// Rows of one length, whose keys and values lie at one distance. Returns as `attend`.
int mmchat_attend(const float *query, const uint16_t *key, const uint16_t *value,
                  const uint8_t *mask, float *out, int64_t B, int64_t G, int64_t R, int64_t N,
                  int64_t D, int64_t batch_stride, int64_t head_stride, int64_t mask_stride,
                  int threads) {
    Row *rows = malloc(sizeof(Row) * (size_t)B);
    for (int64_t b = 0; rows && b < B; b++)
        rows[b] = (Row){key + b * batch_stride, value + b * batch_stride, N, head_stride};
    int failed = !rows || attend(query, rows, mask, out, B, G, R, D, mask_stride, threads);
    free(rows);
    return failed;
}

// Rows of any lengths, wherever they lie: `rows` is [B]. Returns as `attend`.
int mmchat_attend_rows(const float *query, const Row *rows, float *out, int64_t B, int64_t G,
                       int64_t R, int64_t D, int threads) {
    return attend(query, rows, NULL, out, B, G, R, D, 0, threads);
}
