/* The thread pool, the guard and the fixed summation tree.  It knows no tensors and allocates no scratch for its
 * callers. */
#include "sys.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

/*
 * One word tells workers everything: the job's generation (upper 31 bits), whether it can still be joined (bit 32), and
 * how many workers are inside (lower 32 bits).  A worker joins by compare-and-swap, so it never touches a job that has
 * been closed, and the caller never waits for a worker that did not wake up in time: on a busy machine that costs
 * nothing.
 */
#define GATE_OPEN ((uint64_t)1 << 32)
#define GATE_GENERATION ((uint64_t)1 << 33)
#define GATE_INSIDE ((uint64_t)0xffffffff)

/* About 20-50 us of pause instructions: longer than the gap between two layers' calls, shorter than a time slice. */
#define SPINS 2000
/* Ranges per worker: enough that a worker which loses its core for a while delays the others by a quarter of a share.
 */
#define RANGES_PER_WORKER 4

typedef struct job {
    obm__range_fn fn;
    void *arg;
    size_t n, chunk;
} job;

typedef struct worker {
    obm__pool *pool;
    pthread_t thread;
    int index;
} worker;

struct obm__pool {
    const obm__topology *topology;
    int threads; /* with the caller */
    int spins;
    worker *workers;  /* [threads], entry 0 unused */
    int running;      /* workers 1 .. running exist */
    _Atomic int busy; /* a job is being run */
    _Atomic int started;
    _Atomic pid_t owner; /* threads do not survive fork */
    job job;             /* written by the caller while the gate is closed and nobody is inside */
    _Atomic uint64_t gate;
    _Atomic size_t next; /* first item not handed out */
    _Atomic int sleepers, caller_waits, stop;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
};

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void run_ranges(obm__pool *p, const job *j, int index) {
    for (;;) {
        size_t begin = atomic_fetch_add_explicit(&p->next, j->chunk, memory_order_relaxed);
        if (begin >= j->n) return;
        size_t end = j->n - begin > j->chunk ? begin + j->chunk : j->n;
        j->fn(j->arg, begin, end, index);
    }
}

static bool has_work(obm__pool *p, uint64_t seen, uint64_t *gate) {
    *gate = atomic_load(&p->gate);
    return atomic_load(&p->stop) || ((*gate & GATE_OPEN) && *gate / GATE_GENERATION != seen);
}

/* Spins, then parks.  The order "count as sleeper, then look again" against "open, then look for sleepers" (both
 * sequentially consistent) is what loses no wake-up. */
