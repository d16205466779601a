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
    bool whole;      /* of the whole group, one span after the other */
    uint64_t first;  /* the row that the first place is of; of factors the element */
    size_t rows;     /* that `kept` holds per model */
    size_t stride;   /* bytes of a row in it, whole words */
    uint8_t *kept;   /* (n_models, rows, stride), bits, LSB first; NULL where factors are wanted */
    size_t span;     /* elements that `factors` hold per model */
    float *factors;  /* (n_models, span) */
    uint32_t *words; /* (workers, words_of) */
    const obm_kernels *k;
    const obm__group *g;
    float *lanes;
    _Atomic uint64_t bad;
};

static uint64_t span_of(uint64_t count) { return count < OBM_MERGE_SPAN ? count : OBM_MERGE_SPAN; }

/* Keys and indices, and what sorting moves them to, or as much of shorter numbers and bits in whole words. */
static uint64_t words_of(uint64_t cols) { return 4 * (cols + 4); }

static uint64_t stride_of(uint64_t cols) { return (cols + 63) / 64 * 8; }

/* A span begins and ends inside of rows, which are ranked as a whole. */
static uint64_t span_rows(const obm__group *g, uint64_t count) {
    uint64_t rows = obm__group_rows(g), most = count ? span_of(count) / obm__group_cols(g) + 2 : 0;
    return rows < most ? rows : most;
}

static bool wants_factors(const obm__group *g) { return g->steps->rescale == OBM_RESCALE_INVERSE_DENSITY; }

static uint64_t kept_bytes(const obm__group *g, uint64_t rows) {
    return g->steps->n * rows * stride_of(obm__group_cols(g));
}

bool obm__ranked_keeps(const obm__group *g) {
    return !wants_factors(g) && kept_bytes(g, obm__group_rows(g)) / sizeof(float) <= OBM_MERGE_SPAN;
}

uint64_t obm__ranked_bytes(const obm__group *g, int threads) {
    uint64_t rows = obm__ranked_keeps(g) ? obm__group_rows(g) : span_rows(g, g->count),
             all = wants_factors(g) ? g->steps->n * span_of(g->count) * sizeof(float) : kept_bytes(g, rows);
    return all + (uint64_t)threads * 4 * words_of(obm__group_cols(g));
}

