/* Every kernel table that this machine can run, against the scalar one and against references of this file.  Buffers
 * end at an unmapped page, so that reading or writing one element too far is a crash. */
#include "kernel_fixture.h"

/* Bit-equal, where any NaN equals any other: arithmetic may return either operand's. */
static void assert_same(const float *a, const float *b, size_t n, const char *isa, const char *op) {
    for (size_t i = 0; i < n; i++)
        if (bits_of(a[i]) != bits_of(b[i]) && !(isnan(a[i]) && isnan(b[i])))
            fail_msg("%s %s: n %zu, element %zu: %a, expected %a", isa, op, n, i, (double)a[i], (double)b[i]);
}

/* 0..300 and a few long ones. */
static const size_t long_lengths[] = {1023, 1024, 4095, 4096, 5632, 11009};
#define N_LENGTHS (301 + sizeof long_lengths / sizeof *long_lengths)
#define MAX_LENGTH 11009
static size_t length_at(size_t i) { return i <= 300 ? i : long_lengths[i - 301]; }

/* ---- tables ---- */

static void test_tables(void **unused) {
    (void)unused;
    assert_string_equal(obm_kernels_list()[0]->isa, "scalar");
    assert_null(obm_kernels_find("sse9"));
    EACH_TABLE(k) {
        assert_ptr_equal(obm_kernels_find(k->isa), k);
        const void *const *entry = (const void *const *)(const void *)k;
        for (size_t i = 0; i < sizeof *k / sizeof *entry; i++) assert_non_null(entry[i]);
    }
    static const char *const known[] = {"scalar", "avx2", "avx512", "amx", "neon"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const obm_kernels *k = obm_kernels_find(known[i]);
        print_message("kernels: %s %s\n", known[i], !k ? "NOT RUN on this machine" : table_wanted(k) ? "tested" : "not asked for");
    }
}

/* ---- conversions, against references of their own ---- */

/* Value of a small float with e exponent bits and m mantissa bits, by the definition. */
static double small_float(uint16_t h, int e, int m) {
    int exponent = h >> m & ((1 << e) - 1), bias = (1 << (e - 1)) - 1, mantissa = h & ((1 << m) - 1);
    double sign = h & 0x8000 ? -1 : 1;
    if (exponent == (1 << e) - 1) return mantissa ? NAN : sign * INFINITY;
    if (!exponent) return sign * ldexp(mantissa, 1 - bias - m);
    return sign * ldexp(mantissa + (1 << m), exponent - bias - m);
}

static void check_widen(const char *isa, void (*op)(float *, const uint16_t *, size_t), int e, int m) {
    uint16_t *in = malloc(65536 * 2);
    float *out = malloc(65536 * 4);
    for (int i = 0; i < 65536; i++) in[i] = (uint16_t)i;
    op(out, in, 65536);
    for (int i = 0; i < 65536; i++) {
        double expected = small_float((uint16_t)i, e, m);
        if (isnan(expected) ? !isnan(out[i]) : bits_of(out[i]) != bits_of((float)expected))
            fail_msg("%s: %#x widens to %a, expected %a", isa, (unsigned)i, (double)out[i], expected);
        /* the payload moves to the top; f16 also becomes quiet */
        if (isnan(expected))
            assert_int_equal(bits_of(out[i]), ((uint32_t)i & 0x8000) << 16 | 0x7f800000 | (e == 5 ? 0x400000 : 0) |
                                                  ((uint32_t)i & ((1u << m) - 1)) << (23 - m));
    }
    free(in);
    free(out);
}

static void test_widen_all(void **unused) {
    (void)unused;
    EACH_TABLE(k) {
        check_widen(k->isa, k->f16_to_f32, 5, 10);
        check_widen(k->isa, k->bf16_to_f32, 8, 7);
    }
}

/* Nearest even among the small floats by bisection over the (ordered) magnitudes; distances in f64 are exact. */
static uint16_t reference_narrow(float x, int e, int m) {
    uint16_t sign = bits_of(x) >> 31 ? 0x8000 : 0, infinity = (uint16_t)(((1 << e) - 1) << m);
    double a = fabs((double)x), largest = small_float((uint16_t)(infinity - 1), e, m);
    if (isnan(x)) return (uint16_t)(sign | infinity | 1 << (m - 1) | (bits_of(x) >> (23 - m) & ((1u << (m - 1)) - 1)));
    double ulp = ldexp(1, (1 << (e - 1)) - 1 - m);
    if (a >= largest + ulp / 2) return (uint16_t)(sign | infinity);
    uint16_t low = 0, high = (uint16_t)(infinity - 1); /* value(low) <= a, the answer is low or low + 1 */
    while (low < high) {
        uint16_t middle = (uint16_t)((low + high + 1) / 2);
        if (small_float(middle, e, m) <= a)
            low = middle;
        else
            high = (uint16_t)(middle - 1);
    }
    if (low == infinity - 1) return (uint16_t)(sign | low);
    double down = a - small_float(low, e, m), up = small_float((uint16_t)(low + 1), e, m) - a;
    return (uint16_t)(sign | (low + (up < down || (up == down && low & 1))));
}

static void check_narrow(const char *isa, void (*op)(uint16_t *, const float *, size_t), const float *x, size_t n,
                         int e, int m, const uint16_t *expected) {
    uint16_t *out = malloc(n * 2);
    op(out, x, n);
    for (size_t i = 0; i < n; i++)
        if (out[i] != expected[i])
            fail_msg("%s: %a to %d/%d bits gives %#x, expected %#x", isa, (double)x[i], e, m, out[i], expected[i]);
    free(out);
}

/* Every small float, the midpoints to its neighbours, one step beside both, NaNs, and random patterns. */
static size_t narrow_cases(float *x, int e, int m) {
    size_t n = 0;
    for (unsigned i = 0; i < 65536; i++) {
        double v = small_float((uint16_t)i, e, m);
        if (!isfinite(v)) continue;
        double next = small_float((uint16_t)(i + 1), e, m), step = isfinite(next) ? next - v : v / 2;
        x[n++] = (float)v;
        float middle = (float)(v + step / 2);
        x[n++] = middle;
        x[n++] = nextafterf(middle, INFINITY);
        x[n++] = nextafterf(middle, -INFINITY);
    }
    static const float special[] = {INFINITY, -INFINITY,  FLT_MAX, -FLT_MAX, FLT_MIN,
                                    65504,    65519.996f, 65520,   65536,    1e-45f};
    memcpy(x + n, special, sizeof special);
    n += sizeof special / sizeof *special;
    for (int i = 0; i < 20000; i++) x[n++] = from_bits((uint32_t)next_random());
    for (int i = 0; i < 200; i++) x[n++] = from_bits((uint32_t)next_random() | 0x7f800001);
    return n;
}

static void test_narrow(void **unused) {
    (void)unused;
    float *x = malloc((65536 * 4 + 30000) * sizeof *x);
    for (int half = 0; half < 2; half++) {
        int e = half ? 5 : 8, m = half ? 10 : 7;
        size_t n = narrow_cases(x, e, m);
        uint16_t *expected = malloc(n * 2);
        for (size_t i = 0; i < n; i++) expected[i] = reference_narrow(x[i], e, m);
        EACH_TABLE(k) check_narrow(k->isa, half ? k->f32_to_f16 : k->f32_to_bf16, x, n, e, m, expected);
        free(expected);
    }
    free(x);
}

/* ---- exact kernels against scalar, at every length, at a guard page and at offsets from one ---- */

typedef struct bench {
    guarded a, b, c, d;
    float *expected;
} bench;
static bench bench_new(void) {
    size_t bytes = MAX_LENGTH * sizeof(float);
    return (bench){guarded_new(bytes), guarded_new(bytes), guarded_new(bytes), guarded_new(bytes), malloc(bytes)};
}
static void bench_free(bench *t) {
    guarded_free(&t->a);
    guarded_free(&t->b);
    guarded_free(&t->c);
    guarded_free(&t->d);
    free(t->expected);
}

