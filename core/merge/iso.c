/* iso_c, iso_cts: a flat spectrum: every direction that the task vectors have together, or besides some that each has
 * alone, weighs the same. */
#include "merge.h"

#define WEIGHT_ROW OBM_PARAM_FACTOR("factor of this model's task vector")

static const obm_param_info c_params[] = {WEIGHT_ROW, OBM_PARAM_LAMBDA};
static const obm_param_info cts_params[] = {
    WEIGHT_ROW,
    OBM_PARAM_LAMBDA,
    OBM_PARAM_ROW("common", "share of the directions that come from the sum; the tasks share the rest",
                  OBM_PARAM_GLOBAL, false, 0.8, 0, 1, false),
};

typedef struct work {
    const obm__run *run;
    const obm__group *g;
    obm__dense_size z;
    size_t common, each; /* directions of the sum, and of each task besides; together k at most */
    obm__svd svd;
    double *out;    /* (m, n) */
    double *u, *vt; /* (m, all), (all, n): task after task, then the common ones */
    double *shared; /* (m, common): the common u by itself */
    double *inside; /* (common, n): a task vector's part in it */
    double *s;      /* (all) */
} work;

static obm_status load_sum(const work *w, obm_error *err) {
    for (size_t t = 0; t < w->g->steps->n; t++)
        OBM_TRY(obm__dense_load(w->run, w->g, t, (double)w->g->steps->weight[t], t > 0, w->svd.a, err));
    return OBM_OK;
}

static double mean(const double *s, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += s[i];
    return n ? sum / (double)n : 0;
}

/* All k singular values become their mean (Marczak et al., arXiv 2502.04959, Iso-C); where a value is practically 0
 * there is no direction to give it to. */
static obm_status flatten_sum(work *w, obm_error *err) {
    OBM_TRY(load_sum(w, err));
    OBM_TRY(obm__svd_run(&w->svd, obm__group_name(w->g), err));
    size_t k = w->z.k, n = w->z.n, rank = obm__svd_rank(&w->svd);
    double level = mean(w->svd.s, k);
    for (size_t i = 0; i < k; i++)
        for (size_t j = 0; j < n; j++) w->svd.vt[i * n + j] *= i < rank ? level : 0;
    obm__product p = {.m = w->z.m, .n = n, .k = k, .alpha = 1, .a = w->svd.u, .b = w->svd.vt, .c = w->out};
    return obm__dense_multiply(w->run, &p, err);
}

/* D_t - U_c U_c^T D_t in the place of the decomposition. */
static obm_status load_outside(const work *w, size_t t, obm_error *err) {
    size_t m = w->z.m, n = w->z.n, c = w->common;
    OBM_TRY(obm__dense_load(w->run, w->g, t, (double)w->g->steps->weight[t], false, w->svd.a, err));
    obm__product in = {
        .transpose_a = true, .m = c, .n = n, .k = m, .alpha = 1, .a = w->shared, .b = w->svd.a, .c = w->inside};
    obm__product out = {.m = m, .n = n, .k = c, .alpha = -1, .beta = 1, .a = w->shared, .b = w->inside, .c = w->svd.a};
    OBM_TRY(obm__dense_multiply(w->run, &in, err));
    return obm__dense_multiply(w->run, &out, err);
}

static obm_status gather_spaces(work *w, size_t all, obm_error *err) {
    const char *name = obm__group_name(w->g);
    size_t tasks = w->g->steps->n, first = w->each * tasks;
    OBM_TRY(load_sum(w, err));
    OBM_TRY(obm__svd_run(&w->svd, name, err));
    obm__dense_take(&w->svd, first, w->common, all, w->u, w->vt, w->s);
    for (size_t row = 0; row < w->z.m; row++)
        memcpy(w->shared + row * w->common, w->u + row * all + first, w->common * sizeof *w->shared);
    for (size_t t = 0; t < tasks && w->each; t++) {
        OBM_TRY(load_outside(w, t, err));
        OBM_TRY(obm__svd_run(&w->svd, name, err));
        obm__dense_take(&w->svd, t * w->each, w->each, all, w->u, w->vt, w->s);
    }
    return OBM_OK;
}

/* Common directions and those of each task outside them, made orthogonal, all with the mean of their values (Iso-CTS).
 */
