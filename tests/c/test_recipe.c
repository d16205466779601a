/* Recipes: their syntax, how settings resolve per tensor, and whole merges of small folders against a plain reference.
 */
#include "recipe_fixture.h"

/* ---- syntax ---- */

static obm__recipe *parse(const char *text) {
    obm__recipe *r;
    obm_error err;
    warnings[0] = 0;
    if (obm__recipe_parse(ctx, text, OBM_PROFILE_DEFAULT, &r, &err) != OBM_OK) fail_msg("%s", err.message);
    return r;
}

static void expect_parse_error(const char *text, obm_status status, const char *part) {
    obm__recipe *r;
    obm_error err;
    warnings[0] = 0;
    obm_status got = obm__recipe_parse(ctx, text, OBM_PROFILE_DEFAULT, &r, &err);
    if (got == OBM_OK) obm__recipe_free(r);
    if (got != status) fail_msg("%s: expected %s", got == OBM_OK ? "OK" : err.message, obm_status_name(status));
    if (!strstr(err.message, part)) fail_msg("`%s` is not in: %s", part, err.message);
}

/* The value of a parameter for model `model` (-1: global) of one tensor, as obm__steps_new sees it; NAN without. */
static double value(const obm__recipe *r, const char *tensor, int64_t n_layers, const char *name, int model) {
    obm_param params[64];
    assert_true(obm__recipe_params_capacity(r) <= 64);
    size_t n = obm__recipe_params(r, &r->slices[0], tensor, NULL, obm__recipe_depth(tensor, n_layers), params);
    double global = NAN, own = NAN;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(params[i].name, name)) continue;
        if (params[i].model == -1) global = params[i].value;
        if (params[i].model == model) own = params[i].value;
    }
    return isnan(own) ? global : own;
}

static const char settings[] = "merge_method: ties\n"
                               "base_model: b\n"
                               "models:\n"
                               "  - model: b\n"
                               "  - model: x\n"
                               "    parameters:\n"
                               "      weight: [0, 1, 0.5]\n"
                               "      density:\n"
                               "        - filter: mlp\n"
                               "          value: [0.1, 0.3]\n"
                               "        - filter: self_attn\n"
                               "          value: 0.5\n"
                               "  - model: y/\n"
                               "    parameters: {weight: 1e-06}\n"
                               "parameters:\n"
                               "  weight: 7\n"
                               "  density: [{filter: norm, value: 0.9}, {value: 0.25}]\n"
                               "  normalize: [true, false]\n"
                               "  lambda: '0.5'\n"
                               "random_seed: 12\n";

static void test_settings(void **state) {
    (void)state;
    obm__recipe *r = parse(settings);
    assert_int_equal(r->n_models, 2);
    assert_string_equal(r->slices[0].models[0].ref, "x");
    assert_int_equal(r->seed, 12);
    assert_int_equal(r->profile, OBM_PROFILE_MERGEKIT);
    /* a gradient over 5 layers: t = layer / 4, three values at 0, 1/2, 1 */
    assert_true(value(r, "model.layers.0.mlp.up_proj.weight", 5, "weight", 0) == 0);
    assert_true(value(r, "model.layers.1.mlp.up_proj.weight", 5, "weight", 0) == 0.5);
    assert_true(value(r, "model.layers.2.mlp.up_proj.weight", 5, "weight", 0) == 1);
    assert_true(value(r, "model.layers.3.mlp.up_proj.weight", 5, "weight", 0) == 0.75);
    assert_true(value(r, "model.layers.4.mlp.up_proj.weight", 5, "weight", 0) == 0.5);
    /* embeddings, final norm and head take the first value; a single layer the last */
    assert_true(value(r, "model.embed_tokens.weight", 5, "weight", 0) == 0);
    assert_true(value(r, "lm_head.weight", 5, "weight", 0) == 0);
    assert_true(value(r, "model.layers.0.mlp.up_proj.weight", 1, "weight", 0) == 0.5);
    /* filters: the first match wins; none falls through to the merge's parameters */
    assert_true(fabs(value(r, "model.layers.4.mlp.up_proj.weight", 5, "density", 0) - 0.3) < 1e-15);
    assert_true(value(r, "model.layers.4.self_attn.q_proj.weight", 5, "density", 0) == 0.5);
    assert_true(value(r, "model.norm.weight", 5, "density", 0) == 0.9);
    assert_true(value(r, "model.embed_tokens.weight", 5, "density", 0) == 0.25);
    /* the model's own setting comes before the merge's */
    assert_true(value(r, "model.norm.weight", 5, "weight", 1) == 1e-06);
    assert_true(value(r, "model.norm.weight", 5, "density", 1) == 0.9);
    /* booleans step: int(t * 1) */
    assert_true(value(r, "model.layers.3.mlp.up_proj.weight", 5, "normalize", -1) == 1);
    assert_true(value(r, "model.layers.4.mlp.up_proj.weight", 5, "normalize", -1) == 0);
    assert_true(value(r, "model.norm.weight", 5, "lambda", -1) == 0.5);
    assert_true(isnan(value(r, "model.norm.weight", 5, "rescale", -1)));
    obm__recipe_free(r);
}

static void test_layers(void **state) {
    (void)state;
    assert_int_equal(obm__layer_of("model.layers.12.mlp.up_proj.weight"), 12);
    assert_int_equal(obm__layer_of("transformer.h.3.attn.c_attn.weight"), 3);
    assert_int_equal(obm__layer_of("model.layers.2.experts.7.w1.weight"), 2);
    assert_int_equal(obm__layer_of("model.norm2.weight"), -1);
    assert_int_equal(obm__layer_of("lm_head.weight"), -1);
    assert_int_equal(obm__layer_of(""), -1);
}

