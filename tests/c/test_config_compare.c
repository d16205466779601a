/* Which differences between two config.json are told, and that two spellings of one meaning are none; layers that a
 * config does not count. */
#include "model/config_compare.h"
#include "tiny_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/stat.h>

#include <cmocka.h>

static char heard[4096]; /* what was told, without its beginning and end */
static int warnings;

/* "other/config.json: KEY: expected A, found B: ..." or what another warning says */
static void listen(void *user, const char *message) {
    (void)user;
    const char *at = strstr(message, "other/config.json: "), *end = strstr(message, ": what is made");
    if (at) message = at + strlen("other/config.json: ");
    size_t used = strlen(heard), n = end && end > message ? (size_t)(end - message) : strlen(message);
    snprintf(heard + used, sizeof heard - used, "%s%.*s", used ? "; " : "", (int)n, message);
    warnings++;
}

static obm_context *new_context(void) {
    obm_context *ctx;
    obm_error err;
    obm_context_options o = {.struct_size = sizeof o, .threads = 1, .log = listen};
    if (obm_context_new(&o, &ctx, &err) != OBM_OK) fail_msg("%s", err.message);
    heard[0] = 0;
    warnings = 0;
    return ctx;
}

#define SIZES                                                                                \
    "\"vocab_size\":64,\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":8," \
    "\"num_attention_heads\":4,\"num_key_value_heads\":4,\"max_position_embeddings\":256,"

