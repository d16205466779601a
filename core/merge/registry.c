/* The table of merge methods, and parameters by name: checked, completed with defaults, turned into pipeline steps. */
#include "merge.h"

#include <stdio.h>
#include <string.h>

static const obm__method *const methods[] = {
    &obm__method_linear,
    &obm__method_task_arithmetic,
    &obm__method_ties,
    &obm__method_dare_linear,
    &obm__method_dare_ties,
    &obm__method_della,
    &obm__method_della_linear,
    &obm__method_breadcrumbs,
    &obm__method_breadcrumbs_ties,
    &obm__method_slerp,
    &obm__method_nuslerp,
    &obm__method_multislerp,
    &obm__method_karcher,
    &obm__method_model_stock,
    &obm__method_sce,
    &obm__method_ram,
    &obm__method_ramplus_tl,
    &obm__method_nearswap,
    &obm__method_arcee_fusion,
    &obm__method_passthrough,
    &obm__method_varm,
    &obm__method_consensus,
    &obm__method_emr,
    &obm__method_wudi,
    &obm__method_optmerge,
    &obm__method_tsvm,
    &obm__method_iso_c,
    &obm__method_iso_cts,
    &obm__method_opcm,
    &obm__method_twin,
    &obm__method_pcb,
    &obm__method_magnitude_prune,
    &obm__method_localize_stitch,
    &obm__method_mwa,
};
#define N_METHODS OBM_COUNT(methods)

/* Parameters of mergekit's methods that have no row here: a recipe may carry them, they name nothing unknown. */
static const char *const foreign_params[] = {"gamma", "epsilon", "t", "scale", "select_topk", "filter_wise"};

size_t obm_method_count(void) { return N_METHODS; }

const obm_method_info *obm_method_at(size_t i) { return i < N_METHODS ? &methods[i]->info : NULL; }

/* ---- names ---- */

void obm__list_names(const char *const *names, size_t n, char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (size_t i = 0; i < n && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s", i ? ", " : "", names[i]);
}

obm_status obm__method_find(const char *name, const obm__method **out, obm_error *err) {
    const char *names[N_METHODS];
    for (size_t i = 0; i < N_METHODS; i++) {
        names[i] = methods[i]->info.name;
        if (name && !strcmp(name, names[i])) {
            *out = methods[i];
            return OBM_OK;
        }
    }
    char known[512], hint[128];
    obm__list_names(names, N_METHODS, known, sizeof known);
    return obm__fail(err, OBM_E_NOTFOUND, "no merge method \"%.64s\" (known: %s)%s", name ? name : "", known,
                     obm__suggest(name ? name : "", names, N_METHODS, hint, sizeof hint));
}

obm_status obm__method_check_count(const obm__method *m, size_t n, const char *where, obm_error *err) {
    const obm_method_info *info = &m->info;
    size_t least = (size_t)info->min_models, most = (size_t)info->max_models;
    if (n >= least && (most == 0 || n <= most)) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s%s takes %s %zu model%s%s, found %zu", where, info->name,
                     least == most ? "exactly"
                     : n < least   ? "at least"
                                   : "at most",
                     n < least ? least : most, (n < least ? least : most) == 1 ? "" : "s",
                     info->needs_base ? " besides the base" : "", n);
}

const obm_param_info *obm__method_param(const obm__method *m, const char *name) {
    for (size_t i = 0; i < m->info.n_params; i++)
        if (!strcmp(m->info.params[i].name, name)) return &m->info.params[i];
    return NULL;
}

bool obm__param_is_known(const char *name) {
    for (size_t i = 0; i < N_METHODS; i++)
        if (obm__method_param(methods[i], name)) return true;
    for (size_t i = 0; i < OBM_COUNT(foreign_params); i++)
        if (!strcmp(foreign_params[i], name)) return true;
    return false;
}

obm_status obm__fail_unknown_param(const obm__method *m, const char *name, const char *where, obm_error *err) {
    const char *names[32] = {0};
    size_t n = m->info.n_params < OBM_COUNT(names) ? m->info.n_params : OBM_COUNT(names);
    for (size_t i = 0; i < n; i++) names[i] = m->info.params[i].name;
    char known[256], hint[128];
    obm__list_names(names, n, known, sizeof known);
    return obm__fail(err, OBM_E_NOTFOUND, "%s%s has no parameter \"%.64s\" (known: %s)%s", where, m->info.name,
                     name, n ? known : "none", obm__suggest(name, names, n, hint, sizeof hint));
}

