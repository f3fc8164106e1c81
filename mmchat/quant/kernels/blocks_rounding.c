// Rounding weights to blocks, as blocks_reference.py does, and widening them.
//
// A vector holds a column of the eight rows of a panel, of two groups that lie next to each other, so
// that each lane fits a group of its own and no lanes are added to each other.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"

#define LANES 16

typedef float Real __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));

INLINE Real everywhere(float value) { return (Real){0} + value; }

INLINE Real chosen(Whole where, Real a, Real b) {
    return (Real)((where & (Whole)a) | (~where & (Whole)b));
}

// Of NaN and a number the number, which comes second.
INLINE Real lesser(Real a, Real b) { return chosen(a < b, a, b); }
INLINE Real greater(Real a, Real b) { return chosen(a > b, a, b); }

INLINE Real nearest(Real v) {  // of |v| < 2^22
    return (v + 0x1.8p23f) - 0x1.8p23f;
}

INLINE Real inverse_of(Real step) {
    const Real size = (Real)((Whole)step & 0x7fffffff);
    return chosen(size >= FLT_MIN, 1.0f / step, (Real){0});
}

INLINE Real levels_of(const int bits, Real w, Real zero, Real inverse) {
    const float most = (float)(1 << (bits - 1));
    return nearest(lesser(greater((w - zero) * inverse, everywhere(-most)), everywhere(most - 1)));
}

typedef struct {
    Real scale, zero, error;
} Fit;

INLINE void keep_better(Fit *kept, Fit tried) {
    const Whole is_less = tried.error < kept->error;
    kept->scale = chosen(is_less, tried.scale, kept->scale);
    kept->zero = chosen(is_less, tried.zero, kept->zero);
    kept->error = chosen(is_less, tried.error, kept->error);
}

// ---- 4 bits ------------------------------------------------------------------------------------

// Sums of 32 columns that every fit of them shares.
typedef struct {
    Real sum, squares;
} Sums;

// Scale and zero by least squares to the levels that these give, and the error with them.
INLINE Fit fit4(const Real *w, Sums of, Real scale, Real zero) {
    const Real inverse = inverse_of(scale);
    Real sum_q = {0}, sum_qq = {0}, sum_qw = {0};
    for (int i = 0; i < 32; i++) {
        const Real q = levels_of(4, w[i], zero, inverse);
        sum_q += q, sum_qq += q * q, sum_qw += q * w[i];
    }
    const Real mean = sum_q / 32, mean_w = of.sum / 32;
    const Real spread = sum_qq - sum_q * mean, together = sum_qw - sum_q * mean_w;
    const Real best = chosen(spread > 0, together / spread, scale);
    const Real error = of.squares - of.sum * mean_w - best * (2 * together - best * spread);
    return (Fit){best, mean_w - best * mean, error};
}

static const float CUTS[] = {0, 0.05f, 0.1f};
static const float SCALES[] = {-0.08f, -0.055f, -0.03f, 0, 0.03f, 0.055f, 0.08f};
static const float ZEROS[] = {-0.45f, -0.3f, -0.15f, 0, 0.15f, 0.3f, 0.45f};

// zero: where a level is 0; that of a Fit is in the middle, where it is 8.
static void search4(const Real *w, float *scale, float *zero) {
    Real low = w[0], high = w[0];
    Sums of = {{0}, {0}};
    for (int i = 0; i < 32; i++) {
        low = lesser(w[i], low), high = greater(w[i], high);
        of.sum += w[i], of.squares += w[i] * w[i];
    }
    const Real span = high - low;
    Fit kept = fit4(w, of, span / 15, low + 8 * span / 15);
    for (int i = 1; i < 9; i++) {
        const Real step = span * (1 - CUTS[i / 3] - CUTS[i % 3]) / 15;
        keep_better(&kept, fit4(w, of, step, low + CUTS[i / 3] * span + 8 * step));
    }
    Fit first = kept;
    for (int i = 0; i < 49; i++)
        keep_better(&kept, fit4(w, of, first.scale * (1 + SCALES[i / 7]),
                                first.zero + first.scale * ZEROS[i % 7]));
    first = kept;
    for (int i = 0; i < 9; i++)
        keep_better(&kept, fit4(w, of, first.scale * (1 + 0.02f * (float)(i / 3 - 1)),
                                first.zero + first.scale * 0.1f * (float)(i % 3 - 1)));
    kept.zero -= 8 * kept.scale;
    memcpy(scale, &kept.scale, sizeof(Real)), memcpy(zero, &kept.zero, sizeof(Real));
}

