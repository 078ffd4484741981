// Weights, packed in panels of 32 rows (32 outputs), each of which is read as one stream. A lane is a row and holds four
// bytes of it: 2 numbers of bfloat16, 4 of 8 bits or 8 of 4 bits (the first four in the low halves of the bytes).
//
// A number q of 8 bits is stored as q + 128. Numbers of few bits come in groups of 32 along a row; a group stands for
// scale * q, where four bits hold q + 8, or for scale * q + offset, where four bits hold q = 0 … 15.

#pragma once
#include <math.h>

#include "pool.h"

#define PANEL 32
#define GROUP 32
#define PIECE 512  // columns of a row that are packed at a time
#define EXPORT __attribute__((visibility("default")))

enum { BF16, INT8, INT4 };
enum { FROM_FLOAT32, FROM_BFLOAT16, FROM_FLOAT16, FROM_BYTES };

typedef struct {
    int64_t rows, columns;
    int64_t format;
    uint8_t *numbers;   // [panels][columns in whole groups][PANEL]
    uint16_t *scales;   // float16 [panels][groups][PANEL]; NULL for bfloat16
    uint16_t *offsets;  // the same, or NULL
} Matrix;

static const int format_bits[] = {16, 8, 4};

INLINE int64_t panels_of(const Matrix *matrix) { return (matrix->rows + PANEL - 1) / PANEL; }

INLINE int64_t groups_of(const Matrix *matrix) { return (matrix->columns + GROUP - 1) / GROUP; }

INLINE int64_t panel_bytes(const Matrix *matrix) {
    return groups_of(matrix) * GROUP * PANEL * format_bits[matrix->format] / 8;
}

// Where the four bytes with this column of a row lie.
INLINE uint8_t *word_at(const Matrix *matrix, int64_t row, int64_t column) {
    const int64_t in_word = 32 / format_bits[matrix->format];
    return matrix->numbers + row / PANEL * panel_bytes(matrix) + (column / in_word * PANEL + row % PANEL) * 4;
}

INLINE int64_t scale_at(const Matrix *matrix, int64_t row, int64_t group) {
    return (row / PANEL * groups_of(matrix) + group) * PANEL + row % PANEL;
}

// --- numbers ---------------------------------------------------------------------------------------------------------

INLINE uint16_t bf16_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float float_of_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE float float_of_half(uint16_t half) {
    const uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float size;
    memcpy(&size, &bits, 4);
    size = (half & 0x7c00) == 0x7c00 ? NAN : size * 0x1p112f;
    return half & 0x8000 ? -size : size;
}

