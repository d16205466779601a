/* The safetensors container: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes.  Reads by
 * mapping, writes as a stream.  Knows nothing about models.
 *
 * The checks are those of the safetensors library (tensors cover the data part without holes or overlaps, sizes follow
 * from dtype and shape), and three of the format's own rules that the library leaves out: no duplicate names, the
 * header begins with
 * '{', no bytes before or after.  Alignment is not required: files in circulation have headers of any length, so every
 * reader of a tensor's bytes goes through memcpy, unaligned loads, or obm_tensor_read_f32. */
#include "io.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LENGTH_BYTES 8
#define MAX_HEADER 100000000u /* the library's limit */
#define METADATA_KEY "__metadata__"

/* ---- reading: one entry ---- */

/* What the checks of one file share: for messages, and to bound offsets. */
typedef struct {
    const char *where;
    const uint8_t *data;
    size_t size;
    size_t header; /* bytes */
} source;

static obm_status parse_dtype(const source *s, const char *name, const obm_json *v, obm_dtype *out, obm_error *err) {
    const char *text = obm__json_string(v);
    if (!text)
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: dtype: expected a string, found %s", s->where, name,
                         obm__json_kind_name(v));
    for (int i = 0; i < OBM_DTYPE_COUNT; i++) {
        if (strcmp(text, obm_dtype_name((obm_dtype)i)) != 0) continue;
        *out = (obm_dtype)i;
        return OBM_OK;
    }
    return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: unknown dtype \"%.40s\"", s->where, name, text);
}

/* Only what JSON writes as an integer: 2.0 is not a dimension. */
static bool non_negative(const obm_json *v, int64_t *out) {
    return v && obm__json_kind(v) == OBM_JSON_INT && obm__json_int(v, out) && *out >= 0;
}

static obm_status parse_shape(const source *s, const char *name, const obm_json *v, obm_tensor *t, obm_error *err) {
    if (!v || obm__json_kind(v) != OBM_JSON_ARRAY)
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: shape: expected an array, found %s", s->where, name,
                         obm__json_kind_name(v));
    size_t n = obm__json_size(v);
    if (n > OBM_MAX_DIM)
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s: tensor %s has %zu dimensions, at most %d are supported", s->where,
                         name, n, OBM_MAX_DIM);
    for (size_t i = 0; i < n; i++) {
        if (!non_negative(obm__json_at(v, i), &t->shape[i]))
            return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: shape[%zu]: expected an integer >= 0", s->where, name,
                             i);
    }
    t->ndim = (int32_t)n;
    return OBM_OK;
}

/* Zeros are left out of the overflow check's product: [0, 2^62, 2^62] is refused too, because readers multiply parts of
 * a shape (rows times columns) without looking at the rest. */
static bool shape_bytes(const obm_tensor *t, size_t *out) {
    size_t bytes = obm_dtype_size(t->dtype);
    bool empty = false;
    for (int32_t i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0)
            empty = true;
        else if (!obm__mul(bytes, (size_t)t->shape[i], &bytes) || bytes > INT64_MAX)
            return false;
    }
    *out = empty ? 0 : bytes;
    return true;
}

static obm_status parse_offsets(const source *s, const char *name, const obm_json *v, obm_tensor *t, obm_error *err) {
    int64_t begin, end;
    if (!v || obm__json_kind(v) != OBM_JSON_ARRAY || obm__json_size(v) != 2 ||
        !non_negative(obm__json_at(v, 0), &begin) || !non_negative(obm__json_at(v, 1), &end))
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: data_offsets: expected two integers >= 0", s->where, name);
    if (begin > end || (uint64_t)end > s->size)
        return obm__fail(err, OBM_E_FORMAT,
                         "%s: tensor %s: data_offsets [%lld, %lld] are outside of the %zu bytes of data", s->where,
                         name, (long long)begin, (long long)end, s->size);
    size_t bytes;
    if (!shape_bytes(t, &bytes))
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: the shape's product is too large", s->where, name);
    if ((uint64_t)(end - begin) != bytes)
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: its shape needs %zu bytes, data_offsets hold %lld",
                         s->where, name, bytes, (long long)(end - begin));
    t->data = s->data + begin;
    return OBM_OK;
}

