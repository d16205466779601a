/* The pieces of a tokenizer: by id in an array, by text in a hash table. */
#include "text.h"

#include <string.h>

/* FNV-1a, 64 bit, with a final mix: the table uses the low bits. */
static uint64_t hash(const char *s, size_t n) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * 0x100000001b3u;
    return h ^ (h >> 32);
}

/* The slot that holds the text, or the free one where it belongs. */
static size_t slot_of(const obm__vocab *v, const char *text, size_t len) {
    size_t i = (size_t)hash(text, len) & v->mask;
    while (v->slots[i] >= 0) {
        const obm__piece *p = &v->pieces[v->slots[i]];
        if (p->len == len && memcmp(p->text, text, len) == 0) break;
        i = (i + 1) & v->mask;
    }
    return i;
}

int32_t obm__vocab_find(const obm__vocab *v, const char *text, size_t len) {
    return v->slots ? v->slots[slot_of(v, text, len)] : -1;
}

int32_t obm__vocab_find_in_model(const obm__vocab *v, const char *text, size_t len) {
    int32_t id = obm__vocab_find(v, text, len);
    return id >= 0 && v->pieces[id].in_model ? id : -1;
}

void obm__vocab_free(obm__vocab *v) {
    for (size_t i = 0; i < v->n_blocks; i++) obm_free(v->blocks[i]);
    obm_free(v->blocks);
    obm_free(v->pieces);
    obm_free(v->slots);
    *v = (obm__vocab){0};
}

/* Ids may have holes, but a file of n pieces must not make us allocate for billions. */
static obm_status check_id(const obm_json *value, size_t n, const char *piece, const char *where, int64_t *id,
                           obm_error *err) {
    if (!obm__json_int(value, id) || *id < 0 || (uint64_t)*id >= 16 * (uint64_t)n + 4096) {
        return obm__fail(err, OBM_E_FORMAT, "%s: the id of piece \"%.64s\" is not an integer that fits %zu pieces",
                         where, piece, n);
    }
    return OBM_OK;
}

/* What the loops below need to know before anything is stored. */
typedef struct extent {
    size_t pieces, size, model_bytes, added_bytes;
} extent;

static obm_status measure_model(const obm_json *model, const char *where, extent *x, obm_error *err) {
    for (void *it = obm__json_first(model); it; it = obm__json_next(model, it)) {
        int64_t id;
        OBM_TRY(check_id(obm__json_value(it), x->pieces, obm__json_key(it), where, &id, err));
        if ((size_t)id >= x->size) x->size = (size_t)id + 1;
        x->model_bytes += strlen(obm__json_key(it)) + 1;
    }
    return OBM_OK;
}

static obm_status measure_added(const obm_json *added, const char *where, extent *x, obm_error *err) {
    for (size_t i = 0; i < obm__json_size(added); i++) {
        const obm_json *token = obm__json_at(added, i);
        size_t len = 0;
        int64_t id;
        const char *text = obm__json_string_n(obm__json_get(token, "content"), &len);
        if (!text) return obm__fail(err, OBM_E_FORMAT, "%s: added_tokens[%zu] has no content", where, i);
        OBM_TRY(check_id(obm__json_get(token, "id"), x->pieces, text, where, &id, err));
        if ((size_t)id >= x->size) x->size = (size_t)id + 1;
        x->added_bytes += len + 1;
    }
    return OBM_OK;
}

static obm_status allocate(obm__vocab *v, const extent *x, obm_error *err) {
    size_t capacity = 16;
    while (capacity < 2 * (x->pieces + 1)) capacity *= 2;
    v->pieces = obm__calloc(x->size, sizeof *v->pieces);
    v->slots = obm__alloc(capacity, sizeof *v->slots);
    v->blocks = obm__calloc(2, sizeof *v->blocks);
    if (!v->pieces || !v->slots || !v->blocks) return obm__fail_nomem(err, x->size * sizeof *v->pieces);
    v->n_blocks = 2;
    v->blocks[0] = obm__calloc(x->model_bytes, 1);
    v->blocks[1] = obm__calloc(x->added_bytes, 1);
    if (!v->blocks[0] || !v->blocks[1]) return obm__fail_nomem(err, x->model_bytes + x->added_bytes);
    memset(v->slots, 0xff, capacity * sizeof *v->slots);
    v->mask = capacity - 1;
    v->size = x->size;
    return OBM_OK;
}

