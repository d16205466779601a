/* config.json: sizes, layers, choices.  Which keys are understood is in config_keys.c, the rotation in config_rope.c.
 * It looks at no weights. */
#include "config.h"

#include "../text/text.h"

#include <stdio.h>
#include <string.h>

/* Sizes beyond this are nonsense and would overflow products of two. */
#define MAX_SIZE ((int64_t)1 << 31)
/* Layers are walked through and allocated for before the tensors are known; published models have a few hundred. */
#define MAX_LAYERS 65536

bool obm__absent(const obm_json *v) { return !v || obm__json_kind(v) == OBM_JSON_NULL; }

obm_status obm__wrong_kind(const obm__reader *r, const char *key, const char *expected) {
    return obm__fail(r->err, OBM_E_FORMAT, "%s: \"%s\": expected %s, found %s", r->where, key, expected,
                     obm__json_kind_name(obm__json_get(r->json, key)));
}

obm_status obm__read_size(const obm__reader *r, const char *key, int64_t dflt, int64_t *out) {
    const obm_json *v = obm__json_get(r->json, key);
    int64_t value;
    if (obm__absent(v) && dflt >= 0) {
        *out = dflt;
        return OBM_OK;
    }
    if (!v) return obm__fail(r->err, OBM_E_FORMAT, "%s: key \"%s\" is missing", r->where, key);
    if (!obm__json_int(v, &value)) return obm__wrong_kind(r, key, "an integer");
    if (value < 1 || value > MAX_SIZE)
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"%s\": expected 1 to %lld, found %lld", r->where, key,
                         (long long)MAX_SIZE, (long long)value);
    *out = value;
    return OBM_OK;
}

obm_status obm__read_positive(const obm__reader *r, const char *key, double dflt, double *out) {
    const obm_json *v = obm__json_get(r->json, key);
    double value;
    if (obm__absent(v) && dflt >= 0) {
        *out = dflt;
        return OBM_OK;
    }
    if (!v) return obm__fail(r->err, OBM_E_FORMAT, "%s: key \"%s\" is missing", r->where, key);
    if (!obm__json_real(v, &value)) return obm__wrong_kind(r, key, "a number");
    if (!(value > 0 && value <= 1e30))
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"%s\": expected a number above 0, found %g", r->where, key, value);
    *out = value;
    return OBM_OK;
}

obm_status obm__read_bool(const obm__reader *r, const char *key, bool dflt, bool *out) {
    const obm_json *v = obm__json_get(r->json, key);
    if (obm__absent(v))
        *out = dflt;
    else if (!obm__json_bool(v, out))
        return obm__wrong_kind(r, key, "true or false");
    return OBM_OK;
}

obm_status obm__refuse_key(const obm__reader *r, const char *key, const obm_json *v) {
    char *text = obm__json_text(v, 0);
    obm_status status =
        obm__fail(r->err, OBM_E_UNSUPPORTED, "%s: \"%s\": %.120s is not supported", r->where, key, text ? text : "?");
    obm_free(text);
    return status;
}

/* ---- activation, scales ---- */

static const struct {
    const char *name;
    obm__activation activation;
} activations[] = {{"silu", OBM_SILU}, {"swish", OBM_SILU}, {"gelu_pytorch_tanh", OBM_GELU_TANH}};

const char *obm__activation_name(obm__activation activation) {
    size_t i = 0;
    while (activations[i].activation != activation) i++;
    return activations[i].name;
}

static obm_status read_activation(const obm__reader *r, obm__config *c) {
    bool gelu = c->arch->has & OBM_HAS_HIDDEN_ACTIVATION;
    const char *key = gelu ? "hidden_activation" : "hidden_act";
    const obm_json *v = obm__json_get(r->json, key);
    const char *name = obm__absent(v) ? (gelu ? "gelu_pytorch_tanh" : "silu") : obm__json_string(v);
    for (size_t i = 0; name && i < sizeof activations / sizeof *activations; i++) {
        if (strcmp(activations[i].name, name)) continue;
        c->activation = activations[i].activation;
        return OBM_OK;
    }
    return obm__refuse_key(r, key, v);
}

