/* emr: the unified task vector of EMR-Merging: elected signs with the largest agreeing magnitude. */
#include "merge.h"

static const obm_param_info params[] = {OBM_PARAM_LAMBDA};

/* sgn(sum d) * max |d| over the models of that sign; a sum of 0 elects nothing (Huang et al., section 3.2). */
static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    memset(b->sum, 0, b->n * sizeof *b->sum);
    for (size_t i = 0; i < s->n; i++) b->k->axpy_f32(b->sum, 1.0f, obm__block_delta(b, i), b->n);
    for (size_t j = 0; j < b->n; j++) {
        float best = 0, sign = (float)((b->sum[j] > 0) - (b->sum[j] < 0));
        for (size_t i = 0; i < s->n; i++) best = fmaxf(best, sign * obm__block_delta(b, i)[j]);
        b->mixed[j] = (float)(b->base[j] + (double)s->lambda * (sign * best));
    }
}

static const obm__custom custom = {.merge = merge};

const obm__method obm__method_emr = {
    .info = {"emr", "elected signs with the largest agreeing magnitudes (EMR-Merging's unified task vector)",
             "Huang et al., EMR-Merging, arXiv 2405.17461, section 3.2", params, OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .cost = 2,
    .custom = &custom,
};
