// One step of a decoder in one call: rows of query tokens, of many sequences, decodes and chunks of prompts mixed, through a
// flat program of fused phases over packed weights and a paged KV cache. Called by ctypes; see program.py and decoder.py.

#include "attention.h"
#include "linear.h"

#define SLICE 512  // rows that go through the layers at a time: it bounds the memory that they take on their way
#define FEW 8      // up to so many rows every thread prepares for itself, instead of all waiting for each other
#define UNIT_BYTES (256 << 10)   // of weights that a thread claims at a time
#define BLOCK_BYTES (512 << 10)  // of activations that stay in a second-level cache while panels pass by

enum { EMBED, LINEAR, ATTEND };
enum { X, QKV, ATTENDED, INNER, LOGITS, BUFFERS };  // [rows][numbers in whole panels]

typedef struct {
    int64_t kind, from, to, epilogue;
    Matrix matrix;
    const float *norm;      // of the rows before the product, or NULL …
    const float *bias;      // … and of the sums after it; both in whole panels
    const float *qk_norm;   // [heads + kv_heads][head_dim], or NULL
    uint16_t *pages;        // of the layer
    int64_t rotates, plan;  // which of the windows
} Op;

typedef struct {
    Heads heads;
    int32_t num_ops, num_windows;
    const Op *ops;  // the last one is the head: only for rows whose logits are wanted
    const int32_t *windows;
    int64_t widths[BUFFERS];  // of the buffers, in whole panels
} Program;

typedef struct {
    int32_t rows, num_spans, outputs;
    const int32_t *tokens;       // [rows]
    const Span *spans;
    const int32_t *blocks;       // of all sequences, one after the other
    const int32_t *output_rows;  // [outputs]
    float *x;                    // [rows]
    float *logits;               // [outputs], or NULL
    int32_t *best;               // [outputs], or NULL
} Batch;

typedef struct {  // of one thread
    Prepared prepared;
    Attending attending;
    float *line;
    Best *best;
    int prepared_op;  // what `prepared` was made for in this step
} Thread;

typedef struct {
    Pool *pool;
    Program program;
    Thread *threads;
    int num_threads;
    float *buffers[BUFFERS];
    float *turns;       // [rows][head_dim]
    int32_t *span_of;   // [rows]
    Span *spans;        // of the slice
    Prepared prepared;  // of many rows, for all threads
    int64_t most_rows, most_outputs;
    Plan *plans;        // [windows]
    char *partials;
    atomic_int *arrived;  // at the place of a tile's first partial result: tasks that are done
    int64_t most_partials;
    // the step that runs
    Batch batch;
    int first_row, rows, num_spans;  // of the slice
    int first_op, stop_op;
} Engine;

// --- phases ----------------------------------------------------------------------------------------------------------

typedef void (*Unit)(Engine *engine, Thread *thread, const Op *op, int unit);

// Each op has two phases of its own, whether it uses them or not, so that all threads count alike.
static void share(Engine *engine, Thread *thread, const Op *op, int which, int units, Unit run) {
    Phase *phase = &engine->pool->phases[(op - engine->program.ops - engine->first_op) * 2 + which];
    for (int unit; (unit = claim(phase)) < units; mark_done(phase)) run(engine, thread, op, unit);
    wait_until(&phase->done, units);
}

INLINE bool is_head(const Op *op) { return op->to == LOGITS; }

INLINE int rows_of(const Engine *engine, const Op *op) { return is_head(op) ? engine->batch.outputs : engine->rows; }

INLINE float *row_of(const Engine *engine, int buffer, int64_t row) {
    if (buffer == X) return engine->batch.x + (engine->first_row + row) * engine->program.widths[X];
    return engine->buffers[buffer] + row * engine->program.widths[buffer];
}

// --- embedding -------------------------------------------------------------------------------------------------------

static void embed_row(Engine *engine, Thread *thread, const Op *op, int row) {
    (void)thread;
    const Heads *heads = &engine->program.heads;
    const Span *span = &engine->spans[engine->span_of[row]];
    float *x = row_of(engine, X, row);
    unpack_row(&op->matrix, engine->batch.tokens[engine->first_row + row], x);
    memset(x + op->matrix.columns, 0, (engine->program.widths[X] - op->matrix.columns) * sizeof *x);
    turns_at(heads, span->position + row - span->row, engine->turns + (int64_t)row * heads->head_dim);
}

