/* Task vectors: pairs the tensors of base and expert by name and reads their difference in f32.  Reads no tensor data
 * before it is asked for, apart from integer buffers, which have no difference and must be equal. */
#include "../model/config_compare.h"
#include "delta.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool obm__is_float(obm_dtype dtype) {
    return dtype == OBM_F32 || dtype == OBM_F16 || dtype == OBM_BF16 || dtype == OBM_F64;
}

size_t obm__tensor_bytes(const obm_tensor *t) { return (size_t)obm_tensor_count(t) * obm_dtype_size(t->dtype); }

void obm__tensor_rows(const obm_tensor *t, int64_t *rows, int64_t *cols) {
    if (t->ndim < 2) {
        *rows = 1;
        *cols = obm_tensor_count(t);
        return;
    }
    *rows = t->shape[0];
    *cols = 1;
    for (int i = 1; i < t->ndim; i++) *cols *= t->shape[i];
}

const char *obm__shape_text(const obm_tensor *t, char *buf, size_t size) {
    size_t used = (size_t)snprintf(buf, size, "(");
    for (int i = 0; i < t->ndim && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    if (used < size) snprintf(buf + used, size - used, ")");
    return buf;
}

/* ---- reading ---- */

static void widen_half(const obm_kernels *k, obm_dtype dtype, const void *src, int64_t n, float *out) {
    (dtype == OBM_BF16 ? k->bf16_to_f32 : k->f16_to_f32)(out, src, (size_t)n);
}

/* Data inside a mapping need not be aligned.  A uint16_t at an odd address must not even be named in C, so such tensors
 * (behind a byte tensor of odd size) go through a buffer. */
static void widen_odd(const obm_kernels *k, obm_dtype dtype, const void *src, int64_t n, float *out) {
    uint16_t aligned[1024];
    for (int64_t at = 0; at < n; at += 1024) {
        int64_t m = n - at < 1024 ? n - at : 1024;
        memcpy(aligned, (const uint8_t *)src + 2 * at, 2 * (size_t)m);
        widen_half(k, dtype, aligned, m, out + at);
    }
}

void obm__widen(const obm_kernels *k, const obm_tensor *t, int64_t begin, int64_t n, float *out) {
    const uint8_t *src = (const uint8_t *)t->data + (size_t)begin * obm_dtype_size(t->dtype);
    switch (t->dtype) {
    case OBM_F32:
        memcpy(out, src, (size_t)n * sizeof *out);
        break;
    case OBM_BF16:
    case OBM_F16:
        ((uintptr_t)src % 2 ? widen_odd : widen_half)(k, t->dtype, src, n, out);
        break;
    default:
        for (int64_t i = 0; i < n; i++) {
            double x;
            memcpy(&x, src + (size_t)i * sizeof x, sizeof x);
            out[i] = (float)x;
        }
    }
}

void obm__narrow(const obm_kernels *k, obm_dtype dtype, const float *in, int64_t n, void *out) {
    switch (dtype) {
    case OBM_BF16:
        k->f32_to_bf16(out, in, (size_t)n);
        break;
    case OBM_F16:
        k->f32_to_f16(out, in, (size_t)n);
        break;
    case OBM_F64:
        for (int64_t i = 0; i < n; i++) ((double *)out)[i] = (double)in[i];
        break;
    default:
        memcpy(out, in, (size_t)n * sizeof *in);
    }
}

/* ---- pairing ---- */

bool obm__is_derived_buffer(const char *name) {
    static const char suffix[] = "rotary_emb.inv_freq";
    size_t n = strlen(name), m = sizeof suffix - 1;
    return n >= m && !strcmp(name + n - m, suffix);
}

/* The tensor, or what stands for one that `c` does not list: the embedding for the head of a tied model.  NULL: none.
 */
static const obm__st_entry *find_in(const obm_checkpoint *c, const char *name) {
    return obm__checkpoint_find(c, c->tied && obm__is_head(name) ? OBM_EMBEDDING_NAME : name);
}

static bool same_tail(const obm_tensor *a, const obm_tensor *b, int from) {
    for (int i = from; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i]) return false;
    }
    return true;
}