static uint64_t wait_for_work(obm__pool *p, uint64_t seen) {
    uint64_t gate;
    for (int i = 0; i < p->spins; i++) {
        if (has_work(p, seen, &gate)) return gate;
        pause_cpu();
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while (!has_work(p, seen, &gate)) pthread_cond_wait(&p->work, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
    return gate;
}

static void leave(obm__pool *p) {
    uint64_t before = atomic_fetch_sub(&p->gate, 1);
    if ((before & GATE_INSIDE) != 1 || (before & GATE_OPEN) || !atomic_load(&p->caller_waits)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_signal(&p->done);
    pthread_mutex_unlock(&p->mutex);
}

static void *worker_main(void *arg) {
    worker *w = arg;
    obm__pool *p = w->pool;
    obm__topology_pin(p->topology, w->index);
    uint64_t seen = 0;
    for (;;) {
        uint64_t gate = wait_for_work(p, seen);
        if (atomic_load(&p->stop)) return NULL;
        if (!atomic_compare_exchange_strong(&p->gate, &gate, gate + 1)) continue;
        seen = gate / GATE_GENERATION;
        run_ranges(p, &p->job, w->index);
        leave(p);
    }
}

obm__pool *obm__pool_new(const obm__topology *topology, int threads, int cores) {
    obm__pool *p = obm__calloc(1, sizeof *p);
    worker *workers = obm__calloc((size_t)threads, sizeof *workers);
    if (!p || !workers) {
        obm_free(p);
        obm_free(workers);
        return NULL;
    }
    p->topology = topology;
    p->threads = threads;
    p->spins =
        threads <= cores ? SPINS : 0; /* with more threads than cores a spinner keeps the one it waits for away */
    p->workers = workers;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->done, NULL);
    atomic_store(&p->owner, getpid());
    return p;
}

/* Our threads take no signals: handlers (Ctrl-C in the bindings) belong to the caller's.  0, or an errno. */
static int start_thread(pthread_t *thread, void *(*main)(void *), void *arg) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(thread, NULL, main, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

/* Too few threads is no error. */
static void start_workers(obm__pool *p) {
    for (int i = 1; i < p->threads; i++) {
        p->workers[i] = (worker){.pool = p, .index = i};
        if (start_thread(&p->workers[i].thread, worker_main, &p->workers[i])) break;
        p->running = i;
    }
    atomic_store(&p->owner, getpid());
    atomic_store(&p->started, 1);
}

void obm__pool_free(obm__pool *p) {
    if (!p) return;
    /* In a forked child the workers do not exist and the locks are in an unknown state: only the memory is ours. */
    if (atomic_load(&p->owner) == getpid()) {
        pthread_mutex_lock(&p->mutex);
        atomic_store(&p->stop, 1);
        pthread_cond_broadcast(&p->work);
        pthread_mutex_unlock(&p->mutex);
        for (int i = 1; i <= p->running; i++) pthread_join(p->workers[i].thread, NULL);
        pthread_cond_destroy(&p->work);
        pthread_cond_destroy(&p->done);
        pthread_mutex_destroy(&p->mutex);
    }
    obm_free(p->workers);
    obm_free(p);
}

static void open_gate(obm__pool *p) {
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    uint64_t generation = atomic_load(&p->gate) / GATE_GENERATION + 1;
    atomic_store(&p->gate, generation * GATE_GENERATION | GATE_OPEN); /* joined is 0: the last job waited for that */
    if (!atomic_load(&p->sleepers)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->mutex);
}

static void close_gate(obm__pool *p) {
    atomic_fetch_and(&p->gate, ~GATE_OPEN);
    for (int i = 0; i < p->spins; i++) {
        if (!(atomic_load(&p->gate) & GATE_INSIDE)) return;
        pause_cpu();
    }
    pthread_mutex_lock(&p->mutex);
    atomic_store(&p->caller_waits, 1);
    while (atomic_load(&p->gate) & GATE_INSIDE) pthread_cond_wait(&p->done, &p->mutex);
    atomic_store(&p->caller_waits, 0);
    pthread_mutex_unlock(&p->mutex);
}

/* False: somebody else's job runs (or this thread is inside one), or the workers stayed behind in the parent process.
 */
static bool acquire(obm__pool *p) {
    if (!p || p->threads < 2) return false;
    if (atomic_load(&p->started) && atomic_load(&p->owner) != getpid()) return false;
    return !atomic_exchange(&p->busy, 1);
}

/* Items per range: a multiple of grain, RANGES_PER_WORKER ranges for each worker where there are enough grains. */
static size_t chunk_size(size_t n, size_t grain, int threads) {
    size_t grains = n / grain + (n % grain != 0), ranges = (size_t)threads * RANGES_PER_WORKER, chunk;
    size_t grains_each = grains / ranges + (grains % ranges != 0);
    return obm__mul(grains_each, grain, &chunk) ? chunk : n;
}

void obm__parallel(obm_context *ctx, size_t n, size_t grain, obm__range_fn fn, void *arg) {
    if (!n) return;
    if (!grain) grain = 1;
    obm__pool *p = ctx->pool;
    if (n <= grain || !acquire(p)) {
        fn(arg, 0, n, 0);
        return;
    }
    if (!atomic_load(&p->started)) start_workers(p);
    p->job = (job){.fn = fn, .arg = arg, .n = n, .chunk = chunk_size(n, grain, p->threads)};
    open_gate(p);
    run_ranges(p, &p->job, 0);
    close_gate(p);
    atomic_store(&p->busy, 0);
}

/* ---- one call on a thread of its own ---- */

struct obm__task {
    pthread_t thread;
    void (*fn)(void *);
    void *arg;
    _Atomic int done;
};

static void *task_main(void *arg) {
    obm__task *t = arg;
    t->fn(t->arg);
    atomic_store(&t->done, 1);
    return NULL;
}

obm_status obm__task_start(void (*fn)(void *), void *arg, obm__task **out, obm_error *err) {
    obm__task *t = obm__calloc(1, sizeof *t);
    if (!t) return obm__fail_nomem(err, sizeof *t);
    t->fn = fn;
    t->arg = arg;
    int failed = start_thread(&t->thread, task_main, t);
    if (!failed) {
        *out = t;
        return OBM_OK;
    }
    obm_free(t);
    errno = failed;
    return obm__fail_errno(err, "cannot start a thread");
}

/* Looked at every millisecond: what it waits for takes many. */
bool obm__task_wait(obm__task *t, int milliseconds) {
    const struct timespec step = {0, 1000000};
    for (int i = 0; i < milliseconds && !atomic_load(&t->done); i++) nanosleep(&step, NULL);
    return atomic_load(&t->done);
}

void obm__task_join(obm__task *t) {
    pthread_join(t->thread, NULL);
    obm_free(t);
}

/* Halves of the index range, recursively: the tree depends on n alone. */
double obm__tree_sum(const double *partial, size_t n) {
    if (n <= 2) return n == 2 ? partial[0] + partial[1] : n ? partial[0] : 0;
    size_t half = n / 2;
    return obm__tree_sum(partial, half) + obm__tree_sum(partial + half, n - half);
}

obm_status obm__guard_enter(obm__guard *g, const char *what, obm_error *err) {
    if (!atomic_exchange_explicit(&g->busy, 1, memory_order_acquire)) return OBM_OK;
    return obm__fail(err, OBM_E_BUSY, "%s is in use: one call at a time", what);
}

void obm__guard_leave(obm__guard *g) { atomic_store_explicit(&g->busy, 0, memory_order_release); }
