/* Packs with shared vectors: the vectors and masks to the bit against plain loops over whole tensors, in any dtype and
 * for any number of threads, and that a stopped, failed or damaged one is noticed. */
#include "delta_fixture.h"

#include "io/pack.h"

#define Q "model.layers.0.self_attn.q_proj.weight"
#define UP "model.layers.0.mlp.up_proj.weight"
#define NORM "model.norm.weight"
/* UP: several windows of one thread, rows of more than a block; Q: odd columns. */
enum { T_UP, T_Q, T_NORM, N };
static const int64_t shapes[N][2] = {{240, 5000}, {9, 70}, {70, 0}};
static const char *const names[N] = {UP, Q, NORM};

typedef struct world {
    obm_context *ctx;
    char *dir, *pack, *folders[4]; /* base and three experts */
    float *values[4][N];
} world;

static size_t count_of(int t) { return (size_t)(shapes[t][0] * (shapes[t][1] ? shapes[t][1] : 1)); }

static char *write_model(const world *w, int who) {
    static const char *const files[] = {"base", "a", "b", "c"};
    fixture_tensor t[N];
    for (int i = 0; i < N; i++) {
        fixture_tensor f = {names[i],          OBM_F32, i == T_NORM ? 1 : 2, {shapes[i][0], shapes[i][1]},
                            w->values[who][i], NULL};
        t[i] = f;
    }
    return fixture_model(w->ctx, w->dir, files[who], t, N);
}

/* The experts lie near the base, so that masks are no accident of large differences; c leaves UP alone. */
static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    w->ctx = fixture_context(3);
    w->dir = fixture_folder();
    for (int who = 0; who < 4; who++) {
        for (int t = 0; t < N; t++) {
            float *v = w->values[who][t] = fixture_values(count_of(t), (uint64_t)(11 + who * N + t));
            for (size_t i = 0; who && i < count_of(t); i++) v[i] = w->values[0][t][i] + v[i] / 64;
        }
        if (who == 3) memcpy(w->values[3][T_UP], w->values[0][T_UP], count_of(T_UP) * sizeof(float));
        w->folders[who] = write_model(w, who);
    }
    w->pack = obm__path_join(w->dir, "my.pack");
    *state = w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    fixture_remove(w->dir);
    for (int who = 0; who < 4; who++) {
        for (int t = 0; t < N; t++) obm_free(w->values[who][t]);
        obm_free(w->folders[who]);
    }
    obm_context_free(w->ctx);
    obm_free(w->dir);
    obm_free(w->pack);
    free(w);
    return 0;
}

static obm_status compress(const world *w, obm_context *ctx, const obm_compress_options *o, const char *out,
                           obm_pack **p, obm_error *err) {
    static const char *const tasks[] = {"a", "b", "c"};
    obm_expert e[3];
    for (int i = 0; i < 3; i++) {
        e[i] = OBM_INIT(obm_expert);
        e[i].name = tasks[i];
        e[i].path = w->folders[i + 1];
    }
    return obm_compress(ctx, w->folders[0], e, 3, o, out, NULL, p, err);
}

static obm_compress_options sharing(const char *method, const char *dtype) {
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.shared = method;
    o.shared_dtype = dtype;
    return o;
}

/* ---- contents ---- */

static float stored(const world *w, obm_dtype dtype, float x) {
    uint16_t bits;
    if (dtype == OBM_F32) return x;
    obm__narrow(w->ctx->k, dtype, &x, 1, &bits);
    obm_tensor t = {.data = &bits, .dtype = dtype, .ndim = 1, .shape = {1}};
    obm__widen(w->ctx->k, &t, 0, 1, &x);
    return x;
}

static float delta(const world *w, int who, int t, size_t i) { return w->values[who][t][i] - w->values[0][t][i]; }

static float plain_shared(const world *w, bool emr, int t, size_t i) {
    float sum = 0, best = 0;
    for (int who = 1; who < 4; who++) sum += delta(w, who, t, i);
    if (!emr) return sum;
    for (int who = 1; who < 4; who++) {
        float d = delta(w, who, t, i);
        if (d * sum > 0 && fabsf(d) > fabsf(best)) best = d;
    }
    return best;
}

static bool plain_bit(bool emr, double lambda, float d, float shared) {
    return emr ? (double)d * shared > 0 : fabs((double)d) > lambda * fabs((double)shared - (double)d);
}

static const obm__pack_entry *entry(const obm_pack *p, size_t task, const char *name) {
    return &p->experts[task].entries[obm__pack_find(p, name)];
}

