/* Byte-pair encoding (Sennrich et al. 2016; over bytes: Radford et al. 2019; over characters with single bytes for
 * those that have no piece: Kudo and Richardson 2018): a word's symbols are merged pair by pair, lowest rank first,
 * leftmost first among equals. */
#include "text.h"

#include <limits.h>
#include <string.h>

/* ---- bytes and characters ---- */

static bool is_plain(int b) { return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae; }

/* The bytes that do not print as Latin-1, in order, become U+0100, U+0101, ... */
static uint32_t char_of(uint8_t byte) {
    if (is_plain(byte)) return byte;
    if (byte <= 0x20) return 0x100u + byte;
    return byte <= 0xa0 ? 0x100u + 33 + (byte - 0x7fu) : 0x100u + 67; // 0x7f .. 0xa0, then 0xad
}

size_t obm__byte_to_char(uint8_t byte, char out[2]) {
    uint32_t c = char_of(byte);
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xc0 | (c >> 6));
    out[1] = (char)(0x80 | (c & 0x3f));
    return 2;
}

int obm__char_to_byte(uint32_t c) {
    if (c < 0x100) return is_plain((int)c) ? (int)c : -1;
    if (c <= 0x120) return (int)(c - 0x100);
    if (c <= 0x142) return (int)(c - 0x121 + 0x7f);
    return c == 0x143 ? 0xad : -1;
}

void obm__ids_add(obm__ids *ids, int32_t id) {
    if (ids->count == ids->capacity) {
        size_t capacity = ids->capacity ? 2 * ids->capacity : 64;
        int32_t *data = obm__realloc(ids->data, capacity, sizeof *data);
        if (!data) {
            ids->failed = true;
            return;
        }
        ids->data = data;
        ids->capacity = capacity;
    }
    ids->data[ids->count++] = id;
}

/* ---- merges ---- */

static uint64_t pair_of(int32_t a, int32_t b) { return (uint64_t)(uint32_t)a << 32 | (uint32_t)b; }

/* The merge of a pair, or the free slot where it belongs (rank UINT32_MAX). */
static obm__merge *merge_of(const obm__bpe *m, uint64_t pair) {
    /* Fibonacci hashing: the product's high half depends on both ids. */
    size_t i = (size_t)((pair * 0x9e3779b97f4a7c15u) >> 32) & m->mask;
    while (m->merges[i].rank != UINT32_MAX && m->merges[i].pair != pair) i = (i + 1) & m->mask;
    return &m->merges[i];
}

/* "a b" or ["a", "b"]. */
static bool read_pair(const obm_json *merge, const char *half[2], size_t len[2]) {
    if (obm__json_kind(merge) == OBM_JSON_ARRAY && obm__json_size(merge) == 2) {
        half[0] = obm__json_string_n(obm__json_at(merge, 0), &len[0]);
        half[1] = obm__json_string_n(obm__json_at(merge, 1), &len[1]);
        return half[0] && half[1];
    }
    size_t n = 0;
    const char *text = obm__json_string_n(merge, &n);
    const char *space = text ? memchr(text, ' ', n) : NULL;
    if (!space) return false;
    half[0] = text;
    len[0] = (size_t)(space - text);
    half[1] = space + 1;
    len[1] = n - len[0] - 1;
    return memchr(half[1], ' ', len[1]) == NULL;
}

static obm_status load_merge(obm__bpe *m, const obm_json *merge, size_t rank, obm__buffer *joined, const char *where,
                             obm_error *err) {
    const char *half[2];
    size_t len[2];
    if (!read_pair(merge, half, len)) {
        return obm__fail(err, OBM_E_FORMAT, "%s: model.merges[%zu] is neither \"a b\" nor [\"a\", \"b\"]", where, rank);
    }
    joined->size = 0;
    obm__buffer_add(joined, half[0], len[0]);
    obm__buffer_add(joined, half[1], len[1]);
    if (joined->failed) return obm__fail_nomem(err, len[0] + len[1]);
    int32_t a = obm__vocab_find_in_model(m->vocab, half[0], len[0]);
    int32_t b = obm__vocab_find_in_model(m->vocab, half[1], len[1]);
    int32_t id = obm__vocab_find_in_model(m->vocab, joined->data, joined->size);
    if (a < 0 || b < 0 || id < 0) {
        return obm__fail(err, OBM_E_FORMAT, "%s: model.merges[%zu] names \"%.64s\", which is not in the vocabulary",
                         where, rank,
                         a < 0   ? half[0]
                         : b < 0 ? half[1]
                                 : joined->data);
    }
    uint64_t pair = pair_of(a, b);
    *merge_of(m, pair) = (obm__merge){pair, (uint32_t)rank, id}; /* of duplicates the last counts, as in the library */
    return OBM_OK;
}

