/* tsvm: the leading singular triples of every task vector, side by side, their vectors made orthogonal across tasks. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_FACTOR("factor of this model's task vector"),
    OBM_PARAM_LAMBDA,
};

typedef struct work {
    const obm__run *run;
    const obm__group *g;
    obm__dense_size z;
    size_t each, all; /* triples of one task and of all: floor(k / tasks), and times the tasks */
    obm__svd svd;
    double *u, *vt; /* (m, all), (all, n) */
    double *s;      /* (all) */
} work;

/* polar(U) S polar(V)^T (Gargiulo et al., Task Singular Vectors, arXiv 2412.00081). */
static obm_status decorrelate(work *w, obm_error *err) {
    for (size_t t = 0; t < w->g->steps->n; t++) {
        OBM_TRY(obm__dense_load(w->run, w->g, t, (double)w->g->steps->weight[t], false, w->svd.a, err));
        OBM_TRY(obm__svd_run(&w->svd, obm__group_name(w->g), err));
        obm__dense_take(&w->svd, t * w->each, w->each, w->all, w->u, w->vt, w->s);
    }
    OBM_TRY(obm__dense_polar(w->run, w->g, &w->svd, w->z.m, w->all, w->u, err));
    OBM_TRY(obm__dense_polar(w->run, w->g, &w->svd, w->all, w->z.n, w->vt, err));
    for (size_t i = 0; i < w->all; i++)
        for (size_t j = 0; j < w->z.n; j++) w->vt[i * w->z.n + j] *= w->s[i];
    return obm__dense_multiply(
        w->run,
        &(obm__product){.m = w->z.m, .n = w->z.n, .k = w->all, .alpha = 1, .a = w->u, .b = w->vt, .c = w->svd.a}, err);
}

/* With more models than singular values there is less than one triple for each: then the rule of other tensors. */
static size_t triples_of(const obm__group *g) {
    return obm__dense_is_matrix(g) ? obm__dense_size_of(g).k / g->steps->n : 0;
}

static obm_status form(const obm__run *run, obm__group *g, obm_error *err) {
    size_t each = triples_of(g);
    if (each == 0) return OBM_OK;
    work w = {.run = run, .g = g, .z = obm__dense_size_of(g), .each = each, .all = each * g->steps->n};
    obm_status status;
    size_t room = (w.z.m + w.z.n + 1) * w.all;
    w.u = obm__calloc(room, sizeof *w.u);
    if (!w.u) return obm__fail_nomem(err, room * sizeof *w.u);
    w.vt = w.u + w.z.m * w.all;
    w.s = w.vt + w.all * w.z.n;
    OBM_GO(obm__svd_new(w.z.m, w.z.n, obm__group_name(g), &w.svd, err));
    OBM_GO(decorrelate(&w, err));
    OBM_GO(obm__dense_form(g, w.svd.a, err));
done:
    obm__svd_free(&w.svd);
    obm_free(w.u);
    return status;
}

static uint64_t bytes(const obm__group *g) {
    size_t all = triples_of(g) * g->steps->n;
    if (all == 0) return 0;
    obm__dense_size z = obm__dense_size_of(g);
    return obm__svd_bytes(z.m, z.n) + (uint64_t)(z.m + z.n + 1) * all * sizeof(double) + g->count * sizeof(float);
}

static const obm__custom custom = {.form = form, .merge = obm__dense_merge, .bytes = bytes};

const obm__method obm__method_tsvm = {
    .info = {"tsvm", "leading singular triples of the task vectors, made orthogonal across tasks",
             "Gargiulo et al., Task Singular Vectors, arXiv 2412.00081", params, OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &custom,
};
