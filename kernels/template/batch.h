/*
 * Dense rows times several vectors, included by rows.h.  Columns keep their order here, since splitting x as rows.h
 * does would cost as many shuffles as multiplications.  In either order each column modulo 2 * VL has a chain of sums
 * of its own; joining the finished chains gives rows.h's lanes, so the results have the same bits.
 *
 * Four vectors by three rows: twelve chains at a time hide the latency of a multiplication with fewer loads for each
 * than eight, so the first half of every step runs through the columns and then the second half does.  The vectors are
 * put into that order before.  Fewer vectors run both halves at once.
 *
 *   BATCH_NAME                       the kernel
 *   BATCH_LOAD(p)                    VL weights, widened, in order, best without a register beside the result's
 *   BATCH_JOIN(a, b)                 the chains of both halves as rows.h adds its two
 *   HSUM_4(p, a, b, c, d)            four HSUMs at p
 *   KEEP(v)                          v stays in a register: gcc would load it for each of its uses
 */
/* Values of the vectors in order. */
#define BATCH_ROOM OBM__BATCH_ROOM
/* Rows that all vectors are multiplied with before the next ones; where they are read more than once, they are to stay
 * in the second cache. */
#define BATCH_ROWS 64
#define BATCH_AGAIN OBM__Z12_UNPACKED
/* Steps for which lines are asked for together. */
#define BATCH_ASKED 8
/* Cache lines of weights in a step. */
#define BATCH_LINES (2 * ROWS_STEP * sizeof(ROWS_TYPE) / 64)
#define BATCH_TWO ROWS_JOIN(BATCH_NAME, _2)
#define BATCH_THREE ROWS_JOIN(BATCH_NAME, _3)
#define BATCH_SUM ROWS_JOIN(BATCH_NAME, _sum)
#define BATCH_ORDER ROWS_JOIN(BATCH_NAME, _order)
#define BATCH_RUN_2 ROWS_JOIN(BATCH_NAME, _run_2)
#define BATCH_RUN_3 ROWS_JOIN(BATCH_NAME, _run_3)
#define BATCH_HALVES ROWS_JOIN(BATCH_NAME, _halves)
#define BATCH_REST ROWS_JOIN(BATCH_NAME, _rest)
#define BATCH_END_4 ROWS_JOIN(BATCH_NAME, _end_4)
#define BATCH_FOURS ROWS_JOIN(BATCH_NAME, _fours)
#define BATCH_FITS ROWS_JOIN(BATCH_NAME, _fits)
#define BATCH_ALL ROWS_JOIN(BATCH_NAME, _all)
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

/* ---- four vectors at a time ---- */

/* x as the tiles take it, so that they read one stream: (groups of four vectors, halves, steps, 4, VL); the last step
 * is filled with zeros. */
FN static void BATCH_ORDER(float *out, const float *x, size_t ldx, size_t tokens, size_t n) {
    size_t whole = n / ROWS_STEP * ROWS_STEP, groups = tokens / 4;
    for (size_t g = 0; g < groups; g++, x += 4 * ldx)
        for (size_t half = 0; half < 2 * VL; half += VL) {
            for (size_t j = half; j < whole; j += ROWS_STEP)
                for (size_t t = 0; t < 4; t++, out += VL) STORE(out, LOAD(x + t * ldx + j));
            for (size_t t = 0; t < 4 && whole < n; t++, out += VL) {
                float end[2 * VL] = {0};
                memcpy(end, x + t * ldx + whole, (n - whole) * sizeof *x);
                STORE(out, LOAD(end + half));
            }
        }
}

