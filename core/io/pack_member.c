/* An expert of a pack where an expert's checkpoint is expected, as PACK:task: its name, its file, and its task vector
 * on the base that it is given, which must be the pack's. */
#include "pack_parts.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

/* ---- names ---- */

size_t obm__member_split(const obm_context *ctx, const char *name) {
    char pack[PATH_MAX];
    const char *colon = strrchr(name, ':');
    size_t n = colon ? (size_t)(colon - name) : 0;
    if (!n || n >= sizeof pack || !obm__is_task_name(colon + 1) || obm__source_is_local(name)) return 0;
    memcpy(pack, name, n);
    pack[n] = 0;
    bool remote = ctx && ctx->resolve && obm__source_is_name(pack) && !obm__source_is_local(pack);
    return obm__is_directory(pack) || remote ? n : 0;
}

/* "chat, math, code", as far as it has room. */
static const char *list_names(const obm_json *experts, char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (size_t i = 0; i < obm__json_size(experts) && used < size; i++) {
        const char *name = obm__json_string(obm__json_get(obm__json_at(experts, i), "name"));
        if (name && obm__is_task_name(name))
            used += (size_t)snprintf(buf + used, size - used, "%s%s", used ? ", " : "", name);
    }
    return buf;
}

static bool is_pack(const obm_json *manifest) {
    const char *format = obm__json_string(obm__json_get(manifest, "format"));
    return format && !strcmp(format, OBM_PACK_FORMAT);
}

static obm_status refuse(const char *directory, const obm_json *manifest, obm_error *err) {
    const obm_json *experts = obm__json_get(manifest, "experts");
    const char *first = obm__json_string(obm__json_get(obm__json_at(experts, 0), "name"));
    char names[200];
    if (!first || !obm__is_task_name(first)) return obm__fail(err, OBM_E_ARG, "%s is a pack, not a model", directory);
    return obm__fail(err, OBM_E_ARG, "%s is a pack: name one of its experts as %s:%s (it has %s)", directory, directory,
                     first, list_names(experts, names, sizeof names));
}

obm_status obm__member_refuse(const char *directory, obm_error *err) {
    char *path = obm__path_join(directory, OBM_PACK_MANIFEST);
    if (!path) return obm__fail_nomem(err, strlen(directory));
    obm_json *manifest = NULL;
    obm_status status = OBM_OK;
    if (obm__file_exists(path)) status = obm__json_load(path, &manifest, err);
    if (status != OBM_OK && status != OBM_E_NOMEM) status = OBM_OK; /* another program's file, whatever it is */
    if (manifest && is_pack(manifest)) status = refuse(directory, manifest, err);
    obm__json_free(manifest);
    obm_free(path);
    return status;
}

/* ---- opening ---- */

static obm_status find_expert(obm__member *m, obm_error *err) {
    const obm_json *experts;
    char names[200];
    OBM_TRY(obm__field(m->manifest, "experts", OBM_JSON_ARRAY, m->pack, &experts, err));
    for (m->index = 0; m->index < obm__json_size(experts); m->index++) {
        m->record = obm__json_at(experts, m->index);
        const char *name = obm__json_string(obm__json_get(m->record, "name"));
        if (name && !strcmp(name, m->task)) return OBM_OK;
    }
    return obm__fail(err, OBM_E_NOTFOUND, "%s has no expert \"%s\": it has %s", m->pack, m->task,
                     list_names(experts, names, sizeof names));
}

static obm_status open_member(obm_context *ctx, const char *name, obm__member *m, obm__safetensors **file,
                              obm_error *err) {
    size_t n = obm__member_split(ctx, name);
    char *pack = obm__strndup(name, n), xxh3[33];
    m->task = obm__strdup(name + n + 1);
    obm_status status = pack && m->task ? obm__source_find(ctx, pack, &m->pack, err) : obm__fail_nomem(err, n);
    obm_free(pack);
    if (status == OBM_OK) status = obm__manifest_read(m->pack, &m->manifest, xxh3, err);
    if (status == OBM_OK) status = find_expert(m, err);
    return status == OBM_OK ? obm__pack_open_file(m->pack, m->record, m->pack, file, err) : status;
}

obm_status obm__member_open(obm_context *ctx, const char *name, obm__member **out, obm__safetensors **file,
                            obm_error *err) {
    obm__member *m = obm__calloc(1, sizeof *m);
    if (!m) return obm__fail_nomem(err, sizeof *m);
    obm_status status = open_member(ctx, name, m, file, err);
    if (status == OBM_OK)
        *out = m;
    else
        obm__member_free(m);
    return status;
}

void obm__member_free(obm__member *m) {
    if (!m) return;
    obm__json_free(m->manifest);
    obm_free(m->pack);
    obm_free(m->task);
    obm_free(m);
}

obm_status obm__member_base(const obm_checkpoint *c, obm_checkpoint **out, obm_error *err) {
    const obm_json *record;
    OBM_TRY(obm__field(c->member->manifest, "base", OBM_JSON_OBJECT, c->member->pack, &record, err));
    return obm__base_open(c->ctx, record, c->member->pack, NULL, out, err);
}

/* ---- its task vector ---- */

static obm__pair pair_of(const obm__pack_tensor_info *info, const obm__pack_entry *e) {
    obm__pair p = {.name = info->name, .base = info->base, .expert = info->base, .cls = info->cls};
    if (e->mode == OBM_MODE_FULL && e->lora.rank) {
        p.lora = &e->lora;
    } else if (e->mode == OBM_MODE_FULL) {
        p.expert = e->full;
        p.extra_rows = e->full.ndim ? e->full.shape[0] - info->base.shape[0] : 0;
    } else if (e->mode == OBM_MODE_1BIT && e->planes.n) {
        p.planes = &e->planes;
    } else if (e->mode == OBM_MODE_MASK) {
        p.masked = &e->masked;
    }
    if (e->extra.data) {
        p.extra = &e->extra;
        p.extra_rows = e->extra.shape[0];
        p.expert.shape[0] += p.extra_rows;
    }
    if (p.lora || p.planes || p.masked || p.extra) p.expert.data = NULL;
    return p;
}

obm_status obm__member_pairs(obm_task_vector *v, obm_error *err) {
    const obm__member *m = v->expert->member;
    const obm_json *record;
    obm__pulse pulse = obm__pulse_new(v->base->ctx, NULL, NULL, "open", 1);
    OBM_TRY(obm__field(m->manifest, "base", OBM_JSON_OBJECT, m->pack, &record, err));
    OBM_TRY(obm__base_check(v->base->ctx, v->base, record, m->pack, false, &pulse, err));
    /* Only read while it is the pack's: obm__member_unload frees neither. */
    OBM_TRY(obm__pack_load_one(v->base->ctx, m->pack, m->manifest, m->index, (obm_checkpoint *)v->base, &v->pack, err));
    for (size_t i = 0; i < v->pack->n_tensors; i++)
        v->pairs[v->count++] = pair_of(&v->pack->tensors[i], &v->pack->experts[0].entries[i]);
    return OBM_OK;
}

void obm__member_unload(obm_pack *p) { obm__pack_unload(p); }

obm_status obm__member_check(const obm_pack *p, obm_error *err) { return obm__pack_check(p, err); }
