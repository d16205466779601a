/* config.json: every key that changes results is read and checked, or refused by name.  It looks at no weights. */
#include "../text/text.h"
#include "model.h"

#include <stdio.h>
#include <string.h>

/* Sizes beyond this are nonsense and would overflow products of two. */
#define MAX_SIZE ((int64_t)1 << 31)

typedef struct reader {
    const obm_json *json;
    const char *where;
    obm_error *err;
} reader;

static bool absent(const obm_json *v) { return !v || obm__json_kind(v) == OBM_JSON_NULL; }

static obm_status wrong_kind(const reader *r, const char *key, const char *expected) {
    return obm__fail(r->err, OBM_E_FORMAT, "%s: \"%s\": expected %s, found %s", r->where, key, expected,
                     obm__json_kind_name(obm__json_get(r->json, key)));
}

/* A size in [1, MAX_SIZE]; dflt < 0: the key is needed. */
static obm_status read_size(const reader *r, const char *key, int64_t dflt, int64_t *out) {
    const obm_json *v = obm__json_get(r->json, key);
    int64_t value;
    if (absent(v) && dflt >= 0) {
        *out = dflt;
        return OBM_OK;
    }
    if (!v) return obm__fail(r->err, OBM_E_FORMAT, "%s: key \"%s\" is missing", r->where, key);
    if (!obm__json_int(v, &value)) return wrong_kind(r, key, "an integer");
    if (value < 1 || value > MAX_SIZE)
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"%s\": expected 1 to %lld, found %lld", r->where, key,
                         (long long)MAX_SIZE, (long long)value);
    *out = value;
    return OBM_OK;
}

/* A positive number; dflt < 0: the key is needed. */
static obm_status read_positive(const reader *r, const char *key, double dflt, double *out) {
    const obm_json *v = obm__json_get(r->json, key);
    double value;
    if (absent(v) && dflt >= 0) {
        *out = dflt;
        return OBM_OK;
    }
    if (!v) return obm__fail(r->err, OBM_E_FORMAT, "%s: key \"%s\" is missing", r->where, key);
    if (!obm__json_real(v, &value)) return wrong_kind(r, key, "a number");
    if (!(value > 0 && value <= 1e30))
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"%s\": expected a number above 0, found %g", r->where, key, value);
    *out = value;
    return OBM_OK;
}

static obm_status read_bool(const reader *r, const char *key, bool *out) {
    const obm_json *v = obm__json_get(r->json, key);
    if (absent(v)) *out = false;
    else if (!obm__json_bool(v, out)) return wrong_kind(r, key, "true or false");
    return OBM_OK;
}

/* ---- what would change results and is not built ---- */

/* Keys with the value at which they change nothing.  Any other value is refused, so that no model runs wrongly in
 * silence. */
static const struct { const char *key; double neutral;
} neutral_keys[] = {
    {"pretraining_tp", 1},
    {"partial_rotary_factor", 1},
    {"rope_interleaved", 0},
    {"use_qk_norm", 0},
    {"qk_norm", 0},
    {"embedding_multiplier", 1},
    {"residual_multiplier", 1},
    {"logits_scaling", 1},
    {"logit_scale", 1},
    {"scale_embeddings", 0},
    {"scale_embedding", 0},
    {"use_alibi", 0},
    {"parallel_attn", 0},
    {"num_local_experts", 0},
    {"num_experts", 0},
    {"logit_softcapping", 0},
    {"attn_logit_softcapping", 0},
    {"final_logit_softcapping", 0},
    {"clip_qkv", 0},
    {"num_nextn_predict_layers", 0},
};
/* Objects or lists whose mere presence changes the model. */
static const char *const foreign_keys[] = {"quantization_config", "compression_config",     "attention_multiplier",
                                           "no_rope_layers",      "cross_attention_layers", "vision_config",
                                           "text_config"};

static bool is_neutral(const obm_json *v, double neutral) {
    bool flag;
    double value;
    if (obm__json_bool(v, &flag)) return flag == (neutral != 0);
    return obm__json_real(v, &value) && value == neutral;
}

static obm_status refuse(const reader *r, const char *key, const obm_json *v) {
    char *text = obm__json_text(v, 0);
    obm_status status =
        obm__fail(r->err, OBM_E_UNSUPPORTED, "%s: \"%s\": %.120s is not supported", r->where, key, text ? text : "?");
    obm_free(text);
    return status;
}

