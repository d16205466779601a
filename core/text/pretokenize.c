/* The pre_tokenizer of tokenizer.json: cutting a normalized text into words. */
#include "text.h"

#include <string.h>

/* ---- loading ---- */

/* Takes over the regex. */
static obm_status add_step(obm__pretokenizer *p, obm__pre_step step, obm_error *err) {
    obm__pre_step *steps = obm__realloc(p->steps, p->n + 1, sizeof *steps);
    if (!steps) {
        obm__regex_free(step.split.regex);
        return obm__fail_nomem(err, (p->n + 1) * sizeof *steps);
    }
    p->steps = steps;
    steps[p->n++] = step;
    return OBM_OK;
}

static obm_status read_behavior(const obm_json *part, const char *where, obm__behavior *out, obm_error *err) {
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *name = obm__json_string(obm__json_get(part, "behavior"));
    for (int i = 0; name && i < 5; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (obm__behavior)i;
            return OBM_OK;
        }
    }
    return obm__fail(err, OBM_E_FORMAT, "%s: pre_tokenizer %s has no behavior that is known (found %.64s)", where,
                     obm__part_type(part), name ? name : "none");
}

static obm_status load_split(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err) {
    obm__split split = {0};
    OBM_TRY(read_behavior(part, where, &split.behavior, err));
    obm__json_bool(obm__json_get(part, "invert"), &split.invert);
    OBM_TRY(obm__part_pattern(obm__json_get(part, "pattern"), "pre_tokenizer Split", where, &split.regex, err));
    return add_step(p, (obm__pre_step){.split = split}, err);
}

/* Rust's char::is_numeric: category N.  Its standard library is a Unicode version ahead of Oniguruma. */
static obm_status load_digits(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err) {
    static const char numeric[] = "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]";
    bool individual = false;
    obm__json_bool(obm__json_get(part, "individual_digits"), &individual);
    obm__split split = {.behavior = individual ? OBM__ISOLATED : OBM__CONTIGUOUS};
    OBM_TRY(obm__regex_new(numeric, sizeof numeric - 1, where, &split.regex, err));
    return add_step(p, (obm__pre_step){.split = split}, err);
}

static obm_status load_punctuation(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err) {
    obm__split split = {.by = OBM__BY_PUNCTUATION, .behavior = OBM__ISOLATED};
    if (obm__json_get(part, "behavior")) OBM_TRY(read_behavior(part, where, &split.behavior, err));
    return add_step(p, (obm__pre_step){.split = split}, err);
}

static obm_status read_scheme(const obm_json *part, const char *what, const char *where, obm__prepend *out,
                              obm_error *err) {
    static const char *const names[] = {"always", "first", "never"}; /* as in obm__prepend */
    const char *name = obm__json_string(obm__json_get(part, "prepend_scheme"));
    bool space = true;
    *out = OBM__PREPEND_ALWAYS;
    obm__json_bool(obm__json_get(part, "add_prefix_space"), &space);
    for (int i = 0; name && i < 3; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *out = (obm__prepend)i;
        name = NULL;
    }
    if (name || (!space && *out != OBM__PREPEND_NEVER)) {
        return obm__fail(err, OBM_E_FORMAT, "%s: %s Metaspace: expected prepend_scheme %s, found %.64s", where, what,
                         name ? "always, first or never" : "never beside add_prefix_space false",
                         name ? name : names[*out]);
    }
    return OBM_OK;
}

obm_status obm__metaspace_read(const obm_json *part, const char *what, const char *where, obm__prepend *prepend,
                               char replacement[5], obm_error *err) {
    size_t n = 0, len = 0;
    const char *text = obm__json_string_n(obm__json_get(part, "replacement"), &n);
    if (text && n) obm__utf8_next(text, n, &len);
    if (!len || len != n || !*text)
        return obm__fail(err, OBM_E_FORMAT, "%s: %s Metaspace: \"replacement\" is not one character", where, what);
    memcpy(replacement, text, n);
    replacement[n] = 0;
    return read_scheme(part, what, where, prepend, err);
}

