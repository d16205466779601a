/* The base as a pack knows it: where it lies and how its tensors are recognised.  Reads the base, never writes it. */
#include "pack_parts.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Samples: 64 blocks of a page each, evenly spread, first and last bytes included: 256 KiB a tensor, so that opening a
 * pack of a large model reads some tens of MB, and a fine-tune posing as the base is caught (it differs nearly
 * everywhere). */
#define SAMPLES 64
#define SAMPLE_BYTES 4096
#define CHUNK OBM_BASE_CHUNK

typedef char digest[33];

/* ---- samples ---- */

/* floor(i * span / 63) without overflow. */
static size_t sample_offset(size_t span, size_t i) {
    return span / (SAMPLES - 1) * i + span % (SAMPLES - 1) * i / (SAMPLES - 1);
}

typedef struct sample_job {
    const obm_checkpoint *base;
    obm__reader *reader; /* faults of single pages take longer than copies of them */
    digest *out;
    bool large; /* only tensors of more than one chunk: the others are sampled while they are hashed */
    _Atomic int failed;
    obm_status status; /* of the first that failed */
    obm_error error;
} sample_job;

/* reader NULL: the bytes are in memory. */
static obm_status add_bytes(const obm__reader *reader, const void *data, size_t n, obm__xxh3 *h, obm_error *err) {
    uint8_t copy[4 * SAMPLE_BYTES];
    if (!reader) {
        obm__xxh3_add(h, data, n);
        return OBM_OK;
    }
    for (size_t at = 0, part; at < n; at += part) {
        part = n - at < sizeof copy ? n - at : sizeof copy;
        OBM_TRY(obm__reader_get(reader, (const uint8_t *)data + at, part, copy, err));
        obm__xxh3_add(h, copy, part);
    }
    return OBM_OK;
}

static obm_status sample_tensor(const obm__reader *reader, const obm_tensor *t, digest out, obm_error *err) {
    size_t n = obm__tensor_bytes(t);
    bool whole = n <= (size_t)SAMPLES * SAMPLE_BYTES;
    obm__xxh3 *h = obm__xxh3_new();
    if (!h) return obm__fail_nomem(err, 0);
    obm_status status = whole ? add_bytes(reader, t->data, n, h, err) : OBM_OK;
    for (size_t i = 0; !whole && status == OBM_OK && i < SAMPLES; i++)
        status = add_bytes(reader, (const uint8_t *)t->data + sample_offset(n - SAMPLE_BYTES, i), SAMPLE_BYTES, h, err);
    obm__xxh3_end(h, status == OBM_OK ? out : NULL);
    return status;
}

static void sample_range(void *arg, size_t begin, size_t end, int id) {
    (void)id;
    sample_job *job = arg;
    for (size_t i = begin; i < end; i++) {
        const obm_tensor *t = &job->base->tensors[i]->t;
        obm_error err;
        if (job->large && obm__tensor_bytes(t) <= CHUNK) continue;
        obm_status status = sample_tensor(job->reader, t, job->out[i], &err);
        if (status == OBM_OK || atomic_exchange(&job->failed, 1)) continue;
        job->status = status;
        job->error = err;
    }
}

static obm_status begin_sampling(const obm_checkpoint *c, sample_job *job, obm_error *err) {
    OBM_TRY(obm__reader_new(&c, 1, &job->reader, err));
    obm__reader_scattered(job->reader);
    return OBM_OK;
}

static obm_status sampled(const sample_job *job, obm_error *err) {
    if (job->failed && err) *err = job->error;
    return job->failed ? job->status : OBM_OK;
}

/* Tensors between two looks at the pulse, per thread: some hundreds of pages from a disk. */
#define SAMPLE_BATCH 4

static obm_status sample_all(obm_context *ctx, const obm_checkpoint *base, bool large, obm__pulse *pulse, digest **out,
                             obm_error *err) {
    digest *d = obm__calloc(base->count, sizeof *d);
    if (!d) return obm__fail_nomem(err, base->count * sizeof *d);
    sample_job job = {.base = base, .out = d, .large = large};
    size_t batch = SAMPLE_BATCH * (size_t)ctx->threads;
    obm_status status = begin_sampling(base, &job, err);
    if (status == OBM_OK) status = obm__parallel_slices(ctx, base->count, 1, batch, sample_range, &job, pulse, err);
    if (status == OBM_OK) status = sampled(&job, err);
    obm__reader_free(job.reader);
    if (status == OBM_OK)
        *out = d;
    else
        obm_free(d);
    return status;
}

