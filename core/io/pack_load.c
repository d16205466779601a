/* From pack.json and the experts' files to the opened pack.  Both may be hostile: every field is checked here, once, so
 * that nobody behind has to.  Checksums are left to verify: they would read everything. */
#include "../route/router.h"
#include "pack_parts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where one tensor of one expert is being read, for messages. */
typedef struct place {
    const obm__safetensors *file;
    const obm__pack_shared *shared;
    const char *manifest; /* path of pack.json */
    const char *task, *name;
    size_t used; /* tensors of the file that are accounted for */
} place;

static obm_status bad_entry(const place *at, obm_error *err, const char *what) {
    return obm__fail(err, OBM_E_FORMAT, "%s: expert %s: tensor %s %s", at->manifest, at->task, at->name, what);
}

/* ---- tensors of an expert's file ---- */

static obm_status find_stored(place *at, const char *suffix, const obm_tensor *want, obm_tensor *out, obm_error *err) {
    char have[160], expected[160];
    char *name = obm__format("%s%s", at->name, suffix);
    if (!name) return obm__fail_nomem(err, strlen(at->name));
    const obm__st_entry *e = obm__safetensors_find(at->file, name);
    obm_free(name);
    if (!e) return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s%s is missing", at->file->path, at->name, suffix);
    bool same = e->t.dtype == want->dtype && e->t.ndim == want->ndim &&
                !memcmp(e->t.shape, want->shape, (size_t)want->ndim * sizeof *want->shape);
    if (!same) {
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s%s is %s %s, expected %s %s", at->file->path, at->name,
                         suffix, obm_dtype_name(e->t.dtype), obm__shape_text(&e->t, have, sizeof have),
                         obm_dtype_name(want->dtype), obm__shape_text(want, expected, sizeof expected));
    }
    *out = e->t;
    at->used++;
    return OBM_OK;
}

static obm_status check_alphas(const place *at, int plane, const obm_tensor *t, obm_error *err) {
    if ((uintptr_t)t->data % sizeof(float)) {
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s.scale.%d is not aligned to 4 bytes", at->file->path,
                         at->name, plane);
    }
    const float *alphas = t->data;
    for (int64_t i = 0, n = obm_tensor_count(t); i < n; i++) {
        if (isfinite(alphas[i]) && alphas[i] >= 0) continue;
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s.scale.%d[%lld] is %g, expected a finite number >= 0",
                         at->file->path, at->name, plane, (long long)i, (double)alphas[i]);
    }
    return OBM_OK;
}

static obm_status load_plane(place *at, obm__planes *planes, int plane, obm_error *err) {
    char suffix[24];
    obm_tensor found, signs = {.dtype = OBM_U8, .ndim = 2, .shape = {planes->rows, planes->row_bytes}};
    int64_t n = obm__scale_count(planes->scale, planes->rows, planes->cols);
    obm_tensor scales = {.dtype = OBM_F32, .ndim = 1, .shape = {n}};
    if (planes->scale.kind == OBM_SCALE_GROUP) {
        scales.ndim = 2;
        scales.shape[0] = planes->rows;
        scales.shape[1] = n / planes->rows;
    }
    snprintf(suffix, sizeof suffix, ".sign.%d", plane);
    OBM_TRY(find_stored(at, suffix, &signs, &found, err));
    planes->signs[plane] = found.data;
    snprintf(suffix, sizeof suffix, ".scale.%d", plane);
    OBM_TRY(find_stored(at, suffix, &scales, &found, err));
    planes->alphas[plane] = found.data;
    return check_alphas(at, plane, &found, err);
}