// --- products --------------------------------------------------------------------------------------------------------

static const float *input_row(const Engine *engine, const Op *op, int row) {
    if (!is_head(op)) return row_of(engine, op->from, row);
    return engine->batch.x + engine->batch.output_rows[row] * engine->program.widths[X];
}

static void prepare_input(Engine *engine, Thread *thread, const Op *op, int row, const Prepared *to) {
    const float *x = input_row(engine, op, row);
    if (op->norm) {
        normalise(x, op->norm, engine->program.heads.eps, op->matrix.columns, thread->line);
        x = thread->line;
    }
    prepare_row(to, row, &op->matrix, x);
}

static void prepare_for_all(Engine *engine, Thread *thread, const Op *op, int row) {
    prepare_input(engine, thread, op, row, &engine->prepared);
}

static const Prepared *prepared_input(Engine *engine, Thread *thread, const Op *op) {
    const int rows = rows_of(engine, op), number = op - engine->program.ops;
    if (rows > FEW) return &engine->prepared;
    if (thread->prepared_op != number)
        for (int row = 0; row < rows; row++) prepare_input(engine, thread, op, row, &thread->prepared);
    thread->prepared_op = number;
    return &thread->prepared;
}

static Outlet outlet_of(const Engine *engine, const Thread *thread, const Op *op) {
    Outlet out = {.epilogue = op->epilogue, .bias = op->bias, .stride = engine->program.widths[op->to]};
    out.to = is_head(op) ? engine->batch.logits : row_of(engine, op->to, 0);
    out.columns = op->matrix.rows;
    out.best = thread->best;
    if (is_head(op) && engine->batch.best) out.epilogue = BEST;
    return out;
}

typedef struct {  // how a product is cut: blocks of rows, and in each of them runs of panels
    int block_rows, blocks, run_panels, runs;
} Cut;

static Cut cut_of(const Engine *engine, const Op *op) {
    const int rows = rows_of(engine, op);
    const int64_t panels = panels_of(&op->matrix), columns = groups_of(&op->matrix) * GROUP;
    const int64_t fitting = BLOCK_BYTES / (columns * (op->matrix.format == BF16 ? 2 : 1));
    Cut cut = {.block_rows = rows_of(engine, op), .blocks = 1, .run_panels = 1};
    if (rows > fitting) cut.block_rows = fitting < 4 * TALL ? 4 * TALL : fitting / TALL * TALL;
    cut.blocks = (rows + cut.block_rows - 1) / cut.block_rows;
    const int64_t each = panels / (4 * engine->num_threads), most = UNIT_BYTES / panel_bytes(&op->matrix);
    if (rows <= FEW && each > 1 && most > 1) cut.run_panels = each < most ? each : most;
    cut.runs = (panels + cut.run_panels - 1) / cut.run_panels;
    return cut;
}

static void multiply_unit(Engine *engine, Thread *thread, const Op *op, int unit) {
    const Cut cut = cut_of(engine, op);
    const Outlet out = outlet_of(engine, thread, op);
    const int64_t panel = unit % cut.runs * cut.run_panels, last = panel + cut.run_panels, row = unit / cut.runs * cut.block_rows;
    const int64_t panels = panels_of(&op->matrix), rows = rows_of(engine, op), stop = row + cut.block_rows;
    multiply(&op->matrix, prepared_input(engine, thread, op), panel, last < panels ? last : panels, row,
             stop < rows ? stop : rows, &out);
}

static void run_linear(Engine *engine, Thread *thread, const Op *op) {
    const int rows = rows_of(engine, op);
    if (rows > FEW) share(engine, thread, op, 0, rows, prepare_for_all);
    const Cut cut = cut_of(engine, op);
    share(engine, thread, op, 1, cut.blocks * cut.runs, multiply_unit);
}

// --- attention -------------------------------------------------------------------------------------------------------

// Whether this row is the last of a step in a page that the step may have begun. Other rows' slots are theirs to write.
INLINE bool begins_page(const Span *span, int row, int position) {
    return row + 1 == span->row + span->rows && (span->rows > 1 || position % PAGE == 0);
}

