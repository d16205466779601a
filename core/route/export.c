/*
 * Writes one route as a dense Hugging Face folder, tile by tile.  Decides dtypes, ties and the config; the values are
 * dynamic.c's, the files model_writer.c's.
 *
 * Rounding to a 16-bit dtype swallows deltas below half a step of the weight (at 0.3 % relative norm about 43 % of
 * them), so the loss is counted: elements that the route changes in f32, and of those the ones that end as the base's
 * value.
 */
#include "dynamic.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

/* Elements per tile: two buffers of 4 MiB, and enough rows for every worker. */
#define EXPORT_TILE ((int64_t)1 << 20)
/* For the estimate of a dry run: nanoseconds per element and thread, and bytes per second of a disk. */
#define NANOSECONDS_PER_ELEMENT 4.0
#define DISK_BYTES_PER_SECOND 5e8

typedef struct export_job {
    const obm_pack *pack;
    const obm__route_plan *plan;
    const double *weights;
    bool has_dtype;
    obm_dtype dtype;
    const obm_export_options *options;
    obm__pulse *pulse; /* of bytes written */
    obm_export_report report;
    _Atomic uint64_t changed, lost;
    _Atomic int failed;
    _Atomic uint64_t bad; /* the first element that cannot be written, UINT64_MAX without */
    /* the tile at hand */
    size_t tensor;
    int64_t row, cols;
    float *values;  /* (rows, cols) */
    uint8_t *bytes; /* the same in the output dtype */
    obm_dtype out;
} export_job;

/* ---- what is written ---- */

static obm_status parse_dtype(export_job *j, const char *text, obm_error *err) {
    j->has_dtype = text && obm__dtype_find(text, &j->dtype);
    if (!text || j->has_dtype) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "export: dtype %.32s, expected f32, bf16 or f16", text);
}

/* The base's dtype by default.  F64 has no place in an f32 pipeline: such a tensor is written as F32 where it changes.
 */
static obm_dtype dtype_of(const export_job *j, size_t tensor) {
    obm_dtype own = j->pack->tensors[tensor].base.dtype;
    if (!obm__is_float(own)) return own;
    if (j->has_dtype) return j->dtype;
    return own == OBM_F64 && obm__route_changes(j->plan, tensor) ? OBM_F32 : own;
}

/* The base's bytes as they are. */
static bool is_copied(const export_job *j, size_t tensor) {
    return !obm__route_changes(j->plan, tensor) && dtype_of(j, tensor) == j->pack->tensors[tensor].base.dtype;
}

static bool shape_of(const export_job *j, size_t tensor, obm_tensor *shape) {
    bool exists;
    obm__route_shape(j->plan, tensor, shape, &exists);
    shape->dtype = dtype_of(j, tensor);
    return exists;
}

static void count_bytes(export_job *j) {
    obm_plan *plan = &j->report.plan;
    uint64_t elements = 0;
    *plan = (obm_plan){0};
    for (size_t t = 0; t < j->pack->n_tensors; t++) {
        obm_tensor shape;
        if (!shape_of(j, t, &shape)) continue;
        plan->tensors++;
        plan->bytes_read += obm__tensor_bytes(&j->pack->tensors[t].base);
        plan->bytes_written += obm__tensor_bytes(&shape);
        uint64_t count = (uint64_t)obm_tensor_count(&shape);
        elements += is_copied(j, t) ? 0 : count;
        plan->tiles += is_copied(j, t) ? 1 : obm__pieces(count, (uint64_t)EXPORT_TILE);
        for (size_t k = 0; k < j->pack->n_experts && obm__route_changes(j->plan, t); k++)
            plan->bytes_read += j->pack->experts[k].entries[t].bytes_pack;
    }
    j->pulse->total = plan->bytes_written;
    plan->peak_memory = (uint64_t)EXPORT_TILE * 8;
    plan->seconds = (double)elements * NANOSECONDS_PER_ELEMENT * 1e-9 / j->pack->ctx->threads +
                    (double)plan->bytes_written / DISK_BYTES_PER_SECOND;
}

/* ---- config and card ---- */

