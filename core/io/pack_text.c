/*
 * The experts' tokenizers, chat templates and eos ids in a pack: what differs from the base's is found, checked and
 * stored when an expert is compressed, and its place is read back when a pack is opened.  What the files mean is
 * core/text's.
 *
 * Three parts are compared, each by what it does rather than by its bytes: tokenizer.json (as JSON, without truncation
 * and padding, which are not applied), the chat template with bos and eos tokens, and the eos ids.  A part that the
 * expert's folder lacks is the base's.  Ids are compared, merges and pre-tokenizers are not: under its own hard route
 * an expert sees its own segmentation, and it is enough that an id stands for the same token.
 */
#include "../text/text.h"
#include "pack_parts.h"

#include <string.h>

/* Files get the name in two parts: "<stem>-<16 hex digits><end>". */
static const struct {
    const char *stem, *end, *name;
} files[OBM_TEXT_FILES] = {{"tokenizer", ".json", "tokenizer.json"},
                           {"added_tokens", ".json", "added_tokens.json"},
                           {"tokenizer_config", ".json", "tokenizer_config.json"},
                           {"special_tokens_map", ".json", "special_tokens_map.json"},
                           {"chat_template", ".jinja", "chat_template.jinja"},
                           {"generation_config", ".json", "generation_config.json"}};

const char *obm__text_file_name(obm__text_file f) { return files[f].name; }

bool obm__text_is_own(const obm__pack_text *t, obm__text_file f) {
    return f <= OBM_TEXT_ADDED ? t->tokenizer : f <= OBM_TEXT_TEMPLATE ? t->template_ : t->eos != NULL;
}

const char *obm__text_derived(size_t i) {
    static const char *const names[] = {"vocab.json", "merges.txt", "tokenizer.model"};
    return i < sizeof names / sizeof *names ? names[i] : NULL;
}

bool obm__text_set_eos(const obm__pack_text *t, obm_json *config) {
    if (t->n_eos == 1) return obm__json_set(config, "eos_token_id", obm__json_new_int(t->eos[0]));
    obm_json *list = obm__json_new_array();
    bool ok = list != NULL;
    for (size_t i = 0; i < t->n_eos; i++) ok = ok && obm__json_append(list, obm__json_new_int(t->eos[i]));
    return obm__json_set(config, "eos_token_id", list) && ok;
}

bool obm__text_owns(const char *file) {
    size_t n = strlen(file);
    for (int f = 0; f < OBM_TEXT_FILES; f++) {
        size_t stem = strlen(files[f].stem), end = strlen(files[f].end);
        if (n != stem + 17 + end || strncmp(file, files[f].stem, stem) || strcmp(file + n - end, files[f].end))
            continue;
        if (file[stem] == '-' && strspn(file + stem + 1, "0123456789abcdef") == 16) return true;
    }
    return false;
}

const obm_json *obm__text_record(const obm_json *record, obm__text_file f) {
    return obm__json_get(obm__json_get(record, "files"), files[f].name);
}

bool obm__text_names(const obm_json *record, const char *file) {
    for (int f = 0; f < OBM_TEXT_FILES; f++) {
        const char *name = obm__json_string(obm__json_get(obm__text_record(record, (obm__text_file)f), "file"));
        if (name && !strcmp(name, file)) return true;
    }
    return false;
}

/* ---- what a folder has ---- */

typedef struct folder {
    const obm_checkpoint *checkpoint;
    char *paths[OBM_TEXT_FILES]; /* NULL: no such file */
    obm__chat chat;
    int32_t *eos;
    size_t n_eos;
} folder;

static void folder_clear(folder *f) {
    for (int i = 0; i < OBM_TEXT_FILES; i++) obm_free(f->paths[i]);
    obm__chat_free(&f->chat);
    obm_free(f->eos);
}

static obm_status find_files(folder *f, obm_error *err) {
    for (int i = 0; i < OBM_TEXT_FILES; i++) {
        char *path = obm__path_join(f->checkpoint->directory, files[i].name);
        if (!path) return obm__fail_nomem(err, strlen(f->checkpoint->directory));
        if (obm__file_exists(path))
            f->paths[i] = path;
        else
            obm_free(path);
    }
    return OBM_OK;
}

