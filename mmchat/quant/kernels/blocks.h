// The order of weights in blocks (blocks_reference.py says it), for products and for rounding.

#ifndef MMCHAT_BLOCKS_H
#define MMCHAT_BLOCKS_H

#include "bfloat16.h"
#include "products.h"

#define ROWS 8  // of a panel

// Columns that share a scale; bytes of 64 columns of a panel, and of what stands before a block.
INLINE int group_of(const int bits) { return bits == 6 ? 16 : 32; }
INLINE int64_t part_bytes(const int bits) { return ROWS * (8 * bits + 4); }
INLINE int64_t large_bytes(const int bits) { return bits == 4 ? 32 : bits == 6 ? 16 : 0; }

INLINE int64_t panel_bytes(const int bits, int64_t K) {
    const int64_t parts = K / BLOCK, blocks = bits == 6 ? (parts + 3) / 4 : 1;
    return parts * part_bytes(bits) + blocks * large_bytes(bits);
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
