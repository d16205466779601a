/* Prepares a route: for every tensor of the pack, which experts come in and which way its values are found.  Reads no
 * tensor data, apart from the trims of full tensors (trim.c). */
#include "plan.h"

#include <math.h>
#include <string.h>

obm_status obm__route_check(const obm_pack *p, const double *weights, obm_error *err) {
    for (size_t k = 0; k < p->n_experts; k++) {
        if (isfinite(weights[k]) && weights[k] >= 0) continue;
        return obm__fail(err, OBM_E_ARG, "route: the weight of task %s is %g, expected a finite number >= 0",
                         p->experts[k].name, weights[k]);
    }
    return OBM_OK;
}

size_t obm__route_hard(const double *weights, size_t n) {
    size_t hard = SIZE_MAX;
    for (size_t k = 0; k < n; k++) {
        if (weights[k] == 0) continue;
        if (weights[k] != 1 || hard != SIZE_MAX) return SIZE_MAX;
        hard = k;
    }
    return hard;
}

/* ---- who comes in ---- */

/* A tied expert of a tied base has no head of its own; where another expert has one, the pack lists it for all, and the
 * tied expert's head moves with its embedding. */
static bool follows_embedding(const obm_pack *p, size_t task, size_t tensor) {
    return !p->tensors[tensor].in_base && p->experts[task].entries[tensor].bytes_expert == 0;
}

const obm__pack_entry *obm__route_entry(const obm_pack *p, size_t task, size_t tensor) {
    if (follows_embedding(p, task, tensor)) {
        size_t embedding = obm__pack_find(p, OBM_EMBEDDING_NAME);
        if (embedding != SIZE_MAX) tensor = embedding;
    }
    return &p->experts[task].entries[tensor];
}

bool obm__entry_is_dense(const obm__pack_entry *e) { return e->mode == OBM_MODE_FULL || e->mode == OBM_MODE_MASK; }

bool obm__entry_present(const obm__pack_entry *e) {
    return obm__entry_is_dense(e) || (e->mode == OBM_MODE_1BIT && e->planes.n > 0);
}

static bool in_remainder(const obm__merge_rule *rule, size_t task) {
    if (rule->lambda == 0) return false;
    for (size_t k = 0; k < rule->n_tasks; k++) {
        if (k != task && rule->weights[k] != 0) return true;
    }
    return false;
}

bool obm__route_involves(const obm__merge_rule *rule, size_t task) {
    return rule->weights[task] != 0 || in_remainder(rule, task);
}

/* ---- what each tensor needs ---- */

/* A full tensor under its own hard route is the expert's tensor, and base + (expert - base) would be it only up to
 * rounding: it is taken as it is when the remainder is nothing - lambda 0, no other expert, or (onto_base) no other has
 * a task vector here.  Under `recomputed` an expert that is the base's here still contributes -d~_k. */
static bool remainder_is_nothing(const obm__route_plan *r, size_t tensor) {
    if (r->rule.lambda == 0 || r->rule.n_tasks == 1) return true;
    if (r->rule.reading == OBM_READING_RECOMPUTED) return false;
    for (size_t j = 0; j < r->rule.n_tasks; j++) {
        if (j != r->hard && obm__entry_present(obm__route_entry(r->pack, j, tensor))) return false;
    }
    return true;
}

static void choose_kind(const obm__route_plan *r, size_t tensor, obm__route_tensor *t) {
    bool any = false, full = false, fits = true;
    for (size_t j = 0; j < r->rule.n_tasks; j++) {
        const obm__pack_entry *e = obm__route_entry(r->pack, j, tensor);
        if (!obm__route_involves(&r->rule, j) || !obm__entry_present(e)) continue;
        any = true;
        full |= obm__entry_is_dense(e);
        if (e->mode == OBM_MODE_1BIT) fits &= obm__plane_set_add(&t->planes, j, &e->planes);
    }
    const obm__pack_entry *routed = r->hard != SIZE_MAX ? obm__route_entry(r->pack, r->hard, tensor) : NULL;
    bool routed_full = routed && routed->mode == OBM_MODE_FULL && !routed->lora.rank; /* factors are base + d for all */
    if (!any)
        t->kind = OBM_ROUTE_BASE;
    else if (routed_full && remainder_is_nothing(r, tensor))
        t->kind = OBM_ROUTE_EXPERT;
    else
        t->kind = full || !fits ? OBM_ROUTE_ELEMENTS : OBM_ROUTE_PATTERNS;
}

/* Vocabulary rows beyond the base's belong to one expert and have nothing to merge with. */
static void find_extra_rows(const obm__route_plan *r, size_t tensor, obm__route_tensor *t) {
    if (r->hard == SIZE_MAX) return;
    const obm__pack_entry *e = obm__route_entry(r->pack, r->hard, tensor);
    if (e->mode == OBM_MODE_FULL && e->full.ndim == 2 && e->full.shape[0] > t->rows) {
        t->extra = &e->full;
        t->extra_first = t->rows;
        t->n_extra = e->full.shape[0] - t->rows;
    } else if (e->mode != OBM_MODE_FULL && e->extra.data) {
        t->extra = &e->extra;
        t->n_extra = e->extra.shape[0];
    }
}

/* A head of the base's own is always there; one that only experts have, when such an expert comes in. */
static bool tensor_exists(const obm__route_plan *r, size_t tensor) {
    if (r->pack->tensors[tensor].in_base) return true;
    for (size_t j = 0; j < r->rule.n_tasks; j++) {
        if (obm__route_involves(&r->rule, j) && !follows_embedding(r->pack, j, tensor)) return true;
    }
    return false;
}

