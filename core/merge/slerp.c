/* slerp: the great arc between the base and one model, each tensor taken as one vector. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("t", "0 gives the base, 1 the model", OBM_PARAM_GLOBAL, true, 0.5, -INFINITY, INFINITY, false),
};

/* Beyond this cosine the vectors count as parallel and are interpolated linearly (mergekit's threshold). */
#define PARALLEL 0.9995
#define LEAST_LENGTH 1e-8

static double length(double square) {
    double root = sqrt(square);
    return root > LEAST_LENGTH ? root : 1;
}

static obm_status mix(const obm__steps *s, const double *gram, size_t n, double *c, obm_error *err) {
    (void)err;
    double t = obm__steps_value(s, "t", 0), cosine = gram[1] / (length(gram[0]) * length(gram[n + 1]));
    cosine = cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
    double angle = acos(cosine);
    bool parallel = fabs(cosine) > PARALLEL;
    c[0] = parallel ? 1 - t : sin((1 - t) * angle) / sin(angle);
    c[1] = parallel ? t : sin(t * angle) / sin(angle);
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n, obm_error *err) {
    return obm__combine(run, groups, n, OBM_VECTOR_TENSOR, mix, err);
}

static const obm__custom custom = {.prepare = prepare, .merge = obm__combine_merge, .bytes = obm__combine_bytes};

const obm__method obm__method_slerp = {
    .info = {"slerp", "great arc between base and model", "Shoemake, Animating rotation with quaternion curves, 1985",
             params, OBM_COUNT(params), true, 1, 1},
    .custom = &custom,
};
