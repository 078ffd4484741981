// Products of rows of activations with a packed matrix, and what is done to the sums before they are stored.

#pragma once
#include "matrix.h"

#if LANES == 16
#define WIDE 2  // vectors of a panel that are computed at a time …
#define TALL 8  // … for so many rows of activations: as many sums as there are registers
#elif LANES == 8
#define WIDE 2
#define TALL 4
#else
#define WIDE 4
#define TALL 4
#endif

enum { STORE, ADD, GATED, BEST };

// Rows of activations in the form that a matrix's format is multiplied with.
typedef struct {
    uint16_t *halves;  // bfloat16 [rows][columns in whole groups]
    int8_t *bytes;     // the same, in groups like the weights, but symmetric
    float *scales;     // [rows][groups]
    float *sums;       // [rows][groups]: what an offset of 1 adds
    int32_t *starts;   // [rows][groups]: of the whole numbers' sum, so that stored numbers count as what they stand for
} Prepared;

static bool new_prepared(Prepared *prepared, int64_t rows, int64_t most_columns) {
    const int64_t numbers = rows * rounded_up(most_columns, GROUP), groups = numbers / GROUP;
    prepared->halves = new_lines(numbers * 2);
    prepared->bytes = new_lines(numbers);
    prepared->scales = new_lines(groups * 4);
    prepared->sums = new_lines(groups * 4);
    prepared->starts = new_lines(groups * 4);
    return prepared->halves && prepared->bytes && prepared->scales && prepared->sums && prepared->starts;
}

static void free_prepared(Prepared *prepared) {
    free(prepared->halves);
    free(prepared->bytes);
    free(prepared->scales);
    free(prepared->sums);
    free(prepared->starts);
}

INLINE int64_t stride_of(const Matrix *matrix) { return groups_of(matrix) * GROUP; }

INLINE int excess_of(const Matrix *matrix) {
    if (matrix->format == INT8) return I8_EXCESS;
    return matrix->offsets ? 0 : 8;
}

// x normalised and scaled into `to`, in whole groups: behind `columns` both x and norm are 0.
static void normalise(const float *x, const float *norm, float eps, int64_t columns, float *to) {
    const int64_t padded = rounded_up(columns, GROUP);
    vf squares = {0};
    for (int64_t i = 0; i < padded; i += LANES) squares += load_floats(x + i) * load_floats(x + i);
    const float scale = 1 / sqrtf(sum_of(squares) / columns + eps);
    for (int64_t i = 0; i < padded; i += LANES) store_floats(to + i, load_floats(x + i) * scale * load_floats(norm + i));
}

// The largest absolute number of a group; not finite where one of them is not: as bits, NaN is the largest of all.
INLINE float size_of(const float *x) {
    vi largest = (vi)all_floats(1e-20f);
    UNROLL for (int i = 0; i < GROUP; i += LANES) {
        const vi bits = (vi)absolute(load_floats(x + i)), more = bits > largest;
        largest = (bits & more) | (largest & ~more);
    }
    int32_t size = largest[0];
    UNROLL for (int i = 1; i < LANES; i++) size = largest[i] > size ? largest[i] : size;
    float number;
    memcpy(&number, &size, sizeof number);
    return number;
}

INLINE void prepare_group(const Prepared *to, int64_t at, int excess, const float *x) {
    const float size = size_of(x);
    if (!(size < INFINITY)) {  // it stays none
        to->scales[at] = to->sums[at] = NAN;
        to->starts[at] = 0;
        return;
    }
    vi sums = {0};
    UNROLL for (int i = 0; i < GROUP; i += LANES) {
        const vi whole = rounded(load_floats(x + i) * (127 / size));
        const vbyte bytes = __builtin_convertvector(whole, vbyte);
        memcpy(to->bytes + at * GROUP + i, &bytes, sizeof bytes);
        sums += whole;
    }
    int32_t sum = 0;
    UNROLL for (int i = 0; i < LANES; i++) sum += sums[i];
    to->scales[at] = size / 127;
    to->sums[at] = size / 127 * sum;
    to->starts[at] = -excess * sum;
}

// Row x of as many numbers as the matrix has columns, in whole groups, becomes row `row`.
static void prepare_row(const Prepared *to, int64_t row, const Matrix *matrix, const float *x) {
    if (matrix->format == BF16) {
        const int64_t stride = stride_of(matrix);
        for (int64_t i = 0; i < stride; i += LANES) store_bf16(to->halves + row * stride + i, load_floats(x + i));
        return;
    }
    const int64_t groups = groups_of(matrix);
    for (int64_t g = 0; g < groups; g++) prepare_group(to, row * groups + g, excess_of(matrix), x + g * GROUP);
}

