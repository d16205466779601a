/* LoRA adapters as experts: tests/vectors/lora (written by tests/reference/lora_reference.py) through task vectors,
 * packs and routes; what is refused, and by which name. */
#include "delta_fixture.h"
#include "route/dynamic.h"

#define VECTORS OBM_SOURCE_DIR "/tests/vectors/lora/"
#define Q0 "model.layers.0.self_attn.q_proj"

typedef struct lora_case {
    char name[64], base[64];
} lora_case;
static lora_case cases[32];
static size_t n_cases;

static int read_cases(void **state) {
    (void)state;
    FILE *f = fopen(VECTORS "cases.txt", "r");
    if (!f) return -1;
    while (n_cases < 32 && fscanf(f, "%63s %63s", cases[n_cases].name, cases[n_cases].base) == 2) n_cases++;
    fclose(f);
    return n_cases >= 10 ? 0 : -1;
}

static const char *vector_path(const char *name, const char *file) {
    static char paths[4][512];
    static int next;
    char *p = paths[next = (next + 1) % 4];
    snprintf(p, sizeof paths[0], VECTORS "%s%s%s", name, *file ? "/" : "", file);
    return p;
}

typedef struct opened {
    obm_checkpoint *base, *adapter, *expected;
    obm_task_vector *v;
} opened;

static opened open_case(obm_context *ctx, const lora_case *c) {
    opened o;
    OK(obm_checkpoint_open(ctx, vector_path(c->base, ""), &o.base, err));
    OK(obm_checkpoint_open(ctx, vector_path(c->name, ""), &o.adapter, err));
    OK(obm_checkpoint_open(ctx, vector_path(c->name, "expected.safetensors"), &o.expected, err));
    OK(obm_task_vector_new(o.base, o.adapter, &o.v, err));
    return o;
}

static void close_case(opened *o) {
    obm_task_vector_free(o->v);
    obm_checkpoint_free(o->expected);
    obm_checkpoint_free(o->adapter);
    obm_checkpoint_free(o->base);
}

/* Equal bits; -0 and 0 are one. */
static void assert_floats(const char *name, const float *have, const float *want, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (have[i] != want[i])
            fail_msg("%s[%lld]: %a, expected %a", name, (long long)i, (double)have[i], (double)want[i]);
}

/* ---- task vectors ---- */

static void test_vectors(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(2);
    for (size_t i = 0; i < n_cases; i++) {
        opened o = open_case(ctx, &cases[i]);
        assert_true(obm_checkpoint_is_adapter(o.adapter));
        assert_false(obm_checkpoint_is_adapter(o.base));
        assert_int_equal(obm_task_vector_count(o.v), obm_checkpoint_count(o.expected));
        for (size_t t = 0; t < o.expected->count; t++) {
            const obm__st_entry *e = o.expected->tensors[t];
            float *d = obm__alloc((size_t)obm_tensor_count(&e->t), sizeof *d);
            OK(obm_task_vector_read(o.v, e->name, d, err));
            assert_floats(e->name, d, e->t.data, obm_tensor_count(&e->t));
            obm_free(d);
        }
        close_case(&o);
    }
    obm_context_free(ctx);
}

/* Any part of d is that part of the whole. */
static void test_parts(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(1);
    for (size_t i = 0; i < n_cases; i++) {
        opened o = open_case(ctx, &cases[i]);
        for (size_t t = 0; t < o.v->count; t++) {
            const obm__pair *p = &o.v->pairs[t];
            const obm__st_entry *e = obm__checkpoint_find(o.expected, p->name);
            if (!p->lora) continue;
            int64_t count = obm_tensor_count(&e->t);
            for (int64_t begin = 0; begin < count; begin += 5) {
                float d[7];
                int64_t n = count - begin < 7 ? count - begin : 7;
                obm__lowrank_read(ctx->k, p->lora, begin, n, d);
                assert_floats(p->name, d, (const float *)e->t.data + begin, n);
            }
        }
        close_case(&o);
    }
    obm_context_free(ctx);
}

/* Against sums in long double: the f64 rule loses next to nothing, for pieces beyond one tile and one block of ranks.
 */
