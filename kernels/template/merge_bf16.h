/*
 * Bodies of the kernels that merge bf16 tensors as they are, on the vectors of merge.h.  Two bf16
 * share a 32-bit lane: a shift makes the even one a float, a mask the odd one, and two floats go back the same way, so
 * nothing is shuffled.  Whole pairs of vectors here, the rest by the scalar entries.
 *
 *   FN, NAME(op), VL, V, GE_ZERO(v)  as in elementwise.h
 *   ANY(v)                           nonzero iff a lane of v is all ones or a NaN, 0 if all are 0
 *   AVERAGE(a, b)                    (a + b + 1) / 2 of unsigned 16-bit lanes
 *   HALVES(even, odd)                16-bit lanes: the lower halves of `even` and the upper ones of `odd`
 *   PACK(a, b)                       16-bit lanes of both as signed bytes, saturated, in any order; may be left out
 *   LANES(v)                         bit i is that of the i-th 16-bit lane of 0 or all ones; these four where the
 * compiler finds no better
 */
typedef int16_t NAME(s) __attribute__((vector_size(4 * VL)));

#define INLINE_FN FN static inline __attribute__((always_inline))
#define UPPER 0xffff0000u
#ifndef ANY
#define ANY(v) NAME(any_lane)((NAME(i))(v))
INLINE_FN uint32_t NAME(any_lane)(NAME(i) v) { return NAME(any)(&v); }
#endif
#ifndef AVERAGE
#define AVERAGE(a, b) (((a) | (b)) - (((a) ^ (b)) >> 1))
#endif
#ifndef HALVES
#define HALVES(even, odd) (((even)&0xffffu) | ((odd)&UPPER))
#endif
/* Elements of one step. */
#define STEP (2 * (size_t)VL)

typedef struct NAME(pair) {
    NAME(u) even, odd; /* patterns of floats */
} NAME(pair);
/* Steps of both in turn: either half alone is a chain that waits for itself. */
typedef struct NAME(floats) {
    NAME(f) even, odd;
} NAME(floats);

INLINE_FN NAME(floats) NAME(plus)(NAME(floats) a, NAME(floats) b) {
    return (NAME(floats)){a.even + b.even, a.odd + b.odd};
}

INLINE_FN NAME(floats) NAME(times)(NAME(floats) a, NAME(f) b) { return (NAME(floats)){a.even * b, a.odd * b}; }

INLINE_FN NAME(floats) NAME(masked)(NAME(floats) a, NAME(pair) mask) {
    return (NAME(floats)){(NAME(f))((NAME(u))a.even & mask.even), (NAME(f))((NAME(u))a.odd & mask.odd)};
}

INLINE_FN NAME(pair) NAME(wide_pair)(const uint16_t *p) {
    NAME(u) u;
    memcpy(&u, p, sizeof u);
    return (NAME(pair)){u << 16, u & UPPER};
}

INLINE_FN NAME(u) NAME(minus)(NAME(u) a, NAME(u) b) { return (NAME(u))((NAME(f))a - (NAME(f))b); }

INLINE_FN NAME(pair) NAME(difference)(const uint16_t *a, const uint16_t *b) {
    NAME(pair) x = NAME(wide_pair)(a);
    if (!b) return x;
    NAME(pair) y = NAME(wide_pair)(b);
    return (NAME(pair)){NAME(minus)(x.even, y.even), NAME(minus)(x.odd, y.odd)};
}

/* ---- counting ---- */

typedef uint16_t NAME(w) __attribute__((vector_size(4 * VL)));

/* Upper halves of magnitudes, in 16-bit lanes in the order of the elements, rounded to nearest even where asked for:
 * lower + 0x7fff + (upper & 1) carries to the upper half. */
INLINE_FN NAME(s) NAME(sizes)(NAME(pair) x, int round) {
    NAME(w) size = (NAME(w))HALVES(x.even >> 16, x.odd) & 0x7fff;
    if (round) {
        NAME(w) lower = (NAME(w))HALVES(x.even, x.odd << 16), odd = size | 0x7ffe;
        size += (NAME(w))AVERAGE(lower, odd) >> 15;
    }
    return (NAME(s))size;
}

/* 16-bit counters hold so many steps. */
#define COUNT_STEPS 32767

