/* ram, ramplus_tl: what one model alone changes stays whole, what several change is averaged. */
#include "merge.h"

#define EPSILON \
    OBM_PARAM_ROW("epsilon", "smaller changes count as none", OBM_PARAM_GLOBAL, false, 1e-5, 0, INFINITY, false)
#define SOURCE "Reinforced Agent Merging, arXiv 2601.13572"

/* How many models change element j, into b->sum. */
static void count_active(const obm__block *b) {
    float epsilon = (float)obm__steps_value(b->g->steps, "epsilon", 0);
    memset(b->sum, 0, b->n * sizeof *b->sum);
    for (size_t i = 0; i < b->g->steps->n; i++) {
        float *d = obm__block_delta(b, i);
        for (size_t j = 0; j < b->n; j++) {
            bool active = fabsf(d[j]) > epsilon;
            d[j] = obm__keep_if(d[j], active);
            b->sum[j] += active;
        }
    }
}

/* stats: the factors of what each model alone changes; NULL: 1. */
static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    count_active(b);
    for (size_t j = 0; j < b->n; j++) {
        double sum = 0;
        for (size_t i = 0; i < s->n; i++)
            sum += obm__block_delta(b, i)[j] * (b->g->stats && b->sum[j] == 1 ? b->g->stats[i] : 1);
        b->mixed[j] = (float)(b->base[j] + (b->sum[j] > 1 ? sum / b->sum[j] : sum));
    }
}

static const obm__custom ram_custom = {.merge = merge};
static const obm_param_info ram_params[] = {EPSILON};

const obm__method obm__method_ram = {
    .info = {"ram", "changes of one model whole, shared changes averaged", SOURCE, ram_params, OBM_COUNT(ram_params),
             true, 1, 0},
    .deltas = true,
    .cost = 3,
    .custom = &ram_custom,
};

/* sums: (n) shared, (n) unique changes. */
static void count_changes(const obm__block *b, const void *arg, double *sums) {
    (void)arg;
    size_t n = b->g->steps->n;
    count_active(b);
    for (size_t i = 0; i < n; i++) {
        const float *d = obm__block_delta(b, i);
        for (size_t j = 0; j < b->n; j++) {
            sums[i] += (d[j] != 0) & (b->sum[j] > 1);
            sums[n + i] += (d[j] != 0) & (b->sum[j] == 1);
        }
    }
}

static obm_status factors_of(const obm__run *run, obm__group *g, obm_error *err) {
    const obm__steps *s = g->steps;
    size_t n = s->n;
    if (2 * n > OBM_MAX_SUMS) return obm__fail(err, OBM_E_UNSUPPORTED, "ramplus_tl takes at most 1024 models");
    double *counts = obm__calloc(2 * n, sizeof *counts);
    g->stats = obm__calloc(n, sizeof *g->stats);
    obm_status status = counts && g->stats ? obm__group_sums(run, g, 2 * n, count_changes, NULL, counts, err)
                                           : obm__fail_nomem(err, 3 * n * sizeof *counts);
    for (size_t i = 0; status == OBM_OK && i < n; i++) {
        double least = obm__steps_value(s, "epsilon", 0), shared = counts[i], unique = fmax(counts[n + i], least);
        double ratio = shared > 0 ? shared / unique : 0;
        g->stats[i] = 1 + obm__steps_value(s, "r", 0) * fmin(ratio, obm__steps_value(s, "alpha", 0));
    }
    obm_free(counts);
    return status;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(factors_of(run, &groups[i], err));
    return OBM_OK;
}

static const obm__custom ramplus_custom = {.prepare = prepare, .merge = merge};
static const obm_param_info ramplus_params[] = {
    OBM_PARAM_ROW("r", "how much the share of shared changes adds to the factor of unique ones", OBM_PARAM_GLOBAL,
                  false, 0.1, -INFINITY, INFINITY, false),
    OBM_PARAM_ROW("alpha", "the largest share that counts", OBM_PARAM_GLOBAL, false, 0.2, 0, INFINITY, false),
    EPSILON,
};

const obm__method obm__method_ramplus_tl = {
    .info = {"ramplus_tl", "ram with unique changes enlarged by the share of shared ones in the tensor", SOURCE,
             ramplus_params, OBM_COUNT(ramplus_params), true, 1, 0},
    .deltas = true,
    .cost = 8,
    .custom = &ramplus_custom,
};
