/* Recipes of slices, modules and several documents: which layers of which model become which of the result, under which
 * settings, and what is refused while planning. */
#include "recipe_fixture.h"

/* ---- models whose every value says where it is from ---- */

#define UP "mlp.up_proj.weight"
#define NORM "input_layernorm.weight"

/* Element j of a tensor of model `m` (from 1), layer `l` (-1: the embedding, -2: the final norm, -3: the head). */
static float value(int m, int64_t l, bool up, size_t j) {
    return (float)(m * 1000) + (float)(l * 20) + (float)(up ? 10 : 0) + (float)j;
}

typedef struct made {
    const char *name, *config;
    int id;
    int64_t layers, cols; /* up_proj is (3, cols), the norms (2) */
    bool head, extra;     /* extra: a bias in every layer */
} made;

static void declare(obm__st_writer *w, const char *name, int32_t ndim, int64_t rows, int64_t cols) {
    OK(obm__st_writer_declare(w, name, OBM_F32, ndim, (int64_t[]){rows, cols}, err));
}

static void write_values(obm__st_writer *w, int m, int64_t layer, bool up, size_t n) {
    float x[16];
    for (size_t j = 0; j < n; j++) x[j] = value(m, layer, up, j);
    OK(obm__st_writer_write(w, x, n * sizeof *x, err));
}

static void write_model(made m) {
    char *dir = in_folder(m.name), *path = obm__path_join(dir, "model.safetensors"),
         *config = obm__path_join(dir, "config.json"), name[96];
    obm__st_writer *w;
    OK(obm__make_directory(dir, err));
    OK(obm__st_writer_new(path, &w, err));
    declare(w, "model.embed_tokens.weight", 2, 4, 2);
    declare(w, "model.norm.weight", 1, 2, 0);
    if (m.head) declare(w, "lm_head.weight", 2, 4, 2);
    for (int64_t l = 0; l < m.layers; l++) {
        snprintf(name, sizeof name, "model.layers.%d." UP, (int)l);
        declare(w, name, 2, 3, m.cols);
        snprintf(name, sizeof name, "model.layers.%d." NORM, (int)l);
        declare(w, name, 1, 2, 0);
        snprintf(name, sizeof name, "model.layers.%d.mlp.up_proj.bias", (int)l);
        if (m.extra) declare(w, name, 1, 2, 0);
    }
    OK(obm__st_writer_begin(w, err));
    write_values(w, m.id, -1, false, 8);
    write_values(w, m.id, -2, false, 2);
    if (m.head) write_values(w, m.id, -3, false, 8);
    for (int64_t l = 0; l < m.layers; l++) {
        write_values(w, m.id, l, true, (size_t)(3 * m.cols));
        write_values(w, m.id, l, false, 2);
        if (m.extra) write_values(w, m.id, l, false, 2);
    }
    OK(obm__st_writer_finish(w, NULL, err));
    obm__st_writer_free(w);
    char text[512];
    snprintf(text, sizeof text, "{\"model_type\": \"llama\", \"num_hidden_layers\": %d, \"tie_word_embeddings\": %s%s}",
             (int)m.layers, m.head ? "false" : "true", m.config ? m.config : "");
    OK(obm__file_write(config, text, strlen(text), err));
    obm_free(dir), obm_free(path), obm_free(config);
}

static void two_models(void) {
    write_model((made){"a", ", \"layer_types\": [\"a0\", \"a1\", \"a2\", \"a3\"]", 1, 4, 2, true, false});
    write_model((made){"b", ", \"layer_types\": [\"b0\", \"b1\", \"b2\"]", 2, 3, 2, true, false});
}

static void read_tensor(const obm_checkpoint *c, const char *name, float *x, size_t n) {
    obm_tensor t;
    OK(obm_checkpoint_get(c, name, &t, err));
    assert_int_equal(obm_tensor_count(&t), n);
    OK(obm_tensor_read_f32(&t, 0, (int64_t)n, x, err));
}