static obm_status load_merges(obm__bpe *m, const obm_json *merges, const char *where, obm_error *err) {
    size_t n = obm__json_size(merges), capacity = 16;
    if (!merges || obm__json_kind(merges) != OBM_JSON_ARRAY)
        return obm__fail(err, OBM_E_FORMAT, "%s: model.merges is not an array", where);
    if (n >= INT32_MAX) return obm__fail(err, OBM_E_FORMAT, "%s: %zu merges are too many", where, n);
    while (capacity < 2 * n) capacity *= 2;
    m->merges = obm__alloc(capacity, sizeof *m->merges);
    if (!m->merges) return obm__fail_nomem(err, capacity * sizeof *m->merges);
    memset(m->merges, 0xff, capacity * sizeof *m->merges);
    m->mask = capacity - 1;
    obm__buffer joined = {0};
    obm_status status = OBM_OK;
    for (size_t i = 0; i < n && status == OBM_OK; i++)
        status = load_merge(m, obm__json_at(merges, i), i, &joined, where, err);
    obm__buffer_free(&joined);
    return status;
}

static bool is_unset(const obm_json *v) {
    const char *text = obm__json_string(v);
    return !v || obm__json_kind(v) == OBM_JSON_NULL || (text && !*text);
}

/* Options of the library's BPE that this one does not have. */
static obm_status check_options(const obm_json *model, const char *where, obm_error *err) {
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    double dropout = 0;
    for (size_t i = 0; i < 2; i++) {
        if (!is_unset(obm__json_get(model, affixes[i]))) {
            return obm__fail(err, OBM_E_UNSUPPORTED, "%s: model.%s is not supported (expected null or \"\")", where,
                             affixes[i]);
        }
    }
    obm__json_real(obm__json_get(model, "dropout"), &dropout);
    if (dropout != 0)
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s: model.dropout must be null or 0, found %g", where, dropout);
    return OBM_OK;
}

/* The pieces of single bytes: in GPT-2's alphabet, and <0x00> to <0xFF>. */
static obm_status load_bytes(obm__bpe *m, const obm_json *model, const char *where, obm_error *err) {
    bool fallback = false, complete = true;
    obm__json_bool(obm__json_get(model, "byte_fallback"), &fallback);
    for (int b = 0; b < 256; b++) {
        static const char hex[] = "0123456789ABCDEF";
        char text[2], code[6] = {'<', '0', 'x', hex[b >> 4], hex[b & 15], '>'};
        size_t len = obm__byte_to_char((uint8_t)b, text);
        m->byte_ids[b] = obm__vocab_find_in_model(m->vocab, text, len);
        m->fallback[b] = fallback ? obm__vocab_find_in_model(m->vocab, code, sizeof code) : -1;
        complete = complete && m->byte_ids[b] >= 0;
    }
    if (m->bytes && fallback && !complete) {
        return obm__fail(err, OBM_E_UNSUPPORTED,
                         "%s: model.byte_fallback with a ByteLevel pre_tokenizer needs a piece for every byte", where);
    }
    return OBM_OK;
}

obm_status obm__bpe_load(obm__bpe *m, const obm__vocab *vocab, const obm_json *model, bool bytes, const char *where,
                         obm_error *err) {
    *m = (obm__bpe){.vocab = vocab, .unk = -1, .bytes = bytes};
    OBM_TRY(check_options(model, where, err));
    OBM_TRY(load_bytes(m, model, where, err));
    obm__json_bool(obm__json_get(model, "fuse_unk"), &m->fuse_unk);
    obm__json_bool(obm__json_get(model, "ignore_merges"), &m->ignore_merges);
    size_t len = 0;
    const char *unk = obm__json_string_n(obm__json_get(model, "unk_token"), &len);
    if (unk && (m->unk = obm__vocab_find_in_model(vocab, unk, len)) < 0) {
        return obm__fail(err, OBM_E_FORMAT, "%s: model.unk_token \"%.64s\" is not in the vocabulary", where, unk);
    }
    obm_status status = load_merges(m, obm__json_get(model, "merges"), where, err);
    if (status != OBM_OK) obm__bpe_free(m);
    return status;
}

