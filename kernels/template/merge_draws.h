/*
 * Bodies of the kernels of random masks, on the vectors of merge.h and merge_bf16.h.  Draws take the time, and of these
 * the 64-bit multiplications; whole steps here, the rest by the scalar entries.
 *
 *   FN, NAME(op), VL, V, GE_ZERO(v)  as in elementwise.h; ANY, HALVES, LANES, STEP as in merge_bf16.h
 *   B, BL, TABLE_B(p), LOOKUP(t, i)  as in planes.h
 *   MUL_EVEN(a, b)                   64-bit products of the lower halves of 64-bit lanes, where there is no
 *                                    multiplication of these lanes
 *   QUARTERS(even, odd)                 32-bit lanes: the even ones of `even` and the odd ones of `odd`
 *   MUL_UPPER(a, b)                  upper halves of the products of unsigned 16-bit lanes
 *   LESS_SOME(a, b), AT_MOST_H(a, b) a - b, or 0 where that is negative, and the lesser one, of unsigned 16-bit lanes;
 * the last four where the compiler finds no better
 */
typedef uint64_t NAME(q) __attribute__((vector_size(4 * VL)));
/* Of one size everywhere: sums have as many lanes as their contract says. */
typedef uint64_t NAME(q4) __attribute__((vector_size(32)));
typedef double NAME(d4) __attribute__((vector_size(32)));
typedef uint16_t NAME(w16) __attribute__((vector_size(32)));

#ifndef QUARTERS
#define QUARTERS(even, odd) (((even)&0xffffffffu) | ((odd)&0xffffffff00000000u))
#endif
#ifndef MUL_UPPER
#define MUL_UPPER(a, b) NAME(mul_upper)(a, b)
INLINE_FN NAME(w) NAME(mul_upper)(NAME(w) a, NAME(w) b) {
    NAME(u) x = (NAME(u))a, y = (NAME(u))b;
    return (NAME(w))(((x & 0xffffu) * (y & 0xffffu)) >> 16 | (((x >> 16) * (y >> 16)) & UPPER));
}
#endif
#ifndef LESS_SOME
#define LESS_SOME(a, b) (((a) - (b)) & (NAME(w))((a) > (b)))
#endif
#ifndef AT_MOST_H
#define AT_MOST_H(a, b) ((a)-LESS_SOME(a, b))
#endif

/* Upper and lower half of a factor change places in `crossed`. */
typedef struct NAME(factor) {
    NAME(q) whole, crossed;
} NAME(factor);
INLINE_FN NAME(factor) NAME(factor_of)(uint64_t f) {
    const NAME(q) zero = {0};
    return (NAME(factor)){zero + f, zero + (f << 32 | f >> 32)};
}

/* z * f; of a product of which only the upper half is wanted the lower one may be anything. */
INLINE_FN NAME(q) NAME(product)(NAME(q) z, NAME(factor) f, int whole) {
#ifdef MUL_EVEN
    NAME(q) cross = (NAME(q))((NAME(u))z * (NAME(u))f.crossed), low = (NAME(q))MUL_EVEN(z, f.whole) + (cross << 32);
    return (NAME(q))((NAME(u))low + (NAME(u))(whole ? cross & 0xffffffff00000000u : cross));
#else
    (void)whole;
    return z * f.whole;
#endif
}

/* The draws without the last step, which changes nothing but bit 32 of their upper halves. */
INLINE_FN NAME(q) NAME(mix)(NAME(q) z, NAME(factor) first, NAME(factor) second) {
    z = NAME(product)(z ^ z >> 30, first, 1);
    return NAME(product)(z ^ z >> 27, second, 0);
}

/* States of every `apart`-th element from `from` on. */
INLINE_FN NAME(q) NAME(states)(uint64_t state, uint64_t from, uint64_t apart) {
    NAME(q) q = {0};
    for (size_t l = 0; l < VL / 2; l++) q[l] = state + (apart * l + from + 1) * OBM__GOLDEN;
    return q;
}

