/* What a recipe merges: `models`, `slices` of layers, or `modules` with one of the two, as a list of slices.  Knows no
 * files: that a model has these layers is checked where it is opened. */
#include "recipe.h"

#include <stdio.h>
#include <string.h>

#define WHERE OBM_RECIPE_WHERE
/* mergekit's name for the one module of a model of text. */
#define MODULE "default"

static const char *const model_keys[] = {"model", "parameters"};
static const char *const source_keys[] = {"model", "parameters", "layer_range"};
static const char *const slice_keys[] = {"sources", "base_model", "parameters", "residual_weight"};
static const char *const ref_keys[] = {"model", "lora", "override_architecture"};
static const char *const path_keys[] = {"path", "revision"};
/* What mergekit reads in slices only. */
static const char *const ignored_in_models[] = {"layer_range"};
static const char *const module_keys[] = {"models", "slices", "parameters"};

static size_t ref_length(const char *ref) {
    size_t n = strlen(ref);
    while (n > 1 && ref[n - 1] == '/') n--;
    return n;
}

bool obm__recipe_same_ref(const char *a, const char *b) {
    size_t n = ref_length(a);
    return n == ref_length(b) && !strncmp(a, b, n);
}

const char *obm__recipe_where(const obm__recipe *r, const obm__slice *s, const obm__source *source, char *buf,
                              size_t size) {
    buf[0] = 0;
    if (r->sliced)
        snprintf(buf, size, WHERE ": %s[%zu].sources[%zu]: ", r->sliced, (size_t)(s - r->slices), source->index);
    return buf;
}

/* ---- one model ---- */

/* A path or name, or {path, revision}. */
static obm_status add_path(const obm_json *v, const char *where, obm__buffer *b, obm_error *err) {
    const char *text = obm__json_string(v), *revision = NULL;
    if (obm__json_kind(v) == OBM_JSON_OBJECT) {
        OBM_TRY(obm__recipe_check_keys(v, where, path_keys, OBM_COUNT(path_keys), err));
        OBM_TRY(obm__recipe_text(v, where, "path", &text, err));
        OBM_TRY(obm__recipe_text(v, where, "revision", &revision, err));
    }
    if (!text || !*text) return obm__fail(err, OBM_E_ARG, "%s: expected a path", where);
    obm__buffer_text(b, text);
    if (revision) obm__buffer_printf(b, "@%s", revision);
    return b->failed ? obm__fail_nomem(err, strlen(text)) : OBM_OK;
}

static obm_status add_mapping(const obm_context *ctx, const obm_json *v, const char *where, obm__buffer *b,
                              obm_error *err) {
    const obm_json *lora = obm__json_get(v, "lora");
    OBM_TRY(obm__recipe_check_keys(v, where, ref_keys, OBM_COUNT(ref_keys), err));
    if (obm__recipe_is_set(obm__json_get(v, "override_architecture")))
        obm__warn(ctx, "%s: override_architecture has no effect here, tensors are known by their names; ignored",
                  where);
    OBM_TRY(add_path(obm__json_get(v, "model"), where, b, err));
    if (!obm__recipe_is_set(lora)) return OBM_OK;
    obm__buffer_text(b, "+");
    return add_path(lora, where, b, err);
}

obm_status obm__recipe_ref(const obm_context *ctx, obm__recipe *r, const obm_json *v, const char *where,
                           const char **out, obm_error *err) {
    *out = obm__json_string(v);
    if (!obm__recipe_is_set(v) || (*out && **out)) return OBM_OK;
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, "%s: expected a path, found %s", where,
                         *out ? "an empty string" : obm__json_kind_name(v));
    obm__buffer b = {0};
    obm_status status = add_mapping(ctx, v, where, &b, err);
    if (status == OBM_OK && !obm__json_append(r->refs, obm__json_new_string(b.data)))
        status = obm__fail_nomem(err, b.size);
    if (status == OBM_OK) *out = obm__json_string(obm__json_at(r->refs, obm__json_size(r->refs) - 1));
    obm__buffer_free(&b);
    return status;
}

/* [first, end), as mergekit counts. */
static obm_status read_range(const obm_json *v, const char *where, obm__source *s, obm_error *err) {
    const obm_json *range = obm__json_get(v, "layer_range");
    if (!obm__recipe_is_set(range)) return obm__fail(err, OBM_E_ARG, "%s: \"layer_range\" is missing", where);
    if (obm__json_kind(range) != OBM_JSON_ARRAY || obm__json_size(range) != 2 ||
        !obm__json_int(obm__json_at(range, 0), &s->first) || !obm__json_int(obm__json_at(range, 1), &s->end))
        return obm__fail(err, OBM_E_ARG, "%s: layer_range: expected two integers, [first, end]", where);
    if (s->first >= 0 && s->first < s->end) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s: layer_range: expected 0 <= first < end, found [%lld, %lld]", where,
                     (long long)s->first, (long long)s->end);
}