// To the nearest; what is too large becomes the largest.
INLINE uint16_t half_of(float number) {
    const uint16_t sign = number < 0 ? 0x8000 : 0;
    float size = fminf(fabsf(number), 65504.0f);
    if (size < 0x1p-14f) return sign | (uint16_t)lrintf(size * 0x1p24f);
    uint32_t bits;
    memcpy(&bits, &size, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

// --- packing ---------------------------------------------------------------------------------------------------------

typedef struct {
    const void *from;
    int64_t kind, stride;  // of `from`: its numbers, and how many lie between one row and the next
    int64_t rows, first;   // so many rows of it become those of the matrix from `first` on …
    int64_t interleaved;   // … or 16 of each panel, the other 16 being those of another tensor
} Source;

typedef struct Packing {
    Pool *pool;
    Matrix *matrix;
    Source source;
    const uint16_t *scales, *offsets;  // of bytes: [rows][groups]
    void (*pack_piece)(struct Packing *packing, int64_t row, int64_t first);
    atomic_int faults;  // pieces of rows with NaN or infinite numbers
} Packing;

INLINE int64_t packed_row(const Source *source, int64_t row) {
    return source->first + (source->interleaved ? row / 16 * PANEL + row % 16 : row);
}

static void read_row(const Source *source, int64_t row, int64_t first, int64_t columns, float *to) {
    const int64_t start = row * source->stride + first;
    if (source->kind == FROM_FLOAT32) memcpy(to, (const float *)source->from + start, columns * sizeof(float));
    const uint16_t *halves = (const uint16_t *)source->from + start;
    if (source->kind == FROM_BFLOAT16)
        for (int64_t i = 0; i < columns; i++) to[i] = float_of_bf16(halves[i]);
    if (source->kind == FROM_FLOAT16)
        for (int64_t i = 0; i < columns; i++) to[i] = float_of_half(halves[i]);
}

// All the numbers' exponents, looked at as integers: what is not finite has all of its exponent's bits.
static bool is_finite(const float *numbers, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, numbers + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest < 0x7f800000;
}

static void pack_bf16_group(const Matrix *matrix, int64_t row, int64_t group, const float *numbers) {
    uint8_t *to = word_at(matrix, row, group * GROUP);
    uint16_t halves[GROUP];
    for (int i = 0; i < GROUP; i += LANES) store_bf16(halves + i, load_floats(numbers + i));
    for (int i = 0; i < GROUP; i += 2) memcpy(to + i / 2 * PANEL * 4, halves + i, 4);
}

// A group as it is stored: 8 bits each, or 4 of them.
static void place_group(const Matrix *matrix, int64_t row, int64_t group, const uint8_t *stored) {
    uint8_t *to = word_at(matrix, row, group * GROUP), four[4];
    for (int word = 0; matrix->format == INT8 && word < GROUP / 4; word++) memcpy(to + word * PANEL * 4, stored + word * 4, 4);
    for (int word = 0; matrix->format == INT4 && word < GROUP / 8; word++) {
        for (int i = 0; i < 4; i++) four[i] = stored[word * 8 + i] | stored[word * 8 + 4 + i] << 4;
        memcpy(to + word * PANEL * 4, four, 4);
    }
}

// line * inverse as whole numbers from -most - 1 … most, with what is stored for 0 added.
static void place_rounded(const Matrix *matrix, int64_t row, int64_t group, const float *line, float inverse, int most,
                          int zero) {
    uint8_t stored[GROUP];
    for (int i = 0; i < GROUP; i += LANES) {
        const vf number = larger(load_floats(line + i) * inverse, all_floats(-1 - most));
        const vbyte bytes = __builtin_convertvector(rounded(-larger(-number, all_floats(-most))) + zero, vbyte);
        memcpy(stored + i, &bytes, sizeof bytes);
    }
    place_group(matrix, row, group, stored);
}

static float largest_size(const float *numbers) {
    vf largest = {0};
    for (int i = 0; i < GROUP; i += LANES) largest = larger(largest, absolute(load_floats(numbers + i)));
    return largest_of(largest);
}

static void pack_int8_group(const Matrix *matrix, int64_t row, int64_t group, const float *numbers) {
    const uint16_t half = half_of(largest_size(numbers) / 127);
    const float scale = float_of_half(half);
    matrix->scales[scale_at(matrix, row, group)] = half;
    place_rounded(matrix, row, group, numbers, scale ? 1 / scale : 0, 127, 128);
}

#define CANDIDATES 16

// How much of a group's squares is left to the error is least where (sum of x q)^2 / (sum of q^2) is largest, q being x in
// 4 bits by one of several scales; a lane is a scale. What it grows from there is (sum of x q) / (sum of q^2).
static void try_scales(const float *numbers, const float *inverses, float *gains, float *scales) {
    vf products = {0}, squares = all_floats(1e-30f);
    const vf inverse = load_floats(inverses);
    for (int i = 0; i < GROUP; i++) {
        const vf number = all_floats(numbers[i]), most = larger(number * inverse, all_floats(-8));
        const vf whole = __builtin_convertvector(rounded(-larger(-most, all_floats(-7))), vf);
        products += number * whole;
        squares += whole * whole;
    }
    store_floats(scales, products / squares);
    store_floats(gains, products * products / squares);
}

// The best of scales that make the largest number -6 … -10: a tenth less squared error than with -8.
static float int4_scale(const float *numbers) {
    float largest = 0, inverses[CANDIDATES], gains[CANDIDATES], scales[CANDIDATES];
    for (int i = 0; i < GROUP; i++) largest = fabsf(numbers[i]) > fabsf(largest) ? numbers[i] : largest;
    if (!largest) return 0;
    for (int i = 0; i < CANDIDATES; i++) inverses[i] = -(6.0f + 0.25f * i) / largest;
    for (int i = 0; i < CANDIDATES; i += LANES) try_scales(numbers, inverses + i, gains + i, scales + i);
    int best = 0;
    for (int i = 1; i < CANDIDATES; i++) best = gains[i] > gains[best] ? i : best;
    return float_of_half(half_of(scales[best]));
}

static void pack_int4_group(const Matrix *matrix, int64_t row, int64_t group, const float *numbers) {
    const float scale = int4_scale(numbers);
    matrix->scales[scale_at(matrix, row, group)] = half_of(scale);
    place_rounded(matrix, row, group, numbers, scale ? 1 / scale : 0, 7, 8);
}

static void (*const pack_group[])(const Matrix *matrix, int64_t row, int64_t group, const float *numbers) = {
    pack_bf16_group,
    pack_int8_group,
    pack_int4_group,
};

// PIECE columns of a row, or what is left of it.
INLINE int64_t piece_columns(const Matrix *matrix, int64_t first) {
    const int64_t left = matrix->columns - first;
    return left < PIECE ? left : PIECE;
}

static void pack_floats(Packing *packing, int64_t row, int64_t first) {
    const Matrix *matrix = packing->matrix;
    const int64_t columns = piece_columns(matrix, first), to = packed_row(&packing->source, row);
    _Alignas(LINE_BYTES) float line[PIECE];
    read_row(&packing->source, row, first, columns, line);
    if (!is_finite(line, columns)) atomic_fetch_add(&packing->faults, 1);
    memset(line + columns, 0, (rounded_up(columns, GROUP) - columns) * sizeof *line);
    for (int64_t at = 0; at < columns; at += GROUP) pack_group[matrix->format](matrix, to, (first + at) / GROUP, line + at);
}

// What is in groups of few bits already, as it is.
static void place_bytes(Packing *packing, int64_t row, int64_t first) {
    const Matrix *matrix = packing->matrix;
    const int64_t columns = piece_columns(matrix, first), to = packed_row(&packing->source, row);
    const uint8_t *from = (const uint8_t *)packing->source.from + row * packing->source.stride + first;
    _Alignas(LINE_BYTES) uint8_t line[PIECE];
    memcpy(line, from, columns);
    memset(line + columns, 0, rounded_up(columns, GROUP) - columns);
    for (int64_t at = 0; at < columns; at += GROUP) {
        const int64_t group = (first + at) / GROUP, source = row * groups_of(matrix) + group, scale = scale_at(matrix, to, group);
        place_group(matrix, to, group, line + at);
        matrix->scales[scale] = packing->scales[source];
        if (matrix->offsets) matrix->offsets[scale] = packing->offsets[source];
    }
}

// A panel's rows piece by piece: the lines that all of them write to are then still in the first cache.
static void pack_units(void *job, int thread) {
    (void)thread;
    Packing *packing = job;
    Phase *phase = packing->pool->phases;
    const int64_t rows = packing->source.rows, units = (rows + PANEL - 1) / PANEL;
    for (int unit; (unit = claim(phase)) < units; mark_done(phase))
        for (int64_t first = 0; first < packing->matrix->columns; first += PIECE)
            for (int64_t row = unit * PANEL; row < (unit + 1) * PANEL && row < rows; row++)
                packing->pack_piece(packing, row, first);
    wait_until(&phase->done, units);
}

// Packs rows of a tensor, in all threads. The matrix's memory was cleared. Bytes are what groups store, with these scales
// and offsets; what is not one byte is made into groups. Returns in how many pieces of rows there are numbers that are none,
// or -1 where memory ran out.
EXPORT int pack_rows(Pool *pool, Matrix *matrix, const Source *source, const uint16_t *scales, const uint16_t *offsets) {
    Packing *packing = calloc(1, sizeof *packing);
    if (!packing) return -1;
    *packing = (Packing){pool, matrix, *source, scales, offsets, source->kind == FROM_BYTES ? place_bytes : pack_floats, 0};
    const bool is_done = run_together(pool, pack_units, packing, 1);
    wait_until(&pool->inside, 0);  // before the job they look at is gone
    const int faults = is_done ? packing->faults : -1;
    free(packing);
    return faults;
}

// --- unpacking -------------------------------------------------------------------------------------------------------

INLINE int number_at(const Matrix *matrix, int64_t row, int64_t column) {
    const uint8_t byte = word_at(matrix, row, column)[column % 4];
    if (matrix->format == INT8) return (int)byte - 128;
    return (column % 8 < 4 ? byte & 15 : byte >> 4) - (matrix->offsets ? 0 : 8);
}

INLINE void unpack_group(const Matrix *matrix, int64_t row, int64_t group, int64_t stop, float *to) {
    const int64_t at = scale_at(matrix, row, group);
    const float scale = float_of_half(matrix->scales[at]);
    const float offset = matrix->offsets ? float_of_half(matrix->offsets[at]) : 0;
    for (int64_t k = group * GROUP; k < stop; k++) to[k] = scale * number_at(matrix, row, k) + offset;
}

// A row's numbers: an embedding.
EXPORT void unpack_row(const Matrix *matrix, int64_t row, float *to) {
    if (matrix->format == BF16) {
        const uint8_t *words = word_at(matrix, row, 0);
        for (int64_t k = 0; k < matrix->columns; k++) {
            uint16_t half;
            memcpy(&half, words + k / 2 * PANEL * 4 + k % 2 * 2, 2);
            to[k] = float_of_bf16(half);
        }
        return;
    }
    for (int64_t g = 0; g < groups_of(matrix); g++) {
        const int64_t stop = (g + 1) * GROUP;
        unpack_group(matrix, row, g, stop < matrix->columns ? stop : matrix->columns, to);
    }
}
