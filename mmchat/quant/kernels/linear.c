// y = x · Wᵀ of large weights, which stream from memory once for the tokens of a prompt's part.
//
// Weights are plain row-major matrices, as they are stored in files, or packed int4 (below):
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
// with int8 weights take 0.7 of the time of four neighbouring rows, and bfloat16 0.85. Rows of int4 as
// they lie are two at a time: their scales and zeros are streams of their own.

#include <stdlib.h>

#include "bfloat16.h"
#include "panels.h"
#include "products.h"

#ifdef _OPENMP
int omp_get_thread_num(void);  // omp.h does not come with every compiler that has OpenMP
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define TOKENS 4          // tokens that share one read of a weight
#define PACKED 8          // rows of int4 that are packed together
#ifdef HAVE_AVX2
#define PACKED_TOKENS (LANES / 2)    // tokens that share one read of them
#define VECTORS (2 * PACKED / LANES)  // of two panels
#endif
#define ROWS 4            // rows of int8 and bf16 read together for one or two tokens
#define ROWS_INT4 2       // rows of int4 for one token; one row at a time meets two
#define CACHED 262144     // bytes of activations that stay close to a core
#define AHEAD 2048        // bytes of each stream that are asked for before they are needed
#define AHEAD_INT4 4096   // likewise of int4
#define AHEAD_SCALES 2    // rows whose scales of int4 are asked for before they are needed
// tokens from which weights are unpacked first: of int8, of rows of int4, and of packed int4, which
// are unpacked as fast each time with vectors of 32 bytes
#ifdef HAVE_VNNI
#define MANY 5
#else
#define MANY 18
#endif
#define MANY_INT4 9
#define MANY_PACKED (LANES == 16 ? 41 : INT64_MAX)
#define WINDOW 64         // tokens whose activations stay close to a core
#define GAP 1024          // floats between what two threads write, which no prefetcher bridges

#ifdef HAVE_NEON
#include "linear_neon.h"
#endif

// ---- activations -------------------------------------------------------------------------------

typedef struct {
    const int8_t *q;     // [M, K], each block in the order that the weights need
    float *scale;  // [M, K / 64]
    float *sum;    // [M, K / group]: sum of the rounded activations of a weight group
} Activations;

// ---- int8 --------------------------------------------------------------------------------------

