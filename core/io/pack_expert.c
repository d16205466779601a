/*
 * Compresses one expert into one safetensors file, streaming: what one look is enough for by pack_stream.c, several
 * planes of a matrix and masks by stripes of rows.  Which tensors exist must be known before the first byte is written;
 * that a plane's scales are all 0 shows only afterwards.  Such planes are rare, so the file is written on the
 * assumption that there are none, and once more without them when there were.
 */
#include "pack_parts.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Elements that a thread compares between two looks at the others: a quarter of a MB. */
#define SAME_STEP ((int64_t)65536)
/* Elements that are compared before the others are asked: half a page at least. */
#define SAME_FIRST ((int64_t)1024)

typedef struct item {
    const obm__pair *pair;
    obm_mode mode;
    int planes;
    int empty; /* planes found to be all 0 in the last pass, counted from the end */
    int64_t rows, cols, row_bytes, n_scales;
    obm__mask_sums sums; /* of its mask */
} item;

/* One thing the file holds, in the order of the file. */
typedef enum { SLOT_PLANES, SLOT_MASK, SLOT_FULL, SLOT_FACTORS, SLOT_EXTRA } slot_kind;
typedef struct slot {
    size_t item;
    slot_kind kind;
    size_t align;
} slot;

typedef struct job {
    const obm__expert_request *r;
    obm_task_vector *v;
    obm__policy policy;
    char *policy_text;
    item *items;
    size_t n;
    slot *slots;
    size_t n_slots;
    obm__st_writer *writer;
    uint64_t ticks; /* bytes of expert tensors that are done */
    obm_json *text; /* the record's "text", NULL: the base's tokenizer, template and eos */
    uint64_t text_bytes;
    float scaling; /* of all masks */
} job;

static uint64_t add_u64(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

/* ---- what is asked for ---- */

bool obm__is_task_name(const char *s) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    size_t n = s ? strlen(s) : 0;
    return n > 0 && n <= 64 && strspn(s, letters) == n;
}

obm_status obm__experts_read(const obm_expert *given, size_t n, obm_expert *own, obm_error *err) {
    if (n && !given) return obm__fail(err, OBM_E_ARG, "no experts");
    for (size_t i = 0; i < n; i++) {
        const void *one = (const char *)given + i * given->struct_size;
        size_t size;
        OBM_TRY(OBM_CHECK(obm_expert, one, err));
        memcpy(&size, one, sizeof size);
        if (size != given->struct_size || (n > 1 && size % _Alignof(obm_expert))) {
            return obm__fail(err, OBM_E_ARG,
                             "obm_expert: struct_size %zu in element %zu, expected that of the first, %zu", size, i,
                             given->struct_size);
        }
        obm__options_read(one, &own[i], sizeof own[i]);
    }
    return OBM_OK;
}

obm_status obm__expert_check(const obm_expert *e, obm_error *err) {
    if (!obm__is_task_name(e->name)) {
        char shown[80];
        return obm__fail(err, OBM_E_ARG, "task name \"%s\": 1 to 64 letters, digits, _ and - are possible",
                         obm__printable(e->name ? e->name : "", shown, sizeof shown));
    }
    /* Both are words of the route syntax. */
    if (!strcmp(e->name, "base") || !strcmp(e->name, "auto"))
        return obm__fail(err, OBM_E_ARG, "task name \"%s\" is reserved", e->name);
    if (!e->path || !*e->path) return obm__fail(err, OBM_E_ARG, "expert %s: no path", e->name);
    return OBM_OK;
}

obm_status obm__expert_open(obm_context *ctx, const obm_expert *e, obm_checkpoint **out, obm_error *err) {
    obm_checkpoint *c;
    OBM_TRY(obm_checkpoint_open(ctx, e->path, &c, err));
    if (!c->member) {
        *out = c;
        return OBM_OK;
    }
    obm_checkpoint_free(c);
    return obm__fail(err, OBM_E_ARG,
                     "expert %s: %.300s is compressed already: name the checkpoint that it was made from", e->name,
                     e->path);
}

uint64_t obm__checkpoint_bytes(const obm_checkpoint *c) {
    uint64_t n = 0;
    for (size_t i = 0; i < c->count; i++) n = add_u64(n, obm__tensor_bytes(&c->tensors[i]->t));
    return n;
}

