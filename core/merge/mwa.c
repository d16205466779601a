/* mwa: the mean of checkpoints, weighted by a number that measures each. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("metric", "what this model measures, above 0: a loss, or a number of steps", OBM_PARAM_PER_MODEL,
                  true, 1, 0, INFINITY, false),
    OBM_PARAM_ROW("penalty", "weights go with the metric to this power; 0 weights all alike", OBM_PARAM_GLOBAL, false,
                  1, 0, INFINITY, false),
    OBM_PARAM_BOOL("higher_is_better", "weights grow with the metric (steps), else with 1 / metric (losses)", 0),
};

/* s^p / sum of them as a softmax of p * log(s), which no power overflows. */
static double exponent(const obm__steps *s, size_t i) {
    double x = obm__steps_value(s, "penalty", 0) * log(obm__steps_value(s, "metric", i));
    return obm__steps_value(s, "higher_is_better", 0) != 0 ? x : -x;
}

static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    double most = -INFINITY, mass = 0;
    for (size_t i = 0; i < s->n; i++) most = fmax(most, exponent(s, i));
    for (size_t i = 0; i < s->n; i++) mass += exp(exponent(s, i) - most);
    memset(b->mixed, 0, b->n * sizeof *b->mixed);
    for (size_t i = 0; i < s->n; i++)
        b->k->axpy_f32(b->mixed, (float)(exp(exponent(s, i) - most) / mass), obm__block_delta(b, i), b->n);
}

static obm_status check(const obm__steps *s, obm_error *err) {
    obm__model_name buf;
    for (size_t i = 0; i < s->n; i++)
        if (!(obm__steps_value(s, "metric", i) > 0) || !isfinite(exponent(s, i)))
            return obm__fail(err, OBM_E_ARG, "mwa: metric of %.300s: expected a number above 0, found %g (penalty %g)",
                             obm__model_label(s->labels, i, buf), obm__steps_value(s, "metric", i),
                             obm__steps_value(s, "penalty", 0));
    return OBM_OK;
}

static const obm__custom custom = {.check = check, .merge = merge};

const obm__method obm__method_mwa = {
    .info = {"mwa", "mean of checkpoints weighted by their losses or steps",
             "Wang et al., Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging, arXiv 2504.18580",
             params, OBM_COUNT(params), false, 1, 0},
    .custom = &custom,
};