static void ready_row(Engine *engine, const Op *op, int row, int kv_head) {
    const Heads *heads = &engine->program.heads;
    const Span *span = &engine->spans[engine->span_of[row]];
    const int position = span->position + row - span->row;
    const int64_t block = engine->batch.blocks[span->table + position / PAGE];
    uint16_t *keys = op->pages + page_offset(heads, kv_head, block);
    const float *turns = op->rotates ? engine->turns + (int64_t)row * heads->head_dim : NULL;
    ready_group(heads, row_of(engine, QKV, row), kv_head, op->qk_norm, turns, keys, position % PAGE);
    if (begins_page(span, row, position)) clear_after(heads, keys + values_apart(heads), position % PAGE);
}

static void store_kv_unit(Engine *engine, Thread *thread, const Op *op, int row) {
    (void)thread;
    for (int kv_head = 0; kv_head < engine->program.heads.kv_heads; kv_head++) ready_row(engine, op, row, kv_head);
}

static Scene scene_of(const Engine *engine, const Op *op, const Task *task, int kv_head) {
    const Span *span = &engine->spans[task->span];
    return (Scene){
        .heads = &engine->program.heads,
        .pages = op->pages,
        .blocks = engine->batch.blocks + span->table,
        .qkv = row_of(engine, QKV, span->row),
        .qkv_stride = engine->program.widths[QKV],
        .to = row_of(engine, ATTENDED, span->row),
        .to_stride = engine->program.widths[ATTENDED],
        .kv_head = kv_head,
        .position = span->position,
        .window = engine->program.windows[op->plan],
    };
}

// One of several tasks over the same queries. Who is the last to arrive joins what all have found.
static void attend_part(Engine *engine, Thread *thread, const Scene *scene, const Task *task) {
    const int64_t kv_heads = scene->heads->kv_heads, bytes = partial_bytes(scene->heads), apart = kv_heads * bytes;
    const int64_t first = task->home * kv_heads + scene->kv_head;
    Partial *home = (Partial *)(engine->partials + first * bytes);
    attend(scene, task, &thread->attending, (Partial *)((char *)home + task->part * apart));
    if (atomic_fetch_add_explicit(&engine->arrived[first], 1, memory_order_acq_rel) + 1 < task->parts) return;
    atomic_store_explicit(&engine->arrived[first], 0, memory_order_relaxed);  // for the next layer
    join_parts(scene, task, home, apart);
    deliver(scene, task, home);
}

static void attend_unit(Engine *engine, Thread *thread, const Op *op, int unit) {
    const int kv_heads = engine->program.heads.kv_heads;
    const Plan *plan = &engine->plans[op->plan];
    const Task *task = &plan->tasks[unit / kv_heads];
    const Scene scene = scene_of(engine, op, task, unit % kv_heads);
    if (plan->is_plain) ready_row(engine, op, engine->spans[task->span].row, unit % kv_heads);
    if (task->parts > 1) {
        attend_part(engine, thread, &scene, task);
        return;
    }
    attend(&scene, task, &thread->attending, thread->attending.partial);
    deliver(&scene, task, thread->attending.partial);
}

// Where every row is a sequence and a task, whoever attends for it also stores its key and value.
static void run_attention(Engine *engine, Thread *thread, const Op *op) {
    const Plan *plan = &engine->plans[op->plan];
    if (!plan->is_plain) share(engine, thread, op, 0, engine->rows, store_kv_unit);
    share(engine, thread, op, 1, plan->count * engine->program.heads.kv_heads, attend_unit);
}

// --- a step ----------------------------------------------------------------------------------------------------------

static void run_ops(void *job, int number) {
    Engine *engine = job;
    Thread *thread = &engine->threads[number];
    thread->prepared_op = -1;
    for (const Op *op = engine->program.ops + engine->first_op; op < engine->program.ops + engine->stop_op; op++) {
        if (op->kind == EMBED) share(engine, thread, op, 0, engine->rows, embed_row);
        else if (op->kind == LINEAR) run_linear(engine, thread, op);
        else run_attention(engine, thread, op);
    }
}

static bool run_program(Engine *engine, int first_op, int stop_op) {
    wait_until(&engine->pool->inside, 0);
    engine->first_op = first_op;
    engine->stop_op = stop_op;
    return run_together(engine->pool, run_ops, engine, 2 * (stop_op - first_op));
}

