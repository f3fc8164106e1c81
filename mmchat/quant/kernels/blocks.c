// y = x · Wᵀ of weights in blocks (blocks_reference.py has the three formats and their order).
//
// A panel of eight rows is one stream: for each 64 columns its scales, then its levels. A vector has
// four bytes of each row and meets four activations, repeated, so that each lane adds up the products
// of one row, and scales serve where they lie. Up to TOKENS tokens share what was read and unpacked,
// and two panels share the activations; those lie far apart, so that each is an unbroken stream.
//
// Activations are rounded to int8 with a scale for each 64, as in linear.c. Levels are unsigned;
// sums begin with what their offset takes away, so that products stay whole numbers. Sums are added
// in the same order for any number of tokens. Written in vectors of 32 bytes that compilers bring to
// any processor; only sums of products of bytes are said for each.

#include <stdlib.h>

#include "blocks.h"
#include "panels.h"

#define TOKENS 4     // tokens that share one read of a weight
#define AHEAD 2048   // bytes of each stream that are asked for before they are needed
#define WINDOW 64    // tokens whose activations stay close to a core

typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef uint16_t Words __attribute__((vector_size(32)));
typedef int32_t Whole __attribute__((vector_size(32)));
typedef float Real __attribute__((vector_size(32)));

// Without VNNI products of bytes pass through int16, for which 8 bits are too many: those are signed
// there and have no offset.
#if defined(HAVE_AVX2) && !defined(HAVE_VNNI)
#define SIGNED8 1
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define SIGNED8 1
#else
#define SIGNED8 0
#endif

INLINE int is_wide(const int bits) { return bits == 8 || bits == TABLE; }

INLINE int offset_of(const int bits) { return is_wide(bits) && SIGNED8 ? 0 : level_offset(bits); }

// ---- eight lanes -------------------------------------------------------------------------------

#ifndef KEEP
#define KEEP(v) (void)(v)
#endif

INLINE Real real_of(Whole v) { return __builtin_convertvector(v, Real); }

INLINE Whole whole_of(const uint8_t *at, int is_signed) {
#ifdef HAVE_AVX2  // of which compilers make no single instruction by themselves
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)at);
    return (Whole)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    Whole out;
    for (int i = 0; i < ROWS; i++) out[i] = is_signed ? (int8_t)at[i] : at[i];
    return out;
#endif
}

INLINE Real half_of(const uint8_t *at) {
#if defined(HAVE_AVX2) && defined(__F16C__)
    return (Real)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    Real out;
    for (int i = 0; i < ROWS; i++) {
        uint16_t bits;
        memcpy(&bits, at + 2 * i, 2);
        out[i] = half_to_float(bits);
    }
    return out;
#endif
}

INLINE Real real_at(const uint8_t *at) {
    Real out;
    memcpy(&out, at, sizeof(Real));
    return out;
}

// table: its 16 numbers twice; at: 0 to 15.
INLINE Bytes looked_up(Bytes table, Bytes at) {
#ifdef HAVE_AVX2
    return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)at);
#elif defined(__aarch64__)
    uint8x16_t numbers, half[2];
    memcpy(&numbers, &table, 16), memcpy(half, &at, 32);
    for (int i = 0; i < 2; i++) half[i] = vqtbl1q_u8(numbers, half[i]);
    memcpy(&at, half, 32);
    return at;
#else
    for (int i = 0; i < 32; i++) at[i] = table[at[i]];
    return at;
#endif
}

INLINE Real repeat_real(const float *at) {
#ifdef HAVE_AVX2
    return (Real)_mm256_broadcast_ss(at);
#else
    return (Real){*at, *at, *at, *at, *at, *at, *at, *at};
#endif
}

INLINE Real fused(Real a, Real b, Real c) {
#ifdef HAVE_AVX2
    return (Real)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Products of four bytes of each row with those of x are added to c. levels: 0 to 2^bits - 1.
INLINE Whole add_products(const int bits, Whole c, Bytes levels, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
#ifdef HAVE_AVX2
    const __m256i others = _mm256_set1_epi32(four);
    __m256i sum = (__m256i)c, a = (__m256i)levels;
    if (is_wide(bits) && SIGNED8) {
        const __m256i w = (__m256i)(levels ^ 0x80);
        sum = dot4(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(others, w));
    } else if (bits == 4) {
        sum = add_levels(sum, a, others);
    } else {
        sum = dot4(sum, a, others);
    }
    KEEP(sum);
    return (Whole)sum;
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t others = vreinterpretq_s8_s32(vdupq_n_s32(four));
    const Bytes w = is_wide(bits) ? levels ^ 0x80 : levels;
    int32x4_t sum[2];
    int8x16_t rows[2];
    memcpy(sum, &c, 32), memcpy(rows, &w, 32);
    for (int i = 0; i < 2; i++) sum[i] = vdotq_s32(sum[i], rows[i], others);
    memcpy(&c, sum, 32);
    return c;
#else
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 4; i++) c[r] += levels[4 * r + i] * x[i];
    return c;
#endif
}

