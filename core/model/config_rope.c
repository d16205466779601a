/* The rotary embedding of a config.json, in the forms of transformers 4 (rope_theta, rope_scaling) and 5
 * (rope_parameters).  The arithmetic is rope.c's. */
#include "config.h"

#include <string.h>

static const struct {
    const char *name;
    obm__rope_type type;
} types[] = {
    {"default", OBM_ROPE_DEFAULT}, {"linear", OBM_ROPE_LINEAR}, {"dynamic", OBM_ROPE_DYNAMIC},
    {"llama3", OBM_ROPE_LLAMA3},   {"yarn", OBM_ROPE_YARN},     {"longrope", OBM_ROPE_LONGROPE},
    {"su", OBM_ROPE_LONGROPE}, /* its name in the first Phi-3 */
};

const char *obm__rope_type_name(obm__rope_type type) {
    size_t i = 0;
    while (types[i].type != type) i++;
    return types[i].name;
}

/* `top` is the config, `rope` the object inside it. */
typedef struct rope_reader {
    const obm__reader *top;
    obm__reader rope;
    const obm__config *c;
    obm__rope *out;
} rope_reader;

/* ---- one rotation ---- */

static obm_status read_type(const rope_reader *r) {
    const obm_json *v = obm__json_get(r->rope.json, "rope_type");
    if (obm__absent(v)) v = obm__json_get(r->rope.json, "type");
    const char *name = obm__absent(v) ? "default" : obm__json_string(v);
    bool old_longrope = (r->c->arch->has & OBM_HAS_OLD_LONGROPE) && name && !strcmp(name, "yarn");
    for (size_t i = 0; name && i < sizeof types / sizeof *types; i++) {
        if (strcmp(types[i].name, name)) continue;
        r->out->type = old_longrope ? OBM_ROPE_LONGROPE : types[i].type;
        return OBM_OK;
    }
    return obm__fail(
        r->rope.err, OBM_E_UNSUPPORTED,
        "%s: rotary embedding of type \"%.40s\" is not supported (known: default, linear, dynamic, llama3, "
        "yarn, longrope)",
        r->rope.where, name ? name : "?");
}

/* The length that was trained: beside the rope's object or, if not there, in it; else as long as the model says. */
static obm_status read_original(const rope_reader *r) {
    const obm__arch *arch = r->c->arch;
    double dflt = (double)r->c->max_positions;
    OBM_TRY(obm__read_positive(&r->rope, "original_max_position_embeddings", dflt, &dflt));
    if (arch->default_original_positions) dflt = (double)arch->default_original_positions;
    return obm__read_positive(r->top, "original_max_position_embeddings", dflt, &r->out->original_positions);
}

/* Absent or null: how much longer the model says it is than it was trained. */
static obm_status read_factor(const rope_reader *r) {
    double dflt = (double)r->c->max_positions / r->out->original_positions;
    return obm__read_positive(&r->rope, "factor", dflt, &r->out->factor);
}

static obm_status read_llama3(const rope_reader *r) {
    OBM_TRY(read_original(r));
    OBM_TRY(obm__read_positive(&r->rope, "factor", -1, &r->out->factor));
    OBM_TRY(obm__read_positive(&r->rope, "low_freq_factor", -1, &r->out->low_freq_factor));
    OBM_TRY(obm__read_positive(&r->rope, "high_freq_factor", -1, &r->out->high_freq_factor));
    if (r->out->high_freq_factor > r->out->low_freq_factor) return OBM_OK;
    return obm__fail(r->rope.err, OBM_E_FORMAT, "%s: \"high_freq_factor\" must be above \"low_freq_factor\"",
                     r->rope.where);
}

/* Peng et al. 2023 (YaRN), section 3.4: sqrt(1/t) = 0.1 ln(s) + 1, with DeepSeek's weight of the logarithm. */
static double yarn_scale(double factor, double weight) { return factor > 1 ? 0.1 * weight * log(factor) + 1 : 1; }