/* The head is written on its own.  Then config.json must not say that it is tied, nor leave that to the architecture:
 * transformers before version 5 would throw the head away. */
static bool is_untied(const export_job *j) {
    size_t head = obm__pack_find(j->pack, OBM_HEAD_NAME), embedding = obm__pack_find(j->pack, OBM_EMBEDDING_NAME);
    obm_tensor shape;
    if (head == SIZE_MAX || !shape_of(j, head, &shape)) return false;
    if (j->pack->tensors[head].in_base) return true;
    return obm__route_changes(j->plan, head) || (embedding != SIZE_MAX && obm__route_changes(j->plan, embedding));
}

static bool set_dtype(obm_json *config, obm_dtype dtype) {
    const char *name = dtype == OBM_F32 ? "float32" : dtype == OBM_F16 ? "float16" : "bfloat16";
    const char *key = obm__json_get(config, "dtype") ? "dtype" : "torch_dtype";
    return obm__json_set(config, key, obm__json_new_string(name));
}

/* What the routed expert brings itself; NULL: a soft route or the base. */
static const obm__pack_text *own_text(const export_job *j) {
    size_t hard = obm__route_hard(j->weights, j->pack->n_experts);
    return hard == SIZE_MAX ? NULL : &j->pack->experts[hard].text;
}

/* Each of tokenizer, template and generation_config comes from one side as a whole. */
static size_t choose_files(const obm__pack_text *t, const char *instead[][2]) {
    size_t n = 0;
    for (int f = 0; t && f < OBM_TEXT_FILES; f++) {
        if (!obm__text_is_own(t, (obm__text_file)f)) continue;
        instead[n][0] = obm__text_file_name((obm__text_file)f);
        instead[n++][1] = t->paths[f];
    }
    for (size_t i = 0; t && t->tokenizer && obm__text_derived(i); i++) {
        instead[n][0] = obm__text_derived(i);
        instead[n++][1] = NULL;
    }
    return n;
}

/* *out owned; NULL where the base has none. */
static obm_status make_config(const export_job *j, obm_json **out, obm_error *err) {
    size_t embedding = obm__pack_find(j->pack, OBM_EMBEDDING_NAME);
    obm_tensor shape;
    *out = NULL;
    if (!j->pack->base->config) return OBM_OK;
    obm_json *config = obm__json_copy(j->pack->base->config);
    bool ok = config != NULL;
    if (ok && is_untied(j)) ok = obm__config_untie(config);
    if (ok && j->has_dtype) ok = set_dtype(config, j->dtype);
    if (ok && own_text(j) && own_text(j)->eos) ok = obm__text_set_eos(own_text(j), config);
    if (ok && embedding != SIZE_MAX && shape_of(j, embedding, &shape) && obm__route_changes(j->plan, embedding))
        ok = obm__text_config_set(config, "vocab_size", obm__json_new_int(shape.shape[0]));
    if (!ok) {
        obm__json_free(config);
        return obm__fail_nomem(err, 0);
    }
    *out = config;
    return OBM_OK;
}

static const char *reading_text(obm_reading reading) {
    return reading == OBM_READING_RECOMPUTED ? "recomputed" : "onto_base";
}

/* *out owned. */
static obm_status make_card(const export_job *j, char **out, obm_error *err) {
    const obm_pack *p = j->pack;
    obm__buffer b = {0};
    char *route;
    OBM_TRY(obm_pack_format_route(p, j->weights, &route, err));
    obm__buffer_printf(&b, "# Route `%s` of a onebitmerge pack\n\n", route);
    obm__buffer_printf(
        &b,
        "Written by onebitmerge %s: the base plus the routed task vectors plus lambda times TIES of the others.\n\n",
        obm_version());
    obm__buffer_printf(&b, "| | |\n|---|---|\n| pack | `%s` |\n| base | `%s` |\n| route | `%s` |\n", p->path,
                       p->base->path, route);
    obm__buffer_printf(&b, "| lambda | %g |\n| reading | %s |\n", p->settings.lambda,
                       reading_text(p->settings.reading));
    obm__buffer_printf(&b, "| trim of full tensors | density %g, scope %s |\n", p->settings.density,
                       p->settings.profile == OBM_PROFILE_PAPER ? "model" : "tensor");
    for (size_t k = 0; k < p->n_experts; k++)
        obm__buffer_printf(&b, "| expert %s | %s |\n", p->experts[k].name,
                           p->experts[k].policy ? p->experts[k].policy : "");
    bool own = own_text(j) && own_text(j)->tokenizer;
    obm__buffer_printf(&b, "\nThe tokenizer is the %s's.\n", own ? "expert" : "base");
    obm_free(route);
    if (b.failed) {
        obm__buffer_free(&b);
        return obm__fail_nomem(err, 0);
    }
    *out = b.data;
    return OBM_OK;
}

