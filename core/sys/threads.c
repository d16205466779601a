/* The thread pool, the guard and the fixed summation tree.  It knows no tensors and allocates no scratch for its
 * callers. */
#include "sys.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
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
/* The next range is a fourth of what would be a worker's share of the items left: one that loses its core for a while
 * delays the others by a quarter of a share, and all end within a grain of each other. */
#define RANGES_PER_WORKER 4

typedef struct job {
    obm__range_fn fn;
    void *arg;
    bool shared; /* one queue for all lanes: the first one's */
} job;

/* The workers of one NUMA node, with a gate and a queue of their own: a barrier passes one cache line to each node, not
 * to each worker, and items of a node go to its own workers. */
typedef struct lane {
    _Atomic uint64_t gate;
    char gate_line[64 - sizeof(uint64_t)];
    _Atomic size_t next; /* first item not handed out */
    size_t end, grain;   /* written by the caller while the gate is closed and nobody is inside */
    int sharers;         /* workers that take from this queue */
    int workers;
    bool open; /* the caller's: has work in this job */
    char queue_line[128 - 64 - 3 * sizeof(size_t) - 2 * sizeof(int) - sizeof(bool)];
} lane;

typedef struct worker {
    obm__pool *pool;
    pthread_t thread;
    int index;
    lane *lane;
    int spins;            /* the pool's, or 0 for a while (judge) */
    unsigned waits, vain; /* since then; how many of them were longer than the spinning */
} worker;

