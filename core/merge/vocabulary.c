/* The vocabulary of a merge's result: its tokenizer.json, made from those of the inputs, and which row of which input's
 * embedding (and head) each of its tokens takes.
 *
 * The rules are mergekit's: a model's own row where it has the token, else what the recipe says for the token, else the
 * base's, else that of the only model that has it, else the mean of those that do; zero where none does.  Reads
 * tokenizers, not tensors. */
#include "../text/text.h"
#include "job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct obm__vocabulary {
    obm_json *ids;             /* token -> id in the result */
    size_t named, rows;        /* rows up to the highest id, and with padding */
    char *directory;           /* whose tokenizer files the result takes, but for those of: */
    const obm__pack_text *own; /* nullable */
    char *tokenizer, *config;  /* tokenizer.json and tokenizer_config.json where they are not that folder's; nullable */
    bool changed;              /* the result's files are not all that folder's */
    bool *used;                /* (named): some token has this id */
    const obm__token_rule **rules; /* (named), NULL */
    int32_t *maps;                 /* (inputs, named): the id in the input, -1 */
    obm__vocab *vocabs;            /* (inputs) */
    const obm__vocab **vocab_of;   /* (inputs): its own, or the donor's where it has no tokenizer */
};

/* ---- tokenizer.json ---- */

typedef struct source {
    char *path; /* in messages too */
    obm_json *root;
} source;

static void free_source(source *s) {
    obm_free(s->path);
    obm__json_free(s->root);
}

/* Of a folder, or of a document that is only planned yet; root NULL without. */
static obm_status load_source(const obm__job *j, const obm_checkpoint *model, const obm__texts *texts, source *s,
                              obm_error *err) {
    *s = (source){0};
    if (!obm__texts_find(texts, "tokenizer.json", &s->path)) return obm__fail_nomem(err, strlen(texts->directory));
    for (size_t i = 0; i < j->n_parts; i++) {
        const obm__stage *part = &j->parts[i];
        if (!model || part->planned != model) continue;
        return part->tokenizer ? obm__json_parse(part->tokenizer, strlen(part->tokenizer), s->path, &s->root, err)
                               : OBM_OK;
    }
    return obm__file_exists(s->path) ? obm__json_load(s->path, &s->root, err) : OBM_OK;
}

/* Into a vocabulary, which checks every id. */
static obm_status read_source(const source *s, obm__vocab *v, obm_error *err) {
    const obm_json *vocab = obm__json_get(obm__json_get(s->root, "model"), "vocab");
    if (obm__json_kind(vocab) == OBM_JSON_OBJECT)
        return obm__vocab_load(v, vocab, obm__json_get(s->root, "added_tokens"), s->path, err);
    return obm__fail(err, OBM_E_UNSUPPORTED, "%s: expected a vocabulary of the form {token: id} (BPE), found %s",
                     s->path, obm__json_kind_name(vocab));
}

/* Ids from here on have no row. */
static int64_t vocab_limit(const obm__input *in) {
    int64_t n = obm__input_own_rows(in);
    const obm__st_entry *e = obm__checkpoint_find(in->model, OBM_EMBEDDING_NAME);
    if (n > 0) return n;
    if (obm__json_int(obm__json_get(obm__checkpoint_text_config(in->model), "vocab_size"), &n) && n > 0) return n;
    return e && e->t.ndim ? e->t.shape[0] : INT32_MAX;
}

/* ---- building the tokenizer ---- */

typedef struct builder {
    obm_json *root, *ids, *added, *is_added; /* of the new tokenizer; is_added: the contents in `added` */
    obm_json *decoder;                       /* new entries of tokenizer_config.json's added_tokens_decoder */
    size_t n_model;
    int64_t next_added; /* the highest id of an added token + 1 */
    bool changed;
} builder;

static void free_builder(builder *b) {
    obm__json_free(b->root);
    obm__json_free(b->ids);
    obm__json_free(b->added);
    obm__json_free(b->is_added);
    obm__json_free(b->decoder);
}

static bool note_added(builder *b, const char *content, int64_t id) {
    if (id >= b->next_added) b->next_added = id + 1;
    return obm__json_set(b->is_added, content, obm__json_new_bool(true)) &&
           (obm__json_get(b->ids, content) || obm__json_set(b->ids, content, obm__json_new_int(id)));
}

