/*
 * Strips of weights times many vectors: two vectors of rows by six of activations in registers, every activation
 * broadcast from where it lies.  A result's sums run over the columns one after the other, whatever it is computed
 * beside.
 *
 *   GEMM_PACK                        the table's gemm_pack;   the rest as in elementwise.h and rows.h
 */
#define GEMM_ZERO(t) V a##t = SET1(0), b##t = a##t;
#define GEMM_STEP(t)                    \
    {                                   \
        V value = SET1(x[t * ldx + j]); \
        a##t = FMA(u, value, a##t);     \
        b##t = FMA(v, value, b##t);     \
    }
#define GEMM_STORE(t)         \
    STORE(y + t * ldy, a##t); \
    STORE(y + t * ldy + VL, b##t);
#define GEMM_ADD(t)                                   \
    STORE(y + t * ldy, ADD(LOAD(y + t * ldy), a##t)); \
    STORE(y + t * ldy + VL, ADD(LOAD(y + t * ldy + VL), b##t));
#define GEMM_TILE(name, EACH)                                                                                      \
    FN static void name(float *y, size_t ldy, const float *w, size_t second, const float *x, size_t ldx, size_t n, \
                        int add) {                                                                                 \
        EACH(GEMM_ZERO)                                                                                            \
        for (size_t j = 0; j < n; j++) {                                                                           \
            V u = LOAD(w + j * OBM__GEMM_HALF), v = LOAD(w + second + j * OBM__GEMM_HALF);                         \
            EACH(GEMM_STEP)                                                                                        \
        }                                                                                                          \
        if (add) {                                                                                                 \
            EACH(GEMM_ADD)                                                                                         \
        } else {                                                                                                   \
            EACH(GEMM_STORE)                                                                                       \
        }                                                                                                          \
    }
#define GEMM_EACH_1(X) X(0)
#define GEMM_EACH_2(X) X(0) X(1)
#define GEMM_EACH_4(X) X(0) X(1) X(2) X(3)
#define GEMM_EACH_6(X) X(0) X(1) X(2) X(3) X(4) X(5)
GEMM_TILE(NAME(gemm_1), GEMM_EACH_1)
GEMM_TILE(NAME(gemm_2), GEMM_EACH_2)
GEMM_TILE(NAME(gemm_4), GEMM_EACH_4)
GEMM_TILE(NAME(gemm_6), GEMM_EACH_6)

FN static void NAME(gemm)(float *y, size_t ldy, const float *packed, size_t strips, const float *x, size_t ldx,
                          size_t tokens, size_t n) {
    const size_t second = VL < OBM__GEMM_HALF ? VL : OBM__GEMM_HALF * n;
    for (size_t t = 0; !n && t < tokens; t++) memset(y + t * ldy, 0, strips * OBM__GEMM_ROWS * sizeof *y);
    for (size_t first = 0, count; first < n; first += count) {
        count = n - first < OBM__GEMM_BLOCK ? n - first : OBM__GEMM_BLOCK;
        for (size_t r = 0; r < strips * OBM__GEMM_ROWS; r += 2 * VL) {
            const float *w = packed + r * n + first * OBM__GEMM_HALF, *from = x + first;
            float *to = y + r;
            size_t t = 0;
            for (; t + 6 <= tokens; t += 6)
                NAME(gemm_6)(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
            for (; t + 4 <= tokens; t += 4)
                NAME(gemm_4)(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
            for (; t + 2 <= tokens; t += 2)
                NAME(gemm_2)(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
            if (t < tokens) NAME(gemm_1)(to + t * ldy, ldy, w, second, from + t * ldx, ldx, count, first > 0);
        }
    }
}
