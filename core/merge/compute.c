/* Arithmetic on tensors, element by element in f32, and sums in f64: what a merge method needs in a language without
 * arrays of its own.  One thread; no matrices. */
#include "merge.h"

#define MAX_ARGUMENTS 3
/* Elements of a lane: three lanes of 4 KiB on the stack.  The sums of a dot product are cut there too. */
#define BLOCK 1024

typedef struct operation {
    const char *name;
    size_t n;
    void (*apply)(const float *a, const float *b, const float *c, size_t n, float *out);
} operation;

#define DEFINE(name, expression)                                                                  \
    static void op_##name(const float *a, const float *b, const float *c, size_t n, float *out) { \
        (void)b, (void)c;                                                                         \
        for (size_t j = 0; j < n; j++) out[j] = (expression);                                     \
    }
DEFINE(add, a[j] + b[j])
DEFINE(sub, a[j] - b[j])
DEFINE(mul, a[j] * b[j])
DEFINE(div, a[j] / b[j])
DEFINE(min, b[j] < a[j] ? b[j] : a[j])
DEFINE(max, b[j] > a[j] ? b[j] : a[j])
DEFINE(lt, a[j] < b[j] ? 1.0f : 0.0f)
DEFINE(le, a[j] <= b[j] ? 1.0f : 0.0f)
DEFINE(eq, a[j] == b[j] ? 1.0f : 0.0f)
DEFINE(where, a[j] != 0 ? b[j] : c[j])
DEFINE(neg, -a[j])
DEFINE(abs, fabsf(a[j]))
DEFINE(sign, (float)((a[j] > 0) - (a[j] < 0)))
DEFINE(sqrt, sqrtf(a[j]))
DEFINE(exp, expf(a[j]))
DEFINE(log, logf(a[j]))
DEFINE(tanh, tanhf(a[j]))
#undef DEFINE

static const operation operations[] = {
    {"add", 2, op_add}, {"sub", 2, op_sub},   {"mul", 2, op_mul},   {"div", 2, op_div},   {"min", 2, op_min},
    {"max", 2, op_max}, {"lt", 2, op_lt},     {"le", 2, op_le},     {"eq", 2, op_eq},     {"where", 3, op_where},
    {"neg", 1, op_neg}, {"abs", 1, op_abs},   {"sign", 1, op_sign}, {"sqrt", 1, op_sqrt}, {"exp", 1, op_exp},
    {"log", 1, op_log}, {"tanh", 1, op_tanh},
};

static obm_status find_operation(const char *name, size_t n, const operation **out, obm_error *err) {
    const char *names[OBM_COUNT(operations)];
    for (size_t i = 0; i < OBM_COUNT(operations); i++) {
        const operation *o = &operations[i];
        names[i] = o->name;
        if (strcmp(o->name, name)) continue;
        *out = o;
        if (o->n == n) return OBM_OK;
        return obm__fail(err, OBM_E_ARG, "%s takes %zu tensors or numbers, found %zu", name, o->n, n);
    }
    char hint[128];
    return obm__fail(err, OBM_E_NOTFOUND, "no operation \"%.64s\"%s", name,
                     obm__suggest(name, names, OBM_COUNT(operations), hint, sizeof hint));
}

static bool is_scalar(const obm_tensor *t) { return t->ndim == 0; }

/* The argument whose shape the result has: the first that is no scalar, or the first. */
static obm_status common_shape(const char *name, const obm_tensor *args, size_t n, size_t *out, obm_error *err) {
    size_t first = 0;
    while (first + 1 < n && is_scalar(&args[first])) first++;
    if (is_scalar(&args[first])) first = 0;
    for (size_t i = 0; i < n; i++) {
        const obm_tensor *t = &args[i];
        if (!obm__is_float(t->dtype))
            return obm__fail(err, OBM_E_DTYPE, "%s: expected F32, F16, BF16 or F64, found %s", name,
                             obm_dtype_name(t->dtype));
        if (is_scalar(t)) continue;
        if (t->ndim == args[first].ndim && !memcmp(t->shape, args[first].shape, (size_t)t->ndim * sizeof *t->shape))
            continue;
        char a[128], b[128];
        obm__shape_text(&args[first], a, sizeof a);
        obm__shape_text(t, b, sizeof b);
        return obm__fail(err, OBM_E_SHAPE, "%s: expected equal shapes, found %s and %s", name, a, b);
    }
    *out = first;
    return OBM_OK;
}

static obm_status read_block(const obm_tensor *t, int64_t begin, size_t n, float *out, obm_error *err) {
    if (!is_scalar(t)) return obm_tensor_read_f32(t, begin, (int64_t)n, out, err);
    OBM_TRY(obm_tensor_read_f32(t, 0, 1, out, err));
    for (size_t j = 1; j < n; j++) out[j] = out[0];
    return OBM_OK;
}

obm_status obm_tensor_compute(const char *op, const obm_tensor *args, size_t n, size_t *shape_of, float *out,
                              obm_error *err) {
    const operation *o = NULL;
    size_t first = 0;
    OBM_TRY(find_operation(op, n, &o, err));
    OBM_TRY(common_shape(op, args, n, &first, err));
    if (shape_of) *shape_of = first;
    if (!out) return OBM_OK;
    int64_t count = obm_tensor_count(&args[first]);
    float lanes[MAX_ARGUMENTS][BLOCK];
    for (int64_t at = 0; at < count; at += BLOCK) {
        size_t length = count - at < BLOCK ? (size_t)(count - at) : BLOCK;
        for (size_t i = 0; i < n; i++) OBM_TRY(read_block(&args[i], at, length, lanes[i], err));
        o->apply(lanes[0], lanes[1], lanes[2], length, out + at);
    }
    return OBM_OK;
}

obm_status obm_tensor_dot(const obm_tensor *a, const obm_tensor *b, double *out, obm_error *err) {
    obm_tensor args[2] = {*a, *b};
    size_t first = 0;
    OBM_TRY(common_shape("dot", args, 2, &first, err));
    int64_t count = obm_tensor_count(&args[first]);
    size_t blocks = (size_t)((count + BLOCK - 1) / BLOCK);
    double *sums = obm__calloc(blocks, sizeof *sums);
    if (!sums) return obm__fail_nomem(err, blocks * sizeof *sums);
    float lanes[2][BLOCK];
    obm_status status = OBM_OK;
    for (size_t block = 0; status == OBM_OK && block < blocks; block++) {
        int64_t at = (int64_t)block * BLOCK;
        size_t length = count - at < BLOCK ? (size_t)(count - at) : BLOCK;
        for (size_t i = 0; status == OBM_OK && i < 2; i++) status = read_block(&args[i], at, length, lanes[i], err);
        for (size_t j = 0; status == OBM_OK && j < length; j++)
            sums[block] += (double)lanes[0][j] * (double)lanes[1][j];
    }
    if (status == OBM_OK) *out = obm__tree_sum(sums, blocks);
    obm_free(sums);
    return status;
}