/* ---- fingerprint of a whole checkpoint ---- */

/* Tensors between two ticks: 16 MiB of samples, some hundredths of a second. */
#define FINGERPRINT_BATCH 64

static void add_tensor(obm__xxh3 *h, const obm__st_entry *e, const digest sample) {
    char shape[128];
    obm__shape_text(&e->t, shape, sizeof shape);
    const char *parts[] = {e->name, obm_dtype_name(e->t.dtype), shape, sample};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) obm__xxh3_add(h, parts[i], strlen(parts[i]) + 1);
}

static obm_status add_all(obm_context *ctx, const obm_checkpoint *c, obm__tick_fn tick, void *user, obm__xxh3 *h,
                          obm_error *err) {
    digest samples[FINGERPRINT_BATCH];
    obm_checkpoint part;
    sample_job job = {.base = &part, .out = samples};
    obm_status status = begin_sampling(c, &job, err);
    for (size_t at = 0, n; status == OBM_OK && at < c->count; at += n) {
        n = c->count - at < FINGERPRINT_BATCH ? c->count - at : FINGERPRINT_BATCH;
        part = (obm_checkpoint){.tensors = c->tensors + at};
        obm__parallel(ctx, n, 1, sample_range, &job);
        status = sampled(&job, err);
        for (size_t i = 0; status == OBM_OK && i < n; i++) add_tensor(h, c->tensors[at + i], samples[i]);
        if (status == OBM_OK && tick) status = tick(user, 0, err);
    }
    obm__reader_free(job.reader);
    return status;
}

obm_status obm__checkpoint_fingerprint(obm_context *ctx, const obm_checkpoint *c, obm__tick_fn tick, void *user,
                                       char out[33], obm_error *err) {
    obm__xxh3 *h = obm__xxh3_new();
    if (!h) return obm__fail_nomem(err, 0);
    if (c->config_text) obm__xxh3_add(h, c->config_text, strlen(c->config_text) + 1);
    if (c->adapter) obm__xxh3_add(h, c->adapter->text, strlen(c->adapter->text) + 1);
    char *record = c->member ? obm__json_text(c->member->record, 0) : NULL; /* how its tensors are to be read */
    if (record) obm__xxh3_add(h, record, strlen(record) + 1);
    obm_status status = !c->member || record ? add_all(ctx, c, tick, user, h, err) : obm__fail_nomem(err, 0);
    obm_free(record);
    obm__xxh3_end(h, status == OBM_OK ? out : NULL);
    return status;
}

/* ---- full hashes ---- */

typedef struct chunk {
    const uint8_t *data;
    size_t n;
    size_t tensor;
} chunk;
typedef struct hash_job {
    const obm_checkpoint *base;
    const chunk *chunks;
    digest *digests; /* of the chunks */
    digest
        *samples; /* of the tensors; filled for those that are one chunk, whose pages are there now; NULL: not wanted */
} hash_job;

static size_t chunks_of(const obm_tensor *t) {
    size_t n = obm__tensor_bytes(t);
    return n ? (n - 1) / CHUNK + 1 : 1;
}

static void hash_range(void *arg, size_t begin, size_t end, int id) {
    (void)id;
    hash_job *job = arg;
    for (size_t i = begin; i < end; i++) {
        const chunk *c = &job->chunks[i];
        if (job->digests[i][0]) continue; /* known */
        const obm_tensor *t = &job->base->tensors[c->tensor]->t;
        obm__xxh3_of(c->data, c->n, job->digests[i]);
        /* Without memory the sample stays "", which hash_all sees. */
        if (job->samples && chunks_of(t) == 1) (void)sample_tensor(NULL, t, job->samples[c->tensor], NULL);
        obm__pages_release(c->data, c->n);
    }
}