INLINE Real error4(const Real *w, Real scale, Real zero) {
    const Real inverse = inverse_of(scale), middle = zero + 8 * scale;
    Real error = {0};
    for (int i = 0; i < 32; i++) {
        const Real off = w[i] - levels_of(4, w[i], middle, inverse) * scale - middle;
        error += off * off;
    }
    return error;
}

// Codes near to scale and zero, of the smallest error; they are left as float in these. step: of d
// and dz.
static void code4(const Real *w, float *scale, float *zero, const Real *step) {
    Real s, z, inverse[2] = {inverse_of(step[0]), inverse_of(step[1])};
    memcpy(&s, scale, sizeof(Real)), memcpy(&z, zero, sizeof(Real));
    s = nearest(lesser(greater(s * inverse[0], (Real){0}), everywhere(255)));
    z = nearest(lesser(greater(z * inverse[1], everywhere(-127)), everywhere(127)));
    Fit kept = {s, z, error4(w, s * step[0], z * step[1])};
    for (int i = 0; i < 9; i++) {
        const Real near = lesser(greater(s + (float)(i / 3 - 1), (Real){0}), everywhere(255));
        const Real near_zero = lesser(greater(z + (float)(i % 3 - 1), everywhere(-127)), everywhere(127));
        keep_better(&kept, (Fit){near, near_zero, error4(w, near * step[0], near_zero * step[1])});
    }
    memcpy(scale, &kept.scale, sizeof(Real)), memcpy(zero, &kept.zero, sizeof(Real));
}

// ---- 6 bits ------------------------------------------------------------------------------------

static void search6(const Real *w, float *scale) {
    Real most = {0}, squares = {0};
    for (int i = 0; i < 16; i++) {
        const Whole is_more = ((Whole)w[i] & 0x7fffffff) > ((Whole)most & 0x7fffffff);
        most = chosen(is_more, w[i], most);  // NaN is the largest
        squares += w[i] * w[i];
    }
    Fit kept;
    for (int attempt = 0; attempt < 12; attempt++) {
        const Real inverse = inverse_of(most / -(31 + attempt / 4.0f));
        Real sum_qq = {0}, sum_qw = {0};
        for (int i = 0; i < 16; i++) {
            const Real q = levels_of(6, w[i], (Real){0}, inverse);
            sum_qq += q * q, sum_qw += q * w[i];
        }
        const Real best = sum_qw / greater(sum_qq, everywhere(1));
        const Fit fit = {best, {0}, squares - best * (2 * sum_qw - best * sum_qq)};
        if (attempt == 0) kept = fit;
        keep_better(&kept, fit);
    }
    memcpy(scale, &kept.scale, sizeof(Real));
}

// ---- a panel -----------------------------------------------------------------------------------

// The largest size of `count` numbers that lie `apart`; NaN if there is one.
static float largest(const float *of, int64_t count, int64_t apart) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, of + i * apart, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value;
}

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// value >= 0 as float16, to the nearest; the next larger where it would be so small that `most` became
// one more.
static uint16_t to_half(float value, float most) {
    if (!(value < 65520.0f)) return value != value ? 0x7e00 : 0x7c00;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t half;
    if (value < 0x1p-14f) {
        half = (uint16_t)nearbyintf(value * 0x1p24f);
    } else {
        bits -= 112u << 23;
        half = (uint16_t)((bits + 0xfff + ((bits >> 13) & 1)) >> 13);
    }
    return (uint16_t)(half + (half_to_float(half) * ((most + 0.5f) / most) < value));
}

// Column k and, in the upper lanes, column k + further of eight rows of K.
INLINE Real column(const float *w, int64_t K, int64_t k, int64_t further) {
    Real out;
    for (int l = 0; l < LANES; l++) out[l] = w[l % ROWS * K + k + l / ROWS * further];
    return out;
}

// For each column of eight rows what is written in its place.
typedef struct {
    float *scale, *zero;  // [parts, groups of a part, ROWS]
    float step[2][ROWS];  // d and dz
} Panel;

static uint8_t level_of(int bits, float w, float scale, float zero) {
    const float most = (float)(1 << (bits - 1)), least = bits == 8 ? -127 : -most;
    const float middle = bits == 4 ? zero + 8 * scale : 0;
    float level = fabsf(scale) >= FLT_MIN ? (w - middle) * (1.0f / scale) : 0;
    level = level > least ? level : least;  // NaN is not
    return (uint8_t)(int)(rintf(level < most - 1 ? level : most - 1) + most);
}

