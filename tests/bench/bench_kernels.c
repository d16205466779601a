/* Kernel speed in GB/s of memory traffic, next to a plain read of the same memory in the same round; plane kernels in
 * units of their own, next to the kernel that does the same for dense weights, or moves as many bytes.  Ratios are what
 * compares between runs: on a shared machine GB/s alone does not.
 *
 * Usage: bench_kernels [--threads N] [--isa NAME] [--mib N (per thread and buffer)] [--rounds N] */
#include "bench.h"
#include "kernels.h"

#include <pthread.h>

#define MAX_THREADS 256
#define BLOCK 4096   /* elements per call of the reductions, as their contract says */
#define COLUMNS 2048 /* of the rows_* matrices */
#define TOKENS 8     /* of batch_* */

/* Each thread's own memory: two f32 arrays and one of half width, n elements each. */
typedef struct slice {
    float *a, *b;
    uint16_t *h;
    uint8_t *bits;
    obm__z12 z; /* of h */
    uint32_t *histogram;
    uint8_t *tables; /* of 2048 columns of a, with scales and abs_sums */
    float scales[1];
    int32_t abs_sums[COLUMNS / 64];
    size_t n;
    double sink;
} slice;

typedef void run_fn(const obm_kernels *k, slice *s);
typedef struct op {
    const char *name;
    double bytes; /* read + written per element */
    run_fn *run;
} op;

/* Four streams, as four rows at a time are, two sums each: more than one stream is what reaches the memory's rate. */
static void run_read(const obm_kernels *k, slice *s) {
    typedef uint64_t lanes __attribute__((vector_size(32)));
    (void)k;
    size_t quarter = s->n / 32; /* of 8 floats */
    const lanes *p = (const void *)s->a, *q = p + quarter, *u = q + quarter, *v = u + quarter;
    lanes p0 = {0}, p1 = {0}, q0 = {0}, q1 = {0}, u0 = {0}, u1 = {0}, v0 = {0}, v1 = {0};
    for (size_t i = 0; i + 2 <= quarter; i += 2) {
        p0 ^= p[i], p1 ^= p[i + 1];
        q0 ^= q[i], q1 ^= q[i + 1];
        u0 ^= u[i], u1 ^= u[i + 1];
        v0 ^= v[i], v1 ^= v[i + 1];
    }
    lanes all = p0 ^ p1 ^ q0 ^ q1 ^ u0 ^ u1 ^ v0 ^ v1;
    s->sink += (double)((all[0] ^ all[1] ^ all[2] ^ all[3]) & 1);
}
static void run_copy(const obm_kernels *k, slice *s) {
    (void)k;
    memcpy(s->b, s->a, s->n * 4);
}
static void run_widen_bf16(const obm_kernels *k, slice *s) { k->bf16_to_f32(s->b, s->h, s->n); }
static void run_widen_f16(const obm_kernels *k, slice *s) { k->f16_to_f32(s->b, s->h, s->n); }
static void run_narrow_bf16(const obm_kernels *k, slice *s) { k->f32_to_bf16(s->h, s->a, s->n); }
static void run_sub(const obm_kernels *k, slice *s) { k->sub_f32(s->b, s->b, s->a, s->n); }
static void run_sub_bf16(const obm_kernels *k, slice *s) { k->sub_bf16(s->b, s->h, s->h + s->n / 2, s->n / 2); }
static void run_axpy(const obm_kernels *k, slice *s) { k->axpy_f32(s->b, 1e-30f, s->a, s->n); }
static void run_nonfinite(const obm_kernels *k, slice *s) { s->sink += (double)k->find_nonfinite(s->a, s->n); }
static void run_abs_sum(const obm_kernels *k, slice *s) {
    for (size_t i = 0; i + BLOCK <= s->n; i += BLOCK) s->sink += k->abs_sum(s->a + i, BLOCK);
}
static void run_dot(const obm_kernels *k, slice *s) {
    for (size_t i = 0; i + BLOCK <= s->n; i += BLOCK) s->sink += k->dot(s->a + i, s->b + i, BLOCK);
}
static void run_pack(const obm_kernels *k, slice *s) { k->sign_pack(s->bits, s->a, s->n); }
static void run_sign_axpy(const obm_kernels *k, slice *s) { k->sign_axpy(s->b, s->bits, 1e-30f, s->n); }
static void run_histogram(const obm_kernels *k, slice *s) { k->magnitude_histogram(s->histogram, s->a, s->n); }

