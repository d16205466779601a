/*
 * Bodies of the kernels that merge bf16 tensors as they are, and of random masks, on the vectors of merge.h.  Two bf16
 * share a 32-bit lane: a shift makes the even one a float, a mask the odd one, and two floats go back the same way, so
 * nothing is shuffled.  Whole pairs of vectors here, the rest by the scalar entries.
 *
 *   FN, NAME(op), VL, V, GE_ZERO(v)  as in elementwise.h
 *   ANY(v)                           nonzero iff a lane of v is; where the compiler finds no better than merge.h's
 */
typedef int16_t NAME(s) __attribute__((vector_size(4 * VL)));
typedef uint64_t NAME(q) __attribute__((vector_size(4 * VL)));
typedef int64_t NAME(t) __attribute__((vector_size(4 * VL)));

#define INLINE_FN FN static inline __attribute__((always_inline))
#define UPPER 0xffff0000u
#ifndef ANY
#define ANY(v) NAME(any_lane)((NAME(i))(v))
INLINE_FN uint32_t NAME(any_lane)(NAME(i) v) { return NAME(any)(&v); }
#endif
/* Elements of one step. */
#define STEP (2 * (size_t)VL)

typedef struct NAME(pair) {
    NAME(u) even, odd; /* patterns of floats */
} NAME(pair);

INLINE_FN NAME(pair) NAME(wide_pair)(const uint16_t *p) {
    NAME(u) u;
    memcpy(&u, p, sizeof u);
    return (NAME(pair)){u << 16, u & UPPER};
}

INLINE_FN NAME(u) NAME(minus)(NAME(u) a, NAME(u) b) { return (NAME(u))((NAME(f))a - (NAME(f))b); }

/* A difference of two bf16 is never a NaN that rounding could carry out of the pattern: its lower half is 0. */
INLINE_FN NAME(pair) NAME(difference)(const uint16_t *a, const uint16_t *b, int round) {
    NAME(pair) x = NAME(wide_pair)(a);
    if (!b) return x;
    NAME(pair) y = NAME(wide_pair)(b);
    x = (NAME(pair)){NAME(minus)(x.even, y.even), NAME(minus)(x.odd, y.odd)};
    if (round) x = (NAME(pair)){ROUND_BF16(x.even), ROUND_BF16(x.odd)};
    return x;
}

/* ---- counting ---- */

/* Upper halves of a step, in 16-bit lanes in their order. */
INLINE_FN NAME(s) NAME(upper_halves)(NAME(pair) x) { return (NAME(s))((x.odd & UPPER) | x.even >> 16); }

/* 16-bit counters hold so many steps. */
#define COUNT_STEPS 32767

INLINE_FN size_t NAME(count_steps)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                   int round, size_t n, NAME(s) * all_bad) {
    const NAME(s) zero = {0}, limit = zero + 0x7f7f;
    NAME(s) bad = *all_bad;
    size_t i = 0;
#define X(k) NAME(s) count##k = zero, below##k = zero + (int16_t)(from[k] - 1);
    EACH_COUNT(X)
#undef X
    for (; i + STEP <= n; i += STEP) {
        NAME(s) size = NAME(upper_halves)(NAME(difference)(a + i, b ? b + i : b, round)) & 0x7fff;
        bad |= size > limit;
#define X(k) count##k -= size > below##k;
        EACH_COUNT(X)
#undef X
    }
#define X(k) \
    for (size_t l = 0; l < STEP; l++) counts[k] += (uint16_t)count##k[l];
    EACH_COUNT(X)
#undef X
    *all_bad = bad;
    return i;
}

FN static size_t NAME(count_bf16)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                  int round, size_t n) {
    NAME(s) bad = {0};
    size_t i = 0, most = COUNT_STEPS * STEP;
    for (size_t done = 1; done;) {
        const uint16_t *base = b ? b + i : b;
        size_t part = n - i < most ? n - i : most;
        done = !b      ? NAME(count_steps)(counts, from, a + i, NULL, 0, part, &bad)
               : round ? NAME(count_steps)(counts, from, a + i, base, 1, part, &bad)
                       : NAME(count_steps)(counts, from, a + i, base, 0, part, &bad);
        i += done;
    }
    if (ANY(bad)) return obm__scalar_count_bf16(counts, from, a, b, round, n);
    return i + obm__scalar_count_bf16(counts, from, a + i, b ? b + i : b, round, n - i);
}

