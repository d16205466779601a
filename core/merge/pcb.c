/* pcb: task vectors scaled element by element by what each parameter is worth against the others of its model and of
 * the other models; only the best share of every model takes part. */
#include "merge.h"

static const obm_param_info params[] = {
    OBM_PARAM_FACTOR("factor of this model"),
    OBM_PARAM_ROW(
        "variant",
        "competition between models by tanh(d * sum of d) (1), or by the sum of tanh(n * n') of the normalised "
        "task vectors, which no scale changes (2)",
        OBM_PARAM_GLOBAL, false, 2, 1, 2, false),
    OBM_PARAM_ROW("ratio", "share of each model's elements that take part; -1: 0.1 in variant 1, 0.05 in variant 2",
                  OBM_PARAM_GLOBAL, false, -1, -1, 1, false),
    OBM_PARAM_ROW("quantile",
                  "magnitudes are cut at this quantile and at 1 - it; -1: 0.0001 in variant 1, 0.01 in variant 2",
                  OBM_PARAM_GLOBAL, false, -1, -1, 0.5, false),
    OBM_PARAM_ROW("scope", "quantiles over each tensor (0, `tensor`) or the whole model (1, `model`)", OBM_PARAM_GLOBAL,
                  false, 1, 0, 1, false),
};

/* stats: the model whose scores are ranked, their sign (scores have to be >= 0), then of each model: */
#define HEAD 2
enum { LOW, HIGH, THRESHOLD, LARGEST, LEAST, PER_MODEL };

static const double *stats_of(const obm__block *b, size_t model) { return b->g->stats + HEAD + model * PER_MODEL; }

static bool is_first(const obm__steps *s) { return obm__steps_value(s, "variant", 0) == 1; }

static double setting(const obm__steps *s, const char *name, double first, double second) {
    double x = obm__steps_value(s, name, 0);
    return x >= 0 ? x : is_first(s) ? first : second;
}

static double clamped(double d, const double *q) {
    double size = fabs(d), high = size < q[HIGH] ? size : q[HIGH];
    return size < q[LOW] ? q[LOW] : high;
}

/* sign(d) times the clamped magnitude, scaled to [0, 1]; 0 where all magnitudes are the same. */
static double normalised(double d, const double *q) {
    return q[HIGH] > q[LOW] ? copysign((clamped(d, q) - q[LOW]) / (q[HIGH] - q[LOW]), d) : 0;
}

/* Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) cut behind 17: within 2.6e-17 of tanh up to 1,
 * where all arguments of variant 2 are.  The same bits with every C library. */
static double hyperbolic_tangent(double x) {
    double t = x * x;
    if (t > 1) return tanh(x);
    return x * (34459425 + t * (4729725 + t * (135135 + t * (990 + t)))) /
           (34459425 + t * (16216200 + t * (945945 + t * (13860 + t * 45))));
}

/* Du et al., section 3: b = exp(N * norm^2) * competition.  exp(-N) in front changes no ratio of two of them, and keeps
 * them below 1 however many models there are. */
static double within(const obm__steps *s, double norm) { return exp((double)s->n * (norm * norm - 1)); }

/* Of `count` elements, by their places in the block. */
static void balance(const obm__block *b, size_t model, const uint16_t *at, size_t count, float *out) {
    const obm__steps *s = b->g->steps;
    const float *d = obm__block_delta(b, model);
    bool first = is_first(s);
    for (size_t j = 0; j < count; j++) {
        double norm = normalised(d[at[j]], stats_of(b, model)), sum = 0;
        for (size_t u = 0; u < s->n; u++) {
            double other = obm__block_delta(b, u)[at[j]];
            sum += first ? other : hyperbolic_tangent(norm * normalised(other, stats_of(b, u)));
        }
        out[j] = (float)(within(s, norm) * (first ? hyperbolic_tangent(d[at[j]] * sum) : sum));
    }
}

/* A magnitude below which no score of the model is `least` or more: the competition is at most 1, or N * tanh(norm). 30
 * halvings, and a millionth more than the rounding to f32 gives. */