/* An adapter is worked on as what it stands for. */
uint64_t obm__expert_bytes(const obm_checkpoint *base, const obm_checkpoint *expert) {
    return obm__checkpoint_bytes(obm__checkpoint_is_change(expert) ? base : expert);
}

static uint64_t pair_bytes(const obm__pair *p) { return obm__tensor_bytes(&p->expert); }

static obm_tensor extra_of(const obm__pair *p) {
    obm_tensor t = p->expert;
    t.data =
        (const uint8_t *)t.data + obm__tensor_bytes(&p->base) / obm_dtype_size(p->base.dtype) * obm_dtype_size(t.dtype);
    t.shape[0] = p->extra_rows;
    return t;
}

static obm_status fill_item(job *j, item *it, const obm__pair *p, obm_error *err) {
    *it = (item){.pair = p, .mode = OBM_MODE_FULL};
    OBM_TRY(obm__policy_mode(&j->policy, p, &it->mode, err));
    if (p->expert.data == p->base.data) it->mode = OBM_MODE_SAME; /* an adapter leaves it alone */
    if (it->mode != OBM_MODE_1BIT && it->mode != OBM_MODE_MASK) return OBM_OK;
    it->rows = p->base.shape[0];
    it->cols = p->base.shape[1];
    it->row_bytes = obm__row_bytes(it->cols);
    if (it->mode == OBM_MODE_MASK) return OBM_OK;
    it->planes = j->policy.planes;
    it->n_scales = obm__scale_count(j->policy.scale, it->rows, it->cols);
    return OBM_OK;
}

static void warn_unused_rules(const job *j) {
    for (size_t r = 0; r < j->policy.n_map; r++) {
        const char *glob = j->policy.map[r].glob;
        size_t i = 0;
        while (i < j->n && !obm__glob_matches(glob, j->items[i].pair->name)) i++;
        if (i == j->n) obm__warn(j->r->ctx, "expert %s: map rule %s matches no tensor", j->r->expert->name, glob);
    }
}

/* A matrix that nobody knows may be anything (the router of a mixture of experts): it stays as it is, and that is said.
 */
static void warn_unknown_matrices(const job *j) {
    const char *first = NULL;
    size_t n = 0;
    for (size_t i = 0; i < j->n; i++) {
        const obm__pair *p = j->items[i].pair;
        if (p->cls != OBM_CLASS_OTHER || !obm__pair_is_matrix(p) || p->expert.data == p->base.data ||
            obm__policy_rule(&j->policy, p->name))
            continue;
        if (!n++) first = p->name;
    }
    if (!n || !j->policy.classes) return;
    obm__warn(j->r->ctx, "expert %s: %zu %s of no known module class %s full (%s); a map rule can decide otherwise",
              j->r->expert->name, n, n == 1 ? "matrix" : "matrices", n == 1 ? "stays" : "stay", first);
}

/* ---- tensors that equal the base's ---- */

typedef struct same_job {
    const obm_kernels *k;
    const obm__pair *pair;
    int64_t first, n; /* elements */
    _Atomic int differ;
} same_job;

static bool same_bytes(const obm__pair *p, int64_t at, int64_t n) {
    size_t size = obm_dtype_size(p->base.dtype);
    return !memcmp((const char *)p->base.data + (size_t)at * size, (const char *)p->expert.data + (size_t)at * size,
                   (size_t)n * size);
}

/* In another dtype: as a task vector sees them, in f32. */
static bool same_values(const obm_kernels *k, const obm__pair *p, int64_t at, int64_t n) {
    float a[1024], b[1024];
    for (int64_t end = at + n, m; at < end; at += m) {
        m = end - at < 1024 ? end - at : 1024;
        obm__widen(k, &p->base, at, m, a);
        obm__widen(k, &p->expert, at, m, b);
        if (memcmp(a, b, (size_t)m * sizeof *a)) return false;
    }
    return true;
}

static bool same_elements(const obm_kernels *k, const obm__pair *p, int64_t at, int64_t n) {
    return p->base.dtype == p->expert.dtype ? same_bytes(p, at, n) : same_values(k, p, at, n);
}