static void test_large(void **state) {
    (void)state;
    enum { ROWS = 3, COLS = 1500, RANK = 67 };
    obm_context *ctx = fixture_context(1);
    float *a = fixture_values((size_t)RANK * COLS, 1), *b = fixture_values((size_t)ROWS * RANK, 2);
    float *d = obm__alloc((size_t)ROWS * COLS, sizeof *d), *t = obm__alloc((size_t)ROWS * COLS, sizeof *t);
    obm__lowrank l = {.a = {a, OBM_F32, 2, {RANK, COLS}},
                      .b = {b, OBM_F32, 2, {ROWS, RANK}},
                      .rank = RANK,
                      .rows = ROWS,
                      .cols = COLS,
                      .scaling = 0.75};
    obm__lowrank_read(ctx->k, &l, 0, (int64_t)ROWS * COLS, d);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) {
            long double s = 0;
            for (int k = 0; k < RANK; k++) s += (long double)b[r * RANK + k] * (long double)a[k * COLS + c];
            assert_true(fabsl(0.75L * s - (long double)d[r * COLS + c]) <= 1e-7L * (1 + fabsl(s)));
        }
    l.rows = COLS, l.cols = ROWS, l.transposed = true;
    obm__lowrank_read(ctx->k, &l, 0, (int64_t)ROWS * COLS, t);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) assert_true(t[c * ROWS + r] == d[r * COLS + c]);
    obm_free(a), obm_free(b), obm_free(d), obm_free(t);
    obm_context_free(ctx);
}

/* ---- packs ---- */

static obm_pack *compress_case(obm_context *ctx, const lora_case *c, const char *policy, const char *out) {
    obm_expert e = OBM_INIT(obm_expert);
    obm_pack *p = NULL;
    e.name = "skill";
    e.path = vector_path(c->name, "");
    e.policy = policy;
    OK(obm_compress(ctx, vector_path(c->base, ""), &e, 1, NULL, out, NULL, &p, err));
    return p;
}

static float *base_plus(obm_context *ctx, const obm_tensor *base, const float *d) {
    int64_t n = obm_tensor_count(base);
    float *x = obm__alloc((size_t)n, sizeof *x);
    obm__widen(ctx->k, base, 0, n, x);
    for (int64_t i = 0; i < n; i++) x[i] += d[i];
    return x;
}

static bool is_whole(const obm_pack *p, size_t t) {
    return p->experts[0].entries[t].mode == OBM_MODE_FULL && !p->experts[0].entries[t].lora.rank;
}

static void check_full(const obm_pack *p, const obm_checkpoint *expected) {
    double route = 1;
    for (size_t t = 0; t < p->n_tensors; t++) {
        const obm__st_entry *e = obm__checkpoint_find(expected, p->tensors[t].name);
        int64_t n = obm_tensor_count(&e->t);
        float *want = base_plus(p->ctx, &p->tensors[t].base, e->t.data), *have = obm__alloc((size_t)n, sizeof *have);
        OK(obm_pack_materialise(p, &route, e->name, have, err));
        for (int64_t i = 0; i < n; i++) /* base + (own - base) is the own tensor but for one rounding */
            assert_true(have[i] == want[i] || (is_whole(p, t) && fabsf(have[i] - want[i]) < 1e-6f));
        obm_free(want), obm_free(have);
    }
}

static void test_full_packs(void **state) {
    (void)state;
    char *dir = fixture_folder();
    obm_context *ctx = fixture_context(2);
    for (size_t i = 0; i < n_cases; i++) {
        char *out = obm__path_join(dir, cases[i].name);
        opened o = open_case(ctx, &cases[i]);
        obm_pack *p = compress_case(ctx, &cases[i], "full", out);
        uint64_t stored = 0, factors = 0;
        for (size_t t = 0; t < o.v->count; t++) {
            const obm__pair *pair = &o.v->pairs[t];
            const obm__pack_entry *e = &p->experts[0].entries[obm__pack_find(p, pair->name)];
            obm_pack_tensor shown;
            obm_pack_tensor_at(p, 0, obm__pack_find(p, pair->name), &shown);
            bool touched = pair->lora || pair->expert.data != pair->base.data;
            bool kept = strcmp(pair->name, OBM_EMBEDDING_NAME) || strcmp(cases[i].name, "embedding");
            assert_int_equal(e->mode, touched ? OBM_MODE_FULL : OBM_MODE_SAME);
            assert_int_equal(shown.rank, pair->lora ? pair->lora->rank : 0);
            assert_true(kept || pair->lora);
            stored += e->bytes_pack;
            factors += pair->lora ? obm__lowrank_bytes(pair->lora) : 0;
        }
        obm_class_bytes b[OBM_CLASS_COUNT];
        uint64_t shown = 0, packed = 0;
        obm_pack_bytes(p, 0, b);
        for (int c = 0; c < OBM_CLASS_COUNT; c++) shown += b[c].bytes_adapter, packed += b[c].bytes_pack;
        assert_int_equal(shown, factors);
        assert_int_equal(packed, stored);
        check_full(p, o.expected);
        OK(obm_pack_verify(p, NULL, NULL, err));
        obm_pack_free(p);
        OK(obm_pack_open(ctx, out, NULL, &p, err));
        check_full(p, o.expected);
        obm_pack_free(p);
        close_case(&o);
        obm_free(out);
    }
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(dir);
}

