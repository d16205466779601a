/* model_stock: from the base towards the mean of the models, as far as the angles between their task vectors say. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_BOOL("filter_wise", "an angle for each row instead of one for the tensor", 0),
};

#define LEAST_PRODUCT 1e-6
#define LEAST_DIVISOR 1e-6

/* t = N cos / (1 + (N - 1) cos), with the mean cosine over all pairs (Jang et al., section 4, equation 4). */
static obm_status mix(const obm__steps *s, const double *gram, size_t n, double *c, obm_error *err) {
    (void)err;
    double least = s->paper ? 0 : LEAST_PRODUCT, sum = 0;
    for (size_t i = 0; i < n; i++) {
        for (size_t j = i + 1; j < n; j++) {
            double product = fmax(sqrt(gram[i * n + i]) * sqrt(gram[j * n + j]), least);
            double cosine = product > 0 ? gram[i * n + j] / product : 0;
            sum += fmin(fmax(cosine, -1), 1);
        }
    }
    double cosine = sum / ((double)n * (double)(n - 1) / 2), divisor = 1 + (double)(n - 1) * cosine;
    double t = fabs(divisor) < LEAST_DIVISOR ? 0 : (double)n * cosine / divisor;
    for (size_t i = 0; i < n; i++) c[i] = t / (double)n;
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n, obm_error *err) {
    bool rows = obm__steps_value(groups[0].steps, "filter_wise", 0) != 0;
    return obm__combine(run, groups, n, rows ? OBM_VECTOR_ROW : OBM_VECTOR_TENSOR, mix, err);
}

static const obm__custom custom = {.prepare = prepare, .merge = obm__combine_merge, .bytes = obm__combine_bytes};

const obm__method obm__method_model_stock = {
    .info = {"model_stock", "between the base and the mean of the models, by the angles of their task vectors",
             "Jang et al., Model Stock, arXiv 2403.19522, section 4", params, OBM_COUNT(params), true, 2, 0},
    .deltas = true,
    .custom = &custom,
};
