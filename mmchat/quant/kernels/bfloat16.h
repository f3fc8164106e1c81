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

// Eight in a register of NEON as four pairs: the first of each, and the second.
#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define HAVE_NEON 1

static inline float32x4_t even_lanes(uint16x8_t pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(pairs), 16));
}

static inline float32x4_t odd_lanes(uint16x8_t pairs) {
    return vreinterpretq_f32_u32(
        vandq_u32(vreinterpretq_u32_u16(pairs), vdupq_n_u32(0xffff0000)));
}
#endif

#endif
