/*
 * The trim of full tensors in the remainder, by the profile: exact k-th magnitude, equal magnitudes kept by lowest
 * index.
 *
 *     paper            one threshold per expert over all its full tensors in the order of their names
 *     mergekit, default    one threshold per expert and tensor
 *
 * k = max(1, floor(density * n)) in both.  1-bit matrices are never trimmed and are not counted: all their magnitudes
 * are equal, so a threshold would keep or delete a matrix as a whole, or pick elements by their index.  A mask of a
 * shared vector counts as a full tensor.  Under `recomputed` what is trimmed is d~_j - d~_k, full where either of the
 * two is.
 */
#include "kth.h"
#include "plan.h"

#include <math.h>

size_t obm__route_cut_count(const obm__merge_rule *rule) {
    return rule->reading == OBM_READING_RECOMPUTED ? rule->n_tasks * rule->n_tasks : rule->n_tasks;
}

size_t obm__route_cut_index(const obm__merge_rule *rule, size_t routed, size_t other) {
    return rule->reading == OBM_READING_RECOMPUTED ? routed * rule->n_tasks + other : other;
}

/* One trimmed vector: d~_j, or d~_j - d~_k, over the tensors of one threshold. */
typedef struct vector {
    obm__route_plan *plan;
    size_t j, k;       /* k == SIZE_MAX: d~_j as it is */
    size_t first, end; /* tensors */
} vector;

static bool is_full(const obm__route_plan *r, size_t task, size_t tensor) {
    return task != SIZE_MAX && obm__entry_is_dense(obm__route_entry(r->pack, task, tensor));
}

/* A tied expert's head is its embedding again, which is counted there. */
static bool is_own(const obm__route_plan *r, size_t task, size_t tensor) {
    return task != SIZE_MAX && obm__route_entry(r->pack, task, tensor) == &r->pack->experts[task].entries[tensor];
}

static bool counts(const vector *v, size_t tensor) {
    const obm__route_plan *r = v->plan;
    return r->tensors[tensor].exists && (is_full(r, v->j, tensor) || is_full(r, v->k, tensor)) &&
           (is_own(r, v->j, tensor) || is_own(r, v->k, tensor));
}

static void read_values(const vector *v, size_t tensor, int64_t row, int64_t col, int64_t n, float *x) {
    float base[OBM_ROUTE_CHUNK];
    double d[OBM_ROUTE_CHUNK], routed[OBM_ROUTE_CHUNK];
    obm__route_read_base(v->plan, tensor, row, col, n, base);
    obm__route_read(v->plan, v->j, tensor, row, col, n, base, d);
    if (v->k != SIZE_MAX) {
        obm__route_read(v->plan, v->k, tensor, row, col, n, base, routed);
        for (int64_t i = 0; i < n; i++) d[i] -= routed[i];
    }
    for (int64_t i = 0; i < n; i++) x[i] = (float)d[i];
}

static obm_status look(const obm__route_plan *r, obm_error *err) {
    if (r->stop && *r->stop) return obm__fail(err, OBM_E_USER, "stopped");
    return obm__pulse_check(r->pulse, err);
}

/* Calls `use` on the values of a tensor in order; false stops. */
typedef bool (*use_fn)(void *state, const float *x, int64_t begin, int64_t n);
static obm_status for_values(const vector *v, size_t tensor, use_fn use, void *state, obm_error *err) {
    const obm__route_tensor *t = &v->plan->tensors[tensor];
    float x[OBM_ROUTE_CHUNK];
    for (int64_t row = 0; row < t->rows; row++) {
        for (int64_t col = 0, n; col < t->cols; col += n) {
            n = t->cols - col < OBM_ROUTE_CHUNK ? t->cols - col : OBM_ROUTE_CHUNK;
            read_values(v, tensor, row, col, n, x);
            if (!use(state, x, row * t->cols + col, n)) return OBM_OK;
        }
        OBM_TRY(look(v->plan, err));
    }
    return OBM_OK;
}

typedef struct counting {
    obm__kth kth;
    const obm_kernels *kernels;
} counting;

static bool count_values(void *state, const float *x, int64_t begin, int64_t n) {
    counting *c = state;
    (void)begin;
    obm__kth_add(&c->kth, c->kernels, x, (size_t)n);
    return true;
}

static obm_status count_pass(const vector *v, counting *c, obm_error *err) {
    for (size_t t = v->first; t < v->end; t++) {
        if (counts(v, t)) OBM_TRY(for_values(v, t, count_values, c, err));
    }
    obm__kth_turn(&c->kth);
    return OBM_OK;
}

/* Hands out the places of equal magnitudes in order; `last` is where they ran out. */
typedef struct handing {
    uint32_t threshold;
    uint64_t left;
    int64_t last;
} handing;

static bool hand_out(void *state, const float *x, int64_t begin, int64_t n) {
    handing *h = state;
    for (int64_t i = 0; i < n && h->left > 0; i++) {
        if (obm__magnitude_bits(x[i]) != h->threshold) continue;
        h->last = begin + i;
        h->left--;
    }
    return h->left > 0;
}