// What add_products has added up, from `start` on.
INLINE Whole sum_of(const int bits, Whole c, int32_t start) {
#if defined(HAVE_AVX2) && !defined(HAVE_VNNI)
    if (bits == 4) c = (Whole)levels_sum((__m256i)c);
    return c + start;
#else
    (void)bits, (void)start;  // where sums began
    return c;
#endif
}

INLINE Whole begin_with(int32_t start) {
#if defined(HAVE_AVX2) && !defined(HAVE_VNNI)
    (void)start;
    return (Whole){0};
#else
    return (Whole){0} + start;
#endif
}

// ---- products ----------------------------------------------------------------------------------

// Activations at the first token of a tile.
typedef struct {
    const int8_t *q;       // [M, K]; but with 8 bits each 64 as even and then odd ones
    const float *scale;    // [M, K / 64]
    const int32_t *start;  // [M, K / group]: minus the offset times the sum of a group
    const float *sum;      // [M, K / group], with 4 bits: the sum of what a group stands for
} Activations;

// Two panels and some tokens.
typedef struct {
    const uint8_t *w;  // the first panel
    int64_t apart;     // bytes to the other one, whose rows are
    int64_t further;   // so many further on
    const uint8_t *table;  // of TABLE, 16 numbers and 128
    Activations x;
    float *y;          // [tokens, N], at the first row and token
    int64_t N, K;
} Tile;

// Levels of four columns, 4·`at` to 4·`at` + 3 with 8 bits; else of eight, every second one, the
// even ones if `at` is even.
INLINE Bytes levels_at(const int bits, const uint8_t *w, const int at, Bytes table) {
    Bytes both;
    if (bits == 8) {
        memcpy(&both, w + 32 * at, 32);
        return both;
    }
    memcpy(&both, w + at / 2 * 32, 32);
    Bytes low = (at % 2 ? (Bytes)((Words)both >> 4) : both) & 15;
    if (bits == 4) return low;
    if (bits == TABLE) return looked_up(table, low);
    Bytes upper;
    memcpy(&upper, w + 256 + at / 4 * 32, 32);
    const Words words = (Words)upper;
    const Words placed = at % 4 == 0 ? words << 4 : at % 4 == 1 ? words << 2
                         : at % 4 == 2 ? words : words >> 2;
    return low | ((Bytes)placed & 0x30);
}

// Of a group g of a block, for eight rows. zero: with 4 bits alone.
INLINE void scales_at(const int bits, const uint8_t *w, const int g, Real large, Real large_zero,
                      Real *scale, Real *zero) {
    if (bits == 8) *scale = half_of(w + 16 * g);
    if (bits == TABLE) *scale = real_at(w);
    if (bits == 6) *scale = large * real_of(whole_of(w + 8 * g, 1));
    if (bits == 4) {
        *scale = large * real_of(whole_of(w + 16 * g, 0));
        *zero = large_zero * real_of(whole_of(w + 16 * g + 8, 1));
    }
}

INLINE void block_tile(const int bits, const int tokens, const Tile *tile) {
    const int group = group_of(bits), each = group / 4;  // vectors of a group
    const int64_t K = tile->K, parts = K / BLOCK, groups = K / group;
    const uint8_t *w[2] = {tile->w, tile->w + tile->apart};
    const int8_t *q = tile->x.q;
    const float *xscale = tile->x.scale, *sum = tile->x.sum;
    const int32_t *start = tile->x.start;
    Bytes table = {0};
    for (int i = 0; i < 2 && bits == TABLE; i++) memcpy((uint8_t *)&table + 16 * i, tile->table, 16);
    Real acc[TOKENS][2], large[2] = {{0}}, large_zero[2] = {{0}};
    for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = (Real){0};
    for (int64_t part = 0; part < parts; part++) {
        for (int p = 0; p < 2; p++) {
            if (large_bytes(bits) && part % (LARGE / BLOCK) == 0) {
                large[p] = half_of(w[p]);
                if (bits == 4) large_zero[p] = half_of(w[p] + 16);
                w[p] += large_bytes(bits);
            }
            for (int i = 0; i < part_bytes(bits); i += 64) __builtin_prefetch(w[p] + AHEAD + i);
        }
#pragma GCC unroll 4
        for (int g = 0; g < BLOCK / group; g++) {
            Real scale[2], zero[2];
            Whole dot[TOKENS][2];
            for (int p = 0; p < 2; p++) {
                scales_at(bits, w[p], g, large[p], large_zero[p], &scale[p], &zero[p]);
                for (int t = 0; t < tokens; t++) dot[t][p] = begin_with(start[t * groups + g]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < each; i++) {
                const int at = g * each + i;
                const int from = bits == 8 ? 4 * at : at % 2 * 32 + at / 2 * 4;
                Bytes levels[2];
                for (int p = 0; p < 2; p++) levels[p] = levels_at(bits, w[p] + 32, at, table);
                for (int t = 0; t < tokens; t++)
                    for (int p = 0; p < 2; p++)
                        dot[t][p] = add_products(bits, dot[t][p], levels[p], q + t * K + from);
            }
            for (int t = 0; t < tokens; t++)
                for (int p = 0; p < 2; p++) {
                    const Real total = real_of(sum_of(bits, dot[t][p], start[t * groups + g]));
                    if (bits == 4)
                        acc[t][p] = fused(zero[p], repeat_real(sum + t * groups + g), acc[t][p]);
                    acc[t][p] = fused(total, scale[p] * repeat_real(xscale + t * parts), acc[t][p]);
                }
        }
        w[0] += part_bytes(bits), w[1] += part_bytes(bits);
        q += BLOCK, xscale++, start += BLOCK / group, sum += BLOCK / group;
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 2; p++)
            memcpy(tile->y + t * tile->N + p * tile->further, &acc[t][p], sizeof(Real));
}

#define DEFINE(bits, tokens)                                                                      \
    static __attribute__((noinline)) void tile_##bits##_##tokens(const Tile *tile) {              \
        block_tile(bits, tokens, tile);                                                           \
    }