static void run_rows(const obm_kernels *k, slice *s, int type) {
    float y[64];
    for (size_t i = 0; i + 64 * COLUMNS <= s->n; i += 64 * COLUMNS) {
        if (type == 0)
            k->rows_bf16(y, s->h + i, COLUMNS, 64, s->a, COLUMNS);
        else if (type == 1)
            k->rows_f16(y, s->h + i, COLUMNS, 64, s->a, COLUMNS);
        else
            k->rows_f32(y, s->b + i, COLUMNS, 64, s->a, COLUMNS);
        s->sink += (double)y[0];
    }
}
static void run_rows_bf16(const obm_kernels *k, slice *s) { run_rows(k, s, 0); }
static void run_rows_f16(const obm_kernels *k, slice *s) { run_rows(k, s, 1); }
static void run_rows_f32(const obm_kernels *k, slice *s) { run_rows(k, s, 2); }

/* TOKENS vectors at once: the same weights are read once. */
static void run_batch(const obm_kernels *k, slice *s, int type) {
    float y[TOKENS * 64];
    for (size_t i = 0; i + 64 * COLUMNS <= s->n; i += 64 * COLUMNS) {
        if (type == 0)
            k->batch_bf16(y, 64, s->h + i, COLUMNS, 64, s->a, COLUMNS, TOKENS, COLUMNS);
        else if (type == 1)
            k->batch_f16(y, 64, s->h + i, COLUMNS, 64, s->a, COLUMNS, TOKENS, COLUMNS);
        else
            k->batch_f32(y, 64, s->b + i, COLUMNS, 64, s->a, COLUMNS, TOKENS, COLUMNS);
        s->sink += (double)y[0];
    }
}
static void run_batch_bf16(const obm_kernels *k, slice *s) { run_batch(k, s, 0); }
static void run_batch_f16(const obm_kernels *k, slice *s) { run_batch(k, s, 1); }
static void run_batch_f32(const obm_kernels *k, slice *s) { run_batch(k, s, 2); }

/* n packed rows of 2048 columns on the rows of a; what they hold does not matter. */
static void add_planes(const obm_kernels *k, slice *s, int n) {
    for (size_t i = 0; i + COLUMNS <= s->n; i += COLUMNS) {
        const uint8_t *bits[3] = {s->bits + i / 8, s->bits, s->bits + COLUMNS / 8};
        k->plane_add(s->b + i, bits, n, 1e-30f, COLUMNS);
    }
}
static void run_plane_add(const obm_kernels *k, slice *s) { add_planes(k, s, 1); }
static void run_plane_add_3(const obm_kernels *k, slice *s) { add_planes(k, s, 3); }

/* The first is the probe.  Histogram counters stay in the cache and count as nothing. */
static const op ops[] = {
    {"read", 4, run_read},
    {"memcpy", 8, run_copy},
    {"rows_bf16", 2, run_rows_bf16},
    {"rows_f16", 2, run_rows_f16},
    {"rows_f32", 4, run_rows_f32},
    {"batch_bf16, 8 vectors", 2, run_batch_bf16},
    {"batch_f16, 8 vectors", 2, run_batch_f16},
    {"batch_f32, 8 vectors", 4, run_batch_f32},
    {"bf16_to_f32", 6, run_widen_bf16},
    {"f16_to_f32", 6, run_widen_f16},
    {"f32_to_bf16", 6, run_narrow_bf16},
    {"sub_f32", 12, run_sub},
    {"sub_bf16", 4, run_sub_bf16}, /* of half as many elements */
    {"axpy_f32", 12, run_axpy},
    {"find_nonfinite", 4, run_nonfinite},
    {"abs_sum", 4, run_abs_sum},
    {"dot", 8, run_dot},
    {"sign_pack", 4.125, run_pack},
    {"sign_axpy", 8.125, run_sign_axpy},
    {"plane_add, 1 row", 8.125, run_plane_add},
    {"plane_add, XOR of 3", 8.125, run_plane_add_3},
    {"magnitude_histogram", 4, run_histogram},
};
#define N_OPS (sizeof ops / sizeof *ops)
#define MAX_ROUNDS 99