static obm_status find_cut(const vector *v, size_t tensor, const obm__kth *kth, uint64_t *left, obm__route_cut *out,
                           obm_error *err) {
    handing h = {kth->threshold, *left, -1};
    bool all = kth->equal == kth->ties;
    if (!all && *left > 0) OBM_TRY(for_values(v, tensor, hand_out, &h, err));
    *out = (obm__route_cut){true, kth->threshold, all ? INT64_MAX : h.last};
    *left = h.left;
    return OBM_OK;
}

static uint64_t wanted(const vector *v) {
    double n = 0;
    for (size_t t = v->first; t < v->end; t++) {
        if (counts(v, t)) n += (double)(v->plan->tensors[t].rows * v->plan->tensors[t].cols);
    }
    return (uint64_t)fmax(1, floor(v->plan->pack->settings.density * n));
}

static obm_status trim_vector(const vector *v, obm_error *err) {
    obm__route_plan *r = v->plan;
    counting c = {.kernels = r->pack->ctx->k};
    OBM_TRY(obm__kth_begin(&c.kth, wanted(v), err));
    obm_status status = count_pass(v, &c, err);
    if (status == OBM_OK) status = count_pass(v, &c, err);
    obm__kth_end(&c.kth);
    uint64_t left = c.kth.equal;
    for (size_t t = v->first; status == OBM_OK && t < v->end; t++) {
        obm__route_cut *cut = counts(v, t) ? &r->tensors[t].cuts[obm__route_cut_index(&r->rule, v->k, v->j)] : NULL;
        if (cut) status = find_cut(v, t, &c.kth, &left, cut, err);
    }
    return status;
}

/* `only` is wanted, or a head that takes its trim from the embedding. */
static bool asked_for(const obm_pack *p, size_t only, size_t tensor) {
    if (only == OBM_ROUTE_ALL || only == tensor) return true;
    return !p->tensors[only].in_base && tensor == obm__pack_find(p, OBM_EMBEDDING_NAME);
}

static obm_status trim_scopes(vector v, size_t only, obm_error *err) {
    const obm_pack *p = v.plan->pack;
    v.first = 0;
    v.end = p->n_tensors;
    if (p->settings.profile == OBM_PROFILE_PAPER) return trim_vector(&v, err);
    for (size_t t = 0; t < p->n_tensors; t++) {
        v.first = t;
        v.end = t + 1;
        if (asked_for(p, only, t) && counts(&v, t)) OBM_TRY(trim_vector(&v, err));
    }
    return OBM_OK;
}

static bool in_some_remainder(const obm__merge_rule *rule, size_t j) {
    for (size_t k = 0; k < rule->n_tasks; k++) {
        if (k != j && rule->weights[k] != 0) return true;
    }
    return false;
}

/* A head that follows its embedding takes the embedding's trim too. */
static void copy_followers(obm__route_plan *r, size_t embedding, size_t k, size_t j) {
    size_t at = obm__route_cut_index(&r->rule, k, j);
    for (size_t t = 0; t < r->pack->n_tensors && embedding != SIZE_MAX; t++) {
        vector v = {r, j, k, 0, 0};
        bool follows = r->tensors[t].cuts && !counts(&v, t) && (is_full(r, j, t) || is_full(r, k, t));
        if (follows && r->tensors[embedding].cuts) r->tensors[t].cuts[at] = r->tensors[embedding].cuts[at];
    }
}

static obm_status trim_pair(obm__route_plan *r, size_t only, size_t k, size_t j, obm_error *err) {
    OBM_TRY(trim_scopes((vector){r, j, k, 0, 0}, only, err));
    copy_followers(r, obm__pack_find(r->pack, OBM_EMBEDDING_NAME), k, j);
    return OBM_OK;
}

static obm_status alloc_cuts(obm__route_plan *r, obm_error *err) {
    size_t count = obm__route_cut_count(&r->rule);
    for (size_t t = 0; t < r->pack->n_tensors; t++) {
        r->tensors[t].cuts = obm__calloc(count, sizeof(obm__route_cut));
        if (!r->tensors[t].cuts) return obm__fail_nomem(err, count * sizeof(obm__route_cut));
    }
    return OBM_OK;
}

obm_status obm__route_trim(obm__route_plan *r, size_t only, obm_error *err) {
    const obm__merge_rule *rule = &r->rule;
    if (only == OBM_ROUTE_NONE || rule->lambda == 0 || rule->n_tasks < 2 || r->pack->settings.density >= 1)
        return OBM_OK;
    OBM_TRY(alloc_cuts(r, err));
    for (size_t j = 0; j < rule->n_tasks; j++) {
        if (rule->reading == OBM_READING_ONTO_BASE) {
            if (in_some_remainder(rule, j)) OBM_TRY(trim_pair(r, only, SIZE_MAX, j, err));
            continue;
        }
        for (size_t k = 0; k < rule->n_tasks; k++) {
            if (k != j && rule->weights[k] != 0) OBM_TRY(trim_pair(r, only, k, j, err));
        }
    }
    return OBM_OK;
}
