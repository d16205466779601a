/* consensus: the sum of the task vectors where enough models count it as theirs. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("k", "models that must count an element as theirs; 0 is task_arithmetic", OBM_PARAM_GLOBAL, false, 2,
                  0, 1e6, false),
    OBM_PARAM_ROW("mask_lambda", "an element is a model's if |d| > mask_lambda * |sum - d|", OBM_PARAM_PER_MODEL, false,
                  0.4, 0, INFINITY, false),
    OBM_PARAM_LAMBDA,
};

/* TALL masks and their count: Wang et al., Localizing Task Information, arXiv 2405.07813, equations 3 and 5. */
static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    double k = obm__steps_value(s, "k", 0);
    memset(b->sum, 0, b->n * sizeof *b->sum);
    memset(b->divisor, 0, b->n * sizeof *b->divisor); /* models that own the element */
    for (size_t i = 0; i < s->n; i++) b->k->axpy_f32(b->sum, 1.0f, obm__block_delta(b, i), b->n);
    for (size_t i = 0; i < s->n; i++) {
        const float *d = obm__block_delta(b, i);
        double lambda = obm__steps_value(s, "mask_lambda", i);
        for (size_t j = 0; j < b->n; j++)
            b->divisor[j] += fabs((double)d[j]) > lambda * fabs((double)b->sum[j] - (double)d[j]);
    }
    for (size_t j = 0; j < b->n; j++)
        b->mixed[j] = (float)(b->base[j] + (b->divisor[j] >= k ? (double)s->lambda * b->sum[j] : 0));
}

static const obm__custom custom = {.merge = merge};

const obm__method obm__method_consensus = {
    .info = {"consensus", "sum of the task vectors where enough models own the element (TALL masks)",
             "Wang et al., Localizing Task Information, arXiv 2405.07813, section 4", params, OBM_COUNT(params), true,
             1, 0},
    .deltas = true,
    .cost = 8,
    .custom = &custom,
};
