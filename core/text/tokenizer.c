/* tokenizer.json of the byte-level BPE kind: opening, text to ids, ids to text.  Truncation and padding that a file may
 * ask for are not applied: they belong to training, and models are run without. */
#include "../io/io.h"
#include "text.h"

#include <limits.h>
#include <string.h>

/* ---- opening ---- */

/* What of an added token is looked for in the text. */
static obm_status read_added(const obm_tokenizer *t, const obm_json *token, bool *normalized, obm__added *out,
                             obm_error *err) {
    size_t len = 0;
    bool special = false;
    int64_t id = 0;
    const char *text = obm__json_string_n(obm__json_get(token, "content"), &len);
    obm__buffer form = {0};
    obm__json_int(obm__json_get(token, "id"), &id);
    obm__json_bool(obm__json_get(token, "special"), &special);
    *normalized = !special;
    obm__json_bool(obm__json_get(token, "normalized"), normalized);
    obm__json_bool(obm__json_get(token, "single_word"), &out->single_word);
    obm__json_bool(obm__json_get(token, "lstrip"), &out->lstrip);
    obm__json_bool(obm__json_get(token, "rstrip"), &out->rstrip);
    if (*normalized && t->pipeline.nfc) {
        obm_status status = obm__nfc(text, len, &form, err);
        if (status != OBM_OK) {
            obm__buffer_free(&form);
            return status;
        }
        text = form.data;
        len = form.size;
    }
    out->id = (int32_t)id;
    out->len = len;
    out->text = obm__strndup(text ? text : "", len);
    obm__buffer_free(&form);
    return out->text ? OBM_OK : obm__fail_nomem(err, len);
}

static obm_status load_added(obm_tokenizer *t, const obm_json *added, obm_error *err) {
    size_t n = obm__json_size(added);
    obm__added_set *sets[2] = {&t->raw, &t->normalized};
    for (int i = 0; i < 2; i++) {
        sets[i]->tokens = obm__calloc(n, sizeof *sets[i]->tokens);
        if (!sets[i]->tokens) return obm__fail_nomem(err, n * sizeof *sets[i]->tokens);
    }
    for (size_t i = 0; i < n; i++) {
        obm__added token = {.order = (uint32_t)i};
        bool normalized;
        OBM_TRY(read_added(t, obm__json_at(added, i), &normalized, &token, err));
        /* The library tries special tokens before the others. */
        if (!t->vocab.pieces[token.id].special) token.order += (uint32_t)n;
        sets[normalized]->tokens[sets[normalized]->count++] = token;
    }
    for (int i = 0; i < 2; i++) obm__added_set_index(sets[i]);
    for (size_t i = 0; i < t->normalized.count; i++) {
        const obm__added *token = &t->normalized.tokens[i];
        t->vocab.pieces[token->id].decoded = token->text;
        t->vocab.pieces[token->id].decoded_len = (uint32_t)token->len;
    }
    return OBM_OK;
}

static obm_status check_processor_ids(const obm_tokenizer *t, const char *where, obm_error *err) {
    const obm__pipeline *p = &t->pipeline;
    for (size_t i = 0; i < p->n_before + p->n_after; i++) {
        int32_t id = i < p->n_before ? p->before[i] : p->after[i - p->n_before];
        if ((size_t)id >= t->vocab.size) {
            return obm__fail(err, OBM_E_FORMAT, "%s: post_processor adds id %d, the vocabulary has %zu", where, (int)id,
                             t->vocab.size);
        }
    }
    return OBM_OK;
}

