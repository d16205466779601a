/* Which tokenizer, template and eos ids apply under a route: the base's, or what the expert of a hard route brings. */
#include "../text/text.h"
#include "model.h"

#include <string.h>

static const char *path_of(const obm__pack_text *t, obm__text_file f) { return t->paths[f]; }

static bool same_path(const char *a, const char *b) { return a && b ? !strcmp(a, b) : a == b; }

/* Files of a pack are named after their contents, so equal names are equal tokenizers. */
static bool same_files(const obm__pack_text *a, const obm__pack_text *b) {
    return a->template_ == b->template_ && same_path(path_of(a, OBM_TEXT_TOKENIZER), path_of(b, OBM_TEXT_TOKENIZER)) &&
           same_path(path_of(a, OBM_TEXT_CONFIG), path_of(b, OBM_TEXT_CONFIG)) &&
           same_path(path_of(a, OBM_TEXT_TEMPLATE), path_of(b, OBM_TEXT_TEMPLATE));
}

static const obm_tokenizer *find_same(const obm_model *m, size_t task) {
    for (size_t k = 0; k < task; k++)
        if (m->texts[k].tokenizer && m->texts[k].tokenizer != m->tokenizer &&
            same_files(&m->pack->experts[k].text, &m->pack->experts[task].text))
            return m->texts[k].tokenizer;
    return NULL;
}

/* Paths of the base's files. */
typedef struct base_files {
    char *tokenizer, *jinja, *config;
} base_files;

static obm_status base_paths(const obm_model *m, base_files *out, obm_error *err) {
    const char *dir = m->base->directory;
    out->tokenizer = obm__path_join(dir, obm__text_file_name(OBM_TEXT_TOKENIZER));
    out->jinja = obm__path_join(dir, obm__text_file_name(OBM_TEXT_TEMPLATE));
    out->config = obm__path_join(dir, obm__text_file_name(OBM_TEXT_CONFIG));
    return out->tokenizer && out->jinja && out->config ? OBM_OK : obm__fail_nomem(err, strlen(dir));
}

static void free_paths(base_files *b) {
    obm_free(b->tokenizer);
    obm_free(b->jinja);
    obm_free(b->config);
}

/* An expert's template without one in its own files is the base's, as when it was compressed. */
static obm_status load_own(obm_model *m, size_t task, const base_files *base, obm_error *err) {
    const obm__pack_text *t = &m->pack->experts[task].text;
    const char *own = path_of(t, OBM_TEXT_TOKENIZER);
    obm__chat_files places[2] = {{path_of(t, OBM_TEXT_TEMPLATE), path_of(t, OBM_TEXT_CONFIG)},
                                 {base->jinja, base->config}};
    if (!own && !m->tokenizer) return OBM_OK; /* a template alone encodes nothing */
    OBM_TRY(obm__tokenizer_load(own ? own : base->tokenizer, places, 2, &m->texts[task].owned, err));
    m->texts[task].owned->ctx = m->ctx;
    m->texts[task].tokenizer = m->texts[task].owned;
    if (!own || !m->tokenizer) return OBM_OK;
    return obm__vocab_check(&m->tokenizer->vocab, &m->texts[task].owned->vocab, m->config.vocab,
                            m->pack->experts[task].name, own, err);
}

static obm_status copy_eos(const obm__pack_text *t, obm__model_text *out, obm_error *err) {
    out->owned_eos = obm__calloc(t->n_eos ? t->n_eos : 1, sizeof *out->owned_eos);
    if (!out->owned_eos) return obm__fail_nomem(err, t->n_eos * sizeof *out->owned_eos);
    memcpy(out->owned_eos, t->eos, t->n_eos * sizeof *t->eos);
    out->eos = out->owned_eos;
    out->n_eos = t->n_eos;
    return OBM_OK;
}

static obm_status load_task(obm_model *m, size_t task, const base_files *base, obm_error *err) {
    const obm__pack_text *t = &m->pack->experts[task].text;
    obm__model_text *out = &m->texts[task];
    *out = m->texts[m->tasks];
    if (t->eos) OBM_TRY(copy_eos(t, out, err));
    if (!t->tokenizer && !t->template_) return OBM_OK;
    const obm_tokenizer *same = find_same(m, task);
    if (!same) return load_own(m, task, base, err);
    out->tokenizer = same;
    return OBM_OK;
}

obm_status obm__model_load_texts(obm_model *m, obm_error *err) {
    base_files base = {0};
    m->texts = obm__calloc(m->tasks + 1, sizeof *m->texts);
    if (!m->texts) return obm__fail_nomem(err, (m->tasks + 1) * sizeof *m->texts);
    m->texts[m->tasks] = (obm__model_text){.tokenizer = m->tokenizer, .eos = m->config.eos, .n_eos = m->config.n_eos};
    obm_status status = base_paths(m, &base, err);
    for (size_t k = 0; k < m->tasks && status == OBM_OK; k++) status = load_task(m, k, &base, err);
    free_paths(&base);
    return status;
}

void obm__model_free_texts(obm_model *m) {
    for (size_t k = 0; m->texts && k < m->tasks; k++) {
        obm_tokenizer_free(m->texts[k].owned);
        obm_free(m->texts[k].owned_eos);
    }
    obm_free(m->texts);
}

/* Experts that came or went since the model was opened make every run fail; until then the base's is as good as any. */
const obm__model_text *obm__model_text_for(const obm_model *m, const double *route) {
    size_t hard = route && m->tasks == obm__model_tasks(m) ? obm__route_hard(route, m->tasks) : SIZE_MAX;
    return &m->texts[hard < m->tasks ? hard : m->tasks];
}

const obm_tokenizer *obm_model_tokenizer_for(const obm_model *m, const double *route) {
    return obm__model_text_for(m, route)->tokenizer;
}
