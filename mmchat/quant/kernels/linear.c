// y = x · Wᵀ of large weights, which stream from memory once for the tokens of a prompt's part.
//
// Weights are plain row-major matrices, as they are stored in files:
//   bf16   uint16_t [N, K]
//   int8   int8_t   [N, K],   w = q · scale[n]
//   int4   uint8_t  [N, K/2], byte j holds elements 2j (low) and 2j+1 (high), 0..15,
//          w = (q - 8) · scale[n, g] + zero[n, g], scale and zero bfloat16 [N, K/group]
// x: float [M, K], y: float [M, N]. K is a multiple of 64, group is 32, 64 or 128.
//
// For int8 and int4 weights the activations are rounded to int8 with one scale for each 64 of a
// token, so that products are whole numbers (as in XNNPACK's and ggml's 8-bit paths).
// bf16 and int4 weights sit in pairs; activations are split into even and odd elements once, so
// that no weight is ever moved between lanes.
//
// Rows that are read together lie far apart: of four, row n goes with n + N/4, n + N/2 and n + 3N/4.
// Each is then one unbroken stream, which the processor's own prefetcher follows: on a Zen 3 products
// with int8 weights take 0.7 of the time of four neighbouring rows, and bfloat16 0.85. Rows of int4
// are two at a time: their scales and zeros are streams of their own.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"

#ifdef _OPENMP
int omp_get_thread_num(void);  // omp.h does not come with every compiler that has OpenMP
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

#define BLOCK 64          // activations that share a scale
#define TOKENS 4          // tokens that share one read of a weight
#define ROWS 4            // rows of int8 and bf16 read together for one or two tokens
#define ROWS_INT4 2       // rows of int4 for one token; one row at a time meets two
#define CACHED 262144     // bytes of activations that stay close to a core
#define AHEAD 1024        // bytes of each stream that are asked for before they are needed
#define AHEAD_INT4 2048   // likewise of int4
#define AHEAD_SCALES 2    // rows whose scales of int4 are asked for before they are needed
#define MANY 13           // tokens from which int8 and groups of 64 are brought into order first
#define MANY_OTHERS 5     // tokens from which groups of 32 and 128 are
#define PANEL 16          // rows of them that are in order together
#define SPAN 512          // columns likewise
#define STRIPE 128        // rows whose sums stay close to a core
#define WINDOW 64         // tokens likewise
#define GAP 1024          // floats between what two threads write, which no prefetcher bridges

#define INLINE static inline __attribute__((always_inline))

#ifdef HAVE_NEON
#include "linear_neon.h"
#endif

// ---- activations -------------------------------------------------------------------------------

typedef struct {
    int8_t *q;     // [M, K], each block in the order that the weights need
    float *scale;  // [M, K / 64]
    float *sum;    // [M, K / group]: sum of the rounded activations of a weight group
} Activations;

static void round_token(const float *x, int64_t K, int64_t group, int split, int8_t *q,
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
        for (int half = 0; half < 2 && group; half++) {
            int total = 0;
            for (int i = 0; i < 32; i++) total += rounded[half * 32 + i];
            sum[(b * BLOCK + half * 32) / group] += step * (float)total;
        }
    }
}

// ---- int8 --------------------------------------------------------------------------------------

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

// a: unsigned, b: signed; sums of four neighbouring products, added to c. With plain AVX2 the
// products of two pairs must fit int16, which |b| <= 127 and a <= 127 ensure.
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
#endif

