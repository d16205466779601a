/*
 * Exact selection of the k largest magnitudes by counting, never by sorting.  First the upper 15 bits of |x| of the
 * k-th largest: a sample tells about where they lie, and one pass counts the elements from each of 8 bounds around
 * there; if they lie elsewhere, or between two bounds with more than one such pattern, another pass with other bounds
 * follows.  Then a histogram over the lower 16 bits of what shares these upper bits, unless all of these are 0, and
 * where elements equal to the threshold are only partly kept a count of them per block, so that the lowest indices
 * stay.
 */
#include "merge.h"

#define LOW_BINS 65536
#define BOUNDS 8
/* Upper halves of finite magnitudes are below this one. */
#define HIGH_END 0x7f80u
#define SAMPLE_RUN 128
#define SAMPLE_RUNS 256

typedef enum { COUNT_BOUNDS, COUNT_LOW, COUNT_EQUAL } count_what;

/* One pass over one group. */
typedef struct pass {
    const obm_kernels *k;
    const obm__group *g;
    size_t model;
    count_what what;
    uint32_t high, bits;      /* the decisive upper bits; the threshold */
    uint64_t begin, end;      /* elements, begin at a block boundary */
    float *scratch;           /* (workers) lanes */
    uint32_t *histogram;      /* (workers, stride) */
    size_t bins, stride;      /* bins: that are counted; of the bounds BOUNDS, of equal elements none */
    uint32_t bounds[BOUNDS];  /* patterns, rising */
    uint16_t (*from)[BOUNDS]; /* nullable: (blocks), elements from each bound on */
    uint64_t *equal;          /* (blocks) of the whole group */
    _Atomic uint64_t bad;     /* lowest index that is not finite */
} pass;

typedef struct selection {
    const obm__run *run;
    obm__group *groups;
    size_t n_groups, model;
    float *scratch;
    uint32_t *histogram;
    uint64_t *total;          /* (LOW_BINS) */
    uint64_t equal;           /* elements at the threshold */
    uint16_t (*from)[BOUNDS]; /* of one group: what the last pass over the bounds counted, or NULL */
    size_t bound;             /* of these the threshold, when its upper half is all of it; else BOUNDS */
} selection;

static inline uint32_t magnitude_bits(float x) { return obm__bits_of(x) & 0x7fffffffu; }

static uint64_t count_equal(const obm_kernels *k, uint32_t bits, const float *d, size_t n) {
    uint32_t counts[BOUNDS] = {0}, from[BOUNDS] = {bits, bits + 1};
    k->count_from(counts, from, d, n);
    return counts[0] - counts[1];
}

/* What is ranked, into b->mixed; returns the first index that is not finite. */
static size_t load_values(const pass *p, obm__block *b, uint64_t begin, size_t n) {
    b->begin = begin;
    b->n = n;
    if (p->model == OBM_BY_SCORE) {
        size_t bad = obm__block_load(b);
        if (bad == n) p->g->steps->method->custom->score(b, b->mixed);
        return bad;
    }
    if (!obm__group_is_plain(p->g, p->model)) obm__group_base(p->k, p->g, begin, n, b->base, b->scratch);
    return obm__group_delta(p->k, p->g, p->model, begin, n, b->base, b->mixed, b->scratch);
}

/* Counts of one block into the worker's histogram, or into the records of the block; returns the first index that is
 * not finite. */
static size_t count_values(const pass *p, obm__block *block, uint64_t begin, size_t n, uint32_t *here,
                           uint32_t *histogram) {
    const float *d = block->mixed;
    size_t bad = load_values(p, block, begin, n);
    if (bad < n) return bad;
    if (p->what == COUNT_BOUNDS)
        p->k->count_from(here, p->bounds, d, n);
    else if (p->what == COUNT_LOW)
        p->k->low_histogram(histogram, p->high, d, n);
    else
        p->equal[begin / OBM_MERGE_BLOCK] = count_equal(p->k, p->bits, d, n);
    return n;
}

/* The same straight from the files' bytes.  Few elements share an upper half, so those equal to the threshold are what
 * one bin of the lower ones gains, whatever it held before. */
