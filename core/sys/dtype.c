/* Element types, tensor views and module classes.  It opens no files. */
#include "sys.h"

#include <string.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[OBM_DTYPE_COUNT] = {
    [OBM_F32] = {"F32", 4}, [OBM_F16] = {"F16", 2},         [OBM_BF16] = {"BF16", 2},       [OBM_F64] = {"F64", 8},
    [OBM_U8] = {"U8", 1},   [OBM_I8] = {"I8", 1},           [OBM_I16] = {"I16", 2},         [OBM_I32] = {"I32", 4},
    [OBM_I64] = {"I64", 8}, [OBM_BOOL] = {"BOOL", 1},       [OBM_U16] = {"U16", 2},         [OBM_U32] = {"U32", 4},
    [OBM_U64] = {"U64", 8}, [OBM_F8_E4M3] = {"F8_E4M3", 1}, [OBM_F8_E5M2] = {"F8_E5M2", 1},
};

static bool dtype_known(obm_dtype dtype) { return (int)dtype >= 0 && (int)dtype < OBM_DTYPE_COUNT; }

const char *obm_dtype_name(obm_dtype dtype) { return dtype_known(dtype) ? dtypes[dtype].name : "UNKNOWN"; }
size_t obm_dtype_size(obm_dtype dtype) { return dtype_known(dtype) ? dtypes[dtype].size : 0; }

bool obm__dtype_find(const char *name, obm_dtype *out) {
    static const struct {
        const char *name;
        obm_dtype dtype;
    } known[] = {{"f32", OBM_F32}, {"bf16", OBM_BF16}, {"f16", OBM_F16}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name)) continue;
        *out = known[i].dtype;
        return true;
    }
    return false;
}

int64_t obm_tensor_count(const obm_tensor *t) {
    if (t->ndim < 0 || t->ndim > OBM_MAX_DIM) return -1;
    int64_t count = 1;
    bool empty = false;
    for (int32_t i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0) return -1;
        if (t->shape[i] == 0)
            empty = true;
        else if (__builtin_mul_overflow(count, t->shape[i], &count))
            return -1;
    }
    return empty ? 0 : count;
}

/* The table with the fastest conversions; they are exact on every ISA, so that no context is needed to choose. */
static const obm_kernels *best_kernels(void) {
    const obm_kernels *const *k = obm_kernels_list();
    while (k[1]) k++;
    return *k;
}

obm_status obm_tensor_read_f32(const obm_tensor *t, int64_t begin, int64_t n, float *out, obm_error *err) {
    int64_t count = obm_tensor_count(t);
    if (begin < 0 || n < 0 || count < 0 || begin > count || n > count - begin)
        return obm__fail(err, OBM_E_ARG, "elements [%lld, %lld + %lld) are outside a tensor of %lld", (long long)begin,
                         (long long)begin, (long long)n, (long long)count);
    const obm_kernels *k = best_kernels();
    switch (t->dtype) {
    case OBM_F32:
        if (n) memcpy(out, (const float *)t->data + begin, (size_t)n * sizeof *out);
        return OBM_OK;
    case OBM_F16:
        k->f16_to_f32(out, (const uint16_t *)t->data + begin, (size_t)n);
        return OBM_OK;
    case OBM_BF16:
        k->bf16_to_f32(out, (const uint16_t *)t->data + begin, (size_t)n);
        return OBM_OK;
    case OBM_F64:
        for (int64_t i = 0; i < n; i++) {
            double value; /* a mapped file need not be aligned to 8 bytes */
            memcpy(&value, (const char *)t->data + (size_t)(begin + i) * sizeof value, sizeof value);
            out[i] = (float)value;
        }
        return OBM_OK;
    default:
        return obm__fail(err, OBM_E_DTYPE, "expected a tensor of F32, F16, BF16 or F64, found %s",
                         obm_dtype_name(t->dtype));
    }
}

const char *obm_class_name(obm_class cls) {
    static const char *const names[OBM_CLASS_COUNT] = {"attention", "mlp",  "embedding", "head",
                                                       "norm",      "bias", "other"};
    return (int)cls >= 0 && (int)cls < OBM_CLASS_COUNT ? names[cls] : "unknown";
}

/* Names of modules in checkpoints of the LLaMA family (transformers' modeling_llama.py; the fused ones are Phi-3's).
 * The whole name must match: "mlp.gate", say, is the router of a mixture of experts, no projection. */
static const struct {
    const char *module;
    obm_class cls;
} modules[] = {
    {"q_proj", OBM_CLASS_ATTENTION}, {"k_proj", OBM_CLASS_ATTENTION},       {"v_proj", OBM_CLASS_ATTENTION},
    {"o_proj", OBM_CLASS_ATTENTION}, {"qkv_proj", OBM_CLASS_ATTENTION},     {"gate_proj", OBM_CLASS_MLP},
    {"up_proj", OBM_CLASS_MLP},      {"down_proj", OBM_CLASS_MLP},          {"gate_up_proj", OBM_CLASS_MLP},
    {"lm_head", OBM_CLASS_HEAD},     {"embed_tokens", OBM_CLASS_EMBEDDING},
};

/* "model.layers.0.mlp.up_proj.weight": module "up_proj" (n characters), then what of it. */
static const char *module_of(const char *name, size_t *n, const char **part) {
    const char *dot = strrchr(name, '.'), *begin = dot ? dot : name;
    *part = dot ? dot + 1 : "";
    while (begin > name && begin[-1] != '.') begin--;
    *n = dot ? (size_t)(dot - begin) : strlen(begin);
    return begin;
}

static bool ends_with(const char *s, size_t n, const char *suffix) {
    size_t m = strlen(suffix);
    return n >= m && !memcmp(s + n - m, suffix, m);
}

/* Parts of a model that are not its text model, whatever their modules are called (transformers' names in LLaVA's
 * likes, Gemma 3 and Qwen-VL). */
bool obm__is_outside(const char *name) {
    static const char *const parts[] = {"vision_tower", "vision_model", "visual", "multi_modal_projector",
                                        "audio_tower"};
    for (const char *p = name; p; p = strchr(p, '.')) {
        p += *p == '.';
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
            size_t n = strlen(parts[i]);
            if (!strncmp(p, parts[i], n) && p[n] == '.') return true;
        }
    }
    return false;
}

obm_class obm_class_of(const char *tensor_name, int32_t ndim) {
    size_t n;
    const char *part, *module = module_of(tensor_name, &n, &part);
    if (obm__is_outside(tensor_name)) return OBM_CLASS_OTHER;
    if (!strcmp(part, "bias")) return OBM_CLASS_BIAS;
    if (ndim <= 1 || ends_with(module, n, "norm")) return OBM_CLASS_NORM;
    for (size_t i = 0; i < sizeof modules / sizeof *modules && !strcmp(part, "weight"); i++)
        if (n == strlen(modules[i].module) && !memcmp(module, modules[i].module, n)) return modules[i].cls;
    return OBM_CLASS_OTHER;
}