// Rows that lie `apart` rows from each other against up to TOKENS tokens. rows and tokens are
// compile-time constants.
INLINE void int8_tile(const int rows, const int tokens, int64_t apart, const int8_t *w,
                      const float *wscale, const int8_t *q, const float *xscale, float *y,
                      int64_t N, int64_t K) {
    const int64_t blocks = K / BLOCK;
#ifdef HAVE_AVX2
    __m256 acc[ROWS][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        for (int r = 0; r < rows; r++) {
            const int8_t *at = w + r * apart * K + b * BLOCK;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            __m256i w0 = _mm256_loadu_si256((const __m256i *)at);
            __m256i w1 = _mm256_loadu_si256((const __m256i *)(at + 32));
            // one factor is unsigned, so the activations take over the signs of the weights
            __m256i a0 = _mm256_abs_epi8(w0), a1 = _mm256_abs_epi8(w1);
            for (int t = 0; t < tokens; t++) {
                const __m256i *x = (const __m256i *)(q + t * K + b * BLOCK);
                __m256i dot = dot4(_mm256_setzero_si256(), a0,
                                   _mm256_sign_epi8(_mm256_loadu_si256(x), w0));
                dot = dot4(dot, a1, _mm256_sign_epi8(_mm256_loadu_si256(x + 1), w1));
                acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot),
                                            _mm256_broadcast_ss(xscale + t * blocks + b),
                                            acc[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            y[t * N + r * apart] = sum_lanes(acc[r][t]) * wscale[r * apart];
#elif defined(HAVE_NEON)
    (void)blocks;
    neon_int8_tile(rows, tokens, apart, w, wscale, q, xscale, y, N, K);
#else
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float total = 0;
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t *a = w + r * apart * K + b * BLOCK, *x = q + t * K + b * BLOCK;
                int32_t dot = 0;
                for (int i = 0; i < BLOCK; i++) dot += (int32_t)a[i] * x[i];
                total += (float)dot * xscale[t * blocks + b];
            }
            y[t * N + r * apart] = total * wscale[r * apart];
        }
#endif
}

// ---- int4 --------------------------------------------------------------------------------------

// For one row and one token: steps[g] = scale of weights and activations together, and the sum over
// g of (zero - 8 · scale) · sum, which is what the offsets of the groups add. blocks: which
// activation scale a group has.
INLINE float int4_steps(const int group, const uint16_t *scale, const uint16_t *zero,
                        const float *xscale, const float *sum, float *steps, int64_t groups) {
    int64_t g = 0;
    float total = 0;
#ifdef HAVE_AVX2
    __m256 offsets = _mm256_setzero_ps();
    for (; g + 8 <= groups; g += 8) {
        __m256 s = bf16_lanes(scale + g), z = bf16_lanes(zero + g);
        offsets = _mm256_fmadd_ps(_mm256_fnmadd_ps(_mm256_set1_ps(8), s, z),
                                  _mm256_loadu_ps(sum + g), offsets);
        if (group == 32) {
            __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
            __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(xscale + g / 2));
            s = _mm256_mul_ps(s, _mm256_permutevar8x32_ps(x, twice));
        } else if (group == 64) {
            s = _mm256_mul_ps(s, _mm256_loadu_ps(xscale + g));
        }
        _mm256_storeu_ps(steps + g, s);
    }
    total = sum_lanes(offsets);
#elif defined(HAVE_NEON)
    total = neon_int4_steps(group, scale, zero, xscale, sum, steps, groups, &g);
#endif
    for (; g < groups; g++) {
        float s = bf16_to_float(scale[g]);
        total += (bf16_to_float(zero[g]) - 8.0f * s) * sum[g];
        steps[g] = group == 128 ? s : s * xscale[g * group / BLOCK];
    }
    return total;
}

#ifdef HAVE_AVX2
// A block of one row against some tokens, added to their sums.
INLINE void int4_block(const int tokens, const int group, const uint8_t *w, const int8_t *q,
                       const float *xscale, const float *steps, int64_t K, int64_t b,
                       __m256 *acc) {
    const uint8_t *at = w + b * BLOCK / 2;
    const __m256i low = _mm256_set1_epi8(0x0f);
    if (b % 2 == 0) _mm_prefetch((const char *)at + AHEAD_INT4, _MM_HINT_T0);
    __m256i both = _mm256_loadu_si256((const __m256i *)at);
    __m256i even = _mm256_and_si256(both, low);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    for (int t = 0; t < tokens; t++) {
        const __m256i *x = (const __m256i *)(q + t * K + b * BLOCK);
        const float *step = steps + t * (K / group) + b * BLOCK / group;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
        __m256i dot = dot4(_mm256_setzero_si256(), even, _mm256_loadu_si256(x));
        dot = dot4(dot, odd, _mm256_loadu_si256(x + 1));
#else
        __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256(x)),
                                         _mm256_maddubs_epi16(odd, _mm256_loadu_si256(x + 1)));
        __m256i dot = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
        __m256 lanes;
        if (group == 32) {  // the low half of a line is the first group
            __m256 two = _mm256_castpd_ps(_mm256_broadcast_sd((const double *)step));
            lanes = _mm256_permutevar8x32_ps(two, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
        } else {
            lanes = _mm256_broadcast_ss(step);
        }
        if (group == 128)
            lanes = _mm256_mul_ps(lanes, _mm256_broadcast_ss(xscale + t * (K / BLOCK) + b));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), lanes, acc[t]);
    }
}
#endif

