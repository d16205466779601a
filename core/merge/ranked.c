/* Masks by rank: an element's chance to stay grows with the rank of its magnitude in its row.
 *
 * With ranks r = 0 .. n - 1 of |d| in a row of n, ascending, equal magnitudes in the order of their indices,
 *
 *     p = density - epsilon + 2 * epsilon * r / (n - 1)          (n = 1: p = density)
 *
 * (Deep et al., DELLA-Merging, arXiv 2406.11617, section 3.1; a 1-D tensor is one row).  Draws are those of random.c.
 *
 * Where only the decisions are wanted nothing is sorted: the upper bits of a magnitude tell about where its rank lies,
 * which settles all but the few draws between the probabilities of that range; for these the exact rank is counted.
 * What a 0 is told does not matter, since a dropped 0 and a kept one are the same.
 */
#include "merge.h"

/* Magnitudes by exponent and 5 bits of mantissa, 32 octaves down from the largest; what is below shares a bin. */
#define BIN_SHIFT 18
#define BINS 1024u
/* Counting ranks may take so many steps per element of the row; from there on sorting is faster. */
#define STEPS 16
#define MAX_OPEN 256

struct obm__ranked {
    uint64_t at, until, cols;
    uint64_t origin; /* the element that place 0 is of */
    size_t span;     /* elements that `kept` or `factors` hold per model */
    uint8_t *kept;   /* (n_models / 8 rounded up, span), a bit per model; NULL where factors are wanted */
    float *factors;  /* (n_models, span) */
    uint32_t *words; /* (workers, 4, cols): keys and indices, and what sorting moves them to */
    const obm_kernels *k;
    const obm__group *g;
    float *lanes;
    _Atomic uint64_t bad;
};

static uint64_t span_of(uint64_t count) { return count < OBM_MERGE_SPAN ? count : OBM_MERGE_SPAN; }

static size_t planes_of(const obm__group *g) { return (g->steps->n + 7) / 8; }

static bool wants_factors(const obm__group *g) { return g->steps->rescale == OBM_RESCALE_INVERSE_DENSITY; }

bool obm__ranked_keeps(const obm__group *g) { return !wants_factors(g) && g->count / sizeof(float) <= OBM_MERGE_SPAN; }

uint64_t obm__ranked_bytes(const obm__group *g, int threads) {
    uint64_t kept = planes_of(g) * (obm__ranked_keeps(g) ? g->count : span_of(g->count)),
             all = wants_factors(g) ? g->steps->n * span_of(g->count) * sizeof(float) : kept;
    return all + (uint64_t)threads * 16 * obm__group_cols(g);
}

obm_status obm__ranked_new(const obm__run *run, const obm__group *g, uint64_t count, obm__ranked **out,
                           obm_error *err) {
    obm__ranked *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    r->span = (size_t)(obm__ranked_keeps(g) && count == g->count ? count : span_of(count));
    r->cols = obm__group_cols(g);
    if (wants_factors(g))
        r->factors = obm__alloc(g->steps->n * r->span, sizeof *r->factors);
    else
        r->kept = obm__alloc(planes_of(g), r->span);
    r->words = obm__alloc((size_t)run->ctx->threads * 4 * (size_t)r->cols, sizeof *r->words);
    if ((r->factors || r->kept) && r->words) {
        *out = r;
        return OBM_OK;
    }
    obm__ranked_free(r);
    return obm__fail_nomem(err, obm__ranked_bytes(g, run->ctx->threads));
}

void obm__ranked_free(obm__ranked *r) {
    if (!r) return;
    obm_free(r->factors);
    obm_free(r->kept);
    obm_free(r->words);
    obm_free(r);
}

/* Stable sort of n (key, index) pairs by their keys, 8 bits at a time; bits that all keys share take no pass.  Returns
 * the indices. */
static const uint32_t *sort_pairs(uint32_t *words, size_t n) {
    uint32_t *from = words, *to = words + 2 * n;
    for (int shift = 0; shift < 32; shift += 8) {
        size_t start[257] = {0};
        for (size_t j = 0; j < n; j++) start[(from[j] >> shift & 255) + 1]++;
        if (start[(from[0] >> shift & 255) + 1] == n) continue;
        for (size_t i = 0; i < 256; i++) start[i + 1] += start[i];
        for (size_t j = 0; j < n; j++) {
            size_t at = start[from[j] >> shift & 255]++;
            to[at] = from[j];
            to[n + at] = from[n + j];
        }
        uint32_t *swap = from;
        from = to;
        to = swap;
    }
    return from + n;
}

