/* gemm_pairs of every table that this machine can run, and the tiles of AMX: what the system is asked, and what is left
 * behind.  Buffers end at an unmapped page. */
#include "kernel_fixture.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

enum { MAX_TOKENS = 67, MAX_ROWS = 64, MAX_PAIRS = 600, LDY = 70, BOTH_NAN = 0x7fc07fc0 };

/* bf16 that are not denormal, as pairs: which may count as 0. */
static void fill_pairs(uint32_t *pairs, size_t n) {
    for (size_t i = 0; i < n; i++) pairs[i] = (bits_of(draw(PLAIN | ZEROS)) & 0xffff0000) | bits_of(draw(PLAIN | ZEROS)) >> 16;
}

typedef struct operands {
    guarded w, packed, x;
} operands;

static operands operands_new(void) {
    return (operands){.w = guarded_new(MAX_ROWS * (MAX_PAIRS + 3) * 4),
                      .packed = guarded_new(MAX_ROWS * MAX_PAIRS * 4),
                      .x = guarded_new(MAX_TOKENS * (MAX_PAIRS + 2) * 4)};
}
static void operands_free(operands *o) {
    guarded_free(&o->w);
    guarded_free(&o->packed);
    guarded_free(&o->x);
}

/* Products are within the bound, and have the bits of a call for one vector and one strip alone; what lies behind the results
 * stays as it was, and what lies between the vectors, NaN, is not looked at. */
static void check_pairs(const obm_kernels *k, size_t rows, size_t tokens, size_t n, const operands *o) {
    size_t ld = n + 3, ldx = n + 2, strips = (rows + 31) / 32;
    uint32_t *w = at_end(&o->w, ((rows - 1) * ld + n) * 4), *packed = at_end(&o->packed, strips * 32 * n * 4);
    uint32_t *x = at_end(&o->x, ((tokens - 1) * ldx + n) * 4);
    float y[MAX_TOKENS * LDY], alone[32];
    fill_pairs(w, (rows - 1) * ld + n);
    fill_pairs(x, (tokens - 1) * ldx + n);
    for (size_t t = 1; t < tokens; t++) x[t * ldx - 2] = x[t * ldx - 1] = BOTH_NAN;
    for (size_t s = 0; s < strips; s++)
        k->gemm_pack((float *)packed + s * 32 * n, (const float *)w + s * 32 * ld, ld,
                     rows - s * 32 < 32 ? rows - s * 32 : 32, n);
    for (size_t i = 0; i < MAX_TOKENS * LDY; i++) y[i] = -77;
    k->gemm_pairs(y, LDY, packed, strips, x, ldx, tokens, n);
    for (size_t i = 0; i < MAX_TOKENS * LDY; i++) {
        size_t t = i / LDY, r = i % LDY;
        double sum = 0, magnitude = 0;
        if (t >= tokens || r >= strips * 32) {
            assert_true(y[i] == -77);
            continue;
        }
        if (r % 32 == 0) k->gemm_pairs(alone, 32, packed + r * n, 1, x + t * ldx, ldx, 1, n);
        assert_true(bits_of(alone[r % 32]) == bits_of(y[i]));
        for (size_t c = 0; r < rows && c < 2 * n; c++) {
            uint32_t wide_w = w[r * ld + c / 2] << (c % 2 ? 0 : 16), wide_x = x[t * ldx + c / 2] << (c % 2 ? 0 : 16);
            double product = (double)from_bits(wide_w & 0xffff0000) * (double)from_bits(wide_x & 0xffff0000);
            sum += product;
            magnitude += fabs(product);
        }
        if (!(fabs(y[i] - sum) <= 2 * (double)n * 0x1p-23 * magnitude))
            fail_msg("%s gemm_pairs: row %zu, vector %zu of %zu, n %zu: %.9g, expected %.9g", k->isa, r, t, tokens, n,
                     (double)y[i], sum);
    }
}

/* In a process of its own, where nobody has asked for tiles yet. */
static void in_child(void (*run)(void)) {
    int status = -1;
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) {
        run();
        fflush(stdout);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

/* Which bits two tables' products of the same numbers have. */
enum { TOKENS = 35, PAIRS = 300 };
typedef struct products {
    float of[2][TOKENS * 32];
} products;
static bool equal_products(const char *a, const char *b) {
    static products p;
    static uint32_t w[32 * PAIRS], packed[32 * PAIRS], x[TOKENS * PAIRS];
    const obm_kernels *tables[] = {obm_kernels_find(a), obm_kernels_find(b)};
    fill_pairs(w, 32 * PAIRS);
    fill_pairs(x, TOKENS * PAIRS);
    tables[0]->gemm_pack((float *)packed, (const float *)w, PAIRS, 32, PAIRS);
    for (size_t i = 0; i < 2; i++) tables[i]->gemm_pairs(p.of[i], 32, packed, 1, x, PAIRS, TOKENS, PAIRS);
    return !memcmp(p.of[0], p.of[1], sizeof p.of[0]);
}

#define REQUIRE(x)                                                \
    do {                                                          \
        if (!(x)) {                                               \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); \
            _exit(1);                                             \
        }                                                         \
    } while (0)

