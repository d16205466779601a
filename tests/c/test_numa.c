/*
 * Models whose rows, planes and KV heads are spread over NUMA nodes: results equal those of one node to the bit, on
 * machines that hwloc makes up (HWLOC_SYNTHETIC).  There binding is refused, which must be said; real nodes are in
 * tests/numa.
 */
#include "planes_fixture.h"

#define N 70

static obm_error err;
static int warnings;
static char last_warning[512];

static void count_warning(void *user, const char *message) {
    (void)user;
    warnings++;
    snprintf(last_warning, sizeof last_warning, "%s", message);
}

/* HWLOC_SYNTHETIC NULL: this machine. */
static obm_context *open_context(const char *machine, obm_numa numa, int threads) {
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_context *ctx;
    o.numa = numa;
    o.threads = threads;
    o.log = count_warning;
    if (machine) setenv("HWLOC_SYNTHETIC", machine, 1);
    obm_status status = obm_context_new(&o, &ctx, &err);
    unsetenv("HWLOC_SYNTHETIC");
    if (status != OBM_OK) fail_msg("%s: %s", machine, err.message);
    return ctx;
}

static world w;
enum { RUNS = 6 };
static float *expected[RUNS]; /* all and decoded, of the base alone and of a route; one far away; one of products of bf16 */

static size_t size_of(int which) { return (size_t)(which % 2 || which == 4 ? 1 : N) * (size_t)w.c.vocab * sizeof(float); }

static void run(const char *path, obm_context *ctx, bool z12, obm_dtype kv, float **out) {
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_run_options r = OBM_INIT(obm_run_options);
    obm_model *m;
    const double route[] = {0.7, 0.3};
    o.z12 = z12 ? OBM_Z12_ON : OBM_Z12_OFF;
    o.kv = r.kv = kv;
    if (obm_model_open(ctx, path, &o, &m, &err) != OBM_OK) fail_msg("%s", err.message);
    for (int routed = 0; routed < 2; routed++) {
        r.route = routed ? route : NULL;
        r.all = true, r.decode = false;
        assert_int_equal(obm_model_logits(m, w.ids, N, &r, out[routed * 2], &err), OBM_OK);
        r.all = false, r.decode = true;
        assert_int_equal(obm_model_logits(m, w.ids, 5, &r, out[routed * 2 + 1], &err), OBM_OK);
    }
    assert_int_equal(run_far(m, kv, 7, NULL, out[4], &err), OBM_OK);
    assert_int_equal(run_pairs(m, w.ids, N, out[5], &err), OBM_OK);
    obm_model_free(m);
}

static void compare(const char *machine, obm_numa numa, int threads, bool z12, obm_dtype kv) {
    float *got[RUNS];
    obm_context *ctx = open_context(machine, numa, threads);
    warnings = 0;
    for (int i = 0; i < RUNS; i++) got[i] = calloc(1, size_of(i));
    run(w.pack_dir, ctx, z12, kv, got);
    for (int i = 0; i < RUNS; i++) {
        if (memcmp(got[i], expected[i], size_of(i)))
            fail_msg("%s, numa %d, %d threads, z12 %d: logits %d differ", machine, numa, threads, z12, i);
        free(got[i]);
    }
    bool spread = ctx->workers.numa != OBM_NUMA_OFF;
    assert_int_equal(warnings, spread ? 2 : 0); /* memory and threads, once each */
    obm_context_free(ctx);
}

static int setup(void **state) {
    (void)state;
    w = (world){.c = {"llama", 450, 256, 320, 2, 8, 4, 32, 0, 1, OBM_BF16, 11, NULL}, .tasks = 2};
    w.spec[0] = (expert_spec){.policy = "linear", .scale = "row"};
    w.spec[1] = (expert_spec){.policy = "attention", .scale = "matrix"};
    open_world(&w, 1);
    for (int i = 0; i < RUNS; i++) expected[i] = calloc(1, size_of(i));
    return 0;
}

static int teardown(void **state) {
    (void)state;
    for (int i = 0; i < RUNS; i++) free(expected[i]);
    close_world(&w);
    return 0;
}

static void reference(bool z12, obm_dtype kv) {
    obm_context *ctx = open_context(NULL, OBM_NUMA_OFF, 1);
    run(w.pack_dir, ctx, z12, kv, expected);
    assert_true(memcmp(expected[5], expected[0] + (N - 1) * w.c.vocab, size_of(5))); /* bf16 rounds otherwise */
    obm_context_free(ctx);
}