/* generation_config.json wins, as in the model. */
static obm_status read_eos(folder *f, obm_error *err) {
    obm_json *generation = NULL;
    char *where = obm__path_join(f->checkpoint->directory, "config.json");
    if (!where) return obm__fail_nomem(err, strlen(f->checkpoint->directory));
    obm_status status = OBM_OK;
    if (f->paths[OBM_TEXT_GENERATION]) status = obm__json_load(f->paths[OBM_TEXT_GENERATION], &generation, err);
    if (status == OBM_OK) status = obm__eos_read(generation, files[OBM_TEXT_GENERATION].name, &f->eos, &f->n_eos, err);
    if (status == OBM_OK && !f->eos) status = obm__eos_read(f->checkpoint->config, where, &f->eos, &f->n_eos, err);
    obm__json_free(generation);
    obm_free(where);
    return status;
}

/* other: where a template is taken from that this folder lacks, nullable. */
static obm_status folder_open(folder *f, const obm_checkpoint *checkpoint, const folder *other, obm_error *err) {
    f->checkpoint = checkpoint;
    OBM_TRY(find_files(f, err));
    obm__chat_files places[2] = {{f->paths[OBM_TEXT_TEMPLATE], f->paths[OBM_TEXT_CONFIG]}};
    if (other) places[1] = (obm__chat_files){other->paths[OBM_TEXT_TEMPLATE], other->paths[OBM_TEXT_CONFIG]};
    OBM_TRY(obm__chat_load(&f->chat, places, other ? 2 : 1, err));
    return read_eos(f, err);
}

/* ---- comparing ---- */

static bool same_text(const char *a, const char *b) { return a && b ? !strcmp(a, b) : a == b; }

static bool same_chat(const obm__chat *a, const obm__chat *b) {
    return same_text(a->source, b->source) && same_text(a->bos, b->bos) && same_text(a->eos, b->eos);
}

static bool same_eos(const folder *expert, const folder *base) {
    if (!expert->eos) return true;
    return base->eos && base->n_eos == expert->n_eos &&
           !memcmp(base->eos, expert->eos, base->n_eos * sizeof *base->eos);
}

/* tokenizer.json without what is not applied. */
static obm_status load_tokenizer(const char *path, obm_json **out, obm_error *err) {
    static const char *const unused[] = {"truncation", "padding"};
    obm_json *root = NULL;
    OBM_TRY(obm__json_load(path, &root, err));
    bool ok = true, object = obm__json_kind(root) == OBM_JSON_OBJECT;
    for (int i = 0; object && i < 2; i++) ok = obm__json_set(root, unused[i], obm__json_new_null()) && ok;
    if (object && ok) {
        *out = root;
        return OBM_OK;
    }
    obm__json_free(root);
    return object ? obm__fail_nomem(err, 0)
                  : obm__fail(err, OBM_E_FORMAT, "%s: expected an object, found another value", path);
}

static obm_status load_vocab(const obm_json *root, const char *path, const char *task, obm__vocab *out,
                             obm_error *err) {
    const obm_json *vocab = obm__json_get(obm__json_get(root, "model"), "vocab");
    if (vocab && obm__json_kind(vocab) == OBM_JSON_OBJECT)
        return obm__vocab_load(out, vocab, obm__json_get(root, "added_tokens"), path, err);
    return obm__fail(
        err, OBM_E_UNSUPPORTED,
        "expert %s: %s: only vocabularies that map tokens to ids can be compared with the base's; without the "
        "expert's tokenizer.json the base's applies",
        task, path);
}

static obm_status check_ids(const obm_json *base, const folder *b, const obm_json *own, const folder *x,
                            const char *task, obm_error *err) {
    const obm__st_entry *embedding = obm__checkpoint_find(b->checkpoint, OBM_EMBEDDING_NAME);
    int64_t rows = embedding && embedding->t.ndim > 0 ? embedding->t.shape[0] : INT64_MAX;
    const char *base_path = b->paths[OBM_TEXT_TOKENIZER], *path = x->paths[OBM_TEXT_TOKENIZER];
    obm__vocab ours = {0}, theirs = {0};
    obm_status status = load_vocab(base, base_path, task, &theirs, err);
    if (status == OBM_OK) status = load_vocab(own, path, task, &ours, err);
    if (status == OBM_OK) status = obm__vocab_check(&theirs, &ours, rows, task, path, err);
    obm__vocab_free(&ours);
    obm__vocab_free(&theirs);
    return status;
}

/* One bad expert must not keep the whole pack from running, so what the model would refuse is refused here, where the
 * base's own tokenizer can be run. */
static obm_status check_kind(const folder *base, const folder *x, obm_error *err) {
    obm_tokenizer *t = NULL;
    if (base->paths[OBM_TEXT_TOKENIZER]) {
        obm_error why = {0};
        obm_status status = obm__tokenizer_load(base->paths[OBM_TEXT_TOKENIZER], NULL, 0, &t, &why);
        obm_tokenizer_free(t);
        if (status == OBM_E_NOMEM) return obm__fail(err, status, "%s", why.message);
        if (status != OBM_OK) return OBM_OK;
    }
    t = NULL;
    OBM_TRY(obm__tokenizer_load(x->paths[OBM_TEXT_TOKENIZER], NULL, 0, &t, err));
    obm_tokenizer_free(t);
    return OBM_OK;
}

