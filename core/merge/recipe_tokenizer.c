/* What a recipe says about the result's tokenizer: `tokenizer_source`, the `tokenizer` block, and `chat_template`.
 * Knows no files (vocabulary.c reads those). */
#include "recipe.h"

#include <stdio.h>
#include <string.h>

#define WHERE OBM_RECIPE_WHERE
/* Bytes of a row times this stay far below 2^63. */
#define MAX_PAD 1048576

static const char *const tokenizer_keys[] = {"source", "tokens", "pad_to_multiple_of"};
static const char *const rule_keys[] = {"source", "force"};
static const char *const zero_keys[] = {"kind"};
static const char *const token_keys[] = {"kind", "model", "token", "token_id"};

/* base, union, or a model; mergekit's documentation writes it as model:PATH too. */
static obm_status read_source(const obm_context *ctx, obm__recipe *r, const obm_json *v, const char *where,
                              obm_error *err) {
    const char *ref;
    OBM_TRY(obm__recipe_ref(ctx, r, v, where, &ref, err));
    r->tokenizer.unite = ref && !strcmp(ref, "union");
    if (!ref || r->tokenizer.unite || !strcmp(ref, "base")) return OBM_OK;
    r->tokenizer.model = strncmp(ref, "model:", 6) ? ref : ref + 6;
    return OBM_OK;
}

static obm_status read_other_token(const obm_context *ctx, obm__recipe *r, const obm_json *v, const char *where,
                                   obm__token_rule *rule, obm_error *err) {
    char path[256];
    const obm_json *id = obm__json_get(v, "token_id");
    rule->kind = OBM_TOKEN_OTHER;
    OBM_TRY(obm__recipe_check_keys(v, where, token_keys, OBM_COUNT(token_keys), err));
    snprintf(path, sizeof path, "%s.model", where);
    OBM_TRY(obm__recipe_ref(ctx, r, obm__json_get(v, "model"), path, &rule->model, err));
    if (!rule->model) return obm__fail(err, OBM_E_ARG, "%s: \"model\" is missing", where);
    OBM_TRY(obm__recipe_text(v, where, "token", &rule->other, err));
    if ((rule->other != NULL) == obm__recipe_is_set(id))
        return obm__fail(err, OBM_E_ARG, "%s: expected \"token\" or \"token_id\", one of them", where);
    if (!rule->other && (!obm__json_int(id, &rule->other_id) || rule->other_id < 0))
        return obm__fail(err, OBM_E_ARG, "%s: token_id: expected an integer >= 0", where);
    return OBM_OK;
}

static obm_status read_rule_source(const obm_context *ctx, obm__recipe *r, const obm_json *v, const char *where,
                                   obm__token_rule *rule, obm_error *err) {
    const obm_json *kind = obm__json_get(v, "kind");
    if (!obm__recipe_is_set(v)) return OBM_OK;
    if (!kind) {
        rule->kind = OBM_TOKEN_OF_MODEL;
        return obm__recipe_ref(ctx, r, v, where, &rule->model, err);
    }
    const char *name = obm__json_string(kind);
    if (name && !strcmp(name, "model_token")) return read_other_token(ctx, r, v, where, rule, err);
    if (!name || strcmp(name, "zero"))
        return obm__fail(err, OBM_E_ARG, "%s: kind: expected model_token or zero, found \"%.64s\"", where,
                         name ? name : obm__json_kind_name(kind));
    rule->kind = OBM_TOKEN_ZERO;
    return obm__recipe_check_keys(v, where, zero_keys, OBM_COUNT(zero_keys), err);
}

static obm_status read_rule(const obm_context *ctx, obm__recipe *r, const char *token, const obm_json *v,
                            obm__token_rule *rule, obm_error *err) {
    char where[192], path[224];
    const obm_json *force = obm__json_get(v, "force");
    rule->token = token;
    snprintf(where, sizeof where, WHERE ": tokenizer.tokens.%.100s", token);
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, "%s: expected a mapping with \"source\", found %s", where,
                         obm__json_kind_name(v));
    OBM_TRY(obm__recipe_check_keys(v, where, rule_keys, OBM_COUNT(rule_keys), err));
    if (obm__recipe_is_set(force) && !obm__json_bool(force, &rule->force))
        return obm__fail(err, OBM_E_ARG, "%s: force: expected true or false, found %s", where,
                         obm__json_kind_name(force));
    snprintf(path, sizeof path, "%s.source", where);
    OBM_TRY(read_rule_source(ctx, r, obm__json_get(v, "source"), path, rule, err));
    if (!rule->force || rule->kind != OBM_TOKEN_DEFAULT) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s: force needs a \"source\"", where);
}

