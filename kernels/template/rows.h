/*
 * Dense rows times a vector: four rows at a time share the loads of x, two accumulators a row.  A row's sums run in the
 * same order whether it is one of four or alone, which makes the result row-exact.  The last columns go through
 * zero-padded copies, so that nothing past n is read.
 *
 * The four are a quarter of the rows apart: memory sees four streams that go on from row to row, which its prefetchers
 * follow.  Four neighbours are four streams that end with each row, the sooner the shorter rows are.
 *
 *   FN, V, VL, SET1, ADD as in elementwise.h;   FMA(a, b, c) = a * b + c rounded once;   HSUM(v) in a fixed order
 *   ROWS_NAME, ROWS_TYPE             the kernel, the element type of w
 *   ROWS_SPLITS                      1: SPLIT_X moves lanes, which is worth doing once for many rows
 *   ROWS_AHEAD                       bytes ahead of which a stream is asked for, over the ends of rows; 0: left to the CPU
 *   SPLIT_W(p, a, b)                 2 * VL weights as two vectors;   SPLIT_X(p, a, b) x in the same order of columns
 *   BATCH_NAME, BATCH_LOAD(p)        for batch.h;   BATCH_NAME for batch_wide.h, where BATCH_WIDE is defined
 */
#define ROWS_STEP ((size_t)2 * VL)
/* Columns whose order is made once for all rows, 64 KiB on the stack (core/sys/threads.c sees to the pool's, the header
 * says it of callers), and rows from which on that pays. */
#define ROWS_ORDERED 16384
#define ROWS_WORTH_ORDER 8
#define ROWS_JOIN_(a, b) a##b
#define ROWS_JOIN(a, b) ROWS_JOIN_(a, b)
#define ROWS_ONE ROWS_JOIN(ROWS_NAME, _1)
#define ROWS_FOUR ROWS_JOIN(ROWS_NAME, _4)
#define ROWS_ALL ROWS_JOIN(ROWS_NAME, _all)
#define ROWS_ORDER ROWS_JOIN(ROWS_NAME, _order)
#define ROWS_IN_ORDER ROWS_JOIN(ROWS_NAME, _in_order)

#define ROWS_ADD(r, p)            \
    do {                          \
        V w0, w1;                 \
        SPLIT_W(p, w0, w1);       \
        a##r = FMA(w0, x0, a##r); \
        b##r = FMA(w1, x1, b##r); \
    } while (0)

FN static float ROWS_ONE(const ROWS_TYPE *w, const float *x, size_t n) {
    V a0 = SET1(0), b0 = SET1(0), x0, x1;
    size_t j = 0;
    for (; j + ROWS_STEP <= n; j += ROWS_STEP) {
        SPLIT_X(x + j, x0, x1);
        ROWS_ADD(0, w + j);
    }
    if (j < n) {
        ROWS_TYPE w_end[2 * VL] = {0};
        float x_end[2 * VL] = {0};
        memcpy(w_end, w + j, (n - j) * sizeof *w);
        memcpy(x_end, x + j, (n - j) * sizeof *x);
        SPLIT_X(x_end, x0, x1);
        ROWS_ADD(0, w_end);
    }
    return HSUM(ADD(a0, b0));
}

#define ROWS_ASK(p)                                                                        \
    for (size_t line = 0; ROWS_AHEAD && line < ROWS_STEP * sizeof(ROWS_TYPE); line += 64) \
    __builtin_prefetch((const void *)((uintptr_t)(p) + ROWS_AHEAD + line))
#define ROWS_X(p)                          \
    if (ordered)                           \
        x0 = LOAD(p), x1 = LOAD((p) + VL); \
    else                                   \
        SPLIT_X(p, x0, x1);

