// Threads that work through the phases of a step. A phase is cut into units that any thread claims, and it is over when its
// units are done, not when all threads have arrived: one whose CPU was taken away stalls nobody unless it held a unit.
// Between steps the threads sleep.

#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "lanes.h"

#define SPINS 3000       // before a thread that waits sleeps: some microseconds
#define NAP_NANOSECONDS 1000

typedef struct {  // on lines of their own: one is written by every claim, the other is read by those who wait
    _Alignas(LINE_BYTES) atomic_int claimed;
    _Alignas(LINE_BYTES) atomic_int done;
} Phase;

typedef void (*Work)(void *job, int thread);

typedef struct {
    int threads;  // the one that calls is number 0
    atomic_int users;  // who made it, and engines: the last one to leave frees it
    pthread_t *others;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool stops, is_open;  // a step that is open may be joined
    long generation;      // of steps
    atomic_int inside;    // threads that may still look at the last step
    Work work;
    void *job;
    Phase *phases;
    int most_phases;
} Pool;

INLINE void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_until(atomic_int *counter, int at_least) {
    for (int spin = 0; atomic_load_explicit(counter, memory_order_acquire) < at_least; spin++) {
        if (spin < SPINS) relax();
        else nanosleep(&(struct timespec){0, NAP_NANOSECONDS}, NULL);
    }
}

INLINE int claim(Phase *phase) { return atomic_fetch_add_explicit(&phase->claimed, 1, memory_order_relaxed); }

INLINE void mark_done(Phase *phase) { atomic_fetch_add_explicit(&phase->done, 1, memory_order_release); }

typedef struct {
    Pool *pool;
    int number;
} Start;

static bool join(Pool *pool, long *seen) {
    pthread_mutex_lock(&pool->mutex);
    while (!pool->stops && !(pool->is_open && pool->generation != *seen)) pthread_cond_wait(&pool->wake, &pool->mutex);
    *seen = pool->generation;
    const bool goes_on = !pool->stops;
    if (goes_on) atomic_fetch_sub(&pool->inside, 1);
    pthread_mutex_unlock(&pool->mutex);
    return goes_on;
}

static void *live(void *argument) {
    const Start start = *(Start *)argument;
    free(argument);
    long seen = 0;
    while (join(start.pool, &seen)) {
        start.pool->work(start.pool->job, start.number);
        atomic_fetch_add_explicit(&start.pool->inside, 1, memory_order_release);
    }
    return NULL;
}

// False where the system gives no more threads; the pool then has those that it got.
static bool start_threads(Pool *pool, int threads) {
    pool->stops = false;
    pool->generation = 0;
    pool->others = calloc(threads, sizeof *pool->others);
    for (pool->threads = 1; pool->others && pool->threads < threads; pool->threads++) {
        Start *start = malloc(sizeof *start);
        if (!start) return false;
        *start = (Start){pool, pool->threads};
        if (pthread_create(&pool->others[pool->threads - 1], NULL, live, start)) {
            free(start);
            return false;
        }
    }
    return pool->others != NULL;
}

static void stop_threads(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pool->stops = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->threads - 1; i++) pthread_join(pool->others[i], NULL);
    free(pool->others);
    pool->others = NULL;
    pool->threads = 1;
}

// `inside` counts down from zero, so that waiting for everybody to leave is waiting for zero.
static bool open_step(Pool *pool, Work work, void *job, int phases) {
    wait_until(&pool->inside, 0);
    if (phases > pool->most_phases) {
        free(pool->phases);
        pool->phases = new_lines((int64_t)phases * sizeof(Phase));
        pool->most_phases = pool->phases ? phases : 0;
        if (!pool->phases) return false;
    }
    for (int i = 0; i < phases; i++) {
        atomic_store_explicit(&pool->phases[i].claimed, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->phases[i].done, 0, memory_order_relaxed);
    }
    pthread_mutex_lock(&pool->mutex);
    pool->work = work;
    pool->job = job;
    pool->generation++;
    pool->is_open = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    return true;
}

static void close_step(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pool->is_open = false;  // who has not woken up by now is not waited for
    pthread_mutex_unlock(&pool->mutex);
}

// Runs `work` in all threads; it must do all units of all phases. False where memory ran out.
static bool run_together(Pool *pool, Work work, void *job, int phases) {
    if (!open_step(pool, work, job, phases)) return false;
    work(job, 0);
    close_step(pool);
    return true;
}

__attribute__((visibility("default"))) Pool *pool_new(int threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    start_threads(pool, threads);
    atomic_store(&pool->users, 1);
    return pool;
}

// That it got, which may be fewer than were asked for.
__attribute__((visibility("default"))) int pool_threads(const Pool *pool) { return pool->threads; }

// It goes on for the engines that still have it: Python gives no order to what dies together.
__attribute__((visibility("default"))) void pool_free(Pool *pool) {
    if (atomic_fetch_sub(&pool->users, 1) > 1) return;
    stop_threads(pool);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    free(pool->phases);
    free(pool);
}
