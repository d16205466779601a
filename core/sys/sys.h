/* What every part of core/ stands on: errors, memory, context, threads, BLAS.  Nothing here knows about tensors' meaning. */
#ifndef OBM_SYS_H
#define OBM_SYS_H

#include "kernels.h"
#include "onebitmerge.h"

#include <stdarg.h>

/* ---- names (dtype.c) ---- */

/* A tensor of what sees or hears beside the text model. */
bool obm__is_outside(const char *name);

/* "f32", "bf16" or "f16", as options name what is written; false for any other name. */
bool obm__dtype_find(const char *name, obm_dtype *out);

/* ---- errors (status.c) ---- */

/* Fills err (nullable) and returns status, so that `return obm__fail(err, OBM_E_ARG, "...", ...)` reads as one step. */
obm_status obm__fail(obm_error *err, obm_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* OBM_E_IO (NOMEM for ENOMEM) with strerror(errno) appended: "cannot open PATH: No such file or directory". */
obm_status obm__fail_errno(obm_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));
obm_status obm__fail_nomem(obm_error *err, uint64_t bytes);
/* Puts "item 3: " in front of the message of an ARG failure; returns status.  What a callback raised keeps its words. */
obm_status obm__fail_at(const char *what, size_t index, obm_status status, obm_error *err);

#define OBM_TRY(expr)                                                                                                  \
    do {                                                                                                               \
        obm_status try_status_ = (expr);                                                                               \
        if (try_status_ != OBM_OK) return try_status_;                                                                 \
    } while (0)
/* The same inside functions with a common exit: sets `status` and jumps to `done`. */
#define OBM_GO(expr)                                                                                                   \
    do {                                                                                                               \
        status = (expr);                                                                                               \
        if (status != OBM_OK) goto done;                                                                               \
    } while (0)

/* ---- structs with struct_size (options.c) ---- */

/* given (nullable) begins with its struct_size.  ARG: no possible size; UNSUPPORTED: bytes after the `known` ones are set. */
obm_status obm__options_check(const void *given, size_t known, const char *type, obm_error *err);
#define OBM_CHECK(type, options, err) obm__options_check(options, sizeof(type), #type, err)
/* Reads a checked struct into one of ours, missing fields zero; writes one of ours, never beyond given's struct_size. */
void obm__options_read(const void *given, void *own, size_t known);
void obm__options_write(const void *own, size_t known, void *given);
/* Field of an option struct that an older caller may not have: OBM_OPT(options, type, field, default). */
#define OBM_OPT(options, type, field, dflt)                                                                            \
    ((options) && (options)->struct_size >= offsetof(type, field) + sizeof(((type *)0)->field) ? (options)->field : (dflt))

/* ---- memory (memory.c) ---- */

bool obm__mul(size_t a, size_t b, size_t *out);   /* false on overflow: the one helper for sizes */
bool obm__add(size_t a, size_t b, size_t *out);
/* All return NULL on failure or overflow; free with obm_free.  count * size is checked. */
void *obm__alloc(size_t count, size_t size);        /* 64-byte aligned, not zeroed */
/* Memory of workers, `bytes` each, a multiple of obm__whole_pages: no page is two workers'.  Not zeroed.  On nodes:
 * obm__desks_new. */
void *obm__alloc_workers(size_t workers, size_t bytes);
size_t obm__whole_pages(size_t bytes);              /* rounded up; SIZE_MAX where that overflows */
void *obm__calloc(size_t count, size_t size);       /* zeroed */
void *obm__realloc(void *p, size_t count, size_t size);   /* only for blocks of obm__calloc / obm__realloc / obm__strdup */
char *obm__strdup(const char *s);
char *obm__strndup(const char *s, size_t n);
char *obm__format(const char *format, ...) __attribute__((format(printf, 1, 2)));   /* owned string */