static void compare(const char *type, bool whole, const char *base, const char *other, const char *expected) {
    obm_context *ctx = new_context();
    obm_checkpoint a = {.ctx = ctx, .directory = "base"}, b = {.ctx = ctx, .directory = "other"}, *c[2] = {&a, &b};
    const char *texts[2] = {base, other};
    obm_error err;
    for (int i = 0; i < 2; i++) {
        char text[2048];
        snprintf(text, sizeof text, "{" SIZES "\"model_type\":\"%s\"%s%s}", type, *texts[i] ? "," : "", texts[i]);
        if (obm__json_parse(text, strlen(text), "config", &c[i]->config, &err) != OBM_OK) fail_msg("%s", err.message);
    }
    if (obm__configs_compare(&a, &b, whole, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_string_equal(heard, expected);
    for (int i = 0; i < 2; i++) obm__json_free(c[i]->config);
    obm_context_free(ctx);
}

#define SCALED(type, more) "\"rope_scaling\":{\"rope_type\":\"" type "\"" more "}"
#define LLAMA3 ",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":64"

/* transformers 4 against transformers 5, a default that is written out against one that is not, 1e6 against 1000000. */
static void test_spellings_are_equal(void **state) {
    (void)state;
    compare("llama", true, "", "\"rope_theta\":10000.0,\"rms_norm_eps\":1e-6,\"hidden_act\":\"silu\"", "");
    compare("llama", true, "\"rope_theta\":1e6",
            "\"rope_parameters\":{\"rope_theta\":1000000,\"rope_type\":\"default\"}", "");
    compare("llama", true, "\"rope_theta\":5e5," SCALED("llama3", LLAMA3),
            "\"rope_parameters\":{\"rope_theta\":500000,\"rope_type\":\"llama3\"" LLAMA3 "}", "");
    compare("llama", true, "", SCALED("linear", ",\"factor\":1"), "");
    compare("llama", true, "\"rope_scaling\":null,\"head_dim\":16",
            "\"use_cache\":false,\"transformers_version\":\"4\"", "");
    compare("qwen2", true, "\"sliding_window\":128,\"use_sliding_window\":false", "\"sliding_window\":null", "");
    compare("qwen2", true, "\"sliding_window\":8,\"use_sliding_window\":true,\"max_window_layers\":7",
            "\"sliding_window\":8,\"use_sliding_window\":true,\"layer_types\":[\"full_attention\",\"full_attention\","
            "\"full_attention\",\"full_attention\",\"full_attention\",\"full_attention\",\"full_attention\","
            "\"sliding_attention\"]",
            "");
    compare("gemma3_text", true, "\"rope_local_base_freq\":10000,\"rope_theta\":1e6",
            "\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1e6,\"rope_type\":\"default\"},"
            "\"sliding_attention\":{\"rope_theta\":1e4,\"rope_type\":\"default\"}}",
            "");
    compare("strange", true, "\"rope_theta\":1e6," SCALED("yarn", ",\"factor\":4"),
            "\"rope_parameters\":{\"rope_theta\":1000000,\"type\":\"yarn\",\"factor\":4.0}", "");
}

static void test_differences_are_told(void **state) {
    (void)state;
    compare("llama", true, "", "\"rope_theta\":1000001,\"rms_norm_eps\":1e-5",
            "rms_norm_eps: expected 1e-06, found 1e-05; rope_theta: expected 10000, found 1000001");
    compare("llama", true, "", SCALED("linear", ",\"factor\":2"), "rope_type: expected default, found linear");
    compare("llama", true, SCALED("linear", ",\"factor\":2"), SCALED("linear", ",\"factor\":4"),
            "RoPE factor: expected 2, found 4");
    compare("llama", true, "\"rope_theta\":5e5",
            "\"rope_parameters\":{\"rope_theta\":10000,\"rope_type\":\"llama3\"" LLAMA3 "}",
            "rope_theta: expected 500000, found 10000; rope_type: expected default, found llama3");
    compare("llama", true, "\"rope_theta\":1e4", "\"rope_theta\":10000.0001",
            "rope_theta: expected 10000, found 10000.000099999999");
    compare("llama", true, "", "\"head_dim\":8", "head_dim: expected 16, found 8");
    compare("mistral", true, "\"sliding_window\":null", "\"sliding_window\":32",
            "sliding window of layer 0: expected none, found 32");
    compare("gemma2", true, "", "\"final_logit_softcapping\":null,\"query_pre_attn_scalar\":64",
            "query_pre_attn_scalar: expected 256, found 64; final_logit_softcapping: expected 30, found none");
    compare("gemma3_text", true, "", "\"rope_local_base_freq\":5000",
            "rope_local_base_freq: expected 10000, found 5000");
    compare("granite", true, "", "\"residual_multiplier\":0.5,\"attention_multiplier\":0.25",
            "attention_multiplier: expected 1, found 0.25; residual_multiplier: expected 1, found 0.5");
    compare("smollm3", true, "", "\"no_rope_layers\":[1,1,1,1,1,1,1,0]", "layer 3: expected no RoPE, found RoPE");
    compare("phi3", true, "", "\"partial_rotary_factor\":0.5",
            "columns of a head that are rotated: expected 16, found 8");
}

/* Only what the whole of a model says; a slice has as many layers as it likes. */
static void test_layers(void **state) {
    (void)state;
    const char *every_second = "\"no_rope_layer_interval\":2";
    compare("smollm3", false, "", every_second, "layer 1: expected RoPE, found no RoPE");
    obm_context *ctx = new_context();
    obm_checkpoint a = {.ctx = ctx, .directory = "base"}, b = {.ctx = ctx, .directory = "other"};
    const char *text = "{" SIZES "\"model_type\":\"llama\"}";
    obm_error err;
    assert_int_equal(obm__json_parse(text, strlen(text), "config", &a.config, &err), OBM_OK);
    b.config = obm__json_copy(a.config);
    assert_true(obm__json_set(b.config, "num_hidden_layers", obm__json_new_int(6)));
    assert_int_equal(obm__configs_compare(&a, &b, false, &err), OBM_OK);
    assert_string_equal(heard, "");
    assert_int_equal(obm__configs_compare(&a, &b, true, &err), OBM_OK);
    assert_string_equal(heard, "num_hidden_layers: expected 8, found 6");
    obm__json_free(a.config);
    obm__json_free(b.config);
    obm_context_free(ctx);
}

/* Known to this library or not; the same weights for text are one architecture, with what sees images or without. */
static void test_architectures(void **state) {
    static const struct {
        const char *base, *other;
        obm_status status;
    } cases[] = {
        {"{\"model_type\":\"mistral\"}", "{\"model_type\":\"mixtral\"}", OBM_E_MISMATCH},
        {"{\"model_type\":\"mixtral\"}", "{\"model_type\":\"gpt2\"}", OBM_E_MISMATCH},
        {"{\"model_type\":\"llama\"}", "{\"model_type\":\"mistral\"}", OBM_E_MISMATCH},
        {"{\"model_type\":\"mixtral\"}", "{\"model_type\":\"mixtral\"}", OBM_OK},
        {"{\"model_type\":\"mixtral\"}", "{}", OBM_OK},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"gemma3_text\"}}",
         "{\"model_type\":\"gemma3_text\"}", OBM_OK},
    };
    (void)state;
    obm_context *ctx = new_context();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        obm_checkpoint a = {.ctx = ctx, .directory = "base", .path = "base"};
        obm_checkpoint b = {.ctx = ctx, .directory = "other", .path = "other"};
        obm_error err;
        assert_int_equal(obm__json_parse(cases[i].base, strlen(cases[i].base), "a", &a.config, &err), OBM_OK);
        assert_int_equal(obm__json_parse(cases[i].other, strlen(cases[i].other), "b", &b.config, &err), OBM_OK);
        for (int whole = 0; whole < 2; whole++)
            assert_int_equal(obm__configs_compare(&a, &b, whole, &err), cases[i].status);
        if (!i)
            assert_string_equal(err.message,
                                "base is a mistral model, other a mixtral (\"model_type\" in config.json): "
                                "only models of one architecture go together");
        obm__json_free(a.config);
        obm__json_free(b.config);
    }
    obm_context_free(ctx);
}