INLINE_FN size_t NAME(count_steps)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                   int round, size_t n, NAME(s) * all_bad) {
    const NAME(s) zero = {0};
    NAME(s) bad = *all_bad;
    size_t i = 0;
#define X(k) NAME(s) count##k = zero, below##k = zero + (int16_t)(from[k] - 1);
    EACH_COUNT(X)
#undef X
    for (; i + STEP <= n; i += STEP) {
        NAME(s) size = NAME(sizes)(NAME(difference)(a + i, b ? b + i : b), round);
        bad |= (NAME(s))((NAME(w))size + 0x80); /* from 0x7f80 on the sign */
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

#ifdef PACK
typedef int8_t NAME(b) __attribute__((vector_size(4 * VL)));
typedef uint8_t NAME(c) __attribute__((vector_size(4 * VL)));

/* 8-bit counters, unsigned ones, hold so many of two steps. */
#define BYTE_STEPS 255

INLINE_FN uint32_t NAME(sum_bytes)(NAME(c) v) {
    NAME(w) pairs = ((NAME(w))v & 0xff) + ((NAME(w))v >> 8);
    NAME(u) lanes = ((NAME(u))pairs & 0xffffu) + ((NAME(u))pairs >> 16);
    uint32_t sum = 0;
    for (size_t l = 0; l < VL; l++) sum += lanes[l];
    return sum;
}

/* Bounds that a byte tells apart: sizes less the one below them all saturate to bytes, and twice as many share a
 * comparison. */
INLINE_FN size_t NAME(count_bytes)(uint32_t *counts, const uint16_t *from, int least, const uint16_t *a,
                                   const uint16_t *b, int round, size_t n, NAME(s) * all_bad) {
    const NAME(b) zero = {0};
    const NAME(s) middle = (NAME(s)){0} + (int16_t)(least + 127);
    NAME(s) bad = *all_bad;
    size_t i = 0, most = n < BYTE_STEPS * 2 * STEP ? n : BYTE_STEPS * 2 * STEP;
#define X(k)                \
    NAME(c) count##k = {0}; \
    const NAME(b) below##k = zero + (int8_t)(from[k] - least - 128);
    EACH_COUNT(X)
#undef X
    for (; i + 2 * STEP <= most; i += 2 * STEP) {
        NAME(s) first = NAME(sizes)(NAME(difference)(a + i, b ? b + i : b), round);
        NAME(s) second = NAME(sizes)(NAME(difference)(a + i + STEP, b ? b + i + STEP : b), round);
        bad |= (NAME(s))((NAME(w))first + 0x80) | (NAME(s))((NAME(w))second + 0x80);
        NAME(b) bytes = (NAME(b))PACK(first - middle, second - middle);
#define X(k) count##k -= (NAME(c))(bytes > below##k);
        EACH_COUNT(X)
#undef X
    }
#define X(k) counts[k] += NAME(sum_bytes)(count##k);
    EACH_COUNT(X)
#undef X
    *all_bad = bad;
    return i;
}

FN static size_t NAME(count_near)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                  int round, size_t n, NAME(s) * bad) {
    int least = from[0], most = from[0];
    size_t i = 0;
    for (size_t k = 1; k < 8; k++) {
        if (from[k] < least) least = from[k];
        if (from[k] > most) most = from[k];
    }
    if (most - least > 254 || least > 0x7f80) return 0; /* what sizes are apart from a higher one takes 17 bits */
    for (size_t done = 1; done; i += done) {
        const uint16_t *base = b ? b + i : b;
        done = !b      ? NAME(count_bytes)(counts, from, least, a + i, NULL, 0, n - i, bad)
               : round ? NAME(count_bytes)(counts, from, least, a + i, base, 1, n - i, bad)
                       : NAME(count_bytes)(counts, from, least, a + i, base, 0, n - i, bad);
    }
    return i;
}
#endif

FN static size_t NAME(count_bf16)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                  int round, size_t n) {
    NAME(s) bad = {0};
    size_t i = 0, most = COUNT_STEPS * STEP;
#ifdef PACK
    i = NAME(count_near)(counts, from, a, b, round, n, &bad);
#endif
    for (size_t done = 1; done;) {
        const uint16_t *base = b ? b + i : b;
        size_t part = n - i < most ? n - i : most;
        done = !b      ? NAME(count_steps)(counts, from, a + i, NULL, 0, part, &bad)
               : round ? NAME(count_steps)(counts, from, a + i, base, 1, part, &bad)
                       : NAME(count_steps)(counts, from, a + i, base, 0, part, &bad);
        i += done;
    }
    if (ANY(bad < 0)) return obm__scalar_count_bf16(counts, from, a, b, round, n);
    return i + obm__scalar_count_bf16(counts, from, a + i, b ? b + i : b, round, n - i);
}

