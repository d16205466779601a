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
#define SPAN_BLOCKS ((size_t)(OBM_MERGE_SPAN / OBM_MERGE_BLOCK))

size_t obm__group_scratch(size_t n_models) {
    return obm__whole_pages((OBM_BLOCK_LANES + n_models) * OBM_MERGE_BLOCK * sizeof(float));
}

/* A parallel walk over the blocks of one group. */
typedef struct walk {
    const obm_kernels *k;
    const obm__group *g;
    uint64_t begin, end;
    uint64_t at, until;        /* the span in work; blocks count from `at` */
    float *block;              /* (workers) lanes */
    uint32_t *least;           /* (workers, n_models) */
    float *ones;               /* (n_models) */
    obm__ranked *ranked;       /* masks by rank of the span; NULL for other masks */
    obm__ranked **keep_ranked; /* nullable: where they stay after a walk over the whole group */
    bool tiled;                /* blocks that are divisible take one pass over the files' bytes */
    double *before, *after;    /* L1 norms: (n_models, blocks) */
    bool by_sizes;             /* norms from the patterns of bf16 deltas, without the deltas themselves */
    int64_t *votes;            /* elected signs: (workers) */
    obm__sums_fn sums;         /* what to add up, of `arg`: */
    const void *arg;
    size_t n_sums;
    double *partial, *total; /* (OBM_MERGE_SPAN / OBM_MERGE_BLOCK, n_sums) of the span; (n_sums) */
    obm_dtype dtype;
    char *out;
    _Atomic uint64_t bad;
} walk;

static void set_block(const walk *w, size_t block, obm__block *b) {
    b->begin = w->at + (uint64_t)block * OBM_MERGE_BLOCK;
    b->n = w->until - b->begin < OBM_MERGE_BLOCK ? (size_t)(w->until - b->begin) : OBM_MERGE_BLOCK;
}