static size_t cut_into_chunks(const obm_checkpoint *base, chunk *out) {
    size_t n = 0;
    for (size_t i = 0; i < base->count; i++) {
        const obm_tensor *t = &base->tensors[i]->t;
        size_t bytes = obm__tensor_bytes(t), at = 0;
        do {
            size_t take = bytes - at < CHUNK ? bytes - at : CHUNK;
            out[n++] = (chunk){(const uint8_t *)t->data + at, take, i};
            at += take;
        } while (at < bytes);
    }
    return n;
}

uint64_t obm__base_memory(const obm_context *ctx, const obm_checkpoint *base) {
    uint64_t window = (uint64_t)ctx->threads * CHUNK, all = obm__checkpoint_bytes(base);
    return window < all ? window : all;
}

static obm_status hash_chunks(obm_context *ctx, const hash_job *all, size_t n, obm__pulse *ticker, obm_error *err) {
    uint64_t done = ticker ? ticker->done : 0;
    for (size_t at = 0, m; at < n; at += m) {
        hash_job job = {all->base, all->chunks + at, all->digests + at, all->samples};
        size_t bytes = 0;
        for (m = 0; m < n - at && bytes < (size_t)ctx->threads * CHUNK; m++) bytes += job.chunks[m].n;
        obm__parallel(ctx, m, 1, hash_range, &job);
        done += bytes;
        OBM_TRY(obm__tick(ticker, done, err));
    }
    return OBM_OK;
}

static size_t count_chunks(const obm_checkpoint *base) {
    size_t n = 0;
    for (size_t i = 0; i < base->count; i++) n += chunks_of(&base->tensors[i]->t);
    return n;
}

/* XXH3 over the hex digests of a tensor's chunks. */
static void join_digests(const obm_checkpoint *base, const digest *chunks, digest *out) {
    for (size_t i = 0; i < base->count; i++) {
        obm__xxh3 *h = obm__xxh3_new();
        for (size_t c = chunks_of(&base->tensors[i]->t); c > 0; c--, chunks++) {
            if (h) obm__xxh3_add(h, *chunks, 32);
        }
        if (h) obm__xxh3_end(h, out[i]); /* without memory the digest stays "", which hash_all sees */
    }
}

/* known: digests of chunks, "" where they are not. */
static obm_status hash_all(obm_context *ctx, const obm_checkpoint *base, const digest *known, obm__pulse *ticker,
                           digest *samples, digest **out, obm_error *err) {
    size_t n = count_chunks(base);
    chunk *chunks = obm__calloc(n, sizeof *chunks);
    digest *parts = obm__calloc(n, sizeof *parts), *whole = obm__calloc(base->count, sizeof *whole);
    if (parts && known && n) memcpy(parts, known, n * sizeof *parts);
    obm_status status = chunks && parts && whole ? OBM_OK : obm__fail_nomem(err, n * (sizeof *chunks + sizeof *parts));
    if (status == OBM_OK) {
        hash_job job = {base, chunks, parts, samples};
        status = hash_chunks(ctx, &job, cut_into_chunks(base, chunks), ticker, err);
    }
    if (status == OBM_OK) {
        join_digests(base, parts, whole);
        for (size_t i = 0; i < base->count && status == OBM_OK; i++) {
            if (!whole[i][0] || (samples && !samples[i][0])) status = obm__fail_nomem(err, 0);
        }
    }
    obm_free(chunks);
    obm_free(parts);
    if (status == OBM_OK)
        *out = whole;
    else
        obm_free(whole);
    return status;
}

/* ---- hashes on the way ---- */

struct obm__base_digests {
    const obm_checkpoint *base;
    size_t *first;   /* (tensors): number of the first chunk */
    size_t *owner;   /* (chunks): tensor */
    bool *taken;     /* (tensors) */
    digest *parts;   /* (chunks) */
    digest *samples; /* (tensors) */
};

obm_status obm__base_digests_new(const obm_checkpoint *base, obm__base_digests **out, obm_error *err) {
    size_t n = count_chunks(base), chunk_number = 0;
    obm__base_digests *d = obm__calloc(1, sizeof *d);
    if (!d) return obm__fail_nomem(err, sizeof *d);
    *d = (obm__base_digests){base,
                             obm__calloc(base->count, sizeof *d->first),
                             obm__calloc(n, sizeof *d->owner),
                             obm__calloc(base->count, sizeof *d->taken),
                             obm__calloc(n, sizeof *d->parts),
                             obm__calloc(base->count, sizeof *d->samples)};
    if (!d->first || !d->owner || !d->taken || !d->parts || !d->samples) {
        obm__base_digests_free(d);
        return obm__fail_nomem(err, n * sizeof *d->parts);
    }
    for (size_t i = 0; i < base->count; i++) {
        d->first[i] = chunk_number;
        for (size_t c = chunks_of(&base->tensors[i]->t); c > 0; c--) d->owner[chunk_number++] = i;
    }
    *out = d;
    return OBM_OK;
}

