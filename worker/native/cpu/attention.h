// Rotary positions, keys and values in pages, and attention over them.
//
// A page holds the keys or the values of 16 tokens and one KV head, ready for products of pairs of bfloat16:
//     keys   [head_dim / 2][16 tokens][2]: a lane is a token
//     values [8 pairs of tokens][head_dim][2]: a lane is a dimension
// and a layer is [kv_heads][keys, values][blocks] of them: of a sequence whose blocks lie in a row, each is one long read.

#pragma once
#include "matrix.h"

#define PAGE 16
#define QUERIES 8                // that look at a page at a time
#if LANES == 8
#define ABREAST 2                // vectors of dimensions at a time, for so many queries; half of them for more
#else
#define ABREAST 4
#endif
#define SEGMENT 256              // tokens whose scores exist at a time
#define PART_PAGES 64            // a lone token's context is cut into parts of at least so many, for several threads
#define HIDDEN_SCORE (-1e30f)

typedef struct {
    int32_t heads, kv_heads, head_dim, num_blocks;
    float eps, scale;           // of the scores
    const float *frequencies;   // radians per position [head_dim / 2]
    float length;               // of rotated vectors
} Heads;

typedef struct {  // a sequence's rows in a step
    int32_t row, rows, position, table;  // the first row's position; where its blocks begin among all
} Span;

// Up to QUERIES queries of one sequence and KV head, and the pages that they are to look at. A query is a row and a head
// of those that share the KV head; the heads of a row come one after the other.
typedef struct {
    int32_t span, query, queries;
    int32_t first_page, stop_page;
    int32_t part, parts;  // which of so many tasks over the same queries
    int32_t home;         // the first of their places among the partial results
} Task;

typedef struct {  // what a task of several found: not yet divided by the sum
    float largest[QUERIES], sum[QUERIES];
    float found[];  // [QUERIES][head_dim in whole vectors]
} Partial;

typedef struct {  // of one thread
    uint16_t *queries;  // bfloat16 [QUERIES][head_dim]
    float *scores;      // [QUERIES][SEGMENT]
    uint16_t *shares;   // bfloat16 [QUERIES][SEGMENT]
    Partial *partial;
} Attending;

INLINE int64_t padded_dim(const Heads *heads) { return rounded_up(heads->head_dim, 16); }

INLINE int64_t partial_bytes(const Heads *heads) {
    return rounded_up(sizeof(Partial) + QUERIES * padded_dim(heads) * sizeof(float), LINE_BYTES);
}

// Numbers from a layer's beginning to a block's page of keys; that of its values lies `values_apart` behind it.
INLINE int64_t page_offset(const Heads *heads, int kv_head, int64_t block) {
    return ((int64_t)kv_head * 2 * heads->num_blocks + block) * PAGE * heads->head_dim;
}

INLINE int64_t values_apart(const Heads *heads) { return (int64_t)heads->num_blocks * PAGE * heads->head_dim; }

static bool new_attending(Attending *attending, const Heads *heads) {
    attending->queries = new_lines(QUERIES * heads->head_dim * 2);
    attending->scores = new_lines(QUERIES * SEGMENT * 4);
    attending->shares = new_lines(QUERIES * SEGMENT * 2);
    attending->partial = new_lines(partial_bytes(heads));
    return attending->queries && attending->scores && attending->shares && attending->partial;
}

static void free_attending(Attending *attending) {
    free(attending->queries);
    free(attending->scores);
    free(attending->shares);
    free(attending->partial);
}

// --- before it: norms, rotation, storing -----------------------------------------------------------------------------

// cos and sin of a row's angles [2][head_dim / 2], as float32 has them
static void turns_at(const Heads *heads, int32_t position, float *turns) {
    const int pairs = heads->head_dim / 2;
    for (int i = 0; i < pairs; i++) {
        const float angle = (float)position * heads->frequencies[i];
        turns[i] = cosf(angle) * heads->length;
        turns[pairs + i] = sinf(angle) * heads->length;
    }
}

static void rotate(float *head, const float *turns, int pairs) {
    for (int i = 0; i < pairs; i++) {
        const float a = head[i], b = head[pairs + i];
        head[i] = a * turns[i] - b * turns[pairs + i];
        head[pairs + i] = b * turns[i] + a * turns[pairs + i];
    }
}

static void normalise_head(const Heads *heads, float *head, const float *norm) {
    float squares = 0;
    for (int i = 0; i < heads->head_dim; i++) squares += head[i] * head[i];
    const float scale = 1 / sqrtf(squares / heads->head_dim + heads->eps);
    for (int i = 0; i < heads->head_dim; i++) head[i] *= scale * norm[i];
}