static size_t count_plain(const pass *p, uint64_t begin, size_t n, uint32_t *here, uint32_t *histogram) {
    obm__plain t = obm__group_plain(p->g, p->model, begin);
    uint16_t high[BOUNDS];
    if (p->what == COUNT_BOUNDS) {
        for (size_t i = 0; i < BOUNDS; i++) high[i] = (uint16_t)(p->bounds[i] >> 16);
        return p->k->count_bf16(here, high, t.model, t.base, t.round, n);
    }
    uint32_t *bin = histogram + (p->bits & 0xffff), before = *bin;
    size_t bad = p->k->low_bf16(histogram, p->high, t.model, t.base, n);
    if (p->what == COUNT_EQUAL) p->equal[begin / OBM_MERGE_BLOCK] = *bin - before;
    return bad;
}

static bool counts_plainly(const pass *p) {
    if (p->model == OBM_BY_SCORE || !obm__group_is_plain(p->g, p->model)) return false;
    return p->what == COUNT_BOUNDS || !obm__group_plain(p->g, p->model, 0).round;
}

static void count_blocks(void *arg, size_t first, size_t last, int worker) {
    pass *p = arg;
    obm__block block = obm__block_of(p->scratch, p->k, p->g, worker);
    uint32_t *histogram = p->histogram + (size_t)worker * p->stride;
    bool plain = counts_plainly(p);
    obm__group_populate(p->g, p->model, p->begin + first * OBM_MERGE_BLOCK, p->begin + last * OBM_MERGE_BLOCK);
    for (size_t b = first; b < last; b++) {
        uint64_t begin = p->begin + (uint64_t)b * OBM_MERGE_BLOCK;
        size_t n = p->end - begin < OBM_MERGE_BLOCK ? (size_t)(p->end - begin) : OBM_MERGE_BLOCK, bad;
        uint32_t here[BOUNDS] = {0};
        bad = plain ? count_plain(p, begin, n, here, histogram) : count_values(p, &block, begin, n, here, histogram);
        if (bad < n) obm__note_lowest(&p->bad, begin + bad);
        if (p->what != COUNT_BOUNDS) continue;
        for (size_t i = 0; i < BOUNDS; i++) histogram[i] += here[i];
        for (size_t i = 0; p->from && i < BOUNDS; i++) p->from[begin / OBM_MERGE_BLOCK][i] = (uint16_t)here[i];
    }
}

/* The 32-bit histograms of the workers are flushed after every span. */
static void flush_histograms(const selection *s, const pass *p) {
    for (int w = 0; w < s->run->ctx->threads; w++) {
        uint32_t *histogram = p->histogram + (size_t)w * p->stride;
        for (size_t i = 0; i < p->bins; i++) s->total[i] += histogram[i];
        memset(histogram, 0, p->bins * sizeof *histogram);
    }
}