/* ---- planes: the bytes of a are blocks of 64 rows x 2048 columns, 16 KiB each, or rows of 256 bytes ---- */

enum { BLOCK_BYTES = 64 * COLUMNS / 8, WINDOW = 8 * BLOCK_BYTES }; /* 128 KiB: in the second cache, not in the first */

/* Sums over all bytes of a, taken from its first `window` bytes again and again. */
static void sum_planes(const obm_kernels *k, slice *s, int n, size_t window) {
    const uint8_t *bytes = (const uint8_t *)s->a;
    int32_t sums[64];
    for (size_t i = 0; i + (size_t)n * BLOCK_BYTES <= s->n * 4; i += (size_t)n * BLOCK_BYTES) {
        const uint8_t *p = bytes + i % window, *planes[3] = {p, p + BLOCK_BYTES, p + 2 * BLOCK_BYTES};
        k->plane_sums(sums, planes, n, COLUMNS / 8, s->tables, s->abs_sums, NULL);
        s->sink += sums[0];
    }
}
static void run_sums(const obm_kernels *k, slice *s) { sum_planes(k, s, 1, SIZE_MAX); }
static void run_sums_3(const obm_kernels *k, slice *s) { sum_planes(k, s, 3, SIZE_MAX); }
static void run_sums_cached(const obm_kernels *k, slice *s) { sum_planes(k, s, 1, WINDOW); }
static void run_sums_3_cached(const obm_kernels *k, slice *s) { sum_planes(k, s, 3, 3 * WINDOW / 4); }
static void run_rows_cached(const obm_kernels *k, slice *s) {
    float y[32];
    for (size_t i = 0; i + 32 * COLUMNS <= s->n; i += 32 * COLUMNS) {
        k->rows_bf16(y, s->h, COLUMNS, 32, s->a, COLUMNS);
        s->sink += (double)y[0];
    }
}
static void run_rows_z12(const obm_kernels *k, slice *s) {
    float y[64];
    for (size_t row = 0; row + 64 <= s->z.rows; row += 64) {
        k->rows_z12(y, &s->z, row, 64, s->a);
        s->sink += (double)y[0];
    }
}
static void run_rows_z12_cached(const obm_kernels *k, slice *s) {
    float y[32];
    for (size_t row = 0; row + 32 <= s->z.rows; row += 32) {
        k->rows_z12(y, &s->z, 0, 32, s->a);
        s->sink += (double)y[0];
    }
}
static bool pack(const obm_kernels *k, slice *s) {
    obm__z12 *z = &s->z;
    uint32_t found = 0;
    for (size_t row = 0; row < z->rows; row++) {
        size_t room = s->n / 64 - found;
        z->first_escape[row] = found;
        size_t n = k->z12_encode(z->codes + row * z->blocks * OBM__Z12_BYTES, z->tables + row * OBM__Z12_TABLE,
                                 z->escapes + found, room, s->h + row * COLUMNS, COLUMNS);
        if (n > room) return false;
        found += (uint32_t)n;
    }
    z->first_escape[z->rows] = found;
    return true;
}
static void run_encode(const obm_kernels *k, slice *s) { (void)pack(k, s); }
static void run_repack(const obm_kernels *k, slice *s) {
    for (size_t i = 0; i + BLOCK_BYTES <= s->n * 4; i += BLOCK_BYTES)
        k->plane_repack((uint8_t *)s->b + i, (uint8_t *)s->a + i, COLUMNS / 8, 64, COLUMNS / 8);
}
static void run_unpack(const obm_kernels *k, slice *s) {
    for (size_t i = 0; i + BLOCK_BYTES <= s->n * 4; i += BLOCK_BYTES)
        k->plane_unpack((uint8_t *)s->b + i, COLUMNS / 8, (uint8_t *)s->a + i, COLUMNS / 8);
}
/* A vector of activations is in the first cache: n / 16 columns, 2048 of them again and again. */
static void run_tables(const obm_kernels *k, slice *s) {
    for (size_t i = 0; i < s->n / 16; i += COLUMNS) k->plane_tables(s->tables, s->scales, s->abs_sums, s->a, COLUMNS);
}
static void run_scalar_tables(const obm_kernels *k, slice *s) {
    (void)k;
    run_tables(obm_kernels_find("scalar"), s);
}