static obm_status check_foreign(const reader *r) {
    for (size_t i = 0; i < sizeof neutral_keys / sizeof *neutral_keys; i++) {
        const obm_json *v = obm__json_get(r->json, neutral_keys[i].key);
        if (!absent(v) && !is_neutral(v, neutral_keys[i].neutral)) return refuse(r, neutral_keys[i].key, v);
    }
    for (size_t i = 0; i < sizeof foreign_keys / sizeof *foreign_keys; i++) {
        const obm_json *v = obm__json_get(r->json, foreign_keys[i]);
        if (!absent(v)) return refuse(r, foreign_keys[i], v);
    }
    const obm_json *act = obm__json_get(r->json, "hidden_act");
    const char *name = obm__json_string(act);
    if (!absent(act) && (!name || (strcmp(name, "silu") && strcmp(name, "swish")))) return refuse(r, "hidden_act", act);
    return OBM_OK;
}

/* transformers 4.5x writes one entry per layer; only uniform ones mean what sliding_window says. */
static obm_status check_layer_types(const reader *r, const obm__config *c) {
    const obm_json *types = obm__json_get(r->json, "layer_types");
    if (absent(types)) return OBM_OK;
    const char *expected = c->window ? "sliding_attention" : "full_attention";
    for (size_t i = 0; i < obm__json_size(types); i++) {
        const char *type = obm__json_string(obm__json_at(types, i));
        if (!type || strcmp(type, expected))
            return obm__fail(r->err, OBM_E_UNSUPPORTED,
                             "%s: \"layer_types\": layer %zu is \"%.40s\", only \"%s\" is supported here", r->where, i,
                             type ? type : "?", expected);
    }
    return OBM_OK;
}

/* ---- rotary embedding ---- */

/* The object with the scaling: rope_parameters (transformers 5) or rope_scaling (before). */
static obm_status find_rope(const reader *r, const obm_json **out, const char **key) {
    *key = "rope_parameters";
    *out = obm__json_get(r->json, *key);
    if (absent(*out)) {
        *key = "rope_scaling";
        *out = obm__json_get(r->json, *key);
    }
    if (absent(*out)) *out = NULL;
    else if (obm__json_kind(*out) != OBM_JSON_OBJECT) return wrong_kind(r, *key, "an object");
    return OBM_OK;
}

static obm_status read_llama3(const reader *rope, const reader *top, int64_t positions, obm__rope *out) {
    double fallback;
    out->llama3 = true;
    OBM_TRY(read_positive(top, "original_max_position_embeddings", (double)positions, &fallback));
    OBM_TRY(read_positive(rope, "original_max_position_embeddings", fallback, &out->original_positions));
    OBM_TRY(read_positive(rope, "factor", -1, &out->factor));
    OBM_TRY(read_positive(rope, "low_freq_factor", -1, &out->low_freq_factor));
    OBM_TRY(read_positive(rope, "high_freq_factor", -1, &out->high_freq_factor));
    if (out->high_freq_factor <= out->low_freq_factor)
        return obm__fail(rope->err, OBM_E_FORMAT, "%s: \"high_freq_factor\" must be above \"low_freq_factor\"",
                         rope->where);
    return OBM_OK;
}

static obm_status read_rope(const reader *r, int64_t positions, obm__rope *out) {
    const obm_json *scaling;
    const char *key;
    OBM_TRY(find_rope(r, &scaling, &key));
    OBM_TRY(read_positive(r, "rope_theta", 10000, &out->theta));
    if (!scaling) return OBM_OK;
    reader rope = {scaling, r->where, r->err};
    OBM_TRY(read_positive(&rope, "rope_theta", out->theta, &out->theta));
    const obm_json *partial = obm__json_get(scaling, "partial_rotary_factor");
    if (!absent(partial) && !is_neutral(partial, 1)) return refuse(r, "partial_rotary_factor", partial);
    const obm_json *type = obm__json_get(scaling, "rope_type");
    if (absent(type)) type = obm__json_get(scaling, "type");
    const char *name = absent(type) ? "default" : obm__json_string(type);
    if (name && !strcmp(name, "default")) return OBM_OK;
    if (name && !strcmp(name, "llama3")) return read_llama3(&rope, r, positions, out);
    return obm__fail(r->err, OBM_E_UNSUPPORTED,
                     "%s: \"%s\" of type \"%.40s\" is not supported (default and llama3 are)", r->where, key,
                     name ? name : "?");
}

/* ---- end of sequence ---- */

static obm_status read_eos(const reader *r, obm__config *c) {
    int32_t *eos = NULL;
    size_t n = 0;
    OBM_TRY(obm__eos_read(r->json, r->where, &eos, &n, r->err));
    if (!eos) return OBM_OK;
    obm_free(c->eos);
    c->eos = eos;
    c->n_eos = n;
    return OBM_OK;
}

/* ---- the whole ---- */