static void same_logits(void **state) {
    (void)state;
    reference(false, OBM_F32);
    const char *machines[] = {"numa:1 core:4 pu:1", "numa:2 core:2 pu:2", "numa:4 core:1 pu:1", "numa:5 core:1 pu:1"};
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++)
        compare(machines[i], OBM_NUMA_SHARD, 0, false, OBM_F32);
    compare(machines[2], OBM_NUMA_AUTO, 0, false, OBM_F32); /* small: one node */
    compare(machines[1], OBM_NUMA_INTERLEAVE, 0, false, OBM_F32);
    compare(machines[1], OBM_NUMA_ISOLATE, 0, false, OBM_F32);
    compare(machines[1], OBM_NUMA_OFF, 0, false, OBM_F32);
    compare(machines[1], OBM_NUMA_SHARD, 3, false, OBM_F32);
    compare(machines[1], OBM_NUMA_SHARD, 1, false, OBM_F32); /* no worker on the other node: no rows there */
    compare(machines[2], OBM_NUMA_SHARD, 7, false, OBM_F32);
    compare(machines[2], OBM_NUMA_SHARD, 0, true, OBM_F32);
    compare(machines[1], OBM_NUMA_REPLICATE, 0, false, OBM_F32);
    compare(machines[3], OBM_NUMA_REPLICATE, 7, true, OBM_F32);
}

static void half_cache(void **state) {
    (void)state;
    reference(false, OBM_F16);
    compare("numa:4 core:1 pu:1", OBM_NUMA_SHARD, 0, false, OBM_F16);
    compare("numa:2 core:1 pu:1", OBM_NUMA_ISOLATE, 0, true, OBM_F16);
}

static void modes(void **state) {
    (void)state;
    obm_context *ctx = open_context("numa:2 core:2 pu:1", OBM_NUMA_AUTO, 0);
    assert_int_equal(ctx->workers.numa, OBM_NUMA_AUTO);
    assert_int_equal(ctx->threads, 4);
    obm_context_free(ctx);
    setenv("ONEBITMERGE_NUMA", "isolate", 1);
    ctx = open_context("numa:2 core:2 pu:1", OBM_NUMA_AUTO, 0);
    assert_int_equal(ctx->workers.numa, OBM_NUMA_ISOLATE);
    assert_int_equal(ctx->threads, 2);
    obm_context_free(ctx);
    setenv("ONEBITMERGE_NUMA", "both", 1);
    assert_int_equal(obm_context_new(NULL, &ctx, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "ONEBITMERGE_NUMA: expected auto, shard"));
    unsetenv("ONEBITMERGE_NUMA");
    ctx = open_context("numa:2 core:2 pu:1", OBM_NUMA_REPLICATE, 0);
    assert_int_equal(ctx->workers.numa, OBM_NUMA_REPLICATE);
    obm_context_free(ctx);
    ctx = open_context("numa:1 core:2 pu:1", OBM_NUMA_REPLICATE, 0);
    assert_int_equal(ctx->workers.numa, OBM_NUMA_OFF);
    obm_context_free(ctx);
    obm_context_options o = OBM_INIT(obm_context_options);
    o.numa = (obm_numa)17;
    assert_int_equal(obm_context_new(&o, &ctx, &err), OBM_E_ARG);
}

/* ---- copies ---- */

/* Who reads which copy cannot be seen in logits; that runs read only a node's own can: the others' are overwritten. */
static void copies(void **state) {
    (void)state;
    obm_context *ctx = open_context("numa:3 core:1 pu:1", OBM_NUMA_REPLICATE, 1); /* the caller, at home */
    obm_model *m;
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_run_options r = OBM_INIT(obm_run_options);
    const double route[] = {0.7, 0.3};
    float *got = malloc(size_of(2));
    reference(true, OBM_F32);
    o.z12 = OBM_Z12_ON;
    r.kv = OBM_F32, r.all = true, r.route = route;
    assert_int_equal(obm_model_open(ctx, w.pack_dir, &o, &m, &err), OBM_OK);
    int found = 0;
    for (obm__region *at = m->regions; at; at = at->next, found++) {
        assert_int_equal(at->copies, 3);
        for (int i = 0; i < 3; i++)
            if (i != m->placement->home)
                memset((char *)at->data + obm__place_near_node(m, at->bytes, i), 0xa5, at->bytes);
    }
    assert_true(found > 20);
    assert_int_equal(obm_model_logits(m, w.ids, N, &r, got, &err), OBM_OK);
    assert_memory_equal(got, expected[2], size_of(2));
    /* and the other way round: the caller is moved to another node */
    ctx->workers.at[0].node = (m->placement->home + 1) % 3;
    assert_int_equal(obm_model_logits(m, w.ids, N, &r, got, &err), OBM_OK);
    assert_true(memcmp(got, expected[2], size_of(2)));
    obm_model_free(m);
    obm_context_free(ctx);
    free(got);
}