/* Bits, padding and what is read back, from any element on and across rows; sums of |d| and of what the mask keeps. */
static void check_mask(const world *w, const obm_pack *p, int who, int t, bool emr, obm_dtype dtype, double sums[2]) {
    const obm__pack_entry *e = entry(p, (size_t)who - 1, names[t]);
    const obm__masked *m = &e->masked;
    size_t n = count_of(t), wrong = 0;
    assert_int_equal(e->mode, OBM_MODE_MASK);
    assert_int_equal(m->shared.dtype, dtype);
    float *want = obm__alloc(n, sizeof *want), *have = obm__alloc(n, sizeof *have);
    for (size_t i = 0; i < n; i++) {
        float d = delta(w, who, t, i), s = stored(w, dtype, plain_shared(w, emr, t, i));
        bool kept = plain_bit(emr, 0.4, d, s);
        size_t row = i / (size_t)shapes[t][1], col = i % (size_t)shapes[t][1];
        wrong += (m->bits[row * (size_t)m->row_bytes + col / 8] >> col % 8 & 1) != kept;
        want[i] = kept ? m->scaling * s : 0;
        sums[0] += fabs((double)d);
        sums[1] += kept ? fabs((double)s) : 0;
    }
    for (int64_t r = 0; r < shapes[t][0]; r++)
        for (int64_t c = shapes[t][1]; c < 8 * m->row_bytes; c++)
            wrong += m->bits[r * m->row_bytes + c / 8] >> c % 8 & 1;
    assert_int_equal(wrong, 0);
    obm__masked_read(w->ctx->k, m, 0, (int64_t)n, have);
    assert_memory_equal(have, want, n * sizeof *have);
    obm__masked_read(w->ctx->k, m, 67, 200, have);
    assert_memory_equal(have, want + 67, 200 * sizeof *have);
    obm_free(want);
    obm_free(have);
}

static void check_pack(const world *w, const obm_pack *p, bool emr, obm_dtype dtype) {
    for (int who = 1; who < 4; who++) {
        double sums[2] = {0};
        check_mask(w, p, who, T_Q, emr, dtype, sums);
        if (who < 3) check_mask(w, p, who, T_UP, emr, dtype, sums);
        double scaling = entry(p, (size_t)who - 1, Q)->masked.scaling, want = emr ? sums[0] / sums[1] : 1;
        assert_true(fabs(scaling - want) <= 1e-6 * want);
    }
    assert_int_equal(entry(p, 2, UP)->mode, OBM_MODE_SAME);
    assert_int_equal(entry(p, 0, NORM)->mode, OBM_MODE_FULL);
}

static void test_contents(void **state) {
    world *w = *state;
    static const struct {
        const char *method, *dtype;
        obm_dtype stored;
    } cases[] = {{"tall", NULL, OBM_F32}, {"tall", "bf16", OBM_BF16}, {"emr", "f32", OBM_F32}, {"emr", "f16", OBM_F16}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        obm_compress_options o = sharing(cases[i].method, cases[i].dtype);
        obm_pack *p = NULL;
        o.overwrite = true;
        OK(compress(w, w->ctx, &o, w->pack, &p, err));
        check_pack(w, p, !strcmp(cases[i].method, "emr"), cases[i].stored);
        obm_pack_free(p);
        OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
        OK(obm_pack_verify(p, NULL, NULL, err));
        obm_pack_shared_info info = {0};
        assert_true(obm_pack_shared(p, &info));
        assert_string_equal(info.method, cases[i].method);
        assert_int_equal(info.bytes, (count_of(T_UP) + count_of(T_Q)) * obm_dtype_size(cases[i].stored));
        obm_pack_free(p);
    }
}

static void test_threads(void **state) {
    world *w = *state;
    obm_compress_options o = sharing("emr", NULL);
    char *other = obm__path_join(w->dir, "other.pack");
    obm_pack *p, *q;
    obm_context *one = fixture_context(1);
    OK(compress(w, w->ctx, &o, w->pack, &p, err));
    OK(compress(w, one, &o, other, &q, err));
    for (size_t k = 0; k < 3; k++) {
        assert_string_equal(obm__json_string(obm__json_get(p->experts[k].record, "xxh3")),
                            obm__json_string(obm__json_get(q->experts[k].record, "xxh3")));
        assert_true(entry(p, k, Q)->masked.scaling == entry(q, k, Q)->masked.scaling);
    }
    assert_string_equal(obm__json_string(obm__json_get(p->shared.record, "xxh3")),
                        obm__json_string(obm__json_get(q->shared.record, "xxh3")));
    obm_pack_free(p);
    obm_pack_free(q);
    obm_context_free(one);
    obm_free(other);
}

