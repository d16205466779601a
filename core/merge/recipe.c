/* Recipes: every key checked, settings (scalars, gradients, filters) resolved per tensor as mergekit resolves them. */
#include "recipe.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WHERE OBM_RECIPE_WHERE

/* ---- several faults in one message ---- */

obm_status obm__recipe_join(obm_status before, obm_error *err, obm_status status, const obm_error *own) {
    if (status == OBM_OK) return before;
    if (before == OBM_OK || status == OBM_E_NOMEM) {
        if (err) *err = *own;
        return status;
    }
    size_t used = err ? strlen(err->message) : 0;
    const char *text = own->message;
    if (!strncmp(text, WHERE ": ", strlen(WHERE ": "))) text += strlen(WHERE ": ");
    bool full = used >= 5 && !strcmp(err->message + used - 5, "; ...");
    if (err && !full)
        snprintf(err->message + used, sizeof err->message - used, "; %s",
                 used + strlen(text) + 8 < sizeof err->message ? text : "...");
    return before;
}

/* ---- keys ---- */

static const char *const recipe_keys[] = {"merge_method", "models",           "base_model", "parameters",   "dtype",
                                          "out_dtype",    "tokenizer_source", "profile",    "random_seed",  "name",
                                          "slices",       "modules",          "tokenizer",  "chat_template"};
/* Settings of mergekit's command line, and what its documentation names but its code does not read. */
static const char *const ignored_keys[] = {"input_model_parameters",
                                           "int8_mask",
                                           "trust_remote_code",
                                           "allow_crimes",
                                           "copy_tokenizer",
                                           "lazy_unpickle",
                                           "low_cpu_memory",
                                           "clone_tensors",
                                           "write_model_card",
                                           "out_shard_size",
                                           "cuda"};
static const char *const condition_keys[] = {"filter", "value"};

static bool is_among(const char *key, const char *const *keys, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!strcmp(key, keys[i])) return true;
    return false;
}

obm_status obm__recipe_check_ignored(const obm_context *ctx, const obm_json *object, const char *where,
                                     const char *const *keys, size_t n, const char *const *ignored, size_t n_ignored,
                                     obm_error *err) {
    obm_status status = OBM_OK;
    for (void *it = obm__json_first(object); it; it = obm__json_next(object, it)) {
        const char *key = obm__json_key(it);
        char hint[128];
        if (is_among(key, keys, n)) continue;
        if (is_among(key, ignored, n_ignored)) {
            obm__warn(ctx, "%s: %s has no effect here, in mergekit too; ignored", where, key);
        } else if (is_among("parameters", keys, n) && obm__param_is_known(key)) {
            OBM_JOIN(obm__fail(OBM_OWN, OBM_E_ARG, "%s: unknown key \"%.64s\", it belongs under \"parameters\"", where,
                               key));
        } else {
            OBM_JOIN(obm__fail(OBM_OWN, OBM_E_ARG, "%s: unknown key \"%.64s\"%s", where, key,
                               obm__suggest(key, keys, n, hint, sizeof hint)));
        }
    }
    return status;
}

obm_status obm__recipe_check_keys(const obm_json *object, const char *where, const char *const *keys, size_t n,
                                  obm_error *err) {
    return obm__recipe_check_ignored(NULL, object, where, keys, n, NULL, 0, err);
}

obm_status obm__recipe_text(const obm_json *object, const char *where, const char *key, const char **out,
                            obm_error *err) {
    const obm_json *v = obm__json_get(object, key);
    *out = NULL;
    if (!obm__recipe_is_set(v)) return OBM_OK;
    *out = obm__json_string(v);
    if (*out && **out) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s: %s: expected text, found %s", where, key,
                     *out ? "an empty string" : obm__json_kind_name(v));
}

static obm_status read_dtype(const obm_json *root, const char *key, bool *has, obm_dtype *out, obm_error *err) {
    static const struct {
        const char *name;
        obm_dtype dtype;
    } known[] = {
        {"float32", OBM_F32}, {"float16", OBM_F16}, {"bfloat16", OBM_BF16}, {"float64", OBM_F64},
        {"f32", OBM_F32},     {"f16", OBM_F16},     {"bf16", OBM_BF16},     {"f64", OBM_F64},
    };
    const char *name, *names[OBM_COUNT(known)];
    OBM_TRY(obm__recipe_text(root, WHERE, key, &name, err));
    if (!name) return OBM_OK;
    if (!strncmp(name, "torch.", 6)) name += 6;
    for (size_t i = 0; i < OBM_COUNT(known); i++) {
        names[i] = known[i].name;
        if (strcmp(name, known[i].name)) continue;
        *has = true;
        *out = known[i].dtype;
        return OBM_OK;
    }
    if (!strcmp(name, "int64"))
        return obm__fail(err, OBM_E_UNSUPPORTED,
                         WHERE ": %s: %s is not supported (float32, float16, bfloat16, float64)", key, name);
    char hint[128];
    return obm__fail(err, OBM_E_ARG, WHERE ": %s: no dtype \"%.64s\" (float32, float16, bfloat16, float64)%s", key,
                     name, obm__suggest(name, names, OBM_COUNT(known), hint, sizeof hint));
}

