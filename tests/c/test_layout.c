/* One model under the names that its text part has by itself, in the files of a model that also sees images, and in the
 * modules of that: task vectors, adapters, packs, exports and merges match them and write the base's. */
#include "delta_fixture.h"

#include "io/pack.h"

#define NORM 0
#define DOWN 1
#define EMBEDDING 2
#define VISION 3
#define PROJECTOR 4
#define HEAD 5
#define N 6

static const char *const NAMES[OBM_LAYOUTS][N] = {
    {"model.norm.weight", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight",
     "vision_tower.encoder.layers.1.self_attn.q_proj.weight", "multi_modal_projector.mm_input_projection_weight",
     "lm_head.weight"},
    {"language_model.model.norm.weight", "language_model.model.layers.0.mlp.down_proj.weight",
     "language_model.model.embed_tokens.weight", "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
     "multi_modal_projector.mm_input_projection_weight", "language_model.lm_head.weight"},
    {"model.language_model.norm.weight", "model.language_model.layers.0.mlp.down_proj.weight",
     "model.language_model.embed_tokens.weight", "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight",
     "model.multi_modal_projector.mm_input_projection_weight", "lm_head.weight"},
};
static const int64_t SHAPES[N][2] = {{4, 0}, {4, 3}, {5, 4}, {2, 2}, {3, 4}, {5, 4}};

typedef struct world {
    obm_context *ctx;
    char *root;
} world;

static int setup(void **state) {
    static world w;
    w.ctx = fixture_context(1);
    w.root = fixture_folder();
    *state = &w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    fixture_remove(w->root);
    obm_free(w->root);
    obm_context_free(w->ctx);
    return 0;
}

static size_t size_of(int which) { return (size_t)(SHAPES[which][0] * (SHAPES[which][1] ? SHAPES[which][1] : 1)); }

/* The first n tensors in a layout, with values of their own. */
static char *make(const world *w, const char *name, int layout, int n, uint64_t seed) {
    fixture_tensor t[N];
    float *values[N];
    for (int i = 0; i < n; i++) {
        values[i] = fixture_values(size_of(i), seed + (uint64_t)i);
        t[i] = (fixture_tensor){NAMES[layout][i], OBM_F32, SHAPES[i][1] ? 2 : 1, {SHAPES[i][0], SHAPES[i][1]},
                                values[i],        NULL};
    }
    char *path = fixture_model(w->ctx, w->root, name, t, (size_t)n);
    for (int i = 0; i < n; i++) obm_free(values[i]);
    return path;
}

static obm_checkpoint *open_at(const world *w, const char *path) {
    obm_checkpoint *c = NULL;
    OK(obm_checkpoint_open(w->ctx, path, &c, err));
    return c;
}

/* What was made with `seed`, minus what was made with `below` (0: nothing). */
static void assert_values(const float *have, int which, uint64_t seed, uint64_t below) {
    float *x = fixture_values(size_of(which), seed + (uint64_t)which),
          *y = fixture_values(size_of(which), below + (uint64_t)which);
    for (size_t i = 0; i < size_of(which); i++) assert_true(have[i] == x[i] - (below ? y[i] : 0));
    obm_free(x);
    obm_free(y);
}

/* ---- checkpoints ---- */

static void test_tensors_are_found_in_any_layout(void **state) {
    world *w = *state;
    obm_tensor t;
    for (int layout = 0; layout < OBM_LAYOUTS; layout++) {
        for (int n = HEAD; n <= N; n++) {
            char *path = make(w, "found", layout, n, 1);
            obm_checkpoint *c = open_at(w, path);
            assert_int_equal(c->layout, layout);
            assert_int_equal(c->tied, n == HEAD);
            for (int asked = 0; asked < OBM_LAYOUTS; asked++)
                for (int i = 0; i < n; i++) {
                    OK(obm_checkpoint_get(c, NAMES[asked][i], &t, err));
                    assert_values(t.data, i, 1, 0);
                }
            FAILS(obm_checkpoint_get(c, "model.vision_tower.nothing", &t, err), OBM_E_NOTFOUND,
                  "no tensor model.vision_tower");
            obm_checkpoint_free(c);
            fixture_remove(path);
            obm_free(path);
        }
    }
}