/* Few steps have a hit, and most of these have one. */
FN static void NAME(count_lower)(uint32_t *histogram, NAME(s) hit, NAME(pair) x) {
    NAME(w) lanes = (NAME(w))HALVES(x.even, x.odd << 16);
    uint16_t lower[STEP];
    memcpy(lower, &lanes, sizeof lower);
#ifdef LANES
    for (uint32_t lane = LANES(hit); lane; lane &= lane - 1) histogram[lower[__builtin_ctz(lane)]]++;
#else
    uint16_t hits[STEP];
    memcpy(hits, &hit, sizeof hits);
    for (size_t l = 0; l < STEP; l++)
        if (hits[l]) histogram[lower[l]]++;
#endif
}

FN static size_t NAME(low_bf16)(uint32_t *histogram, uint32_t high, const uint16_t *a, const uint16_t *b, size_t n) {
    const NAME(s) zero = {0}, limit = zero + 0x7f7f, wanted = zero + (int16_t)high;
    NAME(s) bad = zero;
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(pair) x = NAME(difference)(a + i, b ? b + i : b);
        NAME(s) size = NAME(sizes)(x, 0), hit = size == wanted;
        bad |= size > limit;
        if (ANY(hit)) NAME(count_lower)(histogram, hit, x);
    }
    if (ANY(bad)) return obm__scalar_low_bf16(histogram, high, a, b, n);
    return i + obm__scalar_low_bf16(histogram, high, a + i, b ? b + i : b, n - i);
}

INLINE_FN size_t NAME(size_steps)(uint16_t *out, const uint16_t *a, const uint16_t *b, int round, size_t n,
                                  NAME(s) * all_most) {
    NAME(s) most = {0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(s) size = NAME(sizes)(NAME(difference)(a + i, b ? b + i : b), round);
        NAME(s) more = size > most;
        most = (size & more) | (most & ~more);
        memcpy(out + i, &size, sizeof size);
    }
    *all_most = most;
    return i;
}

FN static size_t NAME(sizes_bf16)(uint16_t *out, uint16_t *most, const uint16_t *a, const uint16_t *b, int round,
                                  size_t n) {
    NAME(s) each;
    size_t i = !b      ? NAME(size_steps)(out, a, NULL, 0, n, &each)
               : round ? NAME(size_steps)(out, a, b, 1, n, &each)
                       : NAME(size_steps)(out, a, b, 0, n, &each);
    size_t rest = obm__scalar_sizes_bf16(out + i, most, a + i, b ? b + i : b, round, n - i);
    for (size_t l = 0; l < STEP; l++)
        if (each[l] > *most) *most = (uint16_t)each[l];
    return *most < 0x7f80 ? i + rest : obm__scalar_sizes_bf16(out, most, a, b, round, n);
}

/* ---- merging ---- */

/* Lanes whose element has its bit. */
INLINE_FN NAME(pair) NAME(kept)(const uint8_t *bits) {
    NAME(u) one = {0}, word = {0};
    uint32_t w = 0;
    memcpy(&w, bits, STEP / 8);
    word += w;
    for (int l = 0; l < VL; l++) one[l] = 1u << (2 * l);
    return (NAME(pair)){(NAME(u))((word & one) == one), (NAME(u))((word & one << 1) == one << 1)};
}

/* Written out, since compilers do not unroll loops over the models by themselves: deltas then stay in registers. */
#define EACH_MODEL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

/* What of a tile is known where a loop is compiled; by value, so that no store makes it unknown. */
typedef enum { NAME(votes_any), NAME(votes_weights), NAME(votes_one) } NAME(voting);
typedef struct NAME(form) {
    int base, round, agree;
    NAME(voting) votes;
    int drops;  /* masks may drop what is not finite, so that it has to be looked for before them */
    int scaled; /* there are factors */
    /* Divided by the weights that agree, of which each is so large that adding them to the least float takes no notice
     * of it: then it may stand where 0 would be divided by.  And no difference of bf16, 2^-133 or more, becomes 0 by
     * it. */
    int large;
    size_t count;
} NAME(form);
#define LEAST_FLOAT 0x1p-126f
#define LARGE_WEIGHT 0x1p-16f