// Tiles of less than four sums have several of each, which hides how long an addition takes.
INLINE void int4_tile(const int rows, const int tokens, int64_t apart, const int group,
                      const uint8_t *w, const uint16_t *scale, const uint16_t *zero, const int8_t *q,
                      const float *xscale, const float *sum, float *steps, float *y, int64_t N,
                      int64_t K) {
    const int64_t blocks = K / BLOCK, groups = K / group;
#ifdef HAVE_AVX2
    for (int r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g += 32) {  // 32 of them fill a line
            const int64_t next = (r * apart + AHEAD_SCALES) * groups + g;
            _mm_prefetch((const char *)(scale + next), _MM_HINT_T0);
            _mm_prefetch((const char *)(zero + next), _MM_HINT_T0);
        }
#endif
    float offset[ROWS_INT4][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++)
            offset[r][t] = int4_steps(group, scale + r * apart * groups, zero + r * apart * groups,
                                      xscale + t * blocks, sum + t * groups,
                                      steps + (r * tokens + t) * groups, groups);
#ifdef HAVE_AVX2
    const int sums = rows * tokens < 4 ? 4 / (rows * tokens) : 1;
    __m256 acc[ROWS_INT4][4][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < sums; i++)
            for (int t = 0; t < tokens; t++) acc[r][i][t] = _mm256_setzero_ps();
    int64_t b = 0;
    for (; b + sums <= blocks; b += sums)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < sums; i++)
                int4_block(tokens, group, w + r * apart * K / 2, q, xscale,
                           steps + r * tokens * groups, K, b + i, acc[r][i]);
    for (; b < blocks; b++)
        for (int r = 0; r < rows; r++)
            int4_block(tokens, group, w + r * apart * K / 2, q, xscale,
                       steps + r * tokens * groups, K, b, acc[r][0]);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            __m256 total = acc[r][0][t];
            for (int i = 1; i < sums; i++) total = _mm256_add_ps(total, acc[r][i][t]);
            y[t * N + r * apart] = sum_lanes(total) + offset[r][t];
        }
#elif defined(HAVE_NEON)
    neon_int4_tile(rows, tokens, apart, group, w, q, xscale, steps, offset, y, N, K);
#else
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float total = offset[r][t];
            for (int64_t b = 0; b < K / 32; b++) {
                const uint8_t *a = w + (r * apart * K + b * 32) / 2;
                const int8_t *x = q + t * K + b / 2 * BLOCK + (b % 2) * 16;
                int32_t dot = 0;
                for (int i = 0; i < 16; i++)
                    dot += (a[i] & 15) * x[i] + (a[i] >> 4) * x[i + BLOCK / 2];
                float step = steps[(r * tokens + t) * groups + b * 32 / group];
                total += (float)dot * (group == 128 ? step * xscale[t * blocks + b / 2] : step);
            }
            y[t * N + r * apart] = total;
        }
#endif
}

// ---- bfloat16 ----------------------------------------------------------------------------------

// x: float [tokens, K], each block of 16 as 8 even and then 8 odd elements
INLINE void bf16_tile(const int rows, const int tokens, int64_t apart, const uint16_t *w,
                      const float *x, float *y, int64_t N, int64_t K) {
#ifdef HAVE_AVX2
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256 acc[ROWS][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = _mm256_setzero_ps();
    for (int64_t k = 0; k < K; k += 16) {
        for (int r = 0; r < rows; r++) {
            const uint16_t *at = w + r * apart * K + k;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            __m256i both = _mm256_loadu_si256((const __m256i *)at);
            __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
            __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, high));
            for (int t = 0; t < tokens; t++) {
                acc[r][t] = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + t * K + k), acc[r][t]);
                acc[r][t] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + t * K + k + 8), acc[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) y[t * N + r * apart] = sum_lanes(acc[r][t]);
#elif defined(HAVE_NEON)
    neon_bf16_tile(rows, tokens, apart, w, x, y, N, K);
#else
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            float total = 0;
            for (int64_t k = 0; k < K; k += 16)
                for (int i = 0; i < 8; i++)
                    total += bf16_to_float(w[r * apart * K + k + 2 * i]) * x[t * K + k + i]
                             + bf16_to_float(w[r * apart * K + k + 2 * i + 1]) * x[t * K + k + 8 + i];
            y[t * N + r * apart] = total;
        }
#endif
}

static void split_token(const float *x, float *out, int64_t K) {
    for (int64_t k = 0; k < K; k += 16)
        for (int i = 0; i < 8; i++) {
            out[k + i] = x[k + 2 * i];
            out[k + 8 + i] = x[k + 2 * i + 1];
        }
}