static obm_status flatten_spaces(work *w, obm_error *err) {
    size_t m = w->z.m, n = w->z.n, all = w->each * w->g->steps->n + w->common;
    OBM_TRY(gather_spaces(w, all, err));
    OBM_TRY(obm__dense_polar(w->run, w->g, &w->svd, m, all, w->u, err));
    OBM_TRY(obm__dense_polar(w->run, w->g, &w->svd, all, n, w->vt, err));
    obm__product p = {.m = m, .n = n, .k = all, .alpha = mean(w->s, all), .a = w->u, .b = w->vt, .c = w->out};
    return obm__dense_multiply(w->run, &p, err);
}

/* n_c = k - round((k - floor(share k)) / T) T, halves to even as the authors' code has it, never below 0. */
static void split(const obm__group *g, obm__dense_size z, size_t *common, size_t *each) {
    size_t tasks = g->steps->n, shared = (size_t)(obm__steps_value(g->steps, "common", 0) * (double)z.k),
           rest = z.k - (shared < z.k ? shared : z.k), rounded = rest / tasks, left = rest % tasks;
    if (2 * left > tasks || (2 * left == tasks && rounded % 2)) rounded++;
    if (rounded * tasks > z.k) rounded--;
    *each = rounded;
    *common = z.k - rounded * tasks;
}

static uint64_t room_of(const work *w, bool spaces) {
    uint64_t count = (uint64_t)w->z.m * w->z.n, sides = (uint64_t)w->z.m + w->z.n;
    return count + (spaces ? sides * w->z.k + sides * w->common + w->z.k : 0);
}

static obm_status form(const obm__run *run, obm__group *g, bool spaces, obm_error *err) {
    if (!obm__dense_is_matrix(g)) return OBM_OK;
    work w = {.run = run, .g = g, .z = obm__dense_size_of(g)};
    obm_status status;
    size_t m = w.z.m, n = w.z.n;
    if (spaces) split(g, w.z, &w.common, &w.each);
    w.out = obm__calloc((size_t)room_of(&w, spaces), sizeof *w.out);
    if (!w.out) return obm__fail_nomem(err, room_of(&w, spaces) * sizeof *w.out);
    w.u = w.out + m * n;
    w.vt = spaces ? w.u + m * w.z.k : NULL;
    w.shared = spaces ? w.vt + w.z.k * n : NULL;
    w.inside = spaces ? w.shared + m * w.common : NULL;
    w.s = spaces ? w.inside + w.common * n : NULL;
    OBM_GO(obm__svd_new(m, n, obm__group_name(g), &w.svd, err));
    OBM_GO(spaces ? flatten_spaces(&w, err) : flatten_sum(&w, err));
    OBM_GO(obm__dense_form(g, w.out, err));
done:
    obm__svd_free(&w.svd);
    obm_free(w.out);
    return status;
}

static obm_status form_c(const obm__run *run, obm__group *g, obm_error *err) { return form(run, g, false, err); }
static obm_status form_cts(const obm__run *run, obm__group *g, obm_error *err) { return form(run, g, true, err); }

static uint64_t bytes(const obm__group *g, bool spaces) {
    if (!obm__dense_is_matrix(g)) return 0;
    work w = {.z = obm__dense_size_of(g)};
    if (spaces) split(g, w.z, &w.common, &w.each);
    return obm__svd_bytes(w.z.m, w.z.n) + room_of(&w, spaces) * sizeof(double) + g->count * sizeof(float);
}

static uint64_t bytes_c(const obm__group *g) { return bytes(g, false); }
static uint64_t bytes_cts(const obm__group *g) { return bytes(g, true); }

static const obm__custom iso_c = {.form = form_c, .merge = obm__dense_merge, .bytes = bytes_c};
static const obm__custom iso_cts = {.form = form_cts, .merge = obm__dense_merge, .bytes = bytes_cts};

const obm__method obm__method_iso_c = {
    .info = {"iso_c", "sum of the task vectors with all singular values at their mean",
             "Marczak et al., No Task Left Behind, arXiv 2502.04959, Iso-C", c_params, OBM_COUNT(c_params), true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &iso_c,
};

const obm__method obm__method_iso_cts = {
    .info = {"iso_cts", "common directions of the sum and some of each task, all with the same singular value",
             "Marczak et al., No Task Left Behind, arXiv 2502.04959, Iso-CTS", cts_params, OBM_COUNT(cts_params), true,
             1, 0},
    .deltas = true,
    .f32_deltas = true,
    .custom = &iso_cts,
};
