/* Reading one tensor across the models: inputs in the working dtype, deltas, and the error for what is not finite. */
#include "merge.h"

obm_dtype obm__group_common_dtype(const obm_tensor *base, const obm_tensor *models, size_t n) {
    obm_dtype common = base ? base->dtype : models[0].dtype;
    for (size_t i = 0; i < n; i++)
        if (models[i].dtype != common) return OBM_F32;
    return common == OBM_F64 ? OBM_F32 : common;
}

const char *obm__group_name(const obm__group *g) { return g->name[0] ? g->name : "the tensor"; }

/* Rounds x to dtype in place; scratch holds n 16-bit values. */
static void round_to(const obm_kernels *k, obm_dtype dtype, float *x, size_t n, void *scratch) {
    if (dtype == OBM_BF16) {
        k->f32_to_bf16(scratch, x, n);
        k->bf16_to_f32(x, scratch, n);
    } else if (dtype == OBM_F16) {
        k->f32_to_f16(scratch, x, n);
        k->f16_to_f32(x, scratch, n);
    }
}

/* The base, or a model. */
#define BASE SIZE_MAX

static const obm_tensor *tensor_of(const obm__group *g, size_t model) {
    return model == BASE ? g->base : &g->models[model];
}

static const obm__pair *change_of(const obm__group *g, size_t model) {
    return model == BASE ? g->base_change : g->changes ? g->changes[model] : NULL;
}

/* With a change the value is f32(tensor + d), which is rounded to the working dtype like a tensor of F32. */
static void read_input(const obm_kernels *k, const obm__group *g, size_t model, uint64_t begin, size_t n, float *out,
                       float *scratch) {
    const obm_tensor *t = tensor_of(g, model);
    const obm__pair *change = change_of(g, model);
    if (g->rows) {
        obm__rows_read(k, g->rows, model == BASE ? 0 : model + (g->base != NULL), begin, n, out, scratch);
        round_to(k, g->work, out, n, scratch);
        return;
    }
    if (change)
        obm__pair_values(k, change, (int64_t)begin, (int64_t)n, out, scratch);
    else
        obm__widen(k, t, (int64_t)begin, (int64_t)n, out);
    if (change || t->dtype != g->work) round_to(k, g->work, out, n, scratch);
}

void obm__group_base(const obm_kernels *k, const obm__group *g, uint64_t begin, size_t n, float *base, float *scratch) {
    if (g->base) read_input(k, g, BASE, begin, n, base, scratch);
}

/* bf16 as it is in the files, at an address that a uint16_t may have, or nothing. */
static bool is_plain(const obm__group *g, const obm_tensor *t, const obm__pair *change) {
    return !t || (t->dtype == OBM_BF16 && !change && !g->rows && (uintptr_t)t->data % 2 == 0);
}

/* The delta comes straight from the files' bytes, and the lane of the base is not looked at. */
bool obm__group_is_plain(const obm__group *g, size_t model) {
    bool delta = g->steps->deltas && g->base;
    return (g->work == OBM_BF16 || g->work == OBM_F32) && is_plain(g, tensor_of(g, model), change_of(g, model)) &&
           is_plain(g, delta ? g->base : NULL, delta ? g->base_change : NULL);
}

obm__plain obm__group_plain(const obm__group *g, size_t model, uint64_t begin) {
    bool delta = g->steps->deltas && g->base;
    return (obm__plain){(const uint16_t *)tensor_of(g, model)->data + begin,
                        delta ? (const uint16_t *)g->base->data + begin : NULL,
                        delta && g->steps->round_deltas && g->work == OBM_BF16};
}

/* F32 that nothing is done to on reading; NULL for all others. */
static const float *in_place(const obm__group *g, size_t model, uint64_t begin) {
    const obm_tensor *t = tensor_of(g, model);
    bool as_it_is = t->dtype == OBM_F32 && g->work == OBM_F32 && !change_of(g, model) && !g->rows;
    return as_it_is && (uintptr_t)t->data % sizeof(float) == 0 ? (const float *)t->data + begin : NULL;
}

size_t obm__group_trimmed(const obm_kernels *k, const obm__group *g, size_t model, uint64_t begin, size_t n,
                          const float *base, uint32_t least, float *d, float *scratch) {
    bool delta = g->steps->deltas && g->base;
    if (obm__group_is_plain(g, model)) {
        obm__plain p = obm__group_plain(g, model, begin);
        return k->delta_bf16(d, p.model, p.base, p.round, least, n);
    }
    const float *x = in_place(g, model, begin);
    if (!x || !delta) {
        read_input(k, g, model, begin, n, d, scratch);
        x = d;
    }
    if (delta) {
        k->sub_f32(d, x, base, n);
        if (g->steps->round_deltas) round_to(k, g->work, d, n, scratch);
    }
    size_t bad = k->find_nonfinite(d, n);
    if (least) k->keep_from(d, least, n);
    return bad;
}

