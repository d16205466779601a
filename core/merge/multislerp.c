/* multislerp: weighted directions averaged in the tangent space at their mean, one step on the sphere. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_WEIGHT,
    OBM_PARAM_BOOL("normalize_weights", "divide the weights by their sum", 1),
    OBM_PARAM_ROW("eps", "added to lengths, and the least length of the mean direction", OBM_PARAM_GLOBAL, false, 1e-8,
                  0, INFINITY, false),
};

static double weight_sum(const obm__steps *s) {
    double sum = 0;
    for (size_t i = 0; i < s->n; i++) sum += s->weight[i];
    return obm__steps_value(s, "normalize_weights", 0) != 0 ? sum : 1;
}

static obm_status check(const obm__steps *s, obm_error *err) {
    if (weight_sum(s) != 0) return OBM_OK;
    return obm__fail(err, OBM_E_ARG,
                     "multislerp: the weights sum to 0, nothing to normalise by; set normalize_weights "
                     "to false");
}

/*
 * With directions u_i = x_i / (|x_i| + eps), weights w_i and the mean direction m = sum(w_i u_i) / L, L = |sum(w_i
 * u_i)|, the weighted tangents at m add up to sum(w_i u_i) - (sum(w_i u_i) . m) m = L m - L m = 0.  So the exponential
 * map leaves m where it is (times cos(eps), eps being added to the tangent's length), and the result is m * sum(w_i
 * |x_i|).
 */
static obm_status mix(const obm__steps *s, const double *gram, size_t n, double *c, obm_error *err) {
    double eps = obm__steps_value(s, "eps", 0), total = weight_sum(s), square = 0, size = 0;
    if (n == 1) return c[0] = 1, OBM_OK;
    for (size_t i = 0; i < n; i++) {
        double length = sqrt(gram[i * n + i]);
        size += s->weight[i] / total * length;
        c[i] = length + eps > 0 ? s->weight[i] / total / (length + eps) : 0; /* of x_i in sum(w_i u_i) */
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) square += c[i] * c[j] * gram[i * n + j];
    double mean = sqrt(fmax(square, 0));
    bool flat = mean < eps || mean == 0;
    if (flat && n > 2 && size != 0)
        return obm__fail(err, OBM_E_VALUE, "multislerp: the weighted directions of the models cancel out");
    for (size_t i = 0; i < n; i++) c[i] = flat ? s->weight[i] / total : c[i] / mean * cos(eps) * size;
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n, obm_error *err) {
    return obm__combine(run, groups, n, OBM_VECTOR_TENSOR, mix, err);
}

static const obm__custom custom = {
    .check = check, .prepare = prepare, .merge = obm__combine_merge, .bytes = obm__combine_bytes};

const obm__method obm__method_multislerp = {
    .info = {"multislerp", "weighted mean direction of several models or task vectors, at their weighted mean length",
             "C. Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea", params, OBM_COUNT(params), false, 1, 0},
    .deltas = true,
    .optional_base = true,
    .custom = &custom,
};