static obm_status load_planes(place *at, const obm_json *record, const obm_tensor *base, obm__planes *out,
                              obm_error *err) {
    const char *scale;
    int64_t n;
    obm__planes p = {0};
    obm_error why = {0};
    char shown[160];
    if (base->ndim != 2 || obm_tensor_count(base) == 0 || !obm__is_float(base->dtype))
        return bad_entry(at, err, "cannot be 1bit: it is no float matrix");
    OBM_TRY(obm__field_int(record, "planes", 0, OBM_MAX_PLANES, at->manifest, &n, err));
    OBM_TRY(obm__field_string(record, "scale", at->manifest, &scale, err));
    if (obm__scale_parse(scale, &p.scale, &why) != OBM_OK) {
        return obm__fail(err, OBM_E_FORMAT, "%s: expert %s: tensor %s: %s", at->manifest, at->task, at->name,
                         obm__printable(why.message, shown, sizeof shown));
    }
    p.rows = base->shape[0];
    p.cols = base->shape[1];
    p.row_bytes = obm__row_bytes(p.cols);
    p.n = (int)n;
    for (int i = 0; i < p.n; i++) OBM_TRY(load_plane(at, &p, i, err));
    *out = p;
    return OBM_OK;
}

/* ---- masks ---- */

static obm_status find_shared(const place *at, const obm_tensor *base, obm_tensor *out, obm_error *err) {
    char have[160], want[160];
    if (!at->shared->file) return bad_entry(at, err, "is a mask, and the pack has no shared vectors");
    const obm__st_entry *e = obm__safetensors_find(at->shared->file, at->name);
    if (!e) return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s is missing", at->shared->file->path, at->name);
    if (e->t.ndim != 2 || memcmp(e->t.shape, base->shape, 2 * sizeof *base->shape))
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s has shape %s, the base has %s", at->shared->file->path,
                         at->name, obm__shape_text(&e->t, have, sizeof have), obm__shape_text(base, want, sizeof want));
    *out = e->t;
    return OBM_OK;
}

static obm_status load_mask(place *at, const obm_json *record, const obm_tensor *base, obm__masked *out,
                            obm_error *err) {
    obm__masked m = {.rows = base->shape[0], .cols = base->shape[1], .row_bytes = obm__row_bytes(base->shape[1])};
    obm_tensor found, bits = {.dtype = OBM_U8, .ndim = 2, .shape = {m.rows, m.row_bytes}};
    double scaling;
    if (base->ndim != 2 || obm_tensor_count(base) == 0 || !obm__is_float(base->dtype))
        return bad_entry(at, err, "cannot be a mask: it is no float matrix");
    OBM_TRY(obm__field_real(record, "scaling", at->manifest, &scaling, err));
    m.scaling = (float)scaling;
    if (!isfinite(m.scaling) || m.scaling < 0)
        return bad_entry(at, err, "has a scaling of its mask that is no finite number >= 0");
    OBM_TRY(find_shared(at, base, &m.shared, err));
    OBM_TRY(find_stored(at, ".mask", &bits, &found, err));
    m.bits = found.data;
    *out = m;
    return OBM_OK;
}

/* ---- one tensor ---- */

static obm_status check_against_base(const place *at, const obm_tensor *t, const obm__pack_tensor_info *info,
                                     int64_t *extra, obm_error *err) {
    char have[160], want[160];
    const obm_tensor *b = &info->base;
    bool vocabulary = (info->cls == OBM_CLASS_EMBEDDING || info->cls == OBM_CLASS_HEAD) && b->ndim == 2;
    bool same = t->ndim == b->ndim;
    for (int i = vocabulary ? 1 : 0; i < t->ndim && same; i++) same = t->shape[i] == b->shape[i];
    if (!same || (vocabulary && t->shape[0] < b->shape[0])) {
        return obm__fail(err, OBM_E_FORMAT, "%s: expert %s: tensor %s has shape %s, the base has %s", at->manifest,
                         at->task, at->name, obm__shape_text(t, have, sizeof have),
                         obm__shape_text(b, want, sizeof want));
    }
    *extra = vocabulary ? t->shape[0] - b->shape[0] : 0;
    if (t->dtype != b->dtype && !(obm__is_float(t->dtype) && obm__is_float(b->dtype)))
        return bad_entry(at, err, "has a dtype that does not fit the base's");
    return OBM_OK;
}

