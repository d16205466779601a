/* Running on sign planes against the plain elementwise rule in f64, and against dense weights of the same route. */
#include "planes_fixture.h"

#define T 4
#define N_LAMBDAS 3
static const double lambdas[N_LAMBDAS] = {0, 0.3, 1};
static const obm_map_rule vocabulary_1bit[] = {{"model.embed_tokens.weight", OBM_MODE_1BIT},
                                               {"lm_head.weight", OBM_MODE_1BIT}};
static const obm_map_rule head_1bit[] = {{"lm_head.weight", OBM_MODE_1BIT}};
static const obm_map_rule embedding_1bit[] = {{"model.embed_tokens.weight", OBM_MODE_1BIT}};

static tiny odd_model(int tied, obm_dtype dtype) {
    return (tiny){"llama", 150, 70, 130, 2, 5, 5, 14, 0, tied, dtype, 3, NULL};
}

/* Base, hard, soft, soft that sums to 1.5, everything, the last expert. */
#define N_ROUTES 6
static void fill_routes(int tasks, double route[N_ROUTES][MAX_TASKS]) {
    memset(route, 0, N_ROUTES * sizeof *route);
    route[1][0] = 1;
    route[2][0] = 0.75;
    route[2][tasks - 1] += 0.25;
    route[3][0] = 1.1;
    route[3][tasks - 1] += 0.4;
    for (int k = 0; k < tasks; k++) route[4][k] = 0.2 + 0.1 * k;
    route[5][tasks - 1] = 1;
}

/* ---- one linear layer, with a bound that is derived ---- */

/* sum over M of |c_M| at one element, by the definition of the transform: c_M = 2^-n sum_s v(s) prod_{i in M} s_i; and
 * which masks are not 0. */
typedef struct plane_ref {
    int task, plane;
    const obm__planes *from;
} plane_ref;
typedef struct layer_ref {
    plane_ref planes[10];
    int n;
    bool full, grouped;
    bool used[256];
    delta_ref deltas[MAX_TASKS];
} layer_ref;

static void list_planes(const world *w, const double *route, const char *name, layer_ref *l) {
    memset(l, 0, sizeof *l);
    find_deltas(w, name, l->deltas);
    for (int k = 0; k < w->tasks; k++) {
        bool others = false;
        for (int j = 0; j < w->tasks; j++) others |= j != k && route[j] != 0;
        if (route[k] == 0 && !(others && w->pack->settings.lambda != 0)) continue;
        const obm__pack_entry *e = entry_of(w, k, name);
        l->full |= e->mode == OBM_MODE_FULL;
        l->grouped |= e->planes.scale.kind == OBM_SCALE_GROUP;
        for (int p = 0; e->mode == OBM_MODE_1BIT && p < e->planes.n && l->n < 10; p++)
            l->planes[l->n++] = (plane_ref){k, p, &e->planes};
    }
}

static double coefficient_sum(const world *w, const double *route, layer_ref *l, int64_t row, int64_t col) {
    double value[256], sum = 0, largest = 0;
    for (int s = 0; s < 1 << l->n; s++) {
        double d[MAX_TASKS] = {0};
        for (int i = 0; i < l->n; i++)
            d[l->planes[i].task] +=
                plain_alpha(l->planes[i].from, l->planes[i].plane, row, col) * (s >> i & 1 ? 1 : -1);
        value[s] = plain_rule(w, route, d);
        largest = fmax(largest, fabs(value[s]));
    }
    for (int mask = 0; mask < 1 << l->n; mask++) {
        double c = 0;
        for (int s = 0; s < 1 << l->n; s++) c += __builtin_parity(mask & ~s) ? -value[s] : value[s];
        c /= 1 << l->n;
        if (fabs(c) > 1e-10 * largest) l->used[mask] = true;
        sum += fabs(c);
    }
    return sum;
}

typedef struct bounds {
    double planes; /* sum over columns of |c_M|, times m / 8170 or |x| */
    double sums;   /* |base x| + sum |c_M| m: what f32 additions see at most */
    double exact;
} bounds;

static double tile_peak(const float *x, int64_t cols, int64_t col) {
    double peak = 0;
    for (int64_t i = col / 2048 * 2048; i < cols && i < (col / 2048 + 1) * 2048; i++) peak = fmax(peak, fabs(x[i]));
    return peak;
}

