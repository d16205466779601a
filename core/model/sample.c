/* From logits to a token.  Random numbers are a function of (seed, prompt, step), so results do not depend on batching.
 */
#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct obm__candidate { double weight; float logit; int32_t id; };   /* weight: exp(logit - max) */

/* ---- random numbers ---- */

/* The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that mixes every bit. */
static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

double obm__random_uniform(uint64_t seed, uint64_t stream, uint64_t step) {
    return (double)(mix(mix(mix(seed) ^ stream) ^ step) >> 11) * 0x1p-53;
}

/* ---- options ---- */

static obm_status check_range(const char *name, double value, double max, obm_error *err) {
    if (value >= 0 && value <= max) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s: expected 0 to %g, found %g", name, max, value);
}

obm_status obm__sampler_init(obm__sampler *s, const obm_kernels *k, const obm_generate_options *o, uint64_t stream,
                             int64_t vocab, obm_error *err) {
    obm__sampler new = {.k = k,
                        .temperature = OBM_OPT(o, obm_generate_options, temperature, 0),
                        .top_k = OBM_OPT(o, obm_generate_options, top_k, 0),
                        .top_p = OBM_OPT(o, obm_generate_options, top_p, 0),
                        .min_p = OBM_OPT(o, obm_generate_options, min_p, 0),
                        .repetition_penalty = OBM_OPT(o, obm_generate_options, repetition_penalty, 0),
                        .seed = OBM_OPT(o, obm_generate_options, seed, 0),
                        .stream = stream, .vocab = vocab};
    OBM_TRY(check_range("temperature", new.temperature, 1e6, err));
    OBM_TRY(check_range("top_p", new.top_p, 1, err));
    OBM_TRY(check_range("min_p", new.min_p, 1, err));
    OBM_TRY(check_range("repetition_penalty", new.repetition_penalty, 1e6, err));
    new.candidates = obm__alloc((size_t)vocab, sizeof *new.candidates);
    if (!new.candidates) return obm__fail_nomem(err, (uint64_t)vocab * sizeof *new.candidates);
    *s = new;
    return OBM_OK;
}

void obm__sampler_clear(obm__sampler *s) {
    obm_free(s->candidates);
    *s = (obm__sampler){0};
}

/* ---- the processors, in the order in which transformers applies them ---- */

/* Keskar et al. 2019 (CTRL), section 4.1, as transformers has it: positive logits are divided, negative multiplied;
 * once per distinct id.  The candidates' ids serve as marks. */
static void penalise(obm__sampler *s, float *logits, const int32_t *history, size_t n) {
    if (s->repetition_penalty == 0 || s->repetition_penalty == 1) return;
    float penalty = (float)s->repetition_penalty;
    for (size_t i = 0; i < n; i++) s->candidates[history[i]].id = -1;
    for (size_t i = 0; i < n; i++) {
        struct obm__candidate *seen = &s->candidates[history[i]];
        if (seen->id != -1) continue;
        seen->id = 0;
        float *l = &logits[history[i]];
        *l = *l < 0 ? *l * penalty : *l / penalty;
    }
}

/* From record to record: there are about ln(n) of them. */
int32_t obm__argmax(const obm_kernels *k, const float *logits, int64_t n) {
    size_t best = 0, from = 0, all = (size_t)n;
    float largest = -INFINITY;
    while (from < all) {
        size_t at = from + k->find_above(logits + from, largest, all - from);
        if (at == all) break;
        best = at;
        largest = logits[at];
        from = isnan(largest) ? all : at + 1;
    }
    return (int32_t)best;
}

obm_status obm__logits_check(const obm_kernels *k, const float *logits, int64_t n, size_t position, size_t prompt,
                             obm_error *err) {
    if (isfinite(logits[obm__argmax(k, logits, n)])) return OBM_OK;
    return obm__fail(err, OBM_E_VALUE,
                     "logits are not finite at position %zu (prompt %zu): the weights, or what the route makes of them, "
                     "hold NaN or Inf or overflow",
                     position, prompt);
}

static void sift_down(float *heap, size_t n, size_t i) {
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[i] <= heap[child]) return;
        float t = heap[i];
        heap[i] = heap[child];
        heap[child] = t;
    }
}