static void same_range(void *arg, size_t begin, size_t end, int id) {
    (void)id;
    same_job *s = arg;
    for (size_t i = begin; i < end && !atomic_load_explicit(&s->differ, memory_order_relaxed); i++) {
        int64_t at = (int64_t)i * SAME_STEP, n = s->n - at < SAME_STEP ? s->n - at : SAME_STEP;
        if (!same_elements(s->k, s->pair, s->first + at, n)) atomic_store(&s->differ, 1);
    }
}

/* The rows that the base has, value for value.  Most fine-tunes differ in the first page, for which nobody wakes up. */
obm_status obm__pair_is_same(obm_context *ctx, const obm__pair *p, obm__pulse *ticker, bool *same, obm_error *err) {
    *same = false;
    if (p->lora) return OBM_OK;
    int64_t total = obm_tensor_count(&p->base), batch = (int64_t)ctx->threads * 8 * SAME_STEP;
    int64_t first = total < SAME_FIRST ? total : SAME_FIRST;
    bool differ = !same_elements(ctx->k, p, 0, first);
    obm__tensor_release(&p->base, 0, total); /* a fault maps neighbours along */
    obm__tensor_release(&p->expert, 0, total);
    if (differ) return OBM_OK;
    for (int64_t at = 0; at < total; at += batch) {
        same_job s = {.k = ctx->k, .pair = p, .first = at, .n = total - at < batch ? total - at : batch};
        obm__parallel(ctx, (size_t)((s.n - 1) / SAME_STEP + 1), 1, same_range, &s);
        if (s.differ) return OBM_OK;
        obm__tensor_release(&p->base, at, s.n);
        obm__tensor_release(&p->expert, at, s.n);
        OBM_TRY(obm__tick(ticker, 0, err));
    }
    *same = true;
    return OBM_OK;
}

static obm_status find_same(job *j, item *it, obm_error *err) {
    bool same = it->mode == OBM_MODE_SAME;
    if (same) return OBM_OK;
    OBM_TRY(obm__pair_is_same(j->r->ctx, it->pair, j->r->ticker, &same, err));
    if (!same) return OBM_OK;
    it->mode = OBM_MODE_SAME;
    it->planes = 0;
    return OBM_OK;
}

/* ---- layout of the file ---- */

/* Planes and masks first, by name: their sizes are multiples of 4, so every scale is aligned.  Then whole tensors by
 * falling element size, which aligns them as far as their base offset allows. */
static int compare_slots(const void *x, const void *y) {
    const slot *a = x, *b = y;
    bool first = a->kind <= SLOT_MASK;
    if (first != (b->kind <= SLOT_MASK)) return first ? -1 : 1;
    if (a->align != b->align) return a->align > b->align ? -1 : 1;
    if (a->item != b->item) return a->item < b->item ? -1 : 1;
    return (int)a->kind - (int)b->kind;
}

static size_t factor_align(const obm__lowrank *l) {
    size_t a = obm_dtype_size(l->a.dtype), b = obm_dtype_size(l->b.dtype);
    return a < b ? a : b;
}

static void lay_out(job *j) {
    j->n_slots = 0;
    for (size_t i = 0; i < j->n; i++) {
        const item *it = &j->items[i];
        size_t align = obm_dtype_size(it->pair->expert.dtype);
        if (it->mode == OBM_MODE_1BIT && it->planes) j->slots[j->n_slots++] = (slot){i, SLOT_PLANES, 0};
        if (it->mode == OBM_MODE_MASK) j->slots[j->n_slots++] = (slot){i, SLOT_MASK, 0};
        if (it->mode == OBM_MODE_FULL && it->pair->lora)
            j->slots[j->n_slots++] = (slot){i, SLOT_FACTORS, factor_align(it->pair->lora)};
        else if (it->mode == OBM_MODE_FULL)
            j->slots[j->n_slots++] = (slot){i, SLOT_FULL, align};
        else if (it->pair->extra_rows)
            j->slots[j->n_slots++] = (slot){i, SLOT_EXTRA, align};
    }
    if (j->n_slots) qsort(j->slots, j->n_slots, sizeof *j->slots, compare_slots);
}

static obm_status declare(obm__st_writer *w, const char *name, const char *suffix, int plane, const obm_tensor *t,
                          obm_error *err) {
    char *full = plane < 0 ? obm__format("%s%s", name, suffix) : obm__format("%s%s.%d", name, suffix, plane);
    if (!full) return obm__fail_nomem(err, strlen(name));
    obm_status status = obm__st_writer_declare(w, full, t->dtype, t->ndim, t->shape, err);
    obm_free(full);
    return status;
}

