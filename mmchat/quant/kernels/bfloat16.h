// bfloat16 is the upper half of a float.

#ifndef MMCHAT_BFLOAT16_H
#define MMCHAT_BFLOAT16_H

#include <stdint.h>
#include <string.h>

static inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

#endif
