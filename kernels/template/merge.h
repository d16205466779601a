/*
 * Bodies of the kernels of static merges, on the compiler's own vectors: they need compares and shifts of lanes and
 * nothing that one instruction set has and another lacks.  Whole vectors here, the rest by the scalar entries.
 *
 *   FN, NAME(op), VL                 as in elementwise.h
 *   WIDE_BF16(p)                     where the compiler's conversion of VL bf16 is not the instruction for it
 */
typedef float NAME(f) __attribute__((vector_size(4 * VL)));
typedef uint32_t NAME(u) __attribute__((vector_size(4 * VL)));
typedef int32_t NAME(i) __attribute__((vector_size(4 * VL)));
typedef uint16_t NAME(h) __attribute__((vector_size(2 * VL)));

#define MAGNITUDE(u) ((NAME(i))((u)&0x7fffffffu))
/* VL bf16, widened: the patterns of floats. */
#ifndef WIDE_BF16
#define WIDE_BF16(p) NAME(widen)(p)
FN static inline NAME(u) NAME(widen)(const uint16_t *p) {
    NAME(h) halves;
    memcpy(&halves, p, sizeof halves);
    return __builtin_convertvector(halves, NAME(u)) << 16;
}
#endif
/* Nearest even; NaN is looked for before. */
#define ROUND_BF16(u) (((u) + (((u) >> 16 & 1u) + 0x7fffu)) & 0xffff0000u)

FN static inline uint32_t NAME(any)(const NAME(i) * v) {
    uint32_t lane[VL], all = 0;
    memcpy(lane, v, sizeof lane);
    for (size_t i = 0; i < VL; i++) all |= lane[i];
    return all;
}

/* One loop for each form of the difference.  What rounds to infinity is not finite either. */
FN static inline __attribute__((always_inline)) size_t NAME(delta_loop)(float *d, const uint16_t *a, const uint16_t *b,
                                                                        int subtract, int round, uint32_t least,
                                                                        size_t n, NAME(i) * all_bad) {
    size_t i = 0;
    NAME(i) bad = {0}, limit = bad + (round ? 0x7f7f7fff : 0x7f7fffff), below = bad + (int32_t)(least - 1);
    for (; i + VL <= n; i += VL) {
        NAME(u) x = WIDE_BF16(a + i);
        if (subtract) x = (NAME(u))((NAME(f))x - (NAME(f))WIDE_BF16(b + i));
        bad |= MAGNITUDE(x) > limit;
        if (round) x = ROUND_BF16(x);
        x &= (NAME(u))(MAGNITUDE(x) > below);
        memcpy(d + i, &x, sizeof x);
    }
    *all_bad = bad;
    return i;
}

FN static size_t NAME(delta_bf16)(float *d, const uint16_t *a, const uint16_t *b, int round, uint32_t least, size_t n) {
    NAME(i) bad;
    size_t i = !b      ? NAME(delta_loop)(d, a, b, 0, 0, least, n, &bad)
               : round ? NAME(delta_loop)(d, a, b, 1, 1, least, n, &bad)
                       : NAME(delta_loop)(d, a, b, 1, 0, least, n, &bad);
    if (NAME(any)(&bad)) return obm__scalar_delta_bf16(d, a, b, round, least, n);
    return i + obm__scalar_delta_bf16(d + i, a + i, b ? b + i : b, round, least, n - i);
}

#define EACH_COUNT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
FN static void NAME(count_from)(uint32_t *counts, const uint32_t *from, const float *x, size_t n) {
    size_t i = 0;
    const NAME(i) zero = {0};
#define X(k) NAME(i) count##k = zero, below##k = zero + (int32_t)(from[k] - 1);
    EACH_COUNT(X)
#undef X
    for (; i + VL <= n; i += VL) {
        NAME(u) u;
        memcpy(&u, x + i, sizeof u);
        NAME(i) size = MAGNITUDE(u);
#define X(k) count##k -= size > below##k;
        EACH_COUNT(X)
#undef X
    }
#define X(k) \
    for (size_t l = 0; l < VL; l++) counts[k] += (uint32_t)count##k[l];
    EACH_COUNT(X)
#undef X
    obm__scalar_count_from(counts, from, x + i, n - i);
}

/* Few match, so eight vectors are looked at together. */
FN static void NAME(low_histogram)(uint32_t *histogram, uint32_t high, const float *x, size_t n) {
    size_t i = 0;
    for (; i + 8 * VL <= n; i += 8 * VL) {
        NAME(i) hit = {0};
        for (size_t j = 0; j < 8 * VL; j += VL) {
            NAME(u) u;
            memcpy(&u, x + i + j, sizeof u);
            hit |= (u >> 16 & 0x7fffu) == high;
        }
        if (NAME(any)(&hit)) obm__scalar_low_histogram(histogram, high, x + i, 8 * VL);
    }
    obm__scalar_low_histogram(histogram, high, x + i, n - i);
}

