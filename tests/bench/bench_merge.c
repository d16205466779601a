/* Static merges of three experts on synthetic models: the arithmetic alone, on tensors in memory, and whole merges from
 * files to a finished folder.  Every figure stands next to a bound measured in turn with it in the same run.
 *
 * Usage: bench_merge [--what compute|folders|all] [--size tiny|0.1b|0.35b] [--threads N] [--rounds N] [--only METHOD]
 */
#include "merge/merge.h"
#include "synthetic.h"

#include <malloc.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#define MAX_ROUNDS 99
#define EXPERTS 3
#define ROWS 2048
#define COLS 4096

static const shape shapes[] = {
    {"tiny", 768, 192, 384, 4, 6, 0},
    {"0.1b", 32000, 768, 2048, 12, 12, 0},
    {"0.35b", 32000, 1024, 2816, 24, 16, 0},
};

typedef struct recipe {
    const char *name, *method;
    obm_profile profile;
    bool base;
    double density; /* 0: the method has none */
} recipe;
static const recipe recipes[] = {
    {"linear", "linear", OBM_PROFILE_MERGEKIT, false, 0},
    {"task_arithmetic", "task_arithmetic", OBM_PROFILE_MERGEKIT, true, 0},
    {"ties", "ties", OBM_PROFILE_MERGEKIT, true, 0.2},
    {"ties (paper)", "ties", OBM_PROFILE_PAPER, true, 0.2},
    {"dare_ties", "dare_ties", OBM_PROFILE_MERGEKIT, true, 0.2},
    {"della", "della", OBM_PROFILE_MERGEKIT, true, 0.2},
};
#define RECIPES (sizeof recipes / sizeof *recipes)

typedef struct bench {
    obm_context *ctx;
    const shape *s;
    int rounds;
    const char *only;
    char dir[64];
} bench;

/* ---- fsync ---- */

/* The library's calls come here: what the disk makes of a folder says nothing about the library, so its share is taken
 * apart. */
static struct {
    bool skip;
    double seconds;
} syncing;
int fsync(int fd) {
    double begin = seconds();
    int failed = syncing.skip ? 0 : (int)syscall(SYS_fsync, fd);
    syncing.seconds += seconds() - begin;
    return failed;
}

/* ---- processor time and memory ---- */

/* Of all threads, in user and system: what a busy machine leaves comparable. */
static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static double anonymous_mb(void) {
    char line[128];
    long kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "RssAnon: %ld", &kb) == 1) break;
    if (f) fclose(f);
    return (double)kb * 1.024e-3;
}

static int watch_memory(void *user, const char *what, uint64_t done, uint64_t total) {
    double *peak = user, now = anonymous_mb();
    (void)what, (void)done, (void)total;
    if (now > *peak) *peak = now;
    return 0;
}

/* ---- the arithmetic ---- */

typedef struct copying {
    char *to;
    const char *from;
} copying;
static void copy_range(void *arg, size_t begin, size_t end, int worker) {
    const copying *c = arg;
    (void)worker;
    memcpy(c->to + begin, c->from + begin, end - begin);
}

static uint16_t *random_tensor(const uint16_t *base, float size, uint32_t seed) {
    uint16_t *t = obm__alloc((size_t)ROWS * COLS, sizeof *t);
    const obm_kernels *k = obm_kernels_find("scalar");
    need(t, "memory");
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++) {
        /* A sum of four is near enough to normal: thresholds then lie where there are many values. */
        float x = (uniform(&seed) + uniform(&seed) + uniform(&seed) + uniform(&seed)) * size, b = 0;
        if (base) k->bf16_to_f32(&b, base + i, 1);
        x += b;
        k->f32_to_bf16(t + i, &x, 1);
    }
    return t;
}

static size_t list_params(const recipe *r, obm_param *out) {
    size_t n = 0;
    out[n++] = (obm_param){"weight", -1, r->base ? 0.5 : 1.0};
    if (r->density > 0) out[n++] = (obm_param){"density", -1, r->density};
    return n;
}

static double compute_seconds(bench *b, const recipe *r, const obm_tensor *base, const obm_tensor *models, void *out,
                              double *cpu) {
    const obm__method *m;
    obm_error err;
    obm_param params[2];
    obm__steps steps;
    check(obm__method_find(r->method, &m, &err), &err);
    check(obm__steps_new(m, r->profile, EXPERTS, NULL, params, list_params(r, params), 0, &steps, &err), &err);
    obm__run run = {.ctx = b->ctx, .what = "merge"};
    obm__group g = {.name = "w", .base = r->base ? base : NULL, .models = models, .steps = &steps, .work = OBM_BF16};
    g.count = (uint64_t)ROWS * COLS;
    double begin = seconds(), cpu_begin = cpu_seconds();
    check(obm__statistics(&run, &g, 1, &err), &err);
    check(obm__group_run(&run, &g, 0, g.count, OBM_BF16, out, &err), &err);
    double took = seconds() - begin;
    *cpu = cpu_seconds() - cpu_begin;
    obm__group_clear(&g);
    obm__steps_free(&steps);
    return took;
}