static void test_classes(void **state) {
    (void)state;
    static const obm_class classes[N] = {OBM_CLASS_NORM,  OBM_CLASS_MLP,   OBM_CLASS_EMBEDDING,
                                         OBM_CLASS_OTHER, OBM_CLASS_OTHER, OBM_CLASS_HEAD};
    for (int layout = 0; layout < OBM_LAYOUTS; layout++)
        for (int i = 0; i < N; i++) assert_int_equal(obm_class_of(NAMES[layout][i], SHAPES[i][1] ? 2 : 1), classes[i]);
    assert_int_equal(obm_class_of("vision_tower.encoder.layers.0.layer_norm1.bias", 1), OBM_CLASS_OTHER);
    assert_int_equal(obm_class_of("visual.blocks.0.mlp.gate_proj.weight", 2), OBM_CLASS_OTHER);
    assert_int_equal(obm_class_of("model.layers.0.visual_norm.weight", 1), OBM_CLASS_NORM);
}

/* ---- task vectors ---- */

static void test_task_vectors_match_across_layouts(void **state) {
    world *w = *state;
    for (int k = 0; k < OBM_LAYOUTS * OBM_LAYOUTS * 4; k++) {
        int b = k % OBM_LAYOUTS, e = k / OBM_LAYOUTS % OBM_LAYOUTS, own = k / (OBM_LAYOUTS * OBM_LAYOUTS);
        int n_base = HEAD + (own & 1), n_expert = HEAD + (own >> 1);
        char *base_path = make(w, "base", b, n_base, 1), *expert_path = make(w, "expert", e, n_expert, 50);
        obm_checkpoint *base = open_at(w, base_path), *expert = open_at(w, expert_path);
        obm_task_vector *v = NULL;
        float d[32];
        OK(obm_task_vector_new(base, expert, &v, err));
        assert_int_equal(obm_task_vector_count(v), own ? N : HEAD);
        for (size_t i = 1; i < v->count; i++) assert_true(strcmp(v->pairs[i - 1].name, v->pairs[i].name) < 0);
        for (int i = 0; i < HEAD; i++) {
            assert_string_equal(obm__task_vector_find(v, NAMES[e][i], NULL)->name, NAMES[b][i]);
            OK(obm_task_vector_read(v, NAMES[b][i], d, err));
            assert_values(d, i, 50, 1);
        }
        if (own) { /* a head that one side lacks is that side's embedding */
            float *x = fixture_values(20, 50 + (n_expert == N ? HEAD : EMBEDDING)),
                  *y = fixture_values(20, 1 + (n_base == N ? HEAD : EMBEDDING));
            OK(obm_task_vector_read(v, NAMES[b][HEAD], d, err));
            for (int i = 0; i < 20; i++) assert_true(d[i] == x[i] - y[i]);
            obm_free(x);
            obm_free(y);
        }
        obm_task_vector_free(v);
        obm_checkpoint_free(base);
        obm_checkpoint_free(expert);
        fixture_remove(base_path);
        fixture_remove(expert_path);
        obm_free(base_path);
        obm_free(expert_path);
    }
}

/* Under two names at once, which of them counts is not to be guessed. */
static void test_a_tensor_under_two_names(void **state) {
    world *w = *state;
    float x[20] = {0};
    const fixture_tensor two[] = {{NAMES[0][NORM], OBM_F32, 1, {4}, x, NULL},
                                  {NAMES[1][NORM], OBM_F32, 1, {4}, x, NULL},
                                  {NAMES[1][EMBEDDING], OBM_F32, 2, {5, 4}, x, NULL}};
    const fixture_tensor one[] = {two[1], two[2]};
    char *base_path = fixture_model(w->ctx, w->root, "one", one, 2),
         *expert_path = fixture_model(w->ctx, w->root, "two", two, 3);
    obm_checkpoint *base = open_at(w, base_path), *expert = open_at(w, expert_path);
    obm_task_vector *v = NULL;
    FAILS(obm_task_vector_new(base, expert, &v, err), OBM_E_NOTFOUND, "tensor model.norm.weight is in");
    obm_checkpoint_free(base);
    obm_checkpoint_free(expert);
    obm_free(base_path);
    obm_free(expert_path);
}

/* ---- adapters ---- */

static void add_name(char *buf, size_t size, const char *tensor, const char *part) {
    snprintf(buf, size, "base_model.model.%.*s.%s", (int)(strlen(tensor) - strlen(".weight")), tensor, part);
}