void obm__bpe_free(obm__bpe *m) {
    obm_free(m->merges);
    m->merges = NULL;
}

/* ---- encoding ---- */

typedef struct symbol {
    int32_t id, previous, next;
} symbol; /* id -1: merged into its left neighbour */
typedef struct candidate {
    uint32_t rank;
    int32_t at;
    int32_t id;
} candidate; /* merge symbol `at` with its right neighbour */

struct obm__bpe_work {
    obm__pulse *pulse;
    unsigned steps;  /* since it was looked at, in merges and words */
    symbol *symbols;
    candidate *heap; // binary, smallest (rank, at) first
    size_t capacity; /* symbols; the heap has three times as many */
    size_t n_symbols, n_heap;
    obm__buffer chars;
};

obm__bpe_work *obm__bpe_work_new(obm__pulse *pulse) {
    obm__bpe_work *w = obm__calloc(1, sizeof *w);
    if (w) w->pulse = pulse;
    return w;
}

/* A step takes some hundred nanoseconds: this many are well below 10 ms. */
#define STEPS_PER_LOOK 8192

static obm_status look(obm__bpe_work *w, obm_error *err) {
    if (++w->steps < STEPS_PER_LOOK) return OBM_OK;
    w->steps = 0;
    return obm__pulse_check(w->pulse, err);
}

void obm__bpe_work_free(obm__bpe_work *w) {
    if (!w) return;
    obm_free(w->symbols);
    obm_free(w->heap);
    obm__buffer_free(&w->chars);
    obm_free(w);
}

/* n - 1 candidates at the start and two more for each of at most n - 1 merges: 3 n is enough. */
static obm_status reserve(obm__bpe_work *w, size_t n, obm_error *err) {
    if (n <= w->capacity) return OBM_OK;
    if (n > INT32_MAX / 2) return obm__fail(err, OBM_E_ARG, "a word of %zu bytes is too long", n);
    size_t capacity = n < 64 ? 64 : 2 * n;
    obm_free(w->symbols);
    obm_free(w->heap);
    w->capacity = 0;
    w->symbols = obm__calloc(capacity, sizeof *w->symbols);
    w->heap = obm__calloc(3 * capacity, sizeof *w->heap);
    if (!w->symbols || !w->heap) return obm__fail_nomem(err, capacity * (sizeof(symbol) + 3 * sizeof(candidate)));
    w->capacity = capacity;
    return OBM_OK;
}