/* Keys of one row; returns the first index that is not finite, UINT64_MAX if all are. */
static uint64_t read_row(const obm__ranked *r, obm__block *b, size_t model, uint64_t row, uint32_t *words) {
    size_t cols = (size_t)r->cols;
    for (size_t j = 0; j < cols; j += b->n) {
        b->begin = row * cols + j;
        b->n = cols - j < OBM_MERGE_BLOCK ? cols - j : OBM_MERGE_BLOCK;
        if (!obm__group_is_plain(b->g, model)) obm__group_base(b->k, b->g, b->begin, b->n, b->base, b->scratch);
        size_t bad = obm__group_delta(b->k, b->g, model, b->begin, b->n, b->base, b->mixed, b->scratch);
        if (bad < b->n) return b->begin + bad;
        for (size_t i = 0; i < b->n; i++) words[j + i] = obm__bits_of(b->mixed[i]) & 0x7fffffffu;
    }
    return UINT64_MAX;
}

/* What the probability of a rank needs. */
typedef struct chances {
    size_t n;
    double density, epsilon;
    uint64_t key;
} chances;

static double chance_of(const chances *c, size_t rank) {
    if (c->n == 1) return c->density;
    return c->density - c->epsilon + 2 * c->epsilon * ((double)rank / (double)(c->n - 1));
}

static bool has_element(const obm__ranked *r, uint64_t element) { return element >= r->at && element < r->until; }

/* Where the span keeps what becomes of an element of it. */
static size_t place_of(const obm__ranked *r, size_t model, uint64_t element) {
    return model * r->span + (size_t)(element - r->origin);
}

/* The decisions about a model from an element on: its bit in bytes. */
typedef struct decisions {
    uint8_t *at;
    unsigned bit;
} decisions;
static decisions decisions_of(const obm__ranked *r, size_t model, uint64_t element) {
    return (decisions){r->kept + place_of(r, model / 8, element), (unsigned)(model % 8)};
}

static void sort_row(const obm__ranked *r, size_t model, uint64_t row, const chances *c, uint32_t *words) {
    for (size_t j = 0; j < c->n; j++) words[c->n + j] = (uint32_t)j;
    const uint32_t *order = sort_pairs(words, c->n);
    for (size_t rank = 0; rank < c->n; rank++) {
        uint64_t element = row * c->n + order[rank];
        if (!has_element(r, element)) continue;
        double keep = chance_of(c, rank);
        bool stays = obm__random_draw(c->key, element) < obm__random_limit(keep);
        if (r->kept) {
            decisions kept = decisions_of(r, model, element);
            *kept.at |= (uint8_t)(stays << kept.bit);
        } else {
            r->factors[place_of(r, model, element)] = stays ? (float)(1 / keep) : 0.0f;
        }
    }
}

/* ---- decisions without an order ---- */

typedef struct bins {
    uint32_t first;                 /* upper bits of what bin 0 takes at most */
    uint32_t start[BINS + 1];       /* rank of the first element of each bin */
    uint32_t low[BINS], high[BINS]; /* upper halves of draws: below low all of a bin stay, above high none */
    bool open[BINS];                /* has elements that are not settled */
} bins;

static inline uint32_t bin_of(const bins *b, uint32_t key) {
    uint32_t upper = key >> BIN_SHIFT;
    return upper > b->first ? upper - b->first : 0;
}

/* The upper 32 of 53 bits. */
static uint32_t top_of(uint64_t limit) { return limit >> 53 ? UINT32_MAX : (uint32_t)(limit >> 21); }

static void fill_bins(bins *b, const chances *c, const uint32_t *keys) {
    uint32_t most = 0, *start = b->start;
    for (size_t j = 0; j < c->n; j++) most = keys[j] > most ? keys[j] : most;
    b->first = most >> BIN_SHIFT < BINS ? 0 : (most >> BIN_SHIFT) - (BINS - 1);
    memset(b->start, 0, sizeof b->start);
    memset(b->open, 0, sizeof b->open);
    for (size_t j = 0; j < c->n; j++) start[bin_of(b, keys[j]) + 1]++;
    uint32_t limit = top_of(obm__random_limit(chance_of(c, 0)));
    for (size_t i = 0; i < BINS; i++) {
        b->low[i] = limit;
        /* Chances rise with the rank, so those of the next bin's first bound this one's. */
        size_t next = start[i] + start[i + 1];
        if (start[i + 1]) limit = top_of(obm__random_limit(chance_of(c, next < c->n ? next : c->n - 1)));
        b->high[i] = limit;
        start[i + 1] = (uint32_t)next;
    }
}