static obm_status read_rules(const obm_context *ctx, obm__recipe *r, const obm_json *tokens, obm_error *err) {
    size_t n = obm__json_size(tokens);
    if (!obm__recipe_is_set(tokens)) return OBM_OK;
    if (obm__json_kind(tokens) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, WHERE ": tokenizer.tokens: expected a mapping, found %s",
                         obm__json_kind_name(tokens));
    r->tokenizer.rules = obm__calloc(n + 1, sizeof *r->tokenizer.rules);
    if (!r->tokenizer.rules) return obm__fail_nomem(err, n * sizeof *r->tokenizer.rules);
    for (void *it = obm__json_first(tokens); it; it = obm__json_next(tokens, it))
        OBM_TRY(read_rule(ctx, r, obm__json_key(it), obm__json_value(it), &r->tokenizer.rules[r->tokenizer.n_rules++],
                          err));
    return OBM_OK;
}

static obm_status read_block(const obm_context *ctx, obm__recipe *r, const obm_json *v, obm_error *err) {
    const obm_json *source = obm__json_get(v, "source"), *pad = obm__json_get(v, "pad_to_multiple_of");
    if (obm__json_kind(v) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_ARG, WHERE ": tokenizer: expected a mapping, found %s", obm__json_kind_name(v));
    OBM_TRY(obm__recipe_check_keys(v, WHERE ": tokenizer", tokenizer_keys, OBM_COUNT(tokenizer_keys), err));
    OBM_TRY(read_source(ctx, r, source, WHERE ": tokenizer.source", err));
    if (!obm__recipe_is_set(source)) r->tokenizer.unite = true;
    if (obm__recipe_is_set(pad) &&
        (!obm__json_int(pad, &r->tokenizer.pad) || r->tokenizer.pad < 1 || r->tokenizer.pad > MAX_PAD))
        return obm__fail(err, OBM_E_ARG, WHERE ": tokenizer.pad_to_multiple_of: expected an integer in [1, %d]",
                         MAX_PAD);
    return read_rules(ctx, r, obm__json_get(v, "tokens"), err);
}

/* mergekit's rule: a name, or text of 20 bytes or more with a brace in it. */
static obm_status read_chat_template(obm__recipe *r, obm_error *err) {
    const char *text, *names[16];
    size_t n = 0;
    OBM_TRY(obm__recipe_text(r->root, WHERE, "chat_template", &text, err));
    r->chat_template = text;
    if (!text || !strcmp(text, "auto") || obm__chat_named(text)) return OBM_OK;
    if (strlen(text) >= 20 && strchr(text, '{')) return OBM_OK;
    char known[128], hint[128];
    names[n++] = "auto";
    for (const char *name; n < OBM_COUNT(names) && (name = obm__chat_name(n - 1)); n++) names[n] = name;
    obm__list_names(names + 1, n - 1, known, sizeof known);
    return obm__fail(err, OBM_E_ARG,
                     WHERE ": chat_template: expected auto, a name (%s) or a Jinja template, found \"%.64s\"%s", known,
                     text, obm__suggest(text, names, n, hint, sizeof hint));
}

obm_status obm__recipe_read_tokenizer(const obm_context *ctx, obm__recipe *r, obm_error *err) {
    const obm_json *source = obm__json_get(r->root, "tokenizer_source"), *block = obm__json_get(r->root, "tokenizer");
    OBM_TRY(read_chat_template(r, err));
    if (obm__recipe_is_set(source) && obm__recipe_is_set(block))
        return obm__fail(err, OBM_E_ARG, WHERE ": both \"tokenizer_source\" and \"tokenizer\", expected one");
    r->tokenizer.set = obm__recipe_is_set(source) || obm__recipe_is_set(block);
    if (obm__recipe_is_set(block)) return read_block(ctx, r, block, err);
    return read_source(ctx, r, source, WHERE ": tokenizer_source", err);
}