struct obm__pool {
    const obm__topology *topology;
    const obm__workers *places;
    int threads; /* with the caller */
    int spins;
    worker *workers; /* [threads], entry 0: the caller */
    lane *lanes;
    int n_lanes;
    int running;      /* workers 1 .. running exist */
    _Atomic int busy; /* a job is being run */
    _Atomic int started;
    _Atomic pid_t owner; /* threads do not survive fork */
    job job;             /* written by the caller while the gates are closed and nobody is inside */
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

/* Items of the next range where `left` are left: a multiple of grain, or all. */
static size_t range_size(const lane *q, size_t left) {
    size_t grains = left / q->grain + (left % q->grain != 0), ranges = (size_t)q->sharers * RANGES_PER_WORKER;
    size_t each = grains / ranges + (grains % ranges != 0);
    return each < grains ? each * q->grain : left;
}

static void run_ranges(lane *q, const job *j, int index) {
    size_t begin = atomic_load_explicit(&q->next, memory_order_relaxed);
    while (begin < q->end) {
        size_t end = begin + range_size(q, q->end - begin);
        if (!atomic_compare_exchange_weak_explicit(&q->next, &begin, end, memory_order_relaxed, memory_order_relaxed))
            continue;
        j->fn(j->arg, begin, end, index);
        begin = atomic_load_explicit(&q->next, memory_order_relaxed);
    }
}

static lane *queue_of(obm__pool *p, lane *own) { return p->job.shared ? p->lanes : own; }

static bool has_work(obm__pool *p, lane *l, uint64_t seen, uint64_t *gate) {
    *gate = atomic_load(&l->gate);
    return atomic_load(&p->stop) || ((*gate & GATE_OPEN) && *gate / GATE_GENERATION != seen);
}

/* Waits by which spinning is judged, how many of them may be longer, and waits without spinning after that. */
#define JUDGED 64
#define VAIN_AT_MOST 32
#define WAITS_WITHOUT 960

/* Spinning that is mostly in vain keeps a core from others, perhaps from the very thread that is waited for: where other
 * programs compute, the system lets two of ours share one.  Tried again from time to time. */
static void judge(obm__pool *p, worker *w, bool vain) {
    w->vain += vain;
    if (++w->waits < (w->spins ? JUDGED : WAITS_WITHOUT)) return;
    w->spins = w->spins && w->vain > VAIN_AT_MOST ? 0 : p->spins;
    w->waits = w->vain = 0;
}

int obm__pool_spins(const obm__pool *p, int worker) { return p->workers[worker].spins; }

/* Spins, then parks.  The order "count as sleeper, then look again" against "open, then look for sleepers" (both
 * sequentially consistent) is what loses no wake-up. */
static uint64_t wait_for_work(obm__pool *p, worker *w, uint64_t seen) {
    lane *l = w->lane;
    uint64_t gate;
    for (int i = 0; i < w->spins; i++) {
        if (has_work(p, l, seen, &gate)) {
            judge(p, w, false);
            return gate;
        }
        pause_cpu();
    }
    judge(p, w, true);
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while (!has_work(p, l, seen, &gate)) pthread_cond_wait(&p->work, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
    return gate;
}

static void leave(obm__pool *p, lane *l) {
    uint64_t before = atomic_fetch_sub(&l->gate, 1);
    if ((before & GATE_INSIDE) != 1 || (before & GATE_OPEN) || !atomic_load(&p->caller_waits)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_signal(&p->done);
    pthread_mutex_unlock(&p->mutex);
}

static void *worker_main(void *arg) {
    worker *w = arg;
    obm__pool *p = w->pool;
    (void)obm__topology_bind(p->topology, p->places, w->index);
    uint64_t seen = 0;
    for (;;) {
        uint64_t gate = wait_for_work(p, w, seen);
        if (atomic_load(&p->stop)) return NULL;
        if (!atomic_compare_exchange_strong(&w->lane->gate, &gate, gate + 1)) continue;
        seen = gate / GATE_GENERATION;
        run_ranges(queue_of(p, w->lane), &p->job, w->index);
        leave(p, w->lane);
    }
}

/* One lane where nobody asked for more. */
static void make_lanes(obm__pool *p, const obm__workers *places) {
    memset(p->lanes, 0, (size_t)p->n_lanes * sizeof *p->lanes);
    for (int i = 0; i < p->threads; i++) {
        lane *l = &p->lanes[p->n_lanes == 1 ? 0 : places->at[i].node];
        p->workers[i] = (worker){.pool = p, .index = i, .lane = l};
        l->workers++;
    }
}

/* With more threads than cores a spinner keeps the one it waits for away. */
static int spins_of(const obm__pool *p, const obm__machine *machine) {
    bool crowded = p->threads > machine->n_cores;
    for (int i = 0; p->n_lanes > 1 && i < p->n_lanes; i++)
        crowded = crowded || p->lanes[i].workers > machine->nodes[i].cores;
    return crowded ? 0 : SPINS;
}

obm__pool *obm__pool_new(const obm__topology *topology, const obm__workers *places) {
    const obm__machine *machine = obm__topology_machine(topology);
    int threads = places->n, lanes = places->numa == OBM_NUMA_OFF ? 1 : machine->n_nodes;
    obm__pool *p = obm__calloc(1, sizeof *p);
    worker *workers = obm__calloc((size_t)threads, sizeof *workers);
    lane *line = obm__alloc((size_t)lanes, sizeof *line);
    if (!p || !workers || !line) {
        obm_free(p);
        obm_free(workers);
        obm_free(line);
        return NULL;
    }
    p->topology = topology;
    p->places = places;
    p->lanes = line;
    p->n_lanes = lanes;
    p->threads = threads;
    p->workers = workers;
    make_lanes(p, places);
    p->spins = spins_of(p, machine);
    for (int i = 0; i < threads; i++) workers[i].spins = p->spins;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->done, NULL);
    atomic_store(&p->owner, getpid());
    return p;
}

/* A kernel has up to 200 KiB of ordered activations and sums on its stack, a merge some KiB, and BLAS what it likes:
 * musl's threads have 128 KiB in all, and glibc's what `ulimit -s` says. */
#define STACK_BYTES ((size_t)1 << 20)

static void enlarge_stack(pthread_attr_t *attributes) {
    size_t bytes = 0;
    if (!pthread_attr_getstacksize(attributes, &bytes) && bytes < STACK_BYTES)
        (void)pthread_attr_setstacksize(attributes, STACK_BYTES);
}

/* Our threads take no signals: handlers (Ctrl-C in the bindings) belong to the caller's.  0, or an errno. */
static int start_thread(pthread_t *thread, void *(*main)(void *), void *arg) {
    sigset_t all, before;
    pthread_attr_t attributes;
    int failed = pthread_attr_init(&attributes);
    if (failed) return failed;
    enlarge_stack(&attributes);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    failed = pthread_create(thread, &attributes, main, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return failed;
}

/* Too few threads is no error. */
static void start_workers(obm__pool *p) {
    for (int i = 1; i < p->threads; i++) {
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
    obm_free(p->lanes);
    obm_free(p);
}

static void open_gates(obm__pool *p) {
    for (int i = 0; i < p->n_lanes; i++) {
        lane *l = &p->lanes[i];
        uint64_t generation = atomic_load(&l->gate) / GATE_GENERATION + 1;
        /* joined is 0: the last job waited for that */
        if (l->open) atomic_store(&l->gate, generation * GATE_GENERATION | GATE_OPEN);
    }
    if (!atomic_load(&p->sleepers)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->mutex);
}

/* Another lane's items are its own workers', but not at any price: who has waited as long as a hand-over takes helps
 * (they may have lost their cores, or there are none: too few threads is no error). */
static void finish_lane(obm__pool *p, lane *l) {
    for (int i = 0; i < p->spins && atomic_load_explicit(&l->next, memory_order_relaxed) < l->end; i++) pause_cpu();
    run_ranges(l, &p->job, 0);
}

static void wait_for_lane(obm__pool *p, lane *l) {
    worker *w = p->workers;
    for (int i = 0; i < w->spins; i++) {
        if (!(atomic_load(&l->gate) & GATE_INSIDE)) {
            judge(p, w, false);
            return;
        }
        pause_cpu();
    }
    judge(p, w, true);
    pthread_mutex_lock(&p->mutex);
    atomic_store(&p->caller_waits, 1);
    while (atomic_load(&l->gate) & GATE_INSIDE) pthread_cond_wait(&p->done, &p->mutex);
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

static void run_job(obm__pool *p, job j) {
    lane *own = p->workers[0].lane;
    p->job = j;
    open_gates(p);
    run_ranges(queue_of(p, own), &p->job, 0);
    for (int i = 0; i < p->n_lanes; i++)
        if (!j.shared && p->lanes[i].open && &p->lanes[i] != own) finish_lane(p, &p->lanes[i]);
    for (int i = 0; i < p->n_lanes; i++)
        if (p->lanes[i].open) atomic_fetch_and(&p->lanes[i].gate, ~GATE_OPEN);
    for (int i = 0; i < p->n_lanes; i++)
        if (p->lanes[i].open) wait_for_lane(p, &p->lanes[i]);
    atomic_store(&p->busy, 0);
}

static void fill_lane(lane *l, size_t begin, size_t end, size_t grain, int sharers) {
    atomic_store_explicit(&l->next, begin, memory_order_relaxed);
    l->end = end;
    l->grain = grain;
    l->sharers = sharers;
}

static void run_anywhere(obm_context *ctx, size_t begin, size_t end, size_t grain, obm__range_fn fn, void *arg) {
    obm__pool *p = ctx->pool;
    if (begin >= end) return;
    if (end - begin <= grain || !acquire(p)) {
        fn(arg, begin, end, 0);
        return;
    }
    if (!atomic_load(&p->started)) start_workers(p);
    fill_lane(&p->lanes[0], begin, end, grain, p->threads);
    for (int i = 0; i < p->n_lanes; i++) p->lanes[i].open = p->lanes[i].workers > 0 || !i;
    run_job(p, (job){.fn = fn, .arg = arg, .shared = true});
}

void obm__parallel(obm_context *ctx, size_t n, size_t grain, obm__range_fn fn, void *arg) {
    run_anywhere(ctx, 0, n, grain ? grain : 1, fn, arg);
}

void obm__parallel_lanes(obm_context *ctx, const obm__lanes *s, size_t grain, obm__range_fn fn, void *arg) {
    obm__pool *p = ctx->pool;
    size_t total = 0;
    if (!grain) grain = 1;
    if (s->n == 1) {
        run_anywhere(ctx, s->begin[0], s->end[0], grain, fn, arg);
        return;
    }
    for (int i = 0; i < s->n; i++) total += s->end[i] - s->begin[i];
    if (total <= grain || !acquire(p)) {
        for (int i = 0; i < s->n; i++)
            if (s->begin[i] < s->end[i]) fn(arg, s->begin[i], s->end[i], 0);
        return;
    }
    if (!atomic_load(&p->started)) start_workers(p);
    for (int i = 0; i < p->n_lanes; i++) {
        lane *l = &p->lanes[i];
        l->open = i < s->n && s->begin[i] < s->end[i];
        if (l->open) fill_lane(l, s->begin[i], s->end[i], grain, l->workers ? l->workers : 1);
    }
    run_job(p, (job){.fn = fn, .arg = arg});
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
