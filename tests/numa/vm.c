/*
 * /init of a virtual machine with one, two or four NUMA nodes (tests/numa/run.sh): opens a pack in every mode and looks
 * at each page of its weights, planes and cache, at the workers' nodes, at their scratch in merges and in compressing, at
 * what happens where binding is refused, and at the logits, which have to be those of one thread.  Prints a hash of them,
 * which the machines have in common, and PASSED or what is wrong.
 */
#include "../c/planes_fixture.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/mempolicy.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define N 20   /* arithmetic is emulated: every token counts */
#define RUNS 6 /* base and route, prompt and token by token; far away; a prompt in products of bf16 */

static obm_error err;
static int bad;
static char warnings[2048];

#define CHECK(what, ...)                                \
    do {                                                \
        if (what) break;                                \
        bad++;                                          \
        printf("numa: line %d: %s: ", __LINE__, #what); \
        printf(__VA_ARGS__);                            \
        printf("\n");                                   \
    } while (0)

static void keep_warning(void *user, const char *message) {
    size_t n = strlen(warnings);
    (void)user;
    snprintf(warnings + n, sizeof warnings - n, "%s\n", message);
}

static world w;
static int nodes; /* of the machine */
static float *expected[RUNS];

static size_t size_of(int which) { return (size_t)(which % 2 || which == 4 ? 1 : N) * (size_t)w.c.vocab * sizeof(float); }

static obm_context *open_context(obm_numa numa, int threads) {
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_context *ctx = NULL;
    o.numa = numa;
    o.threads = threads;
    o.log = keep_warning;
    warnings[0] = 0;
    if (obm_context_new(&o, &ctx, &err)) printf("numa: context: %s\n", err.message), bad++;
    return ctx;
}

static int far_pages;
static void look_at_far(const obm_model *m, const obm__sequence *s);

static void run(obm_model *m, float **out) {
    obm_run_options r = OBM_INIT(obm_run_options);
    const double route[] = {0.7, 0.3};
    for (int i = 0; i < 4; i++) {
        r.route = i / 2 ? route : NULL;
        r.decode = i % 2;
        r.all = !r.decode;
        CHECK(!obm_model_logits(m, w.ids, r.decode ? 4 : N, &r, out[i], &err), "%s", err.message);
    }
    far_pages = 0;
    CHECK(!run_far(m, OBM_F16, 7, look_at_far, out[4], &err), "%s", err.message);
    CHECK(!run_pairs(m, w.ids, N, out[5], &err), "%s", err.message);
}

static void compare(obm_model *m, const char *what) {
    float *got[RUNS];
    for (int i = 0; i < RUNS; i++) got[i] = calloc(1, size_of(i));
    run(m, got);
    for (int i = 0; i < RUNS; i++) {
        CHECK(!memcmp(got[i], expected[i], size_of(i)), "%s: logits %d", what, i);
        free(got[i]);
    }
}

static uint64_t hash_logits(void) { /* FNV-1a */
    uint64_t h = 0xcbf29ce484222325u;
    for (int i = 0; i < RUNS; i++)
        for (size_t b = 0; b < size_of(i); b++) h = (h ^ ((uint8_t *)expected[i])[b]) * 0x100000001b3u;
    return h;
}

static obm_model *open_model_in(obm_context *ctx, bool z12) {
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m = NULL;
    o.z12 = z12 ? OBM_Z12_ON : OBM_Z12_OFF;
    CHECK(!obm_model_open(ctx, w.pack_dir, &o, &m, &err), "%s", err.message);
    return m;
}

/* ---- pages ---- */

/* The kernel's answer, without the library's help. */
static int node_of(const void *page) {
    int status = -1;
    void *at = (void *)((uintptr_t)page & ~(uintptr_t)4095);
    return syscall(SYS_move_pages, 0, 1UL, &at, NULL, &status, 0) ? -1000 : status;
}

static int os_node(const obm_model *m, int i) { return (int)obm__topology_machine(m->ctx->topology)->nodes[i].os; }

/* Every page of [data, data + bytes) is on one node; pages that the range shares with a neighbour are not looked at. */
static int check_pages(const obm_model *m, const char *data, size_t bytes, int node, const char *what) {
    int n = 0;
    uintptr_t from = ((uintptr_t)data + 4095) & ~(uintptr_t)4095, to = ((uintptr_t)data + bytes) & ~(uintptr_t)4095;
    for (; from < to; from += 4096, n++)
        CHECK(node_of((void *)from) == os_node(m, node), "%s: page on %d, its reader on %d", what,
              node_of((void *)from), os_node(m, node));
    return n;
}

/* The rows of every matrix by the plan, slab by slab. */
static int check_rows(const obm_model *m) {
    int pages = 0;
    const obm__placement *p = m->placement;
    for (size_t i = 0; i < obm__matrix_count(m); i++) {
        int64_t layer;
        obm__role role = obm__matrix_role(m, i, &layer);
        const obm__matrix *x = obm__weights_at(m->base_alone, layer, role);
        const obm__signs *s = obm__signs_of(m, layer, role);
        const int64_t *rows = p->rows[obm__role_kind(role)];
        for (int node = 0; node < p->nodes; node++) {
            size_t row = (size_t)x->cols * 2, first = (size_t)rows[node], n = (size_t)(rows[node + 1] - rows[node]);
            if (!n) continue;
            if (!x->z12)
                pages += check_pages(m, (const char *)x->data + first * row, n * row, node, "weights");
            else
                pages += check_pages(m, (char *)x->z12->codes + first / 4 * x->z12->blocks * 384,
                                     n / 4 * x->z12->blocks * 384, node, "z12");
            if (!s) continue;
            size_t block = s->n * (size_t)s->row_bytes * 64;
            pages += check_pages(m, (char *)s->blocks + first / 64 * block, (n + 63) / 64 * block, node, "planes");
        }
    }
    return pages;
}

/* What a route makes: cut as the matrices of the base are, or spread. */
static int check_overlays(const obm_model *m) {
    int pages = 0;
    for (const obm__overlay *o = m->overlays; o; o = o->next)
        for (int node = 0; !o->region->shared && node < m->placement->nodes; node++)
            pages += check_pages(m, (const char *)o->region->data + o->region->at[node],
                                 o->region->at[node + 1] - o->region->at[node], node, "overlay");
    return pages;
}

/* One copy for each node, equal to the others, on it. */
static int check_copies(const obm_model *m) {
    int pages = 0;
    for (const obm__region *r = m->regions; r; r = r->next)
        for (int node = 0; node < m->placement->nodes; node++) {
            const char *copy = (const char *)r->data + obm__place_near_node(m, r->bytes, node);
            pages += check_pages(m, copy, r->bytes, node, "copy");
            CHECK(!memcmp(copy, r->data, r->bytes), "copies differ");
        }
    return pages;
}

static int check_sequence(const obm_model *m, const obm__sequence *s) {
    const obm__placement *p = m->placement;
    size_t size = OBM_TILE_TOKENS * (size_t)m->config.head_dim * obm_dtype_size(s->kv);
    int pages = 0;
    for (size_t page = 0; page < s->n_pages; page++)
        for (int node = 0; node < p->nodes; node++)
            for (int64_t head = p->heads[node]; head < p->heads[node + 1]; head++)
                for (int64_t layer = 0; layer < m->config.layers; layer++)
                    for (int which = 0; which < 2; which++)
                        pages += check_pages(m, obm__kv_at(m, s, (int64_t)page, layer, which, head), size, node, "cache");
    return pages;
}

static void look_at_far(const obm_model *m, const obm__sequence *s) {
    bool bound = m->placement && obm__placement_local(m->placement) && !m->bind_refused;
    if (bound) far_pages = check_sequence(m, s);
}

static int check_cache(obm_model *m) {
    obm__sequence *s = NULL;
    obm__pulse pulse = {0};
    CHECK(!obm__model_enter(m, &pulse, &err), "%s", err.message);
    CHECK(!obm__sequence_new(m, NULL, OBM_F32, &s, &err), "%s", err.message);
    CHECK(!obm__prefill(m, s, w.ids, OBM_TILE_TOKENS, false, m->config.layers, NULL, NULL, &err), "%s", err.message);
    int pages = check_sequence(m, s);
    obm__sequence_free(m, s);
    obm__model_leave(m);
    return pages;
}

/* ---- workers ---- */

static _Atomic int misplaced, seen[OBM_NODES], helped;
static const obm_context *asked;

/* Worker 0 is the caller; it may help another node, which is counted. */
static void where(void *arg, size_t begin, size_t end, int worker) {
    const obm__lanes *s = arg;
    unsigned cpu, node;
    syscall(SYS_getcpu, &cpu, &node, NULL);
    (void)end;
    for (int i = 0; i < s->n; i++) {
        if (begin < s->begin[i] || begin >= s->end[i]) continue;
        if (obm__topology_machine(asked->topology)->nodes[i].os != node) {
            if (worker)
                misplaced++;
            else
                helped++;
        } else
            seen[i]++;
    }
    usleep(2000);
}

static void check_workers(obm_context *ctx) {
    obm__lanes s = {.n = nodes};
    for (int i = 0; i < nodes; i++) s.begin[i] = (size_t)i * 100, s.end[i] = s.begin[i] + 100;
    asked = ctx;
    misplaced = helped = 0;
    memset((void *)seen, 0, sizeof seen);
    obm__parallel_lanes(ctx, &s, 1, where, &s);
    CHECK(!misplaced, "%d items by workers of another node", misplaced);
    for (int i = 0; i < nodes; i++) CHECK(seen[i] > 0 || !i, "node %d: no worker", i);
}

/* ---- modes ---- */

static void check_verify(obm_model *m, const char *expected_part, const char *what) {
    char *json = NULL;
    CHECK(!obm_model_verify_placement(m, &json, &err), "%s: %s", what, err.message);
    CHECK(json && strstr(json, expected_part), "%s: no %s in %s", what, expected_part, json);
    obm_free(json);
}

static void check_mode(obm_numa numa, int threads, bool z12) {
    char what[64];
    obm_context *ctx = open_context(numa, threads);
    obm_model *m = ctx ? open_model_in(ctx, z12) : NULL;
    if (!m) return;
    snprintf(what, sizeof what, "numa %s, %d threads%s", obm__numa_name(numa), ctx->threads, z12 ? ", z12" : "");
    CHECK(!warnings[0], "%s: %s", what, warnings);
    cpu_set_t before, after;
    sched_getaffinity(0, sizeof before, &before);
    compare(m, what);
    sched_getaffinity(0, sizeof after, &after);
    CHECK(CPU_EQUAL(&before, &after), "%s: the caller stayed bound", what);
    if (m->placement && obm__placement_local(m->placement)) {
        bool cut = obm__placement_cuts(m->placement);
        int rows = cut ? check_rows(m) : check_copies(m), cache = check_cache(m);
        CHECK(rows > 100 && cache >= 32, "%s: %d and %d pages", what, rows, cache);
        CHECK(far_pages >= FAR / 64 * 16, "%s: %d pages of a long cache", what, far_pages);
        check_verify(m, z12 && cut ? "\"bound\": true" : "\"remote_bytes\": 0}",
                     what); /* tables of z12 end inside pages */
        printf("numa: %s: %d pages of rows and %d of cache where their readers are\n", what, rows, cache + far_pages);
    }
    if (numa == OBM_NUMA_SHARD && !threads) check_workers(ctx);
    obm_model_free(m);
    obm_context_free(ctx);
}

static void check_materialised(void) {
    obm_context *ctx = open_context(OBM_NUMA_SHARD, 0);
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_run_options r = OBM_INIT(obm_run_options);
    const double route[] = {0.7, 0.3};
    obm_model *m = NULL;
    float *out = calloc(1, size_of(1));
    o.materialise = true;
    r.route = route;
    CHECK(ctx && !obm_model_open(ctx, w.pack_dir, &o, &m, &err), "%s", err.message);
    CHECK(m && !obm_model_logits(m, w.ids, 1, &r, out, &err), "%s", err.message);
    if (m && m->placement) {
        int pages = check_overlays(m);
        CHECK(pages > 100, "overlays: %d pages", pages);
        check_verify(m, "\"overlays\": {\"bytes\": ", "overlays");
        check_verify(m, "\"absent\": 0, \"remote_bytes\": 0}, \"kv\"", "overlays");
        printf("numa: shard, materialised: %d pages of overlays where their readers are\n", pages);
    }
    free(out);
    obm_model_free(m);
    obm_context_free(ctx);
}

static void check_interleave(void) {
    obm_context *ctx = open_context(OBM_NUMA_INTERLEAVE, 0);
    obm_model *m = ctx ? open_model_in(ctx, false) : NULL;
    int count[OBM_NODES] = {0}, pages = 0;
    if (!m) return;
    compare(m, "interleave");
    for (const obm__region *r = m->regions; r; r = r->next)
        for (size_t at = 0; at < r->bytes; at += 4096, pages++) {
            int node = node_of((char *)r->data + at);
            CHECK(node >= 0 && node < nodes, "page on %d", node);
            if (node >= 0) count[node]++;
        }
    for (int i = 0; i < nodes; i++)
        CHECK(count[i] * nodes > pages / 2, "interleave: %d of %d pages on node %d", count[i], pages, i);
    check_verify(m, "\"remote_bytes\": null", "interleave");
    obm_model_free(m);
    obm_context_free(ctx);
}

/* ---- merges and packs ---- */

/* Every page of scratch that a run touched is on the node of its worker; whose there are, by node. */
static int check_desks(const obm_context *ctx, const char *what, bool *seen) {
    const size_t *header = (const size_t *)(const void *)ctx->spare_desks; /* bytes of a worker, then of all */
    int touched = 0;
    CHECK(header, "%s: no scratch is kept", what);
    for (int i = 0; header && i < ctx->workers.n; i++) {
        const char *desk = (const char *)header + 4096 + (size_t)i * header[0];
        int own = ctx->workers.at[i].node, want = (int)obm__topology_machine(ctx->topology)->nodes[own].os;
        for (size_t at = 0; at < header[0]; at += 4096) {
            int node = node_of(desk + at);
            if (node == -ENOENT || node == -EFAULT) continue; /* nobody was here */
            touched++;
            seen[own] = true;
            CHECK(node == want, "%s: scratch of worker %d on %d, the worker on %d", what, i, node, want);
        }
    }
    return touched;
}

/* Models with an embedding of some work for everybody: a base and two of other seeds. */
static char *wide[3];

static void make_wide(void) {
    for (unsigned i = 0; i < 3; i++) {
        tiny c = w.c;
        tiny_weights weights;
        c.vocab = 6000;
        c.seed += i;
        tiny_weights_new(&c, &weights);
        wide[i] = tiny_folder();
        CHECK(!tiny_write(&c, &weights, wide[i], &err), "%s", err.message);
        tiny_weights_free(&weights);
    }
}

static void merge_in(obm_context *ctx, char **bytes, size_t *size) {
    char recipe[1024], *out = tiny_folder(), *path = obm__path_join(out, "model.safetensors");
    obm_merge_options o = OBM_INIT(obm_merge_options);
    snprintf(recipe, sizeof recipe,
             "merge_method: ties\nbase_model: %s\nmodels: [{model: %s}, {model: %s}]\n"
             "parameters: {weight: 0.5, density: 0.3}\n",
             wide[0], wide[1], wide[2]);
    o.overwrite = true;
    CHECK(!obm_merge(ctx, recipe, &o, out, NULL, &err), "%s", err.message);
    CHECK(!obm__file_read(path, bytes, size, &err), "%s", err.message);
    obm_free(path);
    remove_folder(out);
}

/* Of F32: what is less than 1 MiB is one worker's. */
static void pack_in(obm_context *ctx) {
    obm_expert expert = OBM_INIT(obm_expert);
    obm_compress_options o = OBM_INIT(obm_compress_options);
    tiny c = w.c;
    char *from = tiny_folder(), *out = tiny_folder();
    c.dtype = OBM_F32;
    CHECK(!tiny_write(&c, &w.expert[0], from, &err), "%s", err.message);
    expert.name = "chat";
    expert.path = from;
    o.overwrite = true;
    CHECK(!obm_compress(ctx, w.dir[0], &expert, 1, &o, out, NULL, NULL, &err), "%s", err.message);
    remove_folder(from);
    remove_folder(out);
}

/* A worker that wakes up late finds nothing left to do, so it may take some runs until each node has had some. */
static void check_scratch(bool packs) {
    const char *what = packs ? "compress" : "merge";
    obm_context *one = open_context(OBM_NUMA_OFF, 1), *all = open_context(OBM_NUMA_SHARD, 0);
    bool seen[OBM_NODES] = {false};
    int pages = 0, found = 0;
    for (int i = 0; one && all && i < 20 && found < nodes; i++) {
        char *want = NULL, *got = NULL;
        size_t n = 0, m = 0;
        if (packs) {
            pack_in(all);
        } else {
            merge_in(one, &want, &n);
            merge_in(all, &got, &m);
            CHECK(want && got && n == m && !memcmp(want, got, n), "merge: %zu and %zu bytes", n, m);
        }
        pages = check_desks(all, what, seen);
        found = 0;
        for (int node = 0; node < nodes; node++) found += seen[node];
        obm_free(want), obm_free(got);
    }
    CHECK(found == nodes, "%s: workers of %d nodes", what, found);
    printf("numa: %s: %d pages of scratch where their workers are\n", what, pages);
    obm_context_free(one);
    obm_context_free(all);
}

/* ---- refusals and limits, each in a process of its own ---- */

static void in_child(void (*fn)(void), const char *what) {
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        bad = 0;
        fn();
        fflush(stdout);
        _exit(bad ? 1 : 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0, "%s: status %d", what, status);
    if (!status) printf("numa: %s\n", what);
}

/* EPERM for one or two system calls, as container runtimes answer. */
static void forbid(int first, int second) {
    struct sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)first, 2, 0),
                                 BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)second, 1, 0),
                                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
                                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)};
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp: %s", strerror(errno));
}

