// x86-64 with AVX512 and VNNI, bfloat16 where the CPU multiplies it.

#pragma once
#include <immintrin.h>

#ifdef __AVX512BF16__
#define HAS_DOT_BF16
INLINE vf dot_bf16(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

#define HAS_STORE_BF16
INLINE void store_bf16(uint16_t *to, vf numbers) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)numbers));
}
#endif

#define HAS_DOT_BYTES
#define I8_EXCESS 128
INLINE vi dot_i8(vi sum, vi a, vi b) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }

INLINE vi dot_u4(vi sum, vi a, vi b) { return dot_i8(sum, a, b); }

#define HAS_HALVES
INLINE vf load_halves(const uint16_t *from) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

#define HAS_LARGER
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