/* Per column and mask a table is off by at most m / 8170 (kernels.h), times |c_M|. */
static bounds bounds_of(const world *w, const double *route, layer_ref *l, int64_t row, int64_t cols, const float *x) {
    const float *base = l->deltas[0].base + row * cols;
    bounds b = {0, 0, 0};
    double c = 0, peak = 0;
    for (int64_t col = 0; col < cols; col++) {
        double d[MAX_TASKS];
        for (int k = 0; k < w->tasks; k++) d[k] = plain_delta(&l->deltas[k], row, col);
        if (col % 64 == 0) peak = tile_peak(x, cols, col);
        if (l->n <= 8 && (col == 0 || (l->grouped && col % 64 == 0))) c = coefficient_sum(w, route, l, row, col);
        b.exact += (base[col] + plain_rule(w, route, d)) * x[col];
        b.planes += c * peak / 8170;
        b.sums += fabs(base[col] * x[col]) + (c + (l->n > 8) * fabs(plain_rule(w, route, d))) * peak;
    }
    return b;
}

/*
 * y = sum_j b_j x_j + sum_M c_M * (scale * sum_M).  In decode: the base's rows are off by cols * 2^-23 of sum |b x|
 * (kernels.h), the tables by b.planes; c_M and each of the two products are rounded once (3 * 2^-24 of |c_M| m per
 * column), and so is each of the additions, masks x segments, of numbers within b.sums.  In a tile the weights are
 * summed in f32 (a rounding per mask), then GEMM is off by cols * 2^-23; no tables.  An overlay is rounded to f32 once.
 */
static void check_rows(const world *w, const char *name, const double *route, bool tiled, bool planes, int64_t rows,
                       int64_t cols, const float *x, const float *y) {
    layer_ref l;
    list_planes(w, route, name, &l);
    for (int64_t r = rows - 1; r >= 0; r -= 23) {
        bounds b = bounds_of(w, route, &l, r, cols, x);
        double adds = 8.0 * (double)(cols / 64 + 1) + 4;
        double bound = ((double)cols * 2 + adds) * 0x1p-24 * b.sums + (tiled || !planes ? 0 : b.planes * 1.001);
        if (!(fabs(y[r] - b.exact) <= bound))
            fail_msg("%s row %lld%s: %.9g, expected %.9g +- %.2g", name, (long long)r, tiled ? " tiled" : "", y[r],
                     b.exact, bound);
        assert_true(bound < 2e-3 * b.sums + 1e-12); /* so that it says something */
    }
    int masks = 0;
    for (int mask = 0; mask < 256; mask++) masks += l.used[mask];
    bool runs = !l.full && l.n > 0 && l.n <= 8 && masks <= 8;
    if (rows == base_tensor(w, name)->rows && runs != planes) fail_msg("%s: %d masks, planes %d", name, masks, planes);
}

static float *random_vectors(size_t n, int64_t cols) {
    unsigned state = 11;
    float *x = malloc(n * (size_t)cols * sizeof *x);
    for (size_t i = 0; i < n * (size_t)cols; i++) x[i] = (float)((int)(tiny_random(&state) % 2001) - 1000) / 700.0f;
    for (size_t i = 0; i < n; i++) x[i * (size_t)cols + (i * 37 + 5) % (size_t)cols] *= 20; /* an outlier in each */
    return x;
}

/* n vectors through one matrix; the first is compared. */
static void check_layer(world *w, obm_model *m, const double *route, obm__role role, const char *name, bool tiled) {
    obm_error err;
    obm__weights *weights;
    const obm__weights *all[OBM_TILE_TOKENS];
    int64_t rows, cols;
    size_t n = tiled ? OBM_TILE_TOKENS : 3;
    obm__config_shape(&m->config, role, &rows, &cols);
    float *x = random_vectors(n, cols), *y = malloc(n * (size_t)rows * sizeof *y);
    check_ok(obm__weights_acquire(m, route, &weights, &err), &err);
    for (size_t i = 0; i < n; i++) all[i] = weights;
    obm__linear layer = {role, y, rows};
    check_ok(obm__linear_run(m, all, n, tiled, 0, &layer, 1, x, &err), &err);
    check_rows(w, name, route, tiled, obm__weights_at(weights, 0, role)->terms != NULL, rows, cols, x, y);
    obm__weights_release(m, weights);
    free(x);
    free(y);
}