/* The chains of one half of the steps, rows by four vectors: chains[(4 * row + vector) * 2 * VL], VL each. */
#define BATCH_ACROSS_2(X, t) X(0, t) X(1, t)
#define BATCH_ACROSS_3(X, t) X(0, t) X(1, t) X(2, t)
#define BATCH_DOWN_4(X, ACROSS) X(0, ACROSS) X(1, ACROSS) X(2, ACROSS) X(3, ACROSS)
#define BATCH_LOAD_CHAIN(r, t) V s##r##t = begin ? SET1(0) : LOAD(chains + (4 * r + t) * 2 * VL);
#define BATCH_STORE_CHAIN(r, t) STORE(chains + (4 * r + t) * 2 * VL, s##r##t);
#define BATCH_LOAD_CHAINS(t, ACROSS) ACROSS(BATCH_LOAD_CHAIN, t)
#define BATCH_STORE_CHAINS(t, ACROSS) ACROSS(BATCH_STORE_CHAIN, t)
#define BATCH_LOAD_ROW(r, k) V w##r = BATCH_LOAD(w + r * ld + (k)*ROWS_STEP);
#define BATCH_MULTIPLY_ROW(r, t)     \
    s##r##t = FMA(w##r, v, s##r##t); \
    KEEP(s##r##t);
#define BATCH_MULTIPLY(t, ACROSS)     \
    {                                 \
        V v = LOAD(from + t * VL);    \
        KEEP(v);                      \
        ACROSS(BATCH_MULTIPLY_ROW, t) \
    }
#define BATCH_ONE_STEP(k, ACROSS)            \
    {                                        \
        const float *from = x + (k)*4 * VL;  \
        ACROSS(BATCH_LOAD_ROW, k)            \
        BATCH_DOWN_4(BATCH_MULTIPLY, ACROSS) \
    }
#define BATCH_ASK(row)                          \
    for (size_t line = 0; line < lines; line++) \
        __builtin_prefetch((const void *)(ahead + (row)*apart + line * 64), 0, 2);
/* What is asked for is spread over the steps: a processor that waits for too many lines forgets further requests. */
#define BATCH_RUN(name, ACROSS)                                                                                      \
    FN static void name(float *chains, const ROWS_TYPE *w, size_t ld, const float *x, size_t steps, uintptr_t ahead, \
                        size_t apart, size_t lines, int begin) {                                                     \
        BATCH_DOWN_4(BATCH_LOAD_CHAINS, ACROSS)                                                                      \
        for (; steps >= BATCH_ASKED; steps -= BATCH_ASKED) {                                                         \
            BATCH_ASK(0)                                                                                             \
            BATCH_ONE_STEP(0, ACROSS)                                                                                \
            BATCH_ONE_STEP(1, ACROSS)                                                                                \
            BATCH_ASK(1)                                                                                             \
            BATCH_ONE_STEP(2, ACROSS)                                                                                \
            BATCH_ONE_STEP(3, ACROSS)                                                                                \
            BATCH_ONE_STEP(4, ACROSS)                                                                                \
            BATCH_ASK(2)                                                                                             \
            BATCH_ONE_STEP(5, ACROSS)                                                                                \
            BATCH_ONE_STEP(6, ACROSS)                                                                                \
            BATCH_ONE_STEP(7, ACROSS)                                                                                \
            ahead += lines * 64;                                                                                     \
            w += BATCH_ASKED * ROWS_STEP;                                                                            \
            x += BATCH_ASKED * 4 * VL;                                                                               \
        }                                                                                                            \
        for (; steps > 0; steps--, w += ROWS_STEP, x += 4 * VL) BATCH_ONE_STEP(0, ACROSS)                            \
        BATCH_DOWN_4(BATCH_STORE_CHAINS, ACROSS)                                                                     \
    }
BATCH_RUN(BATCH_RUN_2, BATCH_ACROSS_2)
BATCH_RUN(BATCH_RUN_3, BATCH_ACROSS_3)

/* Rows (2 or 3) by four vectors and n columns; x: (halves, steps, 4, VL).  Half of what comes next is asked for by each
 * half of the steps. */
FN static inline void BATCH_HALVES(float *chains, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t n,
                                   uintptr_t ahead, size_t apart, size_t asked, size_t lines, int begin) {
    size_t whole = n / ROWS_STEP, steps = (n + ROWS_STEP - 1) / ROWS_STEP;
    for (size_t half = 0; half < 2; half++, ahead += asked, x += steps * 4 * VL)
        if (rows == 3)
            BATCH_RUN_3(chains + half * VL, w + half * VL, ld, x, whole, ahead, apart, lines, begin);
        else
            BATCH_RUN_2(chains + half * VL, w + half * VL, ld, x, whole, ahead, apart, lines, begin);
}

/* The columns behind the last whole step. */
FN static void BATCH_REST(float *chains, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t n) {
    size_t whole = n / ROWS_STEP, steps = whole + 1;
    ROWS_TYPE end[3][2 * VL] = {{0}};
    for (size_t r = 0; r < rows; r++) memcpy(end[r], w + r * ld + whole * ROWS_STEP, n % ROWS_STEP * sizeof *w);
    for (size_t half = 0; half < 2; half++) {
        const float *last = x + (half * steps + whole) * 4 * VL;
        if (rows == 3)
            BATCH_RUN_3(chains + half * VL, end[0] + half * VL, ROWS_STEP, last, 1, 0, 0, 0, 0);
        else
            BATCH_RUN_2(chains + half * VL, end[0] + half * VL, ROWS_STEP, last, 1, 0, 0, 0, 0);
    }
}

FN static void BATCH_END_4(float *y, size_t ldy, const float *chains, size_t rows) {
    for (size_t r = 0; r < rows; r++, chains += 8 * VL) {
        float sums[4];
        HSUM_4(sums, BATCH_JOIN(LOAD(chains), LOAD(chains + VL)),
               BATCH_JOIN(LOAD(chains + 2 * VL), LOAD(chains + 3 * VL)),
               BATCH_JOIN(LOAD(chains + 4 * VL), LOAD(chains + 5 * VL)),
               BATCH_JOIN(LOAD(chains + 6 * VL), LOAD(chains + 7 * VL)));
        for (size_t t = 0; t < 4; t++) y[t * ldy + r] = sums[t];
    }
}

/* At least two rows, BATCH_ROWS at most, by one or two groups of four vectors.  ordered: all columns of x, or NULL
 * where they are too many: then a stretch after the other is put into `room`, and chains wait for the next one. */
FN static void BATCH_FOURS(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                           size_t groups, size_t n, const float *ordered, float *room, const char *ahead,
                           size_t apart) {
    _Alignas(64) float chains[BATCH_ROWS * 2 * 8 * VL];
    const size_t stretch = BATCH_ROOM / (groups * 4) / (BATCH_ASKED * ROWS_STEP) * (BATCH_ASKED * ROWS_STEP);
    size_t first = 0, count;
    do {
        count = ordered || n - first < stretch ? n - first : stretch;
        size_t steps = (count + ROWS_STEP - 1) / ROWS_STEP, asked = count * sizeof *w / (2 * groups);
        size_t lines = (BATCH_ASKED * ROWS_STEP * sizeof *w / (2 * groups) + 63) / 64;
        if (!ordered) BATCH_ORDER(room, x + first, ldx, groups * 4, count);
        for (size_t r = 0, tile; r < rows; r += tile) {
            tile = rows - r == 2 || rows - r == 4 ? 2 : 3;
            for (size_t g = 0; g < groups; g++) {
                float *at = chains + (ordered ? 0 : (r * groups + g * tile) * 8 * VL);
                const float *from = (ordered ? ordered : room) + g * 2 * steps * 4 * VL;
                const ROWS_TYPE *p = w + r * ld + first;
                BATCH_HALVES(at, p, ld, tile, from, count,
                             (uintptr_t)ahead + r * apart + first * sizeof *w + 2 * g * asked, apart, asked, lines,
                             !first);
                if (count % ROWS_STEP) BATCH_REST(at, p, ld, tile, from, count);
                if (first + count == n) BATCH_END_4(y + 4 * g * ldy + r, ldy, at, tile);
            }
        }
        first += count;
    } while (first < n);
}

/* Whether the order of all vectors is made once for all rows. */
FN static inline int BATCH_FITS(size_t tokens, size_t n) {
    return tokens / 4 * 4 * ((n + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP) <= BATCH_ROOM;
}

/* Rows by all vectors; room: BATCH_ROOM values, which hold the order of x where it fits. */
FN static void BATCH_BLOCK(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                           size_t tokens, size_t n, float *room, NAME(batch_ask) ask) {
    const size_t apart = ask.apart;
    const char *ahead = (const char *)(ask.at + ask.lead * apart);
    size_t even = rows / 2 * 2, fours = rows > 1 ? rows : 0, fits = (size_t)BATCH_FITS(tokens, n), t = 0;
    size_t ordered = 4 * ((n + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP); /* values of a group */
    for (size_t count; t + 4 <= tokens && fours; t += count) {
        count = t + 8 <= tokens ? 8 : 4;
        BATCH_FOURS(y + t * ldy, ldy, w, ld, rows, x + t * ldx, ldx, count / 4, n, fits ? room + t / 4 * ordered : NULL,
                    room, ahead, apart);
    }
    for (size_t first = t, r = 0; tokens - t > 1 && tokens - t < 4 && r < even; r += 2) {
        const char *next = first ? (const char *)w : (const char *)((uintptr_t)ahead + r * apart);
        if (tokens - t == 2)
            BATCH_TWO(y + t * ldy + r, ldy, w + r * ld, ld, x + t * ldx, ldx, n, next);
        else
            BATCH_THREE(y + t * ldy + r, ldy, w + r * ld, ld, x + t * ldx, ldx, n, next);
    }
    if (tokens - t == 1) ROWS_NAME(y + t * ldy, w, ld, even, x + t * ldx, n);
    for (size_t u = fours ? t : 0; u < tokens && even < rows; u++)
        y[u * ldy + even] = ROWS_ONE(w + even * ld, x + u * ldx, n);
}

/* The rows that follow are asked for while others are multiplied, behind the last ones too: that is where callers go
 * on, and asking for what is not there does no harm. */
#define BATCH_MOST (tokens == 4 || tokens == 8 || !BATCH_FITS(tokens, n) ? BATCH_ROWS : BATCH_AGAIN)
#define BATCH_AHEAD (tokens < 4 ? BATCH_AGAIN : 3)
#include "batch_all.h"

#undef BATCH_AHEAD
#undef BATCH_MOST
#undef BATCH_A
#undef BATCH_ACROSS_2
#undef BATCH_ACROSS_3
#undef BATCH_AGAIN
#undef BATCH_ALL
#undef BATCH_ASK
#undef BATCH_ASKED
#undef BATCH_B
#undef BATCH_BLOCK
#undef BATCH_DOWN_4
#undef BATCH_EACH_2
#undef BATCH_EACH_3
#undef BATCH_END
#undef BATCH_END_4
#undef BATCH_FITS
#undef BATCH_FOURS
#undef BATCH_HALVES
#undef BATCH_LINES
#undef BATCH_LOAD_CHAIN
#undef BATCH_LOAD_CHAINS
#undef BATCH_LOAD_ROW
#undef BATCH_MULTIPLY
#undef BATCH_MULTIPLY_ROW
#undef BATCH_ONE_STEP
#undef BATCH_ORDER
#undef BATCH_REST
#undef BATCH_ROOM
#undef BATCH_ROWS
#undef BATCH_RUN
#undef BATCH_RUN_2
#undef BATCH_RUN_3
#undef BATCH_STEP
#undef BATCH_STORE_CHAIN
#undef BATCH_STORE_CHAINS
#undef BATCH_SUM
#undef BATCH_THREE
#undef BATCH_TILE
#undef BATCH_TWO
#undef BATCH_ZERO
#undef BATCH_NAME