// Rows that lie `apart` rows from each other against up to TOKENS tokens. rows and tokens are
// compile-time constants.
INLINE void int8_tile(const int rows, const int tokens, int64_t apart, const int8_t *w,
                      const float *wscale, const int8_t *q, const float *xscale,
                      float *y, int64_t N, int64_t K) {
    const int64_t blocks = K / BLOCK;
#if defined(HAVE_AVX2) && LANES == 16
    PanelReal acc[ROWS][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) acc[r][t] = (PanelReal){0};
    for (int64_t b = 0; b < blocks; b++) {
        // one factor is unsigned: 128 is added to the weights, and what it gives is taken away
        PanelWhole x[TOKENS], start[TOKENS];
        for (int t = 0; t < tokens; t++) {
            memcpy(&x[t], q + t * K + b * BLOCK, BLOCK);
            const PanelBytes all = (PanelBytes){0} + 128;
            start[t] = -panel_products((Kind){0}, (PanelWhole){0}, all, x[t]);
        }
        for (int r = 0; r < rows; r++) {
            const int8_t *at = w + r * apart * K + b * BLOCK;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            PanelBytes levels;
            memcpy(&levels, at, BLOCK);
            levels ^= 128;
            for (int t = 0; t < tokens; t++) {
                const PanelWhole dot = panel_products((Kind){0}, start[t], levels, x[t]);
                acc[r][t] = panel_fused(__builtin_convertvector(dot, PanelReal),
                                        xscale[t * blocks + b] - (PanelReal){0}, acc[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            __m256 half[2];
            memcpy(half, &acc[r][t], sizeof(half));
            y[t * N + r * apart] = sum_lanes(_mm256_add_ps(half[0], half[1])) * wscale[r * apart];
        }
#elif defined(HAVE_AVX2)
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

// ---- int4 in one stream ------------------------------------------------------------------------
//
// Rows of int4 as they lie are three streams each, of weights, scales and zeros, on which products
// with one token wait: they reach 0.7 of what memory gives. A panel of PACKED rows is a single one:
//
//   for each group: bfloat16 scale[PACKED], zero[PACKED], uint8_t [group / 8, PACKED, 4],
//
// where four bytes of a row hold 8 of its columns, as above. Weights are packed when they are loaded.
// A vector has four bytes of each row and meets four activations, repeated, so that each lane adds up
// the products of one row: no lanes are added to each other, and scales serve where they lie. Up to
// PACKED_TOKENS tokens share what was read and brought out of its halves of bytes, and two panels share
// the activations, in one vector of 64 bytes or two of 32. They lie far apart, as rows do above. Sums
// are added in the same order for any number of tokens. ARM and plain C read rows as they lie: what
// would be faster there was measured nowhere.

#ifdef HAVE_AVX2

// Bytes of a panel.
INLINE int64_t packed_bytes(int64_t K, int64_t group) {
    return K / group * (2 * 2 * PACKED + PACKED * group / 2);
}

// Eight vectors, each with four neighbouring bytes of eight rows, which lie `apart` bytes apart.
INLINE void turn_rows(const uint8_t *const *w, int64_t at, __m256i *out) {
    for (int half = 0; half < 2; half++) {
        __m256i row[4], pair[4];
        for (int r = 0; r < 4; r++) {
            const __m128i *low = (const __m128i *)(w[r] + at + 16 * half);
            const __m128i *high = (const __m128i *)(w[r + 4] + at + 16 * half);
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

// `columns` of eight rows from n on, of which those behind the last one are like it.
static void pack_panel(const uint8_t *w, const uint16_t *scale, const uint16_t *zero, int64_t n,
                       int64_t N, int64_t K, int64_t group, int64_t column, int64_t columns,
                       uint8_t *to) {
    const int64_t groups = K / group;
    const uint8_t *rows[PACKED];
    int64_t row[PACKED];
    for (int r = 0; r < PACKED; r++) {
        row[r] = n + r < N ? n + r : N - 1;
        rows[r] = w + row[r] * K / 2;
    }
    for (int64_t k = column; k < column + columns; k += BLOCK) {
        __m256i turned[8];
        turn_rows(rows, k / 2, turned);
        for (int i = 0; i < 8; i++) {
            const int64_t at = k + 8 * i, g = at / group;
            if (at % group == 0) {
                uint16_t *shared = (uint16_t *)to;
                for (int r = 0; r < PACKED; r++) {
                    shared[r] = scale[row[r] * groups + g];
                    shared[PACKED + r] = zero[row[r] * groups + g];
                }
                to += 4 * PACKED;
            }
            _mm256_storeu_si256((__m256i *)to, turned[i]);
            to += 4 * PACKED;
        }
    }
}

// Two panels and some tokens.
typedef struct {
    const uint8_t *w;          // the first panel
    int64_t apart;             // bytes to the other one, whose rows are
    int64_t further;           // so many further on
    Activations x;             // at the first token
    float *y;                  // [tokens, N], at the first row and token
    int64_t N, K;
} PackedTile;

// Eight lanes of each of the panels that a vector holds, from v on.
INLINE PanelBytes joined(const __m256i *half) {
#if LANES == 16 && defined(__AVX512F__)
    return (PanelBytes)_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
#else
    PanelBytes out;
    memcpy(&out, half, sizeof(out));
    return out;
#endif
}

INLINE PanelBytes packed_at(const uint8_t *const *w, int v) {
    __m256i half[LANES / PACKED];
    for (int i = 0; i < LANES / PACKED; i++)
        half[i] = _mm256_loadu_si256((const __m256i *)w[v + i]);
    return joined(half);
}

INLINE PanelReal shared_at(const uint8_t *const *w, int v, int from) {
    __m256i half[LANES / PACKED];
    for (int i = 0; i < LANES / PACKED; i++)
        half[i] = (__m256i)bf16_lanes((const uint16_t *)w[v + i] + from);
    return (PanelReal)joined(half);
}

// 32 columns at a time, whose sums fit int16.
INLINE void packed_int4_tile(const int tokens, const int group, const PackedTile *tile) {
    const Kind kind = {.is_small = 1};
    const int step = group > BLOCK ? group : BLOCK;
    const int each = group < BLOCK ? group : BLOCK;  // columns of a sum
    const int64_t K = tile->K, blocks = K / BLOCK;
    const uint8_t *w[2] = {tile->w, tile->w + tile->apart};
    const int8_t *q = tile->x.q;
    const float *xscale = tile->x.scale, *sum = tile->x.sum;
    PanelReal acc[PACKED_TOKENS][VECTORS];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++) acc[t][v] = (PanelReal){0};
    for (int64_t k = 0; k < K; k += step) {
        PanelReal scale[VECTORS], offset[VECTORS];
        PanelWhole total[PACKED_TOKENS][VECTORS];
#pragma GCC unroll 4
        for (int part = 0; part < step / 32; part++) {
            if (part * 32 % group == 0) {
                for (int v = 0; v < VECTORS; v++) {
                    scale[v] = shared_at(w, v, 0);
                    offset[v] = panel_fused(scale[v], (PanelReal){0} - 8.0f, shared_at(w, v, PACKED));
                }
                for (int p = 0; p < 2; p++) {
                    _mm_prefetch((const char *)w[p] + AHEAD_INT4, _MM_HINT_T0);
                    w[p] += 4 * PACKED;
                }
            }
            if (part * 32 % each == 0) {
                for (int t = 0; t < tokens; t++)
                    for (int v = 0; v < VECTORS; v++)
                        acc[t][v] = panel_fused(offset[v], sum[t * (K / each)] - (PanelReal){0},
                                                acc[t][v]);
                sum++;
            }
            PanelWhole dot[PACKED_TOKENS][VECTORS];
            for (int t = 0; t < tokens; t++)
                for (int v = 0; v < VECTORS; v++) dot[t][v] = (PanelWhole){0};
            for (int p = 0; p < 2; p++)
                for (int i = 0; i < 128; i += 64)
                    _mm_prefetch((const char *)w[p] + AHEAD_INT4 + i, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                PanelBytes both[VECTORS];
                for (int v = 0; v < VECTORS; v++) both[v] = packed_at(w, v);
                w[0] += 4 * PACKED, w[1] += 4 * PACKED;
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++) {
                    PanelBytes levels[VECTORS];
                    for (int v = 0; v < VECTORS; v++)
                        levels[v] = (odd ? (PanelBytes)((PanelHalves)both[v] >> 4) : both[v]) & 15;
                    for (int t = 0; t < tokens; t++) {
                        const int8_t *x = q + t * K + part / 2 * BLOCK + part % 2 * 16;
                        int32_t four;
                        memcpy(&four, x + odd * BLOCK / 2 + 4 * i, 4);
                        for (int v = 0; v < VECTORS; v++) {
                            dot[t][v] =
                                panel_products(kind, dot[t][v], levels[v], (PanelWhole){0} + four);
                            KEEP_PANEL(dot[t][v]);
                        }
                    }
                }
            }
            for (int t = 0; t < tokens; t++)
                for (int v = 0; v < VECTORS; v++) {
                    const PanelWhole here = panel_sums(kind, dot[t][v]);
                    total[t][v] = group == 32 || part % 2 == 0 ? here : total[t][v] + here;
                    if (group == 32 || part % 2 == 1)
                        acc[t][v] = panel_fused(__builtin_convertvector(total[t][v], PanelReal),
                                                scale[v] * xscale[t * blocks + part / 2], acc[t][v]);
                }
        }
        q += step, xscale += step / BLOCK;
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 2; p++) {
            float *y = tile->y + t * tile->N + p * tile->further;
            memcpy(y, (const float *)acc[t] + p * PACKED, sizeof(float) * PACKED);
        }
}

#define DEFINE(group, tokens)                                                                     \
    static __attribute__((noinline)) void packed_int4_##group##_##tokens(const PackedTile *tile) { \
        packed_int4_tile(tokens, group, tile);                                                    \
    }
#if LANES == 16
#define EACH(DO, group)                                                                           \
    DO(group, 1) DO(group, 2) DO(group, 3) DO(group, 4) DO(group, 5) DO(group, 6) DO(group, 7)    \
        DO(group, 8)
#else
#define EACH(DO, group) DO(group, 1) DO(group, 2) DO(group, 3) DO(group, 4)
#endif
EACH(DEFINE, 32)
EACH(DEFINE, 64)
EACH(DEFINE, 128)
#undef DEFINE

#define NAME(group, tokens) packed_int4_##group##_##tokens,
static void (*const PACKED_TILES[3][PACKED_TOKENS])(const PackedTile *) = {
    {EACH(NAME, 32)},
    {EACH(NAME, 64)},
    {EACH(NAME, 128)},
};
#undef NAME
#undef EACH

// The panels of `tile`, which is at its first token, against `count` tokens.
static void packed_products(PackedTile tile, int64_t group, int64_t count) {
    for (int64_t left = count, tokens; left; left -= tokens) {
        const int64_t tiles = (left + PACKED_TOKENS - 1) / PACKED_TOKENS;
        tokens = (left + tiles - 1) / tiles;  // 5 of 4 at most are 3 and 2, not 4 and 1
        PACKED_TILES[group / 64][tokens - 1](&tile);
        tile.x.q += tokens * tile.K, tile.x.scale += tokens * (tile.K / BLOCK);
        tile.x.sum += tokens * (tile.K / (group < BLOCK ? group : BLOCK));
        tile.y += tokens * tile.N;
    }
}
#endif

// ---- many tokens, as panels.h says -------------------------------------------------------------

#ifdef HAVE_AVX2
#ifdef HAVE_VNNI
#define KIND_INT8 ((Kind){.group = BLOCK, .offset = 128})
#else
#define KIND_INT8 ((Kind){.group = BLOCK, .is_signed = 1, .is_parted = 1})
#endif
DEFINE_PANEL_TILES(INT8_TILES, KIND_INT8)

#define KIND_INT4(columns)                                                                        \
    ((Kind){.group = columns, .is_split = 1, .is_small = 1, .has_scale = 1, .has_zero = 1})
DEFINE_PANEL_TILES(INT4_TILES_32, KIND_INT4(32))
DEFINE_PANEL_TILES(INT4_TILES_64, KIND_INT4(64))

// 64 columns of eight rows, in order. to: of their first column and row.
#if LANES == 16 && defined(__AVX512F__)
INLINE void turn_block(const int8_t *const *rows, int64_t k, uint8_t (*to)[PANEL][4]) {
    const __m512i flip = _mm512_set1_epi32((int)0x80808080);
    const __m512i halves[2] = {
        _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
        _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15),
    };
    __m512i row[8];
    for (int r = 0; r < 8; r++) row[r] = _mm512_xor_si512(_mm512_loadu_si512(rows[r] + k), flip);
    for (int half = 0; half < 2; half++) {
        __m512i v[4], pair[4], out[4];
        for (int r = 0; r < 4; r++)  // 16 columns of rows r and r + 4, then the next 16
            v[r] = _mm512_permutex2var_epi64(row[r], halves[half], row[r + 4]);
        for (int i = 0; i < 2; i++) {
            pair[i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            pair[2 + i] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        for (int i = 0; i < 4; i += 2) {
            out[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 1]);
            out[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 1]);
        }
        for (int i = 0; i < 4; i++) {
            __m256i *low = (__m256i *)to[8 * half + i], *high = (__m256i *)to[8 * half + i + 4];
            _mm256_storeu_si256(low, _mm512_castsi512_si256(out[i]));
            _mm256_storeu_si256(high, _mm512_extracti64x4_epi64(out[i], 1));
        }
    }
}
#else
INLINE void turn_block(const int8_t *const *rows, int64_t k, uint8_t (*to)[PANEL][4]) {
    const __m256i flip = _mm256_set1_epi8((char)KIND_INT8.offset);
    for (int half = 0; half < 2; half++) {
        __m256i turned[8];
        turn_rows((const uint8_t *const *)rows, k + 32 * half, turned);
        for (int i = 0; i < 8; i++)
            _mm256_storeu_si256((__m256i *)to[8 * half + i], _mm256_xor_si256(turned[i], flip));
    }
}
#endif

INLINE void unpack_int4(const uint8_t *packed, int64_t group, int64_t columns, int row, Panel *to) {
    const Kind kind = KIND_INT4(group < BLOCK ? (int)group : BLOCK);
    const __m256i low = _mm256_set1_epi8(0x0f);
    __m256 scale = _mm256_setzero_ps(), zero = scale;
    for (int64_t k = 0; k < columns; k += BLOCK) {
        uint8_t (*level)[PANEL][4] = to->level + k / 4;
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK; i += 8, packed += 4 * PACKED) {
            if (i % kind.group == 0) {
                if ((k + i) % group == 0) {
                    scale = bf16_lanes((const uint16_t *)packed);
                    zero = _mm256_fnmadd_ps(_mm256_set1_ps(8), scale,
                                            bf16_lanes((const uint16_t *)packed + PACKED));
                    packed += 4 * PACKED;
                }
                _mm256_storeu_ps(to->scale[(k + i) / kind.group] + row, scale);
                _mm256_storeu_ps(to->zero[(k + i) / kind.group] + row, zero);
            }
            const __m256i both = _mm256_loadu_si256((const __m256i *)packed);
            const __m256i odd = _mm256_srli_epi16(both, 4);
            _mm256_storeu_si256((__m256i *)level[place_of(kind, i / 8)][row],
                                _mm256_and_si256(both, low));
            _mm256_storeu_si256((__m256i *)level[place_of(kind, i / 8 + 8)][row],
                                _mm256_and_si256(odd, low));
        }
    }
}

#define DEFINE(group)                                                                             \
    static void unpack_packed_int4_##group(const Weights *of, int64_t n, int64_t column,          \
                                           int64_t columns, Panel *to) {                          \
        for (int r = 0; r < PANEL; r += PACKED) {                                                 \
            const int64_t unit = (n + r < of->N ? n + r : of->N - 1) / PACKED;                    \
            const uint8_t *packed = of->w + unit * of->stride + packed_bytes(column, group);      \
            unpack_int4(packed, group, columns, r, to);                                           \
        }                                                                                         \
    }                                                                                             \
    static void unpack_int4_##group(const Weights *of, int64_t n, int64_t column, int64_t columns, \
                                    Panel *to) {                                                  \
        uint8_t packed[SPAN * PACKED];                                                            \
        for (int r = 0; r < PANEL; r += PACKED) {                                                 \
            pack_panel(of->w, of->shared[0], of->shared[1], n + r, of->N, of->K, group, column,   \
                       columns, packed);                                                          \
            unpack_int4(packed, group, columns, r, to);                                           \
        }                                                                                         \
    }
DEFINE(32)
DEFINE(64)
DEFINE(128)
#undef DEFINE

// Which of the formats above has so many columns in a group.
#define OF_GROUP(name, group) (group == 32 ? name##_32 : group == 64 ? name##_64 : name##_128)
#define INT4_TILES_128 INT4_TILES_64

#ifndef HAVE_VNNI
// Parts the levels of a block and LANES rows, as panels.h says.
INLINE void part_block(uint8_t (*level)[PANEL][4], int32_t *start, Rest *rest) {
    const __m256i one = _mm256_set1_epi16(1);
    const __m256i most = _mm256_set1_epi8(64), least = _mm256_set1_epi8(-64);
    __m256i total = _mm256_setzero_si256();
    rest->count = 0;
    for (int i = 0; i < BLOCK / 4; i++) {
        const __m256i levels = _mm256_loadu_si256((const __m256i *)level[i]);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), levels);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, one));
        const __m256i large = _mm256_cmpgt_epi16(_mm256_abs_epi16(pairs), _mm256_set1_epi16(128));
        if (_mm256_testz_si256(large, large)) continue;
        const __m256i part = _mm256_max_epi8(_mm256_min_epi8(levels, most), least);
        _mm256_storeu_si256((__m256i *)level[i], part);
        _mm256_storeu_si256((__m256i *)rest->level[rest->count], _mm256_sub_epi8(levels, part));
        rest->from[rest->count++] = (uint8_t)(4 * i);
    }
    const __m256i zero = _mm256_setzero_si256();
    _mm256_storeu_si256((__m256i *)start, _mm256_sub_epi32(zero, _mm256_slli_epi32(total, 7)));
}
#endif

