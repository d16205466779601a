/*
 * Exact selection of the k largest magnitudes by counting, never by sorting.  First the upper 15 bits of |x| of the
 * k-th largest: a sample tells about where they lie, and one pass counts the elements from each of 8 bounds around
 * there; if they lie elsewhere, or between two bounds with more than one such pattern, another pass with other bounds
 * follows.  Several models take these passes together, so that their base is read once.  Then, unless all lower 16 bits
 * are 0, one more pass for all lists those of the elements that share the upper ones, block by block: the list has the
 * threshold, and where elements equal to it are only partly kept how many of them each block has, so that the lowest
 * indices stay.  Many are zeros, since differences of near bf16 have few bits; these are counted instead.  Where a list
 * becomes too long, a histogram over the lower bits and a count of what is equal take a pass for each model instead.
 */
#include "merge.h"

#define LOW_BINS 65536
#define BOUNDS 8
/* Of all targets. */
#define COUNTS ((size_t)OBM__PICKS * BOUNDS)
/* Upper halves of finite magnitudes are below this one. */
#define HIGH_END 0x7f80u
/* Runs of a sample: an element in 16, but no fewer than half of the 64 thousand that a small tensor has, and no more
 * than tell the 8 bounds apart: of normal values with a fifth above the threshold 0.23 % share its upper half, which
 * among 2^17 is the standard deviation of the rank twice over. */
#define SAMPLE_RUN 128
#define SAMPLE_LEAST 256
#define SAMPLE_MOST 1024
/* Runs between which pages are handed back. */
#define SAMPLE_AT_ONCE 128

/* Words of a list at most; and of all elements at most, but a small tensor's: of normal values 0.4 % share an upper
 * half, 14 in a block. */
#define MOST_LISTED ((uint64_t)1 << 22)
#define LISTED_SHARE 64
#define FEW_LISTED 4096
/* Words of a block in a list, in front of the lower halves: its number in two, how many are 0, and how many follow. */
#define LIST_HEAD 4

typedef enum { COUNT_BOUNDS, COUNT_LOW, COUNT_EQUAL, LIST_LOWS } count_what;

/* The range that is known to hold the upper half: at least as many elements as are wanted are from `low` on, fewer from
 * `end` on. */
typedef struct range {
    uint32_t low, end;
    uint64_t from_low, from_end;
} range;

/* What is looked for: the upper half of the magnitude that the rest-th largest has. */
typedef struct target {
    size_t model;
    uint64_t rest;  /* how many are wanted; once the upper half is known, of those that have it */
    uint64_t equal; /* how many have it */
    range known;
    uint32_t low, end;        /* where it very likely is: in [low, end) */
    uint32_t bounds[BOUNDS];  /* of the last pass: rising upper halves, and */
    uint64_t total[BOUNDS];   /* the elements from each of them on */
    uint16_t (*from)[BOUNDS]; /* nullable: the same of each block of the only group */
    size_t bound; /* of the bounds the one that is the upper half, where the next one ends it; else BOUNDS */
    uint16_t *list;        /* nullable, (room): the blocks that have such elements, in any order */
    size_t room;
    _Atomic size_t listed; /* words; more than there is room for: the list is of no use */
} target;

/* One pass over one group. */
typedef struct pass {
    const obm_kernels *k;
    const obm__group *g;
    size_t model; /* of passes for one model */
    count_what what;
    target *const *targets; /* (n_targets), of passes over bounds and for lists */
    size_t n_targets;
    uint64_t block; /* number of the group's first one, of lists */
    uint32_t high, bits;  /* the decisive upper bits; the threshold */
    uint64_t begin, end;  /* elements, begin at a block boundary */
    float *scratch;       /* (workers) lanes */
    uint32_t *histogram;  /* (workers, stride): lower halves, or (n_targets, BOUNDS) */
    uint64_t *total;      /* (bins): of all workers and spans */
    size_t bins, stride;  /* bins: that are counted; of equal elements none */
    uint64_t *equal;      /* (blocks) of the whole group */
    _Atomic uint64_t bad; /* lowest index that is not finite */
} pass;

typedef struct selection {
    const obm__run *run;
    obm__group *groups;
    size_t n_groups;
    float *scratch;
    uint32_t *counts;    /* (workers, COUNTS) of bounds */
    uint32_t *histogram; /* (workers, LOW_BINS), with `total` (LOW_BINS) from where lower halves are first counted */
    uint64_t *total;
    target targets[OBM__PICKS];
    size_t n_targets;
} selection;

static inline uint32_t magnitude_bits(float x) { return obm__bits_of(x) & 0x7fffffffu; }

static uint64_t count_equal(const obm_kernels *k, uint32_t bits, const float *d, size_t n) {
    uint32_t counts[BOUNDS] = {0}, from[BOUNDS] = {bits, bits + 1};
    k->count_from(counts, from, d, n);
    return counts[0] - counts[1];
}