FN static size_t NAME(low_bf16)(uint32_t *histogram, uint32_t high, const uint16_t *a, const uint16_t *b, size_t n) {
    const NAME(s) zero = {0}, limit = zero + 0x7f7f, wanted = zero + (int16_t)high;
    NAME(s) bad = zero;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(s) size = NAME(upper_halves)(NAME(difference)(a + i, b ? b + i : b, 0)) & 0x7fff, hit = size == wanted;
        bad |= size > limit;
        if (ANY(hit)) obm__scalar_low_bf16(histogram, high, a + i, b ? b + i : b, STEP);
    }
    if (ANY(bad)) return obm__scalar_low_bf16(histogram, high, a, b, n);
    return i + obm__scalar_low_bf16(histogram, high, a + i, b ? b + i : b, n - i);
}

/* ---- merging ---- */

/* Lanes whose element has its bit. */
INLINE_FN NAME(pair) NAME(kept)(const uint8_t *bits) {
    NAME(u) one = {0}, word = {0};
    uint32_t w = 0;
    memcpy(&w, bits, STEP / 8);
    word += w;
    for (int l = 0; l < VL; l++) one[l] = 1u << (2 * l);
    return (NAME(pair)){(NAME(u))((word & one) != 0u), (NAME(u))((word & one << 1) != 0u)};
}

/* Written out, since compilers do not unroll loops over the models by themselves: deltas then stay in registers. */
#define EACH_MODEL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

/* What of a tile is known where a loop is compiled; by value, so that no store makes it unknown. */
typedef struct NAME(form) {
    int base, round, agree, weighted; /* weighted: votes are the weights */
    size_t count;
} NAME(form);

/* Its numbers in every lane. */
typedef struct NAME(tile) {
    obm__tile t;
    NAME(i) below[OBM__TILE_MODELS];
    NAME(f) weights[OBM__TILE_MODELS], votes[OBM__TILE_MODELS], factors[OBM__TILE_MODELS];
    NAME(f) lambda, divisor;
    NAME(u) zero_sign;
    /* Constants: compilers would make them anew in every step. */
    NAME(u) one, last, half, upper, magnitude, sign;
    NAME(i) largest;
} NAME(tile);

FN static void NAME(tile_open)(NAME(tile) * w, const obm__tile *t) {
    const NAME(f) zero = {0};
    w->t = *t;
    for (size_t m = 0; m < t->count; m++) {
        w->below[m] = (NAME(i))zero + (int32_t)(t->least[m] - 1);
        w->weights[m] = zero + t->weights[m];
        w->votes[m] = zero + t->votes[m];
        w->factors[m] = zero + (t->factors ? t->factors[m] : 1);
    }
    w->lambda = zero + t->lambda;
    w->divisor = zero + t->divisor;
    w->zero_sign = (NAME(u))(zero + t->zero_sign);
    w->one = (NAME(u))(zero + 1);
    w->last = (NAME(u))zero + 1u;
    w->half = (NAME(u))zero + 0x7fffu;
    w->upper = (NAME(u))zero + UPPER;
    w->magnitude = (NAME(u))zero + 0x7fffffffu;
    w->sign = (NAME(u))zero + 0x80000000u;
    w->largest = (NAME(i))zero + 0x7f7fffff;
}

INLINE_FN NAME(u) NAME(nearest)(const NAME(tile) * w, NAME(u) x) { return x + ((x >> 16 & w->last) + w->half); }

INLINE_FN NAME(i) NAME(infinite)(const NAME(tile) * w, NAME(u) x) { return (NAME(i))(x & w->magnitude) > w->largest; }

INLINE_FN NAME(u) NAME(trim)(const NAME(tile) * w, NAME(u) x, size_t m, NAME(i) * bad) {
    NAME(i) size = (NAME(i))(x & w->magnitude);
    *bad |= size > w->largest;
    return x & (NAME(u))(size > w->below[m]);
}

INLINE_FN NAME(pair) NAME(wide)(const NAME(tile) * w, const uint16_t *p) {
    NAME(u) u;
    memcpy(&u, p, sizeof u);
    return (NAME(pair)){u << 16, u & w->upper};
}

INLINE_FN NAME(pair)
    NAME(tile_delta)(const NAME(tile) * w, NAME(form) is, size_t m, size_t i, NAME(pair) base, NAME(i) * bad) {
    const obm__tile *t = &w->t;
    NAME(pair) x = NAME(wide)(w, t->models[m] + i);
    if (is.base) x = (NAME(pair)){NAME(minus)(x.even, base.even), NAME(minus)(x.odd, base.odd)};
    if (is.base && is.round) x = (NAME(pair)){NAME(nearest)(w, x.even) & w->upper, NAME(nearest)(w, x.odd) & w->upper};
    x = (NAME(pair)){NAME(trim)(w, x.even, m, bad), NAME(trim)(w, x.odd, m, bad)};
    if (t->keep && t->keep[m]) {
        NAME(pair) kept = NAME(kept)(t->keep[m] + i / 8);
        x = (NAME(pair)){x.even & kept.even, x.odd & kept.odd};
    }
    if (t->factors) {
        x = (NAME(pair)){(NAME(u))((NAME(f))x.even * w->factors[m]), (NAME(u))((NAME(f))x.odd * w->factors[m])};
        *bad |= NAME(infinite)(w, x.even) | NAME(infinite)(w, x.odd);
    }
    return x;
}