static obm_status parse_mode(const place *at, const obm_json *record, obm_mode *out, obm_error *err) {
    const char *s;
    OBM_TRY(obm__field_string(record, "mode", at->manifest, &s, err));
    for (int m = OBM_MODE_1BIT; m <= OBM_MODE_MASK; m++) {
        if (strcmp(s, obm_mode_name((obm_mode)m))) continue;
        *out = (obm_mode)m;
        return OBM_OK;
    }
    return bad_entry(at, err, "has an unknown mode");
}

static uint64_t planes_bytes(const obm__planes *p) {
    uint64_t scales = (uint64_t)obm__scale_count(p->scale, p->rows, p->cols) * sizeof(float);
    return (uint64_t)p->n * ((uint64_t)p->rows * (uint64_t)p->row_bytes + scales);
}

static obm_status load_factor(place *at, const obm_json *record, const char *key, const char *suffix, int64_t rows,
                              int64_t cols, obm_tensor *out, obm_error *err) {
    const char *dtype;
    obm_tensor want = {.ndim = 2, .shape = {rows, cols}};
    OBM_TRY(obm__field_string(record, key, at->manifest, &dtype, err));
    for (int i = 0; i < OBM_DTYPE_COUNT; i++) {
        if (strcmp(dtype, obm_dtype_name((obm_dtype)i)) || !obm__is_float((obm_dtype)i)) continue;
        want.dtype = (obm_dtype)i;
        return find_stored(at, suffix, &want, out, err);
    }
    return bad_entry(at, err, "has LoRA factors of a dtype that is no float");
}

static obm_status load_factors(place *at, const obm_json *record, const obm_tensor *base, obm__lowrank *out,
                               obm_error *err) {
    obm__lowrank l = {0};
    if (obm__json_kind(record) != OBM_JSON_OBJECT) return bad_entry(at, err, "has a \"lora\" that is no object");
    if (base->ndim != 2 || !obm__is_float(base->dtype))
        return bad_entry(at, err, "cannot have LoRA factors: it is no float matrix");
    OBM_TRY(obm__field_int(record, "rank", 1, INT32_MAX, at->manifest, &l.rank, err));
    OBM_TRY(obm__field_real(record, "scaling", at->manifest, &l.scaling, err));
    if (!isfinite(l.scaling)) return bad_entry(at, err, "has a LoRA scaling that is not finite");
    if (!obm__json_bool(obm__json_get(record, "transposed"), &l.transposed))
        return bad_entry(at, err, "lacks \"transposed\" of its LoRA factors");
    l.rows = base->shape[0];
    l.cols = base->shape[1];
    OBM_TRY(load_factor(at, record, "a", ".lora_A", l.rank, l.transposed ? l.rows : l.cols, &l.a, err));
    OBM_TRY(load_factor(at, record, "b", ".lora_B", l.transposed ? l.cols : l.rows, l.rank, &l.b, err));
    *out = l;
    return OBM_OK;
}

static obm_status load_full(place *at, const obm_json *record, const obm_tensor *t, int64_t extra,
                            const obm_tensor *base, obm__pack_entry *e, obm_error *err) {
    const obm_json *factors = obm__json_get(record, "lora");
    if (!obm__is_float(t->dtype)) return bad_entry(at, err, "cannot be full: its dtype is no float");
    if (!factors) {
        OBM_TRY(find_stored(at, "", t, &e->full, err));
        e->bytes_pack = e->bytes_expert;
        return OBM_OK;
    }
    if (extra) return bad_entry(at, err, "has LoRA factors and rows beyond the base's");
    OBM_TRY(load_factors(at, factors, base, &e->lora, err));
    e->bytes_pack = obm__lowrank_bytes(&e->lora);
    return OBM_OK;
}

