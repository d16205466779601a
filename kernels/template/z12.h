/*
 * z12 (kernels.h).  A part of a block, all of its columns or half of them, is unpacked in registers to two vectors of
 * what the bf16 kernel loads, and then multiplied as rows.h does it: the same products in the same order.  Blocks with
 * escapes and the last columns go through memory.
 *
 *   W, EVEN_W(w) ODD_W(w)            2 * VL bf16; the even and the odd ones, widened;   STORE_W(p, w)
 *   Z12_PARTS                        of a block, 1 or 2;   z12_part(w, p, table, part) unpacks one of a row's 96 bytes
 *                                    at p
 *   Z12_NEIGHBOURS                   1: the four rows that share x are neighbours; 0: a quarter of the rows apart
 */
#define Z12_STEP ((size_t)2 * VL)
/* A row's blocks are one stream, and the next row's go on with it: what comes is asked for this far ahead.  Unpacking
 * alone is faster than memory, and callers multiply in between. */
#define Z12_UNPACK_AHEAD ((size_t)64 * OBM__Z12_BYTES)
/*
 * Unpacking leaves fewer loads under way at a time than plain rows have, so what comes is asked for.
 *
 * Four rows a quarter apart: each 512 bytes ahead.  1.04 times as fast as without on Zen 3; twice as far ahead is slower
 * than not at all.
 *
 * Four neighbours are one stretch of memory: while they are multiplied the next four are asked for line after line, and
 * at least 8 KiB ahead.  With two threads on Zen 5 1.4 times the speed of plain rows where four streams reach 1.2 at
 * their best distance, 2 KiB; less than the four rows ahead, 1.1.
 */
#define Z12_ROWS_AHEAD ((size_t)(Z12_NEIGHBOURS ? 8192 : 512))

FN static inline void NAME(z12_row)(uint16_t *out, const uint8_t *p, const uint8_t *table) {
    for (int part = 0; part < Z12_PARTS; part++, out += 2 * Z12_STEP) {
        W w[2];
        z12_part(w, p, table, part);
        STORE_W(out, w[0]);
        STORE_W(out + Z12_STEP, w[1]);
    }
}

/* A block of a row with its escapes, of which *e is the first. */
FN static inline void NAME(z12_block)(uint16_t *out, const uint8_t *p, const uint8_t *table, size_t block,
                                      const obm__z12_escape **e, const obm__z12_escape *end) {
    NAME(z12_row)(out, p, table);
    for (; *e < end && (*e)->block == block; ++*e) out[(*e)->col] = (*e)->value;
}

FN static void NAME(z12_unpack)(uint16_t *out, size_t ld, const obm__z12 *w, size_t row, size_t rows) {
    for (size_t r = row; r < row + rows; r++, out += ld) {
        const uint8_t *p = w->codes + r * w->blocks * OBM__Z12_BYTES, *table = w->tables + r * OBM__Z12_TABLE;
        const obm__z12_escape *e = w->escapes + w->first_escape[r], *end = w->escapes + w->first_escape[r + 1];
        for (size_t block = 0; block < w->blocks; block++, p += OBM__Z12_BYTES) {
            size_t first = block * OBM__Z12_COLUMNS, left = w->cols - first;
            uint16_t part[OBM__Z12_COLUMNS];
            __builtin_prefetch((const void *)((uintptr_t)p + Z12_UNPACK_AHEAD));
            __builtin_prefetch((const void *)((uintptr_t)p + Z12_UNPACK_AHEAD + 64));
            if (left >= OBM__Z12_COLUMNS) {
                NAME(z12_block)(out + first, p, table, block, &e, end);
                continue;
            }
            NAME(z12_block)(part, p, table, block, &e, end);
            memcpy(out + first, part, left * sizeof *out);
        }
    }
}

#define Z12_MULTIPLY(r, w, u, v)        \
    do {                                \
        a##r = FMA(EVEN_W(w), u, a##r); \
        b##r = FMA(ODD_W(w), v, b##r);  \
    } while (0)