/* Copies the text to *to, which moves on. */
static void put(obm__vocab *v, int32_t id, size_t slot, const char *text, size_t len, char **to) {
    memcpy(*to, text, len);
    (*to)[len] = 0;
    v->pieces[id].text = *to;
    v->pieces[id].len = (uint32_t)len;
    v->slots[slot] = id;
    *to += len + 1;
}

static obm_status store_model(obm__vocab *v, const obm_json *model, const char *where, obm_error *err) {
    char *to = v->blocks[0];
    for (void *it = obm__json_first(model); it; it = obm__json_next(model, it)) {
        const char *text = obm__json_key(it);
        int64_t id = 0;
        obm__json_int(obm__json_value(it), &id);
        if (v->pieces[id].text) {
            return obm__fail(err, OBM_E_FORMAT, "%s: pieces \"%.64s\" and \"%.64s\" have the same id %lld", where,
                             v->pieces[id].text, text, (long long)id);
        }
        put(v, (int32_t)id, slot_of(v, text, strlen(text)), text, strlen(text), &to);
        v->pieces[id].in_model = true;
    }
    return OBM_OK;
}

static obm_status store_added(obm__vocab *v, const obm_json *added, const char *where, obm_error *err) {
    char *to = v->blocks[1];
    for (size_t i = 0; i < obm__json_size(added); i++) {
        const obm_json *token = obm__json_at(added, i);
        size_t len = 0;
        int64_t id = 0;
        bool special = false;
        const char *text = obm__json_string_n(obm__json_get(token, "content"), &len);
        obm__json_int(obm__json_get(token, "id"), &id);
        obm__json_bool(obm__json_get(token, "special"), &special);
        if (len == 0) continue; /* the tokenizers library ignores these */
        size_t slot = slot_of(v, text, len);
        int32_t other = v->slots[slot];
        if (other < 0 ? v->pieces[id].text != NULL : other != (int32_t)id) {
            return obm__fail(err, OBM_E_FORMAT, "%s: added token \"%.64s\" has id %lld, but %s", where, text,
                             (long long)id,
                             other < 0 ? "another piece has it too" : "the vocabulary gives it another one");
        }
        if (other < 0) put(v, (int32_t)id, slot, text, len, &to);
        v->pieces[id].special |= special;
    }
    return OBM_OK;
}

obm_status obm__vocab_load(obm__vocab *v, const obm_json *model, const obm_json *added, const char *where,
                           obm_error *err) {
    extent x = {.pieces = obm__json_size(model) + obm__json_size(added)};
    OBM_TRY(measure_model(model, where, &x, err));
    OBM_TRY(measure_added(added, where, &x, err));
    obm_status status = allocate(v, &x, err);
    if (status == OBM_OK) status = store_model(v, model, where, err);
    if (status == OBM_OK) status = store_added(v, added, where, err);
    if (status != OBM_OK) obm__vocab_free(v);
    return status;
}

/* A piece for a message: control characters become '?'. */
static const char *shown(const obm__piece *p, char *buf, size_t size) {
    size_t n = 0;
    for (; n < p->len && n + 1 < size; n++)
        buf[n] = (unsigned char)p->text[n] < 0x20 || p->text[n] == 0x7f ? '?' : p->text[n];
    while (n < p->len && n > 0 && ((unsigned char)p->text[n] & 0xc0) == 0x80) n--; /* cut between characters */
    buf[n] = 0;
    return buf;
}

obm_status obm__vocab_check(const obm__vocab *base, const obm__vocab *own, int64_t rows, const char *task,
                            const char *where, obm_error *err) {
    for (size_t i = 0; i < base->size && i < own->size && (int64_t)i < rows; i++) {
        const obm__piece *a = &base->pieces[i], *b = &own->pieces[i];
        char theirs[64], ours[64];
        if (!a->text || !b->text || (a->len == b->len && !memcmp(a->text, b->text, a->len))) continue;
        return obm__fail(err, OBM_E_MISMATCH, "expert %s: %s gives id %zu the token \"%s\", the base's is \"%s\"", task,
                         where, i, shown(b, ours, sizeof ours), shown(a, theirs, sizeof theirs));
    }
    return OBM_OK;
}