static obm_tensor scale_shape(const job *j, const item *it) {
    obm_tensor t = {.dtype = OBM_F32, .ndim = 1, .shape = {it->n_scales}};
    if (j->policy.scale.kind != OBM_SCALE_GROUP) return t;
    t.ndim = 2;
    t.shape[0] = it->rows;
    t.shape[1] = it->n_scales / it->rows;
    return t;
}

static obm_status declare_slot(job *j, const slot *s, obm_error *err) {
    const item *it = &j->items[s->item];
    const char *name = it->pair->name;
    if (s->kind == SLOT_FULL) return declare(j->writer, name, "", -1, &it->pair->expert, err);
    if (s->kind == SLOT_FACTORS) {
        OBM_TRY(declare(j->writer, name, ".lora_A", -1, &it->pair->lora->a, err));
        return declare(j->writer, name, ".lora_B", -1, &it->pair->lora->b, err);
    }
    if (s->kind == SLOT_EXTRA) {
        obm_tensor extra = extra_of(it->pair);
        return declare(j->writer, name, ".extra", -1, &extra, err);
    }
    if (s->kind == SLOT_MASK) {
        obm_tensor bits = {.dtype = OBM_U8, .ndim = 2, .shape = {it->rows, it->row_bytes}};
        return declare(j->writer, name, ".mask", -1, &bits, err);
    }
    obm_tensor signs = {.dtype = OBM_U8, .ndim = 2, .shape = {it->rows, it->row_bytes}}, scales = scale_shape(j, it);
    for (int p = 0; p < it->planes; p++) {
        OBM_TRY(declare(j->writer, name, ".sign", p, &signs, err));
        OBM_TRY(declare(j->writer, name, ".scale", p, &scales, err));
    }
    return OBM_OK;
}

/* ---- planes ---- */

/* One look at base and expert is enough, and rows are short enough to have some in memory. */
static bool streams_rows(const item *it) {
    return it->planes == 1 && !it->pair->lora && it->cols <= OBM_STREAM_WINDOW && obm_tensor_count(&it->pair->base) > 0;
}

typedef struct plane_sink {
    job *j;
    const item *it;
    int plane;
    uint64_t ticks;   /* at the begin of the tensor */
    int64_t released; /* rows whose pages are let go */
} plane_sink;

static obm_status take_signs(void *user, const void *bytes, size_t n, int64_t rows_done, obm_error *err) {
    plane_sink *s = user;
    const item *it = s->it;
    OBM_TRY(obm__st_writer_write(s->j->writer, bytes, n, err));
    if (!it->pair->lora) {
        int64_t first = s->released * it->cols, count = rows_done * it->cols - first;
        obm__tensor_release(&it->pair->base, first, count);
        obm__tensor_release(&it->pair->expert, first, count);
    }
    s->released = rows_done;
    double share = ((double)s->plane + (double)rows_done / (double)it->rows) / it->planes;
    return obm__tick(s->j->r->ticker, s->ticks + (uint64_t)(share * (double)pair_bytes(it->pair)), err);
}

static void free_alphas(float **alphas, int n) {
    for (int p = 0; p < n; p++) obm_free(alphas[p]);
}

static obm_status write_planes(job *j, item *it, obm_error *err) {
    float *alphas[OBM_MAX_PLANES] = {0};
    obm_status status = OBM_OK;
    it->empty = 0;
    for (int p = 0; p < it->planes && status == OBM_OK; p++) {
        plane_sink sink = {j, it, p, j->ticks, 0};
        bool zero = false;
        alphas[p] = obm__calloc((size_t)it->n_scales, sizeof(float));
        status = alphas[p]
                     ? obm__onebit_plane(j->r->ctx, it->pair, j->policy.scale, p, alphas, take_signs, &sink, &zero, err)
                     : obm__fail_nomem(err, (uint64_t)it->n_scales * sizeof(float));
        if (status == OBM_OK)
            status = obm__st_writer_write(j->writer, alphas[p], (size_t)it->n_scales * sizeof(float), err);
        it->empty += zero; /* a plane of zeros is followed by planes of zeros only */
    }
    free_alphas(alphas, it->planes);
    j->ticks += pair_bytes(it->pair);
    return status;
}

/* ---- masks ---- */