/* ---- tiles ---- */

/* Elements that the route changes in f32, and those of them that the output dtype gives the base's value. */
static void count_lost(export_job *j, int64_t row, const float *values, const uint8_t *bytes) {
    const obm_kernels *k = j->pack->ctx->k;
    const obm_tensor *base = &j->pack->tensors[j->tensor].base;
    size_t size = obm_dtype_size(j->out);
    uint64_t changed = 0, lost = 0;
    float before[512];
    uint8_t rounded[512 * 4];
    if ((row + 1) * j->cols > obm_tensor_count(base)) return; /* an extra row has no base */
    for (int64_t col = 0, n; col < j->cols; col += n) {
        n = j->cols - col < 512 ? j->cols - col : 512;
        obm__widen(k, base, row * j->cols + col, n, before);
        obm__narrow(k, j->out, before, n, rounded);
        for (int64_t i = 0; i < n; i++) {
            if (values[col + i] == before[i]) continue;
            changed++;
            lost += !memcmp(rounded + (size_t)i * size, bytes + (size_t)(col + i) * size, size);
        }
    }
    j->changed += changed;
    j->lost += lost;
}

/* All exponent bits set: NaN or Inf, whatever else. */
static bool is_finite_in(obm_dtype dtype, const uint8_t *at) {
    uint16_t half;
    float whole;
    memcpy(&half, at, sizeof half);
    if (dtype == OBM_F16) return (half & 0x7c00) != 0x7c00;
    if (dtype == OBM_BF16) return (half & 0x7f80) != 0x7f80;
    memcpy(&whole, at, sizeof whole);
    return isfinite(whole);
}

/* Notes the first element of n that is not a number as it would be written.  What the base itself holds where the route
 * changes nothing is the base's affair. */
static void find_bad(export_job *j, uint64_t first, const float *values, const uint8_t *bytes, int64_t n) {
    size_t size = obm_dtype_size(j->out);
    bool changes = obm__route_changes(j->plan, j->tensor);
    for (int64_t i = 0; i < n; i++) {
        if (is_finite_in(j->out, bytes + (size_t)i * size) || (!changes && !isfinite(values[i]))) continue;
        uint64_t index = first + (uint64_t)i, known = j->bad;
        while (index < known && !atomic_compare_exchange_weak(&j->bad, &known, index)) continue;
        return;
    }
}

static obm_status refuse_bad(const export_job *j, obm_error *err) {
    const char *name = j->pack->tensors[j->tensor].name;
    double value = (double)j->values[j->bad - (uint64_t)(j->row * j->cols)];
    if (isfinite(value))
        return obm__fail(err, OBM_E_VALUE, "export: tensor %s is %g at index %llu, too large for %s", name, value,
                         (unsigned long long)j->bad, obm_dtype_name(j->out));
    return obm__fail(err, OBM_E_VALUE, "export: tensor %s is %g at index %llu under this route", name, value,
                     (unsigned long long)j->bad);
}

static void run_tile(void *arg, size_t begin, size_t end, int worker) {
    export_job *j = arg;
    const obm_kernels *k = j->pack->ctx->k;
    float *values = j->values + begin * (size_t)j->cols;
    uint8_t *bytes = j->bytes + begin * (size_t)j->cols * obm_dtype_size(j->out);
    int64_t row = j->row + (int64_t)begin, n = (int64_t)(end - begin);
    (void)worker;
    if (obm__route_rows(j->plan, j->tensor, row, n, values, NULL) != OBM_OK) {
        j->failed = 1;
        return;
    }
    obm__narrow(k, j->out, values, n * j->cols, bytes);
    find_bad(j, (uint64_t)(row * j->cols), values, bytes, n * j->cols);
    for (int64_t i = 0; i < n; i++, values += j->cols, bytes += (size_t)j->cols * obm_dtype_size(j->out)) {
        count_lost(j, row + i, values, bytes);
    }
}

