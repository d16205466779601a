/*
 * z12 (kernels.h).  A half of a block, 32 columns of one row, is unpacked in registers to what the bf16 kernel loads,
 * and then multiplied as rows.h does it: the same products in the same order.  Blocks with escapes and the last columns
 * go through memory.
 *
 *   W, EVEN_W(w) ODD_W(w)            2 * VL bf16; the even and the odd ones, widened;   STORE_W(p, w)
 *   Z12_STEPS                        of them in a half;   z12_half(w, p, table, half) unpacks one of a row's 96 bytes
 * at p
 */
#define Z12_STEP ((size_t)2 * VL)
/* A group's block is 384 bytes, its table 64. */
#define Z12_GROUP ((size_t)OBM__Z12_ROWS * OBM__Z12_BYTES)
/* One packed stream is more than the hardware asks for ahead: 1.5 KiB was the best of 0.75 to 4 on Zen 3. */
#define Z12_AHEAD (4 * Z12_GROUP)
/* Unpacking alone is faster than memory, and callers multiply in between. */
#define Z12_UNPACK_AHEAD (16 * Z12_GROUP)

FN static inline void NAME(z12_row)(uint16_t *out, const uint8_t *p, const uint8_t *table) {
    for (int half = 0; half < 2; half++) {
        W w[Z12_STEPS];
        z12_half(w, p, table, half);
        for (size_t i = 0; i < Z12_STEPS; i++) STORE_W(out + (size_t)half * 32 + i * Z12_STEP, w[i]);
    }
}

/* The four rows of a block with the escapes from *e on, (4, 64). */
FN static inline void NAME(z12_block)(uint16_t *out, const uint8_t *p, const uint8_t *table, size_t block,
                                      const obm__z12_escape **e, const obm__z12_escape *end) {
    for (size_t r = 0; r < OBM__Z12_ROWS; r++)
        NAME(z12_row)(out + r * OBM__Z12_COLUMNS, p + r * OBM__Z12_BYTES, table + r * OBM__Z12_TABLE);
    for (; *e < end && (*e)->block == block; ++*e) out[(*e)->row * OBM__Z12_COLUMNS + (*e)->col] = (*e)->value;
}

/* A block with escapes, or the last columns or rows: through memory. */
FN static void NAME(z12_unpack_part)(uint16_t *out, size_t ld, const uint8_t *p, const uint8_t *table, size_t block,
                                     size_t rows, size_t n, const obm__z12_escape **e, const obm__z12_escape *end) {
    uint16_t part[OBM__Z12_ROWS * OBM__Z12_COLUMNS];
    NAME(z12_block)(part, p, table, block, e, end);
    for (size_t i = 0; i < rows; i++) memcpy(out + i * ld, part + i * OBM__Z12_COLUMNS, n * sizeof *out);
}

FN static void NAME(z12_unpack)(uint16_t *out, size_t ld, const obm__z12 *w, size_t row, size_t rows) {
    for (size_t r = 0; r < rows; r += OBM__Z12_ROWS) {
        size_t group = (row + r) / OBM__Z12_ROWS, n_rows = rows - r < OBM__Z12_ROWS ? rows - r : OBM__Z12_ROWS;
        const uint8_t *p = w->codes + group * w->blocks * Z12_GROUP, *table = w->tables + group * 4 * OBM__Z12_TABLE;
        const obm__z12_escape *e = w->escapes + w->first_escape[group], *end = w->escapes + w->first_escape[group + 1];
        for (size_t block = 0; block < w->blocks; block++, p += Z12_GROUP) {
            size_t first = block * OBM__Z12_COLUMNS, left = w->cols - first, n = left < 64 ? left : 64;
            uint16_t *to = out + r * ld + first;
            for (size_t line = 0; line < Z12_GROUP; line += 64) __builtin_prefetch(p + Z12_UNPACK_AHEAD + line);
            if (n < OBM__Z12_COLUMNS || n_rows < OBM__Z12_ROWS || (e < end && e->block == block))
                NAME(z12_unpack_part)(to, ld, p, table, block, n_rows, n, &e, end);
            else
                for (size_t i = 0; i < OBM__Z12_ROWS; i++)
                    NAME(z12_row)(to + i * ld, p + i * OBM__Z12_BYTES, table + i * OBM__Z12_TABLE);
        }
    }
}

#define Z12_MULTIPLY(r, w, u, v)        \
    do {                                \
        a##r = FMA(EVEN_W(w), u, a##r); \
        b##r = FMA(ODD_W(w), v, b##r);  \
    } while (0)