/* Its numbers in every lane. */
typedef struct NAME(tile) {
    obm__tile t;
    NAME(i) below[OBM__TILE_MODELS];
    NAME(f) weights[OBM__TILE_MODELS], votes[OBM__TILE_MODELS], factors[OBM__TILE_MODELS];
    NAME(f) lambda, divisor;
    NAME(u) zero_sign;
    /* Constants: compilers would make them anew in every step. */
    NAME(u) one, upper, magnitude, sign, exponent, below_zero;
    NAME(f) steps, start;
    NAME(i) largest;
} NAME(tile);

/* The least pattern that rounds to the bf16 from `least` on: half a step below it, where a tie goes to an even one. */
INLINE_FN uint32_t NAME(before_rounding)(uint32_t least) {
    uint32_t upper = (least + 0xffffu) >> 16;
    return upper ? (upper << 16) - 0x8000u + (upper & 1) : 0;
}

FN static NAME(form) NAME(tile_open)(NAME(tile) * w, const obm__tile *t) {
    const NAME(f) zero = {0};
    NAME(form)
    is = {t->base != NULL,    t->base && t->round,      t->agree != 0, NAME(votes_one), t->keep != NULL,
          t->factors != NULL, t->agree && t->normalize, t->count};
    w->t = *t;
    for (size_t m = 0; m < t->count; m++) {
        w->below[m] = (NAME(i))zero + (int32_t)((is.round ? NAME(before_rounding)(t->least[m]) : t->least[m]) - 1);
        w->weights[m] = zero + t->weights[m];
        w->votes[m] = zero + t->votes[m];
        w->factors[m] = zero + (t->factors ? t->factors[m] : 1);
        is.drops |= t->least[m] > 0x7f800000u;
        is.large &= t->weights[m] >= LARGE_WEIGHT;
        if (t->votes[m] != 1) is.votes = NAME(votes_any);
    }
    if (t->votes == t->weights) is.votes = NAME(votes_weights);
    w->lambda = zero + t->lambda;
    w->divisor = zero + t->divisor;
    w->start = zero + (is.large ? LEAST_FLOAT : 0);
    w->below_zero = (NAME(u))zero + (t->zero_sign < 0);
    w->one = (NAME(u))(zero + 1);
    w->upper = (NAME(u))zero + UPPER;
    w->magnitude = (NAME(u))zero + 0x7fffffffu;
    w->sign = (NAME(u))zero + 0x80000000u;
    w->exponent = (NAME(u))zero + 0x7f800000u;
    w->steps = zero + 0x1.8p16f;
    w->largest = (NAME(i))zero + 0x7f7fffff;
    return is;
}

/* Of a difference of two bf16: with 1.5 * 2^16 powers of two of its exponent the last bit is that of a bf16, and sums
 * round to nearest even.  What is denormal, or rounds to infinity or comes near (2^111), stays as it is: it is a bf16,
 * or becomes a NaN. */
INLINE_FN NAME(u) NAME(rounded)(const NAME(tile) * w, NAME(u) x) {
    NAME(f) steps = (NAME(f))(x & w->exponent) * w->steps;
    return (NAME(u))(((NAME(f))x + steps) - steps);
}

INLINE_FN NAME(i) NAME(infinite)(const NAME(tile) * w, NAME(u) x) { return (NAME(i))(x & w->magnitude) > w->largest; }

/* All ones where the magnitude stays. */
INLINE_FN NAME(u) NAME(stays)(const NAME(tile) * w, NAME(u) x, size_t m) {
    return (NAME(u))((NAME(i))(x & w->magnitude) > w->below[m]);
}

INLINE_FN NAME(pair) NAME(wide)(const NAME(tile) * w, const uint16_t *p) {
    NAME(u) u;
    memcpy(&u, p, sizeof u);
    return (NAME(pair)){u << 16, u & w->upper};
}