/* peft names modules as they are in memory, which is not how the base's file names them. */
static void test_adapters_match_across_layouts(void **state) {
    world *w = *state;
    static const float a[4] = {1, -2, 0.5f, 3}, b[5] = {1, 2, -1, 0.25f, 4};
    char *config, *weights, *folder = obm__path_join(w->root, "adapter");
    OK(obm__make_directory(folder, err));
    config = obm__path_join(folder, "adapter_config.json");
    weights = obm__path_join(folder, OBM_ADAPTER_WEIGHTS);
    OK(obm__file_write(config, "{\"peft_type\":\"LORA\",\"r\":1,\"lora_alpha\":2}", 41, err));
    for (int k = 0; k < OBM_LAYOUTS * OBM_LAYOUTS; k++) {
        int layout = k % OBM_LAYOUTS, named = k / OBM_LAYOUTS;
        char names[4][128];
        obm_task_vector *v = NULL;
        float d[32];
        for (int i = 0; i < 4; i++)
            add_name(names[i], sizeof names[i], NAMES[named][i < 2 ? DOWN : HEAD],
                     i % 2 ? "lora_B.weight" : "lora_A.weight");
        const fixture_tensor t[] = {{names[0], OBM_F32, 2, {1, 3}, a, NULL},
                                    {names[1], OBM_F32, 2, {4, 1}, b, NULL},
                                    {names[2], OBM_F32, 2, {1, 4}, a, NULL},
                                    {names[3], OBM_F32, 2, {5, 1}, b, NULL}};
        fixture_write_file(w->ctx, weights, t, 4);
        char *path = make(w, "below", layout, HEAD, 1);
        obm_checkpoint *base = open_at(w, path), *adapter = open_at(w, folder);
        OK(obm_task_vector_new(base, adapter, &v, err));
        assert_int_equal(obm_task_vector_count(v), N); /* the adapter unties the head */
        OK(obm_task_vector_read(v, NAMES[layout][DOWN], d, err));
        for (int i = 0; i < 12; i++) assert_true(d[i] == 2 * b[i / 3] * a[i % 3]);
        OK(obm_task_vector_read(v, NAMES[layout][HEAD], d, err));
        for (int i = 0; i < 20; i++) assert_true(d[i] == 2 * b[i / 4] * a[i % 4]);
        OK(obm_task_vector_read(v, NAMES[layout][EMBEDDING], d, err));
        for (int i = 0; i < 20; i++) assert_true(d[i] == 0);
        obm_task_vector_free(v);
        obm_checkpoint_free(base);
        obm_checkpoint_free(adapter);
        fixture_remove(path);
        obm_free(path);
    }
    obm_free(config);
    obm_free(weights);
    obm_free(folder);
}

/* ---- packs, exports, merges ---- */

static void assert_config_says_untied(const obm_checkpoint *c) {
    bool tied = true;
    assert_true(obm__json_bool(obm__json_get(c->config, "tie_word_embeddings"), &tied));
    assert_false(tied);
    tied = true;
    assert_true(obm__json_bool(obm__json_get(obm__checkpoint_text_config(c), "tie_word_embeddings"), &tied));
    assert_false(tied);
}

/* The expert's tensors under the base's names. */
static void check_written(const world *w, const char *path, int layout) {
    obm_checkpoint *c = open_at(w, path);
    assert_int_equal(c->count, N);
    for (int i = 0; i < N; i++) {
        const obm__st_entry *e = obm__checkpoint_find(c, NAMES[layout][i]);
        assert_string_equal(e->name, NAMES[layout][i]);
        assert_values(e->t.data, i, 50, 0);
    }
    assert_config_says_untied(c);
    obm_checkpoint_free(c);
}