/* A pack of planes says version 1 and has no trace of any of this. */
static void test_without(void **state) {
    world *w = *state;
    obm_pack *p = NULL;
    obm_pack_shared_info info;
    int64_t version = 0;
    obm_compress_options o = sharing("", "");
    o.struct_size = offsetof(obm_compress_options, shared); /* of a caller who knows no shared vectors */
    o.shared = (const char *)16;
    OK(compress(w, w->ctx, &o, w->pack, &p, err));
    assert_true(obm__json_int(obm__json_get(p->manifest, "version"), &version) && version == 1);
    assert_null(obm__json_get(p->manifest, "shared"));
    assert_false(obm_pack_shared(p, &info));
    obm_expert e = OBM_INIT(obm_expert);
    e.name = "d";
    e.path = w->folders[1];
    o = sharing("tall", NULL);
    FAILS(obm_pack_add(p, &e, &o, err), OBM_E_ARG, "made of all experts at once");
    obm_pack_free(p);
}

/* ---- failures ---- */

static int stop_at(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    assert_true(done <= total);
    return (*(int *)user)-- == 0;
}

static void test_stopping_leaves_nothing(void **state) {
    world *w = *state;
    int stops = 0, before;
    for (before = 0; before < 200; before++) {
        int left = before;
        obm_error err;
        obm_compress_options o = sharing("tall", NULL);
        o.progress = stop_at;
        o.progress_user = &left;
        obm_status s = compress(w, w->ctx, &o, w->pack, NULL, &err);
        if (s == OBM_OK) break;
        assert_int_equal(s, OBM_E_USER);
        assert_false(obm__is_directory(w->pack));
        stops++;
    }
    assert_true(stops > 5 && before < 200);
}

static void test_values_that_are_none(void **state) {
    world *w = *state;
    size_t at = count_of(T_UP) - 3;
    char part[160];
    w->values[2][T_UP][at] = NAN;
    w->values[2][T_UP][at + 1] = INFINITY;
    fixture_remove(w->folders[2]);
    obm_free(w->folders[2]);
    w->folders[2] = write_model(w, 2);
    snprintf(part, sizeof part, "expert b: tensor %s: NaN or Inf in expert - base at index %zu ", UP, at);
    obm_compress_options o = sharing("emr", NULL);
    FAILS(compress(w, w->ctx, &o, w->pack, NULL, err), OBM_E_VALUE, part);
    assert_false(obm__is_directory(w->pack));
}

static void test_damage(void **state) {
    world *w = *state;
    obm_compress_options o = sharing("tall", NULL);
    obm_pack *p = NULL;
    size_t size;
    char *text;
    OK(compress(w, w->ctx, &o, w->pack, &p, err));
    char *path = obm__path_join(w->pack, obm__json_string(obm__json_get(p->shared.record, "file")));
    char *member = obm__format("%s:a", w->pack);
    double weights[3] = {1, 0, 0};
    float *out = obm__alloc(count_of(T_Q), sizeof *out);
    OK(obm_pack_materialise(p, weights, Q, out, err));
    OK(obm__file_read(path, &text, &size, err));
    assert_int_equal(truncate(path, (off_t)size / 2), 0);
    FAILS(obm_pack_materialise(p, weights, Q, out, err), OBM_E_IO, "shared-"); /* not a bus error */
    obm_pack_free(p);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "shared-");
    text[size - 9] ^= 1;
    OK(obm__file_write(path, text, size, err));
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    FAILS(obm_pack_verify(p, NULL, NULL, err), OBM_E_FORMAT, "shared-");
    obm_pack_free(p);
    assert_int_equal(remove(path), 0);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_IO, "shared-");
    obm_checkpoint *base, *a;
    obm_task_vector *v = NULL;
    OK(obm_checkpoint_open(w->ctx, w->folders[0], &base, err));
    OK(obm_checkpoint_open(w->ctx, member, &a, err));
    FAILS(obm_task_vector_new(base, a, &v, err), OBM_E_IO, "shared-");
    obm_checkpoint_free(a);
    obm_checkpoint_free(base);
    obm_free(out);
    obm_free(text);
    obm_free(path);
    obm_free(member);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {TEST(test_contents),
                                       TEST(test_threads),
                                       TEST(test_without),
                                       TEST(test_stopping_leaves_nothing),
                                       TEST(test_values_that_are_none),
                                       TEST(test_damage)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
