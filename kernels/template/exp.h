/*
 * The exponential and what a model does with it, the weighted sum of rows that follows a softmax, and what else passes
 * over activations.  The same operations in the same order as in scalar.c, so the same bits on every ISA.
 *
 *   DIV(a, b)   AT_LEAST(v, a) AT_MOST(v, a) v where it is NaN
 *   TIMES_POWER(v, n)   v * 2^n rounded once, of integers in f32, where there is an instruction for it, or
 *   POWER(n)            2^n of integers in f32, -126 <= n <= 127
 */
#ifndef TIMES_POWER
#define TIMES_POWER(v, n) NAME(times_power)(v, n)
/* Two halves: 2^n may be denormal or 2^128. */
FN static inline V NAME(times_power)(V v, V n) {
    const V magic = SET1(OBM__EXP_MAGIC);
    V half = SUB(FMA(n, SET1(0.5f), magic), magic);
    return MUL(MUL(v, POWER(half)), POWER(SUB(n, half)));
}
#endif

FN static inline V NAME(exp_vector)(V x) {
    const V magic = SET1(OBM__EXP_MAGIC);
    x = AT_MOST(AT_LEAST(x, SET1(OBM__EXP_LEAST)), SET1(OBM__EXP_MOST));
    V n = SUB(FMA(x, SET1(OBM__EXP_LOG2E), magic), magic);
    V r = FMA(n, SET1(-OBM__EXP_LN2_LOW), FMA(n, SET1(-OBM__EXP_LN2), x));
    V p = FMA(SET1(1.0f / 5040), r, SET1(1.0f / 720));
    p = FMA(p, r, SET1(1.0f / 120));
    p = FMA(p, r, SET1(1.0f / 24));
    p = FMA(p, r, SET1(1.0f / 6));
    p = FMA(p, r, SET1(0.5f));
    p = FMA(p, r, SET1(1));
    p = FMA(p, r, SET1(1));
    return TIMES_POWER(p, n);
}

FN static inline V NAME(silu_vector)(V gate, V up) {
    return MUL(DIV(gate, ADD(SET1(1), NAME(exp_vector)(SUB(SET1(0), gate)))), up);
}

FN static void NAME(silu_mul)(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(gate + i, NAME(silu_vector)(LOAD(gate + i), LOAD(up + i)));
    obm__scalar_silu_mul(gate + i, up + i, n - i);
}

FN static inline V NAME(gelu_vector)(V x, V up) {
    V slope = FMA(MUL(x, x), SET1(OBM__GELU_CUBE), SET1(OBM__GELU_SLOPE));
    return MUL(DIV(x, ADD(SET1(1), NAME(exp_vector)(MUL(x, slope)))), up);
}

FN static void NAME(gelu_mul)(float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(gate + i, NAME(gelu_vector)(LOAD(gate + i), LOAD(up + i)));
    obm__scalar_gelu_mul(gate + i, up + i, n - i);
}

/* Accumulator k holds lanes k * DL .. k * DL + DL - 1 of abs_sum's 16; the rest goes through a copy in whole vectors.
 */
FN static double NAME(exp_sum)(float *x, float max, size_t n) {
    const V most = SET1(max);
    size_t i = 0;
    float end[16] = {0};
    double lane[16];
#define X(k) D sum##k = SET1_D(0);
    EACH_D(X)
#undef X
    for (; i + 16 <= n; i += 16) {
        for (size_t j = i; j < i + 16; j += VL) STORE(x + j, NAME(exp_vector)(SUB(LOAD(x + j), most)));
#define X(k) sum##k = ADD_D(sum##k, LOAD_D(x + i + k * DL));
        EACH_D(X)
#undef X
    }
#define X(k) STORE_D(lane + k * DL, sum##k);
    EACH_D(X)
#undef X
    memcpy(end, x + i, (n - i) * sizeof *x);
    for (size_t j = 0; j < n - i; j += VL) STORE(end + j, NAME(exp_vector)(SUB(LOAD(end + j), most)));
    memcpy(x + i, end, (n - i) * sizeof *x);
    for (size_t j = 0; i + j < n; j++) lane[j] += (double)end[j];
    return obm__lane_sum(lane);
}

/* In two chains, since each comparison waits for the one before. */
FN static float NAME(scale_max)(float *x, float scale, size_t n) {
    const V factor = SET1(scale);
    V a = SET1(-INFINITY), b = a;
    float lane[VL];
    size_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        V u = MUL(LOAD(x + i), factor), v = MUL(LOAD(x + i + VL), factor);
        STORE(x + i, u);
        STORE(x + i + VL, v);
        a = AT_LEAST(a, u);
        b = AT_LEAST(b, v);
    }
    STORE(lane, AT_LEAST(a, b));
    float max = obm__scalar_scale_max(x + i, scale, n - i);
    for (size_t j = 0; j < VL; j++) max = lane[j] > max ? lane[j] : max;
    return max;
}

/* Vectors of the result that stay in registers: eight, or four, since head dimensions may be few vectors. */
#define MIX_EACH_8(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define MIX_EACH_4(X) X(0) X(1) X(2) X(3)
#define MIX_LOAD(k) V s##k = LOAD(out + i + k * VL);
#define MIX_ADD(k) s##k = ADD(s##k, MUL(weight, LOAD(row + k * VL)));
#define MIX_STORE(k) STORE(out + i + k * VL, s##k);
#define MIX_BLOCKS(vectors)                                                          \
    for (; i + vectors * VL <= n; i += vectors * VL) {                               \
        const float *row = rows + i;                                                 \
        MIX_EACH_##vectors(MIX_LOAD) for (size_t p = 0; p < count; p++, row += ld) { \
            V weight = SET1(w[p]);                                                   \
            MIX_EACH_##vectors(MIX_ADD)                                              \
        }                                                                            \
        MIX_EACH_##vectors(MIX_STORE)                                                \
    }
FN static void NAME(mix_rows)(float *out, const float *w, const float *rows, size_t ld, size_t count, size_t n) {
    size_t i = 0;
    MIX_BLOCKS(8)
    MIX_BLOCKS(4)
    for (size_t p = 0; i < n && p < count; p++) NAME(axpy_f32)(out + i, w[p], rows + p * ld + i, n - i);
}

FN static void NAME(rotate)(float *x, const float *cosine, const float *sine, size_t pairs) {
    size_t i = 0;
    for (; i + VL <= pairs; i += VL) {
        V a = LOAD(x + i), b = LOAD(x + i + pairs), c = LOAD(cosine + i), s = LOAD(sine + i);
        STORE(x + i, SUB(MUL(a, c), MUL(b, s)));
        STORE(x + i + pairs, ADD(MUL(b, c), MUL(a, s)));
    }
    obm__scalar_rotate(x + i, pairs, cosine + i, sine + i, pairs - i);
}

FN static void NAME(norm_mul)(float *out, const float *x, const float *weight, float scale, float offset, size_t n) {
    const V factor = SET1(scale), more = SET1(offset);
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(out + i, MUL(ADD(LOAD(weight + i), more), MUL(LOAD(x + i), factor)));
    obm__scalar_norm_mul(out + i, x + i, weight + i, scale, offset, n - i);
}