static void unpack_int8(const Weights *of, int64_t n, int64_t column, int64_t columns, Panel *to) {
    for (int r = 0; r < PANEL; r += 8) {
        const int8_t *rows[8];
        for (int i = 0; i < 8; i++) {
            const int64_t row = n + r + i < of->N ? n + r + i : of->N - 1;
            rows[i] = (const int8_t *)of->w + row * of->K + column;
        }
        for (int64_t k = 0; k < columns; k += BLOCK) {
            uint8_t (*level)[PANEL][4] = (uint8_t(*)[PANEL][4])to->level[k / 4][r];
            turn_block(rows, k, level);
#ifndef HAVE_VNNI
            part_block(level, to->start[k / BLOCK] + r, &to->rest[k / BLOCK][r / LANES]);
#endif
        }
    }
}
#endif

// ---- walking over rows and tokens --------------------------------------------------------------

// CALL(rows, tokens, n, m) runs one tile, of rows n, n + apart, and so on; the branches make both
// counts constants. one, two: rows that meet one and two tokens together; 2 rows meet TOKENS.
// 
#define WALK(CALL, one, two)                                                               \
    const int64_t apart = N / one;                                                    \
    for (int64_t m0 = 0; m0 < M; m0 += window) {                                                  \
        int64_t m1 = m0 + window < M ? m0 + window : M;                                           \
        _Pragma("omp for schedule(static) nowait") for (int64_t n = 0; n < apart; n++) {          \
            int64_t m = m0;                                                                       \
            for (; m + TOKENS <= m1; m += TOKENS)                                                 \
                for (int r = 0; r < one; r += 2) { CALL(2, TOKENS, n + r * apart, m); }           \
            for (; m + 2 <= m1; m += 2)                                                           \
                for (int r = 0; r < one; r += two) { CALL(two, 2, n + r * apart, m); }            \
            for (; m < m1; m++) { CALL(one, 1, n, m); }                                           \
        }                                                                                         \
        _Pragma("omp single nowait") for (int64_t n = one * apart; n < N; n++)            \
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
#ifdef HAVE_AVX2
    if (M >= MANY && may_use_tiles()) {
        const Kind kind = KIND_INT8;
        const Weights of = {
            .unpack = unpack_int8,
            .tile = INT8_TILES,
            .w = (const uint8_t *)w,
            .unit = 1,
            .stride = K,
            .row_scale = wscale,
            .N = N,
            .K = K,
        };
        return many_products(&kind, &of, x, y, M, threads);
    }
#endif
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    if (q && xs) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, 0, 0, q + m * K, xs + m * blocks, NULL);
#define CALL(rows, tokens, n, m)                                                                  \
    int8_tile(rows, tokens, apart, w + (n)*K, wscale + (n), q + (m)*K, xs + (m)*blocks,           \
              y + (m)*N + (n), N, K)
            WALK(CALL, ROWS, ROWS)
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
#ifdef HAVE_AVX2
    if (M >= MANY_INT4 && may_use_tiles()) {
        const Kind kind = KIND_INT4(group < BLOCK ? (int)group : BLOCK);
        const Weights of = {
            .unpack = OF_GROUP(unpack_int4, group),
            .tile = OF_GROUP(INT4_TILES, group),
            .w = w,
            .unit = 1,
            .stride = K / 2,
            .shared = {scale, zero},
            .N = N,
            .K = K,
        };
        return many_products(&kind, &of, x, y, M, threads);
    }
