/*
 * The element pipeline: the statistics pass in front (trims, norms, majority sign) and the merge of a range of
 * elements.
 *
 * Everything is f32 in the order of the models, so a value depends on its element alone; the output is rounded once.
 */
#include "merge.h"

/* mergekit does not rescale what has practically no norm, and does not divide by practically no weight. */
#define LEAST_NORM 1e-7
#define LEAST_WEIGHT 1e-8f

/* One worker's lanes, OBM_MERGE_BLOCK floats each; deltas: (n_models, OBM_MERGE_BLOCK). */
typedef struct lanes {
    float *base, *scratch, *sum, *mixed, *divisor, *deltas;
} lanes;
#define FIXED_LANES 5

size_t obm__group_scratch(size_t n_models) { return (FIXED_LANES + n_models) * OBM_MERGE_BLOCK * sizeof(float); }

static lanes worker_lanes(float *block, size_t n_models, int worker) {
    float *p = block + (size_t)worker * (FIXED_LANES + n_models) * OBM_MERGE_BLOCK;
    return (lanes){p,
                   p + OBM_MERGE_BLOCK,
                   p + 2 * OBM_MERGE_BLOCK,
                   p + 3 * OBM_MERGE_BLOCK,
                   p + 4 * OBM_MERGE_BLOCK,
                   p + 5 * OBM_MERGE_BLOCK};
}

/* A parallel walk over the blocks of one group. */
typedef struct walk {
    const obm_kernels *k;
    const obm__group *g;
    uint64_t begin, end;
    uint64_t at, until;     /* the span in work; blocks count from `at` */
    float *block;           /* (workers) lanes */
    double *before, *after; /* L1 norms: (n_models, blocks) */
    int64_t *votes;         /* elected signs: (workers) */
    obm_dtype dtype;
    char *out;
    _Atomic uint64_t bad;
} walk;

static size_t block_length(const walk *w, uint64_t begin) {
    return w->until - begin < OBM_MERGE_BLOCK ? (size_t)(w->until - begin) : OBM_MERGE_BLOCK;
}

static uint64_t block_begin(const walk *w, size_t block) { return w->at + (uint64_t)block * OBM_MERGE_BLOCK; }