// `norm` and `turns` are NULL where a model or layer has none.
static void ready_head(const Heads *heads, float *head, const float *norm, const float *turns) {
    if (norm) normalise_head(heads, head, norm);
    if (turns) rotate(head, turns, heads->head_dim / 2);
}

static void store_key(const Heads *heads, uint16_t *keys, int slot, const float *key) {
    for (int i = 0; i < heads->head_dim; i++) keys[(i / 2 * PAGE + slot) * 2 + i % 2] = bf16_of(key[i]);
}

static void store_value(const Heads *heads, uint16_t *values, int slot, const float *value) {
    values += slot / 2 * 2 * heads->head_dim + slot % 2;
    for (int i = 0; i < heads->head_dim; i++) values[i * 2] = bf16_of(value[i]);
}

// The slots of a page behind this one. What lies there is multiplied with a share of zero, which NaN would survive.
static void clear_after(const Heads *heads, uint16_t *values, int slot) {
    values += slot / 2 * 2 * heads->head_dim;
    for (int i = 0; slot % 2 == 0 && i < heads->head_dim; i++) values[i * 2 + 1] = 0;
    const int pairs = PAGE / 2 - slot / 2 - 1;
    memset(values + 2 * heads->head_dim, 0, pairs * 2 * heads->head_dim * sizeof *values);
}

// A row's q, k, v [heads + 2 * kv_heads][head_dim] as far as a KV head is concerned: makes its queries and key ready, and
// stores key and value.
static void ready_group(const Heads *heads, float *qkv, int kv_head, const float *norms, const float *turns,
                        uint16_t *keys, int slot) {
    const int shared = heads->heads / heads->kv_heads, dim = heads->head_dim;
    for (int head = kv_head * shared; head < (kv_head + 1) * shared; head++)
        ready_head(heads, qkv + head * dim, norms ? norms + head * dim : NULL, turns);
    const int key = heads->heads + kv_head;
    ready_head(heads, qkv + key * dim, norms ? norms + key * dim : NULL, turns);
    store_key(heads, keys, slot, qkv + key * dim);
    store_value(heads, keys + values_apart(heads), slot, qkv + (key + heads->kv_heads) * dim);
}

// --- attention -------------------------------------------------------------------------------------------------------

// Where one task reads and writes.
typedef struct {
    const Heads *heads;
    const uint16_t *pages;   // the layer's
    const int32_t *blocks;   // the sequence's
    const float *qkv;        // of its first row
    int64_t qkv_stride, to_stride;
    float *to;               // [rows][heads][head_dim], its first row
    int32_t kv_head, position, window;
} Scene;

INLINE int shared_heads(const Scene *scene) { return scene->heads->heads / scene->heads->kv_heads; }

INLINE int query_row(const Scene *scene, int query) { return query / shared_heads(scene); }

INLINE int query_head(const Scene *scene, int query) {
    return scene->kv_head * shared_heads(scene) + query % shared_heads(scene);
}

INLINE int stop_token(const Scene *scene, int query) { return scene->position + query_row(scene, query) + 1; }

INLINE int first_token(const Scene *scene, int query) {
    const int seen = stop_token(scene, query) - scene->window;
    return scene->window && seen > 0 ? seen : 0;
}

INLINE const uint16_t *keys_at(const Scene *scene, int page) {
    return scene->pages + page_offset(scene->heads, scene->kv_head, scene->blocks[page]);
}

INLINE const uint16_t *values_at(const Scene *scene, int page) { return keys_at(scene, page) + values_apart(scene->heads); }

static void take_queries(const Scene *scene, const Task *task, uint16_t *to) {
    const int dim = scene->heads->head_dim;
    for (int i = 0; i < task->queries; i++) {
        const int query = task->query + i;
        const float *from = scene->qkv + query_row(scene, query) * scene->qkv_stride + query_head(scene, query) * dim;
        for (int d = 0; d < dim; d++) to[i * dim + d] = bf16_of(from[d]);
    }
}

// Scores of a page's 16 tokens, a segment's row apart. Two sums for each, since a sum waits for the one before it.
INLINE void score_page(const uint16_t *keys, const uint16_t *queries, int dim, float scale, const int count, float *scores) {
    for (int first = 0; first < PAGE; first += LANES) {
        vf even[QUERIES], odd[QUERIES];
        const uint16_t *key = keys + first * 2;
        UNROLL for (int i = 0; i < count; i++) even[i] = odd[i] = (vf){0};
        for (int d = 0; d + 4 <= dim; d += 4, key += 4 * PAGE) {
            const vi one = load_ints(key), two = load_ints(key + 2 * PAGE);
            UNROLL for (int i = 0; i < count; i++) even[i] = dot_bf16(even[i], one, all_words(queries + i * dim + d));
            UNROLL for (int i = 0; i < count; i++) odd[i] = dot_bf16(odd[i], two, all_words(queries + i * dim + d + 2));
        }
        if (dim % 4)
            UNROLL for (int i = 0; i < count; i++)
                even[i] = dot_bf16(even[i], load_ints(key), all_words(queries + i * dim + dim - 2));
        UNROLL for (int i = 0; i < count; i++) store_floats(scores + i * SEGMENT + first, (even[i] + odd[i]) * scale);
    }
}

