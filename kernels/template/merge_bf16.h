/*
 * Bodies of the kernels that merge bf16 tensors as they are, on the vectors of merge.h.  Two bf16
 * share a 32-bit lane: a shift makes the even one a float, a mask the odd one, and two floats go back the same way, so
 * nothing is shuffled.  Whole pairs of vectors here, the rest by the scalar entries.
 *
 *   FN, NAME(op), VL, V, GE_ZERO(v)  as in elementwise.h
 *   ANY(v)                           nonzero iff a lane of v is all ones or a NaN, 0 if all are 0
 *   AVERAGE(a, b)                    (a + b + 1) / 2 of unsigned 16-bit lanes
 *   AT_LEAST_H(a, b)                 the greater one of unsigned 16-bit lanes
 *   HALVES(even, odd)                16-bit lanes: the lower halves of `even` and the upper ones of `odd`
 *   PACK(a, b)                       16-bit lanes of both as signed bytes, saturated, in any order; may be left out
 *   LANES(v)                         bit i is that of the i-th 16-bit lane of 0 or all ones; these five where the
 * compiler finds no better
 *   MASK                             what a comparison of 32-bit lanes gives, where that is no vector; then also
 *   ABOVE_I(a, b) ABOVE_F(a, b)      a > b of signed lanes, of floats
 *   HAS_BITS(a, b)                   a & b is not 0
 *   KEEP_IF(mask, v)                 v, or +0
 *   ADD_IF(mask, a, b)               a + b, or a
 *   PLUS_PRODUCT(c, a, b)            c + a * b of an exact product, by one instruction; may be left out, like
 *   ROUND_BY(x, a, b)                (x + a * b) - a * b of such products
 *   COUNT_W(n, a, b) COUNT_B         one more in 16-bit or 8-bit lanes of n where signed ones have a > b
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
#ifndef AT_LEAST_H
#define AT_LEAST_H(a, b) (((a) & (NAME(w))((a) > (b))) | ((b) & ~(NAME(w))((a) > (b))))
#endif
#ifndef PLUS_PRODUCT
#define PLUS_PRODUCT(c, a, b) ((c) + (a) * (b))
#endif
#ifndef ROUND_BY
#define ROUND_BY(x, a, b) (((x) + (a) * (b)) - (a) * (b))
#endif
#ifndef MASK
#define MASK NAME(u)
#define ABOVE_I(a, b) ((NAME(u))((a) > (b)))
#define ABOVE_F(a, b) ((NAME(u))((a) > (b)))
#define HAS_BITS(a, b) ((NAME(u))(((a) & (b)) != 0))
#define KEEP_IF(mask, v) ((NAME(f))((NAME(u))(v) & (mask)))
/* Of an `a` that is no -0. */
#define ADD_IF(mask, a, b) ((a) + KEEP_IF(mask, b))
#define COUNT_W(n, a, b) ((n) - (NAME(w))((a) > (b)))
#define COUNT_B(n, a, b) ((n) - (NAME(c))((a) > (b)))
#endif
/* Elements that are asked for ahead of a load: what fetches memory by itself ends with a page, and every stream comes
 * to its next one at the same time. */
#define AHEAD 1024
/* Elements of one step. */
#define STEP (2 * (size_t)VL)

typedef uint16_t NAME(w) __attribute__((vector_size(4 * VL)));

typedef struct NAME(pair) {
    NAME(u) even, odd; /* patterns of floats */
} NAME(pair);
typedef struct NAME(masks) {
    MASK even, odd;
} NAME(masks);
/* Steps of both in turn: either half alone is a chain that waits for itself. */
typedef struct NAME(floats) {
    NAME(f) even, odd;
} NAME(floats);

INLINE_FN NAME(floats) NAME(plus)(NAME(floats) a, NAME(floats) b) {
    return (NAME(floats)){a.even + b.even, a.odd + b.odd};
}

INLINE_FN NAME(floats) NAME(times)(NAME(floats) a, NAME(f) b) { return (NAME(floats)){a.even * b, a.odd * b}; }

INLINE_FN NAME(floats) NAME(masked)(NAME(floats) a, NAME(masks) m) {
    return (NAME(floats)){KEEP_IF(m.even, a.even), KEEP_IF(m.odd, a.odd)};
}

