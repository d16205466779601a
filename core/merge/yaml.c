/* YAML 1.1 into a JSON tree, over libyaml (the only file that includes it).  Plain data: anchors and
 * aliases within a budget, merge keys (<<), no custom tags, no duplicate keys. */
#include "recipe.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

/* A recipe has tens of nodes; aliases that multiply ("billion laughs") run into this.  Long text, keys too, counts as
 * several. */
#define MAX_NODES 100000
#define MAX_DEPTH 64
#define MAX_DOCUMENTS 64

typedef struct reader {
    yaml_document_t *document;
    const char *where;
    size_t nodes;
    obm_error *err;
} reader;

static obm_status fail_at(const reader *r, const yaml_node_t *node, obm_status status, const char *what,
                          const char *detail) {
    return obm__fail(r->err, status, "%s, line %zu: %s%.200s", r->where, node->start_mark.line + 1, what, detail);
}

static obm_status fail_parser(const yaml_parser_t *p, const char *where, obm_error *err) {
    if (p->error == YAML_MEMORY_ERROR) return obm__fail_nomem(err, 0);
    if (p->error == YAML_READER_ERROR)
        return obm__fail(err, OBM_E_FORMAT, "%s, byte %zu: %s", where, p->problem_offset,
                         p->problem ? p->problem : "unreadable text");
    return obm__fail(err, OBM_E_FORMAT, "%s, line %zu, column %zu: %s%s%s%s", where, p->problem_mark.line + 1,
                     p->problem_mark.column + 1, p->problem ? p->problem : "invalid YAML", p->context ? " " : "",
                     p->context ? p->context : "",
                     p->problem && strstr(p->problem, "cannot start any token")
                         ? " (YAML indents with spaces, not tabs, and puts text that begins with @, ` or % in quotes)"
                         : "");
}

/* ---- scalars ---- */

static bool one_of(const char *s, const char *const *words) {
    for (; *words; words++)
        if (!strcmp(s, *words)) return true;
    return false;
}

/* [-+]? (digits [. digits*] | . digits) ([eE] [-+]? digits)?  Unlike YAML 1.1, `1e-06` is a number too.  *integral:
 * digits only. */
static bool looks_like_number(const char *s, bool *integral) {
    size_t digits = 0;
    *integral = true;
    if (*s == '-' || *s == '+') s++;
    for (; isdigit((unsigned char)*s); s++) digits++;
    if (*s == '.') {
        *integral = false;
        for (s++; isdigit((unsigned char)*s); s++) digits++;
    }
    if (digits == 0) return false;
    if (*s == 'e' || *s == 'E') {
        *integral = false;
        s++;
        if (*s == '-' || *s == '+') s++;
        if (!isdigit((unsigned char)*s)) return false;
        while (isdigit((unsigned char)*s)) s++;
    }
    return *s == 0;
}

static obm_status read_number(const reader *r, const yaml_node_t *node, const char *s, bool integral, obm_json **out) {
    const char *digits = s + (*s == '-' || *s == '+');
    if (integral && digits[0] == '0' && digits[1])
        return fail_at(r, node, OBM_E_FORMAT, "a number with a leading zero is ambiguous in YAML (octal or not): ", s);
    errno = 0;
    long long i = integral ? strtoll(s, NULL, 10) : 0;
    if (integral && errno == 0) {
        *out = obm__json_new_int(i);
        return OBM_OK;
    }
    double x = strtod(s, NULL);
    if (!isfinite(x)) return fail_at(r, node, OBM_E_FORMAT, "a number that no double holds: ", s);
    *out = obm__json_new_real(x);
    return OBM_OK;
}

