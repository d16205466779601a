/* Compress, then export: the folder that comes out against what the pack itself says, and against plain arithmetic. */
#include "delta_fixture.h"

#include "route/dynamic.h"

enum { VOCAB = 10, WIDTH = 96 };

typedef struct family {
    obm_context *ctx;
    char *dir, *base, *out;
    obm_pack *pack;
} family;

/* head: an own one; extra: vocabulary rows beyond the base's. */
static char *write_model(family *f, const char *name, obm_dtype dtype, uint64_t seed, float size, bool head,
                         int64_t extra) {
    float *values[4];
    static const struct {
        const char *name;
        int64_t rows;
    } names[] = {{"lm_head.weight", VOCAB},
                 {"model.embed_tokens.weight", VOCAB},
                 {"model.layers.0.mlp.up_proj.weight", 40},
                 {"model.norm.weight", 0}};
    fixture_tensor t[4];
    size_t n = 0;
    for (int i = 0; i < 4; i++) {
        int64_t rows = names[i].rows ? names[i].rows + (i < 2 ? extra : 0) : 1;
        size_t count = (size_t)(rows * WIDTH);
        /* The head's base is the embedding. */
        values[i] = fixture_values(count, i ? (uint64_t)i : 1);
        float *d = fixture_values(count, seed + (uint64_t)i);
        for (size_t k = 0; k < count; k++) values[i][k] = values[i][k] * 0.1f + size * d[k];
        obm_free(d);
        if (i == 0 && !head) continue;
        t[n++] =
            (fixture_tensor){names[i].name, dtype, i == 3 ? 1 : 2, {i == 3 ? WIDTH : rows, WIDTH}, values[i], NULL};
    }
    char *path = fixture_model(f->ctx, f->dir, name, t, n), *config = obm__path_join(path, "config.json");
    for (int i = 0; i < 4; i++) obm_free(values[i]);
    char *text = obm__format(
        "{\"model_type\": \"llama\", \"vocab_size\": %d, \"tie_word_embeddings\": %s, \"torch_dtype\": \"bfloat16\"}",
        (int)(VOCAB + extra), head ? "false" : "true");
    OK(obm__file_write(config, text, strlen(text), err));
    obm_free(text), obm_free(config);
    return path;
}