static obm_status adapter_bytes(const place *at, const obm_json *record, uint64_t *out, obm_error *err) {
    int64_t n = 0;
    if (obm__json_get(record, "adapter_bytes"))
        OBM_TRY(obm__field_int(record, "adapter_bytes", 0, INT64_MAX, at->manifest, &n, err));
    *out = (uint64_t)n;
    return OBM_OK;
}

static obm_status load_entry(place *at, const obm_json *record, const obm__pack_tensor_info *info, obm__pack_entry *out,
                             obm_error *err) {
    obm__pack_entry e = {0};
    obm_tensor t;
    int64_t extra = 0;
    if (obm__json_kind(record) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: expert %s: tensor %s: expected an object, found %s", at->manifest,
                         at->task, at->name, obm__json_kind_name(record));
    OBM_TRY(obm__field_tensor(record, at->manifest, &t, err));
    OBM_TRY(check_against_base(at, &t, info, &extra, err));
    OBM_TRY(parse_mode(at, record, &e.mode, err));
    e.bytes_expert = obm__tensor_bytes(&t);
    OBM_TRY(adapter_bytes(at, record, &e.bytes_adapter, err));
    if (e.mode == OBM_MODE_FULL) {
        OBM_TRY(load_full(at, record, &t, extra, &info->base, &e, err));
    } else if (extra) {
        t.shape[0] = extra;
        OBM_TRY(find_stored(at, ".extra", &t, &e.extra, err));
        e.bytes_pack = obm__tensor_bytes(&t);
    }
    if (e.mode == OBM_MODE_1BIT) {
        OBM_TRY(load_planes(at, record, &info->base, &e.planes, err));
        e.bytes_pack += planes_bytes(&e.planes);
    }
    if (e.mode == OBM_MODE_MASK) {
        OBM_TRY(load_mask(at, record, &info->base, &e.masked, err));
        e.bytes_pack += (uint64_t)e.masked.rows * (uint64_t)e.masked.row_bytes;
    }
    *out = e;
    return OBM_OK;
}

/* ---- the union of tensors ---- */

/* Experts [first, end) of pack.json. */
typedef struct range {
    size_t first, end;
} range;

/* A tied base under an untied expert: the head exists for that expert only and its base value is the embedding. */
static bool any_own_head(const obm_json *experts, range r, const char *head) {
    for (size_t i = r.first; i < r.end; i++) {
        if (obm__json_get(obm__json_get(obm__json_at(experts, i), "tensors"), head)) return true;
    }
    return false;
}

static int compare_info(const void *a, const void *b) {
    return strcmp(((const obm__pack_tensor_info *)a)->name, ((const obm__pack_tensor_info *)b)->name);
}

static obm_status fill_tensors(obm_pack *p, const obm_json *experts, range r, obm_error *err) {
    const obm_checkpoint *base = p->base;
    const obm__st_entry *embedding = obm__checkpoint_find(base, OBM_EMBEDDING_NAME);
    const char *head = obm__layout_head(base->layout);
    p->tensors = obm__calloc(base->count + 1, sizeof *p->tensors);
    if (!p->tensors) return obm__fail_nomem(err, (base->count + 1) * sizeof *p->tensors);
    for (size_t i = 0; i < base->count; i++) {
        const obm__st_entry *e = base->tensors[i];
        p->tensors[p->n_tensors++] = (obm__pack_tensor_info){e->name, obm_class_of(e->name, e->t.ndim), e->t, true};
    }
    if (base->tied && any_own_head(experts, r, head)) {
        p->tensors[p->n_tensors++] = (obm__pack_tensor_info){head, OBM_CLASS_HEAD, embedding->t, false};
        qsort(p->tensors, p->n_tensors, sizeof *p->tensors, compare_info);
    }
    return OBM_OK;
}

static const char *name_of(const void *info) { return ((const obm__pack_tensor_info *)info)->name; }