// ---- many tokens -------------------------------------------------------------------------------
//
// The weights of PANEL rows and SPAN columns are brought into the order in which products read
// them, and then meet all tokens of a window. A vector has four columns of eight rows. It meets
// four activations of a token, repeated, so that each lane adds up the products of one row: no lanes
// are added to each other, and levels of int4 are scaled once for 32 columns. On a Zen 3 a product
// with 64 tokens takes 0.7 of the time with int4 (groups of 32 and 128: 0.54) and 0.79 with int8,
// 0.9 of what its integer instructions allow. Bringing weights into order costs as much as three
// tokens, so that fewer than MANY read them as they lie.

#ifdef HAVE_AVX2
typedef struct {
    int8_t weight[SPAN * PANEL];      // [SPAN / 4, PANEL, 4]: int8, or levels of int4
    float scale[SPAN / 32 * PANEL];   // of int4: [groups, PANEL]
    float offset[SPAN / 32 * PANEL];  // of int4: zero - 8 · scale
} Panel;

// Eight vectors, each with four neighbouring bytes of eight rows, which lie `apart` bytes apart.
INLINE void turn(const uint8_t *w, int64_t apart, __m256i *out) {
    for (int half = 0; half < 2; half++) {
        __m256i row[4], pair[4];
        for (int r = 0; r < 4; r++) {
            const __m128i *low = (const __m128i *)(w + r * apart + 16 * half);
            const __m128i *high = (const __m128i *)(w + (r + 4) * apart + 16 * half);
            row[r] = _mm256_blend_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128(low)),
                                        _mm256_broadcastsi128_si256(_mm_loadu_si128(high)), 0xf0);
        }
        pair[0] = _mm256_unpacklo_epi32(row[0], row[1]);
        pair[1] = _mm256_unpacklo_epi32(row[2], row[3]);
        pair[2] = _mm256_unpackhi_epi32(row[0], row[1]);
        pair[3] = _mm256_unpackhi_epi32(row[2], row[3]);
        for (int i = 0; i < 4; i += 2, out += 2) {
            out[0] = _mm256_unpacklo_epi64(pair[i], pair[i + 1]);
            out[1] = _mm256_unpackhi_epi64(pair[i], pair[i + 1]);
        }
    }
}

// Four vectors, each with one of four neighbouring numbers of eight rows.
INLINE void turn_bf16(const uint16_t *in, int64_t apart, __m256 *out) {
    __m128i row[8], pair[4], even[2], odd[2];
    for (int r = 0; r < 8; r++) row[r] = _mm_loadl_epi64((const __m128i *)(in + r * apart));
    for (int r = 0; r < 4; r++) pair[r] = _mm_unpacklo_epi16(row[r], row[r + 4]);
    even[0] = _mm_unpacklo_epi16(pair[0], pair[2]), odd[0] = _mm_unpacklo_epi16(pair[1], pair[3]);
    even[1] = _mm_unpackhi_epi16(pair[0], pair[2]), odd[1] = _mm_unpackhi_epi16(pair[1], pair[3]);
    for (int i = 0; i < 2; i++) {
        out[2 * i] = widen_bf16(_mm_unpacklo_epi16(even[i], odd[i]));
        out[2 * i + 1] = widen_bf16(_mm_unpackhi_epi16(even[i], odd[i]));
    }
}

static void int8_panel(Panel *to, const int8_t *w, int64_t K, int64_t columns) {
    for (int r = 0; r < PANEL; r += 8)
        for (int64_t k = 0; k < columns; k += 32) {
            __m256i turned[8];
            turn((const uint8_t *)w + r * K + k, K, turned);
            for (int i = 0; i < 8; i++) {
                int8_t *at = to->weight + (k + 4 * i) * PANEL + 4 * r;
                _mm256_storeu_si256((__m256i *)at, turned[i]);
            }
        }
}