/* A growing byte buffer; after a failed append `failed` stays set, so that one check at the end is enough. */
typedef struct obm__buffer { char *data; size_t size, capacity; bool failed; } obm__buffer;   /* zero-initialise */
void obm__buffer_add(obm__buffer *b, const void *bytes, size_t n);
void obm__buffer_text(obm__buffer *b, const char *s);
void obm__buffer_printf(obm__buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void obm__buffer_free(obm__buffer *b);

/* ---- machines and workers (topology.c, workers.c) ---- */

/* What a plan needs to know of a machine, as plain numbers. */
#define OBM_NODES 64
typedef struct obm__node {
    unsigned os;                /* number that the operating system gives it */
    uint64_t memory;            /* bytes; 0: unknown */
    int cores;
    int speed;                  /* sum of its cores' */
} obm__node;
typedef struct obm__core {
    unsigned cpu;               /* its first allowed processing unit: SMT siblings are left out */
    int node;                   /* whose memory is nearest; of several (HBM beside DRAM) the first */
    int speed;                  /* percent of the fastest kind of core, by highest frequency; 100 where the system does not say */
} obm__core;
/* Allowed nodes with memory, and allowed cores.  A node without cores stands there with none; the cores of a node without
 * memory belong to the nearest one with.  At least one of each. */
typedef struct obm__machine {
    int n_nodes, n_cores;
    obm__node nodes[OBM_NODES];
    obm__core *cores;
} obm__machine;

typedef struct obm__worker_place {
    int node;                   /* of the machine's */
    int cpu;                    /* -1: any core (of the node, where `numa` is not OFF) */
    int speed;
} obm__worker_place;
typedef struct obm__workers {
    obm_numa numa;              /* AUTO: shard or isolate, as a model's size says */
    int n, home;                /* home: node of worker 0, who is the caller */
    obm__worker_place *at;      /* (n), owned */
} obm__workers;
/* threads 0: one per core, with isolate one per core of the node. */
obm_status obm__workers_new(const obm__machine *m, obm_numa wanted, int threads, obm__workers *out, obm_error *err);
/* How many `threads` that nobody gave are under a quota of processors, or 0: with isolate no more than the node has cores. */
int obm__workers_within(const obm__machine *m, obm_numa wanted, int quota);
const char *obm__numa_name(obm_numa numa);
int obm__workers_count(const obm__workers *w, int node);

/* ---- context (context.c) ---- */

typedef struct obm__pool obm__pool;
typedef struct obm__topology obm__topology;
struct obm_context {
    const obm_kernels *k;      /* the kernel table, chosen once */
    int threads;
    int quota;                 /* processors that a control group's share of time comes to; 0: all */
    obm__topology *topology;
    obm_numa numa;             /* as asked for */
    obm__workers workers;
    obm__pool *pool;           /* its workers start at the first parallel call */
    obm_log_fn log;
    void *log_user;
    obm_resolve_fn resolve;
    void *resolve_user;
    obm_interrupt_fn interrupt;
    void *interrupt_user;
    struct obm__desks *_Atomic spare_desks;   /* of desks.c */
    obm_context_info info;
    char blas[128], topology_text[256], available[64];
};
obm_status obm__threads_check(int64_t wanted, obm_error *err);
obm_status obm__numa_check(obm_numa wanted, obm_error *err);
void obm__warn(const obm_context *ctx, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- scratch of workers (desks.c) ---- */

typedef struct obm__desks obm__desks;
/* `each` bytes for every worker of the context, as obm__alloc_workers has them, and each worker's on its node where there
 * are several; NULL: no memory. */
void *obm__desks_new(obm_context *ctx, size_t each);
void obm__desks_free(obm_context *ctx, void *desks);
void obm__desks_clear(obm_context *ctx);   /* what is kept for the next */

/* ---- threads (threads.c) ---- */

/* Runs fn on contiguous ranges [begin, end) that cover 0..n, boundaries at multiples of `grain`.  `worker` < ctx->threads
 * selects scratch.  fn must compute each item independently of the partition: that is what makes results the same for any
 * thread count.  When the pool is busy or forked away, everything runs on the calling thread. */
typedef void (*obm__range_fn)(void *arg, size_t begin, size_t end, int worker);
void obm__parallel(obm_context *ctx, size_t n, size_t grain, obm__range_fn fn, void *arg);
/* Items of each node of the machine: [begin[i], end[i]) are run by the workers of node i (another may help who would
 * else wait long).  Only where the context's workers are in lanes, which is where their `numa` is not OFF.  n = 1:
 * items without a node, which any worker runs. */
typedef struct obm__lanes {
    int n;
    size_t begin[OBM_NODES], end[OBM_NODES];
} obm__lanes;
void obm__parallel_lanes(obm_context *ctx, const obm__lanes *s, size_t grain, obm__range_fn fn, void *arg);
/* The caller is worker 0; with more workers than cores nobody spins, and no worker does for a while that mostly spun in
 * vain.  Keeps both pointers. */
obm__pool *obm__pool_new(const obm__topology *topology, const obm__workers *workers);
void obm__pool_free(obm__pool *p);
/* Turns of a worker's next wait before it parks; asked inside a job, by itself. */
int obm__pool_spins(const obm__pool *p, int worker);
/* One call of fn on a thread of its own, beside what the pool runs.  obm__task_wait: true once fn has returned; looks for at
 * most `milliseconds`.  obm__task_join waits to the end and frees. */
typedef struct obm__task obm__task;
obm_status obm__task_start(void (*fn)(void *), void *arg, obm__task **out, obm_error *err);
bool obm__task_wait(obm__task *t, int milliseconds);
void obm__task_join(obm__task *t);
/* Sum of n partial sums in a fixed pairwise tree (bit-identical for any thread count). */
double obm__tree_sum(const double *partial, size_t n);

/* One thread at a time: OBM_E_BUSY for a second.  Zero-initialise. */
typedef struct obm__guard { _Atomic int busy; } obm__guard;
obm_status obm__guard_enter(obm__guard *g, const char *what, obm_error *err);
void obm__guard_leave(obm__guard *g);

/* ---- progress and Ctrl-C (pulse.c) ---- */

/* Calls `fn` at most every 50 ms, from the caller's thread, between slices of work. */
typedef struct obm__pulse {
    obm_progress_fn fn;         /* NULL: nobody is to be asked */
    void *user;
    const char *what;
    uint64_t done, total;
    uint64_t last;              /* nanoseconds, monotonic */
} obm__pulse;
/* Of a call that takes or was given no `fn`: the context's interrupt is asked instead. */
obm__pulse obm__pulse_new(const obm_context *ctx, obm_progress_fn fn, void *user, const char *what, uint64_t total);
obm_status obm__pulse_check(obm__pulse *p, obm_error *err);   /* NULL is fine; OBM_E_USER when asked to stop */
obm_status obm__pulse_done(obm__pulse *p, uint64_t done, obm_error *err);   /* reports now */
/* obm__parallel_lanes over `parts` slices, each with its part of every node's items, and a look at the pulse behind
 * each. What fn computes must not depend on the slicing either. */
obm_status obm__parallel_parts(obm_context *ctx, const obm__lanes *whole, size_t parts, size_t grain, obm__range_fn fn,
                               void *arg, obm__pulse *pulse, obm_error *err);
/* The same of n items without a node, at most `size` in a slice. */
obm_status obm__parallel_slices(obm_context *ctx, size_t n, size_t grain, size_t size, obm__range_fn fn, void *arg,
                                obm__pulse *pulse, obm_error *err);
/* fn(arg) on a thread of its own while this one looks at the pulse, for items too long to look between: once the pulse
 * says stop, *stop is 1, and what fn does should end soon.  Without anybody to ask, fn just runs. */
obm_status obm__watched(void (*fn)(void *), void *arg, _Atomic int *stop, obm__pulse *pulse, obm_error *err);

/* ---- BLAS (blas.c) ---- */

/* Holds the process-wide OpenBLAS thread count at 1 between enter and leave (counted, thread-safe): the first enter saves the
 * count, the last leave restores it unless somebody else changed it meanwhile.  What is declared below does it for itself; put a
 * pair around a whole region of calls so that the count does not flip in between. */
void obm__blas_enter(void);
void obm__blas_leave(void);
/* Call it before `threads` threads use the library together: NOMEM where it would wait forever for address space. */
obm_status obm__blas_check(int threads, obm_error *err);
/* C (m, n) = alpha * op(A) * op(B) + beta * C, op(A) (m, k), either factor transposed or not; row-major, one thread. */
void obm__dgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const double *a, int64_t lda,
                const double *b, int64_t ldb, double beta, double *c, int64_t ldc);
/* LAPACK on row-major matrices; linalg.c makes room and errors of the answers: 0, or > 0 without convergence. */
int obm__dgesdd(int64_t m, int64_t n, double *a, double *s, double *small, double *work, int64_t n_work, int32_t *integers);
int obm__dsyevd(int64_t n, double *a, double *w, double *work, int64_t n_work, int32_t *integers, int64_t n_integers);
int obm__dposv(int64_t n, int64_t m, double *c, double *x);
const char *obm__blas_describe(char *buf, size_t size);

/* ---- dense matrices (linalg.c): f64, row-major, without gaps ---- */

/* What rounding to f32 leaves of a zero singular value: an error of 2^-24 of each element is a matrix of norm 2^-23 times
 * the largest singular value at most, on average; values below eight times that have no direction worth its name. */
#define OBM_RANK_TOLERANCE 0x1p-20
/* C (m, n) = alpha * op(A) * op(B) + beta * C, op(A) (m, k); in fixed panels of rows, so that no bit depends on threads. `look`
 * (nullable) is asked after some tenths of a second each. */
typedef obm_status (*obm__look_fn)(void *user, obm_error *err);
typedef struct obm__product {
    bool transpose_a, transpose_b;
    size_t m, n, k;
    double alpha, beta;
    const double *a, *b;
    double *c;
} obm__product;
obm_status obm__multiply(obm_context *ctx, const obm__product *p, obm__look_fn look, void *user, obm_error *err);

/* A (m, n) = U diag(s) VT; k = min(m, n).  Views of one allocation. */
typedef struct obm__svd {
    size_t m, n, k;
    double *a;         /* (m, n): the matrix in, overwritten */
    double *s;         /* (k), falling */
    double *u, *vt;    /* (m, k), (k, n) */
    double *work;      /* (n_work): free for other use between decompositions */
    size_t n_work;
    void *memory;
} obm__svd;
/* UNSUPPORTED for matrices beyond LAPACK's 32-bit sizes, which names `what`; NOMEM. */
obm_status obm__svd_new(size_t m, size_t n, const char *what, obm__svd *out, obm_error *err);
void obm__svd_free(obm__svd *d);
uint64_t obm__svd_bytes(uint64_t m, uint64_t n);
/* VALUE where LAPACK does not converge; names `what`.  Signs are as LAPACK gives them: the same for the same input. */
obm_status obm__svd_run(const obm__svd *d, const char *what, obm_error *err);
/* The same memory for a matrix that is not larger in either direction. */
void obm__svd_shape(obm__svd *d, size_t m, size_t n);
/* The orthogonal polar factor U VT of x (m, n) in its place, by the room of d, which keeps its shape and nothing else.  Directions
 * beyond the rank have no factor and stay out. */
obm_status obm__polar(obm_context *ctx, obm__svd *d, size_t m, size_t n, double *x, const char *what, obm__look_fn look, void *user,
                      obm_error *err);
/* How many singular values are above OBM_RANK_TOLERANCE of the largest. */
size_t obm__svd_rank(const obm__svd *d);

/* Eigenvalues w (n), rising, of the symmetric matrix a (n, n), whose rows become the eigenvectors. */
obm_status obm__eigen(size_t n, double *a, double *w, const char *what, obm_error *err);
uint64_t obm__eigen_bytes(uint64_t n);
/* X (m, n) with X C = B in place of B, for a positive definite C (n, n), which is lost. */
obm_status obm__solve(size_t m, size_t n, double *c, double *b, const char *what, obm_error *err);

/* What a container lets this process use (context.c); UINT64_MAX: all there is. */
uint64_t obm__memory_limit(void);
/* The least limit of the groups that the file `groups` (of the form of /proc/self/cgroup) names, and of those they are
 * in; `mount` as /sys/fs/cgroup, where version 1 has a folder "memory". */
uint64_t obm__group_limit(const char *groups, const char *mount);
/* The same of whole processors (cpu.max, cpu.cfs_quota_us). */
uint64_t obm__group_processors(const char *groups, const char *mount);

/* ---- topology (topology.c): the only file that includes hwloc.h ---- */

/* What this process may use (allowed cpuset, affinity, memory policy).  NULL without memory or when hwloc cannot read the
 * machine; the other functions take NULL as one unnamed core.  Immutable. */
obm__topology *obm__topology_new(void);
/* Another machine: the path of hwloc's XML, or a synthetic description ("numa:2 core:4 pu:2").  Errors: ARG, IO, FORMAT,
 * UNSUPPORTED (more than OBM_NODES nodes), NOMEM. */
obm_status obm__topology_read(const char *text, obm__topology **out, obm_error *err);
void obm__topology_free(obm__topology *t);
int obm__topology_cores(const obm__topology *t);
int obm__topology_nodes(const obm__topology *t);
const obm__machine *obm__topology_machine(const obm__topology *t);   /* borrowed; never NULL */
uint64_t obm__topology_cache(const obm__topology *t);   /* bytes of all third-level caches; 0: none, or unknown */
/* "1 package, 1 NUMA node, 2 cores, L2 512 KiB, L3 32 MiB" */
const char *obm__topology_describe(const obm__topology *t, char *buf, size_t size);
/* Binds the calling thread to the place of a worker; 0 on success, failure is harmless.  Workers beyond the cores: to the
 * cores of their node, with `numa` OFF to nothing (and -1). */
int obm__topology_bind(const obm__topology *t, const obm__workers *w, int worker);
/* What the calling thread is bound to, for obm__topology_restore, which frees it; NULL: unknown. */
void *obm__topology_save(const obm__topology *t);
void obm__topology_restore(const obm__topology *t, void *saved);
/* For a thread that a bound one has started, and whose place it would share. */
void obm__topology_unbind(const obm__topology *t);
/* Where pages will be that nobody has touched: on a node (of the machine's; when it is full on another), or in turn on all
 * (node -1).  0, or -1 with errno: the system refuses, or the topology is another machine's.  Whole pages. */
int obm__topology_place(const obm__topology *t, void *at, size_t bytes, int node);
/* node[i]: of the machine's, where page i from `at` on is; -1 on none of them, -2 nowhere yet.  -1 with errno as above. */
int obm__topology_find(const obm__topology *t, const void *at, size_t pages, int *node);

#endif