static void prepare_tensor(obm__route_plan *r, size_t tensor) {
    obm__route_tensor *t = &r->tensors[tensor];
    obm__tensor_rows(&r->pack->tensors[tensor].base, &t->rows, &t->cols);
    t->exists = tensor_exists(r, tensor);
    if (!t->exists) return;
    choose_kind(r, tensor, t);
    find_extra_rows(r, tensor, t);
}

/* ---- life ---- */

/* With two experts and lambda 1, theta_base + d~_k + (d~_j - d~_k) is the other expert, whatever the router says. */
static void warn_once_of_other_expert(const obm_pack *p) {
    const obm_pack_settings *s = &p->settings;
    if (s->reading != OBM_READING_RECOMPUTED || s->lambda != 1 || p->n_experts != 2) return;
    /* The flag is no part of the pack's value, so a const pack may set it. */
    if (!((obm_pack *)p)->warned_of_other_expert++)
        obm__warn(p->ctx,
                  "pack %s: reading recomputed with two experts and lambda 1 gives the other expert for every route",
                  p->path);
}

static obm_status plan_alloc(const obm_pack *p, const double *weights, obm__route_plan **out, obm_error *err) {
    obm__route_plan *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    r->pack = p;
    r->n_tensors = p->n_tensors;
    r->weights = obm__calloc(p->n_experts, sizeof *r->weights);
    r->tensors = obm__calloc(p->n_tensors, sizeof *r->tensors);
    if (!r->weights || !r->tensors) {
        obm__route_plan_free(r);
        return obm__fail_nomem(err, p->n_tensors * sizeof *r->tensors);
    }
    memcpy(r->weights, weights, p->n_experts * sizeof *weights);
    r->rule = (obm__merge_rule){p->n_experts, r->weights, p->settings.lambda, p->settings.reading};
    r->hard = obm__route_hard(weights, p->n_experts);
    *out = r;
    return OBM_OK;
}

obm_status obm__route_plan_new(const obm_pack *p, const double *weights, size_t only, obm__pulse *pulse,
                               obm__route_plan **out, obm_error *err) {
    obm__route_plan *r = NULL;
    if (p->n_experts > OBM_ROUTE_TASKS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "pack %s has %zu experts, routes take at most %d", p->path,
                         p->n_experts, OBM_ROUTE_TASKS);
    OBM_TRY(obm__route_check(p, weights, err));
    OBM_TRY(obm__pack_check(p, err));
    OBM_TRY(plan_alloc(p, weights, &r, err));
    warn_once_of_other_expert(p);
    for (size_t t = 0; t < p->n_tensors; t++) prepare_tensor(r, t);
    r->pulse = pulse;
    obm_status status = obm__route_trim(r, only, err);
    r->pulse = NULL;
    if (status != OBM_OK) {
        obm__route_plan_free(r);
        return status;
    }
    *out = r;
    return OBM_OK;
}

obm_status obm__route_plan_trim(obm__route_plan *r, obm__pulse *pulse, const _Atomic int *stop, obm_error *err) {
    r->pulse = pulse;
    r->stop = stop;
    obm_status status = obm__route_trim(r, OBM_ROUTE_ALL, err);
    r->pulse = NULL;
    r->stop = NULL;
    return status;
}

void obm__route_plan_free(obm__route_plan *r) {
    if (!r) return;
    for (size_t t = 0; r->tensors && t < r->n_tensors; t++) obm_free(r->tensors[t].cuts);
    obm_free(r->tensors);
    obm_free(r->weights);
    obm_free(r);
}

/* ---- questions ---- */

bool obm__route_changes(const obm__route_plan *r, size_t tensor) {
    const obm__route_tensor *t = &r->tensors[tensor];
    return t->exists && (t->kind != OBM_ROUTE_BASE || t->n_extra > 0);
}

obm_status obm__route_shape(const obm__route_plan *r, size_t tensor, obm_tensor *shape, bool *exists) {
    const obm__route_tensor *t = &r->tensors[tensor];
    *shape = r->pack->tensors[tensor].base;
    shape->data = NULL;
    if (t->n_extra > 0) shape->shape[0] += t->n_extra;
    *exists = t->exists;
    return OBM_OK;
}

const obm_tensor *obm__route_own(const obm__route_plan *r, size_t tensor) {
    return &obm__route_entry(r->pack, r->hard, tensor)->full;
}

void obm__route_effective(const obm__route_plan *r, size_t tensor, double *weights) {
    const obm_pack_settings *s = &r->pack->settings;
    size_t first = SIZE_MAX;
    memcpy(weights, r->rule.weights, r->rule.n_tasks * sizeof *weights);
    bool trims_pairs = s->reading == OBM_READING_RECOMPUTED && s->density < 1;
    if (r->tensors[tensor].n_extra > 0 || (trims_pairs && s->lambda != 0)) return;
    for (size_t k = 0; k < r->rule.n_tasks; k++) {
        if (obm__entry_present(obm__route_entry(r->pack, k, tensor))) continue;
        if (first == SIZE_MAX) first = k;
        if (first != k) weights[first] += weights[k];
        if (first != k || s->lambda == 0) weights[k] = 0;
    }
    if (s->lambda == 0 && first != SIZE_MAX) weights[first] = 0;
}
