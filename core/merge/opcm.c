/* opcm: the models one after the other, each without what lies in the directions that the earlier ones fill. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_LAMBDA,
    OBM_PARAM_ROW("alpha", "share of the sum of the singular values that earlier models keep for themselves",
                  OBM_PARAM_GLOBAL, false, 0.5, 0, 1, false),
    OBM_PARAM_SCOPE,
};

typedef struct work {
    const obm__run *run;
    const obm__group *g;
    obm__dense_size z;
    obm__svd svd;
    double *sum, *d; /* (m, n) */
    double *y;       /* (k, n) */
    double *p;       /* (k, k) */
} work;

/* The first index whose running share of the singular values is above alpha; 0 where none is, as argmax has it. */
static size_t cut_of(const double *s, size_t k, double alpha) {
    double total = 0, running = 0;
    for (size_t i = 0; i < k; i++) total += s[i];
    for (size_t i = 0; i < k; i++) {
        running += s[i];
        if (running / total > alpha) return i;
    }
    return 0;
}

/* D - U P VT, where P is U^T D V on the diagonal and in its first `cut` rows and columns, else 0: what lies outside the
 * singular vectors of the sum passes unchanged, so that thin ones are enough. */
static obm_status project(const work *w, obm_error *err) {
    size_t m = w->z.m, n = w->z.n, k = w->z.k, rank = obm__svd_rank(&w->svd),
           cut = cut_of(w->svd.s, k, obm__steps_value(w->g->steps, "alpha", 0));
    if (rank == 0) return OBM_OK;
    obm__product left = {.transpose_a = true, .m = k, .n = n, .k = m, .alpha = 1, .a = w->svd.u, .b = w->d, .c = w->y};
    obm__product both = {.transpose_b = true, .m = k, .n = k, .k = n, .alpha = 1, .a = w->y, .b = w->svd.vt, .c = w->p};
    obm__product right = {.m = k, .n = n, .k = k, .alpha = 1, .a = w->p, .b = w->svd.vt, .c = w->y};
    obm__product take = {.m = m, .n = n, .k = k, .alpha = -1, .beta = 1, .a = w->svd.u, .b = w->y, .c = w->d};
    OBM_TRY(obm__dense_multiply(w->run, &left, err));
    OBM_TRY(obm__dense_multiply(w->run, &both, err));
    for (size_t i = 0; i < k; i++)
        for (size_t j = 0; j < k; j++)
            if ((i != j && (i >= cut || j >= cut)) || i >= rank || j >= rank) w->p[i * k + j] = 0;
    OBM_TRY(obm__dense_multiply(w->run, &right, err));
    return obm__dense_multiply(w->run, &take, err);
}

/* Tang et al., arXiv 2501.09522: every step decomposes the merged task vector so far.  Its norm is matched to the
 * experts' at every step; directions and cut do not depend on it, so the sum is kept as it is and scaled once at the
 * end. */
static obm_status accumulate(const work *w, obm_error *err) {
    size_t count = w->z.m * w->z.n;
    OBM_TRY(obm__dense_load(w->run, w->g, 0, 1, false, w->sum, err));
    for (size_t t = 1; t < w->g->steps->n; t++) {
        memcpy(w->svd.a, w->sum, count * sizeof *w->sum);
        OBM_TRY(obm__svd_run(&w->svd, obm__group_name(w->g), err));
        OBM_TRY(obm__dense_load(w->run, w->g, t, 1, false, w->d, err));
        OBM_TRY(project(w, err));
        for (size_t i = 0; i < count; i++) w->sum[i] += w->d[i];
    }
    return OBM_OK;
}

static uint64_t room_of(obm__dense_size z) { return 2 * (uint64_t)z.m * z.n + (uint64_t)z.k * (z.n + z.k); }