static void without_mbind(void) {
    forbid(SYS_mbind, SYS_set_mempolicy);
    obm_context *ctx = open_context(OBM_NUMA_SHARD, 0);
    obm_model *m = open_model_in(ctx, false);
    CHECK(!strcmp(warnings,
                  "numa shard: memory cannot be bound to nodes here (Operation not permitted): pages lie where they "
                  "are touched first\n"),
          "%s", warnings);
    compare(m, "without mbind");
    check_verify(m, "\"bound\": false", "without mbind");
    obm_model_free(m);
    obm_context_free(ctx);
}

static void without_affinity(void) {
    forbid(SYS_sched_setaffinity, SYS_sched_setaffinity);
    obm_context *ctx = open_context(OBM_NUMA_SHARD, 0);
    obm_model *m = open_model_in(ctx, false);
    CHECK(!strcmp(warnings, "numa shard: threads cannot be bound to cores here: rows may be read by another node's\n"),
          "%s", warnings);
    compare(m, "without sched_setaffinity");
    check_rows(m); /* memory is bound all the same */
    obm_model_free(m);
    obm_context_free(ctx);
}

static void without_move_pages(void) {
    forbid(SYS_move_pages, SYS_move_pages);
    obm_context *ctx = open_context(OBM_NUMA_SHARD, 0);
    obm_model *m = open_model_in(ctx, false);
    char *json = NULL;
    CHECK(obm_model_verify_placement(m, &json, &err) == OBM_E_IO, "%s", json);
    CHECK(strstr(err.message, "does not say where pages are: Operation not permitted"), "%s", err.message);
    obm_model_free(m);
    obm_context_free(ctx);
}

