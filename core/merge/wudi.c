/* wudi, optmerge: the task vector that disturbs each expert least, where its own task vector stands for its inputs. */
#include "merge.h"

/* The smallest eigenvalues are noise of the task vectors, and what divides by them is far longer than any expert: the
 * whole pseudo-inverse (rank 1, ridge 0) ruins fine-tunes.  0.85 is what SWUDI, the closed form of OptMerge's authors,
 * takes for language models. */
static const obm_param_info params[] = {
    OBM_PARAM_LAMBDA,
    OBM_PARAM_ROW("ridge", "added to the eigenvalues of the Gram matrix, times their mean; 0 is the pseudo-inverse",
                  OBM_PARAM_GLOBAL, false, 0, 0, INFINITY, false),
    OBM_PARAM_ROW("rank", "share of the largest eigenvalues of the Gram matrix that count; the others keep the start",
                  OBM_PARAM_GLOBAL, false, 0.85, 0, 1, false),
};

/* With G_t = D_t^T D_t / ||D_t||^2 the sum C is X^T X, X (n_models m, n) the D_t / ||D_t|| below each other, and B is Z
 * X with Z_t = D_t X_t^T beside each other.  Where X is wide, X g(X^T X) = g(X X^T) X makes the smaller K = X X^T do.
 */
typedef struct work {
    const obm__run *run;
    const obm__group *g;
    obm__dense_size z;
    bool stacks;
    size_t order;  /* of c: n, or n_models m */
    double *d;     /* (m, n): D_t, then room of the solver */
    double *start; /* (m, n): M_0 */
    double *r;     /* (m, order): B, or Z */
    double *c;     /* (order, order): C, or K */
    double *x;     /* (n_models m, n): X if it is needed */
    double *small; /* (k, k): D_t^T D_t, or D_t D_t^T if that is smaller */
} work;

