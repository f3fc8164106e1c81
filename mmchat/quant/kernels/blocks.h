// The order of weights in blocks (blocks_reference.py says it), for products and for rounding.

#ifndef MMCHAT_BLOCKS_H
#define MMCHAT_BLOCKS_H

#include "bfloat16.h"
#include "products.h"

#define ROWS 8     // of a panel
#define LARGE 256  // columns that share d and dz

#define TABLE 5    // in place of bits: 4, which choose one of 16 whole numbers

// Columns that share a scale; bytes of 64 columns of a panel, and of what stands before LARGE.
INLINE int group_of(const int bits) { return bits == TABLE ? 64 : bits == 6 ? 16 : 32; }
INLINE int64_t part_bytes(const int bits) { return ROWS * (8 * (bits == TABLE ? 4 : bits) + 4); }
INLINE int64_t large_bytes(const int bits) { return bits == 4 ? 32 : bits == 6 ? 16 : 0; }

INLINE int64_t panel_bytes(const int bits, int64_t K) {
    return K / BLOCK * part_bytes(bits) + (K + LARGE - 1) / LARGE * large_bytes(bits);
}

// What a level stands for less than its bits say. Those of a table are of 8 bits.
INLINE int level_offset(const int bits) {
    return bits == 4 ? 0 : 1 << ((bits == TABLE ? 8 : bits) - 1);
}

INLINE float half_to_float(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    const uint32_t wide = rest >= 0x7c00 ? rest << 13 | 0x7f800000 : (rest << 13) + (112u << 23);
    float value;
    if (rest < 0x400) return sign ? -(float)rest * 0x1p-24f : (float)rest * 0x1p-24f;
    memcpy(&value, &(uint32_t){sign | wide}, 4);
    return value;
}

#endif
