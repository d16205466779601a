/* Running packs on their sign planes, on a synthetic base with experts that are 1-bit in attention and mlp and the
 * base's elsewhere: decode, batches of several routes, prefill, route switches, memory, loading.  Figures stand next to
 * the base alone, or to materialised models, measured in turn with them, step by step.  Each part runs in a process of
 * its own.
 *
 * Usage: bench_planes [--what decode|batch|prefill|switch|memory|load|all|tasks] [--size tiny|0.1b|0.4b] [--threads N]
 *                     [--rounds N] [--tasks N]
 * all: without tasks, whose packs take many times the base's space on disk. */
#include "synthetic_pack.h"

#include "model/model.h"

#include <sys/wait.h>

#define MAX_ROUNDS 999
#define PROMPT 512 /* tokens */
#define FIRST 8    /* tokens of a sequence before it decodes */
#define MAX_BATCH 8

static const shape shapes[] = {
    {"tiny", 768, 192, 384, 4, 6, 0},
    {"0.1b", 32000, 768, 2048, 12, 12, 0},
    {"0.4b", 32000, 1536, 4096, 12, 12, 0},
};

typedef struct bench {
    obm_context *ctx; /* of the part that runs */
    const shape *s;
    int rounds, threads, tasks;
    char dir[64], base[96], expert[96];
} bench;

/* ---- packs ---- */

/* Packs of one expert, from which the others are made. */
static void make_seeds(bench *b) {
    static const char *const scales[] = {"row", "matrix"};
    char path[128];
    write_folder(b->s, b->base, NULL);
    write_folder(b->s, b->expert, "_proj");
    for (int i = 0; i < 2; i++) {
        obm_expert e = OBM_INIT(obm_expert);
        obm_error err;
        e.name = "task";
        e.path = b->expert;
        e.scale = scales[i];
        join(path, sizeof path, b->dir, scales[i]);
        check(obm_compress(b->ctx, b->base, &e, 1, NULL, path, NULL, NULL, &err), &err);
    }
    remove_folder(b->expert);
}

static void pack_path(const bench *b, const char *scale, int n, char *path, size_t size) {
    need((size_t)snprintf(path, size, "%s/%s-%d", b->dir, scale, n) < size, "a path");
}

static void change_settings(obm_pack *p, double lambda, obm_reading reading) {
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_error err;
    obm_pack_get_settings(p, &s);
    s.lambda = lambda;
    s.reading = reading;
    check(obm_pack_set_settings(p, &s, &err), &err);
}

static obm_pack *open_pack(bench *b, const char *scale, int n, double lambda) {
    char path[128], seed[128];
    obm_pack *p;
    obm_error err;
    struct stat st;
    pack_path(b, scale, n, path, sizeof path);
    join(seed, sizeof seed, b->dir, scale);
    if (stat(path, &st)) write_pack(seed, path, n);
    check(obm_pack_open(b->ctx, path, b->base, &p, &err), &err);
    change_settings(p, lambda, OBM_READING_ONTO_BASE);
    return p;
}

static obm_model *open_with(bench *b, const obm_pack *p, bool materialise, bool z12) {
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m;
    obm_error err;
    o.materialise = materialise;
    o.z12 = z12 ? OBM_Z12_ON : OBM_Z12_OFF;
    o.route_budget = UINT64_MAX; /* what is measured has to stay */
    check(obm_model_from_pack(b->ctx, p, &o, &m, &err), &err);
    return m;
}

static obm_model *open_model(bench *b, const obm_pack *p, bool materialise) {
    return open_with(b, p, materialise, false);
}

/* ---- decoding step by step ---- */

typedef struct batch {
    obm_model *m;
    obm__sequence *s[MAX_BATCH];
    size_t n;
    float *logits; /* (n, vocab) */
} batch;

enum { BASE = -1, SOFT = -2 }; /* in place of a task: the base alone, all tasks in equal parts */

static void add_sequence(batch *b, obm_model *m, int task) {
    double route[OBM_ROUTE_TASKS] = {0};
    int32_t ids[FIRST];
    obm_error err;
    b->m = m;
    for (size_t k = 0; k < m->tasks; k++) route[k] = task == SOFT ? 1 / (double)m->tasks : (int)k == task;
    check(obm__sequence_new(m, route, OBM_F32, &b->s[b->n], &err), &err);
    for (int i = 0; i < FIRST; i++) ids[i] = (int32_t)((i * 37 + task + 3) % m->vocab);
    check(obm__prefill(m, b->s[b->n++], ids, FIRST, true, m->config.layers, NULL, NULL, &err), &err);
    obm_free(b->logits);
    b->logits = obm__alloc(b->n * (size_t)m->vocab, sizeof *b->logits);
    need(b->logits, "memory");
}

