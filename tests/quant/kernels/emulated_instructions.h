// The VNNI and AMX instructions that the kernels use, in plain C, for processors that lack them.
//
// Compile with -mavx2 -mfma -include of this file, and -DEMULATE_AVX512_VNNI or -DEMULATE_AVX_VNNI;
// with the first also -DEMULATE_AMX=0, or -DEMULATE_AMX=-1 where Linux refuses the matrix units.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// VPDPBUSD (Intel SDM, volume 2): unsigned bytes of a times signed bytes of b, four neighbouring
// products added to c without saturation, not even in between.
static inline __m256i emulated_dpbusd(__m256i c, __m256i a, __m256i b) {
    uint32_t sums[8];
    uint8_t left[32];
    int8_t right[32];
    memcpy(sums, &c, 32), memcpy(left, &a, 32), memcpy(right, &b, 32);
    for (int i = 0; i < 32; i++) sums[i / 4] += (uint32_t)((int)left[i] * right[i]);
    memcpy(&c, sums, 32);
    return c;
}

// VPDPWSSD: signed words, two neighbouring products added to c without saturation.
static inline __m256i emulated_dpwssd(__m256i c, __m256i a, __m256i b) {
    uint32_t sums[8];
    int16_t left[16], right[16];
    memcpy(sums, &c, 32), memcpy(left, &a, 32), memcpy(right, &b, 32);
    for (int i = 0; i < 16; i++) sums[i / 2] += (uint32_t)((int)left[i] * right[i]);
    memcpy(&c, sums, 32);
    return c;
}

// VPDPBUSD of 64 bytes. The type is there without the instructions.
static inline __m512i emulated_wide_dpbusd(__m512i c, __m512i a, __m512i b) {
    __m256i sums[2], left[2], right[2];
    memcpy(sums, &c, 64), memcpy(left, &a, 64), memcpy(right, &b, 64);
    for (int i = 0; i < 2; i++) sums[i] = emulated_dpbusd(sums[i], left[i], right[i]);
    memcpy(&c, sums, 64);
    return c;
}

// The matrix unit of a thread. What the processor would refuse ends the process.
static _Thread_local struct {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } is;
    uint8_t tile[8][16][64];
} emulated_unit;

static inline void emulated_demand(int is_right) {
    if (!is_right) abort();
}

static inline void emulated_configure(const void *config) {
    memset(&emulated_unit, 0, sizeof(emulated_unit));
    memcpy(&emulated_unit.is, config, 64);
    emulated_demand(sizeof(emulated_unit.is) == 64 && emulated_unit.is.palette == 1);
    for (int i = 0; i < 8; i++)
        emulated_demand(emulated_unit.is.rows[i] <= 16 && emulated_unit.is.bytes[i] <= 64 &&
                        !emulated_unit.is.rows[i] == !emulated_unit.is.bytes[i]);
}

static inline void emulated_move(int tile, uint8_t *base, long stride, int is_load) {
    emulated_demand(emulated_unit.is.palette == 1 && emulated_unit.is.rows[tile]);
    if (is_load) memset(emulated_unit.tile[tile], 0, sizeof(emulated_unit.tile[tile]));
    for (int row = 0; row < emulated_unit.is.rows[tile]; row++) {
        uint8_t *here = emulated_unit.tile[tile][row], *there = base + row * stride;
        memcpy(is_load ? here : there, is_load ? there : here, emulated_unit.is.bytes[tile]);
    }
}

// TDPBSUD: signed bytes of a times unsigned bytes of b, four neighbouring products added to c.
// Optimised, or a build without optimisation would spend a minute here.
__attribute__((optimize("O3"))) static inline void emulated_dpbsud(int c, int a, int b) {
    const uint16_t *bytes = emulated_unit.is.bytes;
    const uint8_t *rows = emulated_unit.is.rows;
    emulated_demand(emulated_unit.is.palette == 1 && rows[a] == rows[c] && bytes[b] == bytes[c] &&
                    rows[b] == bytes[a] / 4 && bytes[a] % 4 == 0 && c != a && a != b && b != c);
    for (int m = 0; m < rows[c]; m++)
        for (int k = 0; k < bytes[a]; k++)
            for (int n = 0; n < bytes[c] / 4; n++) {
                uint32_t sum;
                memcpy(&sum, emulated_unit.tile[c][m] + 4 * n, 4);
                sum += (uint32_t)((int8_t)emulated_unit.tile[a][m][k] *
                                  (int)emulated_unit.tile[b][k / 4][4 * n + k % 4]);
                memcpy(emulated_unit.tile[c][m] + 4 * n, &sum, 4);
            }
}

// The macros come after immintrin.h, which would take them for permission to use the instructions.
#undef __AVX512VNNI__
#undef __AVX512VL__
#undef __AVXVNNI__
#undef _mm256_dpbusd_epi32
#undef _mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_epi32
#undef _mm256_dpwssd_avx_epi32
#ifdef EMULATE_AVX512_VNNI
#define __AVX512VNNI__ 1
#define __AVX512VL__ 1
#define _mm256_dpbusd_epi32 emulated_dpbusd
#define _mm512_dpbusd_epi32 emulated_wide_dpbusd
#define _mm256_dpwssd_epi32 emulated_dpwssd
#endif
#ifdef EMULATE_AVX_VNNI
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
#endif
#ifdef EMULATE_AMX
#undef __AMX_INT8__
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define __AMX_INT8__ 1
#define _tile_loadconfig emulated_configure
#define _tile_release() ((void)(emulated_unit.is.palette = 0))
#define _tile_loadd(which, base, stride) emulated_move(which, (uint8_t *)(base), stride, 1)
#define _tile_stored(which, base, stride) emulated_move(which, (uint8_t *)(base), stride, 0)
#define _tile_zero(which) memset(emulated_unit.tile[which], 0, sizeof(emulated_unit.tile[which]))
#define _tile_dpbsud emulated_dpbsud
#define syscall(...) (EMULATE_AMX)
#endif
