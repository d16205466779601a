/*
 * gemm of bf16: an instruction multiplies pairs of 16-bit numbers and adds both products to an f32.  Two vectors of rows
 * by eight of activations in registers, else as gemm.h.  For AVX-512 with its BF16 extension.
 */
#define PAIRS_ZERO(t) __m512 a##t = _mm512_setzero_ps(), b##t = a##t;
#define PAIRS_STEP(t)                                                   \
    {                                                                   \
        __m512bh value = (__m512bh)_mm512_set1_epi32((int)x[t * ldx + j]); \
        a##t = _mm512_dpbf16_ps(a##t, u, value);                        \
        b##t = _mm512_dpbf16_ps(b##t, v, value);                        \
    }
#define PAIRS_TILE(name, EACH)                                                                                         \
    FN_PAIRS static void name(float *y, size_t ldy, const uint32_t *w, size_t second, const uint32_t *x, size_t ldx,   \
                              size_t n, int add) {                                                                     \
        EACH(PAIRS_ZERO)                                                                                               \
        for (size_t j = 0; j < n; j++) {                                                                               \
            __m512bh u = (__m512bh)LOAD_512(w + j * OBM__GEMM_HALF), v = (__m512bh)LOAD_512(w + second + j * OBM__GEMM_HALF); \
            EACH(PAIRS_STEP)                                                                                           \
        }                                                                                                              \
        if (add) {                                                                                                     \
            EACH(GEMM_ADD)                                                                                             \
        } else {                                                                                                       \
            EACH(GEMM_STORE)                                                                                           \
        }                                                                                                              \
    }
#define GEMM_EACH_8(X) GEMM_EACH_4(X) X(4) X(5) X(6) X(7)
PAIRS_TILE(pairs_1, GEMM_EACH_1)
PAIRS_TILE(pairs_2, GEMM_EACH_2)
PAIRS_TILE(pairs_4, GEMM_EACH_4)
PAIRS_TILE(pairs_8, GEMM_EACH_8)

FN_PAIRS static void gemm_pairs(float *y, size_t ldy, const uint32_t *packed, size_t strips, const uint32_t *x, size_t ldx,
                                size_t tokens, size_t n) {
    const size_t second = OBM__GEMM_HALF * n;
    for (size_t t = 0; !n && t < tokens; t++) memset(y + t * ldy, 0, strips * OBM__GEMM_ROWS * sizeof *y);
    for (size_t first = 0, count; first < n; first += count) {
        count = n - first < OBM__GEMM_BLOCK ? n - first : OBM__GEMM_BLOCK;
        for (size_t r = 0; r < strips * OBM__GEMM_ROWS; r += OBM__GEMM_ROWS) {
            const uint32_t *w = packed + r * n + first * OBM__GEMM_HALF, *from = x + first;
            float *to = y + r;
            size_t t = 0;
            for (; t + 8 <= tokens; t += 8) pairs_8(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
            for (; t + 4 <= tokens; t += 4) pairs_4(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
            for (; t + 2 <= tokens; t += 2) pairs_2(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
            if (t < tokens) pairs_1(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
        }
    }
}