typedef struct plane_op {
    const char *name, *unit;
    double work; /* in 1e-9 units per element, as base_work */
    run_fn *run;
    const char *base;
    double base_work;
    run_fn *run_base;
} plane_op;
static const plane_op plane_ops[] = {
    {"plane_sums, L2", "Gweight/s", 32, run_sums_cached, "rows_bf16, L2", 1, run_rows_cached},
    {"plane_sums of 3, L2", "Gweight/s", 32 / 3.0, run_sums_3_cached, "rows_bf16, L2", 1, run_rows_cached},
    {"plane_sums", "Gweight/s", 32, run_sums, "rows_bf16", 1, run_rows_bf16},
    {"plane_sums of 3", "Gweight/s", 32 / 3.0, run_sums_3, "rows_bf16", 1, run_rows_bf16},
    {"rows_z12, L2", "Gweight/s", 1, run_rows_z12_cached, "rows_bf16, L2", 1, run_rows_cached},
    {"rows_z12", "Gweight/s", 1, run_rows_z12, "rows_bf16", 1, run_rows_bf16},
    {"z12_encode", "GB/s of bf16", 2, run_encode, "memcpy", 4, run_copy},
    {"plane_repack", "GB/s of plane", 4, run_repack, "memcpy", 4, run_copy},
    {"plane_unpack", "GB/s of plane", 4, run_unpack, "memcpy", 4, run_copy},
    {"plane_tables", "Gcolumn/s", 1 / 16.0, run_tables, "scalar", 1 / 16.0, run_scalar_tables},
};
#define N_PLANE_OPS (sizeof plane_ops / sizeof *plane_ops)

typedef struct team {
    pthread_barrier_t start, stop;
    const obm_kernels *k;
    run_fn *current; /* NULL: end */
    slice slices[MAX_THREADS];
} team;
typedef struct member {
    team *t;
    int index;
} member;

static bool make_packed(slice *s) {
    size_t rows = s->n / COLUMNS;
    s->z = (obm__z12){.rows = rows, .cols = COLUMNS, .blocks = COLUMNS / OBM__Z12_COLUMNS};
    s->z.codes = aligned_alloc(64, rows * s->z.blocks * OBM__Z12_BYTES);
    s->z.tables = malloc(rows * OBM__Z12_TABLE);
    s->z.escapes = malloc(s->n / 64 * sizeof *s->z.escapes);
    s->z.first_escape = malloc((rows + 1) * sizeof *s->z.first_escape);
    return s->z.codes && s->z.tables && s->z.escapes && s->z.first_escape && pack(obm_kernels_find("scalar"), s);
}

/* Filled by the thread that uses it: small finite values, so that no kernel meets denormals or overflows. */
static bool slice_fill(slice *s, size_t n) {
    *s = (slice){.n = n};
    s->a = aligned_alloc(64, n * 4);
    s->b = aligned_alloc(64, n * 4);
    s->h = aligned_alloc(64, n * 2);
    s->bits = aligned_alloc(64, n / 8);
    s->histogram = calloc(32768, sizeof *s->histogram);
    s->tables = aligned_alloc(64, COLUMNS * 8);
    if (!s->a || !s->b || !s->h || !s->bits || !s->histogram || !s->tables) return false;
    uint32_t seed = 1;
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        s->a[i] = s->b[i] = ((float)(seed >> 8) * 0x1p-24f - 0.5f) * 0.04f + 1e-9f;
    }
    obm_kernels_find("scalar")->f32_to_bf16(s->h, s->a, n);
    memset(s->bits, 0x5a, n / 8);
    if (!make_packed(s)) return false;
    obm_kernels_find("scalar")->plane_tables(s->tables, s->scales, s->abs_sums, s->a, COLUMNS);
    return true;
}

static void *member_main(void *arg) {
    member *m = arg;
    team *t = m->t;
    size_t n = t->slices[m->index].n;
    if (!slice_fill(&t->slices[m->index], n)) {
        fprintf(stderr, "out of memory: use a smaller --mib\n");
        exit(1);
    }
    for (;;) {
        pthread_barrier_wait(&t->start);
        if (!t->current) return NULL;
        t->current(t->k, &t->slices[m->index]);
        pthread_barrier_wait(&t->stop);
    }
}

