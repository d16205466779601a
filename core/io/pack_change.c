/*
 * Everything that changes a pack on disk.  Files get names that derive from their contents, so nothing that a reader
 * may hold open is ever rewritten; renaming pack.json is the commit; what the new pack.json no longer names goes after
 * it.  The folder is locked meanwhile (pack_lock.c): the clean-up would take the new files of another change for
 * strays.
 */
#include "pack_parts.h"

#include <dirent.h>
#include <string.h>
#include <unistd.h>

/* ---- clean-up ---- */

static bool is_named(const obm_json *manifest, const char *file) {
    const obm_json *experts = obm__json_get(manifest, "experts");
    for (size_t i = 0; i < obm__json_size(experts); i++) {
        const obm_json *expert = obm__json_at(experts, i);
        const char *s = obm__json_string(obm__json_get(expert, "file"));
        if ((s && !strcmp(s, file)) || obm__text_names(obm__json_get(expert, "text"), file)) return true;
    }
    static const char *const others[] = {"router", "shared"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        const char *s = obm__json_string(obm__json_get(obm__json_get(manifest, others[i]), "file"));
        if (s && !strcmp(s, file)) return true;
    }
    return false;
}

static bool starts_with(const char *s, const char *prefix) { return !strncmp(s, prefix, strlen(prefix)); }

/* The 16 digits in the name of a finished file, NULL: it is none.  No text file's stem holds a '-'. */
static const char *digits_of(const char *file) {
    size_t n = strlen(file);
    if (obm__text_owns(file)) return strchr(file, '-') + 1;
    bool ours = n >= 30 && !strcmp(file + n - 12, ".safetensors") && file[n - 29] == '-' &&
                strspn(file + n - 28, "0123456789abcdef") == 16;
    return ours ? file + n - 28 : NULL;
}

/* Of pack.json and of "<stem>" OBM_PACK_PARTIAL. */
static bool is_temporary(const char *file) {
    const size_t partial = sizeof OBM_PACK_PARTIAL - 1, manifest = sizeof OBM_PACK_MANIFEST - 1;
    size_t n = obm__temp_stem(file);
    if (n == manifest && starts_with(file, OBM_PACK_MANIFEST)) return true;
    return n > partial && starts_with(file + n - partial, OBM_PACK_PARTIAL);
}

/* "<stem>-<16 hex digits>.safetensors", the text files and the temporary names.  Nothing else in the folder is ours to
 * remove. */
bool obm__pack_owns(const char *file) { return digits_of(file) || is_temporary(file); }

/* A finished file's name holds the first digits of its own XXH3; somebody else's only looks alike. */
static bool is_proven(const char *path, const char *file) {
    obm__map map;
    char hash[33];
    if (!digits_of(file)) return true;
    if (obm__map_open(path, &map, NULL) != OBM_OK) return false;
    bool same = obm__map_xxh3(&map, NULL, NULL, hash, NULL) == OBM_OK && !strncmp(hash, digits_of(file), 16);
    obm__map_close(&map);
    return same;
}

void obm__pack_clean(const char *dir, const obm_json *manifest) {
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!obm__pack_owns(e->d_name) || is_named(manifest, e->d_name)) continue;
        char *path = obm__path_join(dir, e->d_name);
        if (path && is_proven(path, e->d_name)) (void)unlink(path);
        obm_free(path);
    }
    if (d) closedir(d);
}

obm_status obm__manifest_write(const char *dir, const obm_json *manifest, char xxh3[33], obm_error *err) {
    char *path = obm__path_join(dir, OBM_PACK_MANIFEST), *text = path ? obm__json_text(manifest, 2) : NULL;
    obm_status status = text ? obm__file_write(path, text, strlen(text), err) : obm__fail_nomem(err, 0);
    if (status == OBM_OK) obm__xxh3_of(text, strlen(text), xxh3);
    obm_free(path);
    obm_free(text);
    if (status == OBM_OK) obm__pack_clean(dir, manifest);
    return status;
}

obm_status obm__pack_commit(obm_pack *p, obm_error *err) {
    return obm__manifest_write(p->path, p->manifest, p->manifest_xxh3, err);
}

/* ---- settings and router: one member of the manifest changes ---- */

