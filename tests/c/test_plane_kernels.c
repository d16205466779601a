/* The plane kernels of every table that this machine can run, against plain references of this file: signs one by one,
 * quantised values one by one.  Everything but the bound against f64 is bit for bit.  Buffers end at an unmapped page.
 */
#include "kernel_fixture.h"

static const size_t row_counts[] = {1, 31, 64, 65, 130};
static const size_t column_counts[] = {64, 200, 1000, 2048, 2112, 4097, 5632};
#define N_ROWS (sizeof row_counts / sizeof *row_counts)
#define N_COLUMNS (sizeof column_counts / sizeof *column_counts)
enum { MAX_ROWS = 130, MAX_COLUMNS = 5632, MAX_PLANES = 7, TILE_BYTES = OBM__PLANE_TILE / 8 };

/* Bytes of a packed row: columns padded to 64. */
static size_t row_bytes(size_t cols) { return (cols + 63) / 64 * 8; }
static size_t blocks_of(size_t rows) { return (rows + 63) / 64; }
static size_t at_most(size_t a, size_t b) { return a < b ? a : b; }

static void random_bytes(uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)(next_random() >> 32);
}

/* ---- layout ---- */

static void check_layout(const obm_kernels *k, size_t n_rows, size_t n_bytes, size_t gap, guarded *packed,
                         guarded *blocked) {
    size_t stride = n_bytes + gap, length = (n_rows - 1) * stride + n_bytes;
    uint8_t *rows = at_end(packed, length), *block = at_end(blocked, 64 * n_bytes);
    random_bytes(rows, length);
    memset(block, 0xa5, 64 * n_bytes);
    k->plane_repack(block, rows, stride, n_rows, n_bytes);
    for (size_t c = 0; c < n_bytes; c++)
        for (size_t r = 0; r < 64; r++)
            if (block[c * 64 + r] != (r < n_rows ? rows[r * stride + c] : 0))
                fail_msg("%s plane_repack: %zu rows of %zu bytes: row %zu, byte %zu", k->isa, n_rows, n_bytes, r, c);
    length = 63 * stride + n_bytes;
    rows = at_end(packed, length);
    memset(rows, 0x5a, length);
    k->plane_unpack(rows, stride, block, n_bytes);
    for (size_t r = 0; r < 64; r++)
        for (size_t c = 0; c < stride && (r < 63 || c < n_bytes); c++)
            if (rows[r * stride + c] != (c < n_bytes ? block[c * 64 + r] : 0x5a))
                fail_msg("%s plane_unpack: rows of %zu bytes: row %zu, byte %zu", k->isa, n_bytes, r, c);
}

static void test_layout(void **unused) {
    (void)unused;
    guarded packed = guarded_new(64 * (MAX_COLUMNS / 8 + 8)), blocked = guarded_new(8 * MAX_COLUMNS);
    EACH_TABLE(k) {
        for (size_t n_rows = 1; n_rows <= 64; n_rows++) check_layout(k, n_rows, 40, 3, &packed, &blocked);
        for (size_t i = 0; i < N_COLUMNS; i++) {
            check_layout(k, 64, row_bytes(column_counts[i]), 0, &packed, &blocked);
            check_layout(k, 31, row_bytes(column_counts[i]), 8, &packed, &blocked);
        }
    }
    guarded_free(&packed);
    guarded_free(&blocked);
}

/* ---- quantised vectors ---- */

enum kind { GAUSSIAN, OUTLIERS, ALL_ZERO, EQUAL, TINY, SUBNORMAL, HUGE_VALUES, ONE_NAN, ONE_INFINITE, N_KINDS };

static float gaussian(void) { /* sum of 12 uniforms (-1, 1): variance 4 */
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum / 2;
}

static void fill_vector(float *x, size_t n, enum kind kind) {
    for (size_t i = 0; i < n; i++) {
        x[i] = gaussian();
        if (kind == OUTLIERS && i % 97 == 0) x[i] *= 30;
        if (kind == ALL_ZERO) x[i] = i % 2 ? 0.0f : -0.0f;
        if (kind == EQUAL) x[i] = i % 3 ? 0.37f : -0.37f;
        if (kind == TINY) x[i] *= 0x1p-120f;
        if (kind == SUBNORMAL) x[i] *= 0x1p-146f;
        if (kind == HUGE_VALUES) x[i] = uniform() * FLT_MAX;
    }
    if (n && kind == ONE_NAN) x[next_random() % n] = from_bits(next_random() & 1 ? 0x7fc00001 : 0xff800001);
    if (n && kind == ONE_INFINITE) x[next_random() % n] = next_random() & 1 ? INFINITY : -INFINITY;
}