static void int4_panel(Panel *to, const uint8_t *w, const uint16_t *scale, const uint16_t *zero,
                       int64_t K, int64_t columns, int64_t group) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    for (int r = 0; r < PANEL; r += 8)
        for (int64_t k = 0; k < columns; k += BLOCK) {
            __m256i turned[8];
            turn(w + (r * K + k) / 2, K / 2, turned);
            for (int i = 0; i < 8; i++) {  // four with even columns, then four with odd ones, twice
                int8_t *at = to->weight + (k + i / 4 * 32 + i % 4 * 4) * PANEL + 4 * r;
                __m256i odd = _mm256_and_si256(_mm256_srli_epi16(turned[i], 4), low);
                _mm256_storeu_si256((__m256i *)at, _mm256_and_si256(turned[i], low));
                _mm256_storeu_si256((__m256i *)(at + 16 * PANEL), odd);
            }
        }
    const int64_t groups = columns / group, apart = K / group;
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4)
        for (int r = 0; r < PANEL; r += 8) {
            __m256 s[4], z[4];
            turn_bf16(scale + r * apart + g, apart, s);
            turn_bf16(zero + r * apart + g, apart, z);
            for (int i = 0; i < 4; i++) {
                const int64_t at = (g + i) * PANEL + r;
                _mm256_storeu_ps(to->scale + at, s[i]);
                _mm256_storeu_ps(to->offset + at, _mm256_fnmadd_ps(_mm256_set1_ps(8), s[i], z[i]));
            }
        }
    for (; g < groups; g++)
        for (int r = 0; r < PANEL; r++) {
            float s = bf16_to_float(scale[r * apart + g]);
            to->scale[g * PANEL + r] = s;
            to->offset[g * PANEL + r] = bf16_to_float(zero[r * apart + g]) - 8.0f * s;
        }
}

// A panel and up to TOKENS tokens, at the first column of the panel.
typedef struct {
    const Panel *panel;
    const int8_t *q;        // [tokens, K]
    const float *xscale;    // [tokens, K / BLOCK]
    const float *sum;       // [tokens, K / group]
    float *out;             // [tokens, PANEL], to which the products are added
    int64_t K, columns, group;
    const uint8_t *next;    // the panel after this one,
    int64_t apart;          // bytes between its rows,
    int64_t first, end;     // and which bytes of each row are asked for meanwhile
} Tile;

// Into the second cache: in the first, rows whose distance is a power of two push each other out.
INLINE void ask_for(const uint8_t *row, int64_t first, int64_t end) {
    for (; first < end; first += 64) _mm_prefetch((const char *)row + first, _MM_HINT_T1);
}

// Additions stay in order. Compilers make trees of them, for which there are too few registers.
#define KEEP(v) __asm__("" : "+x"(v))

INLINE __m256i repeated(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

INLINE void add_product(float *out, __m256i dot, __m256 scale) {
    __m256 total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, _mm256_loadu_ps(out));
    _mm256_storeu_ps(out, total);
}

// What is read in loops is copied first, as a store might change it for all that a compiler knows.
INLINE void int8_panel_tile(const int tokens, const Tile *tile) {
    const int64_t K = tile->K, columns = tile->columns, apart = tile->apart;
    const int64_t first = tile->first, end = tile->end;
    const int8_t *w = tile->panel->weight, *x[TOKENS];
    const uint8_t *row = tile->next;
    const float *xscale = tile->xscale;
    float *out = tile->out;
    for (int t = 0; t < tokens; t++) x[t] = tile->q + t * K;
    for (int64_t k = 0; k < columns; k += BLOCK, xscale++, row += BLOCK * PANEL / SPAN * apart) {
        for (int r = 0; r < BLOCK * PANEL / SPAN; r++) ask_for(row + r * apart, first, end);
        __m256i dot[TOKENS][2];
        for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
        for (int i = 0; i < BLOCK; i += 16) {
#pragma GCC unroll 4
            for (int j = 0; j < 16; j += 4)
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++, w += 32) {
                    __m256i weight = _mm256_loadu_si256((const __m256i *)w);
                    __m256i size = _mm256_abs_epi8(weight);
                    for (int t = 0; t < tokens; t++) {
                        __m256i signs = _mm256_sign_epi8(repeated(x[t] + j), weight);
                        dot[t][r] = dot4(dot[t][r], size, signs);
                        KEEP(dot[t][r]);
                    }
                }
            for (int t = 0; t < tokens; t++) x[t] += 16;
        }
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < 2; r++)
                add_product(out + t * PANEL + 8 * r, dot[t][r],
                            _mm256_broadcast_ss(xscale + t * (K / BLOCK)));
    }
}