static const lora_case *case_named(const char *name) {
    for (size_t i = 0; i < n_cases; i++)
        if (!strcmp(cases[i].name, name)) return &cases[i];
    fail_msg("no case %s", name);
    return NULL;
}

/* sign(d), and the mean of |d| by row. */
static void test_planes(void **state) {
    (void)state;
    char *dir = fixture_folder(), *out = obm__path_join(dir, "p");
    obm_context *ctx = fixture_context(2);
    opened o = open_case(ctx, case_named("patterns"));
    obm_pack *p = compress_case(ctx, case_named("patterns"), "linear", out);
    size_t matrices = 0;
    for (size_t t = 0; t < p->n_tensors; t++) {
        obm_pack_tensor s;
        obm_pack_tensor_at(p, 0, t, &s);
        if (s.mode == OBM_MODE_SAME) continue;
        assert_int_equal(s.mode, OBM_MODE_1BIT);
        assert_int_equal(s.planes, 1);
        const float *d = obm__checkpoint_find(o.expected, s.name)->t.data;
        for (int64_t r = 0; r < s.rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < s.cols; c++) {
                sum += fabs((double)d[r * s.cols + c]);
                assert_int_equal(s.signs[0][r * s.row_bytes + c / 8] >> (c % 8) & 1, d[r * s.cols + c] >= 0);
            }
            assert_true(fabs((double)s.scales[0][r] - sum / (double)s.cols) < 1e-6);
        }
        matrices++;
    }
    assert_int_equal(matrices, 6);
    obm_pack_free(p);
    close_case(&o);
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(out), obm_free(dir);
}