/* Of keys: [0] from the lowest of the bin of `key` on, [1] from `key` on, [2] above it. */
static void count_keys(const obm_kernels *k, const bins *b, uint32_t key, const uint32_t *keys, size_t n,
                       uint32_t counts[8]) {
    uint32_t bin = bin_of(b, key), from[8] = {bin ? (b->first + bin) << BIN_SHIFT : 0, key, key + 1};
    memset(counts, 0, 8 * sizeof *counts);
    k->count_from(counts, from, (const float *)(const void *)keys, n);
}

/* The open elements by their exact ranks.  others: the keys of all elements of open bins in the order of these; where:
 * at which of them each open element is. */
static void settle_open(const obm_kernels *k, const bins *b, const chances *c, uint64_t begin, const uint32_t *open,
                        const uint32_t *where, size_t n_open, const uint32_t *others, size_t n_others, decisions kept) {
    for (size_t i = 0; i < n_open; i++) {
        size_t at = where[i];
        uint32_t key = others[at], before[8], behind[8];
        count_keys(k, b, key, others, at, before);
        count_keys(k, b, key, others + at + 1, n_others - at - 1, behind);
        size_t rank = b->start[bin_of(b, key)] + (before[0] - before[2]) + (behind[0] - behind[1]);
        bool stays = obm__random_draw(c->key, begin + open[i]) < obm__random_limit(chance_of(c, rank));
        kept.at[open[i]] |= (uint8_t)(stays << kept.bit);
    }
}

/* False: too many elements are open, and nothing is decided.  words: (4, n), the keys first. */
static bool decide_row(const obm_kernels *k, const chances *c, uint64_t begin, uint32_t *words, decisions kept) {
    const uint32_t *keys = words;
    uint32_t *tops = words + c->n, *open = words + 2 * c->n, *others = words + 3 * c->n;
    bins b;
    size_t n_open = 0, n_others = 0;
    fill_bins(&b, c, keys);
    k->random_tops(tops, obm__random_state(c->key, begin), c->n);
    for (size_t j = 0; j < c->n; j++) {
        uint32_t bin = bin_of(&b, keys[j]);
        bool stays = tops[j] < b.low[bin];
        kept.at[j] |= (uint8_t)(stays << kept.bit);
        open[n_open] = (uint32_t)j;
        n_open += !stays & (tops[j] <= b.high[bin]) & (keys[j] != 0);
    }
    if (n_open > MAX_OPEN) return false;
    for (size_t i = 0; i < n_open; i++) {
        uint32_t bin = bin_of(&b, keys[open[i]]);
        n_others += b.open[bin] ? 0 : b.start[bin + 1] - b.start[bin];
        b.open[bin] = true;
    }
    if (n_open * n_others > STEPS * c->n) return false;
    n_others = 0;
    for (size_t j = 0, i = 0; j < c->n && i < n_open; i++) {
        for (; j <= open[i]; j++) {
            others[n_others] = keys[j];
            n_others += b.open[bin_of(&b, keys[j])];
        }
        tops[i] = (uint32_t)n_others - 1;
    }
    for (size_t j = n_open ? open[n_open - 1] + 1 : c->n; j < c->n; j++) {
        others[n_others] = keys[j];
        n_others += b.open[bin_of(&b, keys[j])];
    }
    settle_open(k, &b, c, begin, open, tops, n_open, others, n_others, kept);
    return true;
}

/* ---- the same for magnitudes that are bf16 ---- */

/* Each of the largest has a bin of its own, in which ranks follow the indices; what is below shares the first one. */
#define SIZE_BINS 1024u
/* Open elements whose ranks one count over the row finds. */
#define TOGETHER 4

typedef struct size_bins {
    uint32_t first;                /* the size that bin 0 takes at most */
    uint32_t start[SIZE_BINS + 1]; /* rank of the first element of each bin */
    uint32_t sure[SIZE_BINS][2];   /* as low and high of bins, but a little apart: rounding is not followed */
} size_bins;

static inline uint32_t size_bin(const size_bins *b, uint32_t size) {
    return (size > b->first ? size : b->first) - b->first;
}