static obm_status compare_tokenizers(const folder *base, const folder *x, const char *task, bool *differs,
                                     obm_error *err) {
    obm_json *theirs = NULL, *own = NULL;
    *differs = false;
    if (!x->paths[OBM_TEXT_TOKENIZER]) return OBM_OK;
    OBM_TRY(load_tokenizer(x->paths[OBM_TEXT_TOKENIZER], &own, err));
    obm_status status =
        base->paths[OBM_TEXT_TOKENIZER] ? load_tokenizer(base->paths[OBM_TEXT_TOKENIZER], &theirs, err) : OBM_OK;
    if (status == OBM_OK) *differs = !theirs || !obm__json_equal(theirs, own);
    if (status == OBM_OK && *differs && theirs) status = check_ids(theirs, base, own, x, task, err);
    if (status == OBM_OK && *differs) status = check_kind(base, x, err);
    obm__json_free(theirs);
    obm__json_free(own);
    return status;
}

/* ---- storing ---- */

typedef struct storing {
    const obm__expert_request *r;
    const folder *x;
    obm_json *list; /* the record's "files" */
    uint64_t bytes;
} storing;

static obm_status publish(const storing *s, int f, const char *text, size_t size, char xxh3[33], char **name,
                          obm_error *err) {
    obm__xxh3_of(text, size, xxh3);
    char *file = obm__format("%s-%.16s%s", files[f].stem, xxh3, files[f].end), *temp = NULL;
    char *partial = obm__format("%s" OBM_PACK_PARTIAL, files[f].stem);
    char *path = file ? obm__path_join(s->r->dir, file) : NULL,
         *staging = partial ? obm__path_join(s->r->dir, partial) : NULL;
    obm_status status =
        path && staging ? obm__file_stage(staging, text, size, &temp, err) : obm__fail_nomem(err, strlen(s->r->dir));
    if (status == OBM_OK) status = obm__file_publish(temp, path, err);
    obm_free(partial);
    obm_free(staging);
    obm_free(path);
    obm_free(temp);
    if (status == OBM_OK)
        *name = file;
    else
        obm_free(file);
    return status;
}

static obm_status store(storing *s, int f, obm_error *err) {
    char *text = NULL, *name = NULL, xxh3[33];
    size_t size = 0;
    if (!s->x->paths[f]) return OBM_OK;
    OBM_TRY(obm__file_read(s->x->paths[f], &text, &size, err));
    s->bytes += size;
    obm_status status = s->r->dry_run ? OBM_OK : publish(s, f, text, size, xxh3, &name, err);
    obm_free(text);
    if (name && !obm__json_set(s->list, files[f].name, obm__file_record(name, size, xxh3)))
        status = obm__fail_nomem(err, 0);
    obm_free(name);
    return status;
}

static obm_status store_range(storing *s, int first, int last, obm_error *err) {
    for (int f = first; f <= last; f++) OBM_TRY(store(s, f, err));
    return OBM_OK;
}

/* A tokenizer brings the files around it too: transformers reads added tokens from tokenizer_config.json as well. */
static obm_status store_parts(storing *s, bool tokenizer, bool chat, bool eos, obm_error *err) {
    if (tokenizer) OBM_TRY(store_range(s, OBM_TEXT_TOKENIZER, OBM_TEXT_ADDED, err));
    if (tokenizer || chat) OBM_TRY(store_range(s, OBM_TEXT_CONFIG, OBM_TEXT_TEMPLATE, err));
    return eos ? store(s, OBM_TEXT_GENERATION, err) : OBM_OK;
}

static bool put_eos(obm_json *record, const folder *x) {
    obm_json *list = obm__json_new_array();
    bool ok = list != NULL;
    for (size_t i = 0; i < x->n_eos; i++) ok = ok && obm__json_append(list, obm__json_new_int(x->eos[i]));
    return obm__json_set(record, "eos", list) && ok;
}

