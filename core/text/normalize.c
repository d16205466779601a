/* The normalizer of tokenizer.json: what a text becomes before it is cut into words.  Precompiled character maps, which
 * only Unigram models have, are not among its steps. */
#include "text.h"

#include <string.h>

/* ---- loading ---- */

static obm_status load_text(obm__normal_step *s, const obm_json *part, const char *key, const char *where,
                            obm_error *err) {
    const char *text = obm__json_string_n(obm__json_get(part, key), &s->len);
    if (!text)
        return obm__fail(err, OBM_E_FORMAT, "%s: normalizer %s has no \"%s\" text", where, obm__part_type(part), key);
    s->text = obm__strndup(text, s->len);
    return s->text ? OBM_OK : obm__fail_nomem(err, s->len);
}

static obm_status load_kind(obm__normal_step *s, const obm_json *part, const char *where, obm_error *err) {
    static const char *const forms[] = {"NFC", "NFD", "NFKC", "NFKD"}; /* as in obm__form */
    const char *type = obm__part_type(part);
    for (int i = 0; i < 4; i++) {
        if (strcmp(type, forms[i]) == 0) {
            s->form = (obm__form)i;
            return OBM_OK;
        }
    }
    if (strcmp(type, "Lowercase") == 0) {
        s->kind = OBM__N_LOWERCASE;
    } else if (strcmp(type, "Prepend") == 0) {
        s->kind = OBM__N_PREPEND;
        return load_text(s, part, "prepend", where, err);
    } else if (strcmp(type, "Replace") == 0) {
        s->kind = OBM__N_REPLACE;
        OBM_TRY(load_text(s, part, "content", where, err));
        return obm__part_pattern(obm__json_get(part, "pattern"), "normalizer Replace", where, &s->regex, err);
    } else if (strcmp(type, "Strip") == 0) {
        s->kind = OBM__N_STRIP;
        obm__json_bool(obm__json_get(part, "strip_left"), &s->left);
        obm__json_bool(obm__json_get(part, "strip_right"), &s->right);
    } else {
        return obm__part_unsupported(where, "normalizer", type,
                                     "NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip and Sequence are", err);
    }
    return OBM_OK;
}

static void step_free(obm__normal_step *s) {
    obm__regex_free(s->regex);
    obm_free(s->text);
}

static obm_status load_step(void *into, const obm_json *part, const char *where, obm_error *err) {
    obm__normalizer *z = into;
    obm__normal_step step = {0}, *steps = obm__realloc(z->steps, z->n + 1, sizeof *steps);
    if (!steps) return obm__fail_nomem(err, (z->n + 1) * sizeof *steps);
    z->steps = steps;
    obm_status status = load_kind(&step, part, where, err);
    if (status == OBM_OK)
        steps[z->n++] = step;
    else
        step_free(&step);
    return status;
}

obm_status obm__normalizer_load(obm__normalizer *z, const obm_json *part, const char *where, obm_error *err) {
    *z = (obm__normalizer){0};
    obm_status status = obm__part_each(part, "normalizers", load_step, z, where, err);
    if (status != OBM_OK) obm__normalizer_free(z);
    return status;
}

void obm__normalizer_free(obm__normalizer *z) {
    for (size_t i = 0; i < z->n; i++) step_free(&z->steps[i]);
    obm_free(z->steps);
    *z = (obm__normalizer){0};
}

/* ---- applying ---- */

static size_t first_char(const char *text, size_t n) {
    size_t len = 0;
    if (n) obm__utf8_next(text, n, &len);
    return len;
}

/* The library takes what stands for several characters to begin where the last of them does. */
static obm_status replace(const obm__normal_step *s, obm__matching *m, const char *text, size_t n, obm__buffer *out,
                          bool *cut, obm_error *err) {
    const obm__split split = {.regex = s->regex};
    obm__matches matches = {0};
    obm__span match;
    size_t done = 0;
    bool found;
    for (;;) {
        OBM_TRY(obm__matches_next(&matches, &split, m, text, n, &found, &match, err));
        if (!found) break;
        *cut |= match.begin == 0 && match.end > (s->len ? first_char(text, n) : 0);
        obm__buffer_add(out, text + done, match.begin - done);
        obm__buffer_add(out, s->text, s->len);
        done = match.end;
    }
    obm__buffer_add(out, text + done, n - done);
    return OBM_OK;
}

static void strip(const obm__normal_step *s, const char *text, size_t n, obm__buffer *out, bool *cut) {
    size_t begin = 0, end = 0, len; /* end: behind the last character that is no space */
    while (s->left && begin < n && obm__is_space(obm__utf8_next(text + begin, n - begin, &len))) begin += len;
    *cut |= begin > 0;
    for (size_t at = end = begin; at < n; at += len) {
        if (!obm__is_space(obm__utf8_next(text + at, n - at, &len))) end = at + len;
    }
    obm__buffer_add(out, text + begin, (s->right ? end : n) - begin);
}

static obm_status apply(const obm__normal_step *s, obm__matching *m, const char *text, size_t n, obm__buffer *out,
                        bool *cut, obm_error *err) {
    switch (s->kind) {
    case OBM__N_FORM:
        return obm__normal_form(s->form, text, n, out, err);
    case OBM__N_LOWERCASE:
        obm__lowercase(text, n, out);
        return OBM_OK;
    case OBM__N_PREPEND:
        if (n) obm__buffer_add(out, s->text, s->len);
        obm__buffer_add(out, text, n);
        return OBM_OK;
    case OBM__N_REPLACE:
        return replace(s, m, text, n, out, cut, err);
    default:
        strip(s, text, n, out, cut);
        return OBM_OK;
    }
}

obm_status obm__normalize(const obm__normalizer *z, obm__matching *m, obm__buffer work[2], const char *text, size_t n,
                          const char **out, size_t *out_n, bool *cut, obm_error *err) {
    *cut = false;
    for (size_t i = 0; i < z->n; i++) {
        obm__buffer *to = &work[i & 1];
        to->size = 0;
        obm__buffer_add(to, "", 0);
        OBM_TRY(apply(&z->steps[i], m, text, n, to, cut, err));
        if (to->failed) return obm__fail_nomem(err, n);
        text = to->data;
        n = to->size;
    }
    *out = text;
    *out_n = n;
    return OBM_OK;
}