/* Two adapters, one of them 1-bit, mixed with lambda: as the rule on full checkpoints would have it. */
static void test_mixed_routes(void **state) {
    (void)state;
    char *dir = fixture_folder(), *out = obm__path_join(dir, "p");
    obm_context *one = fixture_context(1), *three = fixture_context(3);
    obm_expert e[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    obm_pack *p = NULL, *q = NULL;
    e[0].name = "a", e[0].path = vector_path("plain", ""), e[0].policy = "full";
    e[1].name = "b", e[1].path = vector_path("patterns", ""), e[1].policy = "linear";
    OK(obm_compress(one, vector_path("base-bf16", ""), e, 2, NULL, out, NULL, &p, err));
    OK(obm_pack_open(three, out, NULL, &q, err));
    size_t t = obm__pack_find(p, Q0 ".weight");
    opened o = open_case(one, case_named("plain"));
    const float *d = obm__checkpoint_find(o.expected, Q0 ".weight")->t.data;
    double routes[3][2] = {{1, 0}, {0, 1}, {0.5, 0.25}};
    for (int i = 0; i < 3; i++) {
        float have[64], again[64], base[64], plane[64];
        OK(obm_pack_materialise(p, routes[i], Q0 ".weight", have, err));
        OK(obm_pack_materialise(q, routes[i], Q0 ".weight", again, err));
        assert_memory_equal(have, again, sizeof have);
        obm__widen(one->k, &p->tensors[t].base, 0, 64, base);
        for (int64_t r = 0; r < 8; r++)
            obm__planes_read_row(one->k, &p->experts[1].entries[t].planes, r, 0, 8, plane + 8 * r);
        for (int j = 0; j < 64; j++) {
            double a = (double)d[j], b = (double)plane[j], lambda = p->settings.lambda;
            double want = (double)base[j] + routes[i][0] * (a + lambda * b) + routes[i][1] * (b + lambda * a);
            assert_true(fabs(want - (double)have[j]) < 1e-6);
        }
    }
    close_case(&o);
    obm_pack_free(q), obm_pack_free(p);
    obm_context_free(one), obm_context_free(three);
    fixture_remove(dir);
    obm_free(out), obm_free(dir);
}

static char last_warning[512];
static void keep_warning(void *user, const char *message) {
    (void)user;
    snprintf(last_warning, sizeof last_warning, "%s", message);
}

/* ---- what is refused ---- */

static void put_bytes(const char *dir, const char *name, const void *bytes, size_t n) {
    char *path = obm__path_join(dir, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
    obm_free(path);
}

static void put_config(const char *dir, const char *members) {
    char *text =
        obm__format("{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4%s%s}", *members ? ", " : "", members);
    put_bytes(dir, "adapter_config.json", text, strlen(text));
    obm_free(text);
}

/* Opens the folder and pairs it with the base. */
static obm_status pair_with(obm_context *ctx, const char *base, const char *dir, obm_error *err) {
    obm_checkpoint *b, *a = NULL;
    obm_task_vector *v = NULL;
    OK(obm_checkpoint_open(ctx, vector_path(base, ""), &b, err));
    obm_status status = obm_checkpoint_open(ctx, dir, &a, err);
    if (status == OBM_OK) status = obm_task_vector_new(b, a, &v, err);
    obm_task_vector_free(v);
    obm_checkpoint_free(a);
    obm_checkpoint_free(b);
    return status;
}

static const float numbers[64];
#define A_OF(module) \
    { "base_model.model." module ".lora_A.weight", OBM_F32, 2, {2, 8}, numbers, NULL }
#define B_OF(module) \
    { "base_model.model." module ".lora_B.weight", OBM_F32, 2, {8, 2}, numbers, NULL }

static void put_adapter(const obm_context *ctx, const char *dir, const fixture_tensor *t, size_t n) {
    char *path = obm__path_join(dir, "adapter_model.safetensors");
    fixture_write_file(ctx, path, t, n);
    obm_free(path);
}

/* 8 columns take 8 bytes of signs and 4 of scale in every row: more than the factors of rank 1 do. */
static void test_says_when_planes_are_larger(void **state) {
    (void)state;
    char *dir = fixture_folder(), *out = obm__path_join(dir, "p");
    const fixture_tensor t[] = {{"base_model.model." Q0 ".lora_A.weight", OBM_F32, 2, {1, 8}, numbers, NULL},
                                {"base_model.model." Q0 ".lora_B.weight", OBM_F32, 2, {8, 1}, numbers, NULL}};
    obm_context_options options = OBM_INIT(obm_context_options);
    obm_context *ctx;
    obm_plan plan;
    obm_compress_options dry = OBM_INIT(obm_compress_options);
    obm_expert e = OBM_INIT(obm_expert);
    options.log = keep_warning;
    dry.dry_run = true;
    e.name = "skill", e.path = dir;
    OK(obm_context_new(&options, &ctx, err));
    put_config(dir, "\"rank_pattern\": {\"q_proj\": 1}");
    put_adapter(ctx, dir, t, 2);
    last_warning[0] = 0;
    OK(obm_compress(ctx, vector_path("base-bf16", ""), &e, 1, &dry, out, &plan, NULL, err));
    assert_non_null(strstr(last_warning, "expert skill: the planes take"));
    assert_non_null(strstr(last_warning, "policy full keeps the factors"));
    uint64_t planes = plan.bytes_written;
    last_warning[0] = 0;
    e.policy = "full";
    OK(obm_compress(ctx, vector_path("base-bf16", ""), &e, 1, &dry, out, &plan, NULL, err));
    assert_int_equal(last_warning[0], 0);
    assert_true(plan.bytes_written < planes);
    assert_int_equal(plan.bytes_written, plan.bytes_read); /* the factors, and nothing of the base */
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(out), obm_free(dir);
}

static void test_configs(void **state) {
    (void)state;
    static const struct {
        const char *members;
        obm_status status;
        const char *part;
    } refused[] = {
        {"\"use_dora\": true", OBM_E_UNSUPPORTED, "use_dora: DoRA is not supported"},
        {"\"lora_bias\": true", OBM_E_UNSUPPORTED, "lora_bias: biases of LoRA layers"},
        {"\"layer_replication\": [[0, 1]]", OBM_E_UNSUPPORTED, "layer_replication"},
        {"\"trainable_token_indices\": [3]", OBM_E_UNSUPPORTED, "single trained token rows"},
        {"\"use_qalora\": true", OBM_E_UNSUPPORTED, "QALoRA"},
        {"\"target_parameters\": [\"x\"]", OBM_E_UNSUPPORTED, "bare parameters"},
        {"\"alora_invocation_tokens\": [1]", OBM_E_UNSUPPORTED, "aLoRA"},
        {"\"init_lora_weights\": \"pissa_niter_4\"", OBM_E_UNSUPPORTED, "init_lora_weights: \"pissa_niter_4\""},
        {"\"new_idea\": {\"x\": 1}", OBM_E_UNSUPPORTED, "\"new_idea\" is not understood"},
        {"\"rank_pattern\": {\"q_proj\": 0}", OBM_E_FORMAT, "rank_pattern: \"q_proj\": expected an integer > 0"},
        {"\"rank_pattern\": [1]", OBM_E_FORMAT, "rank_pattern: expected an object, found an array"},
        {"\"rank_pattern\": {\"(q_proj\": 2}", OBM_E_FORMAT, "adapter_config.json: rank_pattern"},
        {"\"alpha_pattern\": {\"q_proj\": \"x\"}", OBM_E_FORMAT, "alpha_pattern: \"q_proj\": expected a finite number"},
        {"\"use_rslora\": 1", OBM_E_FORMAT, "use_rslora: expected true or false, found 1"},
        {"\"rank_pattern\": {\"q_proj\": 3}", OBM_E_SHAPE, "expected LoRA factors of rank 3"},
        {"\"fan_in_fan_out\": true, \"rank_pattern\": {\"k_proj\": 3}", OBM_OK, ""},
        {"\"target_modules\": [\"v_proj\"], \"exclude_modules\": \"x\", \"layers_to_transform\": [0], "
         "\"layers_pattern\": "
         "\"layers\", \"new_idea\": null, \"init_lora_weights\": \"gaussian\", \"loftq_config\": {}, \"eva_config\": "
         "null",
         OBM_OK, ""}};
    static const fixture_tensor good[] = {A_OF(Q0), B_OF(Q0)};
    char *dir = fixture_folder();
    obm_context *ctx = fixture_context(1);
    put_adapter(ctx, dir, good, 2);
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        put_config(dir, refused[i].members);
        FAILS(pair_with(ctx, "base-bf16", dir, err), refused[i].status, refused[i].part);
    }
    static const char *const types[] = {"LOHA", "LOKR", "IA3", "PROMPT_TUNING", "ADALORA"};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        char *text = obm__format("{\"peft_type\": \"%s\", \"r\": 2, \"lora_alpha\": 4}", types[i]);
        put_bytes(dir, "adapter_config.json", text, strlen(text));
        FAILS(pair_with(ctx, "base-bf16", dir, err), OBM_E_UNSUPPORTED, types[i]);
        obm_free(text);
    }
    static const char *const broken[] = {
        "[]",
        "{}",
        "{\"peft_type\": 3}",
        "{\"peft_type\": \"LORA\"}",
        "{\"peft_type\": \"LORA\", \"r\": 2}",
        "{\"peft_type\": \"LORA\", \"r\": -2, \"lora_alpha\": 1}",
        "{\"peft_type\": \"LORA\", \"r\": 2.5, \"lora_alpha\": 1}",
        "{\"peft_type\": \"LORA\", \"r\": 99999999999, \"lora_alpha\": 1}",
        "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": \"8\"}",
        "{\"peft_type\": \"LORA\", \"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 8}"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        put_bytes(dir, "adapter_config.json", broken[i], strlen(broken[i]));
        FAILS(pair_with(ctx, "base-bf16", dir, err), OBM_E_FORMAT, "adapter_config.json");
    }
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(dir);
}