/* y[0], y[apart], ...: four rows, ld apart.  ordered: x is what ROWS_ORDER made of it. */
FN static inline __attribute__((always_inline)) void ROWS_FOUR(float *y, size_t apart, const ROWS_TYPE *w, size_t ld,
                                                               const float *x, size_t n, const int ordered) {
    V a0 = SET1(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0, x0, x1;
    size_t j = 0;
    for (; j + ROWS_STEP <= n; j += ROWS_STEP) {
        ROWS_X(x + j)
        ROWS_ASK(w + j);
        ROWS_ASK(w + ld + j);
        ROWS_ASK(w + 2 * ld + j);
        ROWS_ASK(w + 3 * ld + j);
        ROWS_ADD(0, w + j);
        ROWS_ADD(1, w + ld + j);
        ROWS_ADD(2, w + 2 * ld + j);
        ROWS_ADD(3, w + 3 * ld + j);
    }
    if (j < n) {
        ROWS_TYPE w_end[4][2 * VL] = {{0}};
        float x_end[2 * VL] = {0};
        for (size_t r = 0; r < 4; r++) memcpy(w_end[r], w + r * ld + j, (n - j) * sizeof *w);
        memcpy(x_end, x + j, (ordered ? ROWS_STEP : n - j) * sizeof *x);
        ROWS_X(x_end)
        ROWS_ADD(0, w_end[0]);
        ROWS_ADD(1, w_end[1]);
        ROWS_ADD(2, w_end[2]);
        ROWS_ADD(3, w_end[3]);
    }
    y[0] = HSUM(ADD(a0, b0));
    y[apart] = HSUM(ADD(a1, b1));
    y[2 * apart] = HSUM(ADD(a2, b2));
    y[3 * apart] = HSUM(ADD(a3, b3));
}

FN static inline __attribute__((always_inline)) void ROWS_ALL(float *y, const ROWS_TYPE *w, size_t ld, size_t rows,
                                                              const float *x, size_t n, const float *ordered) {
    size_t quarter = rows / 4;
    for (size_t r = 0; r < quarter; r++)
        ROWS_FOUR(y + r, quarter, w + r * ld, quarter * ld, ordered ? ordered : x, n, ordered != NULL);
    for (size_t r = 4 * quarter; r < rows; r++) y[r] = ROWS_ONE(w + r * ld, x, n);
}

#if ROWS_SPLITS
/* x as SPLIT_X gives it, step by step; the last one is filled with zeros. */
FN static void ROWS_ORDER(float *out, const float *x, size_t n) {
    V a, b;
    float end[2 * VL] = {0};
    for (size_t j = 0; j < n; j += ROWS_STEP) {
        const float *from = n - j < ROWS_STEP ? memcpy(end, x + j, (n - j) * sizeof *x) : x + j;
        SPLIT_X(from, a, b);
        STORE(out + j, a);
        STORE(out + j + VL, b);
    }
}

FN static void ROWS_IN_ORDER(float *y, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t n) {
    _Alignas(64) float ordered[ROWS_ORDERED];
    ROWS_ORDER(ordered, x, n);
    ROWS_ALL(y, w, ld, rows, x, n, ordered);
}
#endif

FN static void ROWS_NAME(float *y, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t n) {
#if ROWS_SPLITS
    if (rows >= ROWS_WORTH_ORDER && n <= ROWS_ORDERED) {
        ROWS_IN_ORDER(y, w, ld, rows, x, n);
        return;
    }
#endif
    ROWS_ALL(y, w, ld, rows, x, n, NULL);
}

#ifdef BATCH_WIDE
#include "batch_wide.h"
#else
#include "batch.h"
#endif

#undef ROWS_STEP
#undef ROWS_JOIN_
#undef ROWS_JOIN
#undef ROWS_ONE
#undef ROWS_FOUR
#undef ROWS_ALL
#undef ROWS_ORDER
#undef ROWS_IN_ORDER
#undef ROWS_X
#undef ROWS_ASK
#undef ROWS_SPLITS
#undef ROWS_ADD
#undef ROWS_NAME
#undef ROWS_TYPE
#undef BATCH_LOAD
#undef BATCH_JOIN
#undef SPLIT_W
#undef SPLIT_X