/* The models of a block come one after the other, and have one base. */
static void want_base(const obm__group *g, obm__block *b, uint64_t begin, size_t n) {
    if (b->n && b->begin == begin) return;
    b->begin = begin;
    b->n = n;
    obm__group_base(b->k, g, begin, n, b->base, b->scratch);
}

/* What is ranked, exactly from the pattern `least` on, into b->mixed; returns the first index that is not finite. */
static size_t load_values(const obm__group *g, size_t model, uint32_t least, obm__block *b, uint64_t begin, size_t n) {
    if (model == OBM_BY_SCORE) {
        b->begin = begin;
        b->n = n;
        size_t bad = obm__block_load(b);
        float from;
        memcpy(&from, &least, sizeof from);
        if (bad < n) return bad;
        g->steps->method->custom->score(b, from, b->mixed);
        return b->k->find_nonfinite(b->mixed, n);
    }
    if (!obm__group_is_plain(g, model)) want_base(g, b, begin, n);
    return obm__group_delta(b->k, g, model, begin, n, b->base, b->mixed, b->scratch);
}

/* The counts of one block from each bound of a target on; returns the first index that is not finite. */
static size_t count_from_bounds(const pass *p, const target *t, bool plain, obm__block *block, uint64_t begin, size_t n,
                                uint32_t *here) {
    uint16_t high[BOUNDS];
    uint32_t bounds[BOUNDS];
    for (size_t i = 0; i < BOUNDS; i++) high[i] = (uint16_t)t->bounds[i], bounds[i] = t->bounds[i] << 16;
    if (plain) {
        obm__plain d = obm__group_plain(p->g, t->model, begin);
        return p->k->count_bf16(here, high, d.model, d.base, d.round, n);
    }
    size_t bad = load_values(p->g, t->model, bounds[0], block, begin, n);
    if (bad == n) p->k->count_from(here, bounds, block->mixed, n);
    return bad;
}

/* Lower halves of one block into the worker's histogram, or the elements equal to the threshold into the record of the
 * block; returns the first index that is not finite. */
static size_t count_values(const pass *p, obm__block *block, uint64_t begin, size_t n, uint32_t *histogram) {
    uint32_t least = p->what == COUNT_LOW ? p->high << 16 : p->bits;
    size_t bad = load_values(p->g, p->model, least, block, begin, n);
    if (bad < n) return bad;
    if (p->what == COUNT_LOW)
        p->k->low_histogram(histogram, p->high, block->mixed, n);
    else
        p->equal[begin / OBM_MERGE_BLOCK] = count_equal(p->k, p->bits, block->mixed, n);
    return n;
}

/* The same straight from the files' bytes. */
static size_t count_plain(const pass *p, uint64_t begin, size_t n, uint32_t *histogram) {
    obm__plain t = obm__group_plain(p->g, p->model, begin);
    uint16_t lows[OBM_MERGE_BLOCK], low = (uint16_t)p->bits;
    size_t found, zeros, bad = p->k->lows_bf16(lows, &found, &zeros, p->high, t.model, t.base, n);
    if (bad < n) return bad;
    if (p->what == COUNT_EQUAL) {
        uint64_t equal = low ? 0 : zeros;
        for (size_t i = 0; i < found; i++) equal += lows[i] == low;
        p->equal[begin / OBM_MERGE_BLOCK] = equal;
        return n;
    }
    histogram[0] += (uint32_t)zeros;
    for (size_t i = 0; i < found; i++) histogram[lows[i]]++;
    return n;
}

/* Whether the lower halves are those of the difference itself, of bf16 as they are. */
static bool has_plain_lows(const pass *p, size_t model) {
    return model != OBM_BY_SCORE && obm__group_is_plain(p->g, model) && !obm__group_plain(p->g, model, 0).round;
}

static bool is_plain(const pass *p, size_t model) { return model != OBM_BY_SCORE && obm__group_is_plain(p->g, model); }

static void populate_blocks(const pass *p, size_t model, size_t first, size_t last) {
    obm__group_populate(p->g, model, p->begin + first * OBM_MERGE_BLOCK, p->begin + last * OBM_MERGE_BLOCK);
}

/* Elements of block b of the pass, and where it begins in the tensor. */
static size_t block_at(const pass *p, size_t b, uint64_t *begin) {
    *begin = p->begin + (uint64_t)b * OBM_MERGE_BLOCK;
    return p->end - *begin < OBM_MERGE_BLOCK ? (size_t)(p->end - *begin) : OBM_MERGE_BLOCK;
}

static void count_blocks(void *arg, size_t first, size_t last, int worker) {
    pass *p = arg;
    obm__block block = obm__block_of(p->scratch, p->k, p->g, worker);
    uint32_t *histogram = p->bins ? p->histogram + (size_t)worker * p->stride : NULL;
    bool plain = has_plain_lows(p, p->model);
    populate_blocks(p, p->model, first, last);
    for (size_t b = first; b < last; b++) {
        uint64_t begin;
        size_t n = block_at(p, b, &begin);
        size_t bad = plain ? count_plain(p, begin, n, histogram) : count_values(p, &block, begin, n, histogram);
        if (bad < n) obm__note_lowest(&p->bad, begin + bad);
    }
}