/* ---- values ---- */

static obm_status check_param(const obm__method *m, size_t n, const obm_param *p, obm_error *err) {
    const obm_param_info *info = p->name ? obm__method_param(m, p->name) : NULL;
    if (!info) return obm__fail_unknown_param(m, p->name ? p->name : "", "", err);
    if (p->model < -1 || (p->model >= 0 && (size_t)p->model >= n))
        return obm__fail(err, OBM_E_ARG, "%s: %s is given for model %d, expected -1 or 0..%zu", m->info.name, p->name,
                         p->model, n - 1);
    if (p->model >= 0 && info->scope == OBM_PARAM_GLOBAL)
        return obm__fail(err, OBM_E_ARG, "%s: %s holds for the whole merge, not for model %d", m->info.name, p->name,
                         p->model);
    if (!isfinite(p->value)) return obm__fail(err, OBM_E_ARG, "%s: %s is not a finite number", m->info.name, p->name);
    if (info->is_bool && p->value != 0 && p->value != 1)
        return obm__fail(err, OBM_E_ARG, "%s: %s: expected true or false, found %g", m->info.name, p->name, p->value);
    if (p->value < info->min || p->value > info->max)
        return obm__fail(err, OBM_E_ARG, "%s: %s: expected a number in [%g, %g], found %g", m->info.name, p->name,
                         info->min, info->max, p->value);
    return OBM_OK;
}

/* The value for one model (or -1): its own, else the one for all; the last of several counts. */
static const obm_param *find_param(const obm_param *params, size_t n_params, const char *name, int model) {
    const obm_param *found = NULL;
    for (size_t i = 0; i < n_params; i++) {
        if (strcmp(params[i].name, name)) continue;
        if (params[i].model == model || (params[i].model == -1 && !(found && found->model == model)))
            found = &params[i];
    }
    return found;
}

static double global_value(const obm__method *m, const obm_param *params, size_t n_params, const char *name,
                           double absent) {
    const obm_param_info *info = obm__method_param(m, name);
    if (!info) return absent;
    const obm_param *p = find_param(params, n_params, name, -1);
    return p ? p->value : info->dflt;
}

const char *obm__model_label(const char *const *labels, size_t model, obm__model_name buf) {
    if (labels) return labels[model];
    snprintf(buf, sizeof(obm__model_name), "model %zu", model);
    return buf;
}

static obm_status check_required(const obm__method *m, obm_profile profile, size_t n, const char *const *labels,
                                 const obm_param *params, size_t n_params, obm_error *err) {
    obm__model_name buf;
    if (profile == OBM_PROFILE_PAPER) return OBM_OK;
    for (size_t i = 0; i < m->info.n_params; i++) {
        const obm_param_info *info = &m->info.params[i];
        for (size_t j = 0; info->required && j < (info->scope == OBM_PARAM_PER_MODEL ? n : 1); j++)
            if (!find_param(params, n_params, info->name, info->scope == OBM_PARAM_PER_MODEL ? (int)j : -1))
                return obm__fail(err, OBM_E_ARG, "%s needs the parameter %s%s%.300s", m->info.name, info->name,
                                 info->scope == OBM_PARAM_PER_MODEL ? " for " : "",
                                 info->scope == OBM_PARAM_PER_MODEL ? obm__model_label(labels, j, buf) : "");
    }
    return OBM_OK;
}

static obm_status fill_model_values(const obm_param *params, size_t n_params, obm__steps *s, obm_error *err) {
    const obm_method_info *info = &s->method->info;
    s->weight = obm__alloc(s->n, sizeof *s->weight);
    s->density = obm__alloc(s->n, sizeof *s->density);
    s->values = obm__alloc(info->n_params * s->n, sizeof *s->values);
    if (!s->weight || !s->density || !s->values) {
        obm__steps_free(s);
        return obm__fail_nomem(err, s->n * (sizeof *s->weight + (1 + info->n_params) * sizeof *s->density));
    }
    for (size_t p = 0; p < info->n_params; p++) {
        for (size_t i = 0; i < s->n; i++) {
            int model = info->params[p].scope == OBM_PARAM_PER_MODEL ? (int)i : -1;
            const obm_param *given = find_param(params, n_params, info->params[p].name, model);
            s->values[p * s->n + i] = given ? given->value : info->params[p].dflt;
        }
    }
    const obm_param_info *density = obm__method_param(s->method, "density");
    for (size_t i = 0; i < s->n; i++) {
        const obm_param *w = find_param(params, n_params, "weight", (int)i),
                        *d = find_param(params, n_params, "density", (int)i);
        s->weight[i] = w ? (float)w->value : 1.0f;
        s->density[i] = d ? d->value : density ? density->dflt : 1.0;
    }
    return OBM_OK;
}

