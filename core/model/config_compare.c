/*
 * Compares the config.json of a fine-tune with its base's and warns of what computes something else.  Where both are
 * understood, what they say is compared as the model reads it, so that defaults and the spellings of transformers 4 and
 * 5 are equal; configs of other architectures are compared key by key.  It changes nothing.
 */
#include "config_compare.h"

#include "config.h"

#include <stdio.h>
#include <string.h>

typedef struct pair {
    const obm_checkpoint *base, *other;
    bool whole;
} pair;

static void tell(const pair *p, const char *key, const char *expected, const char *found) {
    obm__warn(p->base->ctx,
              "%s/config.json: %s: expected %s, found %s: what is made of both follows %s/config.json, and may compute "
              "something else",
              p->other->directory, key, expected, found, p->base->directory);
}

/* ---- as the model reads them ---- */

static void tell_numbers(const pair *p, const char *key, double a, double b) {
    char expected[40], found[40];
    snprintf(expected, sizeof expected, "%.7g", a);
    snprintf(found, sizeof found, "%.7g", b);
    if (!strcmp(expected, found)) { /* all the digits of a double */
        snprintf(expected, sizeof expected, "%.17g", a);
        snprintf(found, sizeof found, "%.17g", b);
    }
    tell(p, key, a == 0 ? "none" : expected, b == 0 ? "none" : found);
}

static void compare_numbers(const pair *p, const char *key, double a, double b) {
    if (a != b) tell_numbers(p, key, a, b);
}

static void compare_names(const pair *p, const char *key, const char *a, const char *b) {
    if (strcmp(a, b)) tell(p, key, a, b);
}

/* Scaling all positions by 1 changes none. */
static obm__rope_type type_of(const obm__rope *r) {
    return r->type == OBM_ROPE_LINEAR && r->factor == 1 ? OBM_ROPE_DEFAULT : r->type;
}

static void compare_factors(const pair *p, const char *key, const float *a, const float *b, int64_t pairs) {
    char expected[48], found[48];
    for (int64_t i = 0; i < pairs; i++) {
        if (a[i] == b[i]) continue;
        snprintf(expected, sizeof expected, "%.7g at index %lld", (double)a[i], (long long)i);
        snprintf(found, sizeof found, "%.7g", (double)b[i]);
        tell(p, key, expected, found);
        return;
    }
}

/* Of one type, and rotating as many columns. */
static void compare_scaling(const pair *p, const obm__rope *a, const obm__rope *b) {
    obm__rope_type type = type_of(a);
    if (type == OBM_ROPE_DEFAULT) return;
    bool trained = type != OBM_ROPE_LINEAR;
    compare_numbers(p, "RoPE factor", a->factor, b->factor);
    if (trained) compare_numbers(p, "RoPE's original length", a->original_positions, b->original_positions);
    compare_numbers(p, "low_freq_factor", a->low_freq_factor, b->low_freq_factor);
    compare_numbers(p, "high_freq_factor", a->high_freq_factor, b->high_freq_factor);
    compare_numbers(p, "beta_fast", a->beta_fast, b->beta_fast);
    compare_numbers(p, "beta_slow", a->beta_slow, b->beta_slow);
    compare_names(p, "truncate", a->truncate ? "true" : "false", b->truncate ? "true" : "false");
    compare_numbers(p, "RoPE's attention_factor", (double)a->attention_factor, (double)b->attention_factor);
    if (type != OBM_ROPE_LONGROPE) return;
    compare_factors(p, "short_factor", a->short_factor, b->short_factor, obm__rope_pairs(a));
    compare_factors(p, "long_factor", a->long_factor, b->long_factor, obm__rope_pairs(a));
}

static void compare_rope(const pair *p, const char *theta, const obm__rope *a, const obm__rope *b) {
    compare_numbers(p, theta, a->theta, b->theta);
    compare_numbers(p, "columns of a head that are rotated", (double)a->dim, (double)b->dim);
    compare_names(p, "rope_type", obm__rope_type_name(type_of(a)), obm__rope_type_name(type_of(b)));
    if (type_of(a) == type_of(b) && a->dim == b->dim) compare_scaling(p, a, b);
}

/* The first layer that differs stands for all. */
static void compare_layers(const pair *p, const obm__config *a, const obm__config *b) {
    char key[64];
    if (p->whole) compare_numbers(p, "num_hidden_layers", (double)a->layers, (double)b->layers);
    for (int64_t i = 0; i < a->layers && i < b->layers; i++) {
        const obm__layer *x = &a->layer[i], *y = &b->layer[i];
        snprintf(key, sizeof key, "sliding window of layer %lld", (long long)i);
        if (x->window != y->window) {
            tell_numbers(p, key, (double)x->window, (double)y->window);
            return;
        }
        if ((x->rope < 0) == (y->rope < 0)) continue;
        snprintf(key, sizeof key, "layer %lld", (long long)i);
        tell(p, key, x->rope < 0 ? "no RoPE" : "RoPE", y->rope < 0 ? "no RoPE" : "RoPE");
        return;
    }
}