// --- tiles: WIDE vectors of a panel for up to TALL rows; inlined, so that each height and format is a loop of its own ----

typedef float Sums[TALL][PANEL];

INLINE void tile_bf16(const Matrix *matrix, const Prepared *in, int64_t panel, int64_t row, int part, const int height,
                      Sums out) {
    const uint8_t *weights = matrix->numbers + panel * panel_bytes(matrix) + part * 4 * LANES;
    const int64_t stride = stride_of(matrix);
    const uint16_t *x = in->halves + row * stride;
    vf sums[TALL][WIDE];
    UNROLL for (int m = 0; m < height; m++) UNROLL for (int v = 0; v < WIDE; v++) sums[m][v] = (vf){0};
    for (int64_t k = 0; k < stride; k += 2, weights += PANEL * 4) {
        vi w[WIDE];
        UNROLL for (int v = 0; v < WIDE; v++) w[v] = load_ints(weights + v * 4 * LANES);
        UNROLL for (int m = 0; m < height; m++) {
            const vi pair = all_words(x + m * stride + k);
            UNROLL for (int v = 0; v < WIDE; v++) sums[m][v] = dot_bf16(sums[m][v], w[v], pair);
        }
    }
    UNROLL for (int m = 0; m < height; m++)
        UNROLL for (int v = 0; v < WIDE; v++) store_floats(&out[m][(part + v) * LANES], sums[m][v]);
}

// Sums of whole numbers over one group.
INLINE void group_sums(const uint8_t *weights, const int8_t *x, int64_t stride, const int bits, const int height,
                       vi sums[TALL][WIDE]) {
    const int words = GROUP * bits / 32;
    UNROLL for (int word = 0; word < words; word++) {
        vi w[WIDE];
        UNROLL for (int v = 0; v < WIDE; v++) w[v] = load_ints(weights + word * PANEL * 4 + v * 4 * LANES);
        if (bits == 8) {
            UNROLL for (int m = 0; m < height; m++) {
                const vi four = all_words(x + m * stride + word * 4);
                UNROLL for (int v = 0; v < WIDE; v++) sums[m][v] = dot_i8(sums[m][v], w[v], four);
            }
            continue;
        }
        UNROLL for (int half = 0; half < 2; half++) {
            vi u[WIDE];
            UNROLL for (int v = 0; v < WIDE; v++) u[v] = (vi)((vu)w[v] >> (4 * half)) & 0x0f0f0f0f;
            UNROLL for (int m = 0; m < height; m++) {
                const vi four = all_words(x + m * stride + word * 8 + half * 4);
                UNROLL for (int v = 0; v < WIDE; v++) sums[m][v] = dot_u4(sums[m][v], u[v], four);
            }
        }
    }
}

INLINE void tile_groups(const Matrix *matrix, const Prepared *in, int64_t panel, int64_t row, int part, const int height,
                        const int bits, const bool has_offsets, Sums out) {
    const int64_t groups = groups_of(matrix), stride = groups * GROUP;
    const uint8_t *weights = matrix->numbers + panel * panel_bytes(matrix) + part * 4 * LANES;
    const int64_t scale_from = panel * groups * PANEL + part * LANES, from = row * groups;
    vf totals[TALL][WIDE];
    UNROLL for (int m = 0; m < height; m++) UNROLL for (int v = 0; v < WIDE; v++) totals[m][v] = (vf){0};
    for (int64_t g = 0; g < groups; g++, weights += GROUP * PANEL * bits / 8) {
        vi sums[TALL][WIDE];
        UNROLL for (int m = 0; m < height; m++)
            UNROLL for (int v = 0; v < WIDE; v++) sums[m][v] = all_ints(in->starts[from + m * groups + g]);
        group_sums(weights, in->bytes + row * stride + g * GROUP, stride, bits, height, sums);
        UNROLL for (int v = 0; v < WIDE; v++) {
            const vf scale = load_halves(matrix->scales + scale_from + g * PANEL + v * LANES);
            UNROLL for (int m = 0; m < height; m++)
                totals[m][v] += __builtin_convertvector(sums[m][v], vf) * (scale * in->scales[from + m * groups + g]);
        }
        if (!has_offsets) continue;
        UNROLL for (int v = 0; v < WIDE; v++) {
            const vf offset = load_halves(matrix->offsets + scale_from + g * PANEL + v * LANES);
            UNROLL for (int m = 0; m < height; m++) totals[m][v] += offset * in->sums[from + m * groups + g];
        }
    }
    UNROLL for (int m = 0; m < height; m++)
        UNROLL for (int v = 0; v < WIDE; v++) store_floats(&out[m][(part + v) * LANES], totals[m][v]);
}