static obm_status read_yarn(const rope_reader *r) {
    double m, m_all, attention;
    OBM_TRY(read_original(r));
    OBM_TRY(read_factor(r));
    OBM_TRY(obm__read_positive(&r->rope, "beta_fast", 32, &r->out->beta_fast));
    OBM_TRY(obm__read_positive(&r->rope, "beta_slow", 1, &r->out->beta_slow));
    OBM_TRY(obm__read_bool(&r->rope, "truncate", true, &r->out->truncate));
    OBM_TRY(obm__read_positive(&r->rope, "mscale", 0, &m));
    OBM_TRY(obm__read_positive(&r->rope, "mscale_all_dim", 0, &m_all));
    double factor = r->out->factor;
    double dflt = m > 0 && m_all > 0 ? yarn_scale(factor, m) / yarn_scale(factor, m_all) : yarn_scale(factor, 1);
    OBM_TRY(obm__read_positive(&r->rope, "attention_factor", dflt, &attention));
    r->out->attention_factor = (float)attention;
    return OBM_OK;
}

static obm_status read_factors(const rope_reader *r, const char *key, float **out) {
    const obm_json *v = obm__json_get(r->rope.json, key);
    size_t pairs = (size_t)obm__rope_pairs(r->out);
    if (obm__json_kind(v) != OBM_JSON_ARRAY) return obm__wrong_kind(&r->rope, key, "a list of numbers");
    if (obm__json_size(v) != pairs)
        return obm__fail(r->rope.err, OBM_E_FORMAT, "%s: \"%s\": expected %zu numbers, found %zu", r->rope.where, key,
                         pairs, obm__json_size(v));
    *out = obm__calloc(pairs, sizeof **out);
    if (!*out) return obm__fail_nomem(r->rope.err, pairs * sizeof **out);
    for (size_t i = 0; i < pairs; i++) {
        double value;
        if (!obm__json_real(obm__json_at(v, i), &value) || !(value > 0 && value <= 1e30))
            return obm__fail(r->rope.err, OBM_E_FORMAT, "%s: \"%s\": expected positive numbers, found another at %zu",
                             r->rope.where, key, i);
        (*out)[i] = (float)value;
    }
    return OBM_OK;
}

/* Ding et al. 2024 (LongRoPE); the attention factor is Phi-3's. */
static obm_status read_longrope(const rope_reader *r) {
    double attention;
    OBM_TRY(read_original(r));
    OBM_TRY(read_factor(r));
    OBM_TRY(read_factors(r, "short_factor", &r->out->short_factor));
    OBM_TRY(read_factors(r, "long_factor", &r->out->long_factor));
    double s = r->out->factor, dflt = s > 1 ? sqrt(1 + log(s) / log(r->out->original_positions)) : 1;
    OBM_TRY(obm__read_positive(&r->rope, "attention_factor", dflt, &attention));
    r->out->attention_factor = (float)attention;
    return OBM_OK;
}

/* int(head_dim * partial_rotary_factor) columns. */
static obm_status read_dim(const rope_reader *r) {
    double part;
    OBM_TRY(obm__read_positive(r->top, "partial_rotary_factor", 1, &part));
    OBM_TRY(obm__read_positive(&r->rope, "partial_rotary_factor", part, &part));
    r->out->dim = (int64_t)((double)r->c->head_dim * part);
    if (part <= 1 && r->out->dim >= 2 && r->out->dim % 2 == 0) return OBM_OK;
    return obm__fail(
        r->rope.err, OBM_E_UNSUPPORTED,
        "%s: %lld of the %lld columns of a head would be rotated; an even number, at least 2, is supported",
        r->rope.where, (long long)r->out->dim, (long long)r->c->head_dim);
}