static void check_layers(world *w, obm__role role, const char *name) {
    float logits[256];
    double route[N_ROUTES][MAX_TASKS];
    obm_model *m = open_model(w, false, 0);
    obm_error err;
    fill_routes(w->tasks, route);
    check_ok(obm_model_logits(m, w->ids, 1, NULL, logits, &err), &err); /* makes the scratch of a tile */
    for (int i = 0; i < N_LAMBDAS * 2; i++) {
        w->pack->settings.lambda = lambdas[i / 2];
        w->pack->settings.reading = i % 2 ? OBM_READING_RECOMPUTED : OBM_READING_ONTO_BASE;
        if (i == 1) continue; /* lambda 0 has one reading */
        for (int r = 1; r < N_ROUTES; r++) {
            check_layer(w, m, route[r], role, name, false);
            check_layer(w, m, route[r], role, name, true);
        }
    }
    obm_model_free(m);
}

static void one_layer_keeps_its_bound(void **state) {
    (void)state;
    const struct {
        int tasks;
        const char *scale;
        int planes;
    } cases[] = {{1, "row", 1},       {2, "matrix", 1}, {2, "group:64", 2}, {3, "row", 1},
                 {3, "group:128", 1}, {3, "matrix", 2}, {4, "row", 1},      {5, "matrix", 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world w = {.c = odd_model(1, OBM_F32), .tasks = cases[i].tasks};
        for (int k = 0; k < w.tasks; k++) w.spec[k] = (expert_spec){.scale = cases[i].scale, .planes = cases[i].planes};
        open_world(&w, 2);
        check_layers(&w, OBM_DOWN, "model.layers.0.mlp.down_proj.weight");
        close_world(&w);
    }
}

/* 2100 columns are two tiles, the second not whole; 4100 three. */
static void wide_layers_have_several_tiles(void **state) {
    (void)state;
    const struct {
        int inter;
        const char *scale;
        obm_dtype dtype;
    } cases[] = {{2100, "row", OBM_BF16},
                 {4100, "group:128", OBM_F32},
                 {2112, "group:2048", OBM_F16},
                 {2100, "matrix", OBM_F32}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world w = {.c = odd_model(1, cases[i].dtype), .tasks = 3};
        w.c.inter = cases[i].inter;
        w.c.hidden = 10;
        w.c.vocab = 20;
        w.c.layers = 1;
        for (int k = 0; k < w.tasks; k++) w.spec[k] = (expert_spec){.scale = cases[i].scale};
        w.spec[1].scale = "row"; /* scales of two kinds in one matrix */
        open_world(&w, 2);
        check_layers(&w, OBM_DOWN, "model.layers.0.mlp.down_proj.weight");
        close_world(&w);
    }
}

/* ---- whole models ---- */

static double relative(const float *a, int64_t width, const double *b, int64_t known, size_t n) {
    double worst = 0, scale = 0;
    for (size_t t = 0; t < n; t++)
        for (int64_t i = 0; i < known; i++) {
            double d = fabs(a[(int64_t)t * width + i] - b[(int64_t)t * known + i]);
            if (!(d <= worst)) worst = d;
            scale = fmax(scale, fabs(b[(int64_t)t * known + i]));
        }
    return worst / scale;
}

/*
 * Relative to the largest logit.  f32 alone is off by some 1e-6 a layer (test_model.c takes 1e-4).  Tables add up to
 * m / 8170 a column and mask, on average a fifth of that with a random sign: with |c| / |w| near 0.1 some 1e-5 of a
 * layer's output, a few layers deep; 1e-3 is far from the 1e-1 that a wrong coefficient or bit makes.
 */
#define PREFILL_BOUND 1e-4
#define DECODE_BOUND 1e-3

/* One route on planes, in prefill and decode, and (dense not NULL) with dense weights. */
static void check_logits(const world *w, obm_model *m, obm_model *dense, const double *route) {
    const struct {
        obm_model *m;
        bool decode;
        double bound;
    } runs[] = {{m, false, PREFILL_BOUND}, {m, true, DECODE_BOUND}, {dense, false, PREFILL_BOUND}};
    obm_error err;
    tiny c;
    tiny_weights merged;
    obm_model_info info;
    obm_model_describe(m, &info);
    plain_weights(w, route, &c, &merged);
    double *expected = malloc(T * (size_t)c.vocab * sizeof *expected);
    float *got = malloc(T * (size_t)info.vocab * sizeof *got);
    tiny_reference(&c, &merged, w->ids, T, expected, NULL);
    for (int i = 0; i < 3 && runs[i].m; i++) {
        obm_run_options options = OBM_INIT(obm_run_options);
        options.route = route;
        options.all = true;
        options.decode = runs[i].decode;
        check_ok(obm_model_logits(runs[i].m, w->ids, T, &options, got, &err), &err);
        double d = relative(got, info.vocab, expected, c.vocab, T);
        if (!(d < runs[i].bound))
            fail_msg("route %g %g %g, lambda %g, reading %d, run %d: off by %g", route[0], route[1], route[2],
                     w->pack->settings.lambda, (int)w->pack->settings.reading, i, d);
        for (int64_t j = c.vocab; j < info.vocab; j++) assert_true(got[j] == -INFINITY);
    }
    tiny_weights_free(&merged);
    free(expected);
    free(got);
}

/* Every lambda and route, packed and dense. */
static void check_settings(world *w, bool with_dense) {
    double route[N_ROUTES][MAX_TASKS];
    obm_model *m = open_model(w, false, 0), *dense = with_dense ? open_model(w, true, 0) : NULL;
    fill_routes(w->tasks, route);
    for (int i = 0; i < N_LAMBDAS; i++) {
        w->pack->settings.lambda = lambdas[i];
        w->pack->settings.reading = i % 2 ? OBM_READING_RECOMPUTED : OBM_READING_ONTO_BASE;
        for (int r = 0; r < N_ROUTES; r++) check_logits(w, m, dense, route[r]);
    }
    obm_model_free(m);
    obm_model_free(dense);
}

static void policies_scales_and_planes(void **state) {
    (void)state;
    const struct {
        int tasks, tied;
        expert_spec e;
    } cases[] = {{1, 0, {.policy = "linear"}},
                 {2, 1, {.policy = "attention", .scale = "matrix"}},
                 {2, 0, {.policy = "mlp", .scale = "group:64", .planes = 2}},
                 {3, 1, {.policy = "paper"}},
                 {3, 0, {.policy = "linear", .scale = "group:128"}},
                 {4, 1, {.policy = "linear", .planes = 2}},
                 {5, 0, {.policy = "linear", .scale = "row"}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world w = {.c = odd_model(cases[i].tied, OBM_F32), .tasks = cases[i].tasks};
        for (int k = 0; k < w.tasks; k++) w.spec[k] = cases[i].e;
        open_world(&w, 2);
        check_settings(&w, true);
        close_world(&w);
    }
}

/* Experts that are each other, or the base's in some tensors; scales and planes that differ between experts. */
static void equal_and_same_experts(void **state) {
    (void)state;
    world w = {.c = odd_model(0, OBM_F32),
               .tasks = 4,
               .spec = {{.scale = "matrix", .same = {"mlp", "embed_tokens"}},
                        {.copy_of = 1, .scale = "matrix"},
                        {.planes = 2, .same = {"q_proj", "norm", "lm_head"}},
                        {.policy = "mlp", .scale = "group:64", .same = {"layers.1"}}}};
    open_world(&w, 2);
    check_settings(&w, true);
    close_world(&w);
}

static void heads_and_embeddings(void **state) {
    (void)state;
    const struct {
        int tied;
        expert_spec e[3];
    } cases[] = {
        {1,
         {{.map = embedding_1bit, .n_map = 1},
          {.map = embedding_1bit, .n_map = 1},
          {.map = embedding_1bit, .n_map = 1}}},
        {1,
         {{.map = embedding_1bit, .n_map = 1},
          {.same = {"embed_tokens"}},
          {.planes = 2, .map = embedding_1bit, .n_map = 1}}},
        {1, {{.map = embedding_1bit, .n_map = 1}, {.policy = "linear"}, {.same = {"embed_tokens"}}}},
        {0,
         {{.map = vocabulary_1bit, .n_map = 2},
          {.map = vocabulary_1bit, .n_map = 2},
          {.map = vocabulary_1bit, .n_map = 2}}},
        {0, {{.map = head_1bit, .n_map = 1}, {.map = head_1bit, .n_map = 1}, {.map = head_1bit, .n_map = 1}}},
        {0, {{.map = embedding_1bit, .n_map = 1}, {.map = vocabulary_1bit, .n_map = 2}, {.same = {"embed_tokens"}}}},
        /* a head of an expert's own beside tied ones */
        {1, {{.own_head = true}, {.policy = "linear"}, {.same = {"embed_tokens"}}}},
        {1,
         {{.own_head = true, .map = head_1bit, .n_map = 1},
          {.map = embedding_1bit, .n_map = 1},
          {.map = embedding_1bit, .n_map = 1}}},
        {1,
         {{.map = embedding_1bit, .n_map = 1},
          {.own_head = true, .map = vocabulary_1bit, .n_map = 2},
          {.map = embedding_1bit, .n_map = 1}}},
        {1,
         {{.own_head = true, .map = embedding_1bit, .n_map = 1},
          {.map = embedding_1bit, .n_map = 1},
          {.planes = 2, .map = embedding_1bit, .n_map = 1}}},
        /* more vocabulary */
        {1, {{.policy = "linear"}, {.policy = "linear"}, {.extra = 3}}},
        {0, {{.extra = 2, .map = vocabulary_1bit, .n_map = 2}, {.map = vocabulary_1bit, .n_map = 2}, {.extra = 70}}},
        {1,
         {{.extra = 2, .map = embedding_1bit, .n_map = 1},
          {.map = embedding_1bit, .n_map = 1},
          {.same = {"embed_tokens"}, .extra = 5}}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world w = {.c = odd_model(cases[i].tied, OBM_F32), .tasks = 3};
        memcpy(w.spec, cases[i].e, sizeof cases[i].e);
        w.c.layers = 1;
        w.c.inter = 30;
        open_world(&w, 2);
        check_settings(&w, true);
        close_world(&w);
    }
}

/* The base stays as it is, whatever its dtype, and what is added is f32: 16-bit bases are as exact as f32 ones where
 * nothing is an overlay. */
static void dtypes_of_base_and_experts(void **state) {
    (void)state;
    const struct {
        obm_dtype base;
        int expert[3];
    } cases[] = {{OBM_BF16, {0, 0, 0}},
                 {OBM_F16, {0, 0, 0}},
                 {OBM_BF16, {1 + OBM_F32, 1 + OBM_F16, 0}},
                 {OBM_F32, {1 + OBM_BF16, 1 + OBM_F16, 0}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world w = {.c = odd_model(0, cases[i].base), .tasks = 3};
        for (int k = 0; k < 3; k++)
            w.spec[k] = (expert_spec){.dtype = cases[i].expert[k], .map = head_1bit, .n_map = 1};
        open_world(&w, 2);
        check_settings(&w, false);
        close_world(&w);
    }
}

/* Full tensors of another dtype than the base's are views of the expert's file. */
static void full_tensors_are_views(void **state) {
    (void)state;
    world w = {.c = odd_model(0, OBM_BF16), .tasks = 2, .spec = {{.dtype = 1 + OBM_F32}, {.dtype = 1 + OBM_F16}}};
    obm_error err;
    open_world(&w, 2);
    w.pack->settings.lambda = 0;
    obm_model *m = open_model(&w, false, 0);
    for (int k = 0; k < 2; k++) {
        double route[MAX_TASKS] = {0};
        obm__weights *weights;
        obm_model_memory memory;
        route[k] = 1;
        check_ok(obm__weights_acquire(m, route, &weights, &err), &err);
        const obm__matrix *head = obm__weights_at(weights, 0, OBM_HEAD);
        assert_int_equal(head->dtype, w.spec[k].dtype - 1);
        assert_ptr_equal(head->data, w.pack->experts[k].entries[obm__pack_find(w.pack, "lm_head.weight")].full.data);
        obm_model_account(m, &memory);
        assert_int_equal(weights->n_overlays, 0);
        obm__weights_release(m, weights);
        check_logits(&w, m, NULL, route);
    }
    obm_model_free(m);
    close_world(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_layer_keeps_its_bound),  cmocka_unit_test(wide_layers_have_several_tiles),
        cmocka_unit_test(policies_scales_and_planes), cmocka_unit_test(equal_and_same_experts),
        cmocka_unit_test(heads_and_embeddings),       cmocka_unit_test(dtypes_of_base_and_experts),
        cmocka_unit_test(full_tensors_are_views),
    };
    return cmocka_run_group_tests_name("planes", tests, NULL, NULL);
}