static void test_tensors(void **state) {
    (void)state;
#define WHOLE(name, dtype, ...) \
    { name, dtype, (int32_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), {__VA_ARGS__}, numbers, NULL }
    static const struct {
        fixture_tensor t[3];
        size_t n;
        obm_status status;
        const char *part;
    } refused[] = {{{A_OF(Q0)}, 1, OBM_E_FORMAT, "lora_A.weight has no base_model.model." Q0 ".lora_B.weight"},
                   {{B_OF(Q0)}, 1, OBM_E_FORMAT, "lora_B.weight has no base_model.model." Q0 ".lora_A.weight"},
                   {{A_OF("model.layers.7.self_attn.q_proj"), B_OF("model.layers.7.self_attn.q_proj")},
                    2,
                    OBM_E_NOTFOUND,
                    "model.layers.7.self_attn.q_proj.lora_A.weight: expected LoRA factors or a tensor of the base"},
                   {{A_OF(Q0), WHOLE("base_model.model." Q0 ".lora_B.weight", OBM_F32, 7, 2)},
                    2,
                    OBM_E_SHAPE,
                    "found A (2, 8) F32, B (7, 2)"},
                   {{A_OF(Q0), WHOLE("base_model.model." Q0 ".lora_B.weight", OBM_F32, 16)}, 2, OBM_E_SHAPE, "B (16)"},
                   {{A_OF(Q0), WHOLE("base_model.model." Q0 ".lora_B.weight", OBM_I32, 8, 2)}, 2, OBM_E_SHAPE, "I32"},
                   {{A_OF("model.norm"), B_OF("model.norm")}, 2, OBM_E_SHAPE, "tensor model.norm.weight of shape (8)"},
                   {{A_OF(Q0), B_OF(Q0), WHOLE("base_model.model." Q0 ".lora_magnitude_vector", OBM_F32, 8)},
                    3,
                    OBM_E_UNSUPPORTED,
                    "DoRA"},
                   {{A_OF(Q0), B_OF(Q0), WHOLE("base_model.model." Q0 ".lora_B.bias", OBM_F32, 8)},
                    3,
                    OBM_E_UNSUPPORTED,
                    "a bias of a LoRA layer"},
                   {{WHOLE("base_model.model." Q0 ".hada_w1_a", OBM_F32, 8)}, 1, OBM_E_UNSUPPORTED, "LoHa"},
                   {{WHOLE("base_model.model." Q0 ".ia3_l", OBM_F32, 8)}, 1, OBM_E_UNSUPPORTED, "IA3"},
                   {{WHOLE("prompt_embeddings", OBM_F32, 2, 8)}, 1, OBM_E_UNSUPPORTED, "prompt tuning"},
                   {{WHOLE("base_model.model." Q0 ".surprise", OBM_F32, 8)}, 1, OBM_E_NOTFOUND, "surprise"},
                   {{WHOLE("base_model.model.model.norm.weight", OBM_F32, 9)},
                    1,
                    OBM_E_SHAPE,
                    "expert has shape (9), base has (8)"},
                   {{WHOLE("base_model.model.model.norm.weight", OBM_I64, 4)}, 1, OBM_E_SHAPE, "model.norm.weight"},
                   {{WHOLE("base_model.model.model.norm.weight", OBM_F32, 8), WHOLE("model.norm.weight", OBM_F32, 8)},
                    2,
                    OBM_E_FORMAT,
                    "there is another for model.norm.weight"},
                   {{A_OF(Q0), B_OF(Q0), WHOLE("base_model.model." Q0 ".base_layer.weight", OBM_F32, 8, 8)},
                    3,
                    OBM_E_UNSUPPORTED,
                    "is replaced and has LoRA factors too"},
                   {{A_OF(Q0), B_OF(Q0), WHOLE("base_model.model.model.norm.weight", OBM_F32, 8)}, 3, OBM_OK, ""}};
    char *dir = fixture_folder();
    obm_context *ctx = fixture_context(1);
    put_config(dir, "");
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        put_adapter(ctx, dir, refused[i].t, refused[i].n);
        FAILS(pair_with(ctx, "base-bf16", dir, err), refused[i].status, refused[i].part);
    }
    put_adapter(ctx, dir, NULL, 0);
    FAILS(pair_with(ctx, "base-bf16", dir, err), OBM_E_FORMAT, "without tensors");
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(dir);
}

