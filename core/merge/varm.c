/* varm: the mean of the task vectors, each weighted by its mean square in the tensor. */
#include "merge.h"

static const obm_param_info params[] = {OBM_PARAM_LAMBDA};

/* w_i = mean(d_i^2) / sum of those: the counts cancel (Wan et al., Knowledge Fusion of Chat LLMs, section 3.3). */
static obm_status mix(const obm__steps *s, const double *gram, size_t n, double *c, obm_error *err) {
    (void)err;
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += gram[i * n + i];
    for (size_t i = 0; i < n; i++) c[i] = s->lambda * (sum > 0 ? gram[i * n + i] / sum : 1 / (double)n);
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n, obm_error *err) {
    return obm__combine(run, groups, n, OBM_VECTOR_TENSOR, mix, err);
}

static const obm__custom custom = {.prepare = prepare, .merge = obm__combine_merge, .bytes = obm__combine_bytes};

const obm__method obm__method_varm = {
    .info = {"varm", "mean of the task vectors weighted by their mean squares",
             "Wan et al., FuseChat, arXiv 2402.16107, section 3.3", params, OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .custom = &custom,
};
