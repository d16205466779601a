/* The parts of tokenizer.json around the model: normalizer, pre_tokenizer, post_processor, decoder.  Whatever could
 * change an id and is not known here is refused by name. */
#include "text.h"

#include <string.h>

/* Sequences may nest; real files nest them once. */
#define MAX_DEPTH 8

typedef struct loader {
    obm__pipeline *p;
    const char *where;
    bool has_bytes; /* a ByteLevel pre-tokenizer was seen: it comes last */
    bool has_decoder;
    obm_error *err;
} loader;

static const char *type_of(const obm_json *part) {
    const char *type = obm__json_string(obm__json_get(part, "type"));
    return type ? type : "unknown";
}

static bool is_null(const obm_json *v) { return !v || obm__json_kind(v) == OBM_JSON_NULL; }

static bool is_array(const obm_json *v) { return v && obm__json_kind(v) == OBM_JSON_ARRAY; }

static obm_status unsupported(const loader *l, const char *part, const char *type, const char *known) {
    return obm__fail(l->err, OBM_E_UNSUPPORTED, "%s: %s of type %.64s is not supported (%s)", l->where, part, type,
                     known);
}

typedef obm_status (*part_fn)(loader *l, const obm_json *part, int depth);

/* Runs fn over the members of a Sequence. */
static obm_status each(loader *l, const obm_json *sequence, const char *key, int depth, part_fn fn) {
    const obm_json *parts = obm__json_get(sequence, key);
    if (depth >= MAX_DEPTH)
        return obm__fail(l->err, OBM_E_UNSUPPORTED, "%s: Sequence nested more than %d deep", l->where, MAX_DEPTH);
    if (!is_array(parts)) return obm__fail(l->err, OBM_E_FORMAT, "%s: a Sequence has no \"%s\" array", l->where, key);
    for (size_t i = 0; i < obm__json_size(parts); i++) OBM_TRY(fn(l, obm__json_at(parts, i), depth + 1));
    return OBM_OK;
}

static obm_status load_normalizer(loader *l, const obm_json *part, int depth) {
    const char *type = type_of(part);
    if (strcmp(type, "Sequence") == 0) return each(l, part, "normalizers", depth, load_normalizer);
    if (strcmp(type, "NFC") != 0) return unsupported(l, "normalizer", type, "NFC and Sequence are");
    l->p->nfc = true;
    return OBM_OK;
}

/* ---- pre_tokenizer ---- */

/* Takes over the regex. */
static obm_status add_split(loader *l, obm__split split) {
    obm__split *splits = obm__realloc(l->p->splits, l->p->n_splits + 1, sizeof *splits);
    if (!splits) {
        obm__regex_free(split.regex);
        return obm__fail_nomem(l->err, (l->p->n_splits + 1) * sizeof *splits);
    }
    l->p->splits = splits;
    splits[l->p->n_splits++] = split;
    return OBM_OK;
}

static obm_status read_behavior(const loader *l, const obm_json *part, obm__behavior *out) {
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *name = obm__json_string(obm__json_get(part, "behavior"));
    for (int i = 0; name && i < 5; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (obm__behavior)i;
            return OBM_OK;
        }
    }
    return obm__fail(l->err, OBM_E_FORMAT, "%s: pre_tokenizer Split has no behavior that is known", l->where);
}

static obm_status load_split(loader *l, const obm_json *part) {
    obm__split split = {0};
    size_t n = 0;
    const obm_json *pattern = obm__json_get(part, "pattern");
    OBM_TRY(read_behavior(l, part, &split.behavior));
    obm__json_bool(obm__json_get(part, "invert"), &split.invert);
    const char *text = obm__json_string_n(obm__json_get(pattern, "Regex"), &n);
    if (text) {
        OBM_TRY(obm__regex_new(text, n, l->where, &split.regex, l->err));
    } else {
        text = obm__json_string_n(obm__json_get(pattern, "String"), &n);
        if (!text)
            return obm__fail(l->err, OBM_E_FORMAT, "%s: pre_tokenizer Split has no Regex or String pattern", l->where);
        OBM_TRY(obm__regex_new_literal(text, n, l->where, &split.regex, l->err));
    }
    return add_split(l, split);
}