static obm_status write_mask(job *j, item *it, obm_error *err) {
    OBM_TRY(obm__mask_write(j->r->shared, it->pair, j->writer, j->ticks, &it->sums, err));
    j->ticks += pair_bytes(it->pair);
    return OBM_OK;
}

/* EMR's rescaler: one per expert, over all of its masks (Huang et al., arXiv 2405.17461, equation 4). */
static obm_status find_scaling(job *j, obm_error *err) {
    double *own = obm__calloc(j->n, 2 * sizeof *own), *of;
    if (!own) return obm__fail_nomem(err, j->n * 2 * sizeof *own);
    of = own + j->n;
    for (size_t i = 0; i < j->n; i++) {
        own[i] = j->items[i].sums.own;
        of[i] = j->items[i].sums.shared;
    }
    double kept = obm__tree_sum(of, j->n);
    j->scaling = kept > 0 ? (float)(obm__tree_sum(own, j->n) / kept) : 0;
    obm_free(own);
    if (isfinite(j->scaling)) return OBM_OK;
    return obm__fail(err, OBM_E_VALUE, "expert %s: the scaling of its masks is too large for f32", j->r->expert->name);
}

/* ---- factors ---- */

/* Small beside what they stand for: written as they are, in one piece. */
static obm_status write_factor(job *j, const obm__pair *p, const obm_tensor *t, const char *which, obm_error *err) {
    const obm_kernels *k = j->r->ctx->k;
    float x[OBM_BLOCK];
    for (int64_t at = 0, n, count = obm_tensor_count(t); at < count; at += n) {
        n = count - at < OBM_BLOCK ? count - at : OBM_BLOCK;
        obm__widen(k, t, at, n, x);
        int64_t bad = (int64_t)k->find_nonfinite(x, (size_t)n);
        if (bad < n)
            return obm__fail(err, OBM_E_VALUE, "tensor %s: NaN or Inf in the factor %s at index %lld", p->name, which,
                             (long long)(at + bad));
    }
    return obm__st_writer_write(j->writer, t->data, obm__tensor_bytes(t), err);
}

static obm_status write_factors(job *j, const obm__pair *p, obm_error *err) {
    OBM_TRY(write_factor(j, p, &p->lora->a, "lora_A", err));
    OBM_TRY(write_factor(j, p, &p->lora->b, "lora_B", err));
    j->ticks += pair_bytes(p);
    return obm__tick(j->r->ticker, j->ticks, err);
}

/* ---- the file ---- */

static obm_status write_slot(job *j, const slot *s, obm_error *err) {
    item *it = &j->items[s->item];
    if (s->kind == SLOT_PLANES) return write_planes(j, it, err);
    return s->kind == SLOT_MASK ? write_mask(j, it, err) : write_factors(j, it->pair, err);
}

/* Whole tensors, and planes for which one look at base and expert is enough; the others are write_slot's. */
static bool can_stream(const job *j, const slot *s) {
    const item *it = &j->items[s->item];
    if (s->kind != SLOT_PLANES) return s->kind == SLOT_FULL || s->kind == SLOT_EXTRA;
    return streams_rows(it);
}

/* The slots from `first` on that can go together; *end is behind them. */
static obm_status write_stream(job *j, size_t first, size_t *end, obm_error *err) {
    size_t n = 0;
    while (first + n < j->n_slots && can_stream(j, &j->slots[first + n])) n++;
    obm__stream_part *parts = obm__calloc(n, sizeof *parts);
    bool *empty = obm__calloc(n, sizeof *empty);
    obm_status status = parts && empty ? OBM_OK : obm__fail_nomem(err, n * sizeof *parts);
    uint64_t bytes = 0;
    for (size_t i = 0; status == OBM_OK && i < n; i++) {
        const slot *s = &j->slots[first + i];
        const obm__pair *p = j->items[s->item].pair;
        int64_t begin = s->kind == SLOT_EXTRA ? obm_tensor_count(&p->base) : 0;
        parts[i] = (obm__stream_part){p, s->kind == SLOT_PLANES, j->policy.scale, begin};
        bytes += pair_bytes(p) - (uint64_t)begin * obm_dtype_size(p->expert.dtype);
    }
    obm__stream s = {j->writer, j->v, parts, n, empty, j->r->digests, j->r->ticker, j->ticks};
    if (status == OBM_OK) status = obm__stream_run(j->r->ctx, &s, err);
    for (size_t i = 0; status == OBM_OK && i < n; i++)
        if (parts[i].planes) j->items[j->slots[first + i].item].empty = empty[i];
    obm_free(parts);
    obm_free(empty);
    OBM_TRY(status);
    j->ticks += bytes;
    *end = first + n;
    return obm__tick(j->r->ticker, j->ticks, err);
}