INLINE void int4_panel_tile(const int tokens, const Tile *tile) {
    const int64_t K = tile->K, columns = tile->columns, apart = tile->apart;
    const int64_t first = tile->first, end = tile->end, blocks = K / BLOCK;
    const int64_t group = tile->group, groups = K / group, own = columns / group;
    const int8_t *w = tile->panel->weight, *x[TOKENS];
    const uint8_t *row = tile->next;
    const float *scale = tile->panel->scale, *offset = tile->panel->offset;
    const float *xscale = tile->xscale, *sum = tile->sum;
    float *out = tile->out;
    for (int t = 0; t < tokens; t++) x[t] = tile->q + t * K;
    for (int64_t k = 0; k < columns; k += 32, row += 32 * PANEL / SPAN * apart) {
        for (int r = 0; r < 32 * PANEL / SPAN; r++) ask_for(row + r * apart, first, end);
        __m256i dot[TOKENS][2];
        for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)  // the even columns, then the odd ones, which lie 32 further on
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++, w += 32) {
                __m256i levels = _mm256_loadu_si256((const __m256i *)w);
                for (int t = 0; t < tokens; t++) {
                    __m256i four = repeated(x[t] + i / 4 * 32 + i % 4 * 4);
                    dot[t][r] = add_levels(dot[t][r], levels, four);
                    KEEP(dot[t][r]);
                }
            }
        for (int r = 0; r < 2; r++)
            for (int t = 0; t < tokens; t++)
                add_product(out + t * PANEL + 8 * r, levels_sum(dot[t][r]),
                            _mm256_mul_ps(_mm256_loadu_ps(scale + 8 * r),
                                          _mm256_broadcast_ss(xscale + t * blocks)));
        const int ends_block = (k & 32) != 0;
        for (int t = 0; t < tokens; t++) x[t] += ends_block ? 48 : 16;
        xscale += ends_block;
        if (((k + 32) & (group - 1)) == 0) scale += PANEL;  // groups are powers of two
    }
    __m256 total[TOKENS][2];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < 2; r++) total[t][r] = _mm256_loadu_ps(out + t * PANEL + 8 * r);
    for (int64_t g = 0; g < own; g++, offset += PANEL)
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < 2; r++)
                total[t][r] = _mm256_fmadd_ps(_mm256_broadcast_ss(sum + t * groups + g),
                                              _mm256_loadu_ps(offset + 8 * r), total[t][r]);
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < 2; r++) _mm256_storeu_ps(out + t * PANEL + 8 * r, total[t][r]);
}

#define DEFINE(kind, tokens)                                                                      \
    static __attribute__((noinline)) void kind##_tile_##tokens(const Tile *tile) {                \
        kind##_panel_tile(tokens, tile);                                                          \
    }
DEFINE(int8, 1)
DEFINE(int8, 2)
DEFINE(int8, 3)
DEFINE(int8, 4)
DEFINE(int4, 1)
DEFINE(int4, 2)
DEFINE(int4, 3)
DEFINE(int4, 4)
#undef DEFINE

static void (*const TILES[2][TOKENS])(const Tile *) = {
    {int8_tile_1, int8_tile_2, int8_tile_3, int8_tile_4},
    {int4_tile_1, int4_tile_2, int4_tile_3, int4_tile_4},
};

// What a product reads and writes, rounded activations included; wscale is of int8, scale and zero
// of int4, and the group of int8 is 0.
typedef struct {
    const uint8_t *w;
    const float *wscale;
    const uint16_t *scale, *zero;
    const int8_t *q;
    const float *xscale, *sum;
    float *y;
    int64_t M, N, K, group;
} Product;