/* dflt where the key is missing; null: none. */
static obm_status read_cap(const obm__reader *r, const char *key, unsigned has, double dflt, const obm__config *c,
                           float *out) {
    const obm_json *v = obm__json_get(r->json, key);
    double cap = 0;
    if (!(c->arch->has & has) || (v && obm__absent(v))) return OBM_OK;
    OBM_TRY(obm__read_positive(r, key, dflt, &cap));
    *out = (float)cap;
    return OBM_OK;
}

static obm_status read_factor(const obm__reader *r, const char *key, float *out) {
    double value;
    OBM_TRY(obm__read_positive(r, key, 1, &value));
    *out = (float)value;
    return OBM_OK;
}

static obm_status read_scales(const obm__reader *r, obm__config *c) {
    const obm__arch *arch = c->arch;
    double scalar = (double)c->head_dim;
    if (arch->has & OBM_HAS_QUERY_SCALAR)
        OBM_TRY(obm__read_positive(r, "query_pre_attn_scalar", arch->default_query_scalar, &scalar));
    c->attention_scale = 1.0f / sqrtf((float)scalar);
    c->embedding_multiplier = c->residual_multiplier = c->logit_divisor = 1;
    OBM_TRY(read_cap(r, "attn_logit_softcapping", OBM_HAS_ATTENTION_CAP, arch->default_attention_cap, c,
                     &c->attention_cap));
    OBM_TRY(read_cap(r, "final_logit_softcapping", OBM_HAS_LOGIT_CAP, arch->default_logit_cap, c, &c->logit_cap));
    if (!(arch->has & OBM_HAS_MULTIPLIERS)) return OBM_OK;
    OBM_TRY(read_factor(r, "attention_multiplier", &c->attention_scale));
    OBM_TRY(read_factor(r, "embedding_multiplier", &c->embedding_multiplier));
    OBM_TRY(read_factor(r, "residual_multiplier", &c->residual_multiplier));
    return read_factor(r, "logits_scaling", &c->logit_divisor);
}

/* ---- layers ---- */

/* c->window: what layers with a window see; 0: there are none. */
static obm_status read_window(const obm__reader *r, obm__config *c) {
    const obm_json *v = obm__json_get(r->json, "sliding_window");
    bool on = true;
    if (c->arch->has & OBM_HAS_WINDOW_SWITCH) OBM_TRY(obm__read_bool(r, "use_sliding_window", false, &on));
    if (!(c->arch->has & OBM_HAS_WINDOW) || !on || (v ? obm__absent(v) : !c->arch->default_window)) return OBM_OK;
    return obm__read_size(r, "sliding_window", c->arch->default_window, &c->window);
}

/* no_rope_layers: 0 for layers that do not rotate; without it every fourth, or as no_rope_layer_interval says. */
static obm_status read_rotating(const obm__reader *r, obm__config *c) {
    const obm_json *list = obm__json_get(r->json, "no_rope_layers");
    int64_t interval, rotates;
    if (!(c->arch->has & OBM_HAS_NO_ROPE_LAYERS)) return OBM_OK;
    OBM_TRY(obm__read_size(r, "no_rope_layer_interval", 4, &interval));
    if (!obm__absent(list) && (obm__json_kind(list) != OBM_JSON_ARRAY || obm__json_size(list) != (size_t)c->layers))
        return obm__wrong_kind(r, "no_rope_layers", "a list of 0 and 1, one for each layer");
    for (int64_t i = 0; i < c->layers; i++) {
        rotates = (i + 1) % interval != 0;
        if (!obm__absent(list) && !obm__json_int(obm__json_at(list, (size_t)i), &rotates))
            return obm__wrong_kind(r, "no_rope_layers", "a list of 0 and 1, one for each layer");
        if (!rotates) c->layer[i].rope = -1;
    }
    return OBM_OK;
}