/* Against widening, then sub_f32: the upper halves of the values that a and b hold. */
static void check_sub_bf16(const obm_kernels *k, bench *t, size_t n) {
    uint16_t *a = at_end(&t->a, n * 2), *b = at_end(&t->b, n * 2), *values[] = {a, b};
    float *y = at_end(&t->c, n * 4), *wide = malloc(n * 4 + 1);
    for (int i = 0; i < 2; i++) {
        fill(wide, n, PLAIN | ZEROS | DENORMALS);
        scalar_table()->f32_to_bf16(values[i], wide, n);
    }
    for (size_t i = 0; i < n; i++) t->expected[i] = small_float(a[i], 8, 7), wide[i] = small_float(b[i], 8, 7);
    scalar_table()->sub_f32(t->expected, t->expected, wide, n);
    k->sub_bf16(y, a, b, n);
    assert_same(y, t->expected, n, k->isa, "sub_bf16");
    free(wide);
}

/* The order that kernels.h states, written out. */
static double reference_lanes(const float *x, const float *y, size_t n) {
    double lane[16] = {0};
    for (size_t i = 0; i < n; i++) lane[i % 16] += y ? (double)x[i] * (double)y[i] : fabs((double)x[i]);
    for (int j = 0; j < 8; j++) lane[j] += lane[j + 8];
    for (int j = 0; j < 4; j++) lane[j] += lane[j + 4];
    for (int j = 0; j < 2; j++) lane[j] += lane[j + 2];
    return lane[0] + lane[1];
}

/* kinds of a; NaN has no sign. */
static void check_sign_sum(const obm_kernels *k, bench *t, size_t n, int kinds) {
    uint16_t *a = at_end(&t->a, n * 2), *b = at_end(&t->b, n * 2);
    uint8_t *bits = at_end(&t->d, (n + 7) / 8);
    fill(t->expected, n, kinds);
    scalar_table()->f32_to_bf16(a, t->expected, n);
    fill(t->expected, n, PLAIN | ZEROS | DENORMALS);
    scalar_table()->f32_to_bf16(b, t->expected, n);
    for (size_t i = 0; i < n; i++) t->expected[i] = small_float(a[i], 8, 7) - small_float(b[i], 8, 7);
    double expected = reference_lanes(t->expected, NULL, n), got = k->sign_sum_bf16(bits, a, b, n);
    if (isfinite(expected) ? got != expected : isfinite(got))
        fail_msg("%s sign_sum_bf16: n %zu: %a, expected %a", k->isa, n, got, expected);
    for (size_t i = 0; i < (n + 7) / 8 * 8; i++)
        if ((bits[i / 8] >> i % 8 & 1) != (i < n && t->expected[i] >= 0))
            fail_msg("%s sign_sum_bf16: n %zu, bit %zu", k->isa, n, i);
}

static void check_arithmetic(const obm_kernels *k, bench *t, size_t n, int kinds) {
    const obm_kernels *s = scalar_table();
    float *a = at_end(&t->a, n * 4), *b = at_end(&t->b, n * 4), *y = at_end(&t->c, n * 4), alpha = draw(PLAIN);
    uint8_t *bits = at_end(&t->d, (n + 7) / 8);
    fill(a, n, kinds);
    fill(b, n, kinds);
    for (size_t i = 0; i < (n + 7) / 8; i++) bits[i] = (uint8_t)next_random();
    s->sub_f32(t->expected, a, b, n);
    k->sub_f32(y, a, b, n);
    assert_same(y, t->expected, n, k->isa, "sub_f32");
    memcpy(y, a, n * 4);
    k->sub_f32(y, y, b, n); /* d may be a */
    assert_same(y, t->expected, n, k->isa, "sub_f32 in place");
    check_sub_bf16(k, t, n);
    check_sign_sum(k, t, n, kinds);
    memcpy(y, b, n * 4);
    memcpy(t->expected, b, n * 4);
    s->axpy_f32(t->expected, alpha, a, n);
    k->axpy_f32(y, alpha, a, n);
    assert_same(y, t->expected, n, k->isa, "axpy_f32");
    const float *const mixed[] = {a, b, a};
    const double weights[] = {draw(PLAIN), draw(PLAIN), draw(PLAIN)};
    for (size_t count = 1; count <= 3; count++) {
        s->mix_f32(t->expected, mixed, weights, count, n);
        k->mix_f32(y, mixed, weights, count, n);
        assert_same(y, t->expected, n, k->isa, "mix_f32");
    }
    memcpy(y, a, n * 4);
    memcpy(t->expected, a, n * 4);
    s->sign_axpy(t->expected, bits, alpha, n);
    k->sign_axpy(y, bits, alpha, n);
    assert_same(y, t->expected, n, k->isa, "sign_axpy");
}

static void check_scans(const obm_kernels *k, bench *t, size_t n, int kinds) {
    float *a = at_end(&t->a, n * 4), *b = at_end(&t->b, n * 4);
    size_t bytes = (n + 7) / 8, zeros = 0, first = n;
    uint8_t *bits = at_end(&t->d, bytes);
    fill(a, n, kinds);
    fill(b, n, PLAIN | ZEROS | DENORMALS);
    memset(bits, 0xaa, bytes);
    k->sign_pack(bits, a, n);
    for (size_t i = 0; i < n; i++) {
        zeros += bits_of(a[i]) << 1 == 0;
        if (!isfinite(a[i]) && first == n) first = i;
        if ((bits[i / 8] >> i % 8 & 1) != (isnan(a[i]) ? 0 : !(a[i] < 0)))
            fail_msg("%s sign_pack: n %zu, bit %zu", k->isa, n, i);
    }
    if (n % 8 && bits[n / 8] >> n % 8) fail_msg("%s sign_pack: n %zu leaves bits past the end", k->isa, n);
    assert_int_equal(k->count_zero(a, n), zeros);
    assert_int_equal(k->find_nonfinite(a, n), first);
    assert_int_equal(k->find_nonfinite(b, n), n);
}

static void check_reductions(const obm_kernels *k, bench *t, size_t n) {
    float *a = at_end(&t->a, n * 4), *b = at_end(&t->b, n * 4);
    fill(a, n, PLAIN | ZEROS | DENORMALS);
    fill(b, n, PLAIN | ZEROS | DENORMALS);
    double got[2] = {k->abs_sum(a, n), k->dot(a, b, n)},
           expected[2] = {reference_lanes(a, NULL, n), reference_lanes(a, b, n)};
    if (memcmp(got, expected, sizeof got))
        fail_msg("%s reductions: n %zu: %a %a, expected %a %a", k->isa, n, got[0], got[1], expected[0], expected[1]);
}

static void check_histogram(const obm_kernels *k, bench *t, size_t n) {
    static uint32_t got[32768], expected[32768];
    float *a = at_end(&t->a, n * 4);
    fill(a, n, PLAIN | ZEROS | DENORMALS);
    memset(got, 0, sizeof got);
    memset(expected, 0, sizeof expected);
    for (size_t i = 0; i < n; i++) expected[bits_of(fabsf(a[i])) >> 16]++;
    k->magnitude_histogram(got, a, n);
    assert_memory_equal(got, expected, sizeof got);
}

/* ---- static merges ---- */

/* From the definition: the difference of the exact values, rounded by the scalar conversions that test_narrow checks.
 */
static size_t reference_delta(float *d, const uint16_t *a, const uint16_t *b, int round, uint32_t least, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float x = (float)small_float(a[i], 8, 7) - (b ? (float)small_float(b[i], 8, 7) : 0);
        uint16_t h;
        scalar_table()->f32_to_bf16(&h, &x, 1);
        if (round && !isnan(x)) x = (float)small_float(h, 8, 7);
        if (!isfinite(x)) return i;
        d[i] = bits_of(fabsf(x)) >= least ? x : 0;
    }
    return n;
}

static void check_delta(const obm_kernels *k, bench *t, size_t n, int kinds) {
    uint16_t *a = at_end(&t->a, n * 2), *b = at_end(&t->b, n * 2), *values[] = {a, b};
    float *d = at_end(&t->c, n * 4), *wide = malloc(n * 4 + 1);
    const uint32_t leasts[] = {0, bits_of(0.25f), 0x80000000u};
    for (int i = 0; i < 2; i++) {
        fill(wide, n, kinds);
        scalar_table()->f32_to_bf16(values[i], wide, n);
    }
    for (int form = 0; form < 9; form++) {
        const uint16_t *base = form % 3 ? b : NULL;
        size_t expected = reference_delta(t->expected, a, base, form % 3 == 2, leasts[form / 3], n);
        assert_int_equal(k->delta_bf16(d, a, base, form % 3 == 2, leasts[form / 3], n), expected);
        assert_same(d, t->expected, expected, k->isa, "delta_bf16");
    }
    free(wide);
}