#define Z12_EACH_ROW(X) X(0) X(1) X(2) X(3)
#define Z12_TWO_OF(r)                                        \
    {                                                        \
        W w[2];                                              \
        z12_part(w, p + r * ld, table + r * ld_table, part); \
        Z12_MULTIPLY(r, w[0], x0, x1);                       \
        Z12_MULTIPLY(r, w[1], x2, x3);                       \
    }
#define Z12_ONE_OF(r) Z12_MULTIPLY(r, LOAD_W(part[r] + j), x0, x1);
#define Z12_X(p, a, b)                   \
    if (ordered)                         \
        a = LOAD(p), b = LOAD((p) + VL); \
    else                                 \
        SPLIT_EVEN_ODD(p, a, b);
#define Z12_PART(i)                                  \
    {                                                \
        const int part = i;                          \
        Z12_X(x + part * 2 * Z12_STEP, x0, x1)       \
        Z12_X(x + (part * 2 + 1) * Z12_STEP, x2, x3) \
        Z12_EACH_ROW(Z12_TWO_OF)                     \
    }

/* Of four rows ld apart, the codes of one block each.  They need not exist. */
FN static inline void NAME(z12_ask)(uintptr_t p, size_t ld) {
    for (size_t i = 0; i < 4 * OBM__Z12_BYTES && Z12_NEIGHBOURS; i += 64) __builtin_prefetch((const void *)(p + i));
    for (size_t r = 0; r < 4 && !Z12_NEIGHBOURS; r++) {
        __builtin_prefetch((const void *)(p + r * ld));
        __builtin_prefetch((const void *)(p + r * ld + 64));
    }
}

