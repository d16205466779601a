/* JSON values: thin, checked access to jansson.  Knows nothing about what the documents mean. */
#include "json.h"

#include "../text/text.h"
#include "io.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PARSE_FLAGS (JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL)

/* ---- parsing ---- */

/* Length of the number at the start of text, 0 if there is none; *long_integer: an integer beyond int64. */
static size_t scan_number(const char *text, size_t size, bool *long_integer) {
    size_t sign = size > 0 && text[0] == '-', digits = 0, n = sign;
    while (sign + digits < size && text[sign + digits] >= '0' && text[sign + digits] <= '9') digits++;
    for (n += digits; n < size && text[n] && strchr(".eE+-0123456789", text[n]); n++) continue;
    *long_integer =
        n == sign + digits && (digits > 19 || (digits == 19 && memcmp(text + sign, "9223372036854775807", 19) > 0));
    return n;
}

static size_t scan_string(const char *text, size_t size) {
    size_t n = 1;
    while (n < size && text[n] != '"') n += text[n] == '\\' ? 2 : 1;
    return n < size ? n + 1 : size;
}

/* Python writes integers of any length (int(1e30) as "no limit" in tokenizer_config.json); jansson refuses what int64
 * cannot hold.  Appending ".0" makes those, and only those, reals. */
static void widen_long_integers(const char *text, size_t size, obm__buffer *out) {
    for (size_t i = 0, n; i < size; i += n) {
        bool long_integer = false;
        n = text[i] == '"' ? scan_string(text + i, size - i) : scan_number(text + i, size - i, &long_integer);
        if (n == 0) n = 1;
        obm__buffer_add(out, text + i, n);
        if (long_integer) obm__buffer_text(out, ".0");
    }
}

/* jansson quotes the input, which may be anything and may be cut inside a character. */
static void make_printable(char *s) {
    for (; *s; s++) {
        if ((unsigned char)*s < 0x20 || (unsigned char)*s >= 0x7f) *s = '?';
    }
}

/* No line: jansson fails without saying why, which it does only when an allocation fails. */
static obm_status parse_failure(json_error_t *e, const char *where, size_t size, obm_error *err) {
    if (json_error_code(e) == json_error_out_of_memory || e->line < 0) return obm__fail_nomem(err, size);
    make_printable(e->text);
    return obm__fail(err, OBM_E_FORMAT, "%s: not valid JSON at line %d, column %d: %s", where, e->line, e->column,
                     e->text);
}

/* jansson's reader does not look whether its token buffer grew: out of memory it drops characters.  So the memory that
 * documents of this size commonly need (names, tensors, pieces: some ten times their text) has to be there beforehand. */
static bool memory_is_there(size_t size) {
    void *probe = obm__alloc(size, 10);
    obm_free(probe);
    return probe != NULL;
}

obm_status obm__json_parse(const char *text, size_t size, const char *where, obm_json **out, obm_error *err) {
    json_error_t e;
    /* jansson's reader skips a raw NUL after a number; JSON allows it nowhere. */
    const char *nul = size ? memchr(text, 0, size) : NULL;
    if (nul) return obm__fail(err, OBM_E_FORMAT, "%s: not valid JSON: a NUL at byte %zu", where, (size_t)(nul - text));
    if (!memory_is_there(size)) return obm__fail_nomem(err, size);
    json_t *v = json_loadb(text ? text : "", size, PARSE_FLAGS, &e);
    if (!v && json_error_code(&e) == json_error_numeric_overflow) {
        obm__buffer widened = {0};
        widen_long_integers(text, size, &widened);
        if (widened.failed) {
            obm__buffer_free(&widened);
            return obm__fail_nomem(err, size);
        }
        v = json_loadb(widened.data, widened.size, PARSE_FLAGS, &e);
        obm__buffer_free(&widened);
    }
    if (!v) OBM_TRY(obm__refuse_pointer(text, size, where, err));
    if (!v) return parse_failure(&e, where, size, err);
    *out = v;
    return OBM_OK;
}

obm_status obm__json_load(const char *path, obm_json **out, obm_error *err) {
    char *text;
    size_t size;
    OBM_TRY(obm__file_read(path, &text, &size, err));
    obm_status status = obm__json_parse(text, size, path, out, err);
    obm_free(text);
    return status;
}

void obm__json_free(obm_json *v) { json_decref(v); }

/* ---- text ---- */

/* NULL unless the text reads back as v: the digits may be too few, and json_dumps, out of memory, leaves out what its
 * buffer had no room for. */