INLINE_FN NAME(floats) NAME(plus_masked)(NAME(floats) a, NAME(floats) b, NAME(masks) m) {
    return (NAME(floats)){ADD_IF(m.even, a.even, b.even), ADD_IF(m.odd, a.odd, b.odd)};
}

/* What is not finite makes a lane NaN, and it stays so. */
INLINE_FN NAME(floats) NAME(noted)(NAME(floats) faults, NAME(floats) x) {
    const NAME(f) zero = {0};
    return (NAME(floats)){PLUS_PRODUCT(faults.even, x.even, zero), PLUS_PRODUCT(faults.odd, x.odd, zero)};
}

INLINE_FN int NAME(has_fault)(NAME(floats) f) {
    NAME(i) even = (NAME(i))(f.even != f.even), odd = (NAME(i))(f.odd != f.odd), any = even | odd;
    return ANY(any) != 0;
}

INLINE_FN NAME(pair) NAME(wide_pair)(const uint16_t *p) {
    NAME(u) u;
    memcpy(&u, p, sizeof u);
    __builtin_prefetch(p + AHEAD);
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

INLINE_FN int NAME(any_infinite)(NAME(w) most) {
    NAME(s) above = (NAME(s))(most > 0x7f7f);
    return ANY(above) != 0;
}

/* 16-bit counters hold so many steps. */
#define COUNT_STEPS 65535

INLINE_FN size_t NAME(count_steps)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                   int round, size_t n, NAME(w) * all_most) {
    const NAME(s) zero = {0};
    NAME(w) most = *all_most;
    size_t i = 0;
#define X(k)               \
    NAME(w) count##k = {0}; \
    const NAME(s) below##k = zero + (int16_t)(from[k] - 1);
    EACH_COUNT(X)
#undef X
    for (; i + STEP <= n; i += STEP) {
        NAME(s) size = NAME(sizes)(NAME(difference)(a + i, b ? b + i : b), round);
        most = (NAME(w))AT_LEAST_H(most, (NAME(w))size);
#define X(k) count##k = (NAME(w))COUNT_W(count##k, size, below##k);
        EACH_COUNT(X)
#undef X
    }
#define X(k) \
    for (size_t l = 0; l < STEP; l++) counts[k] += count##k[l];
    EACH_COUNT(X)
#undef X
    *all_most = most;
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
                                   const uint16_t *b, int round, size_t n, NAME(w) * all_most) {
    const NAME(b) zero = {0};
    const NAME(s) middle = (NAME(s)){0} + (int16_t)(least + 127);
    NAME(w) most = *all_most;
    size_t i = 0, end = n < BYTE_STEPS * 2 * STEP ? n : BYTE_STEPS * 2 * STEP;
#define X(k)                \
    NAME(c) count##k = {0}; \
    const NAME(b) below##k = zero + (int8_t)(from[k] - least - 128);
    EACH_COUNT(X)
#undef X
    for (; i + 2 * STEP <= end; i += 2 * STEP) {
        NAME(s) first = NAME(sizes)(NAME(difference)(a + i, b ? b + i : b), round);
        NAME(s) second = NAME(sizes)(NAME(difference)(a + i + STEP, b ? b + i + STEP : b), round);
        most = (NAME(w))AT_LEAST_H(most, (NAME(w))first);
        most = (NAME(w))AT_LEAST_H(most, (NAME(w))second);
        NAME(b) bytes = (NAME(b))PACK(first - middle, second - middle);
#define X(k) count##k = (NAME(c))COUNT_B(count##k, bytes, below##k);
        EACH_COUNT(X)
#undef X
    }
#define X(k) counts[k] += NAME(sum_bytes)(count##k);
    EACH_COUNT(X)
#undef X
    *all_most = most;
    return i;
}

FN static size_t NAME(count_near)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                  int round, size_t n, NAME(w) * all_most) {
    int least = from[0], most = from[0];
    size_t i = 0;
    for (size_t k = 1; k < 8; k++) {
        if (from[k] < least) least = from[k];
        if (from[k] > most) most = from[k];
    }
    if (most - least > 254 || least > 0x7f80) return 0; /* what sizes are apart from a higher one takes 17 bits */
    for (size_t done = 1; done; i += done) {
        const uint16_t *base = b ? b + i : b;
        done = !b      ? NAME(count_bytes)(counts, from, least, a + i, NULL, 0, n - i, all_most)
               : round ? NAME(count_bytes)(counts, from, least, a + i, base, 1, n - i, all_most)
                       : NAME(count_bytes)(counts, from, least, a + i, base, 0, n - i, all_most);
    }
    return i;
}
#endif

