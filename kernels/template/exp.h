/*
 * The exponential and what a model does with it, and the weighted sum of rows that follows a softmax.  The same
 * operations in the same order as in scalar.c, so the same bits on every ISA.
 *
 *   DIV(a, b)   AT_LEAST(v, a) AT_MOST(v, a) v where it is NaN   POWER(n) 2^n of integers in f32, -126 <= n <= 127
 */
FN static inline V NAME(exp_vector)(V x) {
    const V magic = SET1(OBM__EXP_MAGIC);
    x = AT_MOST(AT_LEAST(x, SET1(OBM__EXP_LEAST)), SET1(OBM__EXP_MOST));
    V n = SUB(FMA(x, SET1(OBM__EXP_LOG2E), magic), magic), half = SUB(FMA(n, SET1(0.5f), magic), magic);
    V r = FMA(n, SET1(-OBM__EXP_LN2_LOW), FMA(n, SET1(-OBM__EXP_LN2), x));
    V p = FMA(SET1(1.0f / 5040), r, SET1(1.0f / 720));
    p = FMA(p, r, SET1(1.0f / 120));
    p = FMA(p, r, SET1(1.0f / 24));
    p = FMA(p, r, SET1(1.0f / 6));
    p = FMA(p, r, SET1(0.5f));
    p = FMA(p, r, SET1(1));
    p = FMA(p, r, SET1(1));
    return MUL(MUL(p, POWER(half)), POWER(SUB(n, half)));
}

FN static inline V NAME(silu_vector)(V gate, V up) {
    return MUL(DIV(gate, ADD(SET1(1), NAME(exp_vector)(SUB(SET1(0), gate)))), up);
}

FN static void NAME(silu_mul)(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(gate + i, NAME(silu_vector)(LOAD(gate + i), LOAD(up + i)));
    obm__scalar_silu_mul(gate + i, up + i, n - i);
}

FN static double NAME(exp_sum)(float *x, float max, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(x + i, NAME(exp_vector)(SUB(LOAD(x + i), SET1(max))));
    obm__scalar_exp_minus(x + i, max, n - i);
    return NAME(abs_sum)(x, n);
}

/* Eight vectors of the result stay in registers. */
#define MIX_EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define MIX_LOAD(k) V s##k = LOAD(out + i + k * VL);
#define MIX_ADD(k) s##k = ADD(s##k, MUL(weight, LOAD(row + k * VL)));
#define MIX_STORE(k) STORE(out + i + k * VL, s##k);
FN static void NAME(mix_rows)(float *out, const float *w, const float *rows, size_t ld, size_t count, size_t n) {
    size_t i = 0;
    for (; i + 8 * VL <= n; i += 8 * VL) {
        const float *row = rows + i;
        MIX_EACH(MIX_LOAD)
        for (size_t p = 0; p < count; p++, row += ld) {
            V weight = SET1(w[p]);
            MIX_EACH(MIX_ADD)
        }
        MIX_EACH(MIX_STORE)
    }
    for (size_t p = 0; i < n && p < count; p++) NAME(axpy_f32)(out + i, w[p], rows + p * ld + i, n - i);
}
