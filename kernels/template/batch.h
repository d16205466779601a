/*
 * Dense rows times several vectors, included by rows.h: two rows by three (or two) vectors share the widened weights,
 * 12 accumulators of the 16 registers that AVX2 has.  Columns keep their order here, since splitting x as rows.h does
 * would cost as many shuffles as multiplications.  In either order each column modulo 2 * VL has a chain of sums of its
 * own; splitting the finished chains gives rows.h's lanes, so the results have the same bits.
 *
 *   BATCH_NAME                       the kernel
 *   BATCH_LOAD(p)                    VL weights, widened, in order
 */
/* Cache lines of weights in a step. */
#define BATCH_LINES (2 * ROWS_STEP * sizeof(ROWS_TYPE) / 64)
#define BATCH_TWO ROWS_JOIN(BATCH_NAME, _2)
#define BATCH_THREE ROWS_JOIN(BATCH_NAME, _3)
#define BATCH_SUM ROWS_JOIN(BATCH_NAME, _sum)

FN static inline float BATCH_SUM(V a, V b) {
    float chains[2 * VL];
    STORE(chains, a);
    STORE(chains + VL, b);
    SPLIT_X(chains, a, b);
    return HSUM(ADD(a, b));
}

/* For vector t: chains a (first half of the step) and b (second half) of rows 0 and 1. */
#define BATCH_ZERO(t) V a0##t = SET1(0), a1##t = a0##t, b0##t = a0##t, b1##t = a0##t;
#define BATCH_A(t)                 \
    {                              \
        V v = LOAD(vs + t * vld);  \
        a0##t = FMA(u0, v, a0##t); \
        a1##t = FMA(u1, v, a1##t); \
    }
#define BATCH_B(t)                     \
    {                                  \
        V v = LOAD(vs + t * vld + VL); \
        b0##t = FMA(u0, v, b0##t);     \
        b1##t = FMA(u1, v, b1##t);     \
    }
#define BATCH_STEP(EACH, row0, row1, vectors, distance) \
    do {                                                \
        const ROWS_TYPE *p0 = row0, *p1 = row1;         \
        const float *vs = vectors;                      \
        const size_t vld = distance;                    \
        V u0 = BATCH_LOAD(p0), u1 = BATCH_LOAD(p1);     \
        EACH(BATCH_A)                                   \
        u0 = BATCH_LOAD(p0 + VL);                       \
        u1 = BATCH_LOAD(p1 + VL);                       \
        EACH(BATCH_B)                                   \
    } while (0)
#define BATCH_END(t)                      \
    y[t * ldy] = BATCH_SUM(a0##t, b0##t); \
    y[t * ldy + 1] = BATCH_SUM(a1##t, b1##t);

#define BATCH_TILE(name, EACH, count)                                                                              \
    FN static void name(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, const float *x, size_t ldx, size_t n, \
                        const char *ahead) {                                                                       \
        size_t j = 0;                                                                                              \
        EACH(BATCH_ZERO)                                                                                           \
        for (; j + ROWS_STEP <= n; j += ROWS_STEP) {                                                               \
            for (size_t line = 0; line < BATCH_LINES; line++) __builtin_prefetch(ahead + line * 64, 0, 2);         \
            ahead += BATCH_LINES * 64;                                                                             \
            BATCH_STEP(EACH, w + j, w + ld + j, x + j, ldx);                                                       \
        }                                                                                                          \
        if (j < n) {                                                                                               \
            ROWS_TYPE w_end[2][2 * VL] = {{0}};                                                                    \
            float x_end[count][2 * VL] = {{0}};                                                                    \
            for (size_t r = 0; r < 2; r++) memcpy(w_end[r], w + r * ld + j, (n - j) * sizeof *w);                  \
            for (size_t t = 0; t < count; t++) memcpy(x_end[t], x + t * ldx + j, (n - j) * sizeof *x);             \
            BATCH_STEP(EACH, w_end[0], w_end[1], x_end[0], ROWS_STEP);                                             \
        }                                                                                                          \
        EACH(BATCH_END)                                                                                            \
    }
#define BATCH_EACH_2(X) X(0) X(1)
#define BATCH_EACH_3(X) X(0) X(1) X(2)
BATCH_TILE(BATCH_TWO, BATCH_EACH_2, 2)
BATCH_TILE(BATCH_THREE, BATCH_EACH_3, 3)

/* Vectors outside, rows inside: the vectors of a tile stay in the nearest cache.  Four are better cut 2 + 2 than 3 + 1.
 * The last pass has its weights in the second cache and leaves memory idle: it asks for the rows that follow, which is
 * where callers go on; asking for what is not there does no harm. */
FN static void BATCH_NAME(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                          size_t tokens, size_t n) {
    size_t even = rows / 2 * 2;
    while (tokens > 1) {
        size_t taken = tokens == 2 || tokens == 4 ? 2 : 3, skip = tokens - taken < 2 ? rows * ld : 0;
        for (size_t r = 0; r < even; r += 2) {
            const char *ahead = (const char *)((uintptr_t)w + (skip + r * ld) * sizeof *w);
            if (taken == 2)
                BATCH_TWO(y + r, ldy, w + r * ld, ld, x, ldx, n, ahead);
            else
                BATCH_THREE(y + r, ldy, w + r * ld, ld, x, ldx, n, ahead);
        }
        for (size_t t = 0; t < taken && even < rows; t++) y[t * ldy + even] = ROWS_ONE(w + even * ld, x + t * ldx, n);
        y += taken * ldy;
        x += taken * ldx;
        tokens -= taken;
    }
    if (tokens) ROWS_NAME(y, w, ld, rows, x, n);
}

#undef BATCH_LINES
#undef BATCH_TWO
#undef BATCH_THREE
#undef BATCH_SUM
#undef BATCH_ZERO
#undef BATCH_A
#undef BATCH_B
#undef BATCH_STEP
#undef BATCH_END
#undef BATCH_TILE
#undef BATCH_EACH_2
#undef BATCH_EACH_3
#undef BATCH_NAME
#undef BATCH_LOAD