size_t obm__group_delta(const obm_kernels *k, const obm__group *g, size_t model, uint64_t begin, size_t n,
                        const float *base, float *d, float *scratch) {
    return obm__group_trimmed(k, g, model, begin, n, base, 0, d, scratch);
}

static void release_tensor(const obm_tensor *t, const obm__pair *change, uint64_t begin, uint64_t n) {
    if (change)
        obm__pair_release(change, (int64_t)begin, (int64_t)n);
    else
        obm__tensor_release(t, (int64_t)begin, (int64_t)n);
}

void obm__group_populate(const obm__group *g, size_t model, uint64_t begin, uint64_t end) {
    if (end > g->count) end = g->count;
    if (g->rows || !g->mapped || g->held || begin >= end) return;
    int64_t first = (int64_t)begin, n = (int64_t)(end - begin);
    if (g->base && !change_of(g, BASE)) obm__tensor_populate(g->base, first, n);
    for (size_t i = 0; i < g->steps->n; i++)
        if ((model == SIZE_MAX || model == i) && !change_of(g, i)) obm__tensor_populate(&g->models[i], first, n);
}

/* Rows lie anywhere in their tensors, so all pages of these go. */
static void release_rows(const obm__rows *r) {
    for (size_t i = 0; i < r->n; i++)
        release_tensor(&r->sources[i], r->changes[i], 0, (uint64_t)obm_tensor_count(&r->sources[i]));
}

void obm__group_drop(const obm__group *g, uint64_t begin, uint64_t n) {
    if (g->rows && g->mapped) release_rows(g->rows);
    if (g->rows || !g->mapped) return;
    if (g->base) release_tensor(g->base, change_of(g, BASE), begin, n);
    for (size_t i = 0; i < g->steps->n; i++) release_tensor(&g->models[i], change_of(g, i), begin, n);
}

void obm__group_release(const obm__group *g, uint64_t begin, uint64_t n) {
    if (!g->held) obm__group_drop(g, begin, n);
}

/* True if element `index` of one input alone is at fault; the message then names whose it is. */
static bool element_is_bad(const obm_kernels *k, const obm__group *g, size_t model, uint64_t index) {
    float x, scratch;
    read_input(k, g, model, index, 1, &x, &scratch);
    return !isfinite(x);
}

/* OK where it is none of the inputs. */
static obm_status bad_input(const obm_kernels *k, const obm__group *g, uint64_t index, obm_error *err) {
    const char *name = obm__group_name(g);
    obm__model_name buf;
    unsigned long long at = index;
    if (g->base && element_is_bad(k, g, BASE, index))
        return obm__fail(err, OBM_E_VALUE, "%s: NaN or Inf in %s at index %llu", name,
                         g->base_label ? g->base_label : "the base", at);
    for (size_t i = 0; i < g->steps->n; i++) {
        float base, d, scratch;
        bool own = element_is_bad(k, g, i, index);
        obm__group_base(k, g, index, 1, &base, &scratch);
        if (!own && obm__group_delta(k, g, i, index, 1, &base, &d, &scratch) == 1) continue;
        const char *what = own ? "NaN or Inf" : "a difference to the base that overflows";
        return obm__fail(err, OBM_E_VALUE, "%s: %s in %.300s at index %llu", name, what,
                         obm__model_label(g->steps->labels, i, buf), at);
    }
    return OBM_OK;
}

obm_status obm__group_bad(const obm_kernels *k, const obm__group *g, uint64_t index, obm_error *err) {
    OBM_TRY(bad_input(k, g, index, err));
    return obm__fail(err, OBM_E_VALUE, "%s: the merged value at index %llu overflows the output's dtype",
                     obm__group_name(g), (unsigned long long)index);
}

obm_status obm__group_bad_rank(const obm_kernels *k, const obm__group *g, uint64_t index, obm_error *err) {
    OBM_TRY(bad_input(k, g, index, err));
    return obm__fail(err, OBM_E_VALUE,
                     "%s: what %s ranks elements by overflows f32 at index %llu: the differences there are too large",
                     obm__group_name(g), g->steps->method->info.name, (unsigned long long)index);
}
