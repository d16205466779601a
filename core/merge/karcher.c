/* karcher: the Karcher mean of the models' directions on the sphere, at their mean length; all models count alike. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("max_iter", "steps at most", OBM_PARAM_GLOBAL, false, 10, 0, 1e6, false),
    OBM_PARAM_ROW("tol", "shorter vectors have no direction, shorter steps end the search", OBM_PARAM_GLOBAL, false,
                  1e-5, 0, INFINITY, false),
};

typedef struct search {
    const double *gram;
    size_t n, valid; /* valid: models with a direction */
    double tol;
    double *mean, *step; /* (n) coefficients of the unit vectors */
} search;

static double length(const search *s, size_t i) { return sqrt(s->gram[i * s->n + i]); }
static bool is_valid(const search *s, size_t i) { return length(s, i) > s->tol; }

/* Inner product of unit vector i and the combination c of all unit vectors. */
static double along(const search *s, size_t i, const double *c) {
    double sum = 0;
    for (size_t j = 0; j < s->n; j++)
        if (c[j] != 0) sum += c[j] * s->gram[i * s->n + j] / (length(s, i) * length(s, j));
    return sum;
}

static double combined_length(const search *s, const double *c) {
    double sum = 0;
    for (size_t i = 0; i < s->n; i++)
        if (c[i] != 0) sum += c[i] * along(s, i, c);
    return sqrt(fmax(sum, 0));
}

/* One step of the exponential map; false once the mean of the tangents is short. */
static bool improve(const search *s) {
    memset(s->step, 0, s->n * sizeof *s->step);
    for (size_t i = 0; i < s->n; i++) {
        if (!is_valid(s, i)) continue;
        double cosine = fmin(fmax(along(s, i, s->mean), -1), 1), angle = acos(cosine);
        if (angle < s->tol || sin(angle) == 0) continue;
        double factor = angle / sin(angle) / (double)s->valid;
        s->step[i] += factor;
        for (size_t j = 0; j < s->n; j++) s->step[j] -= factor * cosine * s->mean[j];
    }
    double size = combined_length(s, s->step);
    if (size < s->tol || size == 0) return false;
    for (size_t i = 0; i < s->n; i++) s->mean[i] = cos(size) * s->mean[i] + sin(size) / size * s->step[i];
    double now = combined_length(s, s->mean);
    for (size_t i = 0; now > s->tol && i < s->n; i++) s->mean[i] /= now;
    return true;
}

/* The normalised sum of the directions, or the first of them where they cancel out. */
static void start(search *s) {
    for (size_t i = 0; i < s->n; i++) s->valid += is_valid(s, i);
    for (size_t i = 0; i < s->n; i++) s->mean[i] = is_valid(s, i) ? 1.0 / (double)s->valid : 0;
    double size = combined_length(s, s->mean);
    bool first = true;
    for (size_t i = 0; i < s->n; i++) {
        if (size >= s->tol && size > 0) {
            s->mean[i] /= size;
        } else {
            s->mean[i] = first && is_valid(s, i);
            first &= !is_valid(s, i);
        }
    }
}

static obm_status mix(const obm__steps *steps, const double *gram, size_t n, double *c, obm_error *err) {
    if (n == 1) return c[0] = 1, OBM_OK;
    double *memory = obm__calloc(2 * n, sizeof *memory), size = 0;
    if (!memory) return obm__fail_nomem(err, 2 * n * sizeof *memory);
    search s = {.gram = gram, .n = n, .tol = obm__steps_value(steps, "tol", 0), .mean = memory, .step = memory + n};
    start(&s);
    for (int left = (int)obm__steps_value(steps, "max_iter", 0); left > 0 && s.valid > 0 && improve(&s);) left--;
    for (size_t i = 0; i < n; i++) size += length(&s, i) / (double)n;
    for (size_t i = 0; i < n; i++) c[i] = s.mean[i] != 0 ? size * s.mean[i] / length(&s, i) : 0;
    obm_free(memory);
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n, obm_error *err) {
    return obm__combine(run, groups, n, OBM_VECTOR_TENSOR, mix, err);
}

static const obm__custom custom = {.prepare = prepare, .merge = obm__combine_merge, .bytes = obm__combine_bytes};

const obm__method obm__method_karcher = {
    .info = {"karcher", "Karcher mean of the models on the sphere",
             "arXiv 2603.04972; Karcher, Riemannian center of "
             "mass, 1977",
             params, OBM_COUNT(params), false, 1, 0},
    .custom = &custom,
};