FN static size_t NAME(count_bf16)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b,
                                  int round, size_t n) {
    NAME(w) most = {0};
    size_t i = 0, longest = COUNT_STEPS * STEP;
#ifdef PACK
    i = NAME(count_near)(counts, from, a, b, round, n, &most);
#endif
    for (size_t done = 1; done;) {
        const uint16_t *base = b ? b + i : b;
        size_t part = n - i < longest ? n - i : longest;
        done = !b      ? NAME(count_steps)(counts, from, a + i, NULL, 0, part, &most)
               : round ? NAME(count_steps)(counts, from, a + i, base, 1, part, &most)
                       : NAME(count_steps)(counts, from, a + i, base, 0, part, &most);
        i += done;
    }
    if (NAME(any_infinite)(most)) return obm__scalar_count_bf16(counts, from, a, b, round, n);
    return i + obm__scalar_count_bf16(counts, from, a + i, b ? b + i : b, round, n - i);
}

/* Few steps have one, and most of these only one. */
FN static size_t NAME(list_lows)(uint16_t *out, NAME(s) hit, NAME(w) lanes) {
    uint16_t lower[STEP];
    size_t found = 0;
    memcpy(lower, &lanes, sizeof lower);
#ifdef LANES
    for (uint32_t lane = LANES(hit); lane; lane &= lane - 1) out[found++] = lower[__builtin_ctz(lane)];
#else
    uint16_t hits[STEP];
    memcpy(hits, &hit, sizeof hits);
    for (size_t l = 0; l < STEP; l++)
        if (hits[l]) out[found++] = lower[l];
#endif
    return found;
}

FN static size_t NAME(lows_bf16)(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const uint16_t *a,
                                 const uint16_t *b, size_t n) {
    const NAME(s) zero = {0}, wanted = zero + (int16_t)high;
    NAME(w) most = {0}, whole = {0};
    size_t i = 0, listed = 0, counted = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(pair) x = NAME(difference)(a + i, b ? b + i : b);
        NAME(w) lower = (NAME(w))HALVES(x.even, x.odd << 16);
        NAME(s) size = NAME(sizes)(x, 0), hit = size == wanted, none = (NAME(s))lower == zero, some = hit & ~none;
        most = (NAME(w))AT_LEAST_H(most, (NAME(w))size);
        whole -= (NAME(w))(hit & none);
        if (ANY(some)) listed += NAME(list_lows)(out + listed, some, lower);
    }
    if (NAME(any_infinite)(most)) return obm__scalar_lows_bf16(out, found, zeros, high, a, b, n);
    for (size_t l = 0; l < STEP; l++) counted += whole[l];
    i += obm__scalar_lows_bf16(out + listed, found, zeros, high, a + i, b ? b + i : b, n - i);
    *found += listed;
    *zeros += counted;
    return i;
}

INLINE_FN size_t NAME(size_steps)(uint16_t *out, const uint16_t *a, const uint16_t *b, int round, size_t n,
                                  NAME(w) * all_most) {
    NAME(w) most = {0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(w) size = (NAME(w))NAME(sizes)(NAME(difference)(a + i, b ? b + i : b), round);
        most = (NAME(w))AT_LEAST_H(most, size);
        memcpy(out + i, &size, sizeof size);
    }
    *all_most = most;
    return i;
}

FN static size_t NAME(sizes_bf16)(uint16_t *out, uint16_t *most, const uint16_t *a, const uint16_t *b, int round,
                                  size_t n) {
    NAME(w) each;
    size_t i = !b      ? NAME(size_steps)(out, a, NULL, 0, n, &each)
               : round ? NAME(size_steps)(out, a, b, 1, n, &each)
                       : NAME(size_steps)(out, a, b, 0, n, &each);
    size_t rest = obm__scalar_sizes_bf16(out + i, most, a + i, b ? b + i : b, round, n - i);
    for (size_t l = 0; l < STEP; l++)
        if (each[l] > *most) *most = each[l];
    return *most < 0x7f80 ? i + rest : obm__scalar_sizes_bf16(out, most, a, b, round, n);
}