/* ---- settings: their form ---- */

/* A number as a parameter takes it.  pydantic reads numbers in quotes too, so recipes have them. */
static bool scalar_value(const obm_param_info *info, const obm_json *v, double *out) {
    bool b;
    const char *text = obm__json_string(v);
    if (obm__json_bool(v, &b)) {
        *out = b;
        return true;
    }
    if (text && !strcmp(info->name, "scope") && (!strcmp(text, "tensor") || !strcmp(text, "model"))) {
        *out = text[0] == 'm';
        return true;
    }
    if (text) {
        char *end;
        *out = strtod(text, &end);
        if (end == text || *end || isspace((unsigned char)*text)) return false;
    } else if (!obm__json_real(v, out)) {
        return false;
    }
    return isfinite(*out) && *out >= info->min && *out <= info->max && (!info->is_bool || *out == 0 || *out == 1);
}

static obm_status bad_value(const obm_param_info *info, const obm_json *v, const char *where, obm_error *err) {
    char *text = obm__json_text(v, 0);
    obm_status status =
        info->is_bool ? obm__fail(err, OBM_E_ARG, "%s: expected true or false, found %.80s", where, text ? text : "?")
        : !strcmp(info->name, "scope")
            ? obm__fail(err, OBM_E_ARG, "%s: expected tensor or model, found %.80s", where, text ? text : "?")
        : isinf(info->min) && isinf(info->max)
            ? obm__fail(err, OBM_E_ARG, "%s: expected a number, found %.80s", where, text ? text : "?")
            : obm__fail(err, OBM_E_ARG, "%s: expected a number in [%g, %g], found %.80s", where, info->min, info->max,
                        text ? text : "?");
    obm_free(text);
    return status;
}

static bool is_scalar(const obm_json *v) {
    obm_json_kind kind = obm__json_kind(v);
    return kind != OBM_JSON_ARRAY && kind != OBM_JSON_OBJECT;
}

/* A scalar or a gradient (a list of scalars). */
static obm_status check_values(const obm_param_info *info, const obm_json *v, const char *where, obm_error *err) {
    double x;
    if (is_scalar(v)) return scalar_value(info, v, &x) ? OBM_OK : bad_value(info, v, where, err);
    if (obm__json_kind(v) != OBM_JSON_ARRAY || obm__json_size(v) == 0)
        return obm__fail(err, OBM_E_ARG, "%s: expected a value or a list of values, found %s", where,
                         obm__json_kind(v) == OBM_JSON_ARRAY ? "an empty list" : obm__json_kind_name(v));
    for (size_t i = 0; i < obm__json_size(v); i++)
        if (!is_scalar(obm__json_at(v, i)) || !scalar_value(info, obm__json_at(v, i), &x))
            return bad_value(info, obm__json_at(v, i), where, err);
    return OBM_OK;
}

static obm_status check_condition(const obm_param_info *info, const obm_json *v, const char *where, obm_error *err) {
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG,
                         "%s: a list is either all values or all filter/value pairs, found %s among pairs", where,
                         obm__json_kind_name(v));
    OBM_TRY(obm__recipe_check_keys(v, where, condition_keys, OBM_COUNT(condition_keys), err));
    const obm_json *filter = obm__json_get(v, "filter"), *value = obm__json_get(v, "value");
    if (obm__recipe_is_set(filter) && !obm__json_string(filter))
        return obm__fail(err, OBM_E_ARG, "%s: filter: expected text, found %s", where, obm__json_kind_name(filter));
    if (!obm__recipe_is_set(value)) return obm__fail(err, OBM_E_ARG, "%s: a filter without a value", where);
    return check_values(info, value, where, err);
}

static bool is_conditional(const obm_json *v) {
    return obm__json_kind(v) == OBM_JSON_OBJECT ||
           (obm__json_kind(v) == OBM_JSON_ARRAY && obm__json_kind(obm__json_at(v, 0)) == OBM_JSON_OBJECT);
}