static obm_status parse_tensor(const source *s, const char *name, const obm_json *v, obm__st_entry *out,
                               obm_error *err) {
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s: expected an object, found %s", s->where, name,
                         obm__json_kind_name(v));
    obm_tensor t = {0};
    OBM_TRY(parse_dtype(s, name, obm__json_get(v, "dtype"), &t.dtype, err));
    OBM_TRY(parse_shape(s, name, obm__json_get(v, "shape"), &t, err));
    OBM_TRY(parse_offsets(s, name, obm__json_get(v, "data_offsets"), &t, err));
    char *copy = obm__strdup(name);
    if (!copy) return obm__fail_nomem(err, strlen(name));
    *out = (obm__st_entry){copy, t};
    return OBM_OK;
}

static obm_status parse_metadata(const char *where, const obm_json *v, obm_json **out, obm_error *err) {
    if (obm__json_kind(v) == OBM_JSON_NULL) return OBM_OK;
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: " METADATA_KEY ": expected an object, found %s", where,
                         obm__json_kind_name(v));
    for (void *it = obm__json_first(v); it; it = obm__json_next(v, it)) {
        if (obm__json_kind(obm__json_value(it)) != OBM_JSON_STRING)
            return obm__fail(err, OBM_E_FORMAT, "%s: " METADATA_KEY ".%s: expected a string, found %s", where,
                             obm__json_key(it), obm__json_kind_name(obm__json_value(it)));
    }
    *out = obm__json_copy(v);
    return *out ? OBM_OK : obm__fail_nomem(err, 0);
}

/* ---- reading: the whole ---- */

static size_t entry_bytes(const obm__st_entry *e) {
    return (size_t)obm_tensor_count(&e->t) * obm_dtype_size(e->t.dtype);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const obm__st_entry *)a)->name, ((const obm__st_entry *)b)->name);
}

/* Empty tensors come before the one that starts at the same place. */
static int by_offset(const void *a, const void *b) {
    const obm__st_entry *x = a, *y = b;
    if (x->t.data != y->t.data) return x->t.data < y->t.data ? -1 : 1;
    size_t nx = entry_bytes(x), ny = entry_bytes(y);
    return (nx > ny) - (nx < ny);
}

/* Tensors in the order of their data must follow each other from the first byte to the last. */
static obm_status check_cover(const source *s, obm__st_entry *entries, size_t n, obm_error *err) {
    if (n > 1) qsort(entries, n, sizeof *entries, by_offset);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        size_t begin = (size_t)((const uint8_t *)entries[i].t.data - s->data);
        if (begin != at)
            return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s starts at byte %zu of the data, expected %zu (%s)",
                             s->where, entries[i].name, begin, at,
                             begin < at ? "it overlaps another" : "bytes that belong to no tensor");
        at += entry_bytes(&entries[i]);
    }
    if (at != s->size)
        return obm__fail(err, OBM_E_FORMAT, "%s: the tensors cover %zu bytes, the file holds %zu bytes of data",
                         s->where, at, s->size);
    return OBM_OK;
}

static void free_entries(obm__st_entry *entries, size_t n) {
    for (size_t i = 0; i < n; i++) obm_free(entries[i].name);
    obm_free(entries);
}

/* Whatever is cut off was written once: the copy is at fault, not what wrote the file. */
static obm_status fail_truncated(const char *where, uint64_t expected, uint64_t found, const char *what,
                                 obm_error *err) {
    return obm__fail(err, OBM_E_FORMAT,
                     "%s: truncated, the download or copy may be incomplete: expected %llu bytes%s, found %llu", where,
                     (unsigned long long)expected, what, (unsigned long long)found);
}

/* The end of the last tensor.  A file that ends before it is looked at first: each of its tensors that lies behind the
 * end would tell a part of it.  Offsets that are no offsets are left to parse_offsets. */
static obm_status check_length(const source *s, const obm_json *header, obm_error *err) {
    int64_t last = 0, end;
    for (void *it = obm__json_first(header); it; it = obm__json_next(header, it)) {
        const obm_json *offsets = obm__json_get(obm__json_value(it), "data_offsets");
        if (!strcmp(obm__json_key(it), METADATA_KEY) || !offsets || obm__json_kind(offsets) != OBM_JSON_ARRAY) continue;
        if (obm__json_size(offsets) == 2 && non_negative(obm__json_at(offsets, 1), &end) && end > last) last = end;
    }
    uint64_t before = (uint64_t)LENGTH_BYTES + s->header;
    if ((uint64_t)last <= s->size) return OBM_OK;
    return fail_truncated(s->where, before + (uint64_t)last, before + s->size, "", err);
}

