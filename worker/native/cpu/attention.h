// Rotary positions, keys and values in pages, and attention over them.
//
// A page holds 16 tokens of one KV head, both parts ready for products of pairs of bfloat16:
//     keys   [head_dim / 2][16 tokens][2]: a lane is a token
//     values [8 pairs of tokens][head_dim][2]: a lane is a dimension
// and a layer's pages lie block by block, in each the KV heads one after the other.

#pragma once
#include "matrix.h"

#define PAGE 16
#define QUERIES 8                // that look at a page at a time
#define SEGMENT 256              // tokens whose scores exist at a time
#define PART_PAGES 64            // a lone token's context is cut into parts of at least so many, for several threads
#define HIDDEN_SCORE (-1e30f)

typedef struct {
    int32_t heads, kv_heads, head_dim;
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

INLINE int64_t page_numbers(const Heads *heads) { return 2 * PAGE * heads->head_dim; }

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

static void store_key(const Heads *heads, uint16_t *page, int slot, const float *key) {
    for (int i = 0; i < heads->head_dim; i++) page[(i / 2 * PAGE + slot) * 2 + i % 2] = bf16_of(key[i]);
}

static void store_value(const Heads *heads, uint16_t *page, int slot, const float *value) {
    uint16_t *values = page + (PAGE + slot / 2 * 2) * heads->head_dim + slot % 2;
    for (int i = 0; i < heads->head_dim; i++) values[i * 2] = bf16_of(value[i]);
}

// The slots of a page behind this one. What lies there is multiplied with a share of zero, which NaN would survive.
static void clear_after(const Heads *heads, uint16_t *page, int slot) {
    uint16_t *values = page + (PAGE + slot / 2 * 2) * heads->head_dim;
    for (int i = 0; slot % 2 == 0 && i < heads->head_dim; i++) values[i * 2 + 1] = 0;
    const int pairs = PAGE / 2 - slot / 2 - 1;
    memset(values + 2 * heads->head_dim, 0, pairs * 2 * heads->head_dim * sizeof *values);
}

// A row's q, k, v [heads + 2 * kv_heads][head_dim] as far as a KV head is concerned: makes its queries and key ready, and
// stores key and value.
static void ready_group(const Heads *heads, float *qkv, int kv_head, const float *norms, const float *turns,
                        uint16_t *page, int slot) {
    const int shared = heads->heads / heads->kv_heads, dim = heads->head_dim;
    for (int head = kv_head * shared; head < (kv_head + 1) * shared; head++)
        ready_head(heads, qkv + head * dim, norms ? norms + head * dim : NULL, turns);
    const int key = heads->heads + kv_head;
    ready_head(heads, qkv + key * dim, norms ? norms + key * dim : NULL, turns);
    store_key(heads, page, slot, qkv + key * dim);
    store_value(heads, page, slot, qkv + (key + heads->kv_heads) * dim);
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

INLINE const uint16_t *page_at(const Scene *scene, int page) {
    const int64_t at = (int64_t)scene->blocks[page] * scene->heads->kv_heads + scene->kv_head;
    return scene->pages + at * page_numbers(scene->heads);
}

static void take_queries(const Scene *scene, const Task *task, uint16_t *to) {
    const int dim = scene->heads->head_dim;
    for (int i = 0; i < task->queries; i++) {
        const int query = task->query + i;
        const float *from = scene->qkv + query_row(scene, query) * scene->qkv_stride + query_head(scene, query) * dim;
        for (int d = 0; d < dim; d++) to[i * dim + d] = bf16_of(from[d]);
    }
}

// Scores of a page's 16 tokens, a segment's row apart.
INLINE void score_page(const uint16_t *keys, const uint16_t *queries, int dim, float scale, const int count, float *scores) {
    for (int first = 0; first < PAGE; first += LANES) {
        vf sums[QUERIES];
        UNROLL for (int i = 0; i < count; i++) sums[i] = (vf){0};
        for (int d = 0; d < dim; d += 2) {
            const vi key = load_ints(keys + (d / 2 * PAGE + first) * 2);
            UNROLL for (int i = 0; i < count; i++) sums[i] = dot_bf16(sums[i], key, all_words(queries + i * dim + d));
        }
        UNROLL for (int i = 0; i < count; i++) store_floats(scores + i * SEGMENT + first, sums[i] * scale);
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

// found = shrinks * found + shares times values, for one vector of dimensions.
INLINE void add_values(const Scene *scene, int page, int pages, int dim, const uint16_t *shares, const float *shrinks,
                       const int count, float *found) {
    const int width = scene->heads->head_dim;
    vf sums[QUERIES];
    UNROLL for (int i = 0; i < count; i++) sums[i] = load_floats(found + i * padded_dim(scene->heads) + dim) * shrinks[i];
    for (int p = 0; p < pages; p++, shares += PAGE) {
        const uint16_t *values = page_at(scene, page + p) + PAGE * width + dim * 2;
        UNROLL for (int pair = 0; pair < PAGE / 2; pair++) {
            const vi two = load_ints(values + pair * width * 2);
            UNROLL for (int i = 0; i < count; i++) sums[i] = dot_bf16(sums[i], two, all_words(shares + i * SEGMENT + pair * 2));
        }
    }
    UNROLL for (int i = 0; i < count; i++) store_floats(found + i * padded_dim(scene->heads) + dim, sums[i]);
}

INLINE void attend_segment(const Scene *scene, const Task *task, Attending *own, int page, int pages, const int count,
                           Partial *into) {
    const Heads *heads = scene->heads;
    const int64_t bytes = page_numbers(heads);  // half of a page's, in bytes
    prefetch(page_at(scene, page), bytes);
    for (int p = 0; p < pages; p++) {
        const uint16_t *keys = page_at(scene, page + p);
        if (p + 1 < pages) prefetch(page_at(scene, page + p + 1), bytes);
        prefetch((const char *)keys + bytes, bytes);
        score_page(keys, own->queries, heads->head_dim, heads->scale, count, own->scores + p * PAGE);
    }
    const int first = page * PAGE, tokens = pages * PAGE;
    if (first + tokens > stop_token(scene, task->query) || first < first_token(scene, task->query + count - 1))
        hide(scene, task, first, tokens, own->scores);
    float shrinks[QUERIES];
    for (int i = 0; i < count; i++)
        shrinks[i] = shares_of(own->scores + i * SEGMENT, tokens, &into->largest[i], &into->sum[i], own->shares + i * SEGMENT);
    for (int dim = 0; dim < heads->head_dim; dim += LANES)
        add_values(scene, page, pages, dim, own->shares, shrinks, count, into->found);
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