static void hide(const Scene *scene, const Task *task, int first, int tokens, float *scores) {
    for (int i = 0; i < task->queries; i++) {
        const int from = first_token(scene, task->query + i), stop = stop_token(scene, task->query + i);
        for (int at = 0; at < tokens && first + at < from; at++) scores[i * SEGMENT + at] = HIDDEN_SCORE;
        for (int at = stop > first ? stop - first : 0; at < tokens; at++) scores[i * SEGMENT + at] = HIDDEN_SCORE;
    }
}

// Scores become shares of the sum so far; what was found before shrinks where a larger score has come. A token that
// nobody may see has a share of 0 unless nobody has seen any yet, and what that adds is forgotten with the first.
static float shares_of(float *scores, int tokens, float *largest, float *sum, uint16_t *shares) {
    vf most = all_floats(*largest);
    for (int at = 0; at < tokens; at += LANES) most = larger(most, load_floats(scores + at));
    const float now = largest_of(most), shrinks = exponential(all_floats(*largest - now))[0];
    vf added = {0};
    for (int at = 0; at < tokens; at += LANES) {
        const vf share = exponential(load_floats(scores + at) - now);
        store_bf16(shares + at, share);
        added += share;
    }
    *sum = *sum * shrinks + sum_of(added);
    *largest = now;
    return shrinks;
}

// found = shrinks * found + shares times values, for so many vectors of dimensions side by side.
INLINE void add_values(const Scene *scene, int page, int pages, int dim, const uint16_t *shares, const float *shrinks,
                       const int count, const int abreast, float *found) {
    const int width = scene->heads->head_dim, apart = padded_dim(scene->heads);
    vf sums[QUERIES][ABREAST];
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int v = 0; v < abreast; v++) sums[i][v] = load_floats(found + i * apart + dim + v * LANES) * shrinks[i];
    for (int p = 0; p < pages; p++, shares += PAGE) {
        const uint16_t *values = values_at(scene, page + p) + dim * 2;
        for (int pair = 0; pair < PAGE / 2; pair++, values += width * 2) {
            vi two[ABREAST];
            UNROLL for (int v = 0; v < abreast; v++) two[v] = load_ints(values + v * LANES * 2);
            UNROLL for (int i = 0; i < count; i++) {
                const vi share = all_words(shares + i * SEGMENT + pair * 2);
                UNROLL for (int v = 0; v < abreast; v++) sums[i][v] = dot_bf16(sums[i][v], two[v], share);
            }
        }
    }
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int v = 0; v < abreast; v++) store_floats(found + i * apart + dim + v * LANES, sums[i][v]);
}

INLINE void attend_segment(const Scene *scene, const Task *task, Attending *own, int page, int pages, const int count,
                           Partial *into) {
    const Heads *heads = scene->heads;
    for (int p = 0; p < pages; p++)
        score_page(keys_at(scene, page + p), own->queries, heads->head_dim, heads->scale, count, own->scores + p * PAGE);
    const int first = page * PAGE, tokens = pages * PAGE;
    if (first + tokens > stop_token(scene, task->query) || first < first_token(scene, task->query + count - 1))
        hide(scene, task, first, tokens, own->scores);
    float shrinks[QUERIES];
    for (int i = 0; i < count; i++)
        shrinks[i] = shares_of(own->scores + i * SEGMENT, tokens, &into->largest[i], &into->sum[i], own->shares + i * SEGMENT);
    const int abreast = count > ABREAST ? ABREAST / 2 : ABREAST;  // as many sums as there are registers
    int dim = 0;
    for (; dim + abreast * LANES <= heads->head_dim; dim += abreast * LANES)
        add_values(scene, page, pages, dim, own->shares, shrinks, count, abreast, into->found);
    for (; dim < heads->head_dim; dim += LANES)
        add_values(scene, page, pages, dim, own->shares, shrinks, count, 1, into->found);
}

INLINE void attend_pages(const Scene *scene, const Task *task, Attending *own, const int count, Partial *into) {
    for (int page = task->first_page; page < task->stop_page; page += SEGMENT / PAGE) {
        const int left = task->stop_page - page;
        attend_segment(scene, task, own, page, left < SEGMENT / PAGE ? left : SEGMENT / PAGE, count, into);
    }
}