/* Fills count, entries and metadata of *out step by step, so that the caller can free what is there on failure. */
static obm_status parse_header(const source *s, const obm_json *header, obm__safetensors *out, obm_error *err) {
    if (obm__json_kind(header) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: header: expected an object, found %s", s->where,
                         obm__json_kind_name(header));
    OBM_TRY(check_length(s, header, err));
    out->entries = obm__calloc(obm__json_size(header), sizeof *out->entries);
    if (!out->entries) return obm__fail_nomem(err, obm__json_size(header) * sizeof *out->entries);
    for (void *it = obm__json_first(header); it; it = obm__json_next(header, it)) {
        const char *name = obm__json_key(it);
        if (!strcmp(name, METADATA_KEY)) {
            OBM_TRY(parse_metadata(s->where, obm__json_value(it), &out->metadata, err));
            continue;
        }
        OBM_TRY(parse_tensor(s, name, obm__json_value(it), &out->entries[out->count], err));
        out->count++;
    }
    OBM_TRY(check_cover(s, out->entries, out->count, err));
    if (out->count > 1) qsort(out->entries, out->count, sizeof *out->entries, by_name);
    return OBM_OK;
}

static obm_status header_length(const uint8_t *data, size_t size, const char *where, size_t *out, obm_error *err) {
    if (size < LENGTH_BYTES)
        return obm__fail(err, OBM_E_FORMAT,
                         "%s: expected a safetensors file, found %zu bytes (shorter than the header's length)", where,
                         size);
    uint64_t n = 0;
    for (int i = 0; i < LENGTH_BYTES; i++) n |= (uint64_t)data[i] << 8 * i;
    if (n > MAX_HEADER)
        return obm__fail(err, OBM_E_FORMAT,
                         "%s: not a safetensors file: a header of %llu bytes is announced, at most %u are allowed",
                         where, (unsigned long long)n, MAX_HEADER);
    if (n > size - LENGTH_BYTES) return fail_truncated(where, n + LENGTH_BYTES, size, " for its header", err);
    if (n == 0 || data[LENGTH_BYTES] != '{')
        return obm__fail(err, OBM_E_FORMAT, "%s: byte 8: the header does not begin with '{'", where);
    *out = (size_t)n;
    return OBM_OK;
}

obm_status obm__safetensors_parse(const uint8_t *data, size_t size, const char *where, obm__safetensors *out,
                                  obm_error *err) {
    size_t n = 0;
    OBM_TRY(obm__refuse_pointer(data, size, where, err));
    OBM_TRY(header_length(data, size, where, &n, err));
    obm_json *header;
    OBM_TRY(obm__json_parse((const char *)data + LENGTH_BYTES, n, where, &header, err));
    source s = {where, data + LENGTH_BYTES + n, size - LENGTH_BYTES - n, n};
    obm__safetensors parsed = {0};
    obm_status status = parse_header(&s, header, &parsed, err);
    obm__json_free(header);
    if (status != OBM_OK) {
        free_entries(parsed.entries, parsed.count);
        obm__json_free(parsed.metadata);
        return status;
    }
    out->entries = parsed.entries;
    out->count = parsed.count;
    out->metadata = parsed.metadata;
    return OBM_OK;
}

obm_status obm__safetensors_open(const char *path, obm__safetensors **out, obm_error *err) {
    obm__safetensors *s = obm__calloc(1, sizeof *s);
    if (!s) return obm__fail_nomem(err, sizeof *s);
    obm_status status;
    s->path = obm__strdup(path);
    OBM_GO(s->path ? OBM_OK : obm__fail_nomem(err, strlen(path)));
    OBM_GO(obm__map_open(path, &s->map, err));
    OBM_GO(obm__safetensors_parse(s->map.data, s->map.size, path, s, err));
    *out = s;
    return OBM_OK;
done:
    obm__safetensors_free(s);
    return status;
}

void obm__safetensors_free(obm__safetensors *s) {
    if (!s) return;
    free_entries(s->entries, s->count);
    obm__json_free(s->metadata);
    obm__map_close(&s->map);
    obm_free(s->path);
    obm_free(s);
}

