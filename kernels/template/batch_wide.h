/*
 * Dense rows times several vectors where there are 32 registers of 64 bytes; included by rows.h in place of batch.h.
 * Three rows by four vectors keep both chains that rows.h has for each, 24 registers, and columns come in its order:
 * weights are loaded once and widen with one operation each then, and what splits x is done once for all rows.  A
 * chain sums the same products in the same order as there, so the results have the same bits.
 *
 * A step of three rows by four vectors reads eight registers of x for 24 multiplications, which the second cache cannot
 * deliver as fast: where x does not stay in the first one, columns come in stretches of which it does, and the chains
 * of a few rows wait for the next stretch.
 *
 *   SPLIT_W, SPLIT_X, HSUM           of rows.h;   HSUM_4(p, a, b, c, d) four HSUMs at p
 *   KEEP(v)                          v stays in a register: gcc would load it for each of its uses
 *   NAME(batch_ask)                  of all.h: what is asked for meanwhile
 */
/* Values of the vectors in order. */
#define BATCH_ROOM OBM__BATCH_ROOM
/* Rows of a block: their chains wait for the next columns where there is no room for all of x. */
#define BATCH_ROWS 64
/* Vectors of a pass, and the rows, a few more at the end, that meet a stretch of their columns in turn. */
#define BATCH_PASS 8
#define BATCH_FEW 12
#define BATCH_FEW_MOST 16
/* Values of x in a stretch, and bytes that stay in the first cache. */
#define BATCH_STRETCH ((size_t)4096)
#define BATCH_NEAR ((size_t)45056)
/* Bytes between what is multiplied and what is asked for, at least: memory takes its time. */
#define BATCH_LEAD ((size_t)16384)
#define BATCH_LEAD_STRETCH ((size_t)8192)
#define BATCH_ORDER ROWS_JOIN(BATCH_NAME, _order)
#define BATCH_ORDER_STEP ROWS_JOIN(BATCH_NAME, _order_step)
#define BATCH_ORDER_PART ROWS_JOIN(BATCH_NAME, _order_part)
#define BATCH_NEXT ROWS_JOIN(BATCH_NAME, _next)
#define BATCH_GROUP ROWS_JOIN(BATCH_NAME, _group)
#define BATCH_PASS_OF ROWS_JOIN(BATCH_NAME, _pass)
#define BATCH_PLACE ROWS_JOIN(BATCH_NAME, _place)
#define BATCH_TILE ROWS_JOIN(BATCH_NAME, _tile)
#define BATCH_END ROWS_JOIN(BATCH_NAME, _end)
#define BATCH_STRIP ROWS_JOIN(BATCH_NAME, _strip)
#define BATCH_PART ROWS_JOIN(BATCH_NAME, _part)
#define BATCH_FITS ROWS_JOIN(BATCH_NAME, _fits)
#define BATCH_ALONE ROWS_JOIN(BATCH_NAME, _alone)
#define BATCH_LEADS ROWS_JOIN(BATCH_NAME, _leads)
#define BATCH_BLOCK ROWS_JOIN(BATCH_NAME, _block)
#define BATCH_ALL ROWS_JOIN(BATCH_NAME, _all)

/* ---- two or three rows by two, three or four vectors ---- */

/* X of an r and each t, or of an R and each t. */
#define BATCH_T_2(X, r) X(r, 0) X(r, 1)
#define BATCH_T_3(X, r) BATCH_T_2(X, r) X(r, 2)
#define BATCH_T_4(X, r) BATCH_T_3(X, r) X(r, 3)
#define BATCH_R_2(X, T) X(0, T) X(1, T)
#define BATCH_R_3(X, T) BATCH_R_2(X, T) X(2, T)
#define BATCH_CHAIN(r, t) (chains + ((r)*across + t) * 2 * VL)
#define BATCH_LOAD_CHAIN(r, t)                             \
    V a##r##t = begin ? SET1(0) : LOAD(BATCH_CHAIN(r, t)); \
    V b##r##t = begin ? SET1(0) : LOAD(BATCH_CHAIN(r, t) + VL);