static obm_status check_setting(const obm_param_info *info, const obm_json *v, const char *where, obm_error *err) {
    if (obm__json_kind(v) == OBM_JSON_OBJECT) return check_condition(info, v, where, err);
    if (obm__json_kind(v) != OBM_JSON_ARRAY || obm__json_size(v) == 0 || !is_conditional(v))
        return check_values(info, v, where, err);
    for (size_t i = 0; i < obm__json_size(v); i++) OBM_TRY(check_condition(info, obm__json_at(v, i), where, err));
    return OBM_OK;
}

/* What NOTFOUND is for a name that a program gives is a fault of the recipe here. */
static obm_status as_fault(obm_status status, obm_error *err) {
    if (status != OBM_E_NOTFOUND) return status;
    if (err) err->code = OBM_E_ARG;
    return OBM_E_ARG;
}

static obm_status unknown_param(const obm__method *m, const char *key, const char *where, obm_error *err) {
    return as_fault(obm__fail_unknown_param(m, key, where, err), err);
}

/* One `parameters` mapping.  What mergekit ignores without a word (another method's parameter, a setting of the whole
 * merge under one model) is ignored with one; what nobody knows is an error. */
obm_status obm__recipe_check_parameters(const obm_context *ctx, const obm__method *m, const obm_json *v, bool of_model,
                                        const char *where, obm_error *err) {
    if (!obm__recipe_is_set(v)) return OBM_OK;
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, "%s: expected a mapping, found %s", where, obm__json_kind_name(v));
    obm_status status = OBM_OK;
    for (void *it = obm__json_first(v); it; it = obm__json_next(v, it)) {
        const char *key = obm__json_key(it);
        const obm_param_info *info = obm__method_param(m, key);
        char path[256];
        snprintf(path, sizeof path, "%s.%.64s", where, key);
        if (!info && !obm__param_is_known(key)) {
            snprintf(path, sizeof path, "%.200s: ", where);
            OBM_JOIN(unknown_param(m, key, path, OBM_OWN));
        } else if (!info) {
            obm__warn(ctx, "%s: %s takes no %s; ignored", where, m->info.name, key);
        } else if (of_model && info->scope == OBM_PARAM_GLOBAL) {
            obm__warn(ctx, "%s: %s holds for the whole merge, not for one model; ignored", where, key);
        } else if (obm__recipe_is_set(obm__json_value(it))) {
            OBM_JOIN(check_setting(info, obm__json_value(it), path, OBM_OWN));
        }
    }
    return status;
}

/* ---- settings: their value for one tensor ---- */

/* mergekit's evaluate_setting: numbers interpolate between neighbours, booleans step. */
static double gradient_value(const obm_param_info *info, const obm_json *v, double depth) {
    size_t last = obm__json_size(v) - 1;
    double scaled = depth * (double)last, a = 0, b = 0;
    size_t i = (size_t)scaled;
    if (i > last) i = last;
    scalar_value(info, obm__json_at(v, i), &a);
    scalar_value(info, obm__json_at(v, i < last ? i + 1 : last), &b);
    double fraction = scaled - (double)i;
    return info->is_bool || !strcmp(info->name, "scope") ? a : (1 - fraction) * a + fraction * b;
}

static double plain_value(const obm_param_info *info, const obm_json *v, double depth) {
    double x = 0;
    if (obm__json_kind(v) == OBM_JSON_ARRAY) return gradient_value(info, v, depth);
    scalar_value(info, v, &x);
    return x;
}

static bool condition_holds(const obm_json *condition, const char *tensor) {
    const char *filter = obm__json_string(obm__json_get(condition, "filter"));
    return !filter || !strcmp(filter, "*") || strstr(tensor, filter);
}

/* False where no filter matches: the next level of precedence is asked then. */
static bool setting_value(const obm_param_info *info, const obm_json *v, const char *tensor, double depth,
                          double *out) {
    if (!obm__recipe_is_set(v)) return false;
    if (!is_conditional(v)) {
        *out = plain_value(info, v, depth);
        return true;
    }
    bool list = obm__json_kind(v) == OBM_JSON_ARRAY;
    for (size_t i = 0; i < (list ? obm__json_size(v) : 1); i++) {
        const obm_json *condition = list ? obm__json_at(v, i) : v;
        if (!condition_holds(condition, tensor)) continue;
        *out = plain_value(info, obm__json_get(condition, "value"), depth);
        return true;
    }
    return false;
}