static void test_json_text(void **state) {
    (void)state;
    obm__recipe *r =
        parse("{\"merge_method\": \"linear\",\n\t\"models\": [{\"model\": \"a\\ud83d\\ude00\", \"parameters\": "
              "{\"weight\": 0.25}}, {\"model\": \"c\"}], \"base_model\": \"c\", \"parameters\": {\"weight\": 2}, "
              "\"dtype\": \"torch.bfloat16\", \"profile\": \"paper\", \"slices\": null}");
    assert_int_equal(r->n_models, 2);
    assert_true(r->has_dtype && r->dtype == OBM_BF16 && !r->has_out_dtype);
    assert_int_equal(r->profile, OBM_PROFILE_PAPER);
    assert_string_equal(r->slices[0].models[0].ref, "a\xf0\x9f\x98\x80");
    assert_true(value(r, "w", 1, "weight", 0) == 0.25 && value(r, "w", 1, "weight", 1) == 2);
    obm__recipe_free(r);
}

static void test_base_of_linear(void **state) {
    (void)state;
    obm__recipe *r = parse("merge_method: linear\nbase_model: b\nmodels: [{model: x}]\nparameters: {weight: 1}\n");
    assert_int_equal(r->n_models, 2); /* as mergekit: the base becomes one more input */
    assert_string_equal(r->slices[0].models[1].ref, "b");
    obm__recipe_free(r);
}

static void test_aliases(void **state) {
    (void)state;
    obm__recipe *r = parse("merge_method: ties\nbase_model: b\nmodels:\n"
                           "- {model: x, parameters: &p {weight: 0.5, density: 0.25}}\n- {model: y, parameters: *p}\n");
    assert_true(value(r, "w", 1, "weight", 1) == 0.5 && value(r, "w", 1, "density", 1) == 0.25);
    obm__recipe_free(r);
}

/* As PyYAML has it: a mapping's own keys come first, whatever their place, then the mappings of the list in order. */
static void test_merge_keys(void **state) {
    (void)state;
    obm__recipe *r = parse("merge_method: ties\nbase_model: b\nmodels:\n"
                           "- {model: x, parameters: &p {weight: 0.5, density: 0.25}}\n"
                           "- {model: y, parameters: {<<: *p, weight: 2}}\n"
                           "- {model: z, parameters: &q {density: 0.75, weight: 1}}\n"
                           "- {model: u, parameters: {weight: 3, <<: [*q, *p]}}\n");
    assert_true(value(r, "w", 1, "weight", 1) == 2 && value(r, "w", 1, "density", 1) == 0.25);
    assert_true(value(r, "w", 1, "weight", 3) == 3 && value(r, "w", 1, "density", 3) == 0.75);
    obm__recipe_free(r);
}

#define TIES "merge_method: ties\nbase_model: b\n"
#define MODELS "models: [{model: x, parameters: {weight: 1}}]\n"