// The spans' parts within rows `first` … `stop` - 1, counted from `first`.
static void take_slice(Engine *engine, int first, int stop) {
    engine->first_row = first;
    engine->rows = stop - first;
    engine->num_spans = 0;
    for (int s = 0; s < engine->batch.num_spans; s++) {
        Span span = engine->batch.spans[s];
        const int begin = span.row > first ? span.row : first;
        const int end = span.row + span.rows < stop ? span.row + span.rows : stop;
        if (begin >= end) continue;
        span = (Span){begin - first, end - begin, span.position + begin - span.row, span.table};
        for (int row = span.row; row < span.row + span.rows; row++) engine->span_of[row] = engine->num_spans;
        engine->spans[engine->num_spans++] = span;
    }
}

static bool reserve_partials(Engine *engine, int64_t partials) {
    if (partials <= engine->most_partials) return true;
    free(engine->partials);
    free(engine->arrived);
    engine->partials = new_lines(partials * partial_bytes(&engine->program.heads));
    engine->arrived = new_lines(partials * sizeof *engine->arrived);
    engine->most_partials = engine->partials && engine->arrived ? partials : 0;
    return engine->most_partials == partials;
}

static bool plan_attention(Engine *engine) {
    const Heads *heads = &engine->program.heads;
    int64_t partials = 0;
    for (int i = 0; i < engine->program.num_windows; i++) {
        Plan *plan = &engine->plans[i];
        const int shared = heads->heads / heads->kv_heads;
        if (!plan_tasks(plan, engine->spans, engine->num_spans, shared, engine->program.windows[i])) return false;
        partials = plan->partials > partials ? plan->partials : partials;
    }
    return reserve_partials(engine, partials * heads->kv_heads);
}

static int64_t most_columns(const Program *program) {
    int64_t most = 0;
    for (int i = 0; i < LOGITS; i++) most = program->widths[i] > most ? program->widths[i] : most;
    return most;
}

static void free_rows(Engine *engine) {
    for (int i = 0; i < BUFFERS; i++) free(engine->buffers[i]), engine->buffers[i] = NULL;
    free(engine->turns);
    free(engine->span_of);
    free(engine->spans);
    free_prepared(&engine->prepared);
    engine->turns = NULL, engine->span_of = NULL, engine->spans = NULL;
    engine->prepared = (Prepared){0};
    engine->most_rows = 0;
}

// Memory for so many rows of a slice, or outputs.
static bool reserve_rows(Engine *engine, int64_t rows) {
    if (rows <= engine->most_rows) return true;
    rows = rounded_up(rows, 64);
    free_rows(engine);
    const Program *program = &engine->program;
    bool is_there = new_prepared(&engine->prepared, rows, most_columns(program));
    for (int i = QKV; i < LOGITS; i++) {
        engine->buffers[i] = new_lines(rows * program->widths[i] * sizeof(float));
        is_there = is_there && engine->buffers[i];
    }
    engine->turns = new_lines(rows * program->heads.head_dim * sizeof(float));
    engine->span_of = new_lines(rows * sizeof *engine->span_of);
    engine->spans = new_lines(rows * sizeof *engine->spans);
    is_there = is_there && engine->turns && engine->span_of && engine->spans;
    engine->most_rows = is_there ? rows : 0;
    return is_there;
}

static bool reserve_outputs(Engine *engine, int64_t outputs) {
    if (outputs <= engine->most_outputs) return true;
    engine->most_outputs = outputs;
    for (int i = 0; i < engine->num_threads; i++) {
        free(engine->threads[i].best);
        engine->threads[i].best = new_lines(outputs * sizeof(Best));
        if (!engine->threads[i].best) engine->most_outputs = 0;
    }
    return engine->most_outputs == outputs;
}

// Before any thread begins, since one that wakes up late does not touch its own.
static void forget_best(const Engine *engine) {
    for (int i = 0; i < engine->num_threads; i++)
        for (int row = 0; row < engine->batch.outputs; row++) engine->threads[i].best[row] = (Best){-INFINITY, 0};
}

static void collect_best(const Engine *engine) {
    for (int row = 0; engine->batch.best && row < engine->batch.outputs; row++) {
        Best best = {-INFINITY, 0};
        for (int i = 0; i < engine->num_threads; i++) {
            const Best other = engine->threads[i].best[row];
            if (other.logit > best.logit || (other.logit == best.logit && other.token < best.token)) best = other;
        }
        engine->batch.best[row] = best.token;
    }
}