// y but for the rows that fill no panel; for all threads of a team to call.
static void panel_products(const Product *of, int threads) {
    const int64_t M = of->M, N = of->N, K = of->K, group = of->group;
    const int is_int4 = group > 0, packed = is_int4 ? 2 : 1;  // columns in a byte
    const int64_t panels = N / PANEL, each = (panels + threads - 1) / threads;
    const int64_t stripe = M * K <= CACHED ? 1 : each < STRIPE / PANEL ? each : STRIPE / PANEL;
    const int64_t windows = (M + WINDOW - 1) / WINDOW, per_window = (M + windows - 1) / windows;
    const int64_t window = (per_window + TOKENS - 1) / TOKENS * TOKENS;
    Panel panel;
    float sums[STRIPE * WINDOW];  // [stripe, tokens, PANEL]
#pragma omp for schedule(static) nowait
    for (int64_t p0 = 0; p0 < panels; p0 += stripe) {
        const int64_t p1 = p0 + stripe < panels ? p0 + stripe : panels;
        for (int64_t m0 = 0; m0 < M; m0 += window) {
            const int64_t count = m0 + window < M ? window : M - m0;
            const int64_t bytes = SPAN / packed, tiles = (count + TOKENS - 1) / TOKENS;
            const int64_t share = (bytes / 64 + tiles - 1) / tiles * 64;  // that each tile asks for
            memset(sums, 0, sizeof(float) * (size_t)((p1 - p0) * PANEL * count));
            for (int64_t k = 0; k < K; k += SPAN)
                for (int64_t p = p0; p < p1; p++) {
                    const int64_t columns = k + SPAN < K ? SPAN : K - k, begin = p * PANEL * K + k;
                    const int64_t next = p + 1 < p1     ? begin + PANEL * K
                                         : k + SPAN < K ? p0 * PANEL * K + k + SPAN
                                                        : p1 * PANEL * K;
                    Tile tile = {.panel = &panel,
                                 .out = sums + (p - p0) * PANEL * count,
                                 .K = K,
                                 .columns = columns,
                                 .group = group,
                                 .next = of->w + next / packed,
                                 .apart = K / packed};
                    if (is_int4) {
                        int4_panel(&panel, of->w + begin / 2, of->scale + begin / group,
                                   of->zero + begin / group, K, columns, group);
                        for (int64_t r = 0; r < PANEL; r++) {
                            const int64_t g = (next + r * K) / group;
                            _mm_prefetch((const char *)(of->scale + g), _MM_HINT_T1);
                            _mm_prefetch((const char *)(of->zero + g), _MM_HINT_T1);
                        }
                    } else {
                        int8_panel(&panel, (const int8_t *)of->w + begin, K, columns);
                    }
                    for (int64_t t = 0; t < count; t += TOKENS) {
                        const int64_t at = (m0 + t) * K + k, left = count - t;
                        tile.q = of->q + at, tile.xscale = of->xscale + at / BLOCK;
                        if (is_int4) tile.sum = of->sum + at / group;
                        tile.first = t / TOKENS * share;
                        tile.end = tile.first + share < bytes ? tile.first + share : bytes;
                        TILES[is_int4][left < TOKENS ? left - 1 : TOKENS - 1](&tile);
                        tile.out += TOKENS * PANEL;
                    }
                }
            const float *sum = sums;
            for (int64_t p = p0; p < p1; p++)
                for (int64_t t = 0; t < count; t++)
                    for (int64_t n = p * PANEL; n < (p + 1) * PANEL; n += 8, sum += 8) {
                        __m256 total = _mm256_loadu_ps(sum);
                        if (!is_int4) total = _mm256_mul_ps(total, _mm256_loadu_ps(of->wscale + n));
                        _mm256_storeu_ps(of->y + (m0 + t) * N + n, total);
                    }
        }
    }
}
#endif

// Rows that panels take of a product with M tokens. group: 0 for int8.
static int64_t rows_in_panels(int64_t M, int64_t N, int64_t group) {
#ifdef HAVE_AVX2
    const int64_t many = group == 32 || group == 128 ? MANY_OTHERS : MANY;
    return M < many ? 0 : N / PANEL * PANEL;
#else
    (void)M, (void)N, (void)group;
    return 0;
#endif
}

// ---- walking over rows and tokens --------------------------------------------------------------

// CALL(rows, tokens, n, m) runs one tile, of rows n, n + apart, and so on; the branches make both
// counts constants. one, two: rows that meet one and two tokens together; 2 rows meet TOKENS.
// first: the row to begin with.
#define WALK(CALL, first, one, two)                                                               \
    const int64_t apart = (N - (first)) / one;                                                    \
    for (int64_t m0 = 0; m0 < M; m0 += window) {                                                  \
        int64_t m1 = m0 + window < M ? m0 + window : M;                                           \
        _Pragma("omp for schedule(static) nowait") for (int64_t i = 0; i < apart; i++) {          \
            const int64_t n = first + i;                                                          \
            int64_t m = m0;                                                                       \
            for (; m + TOKENS <= m1; m += TOKENS)                                                 \
                for (int r = 0; r < one; r += 2) { CALL(2, TOKENS, n + r * apart, m); }           \
            for (; m + 2 <= m1; m += 2)                                                           \
                for (int r = 0; r < one; r += two) { CALL(two, 2, n + r * apart, m); }            \
            for (; m < m1; m++) { CALL(one, 1, n, m); }                                           \
        }                                                                                         \
        _Pragma("omp single nowait") for (int64_t n = first + one * apart; n < N; n++)            \
            for (int64_t m = m0; m < m1; m++) { CALL(1, 1, n, m); }                               \
    }