size_t obm__pack_find(const obm_pack *p, const char *name) {
    const obm__pack_tensor_info *t =
        obm__find_named(name, p->base->layout, p->tensors, p->n_tensors, sizeof *p->tensors, name_of);
    return t ? (size_t)(t - p->tensors) : SIZE_MAX;
}

/* ---- one expert ---- */

/* An expert without a head of its own ties it to its embedding, so where the union has a head, it is that embedding. */
static void tie_head(const obm_pack *p, obm__pack_expert *x, size_t head) {
    size_t embedding = obm__pack_find(p, OBM_EMBEDDING_NAME);
    x->entries[head] = x->entries[embedding];
    x->entries[head].bytes_expert = x->entries[head].bytes_pack = x->entries[head].bytes_adapter = 0;
}

static obm_status load_entries(const obm_pack *p, obm__pack_expert *x, place *at, const obm_json *tensors,
                               obm_error *err) {
    size_t found = 0, head = SIZE_MAX;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const obm_json *record = obm__json_get(tensors, p->tensors[i].name);
        at->name = p->tensors[i].name;
        found += record != NULL;
        if (record) {
            OBM_TRY(load_entry(at, record, &p->tensors[i], &x->entries[i], err));
        } else if (!p->tensors[i].in_base) {
            head = i;
        } else if (obm__is_derived_buffer(at->name)) {
            x->entries[i].mode = OBM_MODE_SAME;
        } else {
            return bad_entry(at, err, "is missing");
        }
    }
    if (head != SIZE_MAX) tie_head(p, x, head);
    if (found != obm__json_size(tensors)) {
        return obm__fail(err, OBM_E_FORMAT, "%s: expert %s has tensors that the base lacks", at->manifest, at->task);
    }
    if (at->used != at->file->count) {
        return obm__fail(err, OBM_E_FORMAT, "%s: %zu tensors, pack.json accounts for %zu", at->file->path,
                         at->file->count, at->used);
    }
    return OBM_OK;
}

obm_status obm__pack_open_file(const char *dir, const obm_json *record, const char *where, obm__safetensors **out,
                               obm_error *err) {
    char *path;
    uint64_t bytes;
    OBM_TRY(obm__file_of(record, dir, where, &path, &bytes, NULL, err));
    obm_status status = obm__safetensors_open(path, out, err);
    if (status == OBM_OK && (*out)->map.size != bytes) {
        status = obm__fail(err, OBM_E_FORMAT, "%s is %zu bytes long, pack.json says %llu", path, (*out)->map.size,
                           (unsigned long long)bytes);
    }
    obm_free(path);
    return status;
}

static obm_status check_name(const obm_pack *p, const char *name, const char *where, obm_error *err) {
    obm_expert probe = OBM_INIT(obm_expert);
    obm_error why = {0};
    probe.name = name;
    probe.path = ".";
    if (obm__expert_check(&probe, &why) != OBM_OK)
        return obm__fail(err, OBM_E_FORMAT, "%s: %.200s", where, why.message);
    for (size_t i = 0; i < p->n_experts; i++) {
        if (!strcmp(p->experts[i].name, name))
            return obm__fail(err, OBM_E_FORMAT, "%s: two experts are named %s", where, name);
    }
    return OBM_OK;
}

static obm_status load_expert(obm_pack *p, const obm_json *record, const char *where, obm_error *err) {
    const char *name, *policy;
    const obm_json *tensors;
    if (obm__json_kind(record) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: an expert: expected an object, found %s", where,
                         obm__json_kind_name(record));
    OBM_TRY(obm__field_string(record, "name", where, &name, err));
    OBM_TRY(check_name(p, name, where, err));
    OBM_TRY(obm__field_string(record, "policy", where, &policy, err));
    OBM_TRY(obm__field(record, "tensors", OBM_JSON_OBJECT, where, &tensors, err));
    obm__pack_expert *x = &p->experts[p->n_experts++]; /* from here on obm__pack_unload cleans up */
    x->record = (obm_json *)record;
    x->name = obm__strdup(name);
    x->policy = obm__strdup(policy);
    x->entries = obm__calloc(p->n_tensors, sizeof *x->entries);
    if (!x->name || !x->policy || !x->entries) return obm__fail_nomem(err, p->n_tensors * sizeof *x->entries);
    OBM_TRY(obm__pack_open_file(p->path, record, where, &x->file, err));
    place at = {.file = x->file, .shared = &p->shared, .manifest = where, .task = x->name};
    OBM_TRY(load_entries(p, x, &at, tensors, err));
    return obm__text_load(obm__json_get(record, "text"), p->path, where, x->name, &x->text, err);
}