obm_status obm__ranked_new(const obm__run *run, const obm__group *g, uint64_t count, obm__ranked **out,
                           obm_error *err) {
    obm__ranked *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    r->whole = obm__ranked_keeps(g) && count == g->count;
    r->rows = (size_t)(r->whole ? obm__group_rows(g) : span_rows(g, count));
    r->cols = obm__group_cols(g);
    r->stride = (size_t)stride_of(r->cols);
    r->span = (size_t)span_of(count);
    if (wants_factors(g))
        r->factors = obm__alloc(g->steps->n * r->span, sizeof *r->factors);
    else
        r->kept = obm__alloc(g->steps->n * r->rows, r->stride);
    r->words = obm__alloc((size_t)run->ctx->threads * (size_t)words_of(r->cols), sizeof *r->words);
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

/* Where the decisions about a row are. */
static uint8_t *kept_row(const obm__ranked *r, size_t model, uint64_t row) {
    return r->kept + (model * r->rows + (size_t)(row - r->first)) * r->stride;
}

static inline void keep_bit(uint8_t *kept, size_t at, bool stays) { kept[at / 8] |= (uint8_t)(stays << at % 8); }

static inline bool stays_at(const chances *c, size_t rank, uint64_t element) {
    return obm__random_draw(c->key, element) < obm__random_limit(chance_of(c, rank));
}

static void sort_row(const obm__ranked *r, size_t model, uint64_t row, const chances *c, uint32_t *words) {
    for (size_t j = 0; j < c->n; j++) words[c->n + j] = (uint32_t)j;
    const uint32_t *order = sort_pairs(words, c->n);
    uint8_t *kept = r->kept ? kept_row(r, model, row) : NULL;
    if (kept) memset(kept, 0, r->stride);
    for (size_t rank = 0; rank < c->n; rank++) {
        uint64_t element = row * c->n + order[rank];
        bool here = kept || (element >= r->at && element < r->until), stays = here && stays_at(c, rank, element);
        if (kept)
            keep_bit(kept, order[rank], stays);
        else if (here)
            r->factors[model * r->span + (element - r->first)] = stays ? (float)(1 / chance_of(c, rank)) : 0.0f;
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
                        const uint32_t *where, size_t n_open, const uint32_t *others, size_t n_others, uint8_t *kept) {
    for (size_t i = 0; i < n_open; i++) {
        size_t at = where[i];
        uint32_t key = others[at], before[8], behind[8];
        count_keys(k, b, key, others, at, before);
        count_keys(k, b, key, others + at + 1, n_others - at - 1, behind);
        size_t rank = b->start[bin_of(b, key)] + (before[0] - before[2]) + (behind[0] - behind[1]);
        keep_bit(kept, open[i], stays_at(c, rank, begin + open[i]));
    }
}

/* False: too many elements are open, and nothing is decided.  words: (4, n), the keys first. */
static bool decide_row(const obm_kernels *k, const chances *c, uint64_t begin, uint32_t *words, uint8_t *kept) {
    const uint32_t *keys = words;
    uint32_t *tops = words + c->n, *open = words + 2 * c->n, *others = words + 3 * c->n;
    bins b;
    size_t n_open = 0, n_others = 0;
    fill_bins(&b, c, keys);
    memset(kept, 0, (size_t)stride_of(c->n));
    k->random_tops(tops, obm__random_state(c->key, begin), c->n);
    for (size_t j = 0; j < c->n; j++) {
        uint32_t bin = bin_of(&b, keys[j]);
        bool stays = tops[j] < b.low[bin];
        keep_bit(kept, j, stays);
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

/* The sizes of the 16 octaves of the largest have bins of their own; what is below shares the first one. */
#define SIZE_BINS 2048u
#define SIZE_GROUP 8u
#define SIZE_GROUPS (SIZE_BINS / SIZE_GROUP)
/* No size is so large. */
#define NO_SIZE 0x7fff
/* Elements of the shared bin whose ranks may be counted one by one. */
#define FEW_SHARED 16
/* Places have 16 bits. */
#define MOST_SIZES 65535
/* A chance that is multiplied out instead of divided is so far from the other at most, in units of 2^-53. */
#define ROUNDING 64.0

typedef struct size_ranks {
    uint32_t first;                   /* the size that bin 0 takes at most */
    uint32_t count[SIZE_BINS];        /* elements of each bin, */
    uint32_t front[SIZE_BINS];        /* and those in the first half of the row */
    uint32_t before[SIZE_GROUPS + 1]; /* rank of the first element of each group of bins */
    uint32_t n, half;
} size_ranks;

static inline uint32_t size_bin(const size_ranks *r, uint32_t size) {
    return (size > r->first ? size : r->first) - r->first;
}

static inline void count_place(uint32_t *count, uint16_t *place) {
    uint32_t *bin = count + *place, here = *bin;
    *place = (uint16_t)here;
    *bin = here + 1;
}

/* places: which of its bin each element is among those of its half.  Equal sizes wait for each other's counter, so the
 * halves take turns; and choosing the bins in the same loop would take longer than a loop of its own. */
static void count_sizes(size_ranks *r, const uint16_t *sizes, uint16_t *places, uint16_t most, size_t n) {
    const uint16_t first = most < SIZE_BINS ? 0 : (uint16_t)(most - (SIZE_BINS - 1));
    const size_t half = n / 2;
    r->first = first;
    r->n = (uint32_t)n;
    r->half = (uint32_t)half;
    memset(r->count, 0, sizeof r->count);
    memset(r->front, 0, sizeof r->front);
    for (size_t j = 0; j < n; j++) places[j] = (uint16_t)((sizes[j] > first ? sizes[j] : first) - first);
    for (size_t j = 0; j < half; j++) {
        count_place(r->front, places + j);
        count_place(r->count, places + half + j);
    }
    if (n % 2) count_place(r->count, places + n - 1);
    for (size_t i = 0; i < SIZE_BINS; i++) r->count[i] += r->front[i];
    const uint32_t *count = r->count;
    r->before[0] = 0;
    for (size_t g = 0; g < SIZE_GROUPS; g++, count += SIZE_GROUP)
        r->before[g + 1] = r->before[g] + ((count[0] + count[1]) + (count[2] + count[3])) +
                           ((count[4] + count[5]) + (count[6] + count[7]));
}

/* Of the first element of a bin. */
static inline uint32_t rank_of_bin(const size_ranks *r, uint32_t bin) {
    const uint32_t *count = r->count + bin / SIZE_GROUP * SIZE_GROUP;
    uint32_t rank = r->before[bin / SIZE_GROUP];
    for (uint32_t i = 0; i < SIZE_GROUP - 1; i++) rank += i < bin % SIZE_GROUP ? count[i] : 0;
    return rank;
}

/* The first bin whose first element has the rank or a higher one, SIZE_BINS if there is none; rank > 0. */
static uint32_t bin_above(const size_ranks *r, uint32_t rank) {
    const uint32_t *at = r->before;
    if (rank > r->n) return SIZE_BINS;
    /* The last group that begins below the rank. */
    for (size_t half = SIZE_GROUPS / 2; half > 0; half /= 2) at += at[half] < rank ? half : 0;
    uint32_t bin = (uint32_t)(at - r->before) * SIZE_GROUP, here = *at;
    for (unsigned i = 0, sum = here; i < SIZE_GROUP; i++) {
        here += sum < rank;
        sum += r->count[bin + i];
    }
    return bin + here - *at;
}

/* The least size from which on all have the rank or a higher one, 0 for rank 0. */
static uint16_t size_from(const size_ranks *r, uint32_t rank) {
    if (rank == 0) return 0;
    return rank > r->n ? NO_SIZE : (uint16_t)(r->first + bin_above(r, rank));
}

/* The largest size below which all have lower ranks, at least 1: zeros may be dropped. */
static uint16_t size_to(const size_ranks *r, uint32_t rank) {
    if (rank >= r->n) return NO_SIZE;
    uint32_t bin = bin_above(r, rank + 1) - 1;
    return (uint16_t)(bin ? r->first + bin : 1);
}

/* From a real number of ranks, one more or one less than it is: rounding is not followed. */
static uint32_t rank_from(double x, double step, bool up) {
    if (x <= 0) return 0;
    return step > 0 && x / step < 0x1p30 ? (uint32_t)(x / step) + (up ? 2 : 0) : 1u << 30;
}

/* Draws between the least chance and the largest are cut into 14 stretches, with what is below and above them as the
 * first and the last one.  Stretch i has the upper halves [begin, end): all ranks whose chance is `end` or more stay,
 * all up to `begin` go. */
static void fill_choice(obm__choice *t, const size_ranks *r, const chances *c) {
    double least = chance_of(c, 0) * 0x1p16, range = c->n == 1 ? 0 : 2 * c->epsilon * 0x1p16,
           step = c->n == 1 ? 0 : range / (double)(c->n - 1), slices = fmin(floor(14 * 0x1p16 / (range + 2)), 0xffff);
    double from = fmax(floor(least - 0x1p16 / slices - 1), 0), begin = 0;
    t->from = (uint16_t)from;
    t->step = (uint16_t)slices;
    for (int i = 0; i < 16; i++) {
        double end = i == 15 ? 0x1p16 : fmin(from + ceil((i + 1) * 0x1p16 / slices), 0x1p16);
        t->keep[i] = size_from(r, rank_from(end + 0x1p-20 - least, step, true));
        t->drop[i] = size_to(r, rank_from(begin - 0x1p-20 - least, step, false));
        begin = end;
    }
}

/* Indices of the bits that are 1; four are written for every word, most of which have fewer. */
static size_t list_bits(const uint64_t *words, size_t n_words, uint32_t *out) {
    size_t n = 0;
    for (size_t w = 0; w < n_words; w++) {
        uint64_t bits = words[w];
        size_t count = (size_t)__builtin_popcountll(bits);
        uint32_t *at = out + n;
        for (size_t i = 0; i < (count > 4 ? count : 4); i++, bits &= bits - 1)
            at[i] = (uint32_t)(64 * w) + (uint32_t)__builtin_ctzll(bits | (uint64_t)1 << 63);
        n += count;
    }
    return n;
}

static size_t rank_of_shared(const uint16_t *sizes, size_t at, size_t n) {
    size_t rank = 0;
    for (size_t j = 0; j < n; j++) rank += sizes[j] < sizes[at] || (sizes[j] == sizes[at] && j < at);
    return rank;
}

/* Elements that the table leaves open, by their exact ranks. */
static bool settle_sizes(const size_ranks *r, const chances *c, uint64_t begin, const uint16_t *sizes,
                         const uint16_t *places, const uint32_t *open, size_t n_open, uint8_t *kept) {
    const double least = chance_of(c, 0) * 0x1p53, step = c->n == 1 ? 0 : 2 * c->epsilon / (double)(c->n - 1) * 0x1p53;
    size_t n_shared = 0;
    for (size_t i = 0; i < n_open; i++) {
        size_t j = open[i];
        uint32_t bin = size_bin(r, sizes[j]), rank = rank_of_bin(r, bin) + places[j];
        rank += j < r->half ? 0 : r->front[bin];
        double draw = (double)obm__random_draw(c->key, begin + j), over = draw - (least + step * rank);
        bool stays = over < 0;
        n_shared += r->first && sizes[j] <= r->first && draw < least + step * r->count[0] + ROUNDING;
        if (fabs(over) < ROUNDING) stays = stays_at(c, rank, begin + j);
        keep_bit(kept, j, stays);
    }
    if (n_shared > FEW_SHARED) return false;
    for (size_t i = 0; n_shared && i < n_open; i++) {
        size_t j = open[i];
        if (sizes[j] > r->first) continue; /* also what no rank of the bin lets stay, to the same end */
        kept[j / 8] &= (uint8_t) ~(1u << j % 8);
        keep_bit(kept, j, stays_at(c, rank_of_shared(sizes, j, c->n), begin + j));
    }
    return true;
}

/* As decide_row.  words: words_of(n), of which the sizes take the first n / 2. */
static bool decide_sizes(const obm_kernels *k, const chances *c, uint64_t begin, uint32_t *words, uint16_t most,
                         uint8_t *kept) {
    const size_t n = c->n, n_words = (n + 63) / 64;
    uint16_t *sizes = (uint16_t *)(void *)words, *highs = sizes + n, *places = highs + n;
    uint64_t *unsure = (uint64_t *)(void *)(words + 2 * (n + 4));
    uint32_t *open = (uint32_t *)(unsure + n_words);
    size_ranks r;
    obm__choice choice;
    count_sizes(&r, sizes, places, most, n);
    fill_choice(&choice, &r, c);
    k->random_highs(highs, obm__random_state(c->key, begin), n);
    unsure[n_words - 1] = 0;
    k->choose_sizes(kept, (uint8_t *)unsure, highs, sizes, &choice, n);
    size_t n_open = list_bits(unsure, n_words, open);
    return settle_sizes(&r, c, begin, sizes, places, open, n_open, kept);
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
    bool decides = r->kept && c.n < UINT32_MAX;
    if (decides && c.n <= MOST_SIZES && has_sizes(r->g, model)) {
        obm__plain p = obm__group_plain(r->g, model, begin);
        uint16_t *sizes = (uint16_t *)(void *)words, most;
        size_t bad = r->k->sizes_bf16(sizes, &most, p.model, p.base, p.round, c.n);
        if (bad < c.n) return begin + bad;
        if (decide_sizes(r->k, &c, begin, words, most, kept_row(r, model, row))) return UINT64_MAX;
    }
    uint64_t bad = read_row(r, b, model, row, words);
    if (bad != UINT64_MAX) return bad;
    if (!decides || !decide_row(r->k, &c, begin, words, kept_row(r, model, row))) sort_row(r, model, row, &c, words);
    return UINT64_MAX;
}

static bool has_ranks(const obm__steps *s, size_t model) { return s->density[model] > 0 && s->density[model] < 1; }

static void rank_rows(void *arg, size_t first, size_t last, int worker) {
    obm__ranked *r = arg;
    obm__block b = obm__block_of(r->lanes, r->k, r->g, worker);
    uint32_t *words = r->words + (size_t)worker * (size_t)words_of(r->cols);
    for (size_t i = first; i < last; i++) {
        uint64_t row = r->at / r->cols + i;
        if (r->whole && row * r->cols < r->at) continue; /* the span before has done it */
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
    r->first = r->factors ? at : r->whole ? 0 : at / r->cols;
    r->k = run->ctx->k;
    r->g = g;
    r->lanes = lanes;
    r->bad = UINT64_MAX;
    obm__parallel(run->ctx, (size_t)((until - 1) / r->cols - at / r->cols + 1), 1, rank_rows, r);
    return r->bad == UINT64_MAX ? OBM_OK : obm__group_bad(r->k, g, r->bad, err);
}

const uint8_t *obm__ranked_bits(const obm__ranked *r, size_t model, uint64_t element, uint8_t *room, size_t n) {
    uint64_t row = element / r->cols, col = element % r->cols;
    /* Without a rest rows follow each other. */
    if (col % 8 == 0 && (r->cols % 64 == 0 || col + n <= r->cols)) return kept_row(r, model, row) + col / 8;
    memset(room, 0, (n + 7) / 8);
    for (size_t j = 0; j < n; row++, col = 0) {
        const uint8_t *kept = kept_row(r, model, row);
        for (; j < n && col < r->cols; j++, col++) keep_bit(room, j, kept[col / 8] >> col % 8 & 1);
    }
    return room;
}

void obm__ranked_apply(const obm__ranked *r, const obm__group *g, size_t model, uint64_t element, float *d, size_t n) {
    if (!has_ranks(g->steps, model)) {
        if (g->steps->density[model] <= 0) memset(d, 0, n * sizeof *d);
        return;
    }
    if (r->kept) {
        uint8_t room[OBM_MERGE_BLOCK / 8];
        const uint8_t *bits = obm__ranked_bits(r, model, element, room, n);
        for (size_t j = 0; j < n; j++) d[j] = obm__keep_if(d[j], bits[j / 8] >> j % 8 & 1);
        return;
    }
    const float *factor = r->factors + model * r->span + (size_t)(element - r->first);
    for (size_t j = 0; j < n; j++) d[j] *= factor[j];
}