/* Four vectors are looked at together, then one by one. */
FN static void NAME(lows_f32)(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const float *x, size_t n) {
    size_t i = 0, listed = 0, counted = 0, some, none;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        NAME(i) hit[4], all = {0};
        for (size_t j = 0; j < 4; j++) {
            NAME(u) u;
            memcpy(&u, x + i + j * VL, sizeof u);
            all |= hit[j] = (u >> 16 & 0x7fffu) == high;
        }
        if (!NAME(any)(&all)) continue;
        for (size_t j = 0; j < 4; j++) {
            if (!NAME(any)(&hit[j])) continue;
            obm__scalar_lows_f32(out + listed, &some, &none, high, x + i + j * VL, VL);
            listed += some;
            counted += none;
        }
    }
    obm__scalar_lows_f32(out + listed, &some, &none, high, x + i, n - i);
    *found = listed + some;
    *zeros = counted + none;
}

FN static void NAME(keep_from)(float *x, uint32_t least, size_t n) {
    NAME(i) below = {0};
    size_t i = 0;
    below += (int32_t)(least - 1);
    for (; i + VL <= n; i += VL) {
        NAME(u) u;
        memcpy(&u, x + i, sizeof u);
        u &= (NAME(u))(MAGNITUDE(u) > below);
        memcpy(x + i, &u, sizeof u);
    }
    obm__scalar_keep_from(x + i, least, n - i);
}

/* The end of agree_f32 and sum_f32. */
#define FINISH(mixed)                          \
    do {                                       \
        mixed *= lambda;                       \
        if (m->base) {                         \
            memcpy(&d, m->base + i, sizeof d); \
            mixed = d + mixed;                 \
        }                                      \
        memcpy(out + i, &mixed, sizeof mixed); \
    } while (0)
static inline obm__agreement NAME(rest)(const obm__agreement *m, size_t done) {
    obm__agreement rest = *m;
    rest.deltas += done;
    if (rest.base) rest.base += done;
    return rest;
}

FN static void NAME(sum_f32)(float *out, const obm__agreement *m, size_t n) {
    const NAME(f) zero = {0}, lambda = zero + m->lambda, divisor = zero + m->divisor;
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        NAME(f) mixed = zero, d;
        for (size_t t = 0; t < m->count; t++) {
            memcpy(&d, m->deltas + t * m->stride + i, sizeof d);
            mixed += d * m->weights[t];
        }
        mixed /= divisor;
        FINISH(mixed);
    }
    obm__agreement rest = NAME(rest)(m, i);
    obm__scalar_sum_f32(out + i, &rest, n - i);
}

FN static void NAME(agree_f32)(float *out, const obm__agreement *m, size_t n) {
    const NAME(f) zero = {0}, zero_sign = zero + m->zero_sign, lambda = zero + m->lambda, one = zero + 1;
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        NAME(f) sum = zero, mixed = zero, divisor = zero, d;
        for (size_t t = 0; t < m->count; t++) {
            memcpy(&d, m->deltas + t * m->stride + i, sizeof d);
            sum += d * m->votes[t];
        }
        NAME(i) empty = sum == zero;
        NAME(u) sign = ((NAME(u))empty & (NAME(u))zero_sign) | (~(NAME(u))empty & (NAME(u))sum);
        for (size_t t = 0; t < m->count; t++) {
            memcpy(&d, m->deltas + t * m->stride + i, sizeof d);
            NAME(u) vote = (NAME(u))(d * m->votes[t]);
            NAME(u) agrees = (NAME(u))((NAME(i))(vote ^ sign) >= 0) & (NAME(u))(vote << 1 != 0u);
            mixed += (NAME(f))((NAME(u))(d * m->weights[t]) & agrees);
            divisor += (NAME(f))((NAME(u))(zero + m->weights[t]) & agrees);
        }
        if (m->normalize) {
            NAME(u) none = (NAME(u))(divisor == zero);
            mixed /= (NAME(f))((none & (NAME(u))one) | (~none & (NAME(u))divisor));
        }
        FINISH(mixed);
    }
    obm__agreement rest = NAME(rest)(m, i);
    obm__scalar_agree_f32(out + i, &rest, n - i);
}

FN static size_t NAME(store_bf16)(uint16_t *out, const float *x, size_t n) {
    size_t i = 0;
    NAME(i) bad = {0}, limit = bad + 0x7f7f7fff;
    for (; i + VL <= n; i += VL) {
        NAME(u) u;
        memcpy(&u, x + i, sizeof u);
        bad |= MAGNITUDE(u) > limit;
        NAME(h) halves = __builtin_convertvector(ROUND_BF16(u) >> 16, NAME(h));
        memcpy(out + i, &halves, sizeof halves);
    }
    if (NAME(any)(&bad)) return obm__scalar_store_bf16(out, x, n);
    return i + obm__scalar_store_bf16(out + i, x + i, n - i);
}