/* Sets the member (stolen) and commits; on failure the old one is back. */
static obm_status change_member(obm_pack *p, const char *key, obm_json *value, obm_error *err) {
    const obm_json *now = obm__json_get(p->manifest, key);
    obm_json *before = now ? obm__json_copy(now) : obm__json_new_null();
    if (!before || !value ||
        !obm__json_set(p->manifest, key, value)) { /* value is NULL or gone now, or before is NULL */
        if (!before) obm__json_free(value);
        obm__json_free(before);
        return obm__fail_nomem(err, 0);
    }
    obm_status status = obm__pack_commit(p, err);
    if (status == OBM_OK)
        obm__json_free(before);
    else
        (void)obm__json_set(p->manifest, key, before);
    return status;
}

void obm_pack_get_settings(const obm_pack *p, obm_pack_settings *out) {
    obm__options_write(&p->settings, sizeof p->settings, out);
}

obm_status obm_pack_set_settings(obm_pack *p, const obm_pack_settings *settings, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_pack_settings, settings, err));
    obm_pack_settings s = p->settings;
    s.lambda = OBM_OPT(settings, obm_pack_settings, lambda, s.lambda);
    s.reading = OBM_OPT(settings, obm_pack_settings, reading, s.reading);
    s.profile = OBM_OPT(settings, obm_pack_settings, profile, s.profile);
    s.density = OBM_OPT(settings, obm_pack_settings, density, s.density);
    if (s.profile == OBM_PROFILE_DEFAULT) s.profile = OBM_PROFILE_MERGEKIT;
    int lock;
    OBM_TRY(obm__settings_check(&s, err));
    OBM_TRY(obm__pack_begin(p, &lock, err));
    obm_status status = obm__pack_claim(p, err);
    if (status == OBM_OK) {
        status = change_member(p, "settings", obm__settings_record(&s), err);
        if (status == OBM_OK) p->settings = s;
        obm__pack_unclaim(p);
    }
    obm__pack_unlock(lock);
    return status;
}

static obm_status write_arrays(obm__st_writer *w, const obm__named_array *arrays, size_t n, obm_error *err) {
    for (size_t i = 0; i < n; i++) {
        OBM_TRY(obm__st_writer_declare(w, arrays[i].name, OBM_F32, arrays[i].ndim, arrays[i].shape, err));
    }
    OBM_TRY(obm__st_writer_begin(w, err));
    for (size_t i = 0; i < n; i++) {
        obm_tensor t = {.dtype = OBM_F32, .ndim = arrays[i].ndim};
        memcpy(t.shape, arrays[i].shape, sizeof arrays[i].shape);
        OBM_TRY(obm__st_writer_write(w, arrays[i].data, obm__tensor_bytes(&t), err));
    }
    return OBM_OK;
}

/* *record owned: the router's member without the report. */
static obm_status write_router_file(const obm_pack *p, const obm__named_array *arrays, size_t n, obm_json **record,
                                    obm_error *err) {
    char xxh3[33], *name = NULL;
    obm__st_writer *w;
    uint64_t bytes = 0;
    OBM_TRY(obm__pack_writer(p->path, "router", &w, err));
    obm_status status = write_arrays(w, arrays, n, err);
    if (status == OBM_OK) status = obm__pack_publish(w, p->path, "router", xxh3, &bytes, &name, err);
    obm__st_writer_free(w);
    if (status == OBM_OK && !(*record = obm__file_record(name, bytes, xxh3))) status = obm__fail_nomem(err, 0);
    obm_free(name);
    return status;
}

obm_status obm__pack_write_router(obm_pack *p, const obm__named_array *arrays, size_t n, obm_json *report,
                                  obm_error *err) {
    obm_json *record = NULL;
    int lock;
    obm_status status = obm__pack_begin(p, &lock, err);
    if (status != OBM_OK) {
        obm__json_free(report);
        return status;
    }
    status = write_router_file(p, arrays, n, &record, err);
    if (status == OBM_OK) {
        bool ok = obm__json_set(record, "report", report);
        report = NULL;
        if (!ok) obm__json_free(record);
        status = ok ? change_member(p, "router", record, err) : obm__fail_nomem(err, 0);
    }
    obm__json_free(report);
    if (status != OBM_OK) obm__pack_clean(p->path, p->manifest);
    obm__pack_unlock(lock);
    return status;
}

