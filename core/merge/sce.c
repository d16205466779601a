/* sce: select the elements in which the models vary most, weight the task vectors by their mean squares, erase what is
 * against the sign of the sum. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_ROW("select_topk", "share of the varying elements kept, those of the largest variance", OBM_PARAM_GLOBAL,
                  false, 1, 0, 1, false),
    OBM_PARAM_BOOL("select_weights_only",
                   "the selection counts for the weights alone, as in the authors' own code, not for the merge", 0),
    OBM_PARAM_SCOPE,
    OBM_PARAM_INT8_MASK,
};

/* mergekit weights all models alike where their mean squares add up to less, and divides by no less weight. */
#define LEAST 1e-6

/* The variance over the models: sum of the squared differences of all pairs / n^2, which is 0 iff all are equal. */
static void score(const obm__block *b, float least, float *out) {
    (void)least;
    size_t n = b->g->steps->n;
    for (size_t j = 0; j < b->n; j++) {
        double sum = 0;
        for (size_t a = 0; a < n; a++) {
            for (size_t c = 0; c < a; c++) {
                double x = (double)obm__block_delta(b, a)[j] - (double)obm__block_delta(b, c)[j];
                sum += x * x;
            }
        }
        out[j] = (float)(sum / ((double)n * (double)n));
    }
}

/* 1 where an element is selected, into b->sum.  What is selected has a score above 0. */
static void selection(const obm__block *b) {
    const obm__cut *cut = &b->g->cuts[0];
    if (!cut->all && !cut->none) {
        score(b, 0, b->sum);
        obm__cut_apply(b->k, cut, b->begin / OBM_MERGE_BLOCK, b->sum, b->n);
    }
    for (size_t j = 0; j < b->n; j++) b->sum[j] = cut->all || (!cut->none && b->sum[j] != 0);
}

static void count_varying(const obm__block *b, const void *arg, double *sums) {
    (void)arg;
    score(b, 0, b->sum);
    for (size_t j = 0; j < b->n; j++) sums[0] += b->sum[j] != 0;
}

static void add_squares(const obm__block *b, const void *arg, double *sums) {
    (void)arg;
    selection(b);
    for (size_t i = 0; i < b->g->steps->n; i++) {
        float *d = obm__block_delta(b, i);
        for (size_t j = 0; j < b->n; j++) d[j] = obm__keep_if(d[j], b->sum[j] != 0);
        sums[i] += b->k->dot(d, d, b->n);
    }
}

static obm_status select_varying(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    double topk = obm__steps_value(groups[0].steps, "select_topk", 0), varying = 0;
    for (size_t i = 0; topk > 0 && topk < 1 && i < n_groups; i++) {
        double here;
        OBM_TRY(obm__group_sums(run, &groups[i], 1, count_varying, NULL, &here, err));
        varying += here;
    }
    uint64_t keep = (uint64_t)(topk * varying);
    for (size_t i = 0; i < n_groups; i++) groups[i].cuts[0] = (obm__cut){.all = topk >= 1, .none = topk < 1};
    return topk < 1 && keep > 0 ? obm__select(run, groups, n_groups, OBM_BY_SCORE, keep, err) : OBM_OK;
}

/* Means over the elements of the scope, then shares of their sum. */
static void weigh(obm__group *groups, size_t n_groups, const double *squares, uint64_t count) {
    const obm__steps *s = groups[0].steps;
    double sum = 0;
    for (size_t m = 0; m < s->n; m++) sum += squares[m] / (double)(count ? count : 1);
    bool even = s->paper ? sum == 0 : sum < LEAST;
    for (size_t i = 0; i < n_groups; i++)
        for (size_t m = 0; m < s->n; m++)
            groups[i].stats[m] = even ? 1 / (double)s->n : squares[m] / (double)count / sum;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    size_t n = groups[0].steps->n;
    uint64_t count = 0;
    OBM_TRY(select_varying(run, groups, n_groups, err));
    double *squares = obm__calloc(2 * n, sizeof *squares);
    obm_status status = squares && n <= OBM_MAX_SUMS ? OBM_OK : obm__fail_nomem(err, 2 * n * sizeof *squares);
    for (size_t i = 0; status == OBM_OK && i < n_groups; i++) {
        groups[i].stats = obm__calloc(n, sizeof *groups[i].stats);
        status = groups[i].stats ? obm__group_sums(run, &groups[i], n, add_squares, NULL, squares + n, err)
                                 : obm__fail_nomem(err, n * sizeof *groups[i].stats);
        for (size_t m = 0; m < n; m++) squares[m] += squares[n + m];
        count += groups[i].count;
    }
    if (status == OBM_OK) weigh(groups, n_groups, squares, count);
    obm_free(squares);
    return status;
}

static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    const double *weight = b->g->stats;
    bool whole = obm__steps_value(s, "select_weights_only", 0) != 0;
    selection(b);
    for (size_t j = 0; j < b->n; j++) {
        double vote = 0, sum = 0, mass = 0;
        for (size_t i = 0; i < s->n && (whole || b->sum[j] != 0); i++) vote += obm__block_delta(b, i)[j];
        for (size_t i = 0; i < s->n && (whole || b->sum[j] != 0); i++) {
            double d = obm__block_delta(b, i)[j];
            if (d == 0 || (d > 0) != (vote >= 0)) continue;
            sum += weight[i] * d;
            mass += weight[i];
        }
        double least = s->paper ? 0 : LEAST;
        b->mixed[j] = (float)(b->base[j] + (mass > 0 || least > 0 ? sum / fmax(mass, least) : 0));
    }
}

static const obm__custom custom = {.prepare = prepare, .score = score, .merge = merge};

const obm__method obm__method_sce = {
    .info = {"sce", "select what varies, weight by mean squares, erase minority signs",
             "Wan et al., FuseChat, arXiv 2408.07990, section 3.3", params, OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .tensor_statistics = true,
    .cost = 10,
    .custom = &custom,
};