static void check_counts(const obm_kernels *k, bench *t, size_t n) {
    static uint32_t got[65536], expected[65536];
    float *a = at_end(&t->a, n * 4);
    uint32_t from[8] = {0, 1, bits_of(0.1f), bits_of(0.25f), bits_of(0.25f) + 1, bits_of(1), 0x7f800000, 0x80000000u};
    uint32_t counts[8] = {5}, wanted[8] = {5}, high;
    fill(a, n, PLAIN | ZEROS | DENORMALS);
    high = n ? bits_of(fabsf(a[n / 2])) >> 16 : 0;
    for (size_t i = 0; i < n; i += 3) a[i] = i & 1 ? -0.25f : 0.25f;
    memset(got, 0, sizeof got);
    memset(expected, 0, sizeof expected);
    for (size_t i = 0; i < n; i++) {
        uint32_t u = bits_of(fabsf(a[i]));
        for (int c = 0; c < 8; c++) wanted[c] += u >= from[c];
        if (u >> 16 == high) expected[u & 0xffff]++;
    }
    k->count_from(counts, from, a, n);
    assert_memory_equal(counts, wanted, sizeof counts);
    k->low_histogram(got, high, a, n);
    assert_memory_equal(got, expected, sizeof got);
    uint16_t *lows = malloc((n + 1) * sizeof *lows);
    for (int which = 0; which < 2; which++) { /* of a value, and of one whose lower half is 0 */
        size_t found = 7, zeros = 7, listed = 0, none = 0, most = n < 65535 ? n : 65535;
        uint32_t wanted_high = which ? bits_of(0.25f) >> 16 : high;
        k->lows_f32(lows, &found, &zeros, wanted_high, a, most);
        for (size_t i = 0; i < most; i++) {
            uint32_t u = bits_of(fabsf(a[i]));
            if (u >> 16 != wanted_high) continue;
            none += !(uint16_t)u;
            if ((uint16_t)u) assert_true(listed < found && lows[listed++] == (uint16_t)u);
        }
        assert_int_equal(found, listed);
        assert_int_equal(zeros, none);
    }
    free(lows);
    for (int c = 0; c < 8; c++) {
        float *x = malloc((n + 1) * sizeof *x);
        memcpy(x, a, n * sizeof *x);
        k->keep_from(x, from[c], n);
        for (size_t i = 0; i < n; i++)
            assert_int_equal(bits_of(x[i]), bits_of(fabsf(a[i])) >= from[c] ? bits_of(a[i]) : 0);
        free(x);
    }
}

/* One element by the definition in kernels.h. */
static float reference_merge(const obm__agreement *m, size_t i, bool agree) {
    float s = 0, sum = 0, mass = 0;
    for (size_t t = 0; t < m->count; t++) s += m->votes[t] * m->deltas[t * m->stride + i];
    if (s == 0) s = m->zero_sign;
    for (size_t t = 0; t < m->count; t++) {
        float vote = m->votes[t] * m->deltas[t * m->stride + i];
        if (agree && (vote == 0 || (vote > 0) != (s > 0))) continue;
        sum += m->weights[t] * m->deltas[t * m->stride + i];
        mass += m->weights[t];
    }
    if (!agree) sum /= m->divisor;
    if (agree && m->normalize) sum /= mass == 0 ? 1 : mass;
    sum *= m->lambda;
    return m->base ? m->base[i] + sum : sum;
}

static void check_agreement(const obm_kernels *k, bench *t, size_t n) {
    static float deltas[4 * MAX_LENGTH];
    const float weights[] = {0.5f, -0.25f, 1.5f, 0.7f}, ones[] = {1, 1, 1, 1};
    float *base = at_end(&t->a, n * 4), *out = at_end(&t->b, n * 4);
    fill(deltas, 4 * n, PLAIN | ZEROS);
    fill(base, n, PLAIN);
    for (size_t i = 0; i < n; i += 5) deltas[n + i] = -deltas[i]; /* sums of 0 */
    for (unsigned form = 0; form < 16; form++) {
        obm__agreement m = {deltas,
                            form % 4 + 1,
                            n,
                            weights,
                            form & 4 ? weights : ones,
                            form & 8 ? base : NULL,
                            0.3f,
                            form & 4 ? -1.0f : 1.0f,
                            form & 1,
                            1.7f};
        for (int agree = 0; agree < 2; agree++) {
            (agree ? k->agree_f32 : k->sum_f32)(out, &m, n);
            for (size_t i = 0; i < n; i++) t->expected[i] = reference_merge(&m, i, agree);
            assert_same(out, t->expected, n, k->isa, agree ? "agree_f32" : "sum_f32");
        }
    }
}

static void check_store(const obm_kernels *k, bench *t, size_t n, int kinds) {
    float *a = at_end(&t->a, n * 4), *wide = malloc(n * 4 + 1);
    uint16_t *h = at_end(&t->b, n * 2), *expected = malloc(n * 2 + 1);
    fill(a, n, kinds);
    if (n > 40) a[n - 1] = 0x1.ffp+127f; /* rounds to infinity */
    scalar_table()->f32_to_bf16(expected, a, n);
    scalar_table()->bf16_to_f32(wide, expected, n);
    size_t first = scalar_table()->find_nonfinite(wide, n);
    assert_int_equal(k->store_bf16(h, a, n), first);
    assert_memory_equal(h, expected, first * 2);
    free(wide);
    free(expected);
}

static void random_bf16(uint16_t *out, size_t n, int kinds) {
    float *wide = malloc(n * 4 + 1);
    fill(wide, n, kinds);
    scalar_table()->f32_to_bf16(out, wide, n);
    free(wide);
}

static void check_counts_bf16(const obm_kernels *k, bench *t, size_t n, int kinds) {
    uint16_t *a = at_end(&t->a, n * 2), *b = at_end(&t->b, n * 2);
    const uint16_t from[8] = {0, 1, 0x3c00, 0x3c80, 0x3c81, 0x3f80, 0x7f80, 0x7fff};
    random_bf16(a, n, kinds);
    random_bf16(b, n, kinds);
    for (int form = 0; form < 3; form++) {
        const uint16_t *base = form ? b : NULL;
        uint32_t counts[8] = {5}, wanted[8] = {5}, high = 0;
        size_t first = reference_delta(t->expected, a, base, form == 2, 0, n);
        for (size_t i = 0; i < first; i++)
            for (int c = 0; c < 8; c++) wanted[c] += bits_of(fabsf(t->expected[i])) >> 16 >= from[c];
        assert_int_equal(k->count_bf16(counts, from, a, base, form == 2, n), first);
        if (first == n) assert_memory_equal(counts, wanted, sizeof counts);
        /* Bounds that a byte tells apart, around what is there. */
        uint16_t middle = n && first == n ? (uint16_t)(bits_of(fabsf(t->expected[n / 2])) >> 16) : 0x3c00, near[8];
        for (int c = 0; c < 8; c++) near[c] = (uint16_t)((middle > 108 ? middle - 108 : 0) + c * 108 % 255);
        memset(counts, 0, sizeof counts);
        memset(wanted, 0, sizeof wanted);
        for (size_t i = 0; i < first; i++)
            for (int c = 0; c < 8; c++) wanted[c] += bits_of(fabsf(t->expected[i])) >> 16 >= near[c];
        assert_int_equal(k->count_bf16(counts, near, a, base, form == 2, n), first);
        if (first == n) assert_memory_equal(counts, wanted, sizeof counts);
        uint16_t *sizes = at_end(&t->c, n * 2), most, largest = 0;
        assert_int_equal(k->sizes_bf16(sizes, &most, a, base, form == 2, n), first);
        for (size_t i = 0; first == n && i < n; i++) {
            uint16_t size = (uint16_t)(bits_of(fabsf(t->expected[i])) >> 16);
            assert_int_equal(sizes[i], size);
            if (size > largest) largest = size;
        }
        if (first == n) assert_int_equal(most, largest);
        if (form == 2) continue;
        if (n && first == n) high = bits_of(fabsf(t->expected[n / 2])) >> 16;
        uint16_t *lows = at_end(&t->c, n * 2);
        size_t found, zeros, listed = 0, whole = 0;
        assert_int_equal(k->lows_bf16(lows, &found, &zeros, high, a, base, n), first);
        for (size_t i = 0; first == n && i < n; i++) {
            uint32_t u = bits_of(fabsf(t->expected[i]));
            whole += u >> 16 == high && (u & 0xffff) == 0;
            if (u >> 16 == high && (u & 0xffff) != 0) assert_int_equal(lows[listed++], u & 0xffff);
        }
        if (first == n) assert_true(found == listed && zeros == whole);
    }
}

