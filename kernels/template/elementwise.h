/*
 * Bodies of the element-by-element kernels and the 16-lane reductions.  Whole vectors here, the rest by the scalar
 * entries, so that nothing past n is read or written.
 *
 *   FN              attributes of every function (target)
 *   NAME(op)        the function's name
 *   V, VL           f32 vector, its lanes (a multiple of 8)
 *   LOAD(p) STORE(p, v) SET1(a) ADD SUB MUL
 *   LOAD_BF16(p) LOAD_F16(p)   VL halves widened;   STORE_BF16(p, v) STORE_F16(p, v) narrow and store VL halves
 *   GE_ZERO(v) IS_ZERO(v) NOT_FINITE(v)   one bit per lane, lane 0 lowest
 *   SIGNED(a, bits)                       a where the lane's bit is 1, else -a
 *   D, DL           f64 vector, its lanes;   LOAD_D(p) widens DL floats, ADD_D MUL_D ABS_D SET1_D STORE_D
 *   NARROW_D(p, v)  stores DL floats
 *   EACH_D(X)       X(0) X(1) ... X(16 / DL - 1)
 */

FN static void NAME(bf16_to_f32)(float *dst, const uint16_t *src, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(dst + i, LOAD_BF16(src + i));
    obm__scalar_bf16_to_f32(dst + i, src + i, n - i);
}

FN static void NAME(f16_to_f32)(float *dst, const uint16_t *src, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(dst + i, LOAD_F16(src + i));
    obm__scalar_f16_to_f32(dst + i, src + i, n - i);
}

FN static void NAME(f32_to_bf16)(uint16_t *dst, const float *src, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE_BF16(dst + i, LOAD(src + i));
    obm__scalar_f32_to_bf16(dst + i, src + i, n - i);
}

FN static void NAME(f32_to_f16)(uint16_t *dst, const float *src, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE_F16(dst + i, LOAD(src + i));
    obm__scalar_f32_to_f16(dst + i, src + i, n - i);
}

FN static void NAME(sub_f32)(float *d, const float *a, const float *b, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(d + i, SUB(LOAD(a + i), LOAD(b + i)));
    obm__scalar_sub_f32(d + i, a + i, b + i, n - i);
}

FN static void NAME(sub_bf16)(float *d, const uint16_t *a, const uint16_t *b, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) STORE(d + i, SUB(LOAD_BF16(a + i), LOAD_BF16(b + i)));
    obm__scalar_sub_bf16(d + i, a + i, b + i, n - i);
}

FN static void NAME(axpy_f32)(float *y, float a, const float *x, size_t n) {
    size_t i = 0;
    V scale = SET1(a);
    for (; i + VL <= n; i += VL) STORE(y + i, ADD(LOAD(y + i), MUL(scale, LOAD(x + i))));
    obm__scalar_axpy_f32(y + i, a, x + i, n - i);
}

FN static void NAME(mix_f32)(float *out, const float *const *c, const double *w, size_t count, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        D weight = SET1_D(w[0]);
#define X(k) D sum##k = MUL_D(weight, LOAD_D(c[0] + i + k * DL));
        EACH_D(X)
#undef X
        for (size_t j = 1; j < count; j++) {
            weight = SET1_D(w[j]);
#define X(k) sum##k = ADD_D(sum##k, MUL_D(weight, LOAD_D(c[j] + i + k * DL)));
            EACH_D(X)
#undef X
        }
#define X(k) NARROW_D(out + i + k * DL, sum##k);
        EACH_D(X)
#undef X
    }
    for (; i < n; i++) {
        double sum = w[0] * (double)c[0][i];
        for (size_t j = 1; j < count; j++) sum += w[j] * (double)c[j][i];
        out[i] = (float)sum;
    }
}

FN static size_t NAME(find_nonfinite)(const float *x, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        unsigned bits = NOT_FINITE(LOAD(x + i));
        if (bits) return i + (size_t)__builtin_ctz(bits);
    }
    return i + obm__scalar_find_nonfinite(x + i, n - i);
}

FN static size_t NAME(find_above)(const float *x, float a, size_t n) {
    const V limit = SET1(a);
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        unsigned bits = NOT_AT_MOST(LOAD(x + i), limit);
        if (bits) return i + (size_t)__builtin_ctz(bits);
    }
    return i + obm__scalar_find_above(x + i, a, n - i);
}