static void end_batch(batch *b) {
    for (size_t i = 0; i < b->n; i++) obm__sequence_free(b->m, b->s[i]);
    obm_free(b->logits);
    *b = (batch){0};
}

/* Seconds of one token for each sequence. */
static double step(batch *b) {
    obm__row rows[MAX_BATCH];
    size_t which[MAX_BATCH];
    obm_error err;
    double begin = seconds();
    for (size_t i = 0; i < b->n; i++) {
        check(obm__sequence_reserve(b->m, b->s[i], b->s[i]->length + 1, &err), &err);
        rows[i] = (obm__row){b->s[i], b->s[i]->length++, (int32_t)(b->s[i]->length % b->m->vocab)};
        which[i] = i;
    }
    check(obm__forward(b->m, rows, b->n, false, b->m->config.layers, &err), &err);
    check(obm__forward_logits(b->m, rows, which, b->n, b->logits, &err), &err);
    for (size_t i = 0; i < b->n; i++) (void)obm__argmax(b->m->ctx->k, b->logits + i * (size_t)b->m->vocab, b->m->vocab);
    return seconds() - begin;
}

static batch one(obm_model *m, int task) {
    batch b = {0};
    add_sequence(&b, m, task);
    return b;
}

/* Medians of the steps, and of the shares: the reference's seconds over the figure's, round by round. */
typedef struct figure {
    double took[MAX_ROUNDS], share[MAX_ROUNDS];
} figure;

static void note(figure *f, int round, double took, double reference) {
    f->took[round] = took;
    f->share[round] = reference / took;
}

static double fastest(const double *x, int n) {
    double least = x[0];
    for (int i = 1; i < n; i++) least = x[i] < least ? x[i] : least;
    return least;
}

/* Fastest against fastest: what is left of the share when other work gets no say. */
static double best_share(const figure *f, const figure *reference, int n) {
    return fastest(reference->took, n) / fastest(f->took, n);
}

/* ---- decode ---- */

/* Planes and masks that the first layer's queries read under the batch's route. */
static const obm__route_masks *masks_of(const batch *b) {
    return obm__weights_at(b->s[0]->weights, 0, OBM_Q)->terms->masks;
}

static void print_decode(const char *what, const batch *b, figure *f, const figure *base, int n) {
    double best = best_share(f, base, n);
    printf("decode    %s, %d planes in %d masks: %.1f tokens/s; share of base alone %.3f, best against best %.3f\n",
           what, masks_of(b)->n_planes, masks_of(b)->n, 1 / median(f->took, n), median(f->share, n), best);
}

/* Sequences keep the weights that they began with, whatever becomes of the settings. */
static batch start_decode(obm_pack *p, obm_model *m, double lambda, obm_reading reading) {
    batch b = {0};
    change_settings(p, lambda, reading);
    add_sequence(&b, m, 1);
    return b;
}