static obm_status check_shapes(obm__pair *p, obm_error *err) {
    const obm_tensor *b = &p->base, *e = &p->expert;
    if (b->ndim == e->ndim && same_tail(b, e, 0)) return OBM_OK;
    bool vocabulary = p->cls == OBM_CLASS_EMBEDDING || p->cls == OBM_CLASS_HEAD;
    if (vocabulary && b->ndim == 2 && e->ndim == 2 && same_tail(b, e, 1) && e->shape[0] > b->shape[0]) {
        p->extra_rows = e->shape[0] - b->shape[0];
        return OBM_OK;
    }
    char have[160], want[160];
    return obm__fail(err, OBM_E_SHAPE, "tensor %s: expert has shape %s, base has %s", p->name,
                     obm__shape_text(e, have, sizeof have), obm__shape_text(b, want, sizeof want));
}

static obm_status check_dtypes(const obm__pair *p, obm_error *err) {
    const obm_tensor *b = &p->base, *e = &p->expert;
    if (obm__is_float(b->dtype) && obm__is_float(e->dtype)) return OBM_OK;
    if (b->dtype == e->dtype && !p->extra_rows && !memcmp(b->data, e->data, obm__tensor_bytes(b))) return OBM_OK;
    return obm__fail(err, OBM_E_DTYPE,
                     "tensor %s: %s in base and %s in expert; only F32, F16, BF16 and F64 have differences", p->name,
                     obm_dtype_name(b->dtype), obm_dtype_name(e->dtype));
}

obm_status obm__pair_fill(obm__pair *p, const char *name, const obm_tensor *base, const obm_tensor *expert,
                          obm_error *err) {
    *p = (obm__pair){.name = name, .base = *base, .expert = *expert};
    p->cls = obm_class_of(name, base->ndim);
    OBM_TRY(check_shapes(p, err));
    return check_dtypes(p, err);
}

static obm_status missing(const char *name, const obm_checkpoint *has, const obm_checkpoint *lacks, obm_error *err) {
    return obm__fail(err, OBM_E_NOTFOUND, "tensor %s is in %s but not in %s", name, has->path, lacks->path);
}

static obm_status add_pair(obm_task_vector *v, const char *name, const obm__st_entry *base, const obm__st_entry *expert,
                           obm_error *err) {
    OBM_TRY(obm__pair_fill(&v->pairs[v->count], name, &base->t, &expert->t, err));
    v->count++;
    return OBM_OK;
}

/* Those of the base, under its names. */
static obm_status match_base(obm_task_vector *v, obm_error *err) {
    for (size_t i = 0; i < v->base->count; i++) {
        const obm__st_entry *in_base = v->base->tensors[i], *in_expert = find_in(v->expert, in_base->name);
        if (!in_expert && obm__is_derived_buffer(in_base->name)) continue;
        if (!in_expert) return missing(in_base->name, v->base, v->expert, err);
        OBM_TRY(add_pair(v, in_base->name, in_base, in_expert, err));
    }
    return OBM_OK;
}

/* What the base lacks can only be a head.  An expert that holds one tensor under two names has one of them in vain. */
static obm_status match_expert(obm_task_vector *v, obm_error *err) {
    for (size_t i = 0; i < v->expert->count; i++) {
        const obm__st_entry *in_expert = v->expert->tensors[i], *in_base = find_in(v->base, in_expert->name);
        bool is_head = v->base->tied && obm__is_head(in_expert->name);
        if (in_base && !is_head && obm__checkpoint_find(v->expert, in_base->name) == in_expert) continue;
        if (!is_head && obm__is_derived_buffer(in_expert->name)) continue;
        if (!in_base || !is_head) return missing(in_expert->name, v->expert, v->base, err);
        OBM_TRY(add_pair(v, obm__layout_head(v->base->layout), in_base, in_expert, err));
    }
    return OBM_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const obm__pair *)a)->name, ((const obm__pair *)b)->name);
}

static obm_status match(obm_task_vector *v, obm_error *err) {
    OBM_TRY(match_base(v, err));
    OBM_TRY(match_expert(v, err));
    if (v->count > 1) qsort(v->pairs, v->count, sizeof *v->pairs, by_name);
    return OBM_OK;
}

obm_status obm__task_vector_check(const obm_task_vector *v, obm_error *err) {
    OBM_TRY(obm__checkpoint_check(v->base, err));
    if (v->pack) OBM_TRY(obm__member_check(v->pack, err));
    return obm__checkpoint_check(v->expert, err);
}

