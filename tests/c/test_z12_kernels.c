/* z12 in every table that this machine can run: the bytes against the format's description, unpacked weights against
 * the originals, products bit for bit against the plain bf16 kernel of the same table.  Buffers end at an unmapped
 * page. */
#include "kernel_fixture.h"

enum kind { GAUSSIAN, ANY_BITS, EQUAL, ZERO, SPIKES, ONE_BYTE_TOO_MANY, N_KINDS };
enum { MAX_COLS = 700, MAX_ROWS = 21, MAX_ESCAPES = MAX_COLS * MAX_ROWS };

static void draw_weights(uint16_t *w, size_t ld, size_t rows, size_t cols, enum kind kind) {
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < ld; j++) {
            float sum = 0;
            for (int i = 0; i < 12; i++) sum += uniform();
            uint16_t *at = &w[r * ld + j];
            *at = (uint16_t)(bits_of(sum * 0.02f * (float)(1 + r)) >> 16);
            if (kind == ANY_BITS || j >= cols || (kind == SPIKES && next_random() % 40 == 0))
                *at = (uint16_t)(next_random() >> 20);
            if (kind == EQUAL) *at = 0x3c5a;
            if (kind == ZERO) *at = next_random() & 1 ? 0x8000 : 0;
            if (kind == ONE_BYTE_TOO_MANY) *at = (uint16_t)(j % 17 << 8 | (next_random() & 255));
        }
}

/* ---- the format, written from its description ---- */

static size_t place_of(size_t col) { /* of a column in its half */
    static const size_t first[] = {0, 8, 16, 24}, lies_at[] = {0, 16, 8, 24};
    size_t q = col % 32, i = 3;
    while (first[i] > q) i--;
    return lies_at[i] + q - first[i];
}

static uint16_t weight_at(const obm__z12 *z, size_t row, size_t col) {
    size_t block = col / 64, c = col % 64;
    for (uint32_t e = z->first_escape[row]; e < z->first_escape[row + 1]; e++)
        if (z->escapes[e].block == block && z->escapes[e].col == c) return z->escapes[e].value;
    const uint8_t *p = z->codes + (row * z->blocks + block) * 96;
    unsigned index = p[64 + place_of(c)] >> (c < 32 ? 0 : 4) & 15;
    return (uint16_t)(p[(c < 32 ? 0 : 32) + place_of(c)] | z->tables[row * 16 + index] << 8);
}

/* Weights of a row whose high byte is not among its 16 most frequent ones. */
static size_t count_escapes(const uint16_t *w, size_t cols) {
    size_t count[256] = {0}, kept = 0;
    for (size_t j = 0; j < cols; j++) count[w[j] >> 8]++;
    for (int i = 0; i < 16; i++) {
        size_t best = 0;
        for (size_t b = 0; b < 256; b++)
            if (count[b] > count[best]) best = b;
        kept += count[best];
        count[best] = 0;
    }
    return cols - kept;
}

typedef struct buffers {
    guarded codes, tables, weights, unpacked, x;
    obm__z12_escape escapes[MAX_ESCAPES];
    uint32_t first[MAX_ROWS + 1];
} buffers;

static obm__z12 encode(const obm_kernels *k, buffers *b, const uint16_t *w, size_t ld, size_t rows, size_t cols) {
    obm__z12 z = {.rows = rows, .cols = cols, .blocks = (cols + 63) / 64};
    size_t n = 0;
    z.codes = at_end(&b->codes, rows * z.blocks * 96);
    z.tables = at_end(&b->tables, rows * 16);
    z.escapes = b->escapes;
    z.first_escape = b->first;
    for (size_t r = 0; r < rows; r++) {
        b->first[r] = (uint32_t)n;
        size_t found = k->z12_encode(z.codes + r * z.blocks * 96, z.tables + r * 16, b->escapes + n, MAX_ESCAPES - n,
                                     w + r * ld, cols);
        assert_int_equal(found, count_escapes(w + r * ld, cols));
        n += found;
    }
    b->first[rows] = (uint32_t)n;
    return z;
}

/* Several vectors against the plain kernel. */
static void check_tokens(const obm_kernels *k, const obm__z12 *z, const uint16_t *w, size_t ld, size_t cols) {
    enum { TOKENS = 9 };
    static float x[TOKENS * (MAX_COLS + 1)], plain[TOKENS][MAX_ROWS], packed[TOKENS][MAX_ROWS + 1];
    static uint16_t unpacked[OBM__Z12_UNPACKED * MAX_COLS];
    size_t tokens = 1 + cols % TOKENS;
    fill(x, TOKENS * (cols + 1), PLAIN | ZEROS);
    for (size_t t = 0; t < tokens; t++) packed[t][z->rows] = 7;
    k->batch_bf16(plain[0], MAX_ROWS, w, ld, z->rows, x, cols + 1, tokens, cols);
    k->batch_z12(packed[0], MAX_ROWS + 1, z, 0, z->rows, x, cols + 1, tokens, unpacked);
    for (size_t t = 0; t < tokens; t++) {
        assert_true(packed[t][z->rows] == 7);
        for (size_t r = 0; r < z->rows; r++)
            if (bits_of(plain[t][r]) != bits_of(packed[t][r]) && !(isnan(plain[t][r]) && isnan(packed[t][r])))
                fail_msg("%s batch_z12: %zu columns, %zu vectors, row %zu: %a, expected %a", k->isa, cols, tokens, r,
                         (double)packed[t][r], (double)plain[t][r]);
    }
}