static void bench_decode(bench *b) {
    enum { BASE_ALONE, THREE, THREE_MATRIX, XORED, ONE, PACKED, THREE_PACKED, ONE_PACKED, KINDS };
    static const char *const what[KINDS] = {"",
                                            "lambda 0.3, row scales",
                                            "lambda 0.3, matrix scales",
                                            "lambda 0.3, row scales, recomputed",
                                            "lambda 0, row scales",
                                            "",
                                            "lambda 0.3, row scales, z12",
                                            "lambda 0, row scales, z12"};
    static figure read, all[KINDS];
    obm_pack *row = open_pack(b, "row", 3, 0.3), *matrix = open_pack(b, "matrix", 3, 0.3);
    obm_model *m = open_model(b, row, false), *other = open_model(b, matrix, false);
    obm_model *z12 = open_with(b, row, false, true);
    batch steps[KINDS] = {one(m, BASE),
                          start_decode(row, m, 0.3, OBM_READING_ONTO_BASE),
                          start_decode(matrix, other, 0.3, OBM_READING_ONTO_BASE),
                          start_decode(row, m, 0.3, OBM_READING_RECOMPUTED),
                          start_decode(row, m, 0, OBM_READING_ONTO_BASE),
                          one(z12, BASE),
                          start_decode(row, z12, 0.3, OBM_READING_ONTO_BASE),
                          start_decode(row, z12, 0, OBM_READING_ONTO_BASE)};
    mapping w = map_weights(b->base);
    read_seconds(b->ctx, &w, 1);
    for (int r = -2; r < b->rounds; r++) {
        int i = r < 0 ? 0 : r;
        double reading = read_seconds(b->ctx, &w, 1);
        note(&read, i, reading, 1);
        for (int k = 0; k < KINDS; k++) note(&all[k], i, step(&steps[k]), k ? all[BASE_ALONE].took[i] : reading);
    }
    printf("decode    bf16 base alone: %.1f tokens/s; %.0f MB of weights a step, read %.1f GB/s; share of read %.3f\n",
           1 / median(all[0].took, b->rounds), (double)w.size * 1e-6,
           (double)w.size / median(read.took, b->rounds) * 1e-9, median(all[0].share, b->rounds));
    printf("decode    z12 base alone: %.1f tokens/s; share of bf16 base alone %.3f, best against best %.3f\n",
           1 / median(all[PACKED].took, b->rounds), median(all[PACKED].share, b->rounds),
           best_share(&all[PACKED], &all[0], b->rounds));
    for (int k = 1; k < KINDS; k++)
        if (k != PACKED) print_decode(what[k], &steps[k], &all[k], &all[0], b->rounds);
    for (int k = 0; k < KINDS; k++) end_batch(&steps[k]);
    munmap((void *)w.data, w.size);
    obm_model_free(m), obm_model_free(other), obm_model_free(z12);
    obm_pack_free(row), obm_pack_free(matrix);
}

/* ---- several tasks in one batch ---- */

static void compare_batch(bench *b, int tasks, double lambda) {
    static figure together, apart, base;
    obm_pack *p = open_pack(b, "row", tasks, lambda);
    obm_model *m = open_model(b, p, false), *dense = open_model(b, p, true);
    batch all = {0}, turn[MAX_BATCH], plain = one(m, BASE);
    for (int k = 0; k < tasks; k++) {
        add_sequence(&all, m, k);
        turn[k] = one(dense, k);
    }
    for (int r = -1; r < b->rounds; r++) {
        double took = 0;
        for (int k = 0; k < tasks; k++) took += step(&turn[k]);
        note(&together, r < 0 ? 0 : r, step(&all), took);
        note(&apart, r < 0 ? 0 : r, took, 1);
        note(&base, r < 0 ? 0 : r, step(&plain), 1);
    }
    printf("batch     %d tasks, lambda %.1f: %.1f tokens/s in one batch on planes, %.1f in turn on %d materialised "
           "models (bf16 base alone %.1f): %.2fx, best against best %.2fx\n",
           tasks, lambda, tasks / median(together.took, b->rounds), tasks / median(apart.took, b->rounds), tasks,
           1 / median(base.took, b->rounds), median(together.share, b->rounds),
           best_share(&together, &apart, b->rounds));
    for (int k = 0; k < tasks; k++) end_batch(&turn[k]);
    end_batch(&all);
    end_batch(&plain);
    obm_model_free(m), obm_model_free(dense);
    obm_pack_free(p);
}

static void bench_batch(bench *b) {
    compare_batch(b, 4, 0);
    compare_batch(b, 4, 0.3);
    compare_batch(b, 8, 0);
    printf("batch     8 tasks, lambda 0.3: a route has more than %d masks, so every matrix is an overlay: as the "
           "materialised models\n",
           OBM_ROUTE_MASKS);
}

/* ---- prefill ---- */

static double prefill_seconds(obm_model *m, int task, const int32_t *ids) {
    double route[OBM_ROUTE_TASKS] = {0};
    obm__sequence *s;
    obm_error err;
    if (task >= 0) route[task] = 1;
    check(obm__sequence_new(m, task < 0 ? NULL : route, OBM_F32, &s, &err), &err);
    double begin = seconds();
    check(obm__prefill(m, s, ids, PROMPT, false, m->config.layers, NULL, NULL, &err), &err);
    double took = seconds() - begin;
    obm__sequence_free(m, s);
    return took;
}

