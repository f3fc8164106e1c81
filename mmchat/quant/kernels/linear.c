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
#include "products.h"

#ifdef _OPENMP
int omp_get_thread_num(void);  // omp.h does not come with every compiler that has OpenMP
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define TOKENS 4          // tokens that share one read of a weight
#define PACKED 8          // rows of int4 that are packed together
#define ROWS 4            // rows of int8 and bf16 read together for one or two tokens
#define ROWS_INT4 2       // rows of int4 for one token; one row at a time meets two
#define CACHED 262144     // bytes of activations that stay close to a core
#define AHEAD 1024        // bytes of each stream that are asked for before they are needed
#define AHEAD_INT4 2048   // likewise of int4
#define AHEAD_SCALES 2    // rows whose scales of int4 are asked for before they are needed
#ifdef HAVE_VNNI
#define MANY 5            // tokens from which int8 is brought into order first
#else
#define MANY 13
#endif
#define MANY_INT4 9       // tokens from which int4 that was not packed is packed first
#define PANEL 16          // rows of them that are in order together
#define SPAN 512          // columns likewise
#define STRIPE 128        // rows whose sums stay close to a core
#define WINDOW 64         // tokens likewise
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
// TOKENS tokens share what was read and brought out of its halves of bytes, and two panels share the
// activations. They lie far apart, as rows do above. Sums are added in the same order for any number
// of tokens. ARM and plain C read rows as they lie: what would be faster there was measured nowhere.

#ifdef HAVE_AVX2

// Bytes of a panel.
INLINE int64_t packed_bytes(int64_t K, int64_t group) {
    return K / group * (2 * 2 * PACKED + PACKED * group / 2);
}

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