obm_status obm__pack_read_router(const obm_pack *p, obm__safetensors **out, obm_error *err) {
    const obm_json *router = obm__json_get(p->manifest, "router");
    if (!router || obm__json_kind(router) == OBM_JSON_NULL) {
        *out = NULL;
        return OBM_OK;
    }
    char *path;
    uint64_t bytes;
    if (obm__json_kind(router) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT,
                         "%s/" OBM_PACK_MANIFEST ": \"router\": expected an object or null, found %s", p->path,
                         obm__json_kind_name(router));
    OBM_TRY(obm__file_of(router, p->path, OBM_PACK_MANIFEST ": router", &path, &bytes, NULL, err));
    obm__safetensors *file = NULL;
    obm_status status = obm__safetensors_open(path, &file, err);
    if (status == OBM_OK && file->map.size != bytes) {
        status = obm__fail(err, OBM_E_FORMAT, "%s is %zu bytes long, pack.json says %llu", path, file->map.size,
                           (unsigned long long)bytes);
    }
    obm_free(path);
    if (status == OBM_OK)
        *out = file;
    else
        obm__safetensors_free(file);
    return status;
}

/* ---- experts ---- */

/* The in-memory pack is built from the new manifest first, so that after the commit nothing can fail.  manifest is
 * stolen. */
static obm_status replace(obm_pack *p, obm_json *manifest, obm_error *err) {
    obm_pack *next = NULL;
    obm_status status =
        manifest ? obm__pack_load(p->ctx, p->path, manifest, p->base, &next, err) : obm__fail_nomem(err, 0);
    bool claimed = status == OBM_OK && (status = obm__pack_claim(p, err)) == OBM_OK;
    if (claimed) status = obm__manifest_write(p->path, manifest, next->manifest_xxh3, err);
    if (status != OBM_OK) {
        if (claimed) obm__pack_unclaim(p);
        obm__pack_unload(next);
        obm__json_free(manifest);
        obm__pack_clean(p->path, p->manifest);
        return status;
    }
    obm_pack old = *p;
    next->revision = p->revision + 1;
    next->users = p->users;
    *p = *next;
    *next = old;
    obm__pack_unclaim(p);
    obm_json *gone = next->manifest;
    obm__pack_unload(next);
    obm__json_free(gone);
    return OBM_OK;
}

static size_t find_task(const obm_pack *p, const char *name) {
    size_t i = 0;
    while (i < p->n_experts && strcmp(p->experts[i].name, name)) i++;
    return i;
}

/* A copy of the manifest with expert `at` replaced (at < n), appended (at == n) or left out (record NULL).  When the
 * number of tasks changes the router goes: it answers for other tasks.  record is stolen; NULL without memory. */
static obm_json *edit_manifest(const obm_pack *p, size_t at, obm_json *record) {
    obm_json *manifest = obm__json_copy(p->manifest), *experts = obm__json_new_array();
    bool ok = manifest && experts, stays = record && at < p->n_experts;
    for (size_t i = 0; i < p->n_experts; i++) {
        if (i != at)
            ok = ok && obm__json_append(experts, obm__json_copy(p->experts[i].record));
        else if (record)
            ok = obm__json_append(experts, record) && ok;
    }
    if (record && at == p->n_experts) ok = obm__json_append(experts, record) && ok;
    ok = obm__json_set(manifest, "experts", experts) && ok;
    if (!stays) ok = ok && obm__json_set(manifest, "router", obm__json_new_null());
    if (ok) return manifest;
    obm__json_free(manifest);
    return NULL;
}

obm_status obm_pack_remove(obm_pack *p, const char *name, obm_error *err) {
    size_t at = find_task(p, name);
    if (at == p->n_experts) return obm__fail(err, OBM_E_NOTFOUND, "pack %s has no expert %s", p->path, name);
    if (p->n_experts == 1)
        return obm__fail(err, OBM_E_ARG, "expert %s is the last of pack %s; delete the folder instead", name, p->path);
    int lock;
    OBM_TRY(obm__pack_begin(p, &lock, err));
    obm_status status = replace(p, edit_manifest(p, at, NULL), err);
    obm__pack_unlock(lock);
    return status;
}