static void bench_prefill(bench *b) {
    static figure base, three, alone;
    static int32_t ids[PROMPT];
    obm_pack *p = open_pack(b, "row", 3, 0.3), *other = open_pack(b, "row", 1, 0);
    obm_model *m = open_model(b, p, false), *single = open_model(b, other, false);
    uint32_t state = 7;
    int n = b->rounds < 7 ? b->rounds : 7;
    for (int i = 0; i < PROMPT; i++) ids[i] = (int32_t)((uniform(&state) + 0.5f) * (float)(b->s->vocab - 1));
    for (int r = -1; r < n; r++) {
        double plain = prefill_seconds(m, -1, ids);
        note(&base, r < 0 ? 0 : r, plain, 1);
        note(&three, r < 0 ? 0 : r, prefill_seconds(m, 1, ids), plain);
        note(&alone, r < 0 ? 0 : r, prefill_seconds(single, 0, ids), plain);
    }
    printf("prefill   %d tokens, bf16 base alone: %.0f tokens/s; with 3 planes: share %.3f; with 1 plane: "
           "share %.3f\n",
           PROMPT, PROMPT / median(base.took, n), median(three.share, n), median(alone.share, n));
    obm_model_free(m), obm_model_free(single);
    obm_pack_free(p), obm_pack_free(other);
}

/* ---- switching routes ---- */

#define SWITCHES 2000

typedef struct switcher {
    obm_model *m;
    obm__weights *held;
    double took[SWITCHES];
} switcher;

/* From the route that a sequence holds to another one. */
static double switch_to(switcher *s, const double *route) {
    obm__weights *next;
    obm_error err;
    double begin = seconds();
    check(obm__weights_acquire(s->m, route, &next, &err), &err);
    obm__weights_release(s->m, s->held);
    s->held = next;
    return seconds() - begin;
}

static void print_switches(switcher *s, const char *what, int n, uint64_t before) {
    obm_model_memory after;
    obm_model_account(s->m, &after);
    qsort(s->took, (size_t)n, sizeof *s->took, ascending);
    printf("switch    %s: p50 %.2f us, p99 %.2f us; weight bytes moved %llu\n", what, s->took[n / 2] * 1e6,
           s->took[n * 99 / 100] * 1e6, (unsigned long long)(after.overlays - before));
}

/* hard: between routes that have been used before; else every route is a new mixture of all tasks. */
static void time_switches(switcher *s, const char *what, size_t tasks, bool hard, int n) {
    uint32_t state = 11;
    obm_model_memory before;
    for (int warm = 1; warm >= 0; warm--) {
        obm_model_account(s->m, &before);
        for (int i = 0; i < n; i++) {
            double route[OBM_ROUTE_TASKS] = {0};
            for (size_t k = 0; k < tasks; k++) route[k] = hard ? k == (size_t)i % tasks : uniform(&state) + 0.6;
            s->took[i] = switch_to(s, route);
        }
    }
    print_switches(s, what, n, before.overlays);
}

static size_t count_routes(const obm_model *m) {
    size_t n = 0;
    for (const obm__weights *w = m->routes; w; w = w->next) n++;
    return n;
}

static void bench_switch_of(bench *b, const char *scale) {
    obm_pack *p = open_pack(b, scale, 3, 0.3);
    obm_error err;
    char what[64];
    static switcher s;
    s = (switcher){.m = open_model(b, p, false)};
    check(obm__weights_acquire(s.m, NULL, &s.held, &err), &err);
    snprintf(what, sizeof what, "%s scales, hard routes", scale);
    time_switches(&s, what, 3, true, SWITCHES);
    snprintf(what, sizeof what, "%s scales, soft routes never seen before", scale);
    time_switches(&s, what, 3, false, 300);
    snprintf(what, sizeof what, "%s scales, hard routes, %zu routes kept", scale, count_routes(s.m));
    time_switches(&s, what, 3, true, SWITCHES);
    obm__weights_release(s.m, s.held);
    obm_model_free(s.m);
    obm_pack_free(p);
}

static void bench_switch(bench *b) {
    bench_switch_of(b, "row");
    bench_switch_of(b, "matrix");
}

/* ---- memory ---- */

/* Resident pages of this process: anonymous memory and touched pages of files. */
static double resident(void) {
    char line[256];
    unsigned long kib = 0;
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    need(f, "/proc/self/smaps_rollup");
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "Rss: %lu kB", &kib) == 1) break;
    fclose(f);
    return (double)kib * 1024;
}

typedef struct usage {
    double resident, planes, kv; /* bytes */
    double step;                 /* seconds of a token of one request */
} usage;