static obm_status load_metaspace(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err) {
    obm__pre_step step = {.metaspace = true, .split.behavior = OBM__MERGED_WITH_NEXT};
    bool split = true;
    if (p->has_metaspace)
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s: pre_tokenizer Metaspace twice is not supported", where);
    p->has_metaspace = true;
    OBM_TRY(obm__metaspace_read(part, "pre_tokenizer", where, &step.prepend, step.replacement, err));
    obm__json_bool(obm__json_get(part, "split"), &split);
    if (split)
        OBM_TRY(obm__regex_new_literal(step.replacement, strlen(step.replacement), where, &step.split.regex, err));
    return add_step(p, step, err);
}

/* GPT-2's pattern (Radford et al. 2019, encoder.py). */
static obm_status load_bytes(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err) {
    static const char words[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    bool use_regex = true; /* files older than the option always used it */
    p->bytes = true;
    obm__json_bool(obm__json_get(part, "add_prefix_space"), &p->prefix_space);
    obm__json_bool(obm__json_get(part, "use_regex"), &use_regex);
    return use_regex ? obm__regex_new(words, sizeof words - 1, where, &p->words, err) : OBM_OK;
}

static obm_status load_step(void *into, const obm_json *part, const char *where, obm_error *err) {
    static const struct {
        const char *type;
        obm_status (*load)(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err);
    } with_options[] = {{"ByteLevel", load_bytes},
                        {"Split", load_split},
                        {"Digits", load_digits},
                        {"Punctuation", load_punctuation},
                        {"Metaspace", load_metaspace}};
    obm__pretokenizer *p = into;
    const char *type = obm__part_type(part);
    /* Behind ByteLevel the text is in its alphabet, where patterns mean something else. */
    if (p->bytes)
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s: pre_tokenizer %.64s after ByteLevel is not supported", where,
                         type);
    for (size_t i = 0; i < sizeof with_options / sizeof *with_options; i++) {
        if (strcmp(type, with_options[i].type) == 0) return with_options[i].load(p, part, where, err);
    }
    obm__pre_step step = {.split = {.behavior = OBM__REMOVED}};
    if (strcmp(type, "WhitespaceSplit") == 0) {
        step.split.by = OBM__BY_SPACE;
    } else if (strcmp(type, "Whitespace") == 0) {
        step.split.by = OBM__BY_WORDS;
        step.split.invert = true;
    } else {
        return obm__part_unsupported(where, "pre_tokenizer", type,
                                     "ByteLevel, Digits, Metaspace, Punctuation, Split, Whitespace, WhitespaceSplit "
                                     "and Sequence are",
                                     err);
    }
    return add_step(p, step, err);
}

obm_status obm__pretokenizer_load(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err) {
    *p = (obm__pretokenizer){0};
    obm_status status = obm__part_each(part, "pretokenizers", load_step, p, where, err);
    if (status != OBM_OK) obm__pretokenizer_free(p);
    return status;
}

void obm__pretokenizer_free(obm__pretokenizer *p) {
    for (size_t i = 0; i < p->n; i++) obm__regex_free(p->steps[i].split.regex);
    obm_free(p->steps);
    obm__regex_free(p->words);
    *p = (obm__pretokenizer){0};
}

/* ---- applying ---- */

void obm__words_free(obm__words *w) {
    obm__matching_free(w->matching);
    obm__spans_free(&w->spans);
    obm__spans_free(&w->next);
    obm__buffer_free(&w->spaced);
    obm__buffer_free(&w->prefixed);
}

static bool begins_with(const char *s, size_t n, const char *prefix) {
    size_t len = strlen(prefix);
    return n >= len && memcmp(s, prefix, len) == 0;
}