#endif
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    float *sum = malloc(sizeof(float) * (size_t)(M * groups));
    const int64_t own = ROWS_INT4 * TOKENS * groups + GAP;  // floats of a thread, for the steps
    float *scratch = malloc(sizeof(float) * (size_t)(own * threads));
    if (q && xs && sum && scratch) {
#pragma omp parallel num_threads(threads)
        {
            float *steps = scratch + own * THREAD;
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, group, 1, q + m * K, xs + m * blocks, sum + m * groups);
#define CALL(rows, tokens, n, m)                                                                  \
    int4_tile(rows, tokens, apart, GROUP, w + (n)*K / 2, scale + (n)*groups, zero + (n)*groups,   \
              q + (m)*K, xs + (m)*blocks, sum + (m)*groups, steps, y + (m)*N + (n), N, K)
#define GROUP 32
            if (group == 32) { WALK(CALL, ROWS_INT4, 1) }
#undef GROUP
#define GROUP 64
            if (group == 64) { WALK(CALL, ROWS_INT4, 1) }
#undef GROUP
#define GROUP 128
            if (group == 128) { WALK(CALL, ROWS_INT4, 1) }
#undef GROUP
#undef CALL
        }
    }
    int failed = !q || !xs || !sum || !scratch;
    free(q), free(xs), free(sum), free(scratch);
    return failed;
}