#define DEFINE_ALL(bits) DEFINE(bits, 1) DEFINE(bits, 2) DEFINE(bits, 3) DEFINE(bits, 4)
DEFINE_ALL(4)
DEFINE_ALL(5)
DEFINE_ALL(6)
DEFINE_ALL(8)
#undef DEFINE_ALL
#undef DEFINE

static void (*const TILES[][TOKENS])(const Tile *) = {
    [4] = {tile_4_1, tile_4_2, tile_4_3, tile_4_4},
    [TABLE] = {tile_5_1, tile_5_2, tile_5_3, tile_5_4},
    [6] = {tile_6_1, tile_6_2, tile_6_3, tile_6_4},
    [8] = {tile_8_1, tile_8_2, tile_8_3, tile_8_4},
};

// The panels of `tile`, which is at its first token, against `count` tokens.
static void tile_products(Tile tile, int bits, int64_t count) {
    const int64_t K = tile.K, groups = K / group_of(bits);
    for (int64_t left = count, tokens; left; left -= tokens) {
        const int64_t tiles = (left + TOKENS - 1) / TOKENS;
        tokens = (left + tiles - 1) / tiles;  // 5 are 3 and 2: a single one costs half of four
        TILES[bits][tokens - 1](&tile);
        tile.x.q += tokens * K, tile.x.scale += tokens * (K / BLOCK);
        tile.x.start += tokens * groups, tile.x.sum += tokens * groups, tile.y += tokens * tile.N;
    }
}

// ---- many tokens -------------------------------------------------------------------------------

#ifdef HAVE_AVX2
#define MANY (LANES == 16 ? 11 : 17)  // tokens for which panels are unpacked first

INLINE Kind kind_of(const int bits) {
    const int wide = is_wide(bits);
    return (Kind){.group = group_of(bits), .is_split = bits != 8, .offset = offset_of(bits),
                  .is_small = bits == 4, .is_signed = wide && SIGNED8, .has_scale = 1,
                  .has_zero = bits == 4};
}

INLINE void store_lanes(float *to, Real lanes) { memcpy(to, &lanes, sizeof(lanes)); }

INLINE void unpack_block(const int bits, const uint8_t *w, Real large, Real large_zero, Bytes table,
                         int64_t block, int row, Panel *to) {
    const Kind kind = kind_of(bits);
    const int groups = BLOCK / kind.group;
    for (int g = 0; g < groups; g++) {
        Real scale, zero;
        scales_at(bits, w, g, large, large_zero, &scale, &zero);
        store_lanes(to->scale[block * groups + g] + row, scale);
        if (kind.has_zero) store_lanes(to->zero[block * groups + g] + row, zero);
    }
#pragma GCC unroll 16
    for (int at = 0; at < 16; at++) {
        const Bytes levels = levels_at(bits, w + 32, at, table);
        const Bytes given = kind.is_signed ? levels ^ 0x80 : levels;
        const int place = place_of(kind, kind.is_split ? at / 2 + at % 2 * 8 : at);
        memcpy(to->level[block * (BLOCK / 4) + place][row], &given, sizeof(given));
    }
}