static void test_recipe_errors(void **state) {
    (void)state;
    expect_parse_error("", OBM_E_FORMAT, "empty");
    expect_parse_error("- a\n", OBM_E_FORMAT, "expected a mapping, found an array");
    expect_parse_error("a: [1\nb: 2\n", OBM_E_FORMAT, "line 2");
    expect_parse_error("merge_method: ties\nmerge_method: linear\n", OBM_E_FORMAT,
                       "line 2: duplicate key merge_method");
    expect_parse_error("<<: 3\nmerge_method: ties\n", OBM_E_FORMAT,
                       "line 1: a merge key (<<): expected a mapping or a list of mappings");
    expect_parse_error("<<: {}\n<<: {}\n", OBM_E_FORMAT, "line 2: duplicate key <<");
    expect_parse_error("'<<': {}\n" TIES MODELS, OBM_E_ARG, "unknown key \"<<\"");
    expect_parse_error("{\"merge_method\": \"ties\", \"merge_method\": 1}", OBM_E_FORMAT, "duplicate key");
    expect_parse_error(TIES MODELS "---\n" TIES MODELS, OBM_E_UNSUPPORTED, "more than one document");
    expect_parse_error(TIES "models: [{model: x, parameters: {weight: .inf}}]\n", OBM_E_FORMAT,
                       "line 3: expected a finite number");
    expect_parse_error(TIES "models: [{model: x, parameters: {weight: 1e999}}]\n", OBM_E_FORMAT, "no double holds");
    expect_parse_error(TIES "models: [{model: x, parameters: {weight: 010}}]\n", OBM_E_FORMAT, "leading zero");
    expect_parse_error(TIES "models: [{model: !!python/object x}]\n", OBM_E_UNSUPPORTED, "tags");
    expect_parse_error("models: []\n", OBM_E_ARG, "\"merge_method\" is missing");
    expect_parse_error("merge_method: dare_tie\nmodels: []\n", OBM_E_ARG, "did you mean \"dare_ties\"?");
    expect_parse_error("merge_method: TIES\nmodels: []\n", OBM_E_ARG, "did you mean \"ties\"?");
    expect_parse_error("merge_method: lin\nmodels: []\n", OBM_E_ARG, "did you mean \"linear\"?");
    expect_parse_error("merge_method: task\nmodels: []\n", OBM_E_ARG, "did you mean \"task_arithmetic\"?");
    expect_parse_error("merge_method: ties\nmodels:\n\t- model: x\n", OBM_E_FORMAT,
                       "YAML indents with spaces, not tabs");
    expect_parse_error("merge_method: ties\n" MODELS, OBM_E_ARG, "needs a \"base_model\"");
    expect_parse_error(TIES, OBM_E_ARG, "\"models\" is missing");
    expect_parse_error(TIES "models: []\n", OBM_E_ARG, "at least 1 model besides the base, found 0");
    expect_parse_error(TIES "models: [{model: b}]\n", OBM_E_ARG, "found 0");
    expect_parse_error(TIES "models: [{modle: x}]\n", OBM_E_ARG,
                       "models[0]: unknown key \"modle\", did you mean \"model\"?");
    expect_parse_error(TIES "models: [{model: x}, {model: x/}]\n", OBM_E_ARG, "listed twice");
    expect_parse_error(TIES "models: [{model: {path: x}}]\n", OBM_E_ARG, "models[0].model: unknown key \"path\"");
    expect_parse_error(TIES "models: [{model: {model: {paht: x}}}]\n", OBM_E_ARG, "did you mean \"path\"?");
    expect_parse_error(TIES "models: [{model: {model: {revision: x}}}]\n", OBM_E_ARG,
                       "models[0].model: expected a path");
    expect_parse_error(TIES "models: [{model: 3}]\n", OBM_E_ARG, "models[0].model: expected a path, found an integer");
    expect_parse_error(TIES "models: [{model: x, weight: 1}]\n", OBM_E_ARG,
                       "models[0]: unknown key \"weight\", it belongs under \"parameters\"");
    expect_parse_error(TIES MODELS "density: 0.5\n", OBM_E_ARG, "it belongs under \"parameters\"");
    expect_parse_error(TIES MODELS "out_dytpe: bfloat16\n", OBM_E_ARG, "did you mean \"out_dtype\"?");
    expect_parse_error(TIES MODELS "dtype: int64\n", OBM_E_UNSUPPORTED, "int64 is not supported");
    expect_parse_error(TIES MODELS "dtype: bfloat\n", OBM_E_ARG, "did you mean \"bfloat16\"?");
    expect_parse_error(TIES MODELS "slices: []\n", OBM_E_ARG, "both \"models\" and \"slices\", expected one");
    expect_parse_error(TIES MODELS "tokenizer_source: 3\n", OBM_E_ARG, "tokenizer_source: expected a path");
    expect_parse_error(TIES MODELS "tokenizer_source: base\ntokenizer: {source: base}\n", OBM_E_ARG,
                       "both \"tokenizer_source\" and \"tokenizer\"");
    expect_parse_error(TIES MODELS "tokenizer: {sauce: base}\n", OBM_E_ARG, "did you mean \"source\"?");
    expect_parse_error(TIES MODELS "tokenizer: {pad_to_multiple_of: 0}\n", OBM_E_ARG,
                       "pad_to_multiple_of: expected an integer");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: [a]}\n", OBM_E_ARG, "tokenizer.tokens: expected a mapping");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: {a: x}}\n", OBM_E_ARG,
                       "tokenizer.tokens.a: expected a mapping");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: {a: {forse: true}}}\n", OBM_E_ARG, "did you mean \"force\"?");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: {a: {force: true}}}\n", OBM_E_ARG, "force needs a \"source\"");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: {a: {source: {kind: zreo}}}}\n", OBM_E_ARG,
                       "tokens.a.source: kind: expected model_token or zero, found \"zreo\"");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: {a: {source: {kind: model_token, model: x}}}}\n", OBM_E_ARG,
                       "expected \"token\" or \"token_id\"");
    expect_parse_error(TIES MODELS "tokenizer: {tokens: {a: {source: {kind: model_token, token: x}}}}\n", OBM_E_ARG,
                       "\"model\" is missing");
    expect_parse_error(TIES MODELS "chat_template: chatlm\n", OBM_E_ARG, "did you mean \"chatml\"?");
    expect_parse_error(TIES MODELS "chat_template: a template without braces in it\n", OBM_E_ARG,
                       "expected auto, a name (alpaca, chatml, exaone, llama3, mistral) or a Jinja template, found");
    expect_parse_error(TIES MODELS "profile: official\n", OBM_E_ARG, "mergekit or paper");
    expect_parse_error(TIES MODELS "random_seed: -1\n", OBM_E_ARG, "random_seed");
    expect_parse_error(TIES MODELS "parameters: {lamda: 1}\n", OBM_E_ARG, "did you mean \"lambda\"?");
    expect_parse_error(TIES MODELS "parameters: {density: 2}\n", OBM_E_ARG,
                       "parameters.density: expected a number in [0, 1], found 2");
    expect_parse_error(TIES MODELS "parameters: {scope: global}\n", OBM_E_ARG,
                       "parameters.scope: expected tensor or model, found \"global\"");
    expect_parse_error(TIES MODELS "parameters: {normalize: 2}\n", OBM_E_ARG, "expected true or false");
    expect_parse_error(TIES MODELS "parameters: {density: []}\n", OBM_E_ARG, "an empty list");
    expect_parse_error(TIES MODELS "parameters: {density: [0.1, {value: 1}]}\n", OBM_E_ARG, "density");
    expect_parse_error(TIES MODELS "parameters: {density: [{value: 1}, 0.1]}\n", OBM_E_ARG, "among pairs");
    expect_parse_error(TIES MODELS "parameters: {density: {fliter: mlp, value: 1}}\n", OBM_E_ARG,
                       "did you mean \"filter\"?");
    expect_parse_error(TIES MODELS "parameters: {density: {filter: mlp}}\n", OBM_E_ARG, "without a value");
    expect_parse_error(TIES MODELS "parameters: {density: many}\n", OBM_E_ARG, "found \"many\"");
    /* What a method needs is asked for where it would stand. */
    expect_parse_error("merge_method: linear\nmodels: [{model: x, parameters: {weight: 1}}, {model: y}]\n", OBM_E_ARG,
                       "models[1].parameters.weight is missing, linear needs it for each model (y)");
    expect_parse_error("merge_method: slerp\nbase_model: b\nmodels: [{model: x}]\n", OBM_E_ARG,
                       "parameters.t is missing, slerp needs it");
    expect_parse_error("merge_method: linear\nbase_model: b\n" MODELS, OBM_E_ARG,
                       "parameters.weight is missing: base_model is one more input of linear");
    /* All that is wrong, in one message, as far as it has room. */
    expect_parse_error(
        TIES "dtyp: bfloat16\ndtype: float23\nmodels: [{model: x, parameters: {weight: a, lamda: 1}}, {modle: y}]\n",
        OBM_E_ARG,
        "recipe: unknown key \"dtyp\", did you mean \"dtype\"?; dtype: no dtype \"float23\" (float32, float16, "
        "bfloat16, float64), did you mean \"float32\"?; models[0].parameters.weight: expected a number, "
        "found \"a\"; models[0].parameters: ties has no parameter \"lamda\"");
    expect_parse_error(TIES MODELS "parameters: {a1: 1, a2: 1, a3: 1, a4: 1, a5: 1, a6: 1, a7: 1, a8: 1, a9: 1}\n",
                       OBM_E_ARG, "; ...");
}