static double least_magnitude(const obm__steps *s, const double *q, double least) {
    double low = 0, high = 1;
    if (!(least > 0) || (is_first(s) && within(s, 0) >= least)) return 0;
    for (int i = 0; i < 30; i++) {
        double norm = (low + high) / 2, most = within(s, norm) * (is_first(s) ? 1 : (double)s->n * tanh(norm));
        if (most * (1 + 1e-6) < least)
            low = norm;
        else
            high = norm;
    }
    return q[LOW] + fmax(low - 1e-6, 0) * (q[HIGH] - q[LOW]);
}

/* Places of magnitudes from `least` on among n <= OBM_MERGE_BLOCK elements from `begin`. */
static size_t find_candidates(const float *d, size_t begin, size_t n, double least, uint16_t *at) {
    size_t count = 0;
    for (size_t j = begin; j < begin + n; j++) {
        at[count] = (uint16_t)j;
        count += fabs((double)d[j]) >= least;
    }
    return count;
}

static void score(const obm__block *b, float least, float *out) {
    size_t model = (size_t)b->g->stats[0];
    float sign = (float)b->g->stats[1], found[OBM_MERGE_PART];
    double magnitude = least_magnitude(b->g->steps, stats_of(b, model), least);
    for (size_t begin = 0; begin < b->n; begin += OBM_MERGE_PART) {
        uint16_t at[OBM_MERGE_PART];
        size_t n = b->n - begin < OBM_MERGE_PART ? b->n - begin : OBM_MERGE_PART;
        size_t count = find_candidates(obm__block_delta(b, model), begin, n, magnitude, at);
        balance(b, model, at, count, found);
        memset(out + begin, 0, n * sizeof *out);
        for (size_t j = 0; j < count; j++) out[at[j]] = fmaxf(sign * found[j], 0);
    }
}

static obm_status ranked(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, double sign,
                         uint64_t n, float *out, obm_error *err) {
    for (size_t i = 0; i < n_groups; i++) {
        groups[i].stats[0] = (double)model;
        groups[i].stats[1] = sign;
    }
    return obm__select_value(run, groups, n_groups, OBM_BY_SCORE, n, out, err);
}

/* The n-th largest of `count` scores.  Where it is not above 0 it is the n-th smallest of the negated ones that are cut
 * off at 0, since those above 0 come first in either order. */
static obm_status find_score(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n,
                             uint64_t count, double *out, obm_error *err) {
    float x;
    OBM_TRY(ranked(run, groups, n_groups, model, 1, n, &x, err));
    *out = x;
    if (x > 0) return OBM_OK;
    OBM_TRY(ranked(run, groups, n_groups, model, -1, count - n + 1, &x, err));
    *out = -(double)x;
    return OBM_OK;
}

static void keep_stat(obm__group *groups, size_t n_groups, size_t model, int which, double value) {
    for (size_t i = 0; i < n_groups; i++) groups[i].stats[HEAD + model * PER_MODEL + (size_t)which] = value;
}

/* The element at floor(share * count) + shift from the smallest, counted from the largest, from 1 (the authors' clamp).
 */
static uint64_t from_largest(double share, uint64_t count, double shift) {
    double index = share * (double)count + shift;
    uint64_t i = index > 0 ? (uint64_t)index : 0;
    return i < count ? count - i : 1;
}

static obm_status find_magnitudes(const obm__run *run, obm__group *groups, size_t n_groups, size_t model,
                                  uint64_t count, obm_error *err) {
    double quantile = setting(groups[0].steps, "quantile", 1e-4, 0.01);
    float low, high;
    OBM_TRY(obm__select_value(run, groups, n_groups, model, from_largest(quantile, count, 0), &low, err));
    OBM_TRY(obm__select_value(run, groups, n_groups, model, from_largest(1 - quantile, count, -1), &high, err));
    keep_stat(groups, n_groups, model, LOW, low);
    keep_stat(groups, n_groups, model, HIGH, high);
    return OBM_OK;
}

