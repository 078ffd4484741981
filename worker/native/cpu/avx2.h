// x86-64 with AVX2, FMA and half floats.

#pragma once
#include <immintrin.h>

#define HAS_DOT_BYTES
#define I8_EXCESS 0

INLINE vi sum_pairs(__m256i products, vi sum) {
    return sum + (vi)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}

// One factor must be unsigned, and a pair of products fits 16 bits: so a's sign goes over to b.
INLINE vi dot_i8(vi sum, vi a, vi b) {
    const __m256i weights = _mm256_xor_si256((__m256i)a, _mm256_set1_epi8((char)0x80));
    return sum_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8((__m256i)b, weights)), sum);
}

INLINE vi dot_u4(vi sum, vi a, vi b) { return sum_pairs(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), sum); }

#define HAS_HALVES
INLINE vf load_halves(const uint16_t *from) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

#define HAS_LARGER
INLINE vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