static obm_status read_source(const obm_context *ctx, obm__recipe *r, const obm_json *v, bool sliced, const char *where,
                              obm__source *out, obm_error *err) {
    char path[160];
    obm__source s = {.index = out->index, .end = -1};
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, "%s: expected a mapping with \"model\", found %s", where,
                         obm__json_kind_name(v));
    obm_status status = OBM_OK;
    OBM_JOIN(sliced ? obm__recipe_check_keys(v, where, source_keys, OBM_COUNT(source_keys), OBM_OWN)
                    : obm__recipe_check_ignored(ctx, v, where, model_keys, OBM_COUNT(model_keys), ignored_in_models,
                                                OBM_COUNT(ignored_in_models), OBM_OWN));
    snprintf(path, sizeof path, "%s.model", where);
    OBM_JOIN(obm__recipe_ref(ctx, r, obm__json_get(v, "model"), path, &s.ref, OBM_OWN));
    if (!s.ref && status == OBM_OK) return obm__fail(err, OBM_E_ARG, "%s: \"model\" is missing", where);
    if (sliced) OBM_JOIN(read_range(v, where, &s, OBM_OWN));
    s.parameters = obm__json_get(v, "parameters");
    snprintf(path, sizeof path, "%s.parameters", where);
    OBM_JOIN(obm__recipe_check_parameters(ctx, r->method, s.parameters, true, path, OBM_OWN));
    if (status == OBM_OK) *out = s;
    return status;
}

static obm_status add_source(const obm_context *ctx, const obm__recipe *r, obm__slice *slice, const char *base,
                             const obm__source *s, const char *where, obm_error *err) {
    bool twice = slice->base.ref && obm__recipe_same_ref(slice->base.ref, s->ref) && r->sliced;
    for (size_t j = 0; j < slice->n_models; j++) twice |= obm__recipe_same_ref(slice->models[j].ref, s->ref);
    if (twice) return obm__fail(err, OBM_E_ARG, "%s: %.200s is listed twice", where, s->ref);
    if (r->sliced && slice->layers >= 0 && s->end - s->first != slice->layers)
        return obm__fail(err, OBM_E_ARG, "%s: layer_range: expected %lld layers as in the first source, found %lld",
                         where, (long long)slice->layers, (long long)(s->end - s->first));
    if (r->sliced) slice->layers = s->end - s->first;
    if (base && obm__method_takes_base(r->method) && obm__recipe_same_ref(base, s->ref)) {
        if (obm__json_size(s->parameters)) obm__warn(ctx, "%s is the base: its parameters are ignored", where);
        slice->base = *s;
        return OBM_OK;
    }
    slice->models[slice->n_models++] = *s;
    return OBM_OK;
}

/* The list under `models` or `sources`, at most one longer for a base that is not in it. */
static obm_status read_list(const obm_context *ctx, obm__recipe *r, const obm_json *list, const char *base,
                            const char *where, obm__slice *slice, obm_error *err) {
    if (obm__json_kind(list) != OBM_JSON_ARRAY)
        return obm__fail(err, OBM_E_ARG, "%s: expected a list, found %s", where, obm__json_kind_name(list));
    size_t n = obm__json_size(list);
    slice->models = obm__calloc(n + 1, sizeof *slice->models);
    if (!slice->models) return obm__fail_nomem(err, (n + 1) * sizeof *slice->models);
    obm_status status = OBM_OK;
    for (size_t i = 0; i < n; i++) {
        char path[128];
        obm__source s = {.index = i};
        snprintf(path, sizeof path, "%s[%zu]", where, i);
        OBM_JOIN(read_source(ctx, r, obm__json_at(list, i), r->sliced != NULL, path, &s, OBM_OWN));
        if (s.ref) OBM_JOIN(add_source(ctx, r, slice, base, &s, path, OBM_OWN));
    }
    return status;
}

/* ---- what must be there ---- */

static obm_status fail_base(const obm__recipe *r, const char *where, obm_error *err) {
    const char *name = r->method->info.name;
    bool own = false;
    for (size_t i = 0; i < r->n_own; i++) own |= r->method == &r->own[i].row;
    if (own)
        return obm__fail(
            err, OBM_E_ARG,
            "%s%s gets task vectors, so it needs a \"base_model\", the model that the others were tuned from; "
            "a method registered with base = false (register_method; needs_base in C) gets the weights",
            where, name);
    return obm__fail(err, OBM_E_ARG, "%s%s needs a \"base_model\", the model that the others were tuned from", where,
                     name);
}