// The levels of 64 columns of a row.
static void put_levels(int bits, const float *w, const float *scale, const float *zero, int row,
                       uint8_t *to) {
    const int group = group_of(bits);
    for (int k = 0; k < BLOCK; k++) {
        const int g = k / group * ROWS;
        const unsigned q = level_of(bits, w[k], scale[g], zero[g]);
        if (bits == 8) {
            to[k / 4 * 32 + row * 4 + k % 4] = (uint8_t)q;
            continue;
        }
        to[k / 8 * 32 + row * 4 + k / 2 % 4] |= (uint8_t)((q & 15) << k % 2 * 4);
        const int field = k / 8 % 2 * 2 + k % 2;
        if (bits == 6) to[256 + k / 16 * 32 + row * 4 + k / 2 % 4] |= (uint8_t)(q >> 4 << 2 * field);
    }
}

// Scales and zeros of all groups, as they are stored: first as numbers, then as codes.
static void find_scales(int bits, const float *w, int64_t K, Panel *panel) {
    const int group = group_of(bits);
    for (int64_t k = 0; k < K; k += 2 * group) {
        Real columns[32];
        float *scale = panel->scale + k / group * ROWS, *zero = panel->zero + k / group * ROWS;
        for (int i = 0; i < group; i++) columns[i] = column(w, K, k + i, group);
        if (bits == 4) search4(columns, scale, zero);
        if (bits == 6) search6(columns, scale);
        for (int l = 0; l < LANES && bits == 8; l++)
            scale[l] = half_to_float(
                to_half(largest(w + l % ROWS * K + k + l / ROWS * group, group, 1) / 127, 127));
    }
}

// Of the block that begins at column k, as below.
static void find_codes4(const float *w, int64_t K, int64_t k, Panel *panel, uint8_t *to) {
    const int64_t end = K - k < LARGE ? K : k + LARGE;
    const float *scale = panel->scale + k / 32 * ROWS, *zero = panel->zero + k / 32 * ROWS;
    Real step[2];
    for (int r = 0; r < ROWS; r++) {
        const uint16_t d = to_half(largest(scale + r, (end - k) / 32, ROWS) / 255, 255);
        const uint16_t dz = to_half(largest(zero + r, (end - k) / 32, ROWS) / 127, 127);
        memcpy(to + 2 * r, &d, 2), memcpy(to + 16 + 2 * r, &dz, 2);
        step[0][r] = step[0][r + ROWS] = panel->step[0][r] = half_to_float(d);
        step[1][r] = step[1][r + ROWS] = panel->step[1][r] = half_to_float(dz);
    }
    for (; k < end; k += 64) {
        Real columns[32];
        for (int i = 0; i < 32; i++) columns[i] = column(w, K, k + i, 32);
        code4(columns, panel->scale + k / 32 * ROWS, panel->zero + k / 32 * ROWS, step);
    }
}

static void find_codes6(int64_t K, int64_t k, Panel *panel, uint8_t *to) {
    const int64_t groups = (K - k < LARGE ? K - k : LARGE) / 16;
    for (int r = 0; r < ROWS; r++) {
        float *scale = panel->scale + k / 16 * ROWS + r;
        const uint16_t d = to_half(largest(scale, groups, ROWS) / 127, 127);
        const float step = panel->step[0][r] = half_to_float(d);
        memcpy(to + 2 * r, &d, 2);
        for (int64_t g = 0; g < groups; g++) {
            const float code = step >= FLT_MIN ? rintf(scale[g * ROWS] / step) : 0;
            scale[g * ROWS] = code > -127 ? code < 127 ? code : 127 : code == code ? -127 : 0;
        }
    }
}

// Codes of 64 columns into the stream, which then stand for numbers again.
static void put_scales(int bits, Panel *panel, float *scale, float *zero, uint8_t *to) {
    for (int g = 0; g < BLOCK / group_of(bits); g++)
        for (int r = 0; r < ROWS; r++) {
            float *s = scale + g * ROWS + r, *z = zero + g * ROWS + r;
            if (bits == 8) {
                const uint16_t half = to_half(*s, 127);
                memcpy(to + g * 16 + 2 * r, &half, 2);
                continue;
            }
            const int code = (int)*s, code_zero = (int)*z;
            to[bits == 4 ? g * 16 + r : g * 8 + r] = (uint8_t)code;
            if (bits == 4) to[g * 16 + 8 + r] = (uint8_t)code_zero;
            *s = panel->step[0][r] * (float)code;
            *z = bits == 4 ? panel->step[1][r] * (float)code_zero : 0;
        }
}