/* ---- merging ---- */

/* Lanes whose element has its bit. */
INLINE_FN NAME(masks) NAME(kept)(const uint8_t *bits) {
    NAME(u) one = {0}, word = {0};
    uint32_t w = 0;
    memcpy(&w, bits, STEP / 8);
    word += w;
    for (int l = 0; l < VL; l++) one[l] = 1u << (2 * l);
    return (NAME(masks)){HAS_BITS(word, one), HAS_BITS(word, one << 1)};
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
    return is;
}

/* Of a difference of two bf16: with 1.5 * 2^16 powers of two of its exponent the last bit is that of a bf16, and sums
 * round to nearest even.  What is denormal stays as it is, since it is a bf16; what rounds to infinity or comes near
 * (2^111) is not finite any more. */
INLINE_FN NAME(u) NAME(rounded)(const NAME(tile) * w, NAME(u) x) {
    return (NAME(u))ROUND_BY((NAME(f))x, (NAME(f))(x & w->exponent), w->steps);
}

INLINE_FN MASK NAME(stays)(const NAME(tile) * w, NAME(u) x, size_t m) {
    return ABOVE_I((NAME(i))(x & w->magnitude), w->below[m]);
}

INLINE_FN NAME(pair) NAME(wide)(const NAME(tile) * w, const uint16_t *p) {
    NAME(u) u;
    memcpy(&u, p, sizeof u);
    __builtin_prefetch(p + AHEAD);
    return (NAME(pair)){u << 16, u & w->upper};
}

INLINE_FN NAME(floats)
    NAME(tile_delta)(const NAME(tile) * w, NAME(form) is, size_t m, size_t i, NAME(pair) base,
                     NAME(floats) * faults) {
    const obm__tile *t = &w->t;
    NAME(pair) x = NAME(wide)(w, t->models[m] + i);
    if (is.base) x = (NAME(pair)){NAME(minus)(x.even, base.even), NAME(minus)(x.odd, base.odd)};
    NAME(masks) stays = {NAME(stays)(w, x.even, m), NAME(stays)(w, x.odd, m)};
    if (is.round) x = (NAME(pair)){NAME(rounded)(w, x.even), NAME(rounded)(w, x.odd)};
    NAME(floats) d = {(NAME(f))x.even, (NAME(f))x.odd};
    if (is.drops) *faults = NAME(noted)(*faults, d);
    if (is.drops && t->keep && t->keep[m]) {
        NAME(masks) kept = NAME(kept)(t->keep[m] + i / 8);
        stays = (NAME(masks)){(MASK)(stays.even & kept.even), (MASK)(stays.odd & kept.odd)};
    }
    d = NAME(masked)(d, stays);
    return is.scaled ? NAME(times)(d, w->factors[m]) : d;
}

INLINE_FN NAME(floats) NAME(vote)(const NAME(tile) * w, NAME(form) is, size_t m, NAME(floats) d) {
    if (is.votes == NAME(votes_one)) return d;
    return NAME(times)(d, is.votes == NAME(votes_weights) ? w->weights[m] : w->votes[m]);
}

/* As in agree_f32.  One less than a sum of +0 has the sign that is below it; a sum of -0 is one of zeros, which agree
 * with nobody.  Under the sign of the sum what agrees is positive.  What is not finite makes the sum so, and no vote is
 * NaN where it is finite; elsewhere the scalar kernel decides. */