/* A merge is "a b", or ["a", "b"].  Also its result must be there, which mergekit does not ask for and the tokenizers
 * library refuses. */
static bool keeps_merge(const obm_json *merge, const obm_json *ids) {
    const char *text = obm__json_string(merge), *space = text ? strchr(text, ' ') : NULL;
    const char *left = text ? text : obm__json_string(obm__json_at(merge, 0));
    const char *right = text ? space ? space + 1 : NULL : obm__json_string(obm__json_at(merge, 1));
    if (!left || !right) return false;
    char *first = obm__strndup(left, text ? (size_t)(space - text) : strlen(left));
    char *whole = first ? obm__format("%s%s", first, right) : NULL;
    bool keep = whole && obm__json_get(ids, first) && obm__json_get(ids, right) && obm__json_get(ids, whole);
    obm_free(first);
    obm_free(whole);
    return keep;
}

/* Model and added tokens without the ids that have no row. */
static bool strip_model(builder *b, int64_t limit) {
    const obm_json *model = obm__json_get(b->root, "model"), *merges = obm__json_get(model, "merges");
    const obm_json *vocab = obm__json_get(model, "vocab");
    obm_json *copy = obm__json_copy(model), *kept = obm__json_new_object(), *left = obm__json_new_array();
    bool ok = copy && kept && left;
    for (void *it = obm__json_first(vocab); ok && it; it = obm__json_next(vocab, it)) {
        int64_t id = 0;
        obm__json_int(obm__json_value(it), &id);
        if (id < limit) ok = obm__json_set(kept, obm__json_key(it), obm__json_new_int(id));
    }
    for (size_t i = 0; ok && i < obm__json_size(merges); i++)
        if (keeps_merge(obm__json_at(merges, i), kept))
            ok = obm__json_append(left, obm__json_copy(obm__json_at(merges, i)));
    ok = obm__json_set(copy, "vocab", kept) && ok;
    if (merges)
        ok = obm__json_set(copy, "merges", left) && ok;
    else
        obm__json_free(left);
    return obm__json_set(b->root, "model", copy) && ok;
}

static bool has_unused(const source *s, int64_t limit) {
    const obm_json *vocab = obm__json_get(obm__json_get(s->root, "model"), "vocab"),
                   *added = obm__json_get(s->root, "added_tokens");
    int64_t id;
    for (void *it = obm__json_first(vocab); it; it = obm__json_next(vocab, it))
        if (obm__json_int(obm__json_value(it), &id) && id >= limit) return true;
    for (size_t i = 0; i < obm__json_size(added); i++)
        if (obm__json_int(obm__json_get(obm__json_at(added, i), "id"), &id) && id >= limit) return true;
    return false;
}