/* By the architecture's rule. */
static obm_status place_windows(const obm__reader *r, obm__config *c) {
    int64_t tail = 28, pattern = c->arch->window_pattern;
    if (c->arch->has & OBM_HAS_WINDOW_TAIL) {
        int64_t given;
        const obm_json *v = obm__json_get(r->json, "max_window_layers");
        if (!obm__absent(v) && (!obm__json_int(v, &given) || given < 0))
            return obm__wrong_kind(r, "max_window_layers", "a number of layers");
        if (!obm__absent(v)) tail = given;
    }
    if (c->arch->has & OBM_HAS_WINDOW_PATTERN) OBM_TRY(obm__read_size(r, "sliding_window_pattern", pattern, &pattern));
    for (int64_t i = 0; i < c->layers; i++) {
        bool windowed = c->arch->windows == OBM_WINDOW_ALL || (c->arch->windows == OBM_WINDOW_TAIL && i >= tail) ||
                        (c->arch->windows == OBM_WINDOW_ALTERNATE && (i + 1) % pattern != 0) ||
                        (c->arch->windows == OBM_WINDOW_NO_ROPE && c->layer[i].rope < 0);
        c->layer[i].window = windowed ? c->window : 0;
    }
    return OBM_OK;
}

static obm_status read_layer_type(const obm__reader *r, obm__config *c, size_t i, const char *type) {
    bool full = type && !strcmp(type, "full_attention"), sliding = type && !strcmp(type, "sliding_attention");
    bool fixed = c->arch->windows == OBM_WINDOW_ALL;
    if ((!full && !sliding) || (fixed && sliding != (c->window > 0)))
        return obm__fail(r->err, OBM_E_UNSUPPORTED,
                         "%s: \"layer_types\": layer %zu is \"%.40s\", which %s does not have", r->where, i,
                         type ? type : "?", c->arch->model_type);
    if (sliding && !c->window)
        return obm__fail(r->err, OBM_E_FORMAT,
                         "%s: \"layer_types\": layer %zu is \"sliding_attention\", but there is no sliding window",
                         r->where, i);
    c->layer[i].window = sliding ? c->window : 0;
    return OBM_OK;
}

/* transformers writes one entry per layer; it overrides the rule. */
static obm_status read_layer_types(const obm__reader *r, obm__config *c) {
    const obm_json *types = obm__json_get(r->json, "layer_types");
    if (obm__absent(types)) return OBM_OK;
    if (obm__json_kind(types) != OBM_JSON_ARRAY) return obm__wrong_kind(r, "layer_types", "a list");
    if (obm__json_size(types) != (size_t)c->layers)
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"layer_types\": expected %lld entries, found %zu", r->where,
                         (long long)c->layers, obm__json_size(types));
    for (size_t i = 0; i < (size_t)c->layers; i++)
        OBM_TRY(read_layer_type(r, c, i, obm__json_string(obm__json_at(types, i))));
    return OBM_OK;
}

static obm_status read_layers(const obm__reader *r, obm__config *c) {
    OBM_TRY(read_window(r, c));
    c->layer = obm__calloc((size_t)c->layers, sizeof *c->layer);
    if (!c->layer) return obm__fail_nomem(r->err, (uint64_t)c->layers * sizeof *c->layer);
    OBM_TRY(read_rotating(r, c));
    OBM_TRY(place_windows(r, c));
    OBM_TRY(read_layer_types(r, c));
    for (int64_t i = 0; i < c->layers && c->n_ropes == 2; i++) c->layer[i].rope = c->layer[i].window > 0;
    return OBM_OK;
}

/* ---- end of sequence ---- */