static bool run_batch(Engine *engine) {
    const int rows = engine->batch.rows, slices = (rows + SLICE - 1) / SLICE, head = engine->program.num_ops - 1;
    const int most = slices ? (rows + slices - 1) / slices : 0, outputs = engine->batch.outputs;
    if (!reserve_rows(engine, most > outputs ? most : outputs) || !reserve_outputs(engine, outputs)) return false;
    forget_best(engine);
    for (int slice = 0; slice < slices; slice++) {
        take_slice(engine, (int64_t)rows * slice / slices, (int64_t)rows * (slice + 1) / slices);
        const bool is_last = slice + 1 == slices;
        if (!plan_attention(engine) || !run_program(engine, 0, is_last && outputs ? head + 1 : head)) return false;
        wait_until(&engine->pool->inside, 0);  // the next slice changes what they look at
    }
    if (!slices && !run_program(engine, head, head + 1)) return false;
    collect_best(engine);
    return true;
}

// Runs a step. Without rows: only the head, over `output_rows` of x. False where memory ran out.
EXPORT bool engine_step(Engine *engine, const Batch *batch) {
    if (!batch->rows && !batch->outputs) return true;
    wait_until(&engine->pool->inside, 0);
    engine->batch = *batch;
    return run_batch(engine);
}

// --- life ------------------------------------------------------------------------------------------------------------

EXPORT void engine_free(Engine *engine);

static bool new_threads(Engine *engine, int threads) {
    engine->threads = calloc(threads, sizeof *engine->threads);
    if (!engine->threads) return false;
    engine->num_threads = threads;
    for (int i = 0; i < threads; i++) {
        Thread *thread = &engine->threads[i];
        const int64_t columns = most_columns(&engine->program);
        thread->line = new_lines(columns * sizeof(float));
        if (!thread->line || !new_prepared(&thread->prepared, FEW, columns)) return false;
        if (!new_attending(&thread->attending, &engine->program.heads)) return false;
    }
    return true;
}

// The program's memory must stay until `engine_free`. NULL where memory ran out.
EXPORT Engine *engine_new(Pool *pool, const Program *program) {
    Engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    engine->pool = pool;
    atomic_fetch_add(&pool->users, 1);
    engine->program = *program;
    engine->plans = calloc(program->num_windows, sizeof *engine->plans);
    if (engine->plans && new_threads(engine, pool->threads)) return engine;
    engine_free(engine);
    return NULL;
}

EXPORT void engine_free(Engine *engine) {
    wait_until(&engine->pool->inside, 0);
    for (int i = 0; i < engine->num_threads; i++) {
        free(engine->threads[i].line);
        free(engine->threads[i].best);
        free_prepared(&engine->threads[i].prepared);
        free_attending(&engine->threads[i].attending);
    }
    for (int i = 0; engine->plans && i < engine->program.num_windows; i++) free(engine->plans[i].tasks);
    free_rows(engine);
    free(engine->threads);
    free(engine->plans);
    free(engine->partials);
    free(engine->arrived);
    pool_free(engine->pool);
    free(engine);
}

// --- a product alone, to be checked and timed ------------------------------------------------------------------------

typedef struct {
    Pool *pool;
    const Matrix *matrix;
    Prepared prepared;
    Outlet out;
    int64_t rows;
} Product;

static void product_units(void *job, int thread) {
    (void)thread;
    const Product *product = job;
    Phase *phase = product->pool->phases;
    const int64_t units = panels_of(product->matrix);
    for (int unit; (unit = claim(phase)) < units; mark_done(phase))
        multiply(product->matrix, &product->prepared, unit, unit + 1, 0, product->rows, &product->out);
    wait_until(&phase->done, units);
}

// to [rows][rows of the matrix in whole panels] = x [rows][columns in whole groups] times the matrix, `times` over.
EXPORT bool multiply_rows(Pool *pool, const Matrix *matrix, const float *x, int64_t rows, float *to, int times) {
    Product product = {.pool = pool, .matrix = matrix, .rows = rows};
    product.out = (Outlet){.epilogue = STORE, .to = to, .stride = panels_of(matrix) * PANEL, .columns = matrix->rows};
    const int64_t columns = groups_of(matrix) * GROUP;
    bool is_done = new_prepared(&product.prepared, rows, columns);
    for (int64_t row = 0; is_done && row < rows; row++) prepare_row(&product.prepared, row, matrix, x + row * columns);
    while (is_done && times--) is_done = run_together(pool, product_units, &product, 1);
    wait_until(&pool->inside, 0);
    free_prepared(&product.prepared);
    return is_done;
}
