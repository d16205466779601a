/* Fields of pack.json: typed access with errors that name the place, and the records that are written. */
#include "pack_parts.h"

#include <math.h>
#include <string.h>

obm__pulse obm__compress_pulse(const obm_context *ctx, const obm_compress_options *options, const char *what,
                               uint64_t total) {
    return obm__pulse_new(ctx, OBM_OPT(options, obm_compress_options, progress, NULL),
                          OBM_OPT(options, obm_compress_options, progress_user, NULL), what, total);
}

obm_status obm__tick(obm__pulse *t, uint64_t done, obm_error *err) {
    if (!t) return OBM_OK;
    return obm__pulse_done(t, done <= t->done ? t->done : done < t->total ? done : t->total, err);
}

const char *obm__printable(const char *s, char *buf, size_t size) {
    size_t n = 0;
    for (; s[n] && n + 1 < size; n++) buf[n] = (unsigned char)s[n] < 0x20 || s[n] == 0x7f ? '?' : s[n];
    while (s[n] && n > 0 && ((unsigned char)s[n] & 0xc0) == 0x80) n--; /* cut between characters */
    buf[n] = 0;
    return buf;
}

static obm_status wrong_kind(const obm_json *v, const char *key, const char *where, const char *expected,
                             obm_error *err) {
    obm__fail(err, OBM_E_FORMAT, "%s: \"%s\": expected %s, found %s", where, key, expected, v ? obm__json_kind_name(v) : "nothing");
    return OBM_E_FORMAT;   /* spelled out: the compiler then sees that callers never use an unset output */
}

obm_status obm__field(const obm_json *object, const char *key, obm_json_kind kind, const char *where,
                      const obm_json **out, obm_error *err) {
    const obm_json *v = obm__json_get(object, key);
    if (!v || obm__json_kind(v) != kind) {
        return wrong_kind(v, key, where, kind == OBM_JSON_ARRAY ? "an array" : "an object", err);
    }
    *out = v;
    return OBM_OK;
}

obm_status obm__field_string(const obm_json *object, const char *key, const char *where, const char **out,
                             obm_error *err) {
    const obm_json *v = obm__json_get(object, key);
    size_t n = 0;
    const char *s = v ? obm__json_string_n(v, &n) : NULL;
    if (!s || strlen(s) != n) return wrong_kind(v, key, where, "a string", err);
    *out = s;
    return OBM_OK;
}

obm_status obm__field_int(const obm_json *object, const char *key, int64_t min, int64_t max, const char *where,
                          int64_t *out, obm_error *err) {
    const obm_json *v = obm__json_get(object, key);
    int64_t i;
    if (!obm__json_int(v, &i)) return wrong_kind(v, key, where, "an integer", err);
    if (i < min || i > max) {
        return obm__fail(err, OBM_E_FORMAT, "%s: \"%s\" is %lld, expected %lld to %lld", where, key, (long long)i,
                         (long long)min, (long long)max);
    }
    *out = i;
    return OBM_OK;
}

obm_status obm__field_real(const obm_json *object, const char *key, const char *where, double *out, obm_error *err) {
    const obm_json *v = obm__json_get(object, key);
    double d;
    if (!obm__json_real(v, &d)) return wrong_kind(v, key, where, "a number", err);
    *out = d;
    return OBM_OK;
}

/* ---- tensors ---- */

static obm_status parse_dtype(const char *name, const char *where, obm_dtype *out, obm_error *err) {
    for (int i = 0; i < OBM_DTYPE_COUNT; i++) {
        if (strcmp(name, obm_dtype_name((obm_dtype)i))) continue;
        *out = (obm_dtype)i;
        return OBM_OK;
    }
    char shown[40];
    return obm__fail(err, OBM_E_FORMAT, "%s: unknown dtype \"%s\"", where, obm__printable(name, shown, sizeof shown));
}