static char *dump(const json_t *v, size_t flags) {
    char *text = json_dumps(v, flags);
    json_t *back = text ? json_loads(text, PARSE_FLAGS, NULL) : NULL;
    bool exact = back && json_equal(back, v);
    json_decref(back);
    if (exact) return text;
    free(text);
    return NULL;
}

/* 15 digits keep 1e-05 readable where they are exact; 17 are always exact. */
char *obm__json_text(const obm_json *v, int indent) {
    size_t flags = JSON_ENCODE_ANY | (indent > 0 ? JSON_INDENT((size_t)indent) : 0);
    if (!v) return NULL;
    char *text = dump(v, flags | JSON_REAL_PRECISION(15));
    return text ? text : dump(v, flags | JSON_REAL_PRECISION(17));
}

/* ---- reading ---- */

obm_json_kind obm__json_kind(const obm_json *v) {
    if (!v) return OBM_JSON_NULL;
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return OBM_JSON_OBJECT;
    case JSON_ARRAY:
        return OBM_JSON_ARRAY;
    case JSON_STRING:
        return OBM_JSON_STRING;
    case JSON_INTEGER:
        return OBM_JSON_INT;
    case JSON_REAL:
        return OBM_JSON_REAL;
    case JSON_TRUE:
    case JSON_FALSE:
        return OBM_JSON_BOOL;
    default:
        return OBM_JSON_NULL;
    }
}

const char *obm__json_kind_name(const obm_json *v) {
    static const char *const names[] = {"null",     "a boolean", "an integer", "a number",
                                        "a string", "an array",  "an object"};
    return v ? names[obm__json_kind(v)] : "nothing";
}

const obm_json *obm__json_get(const obm_json *object, const char *key) { return json_object_get(object, key); }
const obm_json *obm__json_at(const obm_json *array, size_t i) { return json_array_get(array, i); }
size_t obm__json_size(const obm_json *v) { return json_is_array(v) ? json_array_size(v) : json_object_size(v); }

/* jansson's iterators take a mutable object but only read it. */
void *obm__json_first(const obm_json *object) { return json_object_iter((json_t *)object); }
void *obm__json_next(const obm_json *object, void *it) { return json_object_iter_next((json_t *)object, it); }
const char *obm__json_key(void *it) { return json_object_iter_key(it); }
const obm_json *obm__json_value(void *it) { return json_object_iter_value(it); }

bool obm__json_bool(const obm_json *v, bool *out) {
    if (!json_is_boolean(v)) return false;
    *out = json_is_true(v);
    return true;
}

bool obm__json_int(const obm_json *v, int64_t *out) {
    if (json_is_integer(v)) {
        *out = json_integer_value(v);
        return true;
    }
    if (!json_is_real(v)) return false;
    double d = json_real_value(v);
    /* 2^63 itself is a double and out of range; -2^63 is in range. */
    if (!(d >= -0x1p63 && d < 0x1p63) || d != floor(d)) return false;
    *out = (int64_t)d;
    return true;
}

bool obm__json_real(const obm_json *v, double *out) {
    if (!json_is_number(v)) return false;
    *out = json_number_value(v);
    return true;
}

const char *obm__json_string(const obm_json *v) {
    return json_is_string(v) && !memchr(json_string_value(v), 0, json_string_length(v)) ? json_string_value(v) : NULL;
}

const char *obm__json_string_n(const obm_json *v, size_t *len) {
    if (!json_is_string(v)) return NULL;
    *len = json_string_length(v);
    return json_string_value(v);
}

/* ---- building ---- */

obm_json *obm__json_new_object(void) { return json_object(); }
obm_json *obm__json_new_array(void) { return json_array(); }
obm_json *obm__json_new_string(const char *s) { return json_string(s); }
bool obm__json_can_hold(const char *s) { return obm__utf8_check(s, strlen(s)) == strlen(s); }
obm_json *obm__json_new_int(int64_t i) { return json_integer(i); }
obm_json *obm__json_new_real(double d) { return json_real(d); }
obm_json *obm__json_new_bool(bool b) { return json_boolean(b); }
obm_json *obm__json_new_null(void) { return json_null(); }
bool obm__json_set(obm_json *object, const char *key, obm_json *value) {
    return json_object_set_new(object, key, value) == 0;
}
bool obm__json_append(obm_json *array, obm_json *value) { return json_array_append_new(array, value) == 0; }
obm_json *obm__json_copy(const obm_json *v) { return json_deep_copy(v); }
bool obm__json_equal(const obm_json *a, const obm_json *b) { return json_equal(a, b) != 0; }