/* NaN and Inf are found wherever d is made or factors are stored. */
static void test_nonfinite(void **state) {
    (void)state;
    float bad[16] = {0};
    bad[9] = NAN;
    const fixture_tensor t[] = {A_OF(Q0), {"base_model.model." Q0 ".lora_B.weight", OBM_F32, 2, {8, 2}, bad, NULL}};
    char *dir = fixture_folder(), *out = obm__path_join(dir, "p");
    obm_context *ctx = fixture_context(2);
    obm_checkpoint *b, *a;
    obm_task_vector *v;
    float d[64];
    put_config(dir, "");
    put_adapter(ctx, dir, t, 2);
    OK(obm_checkpoint_open(ctx, vector_path("base-bf16", ""), &b, err));
    OK(obm_checkpoint_open(ctx, dir, &a, err));
    OK(obm_task_vector_new(b, a, &v, err));
    FAILS(obm_task_vector_read(v, Q0 ".weight", d, err), OBM_E_VALUE,
          Q0 ".weight: NaN or Inf in expert - base at index 32");
    obm_task_vector_free(v);
    obm_checkpoint_free(a);
    obm_checkpoint_free(b);
    static const struct {
        const char *policy, *part;
    } packs[] = {{"linear", "at index 32"}, {"full", "NaN or Inf in the factor lora_B at index 9"}};
    for (size_t i = 0; i < 2; i++) {
        obm_expert e = OBM_INIT(obm_expert);
        e.name = "x", e.path = dir, e.policy = packs[i].policy;
        FAILS(obm_compress(ctx, vector_path("base-bf16", ""), &e, 1, NULL, out, NULL, NULL, err), OBM_E_VALUE,
              packs[i].part);
    }
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(out), obm_free(dir);
}