static obm_status write_copied(export_job *j, obm__model_writer *w, size_t tensor, obm_error *err) {
    const obm_tensor *t = &j->pack->tensors[tensor].base;
    size_t bytes = obm__tensor_bytes(t), piece = (size_t)EXPORT_TILE * 4;
    for (size_t at = 0; at < bytes; at += piece) {
        size_t n = bytes - at < piece ? bytes - at : piece;
        OBM_TRY(obm__model_writer_write(w, (const uint8_t *)t->data + at, n, err));
        OBM_TRY(obm__pulse_done(j->pulse, j->pulse->done + n, err));
    }
    return OBM_OK;
}

static obm_status write_merged(export_job *j, obm__model_writer *w, const obm_tensor *shape, obm_error *err) {
    int64_t rows, per_tile;
    obm__tensor_rows(shape, &rows, &j->cols);
    per_tile = j->cols < EXPORT_TILE ? EXPORT_TILE / (j->cols ? j->cols : 1) : 1;
    for (j->row = 0; j->row < rows; j->row += per_tile) {
        int64_t n = rows - j->row < per_tile ? rows - j->row : per_tile;
        size_t bytes = (size_t)(n * j->cols) * obm_dtype_size(j->out);
        obm__parallel(j->pack->ctx, (size_t)n, 1, run_tile, j);
        if (j->failed) return obm__fail_nomem(err, OBM_ROUTE_TASKS * 4096);
        if (j->bad != UINT64_MAX) return refuse_bad(j, err);
        OBM_TRY(obm__model_writer_write(w, j->bytes, bytes, err));
        OBM_TRY(obm__pulse_done(j->pulse, j->pulse->done + bytes, err));
    }
    return OBM_OK;
}

static obm_status write_tensors(export_job *j, obm__model_writer *w, obm_error *err) {
    for (size_t t = 0; t < j->pack->n_tensors; t++) {
        obm_tensor shape;
        if (!shape_of(j, t, &shape)) continue;
        j->tensor = t;
        j->out = shape.dtype;
        OBM_TRY(obm__pack_check(j->pack, err));
        OBM_TRY(is_copied(j, t) ? write_copied(j, w, t, err) : write_merged(j, w, &shape, err));
    }
    return OBM_OK;
}

static obm_status declare_tensors(export_job *j, obm__model_writer *w, obm_error *err) {
    for (size_t t = 0; t < j->pack->n_tensors; t++) {
        obm_tensor shape;
        if (!shape_of(j, t, &shape)) continue;
        OBM_TRY(obm__model_writer_declare(w, j->pack->tensors[t].name, shape.dtype, shape.ndim, shape.shape, err));
    }
    return OBM_OK;
}

/* ---- the whole ---- */

/* A tile holds at least one row. */
static obm_status alloc_tile(export_job *j, obm_error *err) {
    size_t elements = (size_t)EXPORT_TILE;
    for (size_t t = 0; t < j->pack->n_tensors; t++) {
        int64_t rows, cols;
        obm__tensor_rows(&j->pack->tensors[t].base, &rows, &cols);
        if ((size_t)cols > elements) elements = (size_t)cols;
    }
    j->values = obm__alloc(elements, sizeof *j->values);
    j->bytes = obm__alloc(elements, sizeof *j->values);
    return j->values && j->bytes ? OBM_OK : obm__fail_nomem(err, elements * 8);
}

