// y = x · Wᵀ for many tokens, of weights of any format with x86's vectors.
//
// Levels of PANEL rows and SPAN columns are unpacked to bytes, in the order in which products read
// them, and then meet all tokens of a window, MOST at a time. A vector has four columns of LANES rows
// and meets four activations of a token, repeated, so that each lane adds up the products of one row:
// no lanes are added to each other, and scales serve where they lie. Activations of MOST tokens lie
// together too, block by block. Unpacking costs as much as some tokens, so that few are better off
// with the weights as they lie.
//
// Matrix units (AMX) read the same panels and activations: 16 such vectors are one of their tiles.

#ifndef MMCHAT_PANELS_H
#define MMCHAT_PANELS_H

#include <stddef.h>
#include <stdlib.h>

#include "products.h"

#ifdef HAVE_AVX2

#ifdef HAVE_AMX
#define LANES 16
#define MOST 16  // tokens of a tile, which has so many rows
#elif defined(__AVX512VNNI__)
#define LANES 16
#define MOST 6  // 8 take 1.1 times as long each, though registers hold their sums
#else
#define LANES 8
#define MOST 4
#endif
#define PANEL (2 * LANES)
#define SPAN 512
#define MANY_TILES (MOST == 16 ? 16 : 44)  // that meet a panel while it is unpacked
// panels that meet a span of activations before the next one, which thus stays in 512 KB of cache
#define TOGETHER (LANES == 16 ? 1 : 4)
#define SMALLEST 16      // columns of a block that share a scale

typedef uint8_t PanelBytes __attribute__((vector_size(4 * LANES)));
typedef uint16_t PanelHalves __attribute__((vector_size(4 * LANES)));
typedef int32_t PanelWhole __attribute__((vector_size(4 * LANES)));
typedef float PanelReal __attribute__((vector_size(4 * LANES)));

#if LANES == 16 && !defined(__AVX512F__)  // emulated
#define KEEP_PANEL(v) (void)(v)
#else
#define KEEP_PANEL(v) __asm__("" : "+v"(v))  // as KEEP
#endif

// How the weights of a format meet activations. All are constants where they are used.
typedef struct {
    int group;      // columns of a block that share a scale: 16, 32 or 64
    int is_split;   // even columns of a block stand before odd ones
    int offset;     // what is taken from each level
    int is_small;   // levels are 15 at most
    int is_signed;  // levels are int8, and products pass through int16
    int is_parted;  // those that are too large for that stand in two parts
    int has_scale;  // for each group, not for each row
    int has_zero;   // for each group, which is added to each of its weights
} Kind;

// Second parts of the levels of a block and LANES rows, of as many vectors as have one.
typedef struct {
    int32_t count;
    uint8_t from[BLOCK / 4];  // their first columns
    int8_t level[BLOCK / 4][LANES][4] __attribute__((aligned(64)));
} Rest;

typedef struct {
    uint8_t level[SPAN / 4][PANEL][4];
    float scale[SPAN / SMALLEST][PANEL];
    float zero[SPAN / SMALLEST][PANEL];
    int32_t start[SPAN / BLOCK][PANEL];  // where levels are parted: -128 times the sum of a block
    Rest rest[SPAN / BLOCK][2];
} __attribute__((aligned(64))) Panel;

// A block of the rounded activations of MOST tokens. Of two numbers that are multiplied one is
// unsigned, and where levels are signed, that is the activation:
// - Where levels are parted, 128 is added to it, and `start` of the panel takes that away. Two products
//   fit int16 together if two levels of one sign are 128 at most together. Where one scale serves a row,
//   nearly all are: the largest is 127, most are far smaller. A vector with others stands in two parts,
//   which fit. Int8 levels of large outliers take 0.8 of the time of what follows, normal ones 0.93.
// - Else q is without its signs, and where an activation is below zero the bits of the levels are
//   turned over. That makes -w - 1 of w in one step, which any unit of the processor takes, where
//   AVX2's own for signs waits for those that multiply; `start` makes up for it.
typedef struct {
    int8_t q[MOST][BLOCK];
    float scale[MOST];
    union {
        int32_t start;  // minus the offset times the sum of a group, or what is said above,
        float sum;      // or with zeros the sum of what a group stands for
    } of[BLOCK / SMALLEST][MOST];
    int8_t turned[MOST][BLOCK] __attribute__((aligned(64)));  // -1 below zero, as said above
} __attribute__((aligned(64))) Slab;

INLINE int is_turned(const Kind kind) { return kind.is_signed && !kind.is_parted; }