static void test_cut_files(void **state) {
    (void)state;
    static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors"};
    char *dir = fixture_folder();
    obm_context *ctx = fixture_context(1);
    obm__map maps[2];
    for (int f = 0; f < 2; f++) OK(obm__map_open(vector_path("tied-head", files[f]), &maps[f], err));
    for (int f = 0; f < 2; f++) {
        put_bytes(dir, files[1 - f], maps[1 - f].data, maps[1 - f].size);
        for (size_t n = 0; n + 2 < maps[f].size; n++) { /* the config ends in a brace and a newline */
            obm_error why = {0};
            put_bytes(dir, files[f], maps[f].data, n);
            obm_status status = pair_with(ctx, "base-tied", dir, &why);
            if (status != OBM_E_FORMAT || !strstr(why.message, files[f]))
                fail_msg("%s cut at %zu: %s", files[f], n, why.message);
        }
    }
    for (int f = 0; f < 2; f++) obm__map_close(&maps[f]);
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(dir);
}

/* An adapter is an expert and nothing else; weights that are not safetensors are named. */
static void test_places(void **state) {
    (void)state;
    char *dir = fixture_folder(), *out = obm__path_join(dir, "p"), *other = obm__path_join(dir, "other");
    obm_context *ctx = fixture_context(1);
    obm_checkpoint *a, *b;
    obm_task_vector *v;
    obm_model *m;
    obm_expert e = OBM_INIT(obm_expert);
    e.name = "x", e.path = vector_path("base-bf16", "");
    OK(obm_checkpoint_open(ctx, vector_path("plain", ""), &a, err));
    OK(obm_checkpoint_open(ctx, vector_path("base-bf16", ""), &b, err));
    FAILS(obm_task_vector_new(a, b, &v, err), OBM_E_ARG, "it can be an expert, not a base");
    FAILS(obm_compress(ctx, vector_path("plain", ""), &e, 1, NULL, out, NULL, NULL, err), OBM_E_ARG, "not a base");
    FAILS(obm_model_open(ctx, vector_path("plain", ""), NULL, &m, err), OBM_E_ARG, "not a model to run");
    obm_checkpoint_free(a);
    obm_checkpoint_free(b);
    OK(obm__make_directory(other, err));
    put_config(other, "");
    FAILS(obm_checkpoint_open(ctx, other, &a, err), OBM_E_IO, "adapter_model.safetensors");
    put_bytes(other, "adapter_model.bin", "x", 1);
    FAILS(obm_checkpoint_open(ctx, other, &a, err), OBM_E_UNSUPPORTED,
          "torch.load(\"adapter_model.bin\", weights_only=True)");
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(out), obm_free(other), obm_free(dir);
}