#ifdef HAVE_AVX2
// to: uint8_t [N / PACKED, packed_bytes]; N is a multiple of PACKED.
void mmchat_pack_int4(const uint8_t *w, const uint16_t *scale, const uint16_t *zero, uint8_t *to,
                      int64_t N, int64_t K, int64_t group, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < N; n += PACKED)
        pack_panel(w, scale, zero, n, N, K, group, 0, K, to + n / PACKED * packed_bytes(K, group));
}

int mmchat_linear_packed_int4(const uint8_t *w, const float *x, float *y, int64_t M, int64_t N,
                              int64_t K, int64_t group, int threads) {
    const int64_t each = group < BLOCK ? group : BLOCK;  // columns of a sum
    const int64_t blocks = K / BLOCK, groups = K / each, bytes = packed_bytes(K, group);
    const int64_t panels = N / PACKED, pairs = (panels + 1) / 2;
    if (M >= MANY_PACKED && may_use_tiles()) {
        const Kind kind = KIND_INT4((int)each);
        const Weights of = {
            .unpack = OF_GROUP(unpack_packed_int4, group),
            .tile = OF_GROUP(INT4_TILES, group),
            .w = w,
            .unit = PACKED,
            .stride = bytes,
            .N = N,
            .K = K,
        };
        return many_products(&kind, &of, x, y, M, threads);
    }
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    float *sum = malloc(sizeof(float) * (size_t)(M * groups));
    if (q && xs && sum) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, each, 1, q + m * K, xs + m * blocks, sum + m * groups);
            for (int64_t m = 0; m < M; m += WINDOW) {
#pragma omp for schedule(static) nowait
                for (int64_t i = 0; i < pairs; i++) {
                    const int64_t apart = i + pairs < panels ? pairs : 0;  // of an odd number
                    const PackedTile tile = {
                        .w = w + i * bytes,
                        .apart = apart * bytes,
                        .further = apart * PACKED,
                        .x = {q + m * K, xs + m * blocks, sum + m * groups},
                        .y = y + m * N + i * PACKED,
                        .N = N,
                        .K = K,
                    };
                    packed_products(tile, group, m + WINDOW < M ? WINDOW : M - m);
                }
            }
        }
    }
    int failed = !q || !xs || !sum;
    free(q), free(xs), free(sum);
    return failed;
}
#endif

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
        WALK(CALL, ROWS, ROWS)
#undef CALL
    }
    free(split);
    return 0;
}

const char *mmchat_instructions(void) {
#ifdef HAVE_AMX
    if (may_use_tiles()) return "AMX";
#endif
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