INLINE void tile(const Matrix *matrix, const Prepared *in, int64_t panel, int64_t row, const int height, Sums out) {
    for (int part = 0; part < PANEL / LANES; part += WIDE) {
        if (matrix->format == BF16) tile_bf16(matrix, in, panel, row, part, height, out);
        else if (matrix->format == INT8 && !matrix->offsets) tile_groups(matrix, in, panel, row, part, height, 8, false, out);
        else if (matrix->format == INT8) tile_groups(matrix, in, panel, row, part, height, 8, true, out);
        else if (!matrix->offsets) tile_groups(matrix, in, panel, row, part, height, 4, false, out);
        else tile_groups(matrix, in, panel, row, part, height, 4, true, out);
    }
}

// out [height][PANEL] = these rows times one panel
static void compute_tile(const Matrix *matrix, const Prepared *in, int64_t panel, int64_t row, int height, Sums out) {
    switch (height) {
        case 1: tile(matrix, in, panel, row, 1, out); break;
        case 2: tile(matrix, in, panel, row, 2, out); break;
        case 3: tile(matrix, in, panel, row, 3, out); break;
        case 4: tile(matrix, in, panel, row, 4, out); break;
#if TALL > 4
        case 5: tile(matrix, in, panel, row, 5, out); break;
        case 6: tile(matrix, in, panel, row, 6, out); break;
        case 7: tile(matrix, in, panel, row, 7, out); break;
        case 8: tile(matrix, in, panel, row, 8, out); break;
#endif
    }
}

// --- what becomes of the sums ----------------------------------------------------------------------------------------

typedef struct {  // the best logit of a row that a thread has seen
    float logit;
    int32_t token;
} Best;

typedef struct {
    int epilogue;
    const float *bias;  // [panels][PANEL], or NULL
    float *to;          // NULL: only the best is wanted
    int64_t stride;     // of `to`, in whole panels (half panels where GATED)
    Best *best;         // [rows]
    int64_t columns;    // of `to` that count
} Outlet;

INLINE vf gated(vf gate, vf up) { return gate * up / (exponential(-gate) + 1.0f); }

// silu(gate) * up: a panel's first half are gates.
static void store_gated(const float *sums, float *to) {
    for (int i = 0; i < PANEL / 2; i += LANES)
        store_floats(to + i, gated(load_floats(sums + i), load_floats(sums + PANEL / 2 + i)));
}

static void add_to(const float *terms, float *to) {
    for (int i = 0; i < PANEL; i += LANES) store_floats(to + i, load_floats(to + i) + load_floats(terms + i));
}

// Of equals the first. What is no number is never better.
static void keep_best(const float *sums, int64_t panel, int64_t columns, Best *best) {
    vf largest = load_floats(sums);
    for (int i = LANES; i < PANEL; i += LANES) largest = larger(largest, load_floats(sums + i));
    if (largest_of(largest) <= best->logit) return;  // as nearly always
    for (int i = 0; i < PANEL && panel * PANEL + i < columns; i++)
        if (sums[i] > best->logit) *best = (Best){sums[i], panel * PANEL + i};
}

static void let_out(const Outlet *out, float *sums, int64_t panel, int64_t row) {
    if (out->bias) add_to(out->bias + panel * PANEL, sums);
    float *to = out->to ? out->to + row * out->stride : NULL;
    if (out->epilogue == GATED) store_gated(sums, to + panel * PANEL / 2);
    else if (out->epilogue == ADD) add_to(sums, to + panel * PANEL);
    else if (to) memcpy(to + panel * PANEL, sums, PANEL * sizeof(float));
    if (out->epilogue == BEST) keep_best(sums, panel, out->columns, &out->best[row]);
}

// Rows `row` … `stop` - 1 times panels `panel` … `last` - 1.
static void multiply(const Matrix *matrix, const Prepared *in, int64_t panel, int64_t last, int64_t row, int64_t stop,
                     const Outlet *out) {
    for (; panel < last; panel++)
        for (int64_t first = row; first < stop; first += TALL) {
            _Alignas(LINE_BYTES) Sums sums;
            const int height = stop - first < TALL ? stop - first : TALL;
            compute_tile(matrix, in, panel, first, height, sums);
            for (int m = 0; m < height; m++) let_out(out, sums[m], panel, first + m);
        }
}