static void test_ignored_parameters_warn(void **state) {
    (void)state;
    obm__recipe_free(parse(TIES "models: [{model: x, parameters: {weight: 1, normalize: false, gamma: 0.1}}]\n"));
    assert_non_null(strstr(warnings, "normalize holds for the whole merge"));
    assert_non_null(strstr(warnings, "ties takes no gamma"));
}

static void test_ignored_keys_warn(void **state) {
    (void)state;
    obm__recipe_free(parse(TIES "models: [{model: x, layer_range: [0, 4], parameters: {weight: 1}}]\nint8_mask: true\n"
                                "trust_remote_code: true\n"));
    assert_non_null(strstr(warnings, "models[0]: layer_range has no effect here, in mergekit too"));
    assert_non_null(strstr(warnings, "recipe: int8_mask has no effect"));
    assert_non_null(strstr(warnings, "recipe: trust_remote_code has no effect"));
}

static void test_references(void **state) {
    (void)state;
    obm__recipe *r = parse("merge_method: linear\nbase_model: {model: org/b, lora: null}\nmodels:\n"
                           "- model: {model: {path: org/x, revision: v2}, lora: {path: l, revision: main}, "
                           "override_architecture: LlamaForCausalLM}\n"
                           "- model: {model: y@z, lora: m}\nparameters: {weight: 1}\n");
    assert_string_equal(r->base, "org/b");
    assert_string_equal(r->slices[0].models[0].ref, "org/x@v2+l@main");
    assert_string_equal(r->slices[0].models[1].ref, "y@z+m");
    assert_non_null(strstr(warnings, "override_architecture has no effect"));
    obm__recipe_free(r);
}

static void test_hostile_yaml(void **state) {
    (void)state;
    char bomb[2048] = "a: &a [x, x, x, x, x, x, x, x, x, x]\n";
    for (char c = 'b'; c < 'k'; c++) {
        size_t n = strlen(bomb);
        snprintf(bomb + n, sizeof bomb - n, "%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n", c, c, c - 1,
                 c - 1, c - 1, c - 1, c - 1, c - 1, c - 1, c - 1, c - 1, c - 1);
    }
    expect_parse_error(bomb, OBM_E_FORMAT, "too many values");
    expect_parse_error("a: &a [*a]\n", OBM_E_FORMAT, "deep");
    char deep[512] = "";
    for (int i = 0; i < 200; i++) strcat(deep, "[");
    expect_parse_error(deep, OBM_E_FORMAT, "recipe");
    expect_parse_error("a: \xff\n", OBM_E_FORMAT, "recipe");
}

/* ---- folders ---- */

#define CONFIG(tied)                                                                       \
    "{\"model_type\": \"llama\", \"num_hidden_layers\": 2, \"torch_dtype\": \"float32\", " \
    "\"tie_word_embeddings\": " tied "}"
#define N_NAMES 6
static const char *const names[N_NAMES] = {"lm_head.weight",
                                           "model.embed_tokens.weight",
                                           "model.layers.0.mlp.up_proj.weight",
                                           "model.layers.1.mlp.up_proj.weight",
                                           "model.layers.1.self_attn.q_proj.bias",
                                           "model.norm.weight"};
static const int64_t shapes[N_NAMES][2] = {{7, 5}, {7, 5}, {9, 5}, {9, 5}, {5, 0}, {5, 0}};
#define MOST 45

typedef struct toy {
    float x[N_NAMES][MOST];
} toy;

static size_t count_of(int t) { return (size_t)(shapes[t][0] * (shapes[t][1] ? shapes[t][1] : 1)); }

static uint64_t rng_state = 1;
static float uniform(void) {
    rng_state = rng_state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(rng_state >> 40) / (1 << 23) - 1.0);
}

/* Writes tensors [first, N_NAMES) of m; first 1 leaves out the head. */
static void write_model(const char *name, const char *config, const toy *m, obm_dtype dtype, int first) {
    char *dir = in_folder(name), *path = obm__path_join(dir, "model.safetensors"),
         *config_path = obm__path_join(dir, "config.json");
    OK(obm__make_directory(dir, err));
    obm__st_writer *w;
    OK(obm__st_writer_new(path, &w, err));
    for (int t = first; t < N_NAMES; t++)
        OK(obm__st_writer_declare(w, names[t], dtype, shapes[t][1] ? 2 : 1, shapes[t], err));
    OK(obm__st_writer_begin(w, err));
    for (int t = first; t < N_NAMES; t++) {
        char bytes[MOST * 4];
        obm__narrow(ctx->k, dtype, m->x[t], (int64_t)count_of(t), bytes);
        OK(obm__st_writer_write(w, bytes, count_of(t) * obm_dtype_size(dtype), err));
    }
    OK(obm__st_writer_finish(w, NULL, err));
    obm__st_writer_free(w);
    OK(obm__file_write(config_path, config, strlen(config), err));
    obm_free(dir), obm_free(path), obm_free(config_path);
}