FN static size_t NAME(count_zero)(const float *x, size_t n) {
    size_t i = 0, count = 0;
    for (; i + VL <= n; i += VL) count += (size_t)__builtin_popcount(IS_ZERO(LOAD(x + i)));
    return count + obm__scalar_count_zero(x + i, n - i);
}

/* memcpy of VL / 8 bytes is one store; the hosts of all vector tables are little-endian. */
FN static void NAME(sign_pack)(uint8_t *bits, const float *d, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        unsigned lanes = GE_ZERO(LOAD(d + i));
        memcpy(bits + i / 8, &lanes, VL / 8);
    }
    obm__scalar_sign_pack(bits + i / 8, d + i, n - i);
}

FN static void NAME(sign_axpy)(float *y, const uint8_t *bits, float alpha, size_t n) {
    size_t i = 0;
    for (; i + VL <= n; i += VL) {
        unsigned lanes = 0;
        memcpy(&lanes, bits + i / 8, VL / 8);
        STORE(y + i, ADD(LOAD(y + i), SIGNED(alpha, lanes)));
    }
    obm__scalar_sign_axpy(y + i, bits + i / 8, alpha, n - i);
}

/* Accumulator k holds lanes k * DL .. k * DL + DL - 1 of the 16; the loop is whole 16s, the rest adds to the lowest
 * lanes. */
FN static double NAME(abs_sum)(const float *x, size_t n) {
    size_t i = 0;
    double lane[16];
#define X(k) D sum##k = SET1_D(0);
    EACH_D(X)
#undef X
    for (; i + 16 <= n; i += 16) {
#define X(k) sum##k = ADD_D(sum##k, ABS_D(LOAD_D(x + i + k * DL)));
        EACH_D(X)
#undef X
    }
#define X(k) STORE_D(lane + k * DL, sum##k);
    EACH_D(X)
#undef X
    float end[16] = {0};
    memcpy(end, x + i, (n - i) * sizeof *x);
    for (size_t j = 0; i + j < n; j++) lane[j] += fabs((double)end[j]);
    return obm__lane_sum(lane);
}

/* The differences pass through d, which never leaves the first cache. */
FN static double NAME(sign_sum_bf16)(uint8_t *bits, const uint16_t *a, const uint16_t *b, size_t n) {
    size_t i = 0;
    float d[16];
    double lane[16];
#define X(k) D sum##k = SET1_D(0);
    EACH_D(X)
#undef X
    for (; i + 16 <= n; i += 16) {
        for (size_t j = 0; j < 16; j += VL) {
            V difference = SUB(LOAD_BF16(a + i + j), LOAD_BF16(b + i + j));
            unsigned lanes = GE_ZERO(difference);
            STORE(d + j, difference);
            memcpy(bits + (i + j) / 8, &lanes, VL / 8);
        }
#define X(k) sum##k = ADD_D(sum##k, ABS_D(LOAD_D(d + k * DL)));
        EACH_D(X)
#undef X
    }
#define X(k) STORE_D(lane + k * DL, sum##k);
    EACH_D(X)
#undef X
    obm__scalar_sub_bf16(d, a + i, b + i, n - i);
    obm__scalar_sign_pack(bits + i / 8, d, n - i);
    for (size_t j = 0; i + j < n; j++) lane[j] += fabs((double)d[j]);
    return obm__lane_sum(lane);
}

FN static double NAME(dot)(const float *x, const float *y, size_t n) {
    size_t i = 0;
    double lane[16];
#define X(k) D sum##k = SET1_D(0);
    EACH_D(X)
#undef X
    for (; i + 16 <= n; i += 16) {
#define X(k) sum##k = ADD_D(sum##k, MUL_D(LOAD_D(x + i + k * DL), LOAD_D(y + i + k * DL)));
        EACH_D(X)
#undef X
    }
#define X(k) STORE_D(lane + k * DL, sum##k);
    EACH_D(X)
#undef X
    float end_x[16] = {0}, end_y[16] = {0};
    memcpy(end_x, x + i, (n - i) * sizeof *x);
    memcpy(end_y, y + i, (n - i) * sizeof *y);
    for (size_t j = 0; i + j < n; j++) {
        double product = (double)end_x[j] * (double)end_y[j];
        lane[j] += product;
    }
    return obm__lane_sum(lane);
}