static obm_status write_all(job *j, obm_error *err) {
    OBM_TRY(obm__st_writer_metadata(j->writer, "format", OBM_PACK_FORMAT, err));
    for (size_t i = 0; i < j->n_slots; i++) OBM_TRY(declare_slot(j, &j->slots[i], err));
    OBM_TRY(obm__st_writer_begin(j->writer, err));
    for (size_t i = 0; i < j->n_slots;) {
        OBM_TRY(obm__task_vector_check(j->v, err));
        if (can_stream(j, &j->slots[i]))
            OBM_TRY(write_stream(j, i, &i, err));
        else
            OBM_TRY(write_slot(j, &j->slots[i++], err));
    }
    return OBM_OK;
}

/* Takes the planes of zeros out of the plan; true if there were any. */
static bool drop_empty_planes(job *j) {
    bool any = false;
    for (size_t i = 0; i < j->n; i++) {
        any = any || j->items[i].empty;
        j->items[i].planes -= j->items[i].empty;
        j->items[i].empty = 0;
    }
    return any;
}

obm_status obm__pack_publish(obm__st_writer *w, const char *dir, const char *stem, char xxh3[33], uint64_t *bytes,
                             char **name, obm_error *err) {
    *bytes = obm__st_writer_size(w);
    OBM_TRY(obm__st_writer_seal(w, xxh3, err));
    char *file = obm__format("%s-%.16s.safetensors", stem, xxh3), *path = file ? obm__path_join(dir, file) : NULL;
    obm_status status = path ? obm__st_writer_publish(w, path, err) : obm__fail_nomem(err, strlen(dir));
    obm_free(path);
    if (status == OBM_OK)
        *name = file;
    else
        obm_free(file);
    return status;
}

obm_status obm__pack_writer(const char *dir, const char *stem, obm__st_writer **out, obm_error *err) {
    char *file = obm__format("%s" OBM_PACK_PARTIAL, stem), *path = file ? obm__path_join(dir, file) : NULL;
    obm_status status = path ? obm__st_writer_new(path, out, err) : obm__fail_nomem(err, strlen(dir));
    obm_free(file);
    obm_free(path);
    return status;
}

static obm_status write_file(job *j, char xxh3[33], uint64_t *bytes, char **name, obm_error *err) {
    uint64_t ticks = j->ticks;
    for (;;) {
        lay_out(j);
        j->ticks = ticks;
        OBM_TRY(obm__pack_writer(j->r->dir, j->r->expert->name, &j->writer, err));
        obm_status status = write_all(j, err);
        bool again = status == OBM_OK && drop_empty_planes(j);
        if (status == OBM_OK && !again)
            status = obm__pack_publish(j->writer, j->r->dir, j->r->expert->name, xxh3, bytes, name, err);
        obm__st_writer_free(j->writer);
        if (!again) return status;
    }
}

/* ---- the record ---- */

static obm_json *factors_record(const obm__lowrank *l) {
    obm_json *r = obm__json_new_object();
    bool ok = obm__json_set(r, "rank", obm__json_new_int(l->rank));
    ok = obm__json_set(r, "scaling", obm__json_new_real(l->scaling)) && ok;
    ok = obm__json_set(r, "transposed", obm__json_new_bool(l->transposed)) && ok;
    ok = obm__json_set(r, "a", obm__json_new_string(obm_dtype_name(l->a.dtype))) && ok;
    ok = obm__json_set(r, "b", obm__json_new_string(obm_dtype_name(l->b.dtype))) && ok;
    if (ok) return r;
    obm__json_free(r);
    return NULL;
}

