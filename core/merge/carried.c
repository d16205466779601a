/* The small files of a merge's result that are not those of the input whose config counts: the tokenizer's, where a
 * vocabulary was built, and the chat template, where the recipe has one. */
#include "job.h"

#include <string.h>

static bool own(obm__carried *c, char *s) {
    if (s) c->owned[c->n_owned++] = s;
    return s != NULL;
}

static bool put_text(obm__carried *c, const char *name, const char *text) {
    char *copy = obm__strdup(text);
    if (!own(c, copy)) return false;
    for (size_t i = 0; i < c->n_texts; i++) {
        if (strcmp(c->texts[i][0], name)) continue;
        c->texts[i][1] = copy;
        return true;
    }
    c->texts[c->n_texts][0] = name;
    c->texts[c->n_texts++][1] = copy;
    return true;
}

/* From another place; texts NULL: the result has no such file. */
static bool put_instead(obm__carried *c, const char *name, const obm__texts *texts) {
    char *path = NULL;
    if (texts && !obm__texts_find(texts, name, &path)) return false;
    if (path) own(c, path);
    c->instead[c->n_instead][0] = name;
    c->instead[c->n_instead++][1] = path;
    return true;
}

/* What an expert brings whose config counts; with a vocabulary, only what that leaves open. */
static bool carry_own(const obm__texts *texts, bool vocabulary, obm__carried *c) {
    bool ok = true;
    for (int f = vocabulary ? OBM_TEXT_GENERATION : 0; ok && f < OBM_TEXT_FILES; f++)
        if (obm__text_is_own(texts->own, (obm__text_file)f))
            ok = put_instead(c, obm__text_file_name((obm__text_file)f), texts);
    for (size_t i = 0; ok && !vocabulary && texts->own->tokenizer && obm__text_derived(i); i++)
        ok = put_instead(c, obm__text_derived(i), NULL);
    return ok;
}

static bool carry_vocabulary(const obm__vocabulary *v, obm__carried *c) {
    static const char *const kept[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                       "chat_template.jinja"};
    /* Forms of the old vocabulary; tokenizer.json says all they say. */
    static const char *const legacy[] = {"vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"};
    bool changed = obm__vocabulary_changed(v), ok = true;
    const char *config = obm__vocabulary_config(v);
    obm__texts texts = obm__vocabulary_texts(v);
    for (size_t i = 0; ok && i < OBM_COUNT(kept); i++) ok = put_instead(c, kept[i], &texts);
    for (size_t i = 0; ok && i < OBM_COUNT(legacy); i++) ok = put_instead(c, legacy[i], changed ? NULL : &texts);
    if (ok && changed) ok = put_text(c, kept[0], obm__vocabulary_tokenizer(v));
    return ok && (!config || put_text(c, kept[1], config));
}

/* Newer versions of transformers read the .jinja file, older ones the config. */
static obm_status carry_template(const obm__job *j, const char *template, obm__carried *c, obm_error *err) {
    const obm__vocabulary *v = j->vocabulary;
    const char *text = v ? obm__vocabulary_config(v) : NULL;
    obm__texts texts = v ? obm__vocabulary_texts(v) : obm__input_texts(&j->inputs[j->donor]);
    const char *directory = texts.directory;
    char *path, *written = NULL;
    obm_json *config = NULL;
    bool found = obm__texts_find(&texts, "tokenizer_config.json", &path);
    obm_status status = found ? OBM_OK : obm__fail_nomem(err, strlen(directory));
    if (status == OBM_OK && text)
        status = obm__json_parse(text, strlen(text), "tokenizer_config.json", &config, err);
    else if (status == OBM_OK && path && obm__file_exists(path))
        status = obm__json_load(path, &config, err);
    if (status == OBM_OK && config && obm__json_kind(config) != OBM_JSON_OBJECT)
        status = obm__fail(err, OBM_E_FORMAT, "%s: expected an object, found %s", path ? path : "tokenizer_config.json",
                           obm__json_kind_name(config));
    bool ok = status == OBM_OK && put_text(c, "chat_template.jinja", template);
    if (ok && config) {
        ok = obm__json_set(config, "chat_template", obm__json_new_string(template)) &&
             (written = obm__json_text(config, 2)) && put_text(c, "tokenizer_config.json", written);
    } else if (ok) {
        obm__warn(j->ctx, "%s has no tokenizer_config.json: the chat template is written by itself", directory);
    }
    if (status == OBM_OK && !ok) status = obm__fail_nomem(err, strlen(template));
    obm__json_free(config);
    obm_free(written);
    obm_free(path);
    return status;
}

obm_status obm__carried_new(const obm__job *j, obm__carried *out, obm_error *err) {
    obm__carried c = {0};
    char *template = NULL;
    obm__texts texts = obm__input_texts(&j->inputs[j->donor]);
    bool ok = !texts.own || carry_own(&texts, j->vocabulary != NULL, &c);
    ok = ok && (!j->vocabulary || carry_vocabulary(j->vocabulary, &c));
    obm_status status = ok ? OBM_OK : obm__fail_nomem(err, sizeof c);
    if (status == OBM_OK) status = obm__chat_template(j, &template, err);
    if (status == OBM_OK && template) status = carry_template(j, template, &c, err);
    obm_free(template);
    if (status == OBM_OK) {
        *out = c;
    } else {
        obm__carried_clear(&c);
    }
    return status;
}

void obm__carried_clear(obm__carried *c) {
    for (size_t i = 0; i < c->n_owned; i++) obm_free(c->owned[i]);
    *c = (obm__carried){0};
}