void obm__base_digests_free(obm__base_digests *d) {
    if (!d) return;
    obm_free(d->first);
    obm_free(d->owner);
    obm_free(d->taken);
    obm_free(d->parts);
    obm_free(d->samples);
    obm_free(d);
}

size_t obm__base_digests_take(obm__base_digests *d, const char *tensor) {
    size_t i = obm__checkpoint_index(d->base, tensor);
    if (i == SIZE_MAX || d->taken[i]) return SIZE_MAX;
    d->taken[i] = true;
    return d->first[i];
}

struct obm__base_chunk {
    obm__base_digests *digests;
    size_t number;
    obm__xxh3 *hash, *sample; /* sample: NULL unless the chunk is a large enough tensor */
    size_t size, at, block;   /* of the tensor, what was added, the block of the sample that is next */
};

obm_status obm__base_chunk_new(obm__base_digests *d, size_t number, obm__base_chunk **out, obm_error *err) {
    const obm_tensor *t = &d->base->tensors[d->owner[number]]->t;
    obm__base_chunk *c = obm__calloc(1, sizeof *c);
    if (!c) return obm__fail_nomem(err, sizeof *c);
    *c = (obm__base_chunk){.digests = d, .number = number, .hash = obm__xxh3_new(), .size = obm__tensor_bytes(t)};
    bool sampled = chunks_of(t) == 1 && c->size > (size_t)SAMPLES * SAMPLE_BYTES;
    if (sampled) c->sample = obm__xxh3_new();
    if (!c->hash || (sampled && !c->sample)) {
        obm__base_chunk_free(c);
        return obm__fail_nomem(err, 0);
    }
    *out = c;
    return OBM_OK;
}

/* Blocks of a sample do not overlap and come in order, so their parts are added as they come by. */
static void add_to_sample(obm__base_chunk *c, const uint8_t *bytes, size_t n) {
    for (size_t end = c->at + n; c->block < SAMPLES; c->block++) {
        size_t first = sample_offset(c->size - SAMPLE_BYTES, c->block), last = first + SAMPLE_BYTES;
        size_t from = first > c->at ? first : c->at, to = last < end ? last : end;
        if (from < to) obm__xxh3_add(c->sample, bytes + (from - c->at), to - from);
        if (last > end) return;
    }
}

void obm__base_chunk_add(obm__base_chunk *c, const void *bytes, size_t n) {
    obm__xxh3_add(c->hash, bytes, n);
    if (c->sample) add_to_sample(c, bytes, n);
    c->at += n;
}

/* Smaller tensors are their own sample. */
void obm__base_chunk_end(obm__base_chunk *c) {
    obm__base_digests *d = c->digests;
    size_t tensor = d->owner[c->number];
    obm__xxh3_end(c->hash, d->parts[c->number]);
    c->hash = NULL;
    if (c->sample) obm__xxh3_end(c->sample, d->samples[tensor]);
    c->sample = NULL;
    if (c->size <= (size_t)SAMPLES * SAMPLE_BYTES) memcpy(d->samples[tensor], d->parts[c->number], sizeof(digest));
    obm__base_chunk_free(c);
}

void obm__base_chunk_free(obm__base_chunk *c) {
    if (!c) return;
    if (c->hash) obm__xxh3_end(c->hash, NULL);
    if (c->sample) obm__xxh3_end(c->sample, NULL);
    obm_free(c);
}

/* ---- record ---- */