static obm_status read_eos(const obm__reader *r, obm__config *c) {
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

static obm_status find_arch(const obm__reader *r, const char *type, const obm__arch **out) {
    char known[160];
    *out = obm__arch_find(type);
    if (*out) return OBM_OK;
    obm__arch_list(known, sizeof known);
    return obm__fail(r->err, OBM_E_UNSUPPORTED, "%s: \"model_type\": \"%.60s\" is not supported (known: %s)", r->where,
                     type, known);
}

/* Goes on in the config of the text model, where that lies inside of another's. */
static obm_status enter_inner(obm__reader *r, obm__config *c) {
    const obm__arch *outer = c->arch;
    const obm_json *inner = obm__json_get(r->json, outer->inner);
    if (obm__json_kind(inner) != OBM_JSON_OBJECT) return obm__wrong_kind(r, outer->inner, "an object");
    OBM_TRY(obm__check_outer_keys(r, inner));
    const char *type = obm__json_string(obm__json_get(inner, "model_type"));
    OBM_TRY(find_arch(r, type ? type : outer->inner_type, &c->arch));
    if (c->arch->inner)
        return obm__fail(r->err, OBM_E_UNSUPPORTED,
                         "%s: \"%s\": \"model_type\": \"%s\" inside of another is not supported", r->where,
                         outer->inner, c->arch->model_type);
    r->json = inner;
    return OBM_OK;
}

static obm_status read_arch(obm__reader *r, obm__config *c) {
    const char *type = obm__json_string(obm__json_get(r->json, "model_type"));
    if (!type) return obm__fail(r->err, OBM_E_FORMAT, "%s: key \"model_type\" is missing or not a string", r->where);
    OBM_TRY(find_arch(r, type, &c->arch));
    return c->arch->inner ? enter_inner(r, c) : OBM_OK;
}

static obm_status read_heads(const obm__reader *r, obm__config *c) {
    const obm__arch *arch = c->arch;
    OBM_TRY(obm__read_size(r, "num_attention_heads", arch->default_heads ? arch->default_heads : -1, &c->heads));
    const obm_json *kv = obm__json_get(r->json, "num_key_value_heads");
    OBM_TRY(obm__read_size(r, "num_key_value_heads", kv || !arch->default_kv_heads ? c->heads : arch->default_kv_heads,
                           &c->kv_heads));
    const obm_json *dim = obm__json_get(r->json, "head_dim");
    OBM_TRY(obm__read_size(
        r, "head_dim", dim || !arch->default_head_dim ? c->hidden / c->heads : arch->default_head_dim, &c->head_dim));
    if (c->head_dim < 2 || c->head_dim % 2)
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"head_dim\": expected an even number, found %lld", r->where,
                         (long long)c->head_dim);
    if (c->heads > MAX_SIZE / c->head_dim)
        return obm__fail(r->err, OBM_E_FORMAT,
                         "%s: expected \"num_attention_heads\" times \"head_dim\" up to %lld, found %lld by %lld",
                         r->where, (long long)MAX_SIZE, (long long)c->heads, (long long)c->head_dim);
    if (c->heads % c->kv_heads)
        return obm__fail(r->err, OBM_E_FORMAT,
                         "%s: \"num_attention_heads\" (%lld) must be a multiple of \"num_key_value_heads\" (%lld)",
                         r->where, (long long)c->heads, (long long)c->kv_heads);
    return OBM_OK;
}

static obm_status read_sizes(const obm__reader *r, obm__config *c) {
    double eps;
    int64_t positions = c->arch->default_positions ? c->arch->default_positions : 2048;
    OBM_TRY(obm__read_size(r, "vocab_size", c->arch->default_vocab ? c->arch->default_vocab : -1, &c->vocab));
    OBM_TRY(obm__read_size(r, "hidden_size", -1, &c->hidden));
    OBM_TRY(obm__read_size(r, "intermediate_size", -1, &c->intermediate));
    OBM_TRY(obm__read_size(r, "num_hidden_layers", -1, &c->layers));
    if (c->layers > MAX_LAYERS)
        return obm__fail(r->err, OBM_E_FORMAT, "%s: \"num_hidden_layers\": expected 1 to %d, found %lld", r->where,
                         MAX_LAYERS, (long long)c->layers);
    OBM_TRY(read_heads(r, c));
    OBM_TRY(obm__read_size(r, "max_position_embeddings", positions, &c->max_positions));
    OBM_TRY(obm__read_positive(r, "rms_norm_eps", c->arch->default_eps ? c->arch->default_eps : 1e-6, &eps));
    c->norm_eps = (float)eps;
    return OBM_OK;
}