static family family_new(obm_dtype dtype, float size, bool untied, int64_t extra) {
    family f = {.ctx = fixture_context(2), .dir = fixture_folder()};
    f.base = write_model(&f, "base", dtype, 1, 0, false, 0);
    char *chat = write_model(&f, "chat", dtype, 100, size, untied, extra),
         *math = write_model(&f, "math", dtype, 200, size, false, 0);
    obm_expert experts[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    experts[0].name = "chat", experts[0].path = chat;
    experts[1].name = "math", experts[1].path = math;
    char *pack = obm__path_join(f.dir, "my.pack");
    OK(obm_compress(f.ctx, f.base, experts, 2, NULL, pack, NULL, &f.pack, err));
    f.out = obm__path_join(f.dir, "out");
    obm_free(chat), obm_free(math), obm_free(pack);
    return f;
}

static void family_free(family *f) {
    obm_pack_free(f->pack);
    obm_context_free(f->ctx);
    fixture_remove(f->dir);
    obm_free(f->dir), obm_free(f->base), obm_free(f->out);
}

/* Every tensor of the folder is the materialised one, rounded once; returns how many elements of `name` equal the
 * base's. */
static void check_folder(family *f, const double *weights, obm_dtype dtype, size_t tensors) {
    obm_checkpoint *c;
    OK(obm_checkpoint_open(f->ctx, f->out, &c, err));
    assert_int_equal(obm_checkpoint_count(c), tensors);
    for (size_t i = 0; i < tensors; i++) {
        const char *name;
        obm_tensor t, shape;
        obm_checkpoint_at(c, i, &name, &t);
        OK(obm_pack_route_shape(f->pack, weights, name, &shape, err));
        assert_int_equal(t.dtype, dtype);
        assert_memory_equal(t.shape, shape.shape, sizeof(int64_t) * (size_t)t.ndim);
        int64_t n = obm_tensor_count(&t);
        float *x = obm__alloc((size_t)n, sizeof *x);
        void *bytes = obm__alloc((size_t)n, sizeof *x);
        OK(obm_pack_materialise(f->pack, weights, name, x, err));
        obm__narrow(f->ctx->k, dtype, x, n, bytes);
        assert_memory_equal(bytes, t.data, (size_t)n * obm_dtype_size(dtype));
        obm_free(x), obm_free(bytes);
    }
    obm_checkpoint_free(c);
}

static bool config_flag(family *f, const char *key) {
    char *path = obm__path_join(f->out, "config.json");
    obm_json *config;
    bool value = false;
    OK(obm__json_load(path, &config, err));
    assert_true(obm__json_bool(obm__json_get(config, key), &value));
    obm__json_free(config);
    obm_free(path);
    return value;
}

static void test_export(void **state) {
    (void)state;
    static const double routes[][2] = {{1, 0}, {0, 1}, {0.6, 0.4}, {0, 0}};
    static const struct {
        const char *text;
        obm_dtype dtype;
    } dtypes[] = {{NULL, OBM_BF16}, {"f32", OBM_F32}, {"f16", OBM_F16}};
    family f = family_new(OBM_BF16, 0.01f, false, 0);
    for (int r = 0; r < 4; r++) {
        for (int d = 0; d < 3; d++) {
            obm_export_options o = OBM_INIT(obm_export_options);
            obm_export_report report;
            o.dtype = dtypes[d].text;
            o.overwrite = true;
            OK(obm_pack_export(f.pack, routes[r], &o, f.out, &report, err));
            check_folder(&f, routes[r], dtypes[d].dtype, 3);
            assert_true(config_flag(&f, "tie_word_embeddings"));
            assert_true(r < 3 ? report.changed > 0 : report.changed == 0);
            assert_true(report.lost <= report.changed && (d != 1 || report.lost == 0));
        }
    }
    family_free(&f);
}

/* lambda 0, one-hot: the full tensors of the folder are the expert's bytes. */
static void test_full_tensors_are_the_experts(void **state) {
    (void)state;
    family f = family_new(OBM_BF16, 0.01f, false, 0);
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_checkpoint *out, *expert;
    obm_pack_get_settings(f.pack, &s);
    s.struct_size = sizeof s;
    s.lambda = 0;
    OK(obm_pack_set_settings(f.pack, &s, err));
    OK(obm_pack_export(f.pack, (double[]){1, 0}, NULL, f.out, NULL, err));
    char *chat = obm__path_join(f.dir, "chat");
    OK(obm_checkpoint_open(f.ctx, f.out, &out, err));
    OK(obm_checkpoint_open(f.ctx, chat, &expert, err));
    static const char *const names[] = {"model.embed_tokens.weight", "model.norm.weight"};
    for (int i = 0; i < 2; i++) {
        obm_tensor a, b;
        OK(obm_checkpoint_get(out, names[i], &a, err));
        OK(obm_checkpoint_get(expert, names[i], &b, err));
        assert_memory_equal(a.data, b.data, obm__tensor_bytes(&a));
    }
    obm_checkpoint_free(out), obm_checkpoint_free(expert);
    obm_free(chat);
    family_free(&f);
}

/* Task vectors far below the steps of bf16: most is lost, and the count says how much. */
static void test_lost_share(void **state) {
    (void)state;
    family f = family_new(OBM_BF16, 0.0002f, false, 0);
    obm_tensor base;
    obm_export_report report;
    uint64_t changed = 0, lost = 0;
    static const double weights[] = {1, 0};
    /* The experts are made in f32 here: in bf16 their own rounding would have eaten the difference. */
    obm_free(write_model(&f, "chat32", OBM_F32, 100, 0.0002f, false, 0));
    char *chat = obm__path_join(f.dir, "chat32"), *pack = obm__path_join(f.dir, "second.pack");
    obm_expert e = OBM_INIT(obm_expert);
    e.name = "chat", e.path = chat;
    obm_pack_free(f.pack);
    OK(obm_compress(f.ctx, f.base, &e, 1, NULL, pack, NULL, &f.pack, err));
    OK(obm_pack_export(f.pack, weights, NULL, f.out, &report, err));
    for (size_t t = 0; t < f.pack->n_tensors; t++) {
        base = f.pack->tensors[t].base;
        size_t n = (size_t)obm_tensor_count(&base);
        float *x = obm__alloc(n, sizeof *x), *b = obm__alloc(n, sizeof *b);
        uint16_t *y = obm__alloc(n, sizeof *y);
        OK(obm_pack_materialise(f.pack, weights, f.pack->tensors[t].name, x, err));
        OK(obm_tensor_read_f32(&base, 0, (int64_t)n, b, err));
        f.ctx->k->f32_to_bf16(y, x, n);
        for (size_t i = 0; i < n; i++) {
            changed += x[i] != b[i];
            lost += x[i] != b[i] && y[i] == ((const uint16_t *)base.data)[i];
        }
        obm_free(x), obm_free(b), obm_free(y);
    }
    assert_int_equal(report.changed, changed);
    assert_int_equal(report.lost, lost);
    assert_true(lost > changed / 4 && lost < changed);
    obm_free(chat), obm_free(pack);
    family_free(&f);
}

static void test_untied_expert(void **state) {
    (void)state;
    family f = family_new(OBM_F32, 0.01f, true, 0);
    obm_export_options o = OBM_INIT(obm_export_options);
    o.overwrite = true;
    OK(obm_pack_export(f.pack, (double[]){1, 0}, &o, f.out, NULL, err));
    check_folder(&f, (double[]){1, 0}, OBM_F32, 4);
    assert_false(config_flag(&f, "tie_word_embeddings"));
    OK(obm_pack_export(f.pack, (double[]){0, 0}, &o, f.out, NULL, err)); /* the base: tied as it was */
    check_folder(&f, (double[]){0, 0}, OBM_F32, 3);
    assert_true(config_flag(&f, "tie_word_embeddings"));
    family_free(&f);
}

static void test_extra_rows(void **state) {
    (void)state;
    family f = family_new(OBM_F32, 0.01f, false, 3);
    obm_json *config;
    int64_t vocab;
    OK(obm_pack_export(f.pack, (double[]){1, 0}, NULL, f.out, NULL, err));
    check_folder(&f, (double[]){1, 0}, OBM_F32, 3);
    char *path = obm__path_join(f.out, "config.json");
    OK(obm__json_load(path, &config, err));
    assert_true(obm__json_int(obm__json_get(config, "vocab_size"), &vocab));
    assert_int_equal(vocab, VOCAB + 3);
    obm__json_free(config);
    obm_free(path);
    family_free(&f);
}

static int stop(void *user, const char *what, uint64_t done, uint64_t total) {
    ++*(int *)user;
    return strcmp(what, "export") || done > total ? 2 : 1;
}

static void test_refusals_and_dry_run(void **state) {
    (void)state;
    family f = family_new(OBM_BF16, 0.01f, false, 0);
    obm_export_options o = OBM_INIT(obm_export_options);
    obm_export_report report;
    static const double chat[] = {1, 0};
    o.dry_run = true;
    OK(obm_pack_export(f.pack, chat, &o, f.out, &report, err));
    assert_int_equal(report.plan.tensors, 3);
    assert_int_equal(report.plan.bytes_written, 2 * (VOCAB * WIDTH + 40 * WIDTH + WIDTH));
    assert_false(obm__file_exists(f.out) || obm__is_directory(f.out));
    o.dry_run = false;
    o.dtype = "int8";
    FAILS(obm_pack_export(f.pack, chat, &o, f.out, NULL, err), OBM_E_ARG, "int8");
    o.dtype = NULL;
    FAILS(obm_pack_export(f.pack, (double[]){NAN, 0}, &o, f.out, NULL, err), OBM_E_ARG, "chat");
    o.overwrite = true;
    FAILS(obm_pack_export(f.pack, chat, &o, f.base, NULL, err), OBM_E_ARG, "the base itself");
    FAILS(obm_pack_export(f.pack, chat, &o, f.pack->path, NULL, err), OBM_E_ARG, "the pack itself");
    o.overwrite = false;
    int calls = 0;
    o.progress = stop, o.progress_user = &calls;
    FAILS(obm_pack_export(f.pack, chat, &o, f.out, NULL, err), OBM_E_USER, "stopped");
    assert_int_equal(calls, 1);
    o.progress = NULL;
    OK(obm_pack_export(f.pack, chat, &o, f.out, NULL, err));
    FAILS(obm_pack_export(f.pack, chat, &o, f.out, NULL, err), OBM_E_EXISTS, "");
    family_free(&f);
}

/* A route is any weights >= 0, but what comes out of it has to be numbers, also in the dtype of the folder. */
static void test_values_that_are_no_numbers(void **state) {
    (void)state;
    static const double huge[] = {1e308, 0}, large[] = {1e8, 0};
    family f = family_new(OBM_BF16, 0.01f, false, 0);
    obm_export_options o = OBM_INIT(obm_export_options);
    float *x = obm__alloc(40 * WIDTH, sizeof *x);
    FAILS(obm_pack_export(f.pack, huge, NULL, f.out, NULL, err), OBM_E_VALUE,
          "tensor model.embed_tokens.weight is ");
    FAILS(obm_pack_export(f.pack, huge, NULL, f.out, NULL, err), OBM_E_VALUE, "inf at index 0 under this route");
    FAILS(obm_pack_materialise(f.pack, huge, "model.layers.0.mlp.up_proj.weight", x, err), OBM_E_VALUE,
          "tensor model.layers.0.mlp.up_proj.weight is ");
    o.dtype = "f16";
    FAILS(obm_pack_export(f.pack, large, &o, f.out, NULL, err), OBM_E_VALUE, "too large for F16");
    assert_false(obm__is_directory(f.out));
    o.dtype = "f32";
    OK(obm_pack_export(f.pack, large, &o, f.out, NULL, err));
    OK(obm_pack_materialise(f.pack, large, "model.layers.0.mlp.up_proj.weight", x, err));
    obm_free(x);
    family_free(&f);
}

static void test_inputs_are_not_written_over(void **state) {
    (void)state;
    family f = family_new(OBM_BF16, 0.01f, false, 0);
    obm_export_options o = OBM_INIT(obm_export_options);
    char *math = obm__path_join(f.dir, "math");
    o.overwrite = true;
    FAILS(obm_pack_export(f.pack, (double[]){1, 0}, &o, math, NULL, err), OBM_E_ARG, "that expert math was made from");
    FAILS(obm_pack_export(f.pack, (double[]){1, 0}, &o, f.base, NULL, err), OBM_E_ARG, "the base itself");
    obm_free(math);
    family_free(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_export),     cmocka_unit_test(test_full_tensors_are_the_experts),
        cmocka_unit_test(test_lost_share), cmocka_unit_test(test_untied_expert),
        cmocka_unit_test(test_extra_rows), cmocka_unit_test(test_refusals_and_dry_run),
        cmocka_unit_test(test_values_that_are_no_numbers), cmocka_unit_test(test_inputs_are_not_written_over),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