const obm__st_entry *obm__safetensors_find(const obm__safetensors *s, const char *name) {
    obm__st_entry key = {(char *)name, {0}};
    return s->count ? bsearch(&key, s->entries, s->count, sizeof key, by_name) : NULL;
}

/* ---- writing ---- */

struct obm__st_writer {
    char *path, *temp; /* temp: NULL before begin and after publishing */
    int fd;
    obm__declared_list tensors;
    obm_json *metadata;    /* NULL without */
    uint64_t header_bytes; /* 0 before begin */
    uint64_t written;
    uint64_t started; /* of them, on their way to the disk */
    obm__xxh3 *hash;
};

obm_status obm__st_writer_new(const char *path, obm__st_writer **out, obm_error *err) {
    obm__st_writer *w = obm__calloc(1, sizeof *w);
    if (!w) return obm__fail_nomem(err, sizeof *w);
    w->fd = -1;
    w->path = obm__strdup(path);
    if (!w->path) {
        obm_free(w);
        return obm__fail_nomem(err, strlen(path));
    }
    *out = w;
    return OBM_OK;
}

obm_status obm__st_bytes(const char *name, obm_dtype dtype, int32_t ndim, const int64_t *shape, uint64_t *out,
                         obm_error *err) {
    obm_tensor t = {.dtype = dtype, .ndim = ndim};
    if (ndim < 0 || ndim > OBM_MAX_DIM || obm_dtype_size(dtype) == 0)
        return obm__fail(err, OBM_E_ARG, "tensor %s: dtype %d with %d dimensions cannot be written", name, (int)dtype,
                         (int)ndim);
    for (int32_t i = 0; i < ndim; i++) {
        if (shape[i] < 0) return obm__fail(err, OBM_E_ARG, "tensor %s: shape[%d] is negative", name, (int)i);
        t.shape[i] = shape[i];
    }
    size_t bytes;
    if (!shape_bytes(&t, &bytes)) return obm__fail(err, OBM_E_ARG, "tensor %s: the shape's product is too large", name);
    *out = bytes;
    return OBM_OK;
}

static obm_status grow(obm__declared_list *l, obm_error *err) {
    if (l->count < l->capacity) return OBM_OK;
    size_t capacity = l->capacity ? 2 * l->capacity : 64;
    obm__declared *items = obm__realloc(l->items, capacity, sizeof *items);
    if (!items) return obm__fail_nomem(err, capacity * sizeof *items);
    l->items = items;
    l->capacity = capacity;
    return OBM_OK;
}

obm_status obm__declare(obm__declared_list *l, const char *where, const char *name, obm_dtype dtype, int32_t ndim,
                        const int64_t *shape, obm_error *err) {
    uint64_t bytes;
    OBM_TRY(obm__st_bytes(name, dtype, ndim, shape, &bytes, err));
    if (bytes > INT64_MAX - l->bytes) return obm__fail(err, OBM_E_ARG, "%s: more than 2^63 bytes declared", where);
    OBM_TRY(grow(l, err));
    obm__declared d = {obm__strdup(name), dtype, ndim, {0}, l->bytes, l->bytes + bytes};
    if (!d.name) return obm__fail_nomem(err, strlen(name));
    for (int32_t i = 0; i < ndim; i++) d.shape[i] = shape[i];
    l->items[l->count++] = d;
    l->bytes += bytes;
    return OBM_OK;
}

void obm__declared_free(obm__declared_list *l) {
    for (size_t i = 0; i < l->count; i++) obm_free(l->items[i].name);
    obm_free(l->items);
}

/* A name declared twice is found in begin, where the header becomes one object. */
obm_status obm__st_writer_declare(obm__st_writer *w, const char *name, obm_dtype dtype, int32_t ndim,
                                  const int64_t *shape, obm_error *err) {
    if (w->fd >= 0) return obm__fail(err, OBM_E_ARG, "%s: tensor %s declared after writing began", w->path, name);
    return obm__declare(&w->tensors, w->path, name, dtype, ndim, shape, err);
}

