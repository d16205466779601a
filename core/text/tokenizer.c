/* tokenizer.json of the BPE kinds (byte-level, or characters with byte fallback): opening, text to ids, ids to text.
 * Truncation and padding that a file may ask for are not applied: they belong to training, and models are run without.
 */
#include "../io/io.h"
#include "text.h"

#include <limits.h>
#include <string.h>

/* ---- opening ---- */

/* The text of an added token as it is looked for. */
static obm_status added_form(const obm_tokenizer *t, obm__words *w, obm__buffer work[2], const char *text, size_t len,
                             bool normalized, obm__added *out, obm_error *err) {
    bool cut;
    out->len = len;
    if (normalized) OBM_TRY(obm__normalize(&t->normalizer, w->matching, work, text, len, &text, &out->len, &cut, err));
    out->text = obm__strndup(text ? text : "", out->len);
    return out->text ? OBM_OK : obm__fail_nomem(err, out->len);
}

static obm_status read_added(const obm_tokenizer *t, obm__words *w, obm__buffer work[2], const obm_json *token,
                             bool *normalized, obm__added *out, obm_error *err) {
    size_t len = 0;
    bool special = false;
    int64_t id = 0;
    const char *text = obm__json_string_n(obm__json_get(token, "content"), &len);
    obm__json_int(obm__json_get(token, "id"), &id);
    obm__json_bool(obm__json_get(token, "special"), &special);
    *normalized = !special;
    obm__json_bool(obm__json_get(token, "normalized"), normalized);
    obm__json_bool(obm__json_get(token, "single_word"), &out->single_word);
    obm__json_bool(obm__json_get(token, "lstrip"), &out->lstrip);
    obm__json_bool(obm__json_get(token, "rstrip"), &out->rstrip);
    out->id = (int32_t)id;
    return added_form(t, w, work, text, len, *normalized, out, err);
}

static obm_status read_all_added(obm_tokenizer *t, obm__words *w, obm__buffer work[2], const obm_json *added,
                                 obm_error *err) {
    size_t n = obm__json_size(added);
    obm__added_set *sets[2] = {&t->raw, &t->normalized};
    for (size_t i = 0; i < n; i++) {
        obm__added token = {.order = (uint32_t)i};
        bool normalized;
        OBM_TRY(read_added(t, w, work, obm__json_at(added, i), &normalized, &token, err));
        /* The library tries special tokens before the others. */
        if (!t->vocab.pieces[token.id].special) token.order += (uint32_t)n;
        sets[normalized]->tokens[sets[normalized]->count++] = token;
    }
    return OBM_OK;
}

static obm_status load_added(obm_tokenizer *t, const obm_json *added, obm_error *err) {
    size_t n = obm__json_size(added);
    obm__added_set *sets[2] = {&t->raw, &t->normalized};
    obm__words words = {.matching = obm__matching_new(NULL)};
    obm__buffer work[2] = {{0}, {0}};
    obm_status status = words.matching ? OBM_OK : obm__fail_nomem(err, sizeof words);
    for (int i = 0; i < 2 && status == OBM_OK; i++) {
        sets[i]->tokens = obm__calloc(n, sizeof *sets[i]->tokens);
        if (!sets[i]->tokens) status = obm__fail_nomem(err, n * sizeof *sets[i]->tokens);
    }
    if (status == OBM_OK) status = read_all_added(t, &words, work, added, err);
    for (int i = 0; i < 2; i++) {
        obm__buffer_free(&work[i]);
        if (status == OBM_OK) obm__added_set_index(sets[i]);
    }
    obm__words_free(&words);
    for (size_t i = 0; status == OBM_OK && i < t->normalized.count; i++) {
        const obm__added *token = &t->normalized.tokens[i];
        t->vocab.pieces[token->id].decoded = token->text;
        t->vocab.pieces[token->id].decoded_len = (uint32_t)token->len;
    }
    return status;
}