static obm_status form(const obm__run *run, obm__group *g, obm_error *err) {
    if (!obm__dense_is_matrix(g)) return OBM_OK;
    work w = {.run = run, .g = g, .z = obm__dense_size_of(g)};
    obm_status status;
    w.sum = obm__alloc((size_t)room_of(w.z), sizeof *w.sum);
    if (!w.sum) return obm__fail_nomem(err, room_of(w.z) * sizeof *w.sum);
    w.d = w.sum + w.z.m * w.z.n;
    w.y = w.d + w.z.m * w.z.n;
    w.p = w.y + w.z.k * w.z.n;
    OBM_GO(obm__svd_new(w.z.m, w.z.n, obm__group_name(g), &w.svd, err));
    OBM_GO(accumulate(&w, err));
    OBM_GO(obm__dense_form(g, w.sum, err));
done:
    obm__svd_free(&w.svd);
    obm_free(w.sum);
    return status;
}

/* ---- the norm ---- */

/* Of every task vector, and of their sum: what a tensor that is no matrix adds. */
static void squares(const obm__block *b, const void *arg, double *sums) {
    size_t n = b->g->steps->n;
    (void)arg;
    for (size_t i = 0; i < n; i++) sums[i] = b->k->dot(obm__block_delta(b, i), obm__block_delta(b, i), b->n);
    for (size_t j = 0; j < b->n; j++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += (double)obm__block_delta(b, i)[j];
        sums[n] += sum * sum;
    }
}

static double formed_square(const obm__group *g) {
    double sum = 0;
    for (uint64_t i = 0; i < g->count; i++) sum += (double)g->formed[i] * (double)g->formed[i];
    return sum;
}

/* total: (n + 1), square norms of the task vectors and of the merged one. */
static obm_status add_norms(const obm__run *run, obm__group *g, double *total, bool keep, obm_error *err) {
    size_t n = g->steps->n;
    double sums[OBM_MAX_SUMS];
    OBM_TRY(obm__group_sums(run, g, n + 1, squares, NULL, sums, err));
    OBM_TRY(obm__group_form(run, g, err));
    if (g->formed) sums[n] = formed_square(g);
    for (size_t i = 0; i <= n; i++) total[i] += sums[i];
    if (keep) return OBM_OK;
    obm_free(g->formed);
    g->formed = NULL;
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    size_t n = groups[0].steps->n;
    if (n + 1 > OBM_MAX_SUMS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "opcm takes at most %d models, found %zu", OBM_MAX_SUMS - 1, n);
    double total[OBM_MAX_SUMS] = {0}, mean = 0;
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(add_norms(run, &groups[i], total, n_groups == 1, err));
    for (size_t i = 0; i < n; i++) mean += sqrt(total[i]) / (double)n;
    for (size_t i = 0; i < n_groups; i++) {
        if (!(groups[i].stats = obm__alloc(1, sizeof *groups[i].stats))) return obm__fail_nomem(err, sizeof(double));
        groups[i].stats[0] = total[n] > 0 ? mean / sqrt(total[n]) : 0;
    }
    return OBM_OK;
}

static void merge(const obm__block *b) {
    double factor = (double)b->g->steps->lambda * b->g->stats[0];
    if (b->g->formed) {
        obm__dense_add(b, factor);
        return;
    }
    for (size_t j = 0; j < b->n; j++) {
        double sum = 0;
        for (size_t i = 0; i < b->g->steps->n; i++) sum += (double)obm__block_delta(b, i)[j];
        b->mixed[j] = (float)(b->base[j] + factor * sum);
    }
}

static uint64_t bytes(const obm__group *g) {
    if (!obm__dense_is_matrix(g)) return 0;
    obm__dense_size z = obm__dense_size_of(g);
    return obm__svd_bytes(z.m, z.n) + room_of(z) * sizeof(double) + g->count * sizeof(float);
}

static const obm__custom custom = {.prepare = prepare, .form = form, .merge = merge, .bytes = bytes};

const obm__method obm__method_opcm = {
    .info = {"opcm", "models in order, each projected away from the directions of the earlier ones (OPCM)",
             "Tang et al., Merging Models on the Fly Without Retraining, arXiv 2501.09522", params, OBM_COUNT(params),
             true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &custom,
};