/* The k-th largest logit, by a heap of the k largest so far; it lies in the candidates' memory. */
static float kth_largest(obm__sampler *s, const float *logits, size_t k) {
    float *heap = (float *)s->candidates;
    memcpy(heap, logits, k * sizeof *heap);
    for (size_t i = k / 2; i-- > 0;) sift_down(heap, k, i);
    for (int64_t i = (int64_t)k; i < s->vocab; i++) {
        if (!(logits[i] > heap[0])) continue;
        heap[0] = logits[i];
        sift_down(heap, k, 0);
    }
    return heap[0];
}

static int by_weight(const void *a, const void *b) {
    const struct obm__candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static double total_weight(const struct obm__candidate *c, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += c[i].weight;
    return sum;
}

/* Keeps candidates of at least this weight, in order. */
static size_t keep_above(struct obm__candidate *c, size_t n, double weight) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (c[i].weight >= weight) c[kept++] = c[i];
    return kept;
}

/* By weight, heaviest first: those before c[pivot] to the front, then it, then the others; where it is now. */
static size_t divide(struct obm__candidate *c, size_t n, size_t pivot) {
    struct obm__candidate by = c[pivot];
    size_t at = 0;
    c[pivot] = c[n - 1];
    for (size_t i = 0; i + 1 < n; i++) {
        if (by_weight(&c[i], &by) > 0) continue;
        struct obm__candidate t = c[i];
        c[i] = c[at];
        c[at++] = t;
    }
    c[n - 1] = c[at];
    c[at] = by;
    return at;
}

/* The fewest that weigh `target` together come first, in some order; returns how many.  Quickselect (Hoare 1961) by sums
 * instead of ranks. */
static size_t select_heaviest(struct obm__candidate *c, size_t n, double target) {
    size_t first = 0, end = n;
    double sum = 0; /* of those before first, which are heavier than the rest */
    while (first < end && sum < target) {
        size_t at = first + divide(c + first, end - first, mix(end) % (end - first));
        double heavier = total_weight(c + first, at - first);
        if (sum + heavier >= target) {
            end = at;
            continue;
        }
        sum += heavier + c[at].weight;
        first = at + 1;
    }
    return first;
}

/* Holtzman et al. 2020: the smallest set of the most likely tokens whose probability reaches top_p.  Tokens of less
 * than (1 - top_p) / n each cannot add up to more than 1 - top_p, so they are dropped first. */
static size_t nucleus(struct obm__candidate *c, size_t n, double top_p) {
    double total = total_weight(c, n);
    n = keep_above(c, n, total * (1 - top_p) / (double)n);
    return select_heaviest(c, n, top_p * total);
}

static size_t fill_candidates(obm__sampler *s, const float *logits) {
    float max = logits[obm__argmax(s->k, logits, s->vocab)], floor = -INFINITY;
    if (s->top_k && (int64_t)s->top_k < s->vocab) floor = kth_largest(s, logits, s->top_k);
    size_t n = 0;
    for (int64_t i = 0; i < s->vocab; i++) {
        if (!(logits[i] >= floor) || logits[i] == -INFINITY) continue;
        /* a small penalty makes some infinite, which are then equals */
        double below = logits[i] == max ? 0 : (double)logits[i] - max, weight = exp(below / s->temperature);
        s->candidates[n++] = (struct obm__candidate){weight, logits[i], (int32_t)i};
    }
    return n;
}

int32_t obm__sample(obm__sampler *s, float *logits, const int32_t *history, size_t n_history, uint64_t step) {
    penalise(s, logits, history, n_history);
    if (s->temperature == 0) return obm__argmax(s->k, logits, s->vocab);
    struct obm__candidate *c = s->candidates;
    size_t n = fill_candidates(s, logits);
    if (!n) return 0;
    if (s->top_p > 0 && s->top_p < 1) n = nucleus(c, n, s->top_p);
    if (s->min_p > 0) n = keep_above(c, n, s->min_p);   /* weights are relative to the most likely token's */
    double target = obm__random_uniform(s->seed, s->stream, step) * total_weight(c, n), sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += c[i].weight;
        if (sum > target) return c[i].id;
    }
    return c[n - 1].id;
}