/* More elements than counters of 8 bits hold, most of them above the same bound, and bounds that no size reaches. */
static void check_long_counts(const obm_kernels *k) {
    static uint16_t a[20007];
    const size_t n = sizeof a / sizeof *a;
    const uint16_t from[][8] = {{0x3c00, 0x3c01, 0x3c02, 0x3c03, 0x3c04, 0x3c05, 0x3c06, 0x3cfe},
                                {0x7f81, 0x7fa0, 0x7fc0, 0x7fd0, 0x7fe0, 0x7ff0, 0x7ffe, 0x7fff},
                                {0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff, 0x7fff}};
    for (size_t set = 0; set < 3; set++) {
        uint32_t counts[8] = {0}, wanted[8] = {0};
        for (size_t i = 0; i < n; i++) a[i] = (uint16_t)(set ? i % 200 : 0x3c00 + (i % 97 ? 6 : i % 6));
        for (size_t i = 0; i < n * 8; i++) wanted[i % 8] += a[i / 8] >= from[set][i % 8];
        assert_int_equal(k->count_bf16(counts, from[set], a, NULL, 0, n), n);
        assert_memory_equal(counts, wanted, sizeof counts);
    }
}

#define TILE_MODELS 5
/* Masked and scaled deltas of a tile by their definition, (count, n).  Returns the first index that is not finite. */
static size_t reference_deltas(const obm__tile *tile, size_t n, float *d) {
    size_t first = n;
    for (size_t m = 0; m < tile->count; m++) {
        size_t bad = reference_delta(d + m * n, tile->models[m], tile->base, tile->round, tile->least[m], n);
        if (bad < first) first = bad;
        for (size_t i = 0; i < bad; i++) {
            if (tile->keep && tile->keep[m] && !(tile->keep[m][i / 8] >> i % 8 & 1)) d[m * n + i] = 0;
            if (tile->factors) d[m * n + i] *= tile->factors[m];
        }
    }
    return first;
}

static void check_tile(const obm_kernels *k, bench *t, size_t n, int kinds) {
    static const float signed_weights[] = {0.5f, -0.25f, 1.5f, 0.7f, 3}, ones[] = {1, 1, 1, 1, 1};
    static const float positive_weights[] = {0.5f, 0.3f, 0.4f, 0x1p-16f, 1e-30f};
    static const float factors[] = {5, 1, 0.3f, 1, 2};
    const uint32_t least[] = {0, bits_of(0.005f), 1, 0x80000000u, bits_of(0.01f)};
    uint16_t *all = at_end(&t->a, n * 2 * TILE_MODELS), *base = at_end(&t->b, n * 2), *out = at_end(&t->c, n * 2);
    float *d = malloc((n * TILE_MODELS + n) * 4 + 1), *mixed = d + n * TILE_MODELS, *wide = malloc(n * 4 + 1);
    size_t bytes = (n + 7) / 8;
    uint8_t *masks = malloc(bytes * 2 + 1);
    const uint16_t *models[TILE_MODELS];
    const uint8_t *keep[TILE_MODELS] = {masks, NULL, masks + bytes, NULL, masks};
    uint16_t *expected = malloc(n * 2 + 1);
    random_bf16(all, n * TILE_MODELS, kinds);
    random_bf16(base, n, kinds);
    for (size_t i = 0; i < 2 * bytes; i++) masks[i] = (uint8_t)next_random();
    for (size_t m = 0; m < TILE_MODELS; m++) models[m] = all + m * n;
    for (unsigned form = 0; form < 128; form++) {
        const float *weights = form >> 6 ? positive_weights : signed_weights;
        obm__tile tile = {.models = models,
                          .base = form & 1 ? base : NULL,
                          .count = form % TILE_MODELS + 1,
                          .keep = form & 2 ? keep : NULL,
                          .least = least,
                          .factors = form & 4 ? factors : NULL,
                          .weights = weights,
                          .votes = form & 8 ? weights : ones,
                          .lambda = 0.3f,
                          .zero_sign = form & 4 ? -1.0f : 1.0f,
                          .divisor = form & 2 ? 1.7f : 1,
                          .round = form >> 4 & 1,
                          .agree = form >> 5 & 1,
                          .normalize = form >> 1 & 1};
        size_t first = reference_deltas(&tile, n, d);
        for (size_t i = 0; base && i < n; i++) wide[i] = (float)small_float(base[i], 8, 7);
        obm__agreement m = {d,           tile.count,     n,
                            weights,     tile.votes,     tile.base ? wide : NULL,
                            tile.lambda, tile.zero_sign, tile.normalize,
                            tile.divisor};
        int64_t votes = 7, wanted = 7;
        for (size_t i = 0; i < first; i++) {
            float s = 0;
            for (size_t j = 0; j < tile.count; j++) s += tile.votes[j] * d[j * n + i];
            wanted += (s > 0) - (s < 0);
            mixed[i] = reference_merge(&m, i, tile.agree);
        }
        assert_int_equal(k->vote_bf16(&votes, &tile, n), first);
        if (first == n) assert_int_equal(votes, wanted);
        first = scalar_table()->store_bf16(expected, mixed, first);
        assert_int_equal(k->merge_bf16(out, &tile, n), first);
        if (first == n && memcmp(out, expected, n * 2)) fail_msg("%s merge_bf16: n %zu, form %u", k->isa, n, form);
    }
    free(d);
    free(wide);
    free(masks);
    free(expected);
}

/* Where all products of those that agree are -0 their sum from +0 on is +0, and so is that of a base of -0 and it. */
static void check_vanishing_tile(const obm_kernels *k) {
    static const float weights[] = {0, 1e-10f, 0x1p-17f, 0.25f}, factors[] = {0x1p-16f}, one[] = {1};
    static const uint32_t least[] = {0};
    uint16_t a[40], base[40], out[40];
    const uint16_t *models[] = {a};
    for (size_t i = 0; i < 40; i++) a[i] = 0x8001, base[i] = 0x8000; /* -2^-133 and -0 */
    for (size_t form = 0; form < 16; form++) {
        obm__tile tile = {.models = models,
                          .base = base,
                          .count = 1,
                          .least = least,
                          .factors = form / 4 == 3 ? factors : NULL,
                          .weights = &weights[form / 4],
                          .votes = one,
                          .lambda = 1,
                          .zero_sign = 1,
                          .divisor = 1,
                          .round = form & 1,
                          .agree = 1,
                          .normalize = form >> 1 & 1};
        assert_int_equal(k->merge_bf16(out, &tile, 40), 40);
        for (size_t i = 0; i < 40; i++) assert_int_equal(out[i], 0);
    }
}

/* A factor makes a delta infinite, and a weight of 0 that NaN: it has no sign to elect, and must not be passed over. */
static void check_overflowing_tile(const obm_kernels *k, size_t n, size_t at) {
    static const float weights[] = {0.5f, 0}, factors[] = {1, 5};
    static const uint32_t least[] = {0, 0};
    uint16_t a[96], b[96], out[96];
    const uint16_t *models[] = {a, b};
    obm__tile tile = {.models = models,
                      .count = 2,
                      .least = least,
                      .factors = factors,
                      .weights = weights,
                      .votes = weights,
                      .lambda = 1,
                      .zero_sign = 1,
                      .divisor = 1,
                      .agree = 1,
                      .normalize = 1};
    for (size_t i = 0; i < n; i++) a[i] = b[i] = 0x3f80;
    b[at] = 0x7f16; /* 2e38 */
    assert_int_equal(k->merge_bf16(out, &tile, n), at);
}