static void bound_blocks(void *arg, size_t first, size_t last, int worker) {
    pass *p = arg;
    obm__block block = obm__block_of(p->scratch, p->k, p->g, worker);
    populate_blocks(p, p->n_targets == 1 ? p->targets[0]->model : SIZE_MAX, first, last);
    for (size_t b = first; b < last; b++) {
        uint64_t begin;
        size_t n = block_at(p, b, &begin);
        for (size_t i = 0; i < p->n_targets; i++) {
            const target *t = p->targets[i];
            uint32_t here[BOUNDS] = {0}, *counts = p->histogram + (size_t)worker * p->stride + i * BOUNDS;
            size_t bad = count_from_bounds(p, t, is_plain(p, t->model), &block, begin, n, here);
            if (bad < n) obm__note_lowest(&p->bad, begin + bad);
            for (size_t k = 0; k < BOUNDS; k++) counts[k] += here[k];
            for (size_t k = 0; t->from && k < BOUNDS; k++) t->from[begin / OBM_MERGE_BLOCK][k] = (uint16_t)here[k];
        }
    }
}

/* What is listed of a block: lower halves that are not 0, and how many are. */
typedef struct lower_halves {
    uint16_t low[OBM_MERGE_BLOCK];
    size_t n, zeros;
} lower_halves;

/* Returns the first index that is not finite. */
static size_t find_lows(const pass *p, const target *t, obm__block *block, uint64_t begin, size_t n,
                        lower_halves *out) {
    uint32_t high = t->known.low;
    if (has_plain_lows(p, t->model)) {
        obm__plain d = obm__group_plain(p->g, t->model, begin);
        return p->k->lows_bf16(out->low, &out->n, &out->zeros, high, d.model, d.base, n);
    }
    size_t bad = load_values(p->g, t->model, high << 16, block, begin, n);
    if (bad == n) p->k->lows_f32(out->low, &out->n, &out->zeros, high, block->mixed, n);
    return bad;
}

static bool has_room(const target *t) { return atomic_load_explicit(&t->listed, memory_order_relaxed) <= t->room; }

static void list_block(target *t, uint64_t block, const lower_halves *l) {
    if (l->n + l->zeros == 0) return;
    size_t words = LIST_HEAD + l->n, at = atomic_fetch_add_explicit(&t->listed, words, memory_order_relaxed);
    if (at > t->room || t->room - at < words) return;
    uint16_t *to = t->list + at;
    to[0] = (uint16_t)block;
    to[1] = (uint16_t)(block >> 16);
    to[2] = (uint16_t)l->zeros;
    to[3] = (uint16_t)l->n;
    memcpy(to + LIST_HEAD, l->low, l->n * sizeof *to);
}

static void list_blocks(void *arg, size_t first, size_t last, int worker) {
    pass *p = arg;
    obm__block block = obm__block_of(p->scratch, p->k, p->g, worker);
    populate_blocks(p, p->n_targets == 1 ? p->targets[0]->model : SIZE_MAX, first, last);
    for (size_t b = first; b < last; b++) {
        uint64_t begin;
        size_t n = block_at(p, b, &begin);
        for (size_t i = 0; i < p->n_targets; i++) {
            lower_halves lows;
            target *t = p->targets[i];
            if (!has_room(t)) continue;
            size_t bad = find_lows(p, t, &block, begin, n, &lows);
            if (bad < n)
                obm__note_lowest(&p->bad, begin + bad);
            else
                list_block(t, p->block + begin / OBM_MERGE_BLOCK, &lows);
        }
    }
}

static obm__range_fn blocks_of(count_what what) {
    return what == COUNT_BOUNDS ? bound_blocks : what == LIST_LOWS ? list_blocks : count_blocks;
}

/* The 32-bit histograms of the workers are flushed after every span. */
static void flush_histograms(const selection *s, const pass *p) {
    if (!p->bins) return;
    for (int w = 0; w < s->run->ctx->threads; w++) {
        uint32_t *histogram = p->histogram + (size_t)w * p->stride;
        for (size_t i = 0; i < p->bins; i++) p->total[i] += histogram[i];
        memset(histogram, 0, p->bins * sizeof *histogram);
    }
}