/* pack.json with factors that do not fit is refused before anything is read through them. */
static void test_hostile_packs(void **state) {
    (void)state;
    static const struct {
        const char *from, *to;
    } edits[] = {{"\"rank\": 3", "\"rank\": 0"},
                 {"\"rank\": 3", "\"rank\": 4"},
                 {"\"rank\": 3", "\"rank\": 2147483647"},
                 {"\"transposed\": false", "\"transposed\": 1"},
                 {"\"a\": \"F32\"", "\"a\": \"I32\""},
                 {"\"b\": \"F32\"", "\"b\": 7"},
                 {"\"lora\": {", "\"lara\": {"},
                 {"\"scaling\"", "\"scalding\""},
                 {"\"adapter_bytes\": ", "\"adapter_bytes\": -"}};
    char *dir = fixture_folder(), *out = obm__path_join(dir, "p");
    obm_context *ctx = fixture_context(1);
    obm_pack_free(compress_case(ctx, case_named("plain"), "full", out));
    char *path = obm__path_join(out, "pack.json"), *text = NULL;
    OK(obm__file_read(path, &text, NULL, err));
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        obm_pack *p = NULL;
        char *at = strstr(text, edits[i].from);
        assert_non_null(at);
        char *edited = obm__format("%.*s%s%s", (int)(at - text), text, edits[i].to, at + strlen(edits[i].from));
        put_bytes(out, "pack.json", edited, strlen(edited));
        FAILS(obm_pack_open(ctx, out, NULL, &p, err), OBM_E_FORMAT, "");
        obm_free(edited);
    }
    obm_free(path), obm_free(text);
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(out), obm_free(dir);
}

/* ---- out of fine-tunes ---- */

/* An adapter that becomes one again: its own rank, and the same task vector but for rounding. */
static void test_extract(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(2);
    char *dir = fixture_folder(), *out = obm__path_join(dir, "out");
    lora_case c = {"plain", "base-f32"};
    char base[512], expert[512];
    snprintf(base, sizeof base, "%s", vector_path(c.base, ""));
    snprintf(expert, sizeof expert, "%s", vector_path(c.name, ""));
    obm_lora_options options = OBM_INIT(obm_lora_options);
    obm_lora_matrix *rows = NULL;
    size_t n = 0;
    options.rank = 64;
    OK(obm_extract_lora(ctx, base, expert, &options, out, NULL, &rows, &n, err));
    assert_int_equal(n, 4);
    opened o = open_case(ctx, &c);
    obm_checkpoint *adapter;
    obm_task_vector *v;
    OK(obm_checkpoint_open(ctx, out, &adapter, err));
    OK(obm_task_vector_new(o.base, adapter, &v, err));
    for (size_t i = 0; i < n; i++) {
        size_t count = (size_t)(rows[i].rows * rows[i].cols);
        float *have = obm__alloc(count, sizeof *have), *want = obm__alloc(count, sizeof *want);
        OK(obm_task_vector_read(v, rows[i].name, have, err));
        OK(obm_task_vector_read(o.v, rows[i].name, want, err));
        assert_int_equal(rows[i].rank, 3);
        for (size_t j = 0; j < count; j++) assert_true(fabs((double)have[j] - want[j]) < 1e-6 * rows[i].norm);
        obm_free(have), obm_free(want);
    }
    obm_free(rows);
    FAILS(obm_extract_lora(ctx, base, expert, &options, out, NULL, NULL, NULL, err), OBM_E_EXISTS, "holds an adapter");
    options.energy = 0.5;
    FAILS(obm_extract_lora(ctx, base, expert, &options, out, NULL, NULL, NULL, err), OBM_E_ARG, "found both");
    obm_task_vector_free(v);
    obm_checkpoint_free(adapter);
    close_case(&o);
    obm_context_free(ctx);
    fixture_remove(dir);
    obm_free(out), obm_free(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_vectors),
                                       cmocka_unit_test(test_parts),
                                       cmocka_unit_test(test_large),
                                       cmocka_unit_test(test_full_packs),
                                       cmocka_unit_test(test_planes),
                                       cmocka_unit_test(test_mixed_routes),
                                       cmocka_unit_test(test_configs),
                                       cmocka_unit_test(test_tensors),
                                       cmocka_unit_test(test_nonfinite),
                                       cmocka_unit_test(test_cut_files),
                                       cmocka_unit_test(test_places),
                                       cmocka_unit_test(test_hostile_packs),
                                       cmocka_unit_test(test_says_when_planes_are_larger),
                                       cmocka_unit_test(test_extract)};
    return cmocka_run_group_tests(tests, read_cases, NULL);
}