#if defined(__x86_64__)
#include <cpuid.h>

/* State components that are not as at the start: 17 and 18 are tiles.  0 where the CPU does not say. */
static unsigned in_use(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(13, 1, &a, &b, &c, &d) || !(a & 4)) return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1));
    return a;
}
#else
static unsigned in_use(void) { return 0; }
#endif

/* Sums of tiles are in another order than those of vectors: that their bits differ shows who has multiplied. */
static void multiply_by_tiles(void) {
    REQUIRE(!equal_products("avx512", "amx"));
    REQUIRE(!(in_use() & 3u << 17));
}

/* No room for tiles on the stack of signals: Linux refuses them, and the instruction on vectors does it, now and later. */
static void multiply_refused(void) {
    static uint8_t stack[8192];
    const stack_t small = {.ss_sp = stack, .ss_size = sizeof stack}, none = {.ss_flags = SS_DISABLE};
    REQUIRE(!sigaltstack(&small, NULL));
    REQUIRE(equal_products("avx512", "amx"));
    REQUIRE(!sigaltstack(&none, NULL));
    REQUIRE(equal_products("avx512", "amx"));
}

/* Tiles are a thread's own: several at once, with different numbers of vectors, have the bits of one. */
static uint32_t shared_packed[32 * PAIRS], shared_x[TOKENS * PAIRS];
static float shared_y[TOKENS * 32];
static void *multiply_again(void *first) {
    const obm_kernels *k = obm_kernels_find("amx");
    size_t from = *(const size_t *)first;
    float y[TOKENS * 32];
    for (int i = 0; i < 20; i++) {
        k->gemm_pairs(y, 32, shared_packed, 1, shared_x + from * PAIRS, PAIRS, TOKENS - from, PAIRS);
        if (memcmp(y, shared_y + from * 32, (TOKENS - from) * 32 * sizeof *y)) return first;
    }
    return NULL;
}
static void multiply_in_threads(void) {
    static const size_t first[] = {0, 3, 20};
    pthread_t threads[3];
    void *failed;
    fill_pairs(shared_packed, 32 * PAIRS);
    fill_pairs(shared_x, TOKENS * PAIRS);
    obm_kernels_find("amx")->gemm_pairs(shared_y, 32, shared_packed, 1, shared_x, PAIRS, TOKENS, PAIRS);
    for (size_t i = 0; i < 3; i++) REQUIRE(!pthread_create(&threads[i], NULL, multiply_again, (void *)(uintptr_t)&first[i]));
    for (size_t i = 0; i < 3; i++) REQUIRE(!pthread_join(threads[i], &failed) && !failed);
}

static void test_tiles(void **unused) {
    (void)unused;
    if (!obm_kernels_find("amx")) {
        print_message("tiles: NOT RUN on this machine\n");
        return;
    }
    in_child(multiply_refused);
    in_child(multiply_by_tiles);
    in_child(multiply_in_threads);
    print_message("tiles: tested, given and refused\n");
}

static void test_gemm_pairs(void **unused) {
    (void)unused;
    operands o = operands_new();
    EACH_TABLE(k) {
        for (size_t n = 0; n <= 40; n++) check_pairs(k, 32, 3, n, &o);
        for (size_t n = 1; n <= 40; n++) check_pairs(k, 32, 19, n, &o);
        for (size_t tokens = 1; tokens <= MAX_TOKENS; tokens++) check_pairs(k, 1 + tokens * 37 % MAX_ROWS, tokens, 23, &o);
        check_pairs(k, 64, 9, 256, &o);
        check_pairs(k, 64, 64, 256, &o);
        check_pairs(k, 33, 7, 600, &o);
        check_pairs(k, 33, 50, 600, &o);
        print_message("%s: products of bf16 %s\n", k->isa, obm_kernels_pairs_gain(k) ? "by an instruction" : "in portable C");
    }
    operands_free(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tiles), cmocka_unit_test(test_gemm_pairs)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