static obm_json *item_record(const job *j, const item *it) {
    obm_json *r = obm__json_new_object();
    bool ok = obm__json_set(r, "mode", obm__json_new_string(obm_mode_name(it->mode))) &&
              obm__put_tensor(r, &it->pair->expert);
    if (it->mode == OBM_MODE_1BIT) {
        char *scale = obm__scale_text(j->policy.scale);
        ok = ok && obm__json_set(r, "planes", obm__json_new_int(it->planes));
        ok = ok && scale && obm__json_set(r, "scale", obm__json_new_string(scale));
        obm_free(scale);
    }
    if (it->mode == OBM_MODE_MASK) ok = ok && obm__json_set(r, "scaling", obm__json_new_real(j->scaling));
    const obm__lowrank *l = it->pair->lora;
    if (l) ok = ok && obm__json_set(r, "adapter_bytes", obm__json_new_int((int64_t)obm__lowrank_bytes(l)));
    if (l && it->mode == OBM_MODE_FULL) ok = ok && obm__json_set(r, "lora", factors_record(l));
    if (ok) return r;
    obm__json_free(r);
    return NULL;
}

static obm_json *make_record(const job *j, const char *file, uint64_t bytes, const char *xxh3) {
    obm_json *r = obm__file_record(file, bytes, xxh3), *tensors = obm__json_new_object();
    bool ok = r && tensors;
    ok = obm__json_set(r, "name", obm__json_new_string(j->r->expert->name)) && ok;
    ok = obm__json_set(r, "policy", obm__json_new_string(j->policy_text)) && ok;
    ok = obm__json_set(r, "source", obm__path_value(j->r->expert->path)) && ok;
    for (size_t i = 0; i < j->n && ok; i++)
        ok = obm__json_set(tensors, j->items[i].pair->name, item_record(j, &j->items[i]));
    ok = obm__json_set(r, "tensors", tensors) && ok;
    if (j->text) ok = ok && obm__json_set(r, "text", obm__json_copy(j->text));
    if (ok) return r;
    obm__json_free(r);
    return NULL;
}

static obm_status produce(job *j, obm_json **record, obm_error *err) {
    char xxh3[33], *name = NULL;
    uint64_t bytes = 0;
    j->scaling = 1;
    OBM_TRY(write_file(j, xxh3, &bytes, &name, err));
    obm_status status = j->r->shared && j->r->shared->rule.emr ? find_scaling(j, err) : OBM_OK;
    if (status == OBM_OK) *record = make_record(j, name, bytes, xxh3);
    obm_free(name);
    return status != OBM_OK ? status : *record ? OBM_OK : obm__fail_nomem(err, 0);
}

/* ---- planning ---- */

static uint64_t plane_bytes(const item *it) {
    return (uint64_t)it->planes * (uint64_t)(it->rows * it->row_bytes + it->n_scales * (int64_t)sizeof(float));
}

static uint64_t slot_bytes(const job *j, const slot *s) {
    const item *it = &j->items[s->item];
    if (s->kind == SLOT_FULL) return pair_bytes(it->pair);
    if (s->kind == SLOT_FACTORS) return obm__lowrank_bytes(it->pair->lora);
    if (s->kind == SLOT_EXTRA) return pair_bytes(it->pair) - (uint64_t)obm_tensor_count(&it->pair->base) * s->align;
    return s->kind == SLOT_MASK ? (uint64_t)(it->rows * it->row_bytes) : plane_bytes(it);
}

static uint64_t read_bytes(const obm__pair *p) {
    if (p->lora) return obm__lowrank_bytes(p->lora);
    if (p->expert.data == p->base.data) return 0; /* the adapter leaves it alone */
    return pair_bytes(p) + obm__tensor_bytes(&p->base);
}

/* Buffers, the scales of all planes, and the mapped stripe of both models. */
static uint64_t item_memory(const job *j, const item *it) {
    uint64_t threads = (uint64_t)j->r->ctx->threads,
             sizes = obm_dtype_size(it->pair->base.dtype) + obm_dtype_size(it->pair->expert.dtype);
    uint64_t mapped = threads * OBM_STREAM_WINDOW * sizes, tensor = read_bytes(it->pair);
    uint64_t buffers = it->planes ? obm__onebit_memory(j->r->ctx, it->rows, it->cols) : 0;
    if (it->mode == OBM_MODE_MASK) {
        mapped += threads * OBM_STREAM_WINDOW * sizeof(float);
        tensor += (uint64_t)obm_tensor_count(&it->pair->base) * sizeof(float);
        buffers = obm__mask_memory(j->r->ctx, it->rows, it->cols);
    }
    bool rows = streams_rows(it);
    if (!it->pair->lora) buffers += obm__stream_memory(j->r->ctx, rows ? it->cols : 1, rows ? it->cols * sizes : 0);
    return buffers + (uint64_t)it->planes * (uint64_t)it->n_scales * sizeof(float) +
           (mapped < tensor ? mapped : tensor);
}