static obm_status begin_builder(const source *s, int64_t limit, builder *b, obm_error *err) {
    *b = (builder){.root = obm__json_copy(s->root),
                   .ids = obm__json_new_object(),
                   .added = obm__json_new_array(),
                   .is_added = obm__json_new_object(),
                   .decoder = obm__json_new_object()};
    bool ok = b->root && b->ids && b->added && b->is_added && b->decoder;
    b->changed = has_unused(s, limit);
    if (ok && b->changed) ok = strip_model(b, limit);
    const obm_json *vocab = obm__json_get(obm__json_get(b->root, "model"), "vocab");
    b->n_model = obm__json_size(vocab);
    if (ok) {
        obm__json_free(b->ids);
        ok = (b->ids = obm__json_copy(vocab)) != NULL;
    }
    const obm_json *added = obm__json_get(s->root, "added_tokens");
    for (size_t i = 0; ok && i < obm__json_size(added); i++) {
        const obm_json *token = obm__json_at(added, i);
        const char *content = obm__json_string(obm__json_get(token, "content"));
        int64_t id = 0;
        if (!content || !obm__json_int(obm__json_get(token, "id"), &id) || id >= limit) continue;
        ok = obm__json_append(b->added, obm__json_copy(token)) && note_added(b, content, id);
    }
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

/* An added token, with the settings of `like` or plain ones, as the tokenizers library numbers it. */
static bool add_token(builder *b, const char *content, const obm_json *like) {
    static const char *const flags[] = {"single_word", "lstrip", "rstrip", "normalized", "special"};
    int64_t id = (int64_t)b->n_model > b->next_added ? (int64_t)b->n_model : b->next_added;
    const obm_json *known = obm__json_get(b->ids, content);
    if (obm__json_get(b->is_added, content) || (known && !like)) return true;
    if (known) obm__json_int(known, &id);
    obm_json *token = obm__json_new_object(), *entry = obm__json_new_object();
    bool ok = obm__json_set(token, "id", obm__json_new_int(id));
    ok = obm__json_set(token, "content", obm__json_new_string(content)) && ok;
    ok = obm__json_set(entry, "content", obm__json_new_string(content)) && ok;
    for (size_t i = 0; i < OBM_COUNT(flags); i++) {
        bool set = i == 3;
        obm__json_bool(obm__json_get(like, flags[i]), &set);
        ok = obm__json_set(token, flags[i], obm__json_new_bool(set)) && ok;
        ok = obm__json_set(entry, flags[i], obm__json_new_bool(set)) && ok;
    }
    char key[24];
    snprintf(key, sizeof key, "%lld", (long long)id);
    ok = obm__json_append(b->added, token) && ok;
    ok = obm__json_set(b->decoder, key, entry) && ok;
    b->changed = true;
    return note_added(b, content, id) && ok;
}

/* ---- the union ---- */

/* Words of one model in the order of their ids, those that are no added tokens there. */
static bool add_words(builder *b, const obm__vocab *v, const obm_json *added, int64_t limit) {
    obm_json *special = obm__json_new_object();
    bool ok = special != NULL;
    for (size_t i = 0; ok && i < obm__json_size(added); i++) {
        const char *content = obm__json_string(obm__json_get(obm__json_at(added, i), "content"));
        if (content) ok = obm__json_set(special, content, obm__json_new_bool(true));
    }
    for (size_t id = 0; ok && id < v->size && (int64_t)id < limit; id++) {
        const char *text = v->pieces[id].text;
        if (text && strlen(text) == v->pieces[id].len && !obm__json_get(special, text)) ok = add_token(b, text, NULL);
    }
    obm__json_free(special);
    return ok;
}

static bool add_added(builder *b, const obm_json *added, int64_t limit) {
    bool ok = true;
    for (size_t i = 0; ok && i < obm__json_size(added); i++) {
        const obm_json *token = obm__json_at(added, i);
        const char *content = obm__json_string(obm__json_get(token, "content"));
        int64_t id = 0;
        if (content && *content && obm__json_int(obm__json_get(token, "id"), &id) && id < limit)
            ok = add_token(b, content, token);
    }
    return ok;
}

/* ---- the inputs' vocabularies ---- */

static obm_status load_vocab(const obm__job *j, size_t i, source *s, obm__vocab *v, obm_error *err) {
    const obm_checkpoint *model = j->inputs[i].model;
    obm__texts texts = obm__input_texts(&j->inputs[i]);
    OBM_TRY(load_source(j, model, &texts, s, err));
    return s->root ? read_source(s, v, err) : OBM_OK;
}

/* First the words of all models, then their added tokens, as mergekit goes through them. */
static obm_status add_inputs(const obm__job *j, obm__vocabulary *v, source *sources, builder *b, obm_error *err) {
    bool ok = true;
    for (int pass = 0; pass < 2; pass++) {
        for (size_t n = 0; ok && n < j->n_inputs; n++) {
            size_t i = n == 0 ? j->donor : n <= j->donor ? n - 1 : n;
            const obm_json *added = obm__json_get(sources[i].root, "added_tokens");
            int64_t limit = vocab_limit(&j->inputs[i]);
            if (!sources[i].root) continue;
            ok = pass == 0 ? add_words(b, &v->vocabs[i], added, limit) : add_added(b, added, limit);
        }
    }
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

/* ---- texts of the result ---- */

static obm_status write_config(const obm__texts *texts, const builder *b, obm__vocabulary *v, int64_t limit,
                               obm_error *err) {
    char *path;
    obm_json *config = NULL;
    obm_status status = obm__texts_find(texts, "tokenizer_config.json", &path)
                            ? OBM_OK
                            : obm__fail_nomem(err, strlen(texts->directory));
    if (status == OBM_OK && path && obm__file_exists(path)) status = obm__json_load(path, &config, err);
    const obm_json *old = obm__json_get(config, "added_tokens_decoder");
    if (status == OBM_OK && obm__json_kind(old) == OBM_JSON_OBJECT) {
        obm_json *decoder = obm__json_new_object();
        bool ok = decoder != NULL;
        for (void *it = obm__json_first(old); ok && it; it = obm__json_next(old, it))
            if (strtoll(obm__json_key(it), NULL, 10) < limit)
                ok = obm__json_set(decoder, obm__json_key(it), obm__json_copy(obm__json_value(it)));
        for (void *it = obm__json_first(b->decoder); ok && it; it = obm__json_next(b->decoder, it))
            ok = obm__json_set(decoder, obm__json_key(it), obm__json_copy(obm__json_value(it)));
        ok = obm__json_set(config, "added_tokens_decoder", decoder) && ok;
        v->config = ok ? obm__json_text(config, 2) : NULL;
        if (!v->config) status = obm__fail_nomem(err, 0);
    }
    obm__json_free(config);
    obm_free(path);
    return status;
}

static obm_status write_tokenizer(const obm__texts *texts, builder *b, obm__vocabulary *v, int64_t limit,
                                  obm_error *err) {
    obm_json *added = b->added;
    b->added = NULL;
    v->directory = obm__strdup(texts->directory);
    v->own = texts->own;
    if (!obm__json_set(b->root, "added_tokens", added) || !v->directory) return obm__fail_nomem(err, 0);
    v->ids = b->ids;
    b->ids = NULL;
    v->tokenizer = obm__json_text(b->root, 2); /* a planned document has no file yet, so the text is kept in any case */
    if (!v->tokenizer) return obm__fail_nomem(err, 0);
    v->changed = b->changed;
    return b->changed ? write_config(texts, b, v, limit, err) : OBM_OK;
}

/* ---- ids ---- */

static obm_status measure(const obm__job *j, obm__vocabulary *v, obm_error *err) {
    int64_t id, highest = -1, pad = j->recipe->tokenizer.pad;
    for (void *it = obm__json_first(v->ids); it; it = obm__json_next(v->ids, it)) {
        if (!obm__json_int(obm__json_value(it), &id) || id < 0 || id > INT32_MAX)
            return obm__fail(err, OBM_E_FORMAT, "%s/tokenizer.json: the id of token \"%.64s\" is not an integer >= 0",
                             v->directory, obm__json_key(it));
        if (id > highest) highest = id;
    }
    /* Holes take rows too, but a file of n tokens does not make rows for billions. */
    if (highest < 0 || (uint64_t)highest > 16 * (uint64_t)obm__json_size(v->ids) + 4096)
        return obm__fail(err, OBM_E_FORMAT, "%s/tokenizer.json: %zu tokens with ids up to %lld", v->directory,
                         obm__json_size(v->ids), (long long)highest);
    v->named = (size_t)highest + 1;
    v->rows = pad ? (v->named + (size_t)pad - 1) / (size_t)pad * (size_t)pad : v->named;
    return OBM_OK;
}

static obm_status map_inputs(const obm__job *j, obm__vocabulary *v, obm_error *err) {
    v->used = obm__calloc(v->named, sizeof *v->used);
    v->rules = obm__calloc(v->named, sizeof *v->rules);
    v->maps = obm__alloc(v->named * j->n_inputs, sizeof *v->maps);
    if (!v->used || !v->rules || !v->maps) return obm__fail_nomem(err, v->named * j->n_inputs * sizeof *v->maps);
    memset(v->maps, 0xff, v->named * j->n_inputs * sizeof *v->maps);
    for (size_t i = 0; i < j->n_inputs; i++) {
        int64_t limit = vocab_limit(&j->inputs[i]);
        for (void *it = obm__json_first(v->ids); it; it = obm__json_next(v->ids, it)) {
            const char *token = obm__json_key(it);
            int64_t id = 0;
            obm__json_int(obm__json_value(it), &id);
            v->used[id] = true;
            int32_t own = obm__vocab_find(v->vocab_of[i], token, strlen(token));
            if (own < limit) v->maps[i * v->named + (size_t)id] = own;
        }
    }
    for (size_t i = 0; i < j->recipe->tokenizer.n_rules; i++) {
        const obm__token_rule *rule = &j->recipe->tokenizer.rules[i];
        int64_t id = 0;
        if (obm__json_int(obm__json_get(v->ids, rule->token), &id)) v->rules[id] = rule;
    }
    return OBM_OK;
}

/* ---- the whole ---- */

/* union and base, mistyped, are read as models. */
static obm_status no_tokenizer(const char *ref, const obm__texts *texts, obm_error *err) {
    static const char *const words[] = {"union", "base"};
    char buf[96];
    const char *hint = obm__is_directory(texts->directory) ? "" : obm__suggest(ref, words, 2, buf, sizeof buf);
    return obm__fail(err, OBM_E_NOTFOUND, "recipe: tokenizer: %.200s has no tokenizer.json%s", ref, hint);
}

static obm_status build(const obm__job *j, obm__vocabulary *v, source *sources, source *other, builder *b,
                        obm_error *err) {
    const obm__recipe_tokenizer *t = &j->recipe->tokenizer;
    const source *from = &sources[j->donor];
    obm__texts texts = obm__input_texts(&j->inputs[j->donor]);
    char *elsewhere = NULL;
    int64_t limit = vocab_limit(&j->inputs[j->donor]);
    if (!from->root)
        return obm__fail(err, OBM_E_NOTFOUND, "recipe: tokenizer: %.200s has no tokenizer.json",
                         j->inputs[j->donor].ref);
    if (t->model) {
        const obm_checkpoint *model = NULL;
        OBM_TRY(obm__job_find_texts(j, t->model, &texts, &elsewhere, &model, err));
        obm_status status = load_source(j, model, &texts, other, err);
        if (status == OBM_OK && !other->root) status = no_tokenizer(t->model, &texts, err);
        obm__vocab checked = {0};
        if (status == OBM_OK) status = read_source(other, &checked, err);
        obm__vocab_free(&checked);
        if (status != OBM_OK) {
            obm_free(elsewhere);
            return status;
        }
        from = other;
        limit = INT64_MAX; /* mergekit keeps all of it */
    }
    obm_status status = begin_builder(from, limit, b, err);
    if (status == OBM_OK && t->unite) status = add_inputs(j, v, sources, b, err);
    bool ok = true;
    for (size_t i = 0; status == OBM_OK && ok && i < t->n_rules; i++) ok = add_token(b, t->rules[i].token, NULL);
    if (!ok) status = obm__fail_nomem(err, 0);
    if (status == OBM_OK) status = write_tokenizer(&texts, b, v, limit, err);
    obm_free(elsewhere);
    return status;
}

static obm_status load_inputs(const obm__job *j, obm__vocabulary *v, source *sources, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        OBM_TRY(load_vocab(j, i, &sources[i], &v->vocabs[i], err));
        v->vocab_of[i] = &v->vocabs[sources[i].root ? i : j->donor];
        if (!sources[i].root && i != j->donor)
            obm__warn(j->ctx, "%s has no tokenizer.json: its vocabulary is taken to be that of %s", j->inputs[i].ref,
                      j->inputs[j->donor].ref);
    }
    return OBM_OK;
}

obm_status obm__vocabulary_new(const obm__job *j, obm__vocabulary **out, obm_error *err) {
    size_t n = j->n_inputs;
    obm__vocabulary *v = obm__calloc(1, sizeof *v);
    source *sources = obm__calloc(n, sizeof *sources), other = {0};
    builder b = {0};
    obm_status status = v && sources ? OBM_OK : obm__fail_nomem(err, n * sizeof *sources);
    if (status == OBM_OK) {
        v->vocabs = obm__calloc(n, sizeof *v->vocabs);
        v->vocab_of = obm__calloc(n, sizeof *v->vocab_of);
        if (!v->vocabs || !v->vocab_of) status = obm__fail_nomem(err, n * sizeof *v->vocabs);
    }
    if (status == OBM_OK) status = load_inputs(j, v, sources, err);
    if (status == OBM_OK) status = build(j, v, sources, &other, &b, err);
    if (status == OBM_OK) status = measure(j, v, err);
    if (status == OBM_OK) status = map_inputs(j, v, err);
    for (size_t i = 0; sources && i < n; i++) free_source(&sources[i]);
    free_source(&other);
    free_builder(&b);
    obm_free(sources);
    if (status == OBM_OK) {
        *out = v;
    } else {
        obm__vocabulary_free(v, n);
    }
    return status;
}

void obm__vocabulary_free(obm__vocabulary *v, size_t n_inputs) {
    if (!v) return;
    for (size_t i = 0; v->vocabs && i < n_inputs; i++) obm__vocab_free(&v->vocabs[i]);
    obm_free(v->vocabs);
    obm_free(v->vocab_of);
    obm_free(v->maps);
    obm_free(v->used);
    obm_free(v->rules);
    obm_free(v->directory);
    obm_free(v->tokenizer);
    obm_free(v->config);
    obm__json_free(v->ids);
    obm_free(v);
}

size_t obm__vocabulary_rows_count(const obm__vocabulary *v) { return v->rows; }
obm__texts obm__vocabulary_texts(const obm__vocabulary *v) { return (obm__texts){v->directory, v->own}; }
bool obm__vocabulary_changed(const obm__vocabulary *v) { return v->changed; }
void obm__vocabulary_hash(const obm__vocabulary *v, size_t n_inputs, char out[33]) {
    obm__xxh3_of(v->maps, v->named * n_inputs * sizeof *v->maps, out);
}
const char *obm__vocabulary_tokenizer(const obm__vocabulary *v) { return v->tokenizer; }
const char *obm__vocabulary_config(const obm__vocabulary *v) { return v->config; }

/* ---- rows of a tensor ---- */

typedef struct choice {
    const obm__vocabulary *v;
    const obm__output *o;
    obm__rows *rows;
    size_t base; /* the input that is the base, n without */
    size_t id;
} choice;

/* The row of token `id` in input i, -1 where it has none. */
static int64_t own_row(const choice *c, size_t i) {
    int64_t row = c->v->maps[c->o->slice->inputs[i] * c->v->named + c->id];
    return row < c->rows->sources[i].shape[0] ? row : -1;
}

static obm__row row_of(size_t input, int64_t row) {
    return (obm__row){.row = (uint32_t)row, .input = (uint16_t)input, .kind = OBM_ROW_INPUT};
}

static obm_status choose_by_rule(const choice *c, const obm__token_rule *rule, obm__row *out, obm_error *err) {
    const obm__slice_plan *p = c->o->slice;
    size_t i = 0;
    while (i < p->n && !obm__recipe_same_ref(p->refs[i], rule->model)) i++;
    if (i == p->n)
        return obm__fail(err, OBM_E_ARG, "recipe: tokenizer.tokens.%.64s: %.200s is no model that %s is merged from",
                         rule->token, rule->model, c->o->name);
    int64_t row = own_row(c, i);
    if (rule->kind == OBM_TOKEN_OTHER) {
        row = rule->other ? obm__vocab_find(c->v->vocab_of[p->inputs[i]], rule->other, strlen(rule->other))
                          : rule->other_id;
        if (row >= c->rows->sources[i].shape[0]) row = -1;
    }
    if (row < 0 && rule->kind == OBM_TOKEN_OTHER && !rule->other)
        return obm__fail(err, OBM_E_ARG, "recipe: tokenizer.tokens.%.64s: token_id: %.200s has %lld rows, found %lld",
                         rule->token, rule->model, (long long)c->rows->sources[i].shape[0], (long long)rule->other_id);
    if (row < 0)
        return obm__fail(err, OBM_E_NOTFOUND, "recipe: tokenizer.tokens.%.64s: %.200s has no token \"%.64s\"",
                         rule->token, rule->model, rule->other ? rule->other : rule->token);
    *out = row_of(i, row);
    return OBM_OK;
}

/* What stands in where an input lacks the token: the base's, the only one there is, or the mean. */
static void choose_default(const choice *c, size_t present, obm__row *out) {
    *out = (obm__row){.kind = OBM_ROW_ZERO};
    for (size_t i = 0; i < c->rows->n; i++) {
        bool takes = present == 1 || i == c->base;
        if (own_row(c, i) < 0 || (!takes && out->kind != OBM_ROW_ZERO)) continue;
        *out = row_of(i, own_row(c, i));
        if (takes) return;
    }
    if (present < 2) return;
    *out = (obm__row){.row = (uint32_t)c->rows->n_means, .kind = OBM_ROW_MADE};
    c->rows->means[c->rows->n_means++] = c->id;
}

static obm_status choose_row(const choice *c, obm_error *err) {
    obm__rows *r = c->rows;
    const obm__token_rule *rule = c->v->rules[c->id];
    bool force = rule && rule->force;
    obm__row other = {.kind = OBM_ROW_ZERO};
    size_t present = 0;
    for (size_t i = 0; i < r->n; i++) present += own_row(c, i) >= 0;
    if (!c->v->used[c->id]) present = 0;
    if (force || present < r->n) {
        if (rule && rule->kind != OBM_TOKEN_DEFAULT && rule->kind != OBM_TOKEN_ZERO)
            OBM_TRY(choose_by_rule(c, rule, &other, err));
        else if (!rule || rule->kind == OBM_TOKEN_DEFAULT)
            choose_default(c, present, &other);
    }
    for (size_t i = 0; i < r->n; i++) {
        int64_t own = force ? -1 : own_row(c, i);
        r->maps[i * r->rows + c->id] = own >= 0 ? row_of(i, own) : other;
    }
    return OBM_OK;
}

static obm_status fill_maps(const obm__job *j, const obm__vocabulary *v, const obm__output *o, obm__rows *r,
                            obm_error *err) {
    const obm__slice_plan *p = o->slice;
    choice c = {.v = v, .o = o, .rows = r, .base = p->n};
    if (p->has_base || (j->recipe->base && p->inputs[p->reference] == j->donor)) c.base = p->reference;
    for (c.id = 0; c.id < v->named; c.id++) OBM_TRY(choose_row(&c, err));
    for (size_t i = 0; i < r->n; i++)
        for (size_t row = v->named; row < v->rows; row++)
            r->maps[i * r->rows + row] = (obm__row){.row = (uint32_t)(r->n_means + i), .kind = OBM_ROW_MADE};
    return OBM_OK;
}

static bool is_identity(const obm__rows *r) {
    for (size_t i = 0; i < r->n; i++) {
        if ((uint64_t)r->sources[i].shape[0] != r->rows) return false;
        for (uint64_t row = 0; row < r->rows; row++) {
            const obm__row *m = &r->maps[i * r->rows + row];
            if (m->kind != OBM_ROW_INPUT || m->input != i || m->row != row) return false;
        }
    }
    return true;
}

obm_status obm__vocabulary_rows(const obm__job *j, const obm__vocabulary *v, obm__output *o, obm__rows **out,
                                obm_error *err) {
    const obm__slice_plan *p = o->slice;
    const obm_tensor *first = &o->tensors[p->reference];
    obm__rows *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    *r = (obm__rows){.n = p->n, .rows = v->rows, .filled = v->named, .cols = 1};
    for (int32_t d = 1; d < first->ndim; d++) r->cols *= (uint64_t)first->shape[d];
    if (r->cols == 0) {
        obm_free(r);
        return obm__fail(err, OBM_E_SHAPE, "%s: a row of no elements per token", o->name);
    }
    r->sources = obm__alloc(p->n, sizeof *r->sources);
    r->changes = obm__alloc(p->n, sizeof *r->changes);
    r->maps = obm__alloc(p->n * v->rows, sizeof *r->maps);
    r->means = obm__alloc(v->named, sizeof *r->means);
    obm_status status = r->sources && r->changes && r->maps && r->means
                            ? OBM_OK
                            : obm__fail_nomem(err, p->n * v->rows * sizeof *r->maps);
    if (status == OBM_OK) {
        memcpy(r->sources, o->tensors, p->n * sizeof *r->sources);
        memcpy(r->changes, o->changes, p->n * sizeof *r->changes);
        status = fill_maps(j, v, o, r, err);
    }
    bool needed = status == OBM_OK && !is_identity(r);
    for (size_t i = 0; needed && i < p->n; i++) o->tensors[i].shape[0] = (int64_t)v->rows;
    if (needed) {
        *out = r;
    } else {
        obm__rows_free(r);
    }
    return status;
}