static void random_model(toy *m, const toy *around) {
    for (int t = 0; t < N_NAMES; t++)
        for (size_t j = 0; j < count_of(t); j++) m->x[t][j] = around ? around->x[t][j] + 0.25f * uniform() : uniform();
}

static void expect_tensor(const obm_checkpoint *c, int t, obm_dtype dtype, const float *want, double bound) {
    obm_tensor got;
    float x[MOST];
    OK(obm_checkpoint_get(c, names[t], &got, err));
    assert_int_equal(got.dtype, dtype);
    assert_int_equal(obm_tensor_count(&got), count_of(t));
    OK(obm_tensor_read_f32(&got, 0, (int64_t)count_of(t), x, err));
    for (size_t j = 0; j < count_of(t); j++)
        if (!(fabs((double)x[j] - want[j]) <= bound))
            fail_msg("%s[%zu] is %.9g, expected %.9g", names[t], j, x[j], want[j]);
}

/* ---- a plain TIES ---- */

static void trim(float *d, size_t n, double density) {
    size_t keep = (size_t)(density * (double)n), dropped = 0;
    if (keep == 0) keep = 1;
    for (; dropped + keep < n; dropped++) { /* drop the smallest, the last index first among equals */
        size_t least = n;
        for (size_t j = 0; j < n; j++)
            if (isfinite(d[j]) && (least == n || fabsf(d[j]) <= fabsf(d[least]))) least = j;
        d[least] = INFINITY;
    }
    for (size_t j = 0; j < n; j++) d[j] = isfinite(d[j]) ? d[j] : 0;
}

/* mergekit's: signs elected on the weighted deltas, divided by the agreeing weights. */
static void ties(const float *base, const float *a, const float *b, size_t n, const double *density,
                 const double *weight, float *out) {
    float d[2][4 * MOST];
    for (size_t j = 0; j < n; j++) d[0][j] = a[j] - base[j], d[1][j] = b[j] - base[j];
    for (int i = 0; i < 2; i++) trim(d[i], n, density[i]);
    for (size_t j = 0; j < n; j++) {
        double p[2] = {weight[0] * d[0][j], weight[1] * d[1][j]}, sum = p[0] + p[1], mixed = 0, mass = 0;
        for (int i = 0; i < 2; i++)
            if (sum >= 0 ? p[i] > 0 : p[i] < 0) mixed += p[i], mass += weight[i];
        out[j] = (float)(base[j] + (mass == 0 ? 0 : mixed / mass));
    }
}

static toy base, one, two;

static void three_models(obm_dtype dtype) {
    random_model(&base, NULL);
    random_model(&one, &base);
    random_model(&two, &base);
    toy *all[] = {&base, &one, &two};
    const char *const dirs[] = {"base", "one", "two"};
    for (int i = 0; i < 3; i++) {
        write_model(dirs[i], CONFIG("false"), all[i], dtype, 0);
        for (int t = 0; t < N_NAMES && dtype == OBM_BF16; t++) { /* what the file holds */
            uint16_t bits[MOST];
            obm__narrow(ctx->k, OBM_BF16, all[i]->x[t], (int64_t)count_of(t), bits);
            ctx->k->bf16_to_f32(all[i]->x[t], bits, count_of(t));
        }
    }
}

#define TWO_MODELS                                                                                \
    "base_model: base\nmodels:\n- {model: one, parameters: {weight: 0.5, density: [0.2, 0.6]}}\n" \
    "- {model: two, parameters: {weight: [{filter: mlp, value: 0.25}, {value: 1}], density: 0.5}}\n"

static void test_ties_folder(void **state) {
    (void)state;
    three_models(OBM_F32);
    obm_checkpoint *c = merged_with("merge_method: ties\n" TWO_MODELS, "ties", NULL);
    assert_int_equal(c->count, N_NAMES);
    for (int t = 0; t < N_NAMES; t++) {
        float want[MOST];
        const double density[2] = {strstr(names[t], "layers.1") ? 0.6 : 0.2, 0.5},
                     weight[2] = {0.5, strstr(names[t], "mlp") ? 0.25 : 1};
        ties(base.x[t], one.x[t], two.x[t], count_of(t), density, weight, want);
        expect_tensor(c, t, OBM_F32, want, 1e-6);
    }
    assert_non_null(strstr(c->config_text, "\"float32\""));
    obm_checkpoint_free(c);
}

static void test_filters_of_nothing_warn(void **state) {
    (void)state;
    three_models(OBM_F32);
    OK(merge_to("merge_method: passthrough\nmodels: [{model: one}]\n"
                "parameters: {scale: [{filter: up_prj, value: 0.5}, {filter: up_proj, value: 1}, {value: 1}]}\n",
                NULL, NULL, err));
    assert_string_equal(warnings, "recipe: parameters.scale: filter \"up_prj\" matches no tensor\n");
    OK(merge_to(
        "merge_method: linear\nmodels: [{model: one, parameters: {weight: [{filter: '*', value: 1}]}}, {model: two,"
        " parameters: {weight: [{filter: mpl, value: 1}, {filter: mlp, value: 0.5}, {value: 1}]}}]\n",
        NULL, NULL, err));
    assert_string_equal(warnings, "recipe: models[1].parameters.weight: filter \"mpl\" matches no tensor\n");
    OK(merge_to("merge_method: passthrough\nslices: [{parameters: {scale: {filter: layers.1., value: 1}}, sources: "
                "[{model: one,"
                " layer_range: [0, 1], parameters: {scale: [{filter: layers.0., value: 2}, {value: 1}]}}]},"
                " {sources: [{model: one, layer_range: [0, 2], parameters: {scale: [{filter: layers.1., value: 2}, "
                "{value: 1}]}}]}]\n",
                NULL, NULL, err));
    assert_string_equal(warnings, "recipe: slices[0].parameters.scale: filter \"layers.1.\" matches no tensor\n");
}