INLINE_FN NAME(floats)
    NAME(agreed)(const NAME(tile) * w, NAME(form) is, const NAME(floats) * d, NAME(floats) * faults) {
    const NAME(f) zero = {0};
    const NAME(floats) start = {is.large ? w->start : zero, is.large ? w->start : zero};
    NAME(floats) sum = {zero, zero}, mixed = sum, divisor = start;
#define X(m) \
    if (m < is.count) sum = m ? NAME(plus)(sum, NAME(vote)(w, is, m, d[m])) : NAME(vote)(w, is, m, d[m]);
    EACH_MODEL(X)
#undef X
    *faults = NAME(noted)(*faults, sum);
    const NAME(pair)
        sign = {((NAME(u))sum.even - w->below_zero) & w->sign, ((NAME(u))sum.odd - w->below_zero) & w->sign};
#define X(m)                                                                                                        \
    if (m < is.count) {                                                                                             \
        NAME(floats) x = NAME(times)(d[m], w->weights[m]);                                                          \
        NAME(floats) v = NAME(vote)(w, is, m, d[m]);                                                                \
        NAME(masks)                                                                                                 \
        agrees = {ABOVE_F((NAME(f))((NAME(u))v.even ^ sign.even), zero),                                            \
                  ABOVE_F((NAME(f))((NAME(u))v.odd ^ sign.odd), zero)};                                             \
        NAME(floats) weight = {w->weights[m], w->weights[m]};                                                       \
        /* Of a product of -0 the sum from +0 on is +0. */                                                          \
        mixed = m || !is.large || is.scaled ? NAME(plus_masked)(mixed, x, agrees) : NAME(masked)(x, agrees);        \
        if (is.large || w->t.normalize) divisor = NAME(plus_masked)(divisor, weight, agrees);                       \
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
    NAME(merged)(const NAME(tile) * w, NAME(form) is, const NAME(floats) * d, NAME(pair) base,
                 NAME(floats) * faults) {
    NAME(floats) mixed = {{0}, {0}};
    if (is.agree) {
        mixed = NAME(agreed)(w, is, d, faults);
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

INLINE_FN size_t NAME(merge_steps)(uint16_t *out, const NAME(tile) * w, NAME(form) is, size_t n, int *bad) {
    NAME(floats) faults = {{0}, {0}};
    NAME(w) most = {0};
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(floats) d[OBM__TILE_MODELS] = {{{0}, {0}}};
        NAME(pair) base = {{0}, {0}};
        if (is.base) base = NAME(wide)(w, w->t.base + i);
#define X(m) \
    if (m < is.count) d[m] = NAME(tile_delta)(w, is, m, i, base, &faults);
        EACH_MODEL(X)
#undef X
        NAME(floats) mixed = NAME(merged)(w, is, d, base, &faults);
        NAME(w) halves = (NAME(w))NAME(narrow)((NAME(pair)){(NAME(u))mixed.even, (NAME(u))mixed.odd});
        most = (NAME(w))AT_LEAST_H(most, halves + halves);
        memcpy(out + i, &halves, sizeof halves);
    }
    *bad = NAME(has_fault)(faults) || NAME(any_infinite)(most >> 1);
    return i;
}

/* Loops of their own for what most merges are. */
FN static size_t NAME(merge_bf16)(uint16_t *out, const obm__tile *t, size_t n) {
    const NAME(voting) one = NAME(votes_one), weights = NAME(votes_weights);
    NAME(tile) w;
    obm__tile_rest room;
    int bad;
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
    if (bad) return obm__scalar_merge_bf16(out, t, n);
    obm__tile rest = obm__tile_behind(t, i, &room);
    return i + obm__scalar_merge_bf16(out + i, &rest, n - i);
}

FN static size_t NAME(vote_bf16)(int64_t *votes, const obm__tile *t, size_t n) {
    const NAME(f) zero = {0};
    NAME(floats) faults = {{0}, {0}};
    NAME(i) all = {0};
    obm__tile_rest room;
    NAME(tile) w;
    size_t i = 0;
    NAME(form) is = NAME(tile_open)(&w, t);
    for (; i + STEP <= n; i += STEP) {
        NAME(pair) base = {{0}, {0}};
        NAME(f) even = zero, odd = zero;
        if (is.base) base = NAME(wide)(&w, t->base + i);
#define X(m)                                                            \
    if (m < is.count) {                                                 \
        NAME(floats) d = NAME(tile_delta)(&w, is, m, i, base, &faults); \
        even += d.even * w.votes[m];                                    \
        odd += d.odd * w.votes[m];                                      \
    }
        EACH_MODEL(X)
#undef X
        faults = NAME(noted)(faults, (NAME(floats)){even, odd});
        all += (even < zero) - (even > zero) + ((odd < zero) - (odd > zero));
    }
    if (NAME(has_fault)(faults)) return obm__scalar_vote_bf16(votes, t, n);
    for (size_t l = 0; l < VL; l++) *votes += all[l];
    obm__tile rest = obm__tile_behind(t, i, &room);
    return i + obm__scalar_vote_bf16(votes, &rest, n - i);
}