static double measure(team *t, run_fn *run) {
    t->current = run;
    double begin = seconds();
    pthread_barrier_wait(&t->start);
    pthread_barrier_wait(&t->stop);
    return seconds() - begin;
}

static void report(team *t, int rounds, double elements) {
    static double rate[N_OPS][MAX_ROUNDS], share[N_OPS][MAX_ROUNDS];
    for (size_t o = 0; o < N_OPS; o++) measure(t, ops[o].run); /* warm */
    for (int r = 0; r < rounds; r++)
        for (size_t o = 0; o < N_OPS; o++) {
            double probe = ops[0].bytes * elements / measure(t, ops[0].run) * 1e-9;
            rate[o][r] = o ? ops[o].bytes * elements / measure(t, ops[o].run) * 1e-9 : probe;
            share[o][r] = rate[o][r] / probe;
        }
    printf("%-22s %8s %8s %8s %8s\n", "kernel", "GB/s", "min", "max", "of read");
    for (size_t o = 0; o < N_OPS; o++) {
        double middle = median(rate[o], rounds);
        printf("%-22s %8.1f %8.1f %8.1f %8.2f\n", ops[o].name, middle, rate[o][0], rate[o][rounds - 1],
               median(share[o], rounds));
    }
}

static void report_planes(team *t, int rounds, double elements) {
    double rate[MAX_ROUNDS], share[MAX_ROUNDS];
    printf("\n%-22s %8s %8s %8s %-14s %s\n", "planes, z12", "median", "min", "max", "", "median ratio to");
    for (size_t i = 0; i < N_PLANE_OPS; i++) {
        const plane_op *o = &plane_ops[i];
        measure(t, o->run);
        for (int r = 0; r < rounds; r++) {
            double base = o->base_work * elements / measure(t, o->run_base) * 1e-9;
            rate[r] = o->work * elements / measure(t, o->run) * 1e-9;
            share[r] = rate[r] / base;
        }
        double middle = median(rate, rounds);
        printf("%-22s %8.2f %8.2f %8.2f %-14s %.2f x %s\n", o->name, middle, rate[0], rate[rounds - 1], o->unit,
               median(share, rounds), o->base);
    }
}

int main(int argc, char **argv) {
    obm_context *ctx;
    obm_context_info info;
    obm_error err;
    if (obm_context_new(NULL, &ctx, &err) != OBM_OK) return fprintf(stderr, "%s\n", err.message), 1;
    obm_context_describe(ctx, &info);
    long threads = number(argc, argv, "--threads", info.threads), mib = number(argc, argv, "--mib", 128);
    long rounds = number(argc, argv, "--rounds", 9);
    static team t;
    t.k = obm_kernels_find(text(argc, argv, "--isa", info.isa));
    if (!t.k || threads < 1 || threads > MAX_THREADS || mib < 1 || mib > 65536 || rounds < 7 || rounds > MAX_ROUNDS)
        return fprintf(stderr, "usage: %s [--threads 1..%d] [--isa %s] [--mib 1..] [--rounds 7..%d]\n", argv[0],
                       MAX_THREADS, info.isa_available, MAX_ROUNDS),
               2;
    print_processor();
    printf("topology  %s\nbuild     onebitmerge %s, %s\nisa       %s (available: %s)\n", info.topology, obm_version(),
           info.compiler, t.k->isa, info.isa_available);
    printf("threads   %ld, %ld MiB of f32 per thread and buffer; median of %ld interleaved rounds\n", threads, mib,
           rounds);
    size_t n = (size_t)mib << 18;
    pthread_t ids[MAX_THREADS];
    member members[MAX_THREADS];
    pthread_barrier_init(&t.start, NULL, (unsigned)threads + 1);
    pthread_barrier_init(&t.stop, NULL, (unsigned)threads + 1);
    for (long i = 0; i < threads; i++) {
        t.slices[i].n = n;
        members[i] = (member){&t, (int)i};
        if (pthread_create(&ids[i], NULL, member_main, &members[i]))
            return fprintf(stderr, "cannot start a thread\n"), 1;
    }
    report(&t, (int)rounds, (double)n * (double)threads);
    report_planes(&t, (int)rounds, (double)n * (double)threads);
    t.current = NULL;
    pthread_barrier_wait(&t.start);
    for (long i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    obm_context_free(ctx);
    return 0;
}