/* q of every column up to a whole group, and the scale of each tile, by the definition. */
static void reference_quantise(int *q, float *scales, const float *x, size_t cols) {
    memset(q, 0, row_bytes(cols) * 8 * sizeof *q);
    for (size_t begin = 0; begin < cols; begin += 2048) {
        size_t end = at_most(begin + 2048, cols);
        float m = 0;
        bool finite = true;
        for (size_t i = begin; i < end; i++) {
            finite = finite && isfinite(x[i]);
            m = fmaxf(m, fabsf(x[i]));
        }
        scales[begin / 2048] = finite ? m / 4095.0f : NAN;
        float up = m < 0x1p-100f ? 0x1p100f : 1.0f, steps = 4095.0f / (m * up);
        for (size_t i = begin; finite && m > 0 && i < end; i++) {
            float exact_steps = x[i] * up * steps;
            q[i] = (int)nearbyint((double)exact_steps);
            assert_in_range(abs(q[i]), 0, 4095);
        }
    }
}

static void check_tables(const obm_kernels *k, size_t cols, const float *x, const int *q, const float *scales,
                         guarded *gt) {
    size_t n_bytes = row_bytes(cols), tiles = (cols + 2047) / 2048;
    uint8_t *tables = at_end(gt, n_bytes * 64);
    float got[4];
    int32_t abs_sums[MAX_COLUMNS / 64 + 1];
    memset(abs_sums, 0x77, sizeof abs_sums);
    memset(tables, 0xee, n_bytes * 64);
    k->plane_tables(tables, got, abs_sums, x, cols);
    for (size_t t = 0; t < tiles; t++)
        if (bits_of(got[t]) != bits_of(scales[t]) && !(isnan(got[t]) && isnan(scales[t])))
            fail_msg("%s plane_tables: %zu columns, scale %zu: %a, expected %a", k->isa, cols, t, (double)got[t],
                     (double)scales[t]);
    for (size_t g = 0; g < n_bytes / 8; g++) {
        int sum = 0;
        for (size_t i = 0; i < 64; i++) sum += abs(q[g * 64 + i]);
        assert_int_equal(abs_sums[g], sum);
    }
    assert_int_equal(abs_sums[n_bytes / 8], 0x77777777);
    for (size_t i = 0; i < n_bytes * 8; i += 4)
        for (int e = 0; e < 16; e++) {
            int u = 0;
            for (int b = 0; b < 4; b++)
                if (e >> b & 1 ? q[i + b] > 0 : q[i + b] < 0) u += abs(q[i + b]);
            const uint8_t *entry = tables + i / 8 * 64 + (i % 8 ? 16 : 0) + e;
            if (entry[0] != u % 128 || entry[32] != u / 128)
                fail_msg("%s plane_tables: %zu columns, column %zu, entry %d: %d + 128 * %d, expected %d", k->isa, cols,
                         i, e, entry[0], entry[32], u);
        }
}

static void test_tables(void **unused) {
    (void)unused;
    guarded gx = guarded_new(MAX_COLUMNS * 4), gt = guarded_new(MAX_COLUMNS * 8);
    int *q = malloc((MAX_COLUMNS + 64) * sizeof *q);
    float scales[4];
    for (int kind = 0; kind < N_KINDS; kind++)
        for (size_t i = 0; i < 132 + N_COLUMNS; i++) {
            size_t cols = i < 132 ? i : column_counts[i - 132];
            float *x = at_end(&gx, cols * 4);
            fill_vector(x, cols, kind);
            reference_quantise(q, scales, x, cols);
            EACH_TABLE(k) check_tables(k, cols, x, q, scales, &gt);
        }
    free(q);
    guarded_free(&gx);
    guarded_free(&gt);
}