static obm_status parse_shape(const obm_json *shape, const char *where, obm_tensor *t, obm_error *err) {
    size_t n = obm__json_size(shape), bytes = obm_dtype_size(t->dtype);
    if (n > OBM_MAX_DIM)
        return obm__fail(err, OBM_E_FORMAT, "%s: %zu dimensions, at most %d are possible", where, n, OBM_MAX_DIM);
    t->ndim = (int32_t)n;
    for (size_t i = 0; i < n; i++) {
        const obm_json *size = obm__json_at(shape, i);
        if (!obm__json_int(size, &t->shape[i]))
            return obm__fail(err, OBM_E_FORMAT, "%s: shape[%zu]: expected an integer, found %s", where, i,
                             obm__json_kind_name(size));
        if (t->shape[i] < 0)
            return obm__fail(err, OBM_E_FORMAT, "%s: shape[%zu]: expected at least 0, found %lld", where, i,
                             (long long)t->shape[i]);
        if (!obm__mul(bytes, (size_t)t->shape[i], &bytes) || bytes > INT64_MAX) {
            return obm__fail(err, OBM_E_FORMAT, "%s: the shape overflows", where);
        }
    }
    return OBM_OK;
}

obm_status obm__field_tensor(const obm_json *object, const char *where, obm_tensor *out, obm_error *err) {
    const char *dtype;
    const obm_json *shape;
    obm_tensor t = {0};
    OBM_TRY(obm__field_string(object, "dtype", where, &dtype, err));
    OBM_TRY(parse_dtype(dtype, where, &t.dtype, err));
    OBM_TRY(obm__field(object, "shape", OBM_JSON_ARRAY, where, &shape, err));
    OBM_TRY(parse_shape(shape, where, &t, err));
    *out = t;
    return OBM_OK;
}

bool obm__put_tensor(obm_json *object, const obm_tensor *t) {
    obm_json *shape = obm__json_new_array();
    bool ok = shape != NULL;
    for (int i = 0; i < t->ndim; i++) ok = ok && obm__json_append(shape, obm__json_new_int(t->shape[i]));
    ok = obm__json_set(object, "shape", shape) && ok;
    return obm__json_set(object, "dtype", obm__json_new_string(obm_dtype_name(t->dtype))) && ok;
}

/* ---- files ---- */

obm_json *obm__path_value(const char *path) {
    return path && obm__json_can_hold(path) ? obm__json_new_string(path) : obm__json_new_null();
}

obm_json *obm__file_record(const char *name, uint64_t bytes, const char *xxh3) {
    obm_json *r = obm__json_new_object();
    bool ok = obm__json_set(r, "file", obm__json_new_string(name));
    ok = obm__json_set(r, "bytes", obm__json_new_int((int64_t)bytes)) && ok;
    ok = obm__json_set(r, "xxh3", obm__json_new_string(xxh3)) && ok;
    if (ok) return r;
    obm__json_free(r);
    return NULL;
}

/* A bare name of our own making: nothing that leaves the folder or hides. */
static bool is_plain_name(const char *s) {
    size_t n = strlen(s);
    if (n < 13 || n > 255 || s[0] == '.' || strcmp(s + n - 12, ".safetensors")) return false;
    for (; *s; s++) {
        if (*s == '/' || *s == '\\' || (unsigned char)*s < 0x20) return false;
    }
    return true;
}

static bool is_hash(const char *s) { return strlen(s) == 32 && strspn(s, "0123456789abcdef") == 32; }

static obm_status file_of(const obm_json *record, const char *dir, const char *where, bool text, char **path,
                          uint64_t *bytes, const char **xxh3, obm_error *err) {
    const char *name, *hash;
    int64_t size;
    OBM_TRY(obm__field_string(record, "file", where, &name, err));
    if (text ? !obm__text_owns(name) : !is_plain_name(name)) {
        char shown[80];
        return obm__fail(err, OBM_E_FORMAT, "%s: \"file\": expected the name of a %s in the pack, found \"%s\"", where,
                         text ? "text file" : ".safetensors file", obm__printable(name, shown, sizeof shown));
    }
    OBM_TRY(obm__field_int(record, "bytes", 0, INT64_MAX, where, &size, err));
    OBM_TRY(obm__field_string(record, "xxh3", where, &hash, err));
    char found[40];
    if (!is_hash(hash))
        return obm__fail(err, OBM_E_FORMAT, "%s: \"xxh3\": expected 32 hex digits, found \"%s\"", where,
                         obm__printable(hash, found, sizeof found));
    char *joined = obm__path_join(dir, name);
    if (!joined) return obm__fail_nomem(err, strlen(dir) + strlen(name));
    *path = joined;
    if (bytes) *bytes = (uint64_t)size;
    if (xxh3) *xxh3 = hash;
    return OBM_OK;
}