/* A model of n tasks at lambda 0, `batched` of which have decoded together. */
static usage measure_tasks(bench *b, int n, size_t batched, int rounds) {
    double before = resident(), took[MAX_ROUNDS];
    obm_pack *p = open_pack(b, "row", n, 0);
    obm_model *m = open_model(b, p, false);
    batch all = {0};
    obm_model_memory account;
    for (size_t k = 0; k < batched; k++) add_sequence(&all, m, (int)k);
    for (int r = 0; r < 3; r++) step(&all);
    obm_model_account(m, &account);
    usage u = {resident() - before, (double)account.planes, (double)account.kv, 0};
    batch request = {.m = m, .s = {all.s[0]}, .n = 1, .logits = all.logits};
    for (int r = 0; r < rounds; r++) took[r] = step(&request);
    u.step = median(took, rounds);
    end_batch(&all);
    obm_model_free(m);
    obm_pack_free(p);
    return u;
}

static double base_bytes(const bench *b) {
    struct stat st;
    char path[128];
    join(path, sizeof path, b->base, "model.safetensors");
    need(!stat(path, &st), path);
    return (double)st.st_size;
}

static void print_memory(bench *b, int tasks) {
    usage u = measure_tasks(b, tasks, (size_t)tasks, 1);
    double base = base_bytes(b), allowed = base * (1 + tasks / 16.0) + base * 0.05;
    printf("memory    %d tasks, lambda 0, %d sequences in a batch: %.0f MB resident, of it %.0f MB planes and "
           "coefficients, %.0f MB KV; base %.0f MB; base * (1 + K/16) + 5%%: %.0f MB; used of that %.3f\n",
           tasks, tasks, u.resident * 1e-6, u.planes * 1e-6, u.kv * 1e-6, base * 1e-6, allowed * 1e-6,
           u.resident / allowed);
}

static void bench_memory_4(bench *b) { print_memory(b, 4); }
static void bench_memory_8(bench *b) { print_memory(b, 8); }

/* ---- loading ---- */

typedef struct repack {
    const obm_pack *pack;
    const obm_kernels *k;
    uint8_t *to;
    size_t bytes, *first; /* of a plane; (tensors) where it goes */
} repack;

static void repack_tensors(void *arg, size_t begin, size_t end, int worker) {
    const repack *j = arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        const obm__planes *p = &j->pack->experts[0].entries[t].planes;
        size_t stride = (size_t)p->row_bytes;
        for (int64_t row = 0; p->n && row < p->rows; row += OBM__PLANE_ROWS) {
            int64_t left = p->rows - row, n = left < OBM__PLANE_ROWS ? left : OBM__PLANE_ROWS;
            j->k->plane_repack(j->to + j->first[t] + (size_t)row * stride, p->signs[0] + (size_t)row * stride, stride,
                               (size_t)n, stride);
        }
    }
}

static void place_tensors(repack *j) {
    for (size_t t = 0; t < j->pack->n_tensors; t++) {
        const obm__planes *p = &j->pack->experts[0].entries[t].planes;
        j->first[t] = j->bytes;
        if (p->n) j->bytes += (size_t)((p->rows + 63) / 64 * 64 * p->row_bytes);
    }
}