/* What a caller does that lets every worker build some tiles: the same bytes. */
static void test_tiles_apart(void **unused) {
    (void)unused;
    enum { N = 4097, BYTES = 520 };
    static float x[N], scales[2][3];
    static uint8_t tables[2][BYTES * 64];
    static int32_t abs_sums[2][BYTES / 8];
    fill_vector(x, N, OUTLIERS);
    EACH_TABLE(k) {
        k->plane_tables(tables[0], scales[0], abs_sums[0], x, N);
        for (size_t t = 3; t-- > 0;)
            k->plane_tables(tables[1] + t * TILE_BYTES * 64, scales[1] + t, abs_sums[1] + t * 32, x + t * 2048,
                            at_most(N - t * 2048, 2048));
        assert_memory_equal(tables[0], tables[1], sizeof tables[0]);
        assert_memory_equal(scales[0], scales[1], sizeof scales[0]);
        assert_memory_equal(abs_sums[0], abs_sums[1], sizeof abs_sums[0]);
    }
}

/* ---- products ---- */

typedef struct product {
    size_t rows, cols, n_bytes;
    uint8_t *packed[MAX_PLANES], *blocks[MAX_PLANES]; /* (rows, n_bytes), (blocks, n_bytes, 64) */
    float *x, scales[4];
    int *q;
    uint8_t *tables;
    int32_t *abs_sums, *expected; /* expected: (tiles, rows) */
} product;

static int sign_at(const product *p, int n, size_t r, size_t j) {
    int sign = 1;
    for (int i = 0; i < n; i++) sign *= p->packed[i][r * p->n_bytes + j / 8] >> j % 8 & 1 ? 1 : -1;
    return sign;
}

static void product_new(product *p, size_t rows, size_t cols, enum kind kind) {
    *p = (product){.rows = rows, .cols = cols, .n_bytes = row_bytes(cols)};
    for (int i = 0; i < MAX_PLANES; i++) {
        p->packed[i] = malloc(rows * p->n_bytes);
        p->blocks[i] = malloc(blocks_of(rows) * 64 * p->n_bytes);
        random_bytes(p->packed[i], rows * p->n_bytes);
        for (size_t b = 0; b < blocks_of(rows); b++)
            scalar_table()->plane_repack(p->blocks[i] + b * 64 * p->n_bytes, p->packed[i] + b * 64 * p->n_bytes,
                                         p->n_bytes, at_most(rows - b * 64, 64), p->n_bytes);
    }
    p->x = malloc(cols * 4);
    p->q = malloc(p->n_bytes * 8 * sizeof *p->q);
    p->tables = malloc(p->n_bytes * 64);
    p->abs_sums = malloc(p->n_bytes / 8 * 4);
    p->expected = malloc((cols + 2047) / 2048 * rows * 4);
    fill_vector(p->x, cols, kind);
    reference_quantise(p->q, p->scales, p->x, cols);
    float scales[4];
    scalar_table()->plane_tables(p->tables, scales, p->abs_sums, p->x, cols);
}

static void product_free(product *p) {
    for (int i = 0; i < MAX_PLANES; i++) free(p->packed[i]), free(p->blocks[i]);
    free(p->x);
    free(p->q);
    free(p->tables);
    free(p->abs_sums);
    free(p->expected);
}

static void product_expect(product *p, int n) {
    for (size_t t = 0; t * 2048 < p->cols; t++)
        for (size_t r = 0; r < p->rows; r++) {
            int32_t sum = 0;
            for (size_t j = t * 2048; j < at_most(p->cols, t * 2048 + 2048); j++) sum += sign_at(p, n, r, j) * p->q[j];
            p->expected[t * p->rows + r] = sum;
        }
}

/* Byte columns begin .. end of block b, whole or cut at group; the cuts must add up. */
static void range_sums(const obm_kernels *k, const product *p, int n, size_t b, size_t begin, size_t end, size_t step,
                       const void *ahead, int32_t *sums) {
    memset(sums, 0, 64 * sizeof *sums);
    for (size_t c = begin; c < end; c += step) {
        const uint8_t *planes[MAX_PLANES];
        int32_t part[64];
        for (int i = 0; i < n; i++) planes[i] = p->blocks[i] + (b * p->n_bytes + c) * 64;
        k->plane_sums(part, planes, n, at_most(step, end - c), p->tables + c * 64, p->abs_sums + c / 8, ahead);
        for (size_t r = 0; r < 64; r++) sums[r] += part[r];
    }
}