obm_status obm__st_writer_metadata(obm__st_writer *w, const char *key, const char *value, obm_error *err) {
    if (!w->metadata) w->metadata = obm__json_new_object();
    if (obm__json_set(w->metadata, key, obm__json_new_string(value))) return OBM_OK;
    if (obm__json_can_hold(key) && obm__json_can_hold(value)) return obm__fail_nomem(err, strlen(value));
    return obm__fail(err, OBM_E_ARG, "%s: metadata %s: not UTF-8", w->path, key);
}

static obm_json *tensor_record(const obm__declared *d) {
    obm_json *record = obm__json_new_object(), *shape = obm__json_new_array(), *offsets = obm__json_new_array();
    bool ok = true;
    for (int32_t i = 0; i < d->ndim; i++) ok = obm__json_append(shape, obm__json_new_int(d->shape[i])) && ok;
    ok = obm__json_append(offsets, obm__json_new_int((int64_t)d->begin)) && ok;
    ok = obm__json_append(offsets, obm__json_new_int((int64_t)d->end)) && ok;
    ok = obm__json_set(record, "dtype", obm__json_new_string(obm_dtype_name(d->dtype))) && ok;
    ok = obm__json_set(record, "shape", shape) && ok;
    ok = obm__json_set(record, "data_offsets", offsets) && ok;
    if (ok) return record;
    obm__json_free(record);
    return NULL;
}

static obm_status add_record(const obm__st_writer *w, const obm__declared *d, obm_json *header, obm_error *err) {
    if (obm__json_get(header, d->name) || !strcmp(d->name, METADATA_KEY))
        return obm__fail(err, OBM_E_ARG, "%s: tensor %s: the name is taken", w->path, d->name);
    if (obm__json_set(header, d->name, tensor_record(d))) return OBM_OK;
    if (obm__json_can_hold(d->name)) return obm__fail_nomem(err, strlen(d->name));
    return obm__fail(err, OBM_E_ARG, "%s: tensor %s: the name is not UTF-8", w->path, d->name);
}

/* The bytes in front of the data: length, JSON, and spaces up to the next multiple of 64, so that data is aligned. */
static obm_status header_bytes(const obm__st_writer *w, obm__buffer *out, obm_error *err) {
    obm_json *header = obm__json_new_object();
    char *text = NULL;
    obm_status status = OBM_OK;
    if (w->metadata && !obm__json_set(header, METADATA_KEY, obm__json_copy(w->metadata)))
        OBM_GO(obm__fail_nomem(err, 0));
    for (size_t i = 0; i < w->tensors.count; i++) OBM_GO(add_record(w, &w->tensors.items[i], header, err));
    text = obm__json_text(header, 0);
    size_t n = text ? strlen(text) : 0, padded = (LENGTH_BYTES + n + 63) / 64 * 64 - LENGTH_BYTES;
    if (padded > MAX_HEADER)
        OBM_GO(obm__fail(err, OBM_E_ARG, "%s: too many tensors: a header of %zu bytes", w->path, padded));
    for (int i = 0; i < LENGTH_BYTES; i++) obm__buffer_add(out, &(char){(char)((uint64_t)padded >> 8 * i)}, 1);
    obm__buffer_add(out, text, n);
    for (size_t i = n; i < padded; i++) obm__buffer_add(out, " ", 1);
    if (!text || out->failed) status = obm__fail_nomem(err, n);
done:
    obm__json_free(header);
    obm_free(text);
    return status;
}

uint64_t obm__st_writer_size(const obm__st_writer *w) {
    if (w->header_bytes) return w->header_bytes + w->tensors.bytes;
    obm__buffer header = {0};
    uint64_t size = header_bytes(w, &header, NULL) == OBM_OK ? header.size + w->tensors.bytes : 0;
    obm__buffer_free(&header);
    return size;
}

obm_status obm__st_writer_begin(obm__st_writer *w, obm_error *err) {
    if (w->fd >= 0) return obm__fail(err, OBM_E_ARG, "%s: writing has begun already", w->path);
    obm__buffer header = {0};
    obm_status status;
    OBM_GO(header_bytes(w, &header, err));
    w->hash = obm__xxh3_new();
    OBM_GO(w->hash ? OBM_OK : obm__fail_nomem(err, 0));
    OBM_GO(obm__temp_create(w->path, &w->temp, &w->fd, err));
    obm__xxh3_add(w->hash, header.data, header.size);
    OBM_GO(obm__fd_reserve(w->fd, w->temp, header.size + w->tensors.bytes, err));
    OBM_GO(obm__fd_write(w->fd, w->temp, header.data, header.size, err));
    w->header_bytes = header.size;
done:
    obm__buffer_free(&header);
    return status;
}

