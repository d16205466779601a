/* The post_processor of tokenizer.json: the special tokens around a text.  Pairs of texts are not a thing here. */
#include "text.h"

#include <string.h>

typedef struct target {
    obm__postprocessor *p;
    const char *where;
    obm_error *err;
} target;

static bool is_array(const obm_json *v) { return v && obm__json_kind(v) == OBM_JSON_ARRAY; }

static obm_status grow_ids(const target *t, int32_t **ids, size_t n) {
    int32_t *grown = obm__realloc(*ids, n, sizeof *grown);
    if (!grown) return obm__fail_nomem(t->err, n * sizeof *grown);
    *ids = grown;
    return OBM_OK;
}

/* Appends the ids of special token `name`. */
static obm_status special_ids(const target *t, const obm_json *processor, const char *name, int32_t **ids, size_t *n) {
    const obm_json *values = obm__json_get(obm__json_get(obm__json_get(processor, "special_tokens"), name), "ids");
    if (!is_array(values)) {
        return obm__fail(t->err, OBM_E_FORMAT, "%s: post_processor uses special token \"%.64s\" without ids", t->where,
                         name);
    }
    for (size_t i = 0; i < obm__json_size(values); i++) {
        int64_t id;
        if (!obm__json_int(obm__json_at(values, i), &id) || id < 0 || id > INT32_MAX) {
            return obm__fail(t->err, OBM_E_FORMAT, "%s: post_processor has an id of \"%.64s\" that is none", t->where,
                             name);
        }
        OBM_TRY(grow_ids(t, ids, *n + 1));
        (*ids)[(*n)++] = (int32_t)id;
    }
    return OBM_OK;
}

/* Around what an earlier processor of the sequence has put: its ids go inside. */
static obm_status wrap(const target *t, const int32_t *before, size_t n_before, const int32_t *after, size_t n_after) {
    obm__postprocessor *p = t->p;
    OBM_TRY(grow_ids(t, &p->before, n_before + p->n_before));
    OBM_TRY(grow_ids(t, &p->after, n_after + p->n_after));
    memmove(p->before + n_before, p->before, p->n_before * sizeof *before);
    if (n_before) memcpy(p->before, before, n_before * sizeof *before);
    if (n_after) memcpy(p->after + p->n_after, after, n_after * sizeof *after);
    p->n_before += n_before;
    p->n_after += n_after;
    return OBM_OK;
}

static obm_status load_template(const target *t, const obm_json *part) {
    const obm_json *single = obm__json_get(part, "single");
    int32_t *ids[2] = {NULL, NULL}; /* before and after the text */
    size_t n[2] = {0, 0};
    int side = 0;
    obm_status status = OBM_OK;
    if (!is_array(single))
        return obm__fail(t->err, OBM_E_FORMAT, "%s: TemplateProcessing has no \"single\" array", t->where);
    for (size_t i = 0; i < obm__json_size(single); i++) {
        const obm_json *piece = obm__json_at(single, i);
        const char *name = obm__json_string(obm__json_get(obm__json_get(piece, "SpecialToken"), "id"));
        if (name) {
            OBM_GO(special_ids(t, part, name, &ids[side], &n[side]));
        } else if (side++ || !obm__json_get(piece, "Sequence")) {
            OBM_GO(obm__fail(t->err, OBM_E_UNSUPPORTED,
                             "%s: TemplateProcessing.single is not special tokens around one sequence", t->where));
        }
    }
    if (side != 1)
        OBM_GO(obm__fail(t->err, OBM_E_UNSUPPORTED, "%s: TemplateProcessing.single has no sequence", t->where));
    OBM_GO(wrap(t, ids[0], n[0], ids[1], n[1]));
done:
    obm_free(ids[0]);
    obm_free(ids[1]);
    return status;
}

static obm_status load_step(void *into, const obm_json *part, const char *where, obm_error *err) {
    const char *type = obm__part_type(part);
    const target t = {into, where, err};
    if (strcmp(type, "TemplateProcessing") == 0) return load_template(&t, part);
    if (strcmp(type, "ByteLevel") == 0) return OBM_OK; /* trims offsets, which we do not give */
    return obm__part_unsupported(where, "post_processor", type, "ByteLevel, TemplateProcessing and Sequence are", err);
}

obm_status obm__postprocessor_load(obm__postprocessor *p, const obm_json *part, const char *where, obm_error *err) {
    *p = (obm__postprocessor){0};
    obm_status status = obm__part_each(part, "processors", load_step, p, where, err);
    if (status != OBM_OK) obm__postprocessor_free(p);
    return status;
}

void obm__postprocessor_free(obm__postprocessor *p) {
    obm_free(p->before);
    obm_free(p->after);
    *p = (obm__postprocessor){0};
}