static obm_status write_record(const obm__expert_request *r, const folder *base, const folder *x, obm_json **record,
                               uint64_t *bytes, obm_error *err) {
    bool tokenizer, chat = !same_chat(&x->chat, &base->chat), eos = !same_eos(x, base);
    OBM_TRY(compare_tokenizers(base, x, r->expert->name, &tokenizer, err));
    if (!tokenizer && !chat && !eos) return OBM_OK;
    obm_json *text = obm__json_new_object();
    storing s = {.r = r, .x = x, .list = obm__json_new_object()};
    obm_status status = text && s.list ? store_parts(&s, tokenizer, chat, eos, err) : obm__fail_nomem(err, 0);
    bool ok = obm__json_set(text, "files", s.list);
    if (eos) ok = ok && put_eos(text, x);
    if (status == OBM_OK && !ok) status = obm__fail_nomem(err, 0);
    *bytes = s.bytes;
    if (status == OBM_OK && !r->dry_run)
        *record = text;
    else
        obm__json_free(text);
    return status;
}

obm_status obm__text_write(const obm__expert_request *r, const obm_checkpoint *expert, obm_json **record,
                           uint64_t *bytes, obm_error *err) {
    folder base = {0}, x = {0};
    *record = NULL;
    *bytes = 0;
    obm_status status = folder_open(&base, r->base, NULL, err);
    if (status == OBM_OK) status = folder_open(&x, expert, &base, err);
    if (status == OBM_OK) status = write_record(r, &base, &x, record, bytes, err);
    folder_clear(&base);
    folder_clear(&x);
    return status;
}

/* ---- reading back ---- */

static obm_status load_file(const obm_json *record, const char *dir, const char *where, char **out, obm_error *err) {
    uint64_t bytes;
    obm__map map = {0};
    OBM_TRY(obm__text_file_of(record, dir, where, out, &bytes, NULL, err));
    OBM_TRY(obm__map_open(*out, &map, err));
    obm_status status = OBM_OK;
    if (map.size != bytes)
        status = obm__fail(err, OBM_E_FORMAT, "%s is %zu bytes long, pack.json says %llu", *out, map.size,
                           (unsigned long long)bytes);
    obm__map_close(&map);
    return status;
}

static obm_status load_eos(const obm_json *list, const char *where, obm__pack_text *out, obm_error *err) {
    out->n_eos = obm__json_size(list);
    out->eos = obm__calloc(out->n_eos ? out->n_eos : 1, sizeof *out->eos);
    if (!out->eos) return obm__fail_nomem(err, out->n_eos * sizeof *out->eos);
    for (size_t i = 0; i < out->n_eos; i++) {
        int64_t id;
        if (!obm__json_int(obm__json_at(list, i), &id) || id < -1 || id > INT32_MAX)
            return obm__fail(err, OBM_E_FORMAT, "%s: \"eos\"[%zu] is not a token id", where, i);
        out->eos[i] = (int32_t)id;
    }
    return OBM_OK;
}

static obm_status load_parts(const obm_json *record, const char *dir, const char *where, obm__pack_text *out,
                             obm_error *err) {
    const obm_json *list, *eos = obm__json_get(record, "eos");
    size_t known = 0;
    OBM_TRY(obm__field(record, "files", OBM_JSON_OBJECT, where, &list, err));
    for (int f = 0; f < OBM_TEXT_FILES; f++) {
        const obm_json *file = obm__json_get(list, files[f].name);
        if (!file) continue;
        known++;
        OBM_TRY(load_file(file, dir, where, &out->paths[f], err));
    }
    if (known != obm__json_size(list)) return obm__fail(err, OBM_E_FORMAT, "%s: unknown text file", where);
    out->tokenizer = out->paths[OBM_TEXT_TOKENIZER] != NULL;
    out->template_ = out->paths[OBM_TEXT_CONFIG] || out->paths[OBM_TEXT_TEMPLATE];
    if (!eos) return OBM_OK;
    if (obm__json_kind(eos) != OBM_JSON_ARRAY)
        return obm__fail(err, OBM_E_FORMAT, "%s: \"eos\": expected an array, found %s", where,
                         obm__json_kind_name(eos));
    return load_eos(eos, where, out, err);
}

obm_status obm__text_load(const obm_json *record, const char *dir, const char *where, const char *task,
                          obm__pack_text *out, obm_error *err) {
    if (!record) return OBM_OK;
    char *place = obm__format("%s: expert %s: text", where, task);
    if (!place) return obm__fail_nomem(err, strlen(where));
    obm_status status =
        obm__json_kind(record) == OBM_JSON_OBJECT
            ? load_parts(record, dir, place, out, err)
            : obm__fail(err, OBM_E_FORMAT, "%s: expected an object, found %s", place, obm__json_kind_name(record));
    obm_free(place);
    return status;
}

void obm__text_clear(obm__pack_text *t) {
    for (int f = 0; f < OBM_TEXT_FILES; f++) obm_free(t->paths[f]);
    obm_free(t->eos);
    *t = (obm__pack_text){0};
}