static double square(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

static obm_status multiply(const work *w, obm__product p, obm_error *err) {
    return obm__dense_multiply(w->run, &p, err);
}

/* weight * D^T D or D D^T, whichever is smaller. */
static obm_status square_small(const work *w, double weight, obm_error *err) {
    bool wide = w->z.m < w->z.n;
    obm__product p = {.transpose_a = !wide, .transpose_b = wide, .m = w->z.k, .n = w->z.k, .alpha = weight};
    p.k = wide ? w->z.n : w->z.m;
    p.a = p.b = w->d;
    p.c = w->small;
    return multiply(w, p, err);
}

/* Adds w D^T D to C and w D D^T D to B. */
static obm_status add_gram(const work *w, double weight, obm_error *err) {
    size_t m = w->z.m, n = w->z.n;
    bool wide = m < n;
    obm__product cube = {.m = m, .n = n, .k = w->z.k, .alpha = 1, .beta = 1, .c = w->r};
    obm__product gram = {.transpose_a = true, .m = n, .n = n, .k = m, .alpha = weight, .beta = 1, .c = w->c};
    cube.a = wide ? w->small : w->d;
    cube.b = wide ? w->d : w->small;
    gram.a = gram.b = w->d;
    OBM_TRY(square_small(w, weight, err));
    OBM_TRY(multiply(w, cube, err));
    if (wide) return multiply(w, gram, err);
    for (size_t i = 0; i < n * n; i++) w->c[i] += w->small[i];
    return OBM_OK;
}

/* Block t of X and Z. */
static obm_status add_block(const work *w, size_t t, double weight, obm_error *err) {
    size_t m = w->z.m, count = m * w->z.n;
    double root = sqrt(weight), *x = w->x + t * count;
    for (size_t i = 0; i < count; i++) x[i] = root * w->d[i];
    OBM_TRY(square_small(w, root, err));
    for (size_t i = 0; i < m; i++) memcpy(w->r + i * w->order + t * m, w->small + i * m, m * sizeof *w->r);
    return OBM_OK;
}

/* The first floor(k / n_models) singular directions of d, at least one. */
static obm_status truncate_d(const work *w, const obm__svd *svd, obm_error *err) {
    size_t m = w->z.m, n = w->z.n, k = w->z.k, keep = k / w->g->steps->n;
    if (keep == 0) keep = 1;
    memcpy(svd->a, w->d, m * n * sizeof *w->d);
    OBM_TRY(obm__svd_run(svd, obm__group_name(w->g), err));
    for (size_t i = 0; i < k; i++)
        for (size_t j = 0; j < n; j++) svd->vt[i * n + j] *= i < keep ? svd->s[i] : 0;
    return multiply(w, (obm__product){.m = m, .n = n, .k = k, .alpha = 1, .a = svd->u, .b = svd->vt, .c = w->d}, err);
}

/* WUDI (Cheng et al., arXiv 2503.08099) starts at the sum, OptMerge (Wei et al., arXiv 2505.19892), whose task vectors
 * are truncated under the norm of the whole ones, at the mean.  Both iterate on a quadratic whose minimum is M C = B.
 */
static obm_status gather(const work *w, const obm__svd *svd, obm_error *err) {
    const obm__steps *s = w->g->steps;
    size_t count = w->z.m * w->z.n;
    for (size_t i = 0; i < s->n; i++) {
        OBM_TRY(obm__dense_load(w->run, w->g, i, 1, false, w->d, err));
        double norm = square(w->d, count), share = svd->memory ? 1 / (double)s->n : 1;
        for (size_t j = 0; j < count; j++) w->start[j] += share * w->d[j];
        if (norm == 0) continue;
        if (svd->memory) OBM_TRY(truncate_d(w, svd, err));
        OBM_TRY(w->stacks ? add_block(w, i, 1 / norm, err) : add_gram(w, 1 / norm, err));
    }
    if (!w->stacks) return OBM_OK;
    obm__product k = {.transpose_b = true, .m = w->order, .n = w->order, .k = w->z.n, .alpha = 1, .c = w->c};
    k.a = k.b = w->x;
    return multiply(w, k, err);
}

/* The ridge and the share of eigenvalues are meant for C, whose trace K has too. */
static obm__gram_filter filter_of(const work *w) {
    const obm__steps *s = w->g->steps;
    double trace = 0, n = (double)w->z.n;
    for (size_t i = 0; i < w->order; i++) trace += w->c[i * w->order + i];
    return (obm__gram_filter){obm__steps_value(s, "ridge", 0) * trace / n,
                              (size_t)ceil(obm__steps_value(s, "rank", 0) * n)};
}

/* The answer in the place of the start. */
static obm_status solve(const work *w, obm_error *err) {
    size_t m = w->z.m, n = w->z.n;
    obm__product rest = {.transpose_b = w->stacks, .m = m, .n = w->order, .k = n, .alpha = -1, .beta = 1};
    rest.a = w->start;
    rest.b = w->stacks ? w->x : w->c;
    rest.c = w->r;
    OBM_TRY(multiply(w, rest, err));
    OBM_TRY(obm__gram_solve(w->run, m, w->order, w->c, w->r, w->d, filter_of(w), obm__group_name(w->g), err));
    obm__product step = {.m = m, .n = n, .k = w->order, .alpha = 1, .beta = 1, .a = w->r, .b = w->x, .c = w->start};
    if (w->stacks) return multiply(w, step, err);
    for (size_t i = 0; i < m * n; i++) w->start[i] += w->r[i];
    return OBM_OK;
}

/* Doubles of all parts; sets w->order and w->stacks. */
static uint64_t plan(work *w, const obm__group *g) {
    w->g = g;
    w->z = obm__dense_size_of(g);
    uint64_t below = (uint64_t)g->steps->n * w->z.m, n = w->z.n;
    w->stacks = below < n;
    w->order = (size_t)(w->stacks ? below : n);
    return 2 * g->count + (uint64_t)w->order * (w->z.m + w->order) + (uint64_t)w->z.k * w->z.k +
           (w->stacks ? below * n : 0);
}

static obm_status form(const obm__run *run, obm__group *g, bool truncates, obm_error *err) {
    if (!obm__dense_is_matrix(g)) return OBM_OK;
    work w = {.run = run};
    obm__svd svd = {0};
    obm_status status;
    uint64_t room = plan(&w, g);
    w.d = obm__calloc((size_t)room, sizeof *w.d);
    if (!w.d) return obm__fail_nomem(err, room * sizeof *w.d);
    w.start = w.d + g->count;
    w.r = w.start + g->count;
    w.c = w.r + w.z.m * w.order;
    w.small = w.c + w.order * w.order;
    w.x = w.small + w.z.k * w.z.k;
    if (truncates) OBM_GO(obm__svd_new(w.z.m, w.z.n, obm__group_name(g), &svd, err));
    OBM_GO(gather(&w, &svd, err));
    obm__svd_free(&svd);
    OBM_GO(solve(&w, err));
    OBM_GO(obm__dense_form(g, w.start, err));
done:
    obm__svd_free(&svd);
    obm_free(w.d);
    return status;
}

static obm_status form_wudi(const obm__run *run, obm__group *g, obm_error *err) { return form(run, g, false, err); }
static obm_status form_optmerge(const obm__run *run, obm__group *g, obm_error *err) { return form(run, g, true, err); }

static uint64_t bytes(const obm__group *g, bool truncates) {
    work w = {0};
    if (!obm__dense_is_matrix(g)) return 0;
    uint64_t room = plan(&w, g), eigen = obm__eigen_bytes(w.order), svd = truncates ? obm__svd_bytes(w.z.m, w.z.n) : 0;
    return room * sizeof(double) + (eigen > svd ? eigen : svd) + g->count * sizeof(float);
}

static uint64_t bytes_wudi(const obm__group *g) { return bytes(g, false); }
static uint64_t bytes_optmerge(const obm__group *g) { return bytes(g, true); }

static const obm__custom wudi = {.form = form_wudi, .merge = obm__dense_merge, .bytes = bytes_wudi};
static const obm__custom optmerge = {.form = form_optmerge, .merge = obm__dense_merge, .bytes = bytes_optmerge};

const obm__method obm__method_wudi = {
    .info = {"wudi", "least interference with each task vector's own row space, in closed form",
             "Cheng et al., WUDI-Merging, arXiv 2503.08099; closed form of its quadratic loss", params,
             OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &wudi,
};

const obm__method obm__method_optmerge = {
    .info = {"optmerge", "wudi with task vectors cut to their leading singular directions, in closed form",
             "Wei et al., OptMerge, arXiv 2505.19892; closed form of its quadratic loss", params, OBM_COUNT(params),
             true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &optmerge,
};