static void fill_size_bins(size_bins *b, const chances *c, const uint16_t *sizes, uint16_t most) {
    double least = chance_of(c, 0) * 0x1p32, step = c->n == 1 ? 0 : 2 * c->epsilon / (double)(c->n - 1) * 0x1p32;
    uint32_t *start = b->start;
    b->first = most < SIZE_BINS ? 0 : most - (SIZE_BINS - 1);
    memset(start, 0, sizeof b->start);
    for (size_t j = 0; j < c->n; j++) start[size_bin(b, sizes[j]) + 1]++;
    double limit = least;
    for (size_t i = 0; i < SIZE_BINS; i++) {
        start[i + 1] += start[i];
        b->sure[i][0] = limit < 2 ? 0 : (uint32_t)(limit - 2);
        /* Behind the last element bins are empty, and chances may be above 1. */
        limit = fmin(least + step * (double)start[i + 1], 0x1p32);
        b->sure[i][1] = limit > 0x1p32 - 4 ? UINT32_MAX : (uint32_t)(limit + 2);
    }
}

/* Up to TOGETHER open elements in rising order by their exact ranks. */
static void settle_sizes(const obm_kernels *k, const size_bins *b, const chances *c, uint64_t begin,
                         const uint16_t *sizes, const uint32_t *open, size_t n_open, decisions kept) {
    uint16_t from[2 * TOGETHER] = {0};
    uint32_t counts[2 * TOGETHER] = {0}, equal[TOGETHER];
    size_t at = 0;
    bool shared = false;
    for (size_t i = 0; i < n_open; i++) {
        from[2 * i] = sizes[open[i]];
        from[2 * i + 1] = (uint16_t)(from[2 * i] + 1);
        shared |= from[2 * i] <= b->first;
    }
    for (size_t i = 0; i < n_open; at = open[i++]) {
        k->count_bf16(counts, from, sizes + at, NULL, 0, open[i] - at);
        equal[i] = counts[2 * i] - counts[2 * i + 1];
    }
    if (shared) k->count_bf16(counts, from, sizes + at, NULL, 0, c->n - at);
    for (size_t i = 0; i < n_open; i++) {
        uint32_t bin = size_bin(b, from[2 * i]);
        size_t rank = equal[i] + (bin ? b->start[bin] : c->n - counts[2 * i]);
        bool stays = obm__random_draw(c->key, begin + open[i]) < obm__random_limit(chance_of(c, rank));
        kept.at[open[i]] |= (uint8_t)(stays << kept.bit);
    }
}

/* As decide_row.  sizes: (n); words: (2, n). */
static bool decide_sizes(const obm_kernels *k, const chances *c, uint64_t begin, const uint16_t *sizes, uint16_t most,
                         uint32_t *words, decisions kept) {
    uint32_t *tops = words, *open = words + c->n;
    size_bins b;
    size_t n = c->n, n_open = 0;
    fill_size_bins(&b, c, sizes, most);
    k->random_tops(tops, obm__random_state(c->key, begin), c->n);
    /* What the loop reads is named: bytes that it writes may be anything else. */
    const uint32_t below = b.first;
    const unsigned bit = kept.bit;
    uint8_t *at = kept.at;
    for (size_t j = 0; j < n; j++) {
        uint32_t size = sizes[j], top = tops[j];
        const uint32_t *sure = b.sure[(size > below ? size : below) - below];
        uint32_t stays = top < sure[0];
        at[j] |= (uint8_t)(stays << bit);
        open[n_open] = (uint32_t)j;
        n_open += (stays ^ 1) & (top <= sure[1]) & (size != 0);
    }
    if (n_open > MAX_OPEN) return false;
    for (size_t i = 0; i < n_open; i += TOGETHER)
        settle_sizes(k, &b, c, begin, sizes, open + i, n_open - i < TOGETHER ? n_open - i : TOGETHER, kept);
    return true;
}

/* ---- rows ---- */

static bool has_sizes(const obm__group *g, size_t model) {
    if (!obm__group_is_plain(g, model)) return false;
    obm__plain p = obm__group_plain(g, model, 0);
    return p.round || !p.base;
}