static bool is_given(const obm_json *parameters, const char *name) {
    return obm__recipe_is_set(obm__json_get(parameters, name));
}

/* A parameter that has to be given and stands at no level; NULL: none.  Of the paper profile all have defaults. Filters
 * may still leave out a tensor, which shows where its value is looked up. */
static const char *missing_parameter(const obm__recipe *r, const obm__slice *s, const obm__source *model) {
    for (size_t i = 0; r->profile != OBM_PROFILE_PAPER && i < r->method->info.n_params; i++) {
        const obm_param_info *info = &r->method->info.params[i];
        bool own = info->scope == OBM_PARAM_PER_MODEL && is_given(model->parameters, info->name);
        if (info->required && !own && !is_given(s->parameters, info->name) && !is_given(s->modules, info->name) &&
            !is_given(r->parameters, info->name))
            return info->name;
    }
    return NULL;
}

static obm_status check_required(const obm__recipe *r, const obm__slice *s, const char *where, obm_error *err) {
    for (size_t i = 0; i < s->n_models; i++) {
        const char *missing = missing_parameter(r, s, &s->models[i]);
        if (!missing) continue;
        if (obm__method_param(r->method, missing)->scope == OBM_PARAM_GLOBAL)
            return obm__fail(err, OBM_E_ARG, WHERE ": parameters.%s is missing, %s needs it", missing,
                             r->method->info.name);
        return obm__fail(err, OBM_E_ARG,
                         "%s[%zu].parameters.%s is missing, %s needs it for each model (%.200s); %s under the merge's "
                         "own parameters holds for all",
                         where, s->models[i].index, missing, r->method->info.name, s->models[i].ref, missing);
    }
    return OBM_OK;
}

/* ---- models ---- */

/* The base is an input like the others where the method has no task vectors: mergekit adds it if it is not listed. */
static obm_status add_base_as_model(const obm__recipe *r, obm__slice *s, obm_error *err) {
    if (obm__method_takes_base(r->method) || !r->base) return OBM_OK;
    for (size_t i = 0; i < s->n_models; i++)
        if (obm__recipe_same_ref(s->models[i].ref, r->base)) return OBM_OK;
    obm__source base = {.ref = r->base, .end = -1};
    const char *missing = missing_parameter(r, s, &base);
    if (missing)
        return obm__fail(err, OBM_E_ARG,
                         WHERE ": parameters.%s is missing: base_model is one more input of %s, and takes the %s that "
                               "stands there",
                         missing, r->method->info.name, missing);
    s->models[s->n_models++] = base;
    return OBM_OK;
}

static obm_status read_models(const obm_context *ctx, obm__recipe *r, const obm_json *models, const obm_json *modules,
                              const char *where, obm_error *err) {
    obm_status status = OBM_OK;
    if (r->method->info.needs_base && !r->base) OBM_JOIN(fail_base(r, WHERE ": ", OBM_OWN));
    r->slices = obm__calloc(1, sizeof *r->slices);
    if (!r->slices) return obm__fail_nomem(err, sizeof *r->slices);
    r->n_slices = 1;
    obm__slice *s = &r->slices[0];
    s->layers = -1;
    s->modules = modules;
    OBM_JOIN(read_list(ctx, r, models, r->base, where, s, OBM_OWN));
    if (status != OBM_OK) return status;
    OBM_TRY(check_required(r, s, where, err));
    OBM_TRY(add_base_as_model(r, s, err));
    if (obm__method_takes_base(r->method) && r->base) s->base = (obm__source){.ref = r->base, .end = -1};
    r->n_models = s->n_models;
    return obm__method_check_count(r->method, s->n_models, WHERE ": ", err);
}

/* ---- slices ---- */

static obm_status read_slice(const obm_context *ctx, obm__recipe *r, const obm_json *v, const char *where,
                             obm__slice *s, obm_error *err) {
    char path[128];
    const char *base;
    s->layers = -1;
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, "%s: expected a mapping with \"sources\", found %s", where,
                         obm__json_kind_name(v));
    OBM_TRY(obm__recipe_check_keys(v, where, slice_keys, OBM_COUNT(slice_keys), err));
    if (obm__recipe_is_set(obm__json_get(v, "residual_weight")))
        obm__warn(ctx, "%s: residual_weight has no effect, in mergekit too; ignored", where);
    snprintf(path, sizeof path, "%s.base_model", where);
    OBM_TRY(obm__recipe_ref(ctx, r, obm__json_get(v, "base_model"), path, &base, err));
    s->parameters = obm__json_get(v, "parameters");
    snprintf(path, sizeof path, "%s.parameters", where);
    OBM_TRY(obm__recipe_check_parameters(ctx, r->method, s->parameters, false, path, err));
    snprintf(path, sizeof path, "%s.sources", where);
    if (!base) base = r->base;
    OBM_TRY(read_list(ctx, r, obm__json_get(v, "sources"), base, path, s, err));
    if (base && !s->base.ref && obm__method_takes_base(r->method))
        return obm__fail(err, OBM_E_ARG, "%s: the base %.200s is not among the sources, so its layers are not known",
                         where, base);
    snprintf(path, sizeof path, "%s: ", where);
    if (s->n_models > r->n_models) r->n_models = s->n_models;
    if (r->method->info.needs_base && !s->base.ref) return fail_base(r, path, err);
    OBM_TRY(obm__method_check_count(r->method, s->n_models, path, err));
    snprintf(path, sizeof path, "%s.sources", where);
    return check_required(r, s, path, err);
}