/* `to` seen from the folder `from`, both absolute and resolved. */
static char *relative_path(const char *from, const char *to) {
    size_t same = 0, i = 0;
    for (; from[i] && from[i] == to[i]; i++) {
        if (from[i] == '/') same = i;
    }
    if ((!from[i] && (!to[i] || to[i] == '/')) || (!to[i] && from[i] == '/')) same = i;
    obm__buffer b = {0};
    for (const char *s = from + same; *s; s++) {
        if (s[0] == '/' && s[1]) obm__buffer_text(&b, b.size ? "/.." : "..");
    }
    const char *rest = to + same + (to[same] == '/');
    if (*rest) obm__buffer_printf(&b, "%s%s", b.size ? "/" : "", rest);
    if (!b.size) obm__buffer_text(&b, ".");
    if (b.failed) obm__buffer_free(&b);
    return b.data;
}

static bool put_paths(obm_json *record, const obm_checkpoint *base, const char *dir) {
    errno = 0;
    char *from = realpath(dir, NULL), *to = from ? realpath(base->path, NULL) : NULL;
    char *relative = from && to ? relative_path(from, to) : NULL;
    bool ok = errno != ENOMEM && (relative || !to) && obm__json_set(record, "path", obm__path_value(relative)) &&
              obm__json_set(record, "absolute", obm__path_value(to));
    free(from);
    free(to);
    obm_free(relative);
    return ok;
}

static bool put_tensors(obm_json *record, const obm_checkpoint *base, const digest *samples, const digest *hashes) {
    obm_json *tensors = obm__json_new_object();
    bool ok = tensors != NULL;
    for (size_t i = 0; i < base->count && ok; i++) {
        obm_json *t = obm__json_new_object();
        ok = t && obm__put_tensor(t, &base->tensors[i]->t);
        ok = ok && obm__json_set(t, "sample", obm__json_new_string(samples[i]));
        ok = ok && obm__json_set(t, "hash", obm__json_new_string(hashes[i]));
        if (!ok)
            obm__json_free(t);
        else
            ok = obm__json_set(tensors, base->tensors[i]->name, t);
    }
    return obm__json_set(record, "tensors", tensors) && ok;
}

obm_status obm__base_record(obm_context *ctx, const obm_checkpoint *base, const char *dir, obm__base_digests *known,
                            obm__pulse *ticker, obm_json **out, obm_error *err) {
    digest *samples = NULL, *hashes = NULL;
    obm_status status = sample_all(ctx, base, true, ticker, &samples, err);
    for (size_t i = 0; status == OBM_OK && known && i < base->count; i++)
        if (known->samples[i][0]) memcpy(samples[i], known->samples[i], sizeof samples[i]);
    if (status == OBM_OK) status = hash_all(ctx, base, known ? known->parts : NULL, ticker, samples, &hashes, err);
    obm_json *record = status == OBM_OK ? obm__json_new_object() : NULL;
    if (status == OBM_OK && !(record && put_paths(record, base, dir) && put_tensors(record, base, samples, hashes))) {
        status = obm__fail_nomem(err, 0);
    }
    obm_free(samples);
    obm_free(hashes);
    if (status == OBM_OK)
        *out = record;
    else
        obm__json_free(record);
    return status;
}

/* ---- opening ---- */

static bool exists(const char *path) { return path && (obm__is_directory(path) || obm__file_exists(path)); }

obm_status obm__base_open(obm_context *ctx, const obm_json *record, const char *pack_path, const char *path,
                          obm_checkpoint **out, obm_error *err) {
    if (path) return obm_checkpoint_open(ctx, path, out, err);
    const char *relative = obm__json_string(obm__json_get(record, "path"));
    const char *absolute = obm__json_string(obm__json_get(record, "absolute"));
    char seen[200], far[200];
    char *joined = relative ? obm__path_join(pack_path, relative) : NULL;
    if (relative && !joined) return obm__fail_nomem(err, strlen(pack_path));
    const char *found = exists(joined) ? joined : exists(absolute) ? absolute : NULL;
    obm_status status =
        found ? obm_checkpoint_open(ctx, found, out, err)
              : obm__fail(
                    err, OBM_E_IO,
                    "the base of pack %s is neither at %s (seen from the pack) nor at %s; give its place with base=",
                    pack_path, obm__printable(relative ? relative : "(unknown)", seen, sizeof seen),
                    obm__printable(absolute ? absolute : "(unknown)", far, sizeof far));
    obm_free(joined);
    return status;
}

/* ---- checking ---- */

typedef struct check_place {
    const char *base, *pack, *name;
} check_place;