static void one_cpu(void) { /* taskset -c 0: no worker on other nodes */
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(0, &set);
    sched_setaffinity(0, sizeof set, &set);
    obm_context *ctx = open_context(OBM_NUMA_AUTO, 0);
    CHECK(ctx->threads == 1 && ctx->workers.numa == OBM_NUMA_OFF, "%d threads, %d", ctx->threads, ctx->workers.numa);
    obm_context_free(ctx);
    ctx = open_context(OBM_NUMA_SHARD, 0);
    CHECK(ctx->threads == 1 && ctx->workers.numa == OBM_NUMA_ISOLATE, "%d threads, %d", ctx->threads,
          ctx->workers.numa);
    obm_context_free(ctx);
}

static void one_memory(void) { /* numactl --membind 0 */
    unsigned long mask = 1;
    CHECK(!syscall(SYS_set_mempolicy, MPOL_BIND, &mask, 64), "%s", strerror(errno));
    obm_context *ctx = open_context(OBM_NUMA_SHARD, 0);
    CHECK(obm__topology_machine(ctx->topology)->n_nodes == 1 && ctx->workers.numa == OBM_NUMA_OFF, "%d nodes",
          obm__topology_machine(ctx->topology)->n_nodes);
    obm_context_free(ctx);
}

/* ---- the machine ---- */