static obm_status load(obm_tokenizer *t, const obm_json *root, const char *where, obm_error *err) {
    const obm_json *model = obm__json_get(root, "model"), *added = obm__json_get(root, "added_tokens");
    const char *type = obm__json_string(obm__json_get(model, "type"));
    /* Old files do not say the type; only BPE has merges. */
    if (type ? strcmp(type, "BPE") != 0 : !obm__json_get(model, "merges")) {
        return obm__fail(err, model ? OBM_E_UNSUPPORTED : OBM_E_FORMAT, "%s: expected a model of type BPE, found %.64s",
                         where,
                         type    ? type
                         : model ? "another"
                                 : "none");
    }
    const obm_json *vocab = obm__json_get(model, "vocab");
    if (!vocab || obm__json_kind(vocab) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: model.vocab is not an object", where);
    OBM_TRY(obm__vocab_load(&t->vocab, vocab, added, where, err));
    OBM_TRY(obm__bpe_load(&t->bpe, &t->vocab, model, where, err));
    OBM_TRY(obm__pipeline_load(&t->pipeline, root, where, err));
    OBM_TRY(check_processor_ids(t, where, err));
    return load_added(t, added, err);
}

obm_status obm__tokenizer_parse(const char *json, size_t size, const char *where, obm_tokenizer **out, obm_error *err) {
    obm_json *root = NULL;
    OBM_TRY(obm__json_parse(json, size, where, &root, err));
    obm_tokenizer *t = obm__calloc(1, sizeof *t);
    obm_status status = t ? load(t, root, where, err) : obm__fail_nomem(err, sizeof *t);
    obm__json_free(root);
    if (status == OBM_OK)
        *out = t;
    else
        obm_tokenizer_free(t);
    return status;
}

obm_status obm__tokenizer_load(const char *path, const obm__chat_files *places, size_t n, obm_tokenizer **out,
                               obm_error *err) {
    obm_tokenizer *t = NULL;
    char *text = NULL;
    size_t size = 0;
    obm_status status;
    OBM_GO(obm__file_read(path, &text, &size, err));
    OBM_GO(obm__tokenizer_parse(text, size, path, &t, err));
    OBM_GO(obm__chat_load(&t->chat, places, n, err));
    *out = t;
    t = NULL;
done:
    obm_free(text);
    obm_tokenizer_free(t);
    return status;
}

/* Everything in the folder that the file is in. */
static obm_status open_in(const char *directory, const char *file, obm_tokenizer **out, obm_error *err) {
    char *jinja = obm__path_join(directory, "chat_template.jinja"),
         *config = obm__path_join(directory, "tokenizer_config.json");
    const obm__chat_files place = {jinja, config};
    obm_status status =
        jinja && config ? obm__tokenizer_load(file, &place, 1, out, err) : obm__fail_nomem(err, strlen(directory));
    obm_free(jinja);
    obm_free(config);
    return status;
}

obm_status obm_tokenizer_open(obm_context *ctx, const char *path, obm_tokenizer **out, obm_error *err) {
    (void)ctx;
    if (!path || !out) return obm__fail(err, OBM_E_ARG, "obm_tokenizer_open: path and out must be given");
    bool folder = obm__is_directory(path);
    const char *slash = strrchr(path, '/');
    char *file = folder ? obm__path_join(path, "tokenizer.json") : obm__strdup(path);
    char *directory = folder  ? obm__strdup(path)
                      : slash ? obm__strndup(path, (size_t)(slash - path) + 1)
                              : obm__strdup(".");
    obm_status status = file && directory ? open_in(directory, file, out, err) : obm__fail_nomem(err, strlen(path));
    obm_free(file);
    obm_free(directory);
    return status;
}

void obm_tokenizer_free(obm_tokenizer *t) {
    if (!t) return;
    obm__bpe_free(&t->bpe);
    obm__vocab_free(&t->vocab);
    obm__pipeline_free(&t->pipeline);
    obm__added_set_free(&t->raw);
    obm__added_set_free(&t->normalized);
    obm__chat_free(&t->chat);
    obm_free(t);
}

/* ---- pieces ---- */

size_t obm_tokenizer_size(const obm_tokenizer *t) { return t->vocab.size; }

const char *obm_tokenizer_piece(const obm_tokenizer *t, int32_t id) {
    return id >= 0 && (size_t)id < t->vocab.size ? t->vocab.pieces[id].text : NULL;
}

int32_t obm_tokenizer_id(const obm_tokenizer *t, const char *piece) {
    return piece ? obm__vocab_find(&t->vocab, piece, strlen(piece)) : -1;
}

bool obm__tokenizer_is_special(const obm_tokenizer *t, int32_t id) {
    return id >= 0 && (size_t)id < t->vocab.size && t->vocab.pieces[id].special;
}

/* ---- text to ids ---- */

typedef struct encoder {
    const obm_tokenizer *t;
    obm__matching *matching;
    obm__bpe_work *work;
    obm__spans spans, next;
    obm__buffer normal, prefixed;
    obm__ids ids;
    obm_error *err;
} encoder;

static obm_status encoder_start(encoder *e, const obm_tokenizer *t, obm_error *err) {
    *e = (encoder){.t = t, .err = err, .matching = obm__matching_new(), .work = obm__bpe_work_new()};
    return e->matching && e->work ? OBM_OK : obm__fail_nomem(err, sizeof *e);
}

static void encoder_end(encoder *e) {
    obm__matching_free(e->matching);
    obm__bpe_work_free(e->work);
    obm__spans_free(&e->spans);
    obm__spans_free(&e->next);
    obm__buffer_free(&e->normal);
    obm__buffer_free(&e->prefixed);
    obm_free(e->ids.data);
}

/* ByteLevel of one part: the space in front, then words. */
static obm_status encode_part(encoder *e, const char *text, size_t n) {
    const obm__pipeline *p = &e->t->pipeline;
    if (p->prefix_space && text[0] != ' ') {
        e->prefixed.size = 0;
        obm__buffer_text(&e->prefixed, " ");
        obm__buffer_add(&e->prefixed, text, n);
        if (e->prefixed.failed) return obm__fail_nomem(e->err, n);
        text = e->prefixed.data;
        n = e->prefixed.size;
    }
    if (!p->words) return obm__bpe_encode(&e->t->bpe, e->work, text, n, &e->ids, e->err);
    e->next.count = 0;
    const obm__split words = {.regex = p->words, .behavior = OBM__ISOLATED};
    OBM_TRY(obm__split_apply(&words, e->matching, text, (obm__span){0, n}, &e->next, e->err));
    for (size_t i = 0; i < e->next.count; i++) {
        obm__span word = e->next.at[i];
        OBM_TRY(obm__bpe_encode(&e->t->bpe, e->work, text + word.begin, word.end - word.begin, &e->ids, e->err));
    }
    return OBM_OK;
}

/* Text without added tokens in it: every split on the parts that the one before has left. */
static obm_status encode_plain(encoder *e, const char *text, size_t n) {
    const obm__pipeline *p = &e->t->pipeline;
    if (n == 0) return OBM_OK;
    e->spans.count = 0;
    if (!obm__spans_add(&e->spans, 0, n)) return obm__fail_nomem(e->err, sizeof(obm__span));
    for (size_t s = 0; s < p->n_splits; s++) {
        e->next.count = 0;
        for (size_t i = 0; i < e->spans.count; i++) {
            OBM_TRY(obm__split_apply(&p->splits[s], e->matching, text, e->spans.at[i], &e->next, e->err));
        }
        obm__spans swap = e->spans;
        e->spans = e->next;
        e->next = swap;
    }
    for (size_t i = 0; i < e->spans.count; i++) {
        obm__span part = e->spans.at[i];
        OBM_TRY(encode_part(e, text + part.begin, part.end - part.begin));
    }
    return OBM_OK;
}

/* Cuts the text at the set's tokens and gives what lies between to `rest`. */
static obm_status encode_around(encoder *e, const obm__added_set *set, const char *text, size_t n,
                                obm_status (*rest)(encoder *e, const char *text, size_t n)) {
    size_t taken = 0, at = 0;
    obm__span span;
    const obm__added *token;
    while ((token = obm__added_next(set, text, n, taken, &at, &span))) {
        if (taken < span.begin) OBM_TRY(rest(e, text + taken, span.begin - taken));
        obm__ids_add(&e->ids, token->id);
        taken = span.end;
    }
    return taken < n ? rest(e, text + taken, n - taken) : OBM_OK;
}

static obm_status encode_unnormalized(encoder *e, const char *text, size_t n) {
    if (e->t->pipeline.nfc) {
        e->normal.size = 0;
        OBM_TRY(obm__nfc(text, n, &e->normal, e->err));
        text = e->normal.data;
        n = e->normal.size;
    }
    return encode_around(e, &e->t->normalized, text, n, encode_plain);
}

static obm_status encode(encoder *e, const char *text, size_t len, bool special) {
    const obm__pipeline *p = &e->t->pipeline;
    for (size_t i = 0; special && i < p->n_before; i++) obm__ids_add(&e->ids, p->before[i]);
    OBM_TRY(encode_around(e, &e->t->raw, text, len, encode_unnormalized));
    for (size_t i = 0; special && i < p->n_after; i++) obm__ids_add(&e->ids, p->after[i]);
    return e->ids.failed ? obm__fail_nomem(e->err, e->ids.count * sizeof(int32_t)) : OBM_OK;
}

obm_status obm_tokenizer_encode(const obm_tokenizer *t, const char *text, size_t len, bool special, int32_t **ids,
                                size_t *n, obm_error *err) {
    encoder e;
    obm_status status;
    if (!text) text = "";
    if (len > INT_MAX) return obm__fail(err, OBM_E_ARG, "a text of %zu bytes is too long", len);
    size_t bad = obm__utf8_check(text, len);
    if (bad < len) {
        return obm__fail(err, OBM_E_FORMAT, "the text is not UTF-8: byte 0x%02x at offset %zu",
                         (unsigned)(uint8_t)text[bad], bad);
    }
    OBM_GO(encoder_start(&e, t, err));
    OBM_GO(encode(&e, text, len, special));
    if (!e.ids.data) e.ids.data = obm__calloc(1, sizeof *e.ids.data); /* no ids are a block of their own too */
    if (!e.ids.data) OBM_GO(obm__fail_nomem(err, sizeof *e.ids.data));
    *n = e.ids.count;
    *ids = e.ids.data;
    e.ids.data = NULL;
done:
    encoder_end(&e);
    return status;
}

/* ---- ids to text ---- */

/* A piece of the byte alphabet only is those bytes; any other is its own text, whole, as the library has it. */
static void add_bytes(const obm__piece *p, obm__buffer *out) {
    const char *text = p->decoded ? p->decoded : p->text;
    size_t n = p->decoded ? p->decoded_len : p->len, start = out->size, at = 0, len;
    while (at < n) {
        int byte = obm__char_to_byte(obm__utf8_next(text + at, n - at, &len));
        if (byte < 0) {
            out->size = start;
            obm__buffer_add(out, text, n);
            return;
        }
        char c = (char)byte;
        obm__buffer_add(out, &c, 1);
        at += len;
    }
}

obm_status obm__tokenizer_bytes(const obm_tokenizer *t, int32_t id, bool skip_special, obm__buffer *out,
                                obm_error *err) {
    if (id < 0 || (size_t)id >= t->vocab.size) {
        return obm__fail(err, OBM_E_ARG, "id %d is out of range: the tokenizer has ids 0 to %zu", (int)id,
                         t->vocab.size - 1);
    }
    const obm__piece *p = &t->vocab.pieces[id];
    if (p->text && !(skip_special && p->special)) add_bytes(p, out);
    return out->failed ? obm__fail_nomem(err, p->len) : OBM_OK;
}

obm_status obm_tokenizer_decode(const obm_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                                size_t *len, obm_error *err) {
    obm__buffer bytes = {0}, out = {0};
    obm_status status = OBM_OK;
    obm__buffer_add(&bytes, "", 0);
    for (size_t i = 0; i < n; i++) OBM_GO(obm__tokenizer_bytes(t, ids[i], skip_special, &bytes, err));
    obm__buffer_add(&out, "", 0);
    if (!bytes.failed) obm__utf8_lossy(bytes.data, bytes.size, true, &out);
    if (bytes.failed || out.failed) OBM_GO(obm__fail_nomem(err, bytes.size));
    *len = out.size;
    *text = out.data;
    out.data = NULL;
done:
    obm__buffer_free(&bytes);
    obm__buffer_free(&out);
    return status;
}

/* ---- chat ---- */

const char *obm_tokenizer_template(const obm_tokenizer *t) { return t->chat.source; }
const char *obm_tokenizer_bos(const obm_tokenizer *t) { return t->chat.bos; }
const char *obm_tokenizer_eos(const obm_tokenizer *t) { return t->chat.eos; }