static void test_what_is_not_understood(void **state) {
    (void)state;
    compare("llama", true, "", SCALED("spiral", ",\"factor\":2"),
            "rotary embedding of type \"spiral\" is not supported (known: default, linear, dynamic, llama3, yarn, "
            "longrope); "
            "what is made of both follows base/config.json, and may compute something else");
    compare("strange", true, "\"rope_theta\":1e4",
            "\"rope_theta\":10000,\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}",
            "rope_type: expected none, found \"linear\"; factor: expected none, found 2");
    compare("strange", true, "\"use_sliding_window\":false",
            "\"head_dim\":16,\"rope_scaling\":{\"type\":\"linear\",\"factor\":1.0}", "");
    compare("strange", true, "\"rope_theta\":1e4,\"sliding_window\":8", "\"rope_parameters\":{\"rope_theta\":1e5}",
            "sliding_window: expected 8, found none; rope_theta: expected 10000.0, found 100000.0");
}

/* A third layer that config.json does not count. */
static void test_layers_beyond_the_config(void **state) {
    (void)state;
    tiny c = {.type = "llama",
              .vocab = 64,
              .hidden = 64,
              .inter = 64,
              .layers = 3,
              .heads = 2,
              .kv_heads = 2,
              .dim = 32,
              .dtype = OBM_F32,
              .seed = 5};
    char dir[] = "/tmp/obm-layers-XXXXXX", expert[64], pack[64];
    obm_context *ctx = new_context();
    obm_model *m;
    obm_error err;
    assert_non_null(mkdtemp(dir));
    snprintf(expert, sizeof expert, "%s/e", dir);
    snprintf(pack, sizeof pack, "%s/p", dir);
    assert_int_equal(mkdir(expert, 0777), 0);
    for (int i = 0; i < 2; i++) {
        tiny_weights w;
        tiny shorter = c;
        tiny_weights_new(&c, &w);
        assert_int_equal(tiny_write(&c, &w, i ? expert : dir, &err), 0);
        shorter.layers = 2;
        tiny_write_config(&shorter, i ? expert : dir);
        tiny_weights_free(&w);
    }
    if (obm_model_open(ctx, dir, NULL, &m, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_int_equal(warnings, 1);
    assert_non_null(strstr(heard, "tensor model.layers.2.input_layernorm.weight and 8 more lie beyond the 2 layers "
                                  "(num_hidden_layers) of config.json: they are not run"));
    obm_model_free(m);
    obm_expert e = {.struct_size = sizeof e, .name = "e", .path = expert};
    heard[0] = 0;
    if (obm_compress(ctx, dir, &e, 1, NULL, pack, NULL, NULL, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_int_equal(warnings, 2);
    assert_non_null(strstr(heard, "tensor model.layers.2.input_layernorm.weight and 8 more lie beyond"));
    obm_context_free(ctx);
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spellings_are_equal),
        cmocka_unit_test(test_differences_are_told),
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_architectures),
        cmocka_unit_test(test_what_is_not_understood),
        cmocka_unit_test(test_layers_beyond_the_config),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