static void bench_compute(bench *b) {
    const size_t n = (size_t)ROWS * COLS;
    obm_tensor base = {.dtype = OBM_BF16, .ndim = 2, .shape = {ROWS, COLS}}, models[EXPERTS];
    base.data = random_tensor(NULL, 0.08f, 1);
    for (int i = 0; i < EXPERTS; i++) {
        models[i] = base;
        models[i].data = random_tensor(base.data, 0.008f, (uint32_t)i + 2);
    }
    char *out = obm__calloc(n, 2), *copy = obm__calloc(n, 16);
    need(out && copy, "memory");
    memset(copy, 1, n * 16);
    for (size_t i = 0; i < RECIPES; i++) {
        const recipe *r = &recipes[i];
        double rate[MAX_ROUNDS], share[MAX_ROUNDS], cpu[MAX_ROUNDS], best = 0, used;
        /* Half of the bytes read and written, since a copy does both with each. */
        size_t bytes = n * (EXPERTS + r->base + 1);
        copying c = {copy + n * 8, copy};
        if (b->only && strcmp(b->only, r->method)) continue;
        for (int round = -1; round < b->rounds; round++) {
            double begin = seconds();
            obm__parallel(b->ctx, bytes, 1 << 18, copy_range, &c);
            double bound = seconds() - begin, took = compute_seconds(b, r, &base, models, out, &used);
            if (round < 0) continue;
            cpu[round] = used / (double)n * 1e9;
            rate[round] = (double)n / took * 1e-9;
            share[round] = bound / took;
            if (rate[round] > best) best = rate[round];
        }
        printf("compute   %-16s %.3f Gparam/s (best %.3f), %.2f core-ns a parameter; share of copying as many bytes "
               "%.3f\n",
               r->name, median(rate, b->rounds), best, median(cpu, b->rounds), median(share, b->rounds));
        fflush(stdout);
    }
    for (int i = 0; i < EXPERTS; i++) obm_free((void *)models[i].data);
    obm_free((void *)base.data);
    obm_free(out);
    obm_free(copy);
}

/* ---- folders ---- */

static void expert_dir(const bench *b, int i, char *out, size_t size) {
    snprintf(out, size, "%s/%s%d", b->dir, i ? "expert" : "base", i);
}

static void write_inputs(const bench *b) {
    char dir[96];
    for (int i = 0; i <= EXPERTS; i++) {
        expert_dir(b, i, dir, sizeof dir);
        write_expert(b->s, dir, i ? "" : NULL, (uint32_t)i);
    }
}

static char *recipe_text(const bench *b, const recipe *r) {
    static char text[2048];
    char dir[96];
    int used = snprintf(text, sizeof text, "merge_method: %s\nmodels:\n", r->method);
    for (int i = 1; i <= EXPERTS; i++) {
        expert_dir(b, i, dir, sizeof dir);
        used += snprintf(text + used, sizeof text - (size_t)used, "  - model: %s\n    parameters: {weight: %g", dir,
                         r->base ? 0.5 : 1.0);
        if (r->density > 0) used += snprintf(text + used, sizeof text - (size_t)used, ", density: %g", r->density);
        used += snprintf(text + used, sizeof text - (size_t)used, "}\n");
    }
    expert_dir(b, 0, dir, sizeof dir);
    if (r->base) used += snprintf(text + used, sizeof text - (size_t)used, "base_model: %s\n", dir);
    snprintf(text + used, sizeof text - (size_t)used, "dtype: bfloat16\n%s",
             r->profile == OBM_PROFILE_PAPER ? "profile: paper\n" : "");
    return text;
}

typedef struct file_copy {
    int fd;
    const char *data;
} file_copy;
static void write_range(void *arg, size_t begin, size_t end, int worker) {
    const file_copy *f = arg;
    (void)worker;
    for (ssize_t done; begin < end; begin += (size_t)done) {
        done = pwrite(f->fd, f->data + begin, end - begin, (off_t)begin);
        need(done > 0, "pwrite");
    }
}