static void check(const obm_kernels *k, buffers *b, size_t rows, size_t cols, enum kind kind) {
    size_t ld = cols + 3;
    uint16_t *w = at_end(&b->weights, ((rows - 1) * ld + cols) * 2), *out = at_end(&b->unpacked, rows * cols * 2);
    float *x = at_end(&b->x, cols * 4), plain[MAX_ROWS], packed[MAX_ROWS + 1];
    draw_weights(w, ld, rows - 1, cols, kind);
    draw_weights(w + (rows - 1) * ld, cols, 1, cols, kind);
    fill(x, cols, PLAIN | ZEROS);
    obm__z12 z = encode(k, b, w, ld, rows, cols);
    k->z12_unpack(out, cols, &z, 0, rows);
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < cols; j++)
            if (weight_at(&z, r, j) != w[r * ld + j] || out[r * cols + j] != w[r * ld + j])
                fail_msg("%s z12: kind %d, %zu columns, row %zu, column %zu: %04x, unpacked %04x, expected %04x",
                         k->isa, kind, cols, r, j, weight_at(&z, r, j), out[r * cols + j], w[r * ld + j]);
    k->rows_bf16(plain, w, ld, rows, x, cols);
    packed[rows] = 7;
    k->rows_z12(packed, &z, 0, rows, x);
    assert_true(packed[rows] == 7);
    for (size_t r = 0; r < rows; r++)
        if (bits_of(plain[r]) != bits_of(packed[r]) && !(isnan(plain[r]) && isnan(packed[r])))
            fail_msg("%s rows_z12: kind %d, %zu columns, row %zu: %a, expected %a", k->isa, kind, cols, r,
                     (double)packed[r], (double)plain[r]);
    check_tokens(k, &z, w, ld, cols);
    if (rows > 3) { /* from a later row on */
        k->rows_z12(packed, &z, 3, rows - 3, x);
        for (size_t r = 3; r < rows; r++) assert_true(bits_of(packed[r - 3]) == bits_of(plain[r]) || isnan(plain[r]));
        k->z12_unpack(out, cols, &z, 3, rows - 3);
        for (size_t r = 3; r < rows; r++) assert_memory_equal(out + (r - 3) * cols, w + r * ld, cols * 2);
    }
}

static void test_all(void **unused) {
    (void)unused;
    static buffers b;
    b.codes = guarded_new(MAX_ROWS * 11 * 96);
    b.tables = guarded_new(MAX_ROWS * 16);
    b.weights = guarded_new(MAX_ROWS * (MAX_COLS + 3) * 2);
    b.unpacked = guarded_new(MAX_ROWS * MAX_COLS * 2);
    b.x = guarded_new(MAX_COLS * 4);
    EACH_TABLE(k)
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (size_t cols = 1; cols <= 300; cols++)
            check(k, &b, cols % 50 ? 1 + cols % 9 : MAX_ROWS, cols, (enum kind)kind);
        check(k, &b, MAX_ROWS, MAX_COLS, (enum kind)kind);
    }
    guarded *all[] = {&b.codes, &b.tables, &b.weights, &b.unpacked, &b.x};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) guarded_free(all[i]);
}

/* Every table writes the same bytes; without room for the escapes, they are counted all the same. */
static void test_encoding_is_exact(void **unused) {
    (void)unused;
    uint16_t w[800];
    uint8_t codes[2][13 * 96], table[2][16];
    obm__z12_escape escapes[2][800];
    draw_weights(w, 800, 1, 800, ANY_BITS);
    memset(codes, 0, sizeof codes);
    size_t n = scalar_table()->z12_encode(codes[0], table[0], escapes[0], 800, w, 800);
    assert_true(n > 300);
    EACH_TABLE(k) {
        assert_int_equal(k->z12_encode(codes[1], table[1], escapes[1], 800, w, 800), n);
        assert_memory_equal(codes[0], codes[1], sizeof codes[0]);
        assert_memory_equal(table[0], table[1], sizeof table[0]);
        for (size_t i = 0; i < n; i++) {
            assert_int_equal(escapes[0][i].block, escapes[1][i].block);
            assert_int_equal(escapes[0][i].col, escapes[1][i].col);
            assert_int_equal(escapes[0][i].value, escapes[1][i].value);
        }
        memset(escapes[1], 0, sizeof escapes[1]);
        assert_int_equal(k->z12_encode(codes[1], table[1], escapes[1], 5, w, 800), n);
        assert_int_equal(escapes[1][5].value | escapes[1][5].col, 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all),
        cmocka_unit_test(test_encoding_is_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
