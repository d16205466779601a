/* nuslerp: the great arc between two models, or between their task vectors, by tensor, row or column. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_WEIGHT,
    OBM_PARAM_BOOL("nuslerp_flatten", "take the tensor as one vector", 1),
    OBM_PARAM_BOOL("nuslerp_row_wise",
                   "without flatten: vectors along the first dimension; else along the last (as mergekit has it)", 0),
};

#define LEAST_LENGTH 1e-7
/* Below this sine the arc has no direction and becomes a line. */
#define LEAST_SINE 1e-8
#define LEAST_TOTAL 1e-6

static obm_status mix(const obm__steps *s, const double *gram, size_t n, double *c, obm_error *err) {
    (void)err;
    double total = (double)s->weight[0] + s->weight[1], t = fabs(total) < LEAST_TOTAL ? 0.5 : s->weight[1] / total;
    double cosine = gram[1] / (fmax(sqrt(gram[0]), LEAST_LENGTH) * fmax(sqrt(gram[n + 1]), LEAST_LENGTH));
    cosine = cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
    double angle = acos(cosine);
    bool line = 1 - cosine * cosine <= LEAST_SINE * LEAST_SINE;
    c[0] = line ? 1 - t : sin((1 - t) * angle) / sin(angle);
    c[1] = line ? t : sin(t * angle) / sin(angle);
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n, obm_error *err) {
    const obm__steps *s = groups[0].steps;
    obm__vector kind = obm__steps_value(s, "nuslerp_row_wise", 0) != 0 ? OBM_VECTOR_COLUMN : OBM_VECTOR_ROW;
    if (obm__steps_value(s, "nuslerp_flatten", 0) != 0) kind = OBM_VECTOR_TENSOR;
    return obm__combine(run, groups, n, kind, mix, err);
}

static const obm__custom custom = {.prepare = prepare, .merge = obm__combine_merge, .bytes = obm__combine_bytes};

const obm__method obm__method_nuslerp = {
    .info = {"nuslerp", "great arc between two models or their task vectors, also by row or column",
             "Shoemake, Animating rotation with quaternion curves, 1985; as in mergekit", params, OBM_COUNT(params),
             false, 2, 2},
    .deltas = true,
    .optional_base = true,
    .custom = &custom,
};