/* Base and planes of machines with one, two and three readers; 2 bytes a weight, a bit a sign of two experts. */
static void account(void **state) {
    (void)state;
    uint64_t layer = (8 + 4 + 4 + 8) * 32 * 256 + 3 * 320 * 256, attention = (8 + 4 + 4 + 8) * 32 * 256;
    uint64_t weights = 2 * (2 * layer + 450 * 256), signs = 2 * (layer + attention) / 8;
    obm_model_memory one, m[3];
    for (int readers = 0; readers <= 3; readers++) {
        obm_context *ctx =
            open_context(readers ? "numa:3 core:1 pu:1" : NULL, readers ? OBM_NUMA_REPLICATE : OBM_NUMA_OFF, readers);
        obm_model *model;
        assert_int_equal(obm_model_open(ctx, w.pack_dir, NULL, &model, &err), OBM_OK);
        obm_model_account(model, readers ? &m[readers - 1] : &one);
        obm_model_free(model);
        obm_context_free(ctx);
    }
    for (uint64_t i = 0; i < 3; i++) {
        assert_int_equal(m[i].base, one.base + i * weights);
        assert_int_equal(m[i].planes, one.planes + i * signs);
    }
}

/* ---- overlays ---- */

static void check_overlays(const obm_model *m) {
    const obm__placement *p = m->placement;
    int found = 0;
    for (const obm__overlay *o = m->overlays; o; o = o->next, found++) {
        const obm__matrix *x = &o->matrix;
        size_t row = (size_t)x->cols * obm_dtype_size(x->dtype);
        assert_ptr_equal(o->region->data, x->data);
        assert_int_equal(o->region->bytes, (size_t)x->rows * row);
        assert_int_equal(o->region->copies, 1);
        bool cut = false; /* as one of the kinds is */
        for (int kind = 0; kind < OBM_KINDS; kind++) {
            bool same = x->rows == p->rows[kind][p->nodes];
            for (int i = 0; i <= p->nodes; i++) same = same && o->region->at[i] == (size_t)p->rows[kind][i] * row;
            cut = cut || same;
        }
        assert_true(obm__placement_cuts(p) ? cut && !o->region->shared : o->region->shared);
    }
    assert_true(found >= 14);
}

static float *run_materialised(const char *machine, obm_numa numa) {
    obm_context *ctx = open_context(machine, numa, 0);
    obm_model *m;
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_run_options r = OBM_INIT(obm_run_options);
    const double route[] = {0.7, 0.3};
    float *out = calloc(1, size_of(2));
    o.materialise = true;
    r.kv = OBM_F32, r.all = true, r.route = route;
    assert_int_equal(obm_model_open(ctx, w.pack_dir, &o, &m, &err), OBM_OK);
    assert_int_equal(obm_model_logits(m, w.ids, N, &r, out, &err), OBM_OK);
    if (m->placement)
        check_overlays(m);
    else
        for (const obm__overlay *at = m->overlays; at; at = at->next) assert_null(at->region);
    obm_model_free(m);
    obm_context_free(ctx);
    return out;
}

/* Matrices that a route makes lie where their rows are read, as the base's do; where rows are anybody's, spread. */
static void overlays(void **state) {
    (void)state;
    static const obm_numa modes[] = {OBM_NUMA_SHARD, OBM_NUMA_ISOLATE, OBM_NUMA_REPLICATE, OBM_NUMA_INTERLEAVE};
    float *plain = run_materialised(NULL, OBM_NUMA_OFF);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        float *got = run_materialised("numa:3 core:1 pu:1", modes[i]);
        assert_memory_equal(got, plain, size_of(2));
        free(got);
    }
    free(plain);
}

/* ---- merges and packs ---- */

static void merge_there(obm_context *ctx, const char *method, char **bytes, size_t *size) {
    char recipe[1024], *out = tiny_folder();
    obm_merge_options o = OBM_INIT(obm_merge_options);
    o.overwrite = true;
    snprintf(recipe, sizeof recipe,
             "merge_method: %s\nbase_model: %s\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 0.5}\n", method,
             w.dir[0], w.dir[1], w.dir[2]);
    if (obm_merge(ctx, recipe, &o, out, NULL, &err)) fail_msg("%s: %s", method, err.message);
    char *path = obm__path_join(out, "model.safetensors");
    assert_int_equal(obm__file_read(path, bytes, size, &err), OBM_OK);
    obm_free(path);
    remove_folder(out);
}

/* Workers' scratch is mapped for nodes, and kept for the next pass; the bytes are those of one node. */
static void merges(void **state) {
    (void)state;
    enum { METHODS = 4 };
    static const char *const methods[METHODS] = {"ties", "della", "tsvm", "pcb"};
    obm_context *one = open_context(NULL, OBM_NUMA_OFF, 2), *two = open_context("numa:2 core:2 pu:1", OBM_NUMA_SHARD, 0);
    for (size_t i = 0; i < METHODS; i++) {
        char *want, *got;
        size_t n, m;
        merge_there(one, methods[i], &want, &n);
        merge_there(two, methods[i], &got, &m);
        assert_int_equal(n, m);
        assert_memory_equal(want, got, n);
        obm_free(want), obm_free(got);
    }
    assert_null(one->spare_desks);
    assert_non_null(two->spare_desks);
    obm_context_free(one);
    obm_context_free(two);
}