static obm_status add_locked(obm_pack *p, const obm__expert_request *r, const obm_checkpoint *checkpoint,
                             obm_error *err) {
    obm_json *record = NULL;
    int lock;
    OBM_TRY(obm__pack_begin(p, &lock, err));
    obm_status status = obm__expert_write(r, checkpoint, &record, err);
    if (status == OBM_OK) /* looked for under the lock: another thread may have changed the pack before it */
        status = replace(p, edit_manifest(p, find_task(p, r->expert->name), record), err);
    else
        obm__pack_clean(p->path, p->manifest);
    obm__pack_unlock(lock);
    return status;
}

/* The vectors are made of all experts' changes and the masks against the vectors: one more expert changes them all. */
static obm_status check_shared(const obm_pack *p, const obm_compress_options *options, obm_error *err) {
    bool wanted;
    obm__sharing rule;
    int dtype;
    OBM_TRY(obm__shared_options(options, &wanted, &rule, &dtype, err));
    if (p->shared.file)
        return obm__fail(err, OBM_E_UNSUPPORTED,
                         "pack %s shares one vector among its experts: compress it anew with all of them", p->path);
    if (!wanted) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "shared vectors are made of all experts at once: compress a new pack");
}

obm_status obm_pack_add(obm_pack *p, const obm_expert *given, const obm_compress_options *options, obm_error *err) {
    obm_expert own, *expert = &own;
    OBM_TRY(OBM_CHECK(obm_compress_options, options, err));
    OBM_TRY(obm__experts_read(given, 1, &own, err));
    OBM_TRY(obm__expert_check(expert, err));
    OBM_TRY(check_shared(p, options, err));
    size_t at = find_task(p, expert->name);
    if (at < p->n_experts && !OBM_OPT(options, obm_compress_options, overwrite, false)) {
        return obm__fail(err, OBM_E_EXISTS, "pack %s has an expert %s already, and overwriting was not asked for",
                         p->path, expert->name);
    }
    if (at == OBM_PACK_MAX_TASKS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "a pack holds at most %d experts", OBM_PACK_MAX_TASKS);
    OBM_TRY(obm__pack_idle(p, err));
    obm_checkpoint *checkpoint = NULL;
    OBM_TRY(obm__expert_open(p->ctx, expert, &checkpoint, err));
    obm__pulse ticker = obm__compress_pulse(p->ctx, options, "compress", obm__expert_bytes(p->base, checkpoint));
    obm__expert_request r = {.ctx = p->ctx, .base = p->base, .expert = expert, .dir = p->path, .ticker = &ticker};
    r.profile = OBM_OPT(options, obm_compress_options, profile, OBM_PROFILE_DEFAULT);
    if (r.profile == OBM_PROFILE_DEFAULT) r.profile = p->settings.profile;
    r.dry_run = OBM_OPT(options, obm_compress_options, dry_run, false);
    obm_status status = r.dry_run ? obm__expert_write(&r, checkpoint, NULL, err) : add_locked(p, &r, checkpoint, err);
    obm_checkpoint_free(checkpoint);
    return status;
}

/* ---- another pack's experts ---- */

#define COPY_STEP ((size_t)4 << 20)

/* In steps, between which the call can be stopped. */
static obm_status copy_bytes(const obm_context *ctx, const obm__map *map, int fd, const char *name, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(ctx, NULL, NULL, "copy", map->size);
    for (size_t at = 0, n; at < map->size; at += n) {
        n = map->size - at < COPY_STEP ? map->size - at : COPY_STEP;
        OBM_TRY(obm__fd_write(fd, name, map->data + at, n, err));
        obm__pages_release(map->data + at, n);
        OBM_TRY(obm__pulse_check(&pulse, err));
    }
    return OBM_OK;
}

/* Under a name that a later change removes, should this one be killed. */
static obm_status copy_file(const obm_context *ctx, const char *from, const char *to, obm_error *err) {
    obm__map map;
    char *partial = obm__format("%s" OBM_PACK_PARTIAL, to), *name = NULL;
    int fd = -1;
    OBM_TRY(partial ? OBM_OK : obm__fail_nomem(err, strlen(to)));
    obm_status status = obm__map_open(from, &map, err);
    if (status == OBM_OK) {
        status = obm__temp_create(partial, &name, &fd, err);
        if (status == OBM_OK) status = copy_bytes(ctx, &map, fd, name, err);
        obm_status sealed = name ? obm__fd_seal(fd, name, status == OBM_OK ? err : NULL) : status;
        if (status == OBM_OK) status = sealed;
        if (status == OBM_OK) status = obm__file_publish(name, to, err);
        if (name && status != OBM_OK) unlink(name);
        obm__map_close(&map);
    }
    obm_free(name);
    obm_free(partial);
    return status;
}

