/* twin: a shared part, and of each model what sets it apart from the shared model, by low rank. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("weight", "share of what is this model's own (what the paper's router gives)", OBM_PARAM_PER_MODEL,
                  false, 1, 0, INFINITY, false),
    OBM_PARAM_NORMALIZE("divide the shares by their sum", 1),
    OBM_PARAM_ROW("density", "kept share of the singular values of what is the model's own", OBM_PARAM_PER_MODEL, false,
                  0.1, 0, 1, false),
    OBM_PARAM_ROW("lambda", "factor of the sum of the task vectors in the shared model", OBM_PARAM_GLOBAL, false, 0.3,
                  -INFINITY, INFINITY, false),
};

typedef struct work {
    const obm__run *run;
    const obm__group *g;
    obm__dense_size z;
    obm__svd svd;
    double *shared, *sum; /* (m, n) */
} work;

/* What a weight is divided by to be a share. */
static double mass_of(const obm__steps *s) {
    double sum = 0;
    for (size_t i = 0; s->normalize && i < s->n; i++) sum += (double)s->weight[i];
    return sum > 0 ? sum : 1;
}

/* Adds the model's share of its rank-r part; svd.a holds D_t - shared. */
static obm_status add_own(const work *w, size_t model, obm_error *err) {
    const obm__steps *s = w->g->steps;
    size_t m = w->z.m, n = w->z.n, k = w->z.k, rank = (size_t)(obm__steps_value(s, "density", model) * (double)k);
    double share = (double)s->weight[model] / mass_of(s);
    if (rank >= k) {
        for (size_t i = 0; i < m * n; i++) w->sum[i] += share * w->svd.a[i];
        return OBM_OK;
    }
    OBM_TRY(obm__svd_run(&w->svd, obm__group_name(w->g), err));
    for (size_t i = 0; i < k; i++)
        for (size_t j = 0; j < n; j++) w->svd.vt[i * n + j] *= i < rank ? share * w->svd.s[i] : 0;
    obm__product p = {.m = m, .n = n, .k = k, .alpha = 1, .beta = 1, .a = w->svd.u, .b = w->svd.vt, .c = w->sum};
    return obm__dense_multiply(w->run, &p, err);
}

/* theta* = theta_0 + lambda sum_t D_t; theta = theta* + sum_t share_t SVD_r(theta_t - theta*) (Lu et al., Twin-Merging,
 * arXiv 2406.15479). */
static obm_status combine(const work *w, obm_error *err) {
    const obm__steps *s = w->g->steps;
    size_t count = w->z.m * w->z.n;
    double lambda = obm__steps_value(s, "lambda", 0);
    for (size_t t = 0; t < s->n; t++) OBM_TRY(obm__dense_load(w->run, w->g, t, lambda, t > 0, w->shared, err));
    memcpy(w->sum, w->shared, count * sizeof *w->sum);
    for (size_t t = 0; t < s->n; t++) {
        if (s->weight[t] == 0 || obm__steps_value(s, "density", t) * (double)w->z.k < 1) continue;
        OBM_TRY(obm__dense_load(w->run, w->g, t, 1, false, w->svd.a, err));
        for (size_t i = 0; i < count; i++) w->svd.a[i] -= w->shared[i];
        OBM_TRY(add_own(w, t, err));
    }
    return OBM_OK;
}

static obm_status form(const obm__run *run, obm__group *g, obm_error *err) {
    if (!obm__dense_is_matrix(g)) return OBM_OK;
    work w = {.run = run, .g = g, .z = obm__dense_size_of(g)};
    obm_status status;
    size_t count = w.z.m * w.z.n;
    w.shared = obm__alloc(2 * count, sizeof *w.shared);
    if (!w.shared) return obm__fail_nomem(err, 2 * count * sizeof *w.shared);
    w.sum = w.shared + count;
    OBM_GO(obm__svd_new(w.z.m, w.z.n, obm__group_name(g), &w.svd, err));
    OBM_GO(combine(&w, err));
    OBM_GO(obm__dense_form(g, w.sum, err));
done:
    obm__svd_free(&w.svd);
    obm_free(w.shared);
    return status;
}

/* What is no matrix keeps the whole of what is each model's own. */
static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    double lambda = obm__steps_value(s, "lambda", 0), mass = mass_of(s);
    if (b->g->formed) {
        obm__dense_add(b, 1);
        return;
    }
    for (size_t j = 0; j < b->n; j++) {
        double shared = 0, own = 0;
        for (size_t i = 0; i < s->n; i++) shared += lambda * (double)obm__block_delta(b, i)[j];
        for (size_t i = 0; i < s->n; i++)
            own += (double)s->weight[i] / mass * ((double)obm__block_delta(b, i)[j] - shared);
        b->mixed[j] = (float)(b->base[j] + shared + own);
    }
}

static uint64_t bytes(const obm__group *g) {
    if (!obm__dense_is_matrix(g)) return 0;
    obm__dense_size z = obm__dense_size_of(g);
    return obm__svd_bytes(z.m, z.n) + 2 * g->count * sizeof(double) + g->count * sizeof(float);
}

static const obm__custom custom = {.form = form, .merge = merge, .bytes = bytes};

const obm__method obm__method_twin = {
    .info = {"twin", "a shared sum of the task vectors, and a low-rank part of each model's own (Twin-Merging)",
             "Lu et al., Twin-Merging, arXiv 2406.15479", params, OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &custom,
};