obm_status obm_task_vector_new(const obm_checkpoint *base, const obm_checkpoint *expert, obm_task_vector **out,
                               obm_error *err) {
    size_t most;
    OBM_TRY(obm__checkpoint_is_model(base, "a base", err));
    /* A head of the expert's own may be there without a tensor in its file. */
    if (!obm__add(base->count, expert->count, &most) || !obm__add(most, 1, &most))
        return obm__fail_nomem(err, SIZE_MAX);
    obm_task_vector *v = obm__calloc(1, sizeof *v);
    obm__pair *pairs = obm__calloc(most, sizeof *pairs);
    if (!v || !pairs) {
        obm_free(v);
        obm_free(pairs);
        return obm__fail_nomem(err, most * sizeof *pairs);
    }
    *v = (obm_task_vector){.base = base, .expert = expert, .pairs = pairs};
    obm_status status = obm__task_vector_check(v, err);
    if (status == OBM_OK)
        status = expert->member    ? obm__member_pairs(v, err)
                 : expert->adapter ? obm__adapter_pairs(v, err)
                                   : match(v, err);
    if (status == OBM_OK && !obm__checkpoint_is_change(expert)) status = obm__configs_compare(base, expert, true, err);
    if (status != OBM_OK) {
        obm_task_vector_free(v);
        return status;
    }
    *out = v;
    return OBM_OK;
}

void obm_task_vector_free(obm_task_vector *v) {
    if (!v) return;
    obm__member_unload(v->pack);
    obm_free(v->lowranks);
    obm_free(v->pairs);
    obm_free(v);
}

size_t obm_task_vector_count(const obm_task_vector *v) { return v->count; }

void obm_task_vector_at(const obm_task_vector *v, size_t i, const char **name, obm_tensor *base, obm_tensor *expert) {
    const obm__pair *p = &v->pairs[i];
    if (name) *name = p->name;
    if (base) *base = p->base;
    if (expert) *expert = p->expert;
}

static const char *name_of(const void *pair) { return ((const obm__pair *)pair)->name; }

const obm__pair *obm__task_vector_find(const obm_task_vector *v, const char *name, obm_error *err) {
    const obm__pair *p = obm__find_named(name, v->base->layout, v->pairs, v->count, sizeof *v->pairs, name_of);
    if (!p) obm__fail(err, OBM_E_NOTFOUND, "no tensor %s in the task vector of %s", name, v->expert->path);
    return p;
}

obm_status obm__fail_nonfinite(obm_error *err, const obm__pair *p, int64_t index) {
    int64_t rows, cols;
    obm__tensor_rows(&p->base, &rows, &cols);
    if (p->base.ndim < 2) {
        return obm__fail(err, OBM_E_VALUE, "tensor %s: NaN or Inf in expert - base at index %lld", p->name,
                         (long long)index);
    }
    return obm__fail(err, OBM_E_VALUE, "tensor %s: NaN or Inf in expert - base at index %lld (row %lld, column %lld)",
                     p->name, (long long)index, (long long)(index / cols), (long long)(index % cols));
}

obm_status obm_task_vector_read(const obm_task_vector *v, const char *name, float *out, obm_error *err) {
    const obm__pair *p = obm__task_vector_find(v, name, err);
    if (!p) return OBM_E_NOTFOUND;
    OBM_TRY(obm__task_vector_check(v, err));
    int64_t n = obm_tensor_count(&p->base);
    if (!obm__is_float(p->base.dtype)) {
        memset(out, 0, (size_t)n * sizeof *out); /* an integer buffer, equal on both sides */
        return OBM_OK;
    }
    const obm_kernels *k = v->base->ctx->k;
    obm__pulse pulse = obm__pulse_new(v->base->ctx, NULL, NULL, "task vector", 1);
    float scratch[OBM_BLOCK];
    for (int64_t at = 0; at < n; at += OBM_BLOCK) {
        int64_t m = n - at < OBM_BLOCK ? n - at : OBM_BLOCK;
        obm__pair_read(k, p, at, m, out + at, scratch);
        int64_t bad = (int64_t)k->find_nonfinite(out + at, (size_t)m);
        if (bad < m) return obm__fail_nonfinite(err, p, at + bad);
        OBM_TRY(obm__pulse_check(&pulse, err));
    }
    return OBM_OK;
}