static void bench_load(bench *b) {
    double open[MAX_ROUNDS], fresh[MAX_ROUNDS], backed[MAX_ROUNDS], copy[MAX_ROUNDS], begin;
    obm_pack *p = open_pack(b, "row", 1, 0);
    repack j = {.pack = p, .k = b->ctx->k, .first = obm__alloc(p->n_tensors, sizeof *j.first)};
    int n = b->rounds < 15 ? b->rounds : 15;
    need(j.first, "memory");
    place_tensors(&j);
    for (int r = -1, i = 0; r < n; i = ++r < 0 ? 0 : r) {
        begin = seconds();
        obm_model *m = open_model(b, p, false);
        open[i] = seconds() - begin;
        obm_model_free(m);
        /* the kernel gives memory on the first touch: a mapping of its own, so that none is left from before */
        j.to = mmap(NULL, j.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        need(j.to != MAP_FAILED, "memory");
        begin = seconds();
        obm__parallel(b->ctx, p->n_tensors, 1, repack_tensors, &j);
        fresh[i] = seconds() - begin;
        begin = seconds();
        obm__parallel(b->ctx, p->n_tensors, 1, repack_tensors, &j);
        backed[i] = seconds() - begin;
        begin = seconds();
        memcpy(j.to, j.to + j.bytes / 2, j.bytes / 2);
        copy[i] = 2 * (seconds() - begin);
        munmap(j.to, j.bytes);
    }
    double gb = (double)j.bytes * 1e-9;
    printf(
        "load      one expert, %.1f MB of planes: opening a model on its pack %.1f ms; repack into new memory %.1f ms "
        "(%.2f GB/s), into backed memory %.1f ms (%.2f GB/s); memcpy by one thread %.2f GB/s\n",
        gb * 1e3, median(open, n) * 1e3, median(fresh, n) * 1e3, gb / median(fresh, n), median(backed, n) * 1e3,
        gb / median(backed, n), gb / median(copy, n));
    obm_free(j.first);
    obm_pack_free(p);
}

/* ---- many tasks on one base ---- */

static void bench_tasks(bench *b) {
    char path[128];
    double base = base_bytes(b);
    printf("tasks     n on one base at lambda 0, one request; n full models: computed, not loaded\n"
           "          n   resident MB   n full models MB   tokens/s   bf16 base alone\n");
    fflush(stdout);
    for (int n = 1; n <= b->tasks; n *= 2) {
        usage u = measure_tasks(b, n, 1, b->rounds);
        obm_pack *p = open_pack(b, "row", n, 0);
        obm_model *m = open_model(b, p, true);
        double took[MAX_ROUNDS];
        batch plain = one(m, BASE);
        for (int r = 0; r < b->rounds; r++) took[r] = step(&plain);
        printf("        %3d   %11.0f   %16.0f   %8.1f   %15.1f\n", n, u.resident * 1e-6, n * base * 1e-6, 1 / u.step,
               1 / median(took, b->rounds));
        fflush(stdout);
        end_batch(&plain);
        obm_model_free(m);
        obm_pack_free(p);
        pack_path(b, "row", n, path, sizeof path);
        if (n > 8) remove_folder(path);
    }
}

/* ---- main ---- */

static void prepare(bench *b) {
    make_seeds(b);
    print_head(b->ctx);
    printf("model     %s, bf16, %.0f MB; medians of %d interleaved rounds\n", b->s->name, base_bytes(b) * 1e-6,
           b->rounds);
}

/* In a process of its own, so that parts do not see each other's memory. */
static void in_child(bench *b, void (*part)(bench *b)) {
    int status;
    fflush(stdout);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (!child) {
        obm_context_options o = OBM_INIT(obm_context_options);
        obm_error err;
        o.threads = b->threads;
        check(obm_context_new(&o, &b->ctx, &err), &err);
        part(b);
        obm_context_free(b->ctx);
        fflush(stdout);
        _exit(0);
    }
    need(waitpid(child, &status, 0) == child, "waitpid");
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        remove_folder(b->dir);
        exit(1);
    }
}

static const struct part {
    const char *name;
    void (*run)(bench *b);
} parts[] = {{"decode", bench_decode}, {"batch", bench_batch},     {"prefill", bench_prefill},
             {"switch", bench_switch}, {"memory", bench_memory_4}, {"memory", bench_memory_8},
             {"load", bench_load},     {"tasks", bench_tasks}};

int main(int argc, char **argv) {
    bench b = {.rounds = (int)number(argc, argv, "--rounds", 41), .dir = "/tmp/obm-bench-XXXXXX"};
    const char *size = text(argc, argv, "--size", "0.4b"), *what = text(argc, argv, "--what", "all");
    bool known = !strcmp(what, "all");
    b.threads = (int)number(argc, argv, "--threads", 0);
    b.tasks = (int)number(argc, argv, "--tasks", 64);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!strcmp(shapes[i].name, size)) b.s = &shapes[i];
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) known |= !strcmp(parts[i].name, what);
    if (!b.s || !known || b.rounds < 7 || b.rounds > MAX_ROUNDS || b.tasks < 1 || b.tasks > OBM_ROUTE_TASKS)
        return fprintf(stderr,
                       "usage: %s [--what decode|batch|prefill|switch|memory|load|all|tasks] [--size tiny|0.1b|0.4b] "
                       "[--threads N] [--rounds 7..%d] [--tasks 1..%d]\n",
                       argv[0], MAX_ROUNDS, OBM_ROUTE_TASKS),
               2;
    need(mkdtemp(b.dir), b.dir);
    join(b.base, sizeof b.base, b.dir, "base");
    join(b.expert, sizeof b.expert, b.dir, "expert");
    in_child(&b, prepare);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strcmp(what, parts[i].name) || (!strcmp(what, "all") && strcmp(parts[i].name, "tasks")))
            in_child(&b, parts[i].run);
    remove_folder(b.dir);
    return 0;
}
