/* JSON values over jansson (json.c is the only file that includes it).  Parsing rejects duplicate keys, non-UTF-8 and
 * nesting deeper than jansson's 2048; errors name the file, line and column.  Integers beyond int64 become reals. */
#ifndef OBM_JSON_H
#define OBM_JSON_H

#include "../sys/sys.h"

typedef struct json_t obm_json; /* jansson's own type, opaque here */

/* text need not be NUL-terminated; `where` names the source in messages.  *out is owned: obm__json_free. */
obm_status obm__json_parse(const char *text, size_t size, const char *where, obm_json **out, obm_error *err);
obm_status obm__json_load(const char *path, obm_json **out, obm_error *err); /* a file; IO, FORMAT */
void obm__json_free(obm_json *v);
/* Owned text, members in insertion order; indent 0: one line.  Reals come back as the same doubles.  NULL: out of
 * memory. */
char *obm__json_text(const obm_json *v, int indent);

typedef enum {
    OBM_JSON_NULL,
    OBM_JSON_BOOL,
    OBM_JSON_INT,
    OBM_JSON_REAL,
    OBM_JSON_STRING,
    OBM_JSON_ARRAY,
    OBM_JSON_OBJECT
} obm_json_kind;
obm_json_kind obm__json_kind(const obm_json *v); /* NULL (absent) counts as null */
const char *obm__json_kind_name(const obm_json *v); /* "a number", "an object", ... for messages */

/* Members and elements, borrowed; NULL when absent or when v is of another kind. */
const obm_json *obm__json_get(const obm_json *object, const char *key);
const obm_json *obm__json_at(const obm_json *array, size_t i);
size_t obm__json_size(const obm_json *array_or_object);
/* Iterates an object in insertion order: for (void *it = obm__json_first(o); it; it = obm__json_next(o, it)). */
void *obm__json_first(const obm_json *object);
void *obm__json_next(const obm_json *object, void *it);
const char *obm__json_key(void *it);
const obm_json *obm__json_value(void *it);

/* Scalars, false if v is NULL or of another kind.  int accepts reals with an integral value; real accepts ints. */
bool obm__json_bool(const obm_json *v, bool *out);
bool obm__json_int(const obm_json *v, int64_t *out);
bool obm__json_real(const obm_json *v, double *out);
const char *obm__json_string(const obm_json *v); /* NULL if not a string or if it holds a NUL byte; borrowed */
const char *obm__json_string_n(const obm_json *v, size_t *len); /* may hold NUL bytes */

/* Building; new_* return NULL when out of memory (new_string also for what is not UTF-8).  set and append steal the
 * reference of `value`; they take NULL for either argument and return false. */
obm_json *obm__json_new_object(void);
obm_json *obm__json_new_array(void);
obm_json *obm__json_new_string(const char *s);
bool obm__json_can_hold(const char *s); /* false: not UTF-8; true and yet no new_string: out of memory */
obm_json *obm__json_new_int(int64_t i);
obm_json *obm__json_new_real(double d);
obm_json *obm__json_new_bool(bool b);
obm_json *obm__json_new_null(void);
bool obm__json_set(obm_json *object, const char *key, obm_json *value);
bool obm__json_append(obm_json *array, obm_json *value);
obm_json *obm__json_copy(const obm_json *v); /* deep */
bool obm__json_equal(const obm_json *a, const obm_json *b); /* deep; members in any order */

#endif