static void test_paper_differs(void **state) {
    (void)state;
    three_models(OBM_F32);
    /* one trim over the concatenation of all tensors in the order of their names, unit weights */
    enum { ALL = 4 * MOST };
    float b[ALL], x[ALL], y[ALL], want[ALL];
    size_t n = 0;
    for (int t = 0; t < N_NAMES; t++)
        for (size_t j = 0; j < count_of(t); j++, n++) b[n] = base.x[t][j], x[n] = one.x[t][j], y[n] = two.x[t][j];
    ties(b, x, y, n, (double[]){0.3, 0.4}, (double[]){1, 1}, want);
    obm_checkpoint *c =
        merged_with("merge_method: ties\nprofile: paper\nbase_model: base\nmodels:\n"
                    "- {model: two, parameters: {density: 0.4}}\n- {model: one, parameters: {density: 0.3}}\n",
                    "paper", NULL);
    size_t at = 0;
    for (int t = 0; t < N_NAMES; at += count_of(t++)) expect_tensor(c, t, OBM_F32, want + at, 1e-6);
    obm_checkpoint_free(c);

    obm_error err;
    assert_int_equal(merge_with("merge_method: ties\nprofile: paper\n" TWO_MODELS, "never", NULL, NULL, &err),
                     OBM_E_ARG);
    assert_non_null(strstr(err.message, "one density per model"));
}

static void test_dtypes(void **state) {
    (void)state;
    three_models(OBM_BF16);
    const char recipe[] = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n";
    float want[MOST];
    char text[256];
    const struct {
        const char *keys, *config;
        obm_dtype dtype;
        double bound;
    } cases[] = {
        {"", "bfloat16", OBM_BF16, 1.0 / 256},
        {"dtype: float32\n", "float32", OBM_F32, 1e-6},
        {"dtype: float32\nout_dtype: float16\n", "float16", OBM_F16, 1.0 / 2048},
    };
    for (size_t i = 0; i < 3; i++) {
        char out[16];
        snprintf(text, sizeof text, "%s%s", recipe, cases[i].keys);
        snprintf(out, sizeof out, "dtype%zu", i);
        obm_checkpoint *c = merged_with(text, out, NULL);
        for (int t = 0; t < N_NAMES; t++) {
            for (size_t j = 0; j < count_of(t); j++) want[j] = (one.x[t][j] + two.x[t][j]) / 2;
            expect_tensor(c, t, cases[i].dtype, want, cases[i].bound * 1.5);
        }
        assert_string_equal(obm__json_string(obm__json_get(c->config, "torch_dtype")), cases[i].config);
        obm_checkpoint_free(c);
    }
}

/* `dtype` casts the inputs before deltas are taken, and deltas are rounded to it too. */
static void test_working_dtype(void **state) {
    (void)state;
    three_models(OBM_F32);
    obm_checkpoint *c = merged_with("merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}]\n"
                                    "parameters: {weight: 0.5}\ndtype: bfloat16\nout_dtype: float32\n",
                                    "working", NULL);
    for (int t = 0; t < N_NAMES; t++) {
        float want[MOST];
        for (size_t j = 0; j < count_of(t); j++) {
            float in[2] = {base.x[t][j], one.x[t][j]}, d;
            uint16_t bits[2];
            ctx->k->f32_to_bf16(bits, in, 2);
            ctx->k->bf16_to_f32(in, bits, 2);
            d = in[1] - in[0];
            ctx->k->f32_to_bf16(bits, &d, 1);
            ctx->k->bf16_to_f32(&d, bits, 1);
            want[j] = in[0] + 0.5f * d;
        }
        expect_tensor(c, t, OBM_F32, want, 0);
    }
    obm_checkpoint_free(c);
}

typedef struct loose {
    const char *name;
    obm_dtype dtype;
    const void *data;
} loose; /* eight bytes each */

static void write_loose(const char *name, const loose *tensors, size_t n) {
    char *dir = in_folder(name), *path = obm__path_join(dir, "model.safetensors");
    OK(obm__make_directory(dir, err));
    obm__st_writer *w;
    OK(obm__st_writer_new(path, &w, err));
    for (size_t i = 0; i < n; i++)
        OK(obm__st_writer_declare(w, tensors[i].name, tensors[i].dtype, 1,
                                  (int64_t[]){8 / (int64_t)obm_dtype_size(tensors[i].dtype)}, err));
    OK(obm__st_writer_begin(w, err));
    for (size_t i = 0; i < n; i++) OK(obm__st_writer_write(w, tensors[i].data, 8, err));
    OK(obm__st_writer_finish(w, NULL, err));
    obm__st_writer_free(w);
    obm_free(dir), obm_free(path);
}

static void expect_merge_error(const char *recipe, const char *out, obm_status status, const char *part) {
    obm_error err;
    obm_status got = merge_with(recipe, out, NULL, NULL, &err);
    if (got != status)
        fail_msg("expected %s, got %s: %s", obm_status_name(status), obm_status_name(got), got ? err.message : "");
    if (!strstr(err.message, part)) fail_msg("`%s` is not in: %s", part, err.message);
}

/* Integers are carried over if they agree; derived buffers are left out; a tensor that only a model has is not dropped
 * in silence. */