INLINE_FN NAME(floats)
    NAME(tile_delta)(const NAME(tile) * w, NAME(form) is, size_t m, size_t i, NAME(pair) base, NAME(i) * bad) {
    const obm__tile *t = &w->t;
    NAME(pair) x = NAME(wide)(w, t->models[m] + i);
    if (is.base) x = (NAME(pair)){NAME(minus)(x.even, base.even), NAME(minus)(x.odd, base.odd)};
    NAME(pair) stays = {NAME(stays)(w, x.even, m), NAME(stays)(w, x.odd, m)};
    if (is.round) x = (NAME(pair)){NAME(rounded)(w, x.even), NAME(rounded)(w, x.odd)};
    if (is.drops) *bad |= NAME(infinite)(w, x.even) | NAME(infinite)(w, x.odd);
    if (is.drops && t->keep && t->keep[m]) {
        NAME(pair) kept = NAME(kept)(t->keep[m] + i / 8);
        stays = (NAME(pair)){stays.even & kept.even, stays.odd & kept.odd};
    }
    NAME(floats) d = {(NAME(f))(x.even & stays.even), (NAME(f))(x.odd & stays.odd)};
    return is.scaled ? NAME(times)(d, w->factors[m]) : d;
}

INLINE_FN NAME(floats) NAME(vote)(const NAME(tile) * w, NAME(form) is, size_t m, NAME(floats) d) {
    if (is.votes == NAME(votes_one)) return d;
    return NAME(times)(d, is.votes == NAME(votes_weights) ? w->weights[m] : w->votes[m]);
}

/* As in agree_f32.  One less than a sum of +0 has the sign that is below it; a sum of -0 is one of zeros, which agree
 * with nobody.  Under the sign of the sum what agrees is positive.  What is not finite makes the sum so, and no vote is
 * NaN where it is finite; elsewhere the scalar kernel decides. */
INLINE_FN NAME(floats) NAME(agreed)(const NAME(tile) * w, NAME(form) is, const NAME(floats) * d, NAME(i) * bad) {
    const NAME(f) zero = {0};
    const NAME(floats) start = {is.large ? w->start : zero, is.large ? w->start : zero};
    NAME(floats) sum = {zero, zero}, mixed = sum, divisor = start;
#define X(m) \
    if (m < is.count) sum = m ? NAME(plus)(sum, NAME(vote)(w, is, m, d[m])) : NAME(vote)(w, is, m, d[m]);
    EACH_MODEL(X)
#undef X
    *bad |= (NAME(i))(sum.even - sum.even) | (NAME(i))(sum.odd - sum.odd);
    const NAME(pair)
        sign = {((NAME(u))sum.even - w->below_zero) & w->sign, ((NAME(u))sum.odd - w->below_zero) & w->sign};
#define X(m)                                                                                                        \
    if (m < is.count) {                                                                                             \
        NAME(floats) x = NAME(times)(d[m], w->weights[m]);                                                          \
        NAME(floats) v = NAME(vote)(w, is, m, d[m]);                                                                \
        NAME(pair)                                                                                                  \
        agrees = {(NAME(u))((NAME(f))((NAME(u))v.even ^ sign.even) > zero),                                         \
                  (NAME(u))((NAME(f))((NAME(u))v.odd ^ sign.odd) > zero)};                                          \
        NAME(floats) weight = {w->weights[m], w->weights[m]};                                                       \
        /* Of a product of -0 the sum from +0 on is +0. */                                                          \
        mixed = m || !is.large || is.scaled ? NAME(plus)(mixed, NAME(masked)(x, agrees)) : NAME(masked)(x, agrees); \
        if (is.large || w->t.normalize) divisor = NAME(plus)(divisor, NAME(masked)(weight, agrees));                \
    }
    EACH_MODEL(X)
#undef X
    if (is.large) return (NAME(floats)){mixed.even / divisor.even, mixed.odd / divisor.odd};
    if (!w->t.normalize) return mixed;
    const NAME(pair) none = {(NAME(u))(divisor.even == zero) & w->one, (NAME(u))(divisor.odd == zero) & w->one};
    return (NAME(floats)){mixed.even / (NAME(f))((NAME(u))divisor.even | none.even),
                          mixed.odd / (NAME(f))((NAME(u))divisor.odd | none.odd)};
}

INLINE_FN NAME(floats)
    NAME(merged)(const NAME(tile) * w, NAME(form) is, const NAME(floats) * d, NAME(pair) base, NAME(i) * bad) {
    NAME(floats) mixed = {{0}, {0}};
    if (is.agree) {
        mixed = NAME(agreed)(w, is, d, bad);
    } else {
#define X(m) \
    if (m < is.count) mixed = NAME(plus)(mixed, NAME(times)(d[m], w->weights[m]));
        EACH_MODEL(X)
#undef X
        if (w->t.divisor != 1) mixed = (NAME(floats)){mixed.even / w->divisor, mixed.odd / w->divisor};
    }
    mixed = NAME(times)(mixed, w->lambda);
    return is.base ? NAME(plus)((NAME(floats)){(NAME(f))base.even, (NAME(f))base.odd}, mixed) : mixed;
}