/* json NULL: nothing but a theta. */
static obm_status read_rope(const obm__reader *top, const obm_json *json, double theta, const obm__config *c,
                            obm__rope *out) {
    rope_reader r = {top, {json, top->where, top->err}, c, out};
    *out = (obm__rope){.theta = theta, .attention_factor = 1, .factor = 1, .dim = c->head_dim};
    if (json && obm__json_kind(json) != OBM_JSON_OBJECT)
        return obm__fail(top->err, OBM_E_FORMAT, "%s: rotary embedding: expected an object, found %s", top->where,
                         obm__json_kind_name(json));
    if (json) OBM_TRY(obm__check_rope_keys(&r.rope, c->arch));
    OBM_TRY(obm__read_positive(&r.rope, "rope_theta", theta, &out->theta));
    OBM_TRY(read_type(&r));
    OBM_TRY(read_dim(&r));
    switch (out->type) {
    case OBM_ROPE_LLAMA3:
        return read_llama3(&r);
    case OBM_ROPE_YARN:
        return read_yarn(&r);
    case OBM_ROPE_LONGROPE:
        return read_longrope(&r);
    case OBM_ROPE_LINEAR:
    case OBM_ROPE_DYNAMIC:
        out->original_positions = (double)c->max_positions;
        if (out->dim <= 2) return obm__refuse_key(&r.rope, "rope_type", obm__json_get(json, "rope_type"));
        return obm__read_positive(&r.rope, "factor", -1, &out->factor);
    default:
        return OBM_OK;
    }
}

/* ---- all of a model ---- */

/* NULL without, or for an empty one. */
static obm_status find_object(const obm__reader *r, const char *key, const obm_json **out) {
    const obm_json *v = obm__json_get(r->json, key);
    *out = obm__absent(v) || (obm__json_kind(v) == OBM_JSON_OBJECT && !obm__json_size(v)) ? NULL : v;
    return *out && obm__json_kind(v) != OBM_JSON_OBJECT ? obm__wrong_kind(r, key, "an object") : OBM_OK;
}

/* Models that were stretched after training keep the trained length in max_position_embeddings; transformers sets no
 * limit at all. */
static void raise_positions(obm__config *c) {
    const obm__rope *r = &c->ropes[0];
    bool stretched = r->type == OBM_ROPE_LINEAR || r->type == OBM_ROPE_DYNAMIC || r->type == OBM_ROPE_YARN;
    double positions = stretched ? r->original_positions * r->factor : 0;
    if (positions > (double)c->max_positions && positions < 0x1p31) c->max_positions = (int64_t)positions;
}

/* Layers that see everything have the config's theta and scaling, those with a window a theta of their own. */
static obm_status read_local(const obm__reader *r, const obm_json *scaling, const obm_json *parameters, double theta,
                             obm__config *c) {
    const obm_json *full = obm__json_get(parameters, "full_attention");
    const obm_json *local = obm__json_get(parameters, "sliding_attention");
    double local_theta;
    OBM_TRY(obm__read_positive(r, "rope_local_base_freq", 10000, &local_theta));
    if (parameters && obm__absent(full) && obm__absent(local))
        return obm__fail(r->err, OBM_E_FORMAT,
                         "%s: \"rope_parameters\": expected \"full_attention\" and \"sliding_attention\"", r->where);
    if (scaling) full = scaling;
    c->n_ropes = 2;
    OBM_TRY(read_rope(r, obm__absent(full) ? NULL : full, theta, c, &c->ropes[0]));
    return read_rope(r, obm__absent(local) ? NULL : local, local_theta, c, &c->ropes[1]);
}

obm_status obm__read_ropes(const obm__reader *r, obm__config *c) {
    const obm_json *scaling, *parameters;
    double theta = c->arch->default_theta ? c->arch->default_theta : 10000;
    OBM_TRY(find_object(r, "rope_scaling", &scaling));
    OBM_TRY(find_object(r, "rope_parameters", &parameters));
    OBM_TRY(obm__read_positive(r, "rope_theta", theta, &theta));
    if (c->arch->has & OBM_HAS_LOCAL_ROPE) return read_local(r, scaling, parameters, theta, c);
    c->n_ropes = 1;
    OBM_TRY(read_rope(r, scaling ? scaling : parameters, theta, c, &c->ropes[0]));
    raise_positions(c);
    return OBM_OK;
}