size_t obm__recipe_params_capacity(const obm__recipe *r) { return r->method->info.n_params * (r->n_models + 1); }

/* The first of the levels that says something for a tensor of this name; own NULL: settings of the whole merge. */
static bool level_value(const obm__recipe *r, const obm__slice *s, const obm_json *own, const obm_param_info *info,
                        const char *tensor, double depth, double *out) {
    const obm_json *const levels[] = {own, s->parameters, s->modules, r->parameters};
    for (size_t i = 0; i < OBM_COUNT(levels); i++)
        if (setting_value(info, obm__json_get(levels[i], info->name), tensor, depth, out)) return true;
    return false;
}

size_t obm__recipe_params(const obm__recipe *r, const obm__slice *s, const char *tensor, const char *const *inputs,
                          double depth, obm_param *out) {
    size_t n = 0;
    for (size_t i = 0; i < r->method->info.n_params; i++) {
        const obm_param_info *info = &r->method->info.params[i];
        obm_param p = {info->name, -1, 0};
        if (info->scope == OBM_PARAM_GLOBAL && level_value(r, s, NULL, info, tensor, depth, &p.value)) out[n++] = p;
        for (size_t m = 0; info->scope == OBM_PARAM_PER_MODEL && m < s->n_models; m++) {
            p.model = (int)m;
            if (level_value(r, s, s->models[m].parameters, info, inputs ? inputs[m] : tensor, depth, &p.value))
                out[n++] = p;
        }
    }
    return n;
}

const char *obm__layer_digits(const char *tensor, size_t *n) {
    for (const char *p = tensor; p; p = strchr(p, '.')) {
        p += *p == '.';
        *n = strspn(p, "0123456789");
        if (*n > 0 && *n < 9 && (p[*n] == '.' || !p[*n])) return p;
    }
    return NULL;
}

int64_t obm__layer_of(const char *tensor) {
    size_t n;
    const char *digits = obm__is_outside(tensor) ? NULL : obm__layer_digits(tensor, &n); /* a layer of something else */
    return digits ? strtol(digits, NULL, 10) : -1;
}

double obm__recipe_depth(const char *tensor, int64_t n_layers) {
    int64_t layer = obm__layer_of(tensor);
    if (layer < 0) return 0;
    if (n_layers <= 1) return 1;
    return layer >= n_layers ? 1 : (double)layer / (double)(n_layers - 1);
}

/* ---- the whole ---- */

static obm_status find_method(obm__recipe *r, const char *name, obm_error *err) {
    for (size_t i = r->n_own; i-- > 0;) {
        if (strcmp(r->own[i].row.info.name, name) != 0) continue;
        r->method = &r->own[i].row;
        return OBM_OK;
    }
    obm_error why = {0};
    obm_status status = obm__method_find(name, &r->method, &why);
    return status == OBM_OK ? OBM_OK
                            : obm__fail(err, as_fault(status, NULL), WHERE ": merge_method: %.400s", why.message);
}

static obm_status read_method(const obm_context *ctx, obm__recipe *r, obm_error *err) {
    const char *method;
    OBM_TRY(obm__recipe_text(r->root, WHERE, "merge_method", &method, err));
    if (!method) return obm__fail(err, OBM_E_ARG, WHERE ": \"merge_method\" is missing");
    OBM_TRY(find_method(r, method, err));
    OBM_TRY(obm__recipe_ref(ctx, r, obm__json_get(r->root, "base_model"), WHERE ": base_model", &r->base, err));
    return OBM_OK;
}

static obm_status read_profile(obm__recipe *r, obm_profile override, obm_error *err) {
    const char *name;
    OBM_TRY(obm__recipe_text(r->root, WHERE, "profile", &name, err));
    bool paper = name && !strcmp(name, "paper");
    if (name && !paper && strcmp(name, "mergekit"))
        return obm__fail(err, OBM_E_ARG, WHERE ": profile: expected mergekit or paper, found \"%.64s\"", name);
    r->profile = override != OBM_PROFILE_DEFAULT ? override : paper ? OBM_PROFILE_PAPER : OBM_PROFILE_MERGEKIT;
    return OBM_OK;
}

static obm_status read_seed(obm__recipe *r, obm_error *err) {
    const obm_json *v = obm__json_get(r->root, "random_seed");
    int64_t seed = 0;
    if (obm__recipe_is_set(v) && (!obm__json_int(v, &seed) || seed < 0))
        return obm__fail(err, OBM_E_ARG, WHERE ": random_seed: expected an integer >= 0");
    r->seed = (uint64_t)seed;
    return OBM_OK;
}