/* The generator as core/merge/random.c states it. */
static uint64_t reference_draw(uint64_t state, uint64_t element) {
    uint64_t z = state + (element + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void check_draws(const obm_kernels *k, bench *t, size_t n) {
    size_t bytes = (n + 7) / 8;
    uint8_t *bits = at_end(&t->a, bytes), *expected = malloc(bytes + 1);
    uint32_t *tops = at_end(&t->b, n * 4);
    uint64_t seed = next_random();
    /* The last one is that of an element in the middle, whose upper half then decides nothing. */
    const uint64_t limits[] = {0, 1, (uint64_t)1 << 51, ((uint64_t)1 << 53) - 1, reference_draw(seed, n / 2) >> 11};
    for (int which = 0; which < 6; which++) {
        uint64_t limit = limits[which < 5 ? which : 4] + (which == 5);
        memset(expected, 0, bytes);
        for (size_t i = 0; i < n; i++) expected[i / 8] |= (uint8_t)((reference_draw(seed, i) >> 11 < limit) << i % 8);
        memset(bits, 0xaa, bytes);
        k->random_bits(bits, seed, limit, n);
        if (memcmp(bits, expected, bytes)) fail_msg("%s random_bits: n %zu, limit %d", k->isa, n, which);
    }
    k->random_tops(tops, seed, n);
    for (size_t i = 0; i < n; i++) assert_int_equal(tops[i], reference_draw(seed, i) >> 32);
    uint16_t *highs = at_end(&t->b, n * 2);
    k->random_highs(highs, seed, n);
    for (size_t i = 0; i < n; i++) assert_int_equal(highs[i], reference_draw(seed, i) >> 48);
    free(expected);
}

/* Tables of all kinds of steps, those that begin at 0 and those whose last entry few draws reach. */
static void check_choices(const obm_kernels *k, bench *t, size_t n) {
    size_t bytes = (n + 7) / 8;
    uint16_t *highs = at_end(&t->a, n * 2), *sizes = at_end(&t->b, n * 2);
    uint8_t *kept = at_end(&t->c, bytes), *open = malloc(bytes + 1);
    obm__choice c = {.from = (uint16_t)(next_random() % 3 * 20000), .step = (uint16_t)(next_random() % 3 * 30000 + 15)};
    for (size_t i = 0; i < 16; i++) {
        c.drop[i] = (uint16_t)(next_random() % 0x8000);
        c.keep[i] = (uint16_t)(next_random() % 0x8000);
    }
    for (size_t i = 0; i < n; i++) {
        highs[i] = (uint16_t)next_random();
        sizes[i] = next_random() % 2 ? c.keep[i % 16] : (uint16_t)(next_random() % 0x8000);
    }
    memset(kept, 0xaa, bytes);
    memset(open, 0xaa, bytes + 1);
    k->choose_sizes(kept, open, highs, sizes, &c, n);
    for (size_t i = 0; i < 8 * bytes; i++) {
        size_t over = i < n && highs[i] > c.from ? (size_t)(highs[i] - c.from) : 0, at = over * c.step / 65536;
        bool stays = i < n && sizes[i] >= c.keep[at < 15 ? at : 15],
             unsure = i < n && !stays && sizes[i] >= c.drop[at < 15 ? at : 15];
        assert_int_equal(kept[i / 8] >> i % 8 & 1, stays);
        assert_int_equal(open[i / 8] >> i % 8 & 1, unsure);
    }
    assert_int_equal(open[bytes], 0xaa);
    free(open);
}

/* All finite bf16, down to the denormal ones. */
static void check_sums(const obm_kernels *k, bench *t, size_t n) {
    size_t bytes = (n + 7) / 8;
    uint16_t *sizes = at_end(&t->a, n * 2);
    uint8_t *keep = at_end(&t->b, bytes);
    float *wide = malloc(2 * n * sizeof *wide + 1);
    double sums[2];
    int range = next_random() % 2 ? 0x100 : 0x7f80;
    for (size_t i = 0; i < bytes; i++) keep[i] = (uint8_t)next_random();
    for (size_t i = 0; i < n; i++) sizes[i] = (uint16_t)(next_random() % (unsigned)range);
    scalar_table()->bf16_to_f32(wide, sizes, n);
    for (size_t i = 0; i < n; i++) wide[n + i] = keep[i / 8] >> i % 8 & 1 ? wide[i] : 0;
    k->sum_sizes(sums, sizes, keep, n);
    assert_true(sums[0] == scalar_table()->abs_sum(wide, n) && sums[1] == scalar_table()->abs_sum(wide + n, n));
    free(wide);
}

static void test_merging(void **unused) {
    (void)unused;
    bench t = bench_new();
    EACH_TABLE(k) {
        for (size_t i = 0; i < N_LENGTHS; i += i < 70 ? 1 : 7) {
            size_t n = length_at(i);
            check_delta(k, &t, n, PLAIN | ZEROS | DENORMALS);
            check_delta(k, &t, n, PLAIN | INFINITE | NOT_A_NUMBER);
            check_store(k, &t, n, PLAIN | ZEROS | DENORMALS);
            check_store(k, &t, n, PLAIN | INFINITE | NOT_A_NUMBER);
            check_agreement(k, &t, n);
            check_draws(k, &t, n);
            check_choices(k, &t, n);
            if (n <= 4096) check_sums(k, &t, n);
            check_counts_bf16(k, &t, n, PLAIN | ZEROS | DENORMALS);
            check_counts_bf16(k, &t, n, PLAIN | INFINITE | NOT_A_NUMBER);
            check_tile(k, &t, n, PLAIN | ZEROS | DENORMALS);
        }
        for (size_t n = 0; n < 300; n += 41) check_tile(k, &t, n, PLAIN | INFINITE | NOT_A_NUMBER);
        for (size_t n = 1; n <= 96; n += 19) check_overflowing_tile(k, n, n / 2);
        check_long_counts(k);
        check_vanishing_tile(k);
        for (size_t n = 0; n < 600; n += 37) check_counts(k, &t, n);
        check_counts(k, &t, MAX_LENGTH);
    }
    bench_free(&t);
}

static void check_half(const obm_kernels *k, bench *t, size_t n, int kinds) {
    const obm_kernels *s = scalar_table();
    float *a = at_end(&t->a, n * 4), *wide = at_end(&t->b, n * 4);
    uint16_t *h = at_end(&t->c, n * 2), *expected = malloc(n * 2 + 1);
    fill(a, n, kinds);
    for (int half = 0; half < 2; half++) {
        (half ? s->f32_to_f16 : s->f32_to_bf16)(expected, a, n);
        (half ? k->f32_to_f16 : k->f32_to_bf16)(h, a, n);
        assert_memory_equal(h, expected, n * 2);
        (half ? s->f16_to_f32 : s->bf16_to_f32)(t->expected, expected, n);
        (half ? k->f16_to_f32 : k->bf16_to_f32)(wide, h, n);
        assert_memory_equal(wide, t->expected, n * 4);
    }
    free(expected);
}

static void test_exact(void **unused) {
    (void)unused;
    bench t = bench_new();
    const int all = PLAIN | ZEROS | DENORMALS | INFINITE | NOT_A_NUMBER;
    EACH_TABLE(k) {
        for (size_t i = 0; i < N_LENGTHS; i++) {
            size_t n = length_at(i);
            check_arithmetic(k, &t, n, all);
            check_arithmetic(k, &t, n, PLAIN);
            check_scans(k, &t, n, all);
            check_half(k, &t, n, all);
            if (n <= 4096) check_reductions(k, &t, n);
        }
        check_histogram(k, &t, 0);
        check_histogram(k, &t, 257);
        check_histogram(k, &t, MAX_LENGTH);
    }
    bench_free(&t);
}

/* From every position, past values that are as large: with NaN, infinities, zeros of both signs. */
static void test_above_position(void **unused) {
    (void)unused;
    static const float limits[] = {-INFINITY, -2.5f, -0.0f, 0, 1, FLT_MAX, INFINITY};
    bench t = bench_new();
    EACH_TABLE(k) {
        for (size_t n = 0; n <= 70; n++) {
            float *a = at_end(&t.a, n * 4);
            for (size_t l = 0; l < sizeof limits / sizeof *limits; l++) {
                float limit = limits[l], above = nextafterf(limit, INFINITY);
                for (size_t i = 0; i < n; i++) a[i] = i & 1 ? limit : -INFINITY;
                assert_int_equal(k->find_above(a, limit, n), n);
                for (size_t i = n; i-- > 0;) {
                    a[i] = i & 1 || limit == INFINITY ? NAN : above;
                    assert_int_equal(k->find_above(a, limit, n), i);
                }
            }
            for (size_t i = 0; i < n; i++) a[i] = -1;
            assert_int_equal(k->find_above(a, NAN, n), 0); /* nothing is at most a NaN */
        }
    }
    bench_free(&t);
}

static void test_nonfinite_position(void **unused) {
    (void)unused;
    bench t = bench_new();
    EACH_TABLE(k) {
        for (size_t n = 1; n <= 70; n++) {
            float *a = at_end(&t.a, n * 4);
            for (size_t i = 0; i < n; i++) {
                fill(a, n, PLAIN);
                a[i] = i & 1 ? -INFINITY : NAN;
                a[n - 1] = n - 1 == i ? a[i] : INFINITY;
                assert_int_equal(k->find_nonfinite(a, n), i);
            }
            a[0] = FLT_MAX;
            a[n - 1] = -FLT_MAX;
            for (size_t i = 1; i + 1 < n; i++) a[i] = 0;
            assert_int_equal(k->find_nonfinite(a, n), n);
        }
    }
    bench_free(&t);
}

/* ---- rows ---- */

static void row_bound(double sum, double magnitude, float got, size_t n, const char *isa, const char *op) {
    double bound = (double)n * 0x1p-23 * magnitude + (double)n * 0x1p-149;
    if (!(fabs((double)got - sum) <= bound))
        fail_msg("%s %s: n %zu: %.9g, expected %.9g within %.3g", isa, op, n, (double)got, sum, bound);
}

/* type 0: bf16, 1: f16, 2: f32. */
static void call_rows(const obm_kernels *k, int type, float *y, const void *w, size_t ld, size_t rows, const float *x,
                      size_t n) {
    if (type == 0)
        k->rows_bf16(y, w, ld, rows, x, n);
    else if (type == 1)
        k->rows_f16(y, w, ld, rows, x, n);
    else
        k->rows_f32(y, w, ld, rows, x, n);
}
static double weight_at(int type, const void *w, size_t i) {
    if (type == 2) return (double)((const float *)w)[i];
    return small_float(((const uint16_t *)w)[i], type ? 5 : 8, type ? 10 : 7);
}

static void check_rows(const obm_kernels *k, int type, size_t rows, size_t ld, size_t n, guarded *gw, guarded *gx) {
    static const char *const names[] = {"rows_bf16", "rows_f16", "rows_f32"};
    size_t size = type == 2 ? 4 : 2, elements = rows ? (rows - 1) * ld + n : 0;
    uint8_t *w = at_end(gw, elements * size);
    float *x = at_end(gx, n * 4), y[16], alone;
    for (size_t i = 0; i < elements; i++) {
        float value = draw(PLAIN | ZEROS) * 0.01f;
        uint16_t half;
        if (type == 0) scalar_table()->f32_to_bf16(&half, &value, 1);
        if (type == 1) scalar_table()->f32_to_f16(&half, &value, 1);
        memcpy(w + i * size, type == 2 ? (void *)&value : (void *)&half, size);
    }
    fill(x, n, PLAIN | ZEROS);
    for (size_t r = 0; r < 16; r++) y[r] = -77;
    call_rows(k, type, y, w, ld, rows, x, n);
    for (size_t r = 0; r < rows; r++) {
        double sum = 0, magnitude = 0;
        for (size_t j = 0; j < n; j++) {
            double product = weight_at(type, w, r * ld + j) * (double)x[j];
            sum += product;
            magnitude += fabs(product);
        }
        row_bound(sum, magnitude, y[r], n, k->isa, names[type]);
        call_rows(k, type, &alone, w + r * ld * size, ld, 1, x, n);
        if (bits_of(alone) != bits_of(y[r]))
            fail_msg("%s %s: row %zu of %zu differs alone, n %zu", k->isa, names[type], r, rows, n);
    }
    for (size_t r = rows; r < 16; r++) assert_true(y[r] == -77);
}

static void test_rows(void **unused) {
    (void)unused;
    guarded w = guarded_new(9 * 6000 * 4), x = guarded_new(6000 * 4);
    EACH_TABLE(k) {
        for (int type = 0; type < 3; type++) {
            for (size_t n = 0; n <= 130; n++) check_rows(k, type, 5, n + n % 3, n, &w, &x);
            for (size_t rows = 0; rows <= 9; rows++) check_rows(k, type, rows, 577, 577, &w, &x);
            check_rows(k, type, 9, 5632, 5632, &w, &x);
            check_rows(k, type, 4, 6000, 4097, &w, &x);
        }
    }
    guarded_free(&w);
    guarded_free(&x);
}

static void call_batch(const obm_kernels *k, int type, float *y, size_t ldy, const void *w, size_t ld, size_t rows,
                       const float *x, size_t ldx, size_t tokens, size_t n) {
    if (type == 0)
        k->batch_bf16(y, ldy, w, ld, rows, x, ldx, tokens, n);
    else if (type == 1)
        k->batch_f16(y, ldy, w, ld, rows, x, ldx, tokens, n);
    else
        k->batch_f32(y, ldy, w, ld, rows, x, ldx, tokens, n);
}

/* Against rows_* of the same table, bit for bit; whatever lies between the results stays as it was. */
static void check_batch(const obm_kernels *k, int type, size_t rows, size_t tokens, size_t n, guarded *gw,
                        guarded *gx) {
    enum { LDY = 67, VECTORS = 17 };
    size_t size = type == 2 ? 4 : 2, ld = n + 3, ldx = n + 5;
    size_t elements = rows ? (rows - 1) * ld + n : 0, values = tokens ? (tokens - 1) * ldx + n : 0;
    uint8_t *w = at_end(gw, elements * size);
    float *x = at_end(gx, values * 4), y[VECTORS * LDY], alone[LDY];
    for (size_t i = 0; i < elements; i++) {
        float value = draw(PLAIN | ZEROS) * 0.01f;
        uint16_t half;
        if (type == 0) scalar_table()->f32_to_bf16(&half, &value, 1);
        if (type == 1) scalar_table()->f32_to_f16(&half, &value, 1);
        memcpy(w + i * size, type == 2 ? (void *)&value : (void *)&half, size);
    }
    fill(x, values, PLAIN | ZEROS);
    for (size_t i = 0; i < VECTORS * LDY; i++) y[i] = -77;
    call_batch(k, type, y, LDY, w, ld, rows, x, ldx, tokens, n);
    for (size_t t = 0; t < VECTORS; t++) {
        if (t < tokens) call_rows(k, type, alone, w, ld, rows, x + t * ldx, n);
        for (size_t r = 0; r < LDY; r++) {
            float want = t < tokens && r < rows ? alone[r] : -77;
            if (bits_of(y[t * LDY + r]) != bits_of(want))
                fail_msg("%s type %d: row %zu of %zu, vector %zu of %zu, n %zu: %.9g, expected %.9g", k->isa, type, r,
                         rows, t, tokens, n, (double)y[t * LDY + r], (double)want);
        }
    }
}

static void test_batch(void **unused) {
    (void)unused;
    guarded w = guarded_new(8 * 4500 * 4), x = guarded_new(9 * 4500 * 4);
    EACH_TABLE(k) {
        for (int type = 0; type < 3; type++) {
            for (size_t n = 0; n <= 70; n++) check_batch(k, type, 5, 5, n, &w, &x);
            for (size_t rows = 0; rows <= 7; rows++)
                for (size_t tokens = 0; tokens <= 9; tokens++) check_batch(k, type, rows, tokens, 77, &w, &x);
            check_batch(k, type, 6, 8, 2119, &w, &x);
            check_batch(k, type, 8, 9, 4403, &w, &x); /* more than the vectors' order has room for */
            check_batch(k, type, 22, 6, 77, &w, &x);
            check_batch(k, type, 67, 8, 300, &w, &x);
            check_batch(k, type, 13, 17, 1500, &w, &x); /* several passes and stretches of columns */
            check_batch(k, type, 8, 4, 4100, &w, &x);
        }
    }
    guarded_free(&w);
    guarded_free(&x);
}

/* Inputs one byte off their alignment, as tensors of a mapped file may lie.  (The sanitizer build sees a wrong access.)
 */
static void test_unaligned_inputs(void **unused) {
    (void)unused;
    enum { N = 77 };
    float x[N], y[N], expected[N], row[2];
    uint16_t h[N], narrow[N];
    uint8_t raw_x[N * 4 + 1], raw_h[N * 2 + 1];
    fill(x, N, PLAIN | ZEROS);
    scalar_table()->f32_to_bf16(h, x, N);
    memcpy(raw_x + 1, x, N * 4);
    memcpy(raw_h + 1, h, N * 2);
    const float *off_x = (const void *)(raw_x + 1);
    const uint16_t *off_h = (const void *)(raw_h + 1);
    EACH_TABLE(k) {
        k->bf16_to_f32(y, off_h, N);
        k->bf16_to_f32(expected, h, N);
        assert_memory_equal(y, expected, sizeof y);
        k->f16_to_f32(y, off_h, N);
        k->f32_to_bf16(narrow, off_x, N);
        assert_memory_equal(narrow, h, sizeof h);
        k->f32_to_f16(narrow, off_x, N);
        k->sub_f32(y, off_x, off_x, N);
        k->sub_bf16(y, off_h, off_h, N);
        uint8_t bits[(N + 7) / 8];
        assert_true(k->sign_sum_bf16(bits, off_h, off_h, N) == 0);
        assert_int_equal(k->count_zero(y, N), N);
        assert_int_equal(k->find_nonfinite(off_x, N), N);
        assert_true(k->abs_sum(off_x, N) == k->abs_sum(x, N) && k->dot(off_x, off_x, N) == k->dot(x, x, N));
        assert_int_equal(k->count_zero(off_x, N), k->count_zero(x, N));
        k->rows_bf16(row, off_h, 1, 1, off_x, N);
        k->rows_bf16(row + 1, h, 1, 1, x, N);
        assert_true(row[0] == row[1]);
        k->rows_f32(row, off_x, 1, 1, off_x, N);
        k->rows_f32(row + 1, x, 1, 1, x, N);
        assert_true(row[0] == row[1]);
        k->rows_f16(row, off_h, 1, 1, off_x, N);
    }
}

/* Against libm in f64, and against the specification bit for bit. */
static void check_exp(const obm_kernels *k, const float *x, size_t n, guarded *gx) {
    float *out = at_end(gx, n * 4), want[64], gate[64], up[64];
    double sum = 0;
    memcpy(out, x, n * 4);
    memcpy(want, x, n * 4);
    double got = k->exp_sum(out, 0.5f, n), specified = scalar_table()->exp_sum(want, 0.5f, n);
    for (size_t i = 0; i < n; i++) {
        double exact = exp((double)(x[i] - 0.5f)), bound = exact * 0x1p-22 + 0x1p-149;
        sum += exact;
        if (bits_of(out[i]) != bits_of(want[i]) && !isnan(x[i]))
            fail_msg("%s exp_sum: exp(%a) is %a, scalar %a", k->isa, (double)x[i], (double)out[i], (double)want[i]);
        if (isnan(x[i])              ? !isnan(out[i])
            : exact > 0x1.fffffep127 ? !(out[i] > 0x1.fffffcp127f)
                                     : !(fabs((double)out[i] - exact) <= bound))
            fail_msg("%s exp_sum: exp(%a) is %a, expected %a", k->isa, (double)x[i], (double)out[i], exact);
    }
    if (isfinite(sum) && sum < 1e38)
        assert_true(got == specified && fabs(got - sum) <= sum * 0x1p-22 + (double)n * 0x1p-149);
    float *in_place = at_end(gx, n * 4);
    for (size_t i = 0; i < n; i++) gate[i] = in_place[i] = x[i], up[i] = 1 + (float)i;
    k->silu_mul(in_place, up, n);
    scalar_table()->silu_mul(gate, up, n);
    for (size_t i = 0; i < n; i++) {
        double exact = (double)x[i] / (1 + exp(-(double)x[i])) * up[i];
        if (isnan(x[i]) || isinf(x[i])) continue;
        if (bits_of(in_place[i]) != bits_of(gate[i]) ||
            !(fabs((double)gate[i] - exact) <= fabs(exact) * 0x1p-20 + 0x1p-112))
            fail_msg("%s silu_mul: %a gives %a, scalar %a, expected %a", k->isa, (double)x[i], (double)in_place[i],
                     (double)gate[i], exact);
    }
}

static void test_exp(void **unused) {
    (void)unused;
    static const float edges[] = {0,        -0.0f,      1,        -1,        88.7f,   88.72f,  89.3f,
                                  90,       1000,       -86.9f,   -87.5f,    -103.2f, -104.5f, -1000,
                                  0x1p-30f, -0x1p-140f, INFINITY, -INFINITY, NAN,     0.5f};
    guarded x = guarded_new(64 * 4);
    EACH_TABLE(k) {
        float values[64];
        for (size_t n = 0; n <= 64; n++) {
            for (size_t i = 0; i < n; i++) values[i] = (draw(PLAIN) - draw(PLAIN)) * 3;
            check_exp(k, values, n, &x);
        }
        check_exp(k, edges, sizeof edges / sizeof *edges, &x);
        for (int i = -104 * 64; i < 88 * 64; i += 64) { /* everywhere, also between the integers that r is taken from */
            for (int e = 0; e < 64; e++) values[e] = (float)(i + e) * 0x1.00f3p-6f;
            check_exp(k, values, 64, &x);
        }
    }
    guarded_free(&x);
}

/* The tanh form in f64: for a large negative x the f32 one would be a difference of nearly equal numbers. */
static void check_gelu(const obm_kernels *k, const float *x, size_t n, guarded *gx) {
    float *gate = at_end(gx, n * 4), want[64], up[64] = {0};
    for (size_t i = 0; i < n; i++) gate[i] = want[i] = x[i], up[i] = 1 + (float)i;
    k->gelu_mul(gate, up, n);
    scalar_table()->gelu_mul(want, up, n);
    for (size_t i = 0; i < n; i++) {
        double v = (double)x[i], z = 2 * sqrt(2 / acos(-1)) * (v + 0.044715 * v * v * v),
               exact = v / (1 + exp(-z)) * up[i];
        if (isnan(x[i]) || isinf(x[i])) continue;
        double slack = fabs(exact) * (0x1p-20 + fabs(z) * 0x1p-22) + 0x1p-112; /* z is rounded before e takes it */
        if (bits_of(gate[i]) != bits_of(want[i]) || !(fabs((double)gate[i] - exact) <= slack))
            fail_msg("%s gelu_mul: %a gives %a, scalar %a, expected %a", k->isa, (double)x[i], (double)gate[i],
                     (double)want[i], exact);
    }
}

static void test_gelu(void **unused) {
    (void)unused;
    static const float edges[] = {0, -0.0f, 1, -1, 10, -10, -5.5f, 1e30f, -1e30f, 0x1p-140f, INFINITY, -INFINITY, NAN};
    guarded x = guarded_new(64 * 4);
    EACH_TABLE(k) {
        float values[64];
        for (size_t n = 0; n <= 64; n++) {
            for (size_t i = 0; i < n; i++) values[i] = (draw(PLAIN) - draw(PLAIN)) * 3;
            check_gelu(k, values, n, &x);
        }
        check_gelu(k, edges, sizeof edges / sizeof *edges, &x);
    }
    guarded_free(&x);
}

/* ---- what passes over activations ---- */

static void check_scale_max(const obm_kernels *k, size_t n, guarded *gx) {
    float *x = at_end(gx, n * 4), want[301];
    fill(x, n, PLAIN | ZEROS);
    if (n > 3) x[n - 3] = -INFINITY;
    for (size_t largest = 0; largest <= n; largest += 1 + largest / 9) {
        float most = -INFINITY;
        if (largest < n) x[largest] = 7 + (float)largest;
        for (size_t i = 0; i < n; i++) {
            want[i] = x[i] * 0.3f;
            most = want[i] > most ? want[i] : most;
        }
        assert_true(k->scale_max(x, 0.3f, n) == most);
        assert_memory_equal(x, want, n * 4);
    }
    if (!n) return;
    x[n / 2] = NAN; /* stays where it is */
    (void)k->scale_max(x, 2, n);
    assert_true(isnan(x[n / 2]));
}

static void check_rotate(const obm_kernels *k, size_t pairs, guarded *gx, guarded *gc) {
    float *x = at_end(gx, 2 * pairs * 4), *c = at_end(gc, pairs * 4), s[150] = {0}, want[300];
    fill(x, 2 * pairs, PLAIN | ZEROS);
    fill(c, pairs, PLAIN | ZEROS);
    fill(s, pairs, PLAIN | ZEROS);
    for (size_t i = 0; i < pairs; i++) {
        float ac = x[i] * c[i], bs = x[i + pairs] * s[i], bc = x[i + pairs] * c[i], as = x[i] * s[i];
        want[i] = ac - bs;
        want[i + pairs] = bc + as;
    }
    k->rotate(x, c, s, pairs);
    assert_memory_equal(x, want, 2 * pairs * 4);
}

static void check_norm(const obm_kernels *k, size_t n, guarded *gx, guarded *gw) {
    float *x = at_end(gx, n * 4), *w = at_end(gw, n * 4), want[300], out[301] = {0};
    fill(x, n, PLAIN | ZEROS);
    fill(w, n, PLAIN | ZEROS);
    for (size_t i = 0; i < n; i++) {
        float weight = w[i] + 1, value = x[i] * 0.7f;
        want[i] = weight * value;
    }
    out[n] = -77;
    k->norm_mul(out, x, w, 0.7f, 1, n);
    assert_memory_equal(out, want, n * 4);
    assert_true(out[n] == -77);
    k->norm_mul(x, x, w, 0.7f, 1, n);
    assert_memory_equal(x, want, n * 4);
}

static void test_passes(void **unused) {
    (void)unused;
    guarded x = guarded_new(302 * 4), w = guarded_new(302 * 4);
    EACH_TABLE(k) {
        for (size_t n = 0; n <= 300; n++) {
            check_scale_max(k, n, &x);
            check_norm(k, n, &x, &w);
            if (n <= 150) check_rotate(k, n, &x, &w);
        }
    }
    guarded_free(&x);
    guarded_free(&w);
}

/* Weighted sums of rows: axpy_f32 row by row. */
static void check_mix(const obm_kernels *k, size_t count, size_t n, guarded *gw, guarded *gx) {
    size_t ld = n + 1;
    float *rows = at_end(gx, count ? ((count - 1) * ld + n) * 4 : 0), *w = at_end(gw, count * 4), out[302], want[301];
    fill(rows, count ? (count - 1) * ld + n : 0, PLAIN | ZEROS);
    fill(w, count, PLAIN | ZEROS);
    for (size_t i = 0; i < n; i++) out[i] = want[i] = (float)i;
    out[n] = -77;
    k->mix_rows(out, w, rows, ld, count, n);
    for (size_t p = 0; p < count; p++) scalar_table()->axpy_f32(want, w[p], rows + p * ld, n);
    assert_memory_equal(out, want, n * 4);
    assert_true(out[n] == -77);
}

static void test_mix_rows(void **unused) {
    (void)unused;
    guarded w = guarded_new(9 * 4), x = guarded_new(9 * 302 * 4);
    EACH_TABLE(k) {
        for (size_t n = 0; n <= 300; n++) check_mix(k, 5, n, &w, &x);
        for (size_t count = 0; count <= 9; count++) check_mix(k, count, 64, &w, &x);
    }
    guarded_free(&w);
    guarded_free(&x);
}

/* Packed strips hold the rows, and zeros behind them; products are within the bound, and have the bits of a call for
 * one vector and one strip alone; what lies behind the results stays as it was. */
static void check_gemm(const obm_kernels *k, size_t rows, size_t tokens, size_t n, guarded *gw, guarded *gp,
                       guarded *gx) {
    enum { MAX_TOKENS = 15, LDY = 70 };
    size_t ld = n + 3, ldx = n + 2, strips = (rows + 31) / 32;
    float *w = at_end(gw, ((rows - 1) * ld + n) * 4), *packed = at_end(gp, strips * 32 * n * 4);
    float *x = at_end(gx, ((tokens - 1) * ldx + n) * 4), y[MAX_TOKENS * LDY], alone[32];
    fill(w, (rows - 1) * ld + n, PLAIN | ZEROS);
    fill(x, (tokens - 1) * ldx + n, PLAIN | ZEROS);
    for (size_t s = 0; s < strips; s++)
        k->gemm_pack(packed + s * 32 * n, w + s * 32 * ld, ld, rows - s * 32 < 32 ? rows - s * 32 : 32, n);
    for (size_t r = 0; r < strips * 32; r++)
        for (size_t i = 0; i < n; i++)
            assert_true(bits_of(packed[(r / 16 * n + i) * 16 + r % 16]) == bits_of(r < rows ? w[r * ld + i] : 0));
    for (size_t i = 0; i < MAX_TOKENS * LDY; i++) y[i] = -77;
    k->gemm(y, LDY, packed, strips, x, ldx, tokens, n);
    for (size_t i = 0; i < MAX_TOKENS * LDY; i++) {
        size_t t = i / LDY, r = i % LDY;
        double sum = 0, magnitude = 0;
        if (t >= tokens || r >= strips * 32) {
            assert_true(y[i] == -77);
            continue;
        }
        if (r % 32 == 0) k->gemm(alone, 32, packed + r * n, 1, x + t * ldx, ldx, 1, n);
        assert_true(bits_of(alone[r % 32]) == bits_of(y[i]));
        for (size_t c = 0; r < rows && c < n; c++) {
            sum += (double)w[r * ld + c] * (double)x[t * ldx + c];
            magnitude += fabs((double)w[r * ld + c] * (double)x[t * ldx + c]);
        }
        if (!(fabs(y[i] - sum) <= (double)n * 0x1p-23 * magnitude))
            fail_msg("%s gemm: row %zu, vector %zu of %zu, n %zu: %.9g, expected %.9g", k->isa, r, t, tokens, n,
                     (double)y[i], sum);
    }
}

static void test_gemm(void **unused) {
    (void)unused;
    guarded w = guarded_new(64 * 700 * 4), packed = guarded_new(64 * 700 * 4), x = guarded_new(15 * 700 * 4);
    EACH_TABLE(k) {
        for (size_t n = 0; n <= 40; n++) check_gemm(k, 32, 3, n, &w, &packed, &x);
        for (size_t tokens = 1; tokens <= 15; tokens++) check_gemm(k, 64 - tokens, tokens, 23, &w, &packed, &x);
        check_gemm(k, 64, 9, 256, &w, &packed, &x);
        check_gemm(k, 33, 7, 600, &w, &packed, &x);
    }
    guarded_free(&w);
    guarded_free(&packed);
    guarded_free(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),   cmocka_unit_test(test_widen_all),
        cmocka_unit_test(test_narrow),   cmocka_unit_test(test_exact),
        cmocka_unit_test(test_merging),  cmocka_unit_test(test_above_position),
        cmocka_unit_test(test_nonfinite_position),
        cmocka_unit_test(test_rows),     cmocka_unit_test(test_batch),
        cmocka_unit_test(test_gemm),     cmocka_unit_test(test_exp),
        cmocka_unit_test(test_gelu),     cmocka_unit_test(test_passes),
        cmocka_unit_test(test_mix_rows), cmocka_unit_test(test_unaligned_inputs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