static obm_status count_group(const selection *s, pass *p, obm_error *err) {
    if (p->bins) memset(p->histogram, 0, (size_t)s->run->ctx->threads * p->stride * sizeof *p->histogram);
    p->bad = UINT64_MAX;
    for (p->begin = 0; p->begin < p->g->count; p->begin = p->end) {
        p->end = p->g->count - p->begin < OBM_MERGE_SPAN ? p->g->count : p->begin + OBM_MERGE_SPAN;
        obm__parallel(s->run->ctx, (size_t)((p->end - p->begin + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK), 1,
                      count_blocks, p);
        if (p->bad != UINT64_MAX) return obm__group_bad(p->k, p->g, p->bad, err);
        flush_histograms(s, p);
        /* Of a small tensor the next pass finds the pages there, and the last one lets them go. */
        if (s->n_groups > 1 || p->g->count > OBM_MERGE_SPAN) obm__group_release(p->g, p->begin, p->end - p->begin);
        OBM_TRY(obm__run_report(s->run, err));
    }
    return OBM_OK;
}

static pass pass_of(const selection *s, obm__group *g, count_what what) {
    return (pass){
        .k = s->run->ctx->k, .g = g, .model = s->model, .what = what, .scratch = s->scratch, .histogram = s->histogram};
}

static obm_status count_low(const selection *s, uint32_t high, obm_error *err) {
    memset(s->total, 0, LOW_BINS * sizeof *s->total);
    for (size_t i = 0; i < s->n_groups; i++) {
        pass p = pass_of(s, &s->groups[i], COUNT_LOW);
        p.high = high;
        p.bins = p.stride = LOW_BINS;
        OBM_TRY(count_group(s, &p, err));
    }
    return OBM_OK;
}

/* high: (BOUNDS) rising upper halves; s->total gets how many elements are from each of them on. */
static obm_status count_bounds(const selection *s, const uint32_t *high, obm_error *err) {
    memset(s->total, 0, BOUNDS * sizeof *s->total);
    for (size_t i = 0; i < s->n_groups; i++) {
        pass p = pass_of(s, &s->groups[i], COUNT_BOUNDS);
        p.bins = p.stride = BOUNDS;
        p.from = s->from;
        for (size_t k = 0; k < BOUNDS; k++) p.bounds[k] = high[k] << 16;
        OBM_TRY(count_group(s, &p, err));
    }
    return OBM_OK;
}

/* ---- where the upper half about lies ---- */

typedef struct sample {
    const selection *s;
    uint64_t count; /* elements of all groups */
    uint32_t *high; /* (SAMPLE_RUNS, SAMPLE_RUN) upper halves, HIGH_END where there is none */
} sample;

/* Runs of neighbours at even distances: pages are what reading costs. */
static void sample_runs(void *arg, size_t first, size_t last, int worker) {
    const sample *t = arg;
    const selection *s = t->s;
    for (size_t r = first; r < last; r++) {
        uint32_t *high = t->high + r * SAMPLE_RUN;
        uint64_t at = t->count / SAMPLE_RUNS * r;
        size_t g = 0;
        while (g + 1 < s->n_groups && at >= s->groups[g].count) at -= s->groups[g++].count;
        pass p = pass_of(s, &s->groups[g], COUNT_BOUNDS);
        obm__block block = obm__block_of(p.scratch, p.k, p.g, worker);
        size_t n = p.g->count - at < SAMPLE_RUN ? (size_t)(p.g->count - at) : SAMPLE_RUN;
        size_t bad = load_values(&p, &block, at, n); /* the error is the counting pass's */
        for (size_t i = 0; i < SAMPLE_RUN; i++)
            high[i] = i < n && bad == n ? magnitude_bits(block.mixed[i]) >> 16 : HIGH_END;
    }
}

/* The range [*low, *end) of upper halves in which the n-th largest of `count` lies very likely: 4 standard deviations
 * of its rank in the sample around where it should be, and 3 more patterns for neighbours that are not independent. */
static obm_status guess_range(const selection *s, uint64_t count, uint64_t n, uint32_t *low, uint32_t *end,
                              obm_error *err) {
    sample t = {s, count, obm__alloc((size_t)SAMPLE_RUNS * SAMPLE_RUN, sizeof *t.high)};
    if (!t.high) return obm__fail_nomem(err, SAMPLE_RUNS * SAMPLE_RUN * sizeof *t.high);
    obm__parallel(s->run->ctx, SAMPLE_RUNS, 1, sample_runs, &t);
    uint32_t size = 0;
    memset(s->histogram, 0, (HIGH_END + 1) * sizeof *s->histogram);
    for (size_t i = 0; i < (size_t)SAMPLE_RUNS * SAMPLE_RUN; i++)
        s->histogram[t.high[i]]++, size += t.high[i] < HIGH_END;
    double share = (double)n / (double)count, spread = 4 * sqrt(share * (1 - share) * (double)size) + 1;
    double rank = share * (double)size, above = 0;
    *end = HIGH_END;
    *low = 0;
    for (uint32_t bin = HIGH_END; bin-- > 0;) {
        above += s->histogram[bin];
        if (above < rank - spread) *end = bin;
        if (above < rank + spread) continue;
        *low = bin;
        break;
    }
    obm_free(t.high);
    return OBM_OK;
}

/* ---- the upper half ---- */

/* The range that is known to hold the upper half: at least n elements are from `low` on, fewer from `end` on. */
typedef struct range {
    uint32_t low, end;
    uint64_t from_low, from_end;
} range;

/* BOUNDS rising bounds inside (low, end], even apart, all of them where there are few. */
static void choose_bounds(uint32_t low, uint32_t end, uint32_t *high) {
    uint32_t width = end - low;
    for (uint32_t k = 0; k < BOUNDS; k++) {
        uint32_t step = width <= BOUNDS ? k + 1 : (uint32_t)((uint64_t)width * (k + 1) / (BOUNDS + 1));
        high[k] = low + (step < width ? step : width);
    }
}

static void narrow_range(const selection *s, const uint32_t *high, uint64_t n, range *r) {
    for (size_t k = 0; k < BOUNDS; k++) {
        if (high[k] <= r->low || high[k] >= r->end) continue;
        if (s->total[k] >= n) {
            r->low = high[k];
            r->from_low = s->total[k];
        } else {
            r->end = high[k];
            r->from_end = s->total[k];
        }
    }
}

static size_t bound_of(const uint32_t *high, uint32_t bound) {
    size_t k = 0;
    while (k < BOUNDS && high[k] != bound) k++;
    return k;
}

/* The upper half of the *rest-th largest; *rest becomes how many with this half are wanted, s->equal how many there
 * are. */
static obm_status find_high(selection *s, uint64_t *rest, uint32_t *out, obm_error *err) {
    range r = {.low = 0, .end = HIGH_END};
    for (size_t i = 0; i < s->n_groups; i++) r.from_low += s->groups[i].count;
    uint32_t low = 0, end = HIGH_END, high[BOUNDS];
    if (*rest < r.from_low && r.from_low > 2 * SAMPLE_RUNS * SAMPLE_RUN)
        OBM_TRY(guess_range(s, r.from_low, *rest, &low, &end, err));
    /* A bound below the range and one above it, so that both are known to hold. */
    low -= low > 0;
    do {
        choose_bounds(low, end, high);
        if (low > r.low) memmove(high + 1, high, (BOUNDS - 1) * sizeof *high), high[0] = low;
        OBM_TRY(count_bounds(s, high, err));
        narrow_range(s, high, *rest, &r);
        low = r.low;
        end = r.end;
    } while (r.end - r.low > 1);
    /* Per block there is what lies from one bound on less what lies from the next. */
    s->bound = bound_of(high, r.low);
    if (s->bound + 1 >= BOUNDS || high[s->bound + 1] != r.end) s->bound = BOUNDS;
    s->equal = r.from_low - r.from_end;
    *rest -= *rest < r.from_end ? *rest : r.from_end;
    *out = r.low;
    return OBM_OK;
}

/* The bin, from above, in which the *rest-th largest lies; *rest becomes how many of that bin are wanted. */
static uint32_t decisive_bin(const uint64_t *total, size_t bins, uint64_t *rest) {
    size_t bin = bins - 1;
    while (bin > 0 && total[bin] < *rest) *rest -= total[bin--];
    return (uint32_t)bin;
}

/* bf16 values have no bits below the upper 15, so the first histogram tells all. */
static bool high_bits_suffice(const selection *s) {
    if (s->model == OBM_BY_SCORE) return false;
    for (size_t i = 0; i < s->n_groups; i++)
        if (s->groups[i].work != OBM_BF16 || !s->groups[i].steps->round_deltas) return false;
    return true;
}

/* Cuts of one group when `*rest` more equal elements may stay; counts them only if it has to. */
static obm_status share_equal(const selection *s, obm__group *g, uint32_t bits, uint64_t *rest, obm_error *err) {
    obm__cut *cut = &g->cuts[s->model == OBM_BY_SCORE ? 0 : s->model];
    size_t blocks = (size_t)((g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
    *cut = (obm__cut){.bits = bits};
    if (*rest == 0 || blocks == 0) return OBM_OK;
    uint64_t *before = obm__alloc(blocks + 1, sizeof *before);
    if (!before) return obm__fail_nomem(err, blocks * sizeof *before);
    pass p = pass_of(s, g, COUNT_EQUAL);
    p.bits = bits;
    p.high = bits >> 16;
    p.stride = LOW_BINS;
    p.equal = before;
    obm_status status = OBM_OK;
    for (size_t b = 0; s->from && s->bound < BOUNDS && b < blocks; b++)
        before[b] = (uint64_t)s->from[b][s->bound] - s->from[b][s->bound + 1];
    if (!s->from || s->bound == BOUNDS) status = count_group(s, &p, err);
    uint64_t total = 0;
    for (size_t b = 0; status == OBM_OK && b < blocks; b++) {
        uint64_t here = before[b];
        before[b] = total;
        total += here;
    }
    before[blocks] = total;
    bool partial = status == OBM_OK && total > *rest;
    cut->equal = partial ? *rest : UINT64_MAX;
    cut->before = partial ? before : NULL;
    if (!partial) obm_free(before);
    *rest -= total < *rest ? total : *rest;
    return status;
}

/* The pattern of the *rest-th largest; *rest becomes how many of that pattern are wanted. */
static obm_status find_threshold(selection *s, uint64_t *rest, uint32_t *bits, obm_error *err) {
    uint32_t high;
    OBM_TRY(find_high(s, rest, &high, err));
    *bits = high << 16;
    if (high_bits_suffice(s) || s->equal == 0) return OBM_OK;
    s->bound = BOUNDS;
    OBM_TRY(count_low(s, high, err));
    uint32_t low = decisive_bin(s->total, LOW_BINS, rest);
    *bits |= low;
    s->equal = s->total[low];
    return OBM_OK;
}

static obm_status select_run(selection *s, uint64_t n_keep, obm_error *err) {
    uint64_t rest = n_keep;
    uint32_t bits;
    OBM_TRY(find_threshold(s, &rest, &bits, err));
    for (size_t i = 0; i < s->n_groups; i++) {
        obm__cut *cut = &s->groups[i].cuts[s->model == OBM_BY_SCORE ? 0 : s->model];
        if (rest == s->equal) {
            *cut = (obm__cut){.bits = bits, .equal = UINT64_MAX};
        } else {
            OBM_TRY(share_equal(s, &s->groups[i], bits, &rest, err));
        }
    }
    return OBM_OK;
}

static obm_status selection_new(selection *s, obm_error *err) {
    size_t threads = (size_t)s->run->ctx->threads, scratch = obm__group_scratch(s->groups[0].steps->n);
    s->scratch = obm__alloc(threads, scratch);
    s->histogram = obm__alloc(threads * LOW_BINS, sizeof *s->histogram);
    s->total = obm__alloc(LOW_BINS, sizeof *s->total);
    s->bound = BOUNDS;
    /* With several groups these records would add up. */
    size_t blocks = s->n_groups == 1 ? (size_t)((s->groups[0].count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK) : 0;
    if (blocks) s->from = obm__alloc(blocks, sizeof *s->from);
    bool all = s->scratch && s->histogram && s->total && (s->from || !blocks);
    return all ? OBM_OK : obm__fail_nomem(err, threads * (scratch + LOW_BINS * 4));
}

static void selection_clear(selection *s) {
    obm_free(s->scratch);
    obm_free(s->histogram);
    obm_free(s->total);
    obm_free(s->from);
}

obm_status obm__select(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n_keep,
                       obm_error *err) {
    selection s = {.run = run, .groups = groups, .n_groups = n_groups, .model = model};
    obm_status status = selection_new(&s, err);
    if (status == OBM_OK) status = select_run(&s, n_keep, err);
    selection_clear(&s);
    return status;
}

obm_status obm__select_value(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n,
                             float *out, obm_error *err) {
    selection s = {.run = run, .groups = groups, .n_groups = n_groups, .model = model};
    uint32_t bits = 0;
    obm_status status = selection_new(&s, err);
    if (status == OBM_OK) status = find_threshold(&s, &n, &bits, err);
    if (status == OBM_OK) memcpy(out, &bits, sizeof *out);
    selection_clear(&s);
    return status;
}

static void keep_from(uint32_t least, float *d, size_t n) {
    for (size_t j = 0; j < n; j++) d[j] = obm__keep_if(d[j], magnitude_bits(d[j]) >= least);
}

/* The block in which the last equal elements that stay end. */
static void keep_some(uint32_t bits, uint64_t left, float *d, size_t n) {
    for (size_t j = 0; j < n; j++) {
        uint32_t u = magnitude_bits(d[j]);
        bool equal = u == bits && left > 0;
        left -= equal;
        d[j] = obm__keep_if(d[j], u > bits || equal);
    }
}

static uint64_t equals_left(const obm__cut *c, uint64_t block) {
    uint64_t before = c->before ? c->before[block] : 0;
    return c->equal > before ? c->equal - before : 0;
}

bool obm__cut_least(const obm__cut *c, uint64_t block, size_t n, uint32_t *least) {
    uint64_t left = c->all || c->none ? 0 : equals_left(c, block);
    *least = c->all ? 0 : c->none ? 0x80000000u : left ? c->bits : c->bits + 1;
    return left == 0 || left >= (c->before ? c->before[block + 1] - c->before[block] : n);
}

void obm__cut_apply(const obm__cut *c, uint64_t block, float *d, size_t n) {
    uint32_t least;
    if (obm__cut_least(c, block, n, &least))
        keep_from(least, d, n);
    else
        keep_some(c->bits, equals_left(c, block), d, n);
}