/* mergekit computes in it; sums here are f64 where they are long, and the rest is f32. */
static void warn_double(const obm_context *ctx, const obm__recipe *r) {
    obm_dtype written = r->has_out_dtype ? r->out_dtype : r->dtype;
    if (written == OBM_F64)
        obm__warn(ctx, WHERE ": float64: merged in float32 and widened on writing: twice the bytes of float32 and no "
                             "digit more, and models of it do not run here");
    else if (r->dtype == OBM_F64)
        obm__warn(ctx, WHERE ": dtype: float64: merged in float32");
}

static obm_status read_recipe(const obm_context *ctx, obm__recipe *r, obm_profile profile, obm_error *err) {
    if (obm__json_kind(r->root) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, WHERE ": expected a mapping, found %s", obm__json_kind_name(r->root));
    obm_status status = OBM_OK;
    OBM_JOIN(obm__recipe_check_ignored(ctx, r->root, WHERE, recipe_keys, OBM_COUNT(recipe_keys), ignored_keys,
                                       OBM_COUNT(ignored_keys), OBM_OWN));
    OBM_JOIN(read_profile(r, profile, OBM_OWN));
    OBM_JOIN(obm__recipe_text(r->root, WHERE, "name", &r->name, OBM_OWN));
    OBM_JOIN(read_dtype(r->root, "dtype", &r->has_dtype, &r->dtype, OBM_OWN));
    OBM_JOIN(read_dtype(r->root, "out_dtype", &r->has_out_dtype, &r->out_dtype, OBM_OWN));
    OBM_JOIN(read_seed(r, OBM_OWN));
    OBM_JOIN(obm__recipe_read_tokenizer(ctx, r, OBM_OWN));
    OBM_JOIN(read_method(ctx, r, OBM_OWN));
    if (!r->method) return status; /* which says what the rest may hold */
    r->parameters = obm__json_get(r->root, "parameters");
    OBM_JOIN(obm__recipe_check_parameters(ctx, r->method, r->parameters, false, WHERE ": parameters", OBM_OWN));
    OBM_JOIN(obm__recipe_read_models(ctx, r, OBM_OWN));
    if (status == OBM_OK) warn_double(ctx, r);
    return status;
}

static obm_status take_methods(obm__recipe *r, const obm__recipe_methods *methods, obm_error *err) {
    if (methods->n) r->own = obm__calloc(methods->n, sizeof *r->own);
    if (methods->n && !r->own) return obm__fail_nomem(err, methods->n * sizeof *r->own);
    for (; r->n_own < methods->n; r->n_own++) OBM_TRY(obm__own_new(methods->items[r->n_own], &r->own[r->n_own], err));
    if (!methods->method || obm__json_kind(r->root) != OBM_JSON_OBJECT) return OBM_OK;
    bool ok = obm__json_set(r->root, "merge_method", obm__json_new_string(methods->method));
    return ok ? OBM_OK : obm__fail_nomem(err, strlen(methods->method));
}

obm_status obm__recipe_read(const obm_context *ctx, const char *text, obm_json *root, obm_profile profile,
                            const obm__recipe_methods *methods, obm__recipe **out, obm_error *err) {
    obm__recipe *r = obm__calloc(1, sizeof *r);
    if (!r) {
        obm__json_free(root);
        return obm__fail_nomem(err, sizeof *r);
    }
    r->root = root;
    r->text = obm__strdup(text);
    r->refs = obm__json_new_array();
    obm_status status = r->text && r->refs ? take_methods(r, methods, err) : obm__fail_nomem(err, strlen(text));
    if (status == OBM_OK) status = read_recipe(ctx, r, profile, err);
    if (status == OBM_OK) {
        *out = r;
    } else {
        obm__recipe_free(r);
    }
    return status;
}

obm_status obm__recipe_parse(const obm_context *ctx, const char *text, obm_profile profile, obm__recipe **out,
                             obm_error *err) {
    obm_json *root;
    OBM_TRY(obm__yaml_parse(text, strlen(text), WHERE, &root, err));
    return obm__recipe_read(ctx, text, root, profile, &(obm__recipe_methods){0}, out, err);
}

void obm__recipe_free(obm__recipe *r) {
    if (!r) return;
    obm__json_free(r->root);
    obm__json_free(r->refs);
    for (size_t i = 0; r->slices && i < r->n_slices; i++) obm_free(r->slices[i].models);
    obm_free(r->slices);
    obm_free(r->own);
    obm_free(r->tokenizer.rules);
    obm_free(r->text);
    obm_free(r);
}