static obm_status find_scores(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t count,
                              obm_error *err) {
    double ratio = setting(groups[0].steps, "ratio", 0.1, 0.05), threshold, largest;
    OBM_TRY(find_score(run, groups, n_groups, model, from_largest(1 - ratio, count, 0), count, &threshold, err));
    OBM_TRY(find_score(run, groups, n_groups, model, 1, count, &largest, err));
    keep_stat(groups, n_groups, model, THRESHOLD, threshold);
    keep_stat(groups, n_groups, model, LARGEST, largest);
    const double *q = groups[0].stats + HEAD + model * PER_MODEL;
    keep_stat(groups, n_groups, model, LEAST, least_magnitude(groups[0].steps, q, threshold));
    return OBM_OK;
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    size_t n = groups[0].steps->n, numbers = HEAD + n * PER_MODEL;
    uint64_t count = 0;
    for (size_t i = 0; i < n_groups; i++) {
        groups[i].stats = obm__calloc(numbers, sizeof *groups[i].stats);
        if (!groups[i].stats) return obm__fail_nomem(err, numbers * sizeof *groups[i].stats);
        count += groups[i].count;
    }
    for (size_t m = 0; count > 0 && m < n; m++) OBM_TRY(find_magnitudes(run, groups, n_groups, m, count, err));
    for (size_t m = 0; count > 0 && m < n; m++) OBM_TRY(find_scores(run, groups, n_groups, m, count, err));
    return OBM_OK;
}

/* 0 at and below the threshold, 1 at the largest. */
static double scale_of(double x, const double *q) {
    return x > q[THRESHOLD] && q[LARGEST] > q[THRESHOLD] ? (x - q[THRESHOLD]) / (q[LARGEST] - q[THRESHOLD]) : 0;
}

typedef struct part {
    size_t begin, n;
    double sum[OBM_MERGE_PART], mass[OBM_MERGE_PART];
} part;

static void add_model(const obm__block *b, part *p, size_t model, double weight) {
    const double *q = stats_of(b, model);
    const float *d = obm__block_delta(b, model);
    float found[OBM_MERGE_PART];
    uint16_t at[OBM_MERGE_PART];
    size_t count = find_candidates(d, p->begin, p->n, q[LEAST], at);
    balance(b, model, at, count, found);
    for (size_t j = 0; j < count; j++) {
        double x = d[at[j]], scale = scale_of(found[j], q);
        p->sum[at[j] - p->begin] += weight * copysign(clamped(x, q), x) * (x == 0 ? 0 : scale);
        p->mass[at[j] - p->begin] += scale;
    }
}

static void merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    /* s->weight is rounded to f32 */
    const double *weight = s->values + (size_t)(obm__method_param(s->method, "weight") - s->method->info.params) * s->n;
    for (size_t begin = 0; begin < b->n; begin += OBM_MERGE_PART) {
        part p = {.begin = begin, .n = b->n - begin < OBM_MERGE_PART ? b->n - begin : OBM_MERGE_PART};
        for (size_t i = 0; i < s->n; i++) add_model(b, &p, i, weight[i]);
        for (size_t j = 0; j < p.n; j++)
            b->mixed[begin + j] = (float)(b->base[begin + j] + p.sum[j] / fmax(p.mass[j], 1e-12));
    }
}

static obm_status check(const obm__steps *s, obm_error *err) {
    double variant = obm__steps_value(s, "variant", 0);
    if (variant == 1 || variant == 2) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "pcb: variant: expected 1 or 2, found %g", variant);
}

static const obm__custom custom = {.check = check, .prepare = prepare, .score = score, .merge = merge};

const obm__method obm__method_pcb = {
    .info = {"pcb", "task vectors scaled by parameter competition within and between the models",
             "Du et al., Parameter Competition Balancing for Model Merging, arXiv 2410.02396, section 3", params,
             OBM_COUNT(params), true, 1, 0},
    .deltas = true,
    .f32_deltas = true,
    .cost = 80,
    .custom = &custom,
};