static void pack_panel(const uint8_t *w, const uint16_t *scale, const uint16_t *zero, uint8_t *to,
                       int64_t K, int64_t group) {
    const int64_t groups = K / group;
    for (int64_t k = 0; k < K; k += BLOCK) {
        __m256i turned[8];
        turn(w + k / 2, K / 2, turned);
        for (int i = 0; i < 8; i++) {
            const int64_t at = k + 8 * i, g = at / group;
            if (at % group == 0) {
                uint16_t *shared = (uint16_t *)to;
                for (int r = 0; r < PACKED; r++) {
                    shared[r] = scale[r * groups + g];
                    shared[PACKED + r] = zero[r * groups + g];
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

// 32 columns at a time, whose sums fit int16.
INLINE void packed_int4_tile(const int tokens, const int group, const PackedTile *tile) {
    const int step = group > BLOCK ? group : BLOCK;
    const int64_t K = tile->K, blocks = K / BLOCK, groups = K / group;
    const __m256i low = _mm256_set1_epi8(0x0f);
    const uint8_t *w[2] = {tile->w, tile->w + tile->apart};
    const int8_t *q = tile->x.q;
    const float *xscale = tile->x.scale, *sum = tile->x.sum;
    __m256 acc[TOKENS][2];
    for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < K; k += step) {
        __m256 scale[2];
        __m256i total[TOKENS][2];
#pragma GCC unroll 4
        for (int part = 0; part < step / 32; part++) {
            if (part * 32 % group == 0) {
                for (int p = 0; p < 2; p++) {
                    _mm_prefetch((const char *)w[p] + AHEAD_INT4, _MM_HINT_T0);
                    scale[p] = bf16_lanes((const uint16_t *)w[p]);
                    __m256 zero = bf16_lanes((const uint16_t *)w[p] + PACKED);
                    __m256 offset = _mm256_fnmadd_ps(_mm256_set1_ps(8), scale[p], zero);
                    for (int t = 0; t < tokens; t++)
                        acc[t][p] = _mm256_fmadd_ps(offset, _mm256_broadcast_ss(sum + t * groups),
                                                    acc[t][p]);
                    w[p] += 4 * PACKED;
                }
                sum++;
            }
            __m256i dot[TOKENS][2];
            for (int t = 0; t < tokens; t++) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
            for (int p = 0; p < 2; p++)
                for (int i = 0; i < 128; i += 64)
                    _mm_prefetch((const char *)w[p] + AHEAD_INT4 + i, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m256i both[2];
                for (int p = 0; p < 2; p++) {
                    both[p] = _mm256_loadu_si256((const __m256i *)w[p]);
                    w[p] += 4 * PACKED;
                }
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++) {
                    __m256i levels[2];
                    for (int p = 0; p < 2; p++)
                        levels[p] = _mm256_and_si256(
                            odd ? _mm256_srli_epi16(both[p], 4) : both[p], low);
                    for (int t = 0; t < tokens; t++) {
                        const int8_t *x = q + t * K + part / 2 * BLOCK + part % 2 * 16;
                        __m256i four = repeated(x + odd * BLOCK / 2 + 4 * i);
                        for (int p = 0; p < 2; p++) {
                            dot[t][p] = add_levels(dot[t][p], levels[p], four);
                            KEEP(dot[t][p]);
                        }
                    }
                }
            }
            for (int t = 0; t < tokens; t++)
                for (int p = 0; p < 2; p++) {
                    __m256i here = levels_sum(dot[t][p]);
                    total[t][p] = group == 32 || part % 2 == 0 ? here
                                                               : _mm256_add_epi32(total[t][p], here);
                    if (group == 32 || part % 2 == 1)
                        acc[t][p] = _mm256_fmadd_ps(
                            _mm256_cvtepi32_ps(total[t][p]),
                            _mm256_mul_ps(scale[p],
                                          _mm256_broadcast_ss(xscale + t * blocks + part / 2)),
                            acc[t][p]);
                }
        }
        q += step, xscale += step / BLOCK;
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 2; p++)
            _mm256_storeu_ps(tile->y + t * tile->N + p * tile->further, acc[t][p]);
}

#define DEFINE(group, tokens)                                                                     \
    static __attribute__((noinline)) void packed_int4_##group##_##tokens(const PackedTile *tile) { \
        packed_int4_tile(tokens, group, tile);                                                    \
    }
#define DEFINE_ALL(group) DEFINE(group, 1) DEFINE(group, 2) DEFINE(group, 3) DEFINE(group, 4)
DEFINE_ALL(32)
DEFINE_ALL(64)
DEFINE_ALL(128)
#undef DEFINE_ALL
#undef DEFINE

static void (*const PACKED_TILES[3][TOKENS])(const PackedTile *) = {
    {packed_int4_32_1, packed_int4_32_2, packed_int4_32_3, packed_int4_32_4},
    {packed_int4_64_1, packed_int4_64_2, packed_int4_64_3, packed_int4_64_4},
    {packed_int4_128_1, packed_int4_128_2, packed_int4_128_3, packed_int4_128_4},
};

// The panels of `tile`, which is at its first token, against `count` tokens.
static void packed_products(PackedTile tile, int64_t group, int64_t count) {
    for (int64_t left = count, tokens; left; left -= tokens) {
        const int64_t tiles = (left + TOKENS - 1) / TOKENS;
        tokens = (left + tiles - 1) / tiles;  // 5 are 3 and 2: a single one costs half of four
        PACKED_TILES[group / 64][tokens - 1](&tile);
        tile.x.q += tokens * tile.K, tile.x.scale += tokens * (tile.K / BLOCK);
        tile.x.sum += tokens * (tile.K / group), tile.y += tokens * tile.N;
    }
}
#endif

// ---- many tokens -------------------------------------------------------------------------------
//
// The weights of PANEL rows and SPAN columns are brought into the order in which products read
// them, and then meet all tokens of a window. A vector has four columns of eight rows. It meets
// four activations of a token, repeated, so that each lane adds up the products of one row: no lanes
// are added to each other. On a Zen 3 a product with 64 tokens takes 0.79 of the time, 0.9 of what its
// integer instructions allow. Bringing weights into order costs as much as three tokens, so that
// fewer than MANY read them as they lie; with VNNI 64 tokens take 0.64 of the time, on a Zen 4, as
// signs move to the weights when they are brought into order. int4 that was not packed when it was loaded, as in compiled
// exports, is packed for MANY_INT4 tokens, two panels at a time.

#ifdef HAVE_AVX2
// One factor of dot4 is unsigned. With VNNI 128 is added to the weights, which `starts_of` takes
// away again; else the activations take over the signs of the weights.
INLINE __m256i unsigned_int8(__m256i w) {
#ifdef HAVE_VNNI
    return _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
#else
    return w;
#endif
}

INLINE __m256i int8_products(__m256i c, __m256i w, __m256i x) {  // w: of unsigned_int8
#ifdef HAVE_VNNI
    return dot4(c, w, x);
#else
    return dot4(c, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
#endif
}

// What the sums of products of each block of a token begin with.
static void starts_of(const int8_t *q, int32_t *start, int64_t K) {
    for (int64_t b = 0; b < K / BLOCK; b++) {
        int total = 0;
#ifdef HAVE_VNNI
        for (int i = 0; i < BLOCK; i++) total += q[b * BLOCK + i];
#else
        (void)q;
#endif
        start[b] = -128 * total;
    }
}

typedef struct {
    int8_t weight[SPAN * PANEL];  // [SPAN / 4, PANEL, 4]
} Panel;

static void int8_panel(Panel *to, const int8_t *w, int64_t K, int64_t columns) {
    for (int r = 0; r < PANEL; r += 8)
        for (int64_t k = 0; k < columns; k += 32) {
            __m256i turned[8];
            turn((const uint8_t *)w + r * K + k, K, turned);
            for (int i = 0; i < 8; i++) {
                int8_t *at = to->weight + (k + 4 * i) * PANEL + 4 * r;
                _mm256_storeu_si256((__m256i *)at, unsigned_int8(turned[i]));
            }
        }
}

// A panel and up to TOKENS tokens, at the first column of the panel.
typedef struct {
    const Panel *panel;
    const int8_t *q;        // [tokens, K]
    const float *xscale;    // [tokens, K / BLOCK]
    const int32_t *start;   // likewise
    float *out;             // [tokens, PANEL], to which the products are added
    int64_t K, columns;
    const int8_t *next;     // the panel after this one,
    int64_t first, end;     // and which bytes of each row are asked for meanwhile
} Tile;

// Into the second cache: in the first, rows whose distance is a power of two push each other out.
INLINE void ask_for(const int8_t *row, int64_t first, int64_t end) {
    for (; first < end; first += 64) _mm_prefetch((const char *)row + first, _MM_HINT_T1);
}

INLINE void add_product(float *out, __m256i dot, __m256 scale) {
    __m256 total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, _mm256_loadu_ps(out));
    _mm256_storeu_ps(out, total);
}

// What is read in loops is copied first, as a store might change it for all that a compiler knows.
INLINE void int8_panel_tile(const int tokens, const Tile *tile) {
    const int64_t K = tile->K, columns = tile->columns;
    const int64_t first = tile->first, end = tile->end;
    const int8_t *w = tile->panel->weight, *x[TOKENS];
    const int8_t *row = tile->next;
    const float *xscale = tile->xscale;
    const int32_t *start = tile->start;
    float *out = tile->out;
    for (int t = 0; t < tokens; t++) x[t] = tile->q + t * K;
    for (int64_t k = 0; k < columns; k += BLOCK, xscale++, start++, row += BLOCK * PANEL / SPAN * K) {
        for (int r = 0; r < BLOCK * PANEL / SPAN; r++) ask_for(row + r * K, first, end);
        __m256i dot[TOKENS][2];
        for (int t = 0; t < tokens; t++)
            dot[t][0] = dot[t][1] = _mm256_set1_epi32(start[t * (K / BLOCK)]);
        for (int i = 0; i < BLOCK; i += 16) {
#pragma GCC unroll 4
            for (int j = 0; j < 16; j += 4)
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++, w += 32) {
                    __m256i weight = _mm256_loadu_si256((const __m256i *)w);
                    for (int t = 0; t < tokens; t++) {
                        dot[t][r] = int8_products(dot[t][r], weight, repeated(x[t] + j));
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

#define DEFINE(tokens)                                                                            \
    static __attribute__((noinline)) void int8_tile_##tokens(const Tile *tile) {                  \
        int8_panel_tile(tokens, tile);                                                            \
    }
DEFINE(1)
DEFINE(2)
DEFINE(3)
DEFINE(4)
#undef DEFINE

static void (*const TILES[TOKENS])(const Tile *) = {int8_tile_1, int8_tile_2, int8_tile_3,
                                                    int8_tile_4};

// What a product reads and writes, rounded activations included.
typedef struct {
    const int8_t *w;
    const float *wscale;
    const int8_t *q;
    const float *xscale;
    const int32_t *start;
    float *y;
    int64_t M, N, K;
} Product;

// y but for the rows that fill no panel; for all threads of a team to call.
static void panel_products(const Product *of, int threads) {
    const int64_t M = of->M, N = of->N, K = of->K;
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
            const int64_t tiles = (count + TOKENS - 1) / TOKENS;
            const int64_t share = (SPAN / 64 + tiles - 1) / tiles * 64;  // that each tile asks for
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
                                 .next = of->w + next};
                    int8_panel(&panel, of->w + begin, K, columns);
                    for (int64_t t = 0; t < count; t += TOKENS) {
                        const int64_t at = (m0 + t) * K + k, left = count - t;
                        tile.q = of->q + at, tile.xscale = of->xscale + at / BLOCK;
                        tile.start = of->start + at / BLOCK;
                        tile.first = t / TOKENS * share;
                        tile.end = tile.first + share < SPAN ? tile.first + share : SPAN;
                        TILES[left < TOKENS ? left - 1 : TOKENS - 1](&tile);
                        tile.out += TOKENS * PANEL;
                    }
                }
            const float *sum = sums;
            for (int64_t p = p0; p < p1; p++)
                for (int64_t t = 0; t < count; t++)
                    for (int64_t n = p * PANEL; n < (p + 1) * PANEL; n += 8, sum += 8) {
                        __m256 scale = _mm256_loadu_ps(of->wscale + n);
                        _mm256_storeu_ps(of->y + (m0 + t) * N + n,
                                         _mm256_mul_ps(_mm256_loadu_ps(sum), scale));
                    }
        }
    }
}
#endif

// Rows that are brought into order for M tokens, where `many` of them make it worth while.
static int64_t rows_in_panels(int64_t M, int64_t N, int64_t many) {
#ifdef HAVE_AVX2
    return M < many ? 0 : N / PANEL * PANEL;
#else
    (void)M, (void)N, (void)many;
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
    const int64_t first = rows_in_panels(M, N, MANY);
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    int32_t *start = malloc(sizeof(int32_t) * (size_t)(M * blocks));
    if (q && xs && start) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) {
                round_token(x + m * K, K, 0, 0, q + m * K, xs + m * blocks, NULL);
#ifdef HAVE_AVX2
                if (first) starts_of(q + m * K, start + m * blocks, K);
#endif
            }
#ifdef HAVE_AVX2
            const Product all = {.w = w, .wscale = wscale, .q = q, .xscale = xs,
                                 .start = start, .y = y, .M = M, .N = N, .K = K};
            if (first) panel_products(&all, threads);
#endif
#define CALL(rows, tokens, n, m)                                                                  \
    int8_tile(rows, tokens, apart, w + (n)*K, wscale + (n), q + (m)*K, xs + (m)*blocks,           \
              y + (m)*N + (n), N, K)
            WALK(CALL, first, ROWS, ROWS)
#undef CALL
        }
    }
    int failed = !q || !xs || !start;
    free(q), free(xs), free(start);
    return failed;
}