static void test_packs_and_merges_write_the_names_of_the_base(void **state) {
    world *w = *state;
    static const char config[] = "{\"model_type\":\"gemma3\",\"text_config\":{\"num_hidden_layers\":1,"
                                 "\"tie_word_embeddings\":true},\"vision_config\":{}}";
    for (int k = 0; k < OBM_LAYOUTS * OBM_LAYOUTS; k++) {
        int b = k % OBM_LAYOUTS, e = k / OBM_LAYOUTS;
        char *base = make(w, "base", b, HEAD, 1), *expert = make(w, "expert", e, N, 50);
        char *pack_path = obm__path_join(w->root, "pack"), *out = obm__path_join(w->root, "out");
        char *to[2] = {obm__path_join(base, "config.json"), obm__path_join(expert, "config.json")};
        for (int i = 0; i < 2; i++) OK(obm__file_write(to[i], config, sizeof config - 1, err));
        obm_expert x = OBM_INIT(obm_expert);
        obm_pack *pack = NULL;
        obm_export_options o = OBM_INIT(obm_export_options);
        x.name = "chat";
        x.path = expert;
        x.policy = "full";
        OK(obm_compress(w->ctx, base, &x, 1, NULL, pack_path, NULL, &pack, err));
        for (int layout = 0; layout < OBM_LAYOUTS; layout++)
            for (int i = 0; i < N; i++)
                assert_string_equal(pack->tensors[obm__pack_find(pack, NAMES[layout][i])].name, NAMES[b][i]);
        OK(obm_pack_export(pack, (double[]){1}, &o, out, NULL, err));
        check_written(w, out, b);
        obm_pack_free(pack);
        fixture_remove(out);
        char *linear = obm__format(
            "{\"merge_method\":\"linear\",\"base_model\":\"%s\",\"models\":[{\"model\":\"%s\",\"parameters\":"
            "{\"weight\":0}},{\"model\":\"%s\",\"parameters\":{\"weight\":1}}]}",
            base, base, expert);
        OK(obm_merge(w->ctx, linear, NULL, out, NULL, err));
        check_written(w, out, b);
        fixture_remove(out);
        fixture_remove(pack_path);
        fixture_remove(base);
        fixture_remove(expert);
        obm_free(linear);
        for (int i = 0; i < 2; i++) obm_free(to[i]);
        obm_free(base);
        obm_free(expert);
        obm_free(pack_path);
        obm_free(out);
    }
}

/* Slices are of the text model's layers; what sees is taken once, with its numbers as they are. */
static void test_slices_are_of_the_text_model(void **state) {
    world *w = *state;
    static const char config[] = "{\"model_type\":\"gemma3\",\"text_config\":{\"num_hidden_layers\":1,"
                                 "\"layer_types\":[\"full_attention\"]},\"vision_config\":{\"num_hidden_layers\":2}}";
    char *base = make(w, "one-layer", 1, HEAD, 1), *to = obm__path_join(base, "config.json"),
         *out = obm__path_join(w->root, "twice");
    char *other = make(w, "other-names", 2, HEAD, 1);
    OK(obm__file_write(to, config, sizeof config - 1, err));
    char *recipe = obm__format(
        "{\"merge_method\":\"passthrough\",\"slices\":[{\"sources\":[{\"model\":\"%s\",\"layer_range\":[0,1]}]},"
        "{\"sources\":[{\"model\":\"%s\",\"layer_range\":[0,1]}]}]}",
        base, base);
    OK(obm_merge(w->ctx, recipe, NULL, out, NULL, err));
    obm_checkpoint *c = open_at(w, out);
    int64_t layers = 0;
    assert_int_equal(c->count, HEAD + 1);
    for (int i = 0; i < HEAD; i++) assert_values(obm__checkpoint_find(c, NAMES[1][i])->t.data, i, 1, 0);
    assert_values(obm__checkpoint_find(c, "language_model.model.layers.1.mlp.down_proj.weight")->t.data, DOWN, 1, 0);
    assert_true(obm__json_int(obm__json_get(obm__checkpoint_text_config(c), "num_hidden_layers"), &layers) &&
                layers == 2);
    assert_int_equal(obm__json_size(obm__json_get(obm__checkpoint_text_config(c), "layer_types")), 2);
    assert_null(obm__json_get(c->config, "num_hidden_layers"));
    obm_checkpoint_free(c);
    obm_free(recipe);
    recipe = obm__format(
        "{\"merge_method\":\"passthrough\",\"slices\":[{\"sources\":[{\"model\":\"%s\",\"layer_range\":[0,1]}]},"
        "{\"sources\":[{\"model\":\"%s\",\"layer_range\":[0,1]}]}]}",
        base, other);
    obm_merge_options again = OBM_INIT(obm_merge_options);
    again.overwrite = true;
    OK(obm__file_write(to, "{}", 2, err));
    char *others = obm__path_join(other, "config.json");
    OK(obm__file_write(others, "{}", 2, err));
    FAILS(obm_merge(w->ctx, recipe, &again, out, NULL, err), OBM_E_UNSUPPORTED, "name their tensors differently");
    obm_free(others);
    obm_free(recipe);
    obm_free(base);
    obm_free(other);
    obm_free(to);
    obm_free(out);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tensors_are_found_in_any_layout),
        cmocka_unit_test(test_classes),
        cmocka_unit_test(test_task_vectors_match_across_layouts),
        cmocka_unit_test(test_a_tensor_under_two_names),
        cmocka_unit_test(test_adapters_match_across_layouts),
        cmocka_unit_test(test_packs_and_merges_write_the_names_of_the_base),
        cmocka_unit_test(test_slices_are_of_the_text_model),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
