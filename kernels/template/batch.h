/*
 * Dense rows times several vectors, included by rows.h.  Columns keep their order here, since splitting x as rows.h
 * does would cost as many shuffles as multiplications.  In either order each column modulo 2 * VL has a chain of sums
 * of its own; joining the finished chains gives rows.h's lanes, so the results have the same bits.
 *
 * Four vectors by two rows: eight chains at a time, as many as hide the latency of a multiplication, so the first half
 * of every step runs through a stretch of columns and then the second half does.  Fewer vectors run both halves at
 * once.
 *
 *   BATCH_NAME                       the kernel
 *   BATCH_LOAD(p)                    VL weights, widened, in order
 *   BATCH_JOIN(a, b)                 the chains of both halves as rows.h adds its two
 *   HSUM_4(p, a, b, c, d)            four HSUMs at p
 *   KEEP(v)                          v stays in a register: gcc would load it for each of its uses
 */
/* Columns of four vectors that stay in the nearest cache beside the weights: 16 KiB. */
#define BATCH_STRETCH 1024
/* Rows that all vectors are multiplied with before the next ones: they stay in the second cache, with those to come. */
#define BATCH_ROWS OBM__Z12_UNPACKED
/* Cache lines of weights in a step. */
#define BATCH_LINES (2 * ROWS_STEP * sizeof(ROWS_TYPE) / 64)
#define BATCH_TWO ROWS_JOIN(BATCH_NAME, _2)
#define BATCH_THREE ROWS_JOIN(BATCH_NAME, _3)
#define BATCH_SUM ROWS_JOIN(BATCH_NAME, _sum)
#define BATCH_HALF ROWS_JOIN(BATCH_NAME, _half)
#define BATCH_FOUR ROWS_JOIN(BATCH_NAME, _4)
#define BATCH_BLOCK ROWS_JOIN(BATCH_NAME, _block)

FN static inline float BATCH_SUM(V a, V b) { return HSUM(BATCH_JOIN(a, b)); }

/* For vector t: chains a (first half of the step) and b (second half) of rows 0 and 1. */
#define BATCH_ZERO(t) V a0##t = SET1(0), a1##t = a0##t, b0##t = a0##t, b1##t = a0##t;
#define BATCH_A(t)                 \
    {                              \
        V v = LOAD(vs + t * vld);  \
        KEEP(v);                   \
        a0##t = FMA(u0, v, a0##t); \
        a1##t = FMA(u1, v, a1##t); \
    }