/* Nearest even, as in NAME(sizes). */
INLINE_FN NAME(s) NAME(narrow)(NAME(pair) x) {
    NAME(w) upper = (NAME(w))HALVES(x.even >> 16, x.odd), lower = (NAME(w))HALVES(x.even, x.odd << 16);
    return (NAME(s))(upper + ((NAME(w))AVERAGE(lower, (upper & 1) | 0x7ffe) >> 15));
}

INLINE_FN size_t NAME(merge_steps)(uint16_t *out, const NAME(tile) * w, NAME(form) is, size_t n, NAME(i) * all_bad) {
    const NAME(s) limit = (NAME(s)){0} + 0x7f7f;
    NAME(i) bad = {0};
    NAME(s) overflow = {0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(floats) d[OBM__TILE_MODELS] = {{{0}, {0}}};
        NAME(pair) base = {{0}, {0}};
        if (is.base) base = NAME(wide)(w, w->t.base + i);
#define X(m) \
    if (m < is.count) d[m] = NAME(tile_delta)(w, is, m, i, base, &bad);
        EACH_MODEL(X)
#undef X
        NAME(floats) mixed = NAME(merged)(w, is, d, base, &bad);
        NAME(s) halves = NAME(narrow)((NAME(pair)){(NAME(u))mixed.even, (NAME(u))mixed.odd});
        overflow |= (halves & 0x7fff) > limit;
        memcpy(out + i, &halves, sizeof halves);
    }
    *all_bad = bad | (NAME(i))overflow;
    return i;
}

/* Loops of their own for what most merges are. */
FN static size_t NAME(merge_bf16)(uint16_t *out, const obm__tile *t, size_t n) {
    const NAME(voting) one = NAME(votes_one), weights = NAME(votes_weights);
    NAME(i) bad;
    NAME(tile) w;
    obm__tile_rest room;
    size_t i;
    NAME(form) is = NAME(tile_open)(&w, t);
    int plain = !is.drops && !is.scaled, masked = is.base && is.round && is.agree && is.drops && is.scaled;
#define STEPS(...) NAME(merge_steps)(out, &w, (NAME(form)){__VA_ARGS__}, n, &bad)
#define FORM(...) \
    (t->count == 2 ? STEPS(__VA_ARGS__, 2) : t->count == 3 ? STEPS(__VA_ARGS__, 3) : STEPS(__VA_ARGS__, t->count))
    if (plain && is.base && is.round && is.large && is.votes == weights)
        i = FORM(1, 1, 1, weights, 0, 0, 1);
    else if (plain && is.base && !is.round && is.large && is.votes == one)
        i = FORM(1, 0, 1, one, 0, 0, 1);
    else if (masked && is.large && is.votes == weights)
        i = FORM(1, 1, 1, weights, 1, 1, 1);
    else if (masked && !t->normalize && is.votes == weights)
        i = FORM(1, 1, 1, weights, 1, 1, 0);
    else if (plain && is.base && is.round && !is.agree)
        i = FORM(1, 1, 0, one, 0, 0, 0);
    else if (plain && !is.base && !is.agree)
        i = FORM(0, 0, 0, one, 0, 0, 0);
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
    size_t i = 0;
    NAME(form) is = NAME(tile_open)(&w, t);
    for (; i + STEP <= n; i += STEP) {
        NAME(pair) base = {{0}, {0}};
        NAME(f) even = zero, odd = zero;
        if (is.base) base = NAME(wide)(&w, t->base + i);
#define X(m)                                                         \
    if (m < is.count) {                                              \
        NAME(floats) d = NAME(tile_delta)(&w, is, m, i, base, &bad); \
        even += d.even * w.votes[m];                                 \
        odd += d.odd * w.votes[m];                                   \
    }
        EACH_MODEL(X)
#undef X
        bad |= (NAME(i))(even - even) | (NAME(i))(odd - odd);
        all += (even < zero) - (even > zero) + ((odd < zero) - (odd > zero));
    }
    if (ANY(bad)) return obm__scalar_vote_bf16(votes, t, n);
    for (size_t l = 0; l < VL; l++) *votes += all[l];
    obm__tile rest = obm__tile_behind(t, i, &room);
    return i + obm__scalar_vote_bf16(votes, &rest, n - i);
}