static obm_status walk_spans(const obm__run *run, walk *w, obm__range_fn fn, obm_error *err) {
    for (w->at = w->begin; w->at < w->end; w->at = w->until) {
        w->until = w->end - w->at < OBM_MERGE_SPAN ? w->end : w->at + OBM_MERGE_SPAN;
        size_t blocks = (size_t)((w->until - w->at + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
        if (w->ranked && w->ranked != w->g->ranked)
            OBM_TRY(obm__ranked_fill(run, w->ranked, w->g, w->at, w->until, w->block, err));
        obm__parallel(run->ctx, blocks, 1, fn, w);
        if (w->bad != UINT64_MAX) return obm__group_bad(w->k, w->g, w->bad, err);
        for (size_t i = 0; i < w->n_sums; i++) w->total[i] += obm__tree_sum(w->partial + i * SPAN_BLOCKS, blocks);
        obm__group_release(w->g, w->at, w->until - w->at);
        OBM_TRY(obm__run_report(run, err));
    }
    return OBM_OK;
}

static bool is_ranked(const obm__steps *s) {
    bool any = false;
    for (size_t i = 0; i < s->n; i++) any |= s->density[i] > 0 && s->density[i] < 1;
    return any && s->mask == OBM_MASK_RANKED;
}

static obm_status walk_blocks(const obm__run *run, walk *w, obm__range_fn fn, obm_error *err) {
    size_t threads = (size_t)run->ctx->threads, bytes = obm__group_scratch(w->g->steps->n);
    obm_status status = OBM_OK;
    w->k = run->ctx->k;
    w->bad = UINT64_MAX;
    w->block = obm__desks_new(run->ctx, bytes);
    w->least = obm__alloc(threads * w->g->steps->n, sizeof *w->least);
    w->ones = obm__alloc(w->g->steps->n, sizeof *w->ones);
    if (!w->block || !w->least || !w->ones) status = obm__fail_nomem(err, (uint64_t)threads * bytes);
    for (size_t i = 0; w->ones && i < w->g->steps->n; i++) w->ones[i] = 1;
    w->ranked = w->g->ranked;
    if (status == OBM_OK && is_ranked(w->g->steps) && !w->ranked)
        status = obm__ranked_new(run, w->g, w->end - w->begin, &w->ranked, err);
    if (status == OBM_OK) status = walk_spans(run, w, fn, err);
    if (status == OBM_OK && w->keep_ranked && obm__ranked_keeps(w->g))
        *w->keep_ranked = w->ranked;
    else if (w->ranked != w->g->ranked)
        obm__ranked_free(w->ranked);
    obm__desks_free(run->ctx, w->block);
    obm_free(w->least);
    obm_free(w->ones);
    return status;
}

/* ---- mask and rescale ---- */

static void mask_delta(const walk *w, size_t model, const obm__block *b, float *d) {
    const obm__group *g = w->g;
    const obm__steps *s = g->steps;
    if (s->mask == OBM_MASK_MAGNITUDE || s->mask == OBM_MASK_OUTLIERS) {
        obm__cut_apply(w->k, &g->cuts[model], b->begin / OBM_MERGE_BLOCK, d, b->n);
        if (s->mask == OBM_MASK_MAGNITUDE || g->tops[model].none) return;
        memcpy(b->scratch, d, b->n * sizeof *d);
        obm__cut_apply(w->k, &g->tops[model], b->begin / OBM_MERGE_BLOCK, b->scratch, b->n);
        w->k->sub_f32(d, d, b->scratch, b->n); /* takes the outliers away: d - d or d - 0 */
    } else if (s->mask == OBM_MASK_RANDOM && s->density[model] < 1) {
        obm__random_mask(obm__random_key(s->seed, g->name, model), b->begin, s->density[model], d, b->n);
    } else if (s->mask == OBM_MASK_RANKED) {
        obm__ranked_apply(w->ranked, g, model, b->begin, d, b->n);
    }
}

static void scale(float *d, float factor, size_t n) {
    if (factor == 1.0f) return;
    for (size_t j = 0; j < n; j++) d[j] *= factor;
}

/* least: of each model, see obm__group_trimmed; NULL: all is kept. */
static size_t load_block(const obm__block *b, const uint32_t *least) {
    size_t first = b->n;
    obm__group_base(b->k, b->g, b->begin, b->n, b->base, b->scratch);
    if (b->g->base && !b->g->steps->deltas) first = b->k->find_nonfinite(b->base, b->n);
    for (size_t i = 0; i < b->g->steps->n; i++) {
        size_t bad = obm__group_trimmed(b->k, b->g, i, b->begin, b->n, b->base, least ? least[i] : 0,
                                        obm__block_delta(b, i), b->scratch);
        if (bad < first) first = bad;
    }
    return first;
}

size_t obm__block_load(const obm__block *b) { return load_block(b, NULL); }

/* Whether a part of the block can be masked without the rest of it; least: what trims leave, as obm__cut_least. */
static bool is_divisible(const obm__group *g, const obm__block *b, uint32_t *least) {
    for (size_t i = 0; i < g->steps->n; i++) {
        least[i] = 0;
        if (g->steps->mask == OBM_MASK_OUTLIERS) return false;
        if (g->steps->mask == OBM_MASK_MAGNITUDE &&
            !obm__cut_least(&g->cuts[i], b->begin / OBM_MERGE_BLOCK, b->n, &least[i]))
            return false;
    }
    return true;
}

/* Base and masked, rescaled deltas of a block, or of a part of one for which least is known.  Returns the first index
 * that is not finite, n if all are. */
static size_t load_part(const walk *w, const obm__block *b, const uint32_t *least) {
    const obm__steps *s = w->g->steps;
    size_t first = load_block(b, least);
    for (size_t i = 0; i < s->n; i++) {
        float *d = obm__block_delta(b, i);
        if (!least || s->mask != OBM_MASK_MAGNITUDE) mask_delta(w, i, b, d);
        scale(d, w->g->factors[i], b->n);
    }
    return first;
}

/* ---- consensus and reduction ---- */

static obm__agreement agreement_of(const walk *w, const obm__block *l) {
    const obm__steps *s = w->g->steps;
    return (obm__agreement){.deltas = l->deltas,
                            .count = s->n,
                            .stride = OBM_MERGE_BLOCK,
                            .weights = s->weight,
                            .votes = s->weighted_election ? s->weight : w->ones,
                            .base = s->deltas ? l->base : NULL,
                            .lambda = s->lambda,
                            .zero_sign = w->g->zero_sign,
                            .normalize = s->normalize,
                            .divisor = 1};
}

static float divisor_of(const obm__steps *s) {
    float divisor = 0;
    for (size_t i = 0; i < s->n; i++) divisor += s->weight[i];
    if (s->deltas && fabsf(divisor) < LEAST_WEIGHT) divisor = 1;
    return s->normalize ? divisor : 1;
}

static void reduce_all(const walk *w, const obm__block *l, size_t n) {
    obm__agreement a = agreement_of(w, l);
    a.divisor = divisor_of(w->g->steps);
    w->k->sum_f32(l->mixed, &a, n);
}

/* sum(w d) and sum(w) over the models whose sign is the elected one; zeros agree with nobody. */
static void reduce_agreeing(const walk *w, const obm__block *l, size_t n) {
    obm__agreement a = agreement_of(w, l);
    w->k->agree_f32(l->mixed, &a, n);
}

size_t obm__store_block(const obm_kernels *k, obm_dtype dtype, float *x, size_t n, void *out) {
    if (dtype == OBM_BF16) return k->store_bf16(out, x, n);
    obm__narrow(k, dtype, x, (int64_t)n, out);
    if (dtype == OBM_F16) k->f16_to_f32(x, out, n);
    return k->find_nonfinite(x, n);
}

/* ---- bf16 in one pass ---- */

/* Every input is bf16 as it lies in the files, and nothing but trims and drawn masks stands between its deltas and
 * their sum. */
static bool is_tiled(const obm__group *g) {
    const obm__steps *s = g->steps;
    const obm__custom *custom = s->method->custom;
    if ((custom && custom->merge) || s->n > OBM__TILE_MODELS || s->deltas != (g->base != NULL)) return false;
    if (s->mask == OBM_MASK_OUTLIERS || (s->mask == OBM_MASK_RANKED && s->rescale == OBM_RESCALE_INVERSE_DENSITY))
        return false;
    for (size_t i = 0; i < s->n; i++)
        if (!obm__group_is_plain(g, i)) return false;
    return true;
}

typedef struct tile_room {
    const uint16_t *models[OBM__TILE_MODELS];
    const uint8_t *keep[OBM__TILE_MODELS];
    uint8_t bits[OBM__TILE_MODELS][OBM_MERGE_BLOCK / 8];
} tile_room;

static bool is_drawn(const obm__steps *s) { return s->mask == OBM_MASK_RANDOM || s->mask == OBM_MASK_RANKED; }

/* What a drawn mask keeps of a block, as bits; they may be in `room`, (OBM_MERGE_BLOCK / 8). */
static const uint8_t *drawn_bits(const walk *w, size_t model, const obm__block *l, uint8_t *room) {
    const obm__steps *s = w->g->steps;
    double density = s->density[model];
    if (density <= 0 || density >= 1) return memset(room, density >= 1 ? 0xff : 0, OBM_MERGE_BLOCK / 8);
    if (s->mask == OBM_MASK_RANKED) return obm__ranked_bits(w->ranked, model, l->begin, room, l->n);
    obm__random_bits(w->k, obm__random_key(s->seed, w->g->name, model), l->begin, density, room, l->n);
    return room;
}

static obm__tile tile_of(const walk *w, const obm__block *l, const uint32_t *least, tile_room *room) {
    const obm__group *g = w->g;
    const obm__steps *s = g->steps;
    obm__tile t = {.models = room->models,
                   .count = s->n,
                   .least = least,
                   .weights = s->weight,
                   .votes = s->weighted_election ? s->weight : w->ones,
                   .lambda = s->lambda,
                   .zero_sign = g->zero_sign,
                   .divisor = divisor_of(s),
                   .agree = s->consensus == OBM_CONSENSUS_SIGN,
                   .normalize = s->normalize};
    bool drawn = is_drawn(s);
    if (drawn) t.keep = room->keep;
    for (size_t i = 0; i < s->n; i++) {
        obm__plain p = obm__group_plain(g, i, l->begin);
        room->models[i] = p.model;
        room->keep[i] = NULL;
        t.base = p.base;
        t.round = p.round;
        if (g->factors[i] != 1.0f) t.factors = g->factors;
        if (drawn && s->density[i] < 1) room->keep[i] = drawn_bits(w, i, l, room->bits[i]);
    }
    return t;
}

static size_t merge_tile(walk *w, const obm__block *l, const uint32_t *least, int worker) {
    (void)worker;
    tile_room room;
    obm__tile t = tile_of(w, l, least, &room);
    return w->k->merge_bf16((uint16_t *)(void *)w->out + (l->begin - w->begin), &t, l->n);
}

static size_t vote_tile(walk *w, const obm__block *l, const uint32_t *least, int worker) {
    tile_room room;
    obm__tile t = tile_of(w, l, least, &room);
    return w->k->vote_bf16(&w->votes[worker], &t, l->n);
}

/* Merges a block, or a part of one.  Returns the first index that is not finite, n if all are. */
static size_t merge_part(walk *w, obm__block *l, const uint32_t *least, int worker) {
    (void)worker;
    const obm__custom *custom = w->g->steps->method->custom;
    size_t bad = load_part(w, l, least);
    if (custom && custom->merge)
        custom->merge(l);
    else if (w->g->steps->consensus == OBM_CONSENSUS_SIGN)
        reduce_agreeing(w, l, l->n);
    else
        reduce_all(w, l, l->n);
    char *out = w->out + (l->begin - w->begin) * obm_dtype_size(w->dtype);
    size_t overflow = obm__store_block(w->k, w->dtype, l->mixed, l->n, out);
    return overflow < bad ? overflow : bad;
}

/* Calls fn for every part of the blocks [first, last) that can be taken alone; tile for whole blocks where it can. */
typedef size_t (*part_fn)(walk *w, obm__block *l, const uint32_t *least, int worker);
typedef size_t (*tile_fn)(walk *w, const obm__block *l, const uint32_t *least, int worker);
static void walk_parts(walk *w, part_fn fn, tile_fn tile, bool whole, size_t first, size_t last, int worker) {
    obm__block l = obm__block_of(w->block, w->k, w->g, worker);
    uint32_t *least = w->least + (size_t)worker * w->g->steps->n;
    obm__group_populate(w->g, SIZE_MAX, w->at + first * OBM_MERGE_BLOCK, w->at + last * OBM_MERGE_BLOCK);
    for (size_t b = first; b < last; b++) {
        set_block(w, b, &l);
        bool divisible = is_divisible(w->g, &l, least) && !whole;
        uint64_t end = l.begin + l.n;
        if (divisible && w->tiled) {
            size_t bad = tile(w, &l, least, worker);
            if (bad < l.n) obm__note_lowest(&w->bad, l.begin + bad);
            continue;
        }
        for (size_t step = divisible ? OBM_MERGE_PART : l.n; l.begin < end; l.begin += l.n) {
            l.n = end - l.begin < step ? (size_t)(end - l.begin) : step;
            size_t bad = fn(w, &l, divisible ? least : NULL, worker);
            if (bad < l.n) obm__note_lowest(&w->bad, l.begin + bad);
        }
    }
}

static void merge_blocks(void *arg, size_t first, size_t last, int worker) {
    walk *w = arg;
    const obm__custom *custom = w->g->steps->method->custom;
    walk_parts(w, merge_part, merge_tile, custom && custom->merge, first, last, worker);
}

obm_status obm__run_report(const obm__run *run, obm_error *err) {
    if (!run->progress || run->progress(run->user, run->what, run->done, run->total) == 0) return OBM_OK;
    return obm__fail(err, OBM_E_USER, "%s: stopped by the progress callback", run->what);
}

obm_status obm__group_run(const obm__run *run, const obm__group *g, uint64_t begin, uint64_t n, obm_dtype dtype,
                          void *out, obm_error *err) {
    const obm__custom *custom = g->steps->method->custom;
    if (custom && custom->run) return custom->run(run, g, begin, n, dtype, out, err);
    walk w = {.g = g, .begin = begin, .end = begin + n, .dtype = dtype, .out = out};
    w.tiled = dtype == OBM_BF16 && is_tiled(g);
    return walk_blocks(run, &w, merge_blocks, err);
}

/* ---- statistics ---- */

/* Norms of deltas that are bf16, before and after a drawn mask; returns the first index that is not finite. */
static size_t drawn_norms(const walk *w, size_t model, const obm__block *l, double sums[2]) {
    uint16_t sizes[OBM_MERGE_BLOCK], most;
    uint8_t room[OBM_MERGE_BLOCK / 8];
    obm__plain p = obm__group_plain(w->g, model, l->begin);
    size_t bad = w->k->sizes_bf16(sizes, &most, p.model, p.base, p.round, l->n);
    if (bad == l->n) w->k->sum_sizes(sums, sizes, drawn_bits(w, model, l, room), l->n);
    return bad;
}

/* Of deltas in f32, of a block that is loaded. */
static size_t delta_norms(const walk *w, size_t model, const obm__block *l, double sums[2]) {
    float *d = obm__block_delta(l, model);
    sums[0] = w->k->abs_sum(d, l->n);
    mask_delta(w, model, l, d);
    sums[1] = w->k->abs_sum(d, l->n);
    return l->n;
}

static void norm_blocks(void *arg, size_t first, size_t last, int worker) {
    walk *w = arg;
    size_t blocks = (size_t)((w->g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
    obm__block l = obm__block_of(w->block, w->k, w->g, worker);
    for (size_t b = first; b < last; b++) {
        set_block(w, b, &l);
        size_t bad = w->by_sizes ? l.n : obm__block_load(&l), at = (size_t)(l.begin / OBM_MERGE_BLOCK);
        for (size_t i = 0; i < w->g->steps->n; i++) {
            double sums[2] = {0};
            size_t found = w->by_sizes ? drawn_norms(w, i, &l, sums) : delta_norms(w, i, &l, sums);
            if (found < bad) bad = found;
            w->before[i * blocks + at] = sums[0];
            w->after[i * blocks + at] = sums[1];
        }
        if (bad < l.n) obm__note_lowest(&w->bad, l.begin + bad);
    }
}

/* Factors that give every masked delta the L1 norm it had. */
static obm_status norm_factors(const obm__run *run, obm__group *g, obm_error *err) {
    size_t n = g->steps->n, blocks = (size_t)((g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
    walk w = {.g = g, .end = g->count, .keep_ranked = &g->ranked};
    w.before = obm__alloc(2 * n * blocks, sizeof *w.before);
    if (!w.before) return obm__fail_nomem(err, 2 * n * blocks * sizeof *w.before);
    w.after = w.before + n * blocks;
    w.by_sizes = is_drawn(g->steps) && is_tiled(g) && obm__group_plain(g, 0, 0).round;
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
        if (s->rescale == OBM_RESCALE_INVERSE_DENSITY &&
            (s->mask == OBM_MASK_RANDOM || s->mask == OBM_MASK_MAGNITUDE) && s->density[i] > 0 && s->density[i] < 1)
            g->factors[i] = (float)(1.0 / s->density[i]);
    }
    return s->rescale == OBM_RESCALE_L1 && s->mask != OBM_MASK_NONE ? norm_factors(run, g, err) : OBM_OK;
}

/* What each model brings to the election of an element: its weighted delta, or the delta itself. */
static size_t vote_part(walk *w, obm__block *l, const uint32_t *least, int worker) {
    uint8_t bits[OBM_MERGE_BLOCK / 8];
    size_t bad = load_part(w, l, least);
    obm__agreement a = agreement_of(w, l);
    a.weights = a.votes;
    a.base = NULL;
    a.lambda = 1;
    w->k->sum_f32(l->sum, &a, l->n);
    w->k->sign_pack(bits, l->sum, l->n);
    int64_t zeros = (int64_t)w->k->count_zero(l->sum, l->n), others = 0;
    for (size_t i = 0; i < (l->n + 7) / 8; i++) others += __builtin_popcount(bits[i]);
    /* Positive ones less negative ones, of n = positive + zeros + negative and others = positive + zeros. */
    w->votes[worker] += 2 * others - zeros - (int64_t)l->n;
    return bad;
}

static void vote_blocks(void *arg, size_t first, size_t last, int worker) {
    walk_parts(arg, vote_part, vote_tile, false, first, last, worker);
}

/* The sign of the sum of all elected signs (Yadav et al., the authors' code: resolve_zero_signs); a sum
 * of 0 gives +1. */
static obm_status find_majority(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    int64_t *votes = obm__calloc((size_t)run->ctx->threads, sizeof *votes), sum = 0;
    if (!votes) return obm__fail_nomem(err, (uint64_t)run->ctx->threads * sizeof *votes);
    obm_status status = OBM_OK;
    for (size_t i = 0; status == OBM_OK && i < n_groups; i++) {
        walk w = {.g = &groups[i], .end = groups[i].count, .votes = votes};
        w.tiled = is_tiled(w.g);
        status = walk_blocks(run, &w, vote_blocks, err);
    }
    for (int t = 0; t < run->ctx->threads; t++) sum += votes[t];
    obm_free(votes);
    for (size_t i = 0; i < n_groups; i++) groups[i].zero_sign = sum < 0 ? -1.0f : 1.0f;
    return status;
}

/* max(1, int(density * n)) elements stay, as the double product truncates. */
static obm_status find_cuts(const obm__run *run, obm__group *groups, size_t n_groups, uint64_t count, obm_error *err) {
    const obm__steps *s = groups[0].steps;
    obm__pick picks[OBM__PICKS];
    size_t n = 0;
    for (size_t m = 0; m < s->n; m++) {
        double density = s->density[m];
        if (density > 0 && density < 1 && count > 0) {
            uint64_t keep = (uint64_t)(density * (double)count);
            picks[n++] = (obm__pick){m, keep ? keep : 1};
            if (n == OBM__PICKS) {
                OBM_TRY(obm__select_each(run, groups, n_groups, picks, n, err));
                n = 0;
            }
            continue;
        }
        for (size_t i = 0; i < n_groups; i++) groups[i].cuts[m] = (obm__cut){.all = density >= 1, .none = density <= 0};
    }
    return n ? obm__select_each(run, groups, n_groups, picks, n, err) : OBM_OK;
}

/* int(density * n) elements stay: those behind the int(gamma * n) largest, or behind fewer where that many are not
 * left (Davari and Belilovsky, Model Breadcrumbs, section 3; the counts as mergekit takes them). */
static obm_status find_crumbs(const obm__run *run, obm__group *groups, size_t n_groups, size_t m, uint64_t count,
                              obm_error *err) {
    const obm__steps *s = groups[0].steps;
    double density = s->density[m];
    uint64_t keep = density < 1 ? (uint64_t)(density * (double)count) : count,
             top = (uint64_t)(obm__steps_value(s, "gamma", m) * (double)count);
    if (density >= 1) top = 0;
    if (top > count - keep) top = count - keep;
    for (size_t i = 0; i < n_groups; i++) groups[i].tops[m] = (obm__cut){.none = true};
    if (top > 0 && keep > 0) {
        OBM_TRY(obm__select(run, groups, n_groups, m, top, err));
        for (size_t i = 0; i < n_groups; i++) {
            groups[i].tops[m] = groups[i].cuts[m];
            groups[i].cuts[m] = (obm__cut){0};
        }
    }
    if (keep > 0 && keep + top < count) return obm__select(run, groups, n_groups, m, keep + top, err);
    for (size_t i = 0; i < n_groups; i++) groups[i].cuts[m] = (obm__cut){.all = keep > 0, .none = keep == 0};
    return OBM_OK;
}

static obm_status find_masks(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    const obm__steps *s = groups[0].steps;
    uint64_t count = 0;
    for (size_t i = 0; i < n_groups; i++) count += groups[i].count;
    if (s->mask == OBM_MASK_MAGNITUDE) return find_cuts(run, groups, n_groups, count, err);
    for (size_t m = 0; s->mask == OBM_MASK_OUTLIERS && m < s->n; m++)
        OBM_TRY(find_crumbs(run, groups, n_groups, m, count, err));
    return OBM_OK;
}

static obm_status group_prepare(obm__group *g, obm_error *err) {
    size_t n = g->steps->n;
    g->zero_sign = 1.0f;
    g->cuts = obm__calloc(n, sizeof *g->cuts);
    g->tops = obm__calloc(n, sizeof *g->tops);
    g->factors = obm__calloc(n, sizeof *g->factors);
    return g->cuts && g->tops && g->factors ? OBM_OK
                                            : obm__fail_nomem(err, n * (2 * sizeof *g->cuts + sizeof *g->factors));
}

obm_status obm__statistics(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    if (n_groups == 0) return OBM_OK;
    const obm__steps *s = groups[0].steps;
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(group_prepare(&groups[i], err));
    OBM_TRY(find_masks(run, groups, n_groups, err));
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(find_factors(run, &groups[i], err));
    if (s->method->custom && s->method->custom->prepare) return s->method->custom->prepare(run, groups, n_groups, err);
    return s->consensus == OBM_CONSENSUS_SIGN && s->majority_zero ? find_majority(run, groups, n_groups, err) : OBM_OK;
}

obm_status obm__group_form(const obm__run *run, obm__group *g, obm_error *err) {
    const obm__custom *custom = g->steps->method->custom;
    return custom && custom->form && !g->formed && g->count ? custom->form(run, g, err) : OBM_OK;
}

void obm__group_clear(obm__group *g) {
    for (size_t i = 0; g->cuts && i < g->steps->n; i++) obm_free(g->cuts[i].before);
    for (size_t i = 0; g->tops && i < g->steps->n; i++) obm_free(g->tops[i].before);
    obm_free(g->cuts);
    obm_free(g->tops);
    obm_free(g->factors);
    obm_free(g->stats);
    obm_free(g->formed);
    obm__ranked_free(g->ranked);
    g->ranked = NULL;
    g->cuts = g->tops = NULL;
    g->factors = NULL;
    g->stats = NULL;
    g->formed = NULL;
}

/* ---- sums for methods of their own ---- */

static void sum_blocks(void *arg, size_t first, size_t last, int worker) {
    walk *w = arg;
    obm__block l = obm__block_of(w->block, w->k, w->g, worker);
    for (size_t b = first; b < last; b++) {
        double sums[OBM_MAX_SUMS];
        set_block(w, b, &l);
        size_t bad = obm__block_load(&l);
        if (bad < l.n) obm__note_lowest(&w->bad, l.begin + bad);
        memset(sums, 0, w->n_sums * sizeof *sums);
        w->sums(&l, w->arg, sums);
        for (size_t i = 0; i < w->n_sums; i++) w->partial[i * SPAN_BLOCKS + b] = sums[i];
    }
}

obm_status obm__group_sums(const obm__run *run, const obm__group *g, size_t n_sums, obm__sums_fn fn, const void *arg,
                           double *total, obm_error *err) {
    walk w = {.g = g, .end = g->count, .sums = fn, .arg = arg, .n_sums = n_sums, .total = total};
    memset(total, 0, n_sums * sizeof *total);
    w.partial = obm__alloc(n_sums * SPAN_BLOCKS, sizeof *w.partial);
    if (!w.partial) return obm__fail_nomem(err, n_sums * SPAN_BLOCKS * sizeof *w.partial);
    obm_status status = walk_blocks(run, &w, sum_blocks, err);
    obm_free(w.partial);
    return status;
}

/* ---- rows and columns for methods of their own ---- */

typedef struct parts {
    const obm_kernels *k;
    const obm__group *g;
    float *block;
    uint64_t row, rows, cols; /* the band in work */
    uint64_t width;           /* columns of a part */
    obm__part_fn fn;
    void *arg;
    _Atomic uint64_t bad;
} parts;

static void part_range(void *arg, size_t first, size_t last, int worker) {
    parts *p = arg;
    obm__block l = obm__block_of(p->block, p->k, p->g, worker);
    for (size_t i = first; i < last; i++) {
        obm__part part = {p->row, p->rows, i * p->width, p->width};
        if (p->width == p->cols) part = (obm__part){p->row + i, 1, 0, p->cols};
        if (part.col + part.cols > p->cols) part.cols = p->cols - part.col;
        uint64_t bad = p->fn(&l, &part, p->arg);
        if (bad != UINT64_MAX) obm__note_lowest(&p->bad, bad);
    }
}

static obm_status run_bands(const obm__run *run, parts *p, uint64_t rows, bool by_columns, obm_error *err) {
    uint64_t band = OBM_MERGE_SPAN / p->cols ? OBM_MERGE_SPAN / p->cols : 1;
    for (p->row = 0; p->row < rows; p->row += p->rows) {
        p->rows = rows - p->row < band ? rows - p->row : band;
        size_t n = (size_t)(by_columns ? (p->cols + p->width - 1) / p->width : p->rows);
        obm__parallel(run->ctx, n, 1, part_range, p);
        if (p->bad != UINT64_MAX) return obm__group_bad(p->k, p->g, p->bad, err);
        obm__group_release(p->g, p->row * p->cols, p->rows * p->cols);
        OBM_TRY(obm__run_report(run, err));
    }
    return OBM_OK;
}

void obm__row_release(const obm__block *b, uint64_t start, uint64_t cols) {
    const uint64_t some = OBM_MERGE_SPAN / 16;
    uint64_t end = b->begin + b->n;
    if (cols > OBM_MERGE_SPAN && (end - start) % some == 0) obm__group_release(b->g, end - some, some);
}

#define PART_COLUMNS 512

obm_status obm__group_parts(const obm__run *run, const obm__group *g, uint64_t rows, uint64_t cols, bool by_columns,
                            obm__part_fn fn, void *arg, obm_error *err) {
    if (g->count == 0) return OBM_OK;
    size_t threads = (size_t)run->ctx->threads, bytes = obm__group_scratch(g->steps->n);
    parts p = {.k = run->ctx->k, .g = g, .cols = cols, .fn = fn, .arg = arg, .bad = UINT64_MAX};
    p.width = by_columns ? PART_COLUMNS : cols;
    p.block = obm__desks_new(run->ctx, bytes);
    if (!p.block) return obm__fail_nomem(err, (uint64_t)threads * bytes);
    obm_status status = run_bands(run, &p, rows, by_columns, err);
    obm__desks_free(run->ctx, p.block);
    return status;
}
