// Vectors of LANES numbers of 32 bits. Adding, multiplying and shifting them is left to the compiler, whose vector types
// GCC and clang share; what it has no words for is here in plain C, and faster in avx512.h, avx2.h and neon.h.

#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));
typedef int8_t vbyte __attribute__((vector_size(LANES)));

INLINE vi load_ints(const void *from) {
    vi loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

INLINE vf load_floats(const float *from) {
    vf loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

INLINE void store_floats(float *to, vf numbers) { memcpy(to, &numbers, sizeof numbers); }

INLINE vf all_floats(float number) { return (vf){0} + number; }

INLINE vi all_ints(int32_t number) { return (vi){0} + number; }

// The same four bytes in every lane.
INLINE vi all_words(const void *from) {
    int32_t word;
    memcpy(&word, from, 4);
    return all_ints(word);
}

#if LANES == 16
#include "avx512.h"
#elif LANES == 8
#include "avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "neon.h"
#endif

// --- in plain C, what the machine has no instruction for --------------------------------------------------------------

#ifndef HAS_DOT_BF16
// sum + the product of two pairs of bfloat16 in each lane
INLINE vf dot_bf16(vf sum, vi a, vi b) {
    const vi upper = all_ints((int32_t)0xffff0000u);
    sum += (vf)(a << 16) * (vf)(b << 16);
    return sum + (vf)(a & upper) * (vf)(b & upper);
}
#endif

#ifndef HAS_DOT_BYTES
// What a weight byte of eight bits stands for is (byte - 128). dot_i8 may take it for (byte - 128 + I8_EXCESS) instead,
// and whoever calls takes away the difference.
#define I8_EXCESS 0

INLINE vi byte_of(vi words, int index) { return (words << (24 - 8 * index)) >> 24; }

// sum + the product of four bytes in each lane: a is 0 … 15, b is signed
INLINE vi dot_u4(vi sum, vi a, vi b) {
    UNROLL for (int i = 0; i < 4; i++) sum += byte_of(a, i) * byte_of(b, i);
    return sum;
}

INLINE vi dot_i8(vi sum, vi a, vi b) { return dot_u4(sum, a ^ all_ints((int32_t)0x80808080u), b); }
#endif

#ifndef HAS_HALVES
INLINE vf load_halves(const uint16_t *from) {
    vhalf halves;
    memcpy(&halves, from, sizeof halves);
    const vi wide = __builtin_convertvector(halves, vi);
    const vf size = (vf)((wide & 0x7fff) << 13) * 0x1p112f;  // the exponent's bias is 112 less; infinity is none here
    return (vf)((vi)size | (wide & 0x8000) << 16);
}
#endif

#ifndef HAS_STORE_BF16
INLINE void store_bf16(uint16_t *to, vf numbers) {
    const vu bits = (vu)numbers;
    const vhalf rounded = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, vhalf);
    memcpy(to, &rounded, sizeof rounded);
}
#endif

#ifndef HAS_LARGER
INLINE vf larger(vf a, vf b) {
    const vi first = a > b;
    return (vf)(((vi)a & first) | ((vi)b & ~first));
}
#endif

// --- everywhere ------------------------------------------------------------------------------------------------------

INLINE vf load_bf16(const uint16_t *from) {
    vhalf halves;
    memcpy(&halves, from, sizeof halves);
    return (vf)(__builtin_convertvector(halves, vi) << 16);
}

INLINE float sum_of(vf numbers) {
    float sum = 0;
    UNROLL for (int i = 0; i < LANES; i++) sum += numbers[i];
    return sum;
}

INLINE float largest_of(vf numbers) {
    float largest = numbers[0];
    UNROLL for (int i = 1; i < LANES; i++) largest = numbers[i] > largest ? numbers[i] : largest;
    return largest;
}

INLINE vf absolute(vf numbers) { return (vf)((vi)numbers & 0x7fffffff); }

// To the nearest whole number, ties to even: adding this leaves no bits for a fraction. For numbers below 2^22.
#define ROUNDER 12582912.0f
INLINE vi rounded(vf numbers) { return (vi)(numbers + ROUNDER) - (vi)all_floats(ROUNDER); }

// e^x as 2^n times a polynomial in the rest, to about 1e-7; below -87 it stays at 1e-38.
INLINE vf exponential(vf x) {
    const vf power = larger(x * 1.44269504f, all_floats(-126.0f));
    const vi whole = rounded(power);
    const vf rest = power - __builtin_convertvector(whole, vf);
    vf sum = all_floats(1.53533e-4f);
    sum = sum * rest + 1.339887e-3f;
    sum = sum * rest + 9.618437e-3f;
    sum = sum * rest + 5.5503324e-2f;
    sum = sum * rest + 2.4022648e-1f;
    sum = sum * rest + 6.9314720e-1f;
    sum = sum * rest + 1.0f;
    return (vf)((vi)sum + (whole << 23));
}

// --- memory ----------------------------------------------------------------------------------------------------------

#define LINE_BYTES 64

INLINE int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Cleared, at a cache line's beginning, and with a line to spare: the last vector of an odd row reads past it.
static void *new_lines(int64_t bytes) {
    const int64_t size = rounded_up(bytes + LINE_BYTES, LINE_BYTES);
    void *made = aligned_alloc(LINE_BYTES, size);
    return made ? memset(made, 0, size) : NULL;
}