static void test_other_tensors(void **state) {
    (void)state;
    const float x[2] = {1, 2}, y[2] = {3, 5};
    const int64_t ids = 42, others = 43;
    const double wide = 0.5;
    write_loose("loose-base",
                (loose[]){{"ids", OBM_I64, &ids},
                          {"layers.0.rotary_emb.inv_freq", OBM_F32, x},
                          {"w", OBM_F32, x},
                          {"wide", OBM_F64, &wide}},
                4);
    write_loose("loose", (loose[]){{"ids", OBM_I64, &ids}, {"w", OBM_F32, y}, {"wide", OBM_F64, &wide}}, 3);
    const char recipe[] =
        "merge_method: task_arithmetic\nbase_model: loose-base\nmodels: [{model: loose}]\nparameters: {weight: 0.5}\n";
    obm_checkpoint *c = merged_with(recipe, "loose-out", NULL);
    obm_tensor t;
    assert_int_equal(c->count, 3);
    assert_int_equal(obm_checkpoint_get(c, "ids", &t, NULL), OBM_OK);
    assert_int_equal(t.dtype, OBM_I64);
    assert_memory_equal(t.data, &ids, 8);
    assert_int_equal(obm_checkpoint_get(c, "w", &t, NULL), OBM_OK);
    assert_memory_equal(t.data, ((float[]){2, 3.5f}), 8);
    assert_int_equal(obm_checkpoint_get(c, "wide", &t, NULL), OBM_OK);
    assert_true(t.dtype == OBM_F32 && *(const float *)t.data == 0.5f);
    obm_checkpoint_free(c);

    write_loose("loose", (loose[]){{"ids", OBM_I64, &others}, {"w", OBM_F32, y}, {"wide", OBM_F64, &wide}}, 3);
    expect_merge_error(recipe, "never", OBM_E_DTYPE, "ids: I64 tensors cannot be merged");
    write_loose("loose",
                (loose[]){{"ids", OBM_I64, &ids}, {"more", OBM_F32, x}, {"w", OBM_F32, y}, {"wide", OBM_F64, &wide}},
                4);
    expect_merge_error(recipe, "never", OBM_E_NOTFOUND, "tensor more of loose is not in loose-base");
}

static void test_tied_embeddings(void **state) {
    (void)state;
    three_models(OBM_F32);
    write_model("base", CONFIG("true"), &base, OBM_F32, 1);
    write_model("one", CONFIG("true"), &one, OBM_F32, 1);
    const char recipe[] =
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}]\nparameters: {weight: 0.5}\n";
    obm_checkpoint *c = merged_with(recipe, "tied", NULL);
    assert_int_equal(c->count, N_NAMES - 1);
    assert_true(c->tied);
    obm_checkpoint_free(c);

    write_model("one", CONFIG("false"), &one, OBM_F32, 0); /* an untied input: the base's head is its embedding */
    c = merged_with(recipe, "untied", NULL);
    assert_int_equal(c->count, N_NAMES);
    assert_false(c->tied);
    float want[MOST];
    for (size_t j = 0; j < count_of(0); j++) want[j] = base.x[1][j] + 0.5f * (one.x[0][j] - base.x[1][j]);
    expect_tensor(c, 0, OBM_F32, want, 1e-6);
    bool tied = true;
    assert_true(obm__json_bool(obm__json_get(c->config, "tie_word_embeddings"), &tied) && !tied);
    obm_checkpoint_free(c);
}

static char *bytes_of(const char *out, size_t *size) {
    char *dir = in_folder(out), *path = obm__path_join(dir, "model.safetensors"), *text;
    OK(obm__file_read(path, &text, size, err));
    obm_free(dir), obm_free(path);
    return text;
}

static void test_same_bytes(void **state) {
    (void)state;
    three_models(OBM_BF16);
    const char recipe[] = "merge_method: dare_ties\n" TWO_MODELS "random_seed: 3\n";
    size_t size, other;
    obm_checkpoint_free(merged_with(recipe, "first", NULL));
    char *want = bytes_of("first", &size);
    obm_context *mine = ctx;
    for (int threads = 1; threads <= 5; threads += 4) {
        ctx = new_context(threads);
        obm_merge_options options = OBM_INIT(obm_merge_options);
        options.overwrite = true;
        options.seed = 3, options.has_seed = true;
        obm_checkpoint_free(merged_with(recipe, "second", &options));
        char *got = bytes_of("second", &other);
        assert_int_equal(size, other);
        assert_memory_equal(want, got, size);
        options.seed = 4;
        obm_checkpoint_free(merged_with(recipe, "second", &options));
        obm_free(got);
        got = bytes_of("second", &other);
        assert_memory_not_equal(want, got, size);
        obm_free(got);
        obm_context_free(ctx);
    }
    ctx = mine;
    obm_free(want);
}

static int count_progress(void *user, const char *what, uint64_t done, uint64_t total) {
    assert_string_equal(what, "merge");
    assert_true(done <= total);
    int *left = user;
    return --*left == 0;
}

static void test_plan_and_progress(void **state) {
    (void)state;
    three_models(OBM_F32);
    obm_error err;
    obm_plan plan = {0};
    obm_merge_options options = OBM_INIT(obm_merge_options);
    options.dry_run = true;
    OK(merge_with("merge_method: ties\n" TWO_MODELS, "dry", &options, &plan, err));
    assert_int_equal(merge_with("merge_method: ties\n" TWO_MODELS, "one", &options, NULL, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "is an input of the merge"));
    char *dry = in_folder("dry");
    assert_false(obm__file_exists(dry) || obm__is_directory(dry));
    obm_free(dry);
    uint64_t bytes = 0;
    for (int t = 0; t < N_NAMES; t++) bytes += 4 * count_of(t);
    assert_int_equal(plan.tensors, N_NAMES);
    assert_int_equal(plan.bytes_written, bytes);
    assert_int_equal(plan.bytes_read, 3 * bytes);
    assert_true(plan.peak_memory > 0 && plan.seconds > 0);

    int left = 3;
    options.dry_run = false;
    options.progress = count_progress;
    options.progress_user = &left;
    assert_int_equal(merge_with("merge_method: ties\n" TWO_MODELS, "stopped", &options, NULL, &err), OBM_E_USER);
    char *stopped = in_folder("stopped/model.safetensors");
    assert_false(obm__file_exists(stopped));
    obm_free(stopped);
    options = (obm_merge_options)OBM_INIT(obm_merge_options);
    options.memory = 1000;
    assert_int_equal(merge_with("merge_method: ties\n" TWO_MODELS, "small", &options, NULL, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "needs at least"));
}