static bool before(const candidate *a, const candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(obm__bpe_work *w, candidate c) {
    size_t i = w->n_heap++;
    while (i > 0 && before(&c, &w->heap[(i - 1) / 2])) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = c;
}

static candidate heap_pop(obm__bpe_work *w) {
    candidate top = w->heap[0], last = w->heap[--w->n_heap];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < w->n_heap) {
        if (child + 1 < w->n_heap && before(&w->heap[child + 1], &w->heap[child])) child++;
        if (!before(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return top;
}

/* Enters the merge of symbol `at` with its right neighbour, if there is one. */
static void consider(const obm__bpe *m, obm__bpe_work *w, int32_t at) {
    if (at < 0 || w->symbols[at].next < 0) return;
    const obm__merge *merge = merge_of(m, pair_of(w->symbols[at].id, w->symbols[w->symbols[at].next].id));
    if (merge->rank != UINT32_MAX) heap_push(w, (candidate){merge->rank, at, merge->id});
}

static void add_symbol(obm__bpe_work *w, int32_t id) {
    int32_t at = (int32_t)w->n_symbols++;
    w->symbols[at] = (symbol){id, at - 1, at + 1};
}

static void start_bytes(const obm__bpe *m, obm__bpe_work *w, const char *word, size_t n) {
    bool unknown = false; /* the byte before had no piece either */
    for (size_t i = 0; i < n; i++) {
        int32_t id = m->byte_ids[(uint8_t)word[i]];
        if (id >= 0) {
            add_symbol(w, id);
        } else if (m->unk >= 0 && !(unknown && m->fuse_unk)) {
            add_symbol(w, m->unk);
        }
        unknown = id < 0;
    }
}

/* The bytes of one character; false if one of them has no piece. */
static bool add_fallback(const obm__bpe *m, obm__bpe_work *w, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (m->fallback[(uint8_t)s[i]] < 0) return false;
    }
    for (size_t i = 0; i < n; i++) add_symbol(w, m->fallback[(uint8_t)s[i]]);
    return true;
}

static void start_chars(const obm__bpe *m, obm__bpe_work *w, const char *word, size_t n) {
    bool pending = false; /* the library adds an unknown once a piece follows: bytes may overtake it */
    for (size_t at = 0, len; at < n; at += len) {
        obm__utf8_next(word + at, n - at, &len);
        int32_t id = obm__vocab_find_in_model(m->vocab, word + at, len);
        if (id >= 0) {
            if (pending) add_symbol(w, m->unk);
            add_symbol(w, id);
            pending = false;
        } else if (!add_fallback(m, w, word + at, len) && m->unk >= 0) {
            if (pending && !m->fuse_unk) add_symbol(w, m->unk);
            pending = true;
        }
    }
    if (pending) add_symbol(w, m->unk);
}

static void start_symbols(const obm__bpe *m, obm__bpe_work *w, const char *word, size_t n) {
    w->n_symbols = w->n_heap = 0;
    if (m->bytes)
        start_bytes(m, w, word, n);
    else
        start_chars(m, w, word, n);
    if (w->n_symbols) w->symbols[w->n_symbols - 1].next = -1;
}

static obm_status merge_symbols(const obm__bpe *m, obm__bpe_work *w, obm_error *err) {
    for (size_t i = 0; i + 1 < w->n_symbols; i++) consider(m, w, (int32_t)i);
    while (w->n_heap) {
        OBM_TRY(look(w, err));
        candidate c = heap_pop(w);
        symbol *left = &w->symbols[c.at];
        if (left->id < 0 || left->next < 0) continue;
        symbol *right = &w->symbols[left->next];
        const obm__merge *merge = merge_of(m, pair_of(left->id, right->id));
        if (merge->rank != c.rank || merge->id != c.id) continue; /* a neighbour has changed since */
        left->id = c.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) w->symbols[left->next].previous = c.at;
        consider(m, w, left->previous);
        consider(m, w, c.at);
    }
    return OBM_OK;
}

/* The whole word as a piece, before any merge; -1 if it is none. */
static int32_t find_whole(const obm__bpe *m, obm__bpe_work *w, const char *word, size_t n) {
    if (!m->bytes) return obm__vocab_find_in_model(m->vocab, word, n);
    w->chars.size = 0;
    for (size_t i = 0; i < n; i++) {
        char text[2];
        size_t len = obm__byte_to_char((uint8_t)word[i], text);
        obm__buffer_add(&w->chars, text, len);
    }
    return w->chars.failed ? -1 : obm__vocab_find_in_model(m->vocab, w->chars.data, w->chars.size);
}

obm_status obm__bpe_encode(const obm__bpe *m, obm__bpe_work *w, const char *word, size_t n, obm__ids *out,
                           obm_error *err) {
    if (n == 0) return OBM_OK;
    OBM_TRY(look(w, err));
    int32_t whole = m->ignore_merges ? find_whole(m, w, word, n) : -1;
    if (w->chars.failed) return obm__fail_nomem(err, 2 * (uint64_t)n);
    if (whole >= 0) {
        obm__ids_add(out, whole);
    } else {
        OBM_TRY(reserve(w, n, err));
        start_symbols(m, w, word, n);
        OBM_TRY(merge_symbols(m, w, err));
        for (int32_t i = w->n_symbols ? 0 : -1; i >= 0; i = w->symbols[i].next) obm__ids_add(out, w->symbols[i].id);
    }
    return out->failed ? obm__fail_nomem(err, n * sizeof(int32_t)) : OBM_OK;
}