FN static void NAME(random_tops)(uint32_t *out, uint64_t state, size_t n) {
    const NAME(factor) first = NAME(factor_of)(OBM__MIX_FIRST), second = NAME(factor_of)(OBM__MIX_SECOND);
    NAME(q) even = NAME(states)(state, 0, 2);
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        NAME(q) x = NAME(mix)(even, first, second), y = NAME(mix)(even + OBM__GOLDEN, first, second);
        NAME(u) tops = (NAME(u))QUARTERS(x >> 32, y);
        tops ^= tops >> 31;
        even += VL * OBM__GOLDEN;
        memcpy(out + i, &tops, sizeof tops);
    }
    obm__scalar_random_tops(out + i, state + i * OBM__GOLDEN, n - i);
}

/* Upper 16 bits of the draws of a step, from the states of every fourth element: nothing moves between lanes. */
INLINE_FN NAME(w) NAME(draw_highs)(NAME(q) states, NAME(factor) first, NAME(factor) second) {
    NAME(q)
    x = NAME(mix)(states, first, second), y = NAME(mix)(states + OBM__GOLDEN, first, second),
    z = NAME(mix)(states + 2 * OBM__GOLDEN, first, second), w = NAME(mix)(states + 3 * OBM__GOLDEN, first, second);
    return (NAME(w))QUARTERS((NAME(q))HALVES((NAME(u))(x >> 48), (NAME(u))(y >> 32)),
                             (NAME(q))HALVES((NAME(u))(z >> 16), (NAME(u))w));
}

FN static void NAME(random_highs)(uint16_t *out, uint64_t state, size_t n) {
    const NAME(factor) first = NAME(factor_of)(OBM__MIX_FIRST), second = NAME(factor_of)(OBM__MIX_SECOND);
    NAME(q) states = NAME(states)(state, 0, 4);
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(w) highs = NAME(draw_highs)(states, first, second);
        states += STEP * OBM__GOLDEN;
        memcpy(out + i, &highs, sizeof highs);
    }
    obm__scalar_random_highs(out + i, state + i * OBM__GOLDEN, n - i);
}

/* Bits of 16-bit lanes of 0 or all ones. */
INLINE_FN void NAME(store_lanes)(uint8_t *bits, NAME(s) lanes) {
#ifdef LANES
    uint32_t all = LANES(lanes);
    memcpy(bits, &all, STEP / 8);
#else
    NAME(s) weights = {0};
    for (size_t l = 0; l < STEP; l++) weights[l] = (int16_t)(1u << l % 16);
    lanes &= weights;
    uint16_t all = 0;
    for (size_t l = 0; l < STEP; l++) all |= (uint16_t)lanes[l];
    memcpy(bits, &all, STEP / 8);
#endif
}

/* The upper 16 bits decide, unless they are equal to the limit's: one element of 65536. */
FN static void NAME(random_bits)(uint8_t *bits, uint64_t state, uint64_t limit, size_t n) {
    const NAME(factor) first = NAME(factor_of)(OBM__MIX_FIRST), second = NAME(factor_of)(OBM__MIX_SECOND);
    const NAME(w) zero = {0}, high_limit = zero + (uint16_t)(limit >> 37);
    NAME(q) states = NAME(states)(state, 0, 4);
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(w) highs = NAME(draw_highs)(states, first, second);
        states += STEP * OBM__GOLDEN;
        if (ANY(highs == high_limit)) {
            obm__scalar_random_bits(bits + i / 8, state + i * OBM__GOLDEN, limit, STEP);
            continue;
        }
        NAME(store_lanes)(bits + i / 8, (NAME(s))(LESS_SOME(high_limit, highs) != zero));
    }
    obm__scalar_random_bits(bits + i / 8, state + i * OBM__GOLDEN, limit, n - i);
}

/* A table of 16 words, of which a lane picks one: two tables of bytes, in which an index with its highest bit finds 0.
 */