static obm_status walk_spans(const obm__run *run, walk *w, obm__range_fn fn, obm_error *err) {
    for (w->at = w->begin; w->at < w->end; w->at = w->until) {
        w->until = w->end - w->at < OBM_MERGE_SPAN ? w->end : w->at + OBM_MERGE_SPAN;
        obm__parallel(run->ctx, (size_t)((w->until - w->at + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK), 1, fn, w);
        if (w->bad != UINT64_MAX) return obm__group_bad(w->k, w->g, w->bad, err);
        obm__group_release(w->g, w->at, w->until - w->at);
        OBM_TRY(obm__run_report(run, err));
    }
    return OBM_OK;
}

static obm_status walk_blocks(const obm__run *run, walk *w, obm__range_fn fn, obm_error *err) {
    size_t threads = (size_t)run->ctx->threads, bytes = obm__group_scratch(w->g->steps->n);
    w->k = run->ctx->k;
    w->bad = UINT64_MAX;
    w->block = obm__alloc(threads, bytes);
    if (!w->block) return obm__fail_nomem(err, (uint64_t)threads * bytes);
    obm_status status = walk_spans(run, w, fn, err);
    obm_free(w->block);
    return status;
}

/* ---- mask and rescale ---- */

static void mask_delta(const obm__group *g, size_t model, uint64_t begin, float *d, size_t n) {
    const obm__steps *s = g->steps;
    if (s->mask == OBM_MASK_MAGNITUDE) {
        obm__cut_apply(&g->cuts[model], begin / OBM_MERGE_BLOCK, d, n);
    } else if (s->mask == OBM_MASK_RANDOM && s->density[model] < 1) {
        obm__random_mask(obm__random_key(s->seed, g->name, model), begin, s->density[model], d, n);
    }
}

static void scale(float *d, float factor, size_t n) {
    if (factor == 1.0f) return;
    for (size_t j = 0; j < n; j++) d[j] *= factor;
}

/* Base and masked, rescaled deltas of one block.  Returns the first index that is not finite, n if all are. */
static size_t load_block(const walk *w, const lanes *l, uint64_t begin, size_t n) {
    const obm__group *g = w->g;
    size_t first = n;
    obm__group_base(w->k, g, begin, n, l->base, l->scratch);
    for (size_t i = 0; i < g->steps->n; i++) {
        float *d = l->deltas + i * OBM_MERGE_BLOCK;
        size_t bad = obm__group_delta(w->k, g, i, begin, n, l->base, d, l->scratch);
        if (bad < first) first = bad;
        mask_delta(g, i, begin, d, n);
        scale(d, g->factors[i], n);
    }
    return first;
}

/* ---- consensus and reduction ---- */

/* What each model brings to the election of element j: its weighted delta, or the delta itself. */
static void sum_election(const walk *w, const lanes *l, size_t n) {
    const obm__steps *s = w->g->steps;
    memset(l->sum, 0, n * sizeof *l->sum);
    for (size_t i = 0; i < s->n; i++)
        w->k->axpy_f32(l->sum, s->weighted_election ? s->weight[i] : 1.0f, l->deltas + i * OBM_MERGE_BLOCK, n);
}

/* sum(w d) and sum(w) over the models whose sign is the elected one; zeros agree with nobody. */
static void reduce_agreeing(const walk *w, const lanes *l, size_t n) {
    const obm__steps *s = w->g->steps;
    float zero_sign = w->g->zero_sign;
    for (size_t j = 0; j < n; j++) {
        l->sum[j] = l->sum[j] == 0 ? zero_sign : l->sum[j];
        l->mixed[j] = l->divisor[j] = 0;
    }
    for (size_t i = 0; i < s->n; i++) {
        const float *d = l->deltas + i * OBM_MERGE_BLOCK;
        float weight = s->weight[i], vote = s->weighted_election ? weight : 1.0f;
        for (size_t j = 0; j < n; j++) {
            uint32_t e = obm__bits_of(vote * d[j]), elected = obm__bits_of(l->sum[j]);
            bool agrees = (((e ^ elected) >> 31) == 0) & (e << 1 != 0);
            l->mixed[j] += obm__keep_if(weight * d[j], agrees);
            l->divisor[j] += obm__keep_if(weight, agrees);
        }
    }
    for (size_t j = 0; s->normalize && j < n; j++) l->mixed[j] /= l->divisor[j] == 0 ? 1.0f : l->divisor[j];
}

static void reduce_all(const walk *w, const lanes *l, size_t n) {
    const obm__steps *s = w->g->steps;
    float divisor = 0;
    memset(l->mixed, 0, n * sizeof *l->mixed);
    for (size_t i = 0; i < s->n; i++) {
        w->k->axpy_f32(l->mixed, s->weight[i], l->deltas + i * OBM_MERGE_BLOCK, n);
        divisor += s->weight[i];
    }
    if (s->deltas && fabsf(divisor) < LEAST_WEIGHT) divisor = 1;
    for (size_t j = 0; s->normalize && j < n; j++) l->mixed[j] /= divisor;
}

static void add_base(const obm__steps *s, const lanes *l, size_t n) {
    if (s->lambda != 1.0f) scale(l->mixed, s->lambda, n);
    for (size_t j = 0; s->deltas && j < n; j++) l->mixed[j] = l->base[j] + l->mixed[j];
}

/* Writes the block and returns the first index that became NaN or Inf, n if none; x is overwritten. */
static size_t store_block(const walk *w, uint64_t begin, float *x, size_t n) {
    size_t size = obm_dtype_size(w->dtype);
    char *out = w->out + (begin - w->begin) * size;
    obm__narrow(w->k, w->dtype, x, (int64_t)n, out);
    if (w->dtype == OBM_BF16) w->k->bf16_to_f32(x, (const uint16_t *)out, n);
    if (w->dtype == OBM_F16) w->k->f16_to_f32(x, (const uint16_t *)out, n);
    return w->k->find_nonfinite(x, n);
}

static void merge_blocks(void *arg, size_t first, size_t last, int worker) {
    walk *w = arg;
    const obm__steps *s = w->g->steps;
    lanes l = worker_lanes(w->block, s->n, worker);
    for (size_t b = first; b < last; b++) {
        uint64_t begin = block_begin(w, b);
        size_t n = block_length(w, begin), bad = load_block(w, &l, begin, n);
        if (s->consensus == OBM_CONSENSUS_SIGN) {
            sum_election(w, &l, n);
            reduce_agreeing(w, &l, n);
        } else {
            reduce_all(w, &l, n);
        }
        add_base(s, &l, n);
        size_t overflow = store_block(w, begin, l.mixed, n);
        if (overflow < bad) bad = overflow;
        if (bad < n) obm__note_lowest(&w->bad, begin + bad);
    }
}

obm_status obm__run_report(const obm__run *run, obm_error *err) {
    if (!run->progress || run->progress(run->user, run->what, run->done, run->total) == 0) return OBM_OK;
    return obm__fail(err, OBM_E_USER, "%s: stopped by the progress callback", run->what);
}

obm_status obm__group_run(const obm__run *run, const obm__group *g, uint64_t begin, uint64_t n, obm_dtype dtype,
                          void *out, obm_error *err) {
    walk w = {.g = g, .begin = begin, .end = begin + n, .dtype = dtype, .out = out};
    return walk_blocks(run, &w, merge_blocks, err);
}

/* ---- statistics ---- */

static void norm_blocks(void *arg, size_t first, size_t last, int worker) {
    walk *w = arg;
    const obm__group *g = w->g;
    size_t blocks = (size_t)((g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
    lanes l = worker_lanes(w->block, g->steps->n, worker);
    for (size_t b = first; b < last; b++) {
        uint64_t begin = block_begin(w, b);
        size_t n = block_length(w, begin);
        obm__group_base(w->k, g, begin, n, l.base, l.scratch);
        for (size_t i = 0; i < g->steps->n; i++) {
            size_t bad = obm__group_delta(w->k, g, i, begin, n, l.base, l.deltas, l.scratch);
            if (bad < n) obm__note_lowest(&w->bad, begin + bad);
            w->before[i * blocks + begin / OBM_MERGE_BLOCK] = w->k->abs_sum(l.deltas, n);
            mask_delta(g, i, begin, l.deltas, n);
            w->after[i * blocks + begin / OBM_MERGE_BLOCK] = w->k->abs_sum(l.deltas, n);
        }
    }
}

/* Factors that give every masked delta the L1 norm it had. */
static obm_status norm_factors(const obm__run *run, obm__group *g, obm_error *err) {
    size_t n = g->steps->n, blocks = (size_t)((g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
    walk w = {.g = g, .end = g->count};
    w.before = obm__alloc(2 * n * blocks, sizeof *w.before);
    if (!w.before) return obm__fail_nomem(err, 2 * n * blocks * sizeof *w.before);
    w.after = w.before + n * blocks;
    obm_status status = walk_blocks(run, &w, norm_blocks, err);
    for (size_t i = 0; status == OBM_OK && i < n; i++) {
        double before = obm__tree_sum(w.before + i * blocks, blocks),
               after = obm__tree_sum(w.after + i * blocks, blocks);
        g->factors[i] = before < LEAST_NORM || after < LEAST_NORM ? 1.0f : (float)(before / after);
    }
    obm_free(w.before);
    return status;
}

static obm_status find_factors(const obm__run *run, obm__group *g, obm_error *err) {
    const obm__steps *s = g->steps;
    for (size_t i = 0; i < s->n; i++) {
        g->factors[i] = 1.0f;
        if (s->rescale == OBM_RESCALE_INVERSE_DENSITY && s->density[i] > 0 && s->density[i] < 1)
            g->factors[i] = (float)(1.0 / s->density[i]);
    }
    return s->rescale == OBM_RESCALE_L1 && s->mask != OBM_MASK_NONE ? norm_factors(run, g, err) : OBM_OK;
}

static void vote_blocks(void *arg, size_t first, size_t last, int worker) {
    walk *w = arg;
    lanes l = worker_lanes(w->block, w->g->steps->n, worker);
    for (size_t b = first; b < last; b++) {
        uint64_t begin = block_begin(w, b);
        size_t n = block_length(w, begin), bad = load_block(w, &l, begin, n);
        if (bad < n) obm__note_lowest(&w->bad, begin + bad);
        sum_election(w, &l, n);
        int64_t votes = 0;
        for (size_t j = 0; j < n; j++) votes += (l.sum[j] > 0) - (l.sum[j] < 0);
        w->votes[worker] += votes;
    }
}

/* The sign of the sum of all elected signs (Yadav et al., the authors' code: resolve_zero_signs); a sum
 * of 0 gives +1. */
static obm_status find_majority(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    int64_t *votes = obm__calloc((size_t)run->ctx->threads, sizeof *votes), sum = 0;
    if (!votes) return obm__fail_nomem(err, (uint64_t)run->ctx->threads * sizeof *votes);
    obm_status status = OBM_OK;
    for (size_t i = 0; status == OBM_OK && i < n_groups; i++) {
        walk w = {.g = &groups[i], .end = groups[i].count, .votes = votes};
        status = walk_blocks(run, &w, vote_blocks, err);
    }
    for (int t = 0; t < run->ctx->threads; t++) sum += votes[t];
    obm_free(votes);
    for (size_t i = 0; i < n_groups; i++) groups[i].zero_sign = sum < 0 ? -1.0f : 1.0f;
    return status;
}

/* max(1, int(density * n)) elements stay, as the double product truncates. */
static obm_status find_cuts(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    const obm__steps *s = groups[0].steps;
    uint64_t count = 0;
    for (size_t i = 0; i < n_groups; i++) count += groups[i].count;
    for (size_t m = 0; m < s->n; m++) {
        double density = s->density[m];
        if (density > 0 && density < 1 && count > 0) {
            uint64_t keep = (uint64_t)(density * (double)count);
            OBM_TRY(obm__select(run, groups, n_groups, m, keep ? keep : 1, err));
            continue;
        }
        for (size_t i = 0; i < n_groups; i++) groups[i].cuts[m] = (obm__cut){.all = density >= 1, .none = density <= 0};
    }
    return OBM_OK;
}

static obm_status group_prepare(obm__group *g, obm_error *err) {
    g->zero_sign = 1.0f;
    g->cuts = obm__calloc(g->steps->n, sizeof *g->cuts);
    g->factors = obm__calloc(g->steps->n, sizeof *g->factors);
    return g->cuts && g->factors ? OBM_OK : obm__fail_nomem(err, g->steps->n * (sizeof *g->cuts + sizeof *g->factors));
}

obm_status obm__statistics(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    if (n_groups == 0) return OBM_OK;
    const obm__steps *s = groups[0].steps;
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(group_prepare(&groups[i], err));
    if (s->mask == OBM_MASK_MAGNITUDE) OBM_TRY(find_cuts(run, groups, n_groups, err));
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(find_factors(run, &groups[i], err));
    return s->consensus == OBM_CONSENSUS_SIGN && s->majority_zero ? find_majority(run, groups, n_groups, err) : OBM_OK;
}

void obm__group_clear(obm__group *g) {
    for (size_t i = 0; g->cuts && i < g->steps->n; i++) obm_free(g->cuts[i].before);
    obm_free(g->cuts);
    obm_free(g->factors);
    g->cuts = NULL;
    g->factors = NULL;
}