/* What any program pays that reads the inputs from new mappings and leaves as much as one of them in a new file. */
static double copy_seconds(bench *b, bool base) {
    char dir[96], path[128];
    double begin = seconds();
    for (int i = 1; i < EXPERTS + base; i++) {
        expert_dir(b, i, dir, sizeof dir);
        fresh_read_seconds(b->ctx, dir);
    }
    expert_dir(b, 0, dir, sizeof dir);
    mapping m = map_weights(dir);
    snprintf(path, sizeof path, "%s/copy", b->dir);
    file_copy f = {open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644), m.data};
    need(f.fd >= 0, path);
    if (fallocate(f.fd, 0, 0, (off_t)m.size)) perror("fallocate"); /* slower without, but no less a copy */
    obm__parallel(b->ctx, m.size, 1 << 20, write_range, &f);
    close(f.fd);
    munmap((void *)m.data, m.size);
    double took = seconds() - begin;
    unlink(path);
    return took;
}

static double folder_seconds(bench *b, const recipe *r, const char *out, double *peak, double *cpu) {
    obm_merge_options o = OBM_INIT(obm_merge_options);
    obm_error err;
    malloc_trim(0);
    double before = anonymous_mb(), most = before;
    o.progress = watch_memory;
    o.progress_user = &most;
    syncing.seconds = 0;
    double begin = seconds(), cpu_begin = cpu_seconds();
    check(obm_merge(b->ctx, recipe_text(b, r), &o, out, NULL, &err), &err);
    double took = seconds() - begin;
    *cpu = cpu_seconds() - cpu_begin;
    if (most - before > *peak) *peak = most - before;
    remove_folder(out);
    return took;
}

static void bench_folders(bench *b, uint64_t file_bytes) {
    char out[96];
    snprintf(out, sizeof out, "%s/out", b->dir);
    for (size_t i = 0; i < RECIPES; i++) {
        const recipe *r = &recipes[i];
        double rate[MAX_ROUNDS], share[MAX_ROUNDS], sync[MAX_ROUNDS], whole[MAX_ROUNDS], cpu[MAX_ROUNDS];
        double best = 0, peak = 0, used;
        double bytes = (double)file_bytes * (EXPERTS + r->base + 1);
        if (b->only && strcmp(b->only, r->method)) continue;
        for (int round = -1; round < b->rounds; round++) {
            double bound = copy_seconds(b, r->base);
            syncing.skip = true;
            double took = folder_seconds(b, r, out, &peak, &used);
            if (round < 0) continue;
            cpu[round] = used / (double)file_bytes * 2e9;
            rate[round] = bytes / took * 1e-9;
            share[round] = bound / took;
            if (rate[round] > best) best = rate[round];
            syncing.skip = false;
            whole[round] = bytes / folder_seconds(b, r, out, &peak, &used) * 1e-9;
            sync[round] = syncing.seconds;
        }
        printf("folders   %-16s %.2f GB/s read and written (best %.2f), %.3f Gparam/s, %.2f core-ns a parameter; share "
               "of copying %.3f; with fsync %.2f GB/s (%.2f s of it); %.0f MB anonymous\n",
               r->name, median(rate, b->rounds), best, median(rate, b->rounds) * (double)file_bytes / bytes / 2,
               median(cpu, b->rounds), median(share, b->rounds), median(whole, b->rounds), median(sync, b->rounds),
               peak);
        fflush(stdout);
    }
}

/* ---- main ---- */

int main(int argc, char **argv) {
    bench b = {.rounds = (int)number(argc, argv, "--rounds", 7), .dir = "/tmp/obm-bench-XXXXXX"};
    const char *size = text(argc, argv, "--size", "0.1b"), *what = text(argc, argv, "--what", "all");
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_error err;
    b.only = text(argc, argv, "--only", NULL);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!strcmp(shapes[i].name, size)) b.s = &shapes[i];
    if (!b.s || b.rounds < 1 || b.rounds > MAX_ROUNDS || !strstr(" compute folders all ", what))
        return fprintf(stderr,
                       "usage: %s [--what compute|folders|all] [--size tiny|0.1b|0.35b] [--threads N] [--rounds 1..%d] "
                       "[--only METHOD]\n",
                       argv[0], MAX_ROUNDS),
               2;
    o.threads = (int)number(argc, argv, "--threads", 0);
    check(obm_context_new(&o, &b.ctx, &err), &err);
    print_head(b.ctx);
    printf("model     %s, bf16, %d experts; medians of %d interleaved rounds\n", b.s->name, EXPERTS, b.rounds);
    if (strcmp(what, "folders")) bench_compute(&b);
    if (strcmp(what, "compute")) {
        char base[96];
        need(mkdtemp(b.dir), b.dir);
        write_inputs(&b);
        expert_dir(&b, 0, base, sizeof base);
        mapping m = map_weights(base);
        munmap((void *)m.data, m.size);
        bench_folders(&b, m.size);
        remove_folder(b.dir);
    }
    obm_context_free(b.ctx);
    return 0;
}