/* Rust's char::is_numeric: category N.  Its standard library is a Unicode version ahead of Oniguruma. */
static obm_status load_digits(loader *l, const obm_json *part) {
    static const char numeric[] = "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]";
    bool individual = false;
    obm__json_bool(obm__json_get(part, "individual_digits"), &individual);
    obm__split split = {.behavior = individual ? OBM__ISOLATED : OBM__CONTIGUOUS};
    OBM_TRY(obm__regex_new(numeric, sizeof numeric - 1, l->where, &split.regex, l->err));
    return add_split(l, split);
}

/* GPT-2's pattern (Radford et al. 2019, encoder.py). */
static obm_status load_bytes(loader *l, const obm_json *part) {
    static const char words[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    bool use_regex = true; /* files older than the option always used it */
    l->has_bytes = true;
    obm__json_bool(obm__json_get(part, "add_prefix_space"), &l->p->prefix_space);
    obm__json_bool(obm__json_get(part, "use_regex"), &use_regex);
    return use_regex ? obm__regex_new(words, sizeof words - 1, l->where, &l->p->words, l->err) : OBM_OK;
}

static obm_status load_pre_tokenizer(loader *l, const obm_json *part, int depth) {
    const char *type = type_of(part);
    if (strcmp(type, "Sequence") == 0) return each(l, part, "pretokenizers", depth, load_pre_tokenizer);
    /* Behind ByteLevel the text is in its alphabet, where patterns mean something else. */
    if (l->has_bytes)
        return obm__fail(l->err, OBM_E_UNSUPPORTED, "%s: pre_tokenizer %.64s after ByteLevel is not supported",
                         l->where, type);
    if (strcmp(type, "ByteLevel") == 0) return load_bytes(l, part);
    if (strcmp(type, "Split") == 0) return load_split(l, part);
    if (strcmp(type, "Digits") == 0) return load_digits(l, part);
    return unsupported(l, "pre_tokenizer", type, "ByteLevel, Split, Digits and Sequence are");
}

/* ---- post_processor ---- */

static obm_status grow_ids(loader *l, int32_t **ids, size_t n) {
    int32_t *grown = obm__realloc(*ids, n, sizeof *grown);
    if (!grown) return obm__fail_nomem(l->err, n * sizeof *grown);
    *ids = grown;
    return OBM_OK;
}

/* Appends the ids of special token `name`. */
static obm_status special_ids(loader *l, const obm_json *processor, const char *name, int32_t **ids, size_t *n) {
    const obm_json *values = obm__json_get(obm__json_get(obm__json_get(processor, "special_tokens"), name), "ids");
    if (!is_array(values)) {
        return obm__fail(l->err, OBM_E_FORMAT, "%s: post_processor uses special token \"%.64s\" without ids", l->where,
                         name);
    }
    for (size_t i = 0; i < obm__json_size(values); i++) {
        int64_t id;
        if (!obm__json_int(obm__json_at(values, i), &id) || id < 0 || id > INT32_MAX) {
            return obm__fail(l->err, OBM_E_FORMAT, "%s: post_processor has an id of \"%.64s\" that is none", l->where,
                             name);
        }
        OBM_TRY(grow_ids(l, ids, *n + 1));
        (*ids)[(*n)++] = (int32_t)id;
    }
    return OBM_OK;
}

/* Around what an earlier processor of the sequence has put: its ids go inside. */
static obm_status wrap(loader *l, const int32_t *before, size_t n_before, const int32_t *after, size_t n_after) {
    obm__pipeline *p = l->p;
    OBM_TRY(grow_ids(l, &p->before, n_before + p->n_before));
    OBM_TRY(grow_ids(l, &p->after, n_after + p->n_after));
    memmove(p->before + n_before, p->before, p->n_before * sizeof *before);
    if (n_before) memcpy(p->before, before, n_before * sizeof *before);
    if (n_after) memcpy(p->after + p->n_after, after, n_after * sizeof *after);
    p->n_before += n_before;
    p->n_after += n_after;
    return OBM_OK;
}

static obm_status load_template(loader *l, const obm_json *part) {
    const obm_json *single = obm__json_get(part, "single");
    int32_t *ids[2] = {NULL, NULL}; /* before and after the text */
    size_t n[2] = {0, 0};
    int side = 0;
    obm_status status = OBM_OK;
    if (!is_array(single))
        return obm__fail(l->err, OBM_E_FORMAT, "%s: TemplateProcessing has no \"single\" array", l->where);
    for (size_t i = 0; i < obm__json_size(single); i++) {
        const obm_json *piece = obm__json_at(single, i);
        const char *name = obm__json_string(obm__json_get(obm__json_get(piece, "SpecialToken"), "id"));
        if (name) {
            OBM_GO(special_ids(l, part, name, &ids[side], &n[side]));
        } else if (side++ || !obm__json_get(piece, "Sequence")) {
            OBM_GO(obm__fail(l->err, OBM_E_UNSUPPORTED,
                             "%s: TemplateProcessing.single is not special tokens around one sequence", l->where));
        }
    }
    if (side != 1)
        OBM_GO(obm__fail(l->err, OBM_E_UNSUPPORTED, "%s: TemplateProcessing.single has no sequence", l->where));
    OBM_GO(wrap(l, ids[0], n[0], ids[1], n[1]));
done:
    obm_free(ids[0]);
    obm_free(ids[1]);
    return status;
}

static obm_status load_post_processor(loader *l, const obm_json *part, int depth) {
    const char *type = type_of(part);
    if (strcmp(type, "Sequence") == 0) return each(l, part, "processors", depth, load_post_processor);
    if (strcmp(type, "TemplateProcessing") == 0) return load_template(l, part);
    if (strcmp(type, "ByteLevel") == 0) return OBM_OK; /* trims offsets, which we do not give */
    return unsupported(l, "post_processor", type, "ByteLevel, TemplateProcessing and Sequence are");
}

/* ---- decoder ---- */

static obm_status load_decoder(loader *l, const obm_json *part, int depth) {
    const char *type = type_of(part);
    if (strcmp(type, "Sequence") == 0) return each(l, part, "decoders", depth, load_decoder);
    if (strcmp(type, "ByteLevel") != 0 || l->has_decoder) return unsupported(l, "decoder", type, "one ByteLevel is");
    l->has_decoder = true;
    return OBM_OK;
}

static obm_status load_all(loader *l, const obm_json *root) {
    static const struct {
        const char *key;
        part_fn load;
    } parts[] = {{"normalizer", load_normalizer},
                 {"pre_tokenizer", load_pre_tokenizer},
                 {"post_processor", load_post_processor},
                 {"decoder", load_decoder}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const obm_json *part = obm__json_get(root, parts[i].key);
        if (!is_null(part)) OBM_TRY(parts[i].load(l, part, 0));
    }
    if (!l->has_bytes)
        return obm__fail(l->err, OBM_E_UNSUPPORTED,
                         "%s: the pre_tokenizer has no ByteLevel (only byte-level BPE is supported)", l->where);
    if (!l->has_decoder)
        return obm__fail(l->err, OBM_E_UNSUPPORTED, "%s: no ByteLevel decoder (only byte-level BPE is supported)",
                         l->where);
    return OBM_OK;
}

obm_status obm__pipeline_load(obm__pipeline *p, const obm_json *root, const char *where, obm_error *err) {
    loader l = {.p = p, .where = where, .err = err};
    *p = (obm__pipeline){0};
    obm_status status = load_all(&l, root);
    if (status != OBM_OK) obm__pipeline_free(p);
    return status;
}

void obm__pipeline_free(obm__pipeline *p) {
    for (size_t i = 0; i < p->n_splits; i++) obm__regex_free(p->splits[i].regex);
    obm_free(p->splits);
    obm__regex_free(p->words);
    obm_free(p->before);
    obm_free(p->after);
    *p = (obm__pipeline){0};
}