#define Z12_EACH_ROW(X) X(0) X(1) X(2) X(3)
#define Z12_HALF_ROW(r)                                                        \
    {                                                                          \
        W w[Z12_STEPS];                                                        \
        z12_half(w, p + r * OBM__Z12_BYTES, table + r * OBM__Z12_TABLE, half); \
        Z12_MULTIPLY(r, w[0], x0, x1);                                         \
        if (Z12_STEPS == 2) Z12_MULTIPLY(r, w[Z12_STEPS - 1], x2, x3);         \
    }
#define Z12_PART_ROW(r) Z12_MULTIPLY(r, LOAD_W(part + r * OBM__Z12_COLUMNS + j), x0, x1);
#define Z12_HALF(h)                                                                 \
    {                                                                               \
        const int half = h;                                                         \
        SPLIT_EVEN_ODD(xs + half * 32, x0, x1);                                     \
        if (Z12_STEPS == 2) SPLIT_EVEN_ODD(xs + half * 32 + 32 - Z12_STEP, x2, x3); \
        Z12_EACH_ROW(Z12_HALF_ROW)                                                  \
    }

FN static void NAME(z12_four)(float *y, const obm__z12 *m, size_t group, const float *x) {
    const uint8_t *p = m->codes + group * m->blocks * Z12_GROUP, *table = m->tables + group * 4 * OBM__Z12_TABLE;
    const obm__z12_escape *e = m->escapes + m->first_escape[group], *end = m->escapes + m->first_escape[group + 1];
    V a0 = SET1(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0, x0, x1, x2 = a0, x3 = a0;
    for (size_t block = 0; block < m->blocks; block++, p += Z12_GROUP) {
        const float *xs = x + block * OBM__Z12_COLUMNS;
        size_t left = m->cols - block * OBM__Z12_COLUMNS;
        if (left >= OBM__Z12_COLUMNS && (e == end || e->block != block)) {
            for (size_t line = 0; line < Z12_GROUP; line += 64) __builtin_prefetch(p + Z12_AHEAD + line);
            Z12_HALF(0)
            Z12_HALF(1)
            continue;
        }
        uint16_t part[OBM__Z12_ROWS * OBM__Z12_COLUMNS];
        float x_end[OBM__Z12_COLUMNS] = {0};
        size_t n = left < OBM__Z12_COLUMNS ? left : OBM__Z12_COLUMNS;
        NAME(z12_block)(part, p, table, block, &e, end);
        memcpy(x_end, xs, n * sizeof *x_end);
        for (size_t r = 0; r < OBM__Z12_ROWS; r++)
            memset(part + r * OBM__Z12_COLUMNS + n, 0, (OBM__Z12_COLUMNS - n) * sizeof *part);
        for (size_t j = 0; j < n; j += Z12_STEP) {
            SPLIT_EVEN_ODD(x_end + j, x0, x1);
            Z12_EACH_ROW(Z12_PART_ROW)
        }
    }
    y[0] = HSUM(ADD(a0, b0));
    y[1] = HSUM(ADD(a1, b1));
    y[2] = HSUM(ADD(a2, b2));
    y[3] = HSUM(ADD(a3, b3));
    (void)x2;
    (void)x3;
}

FN static void NAME(rows_z12)(float *y, const obm__z12 *w, size_t row, size_t rows, const float *x) {
    for (size_t r = 0; r < rows; r += OBM__Z12_ROWS) {
        float four[OBM__Z12_ROWS];
        NAME(z12_four)(four, w, (row + r) / OBM__Z12_ROWS, x);
        memcpy(y + r, four, (rows - r < OBM__Z12_ROWS ? rows - r : OBM__Z12_ROWS) * sizeof *y);
    }
}

/* Unpacked, multiplied as bf16, and meanwhile the next codes are asked for: they are fewer than the rows that
 * batch_block takes to come next, so it reaches a little into those behind them. */
FN static void NAME(batch_z12)(float *y, size_t ldy, const obm__z12 *w, size_t row, size_t rows, const float *x,
                               size_t ldx, size_t tokens, uint16_t *unpacked) {
    if (tokens == 1) NAME(rows_z12)(y, w, row, rows, x);
    for (size_t r = 0, count; tokens > 1 && r < rows; r += count) {
        size_t next = (row + r + OBM__Z12_UNPACKED) / OBM__Z12_ROWS * w->blocks * Z12_GROUP;
        count = rows - r < OBM__Z12_UNPACKED ? rows - r : OBM__Z12_UNPACKED;
        NAME(z12_unpack)(unpacked, w->cols, w, row + r, count);
        NAME(batch_bf16_block)
        (y + r, ldy, unpacked, w->cols, count, x, ldx, tokens, w->cols, (const char *)((uintptr_t)w->codes + next));
    }
}