static void add_to_plan(job *j) {
    obm_plan *plan = j->r->plan;
    lay_out(j);
    for (size_t i = 0; i < j->n; i++) {
        const item *it = &j->items[i];
        uint64_t memory = item_memory(j, it), n = (uint64_t)obm_tensor_count(&it->pair->base);
        plan->tensors++;
        plan->tiles += obm__pieces(n, (uint64_t)OBM_STREAM_WINDOW * (uint64_t)j->r->ctx->threads);
        plan->bytes_read += read_bytes(it->pair);
        if (memory > plan->peak_memory) plan->peak_memory = memory;
    }
    for (size_t i = 0; i < j->n_slots; i++) plan->bytes_written += slot_bytes(j, &j->slots[i]);
    plan->bytes_written += j->text_bytes;
}

/* An adapter of a low rank may hold fewer bytes than one sign per weight. */
static void warn_larger_planes(const job *j) {
    uint64_t planes = 0, factors = 0;
    for (size_t i = 0; i < j->n; i++) {
        const item *it = &j->items[i];
        if (it->mode != OBM_MODE_1BIT || !it->pair->lora) continue;
        planes += plane_bytes(it);
        factors += obm__lowrank_bytes(it->pair->lora);
    }
    if (planes > factors)
        obm__warn(j->r->ctx,
                  "expert %s: the planes take %llu bytes, the adapter's factors %llu: policy full keeps the factors",
                  j->r->expert->name, (unsigned long long)planes, (unsigned long long)factors);
}

static obm_status prepare(job *j, obm_error *err) {
    OBM_TRY(obm__policy_parse(j->r->expert, j->r->profile, j->r->shared != NULL, &j->policy, &j->policy_text, err));
    j->n = j->v->count;
    j->items = obm__calloc(j->n, sizeof *j->items);
    j->slots = obm__calloc(j->n, 2 * sizeof *j->slots); /* planes and extra rows of the same tensor */
    if (!j->items || !j->slots) return obm__fail_nomem(err, j->n * (sizeof *j->items + 2 * sizeof *j->slots));
    for (size_t i = 0; i < j->n; i++) OBM_TRY(fill_item(j, &j->items[i], &j->v->pairs[i], err));
    warn_unused_rules(j);
    warn_unknown_matrices(j);
    warn_larger_planes(j);
    return OBM_OK;
}

static obm_status compress_items(job *j, obm_json **record, obm_error *err) {
    OBM_TRY(prepare(j, err));
    if (j->r->plan) add_to_plan(j);
    if (j->r->dry_run) return OBM_OK;
    j->ticks = j->r->ticker ? j->r->ticker->done : 0;
    for (size_t i = 0; i < j->n; i++) {
        OBM_TRY(obm__task_vector_check(j->v, err));
        OBM_TRY(find_same(j, &j->items[i], err));
        if (j->items[i].mode == OBM_MODE_SAME || j->items[i].mode == OBM_MODE_DROP)
            j->ticks += pair_bytes(j->items[i].pair);
    }
    return produce(j, record, err);
}

obm_status obm__expert_write(const obm__expert_request *r, const obm_checkpoint *checkpoint, obm_json **record,
                             obm_error *err) {
    job j = {.r = r, .v = r->v};
    obm_status status = r->v ? OBM_OK : obm_task_vector_new(r->base, checkpoint, &j.v, err);
    if (status == OBM_OK) status = obm__text_write(r, checkpoint, &j.text, &j.text_bytes, err);
    if (status == OBM_OK) status = compress_items(&j, record, err);
    if (status == OBM_E_VALUE && err) { /* the tensor is named already, as a task vector does */
        obm_error why = *err;
        obm__fail(err, status, "expert %s: %.640s", r->expert->name, why.message);
    }
    if (!r->v) obm_task_vector_free(j.v);
    obm__json_free(j.text);
    obm_free(j.policy_text);
    obm_free(j.items);
    obm_free(j.slots);
    return status;
}