static obm_status read_arch(const reader *r, obm__config *c) {
    const char *type = obm__json_string(obm__json_get(r->json, "model_type"));
    char known[128];
    if (!type) return obm__fail(r->err, OBM_E_FORMAT, "%s: key \"model_type\" is missing or not a string", r->where);
    c->arch = obm__arch_find(type);
    if (c->arch) return OBM_OK;
    obm__arch_list(known, sizeof known);
    return obm__fail(r->err, OBM_E_UNSUPPORTED, "%s: \"model_type\": \"%.60s\" is not supported (known: %s)", r->where,
                     type, known);
}

static obm_status read_window(const reader *r, obm__config *c) {
    if (!c->arch->sliding_window) return OBM_OK;
    const obm_json *v = obm__json_get(r->json, "sliding_window");
    if (v && obm__json_kind(v) == OBM_JSON_NULL) return OBM_OK;
    return read_size(r, "sliding_window", c->arch->default_window, &c->window);
}

static obm_status read_heads(const reader *r, obm__config *c) {
    OBM_TRY(read_size(r, "num_attention_heads", -1, &c->heads));
    const obm_json *kv = obm__json_get(r->json, "num_key_value_heads");
    int64_t dflt = kv || !c->arch->default_kv_heads ? c->heads : c->arch->default_kv_heads;
    OBM_TRY(read_size(r, "num_key_value_heads", dflt, &c->kv_heads));
    OBM_TRY(read_size(r, "head_dim", c->hidden / c->heads, &c->head_dim));
    if (c->heads % c->kv_heads)
        return obm__fail(r->err, OBM_E_FORMAT,
                         "%s: \"num_attention_heads\" (%lld) must be a multiple of \"num_key_value_heads\" (%lld)",
                         r->where, (long long)c->heads, (long long)c->kv_heads);
    if (c->head_dim < 2 || c->head_dim % 2)
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"head_dim\": expected an even number, found %lld", r->where,
                         (long long)c->head_dim);
    return OBM_OK;
}

static obm_status read_all(const reader *r, obm__config *c) {
    double eps;
    OBM_TRY(read_arch(r, c));
    OBM_TRY(check_foreign(r));
    OBM_TRY(read_size(r, "vocab_size", -1, &c->vocab));
    OBM_TRY(read_size(r, "hidden_size", -1, &c->hidden));
    OBM_TRY(read_size(r, "intermediate_size", -1, &c->intermediate));
    OBM_TRY(read_size(r, "num_hidden_layers", -1, &c->layers));
    OBM_TRY(read_heads(r, c));
    OBM_TRY(read_size(r, "max_position_embeddings", c->arch->default_positions, &c->max_positions));
    OBM_TRY(read_positive(r, "rms_norm_eps", 1e-6, &eps));
    c->norm_eps = (float)eps;
    OBM_TRY(read_window(r, c));
    OBM_TRY(check_layer_types(r, c));
    OBM_TRY(read_bool(r, "tie_word_embeddings", &c->tied));
    OBM_TRY(read_bool(r, "attention_bias", &c->attention_bias));
    OBM_TRY(read_bool(r, "mlp_bias", &c->mlp_bias));
    OBM_TRY(read_rope(r, c->max_positions, &c->rope));
    return read_eos(r, c);
}

obm_status obm__config_parse(const obm_json *config, const obm_json *generation, const char *where, obm__config *out,
                             obm_error *err) {
    obm__config c = {0};
    reader r = {config, where, err}, g = {generation, "generation_config.json", err};
    obm_status status = read_all(&r, &c);
    if (status == OBM_OK && generation) status = read_eos(&g, &c);
    if (status == OBM_OK) *out = c;
    else obm__config_clear(&c);
    return status;
}

void obm__config_clear(obm__config *c) {
    obm_free(c->eos);
    *c = (obm__config){0};
}

bool obm__config_has(const obm__config *c, obm__role role) {
    if (!c->arch->names[role]) return false;
    if (role >= OBM_Q_BIAS && role <= OBM_O_BIAS) return c->attention_bias;
    if (role >= OBM_GATE_BIAS && role <= OBM_DOWN_BIAS) return c->mlp_bias;
    return role != OBM_HEAD || !c->tied;
}

void obm__config_shape(const obm__config *c, obm__role role, int64_t *rows, int64_t *cols) {
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, r = 1, h = c->hidden;
    bool bias = role >= OBM_Q_BIAS && role <= OBM_DOWN_BIAS;
    switch (bias ? role - OBM_Q_BIAS : role) {
    case OBM_Q: r = q; break;
    case OBM_K:
    case OBM_V: r = kv; break;
    case OBM_O: r = c->hidden; h = q; break;
    case OBM_GATE:
    case OBM_UP: r = c->intermediate; break;
    case OBM_DOWN: r = c->hidden; h = c->intermediate; break;
    case OBM_EMBEDDING:
    case OBM_HEAD: r = c->vocab; break;
    default: break;   /* norms: one row of the hidden size */
    }
    *rows = bias ? 1 : r;
    *cols = bias ? r : h;
}