// The one that stands so many after `first`.
INLINE Slab *slab_after(const Kind kind, const Slab *first, int64_t count) {
    const int64_t bytes = is_turned(kind) ? sizeof(Slab) : offsetof(Slab, turned);
    return (Slab *)((char *)first + count * bytes);
}

// Lines of memory that are asked for meanwhile, so many for each block.
typedef struct {
    const char *const *line;
    int64_t each;
} Ahead;

// tokens: of the slabs; out: their sums [tokens, PANEL], to which the products are added.
typedef void PanelTile(const Panel *panel, const Slab *x, int64_t columns, int tokens, Ahead ahead,
                       float *out);

// Weights that can be unpacked. Rows behind the last one are unpacked too, as anything.
typedef struct Weights {
    void (*unpack)(const struct Weights *of, int64_t n, int64_t column, int64_t columns, Panel *to);
    PanelTile *const *tile;     // for MOST tokens, one less and two less, where that is a constant
    const uint8_t *w;
    int64_t unit, stride;       // rows that lie together, and their bytes
    const uint16_t *shared[2];  // scales and zeros of groups, where they lie elsewhere
    const float *row_scale;     // [N], NULL where groups have theirs
    const uint8_t *table;       // of blocks that have one
    int64_t N, K;
} Weights;

// Vectors of the group g stand together: those of its even columns first where a block is split.
// vector: of four columns of a block, as activations have them.
INLINE int place_of(const Kind kind, const int vector) {
    const int odd = vector >= 8, half = kind.group / 8, v = vector - 8 * odd, g = v / half;
    return kind.is_split ? (2 * g + odd) * half + v % half : vector;
}

INLINE PanelReal panel_fused(PanelReal a, PanelReal b, PanelReal c) {
#if LANES == 16 && defined(__AVX512F__)
    return (PanelReal)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (PanelReal)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE PanelWhole panel_products(const Kind kind, PanelWhole c, PanelBytes w, PanelWhole x) {
#if LANES == 16
    (void)kind;
    return (PanelWhole)_mm512_dpbusd_epi32((__m512i)c, (__m512i)w, (__m512i)x);
#else
    const __m256i sum = (__m256i)c, a = (__m256i)w, b = (__m256i)x;
    if (kind.is_small) return (PanelWhole)add_levels(sum, a, b);
    return (PanelWhole)(kind.is_signed ? dot4(sum, b, a) : dot4(sum, a, b));
#endif
}

INLINE PanelWhole panel_sums(const Kind kind, PanelWhole c) {
#if !defined(HAVE_VNNI)
    if (kind.is_small) return (PanelWhole)levels_sum((__m256i)c);
#endif
    (void)kind;
    return c;
}

// Adds the products of a group's levels with those of token t, scaled, to what stands at `out`.
INLINE void add_scaled(const Kind kind, PanelWhole sum, const Slab *x, int t, int g,
                       const float *scale, const float *zero, float *out) {
    PanelReal total, step = x->scale[t] - (PanelReal){0}, other;
    memcpy(&total, out, sizeof(total));
    if (kind.has_scale) {
        memcpy(&other, scale, sizeof(other));
        step *= other;
    }
    if (kind.has_zero) {
        memcpy(&other, zero, sizeof(other));
        total = panel_fused(other, x->of[g][t].sum - (PanelReal){0}, total);
    }
    total = panel_fused(__builtin_convertvector(sum, PanelReal), step, total);
    memcpy(out, &total, sizeof(total));
}

#ifdef HAVE_AMX
// LDTILECFG's operand: bytes of a row and rows of each tile.
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) Tiles;

// The compiler is to finish what it writes, of which gcc's intrinsics do not say that they read it.
#define READS(pointer) __asm__ volatile("" ::"r"(pointer) : "memory")

// Columns of which four stand in a vector, without a gap in activations: where the groups of a split
// block are smaller than it, the even columns of a group and its odd ones are apart.
INLINE int run_of(const Kind kind) {
    return kind.is_split && kind.group < BLOCK ? kind.group / 8 : kind.group / 4;
}

// Tiles 0 and 1 have sums, 2 activations, 3 and 4 levels.
static void configure(const Kind kind, int tokens) {
    const uint8_t run = (uint8_t)run_of(kind), rows = (uint8_t)tokens;
    const Tiles tiles = {
        .palette = 1,
        .bytes = {64, 64, 4 * run, 64, 64},
        .rows = {rows, rows, rows, run, run},
    };
    READS(&tiles);
    _tile_loadconfig(&tiles);
}

// Asks Linux for the units, which it gives a process only then; whether it has.
INLINE int may_use_tiles(void) {
    const int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return !syscall(SYS_arch_prctl, request, tile_data);
}

