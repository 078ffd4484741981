// 64-bit ARM with dot products of bytes, of bfloat16 where the CPU has them.

#pragma once
#include <arm_neon.h>

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define HAS_DOT_BF16
INLINE vf dot_bf16(vf sum, vi a, vi b) {
    return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#endif

#define HAS_DOT_BYTES
#define I8_EXCESS 0
INLINE vi dot_u4(vi sum, vi a, vi b) { return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b); }

INLINE vi dot_i8(vi sum, vi a, vi b) { return dot_u4(sum, a ^ all_ints((int32_t)0x80808080u), b); }

#define HAS_HALVES
INLINE vf load_halves(const uint16_t *from) { return (vf)vcvt_f32_f16((float16x4_t)vld1_u16(from)); }

#define HAS_LARGER
INLINE vf larger(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