static obm_status read_all(obm__reader *r, obm__config *c) {
    const obm__reader whole = *r;
    OBM_TRY(read_arch(r, c));
    OBM_TRY(obm__check_keys(r, c->arch));
    OBM_TRY(read_sizes(r, c));
    OBM_TRY(obm__read_bool(r, "tie_word_embeddings", c->arch->default_tied, &c->tied));
    if (c->arch->has & OBM_HAS_ATTENTION_BIAS) OBM_TRY(obm__read_bool(r, "attention_bias", false, &c->attention_bias));
    if (c->arch->has & OBM_HAS_MLP_BIAS) OBM_TRY(obm__read_bool(r, "mlp_bias", false, &c->mlp_bias));
    OBM_TRY(read_activation(r, c));
    OBM_TRY(read_scales(r, c));
    OBM_TRY(obm__read_ropes(r, c));
    OBM_TRY(read_layers(r, c));
    OBM_TRY(read_eos(r, c));
    return whole.json == r->json ? OBM_OK : read_eos(&whole, c);
}

obm_status obm__config_parse(const obm_json *config, const obm_json *generation, const char *where, obm__config *out,
                             obm_error *err) {
    obm__config c = {0};
    obm__reader r = {config, where, err}, g = {generation, "generation_config.json", err};
    obm_status status = read_all(&r, &c);
    if (status == OBM_OK && generation) status = read_eos(&g, &c);
    if (status == OBM_OK)
        *out = c;
    else
        obm__config_clear(&c);
    return status;
}

void obm__config_clear(obm__config *c) {
    for (int i = 0; i < OBM_ROPES; i++) {
        obm_free(c->ropes[i].short_factor);
        obm_free(c->ropes[i].long_factor);
    }
    obm_free(c->layer);
    obm_free(c->eos);
    *c = (obm__config){0};
}

bool obm__config_has(const obm__config *c, obm__role role) {
    if (!c->arch->names[role]) return false;
    if (role >= OBM_Q_BIAS && role <= OBM_V_BIAS) return c->attention_bias || (c->arch->has & OBM_HAS_QKV_BIAS);
    if (role == OBM_O_BIAS) return c->attention_bias;
    if (role >= OBM_GATE_BIAS && role <= OBM_DOWN_BIAS) return c->mlp_bias;
    return role != OBM_HEAD || !c->tied;
}

void obm__config_place(const obm__config *c, obm__role role, int64_t *first, int64_t *whole) {
    int64_t rows, cols;
    obm__config_shape(c, role, whole, &cols);
    *first = 0;
    if (role >= OBM_MATRIX_ROLES) return;
    *whole = 0;
    for (int other = 0; other < OBM_MATRIX_ROLES; other++) {
        if (strcmp(c->arch->names[other], c->arch->names[role])) continue;
        obm__config_shape(c, (obm__role)other, &rows, &cols);
        if (other < (int)role) *first += rows;
        *whole += rows;
    }
}

void obm__config_shape(const obm__config *c, obm__role role, int64_t *rows, int64_t *cols) {
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, r = 1, h = c->hidden;
    bool bias = role >= OBM_Q_BIAS && role <= OBM_DOWN_BIAS, whole = c->arch->has & OBM_HAS_WHOLE_QK_NORM;
    switch (bias ? role - OBM_Q_BIAS : role) {
    case OBM_Q:
        r = q;
        break;
    case OBM_K:
    case OBM_V:
        r = kv;
        break;
    case OBM_O:
        r = c->hidden;
        h = q;
        break;
    case OBM_GATE:
    case OBM_UP:
        r = c->intermediate;
        break;
    case OBM_DOWN:
        r = c->hidden;
        h = c->intermediate;
        break;
    case OBM_Q_NORM:
        h = whole ? q : c->head_dim;
        break;
    case OBM_K_NORM:
        h = whole ? kv : c->head_dim;
        break;
    case OBM_EMBEDDING:
    case OBM_HEAD:
        r = c->vocab;
        break;
    default:
        break; /* norms: one row of the hidden size */
    }
    *rows = bias ? 1 : r;
    *cols = bias ? r : h;
}