/* Sizes whose slabs end at pages: 64 rows of 128 columns in bf16 are four, in four planes one. */
static void make_world(void) {
    w = (world){.c = {"llama", 450, 128, 256, 2, 4, 4, 32, 0, 1, OBM_BF16, 11, NULL}, .tasks = 2};
    w.spec[0] = (expert_spec){.policy = "linear", .scale = "row", .planes = 2};
    w.spec[1] = (expert_spec){.policy = "linear", .scale = "matrix", .planes = 2};
    open_world(&w, 1);
    for (int i = 0; i < RUNS; i++) expected[i] = calloc(1, size_of(i));
    obm_context *ctx = open_context(OBM_NUMA_OFF, 1);
    obm_model *m = open_model_in(ctx, false);
    run(m, expected);
    nodes = obm__topology_nodes(ctx->topology);
    obm_model_free(m);
    obm_context_free(ctx);
}

static void check_all(void) {
    obm_context *ctx = open_context(OBM_NUMA_AUTO, 0);
    obm_context_info info;
    obm_context_describe(ctx, &info);
    printf("numa: %s; %s\n", info.topology, info.isa);
    obm_context_free(ctx);
    for (int numa = OBM_NUMA_AUTO; numa <= OBM_NUMA_OFF; numa++) check_mode((obm_numa)numa, 0, false);
    check_mode(OBM_NUMA_SHARD, 0, true);
    check_mode(OBM_NUMA_REPLICATE, 0, true);
    if (nodes == 1) return;
    check_mode(OBM_NUMA_SHARD, nodes, false);
    check_materialised();
    check_interleave();
    make_wide();
    check_scratch(false);
    check_scratch(true);
    in_child(without_mbind, "refused mbind: reported, same logits");
    in_child(without_affinity, "refused sched_setaffinity: reported, same logits");
    in_child(without_move_pages, "refused move_pages: reported");
    in_child(one_cpu, "one cpu: one node");
    in_child(one_memory, "memory of one node: one node");
}

int main(void) {
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/tmp", 01777), mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL), mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL), mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    make_world();
    check_all();
    printf("numa: nodes %d, logits %016llx\n", nodes, (unsigned long long)hash_logits());
    printf("numa: %s\n", bad ? "FAILED" : "PASSED");
    fflush(stdout);
    if (getpid() == 1) reboot(RB_POWER_OFF);
    return bad != 0;
}