#define BATCH_B(t)                     \
    {                                  \
        V v = LOAD(vs + t * vld + VL); \
        KEEP(v);                       \
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

/* The chains of one half of the steps, two rows by four vectors: chain[(2 * row + half) * 4 + vector], VL each. */
#define BATCH_EACH_4(X) X(0) X(1) X(2) X(3)
#define BATCH_LOAD_CHAINS(t) V a##t = LOAD(chains + t * VL), b##t = LOAD(chains + (8 + t) * VL);
#define BATCH_STORE_CHAINS(t)     \
    STORE(chains + t * VL, a##t); \
    STORE(chains + (8 + t) * VL, b##t);
#define BATCH_MULTIPLY(t)            \
    {                                \
        V v = LOAD(x + t * ldx + j); \
        KEEP(v);                     \
        a##t = FMA(u0, v, a##t);     \
        b##t = FMA(u1, v, b##t);     \
    }
FN static inline void BATCH_HALF(float *chains, const ROWS_TYPE *w, size_t ld, const float *x, size_t ldx, size_t n,
                                 const char *ahead, size_t line) {
    BATCH_EACH_4(BATCH_LOAD_CHAINS)
    for (size_t j = 0; j < n; ahead += 64) {
        const size_t stop = n - j < line ? n : j + line;
        __builtin_prefetch(ahead, 0, 2);
        for (; j < stop; j += ROWS_STEP) {
            V u0 = BATCH_LOAD(w + j), u1 = BATCH_LOAD(w + ld + j);
            BATCH_EACH_4(BATCH_MULTIPLY)
        }
    }
    BATCH_EACH_4(BATCH_STORE_CHAINS)
}

/* An even number of rows, BATCH_ROWS at most, by four vectors, number `pass` of `passes`.  What comes next is asked for
 * in equal parts by every pass and half: a processor has few places for what it waits for. */
FN static void BATCH_FOUR(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                          size_t n, const char *ahead, size_t pass, size_t passes) {
    float chains[BATCH_ROWS / 2][16 * VL];
    size_t whole = n / ROWS_STEP * ROWS_STEP, per_step = ROWS_STEP * sizeof *w / passes;
    size_t line = per_step > 0 && per_step < 64 ? 64 / per_step * ROWS_STEP : ROWS_STEP;
    size_t per_half = n * sizeof *w / passes, per_pair = 2 * n * sizeof *w;
    memset(chains, 0, rows / 2 * sizeof *chains);
    for (size_t first = 0, count; first < whole; first += count) {
        count = whole - first < BATCH_STRETCH ? whole - first : BATCH_STRETCH;
        for (size_t r = 0; r < rows; r += 2) {
            const char *next = (const char *)((uintptr_t)ahead + r / 2 * per_pair + 2 * pass * per_half +
                                              first / ROWS_STEP * per_step);
            const ROWS_TYPE *p = w + r * ld + first;
            BATCH_HALF(chains[r / 2], p, ld, x + first, ldx, count, next, line);
            BATCH_HALF(chains[r / 2] + 4 * VL, p + VL, ld, x + first + VL, ldx, count,
                       (const char *)((uintptr_t)next + per_half), line);
        }
    }
    if (whole < n) {
        float x_end[4][2 * VL] = {{0}};
        for (size_t t = 0; t < 4; t++) memcpy(x_end[t], x + t * ldx + whole, (n - whole) * sizeof *x);
        for (size_t r = 0; r < rows; r += 2) {
            ROWS_TYPE w_end[2][2 * VL] = {{0}};
            for (size_t i = 0; i < 2; i++) memcpy(w_end[i], w + (r + i) * ld + whole, (n - whole) * sizeof *w);
            for (size_t half = 0; half < 2; half++)
                BATCH_HALF(chains[r / 2] + half * 4 * VL, w_end[0] + half * VL, ROWS_STEP, x_end[0] + half * VL,
                           ROWS_STEP, ROWS_STEP, (const char *)w, ROWS_STEP);
        }
    }
    for (size_t r = 0; r < rows; r++) {
        const float *a = chains[r / 2] + r % 2 * 8 * VL, *b = a + 4 * VL;
        float sums[4];
        HSUM_4(sums, BATCH_JOIN(LOAD(a), LOAD(b)), BATCH_JOIN(LOAD(a + VL), LOAD(b + VL)),
               BATCH_JOIN(LOAD(a + 2 * VL), LOAD(b + 2 * VL)), BATCH_JOIN(LOAD(a + 3 * VL), LOAD(b + 3 * VL)));
        for (size_t t = 0; t < 4; t++) y[t * ldy + r] = sums[t];
    }
}

/* Rows by all vectors; ahead: the rows behind them. */
FN static void BATCH_BLOCK(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                           size_t tokens, size_t n, const char *ahead) {
    size_t even = rows / 2 * 2, passes = tokens / 4, t = 0;
    for (; t + 4 <= tokens; t += 4)
        BATCH_FOUR(y + t * ldy, ldy, w, ld, even, x + t * ldx, ldx, n, ahead, t / 4, passes);
    for (size_t r = 0; tokens - t > 1 && r < even; r += 2) {
        const char *next = passes ? (const char *)w : (const char *)((uintptr_t)ahead + r * ld * sizeof *w);
        if (tokens - t == 2)
            BATCH_TWO(y + t * ldy + r, ldy, w + r * ld, ld, x + t * ldx, ldx, n, next);
        else
            BATCH_THREE(y + t * ldy + r, ldy, w + r * ld, ld, x + t * ldx, ldx, n, next);
    }
    if (tokens - t == 1) ROWS_NAME(y + t * ldy, w, ld, even, x + t * ldx, n);
    for (t = 0; t < tokens && even < rows; t++) y[t * ldy + even] = ROWS_ONE(w + even * ld, x + t * ldx, n);
}

/* The rows that follow are asked for while others are multiplied, behind the last ones too: that is where callers go
 * on, and asking for what is not there does no harm. */
FN static void BATCH_NAME(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                          size_t tokens, size_t n) {
    if (tokens == 1) ROWS_NAME(y, w, ld, rows, x, n);
    for (size_t r = 0, count; tokens > 1 && r < rows; r += count) {
        count = rows - r < BATCH_ROWS ? rows - r : BATCH_ROWS;
        BATCH_BLOCK(y + r, ldy, w + r * ld, ld, count, x, ldx, tokens, n,
                    (const char *)((uintptr_t)w + (r + count) * ld * sizeof *w));
    }
}

#undef BATCH_HALF
#undef BATCH_FOUR
#undef BATCH_BLOCK
#undef BATCH_EACH_4
#undef BATCH_LOAD_CHAINS
#undef BATCH_STORE_CHAINS
#undef BATCH_MULTIPLY
#undef BATCH_STRETCH
#undef BATCH_ROWS
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
#undef BATCH_JOIN