/* ---- the pack ---- */

static obm_status load_experts(obm_pack *p, const obm_json *experts, range r, const char *where, obm_error *err) {
    size_t n = r.end - r.first;
    if (!(p->experts = obm__calloc(n, sizeof *p->experts))) return obm__fail_nomem(err, n * sizeof *p->experts);
    OBM_TRY(fill_tensors(p, experts, r, err));
    for (size_t i = r.first; i < r.end; i++) OBM_TRY(load_expert(p, obm__json_at(experts, i), where, err));
    return OBM_OK;
}

#define ALL SIZE_MAX

static obm_status load_parts(obm_pack *p, size_t only, const char *where, obm_error *err) {
    const obm_json *experts;
    OBM_TRY(obm__field(p->manifest, "experts", OBM_JSON_ARRAY, where, &experts, err));
    size_t n = obm__json_size(experts);
    OBM_TRY(obm__shared_load(p->manifest, p->path, where, &p->shared, err));
    if (only != ALL) return load_experts(p, experts, (range){only, only + 1}, where, err);
    OBM_TRY(obm__settings_parse(p->manifest, where, &p->settings, err));
    if (n < 1 || n > OBM_PACK_MAX_TASKS) {
        return obm__fail(err, OBM_E_FORMAT, "%s: %zu experts, expected 1 to %d", where, n, OBM_PACK_MAX_TASKS);
    }
    OBM_TRY(load_experts(p, experts, (range){0, n}, where, err));
    return obm__router_load(p, &p->router, err);
}

static obm_status load(obm_context *ctx, const char *path, obm_json *manifest, size_t only, obm_checkpoint *base,
                       obm_pack **out, obm_error *err) {
    obm_pack *p = obm__calloc(1, sizeof *p);
    if (!p) return obm__fail_nomem(err, sizeof *p);
    *p = (obm_pack){.ctx = ctx, .path = obm__strdup(path), .manifest = manifest, .base = base};
    char *where = p->path ? obm__path_join(path, OBM_PACK_MANIFEST) : NULL;
    obm_status status = where ? load_parts(p, only, where, err) : obm__fail_nomem(err, strlen(path));
    obm_free(where);
    if (status == OBM_OK) {
        *out = p;
        return OBM_OK;
    }
    obm__pack_unload(p);
    return status;
}

obm_status obm__pack_load(obm_context *ctx, const char *path, obm_json *manifest, obm_checkpoint *base, obm_pack **out,
                          obm_error *err) {
    return load(ctx, path, manifest, ALL, base, out, err);
}

obm_status obm__pack_load_one(obm_context *ctx, const char *path, obm_json *manifest, size_t expert,
                              obm_checkpoint *base, obm_pack **out, obm_error *err) {
    return load(ctx, path, manifest, expert, base, out, err);
}

void obm__pack_unload(obm_pack *p) {
    if (!p) return;
    for (size_t i = 0; i < p->n_experts; i++) {
        obm_free(p->experts[i].name);
        obm_free(p->experts[i].policy);
        obm_free(p->experts[i].entries);
        obm__safetensors_free(p->experts[i].file);
        obm__text_clear(&p->experts[i].text);
    }
    obm__shared_close(&p->shared);
    obm_free(p->experts);
    obm_free(p->tensors);
    obm_free(p->path);
    obm__router_free(p->router);
    obm_free(p);
}