static void compare_scales(const pair *p, const obm__config *a, const obm__config *b) {
    bool granite = a->arch->has & OBM_HAS_MULTIPLIERS;
    double x = (double)a->attention_scale, y = (double)b->attention_scale;
    if (granite)
        compare_numbers(p, "attention_multiplier", x, y);
    else if ((a->arch->has & OBM_HAS_QUERY_SCALAR) && x != y)
        tell_numbers(p, "query_pre_attn_scalar", 1 / (x * x), 1 / (y * y));
    compare_numbers(p, "attn_logit_softcapping", (double)a->attention_cap, (double)b->attention_cap);
    compare_numbers(p, "final_logit_softcapping", (double)a->logit_cap, (double)b->logit_cap);
    compare_numbers(p, "embedding_multiplier", (double)a->embedding_multiplier, (double)b->embedding_multiplier);
    compare_numbers(p, "residual_multiplier", (double)a->residual_multiplier, (double)b->residual_multiplier);
    compare_numbers(p, "logits_scaling", (double)a->logit_divisor, (double)b->logit_divisor);
}

/* Sizes are those of the tensors, which are compared elsewhere; lengths are limits; ends of text are the tokenizer's.
 */
static void compare_parsed(const pair *p, const obm__config *a, const obm__config *b) {
    compare_names(p, "model_type", a->arch->model_type, b->arch->model_type);
    if (a->arch != b->arch) return;
    compare_numbers(p, "num_attention_heads", (double)a->heads, (double)b->heads);
    compare_numbers(p, "num_key_value_heads", (double)a->kv_heads, (double)b->kv_heads);
    compare_numbers(p, "head_dim", (double)a->head_dim, (double)b->head_dim);
    compare_numbers(p, "rms_norm_eps", (double)a->norm_eps, (double)b->norm_eps);
    if (a->activation != b->activation)
        tell(p, "activation", obm__activation_name(a->activation), obm__activation_name(b->activation));
    compare_scales(p, a, b);
    if (a->head_dim != b->head_dim) return; /* nor is anything below the same */
    compare_rope(p, "rope_theta", &a->ropes[0], &b->ropes[0]);
    if (a->n_ropes == 2) compare_rope(p, "rope_local_base_freq", &a->ropes[1], &b->ropes[1]);
    compare_layers(p, a, b);
}

/* ---- key by key ---- */

/* Absent, null, empty, or a rotation by the default rule. */
static bool says_nothing(const obm_json *v) {
    const char *text = obm__json_string(v);
    obm_json_kind kind = obm__json_kind(v);
    if (kind == OBM_JSON_ARRAY || kind == OBM_JSON_OBJECT) return !obm__json_size(v);
    return kind == OBM_JSON_NULL || (text && !strcmp(text, "default"));
}

/* transformers 4 has it in rope_scaling and beside that, transformers 5 in rope_parameters. */
static const obm_json *rope_value(const obm_json *config, const char *key) {
    const char *const places[] = {"rope_scaling", "rope_parameters"};
    const obm_json *v = NULL;
    for (int i = 0; i < 2 && says_nothing(v); i++) {
        v = obm__json_get(obm__json_get(config, places[i]), key);
        if (says_nothing(v) && !strcmp(key, "rope_type")) v = obm__json_get(obm__json_get(config, places[i]), "type");
    }
    return says_nothing(v) ? obm__json_get(config, key) : v;
}

/* What leaving the key out says too, for any architecture. */
static bool is_default(const obm_json *config, const char *key, const obm_json *v) {
    const char *text = obm__json_string(v);
    double x, hidden, heads;
    bool flag;
    if (says_nothing(v)) return true;
    if (obm__json_bool(v, &flag)) return !flag;
    if (text) return !strcmp(text, "linear") && obm__json_real(rope_value(config, "factor"), &x) && x == 1;
    if (!obm__json_real(v, &x)) return false;
    if (!strcmp(key, "head_dim") && obm__json_real(obm__json_get(config, "hidden_size"), &hidden) &&
        obm__json_real(obm__json_get(config, "num_attention_heads"), &heads))
        return x * heads == hidden;
    return !strcmp(key, "factor") && x == 1;
}

/* 10000 and 10000.0 are one value. */
static bool same_setting(const pair *p, const char *key, const obm_json *a, const obm_json *b) {
    double x, y;
    if (says_nothing(a) || says_nothing(b))
        return is_default(obm__checkpoint_text_config(p->base), key, a) &&
               is_default(obm__checkpoint_text_config(p->other), key, b);
    return obm__json_real(a, &x) && obm__json_real(b, &y) ? x == y : obm__json_equal(a, b);
}