/* That layer `at` of the result is wa * (layer la of a) + wb * (layer lb of b). */
static void expect_layer(const obm_checkpoint *c, int at, double wa, int64_t la, double wb, int64_t lb) {
    float x[6];
    char name[96];
    for (int up = 0; up < 2; up++) {
        size_t n = up ? 6 : 2;
        snprintf(name, sizeof name, "model.layers.%d.%s", at, up ? UP : NORM);
        read_tensor(c, name, x, n);
        for (size_t j = 0; j < n; j++) {
            double want = wa * value(1, la, up, j) + wb * value(2, lb, up, j);
            if (fabs(x[j] - want) > 1e-3) fail_msg("%s[%zu] is %g, expected %g", name, j, x[j], want);
        }
    }
}

static void expect_around(const obm_checkpoint *c, const char *name, int model, int64_t what, size_t n) {
    float x[8];
    read_tensor(c, name, x, n);
    for (size_t j = 0; j < n; j++) assert_true(x[j] == value(model, what, false, j));
}

static void expect_config(const obm_checkpoint *c, int64_t layers, const char *types) {
    int64_t n = 0;
    char text[128] = "";
    assert_true(obm__json_int(obm__json_get(c->config, "num_hidden_layers"), &n));
    assert_int_equal(n, layers);
    const obm_json *list = obm__json_get(c->config, "layer_types");
    for (size_t i = 0; i < obm__json_size(list); i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s ", obm__json_string(obm__json_at(list, i)));
    assert_string_equal(text, types);
}

/* ---- slices ---- */

static void test_stack(void **state) {
    (void)state;
    two_models();
    obm_checkpoint *c =
        merged("merge_method: passthrough\n"
               "slices:\n"
               "- sources: [{model: a, layer_range: [0, 3]}]\n"
               "- sources: [{model: b, layer_range: [1, 3]}]\n"
               "- sources: [{model: a, layer_range: [2, 4]}]\n"
               "- sources:\n  - {model: b/, layer_range: [0, 1], parameters: {scale: [{filter: layers.0.mlp, "
               "value: 0.5}, {value: 2}]}}\n",
               "stack");
    assert_int_equal(c->count, 3 + 2 * 8);
    const int64_t from[8][2] = {{1, 0}, {1, 1}, {1, 2}, {2, 1}, {2, 2}, {1, 2}, {1, 3}, {2, 0}};
    for (int i = 0; i < 7; i++) expect_layer(c, i, from[i][0] == 1, from[i][1], from[i][0] == 2, from[i][1]);
    float x[6]; /* a model's filter sees its own layer's number */
    read_tensor(c, "model.layers.7." UP, x, 6);
    for (size_t j = 0; j < 6; j++) assert_true(x[j] == 0.5f * value(2, 0, true, j));
    read_tensor(c, "model.layers.7." NORM, x, 2);
    for (size_t j = 0; j < 2; j++) assert_true(x[j] == 2 * value(2, 0, false, j));
    expect_around(c, "model.embed_tokens.weight", 1, -1, 8); /* of the first slice */
    read_tensor(c, "model.norm.weight", x, 2);               /* of the last one, with its settings */
    for (size_t j = 0; j < 2; j++) assert_true(x[j] == 2 * value(2, -2, false, j));
    expect_config(c, 8, "a0 a1 a2 b1 b2 a2 a3 b0 ");
    obm_checkpoint_free(c);
}

/* Precedence: source, slice, module, merge; gradients over the layers of a slice, 0 for what is in none. */
static void test_settings(void **state) {
    (void)state;
    two_models();
    obm_checkpoint *c =
        merged("merge_method: linear\n"
               "modules:\n  default:\n    parameters: {weight: [{filter: layernorm, value: 3}]}\n    slices:\n"
               "    - sources:\n"
               "      - {model: a, layer_range: [1, 4], parameters: {weight: [1, 0]}}\n"
               "      - {model: b, layer_range: [0, 3], parameters: {weight: [0, 1]}}\n"
               "    - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [2, 3]}]\n"
               "      parameters: {weight: [{filter: layers.3.mlp, value: [9, 0.5]}]}\n"
               "      residual_weight: 0.5\n"
               "parameters: {normalize: false, weight: [0.25, 5]}\n",
               "settings");
    expect_layer(c, 0, 1, 1, 0, 0);
    expect_layer(c, 1, 0.5, 2, 0.5, 1);
    expect_layer(c, 2, 0, 3, 1, 2);
    float x[6];
    read_tensor(c, "model.layers.3." UP, x, 6); /* one layer: the last value; layers.3 of a, but layers.2 of b */
    for (size_t j = 0; j < 6; j++) assert_true(x[j] == 0.5f * value(1, 3, true, j) + 5 * value(2, 2, true, j));
    read_tensor(c, "model.layers.3." NORM, x, 2); /* of the module */
    for (size_t j = 0; j < 2; j++) assert_true(x[j] == 3 * value(1, 3, false, j) + 3 * value(2, 2, false, j));
    expect_around(c, "model.embed_tokens.weight", 1, -1, 8); /* weights 1 and 0 */
    float head[8];                                           /* of the last slice, at the gradient's first value */
    read_tensor(c, "lm_head.weight", head, 8);
    for (size_t j = 0; j < 8; j++)
        assert_true(fabs(head[j] - 0.25 * (value(1, -3, false, j) + value(2, -3, false, j))) < 1e-3);
    expect_config(c, 4, "a1 a2 a3 a3 ");
    assert_non_null(strstr(warnings, "slices[1]: residual_weight has no effect"));
    obm_checkpoint_free(c);
}

/* Task vectors against a base whose layers have other numbers, and a base of the slice's own. */
static void test_bases(void **state) {
    (void)state;
    two_models();
    obm_checkpoint *c =
        merged("merge_method: task_arithmetic\nbase_model: a\n"
               "slices:\n"
               "- sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [1, 3]}]\n"
               "- base_model: b\n  sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]\n"
               "parameters: {weight: 0.25}\n",
               "bases");
    expect_layer(c, 0, 0.75, 2, 0.25, 1);
    expect_layer(c, 1, 0.75, 3, 0.25, 2);
    expect_layer(c, 2, 0.25, 0, 0.75, 0);
    expect_config(c, 3, "a2 a3 b0 ");
    obm_checkpoint_free(c);
}

/* As in mergekit: a head is written where a source of the last slice has one. */
static void test_tied(void **state) {
    (void)state;
    two_models();
    write_model((made){"tied", NULL, 3, 3, 2, false, false});
    obm_checkpoint *c = merged("merge_method: passthrough\nslices:\n- sources: [{model: tied, layer_range: [0, 2]}]\n"
                               "- sources: [{model: tied, layer_range: [1, 3]}]\n",
                               "still-tied");
    assert_true(c->tied && c->count == 2 + 2 * 4);
    obm_checkpoint_free(c);
    c = merged("merge_method: passthrough\nslices:\n- sources: [{model: tied, layer_range: [0, 2]}]\n"
               "- sources: [{model: b, layer_range: [1, 3]}]\n",
               "untied");
    assert_false(c->tied);
    expect_around(c, "model.embed_tokens.weight", 3, -1, 8);
    expect_around(c, "lm_head.weight", 2, -3, 8);
    obm_checkpoint_free(c);
}

static void test_plan(void **state) {
    (void)state;
    two_models();
    obm_plan plan = {0};
    OK(merge_to("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 4]}]\n"
                "- sources: [{model: b, layer_range: [0, 3]}]\n",
                NULL, &plan, err));
    assert_int_equal(plan.tensors, 3 + 2 * 7);
    assert_int_equal(plan.bytes_read, 4 * (8 + 2 + 8 + 7 * 8));
    assert_int_equal(plan.bytes_written, plan.bytes_read);
}

#define PASS "merge_method: passthrough\n"
#define SLICE(x) "slices:\n- sources: [" x "]\n"

static void test_form_errors(void **state) {
    (void)state;
    two_models();
    expect_error(PASS "slices: []\n", OBM_E_ARG, "recipe: slices: expected a list of slices, found none");
    expect_error(PASS "slices: {a: 1}\n", OBM_E_ARG, "expected a list of slices, found an object");
    expect_error(PASS "slices: [1]\n", OBM_E_ARG, "slices[0]: expected a mapping");
    expect_error(PASS "slices: [{sauces: []}]\n", OBM_E_ARG,
                 "slices[0]: unknown key \"sauces\", did you mean \"sources\"?");
    expect_error(PASS "slices: [{sources: 1}]\n", OBM_E_ARG, "slices[0].sources: expected a list");
    expect_error(PASS "slices: [{sources: []}]\n", OBM_E_ARG, "slices[0]: passthrough takes exactly 1 model, found 0");
    expect_error(PASS SLICE("{model: a}"), OBM_E_ARG, "slices[0].sources[0]: \"layer_range\" is missing");
    expect_error(PASS SLICE("{model: a, layer_rnage: [0, 1]}"), OBM_E_ARG, "did you mean \"layer_range\"?");
    expect_error(PASS SLICE("{model: a, layer_range: [0, 1.5]}"), OBM_E_ARG, "expected two integers");
    expect_error(PASS SLICE("{model: a, layer_range: [2, 2]}"), OBM_E_ARG, "0 <= first < end, found [2, 2]");
    expect_error(PASS SLICE("{model: a, layer_range: [-1, 2]}"), OBM_E_ARG, "slices[0].sources[0]: layer_range");
    expect_error("merge_method: linear\n" SLICE(
                     "{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}") "parameters: {weight: 1}\n",
                 OBM_E_ARG, "slices[0].sources[1]: layer_range: expected 2 layers as in the first source, found 3");
    expect_error("merge_method: linear\n" SLICE("{model: a, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}"),
                 OBM_E_ARG, "slices[0].sources[1]: a is listed twice");
    expect_error("merge_method: ties\nbase_model: a\n" SLICE("{model: b, layer_range: [0, 2]}"), OBM_E_ARG,
                 "slices[0]: the base a is not among the sources");
    expect_error("merge_method: ties\n" SLICE("{model: b, layer_range: [0, 2]}"), OBM_E_ARG,
                 "slices[0]: ties needs a \"base_model\"");
    expect_error("merge_method: linear\n" SLICE("{model: a, layer_range: [0, 1], parameters: {wieght: 1}}"), OBM_E_ARG,
                 "slices[0].sources[0].parameters: linear has no parameter \"wieght\" "
                 "(known: weight, normalize), did you mean");
    expect_error(PASS "models: [{model: a}]\nslices: []\n", OBM_E_ARG, "both \"models\" and \"slices\", expected one");
    expect_error(PASS "modules: {default: {models: [{model: a}], slices: []}}\n", OBM_E_ARG,
                 "modules.default: both \"models\" and \"slices\"");
    expect_error(PASS "modules: {default: {}}\n", OBM_E_ARG, "modules.default: \"models\" is missing");
    expect_error(PASS "modules: {defualt: {models: [{model: a}]}}\n", OBM_E_UNSUPPORTED,
                 "modules: \"defualt\": models of text have one module, \"default\", did you mean \"default\"?");
    expect_error(PASS "modules: {vision_tower: {models: [{model: a}]}}\n", OBM_E_UNSUPPORTED, "\"vision_tower\"");
    expect_error(PASS "modules: [a]\n", OBM_E_ARG, "modules: expected a mapping, found an array");
    expect_error(PASS "modules: {default: {model: a}}\n", OBM_E_ARG, "modules.default: unknown key \"model\"");
    expect_error(PASS "modules: {default: {slices: [{sources: [{model: a, layer_range: [3, 5]}]}]}}\n", OBM_E_ARG,
                 "modules.default.slices[0].sources[0]: layer_range: a has layers [0, 4)");
}

/* What the files say against the slices; nothing is read but headers. */
static void test_model_errors(void **state) {
    (void)state;
    two_models();
    const char both[] = PASS "slices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
                             "- sources: [{model: other, layer_range: [1, 2]}]\n";
    expect_error(PASS SLICE("{model: a, layer_range: [3, 5]}"), OBM_E_ARG,
                 "recipe: slices[0].sources[0]: layer_range: a has layers [0, 4), expected a part of it, found [3, 5)");
    write_model((made){"other", NULL, 3, 2, 3, true, false});
    expect_error(both, OBM_E_SHAPE,
                 "recipe: slices[1].sources[0]: model.layers.1." UP ": shape (3, 2) in a, (3, 3) in other");
    expect_error(
        "merge_method: linear\n" SLICE(
            "{model: a, layer_range: [0, 1]}, {model: other, layer_range: [1, 2]}") "parameters: {weight: 1}\n",
        OBM_E_SHAPE, "recipe: slices[0].sources[1]: model.layers.1." UP ": shape (3, 2) in a, (3, 3) in other");
    write_model((made){"other", NULL, 3, 2, 2, true, true});
    expect_error(both, OBM_E_NOTFOUND,
                 "slices[1].sources[0]: tensor model.layers.1.mlp.up_proj.bias of other is not in a");
    expect_error(PASS "slices:\n- sources: [{model: other, layer_range: [0, 2]}]\n"
                      "- sources: [{model: a, layer_range: [1, 2]}]\n",
                 OBM_E_NOTFOUND, "slices[1].sources[0]: tensor model.layers.0.mlp.up_proj.bias of other is not in a");
    expect_error("merge_method: ties\nprofile: paper\nslices:\n"
                 "- {base_model: a, sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}\n"
                 "- {base_model: b, sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]}\n",
                 OBM_E_ARG, "the same models in every slice");
}

/* ---- several documents ---- */

#define HALF "{model: a, layer_range: [0, 2]}"
static const char chain[] =
    "merge_method: linear\nmodels: [{model: stacked}, {model: scaled}]\nparameters: {weight: 1}\n"
    "---\nname: scaled\nmerge_method: passthrough\nmodels: [{model: stacked, parameters: {scale: 3}}]\n"
    "---\nname: stacked\nmerge_method: passthrough\n"
    "slices: [{sources: [" HALF "]}, {sources: [{model: b, layer_range: [0, 1]}]}]\n---\n";

static bool is_there(const char *name) {
    char *path = in_folder(name);
    bool there = obm__is_directory(path);
    obm_free(path);
    return there;
}

static void test_documents(void **state) {
    (void)state;
    two_models();
    obm_checkpoint *c = merged(chain, "chained");
    expect_layer(c, 0, 2, 0, 0, 0);
    expect_layer(c, 1, 2, 1, 0, 0);
    expect_layer(c, 2, 0, 0, 2, 0);
    expect_config(c, 3, "a0 a1 b0 ");
    obm_checkpoint_free(c);
    assert_false(is_there("chained.onebitmerge-parts"));

    obm_plan plan = {0};
    OK(merge_to(chain, NULL, &plan, err));
    const uint64_t one = 8 + 2 + 8 + 3 * 8; /* elements */
    assert_int_equal(plan.bytes_read, 4 * (one + one + 2 * one));
    assert_int_equal(plan.bytes_written, 4 * 3 * one);
    assert_int_equal(plan.tensors, 3 * 9);
}

static void test_documents_with_names(void **state) {
    (void)state;
    two_models();
    char text[1024];
    snprintf(text, sizeof text, "name: last\n%s", chain);
    OK(merge_to(text, "all", NULL, err));
    static const char *const names[] = {"all/stacked", "all/scaled", "all/last"};
    const double scales[] = {1, 3, 2};
    for (int i = 0; i < 3; i++) {
        obm_checkpoint *c;
        char *path = in_folder(names[i]);
        OK(obm_checkpoint_open(ctx, path, &c, err));
        expect_layer(c, 1, scales[i], 1, 0, 0);
        obm_checkpoint_free(c);
        obm_free(path);
    }
}

#define NAMED(name, model) "name: " name "\nmerge_method: passthrough\nmodels: [{model: " model "}]\n"

/* All of a recipe is planned before any of it is run. */
static void test_document_errors(void **state) {
    (void)state;
    two_models();
    obm_error err;
    const char late[] =
        "merge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [2, 5]}]}]\n---\n" NAMED("x", "a");
    assert_int_equal(merge_to(late, "late", NULL, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "layer_range: x has layers [0, 4)"));
    assert_false(is_there("late.onebitmerge-parts") || is_there("late"));
    expect_error(NAMED("x", "y") "---\n" NAMED("y", "x"), OBM_E_ARG, "document \"y\" needs \"x\", which needs it too");
    expect_error(NAMED("x", "x") "---\n" NAMED("y", "a"), OBM_E_ARG, "which needs it too");
    expect_error(NAMED("x", "a") "---\n" NAMED("x", "b"), OBM_E_ARG, "two documents have the name \"x\"");
    expect_error(NAMED("../x", "a") "---\n" NAMED("y", "b"), OBM_E_ARG, "name: expected the name of a folder");
    expect_error(PASS "models: [{model: a}]\n---\n" PASS "models: [{model: a}]\n", OBM_E_ARG,
                 "more than one document without a \"name\"");
    expect_error(NAMED("x", "a") "---\nmerge_method: passthruogh\nmodels: [{model: x}]\n", OBM_E_ARG,
                 "did you mean \"passthrough\"?");
    expect_error(NAMED("x", "a") "---\n- 1\n", OBM_E_FORMAT, "expected a mapping");
}

/* Where a run fails nothing of its parts stays, and what is no part is not touched. */
static void test_document_failures(void **state) {
    (void)state;
    two_models();
    write_model((made){"nan", NULL, 3, 3, 2, true, false});
    char *path = in_folder("nan/model.safetensors"), *bytes;
    size_t size;
    obm_error err;
    OK(obm__file_read(path, &bytes, &size, err));
    memcpy(bytes + size - 4, &(float){NAN}, 4);
    OK(obm__file_write(path, bytes, size, err));
    obm_free(bytes), obm_free(path);
    const char recipe[] = NAMED(
        "x", "a") "---\nmerge_method: linear\nmodels: [{model: nan}, {model: y}]\nparameters: {weight: 1}\n"
                  "---\nname: y\nmerge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [0, 3]}]}]\n";
    assert_int_equal(merge_to(recipe, "failed", NULL, &err), OBM_E_VALUE);
    assert_false(is_there("failed.onebitmerge-parts") || is_there("failed"));
}

/* A local folder has no revisions; parts and hub names do. */
static void test_revisions(void **state) {
    (void)state;
    two_models();
    obm_checkpoint *c = merged(PASS SLICE("{model: a@main, layer_range: [1, 2]}"), "revision");
    expect_layer(c, 0, 1, 1, 0, 0);
    obm_checkpoint_free(c);
    assert_non_null(strstr(warnings, "a is a local folder: the revision main is ignored"));
    expect_error(PASS "models: [{model: org/model@v1}]\n", OBM_E_IO, "org/model@v1");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stack),
        cmocka_unit_test(test_settings),
        cmocka_unit_test(test_bases),
        cmocka_unit_test(test_tied),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_form_errors),
        cmocka_unit_test(test_model_errors),
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_documents_with_names),
        cmocka_unit_test(test_document_errors),
        cmocka_unit_test(test_document_failures),
        cmocka_unit_test(test_revisions),
    };
    return cmocka_run_group_tests_name("slices", tests, setup, teardown);
}