static obm_status count_group(const selection *s, pass *p, obm_error *err) {
    if (p->bins) memset(p->histogram, 0, (size_t)s->run->ctx->threads * p->stride * sizeof *p->histogram);
    p->bad = UINT64_MAX;
    for (p->begin = 0; p->begin < p->g->count; p->begin = p->end) {
        p->end = p->g->count - p->begin < OBM_MERGE_SPAN ? p->g->count : p->begin + OBM_MERGE_SPAN;
        obm__parallel(s->run->ctx, (size_t)((p->end - p->begin + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK), 1,
                      blocks_of(p->what), p);
        if (p->bad != UINT64_MAX) return obm__group_bad_rank(p->k, p->g, p->bad, err);
        flush_histograms(s, p);
        /* Of a small tensor the next pass finds the pages there, and the last one lets them go. */
        if (s->n_groups > 1 || p->g->count > OBM_MERGE_SPAN) obm__group_release(p->g, p->begin, p->end - p->begin);
        OBM_TRY(obm__run_report(s->run, err));
    }
    return OBM_OK;
}

static pass pass_of(const selection *s, obm__group *g, count_what what) {
    return (pass){.k = s->run->ctx->k,
                  .g = g,
                  .what = what,
                  .scratch = s->scratch,
                  .histogram = s->histogram,
                  .total = s->total,
                  .stride = LOW_BINS};
}

/* Most selections do without: the pages of such arrays take longer to come than a small tensor to be merged. */
static obm_status want_histograms(selection *s, obm_error *err) {
    size_t threads = (size_t)s->run->ctx->threads;
    if (!s->histogram) s->histogram = obm__desks_new(s->run->ctx, LOW_BINS * sizeof *s->histogram);
    if (!s->total) s->total = obm__alloc(LOW_BINS, sizeof *s->total);
    return s->histogram && s->total ? OBM_OK : obm__fail_nomem(err, (threads * 4 + 8) * (uint64_t)LOW_BINS);
}

static obm_status count_low(selection *s, size_t model, uint32_t high, obm_error *err) {
    OBM_TRY(want_histograms(s, err));
    memset(s->total, 0, LOW_BINS * sizeof *s->total);
    for (size_t i = 0; i < s->n_groups; i++) {
        pass p = pass_of(s, &s->groups[i], COUNT_LOW);
        p.model = model;
        p.high = high;
        p.bins = LOW_BINS;
        OBM_TRY(count_group(s, &p, err));
    }
    return OBM_OK;
}

/* How many elements are from each bound of the targets on. */
static obm_status count_bounds(const selection *s, target *const *targets, size_t n, obm_error *err) {
    uint64_t total[COUNTS] = {0};
    for (size_t i = 0; i < s->n_groups; i++) {
        pass p = pass_of(s, &s->groups[i], COUNT_BOUNDS);
        p.targets = targets;
        p.n_targets = n;
        p.histogram = s->counts;
        p.total = total;
        p.bins = n * BOUNDS;
        p.stride = COUNTS;
        OBM_TRY(count_group(s, &p, err));
    }
    for (size_t i = 0; i < n; i++) memcpy(targets[i]->total, total + i * BOUNDS, sizeof targets[i]->total);
    return OBM_OK;
}

/* ---- where the upper half about lies ---- */

typedef struct sample {
    const selection *s;
    uint64_t count; /* elements of all groups */
    size_t runs, first; /* first: of those that are read together */
    uint16_t *high; /* (n_targets, runs, SAMPLE_RUN) upper halves, HIGH_END where there is none */
} sample;

/* Upper halves of n elements; false: one of them is not finite, which is the counting pass's to say. */
static bool load_highs(const obm__group *g, size_t model, obm__block *b, uint64_t begin, size_t n, uint16_t *high) {
    if (model != OBM_BY_SCORE && obm__group_is_plain(g, model)) {
        uint16_t most;
        obm__plain t = obm__group_plain(g, model, begin);
        return b->k->sizes_bf16(high, &most, t.model, t.base, t.round, n) == n;
    }
    if (load_values(g, model, 0, b, begin, n) < n) return false;
    for (size_t i = 0; i < n; i++) high[i] = (uint16_t)(magnitude_bits(b->mixed[i]) >> 16);
    return true;
}

/* The group in which a run begins, and the element there. */
static const obm__group *place_of_run(const sample *t, size_t run, uint64_t *at) {
    const selection *s = t->s;
    size_t g = 0;
    *at = t->count / t->runs * run;
    while (g + 1 < s->n_groups && *at >= s->groups[g].count) *at -= s->groups[g++].count;
    return &s->groups[g];
}

/* Runs of neighbours at even distances: pages are what reading costs. */
static void sample_runs(void *arg, size_t first, size_t last, int worker) {
    const sample *t = arg;
    const selection *s = t->s;
    for (size_t r = t->first + first; r < t->first + last; r++) {
        uint64_t at;
        const obm__group *group = place_of_run(t, r, &at);
        obm__block block = obm__block_of(s->scratch, s->run->ctx->k, group, worker);
        size_t n = group->count - at < SAMPLE_RUN ? (size_t)(group->count - at) : SAMPLE_RUN;
        for (size_t m = 0; m < s->n_targets; m++) {
            uint16_t *high = t->high + (m * t->runs + r) * SAMPLE_RUN;
            bool finite = load_highs(group, s->targets[m].model, &block, at, n, high);
            for (size_t i = finite ? n : 0; i < SAMPLE_RUN; i++) high[i] = HIGH_END;
        }
    }
}

/* Pages come with their neighbours (pages.c), which would be 64 MiB of each input if all stayed until they are counted.
 * Of a small tensor they may. */
static void release_runs(const sample *t, size_t first, size_t last) {
    enum { NEIGHBOURS = 65536 / sizeof(uint16_t) };
    for (size_t r = first, next; r < last; r = next) {
        uint64_t begin, at, end;
        const obm__group *g = place_of_run(t, r, &begin);
        for (end = begin, next = r + 1; next < last && place_of_run(t, next, &at) == g; next++) end = at;
        begin -= begin < NEIGHBOURS ? begin : NEIGHBOURS;
        end = g->count - end < SAMPLE_RUN + NEIGHBOURS ? g->count : end + SAMPLE_RUN + NEIGHBOURS;
        if (t->s->n_groups > 1 || g->count > OBM_MERGE_SPAN) obm__group_release(g, begin, end - begin);
    }
}

static void read_sample(sample *t) {
    for (size_t end; t->first < t->runs; t->first = end) {
        end = t->runs - t->first < SAMPLE_AT_ONCE ? t->runs : t->first + SAMPLE_AT_ONCE;
        obm__parallel(t->s->run->ctx, end - t->first, 1, sample_runs, t);
        release_runs(t, t->first, end);
    }
}

/* The range [low, end) of upper halves in which the rest-th largest of `count` lies very likely: 4 standard deviations
 * of its rank in the sample around where it should be.  What may be above the whole sample is looked for below 1.5
 * times its largest, which two passes search. */
static void guess_range(uint32_t *histogram, const uint16_t *high, size_t n, uint64_t count, target *t) {
    memset(histogram, 0, (HIGH_END + 1) * sizeof *histogram);
    for (size_t i = 0; i < n; i++) histogram[high[i]]++;
    double size = (double)(n - histogram[HIGH_END]), share = (double)t->rest / (double)count, rank = share * size;
    double spread = 4 * sqrt(share * (1 - share) * size) + 1;
    uint64_t above = 0, from_end = rank < spread ? 0 : (uint64_t)ceil(rank - spread),
             from_low = (uint64_t)ceil(rank + spread);
    for (uint32_t bin = HIGH_END; bin-- > 0;) {
        if (above == 0 && from_end == 0) t->end = bin + BOUNDS * BOUNDS;
        above += histogram[bin];
        if (above < from_end) t->end = bin;
        if (above < from_low) continue;
        t->low = bin;
        break;
    }
}

static obm_status guess_ranges(selection *s, uint64_t count, obm_error *err) {
    uint64_t runs = count / (16 * SAMPLE_RUN), most = count / (2 * SAMPLE_RUN);
    runs = runs < SAMPLE_LEAST ? SAMPLE_LEAST : runs > SAMPLE_MOST ? SAMPLE_MOST : runs;
    sample t = {.s = s, .count = count, .runs = (size_t)(runs < most ? runs : most)};
    if (t.runs == 0) return OBM_OK;
    size_t each = t.runs * SAMPLE_RUN, bytes = s->n_targets * each * sizeof *t.high;
    uint32_t *histogram = obm__alloc(HIGH_END + 1, sizeof *histogram);
    t.high = obm__alloc(s->n_targets, each * sizeof *t.high);
    if (t.high && histogram) {
        read_sample(&t);
        for (size_t m = 0; m < s->n_targets; m++)
            if (s->targets[m].rest < count) guess_range(histogram, t.high + m * each, each, count, &s->targets[m]);
    }
    obm_status status = t.high && histogram ? OBM_OK : obm__fail_nomem(err, bytes + (HIGH_END + 1) * sizeof *histogram);
    obm_free(t.high);
    obm_free(histogram);
    return status;
}

/* ---- the upper half ---- */

/* The range that is likely, or the known one where it turned out to be elsewhere. */
static void narrow_guess(target *t) {
    if (t->low < t->known.low) t->low = t->known.low;
    if (t->end > t->known.end) t->end = t->known.end;
    if (t->low < t->end) return;
    t->low = t->known.low;
    t->end = t->known.end;
}

/* Rising bounds: all from low to end, so that both are known to hold; of somewhat more the middle ones, since it is
 * likely there, and far fewer of many. */
static void choose_bounds(target *t) {
    narrow_guess(t);
    uint32_t n = t->end - t->low + 1;
    for (uint32_t k = 0; k < BOUNDS; k++) {
        uint32_t step = n <= BOUNDS       ? (k < n ? k : n - 1)
                        : n <= 2 * BOUNDS ? (n - BOUNDS) / 2 + k
                                          : (uint32_t)((uint64_t)n * (k + 1) / (BOUNDS + 1));
        t->bounds[k] = t->low + step;
    }
}

static bool narrow_range(target *t) {
    range *r = &t->known;
    for (size_t k = 0; k < BOUNDS; k++) {
        if (t->bounds[k] <= r->low || t->bounds[k] >= r->end) continue;
        if (t->total[k] >= t->rest) {
            r->low = t->bounds[k];
            r->from_low = t->total[k];
        } else {
            r->end = t->bounds[k];
            r->from_end = t->total[k];
        }
    }
    return r->end - r->low == 1;
}

/* Per block there is what lies from one bound on less what lies from the next. */
static size_t bound_of(const target *t) {
    size_t k = 0;
    while (k < BOUNDS && t->bounds[k] != t->known.low) k++;
    return k + 1 < BOUNDS && t->bounds[k + 1] == t->known.end ? k : BOUNDS;
}

/* The upper half of every target, as known.low. */
static obm_status find_highs(selection *s, obm_error *err) {
    target *open[OBM__PICKS];
    uint64_t count = 0;
    size_t n_open = s->n_targets;
    for (size_t i = 0; i < s->n_groups; i++) count += s->groups[i].count;
    for (size_t i = 0; i < n_open; i++) {
        open[i] = &s->targets[i];
        open[i]->known = (range){.end = HIGH_END, .from_low = count};
        open[i]->end = HIGH_END;
    }
    OBM_TRY(guess_ranges(s, count, err));
    while (n_open) {
        size_t left = 0;
        for (size_t i = 0; i < n_open; i++) choose_bounds(open[i]);
        OBM_TRY(count_bounds(s, open, n_open, err));
        for (size_t i = 0; i < n_open; i++) {
            target *t = open[i];
            const range *r = &t->known;
            if (!narrow_range(t)) {
                open[left++] = t;
                continue;
            }
            t->bound = bound_of(t);
            t->equal = r->from_low - r->from_end;
            t->rest -= t->rest < r->from_end ? t->rest : r->from_end;
        }
        n_open = left;
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
static bool high_bits_suffice(const selection *s, size_t model) {
    if (model == OBM_BY_SCORE) return false;
    for (size_t i = 0; i < s->n_groups; i++)
        if (s->groups[i].work != OBM_BF16 || !s->groups[i].steps->round_deltas) return false;
    return true;
}

static obm__cut *cut_of(const obm__group *g, size_t model) { return &g->cuts[model == OBM_BY_SCORE ? 0 : model]; }

/* ---- lists of lower halves ---- */

typedef struct listed {
    uint64_t block;
    const uint16_t *lows;
    size_t n, zeros;
} listed;

/* The block at *at, which moves on to the next one; false at the end. */
static bool next_listed(const target *t, size_t *at, listed *b) {
    const uint16_t *words = t->list + *at;
    if (*at >= t->listed) return false;
    *b = (listed){words[0] | (uint64_t)words[1] << 16, words + LIST_HEAD, words[3], words[2]};
    *at += LIST_HEAD + b->n;
    return true;
}

/* The pattern of which t->rest are wanted: by the upper 8 of its lower 16 bits, then by the last. */
static uint32_t threshold_of_list(target *t) {
    uint64_t upper[256] = {0}, last[256] = {0};
    listed b;
    for (size_t at = 0; next_listed(t, &at, &b);) {
        upper[0] += b.zeros;
        for (size_t i = 0; i < b.n; i++) upper[b.lows[i] >> 8]++;
    }
    uint32_t bin = decisive_bin(upper, 256, &t->rest);
    for (size_t at = 0; next_listed(t, &at, &b);) {
        last[0] += bin ? 0 : b.zeros;
        for (size_t i = 0; i < b.n; i++) last[b.lows[i] & 255] += b.lows[i] >> 8 == bin;
    }
    uint32_t low = decisive_bin(last, 256, &t->rest);
    t->equal = last[low];
    return t->known.low << 16 | bin << 8 | low;
}

static uint64_t count_listed(const listed *b, uint32_t bits) {
    uint16_t low = (uint16_t)bits;
    uint64_t n = low ? 0 : b->zeros;
    for (size_t i = 0; i < b->n; i++) n += b->lows[i] == low;
    return n;
}

static uint64_t blocks_in(const obm__group *g) { return (g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK; }

static uint64_t most_listed(uint64_t count) {
    uint64_t words = count / LISTED_SHARE + FEW_LISTED;
    return words < MOST_LISTED ? words : MOST_LISTED;
}

uint64_t obm__select_bytes(uint64_t count, size_t n_picks) {
    return most_listed(count) * sizeof(uint16_t) * (n_picks < OBM__PICKS ? n_picks : OBM__PICKS);
}

/* Words for the heads of all blocks that may need one, and for what is listed, but no more than a list may have. */
static uint64_t room_for(const target *t, uint64_t blocks, uint64_t count) {
    uint64_t heads = LIST_HEAD * (t->equal < blocks ? t->equal : blocks), most = most_listed(count);
    return heads + t->equal < most ? heads + t->equal : heads < most ? most : 0;
}

static void drop_list(target *t) {
    obm_free(t->list);
    t->list = NULL;
}

/* One pass for all.  What has no room is given up. */
static obm_status list_lows(selection *s, obm_error *err) {
    target *open[OBM__PICKS];
    uint64_t blocks = 0, count = 0;
    size_t n = 0;
    for (size_t i = 0; i < s->n_groups; i++) blocks += blocks_in(&s->groups[i]), count += s->groups[i].count;
    for (size_t i = 0; i < s->n_targets; i++) {
        target *t = &s->targets[i];
        uint64_t room = room_for(t, blocks, count);
        if (high_bits_suffice(s, t->model) || t->equal == 0 || room == 0) continue;
        t->list = obm__alloc((size_t)room, sizeof *t->list);
        if (!t->list) return obm__fail_nomem(err, room * sizeof *t->list);
        t->room = (size_t)room;
        open[n++] = t;
    }
    blocks = 0;
    for (size_t i = 0; n && i < s->n_groups; i++) {
        pass p = pass_of(s, &s->groups[i], LIST_LOWS);
        p.targets = open;
        p.n_targets = n;
        p.block = blocks;
        OBM_TRY(count_group(s, &p, err));
        blocks += blocks_in(&s->groups[i]);
    }
    for (size_t i = 0; i < n; i++)
        if (!has_room(open[i])) drop_list(open[i]);
    return OBM_OK;
}

/* ---- cuts ---- */

/* Cuts of one group when t->rest more equal elements may stay; counts them only if it has to. */
static obm_status share_equal(const selection *s, obm__group *g, uint32_t bits, target *t, obm_error *err) {
    obm__cut *cut = cut_of(g, t->model);
    size_t blocks = (size_t)((g->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK);
    *cut = (obm__cut){.bits = bits};
    if (t->rest == 0 || blocks == 0) return OBM_OK;
    bool known = t->from && t->bound < BOUNDS;
    uint64_t *before = obm__alloc(blocks + 1, sizeof *before);
    if (!before) return obm__fail_nomem(err, blocks * sizeof *before);
    pass p = pass_of(s, g, COUNT_EQUAL);
    p.model = t->model;
    p.bits = bits;
    p.high = bits >> 16;
    p.equal = before;
    obm_status status = OBM_OK;
    for (size_t b = 0; known && b < blocks; b++) before[b] = (uint64_t)t->from[b][t->bound] - t->from[b][t->bound + 1];
    if (!known) status = count_group(s, &p, err);
    uint64_t total = 0;
    for (size_t b = 0; status == OBM_OK && b < blocks; b++) {
        uint64_t here = before[b];
        before[b] = total;
        total += here;
    }
    before[blocks] = total;
    bool partial = status == OBM_OK && total > t->rest;
    cut->equal = partial ? t->rest : UINT64_MAX;
    cut->before = partial ? before : NULL;
    if (!partial) obm_free(before);
    t->rest -= total < t->rest ? total : t->rest;
    return status;
}

/* How many equal elements each group has, `sums` (n_groups), as the list tells. */
static void sum_listed(const selection *s, const target *t, uint32_t bits, uint64_t *sums) {
    uint64_t *ends = sums + s->n_groups, end = 0;
    listed b;
    memset(sums, 0, s->n_groups * sizeof *sums);
    for (size_t i = 0; i < s->n_groups; i++) ends[i] = end += blocks_in(&s->groups[i]);
    for (size_t at = 0; next_listed(t, &at, &b);) {
        size_t low = 0, high = s->n_groups - 1; /* the first group that ends behind the block */
        uint64_t n = count_listed(&b, bits);
        while (n && low < high) {
            size_t middle = (low + high) / 2;
            if (ends[middle] > b.block)
                high = middle;
            else
                low = middle + 1;
        }
        sums[low] += n;
    }
}

/* Equal elements before each block of a group that begins with block `first`. */
static obm_status list_before(const target *t, const obm__group *g, uint64_t first, uint32_t bits, uint64_t **out,
                              obm_error *err) {
    uint64_t blocks = blocks_in(g), *before = obm__calloc((size_t)blocks + 1, sizeof *before);
    if (!before) return obm__fail_nomem(err, (blocks + 1) * sizeof *before);
    listed b;
    for (size_t at = 0; next_listed(t, &at, &b);)
        if (b.block >= first && b.block - first < blocks) before[b.block - first + 1] = count_listed(&b, bits);
    for (uint64_t i = 0; i < blocks; i++) before[i + 1] += before[i];
    *out = before;
    return OBM_OK;
}

/* Cuts of all groups when t->rest equal elements may stay. */
static obm_status share_listed(const selection *s, uint32_t bits, target *t, obm_error *err) {
    uint64_t *sums = obm__alloc(2 * s->n_groups, sizeof *sums), first = 0;
    obm_status status = sums ? OBM_OK : obm__fail_nomem(err, 2 * s->n_groups * sizeof *sums);
    if (sums) sum_listed(s, t, bits, sums);
    for (size_t i = 0; status == OBM_OK && i < s->n_groups; first += blocks_in(&s->groups[i++])) {
        obm__cut *cut = cut_of(&s->groups[i], t->model);
        bool partial = sums[i] > t->rest;
        *cut = (obm__cut){.bits = bits, .equal = partial ? t->rest : UINT64_MAX};
        if (partial && t->rest) status = list_before(t, &s->groups[i], first, bits, &cut->before, err);
        t->rest -= partial ? t->rest : sums[i];
    }
    obm_free(sums);
    return status;
}

/* The pattern that a target's upper half begins; its `rest` and `equal` then are of that pattern. */
static obm_status find_threshold(selection *s, target *t, uint32_t *bits, obm_error *err) {
    *bits = t->known.low << 16;
    if (high_bits_suffice(s, t->model) || t->equal == 0) return OBM_OK;
    if (t->list) {
        *bits = threshold_of_list(t);
        return OBM_OK;
    }
    t->bound = BOUNDS;
    OBM_TRY(count_low(s, t->model, t->known.low, err));
    uint32_t low = decisive_bin(s->total, LOW_BINS, &t->rest);
    *bits |= low;
    t->equal = s->total[low];
    return OBM_OK;
}

static obm_status find_cut(selection *s, target *t, obm_error *err) {
    uint32_t bits;
    OBM_TRY(find_threshold(s, t, &bits, err));
    bool all = t->rest == t->equal;
    if (!all && t->list) return share_listed(s, bits, t, err);
    for (size_t i = 0; i < s->n_groups; i++) {
        if (all)
            *cut_of(&s->groups[i], t->model) = (obm__cut){.bits = bits, .equal = UINT64_MAX};
        else
            OBM_TRY(share_equal(s, &s->groups[i], bits, t, err));
    }
    return OBM_OK;
}

static obm_status selection_new(selection *s, const obm__pick *picks, obm_error *err) {
    size_t threads = (size_t)s->run->ctx->threads, scratch = obm__group_scratch(s->groups[0].steps->n);
    s->scratch = obm__desks_new(s->run->ctx, scratch);
    s->counts = obm__calloc(threads * COUNTS, sizeof *s->counts);
    bool all = s->scratch && s->counts;
    /* With several groups the records of blocks would add up. */
    size_t blocks = s->n_groups == 1 ? (size_t)((s->groups[0].count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK) : 0;
    for (size_t i = 0; i < s->n_targets; i++) {
        target *t = &s->targets[i];
        *t = (target){.model = picks[i].model, .rest = picks[i].n, .bound = BOUNDS};
        if (blocks) t->from = obm__alloc(blocks, sizeof *t->from);
        all = all && (t->from || !blocks);
    }
    return all ? OBM_OK : obm__fail_nomem(err, threads * (scratch + COUNTS * sizeof *s->counts));
}

static void selection_clear(selection *s) {
    obm__desks_free(s->run->ctx, s->histogram);
    obm__desks_free(s->run->ctx, s->scratch); /* behind the histograms: the next one wants these again */
    obm_free(s->counts);
    obm_free(s->total);
    for (size_t i = 0; i < s->n_targets; i++) {
        obm_free(s->targets[i].from);
        drop_list(&s->targets[i]);
    }
}

obm_status obm__select_each(const obm__run *run, obm__group *groups, size_t n_groups, const obm__pick *picks,
                            size_t n_picks, obm_error *err) {
    selection s = {.run = run, .groups = groups, .n_groups = n_groups, .n_targets = n_picks};
    obm_status status = selection_new(&s, picks, err);
    if (status == OBM_OK) status = find_highs(&s, err);
    if (status == OBM_OK) status = list_lows(&s, err);
    for (size_t i = 0; status == OBM_OK && i < n_picks; i++) status = find_cut(&s, &s.targets[i], err);
    selection_clear(&s);
    return status;
}

obm_status obm__select(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n_keep,
                       obm_error *err) {
    return obm__select_each(run, groups, n_groups, &(obm__pick){model, n_keep}, 1, err);
}

obm_status obm__select_value(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n,
                             float *out, obm_error *err) {
    selection s = {.run = run, .groups = groups, .n_groups = n_groups, .n_targets = 1};
    uint32_t bits = 0;
    obm_status status = selection_new(&s, &(obm__pick){model, n}, err);
    if (status == OBM_OK) status = find_highs(&s, err);
    if (status == OBM_OK) status = list_lows(&s, err);
    if (status == OBM_OK) status = find_threshold(&s, &s.targets[0], &bits, err);
    if (status == OBM_OK) memcpy(out, &bits, sizeof *out);
    selection_clear(&s);
    return status;
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

void obm__cut_apply(const obm_kernels *k, const obm__cut *c, uint64_t block, float *d, size_t n) {
    uint32_t least;
    if (obm__cut_least(c, block, n, &least))
        k->keep_from(d, least, n);
    else
        keep_some(c->bits, equals_left(c, block), d, n);
}