static obm_status write_folder(export_job *j, const char *path, const obm__model_writer_options *o, obm_error *err) {
    obm__model_writer *w = NULL;
    OBM_TRY(obm__model_writer_new(path, o, &w, err));
    obm_status status = declare_tensors(j, w, err);
    if (status == OBM_OK) status = obm__model_writer_begin(w, err);
    if (status == OBM_OK) status = write_tensors(j, w, err);
    if (status == OBM_OK) status = obm__model_writer_finish(w, err);
    obm__model_writer_free(w);
    return status;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static obm_status run_export(export_job *j, const char *path, obm_error *err) {
    obm_json *config = NULL;
    char *card = NULL;
    double start = now();
    OBM_TRY(make_config(j, &config, err));
    obm_status status = make_card(j, &card, err);
    const char *instead[OBM_TEXT_FILES + 3][2];
    obm__model_writer_options o = {.instead = (const char *const(*)[2])instead,
                                   .n_instead = choose_files(own_text(j), instead),
                                   .shard_bytes = OBM_OPT(j->options, obm_export_options, shard_bytes, 0),
                                   .overwrite = OBM_OPT(j->options, obm_export_options, overwrite, false),
                                   .copy_from = j->pack->base->directory,
                                   .config = config,
                                   .card = card};
    if (status == OBM_OK) status = alloc_tile(j, err);
    if (status == OBM_OK) status = write_folder(j, path, &o, err);
    obm_free(j->values);
    obm_free(j->bytes);
    obm_free(card);
    obm__json_free(config);
    j->report.plan.seconds = now() - start;
    j->report.changed = j->changed;
    j->report.lost = j->lost;
    return status;
}

/* The base and the pack are being read while the output is written. */
static obm_status refuse_own_folder(const obm_pack *p, const char *path, obm_error *err) {
    const char *ours[] = {p->base->directory, p->path};
    for (int i = 0; i < 2; i++) {
        if (obm__same_path(path, ours[i]))
            return obm__fail(err, OBM_E_ARG, "export: %s is the folder of the %s itself", path, i ? "pack" : "base");
    }
    return OBM_OK;
}

/* pack.json tells where the experts came from; a folder that is there still is not written over. */
static obm_status refuse_sources(const obm_pack *p, const char *path, obm_error *err) {
    for (size_t k = 0; k < p->n_experts; k++) {
        const char *from = obm__json_string(obm__json_get(p->experts[k].record, "source"));
        if (!from || !obm__same_path(path, from)) continue;
        return obm__fail(err, OBM_E_ARG, "export: %s is the folder that expert %s was made from", path,
                         p->experts[k].name);
    }
    return OBM_OK;
}

static obm_status export_pack(const obm_pack *p, const double *weights, const obm_export_options *options,
                              const char *out_path, obm_export_report *report, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_export_options, options, err));
    bool dry = OBM_OPT(options, obm_export_options, dry_run, false);
    obm__route_plan *plan = NULL;
    export_job j = {.pack = p, .weights = weights, .options = options, .bad = UINT64_MAX};
    OBM_TRY(parse_dtype(&j, OBM_OPT(options, obm_export_options, dtype, NULL), err));
    OBM_TRY(refuse_own_folder(p, out_path, err));
    OBM_TRY(refuse_sources(p, out_path, err));
    OBM_TRY(obm__model_writer_check(out_path, OBM_OPT(options, obm_export_options, overwrite, false), err));
    obm__pulse pulse = obm__pulse_new(p->ctx, OBM_OPT(options, obm_export_options, progress, NULL),
                                      OBM_OPT(options, obm_export_options, progress_user, NULL), "export", 0);
    j.pulse = &pulse;
    OBM_TRY(obm__route_plan_new(p, weights, dry ? OBM_ROUTE_NONE : OBM_ROUTE_ALL, &pulse, &plan, err));
    j.plan = plan;
    count_bytes(&j);
    obm_status status = dry ? OBM_OK : run_export(&j, out_path, err);
    obm__route_plan_free(plan);
    if (status == OBM_OK && report) *report = j.report;
    return status;
}

obm_status obm_pack_export(const obm_pack *p, const double *weights, const obm_export_options *options,
                           const char *out_path, obm_export_report *report, obm_error *err) {
    OBM_TRY(obm__pack_use(p, err));
    obm_status status = export_pack(p, weights, options, out_path, report, err);
    obm__pack_unuse(p);
    return status;
}