#if BL == 4 * VL
typedef struct NAME(choices) {
    B low, high;
} NAME(choices);
INLINE_FN NAME(choices) NAME(choices_of)(const uint16_t *table) {
    uint8_t low[16], high[16];
    for (size_t i = 0; i < 16; i++) {
        low[i] = (uint8_t)table[i];
        high[i] = (uint8_t)(table[i] >> 8);
    }
    return (NAME(choices)){TABLE_B(low), TABLE_B(high)};
}
INLINE_FN NAME(w) NAME(pick)(NAME(choices) table, NAME(w) at) {
    return (NAME(w))LOOKUP(table.low, (B)(at | 0x8000)) | (NAME(w))LOOKUP(table.high, (B)(at << 8 | 0x80));
}
#else
typedef struct NAME(choices) {
    const uint16_t *table;
} NAME(choices);
INLINE_FN NAME(choices) NAME(choices_of)(const uint16_t *table) { return (NAME(choices)){table}; }
INLINE_FN NAME(w) NAME(pick)(NAME(choices) words, NAME(w) at) {
    for (size_t l = 0; l < STEP; l++) at[l] = words.table[at[l]];
    return at;
}
#endif

FN static void NAME(choose_sizes)(uint8_t *kept, uint8_t *open, const uint16_t *highs, const uint16_t *sizes,
                                  const obm__choice *c, size_t n) {
    const NAME(w) zero = {0}, from = zero + c->from, step = zero + c->step;
    const NAME(choices) keep = NAME(choices_of)(c->keep), drop = NAME(choices_of)(c->drop);
    size_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        NAME(w) high, size;
        memcpy(&high, highs + i, sizeof high);
        memcpy(&size, sizes + i, sizeof size);
        NAME(w) at = MUL_UPPER((NAME(w))LESS_SOME(high, from), step);
        at = (NAME(w))AT_MOST_H(at, zero + 15);
        NAME(s) stays = (NAME(s))size >= (NAME(s))NAME(pick)(keep, at);
        NAME(s) goes = (NAME(s))size < (NAME(s))NAME(pick)(drop, at);
        NAME(store_lanes)(kept + i / 8, stays);
        NAME(store_lanes)(open + i / 8, ~(stays | goes));
    }
    obm__scalar_choose_sizes(kept + i / 8, open + i / 8, highs + i, sizes + i, c, n - i);
}

/* The bits of a bf16 are those of a double that is 2^896 times less: four of them come out of 64-bit lanes by shifts
 * alone, and sums are those of the values, since none of their terms is below the least double. */
FN static void NAME(sum_sizes)(double *sums, const uint16_t *sizes, const uint8_t *keep, size_t n) {
    const NAME(q4) bits = (NAME(q4)){0} + ((uint64_t)0x7fff << 45);
    const NAME(w16) one = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                           1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    NAME(d4) all[4] = {{0}}, some[4] = {{0}};
    double lane[2][16];
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        NAME(w16) size, word;
        uint16_t kept;
        memcpy(&size, sizes + i, sizeof size);
        memcpy(&kept, keep + i / 8, sizeof kept);
        word = (NAME(w16)){0} + kept;
        NAME(q4) x = (NAME(q4))size, y = (NAME(q4))(size & (NAME(w16))((word & one) == one));
        all[0] += (NAME(d4))(x << 45 & bits);
        all[1] += (NAME(d4))(x << 29 & bits);
        all[2] += (NAME(d4))(x << 13 & bits);
        all[3] += (NAME(d4))(x >> 3 & bits);
        some[0] += (NAME(d4))(y << 45 & bits);
        some[1] += (NAME(d4))(y << 29 & bits);
        some[2] += (NAME(d4))(y << 13 & bits);
        some[3] += (NAME(d4))(y >> 3 & bits);
    }
    for (size_t j = 0; j < 16; j++) {
        lane[0][j] = all[j % 4][j / 4] * 0x1p896;
        lane[1][j] = some[j % 4][j / 4] * 0x1p896;
    }
    obm__sum_sizes_rest(sums, lane, sizes + i, keep + i / 8, n - i);
}