static obm_status compare_values(const pair *p, const char *key, const obm_json *a, const obm_json *b, obm_error *err) {
    if (same_setting(p, key, a, b)) return OBM_OK;
    char *expected = says_nothing(a) ? obm__strdup("none") : obm__json_text(a, 0);
    char *found = says_nothing(b) ? obm__strdup("none") : obm__json_text(b, 0);
    obm_status status = expected && found ? OBM_OK : obm__fail_nomem(err, 1);
    if (status == OBM_OK) {
        char x[80], y[80];
        snprintf(x, sizeof x, "%.70s", expected);
        snprintf(y, sizeof y, "%.70s", found);
        tell(p, key, x, y);
    }
    obm_free(expected);
    obm_free(found);
    return status;
}

static obm_status compare_keys(const pair *p, const obm_json *a, const obm_json *b, obm_error *err) {
    static const char *const keys[] = {"rope_local_base_freq",
                                       "no_rope_layers",
                                       "rms_norm_eps",
                                       "layer_norm_eps",
                                       "hidden_act",
                                       "hidden_activation",
                                       "num_attention_heads",
                                       "num_key_value_heads",
                                       "head_dim",
                                       "sliding_window",
                                       "use_sliding_window",
                                       "layer_types",
                                       "query_pre_attn_scalar",
                                       "embedding_multiplier",
                                       "residual_multiplier",
                                       "attention_multiplier",
                                       "logits_scaling",
                                       "logit_scale",
                                       "attn_logit_softcapping",
                                       "sliding_window_pattern",
                                       "final_logit_softcapping",
                                       "num_experts_per_tok"};
    static const char *const in_rope[] = {"rope_type",        "rope_theta",
                                          "factor",           "original_max_position_embeddings",
                                          "low_freq_factor",  "high_freq_factor",
                                          "beta_fast",        "beta_slow",
                                          "mscale",           "mscale_all_dim",
                                          "attention_factor", "short_factor",
                                          "long_factor",      "partial_rotary_factor",
                                          "full_attention",   "sliding_attention"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        OBM_TRY(compare_values(p, keys[i], obm__json_get(a, keys[i]), obm__json_get(b, keys[i]), err));
    for (size_t i = 0; i < sizeof in_rope / sizeof *in_rope; i++)
        OBM_TRY(compare_values(p, in_rope[i], rope_value(a, in_rope[i]), rope_value(b, in_rope[i]), err));
    return OBM_OK;
}

/* ---- both ---- */

static obm_status parse(const obm_checkpoint *c, obm__config *out, obm_error *err) {
    char *where = obm__path_join(c->directory, "config.json");
    obm_status status = where ? obm__config_parse(c->config, NULL, where, out, err) : obm__fail_nomem(err, 1);
    obm_free(where);
    return status;
}

static obm_status compare(const pair *p, obm__config *a, obm__config *b, obm_error *err) {
    obm_error refused = {0};
    obm_status of_base = parse(p->base, a, err), of_other = OBM_OK;
    if (of_base == OBM_E_NOMEM) return of_base;
    if (of_base == OBM_OK) of_other = parse(p->other, b, &refused);
    if (of_other == OBM_E_NOMEM && err) *err = refused;
    if (of_other == OBM_E_NOMEM) return of_other;
    if (of_base != OBM_OK)
        return compare_keys(p, obm__checkpoint_text_config(p->base), obm__checkpoint_text_config(p->other), err);
    if (of_other == OBM_OK)
        compare_parsed(p, a, b);
    else
        obm__warn(p->base->ctx, "%s; what is made of both follows %s/config.json, and may compute something else",
                  refused.message, p->base->directory);
    return OBM_OK;
}

/* By the part that is the language model: one checkpoint may have it alone, the other beside what sees images. */
static obm_status same_architecture(const pair *p, obm_error *err) {
    const char *a = obm__json_string(obm__json_get(obm__checkpoint_text_config(p->base), "model_type"));
    const char *b = obm__json_string(obm__json_get(obm__checkpoint_text_config(p->other), "model_type"));
    if (!a || !b || !strcmp(a, b)) return OBM_OK;
    return obm__fail(err, OBM_E_MISMATCH,
                     "%.200s is a %.40s model, %.200s a %.40s (\"model_type\" in config.json): only models of one "
                     "architecture go together",
                     p->base->path, a, p->other->path, b);
}

obm_status obm__configs_same_architecture(const obm_checkpoint *base, const obm_checkpoint *other, obm_error *err) {
    const pair p = {base, other, true};
    return base->config && other->config ? same_architecture(&p, err) : OBM_OK;
}

obm_status obm__configs_compare(const obm_checkpoint *base, const obm_checkpoint *other, bool whole, obm_error *err) {
    const pair p = {base, other, whole};
    obm__config a = {0}, b = {0};
    if (!base->config || !other->config) return OBM_OK;
    OBM_TRY(same_architecture(&p, err));
    obm_status status = compare(&p, &a, &b, err);
    obm__config_clear(&a);
    obm__config_clear(&b);
    return status;
}