INLINE void panel_tile(const Kind kind, const int tokens, const Panel *panel, const Slab *x,
                       int64_t columns, Ahead ahead, float *out) {
    const int run = run_of(kind), parts = kind.group / 4 / run;
    const uint8_t *w = panel->level[0][0];
    const float *scale = panel->scale[0], *zero = panel->zero[0];
    PanelWhole dot[2][MOST];
    for (int64_t k = 0; k < columns; k += BLOCK, x = slab_after(kind, x, 1)) {
        for (int64_t i = 0; i < ahead.each; i++) _mm_prefetch(*ahead.line++, _MM_HINT_T0);
        for (int g = 0; g < BLOCK / kind.group; g++, scale += PANEL, zero += PANEL) {
            READS(x);
            _tile_zero(0);
            _tile_zero(1);
            for (int part = 0; part < parts; part++, w += run * 4 * PANEL) {
                const int8_t *q = x->q[0] + 4 * run * g + part * BLOCK / 2;
                _tile_loadd(2, q, BLOCK);
                _tile_loadd(3, w, 4 * PANEL);
                _tile_loadd(4, w + 4 * LANES, 4 * PANEL);
                _tile_dpbsud(0, 2, 3);
                _tile_dpbsud(1, 2, 4);
            }
            _tile_stored(0, dot[0], sizeof(PanelWhole));
            _tile_stored(1, dot[1], sizeof(PanelWhole));
            for (int t = 0; t < tokens; t++)
                for (int r = 0; r < 2; r++) {
                    const PanelWhole start = (PanelWhole){0} + (kind.offset ? x->of[g][t].start : 0);
                    add_scaled(kind, dot[r][t] + start, x, t, g, scale + r * LANES,
                               zero + r * LANES, out + t * PANEL + r * LANES);
                }
        }
    }
}

#define DEFINE_PANEL_TILES(name, kind)                                                            \
    static void name##_any(const Panel *panel, const Slab *x, int64_t columns, int tokens,        \
                           Ahead ahead, float *out) {                                             \
        panel_tile(kind, tokens, panel, x, columns, ahead, out);                                  \
    }                                                                                             \
    static PanelTile *const name[3] = {name##_any, name##_any, name##_any};

#else
INLINE int may_use_tiles(void) { return 1; }  // which are made of vectors

INLINE void panel_tile(const Kind kind, const int tokens, const Panel *panel, const Slab *x,
                       int64_t columns, Ahead ahead, float *out) {
    const int each = kind.group / 4;
    const uint8_t *w = panel->level[0][0];
    const float *scale = panel->scale[0], *zero = panel->zero[0];
    for (int64_t k = 0; k < columns; k += BLOCK, x = slab_after(kind, x, 1)) {
        const Rest *rest = panel->rest[k / BLOCK];
        for (int64_t i = 0; i < ahead.each; i++) _mm_prefetch(*ahead.line++, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int g = 0; g < BLOCK / kind.group; g++, scale += PANEL, zero += PANEL) {
            PanelWhole dot[MOST][2], before[MOST][2] = {{{0}}};
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++)
                    if (kind.is_parted)
                        memcpy(&dot[t][r], panel->start[k / BLOCK] + r * LANES, sizeof(PanelWhole));
                    else
                        dot[t][r] = (PanelWhole){0} +
                                    (kind.offset || kind.is_signed ? x->of[g][t].start : 0);
#pragma GCC unroll 16
            for (int i = 0; i < each; i++, w += 4 * PANEL) {
                const int half = each / 2, odd = i >= half;
                const int from = kind.is_split ? odd * BLOCK / 2 + 2 * each * g + 4 * (i - odd * half)
                                               : 4 * (g * each + i);
                if (i == 8 && kind.is_small && LANES == 8)  // add_levels says why
                    for (int t = 0; t < tokens; t++)
                        for (int r = 0; r < 2; r++) {
                            before[t][r] = panel_sums(kind, dot[t][r]);
                            dot[t][r] = (PanelWhole){0};
                        }
                PanelBytes weight[2];
                for (int r = 0; r < 2; r++)
                    memcpy(&weight[r], w + r * sizeof(PanelBytes), sizeof(PanelBytes));
                for (int t = 0; t < tokens; t++) {
                    int32_t four, turned = 0;
                    memcpy(&four, x->q[t] + from, 4);
                    if (is_turned(kind)) memcpy(&turned, x->turned[t] + from, 4);
                    for (int r = 0; r < 2; r++) {
                        PanelBytes levels = weight[r];
                        if (is_turned(kind)) levels ^= (PanelBytes)((PanelWhole){0} + turned);
                        dot[t][r] = panel_products(kind, dot[t][r], levels, (PanelWhole){0} + four);
                        KEEP_PANEL(dot[t][r]);
                    }
                }
            }
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++)
                for (int i = 0; kind.is_parted && i < rest[r].count; i++) {
                    PanelBytes levels;
                    memcpy(&levels, rest[r].level[i], sizeof(levels));
#pragma GCC unroll 8
                    for (int t = 0; t < tokens; t++) {
                        int32_t four;
                        memcpy(&four, x->q[t] + rest[r].from[i], 4);
                        dot[t][r] = panel_products(kind, dot[t][r], levels, (PanelWhole){0} + four);
                        KEEP_PANEL(dot[t][r]);
                    }
                }
            for (int t = 0; t < tokens; t++)
                for (int r = 0; r < 2; r++)
                    add_scaled(kind, panel_sums(kind, dot[t][r]) + before[t][r], x, t, g,
                               scale + r * LANES, zero + r * LANES, out + t * PANEL + r * LANES);
        }
    }
}