/* The bound that kernels.h states, with the rounding of y: scale * sum and the additions of tiles once each. */
static void check_bound(const product *p, int n, size_t r, float y) {
    double exact = 0, magnitude = 0, bound = 0;
    for (size_t t = 0; t * 2048 < p->cols; t++) {
        double m = 0;
        size_t end = at_most(p->cols, t * 2048 + 2048);
        for (size_t j = t * 2048; j < end; j++) {
            exact += sign_at(p, n, r, j) * (double)p->x[j];
            magnitude += fabs((double)p->x[j]);
            m = fmax(m, fabs((double)p->x[j]));
        }
        bound += (double)(end - t * 2048) * (m / 8170 + 0x1p-138);
    }
    bound += 4 * 0x1p-23 * magnitude;
    if (!(fabs((double)y - exact) <= bound)) fail_msg("row %zu: %g, expected %g within %g", r, (double)y, exact, bound);
}

static void check_sums(const obm_kernels *k, const product *p, int n, size_t step, bool bound, const void *ahead) {
    float y[64];
    for (size_t b = 0; b < blocks_of(p->rows); b++) {
        size_t rows = at_most(p->rows - b * 64, 64);
        for (size_t t = 0; t * 2048 < p->cols; t++) {
            int32_t sums[64];
            range_sums(k, p, n, b, t * TILE_BYTES, at_most(p->n_bytes, (t + 1) * TILE_BYTES), step, ahead, sums);
            for (size_t r = 0; r < rows; r++) {
                if (sums[r] != p->expected[t * p->rows + b * 64 + r])
                    fail_msg("%s plane_sums: %d planes, %zux%zu, tile %zu, row %zu: %d, expected %d", k->isa, n,
                             p->rows, p->cols, t, b * 64 + r, sums[r], p->expected[t * p->rows + b * 64 + r]);
                float part = p->scales[t] * (float)sums[r];
                y[r] = t ? y[r] + part : part;
            }
        }
        for (size_t r = 0; bound && r < rows; r += 7) check_bound(p, n, b * 64 + r, y[r]);
    }
}

static void test_sums(void **unused) {
    (void)unused;
    guarded nothing = guarded_new(1);
    for (size_t i = 0; i < N_ROWS; i++)
        for (size_t j = 0; j < N_COLUMNS; j++) {
            product p;
            product_new(&p, row_counts[i], column_counts[j], (i + j) % 2 ? OUTLIERS : GAUSSIAN);
            for (int n = 1; n <= 7; n += 2) {
                product_expect(&p, n);
                EACH_TABLE(k) {
                    check_sums(k, &p, n, TILE_BYTES, true, NULL);
                    check_sums(k, &p, n, 24, false, nothing.end); /* ahead: not there */
                }
            }
            product_free(&p);
        }
    guarded_free(&nothing);
}

/* Vectors of every kind; NaN and Inf must come out of the product.  (Sums of huge values overflow: no bound there.) */
static void test_kinds(void **unused) {
    (void)unused;
    for (int kind = 0; kind < N_KINDS; kind++) {
        product p;
        product_new(&p, 70, 2112, kind);
        product_expect(&p, 1);
        EACH_TABLE(k) check_sums(k, &p, 1, TILE_BYTES, kind < HUGE_VALUES, NULL);
        bool any = isnan(p.scales[0] * (float)p.expected[0]) || isnan(p.scales[1] * (float)p.expected[70]);
        assert_int_equal(any, kind >= ONE_NAN);
        product_free(&p);
    }
}

/* The largest sums there are: every |q| = 4095 with all signs for it or against it, and tables whose every limb is 127.
 */