/* The implicit types of YAML 1.1 for a scalar without quotes. */
static obm_status read_plain(const reader *r, const yaml_node_t *node, const char *s, obm_json **out) {
    static const char *const nulls[] = {"", "~", "null", "Null", "NULL", NULL};
    static const char *const yes[] = {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON", NULL};
    static const char *const no[] = {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF", NULL};
    static const char *const not_finite[] = {".inf", ".Inf", ".INF", "+.inf", "-.inf", ".nan", ".NaN", ".NAN", NULL};
    bool integral;
    if (one_of(s, not_finite)) return fail_at(r, node, OBM_E_FORMAT, "expected a finite number, found ", s);
    if (looks_like_number(s, &integral)) return read_number(r, node, s, integral, out);
    *out = one_of(s, nulls) ? obm__json_new_null()
           : one_of(s, yes) ? obm__json_new_bool(true)
           : one_of(s, no)  ? obm__json_new_bool(false)
                            : obm__json_new_string(s);
    return OBM_OK;
}

static obm_status read_scalar(const reader *r, const yaml_node_t *node, obm_json **out) {
    const char *s = (const char *)node->data.scalar.value, *tag = (const char *)node->tag;
    if (strlen(s) != node->data.scalar.length) return fail_at(r, node, OBM_E_FORMAT, "a NUL character in a value", "");
    if (strcmp(tag, YAML_STR_TAG) && strcmp(tag, YAML_INT_TAG) && strcmp(tag, YAML_FLOAT_TAG) &&
        strcmp(tag, YAML_BOOL_TAG) && strcmp(tag, YAML_NULL_TAG))
        return fail_at(r, node, OBM_E_UNSUPPORTED, "tags are not supported: ", tag);
    if (node->data.scalar.style == YAML_PLAIN_SCALAR_STYLE || strcmp(tag, YAML_STR_TAG))
        return read_plain(r, node, s, out);
    *out = obm__json_new_string(s);
    return OBM_OK;
}

/* ---- collections ---- */

static obm_status read_node(reader *r, yaml_node_t *node, int depth, obm_json **out);

static obm_status read_sequence(reader *r, yaml_node_t *node, int depth, obm_json *array) {
    for (yaml_node_item_t *i = node->data.sequence.items.start; i < node->data.sequence.items.top; i++) {
        obm_json *value = NULL;
        OBM_TRY(read_node(r, yaml_document_get_node(r->document, *i), depth + 1, &value));
        if (!obm__json_append(array, value)) return obm__fail_nomem(r->err, 0);
    }
    return OBM_OK;
}

static obm_status read_key(reader *r, yaml_node_t *mapping, yaml_node_t *key) {
    if (!key || key->type != YAML_SCALAR_NODE)
        return fail_at(r, mapping, OBM_E_FORMAT, "a key that is not a scalar", "");
    r->nodes += key->data.scalar.length / 64;
    if (strlen((const char *)key->data.scalar.value) != key->data.scalar.length)
        return fail_at(r, key, OBM_E_FORMAT, "a NUL character in a key", "");
    return OBM_OK;
}

/* YAML 1.1's merge key, which PyYAML follows: <<: *defaults, or <<: [*a, *b] of which the first counts. */
static bool is_merge_key(const yaml_node_t *key) {
    return key->data.scalar.style == YAML_PLAIN_SCALAR_STYLE && !strcmp((const char *)key->data.scalar.value, "<<");
}

/* What a mapping does not have itself comes from `other`. */
static obm_status add_missing(reader *r, const yaml_node_t *key, const obm_json *other, obm_json *object) {
    if (obm__json_kind(other) != OBM_JSON_OBJECT)
        return fail_at(r, key, OBM_E_FORMAT, "a merge key (<<): expected a mapping or a list of mappings", "");
    for (void *it = obm__json_first(other); it; it = obm__json_next(other, it)) {
        const char *name = obm__json_key(it);
        if (!obm__json_get(object, name) && !obm__json_set(object, name, obm__json_copy(obm__json_value(it))))
            return obm__fail_nomem(r->err, 0);
    }
    return OBM_OK;
}

static obm_status merge_mappings(reader *r, const yaml_node_pair_t *p, int depth, obm_json *object) {
    const yaml_node_t *key = yaml_document_get_node(r->document, p->key);
    obm_json *value = NULL;
    OBM_TRY(read_node(r, yaml_document_get_node(r->document, p->value), depth + 1, &value));
    bool list = obm__json_kind(value) == OBM_JSON_ARRAY;
    obm_status status = list ? OBM_OK : add_missing(r, key, value, object);
    for (size_t i = 0; status == OBM_OK && list && i < obm__json_size(value); i++)
        status = add_missing(r, key, obm__json_at(value, i), object);
    obm__json_free(value);
    return status;
}

static obm_status read_mapping(reader *r, yaml_node_t *node, int depth, obm_json *object) {
    const yaml_node_pair_t *merged = NULL;
    for (yaml_node_pair_t *p = node->data.mapping.pairs.start; p < node->data.mapping.pairs.top; p++) {
        yaml_node_t *key = yaml_document_get_node(r->document, p->key);
        OBM_TRY(read_key(r, node, key));
        const char *name = (const char *)key->data.scalar.value;
        bool merge = is_merge_key(key);
        if (merge ? merged != NULL : obm__json_get(object, name) != NULL)
            return fail_at(r, key, OBM_E_FORMAT, "duplicate key ", name);
        if (merge) {
            merged = p;
            continue;
        }
        obm_json *value = NULL;
        OBM_TRY(read_node(r, yaml_document_get_node(r->document, p->value), depth + 1, &value));
        if (!obm__json_set(object, name, value)) return obm__fail_nomem(r->err, 0);
    }
    return merged ? merge_mappings(r, merged, depth, object) : OBM_OK;
}

static obm_status read_node(reader *r, yaml_node_t *node, int depth, obm_json **out) {
    if (!node) return obm__fail(r->err, OBM_E_FORMAT, "%s: an alias to nothing", r->where);
    r->nodes += 1 + (node->type == YAML_SCALAR_NODE ? node->data.scalar.length / 64 : 0);
    if (r->nodes > MAX_NODES) return fail_at(r, node, OBM_E_FORMAT, "too many values (aliases that multiply?)", "");
    if (depth > MAX_DEPTH) return fail_at(r, node, OBM_E_FORMAT, "nested too deep", "");
    if (node->type == YAML_SCALAR_NODE) {
        OBM_TRY(read_scalar(r, node, out));
        return *out ? OBM_OK : obm__fail_nomem(r->err, node->data.scalar.length); /* libyaml has checked the UTF-8 */
    }
    bool sequence = node->type == YAML_SEQUENCE_NODE;
    obm_json *collection = sequence ? obm__json_new_array() : obm__json_new_object();
    if (!collection) return obm__fail_nomem(r->err, 0);
    obm_status status = sequence ? read_sequence(r, node, depth, collection) : read_mapping(r, node, depth, collection);
    if (status == OBM_OK) {
        *out = collection;
    } else {
        obm__json_free(collection);
    }
    return status;
}

/* ---- documents ---- */

/* All documents but empty ones into a list. */
static obm_status read_documents(yaml_parser_t *parser, const char *where, obm_json *list, obm_error *err) {
    size_t nodes = 0; /* of all documents together: the limit is the file's */
    for (bool more = true; more;) {
        yaml_document_t document;
        obm_json *value = NULL;
        if (!yaml_parser_load(parser, &document)) return fail_parser(parser, where, err);
        reader r = {.document = &document, .where = where, .nodes = nodes, .err = err};
        yaml_node_t *root = yaml_document_get_root_node(&document);
        more = root != NULL;
        obm_status status = more ? read_node(&r, root, 0, &value) : OBM_OK;
        yaml_document_delete(&document);
        nodes = r.nodes;
        OBM_TRY(status);
        bool empty = obm__json_kind(value) == OBM_JSON_NULL;
        if (empty) obm__json_free(value);
        if (!empty && !obm__json_append(list, value)) return obm__fail_nomem(err, 0);
        if (obm__json_size(list) > MAX_DOCUMENTS)
            return obm__fail(err, OBM_E_FORMAT, "%s: more than %d documents", where, MAX_DOCUMENTS);
    }
    return obm__json_size(list) ? OBM_OK : obm__fail(err, OBM_E_FORMAT, "%s: empty", where);
}

obm_status obm__yaml_parse_all(const char *text, size_t size, const char *where, obm_json **out, obm_error *err) {
    size_t start = 0;
    obm_json *list = obm__json_new_array(), *root;
    if (!list) return obm__fail_nomem(err, 0);
    while (start < size && isspace((unsigned char)text[start])) start++;
    /* JSON is nearly YAML, but not where strings hold \u surrogates or tabs separate tokens. */
    bool json = start < size && text[start] == '{' && obm__json_parse(text, size, where, &root, NULL) == OBM_OK;
    obm_status status = OBM_OK;
    yaml_parser_t parser;
    if (json) {
        if (!obm__json_append(list, root)) status = obm__fail_nomem(err, size);
    } else if (!yaml_parser_initialize(&parser)) {
        status = obm__fail_nomem(err, 0);
    } else {
        yaml_parser_set_input_string(&parser, (const unsigned char *)text, size);
        status = read_documents(&parser, where, list, err);
        yaml_parser_delete(&parser);
    }
    if (status == OBM_OK) {
        *out = list;
    } else {
        obm__json_free(list);
    }
    return status;
}

obm_status obm__yaml_parse(const char *text, size_t size, const char *where, obm_json **out, obm_error *err) {
    obm_json *list;
    OBM_TRY(obm__yaml_parse_all(text, size, where, &list, err));
    obm_json *root = obm__json_size(list) == 1 ? obm__json_copy(obm__json_at(list, 0)) : NULL;
    bool several = obm__json_size(list) > 1;
    obm__json_free(list);
    if (several) return obm__fail(err, OBM_E_UNSUPPORTED, "%s: more than one document (---), expected one", where);
    if (!root) return obm__fail_nomem(err, size);
    *out = root;
    return OBM_OK;
}