/* Returns the first index that is not finite, UINT64_MAX if all are. */
static uint64_t rank_row(const obm__ranked *r, obm__block *b, size_t model, uint64_t row, uint32_t *words) {
    const obm__steps *s = r->g->steps;
    chances c = {.n = (size_t)r->cols,
                 .density = s->density[model],
                 .epsilon = obm__steps_value(s, "epsilon", model),
                 .key = obm__random_key(s->seed, r->g->name, model)};
    uint64_t begin = row * c.n;
    bool whole = r->kept && begin >= r->at && begin + c.n <= r->until && c.n < UINT32_MAX;
    decisions kept = {0};
    if (whole) kept = decisions_of(r, model, begin);
    if (whole && has_sizes(r->g, model)) {
        obm__plain p = obm__group_plain(r->g, model, begin);
        uint16_t *sizes = (uint16_t *)(void *)words, most;
        size_t bad = r->k->sizes_bf16(sizes, &most, p.model, p.base, p.round, c.n);
        if (bad < c.n) return begin + bad;
        if (decide_sizes(r->k, &c, begin, sizes, most, words + c.n, kept)) return UINT64_MAX;
    }
    uint64_t bad = read_row(r, b, model, row, words);
    if (bad != UINT64_MAX) return bad;
    if (!whole || !decide_row(r->k, &c, begin, words, kept)) sort_row(r, model, row, &c, words);
    return UINT64_MAX;
}

static bool has_ranks(const obm__steps *s, size_t model) { return s->density[model] > 0 && s->density[model] < 1; }

/* Decisions begin as 0, of what the span has of a row. */
static void clear_row(const obm__ranked *r, uint64_t row) {
    uint64_t begin = row * r->cols > r->at ? row * r->cols : r->at,
             end = (row + 1) * r->cols < r->until ? (row + 1) * r->cols : r->until;
    for (size_t p = 0; r->kept && p < planes_of(r->g); p++) memset(r->kept + place_of(r, p, begin), 0, end - begin);
}

static void rank_rows(void *arg, size_t first, size_t last, int worker) {
    obm__ranked *r = arg;
    obm__block b = obm__block_of(r->lanes, r->k, r->g, worker);
    uint32_t *words = r->words + (size_t)worker * 4 * (size_t)r->cols;
    for (size_t i = first; i < last; i++) {
        uint64_t row = r->at / r->cols + i;
        clear_row(r, row);
        for (size_t m = 0; m < r->g->steps->n; m++) {
            uint64_t bad = has_ranks(r->g->steps, m) ? rank_row(r, &b, m, row, words) : UINT64_MAX;
            if (bad != UINT64_MAX) obm__note_lowest(&r->bad, bad);
        }
    }
}

obm_status obm__ranked_fill(const obm__run *run, obm__ranked *r, const obm__group *g, uint64_t at, uint64_t until,
                            float *lanes, obm_error *err) {
    r->at = at;
    r->until = until;
    r->origin = r->span < g->count ? at : 0;
    r->k = run->ctx->k;
    r->g = g;
    r->lanes = lanes;
    r->bad = UINT64_MAX;
    obm__parallel(run->ctx, (size_t)((until - 1) / r->cols - at / r->cols + 1), 1, rank_rows, r);
    return r->bad == UINT64_MAX ? OBM_OK : obm__group_bad(r->k, g, r->bad, err);
}

void obm__ranked_bits(const obm__ranked *r, const obm__group *g, size_t model, uint64_t element, uint8_t *bits,
                      size_t n) {
    memset(bits, 0, (n + 7) / 8);
    if (g->steps->density[model] <= 0) return;
    const decisions kept = decisions_of(r, model, element);
    size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        uint64_t eight; /* bytes of 0 or 1: each product moves one of them to its bit of the upper byte */
        memcpy(&eight, kept.at + j, sizeof eight);
        bits[j / 8] = (uint8_t)((eight >> kept.bit & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
    for (; j < n; j++) bits[j / 8] |= (uint8_t)((kept.at[j] >> kept.bit & 1) << j % 8);
}

void obm__ranked_apply(const obm__ranked *r, const obm__group *g, size_t model, uint64_t element, float *d, size_t n) {
    if (!has_ranks(g->steps, model)) {
        if (g->steps->density[model] <= 0) memset(d, 0, n * sizeof *d);
        return;
    }
    if (r->kept) {
        const decisions kept = decisions_of(r, model, element);
        for (size_t j = 0; j < n; j++) d[j] = obm__keep_if(d[j], kept.at[j] >> kept.bit & 1);
        return;
    }
    const float *factor = r->factors + model * r->span + (size_t)(element - r->at);
    for (size_t j = 0; j < n; j++) d[j] *= factor[j];
}