static void test_merge_errors(void **state) {
    (void)state;
    const char recipe[] =
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}]\nparameters: {weight: 1}\n";
    three_models(OBM_F32);
    obm_checkpoint_free(merged_with(recipe, "there", NULL));
    expect_merge_error(recipe, "there", OBM_E_EXISTS, "there");
    expect_merge_error(recipe, "one", OBM_E_ARG, "is an input of the merge");
    expect_merge_error("merge_method: ties\nbase_model: base\nmodels: [{model: one}]\n", "x", OBM_E_ARG,
                       "recipe: models[0].parameters.weight is missing, ties needs it for each model (one)");
    expect_merge_error("merge_method: della\nbase_model: base\nparameters: {weight: 1}\n"
                       "models: [{model: one}, {model: two, parameters: {density: 0.1}}]\n",
                       "x", OBM_E_ARG, "density + epsilon in (0, 1) for two, found -0.05 and 0.25");
    expect_merge_error("merge_method: mwa\n"
                       "models: [{model: one, parameters: {metric: 1}}, {model: two, parameters: {metric: 0}}]\n",
                       "x", OBM_E_ARG, "mwa: metric of two: expected a number above 0, found 0");
    expect_merge_error("merge_method: linear\n"
                       "models: [{model: one, parameters: {weight: 1e300}}, {model: two, parameters: {weight: 1}}]\n",
                       "x", OBM_E_ARG, "linear: the weight of one does not fit f32");
    expect_merge_error("merge_method: ties\nbase_model: base\nmodels: [{model: nowhere, parameters: {weight: 1}}]\n",
                       "x", OBM_E_IO, "nowhere");

    one.x[3][17] = NAN;
    write_model("one", CONFIG("false"), &one, OBM_F32, 0);
    expect_merge_error(recipe, "x", OBM_E_VALUE, "model.layers.1.mlp.up_proj.weight: NaN or Inf in one at index 17");
    write_model("one", CONFIG("false"), &two, OBM_F32, 2);
    expect_merge_error(recipe, "x", OBM_E_NOTFOUND, "tensor lm_head.weight is not in one");
    write_model("one", "{\"model_type\": \"mistral\"}", &two, OBM_F32, 0);
    expect_merge_error(recipe, "x", OBM_E_MISMATCH, "one a mistral");

    char *path = in_folder("one/model.safetensors");
    obm__st_writer *w;
    OK(obm__st_writer_new(path, &w, err));
    const float zeros[MOST] = {0};
    for (int t = 0; t < N_NAMES; t++)
        OK(obm__st_writer_declare(w, names[t], OBM_F32, shapes[t][1] ? 2 : 1,
                                  (int64_t[]){shapes[t][0] - (t == 1), shapes[t][1]}, err));
    OK(obm__st_writer_begin(w, err));
    for (int t = 0; t < N_NAMES; t++) OK(obm__st_writer_write(w, zeros, (count_of(t) - (t == 1 ? 5 : 0)) * 4, err));
    OK(obm__st_writer_finish(w, NULL, err));
    obm__st_writer_free(w);
    obm_free(path);
    char *config = in_folder("one/config.json");
    OK(obm__file_write(config, CONFIG("false"), strlen(CONFIG("false")), err));
    obm_free(config);
    expect_merge_error(recipe, "x", OBM_E_SHAPE,
                       "model.embed_tokens.weight: shape (7, 5) in base, (6, 5) in one: the vocabularies must be the "
                       "same, or tokenizer_source");
}

static void test_card(void **state) {
    (void)state;
    three_models(OBM_F32);
    const char recipe[] = "name: Blend\nmerge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: "
                          "{weight: 1}  # ``` in a comment\n";
    obm_checkpoint_free(merged_with(recipe, "card", NULL));
    char *path = in_folder("card/README.md"), *text;
    size_t size;
    OK(obm__file_read(path, &text, &size, err));
    assert_non_null(strstr(text, "# Blend"));
    assert_non_null(strstr(text, obm_version()));
    assert_non_null(strstr(text, "````yaml\nname: Blend"));
    obm_free(path);
    char hash[33], line[128]; /* of the file as it is */
    obm__map map;
    path = in_folder("card/model.safetensors");
    OK(obm__map_open(path, &map, err));
    OK(obm__map_xxh3(&map, NULL, NULL, hash, err));
    snprintf(line, sizeof line, "\n| model.safetensors | %s |\n", hash);
    assert_non_null(strstr(text, line));
    obm__map_close(&map);
    obm_free(path), obm_free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_settings),
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_json_text),
        cmocka_unit_test(test_base_of_linear),
        cmocka_unit_test(test_aliases),
        cmocka_unit_test(test_merge_keys),
        cmocka_unit_test(test_recipe_errors),
        cmocka_unit_test(test_ignored_parameters_warn),
        cmocka_unit_test(test_ignored_keys_warn),
        cmocka_unit_test(test_references),
        cmocka_unit_test(test_hostile_yaml),
        cmocka_unit_test(test_ties_folder),
        cmocka_unit_test(test_filters_of_nothing_warn),
        cmocka_unit_test(test_paper_differs),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_working_dtype),
        cmocka_unit_test(test_other_tensors),
        cmocka_unit_test(test_tied_embeddings),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_plan_and_progress),
        cmocka_unit_test(test_merge_errors),
        cmocka_unit_test(test_card),
    };
    return cmocka_run_group_tests_name("recipe", tests, setup, teardown);
}