int mmchat_linear_int4(const uint8_t *w, const uint16_t *scale, const uint16_t *zero,
                       const float *x, float *y, int64_t M, int64_t N, int64_t K, int64_t group,
                       int threads) {
    const int64_t blocks = K / BLOCK, groups = K / group, window = tokens_at_once(K);
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    float *sum = malloc(sizeof(float) * (size_t)(M * groups));
    const int64_t first = rows_in_panels(M, N, MANY_INT4);
    int64_t own = ROWS_INT4 * TOKENS * groups;  // floats of a thread: the steps of a tile
#ifdef HAVE_AVX2
    if (first) own += PANEL / PACKED * packed_bytes(K, group) / 4;  // or packed rows
#endif
    own += GAP;
    float *scratch = malloc(sizeof(float) * (size_t)(own * threads));
    if (q && xs && sum && scratch) {
#pragma omp parallel num_threads(threads)
        {
            float *steps = scratch + own * THREAD;
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, group, 1, q + m * K, xs + m * blocks, sum + m * groups);
#ifdef HAVE_AVX2
            const int64_t bytes = packed_bytes(K, group);
            for (int64_t m = 0; first && m < M; m += WINDOW)
#pragma omp for schedule(static) nowait
                for (int64_t n = 0; n < first; n += PANEL) {
                    uint8_t *panels = (uint8_t *)steps;
                    for (int64_t r = 0; r < PANEL; r += PACKED)
                        pack_panel(w + (n + r) * K / 2, scale + (n + r) * groups,
                                   zero + (n + r) * groups, panels + r / PACKED * bytes, K, group);
                    const PackedTile tile = {
                        .w = panels,
                        .apart = bytes,
                        .further = PACKED,
                        .x = {q + m * K, xs + m * blocks, sum + m * groups},
                        .y = y + m * N + n,
                        .N = N,
                        .K = K,
                    };
                    packed_products(tile, group, m + WINDOW < M ? WINDOW : M - m);
                }
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

#ifdef HAVE_AVX2
// to: uint8_t [N / PACKED, packed_bytes]; N is a multiple of PACKED. Pages of 2 MB are not asked for:
// products with one token would take 0.9 of the time, but packing four times as long.
void mmchat_pack_int4(const uint8_t *w, const uint16_t *scale, const uint16_t *zero, uint8_t *to,
                      int64_t N, int64_t K, int64_t group, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < N; n += PACKED)
        pack_panel(w + n * K / 2, scale + n * (K / group), zero + n * (K / group),
                   to + n / PACKED * packed_bytes(K, group), K, group);
}

int mmchat_linear_packed_int4(const uint8_t *w, const float *x, float *y, int64_t M, int64_t N,
                              int64_t K, int64_t group, int threads) {
    const int64_t blocks = K / BLOCK, groups = K / group, bytes = packed_bytes(K, group);
    const int64_t panels = N / PACKED, pairs = (panels + 1) / 2;
    int8_t *q = malloc((size_t)(M * K));
    float *xs = malloc(sizeof(float) * (size_t)(M * blocks));
    float *sum = malloc(sizeof(float) * (size_t)(M * groups));
    if (q && xs && sum) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                round_token(x + m * K, K, group, 1, q + m * K, xs + m * blocks, sum + m * groups);
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