/* As in agree_f32.  Sums that begin with +0 are never -0, so a bit more is all that a sum of 0 needs; under the sign of
 * the sum what agrees is positive.  No vote is NaN where the sum is finite; elsewhere the scalar kernel decides. */
INLINE_FN NAME(f) NAME(agreed)(const NAME(tile) * w, NAME(form) is, const NAME(f) * d, NAME(i) * bad) {
    const NAME(f) zero = {0};
    NAME(f) sum = zero, mixed = zero, divisor = zero;
#define X(m) \
    if (m < is.count) sum += d[m] * w->votes[m];
    EACH_MODEL(X)
#undef X
    *bad |= NAME(infinite)(w, (NAME(u))sum);
    NAME(u) sign = ((NAME(u))sum | ((NAME(u))(sum == zero) & w->zero_sign)) & w->sign;
#define X(m)                                                                                              \
    if (m < is.count) {                                                                                   \
        NAME(u) x = (NAME(u))(d[m] * w->weights[m]), v = is.weighted ? x : (NAME(u))(d[m] * w->votes[m]); \
        NAME(u) agrees = (NAME(u))((NAME(f))(v ^ sign) > zero);                                           \
        mixed += (NAME(f))(x & agrees);                                                                   \
        divisor += (NAME(f))((NAME(u))w->weights[m] & agrees);                                            \
    }
    EACH_MODEL(X)
#undef X
    if (w->t.normalize) mixed /= (NAME(f))((NAME(u))divisor | ((NAME(u))(divisor == zero) & w->one));
    return mixed;
}

INLINE_FN NAME(u) NAME(merged)(const NAME(tile) * w, NAME(form) is, const NAME(f) * d, NAME(u) base, NAME(i) * bad) {
    NAME(f) mixed = {0};
    if (is.agree) {
        mixed = NAME(agreed)(w, is, d, bad);
    } else {
#define X(m) \
    if (m < is.count) mixed += d[m] * w->weights[m];
        EACH_MODEL(X)
#undef X
        if (w->t.divisor != 1) mixed /= w->divisor;
    }
    mixed *= w->lambda;
    if (is.base) mixed = (NAME(f))base + mixed;
    return NAME(nearest)(w, (NAME(u))mixed);
}

INLINE_FN size_t NAME(merge_steps)(uint16_t *out, const NAME(tile) * w, NAME(form) is, size_t n, NAME(i) * all_bad) {
    const NAME(s) limit = (NAME(s)){0} + 0x7f7f;
    NAME(i) bad = {0};
    NAME(s) overflow = {0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(f) even[OBM__TILE_MODELS] = {{0}}, odd[OBM__TILE_MODELS] = {{0}};
        NAME(pair) base = {{0}, {0}};
        if (is.base) base = NAME(wide)(w, w->t.base + i);
#define X(m)                                                      \
    if (m < is.count) {                                           \
        NAME(pair) x = NAME(tile_delta)(w, is, m, i, base, &bad); \
        even[m] = (NAME(f))x.even;                                \
        odd[m] = (NAME(f))x.odd;                                  \
    }
        EACH_MODEL(X)
#undef X
        NAME(pair) x = {NAME(merged)(w, is, even, base.even, &bad), NAME(merged)(w, is, odd, base.odd, &bad)};
        NAME(s) halves = (NAME(s))((x.odd & w->upper) | x.even >> 16);
        overflow |= (halves & 0x7fff) > limit;
        memcpy(out + i, &halves, sizeof halves);
    }
    *all_bad = bad | (NAME(i))overflow;
    return i;
}