/* The pack's own files are what their names say; what else lies there under such a name has to show it. */
static bool is_there(const obm_pack *p, const char *path, const char *name) {
    if (!obm__file_exists(path)) return false;
    if (is_named(p->manifest, name) || is_proven(path, name)) return true;
    (void)unlink(path);
    return false;
}

static obm_status take_file(const obm_pack *p, const obm_pack *from, const char *name, obm_error *err) {
    char *source = obm__path_join(from->path, name), *target = obm__path_join(p->path, name);
    obm_status status = source && target ? OBM_OK : obm__fail_nomem(err, strlen(name));
    if (status == OBM_OK && !is_there(p, target, name) && link(source, target) != 0)
        status = copy_file(p->ctx, source, target, err); /* another file system, or one without links */
    obm_free(source);
    obm_free(target);
    return status;
}

static obm_status take_files(const obm_pack *p, const obm_pack *from, obm_error *err) {
    DIR *d = opendir(from->path);
    obm_status status = d ? OBM_OK : obm__fail_errno(err, "cannot read folder %s", from->path);
    for (struct dirent *e; status == OBM_OK && d && (e = readdir(d));)
        if (digits_of(e->d_name) && is_named(from->manifest, e->d_name)) status = take_file(p, from, e->d_name, err);
    if (d) closedir(d);
    return status;
}

static obm_status check_tasks(const obm_pack *p, const obm_pack *other, obm_error *err) {
    bool same = p->n_experts == other->n_experts;
    for (size_t i = 0; same && i < p->n_experts; i++) same = !strcmp(p->experts[i].name, other->experts[i].name);
    if (same) return OBM_OK;
    return obm__fail(err, OBM_E_MISMATCH, "pack %s: expected the tasks of pack %s, in the same order", other->path,
                     p->path);
}

/* What comes from the other; the rest is the pack's own, also what nobody here knows.  Both are of one base, so that
 * versions differ by shared vectors only. */
static bool is_adopted(const char *key) {
    static const char *const keys[] = {"version", "experts", "shared", "settings"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!strcmp(key, keys[i])) return true;
    return false;
}

/* In the order that the pack has them; NULL without memory. */
static obm_json *manifest_with(const obm_pack *p, const obm_pack *other) {
    obm_json *manifest = obm__json_new_object();
    const obm_json *shared = obm__json_get(other->manifest, "shared");
    bool ok = manifest != NULL;
    for (void *it = obm__json_first(p->manifest); ok && it; it = obm__json_next(p->manifest, it)) {
        const char *key = obm__json_key(it);
        const obm_json *value = is_adopted(key) ? obm__json_get(other->manifest, key) : obm__json_value(it);
        if (value) ok = obm__json_set(manifest, key, obm__json_copy(value));
    }
    if (ok && shared) ok = obm__json_set(manifest, "shared", obm__json_copy(shared));
    if (ok) return manifest;
    obm__json_free(manifest);
    return NULL;
}

static obm_status adopt_locked(obm_pack *p, const obm_pack *other, obm_error *err) {
    obm_status status = take_files(p, other, err);
    if (status == OBM_OK) return replace(p, manifest_with(p, other), err);
    obm__pack_clean(p->path, p->manifest);
    return status;
}

obm_status obm_pack_adopt(obm_pack *p, const char *path, obm_error *err) {
    obm_pack *other;
    int lock;
    if (!path || !*path) return obm__fail(err, OBM_E_ARG, "no pack to take the experts of");
    OBM_TRY(obm__pack_idle(p, err));
    OBM_TRY(obm_pack_open(p->ctx, path, p->base->path, &other, err));
    obm_status status = check_tasks(p, other, err);
    if (status == OBM_OK) status = obm__pack_begin(p, &lock, err);
    if (status == OBM_OK) {
        status = adopt_locked(p, other, err);
        obm__pack_unlock(lock);
    }
    obm_pack_free(other);
    return status;
}