/* Rows row, row + apart, ...; x ordered as in rows.h, or not. */
FN static inline __attribute__((always_inline)) void NAME(z12_four)(float *four, const obm__z12 *m, size_t row,
                                                                    size_t apart, const float *x, const int ordered) {
    size_t ld = apart * m->blocks * OBM__Z12_BYTES, ld_table = apart * OBM__Z12_TABLE, whole = m->cols / 64;
    const uint8_t *p = m->codes + row * m->blocks * OBM__Z12_BYTES, *table = m->tables + row * OBM__Z12_TABLE;
    const obm__z12_escape *e[4], *end[4];
    V a0 = SET1(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0, x0, x1, x2, x3;
    uintptr_t ahead = (uintptr_t)p + (Z12_NEIGHBOURS && 4 * ld > Z12_ROWS_AHEAD ? 4 * ld : Z12_ROWS_AHEAD);
    for (size_t r = 0; r < 4; r++) {
        e[r] = m->escapes + m->first_escape[row + r * apart];
        end[r] = m->escapes + m->first_escape[row + r * apart + 1];
    }
    for (size_t block = 0; block < m->blocks; block++, p += OBM__Z12_BYTES, x += OBM__Z12_COLUMNS) {
        size_t stop = whole;
        for (size_t r = 0; r < 4; r++)
            if (e[r] < end[r] && e[r]->block < stop) stop = e[r]->block;
        for (; block < stop; block++, p += OBM__Z12_BYTES, x += OBM__Z12_COLUMNS) {
            NAME(z12_ask)(ahead + block * (Z12_NEIGHBOURS ? 4 : 1) * OBM__Z12_BYTES, ld);
            Z12_PART(0)
#if Z12_PARTS == 2
            Z12_PART(1)
#endif
        }
        if (block == m->blocks) break;
        uint16_t part[4][OBM__Z12_COLUMNS];
        float x_end[OBM__Z12_COLUMNS] = {0};
        size_t left = m->cols - block * OBM__Z12_COLUMNS, n = left < OBM__Z12_COLUMNS ? left : OBM__Z12_COLUMNS;
        for (size_t r = 0; r < 4; r++) {
            NAME(z12_block)(part[r], p + r * ld, table + r * ld_table, block, &e[r], end[r]);
            memset(part[r] + n, 0, (OBM__Z12_COLUMNS - n) * sizeof *part[r]);
        }
        memcpy(x_end, x, (ordered ? (n + Z12_STEP - 1) / Z12_STEP * Z12_STEP : n) * sizeof *x_end);
        for (size_t j = 0; j < n; j += Z12_STEP) {
            Z12_X(x_end + j, x0, x1)
            Z12_EACH_ROW(Z12_ONE_OF)
        }
    }
    four[0] = HSUM(ADD(a0, b0));
    four[1] = HSUM(ADD(a1, b1));
    four[2] = HSUM(ADD(a2, b2));
    four[3] = HSUM(ADD(a3, b3));
}

FN static inline __attribute__((always_inline)) void NAME(z12_rows)(float *y, const obm__z12 *w, size_t row,
                                                                    size_t rows, const float *x, const int ordered) {
    size_t quarter = rows / 4;
    float four[4];
    for (size_t r = 0; r < quarter; r++) {
        size_t first = Z12_NEIGHBOURS ? 4 * r : r, apart = Z12_NEIGHBOURS ? 1 : quarter;
        NAME(z12_four)(four, w, row + first, apart, x, ordered);
        for (size_t i = 0; i < 4; i++) y[first + i * apart] = four[i];
    }
    for (size_t r = 4 * quarter; r < rows; r++) {
        NAME(z12_four)(four, w, row + r, 0, x, ordered);
        y[r] = four[0];
    }
}

FN static void NAME(z12_ordered)(float *y, const obm__z12 *w, size_t row, size_t rows, const float *x) {
    _Alignas(64) float ordered[ROWS_ORDERED];
    NAME(rows_bf16_order)(ordered, x, w->cols);
    NAME(z12_rows)(y, w, row, rows, ordered, 1);
}

FN static void NAME(rows_z12)(float *y, const obm__z12 *w, size_t row, size_t rows, const float *x) {
    if (rows >= ROWS_WORTH_ORDER && w->cols <= ROWS_ORDERED)
        NAME(z12_ordered)(y, w, row, rows, x);
    else
        NAME(z12_rows)(y, w, row, rows, x, 0);
}

/* Unpacked, multiplied as bf16, and meanwhile the next codes are asked for: they are fewer than the rows that
 * batch_bf16_block takes to come next, so it reaches a little into those behind them. */
FN static void NAME(z12_batch)(float *y, size_t ldy, const obm__z12 *w, size_t row, size_t rows, const float *x,
                               size_t ldx, size_t tokens, uint16_t *unpacked) {
    _Alignas(64) float room[OBM__BATCH_ROOM];
    if (NAME(batch_bf16_fits)(tokens, w->cols)) NAME(batch_bf16_order)(room, x, ldx, tokens, w->cols);
    for (size_t r = 0, count; r < rows; r += count) {
        size_t apart = w->blocks * OBM__Z12_BYTES, next = (row + r + OBM__Z12_UNPACKED) * apart;
        NAME(batch_ask) ask = {(uintptr_t)w->codes + next, 0, apart, Z12_STEP * OBM__Z12_BYTES / 64, 0};
        count = rows - r < OBM__Z12_UNPACKED ? rows - r : OBM__Z12_UNPACKED;
        NAME(z12_unpack)(unpacked, w->cols, w, row + r, count);
        NAME(batch_bf16_block)(y + r, ldy, unpacked, w->cols, count, x, ldx, tokens, w->cols, room, ask);
    }
}

FN static void NAME(batch_z12)(float *y, size_t ldy, const obm__z12 *w, size_t row, size_t rows, const float *x,
                               size_t ldx, size_t tokens, uint16_t *unpacked) {
    if (tokens > 1) NAME(z12_batch)(y, ldy, w, row, rows, x, ldx, tokens, unpacked);
    if (tokens == 1) NAME(rows_z12)(y, w, row, rows, x);
}