INLINE void unpack_blocks(const int bits, const Weights *of, int64_t n, int64_t column,
                          int64_t columns, Panel *to) {
    Bytes table = {0};
    for (int i = 0; i < 2 && bits == TABLE; i++) memcpy((uint8_t *)&table + 16 * i, of->table, 16);
    for (int r = 0; r < PANEL; r += ROWS) {
        const int64_t unit = (n + r < of->N ? n + r : of->N - 1) / ROWS;
        const uint8_t *w = of->w + unit * of->stride + panel_bytes(bits, column);
        Real large = {0}, large_zero = {0};
        for (int64_t k = 0; k < columns; k += BLOCK, w += part_bytes(bits)) {
            if (large_bytes(bits) && k % LARGE == 0) {
                large = half_of(w);
                if (bits == 4) large_zero = half_of(w + 16);
                w += large_bytes(bits);
            }
            unpack_block(bits, w, large, large_zero, table, k / BLOCK, r, to);
        }
    }
}

#define DEFINE(bits)                                                                              \
    DEFINE_PANEL_TILES(PANEL_TILES_##bits, kind_of(bits))                                         \
    static void unpack_##bits(const Weights *of, int64_t n, int64_t column, int64_t columns,      \
                              Panel *to) {                                                        \
        unpack_blocks(bits, of, n, column, columns, to);                                          \
    }
DEFINE(4)
DEFINE(5)
DEFINE(6)
DEFINE(8)
#undef DEFINE

// The format of so many bits in the place of 4, TABLE, 6 and 8.
#define OF_BITS(name, bits)                                                                       \
    (bits == 4 ? name##_4 : bits == TABLE ? name##_5 : bits == 6 ? name##_6 : name##_8)
#endif

// The starts and sums of one token, whose rounded activations are in q.
static void sum_groups(int bits, const int8_t *q, const float *scale, int32_t *start, float *sum,
                       int64_t K) {
    const int group = group_of(bits), is_split = bits != 8;
    for (int64_t g = 0; g < K / group; g++) {
        const int8_t *block = q + g * group / BLOCK * BLOCK;
        const int64_t from = g * group % BLOCK;
        int32_t total = 0;
        for (int i = 0; i < group / 2; i++)
            total += is_split ? block[from / 2 + i] + block[BLOCK / 2 + from / 2 + i]
                              : block[from + 2 * i] + block[from + 2 * i + 1];
        start[g] = -offset_of(bits) * total;
        sum[g] = scale[g * group / BLOCK] * (float)total;
    }
}

// bits: 4, 6, 8 or TABLE; K a multiple of 64, N of 8. Returns 0, or 1 when there is no memory.
int mmchat_linear_blocks(const uint8_t *w, const uint8_t *table, const float *x, float *y, int64_t M,
                         int64_t N, int64_t K, int64_t bits, int threads) {
    const int64_t blocks = K / BLOCK, groups = K / group_of((int)bits);
    const int64_t bytes = panel_bytes((int)bits, K);
#ifdef HAVE_AVX2
    if (M >= MANY && may_use_tiles()) {
        const Kind kind = kind_of((int)bits);
        const Weights of = {
            .unpack = OF_BITS(unpack, bits),
            .tile = OF_BITS(PANEL_TILES, bits),
            .w = w,
            .unit = ROWS,
            .stride = bytes,
            .table = table,
            .N = N,
            .K = K,
        };
        return many_products(&kind, &of, x, y, M, threads);
    }
#endif
    const int64_t panels = N / ROWS, pairs = (panels + 1) / 2;
    int8_t *q = malloc((size_t)(M * K));
    float *scale = malloc(sizeof(float) * (size_t)(M * blocks));
    float *sum = malloc(sizeof(float) * (size_t)(M * groups));
    int32_t *start = malloc(sizeof(int32_t) * (size_t)(M * groups));
    const int failed = !q || !scale || !sum || !start;
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) {
                round_token(x + m * K, K, 0, bits != 8, q + m * K, scale + m * blocks, NULL);
                sum_groups((int)bits, q + m * K, scale + m * blocks, start + m * groups,
                           sum + m * groups, K);
            }
            for (int64_t m = 0; m < M; m += WINDOW) {
#pragma omp for schedule(static) nowait
                for (int64_t i = 0; i < pairs; i++) {
                    const int64_t apart = i + pairs < panels ? pairs : 0;  // of an odd number
                    const Tile tile = {
                        .w = w + i * bytes,
                        .apart = apart * bytes,
                        .further = apart * ROWS,
                        .table = table,
                        .x = {q + m * K, scale + m * blocks, start + m * groups, sum + m * groups},
                        .y = y + m * N + i * ROWS,
                        .N = N,
                        .K = K,
                    };
                    tile_products(tile, (int)bits, m + WINDOW < M ? WINDOW : M - m);
                }
            }
        }
    }
    free(q), free(scale), free(sum), free(start);
    return failed;
}