#define DEFINE_PANEL_TILE(name, kind, less)                                                       \
    static __attribute__((noinline)) void name##_##less(const Panel *panel, const Slab *x,        \
                                                        int64_t columns, int tokens, Ahead ahead, \
                                                        float *out) {                             \
        (void)tokens;                                                                             \
        panel_tile(kind, MOST - less, panel, x, columns, ahead, out);                             \
    }
#define DEFINE_PANEL_TILES(name, kind)                                                            \
    DEFINE_PANEL_TILE(name, kind, 0)                                                              \
    DEFINE_PANEL_TILE(name, kind, 1)                                                              \
    DEFINE_PANEL_TILE(name, kind, 2)                                                              \
    static PanelTile *const name[3] = {name##_0, name##_1, name##_2};
#endif

#define MOST_LINES (PANEL * (SPAN * 5 / 4 / 64 + 1))

// What is unpacked next, a line of each unit after the other, so that memory is read while products
// are made. Returns how many they are.
static int64_t lines_of(const Weights *of, int64_t row, int64_t column, const char **line) {
    const int64_t begin = of->stride * column / of->K, bytes = of->stride * SPAN / of->K;
    int64_t count = 0;
    for (int64_t at = 0; at < bytes; at += 64)
        for (int64_t i = 0; i < PANEL / of->unit; i++)
            line[count++] = (const char *)of->w + (row / of->unit + i) * of->stride + begin + at;
    return count;
}

static void fill_slab(const Kind *kind, const float *x, Slab *to, int t) {
    round_token(x, BLOCK, 0, kind->is_split, to->q[t], &to->scale[t], NULL);
    if (kind->is_parted) {  // `start` of the panel is what is taken away
        for (int i = 0; i < BLOCK; i++) to->q[t][i] ^= -128;
        return;
    }
    for (int g = 0; g < BLOCK / kind->group; g++) {
        const int half = kind->group / 2;
        const int8_t *first = to->q[t] + g * (kind->is_split ? half : 2 * half);
        const int8_t *second = first + (kind->is_split ? BLOCK / 2 : half);
        int32_t total = 0, below = 0;
        for (int i = 0; i < half; i++) {
            total += first[i] + second[i];
            below -= (first[i] < 0 ? first[i] : 0) + (second[i] < 0 ? second[i] : 0);
        }
        if (kind->has_zero)
            to->of[g][t].sum = to->scale[t] * (float)total;
        else
            to->of[g][t].start = kind->is_signed ? below : -kind->offset * total;
    }
    for (int i = 0; i < BLOCK && is_turned(*kind); i++) {
        to->turned[t][i] = to->q[t][i] < 0 ? -1 : 0;
        to->q[t][i] = (int8_t)(to->q[t][i] < 0 ? -to->q[t][i] : to->q[t][i]);
    }
}

// The sums of a token with PANEL rows from n on, or as many as there are.
INLINE void write_rows(const Weights *of, int64_t n, const float *sums, float *y) {
    const int count = of->N - n < PANEL ? (int)(of->N - n) : PANEL;
    if (!of->row_scale)
        memcpy(y + n, sums, sizeof(float) * (size_t)count);
    else
        for (int r = 0; r < count; r++) y[n + r] = sums[r] * of->row_scale[n + r];
}

// How M tokens are dealt to tiles: the first `full` have `most` each, the others `least`.
typedef struct {
    int64_t count, most, least, full;
} Tiling;

static Tiling tiling_of(int64_t M) {
    const int64_t count = (M + MOST - 1) / MOST;
    const int64_t most = (M + count - 1) / count;  // 8 are 4 and 4, not 6 and 2
    // 64 are 9 of 6 and 2 of 5. Not where `tile` of Weights has none that is smaller, nor for matrix
    // units, to which both are the same.
    const int64_t least = MOST < 16 && most > MOST - 2 ? most - 1 : most;
    return (Tiling){count, most, least, least < most ? M - count * least : count};
}

INLINE int64_t first_of(Tiling of, int64_t tile) {
    return tile < of.full ? tile * of.most : of.full * of.most + (tile - of.full) * of.least;
}

INLINE int64_t tile_of(Tiling of, int64_t m) {
    const int64_t others = m - of.full * of.most;
    return others < 0 ? m / of.most : of.full + others / of.least;
}

// Returns 0, or 1 when there is no memory for the activations.
static int many_products(const Kind *kind, const Weights *of, const float *x, float *y, int64_t M,
                         int threads) {
    const int64_t N = of->N, K = of->K, together = SPAN / BLOCK, spans = (K + SPAN - 1) / SPAN;
    const Tiling tiling = tiling_of(M);
    Slab *slabs = aligned_alloc(64, sizeof(Slab) * (size_t)(spans * tiling.count * together));
    if (!slabs) return 1;
    for (int64_t s = 0; s < spans; s++) {  // the last tile may not be full
        Slab *const last =
            slab_after(*kind, slabs, (s * tiling.count + tiling.count - 1) * together);
        memset(last, 0, (size_t)((char *)slab_after(*kind, last, together) - (char *)last));
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            const int64_t tile = tile_of(tiling, m), first = tile * together;
            for (int64_t b = 0; b < K / BLOCK; b++) {
                const int64_t place = b / together * tiling.count * together + first + b % together;
                fill_slab(kind, x + m * K + b * BLOCK, slab_after(*kind, slabs, place),
                          (int)(m - first_of(tiling, tile)));
            }
        }
#ifdef HAVE_AMX
        configure(*kind, (int)tiling.most);
#endif
        Panel panel;
        const char *line[MOST_LINES];
        float sums[TOGETHER * MANY_TILES * MOST * PANEL] __attribute__((aligned(64)));
        for (int64_t t0 = 0; t0 < tiling.count; t0 += MANY_TILES) {
            const int64_t count = tiling.count - t0 < MANY_TILES ? tiling.count - t0 : MANY_TILES;
            const int64_t m0 = first_of(tiling, t0), m1 = first_of(tiling, t0 + count);
            const int64_t size = (m1 - m0) * PANEL;  // sums of a panel
#pragma omp for schedule(static) nowait
            for (int64_t n0 = 0; n0 < N; n0 += TOGETHER * PANEL) {
                const int64_t rows = N - n0 < TOGETHER * PANEL ? N - n0 : TOGETHER * PANEL;
                const int64_t panels = (rows + PANEL - 1) / PANEL;
                memset(sums, 0, sizeof(float) * (size_t)(panels * size));
                for (int64_t i = 0; i < panels * spans; i++) {
                    const int64_t p = i % panels, k = i / panels * SPAN;
                    const int64_t columns = K - k < SPAN ? K - k : SPAN;
                    const int is_last = i + 1 == panels * spans;
                    const int64_t lines = lines_of(
                        of, n0 + (is_last ? panels : (i + 1) % panels) * PANEL,
                        is_last ? 0 : (i + 1) / panels * SPAN, line);
                    const int64_t blocks = columns / BLOCK, slots = blocks * count;
                    Ahead ahead = {line, (lines + slots - 1) / slots};
                    of->unpack(of, n0 + p * PANEL, k, columns, &panel);
                    for (int64_t t = t0; t < t0 + count; t++, ahead.line += blocks * ahead.each) {
                        if (ahead.line + blocks * ahead.each > line + lines) ahead.each = 0;
                        const int64_t tokens = t < tiling.full ? tiling.most : tiling.least;
                        const int64_t place = (k / SPAN * tiling.count + t) * together;
                        PanelTile *const tile = of->tile[tokens > MOST - 2 ? MOST - tokens : 2];
                        tile(&panel, slab_after(*kind, slabs, place), columns, (int)tokens, ahead,
                             sums + p * size + (first_of(tiling, t) - m0) * PANEL);
                    }
                }
                for (int64_t m = m0; m < m1 && m < M; m++)
                    for (int64_t r = 0; r < rows; r += PANEL)
                        write_rows(of, n0 + r, sums + r / PANEL * size + (m - m0) * PANEL, y + m * N);
            }
        }
#ifdef HAVE_AMX
        _tile_release();
#endif
    }
    free(slabs);
    return 0;
}

#endif
#endif