/* Without task vectors a weight sum of zero leaves nothing to divide by; with them it means "divide by one", as
 * mergekit has it (its threshold is 1e-8). */
static obm_status check_weight_sum(const obm__method *m, const obm__steps *s, obm_error *err) {
    float sum = 0;
    obm__model_name buf;
    for (size_t i = 0; i < s->n; i++) {
        if (!isfinite(s->weight[i]))
            return obm__fail(err, OBM_E_ARG, "%s: the weight of %.300s does not fit f32", m->info.name,
                             obm__model_label(s->labels, i, buf));
        sum += s->weight[i];
    }
    if (s->deltas || !s->normalize || sum != 0) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s: the weights sum to 0, nothing to normalise by; set normalize to false",
                     m->info.name);
}

obm_status obm__steps_new(const obm__method *m, obm_profile profile, size_t n, const char *const *labels,
                          const obm_param *params, size_t n_params, uint64_t seed, obm__steps *out, obm_error *err) {
    for (size_t i = 0; i < n_params; i++) OBM_TRY(check_param(m, n, &params[i], err));
    OBM_TRY(check_required(m, profile, n, labels, params, n_params, err));

#define GLOBAL(name, absent) global_value(m, params, n_params, name, absent)
    bool paper = profile == OBM_PROFILE_PAPER;
    double scope = GLOBAL("scope", -1);
    obm__steps s = {.method = m,
                    .deltas = m->deltas,
                    .mask = m->mask,
                    .consensus = m->consensus,
                    .seed = seed,
                    .n = n,
                    .labels = labels};
    s.round_deltas = !paper && !m->f32_deltas;
    s.weighted_election = !paper;
    s.majority_zero = paper;
    bool has_statistics = obm__method_param(m, "scope") != NULL;
    s.model_scope = has_statistics && (scope < 0 ? paper && !m->tensor_statistics : scope == 1);
    s.normalize = GLOBAL("normalize", 0) != 0;
    s.lambda = (float)GLOBAL("lambda", 1);
    s.rescale = GLOBAL("rescale", 0) == 0 ? OBM_RESCALE_NONE : GLOBAL("rescale_l1", 0) ? OBM_RESCALE_L1 : m->rescale;
    if (s.rescale == OBM_RESCALE_BY_PROFILE) s.rescale = paper ? OBM_RESCALE_INVERSE_DENSITY : OBM_RESCALE_L1;
    s.paper = paper;
#undef GLOBAL
    if (scope > -1 && scope != 0 && scope != 1)
        return obm__fail(err, OBM_E_ARG, "%s: scope: expected 0 (tensor), 1 (model) or -1, found %g", m->info.name,
                         scope);
    if (!isfinite(s.lambda)) return obm__fail(err, OBM_E_ARG, "%s: lambda does not fit f32", m->info.name);
    OBM_TRY(fill_model_values(params, n_params, &s, err));
    obm_status status = check_weight_sum(m, &s, err);
    if (status == OBM_OK && m->custom && m->custom->check) status = m->custom->check(&s, err);
    if (status != OBM_OK) {
        obm__steps_free(&s);
        return status;
    }
    *out = s;
    return OBM_OK;
}

void obm__steps_free(obm__steps *s) {
    obm_free(s->weight);
    obm_free(s->density);
    obm_free(s->values);
    s->weight = NULL;
    s->density = NULL;
    s->values = NULL;
}

double obm__steps_value(const obm__steps *s, const char *name, size_t model) {
    const obm_param_info *info = obm__method_param(s->method, name);
    return info ? s->values[(size_t)(info - s->method->info.params) * s->n + model] : 0;
}