#define BATCH_STORE_CHAIN(r, t)        \
    STORE(BATCH_CHAIN(r, t), a##r##t); \
    STORE(BATCH_CHAIN(r, t) + VL, b##r##t);
#define BATCH_JOIN_CHAIN(r, t) STORE(sums + ((r)*across + t) * VL, ADD(a##r##t, b##r##t));
#define BATCH_LOAD_CHAINS(r, T) T(BATCH_LOAD_CHAIN, r)
#define BATCH_STORE_CHAINS(r, T) T(BATCH_STORE_CHAIN, r)
#define BATCH_JOIN_CHAINS(r, T) T(BATCH_JOIN_CHAIN, r)
#define BATCH_LOAD_ROW(r, T) \
    V u##r, v##r;            \
    SPLIT_W(w + r * ld, u##r, v##r);
#define BATCH_MULTIPLY_A(r, t)        \
    a##r##t = FMA(u##r, x0, a##r##t); \
    KEEP(a##r##t);
#define BATCH_MULTIPLY_B(r, t)        \
    b##r##t = FMA(v##r, x0, b##r##t); \
    KEEP(b##r##t);
#define BATCH_VECTOR_A(R, t)     \
    {                            \
        V x0 = LOAD(x + (t)*VL); \
        KEEP(x0);                \
        R(BATCH_MULTIPLY_A, t)   \
    }
#define BATCH_VECTOR_B(R, t)                   \
    {                                          \
        V x0 = LOAD(x + (vectors + (t)) * VL); \
        KEEP(x0);                              \
        R(BATCH_MULTIPLY_B, t)                 \
    }
#define BATCH_ASK(r, T) __builtin_prefetch((const void *)(ahead + r * apart));
/* x: (steps, 2, vectors, VL).  chains: (rows, vectors of the pass, 2, VL); in the end sums: (rows, those, VL).  Each
 * step asks for a line per row, `apart` from one to the next and `pace` behind those of the step before. */
#define BATCH_RUN(R, T, rows, count)                                                                                   \
    FN static void ROWS_JOIN(BATCH_NAME, _##rows##count)(float *sums, float *chains, size_t across,                    \
                                                         const ROWS_TYPE *w, size_t ld, const float *x, size_t steps,  \
                                                         uintptr_t ahead, size_t apart, size_t pace, int begin,        \
                                                         int end) {                                                    \
        const size_t vectors = count;                                                                                  \
        R(BATCH_LOAD_CHAINS, T)                                                                                        \
        for (; steps > 0; steps--, w += ROWS_STEP, x += 2 * vectors * VL, ahead += pace) {                             \
            R(BATCH_ASK, T)                                                                                            \
            R(BATCH_LOAD_ROW, T)                                                                                       \
            T(BATCH_VECTOR_A, R)                                                                                       \
            T(BATCH_VECTOR_B, R)                                                                                       \
        }                                                                                                              \
        if (end) {                                                                                                     \
            R(BATCH_JOIN_CHAINS, T)                                                                                    \
        } else {                                                                                                       \
            R(BATCH_STORE_CHAINS, T)                                                                                   \
        }                                                                                                              \
    }
BATCH_RUN(BATCH_R_2, BATCH_T_2, 2, 2)
BATCH_RUN(BATCH_R_2, BATCH_T_3, 2, 3)
BATCH_RUN(BATCH_R_2, BATCH_T_4, 2, 4)
BATCH_RUN(BATCH_R_3, BATCH_T_2, 3, 2)
BATCH_RUN(BATCH_R_3, BATCH_T_3, 3, 3)
BATCH_RUN(BATCH_R_3, BATCH_T_4, 3, 4)

/* n columns, the last ones of them where they are no whole step. */
FN static void BATCH_TILE(float *sums, float *chains, size_t across, const ROWS_TYPE *w, size_t ld, size_t rows,
                          const float *x, size_t vectors, size_t n, uintptr_t ahead, size_t apart, size_t pace,
                          int begin, int end) {
    static void (*const runs[2][3])(float *, float *, size_t, const ROWS_TYPE *, size_t, const float *, size_t,
                                    uintptr_t, size_t, size_t, int, int) = {
        {ROWS_JOIN(BATCH_NAME, _22), ROWS_JOIN(BATCH_NAME, _23), ROWS_JOIN(BATCH_NAME, _24)},
        {ROWS_JOIN(BATCH_NAME, _32), ROWS_JOIN(BATCH_NAME, _33), ROWS_JOIN(BATCH_NAME, _34)}};
    size_t whole = n / ROWS_STEP, left = n % ROWS_STEP;
    runs[rows - 2][vectors - 2](sums, chains, across, w, ld, x, whole, ahead, apart, pace, begin, end && !left);
    if (left) {
        ROWS_TYPE last[3][2 * VL] = {{0}};
        for (size_t r = 0; r < rows; r++) memcpy(last[r], w + r * ld + whole * ROWS_STEP, left * sizeof *w);
        runs[rows - 2][vectors - 2](sums, chains, across, last[0], ROWS_STEP, x + whole * ROWS_STEP * vectors, 1, ahead,
                                    0, 0, 0, end);
    }
}

/* sums: (rows, vectors, VL). */
FN static void BATCH_END(float *y, size_t ldy, const float *sums, size_t rows, size_t vectors) {
    const size_t row = vectors * VL;
    for (size_t t = 0; t < vectors; t++, y += ldy, sums += VL) {
        for (size_t r = 0; r + 4 <= rows; r += 4) {
            const float *p = sums + r * row;
            HSUM_4(y + r, LOAD(p), LOAD(p + row), LOAD(p + 2 * row), LOAD(p + 3 * row));
        }
        for (size_t r = rows / 4 * 4; r < rows; r++) y[r] = HSUM(LOAD(sums + r * row));
    }
}

/* ---- vectors in order ---- */

/* Vectors of the next pass, and of the next group of a pass: two to four.  No later one has a single vector. */
FN static inline size_t BATCH_PASS_OF(size_t left) {
    return left <= BATCH_PASS ? left : left == BATCH_PASS + 1 ? BATCH_PASS - 1 : BATCH_PASS;
}
FN static inline size_t BATCH_GROUP(size_t left) { return left <= 4 ? left : (left + 1) / 2; }

/* Columns of the next stretch: all where they stay in the first cache beside the rows of this tile and the next. */
FN static inline size_t BATCH_NEXT(size_t vectors, size_t left) {
    size_t stretch = BATCH_STRETCH / vectors / ROWS_STEP * ROWS_STEP;
    size_t bytes = left * (vectors * sizeof(float) + 6 * sizeof(ROWS_TYPE));
    return left <= stretch || bytes <= BATCH_NEAR ? left : stretch;
}

/* Columns up to a whole step. */
FN static inline size_t BATCH_PLACE(size_t n) { return (n + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP; }

FN static inline void BATCH_ORDER_STEP(float *out, const float *x, size_t vectors) {
    V a, b;
    SPLIT_X(x, a, b);
    STORE(out, a);
    STORE(out + vectors * VL, b);
}

/* One group and one stretch: (steps, 2, vectors, VL), the last step filled with zeros. */
FN static void BATCH_ORDER_PART(float *out, const float *x, size_t ldx, size_t vectors, size_t n) {
    size_t whole = n / ROWS_STEP * ROWS_STEP;
    for (size_t t = 0; t < vectors; t++, out += VL, x += ldx) {
        float end[2 * VL] = {0};
        for (size_t j = 0; j < whole; j += ROWS_STEP) BATCH_ORDER_STEP(out + j * vectors, x + j, vectors);
        if (whole == n) continue;
        memcpy(end, x + whole, (n - whole) * sizeof *x);
        BATCH_ORDER_STEP(out + whole * vectors, end, vectors);
    }
}

/* Pass after pass: (stretches, groups). */
FN static void BATCH_ORDER(float *out, const float *x, size_t ldx, size_t tokens, size_t n) {
    for (size_t t = 0, pass; t < tokens; t += pass) {
        pass = BATCH_PASS_OF(tokens - t);
        for (size_t j = 0, cols; j < n; j += cols) {
            cols = BATCH_NEXT(pass, n - j);
            for (size_t u = t, group; u < t + pass; u += group) {
                group = BATCH_GROUP(t + pass - u);
                BATCH_ORDER_PART(out, x + u * ldx + j, ldx, group, cols);
                out += group * BATCH_PLACE(cols);
            }
        }
    }
}

/* Whether the order of all vectors is made once for all rows. */
FN static inline int BATCH_FITS(size_t tokens, size_t n) { return tokens * BATCH_PLACE(n) <= BATCH_ROOM; }

/* ---- many rows by all vectors ---- */

/* A few rows by one stretch of the vectors of a pass.  Whole rows are asked for as they lie in memory, one stream;
 * stretches row by row, those of the next strip behind those of this one. */
FN static void BATCH_STRIP(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x,
                           size_t vectors, size_t n, float *chains, const NAME(batch_ask) * ask, int begin, int end) {
    _Alignas(64) float sums[BATCH_FEW_MOST * BATCH_PASS * VL];
    const size_t groups = (vectors + 3) / 4;
    const int stream = begin && end;
    for (size_t r = 0, tile; r < rows; r += tile) {
        const float *from = x;
        size_t to = r + ask->lead;
        uintptr_t ahead = to < rows ? ask->at + to * ask->apart : ask->next + (to - rows) * ask->apart;
        tile = rows - r == 2 || rows - r == 4 ? 2 : 3;
        size_t apart = stream ? 64 : ask->apart, pace = (stream ? tile : 1) * ask->step / groups;
        for (size_t t = 0, group; t < vectors; t += group) {
            size_t at = (r * vectors + t) * VL;
            group = BATCH_GROUP(vectors - t);
            BATCH_TILE(sums + at, chains + 2 * at, vectors, w + r * ld, ld, tile, from, group, n, ahead, apart, pace,
                       begin, end);
            ahead += n / ROWS_STEP * pace;
            from += group * BATCH_PLACE(n);
        }
    }
    if (end) BATCH_END(y, ldy, sums, rows, vectors);
}

/* At least two rows, BATCH_ROWS at most, by the vectors of a pass in order. */
FN static void BATCH_PART(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x,
                          size_t vectors, size_t n, float *chains, NAME(batch_ask) ask, int begin, int end) {
    for (size_t r = 0, few; r < rows; r += few) {
        uintptr_t first = ask.at + r * ask.apart;
        few = rows - r <= BATCH_FEW_MOST ? rows - r : BATCH_FEW;
        for (size_t j = 0, cols; j < n; j += cols) {
            cols = BATCH_NEXT(vectors, n - j);
            NAME(batch_ask) strip = ask;
            strip.at = first + j / ROWS_STEP * ask.step;
            strip.next = j + cols < n ? strip.at + cols / ROWS_STEP * ask.step : first + few * ask.apart;
            BATCH_STRIP(y + r, ldy, w + r * ld + j, ld, few, x + j * vectors, vectors, cols,
                        chains + r * vectors * 2 * VL, &strip, begin && j == 0, end && j + cols == n);
        }
    }
}

FN static void BATCH_ALONE(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                           size_t tokens, size_t n) {
    for (size_t t = 0; t < tokens; t++)
        for (size_t r = 0; r < rows; r++) y[t * ldy + r] = ROWS_ONE(w + r * ld, x + t * ldx, n);
}

/* BATCH_ROWS rows at most, by all vectors; room: BATCH_ROOM values, which hold the order of x where it fits.  Where it
 * does not, a part of the columns after the other is put into it. */
FN static void BATCH_BLOCK(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                           size_t tokens, size_t n, float *room, NAME(batch_ask) ask) {
    _Alignas(64) float chains[BATCH_ROWS * BATCH_PASS * 2 * VL];
    const int fits = BATCH_FITS(tokens, n);
    const size_t part = fits ? n : BATCH_ROOM / BATCH_PASS;
    if (rows < 2 || n == 0) {
        BATCH_ALONE(y, ldy, w, ld, rows, x, ldx, tokens, n);
        return;
    }
    for (size_t t = 0, pass; t < tokens; t += pass) {
        NAME(batch_ask) a = ask;
        pass = BATCH_PASS_OF(tokens - t);
        for (size_t j = 0, cols; j < n; j += cols, a.at += part / ROWS_STEP * ask.step) {
            cols = n - j < part ? n - j : part;
            const float *ordered = fits ? room + t * BATCH_PLACE(n) : room;
            if (!fits) BATCH_ORDER(room, x + t * ldx + j, ldx, pass, cols);
            BATCH_PART(y + t * ldy, ldy, w + j, ld, rows, ordered, pass, cols, chains, a, j == 0, j + cols == n);
        }
    }
}

/* Rows between those that are multiplied and those that are asked for: tiles, and no more than a strip has. */
FN static size_t BATCH_LEADS(size_t tokens, size_t n) {
    size_t cols = BATCH_NEXT(BATCH_PASS_OF(tokens), n), rows = 3;
    size_t bytes = cols < n ? BATCH_LEAD_STRETCH : BATCH_LEAD;
    while (rows < BATCH_FEW && rows * cols * sizeof(ROWS_TYPE) < bytes) rows += 3;
    return rows;
}

/* The rows that follow are asked for while others are multiplied, behind the last ones too: that is where callers go
 * on, and asking for what is not there does no harm. */
#define BATCH_MOST (tokens > BATCH_PASS && BATCH_FITS(tokens, n) ? BATCH_FEW : BATCH_ROWS)
#define BATCH_AHEAD (BATCH_LEADS(tokens, n))
#include "batch_all.h"

#undef BATCH_AHEAD
#undef BATCH_MOST
#undef BATCH_ALL
#undef BATCH_ALONE
#undef BATCH_ASK
#undef BATCH_BLOCK
#undef BATCH_CHAIN
#undef BATCH_END
#undef BATCH_FEW
#undef BATCH_FEW_MOST
#undef BATCH_FITS
#undef BATCH_GROUP
#undef BATCH_JOIN_CHAIN
#undef BATCH_JOIN_CHAINS
#undef BATCH_LEAD
#undef BATCH_LEADS
#undef BATCH_LEAD_STRETCH
#undef BATCH_LOAD_CHAIN
#undef BATCH_LOAD_CHAINS
#undef BATCH_LOAD_ROW
#undef BATCH_MULTIPLY_A
#undef BATCH_MULTIPLY_B
#undef BATCH_NEAR
#undef BATCH_NEXT
#undef BATCH_ORDER
#undef BATCH_ORDER_PART
#undef BATCH_ORDER_STEP
#undef BATCH_PART
#undef BATCH_PASS
#undef BATCH_PASS_OF
#undef BATCH_PLACE
#undef BATCH_ROOM
#undef BATCH_ROWS
#undef BATCH_RUN
#undef BATCH_R_2
#undef BATCH_R_3
#undef BATCH_STORE_CHAIN
#undef BATCH_STORE_CHAINS
#undef BATCH_STRETCH
#undef BATCH_STRIP
#undef BATCH_TILE
#undef BATCH_T_2
#undef BATCH_T_3
#undef BATCH_T_4
#undef BATCH_VECTOR_A
#undef BATCH_VECTOR_B
#undef BATCH_NAME