static obm_status mismatch(const check_place *p, obm_error *err, const char *how) {
    char name[160];
    return obm__fail(err, OBM_E_MISMATCH, "%.200s is not the base that pack %.200s was made from: tensor %s %s",
                     p->base, p->pack, obm__printable(p->name, name, sizeof name), how);
}

static obm_status check_form(const obm_tensor *have, const obm_json *record, const check_place *place, obm_error *err) {
    obm_tensor want;
    char where[320], how[200], a[80], b[80];
    snprintf(where, sizeof where, "%.200s/" OBM_PACK_MANIFEST, place->pack);
    OBM_TRY(obm__field_tensor(record, where, &want, err));
    if (want.dtype != have->dtype) {
        snprintf(how, sizeof how, "has dtype %s, expected %s", obm_dtype_name(have->dtype), obm_dtype_name(want.dtype));
        return mismatch(place, err, how);
    }
    if (want.ndim != have->ndim || memcmp(want.shape, have->shape, (size_t)want.ndim * sizeof *want.shape)) {
        snprintf(how, sizeof how, "has shape %s, expected %s", obm__shape_text(have, a, sizeof a),
                 obm__shape_text(&want, b, sizeof b));
        return mismatch(place, err, how);
    }
    return OBM_OK;
}

static obm_status check_one(const obm__st_entry *e, const obm_json *record, const digest have, const char *key,
                            const check_place *place, obm_error *err) {
    const char *want;
    OBM_TRY(check_form(&e->t, record, place, err));
    OBM_TRY(obm__field_string(record, key, OBM_PACK_MANIFEST, &want, err));
    return strcmp(want, have) ? mismatch(place, err, "has other contents") : OBM_OK;
}

/* Names first: a tensor that one side lacks is the clearest difference there is. */
static obm_status check_names(const obm_checkpoint *base, const obm_json *tensors, const char *pack_path,
                              obm_error *err) {
    check_place place = {base->path, pack_path, NULL};
    for (void *it = obm__json_first(tensors); it; it = obm__json_next(tensors, it)) {
        place.name = obm__json_key(it);
        if (!obm__checkpoint_find(base, place.name)) return mismatch(&place, err, "is missing");
        if (obm__json_kind(obm__json_value(it)) != OBM_JSON_OBJECT) {
            char name[160];
            return obm__fail(err, OBM_E_FORMAT,
                             "%s/" OBM_PACK_MANIFEST ": base tensor %s: expected an object, found %s", pack_path,
                             obm__printable(place.name, name, sizeof name), obm__json_kind_name(obm__json_value(it)));
        }
    }
    for (size_t i = 0; i < base->count; i++) {
        place.name = base->tensors[i]->name;
        if (!obm__json_get(tensors, place.name)) return mismatch(&place, err, "is unknown to the pack");
    }
    return OBM_OK;
}

obm_status obm__base_check(obm_context *ctx, const obm_checkpoint *base, const obm_json *record, const char *pack_path,
                           bool full, obm__pulse *ticker, obm_error *err) {
    const obm_json *tensors;
    OBM_TRY(obm__checkpoint_is_model(base, "a base", err));
    OBM_TRY(obm__field(record, "tensors", OBM_JSON_OBJECT, OBM_PACK_MANIFEST ": base", &tensors, err));
    OBM_TRY(check_names(base, tensors, pack_path, err));
    for (size_t i = 0; i < base->count; i++) { /* shapes before contents: nothing need be read for them */
        check_place place = {base->path, pack_path, base->tensors[i]->name};
        OBM_TRY(check_form(&base->tensors[i]->t, obm__json_get(tensors, place.name), &place, err));
    }
    digest *have;
    OBM_TRY(obm__checkpoint_check(base, err));
    OBM_TRY(full ? hash_all(ctx, base, NULL, ticker, NULL, &have, err)
                 : sample_all(ctx, base, false, ticker, &have, err));
    obm_status status = OBM_OK;
    for (size_t i = 0; i < base->count && status == OBM_OK; i++) {
        check_place place = {base->path, pack_path, base->tensors[i]->name};
        status = check_one(base->tensors[i], obm__json_get(tensors, place.name), have[i], full ? "hash" : "sample",
                           &place, err);
    }
    obm_free(have);
    return status;
}