// What a task finds, in `into`.
static void attend(const Scene *scene, const Task *task, Attending *own, Partial *into) {
    take_queries(scene, task, own->queries);
    for (int i = 0; i < QUERIES; i++) into->largest[i] = HIDDEN_SCORE, into->sum[i] = 0;
    memset(into->found, 0, QUERIES * padded_dim(scene->heads) * sizeof(float));
    switch (task->queries) {
        case 1: attend_pages(scene, task, own, 1, into); break;
        case 2: attend_pages(scene, task, own, 2, into); break;
        case 3: attend_pages(scene, task, own, 3, into); break;
        case 4: attend_pages(scene, task, own, 4, into); break;
        case 5: attend_pages(scene, task, own, 5, into); break;
        case 6: attend_pages(scene, task, own, 6, into); break;
        case 7: attend_pages(scene, task, own, 7, into); break;
        case 8: attend_pages(scene, task, own, 8, into); break;
    }
}

// Joins what tasks over the same queries found, `apart` bytes from each other, in the first of them.
static void join_parts(const Scene *scene, const Task *task, Partial *first, int64_t apart) {
    const int64_t dim = padded_dim(scene->heads);
    for (int part = 1; part < task->parts; part++) {
        const Partial *next = (const Partial *)((const char *)first + part * apart);
        for (int i = 0; i < task->queries; i++) {
            const float now = fmaxf(first->largest[i], next->largest[i]);
            const float kept = expf(first->largest[i] - now), taken = expf(next->largest[i] - now);
            first->sum[i] = first->sum[i] * kept + next->sum[i] * taken;
            first->largest[i] = now;
            for (int d = 0; d < dim; d++) first->found[i * dim + d] = first->found[i * dim + d] * kept + next->found[i * dim + d] * taken;
        }
    }
}

static void deliver(const Scene *scene, const Task *task, const Partial *from) {
    const int dim = scene->heads->head_dim;
    for (int i = 0; i < task->queries; i++) {
        const int query = task->query + i;
        float *to = scene->to + query_row(scene, query) * scene->to_stride + query_head(scene, query) * dim;
        for (int d = 0; d < dim; d++) to[d] = from->found[i * padded_dim(scene->heads) + d] / from->sum[i];
    }
}

// --- tasks -----------------------------------------------------------------------------------------------------------

typedef struct {  // of all layers with the same window
    Task *tasks;
    int32_t count, capacity, partials, tiles;
    bool is_plain;  // each span is one row and one task
} Plan;

static bool add_task(Plan *plan, Task task) {
    if (plan->count == plan->capacity) {
        const int32_t capacity = plan->capacity ? 2 * plan->capacity : 64;
        Task *grown = realloc(plan->tasks, capacity * sizeof *grown);
        if (!grown) return false;
        plan->tasks = grown;
        plan->capacity = capacity;
    }
    plan->tasks[plan->count++] = task;
    return true;
}

// One task, or several where a single row looks at so much that its threads should share it.
static bool add_tile(Plan *plan, const Span *span, Task task) {
    const int pages = task.stop_page - task.first_page;
    const int parts = span->rows == 1 && pages >= 2 * PART_PAGES ? pages / PART_PAGES : 1, first = task.first_page;
    task.home = parts > 1 ? plan->partials : 0;
    task.parts = parts;
    for (task.part = 0; task.part < parts; task.part++) {
        task.first_page = first + (int64_t)pages * task.part / parts;
        task.stop_page = first + (int64_t)pages * (task.part + 1) / parts;
        if (!add_task(plan, task)) return false;
    }
    plan->partials += parts > 1 ? parts : 0;
    return true;
}

static bool plan_tasks(Plan *plan, const Span *spans, int count, int shared, int window) {
    plan->count = plan->partials = 0;
    plan->is_plain = true;
    for (int s = 0; s < count; s++) {
        const Span *span = &spans[s];
        const int queries = span->rows * shared, before = plan->count;
        for (int query = 0; query < queries; query += QUERIES) {
            const int some = queries - query < QUERIES ? queries - query : QUERIES;
            const int first = span->position + query / shared + 1 - window;
            const int stop = span->position + (query + some - 1) / shared + 1;
            Task task = {.span = s, .query = query, .queries = some};
            task.first_page = window && first > 0 ? first / PAGE : 0;
            task.stop_page = (stop + PAGE - 1) / PAGE;
            if (!add_tile(plan, span, task)) return false;
        }
        plan->is_plain = plan->is_plain && span->rows == 1 && plan->count == before + 1;
    }
    return true;
}