static void round_panel(int bits, const float *w, int64_t K, Panel *panel, uint8_t *to) {
    const int group = group_of(bits);
    memset(to, 0, (size_t)panel_bytes(bits, K));
    memset(panel->zero, 0, sizeof(float) * (size_t)(K / group * ROWS));
    find_scales(bits, w, K, panel);
    for (int64_t k = 0; k < K; k += BLOCK, to += part_bytes(bits)) {
        if (k % LARGE == 0) {
            if (bits == 4) find_codes4(w, K, k, panel, to);
            if (bits == 6) find_codes6(K, k, panel, to);
            to += large_bytes(bits);
        }
        float *scale = panel->scale + k / group * ROWS, *zero = panel->zero + k / group * ROWS;
        put_scales(bits, panel, scale, zero, to);
        for (int r = 0; r < ROWS; r++)
            put_levels(bits, w + r * K + k, scale + r, zero + r, r, to + 32);
    }
}

// w: float [N, K] -> uint8 [N, bytes of a row]; N is a multiple of 8, K of 64. Returns 0, or 1 when
// there is no memory.
int mmchat_quantize_blocks(const float *w, uint8_t *to, int64_t N, int64_t K, int64_t bits,
                           int threads) {
    const int64_t each = K / group_of((int)bits) * ROWS;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scales = malloc(sizeof(float) * (size_t)(2 * each));
        failed = !scales;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += ROWS) {
            Panel panel = {.scale = scales, .zero = scales + each};
            uint8_t *at = to + n / ROWS * panel_bytes((int)bits, K);
            if (scales) round_panel((int)bits, w + n * K, K, &panel, at);
        }
        free(scales);
    }
    return failed;
}

// ---- widening ----------------------------------------------------------------------------------

static unsigned level_at(int bits, const uint8_t *w, int row, int k, const uint8_t *table) {
    if (bits == 8) return w[k / 4 * 32 + row * 4 + k % 4];
    const unsigned low = w[k / 8 * 32 + row * 4 + k / 2 % 4] >> k % 2 * 4 & 15;
    if (bits == 4) return low;
    if (bits == TABLE) return table[low];
    const int field = k / 8 % 2 * 2 + k % 2;
    return low | (w[256 + k / 16 * 32 + row * 4 + k / 2 % 4] >> 2 * field & 3) << 4;
}

static float half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return half_to_float(bits);
}

static float scale_at(int bits, const uint8_t *w, int g, int r, float d) {
    float scale;
    switch (bits) {
        case 4: return d * w[g * 16 + r];
        case 6: return d * (int8_t)w[g * 8 + r];
        case 8: return half_at(w + g * 16 + 2 * r);
        default: memcpy(&scale, w + 4 * r, 4); return scale;
    }
}

static void widen_panel(int bits, const uint8_t *w, const uint8_t *table, uint16_t *out, int64_t K) {
    const int group = group_of(bits);
    float d[ROWS] = {0}, dz[ROWS] = {0};
    for (int64_t k = 0; k < K; k += BLOCK, w += part_bytes(bits)) {
        if (k % LARGE == 0) {
            for (int r = 0; r < ROWS && large_bytes(bits); r++) {
                d[r] = half_at(w + 2 * r);
                if (bits == 4) dz[r] = half_at(w + 16 + 2 * r);
            }
            w += large_bytes(bits);
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < BLOCK; i++) {
                const int g = i / group;
                const float scale = scale_at(bits, w, g, r, d[r]);
                const float zero = bits == 4 ? dz[r] * (int8_t)w[g * 16 + 8 + r] : 0;
                const int level = (int)level_at(bits, w + 32, r, i, table) - level_offset(bits);
                out[r * K + k + i] = to_bf16((float)level * scale + zero);
            }
    }
}

// -> bfloat16 [N, K]
void mmchat_widen_blocks(const uint8_t *w, const uint8_t *table, uint16_t *out, int64_t N, int64_t K,
                         int64_t bits, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < N; n += ROWS)
        widen_panel((int)bits, w + n / ROWS * panel_bytes((int)bits, K), table, out + n * K, K);
}