obm_status obm__st_writer_write(obm__st_writer *w, const void *bytes, size_t n, obm_error *err) {
    if (w->fd < 0) return obm__fail(err, OBM_E_ARG, "%s: writing has not begun", w->path);
    if (n > w->tensors.bytes - w->written)
        return obm__fail(err, OBM_E_ARG, "%s: %zu bytes written where %llu are left", w->path, n,
                         (unsigned long long)(w->tensors.bytes - w->written));
    OBM_TRY(obm__st_writer_put(w, w->written, bytes, n, err));
    obm__st_writer_pass(w, bytes, n);
    return OBM_OK;
}

obm_status obm__st_writer_put(const obm__st_writer *w, uint64_t offset, const void *bytes, size_t n, obm_error *err) {
    return obm__fd_write_at(w->fd, w->temp, bytes, n, w->header_bytes + offset, err);
}

/* Bytes that the disk is told to write in one go.  Smaller requests take the processor more time than they save of the
 * sync at the end; much larger ones leave it too much. */
#define START_SYNC ((uint64_t)16 << 20)

void obm__st_writer_pass(obm__st_writer *w, const void *bytes, size_t n) {
    obm__xxh3_add(w->hash, bytes, n);
    w->written += n;
    if (w->written - w->started < START_SYNC) return;
    obm__fd_start_sync(w->fd, w->header_bytes + w->started, w->written - w->started);
    w->started = w->written;
}

uint64_t obm__st_writer_written(const obm__st_writer *w) { return w->written; }

obm_status obm__st_writer_seal(obm__st_writer *w, char xxh3[33], obm_error *err) {
    if (w->fd < 0) return obm__fail(err, OBM_E_ARG, "%s: writing has not begun", w->path);
    if (w->written != w->tensors.bytes)
        return obm__fail(err, OBM_E_ARG, "%s: %llu of %llu declared bytes written", w->path,
                         (unsigned long long)w->written, (unsigned long long)w->tensors.bytes);
    int fd = w->fd;
    w->fd = -1;
    OBM_TRY(obm__fd_seal(fd, w->temp, err));
    obm__xxh3_end(w->hash, xxh3);
    w->hash = NULL;
    return OBM_OK;
}

obm_status obm__st_writer_publish(obm__st_writer *w, const char *path, obm_error *err) {
    if (!w->temp || w->fd >= 0) return obm__fail(err, OBM_E_ARG, "%s: nothing sealed to publish", w->path);
    OBM_TRY(obm__file_publish(w->temp, path ? path : w->path, err));
    obm_free(w->temp);
    w->temp = NULL;
    return OBM_OK;
}

obm_status obm__st_writer_finish(obm__st_writer *w, char xxh3[33], obm_error *err) {
    char hash[33];
    OBM_TRY(obm__st_writer_seal(w, hash, err));
    OBM_TRY(obm__st_writer_publish(w, NULL, err));
    if (xxh3) memcpy(xxh3, hash, sizeof hash);
    return OBM_OK;
}

obm_status obm__st_writer_adopt(obm__st_writer *w, const char *temp, obm_error *err) {
    if (w->temp) return obm__fail(err, OBM_E_ARG, "%s: writing has begun already", w->path);
    w->temp = obm__strdup(temp);
    return w->temp ? OBM_OK : obm__fail_nomem(err, strlen(temp));
}

const char *obm__st_writer_temp(const obm__st_writer *w) { return w->temp; }

void obm__st_writer_leave(obm__st_writer *w) {
    if (w->fd >= 0) return;
    obm_free(w->temp);
    w->temp = NULL;
}

void obm__st_writer_free(obm__st_writer *w) {
    if (!w) return;
    if (w->fd >= 0) close(w->fd);
    if (w->temp) unlink(w->temp);
    if (w->hash) obm__xxh3_end(w->hash, NULL);
    obm__declared_free(&w->tensors);
    obm__json_free(w->metadata);
    obm_free(w->temp);
    obm_free(w->path);
    obm_free(w);
}
