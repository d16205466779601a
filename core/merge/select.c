/*
 * Exact selection of the k largest magnitudes by counting, never by sorting: a histogram over the upper 15 bits of |x|,
 * one over the lower 16 bits of what shares the decisive upper bits, and where elements equal to the threshold are only
 * partly kept a count of them per block, so that the lowest indices stay.
 */
#include "merge.h"

#define HIGH_BINS 32768
#define LOW_BINS 65536

typedef enum { COUNT_HIGH, COUNT_LOW, COUNT_EQUAL } count_what;

/* One pass over one group. */
typedef struct pass {
    const obm_kernels *k;
    const obm__group *g;
    size_t model;
    count_what what;
    uint32_t high, bits; /* the decisive upper bits; the threshold */
    uint64_t begin, end; /* elements, begin at a block boundary */
    float *scratch;      /* (workers) lanes */
    uint32_t *histogram; /* (workers, bins) */
    size_t bins;
    uint64_t *equal;      /* (blocks) of the whole group */
    _Atomic uint64_t bad; /* lowest index that is not finite */
} pass;

typedef struct selection {
    const obm__run *run;
    obm__group *groups;
    size_t n_groups, model;
    float *scratch;
    uint32_t *histogram;
    uint64_t *total; /* (LOW_BINS) */
    uint64_t equal;  /* elements at the threshold */
} selection;

static inline uint32_t magnitude_bits(float x) { return obm__bits_of(x) & 0x7fffffffu; }

static void count_low(uint32_t *histogram, uint32_t high, const float *d, size_t n) {
    for (size_t j = 0; j < n; j++) {
        uint32_t u = magnitude_bits(d[j]);
        if (u >> 16 == high) histogram[u & 0xffff]++;
    }
}

static uint64_t count_equal(uint32_t bits, const float *d, size_t n) {
    uint64_t count = 0;
    for (size_t j = 0; j < n; j++) count += magnitude_bits(d[j]) == bits;
    return count;
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
    obm__group_base(p->k, p->g, begin, n, b->base, b->scratch);
    return obm__group_delta(p->k, p->g, p->model, begin, n, b->base, b->mixed, b->scratch);
}

static void count_blocks(void *arg, size_t first, size_t last, int worker) {
    pass *p = arg;
    obm__block block = obm__block_of(p->scratch, p->k, p->g, worker);
    float *d = block.mixed;
    uint32_t *histogram = p->histogram + (size_t)worker * p->bins;
    for (size_t b = first; b < last; b++) {
        uint64_t begin = p->begin + (uint64_t)b * OBM_MERGE_BLOCK;
        size_t n = p->end - begin < OBM_MERGE_BLOCK ? (size_t)(p->end - begin) : OBM_MERGE_BLOCK;
        size_t bad = load_values(p, &block, begin, n);
        if (bad < n) {
            obm__note_lowest(&p->bad, begin + bad);
        } else if (p->what == COUNT_HIGH) {
            p->k->magnitude_histogram(histogram, d, n);
        } else if (p->what == COUNT_LOW) {
            count_low(histogram, p->high, d, n);
        } else {
            p->equal[begin / OBM_MERGE_BLOCK] = count_equal(p->bits, d, n);
        }
    }
}

/* The 32-bit histograms of the workers are flushed after every span. */
static void flush_histograms(const selection *s, const pass *p) {
    for (int w = 0; w < s->run->ctx->threads; w++) {
        uint32_t *histogram = p->histogram + (size_t)w * p->bins;
        for (size_t i = 0; i < p->bins; i++) s->total[i] += histogram[i];
        memset(histogram, 0, p->bins * sizeof *histogram);
    }
}

static obm_status count_group(const selection *s, pass *p, obm_error *err) {
    if (p->bins) memset(p->histogram, 0, (size_t)s->run->ctx->threads * p->bins * sizeof *p->histogram);
    p->bad = UINT64_MAX;
    for (p->begin = 0; p->begin < p->g->count; p->begin = p->end) {
        p->end = p->g->count - p->begin < OBM_MERGE_SPAN ? p->g->count : p->begin + OBM_MERGE_SPAN;
        obm__parallel(s->run->ctx, (size_t)((p->end - p->begin + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK), 1,
                      count_blocks, p);
        if (p->bad != UINT64_MAX) return obm__group_bad(p->k, p->g, p->bad, err);
        flush_histograms(s, p);
        obm__group_release(p->g, p->begin, p->end - p->begin);
        OBM_TRY(obm__run_report(s->run, err));
    }
    return OBM_OK;
}

static obm_status count_all(const selection *s, count_what what, uint32_t high, obm_error *err) {
    size_t bins = what == COUNT_HIGH ? HIGH_BINS : LOW_BINS;
    memset(s->total, 0, bins * sizeof *s->total);
    for (size_t i = 0; i < s->n_groups; i++) {
        pass p = {.k = s->run->ctx->k,
                  .g = &s->groups[i],
                  .model = s->model,
                  .what = what,
                  .high = high,
                  .scratch = s->scratch,
                  .histogram = s->histogram,
                  .bins = bins};
        OBM_TRY(count_group(s, &p, err));
    }
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
    uint64_t *before = obm__alloc(blocks, sizeof *before);
    if (!before) return obm__fail_nomem(err, blocks * sizeof *before);
    pass p = {.k = s->run->ctx->k,
              .g = g,
              .model = s->model,
              .what = COUNT_EQUAL,
              .bits = bits,
              .scratch = s->scratch,
              .histogram = s->histogram,
              .equal = before};
    obm_status status = count_group(s, &p, err);
    uint64_t total = 0;
    for (size_t b = 0; status == OBM_OK && b < blocks; b++) {
        uint64_t here = before[b];
        before[b] = total;
        total += here;
    }
    bool partial = status == OBM_OK && total > *rest;
    cut->equal = partial ? *rest : UINT64_MAX;
    cut->before = partial ? before : NULL;
    if (!partial) obm_free(before);
    *rest -= total < *rest ? total : *rest;
    return status;
}

/* The pattern of the *rest-th largest; *rest becomes how many of that pattern are wanted. */
static obm_status find_threshold(selection *s, uint64_t *rest, uint32_t *bits, obm_error *err) {
    OBM_TRY(count_all(s, COUNT_HIGH, 0, err));
    uint32_t high = decisive_bin(s->total, HIGH_BINS, rest);
    *bits = high << 16;
    s->equal = s->total[high];
    if (high_bits_suffice(s) || s->equal == 0) return OBM_OK;
    OBM_TRY(count_all(s, COUNT_LOW, high, err));
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
    return s->scratch && s->histogram && s->total ? OBM_OK : obm__fail_nomem(err, threads * (scratch + LOW_BINS * 4));
}

static void selection_clear(selection *s) {
    obm_free(s->scratch);
    obm_free(s->histogram);
    obm_free(s->total);
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

void obm__cut_apply(const obm__cut *c, uint64_t block, float *d, size_t n) {
    if (c->all) return;
    if (c->none) {
        memset(d, 0, n * sizeof *d);
        return;
    }
    uint64_t before = c->before ? c->before[block] : 0, left = c->equal > before ? c->equal - before : 0;
    if (left > 0 && left < n) {
        keep_some(c->bits, left, d, n);
    } else {
        keep_from(left ? c->bits : c->bits + 1, d, n);
    }
}