obm_status obm__file_of(const obm_json *record, const char *dir, const char *where, char **path, uint64_t *bytes,
                        const char **xxh3, obm_error *err) {
    return file_of(record, dir, where, false, path, bytes, xxh3, err);
}

obm_status obm__text_file_of(const obm_json *record, const char *dir, const char *where, char **path, uint64_t *bytes,
                             const char **xxh3, obm_error *err) {
    return file_of(record, dir, where, true, path, bytes, xxh3, err);
}

/* ---- settings ---- */

static const char *const readings[] = {"onto_base", "recomputed"};
static const char *const profiles[] = {"default", "paper", "mergekit"};

/* Recipes of mergekit's kind do not trim unless asked to; the paper's TIES keeps a fifth (Yadav et al., section 4). */
void obm__settings_default(obm_profile profile, obm_pack_settings *out) {
    bool paper = profile == OBM_PROFILE_PAPER;
    *out = OBM_INIT(obm_pack_settings);
    out->lambda = paper ? 1 : 0.3;
    out->density = paper ? 0.2 : 1;
    out->profile = paper ? OBM_PROFILE_PAPER : OBM_PROFILE_MERGEKIT;
    out->reading = OBM_READING_ONTO_BASE;
}

obm_status obm__settings_check(const obm_pack_settings *s, obm_error *err) {
    if (!isfinite(s->lambda) || s->lambda < 0)
        return obm__fail(err, OBM_E_ARG, "lambda is %g, expected a number >= 0", s->lambda);
    if (!(s->density > 0 && s->density <= 1)) {
        return obm__fail(err, OBM_E_ARG, "density is %g, expected more than 0 and at most 1", s->density);
    }
    if ((unsigned)s->reading > OBM_READING_RECOMPUTED)
        return obm__fail(err, OBM_E_ARG, "unknown reading %d", (int)s->reading);
    if ((unsigned)s->profile > OBM_PROFILE_MERGEKIT)
        return obm__fail(err, OBM_E_ARG, "unknown profile %d", (int)s->profile);
    return OBM_OK;
}

obm_json *obm__settings_record(const obm_pack_settings *s) {
    obm_json *r = obm__json_new_object();
    bool ok = obm__json_set(r, "lambda", obm__json_new_real(s->lambda));
    ok = obm__json_set(r, "reading", obm__json_new_string(readings[s->reading])) && ok;
    ok = obm__json_set(r, "profile", obm__json_new_string(profiles[s->profile])) && ok;
    ok = obm__json_set(r, "density", obm__json_new_real(s->density)) && ok;
    if (ok) return r;
    obm__json_free(r);
    return NULL;
}

static obm_status choice(const obm_json *object, const char *key, const char *where, const char *const *names,
                         int first, int n, int *out, obm_error *err) {
    const char *s;
    OBM_TRY(obm__field_string(object, key, where, &s, err));
    for (int i = first; i < n; i++) {
        if (strcmp(s, names[i])) continue;
        *out = i;
        return OBM_OK;
    }
    char shown[40];
    return obm__fail(err, OBM_E_FORMAT, "%s: \"%s\" is \"%s\", expected \"%s\" or \"%s\"", where, key,
                     obm__printable(s, shown, sizeof shown), names[first], names[n - 1]);
}

obm_status obm__settings_parse(const obm_json *manifest, const char *where, obm_pack_settings *out, obm_error *err) {
    const obm_json *r;
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    int reading = 0, profile = 0;
    OBM_TRY(obm__field(manifest, "settings", OBM_JSON_OBJECT, where, &r, err));
    OBM_TRY(obm__field_real(r, "lambda", where, &s.lambda, err));
    OBM_TRY(obm__field_real(r, "density", where, &s.density, err));
    OBM_TRY(choice(r, "reading", where, readings, 0, 2, &reading, err));
    OBM_TRY(choice(r, "profile", where, profiles, 1, 3, &profile, err));
    s.reading = (obm_reading)reading;
    s.profile = (obm_profile)profile;
    obm_error why = {0};
    if (obm__settings_check(&s, &why) != OBM_OK)
        return obm__fail(err, OBM_E_FORMAT, "%s: \"settings\": %s", where, why.message);
    *out = s;
    return OBM_OK;
}
