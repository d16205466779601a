/* Filters of settings that hold for no tensor of the merge: a slip in one is a setting that does nothing, so each is
 * told.  Looks at names alone; settings are resolved elsewhere. */
#include "job.h"

#include <stdio.h>
#include <string.h>

#define WHERE OBM_RECIPE_WHERE
#define ALL_MODELS SIZE_MAX

/* One `parameters` mapping and what it speaks of. */
typedef struct level {
    const obm_json *parameters;
    const obm__slice *slice; /* NULL: all of them */
    size_t model;            /* among the slice's, or ALL_MODELS */
    const char *where;
} level;

/* As settings are resolved: those of a model see the name that the tensor has there. */
static bool is_in_name(const obm__output *o, size_t model, const char *filter) {
    const obm__slice_plan *p = o->slice;
    bool found = model == ALL_MODELS && strstr(o->name, filter);
    for (size_t i = p->has_base; !found && i < p->n; i++) {
        if (model != ALL_MODELS && model != i - p->has_base) continue;
        char *name = obm__output_source_name(o, i);
        found = !name || strstr(name, filter); /* without memory nothing is claimed */
        obm_free(name);
    }
    return found;
}

static void check_filter(const obm__job *j, const level *l, const char *key, const obm_json *condition) {
    const char *filter = obm__json_string(obm__json_get(condition, "filter"));
    if (!filter || !strcmp(filter, "*")) return;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__output *o = &j->outputs[i];
        if ((!l->slice || o->slice->slice == l->slice) && is_in_name(o, l->model, filter)) return;
    }
    obm__warn(j->ctx, "%s.%.64s: filter \"%.200s\" matches no tensor", l->where, key, filter);
}

static void check_level(const obm__job *j, const level *l) {
    for (void *it = obm__json_first(l->parameters); it; it = obm__json_next(l->parameters, it)) {
        const obm_param_info *info = obm__method_param(j->recipe->method, obm__json_key(it));
        const obm_json *setting = obm__json_value(it);
        bool ignored = !info || (l->model != ALL_MODELS && info->scope == OBM_PARAM_GLOBAL);
        if (ignored) continue; /* which was told already */
        check_filter(j, l, obm__json_key(it), setting);
        if (obm__json_kind(setting) != OBM_JSON_ARRAY) continue;
        for (size_t i = 0; i < obm__json_size(setting); i++)
            check_filter(j, l, obm__json_key(it), obm__json_at(setting, i));
    }
}

static void check_slice(const obm__job *j, const obm__slice *s) {
    const obm__recipe *r = j->recipe;
    char slice[96], where[160];
    if (r->sliced)
        snprintf(slice, sizeof slice, WHERE ": %s[%zu]", r->sliced, (size_t)(s - r->slices));
    else
        snprintf(slice, sizeof slice, WHERE ": %smodels", obm__json_get(r->root, "modules") ? "modules.default." : "");
    snprintf(where, sizeof where, "%s.parameters", slice);
    check_level(j, &(level){s->parameters, s, ALL_MODELS, where});
    for (size_t i = 0; i < s->n_models; i++) {
        snprintf(where, sizeof where, "%s%s[%zu].parameters", slice, r->sliced ? ".sources" : "", s->models[i].index);
        check_level(j, &(level){s->models[i].parameters, s, i, where});
    }
}

void obm__job_warn_filters(const obm__job *j) {
    const obm__recipe *r = j->recipe;
    for (size_t s = 0; s < r->n_slices; s++) check_slice(j, &r->slices[s]);
    check_level(j, &(level){r->slices[0].modules, NULL, ALL_MODELS, WHERE ": modules.default.parameters"});
    check_level(j, &(level){r->parameters, NULL, ALL_MODELS, WHERE ": parameters"});
}