static obm_status check_processor_ids(const obm_tokenizer *t, const char *where, obm_error *err) {
    const obm__postprocessor *p = &t->postprocessor;
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
        if (!model) return obm__fail(err, OBM_E_FORMAT, "%s: expected a model of type BPE, found none", where);
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s: model.type: expected BPE, found %.64s, which is not supported",
                         where, type ? type : "none");
    }
    const obm_json *vocab = obm__json_get(model, "vocab");
    if (!vocab || obm__json_kind(vocab) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: model.vocab is not an object", where);
    OBM_TRY(obm__vocab_load(&t->vocab, vocab, added, where, err));
    OBM_TRY(obm__normalizer_load(&t->normalizer, obm__json_get(root, "normalizer"), where, err));
    OBM_TRY(obm__pretokenizer_load(&t->pretokenizer, obm__json_get(root, "pre_tokenizer"), where, err));
    OBM_TRY(obm__postprocessor_load(&t->postprocessor, obm__json_get(root, "post_processor"), where, err));
    OBM_TRY(obm__decoder_load(&t->decoder, obm__json_get(root, "decoder"), where, err));
    OBM_TRY(obm__bpe_load(&t->bpe, &t->vocab, model, t->pretokenizer.bytes, where, err));
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

const char *obm__tokenizer_hint(const char *directory) {
    char *path = obm__path_join(directory, "tokenizer.model");
    bool there = path && obm__file_exists(path);
    obm_free(path);
    return there ? "; there is a tokenizer.model, which is not read: convert it in Python: from transformers import "
                   "AutoTokenizer; AutoTokenizer.from_pretrained(IN).save_pretrained(OUT)"
                 : "";
}

static obm_status refuse_other(const char *directory, const char *file, obm_error *err) {
    const char *hint = obm__file_exists(file) ? "" : obm__tokenizer_hint(directory);
    return *hint ? obm__fail(err, OBM_E_UNSUPPORTED, "%s: no tokenizer.json here%s", directory, hint) : OBM_OK;
}

obm_status obm_tokenizer_open(obm_context *ctx, const char *path, obm_tokenizer **out, obm_error *err) {
    if (!path || !out) return obm__fail(err, OBM_E_ARG, "obm_tokenizer_open: path and out must be given");
    bool folder = obm__is_directory(path);
    const char *slash = strrchr(path, '/');
    char *file = folder ? obm__path_join(path, "tokenizer.json") : obm__strdup(path);
    char *directory = folder  ? obm__strdup(path)
                      : slash ? obm__strndup(path, (size_t)(slash - path) + 1)
                              : obm__strdup(".");
    obm_status status = file && directory ? OBM_OK : obm__fail_nomem(err, strlen(path));
    if (status == OBM_OK && folder) status = refuse_other(directory, file, err);
    if (status == OBM_OK) status = open_in(directory, file, out, err);
    if (status == OBM_OK) (*out)->ctx = ctx;
    obm_free(file);
    obm_free(directory);
    return status;
}

void obm_tokenizer_free(obm_tokenizer *t) {
    if (!t) return;
    obm__bpe_free(&t->bpe);
    obm__vocab_free(&t->vocab);
    obm__normalizer_free(&t->normalizer);
    obm__pretokenizer_free(&t->pretokenizer);
    obm__postprocessor_free(&t->postprocessor);
    obm__decoder_free(&t->decoder);
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
    obm__words words;
    obm__bpe_work *work;
    obm__buffer normal[2];
    obm__ids ids;
    bool at_start; /* of the part that is being encoded: it begins where the input does */
    obm__pulse pulse;
    obm_error *err;
} encoder;

static obm_status encoder_start(encoder *e, const obm_tokenizer *t, obm_error *err) {
    *e = (encoder){.t = t, .err = err, .pulse = obm__pulse_new(t->ctx, NULL, NULL, "encode", 1)};
    e->words.matching = obm__matching_new(&e->pulse);
    e->work = obm__bpe_work_new(&e->pulse);
    return e->words.matching && e->work ? OBM_OK : obm__fail_nomem(err, sizeof *e);
}

static void encoder_end(encoder *e) {
    obm__words_free(&e->words);
    obm__bpe_work_free(e->work);
    for (int i = 0; i < 2; i++) obm__buffer_free(&e->normal[i]);
    obm_free(e->ids.data);
}

static obm_status encode_word(void *user, const char *word, size_t n, obm_error *err) {
    encoder *e = user;
    return obm__bpe_encode(&e->t->bpe, e->work, word, n, &e->ids, err);
}

/* Text without added tokens in it. */
static obm_status encode_plain(encoder *e, const char *text, size_t n, bool first) {
    return obm__pretokenize(&e->t->pretokenizer, &e->words, text, n, first && e->at_start, encode_word, e, e->err);
}

/* Cuts the text at the set's tokens and gives what lies between to `rest`. */
static obm_status encode_around(encoder *e, const obm__added_set *set, const char *text, size_t n,
                                obm_status (*rest)(encoder *e, const char *text, size_t n, bool first)) {
    size_t taken = 0, at = 0;
    obm__span span;
    const obm__added *token;
    while ((token = obm__added_next(set, text, n, taken, &at, &span))) {
        if (taken < span.begin) OBM_TRY(rest(e, text + taken, span.begin - taken, taken == 0));
        obm__ids_add(&e->ids, token->id);
        taken = span.end;
    }
    return taken < n ? rest(e, text + taken, n - taken, taken == 0) : OBM_OK;
}

static obm_status encode_unnormalized(encoder *e, const char *text, size_t n, bool first) {
    bool cut;
    OBM_TRY(obm__normalize(&e->t->normalizer, e->words.matching, e->normal, text, n, &text, &n, &cut, e->err));
    e->at_start = first && !cut;
    return encode_around(e, &e->t->normalized, text, n, encode_plain);
}

static obm_status encode(encoder *e, const char *text, size_t len, bool special) {
    const obm__postprocessor *p = &e->t->postprocessor;
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

obm_status obm__tokenizer_push(const obm_tokenizer *t, obm__decoding *s, int32_t id, bool skip_special,
                               obm__buffer *out, obm_error *err) {
    if (id < 0 || (size_t)id >= t->vocab.size) {
        return obm__fail(err, OBM_E_ARG, "id %d is out of range: the tokenizer has ids 0 to %zu", (int)id,
                         t->vocab.size - 1);
    }
    const obm__piece *p = &t->vocab.pieces[id];
    if (!p->text || (skip_special && p->special)) return OBM_OK;
    return p->decoded ? obm__decoding_push(s, p->decoded, p->decoded_len, out, err)
                      : obm__decoding_push(s, p->text, p->len, out, err);
}

/* Ids between two looks at the pulse, which reads the clock. */
#define IDS_PER_LOOK 1024

obm_status obm_tokenizer_decode(const obm_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                                size_t *len, obm_error *err) {
    obm__buffer out = {0};
    obm__decoding *decoding = NULL;
    obm__pulse pulse = obm__pulse_new(t->ctx, NULL, NULL, "decode", n);
    obm_status status = obm__decoding_new(&t->decoder, false, &decoding, err);
    obm__buffer_add(&out, "", 0);
    for (size_t i = 0; i < n && status == OBM_OK; i++) {
        status = obm__tokenizer_push(t, decoding, ids[i], skip_special, &out, err);
        if (status == OBM_OK && i % IDS_PER_LOOK == 0) status = obm__pulse_check(&pulse, err);
    }
    if (status == OBM_OK) status = obm__decoding_end(decoding, &out, err);
    if (status == OBM_OK && out.failed) status = obm__fail_nomem(err, out.size);
    obm__decoding_free(decoding);
    if (status == OBM_OK) {
        *len = out.size;
        *text = out.data;
    } else {
        obm__buffer_free(&out);
    }
    return status;
}

/* ---- chat ---- */

const char *obm_tokenizer_template(const obm_tokenizer *t) { return t->chat.source; }
const char *obm_tokenizer_bos(const obm_tokenizer *t) { return t->chat.bos; }
const char *obm_tokenizer_eos(const obm_tokenizer *t) { return t->chat.eos; }