static void test_extremes(void **unused) {
    (void)unused;
    enum { BLOCK = TILE_BYTES * 64 };
    static uint8_t with[BLOCK], tables[BLOCK];
    static float x[2048];
    float scale;
    int32_t abs_sums[32], sums[64], none[32] = {0};
    for (size_t i = 0; i < 2048; i++) x[i] = i % 5 < 2 ? -3.5f : 3.5f;
    memset(with, 0, sizeof with);
    for (size_t i = 0; i < 2048; i++)
        for (size_t r = 0; r < 64; r++) with[i / 8 * 64 + r] |= (uint8_t)(((x[i] > 0) ^ (r & 1)) << i % 8);
    const uint8_t *plane = with;
    EACH_TABLE(k) {
        k->plane_tables(tables, &scale, abs_sums, x, 2048);
        k->plane_sums(sums, &plane, 1, TILE_BYTES, tables, abs_sums, NULL);
        for (int r = 0; r < 64; r++) assert_int_equal(sums[r], r & 1 ? -4095 * 2048 : 4095 * 2048);
        memset(tables, 127, sizeof tables);
        k->plane_sums(sums, &plane, 1, TILE_BYTES, tables, none, NULL);
        for (int r = 0; r < 64; r++) assert_int_equal(sums[r], 2 * TILE_BYTES * 2 * (127 + 127 * 128));
    }
}

/* ---- adding to dense rows ---- */

static void check_add(const obm_kernels *k, int n, size_t cols, guarded *gy, guarded *gb) {
    size_t bytes = (cols + 7) / 8;
    float *y = at_end(gy, cols * 4), *before = malloc(cols * 4 + 1), c = draw(PLAIN | ZEROS);
    const uint8_t *bits[MAX_PLANES];
    random_bytes(at_end(gb, bytes * (size_t)n), bytes * (size_t)n);
    for (int i = 0; i < n; i++) bits[i] = gb->end - bytes * (size_t)(i + 1);
    fill(y, cols, PLAIN | ZEROS | DENORMALS | INFINITE);
    memcpy(before, y, cols * 4);
    k->plane_add(y, bits, n, c, cols);
    for (size_t j = 0; j < cols; j++) {
        int sign = 1;
        for (int i = 0; i < n; i++) sign *= bits[i][j / 8] >> j % 8 & 1 ? 1 : -1;
        float expected = before[j] + (sign > 0 ? c : -c);
        if (bits_of(y[j]) != bits_of(expected))
            fail_msg("%s plane_add: %d rows, %zu columns, column %zu: %a, expected %a", k->isa, n, cols, j,
                     (double)y[j], (double)expected);
    }
    free(before);
}

static void test_add(void **unused) {
    (void)unused;
    guarded y = guarded_new(MAX_COLUMNS * 4), bits = guarded_new(MAX_PLANES * MAX_COLUMNS / 8);
    EACH_TABLE(k) {
        for (int n = 1; n <= 7; n += 2) {
            for (size_t cols = 0; cols <= 200; cols++) check_add(k, n, cols, &y, &bits);
            for (size_t i = 0; i < N_COLUMNS; i++) check_add(k, n, column_counts[i], &y, &bits);
        }
    }
    guarded_free(&y);
    guarded_free(&bits);
}

/* Inputs that lie one byte off, as a mapped pack may have them. */
static void test_unaligned_inputs(void **unused) {
    (void)unused;
    enum { N = 200, BYTES = 32 };
    static float x[N], scale[2];
    static uint8_t raw_x[N * 4 + 1], tables[2][BYTES * 64 + 1], rows[64 * BYTES + 1], block[2][BYTES * 64 + 1];
    int32_t abs_sums[BYTES / 8], sums[2][64];
    fill_vector(x, N, GAUSSIAN);
    memcpy(raw_x + 1, x, sizeof x);
    random_bytes(rows, sizeof rows);
    EACH_TABLE(k) {
        k->plane_tables(tables[0], scale, abs_sums, x, N);
        k->plane_tables(tables[1] + 1, scale + 1, abs_sums, (const void *)(raw_x + 1), N);
        assert_memory_equal(tables[0], tables[1] + 1, BYTES * 64);
        k->plane_repack(block[0], rows + 1, BYTES, 64, BYTES);
        k->plane_repack(block[1] + 1, rows + 1, BYTES, 64, BYTES);
        assert_memory_equal(block[0], block[1] + 1, BYTES * 64);
        for (int i = 0; i < 2; i++) {
            const uint8_t *plane = block[i] + i;
            k->plane_sums(sums[i], &plane, 1, BYTES, tables[i] + i, abs_sums, NULL);
        }
        assert_memory_equal(sums[0], sums[1], sizeof sums[0]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout),      cmocka_unit_test(test_tables),
        cmocka_unit_test(test_tiles_apart), cmocka_unit_test(test_sums),
        cmocka_unit_test(test_kinds),       cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_add),         cmocka_unit_test(test_unaligned_inputs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