static int64_t tokens_at_once(int64_t bytes_per_token) {
    int64_t count = CACHED / bytes_per_token / TOKENS * TOKENS;
    return count < TOKENS ? TOKENS : count;
}

// Each returns 0, or 1 when there is no memory for the activations.

int mmchat_linear_int8(const int8_t *w, const float *wscale, const float *x, float *y, int64_t M,
                       int64_t N, int64_t K, int threads) {
    const int64_t blocks = K / BLOCK, window = tokens_at_once(K);
    const int64_t first = rows_in_panels(M, N, 0);
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    if (q && xs) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, 0, 0, q + m * K, xs + m * blocks, NULL);
#ifdef HAVE_AVX2
            const Product all = {.w = (const uint8_t *)w, .wscale = wscale, .q = q, .xscale = xs,
                                 .y = y, .M = M, .N = N, .K = K};
            if (first) panel_products(&all, threads);
#endif
#define CALL(rows, tokens, n, m)                                                                  \
    int8_tile(rows, tokens, apart, w + (n)*K, wscale + (n), q + (m)*K, xs + (m)*blocks,           \
              y + (m)*N + (n), N, K)
            WALK(CALL, first, ROWS, ROWS)
#undef CALL
        }
    }
    int failed = !q || !xs;
    free(q), free(xs);
    return failed;
}

int mmchat_linear_int4(const uint8_t *w, const uint16_t *scale, const uint16_t *zero,
                       const float *x, float *y, int64_t M, int64_t N, int64_t K, int64_t group,
                       int threads) {
    const int64_t blocks = K / BLOCK, groups = K / group, window = tokens_at_once(K);
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    float *sum = malloc(sizeof(float) * (size_t)(M * groups));
    const int64_t first = rows_in_panels(M, N, group);
    const int64_t own = ROWS_INT4 * TOKENS * groups + GAP;
    float *scratch = malloc(sizeof(float) * (size_t)(own * threads));
    if (q && xs && sum && scratch) {
#pragma omp parallel num_threads(threads)
        {
            float *steps = scratch + own * THREAD;
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, group, 1, q + m * K, xs + m * blocks, sum + m * groups);
#ifdef HAVE_AVX2
            const Product all = {.w = w, .scale = scale, .zero = zero, .q = q, .xscale = xs,
                                 .sum = sum, .y = y, .M = M, .N = N, .K = K, .group = group};
            if (first) panel_products(&all, threads);
#endif
#define CALL(rows, tokens, n, m)                                                                  \
    int4_tile(rows, tokens, apart, GROUP, w + (n)*K / 2, scale + (n)*groups, zero + (n)*groups,   \
              q + (m)*K, xs + (m)*blocks, sum + (m)*groups, steps, y + (m)*N + (n), N, K)
#define GROUP 32
            if (group == 32) { WALK(CALL, first, ROWS_INT4, 1) }
#undef GROUP
#define GROUP 64
            if (group == 64) { WALK(CALL, first, ROWS_INT4, 1) }
#undef GROUP
#define GROUP 128
            if (group == 128) { WALK(CALL, first, ROWS_INT4, 1) }
#undef GROUP
#undef CALL
        }
    }
    int failed = !q || !xs || !sum || !scratch;
    free(q), free(xs), free(sum), free(scratch);
    return failed;
}

int mmchat_linear_bf16(const uint16_t *w, const float *x, float *y, int64_t M, int64_t N,
                       int64_t K, int threads) {
    const int64_t window = tokens_at_once(4 * K);
    float *split = malloc(sizeof(float) * (size_t)(M * K));
    if (!split) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) split_token(x + m * K, split + m * K, K);
#define CALL(rows, tokens, n, m)                                                                  \
    bf16_tile(rows, tokens, apart, w + (n)*K, split + (m)*K, y + (m)*N + (n), N, K)
        WALK(CALL, 0, ROWS, ROWS)
#undef CALL
    }
    free(split);
    return 0;
}

const char *mmchat_instructions(void) {
#if defined(HAVE_AVX2) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return "AVX-512 VNNI";
#elif defined(HAVE_AVX2) && defined(__AVXVNNI__)
    return "AVX VNNI";
#elif defined(HAVE_AVX2)
    return "AVX2";
#elif defined(HAVE_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
    return "NEON i8mm";
#elif defined(HAVE_NEON) && defined(__ARM_FEATURE_DOTPROD)
    return "NEON dotprod";
#elif defined(HAVE_NEON)
    return "NEON";
#else
    return "portable C";
#endif
}