static obm_status read_slices(const obm_context *ctx, obm__recipe *r, const obm_json *slices, const obm_json *modules,
                              const char *name, obm_error *err) {
    size_t n = obm__json_size(slices);
    if (obm__json_kind(slices) != OBM_JSON_ARRAY || n == 0)
        return obm__fail(err, OBM_E_ARG, WHERE ": %s: expected a list of slices, found %s", name,
                         n ? obm__json_kind_name(slices) : "none");
    r->slices = obm__calloc(n, sizeof *r->slices);
    if (!r->slices) return obm__fail_nomem(err, n * sizeof *r->slices);
    r->n_slices = n;
    r->sliced = name;
    obm_status status = OBM_OK;
    for (size_t i = 0; i < n; i++) {
        char where[96];
        snprintf(where, sizeof where, WHERE ": %s[%zu]", name, i);
        r->slices[i].modules = modules;
        OBM_JOIN(read_slice(ctx, r, obm__json_at(slices, i), where, &r->slices[i], OBM_OWN));
    }
    return status;
}

/* ---- modules ---- */

/* The one module there is, by any key order; others belong to architectures that are not here. */
static obm_status find_module(const obm_json *modules, const obm_json **out, obm_error *err) {
    static const char *const known[] = {MODULE};
    if (obm__json_kind(modules) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, WHERE ": modules: expected a mapping, found %s", obm__json_kind_name(modules));
    for (void *it = obm__json_first(modules); it; it = obm__json_next(modules, it)) {
        const char *name = obm__json_key(it);
        char hint[128];
        if (strcmp(name, MODULE) != 0)
            return obm__fail(err, OBM_E_UNSUPPORTED,
                             WHERE ": modules: \"%.64s\": models of text have one module, \"" MODULE "\"%s", name,
                             obm__suggest(name, known, 1, hint, sizeof hint));
    }
    *out = obm__json_get(modules, MODULE);
    if (obm__json_kind(*out) == OBM_JSON_OBJECT) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, WHERE ": modules: expected a mapping under \"" MODULE "\", found %s",
                     obm__json_kind_name(*out));
}

/* Exactly one of the keys is set in `object`; returned by *found, an index. */
static obm_status one_form(const obm_json *object, const char *where, const char *const *keys, size_t n, size_t *found,
                           obm_error *err) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        if (!obm__recipe_is_set(obm__json_get(object, keys[i]))) continue;
        if (count++)
            return obm__fail(err, OBM_E_ARG, "%s: both \"%s\" and \"%s\", expected one", where, keys[*found], keys[i]);
        *found = i;
    }
    return count ? OBM_OK : obm__fail(err, OBM_E_ARG, "%s: \"models\" is missing", where);
}

obm_status obm__recipe_read_models(const obm_context *ctx, obm__recipe *r, obm_error *err) {
    static const char *const forms[] = {"models", "slices", "modules"};
    const char *where = WHERE ": models", *slices = "slices";
    const obm_json *object = r->root, *parameters = NULL;
    size_t form = 0;
    OBM_TRY(one_form(r->root, WHERE, forms, OBM_COUNT(forms), &form, err));
    if (form == 2) {
        const char *module = WHERE ": modules." MODULE;
        OBM_TRY(find_module(obm__json_get(r->root, "modules"), &object, err));
        OBM_TRY(obm__recipe_check_keys(object, module, module_keys, OBM_COUNT(module_keys), err));
        OBM_TRY(one_form(object, module, forms, 2, &form, err));
        parameters = obm__json_get(object, "parameters");
        OBM_TRY(obm__recipe_check_parameters(ctx, r->method, parameters, false, WHERE ": modules." MODULE ".parameters",
                                             err));
        where = WHERE ": modules." MODULE ".models", slices = "modules." MODULE ".slices";
    }
    if (form == 1) return read_slices(ctx, r, obm__json_get(object, "slices"), parameters, slices, err);
    return read_models(ctx, r, obm__json_get(object, "models"), parameters, where, err);
}
