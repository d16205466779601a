/* The parts of tokenizer.json around the model: sequences of them, their patterns, and refusing by name whatever could
 * change an id and is not known. */
#include "text.h"

#include <string.h>

/* Sequences may nest; real files nest them once. */
#define MAX_DEPTH 8

const char *obm__part_type(const obm_json *part) {
    const char *type = obm__json_string(obm__json_get(part, "type"));
    return type ? type : "none";
}

obm_status obm__part_unsupported(const char *where, const char *part, const char *type, const char *known,
                                 obm_error *err) {
    return obm__fail(err, OBM_E_UNSUPPORTED, "%s: %s of type %.64s is not supported (%s)", where, part, type, known);
}

typedef struct walk {
    const char *key, *where;
    obm__text_part_fn fn;
    void *into;
    obm_error *err;
} walk;

static obm_status each(const walk *w, const obm_json *part, int depth) {
    if (!part || obm__json_kind(part) == OBM_JSON_NULL) return OBM_OK;
    if (strcmp(obm__part_type(part), "Sequence") != 0) return w->fn(w->into, part, w->where, w->err);
    const obm_json *members = obm__json_get(part, w->key);
    if (depth >= MAX_DEPTH)
        return obm__fail(w->err, OBM_E_UNSUPPORTED, "%s: Sequence nested more than %d deep", w->where, MAX_DEPTH);
    if (!members || obm__json_kind(members) != OBM_JSON_ARRAY)
        return obm__fail(w->err, OBM_E_FORMAT, "%s: a Sequence has no \"%s\" array", w->where, w->key);
    for (size_t i = 0; i < obm__json_size(members); i++) OBM_TRY(each(w, obm__json_at(members, i), depth + 1));
    return OBM_OK;
}

obm_status obm__part_each(const obm_json *part, const char *key, obm__text_part_fn fn, void *into, const char *where,
                          obm_error *err) {
    const walk w = {key, where, fn, into, err};
    return each(&w, part, 0);
}

obm_status obm__part_pattern(const obm_json *pattern, const char *part, const char *where, obm__regex **out,
                             obm_error *err) {
    size_t n = 0;
    const char *text = obm__json_string_n(obm__json_get(pattern, "Regex"), &n);
    if (text) return obm__regex_new(text, n, where, out, err);
    text = obm__json_string_n(obm__json_get(pattern, "String"), &n);
    if (!text) return obm__fail(err, OBM_E_FORMAT, "%s: %s has no Regex or String pattern", where, part);
    return obm__regex_new_literal(text, n, where, out, err);
}