static void desks(void **state) {
    (void)state;
    obm_context *ctx = open_context("numa:2 core:2 pu:1", OBM_NUMA_SHARD, 0);
    size_t page = obm__whole_pages(1);
    char *a = obm__desks_new(ctx, 2 * page), *b = obm__desks_new(ctx, 2 * page);
    assert_true(a && b && a != b && (uintptr_t)a % page == 0);
    memset(a, 1, 4 * 2 * page), memset(b, 2, 4 * 2 * page); /* four workers */
    obm__desks_free(ctx, b);
    obm__desks_free(ctx, a);
    assert_ptr_equal(obm__desks_new(ctx, 2 * page), a); /* the last that came back */
    obm__desks_free(ctx, a);
    b = obm__desks_new(ctx, page); /* of another size */
    memset(b, 3, 4 * page);
    obm__desks_free(ctx, b);
    obm__desks_free(ctx, NULL);
    assert_null(obm__desks_new(ctx, SIZE_MAX / page * page));
    obm_context_free(ctx);
}

/* ---- the pool ---- */

static _Atomic int taken[300];

static void take(void *arg, size_t begin, size_t end, int worker) {
    (void)arg, (void)worker;
    for (size_t i = begin; i < end; i++) taken[i]++;
}

/* Every item of every lane once, also of lanes that nobody works in and of many jobs one after the other. */
static void lanes(void **state) {
    (void)state;
    const char *machines[] = {"numa:2 core:2 pu:1", "numa:4 core:1 pu:1", "numa:3 core:2 pu:1"};
    for (int round = 0; round < 300; round++) {
        static obm_context *ctx;
        if (round % 100 == 0) ctx = open_context(machines[round / 100], OBM_NUMA_SHARD, 0);
        obm__lanes s = {.n = obm__topology_machine(ctx->topology)->n_nodes};
        for (int i = 0; i < s.n; i++) {
            s.begin[i] = i ? s.end[i - 1] : (size_t)(round % 3);
            s.end[i] = s.begin[i] + (size_t)((round * 7 + i * 13) % 60);
        }
        memset((void *)taken, 0, sizeof taken);
        assert_int_equal(obm__parallel_parts(ctx, &s, 3, 1 + (size_t)(round % 4), take, NULL, NULL, &err), OBM_OK);
        for (size_t i = 0; i < 300; i++) assert_int_equal(taken[i], i >= s.begin[0] && i < s.end[s.n - 1]);
        obm__parallel(ctx, 200, 3, take, NULL);
        obm__lanes any = {.n = 1, .begin = {50}, .end = {250}};
        assert_int_equal(obm__parallel_parts(ctx, &any, 7, 3, take, NULL, NULL, &err), OBM_OK);
        for (size_t i = 0; i < 300; i++)
            assert_int_equal(taken[i], (i >= s.begin[0] && i < s.end[s.n - 1]) + (i < 200) + (i >= 50 && i < 250));
        if (round % 100 == 99) obm_context_free(ctx);
    }
}

/* ---- what this machine can say ---- */

static void verify(void **state) {
    (void)state;
    obm_context *ctx = open_context("numa:2 core:1 pu:1", OBM_NUMA_SHARD, 0);
    obm_model *m;
    char *json = NULL;
    assert_int_equal(obm_model_open(ctx, w.pack_dir, NULL, &m, &err), OBM_OK);
    assert_non_null(strstr(last_warning, "numa shard: "));
    assert_int_equal(obm_model_verify_placement(m, &json, &err), OBM_E_IO); /* made-up nodes have no pages */
    assert_non_null(strstr(err.message, "does not say where pages are"));
    assert_null(json);
    obm_model_free(m);
    obm_context_free(ctx);
    ctx = open_context(NULL, OBM_NUMA_OFF, 0);
    assert_int_equal(obm_model_open(ctx, w.pack_dir, NULL, &m, &err), OBM_OK);
    assert_int_equal(obm_model_verify_placement(m, &json, &err), OBM_OK);
    assert_string_equal(json, "{\"numa\": \"off\", \"bound\": false, \"remote_bytes\": null}");
    obm_free(json);
    obm_model_free(m);
    obm_context_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_logits), cmocka_unit_test(half_cache), cmocka_unit_test(modes), cmocka_unit_test(copies),
        cmocka_unit_test(account),     cmocka_unit_test(overlays),   cmocka_unit_test(lanes), cmocka_unit_test(verify),
        cmocka_unit_test(merges),      cmocka_unit_test(desks)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
