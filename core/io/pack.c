/* Opening, closing and looking at packs, and the check of all contents. */
#include "pack_parts.h"

#include <stdio.h>
#include <string.h>

/* ---- open ---- */

static obm_status check_version(const obm_json *manifest, const char *where, obm_error *err) {
    const char *format;
    int64_t version;
    if (obm__json_kind(manifest) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: expected an object, found %s", where, obm__json_kind_name(manifest));
    OBM_TRY(obm__field_string(manifest, "format", where, &format, err));
    if (strcmp(format, OBM_PACK_FORMAT)) {
        char shown[40];
        return obm__fail(err, OBM_E_FORMAT, "%s: \"format\" is \"%s\", expected \"" OBM_PACK_FORMAT "\"", where,
                         obm__printable(format, shown, sizeof shown));
    }
    OBM_TRY(obm__field_int(manifest, "version", 1, INT32_MAX, where, &version, err));
    if (version == OBM_PACK_VERSION || version == OBM_PACK_VERSION_SHARED) return OBM_OK;
    return obm__fail(err, OBM_E_UNSUPPORTED, "%s: version %lld of the format; this build reads versions %d and %d",
                     where, (long long)version, OBM_PACK_VERSION, OBM_PACK_VERSION_SHARED);
}

obm_status obm__manifest_read(const char *path, obm_json **out, char xxh3[33], obm_error *err) {
    char *where = obm__path_join(path, OBM_PACK_MANIFEST), *text = NULL;
    size_t size = 0;
    obm_json *manifest = NULL;
    obm_status status = where ? OBM_OK : obm__fail_nomem(err, strlen(path));
    if (status == OBM_OK && obm__is_directory(path) && !obm__file_exists(where)) {
        status = obm__fail(err, OBM_E_FORMAT, "%s is no pack: it has no " OBM_PACK_MANIFEST, path);
    }
    if (status == OBM_OK) status = obm__file_read(where, &text, &size, err);
    if (status == OBM_OK) status = obm__json_parse(text, size, where, &manifest, err);
    if (status == OBM_OK) obm__xxh3_of(text, size, xxh3);
    if (status == OBM_OK) status = check_version(manifest, where, err);
    obm_free(text);
    obm_free(where);
    if (status == OBM_OK)
        *out = manifest;
    else
        obm__json_free(manifest);
    return status;
}

static obm_status open_at(obm_context *ctx, const char *path, const char *base_path, obm__pulse *pulse, obm_pack **out,
                          obm_error *err) {
    obm_json *manifest = NULL;
    obm_checkpoint *base = NULL;
    const obm_json *record;
    char xxh3[33];
    OBM_TRY(obm__manifest_read(path, &manifest, xxh3, err));
    obm_status status = obm__field(manifest, "base", OBM_JSON_OBJECT, path, &record, err);
    if (status == OBM_OK) status = obm__base_open(ctx, record, path, base_path, &base, err);
    if (status == OBM_OK) status = obm__base_check(ctx, base, record, path, false, pulse, err);
    if (status == OBM_OK) status = obm__pack_load(ctx, path, manifest, base, out, err);
    if (status != OBM_OK) {
        obm_checkpoint_free(base);
        obm__json_free(manifest);
        return status;
    }
    memcpy((*out)->manifest_xxh3, xxh3, sizeof xxh3);
    return OBM_OK;
}

obm_status obm__pack_open(obm_context *ctx, const char *path, const char *base_path, obm__pulse *pulse, obm_pack **out,
                          obm_error *err) {
    char *local;
    OBM_TRY(obm__source_find(ctx, path, &local, err));
    obm_status status = open_at(ctx, local, base_path, pulse, out, err);
    obm_free(local);
    return status;
}

obm_status obm_pack_open(obm_context *ctx, const char *path, const char *base_path, obm_pack **out, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(ctx, NULL, NULL, "open", 1);
    return obm__pack_open(ctx, path, base_path, &pulse, out, err);
}

void obm_pack_free(obm_pack *p) {
    if (!p) return;
    obm_checkpoint *base = p->base;
    obm_json *manifest = p->manifest;
    obm__pack_unload(p);
    obm_checkpoint_free(base);
    obm__json_free(manifest);
}

/* ---- looking ---- */

const char *obm_pack_path(const obm_pack *p) { return p->path; }
const obm_checkpoint *obm_pack_base(const obm_pack *p) { return p->base; }
size_t obm_pack_task_count(const obm_pack *p) { return p->n_experts; }
const char *obm_pack_task_name(const obm_pack *p, size_t task) { return p->experts[task].name; }
const char *obm_pack_policy(const obm_pack *p, size_t task) { return p->experts[task].policy; }

bool obm_pack_shared(const obm_pack *p, obm_pack_shared_info *out) {
    const obm__safetensors *file = p->shared.file;
    if (!file) return false;
    obm_pack_shared_info info = {.method = p->shared.method, .lambda = p->shared.lambda, .tensors = file->count};
    for (size_t i = 0; i < file->count; i++) info.bytes += obm__tensor_bytes(&file->entries[i].t);
    *out = info;
    return true;
}

/* By the bits tokenizer, template, eos. */
const char *obm_pack_text(const obm_pack *p, size_t task) {
    static const char *const names[] = {"",    "tokenizer",      "template",      "tokenizer, template",
                                        "eos", "tokenizer, eos", "template, eos", "tokenizer, template, eos"};
    const obm__pack_text *t = &p->experts[task].text;
    return names[t->tokenizer + 2 * t->template_ + 4 * (t->eos != NULL)];
}

size_t obm_pack_tensor_count(const obm_pack *p) { return p->n_tensors; }
uint64_t obm_pack_base_bytes(const obm_pack *p) { return obm__checkpoint_bytes(p->base); }

void obm_pack_bytes(const obm_pack *p, size_t task, obm_class_bytes *out) {
    memset(out, 0, OBM_CLASS_COUNT * sizeof *out);
    for (size_t i = 0; i < p->n_tensors; i++) {
        const obm__pack_entry *e = &p->experts[task].entries[i];
        obm_class_bytes *c = &out[p->tensors[i].cls];
        if (!e->bytes_expert) continue; /* a head that is its embedding, a buffer that the expert lacks */
        c->tensors++;
        c->params += (uint64_t)obm_tensor_count(&p->tensors[i].base);
        c->bytes_expert += e->bytes_expert;
        c->bytes_pack += e->bytes_pack;
        c->bytes_adapter += e->bytes_adapter;
    }
}

void obm_pack_tensor_at(const obm_pack *p, size_t task, size_t i, obm_pack_tensor *out) {
    const obm__pack_tensor_info *info = &p->tensors[i];
    const obm__pack_entry *e = &p->experts[task].entries[i];
    obm_pack_tensor t = {.name = info->name, .cls = info->cls, .mode = e->mode, .bytes_pack = e->bytes_pack};
    t.rank = e->lora.rank;
    obm__tensor_rows(&info->base, &t.rows, &t.cols);
    if (e->mode == OBM_MODE_1BIT) {
        t.planes = e->planes.n;
        t.row_bytes = e->planes.row_bytes;
        t.n_scales = obm__scale_count(e->planes.scale, e->planes.rows, e->planes.cols);
    }
    if (e->mode == OBM_MODE_MASK) {
        t.row_bytes = e->masked.row_bytes;
        t.mask = e->masked.bits;
        t.scaling = e->masked.scaling;
    }
    for (int k = 0; k < t.planes; k++) {
        t.scales[k] = e->planes.alphas[k];
        t.signs[k] = e->planes.signs[k];
    }
    *out = t;
}

obm_status obm__pack_check(const obm_pack *p, obm_error *err) {
    if (p->base) OBM_TRY(obm__checkpoint_check(p->base, err));
    if (p->shared.file) OBM_TRY(obm__map_check(&p->shared.file->map, p->shared.file->path, err));
    for (size_t k = 0; k < p->n_experts; k++) {
        const obm__safetensors *file = p->experts[k].file;
        if (file) OBM_TRY(obm__map_check(&file->map, file->path, err));
    }
    return OBM_OK;
}

void obm__pack_release_pages(const obm_pack *p) {
    if (p->shared.file) obm__pages_release(p->shared.file->map.data, p->shared.file->map.size);
    for (size_t i = 0; i < p->n_experts; i++) {
        const obm__safetensors *file = p->experts[i].file;
        if (file) obm__pages_release(file->map.data, file->map.size);
    }
}

/* ---- verify ---- */

/* A buffer of this size between two progress calls keeps a stop within a few ms. */
#define PIECE ((size_t)4 << 20)

#define COMPRESS_ANEW "bring it back from a copy of the pack, or compress the pack anew (overwriting this one)"
#define TRAIN_ANEW "bring it back from a copy of the pack, or train the router again"

static obm_status verify_file(const char *path, uint64_t bytes, const char *want, const char *advice,
                              obm__pulse *ticker, obm_error *err) {
    char have[33] = "";
    uint64_t done = ticker->done;
    obm__map map = {0};
    obm_status status = obm__map_open(path, &map, err);
    obm__xxh3 *h = status == OBM_OK ? obm__xxh3_new() : NULL;
    if (status == OBM_OK && !h) status = obm__fail_nomem(err, 0);
    for (size_t at = 0; at < map.size && status == OBM_OK; at += PIECE) {
        size_t n = map.size - at < PIECE ? map.size - at : PIECE;
        obm__xxh3_add(h, map.data + at, n);
        obm__pages_release(map.data + at, n);
        status = obm__tick(ticker, done + at + n, err);
    }
    if (h) obm__xxh3_end(h, have);
    if (status == OBM_OK && (map.size != bytes || strcmp(have, want))) {
        status =
            obm__fail(err, OBM_E_FORMAT,
                      "%s: checksum %s of %zu bytes, pack.json says %s of %llu: the file is damaged or another; %s",
                      path, have, map.size, want, (unsigned long long)bytes, advice);
    }
    obm__map_close(&map);
    return status;
}

static obm_status verify_record(const obm_pack *p, const obm_json *record, bool text, const char *advice,
                                obm__pulse *ticker, obm_error *err) {
    char *path = NULL;
    const char *want;
    uint64_t bytes;
    OBM_TRY(text ? obm__text_file_of(record, p->path, p->path, &path, &bytes, &want, err)
                 : obm__file_of(record, p->path, p->path, &path, &bytes, &want, err));
    obm_status status = verify_file(path, bytes, want, advice, ticker, err);
    obm_free(path);
    return status;
}

static obm_status verify_expert(const obm_pack *p, const obm_json *record, obm__pulse *ticker, obm_error *err) {
    OBM_TRY(verify_record(p, record, false, COMPRESS_ANEW, ticker, err));
    for (int f = 0; f < OBM_TEXT_FILES; f++) {
        const obm_json *file = obm__text_record(obm__json_get(record, "text"), (obm__text_file)f);
        if (file) OBM_TRY(verify_record(p, file, true, COMPRESS_ANEW, ticker, err));
    }
    return OBM_OK;
}

static uint64_t text_bytes(const obm_json *record) {
    uint64_t sum = 0;
    for (int f = 0; f < OBM_TEXT_FILES; f++) {
        int64_t bytes = 0;
        obm__json_int(obm__json_get(obm__text_record(obm__json_get(record, "text"), (obm__text_file)f), "bytes"),
                      &bytes);
        sum += (uint64_t)bytes;
    }
    return sum;
}

static obm_status verify(const obm_pack *p, obm_progress_fn progress, void *user, obm_error *err) {
    const obm_json *router = obm__json_get(p->manifest, "router");
    obm__pulse ticker = obm__pulse_new(p->ctx, progress, user, "verify", obm_pack_base_bytes(p));
    if (p->shared.file) ticker.total += p->shared.file->map.size;
    for (size_t i = 0; i < p->n_experts; i++)
        ticker.total += p->experts[i].file->map.size + text_bytes(p->experts[i].record);
    if (p->shared.file) OBM_TRY(verify_record(p, p->shared.record, false, COMPRESS_ANEW, &ticker, err));
    for (size_t i = 0; i < p->n_experts; i++) OBM_TRY(verify_expert(p, p->experts[i].record, &ticker, err));
    if (obm__json_kind(router) == OBM_JSON_OBJECT) OBM_TRY(verify_record(p, router, false, TRAIN_ANEW, &ticker, err));
    return obm__base_check(p->ctx, p->base, obm__json_get(p->manifest, "base"), p->path, true, &ticker, err);
}

obm_status obm_pack_verify(const obm_pack *p, obm_progress_fn progress, void *user, obm_error *err) {
    OBM_TRY(obm__pack_use(p, err));
    obm_status status = verify(p, progress, user, err);
    obm__pack_unuse(p);
    return status;
}