/* Loops of their own for what most merges are. */
FN static size_t NAME(merge_bf16)(uint16_t *out, const obm__tile *t, size_t n) {
    NAME(i) bad;
    NAME(tile) w;
    obm__tile_rest room;
    size_t i;
    NAME(tile_open)(&w, t);
    NAME(form) is = {t->base != NULL, t->round != 0, t->agree != 0, t->votes == t->weights, t->count};
#define STEPS(...) NAME(merge_steps)(out, &w, (NAME(form)){__VA_ARGS__}, n, &bad)
#define FORM(base, round, agree, weighted)                    \
    (t->count == 2   ? STEPS(base, round, agree, weighted, 2) \
     : t->count == 3 ? STEPS(base, round, agree, weighted, 3) \
                     : STEPS(base, round, agree, weighted, t->count))
    if (is.base && is.round && is.agree && is.weighted)
        i = FORM(1, 1, 1, 1);
    else if (is.base && !is.round && is.agree && !is.weighted)
        i = FORM(1, 0, 1, 0);
    else if (is.base && is.round && !is.agree)
        i = FORM(1, 1, 0, 0);
    else if (!is.base && !is.agree)
        i = FORM(0, 0, 0, 0);
    else
        i = NAME(merge_steps)(out, &w, is, n, &bad);
    if (ANY(bad)) return obm__scalar_merge_bf16(out, t, n);
    obm__tile rest = obm__tile_behind(t, i, &room);
    return i + obm__scalar_merge_bf16(out + i, &rest, n - i);
}

FN static size_t NAME(vote_bf16)(int64_t *votes, const obm__tile *t, size_t n) {
    const NAME(f) zero = {0};
    NAME(i) bad = {0}, all = {0};
    obm__tile_rest room;
    NAME(tile) w;
    NAME(form) is = {t->base != NULL, t->round, 1, 0, t->count};
    size_t i = 0;
    NAME(tile_open)(&w, t);
    for (; i + STEP <= n; i += STEP) {
        NAME(pair) base = {{0}, {0}};
        NAME(f) even = zero, odd = zero;
        if (is.base) base = NAME(wide)(&w, t->base + i);
#define X(m)                                                       \
    if (m < is.count) {                                            \
        NAME(pair) d = NAME(tile_delta)(&w, is, m, i, base, &bad); \
        even += (NAME(f))d.even * w.votes[m];                      \
        odd += (NAME(f))d.odd * w.votes[m];                        \
    }
        EACH_MODEL(X)
#undef X
        all += (even < zero) - (even > zero) + ((odd < zero) - (odd > zero));
    }
    if (ANY(bad)) return obm__scalar_vote_bf16(votes, t, n);
    for (size_t l = 0; l < VL; l++) *votes += all[l];
    obm__tile rest = obm__tile_behind(t, i, &room);
    return i + obm__scalar_vote_bf16(votes, &rest, n - i);
}

/* ---- random masks ---- */

INLINE_FN NAME(q) NAME(mix)(NAME(q) z) {
    z = (z ^ z >> 30) * OBM__MIX_FIRST;
    z = (z ^ z >> 27) * OBM__MIX_SECOND;
    return z ^ z >> 31;
}

/* Upper halves of the draws of VL elements in their order: even elements in one vector, odd ones in the other. */
INLINE_FN NAME(u) NAME(draw_tops)(NAME(q) even, NAME(q) odd) {
    return (NAME(u))((NAME(mix)(even) >> 32) | (NAME(mix)(odd) & 0xffffffff00000000u));
}

INLINE_FN NAME(q) NAME(first_states)(uint64_t state) {
    NAME(q) q = {0};
    for (size_t l = 0; l < VL / 2; l++) q[l] = state + (2 * l + 1) * OBM__GOLDEN;
    return q;
}

FN static void NAME(random_tops)(uint32_t *out, uint64_t state, size_t n) {
    NAME(q) even = NAME(first_states)(state);
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        NAME(u) tops = NAME(draw_tops)(even, even + OBM__GOLDEN);
        even += VL * OBM__GOLDEN;
        memcpy(out + i, &tops, sizeof tops);
    }
    obm__scalar_random_tops(out + i, state + i * OBM__GOLDEN, n - i);
}

/* The upper halves decide, unless one is equal to the limit's: one stretch of some million. */
FN static void NAME(random_bits)(uint8_t *bits, uint64_t state, uint64_t limit, size_t n) {
    NAME(q) even = NAME(first_states)(state);
    const NAME(u) top_limit = (NAME(u)){0} + (uint32_t)(limit >> 21);
    NAME(u) open = {0};
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        NAME(u) tops = NAME(draw_tops)(even, even + OBM__GOLDEN), lost = (NAME(u))(tops >= top_limit);
        even += VL * OBM__GOLDEN;
        open |= (NAME(u))(tops == top_limit);
        /* Lanes of what is lost are NaN, the others 0. */
        V v;
        memcpy(&v, &lost, sizeof v);
        unsigned lanes = GE_ZERO(v);
        memcpy(bits + i / 8, &lanes, VL / 8);
    }
    if (ANY(open))
        obm__scalar_random_bits(bits, state, limit, n);
    else
        obm__scalar_random_bits(bits + i / 8, state + i * OBM__GOLDEN, limit, n - i);
}