/* One part with spaces replaced, and one in front; appends to w->spaced. */
static void replace_spaces(obm__words *w, const obm__pre_step *step, const char *s, size_t n, bool first) {
    bool wanted = step->prepend == OBM__PREPEND_ALWAYS || (step->prepend == OBM__PREPEND_FIRST && first);
    if (wanted && s[0] != ' ' && !begins_with(s, n, step->replacement)) obm__buffer_text(&w->spaced, step->replacement);
    for (size_t at = 0; at < n;) {
        const char *space = memchr(s + at, ' ', n - at);
        size_t end = space ? (size_t)(space - s) : n;
        obm__buffer_add(&w->spaced, s + at, end - at);
        if (space) obm__buffer_text(&w->spaced, step->replacement);
        at = end + (space != NULL);
    }
}

/* Parts of *text become parts of w->spaced, which *text is then. */
static obm_status apply_metaspace(obm__words *w, const obm__pre_step *step, const char **text, bool first,
                                  obm_error *err) {
    w->spaced.size = 0;
    for (size_t i = 0; i < w->spans.count; i++) {
        obm__span *part = &w->spans.at[i];
        size_t begin = w->spaced.size;
        replace_spaces(w, step, *text + part->begin, part->end - part->begin, first && part->begin == 0);
        *part = (obm__span){begin, w->spaced.size};
    }
    if (w->spaced.failed) return obm__fail_nomem(err, w->spaced.size);
    *text = w->spaced.data;
    return OBM_OK;
}

static obm_status apply_split(obm__words *w, const obm__split *split, const char *text, obm_error *err) {
    w->next.count = 0;
    for (size_t i = 0; i < w->spans.count; i++)
        OBM_TRY(obm__split_apply(split, w->matching, text, w->spans.at[i], &w->next, err));
    obm__spans swap = w->spans;
    w->spans = w->next;
    w->next = swap;
    return OBM_OK;
}

/* ByteLevel of one part: the space in front, then words. */
static obm_status give_bytes(const obm__pretokenizer *p, obm__words *w, const char *text, size_t n, obm__word_fn fn,
                             void *user, obm_error *err) {
    if (p->prefix_space && text[0] != ' ') {
        w->prefixed.size = 0;
        obm__buffer_text(&w->prefixed, " ");
        obm__buffer_add(&w->prefixed, text, n);
        if (w->prefixed.failed) return obm__fail_nomem(err, n);
        text = w->prefixed.data;
        n = w->prefixed.size;
    }
    if (!p->words) return fn(user, text, n, err);
    w->next.count = 0;
    const obm__split words = {.regex = p->words, .behavior = OBM__ISOLATED};
    OBM_TRY(obm__split_apply(&words, w->matching, text, (obm__span){0, n}, &w->next, err));
    for (size_t i = 0; i < w->next.count; i++) {
        obm__span word = w->next.at[i];
        OBM_TRY(fn(user, text + word.begin, word.end - word.begin, err));
    }
    return OBM_OK;
}

obm_status obm__pretokenize(const obm__pretokenizer *p, obm__words *w, const char *text, size_t n, bool first,
                            obm__word_fn fn, void *user, obm_error *err) {
    if (n == 0) return OBM_OK;
    w->spans.count = 0;
    if (!obm__spans_add(&w->spans, 0, n)) return obm__fail_nomem(err, sizeof(obm__span));
    for (size_t i = 0; i < p->n; i++) {
        const obm__pre_step *step = &p->steps[i];
        if (step->metaspace) OBM_TRY(apply_metaspace(w, step, &text, first, err));
        if (!step->metaspace || step->split.regex) OBM_TRY(apply_split(w, &step->split, text, err));
    }
    for (size_t i = 0; i < w->spans.count; i++) {
        const char *part = text + w->spans.at[i].begin;
        size_t len = w->spans.at[i].end - w->spans.at[i].begin;
        OBM_TRY(p->bytes ? give_bytes(p, w, part, len, fn, user, err) : fn(user, part, len, err));
    }
    return OBM_OK;
}
