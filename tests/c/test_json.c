/* JSON access: what is accepted, what is refused and how it is said, and that texts come back. */
#include "io/json.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static obm_json *parse(const char *text) {
    obm_json *v = NULL;
    obm_error err;
    if (obm__json_parse(text, strlen(text), "test", &v, &err) != OBM_OK) fail_msg("%s", err.message);
    return v;
}

static void refuse(const char *text, size_t size, const char *said) {
    obm_json *v = (obm_json *)&v;
    obm_error err;
    assert_int_equal(obm__json_parse(text, size, "file.json", &v, &err), OBM_E_FORMAT);
    assert_ptr_equal(v, &v);
    assert_non_null(strstr(err.message, "file.json: not valid JSON at line "));
    if (!strstr(err.message, said)) fail_msg("expected \"%s\" in \"%s\"", said, err.message);
}

static void test_kinds(void **state) {
    (void)state;
    obm_json *v = parse("[null, true, 1, 1.5, \"s\", [], {}]");
    const obm_json_kind kinds[] = {OBM_JSON_NULL,   OBM_JSON_BOOL,  OBM_JSON_INT,   OBM_JSON_REAL,
                                   OBM_JSON_STRING, OBM_JSON_ARRAY, OBM_JSON_OBJECT};
    assert_int_equal(obm__json_size(v), 7);
    for (size_t i = 0; i < 7; i++) assert_int_equal(obm__json_kind(obm__json_at(v, i)), kinds[i]);
    assert_null(obm__json_at(v, 7));
    assert_null(obm__json_get(v, "a"));
    assert_string_equal(obm__json_kind_name(obm__json_at(v, 6)), "an object");
    assert_string_equal(obm__json_kind_name(NULL), "nothing");
    obm__json_free(v);
}

static void test_integers(void **state) {
    (void)state;
    obm_json *v = parse(
        "[9223372036854775807, -9223372036854775808, 4.0, 4.5, 9223372036854775808.0, -9223372036854775808.0, \"4\"]");
    int64_t i = -1;
    assert_true(obm__json_int(obm__json_at(v, 0), &i) && i == INT64_MAX);
    assert_true(obm__json_int(obm__json_at(v, 1), &i) && i == INT64_MIN);
    assert_true(obm__json_int(obm__json_at(v, 2), &i) && i == 4);
    assert_true(obm__json_int(obm__json_at(v, 5), &i) && i == INT64_MIN);
    i = 77;
    assert_false(obm__json_int(obm__json_at(v, 3), &i));
    assert_false(obm__json_int(obm__json_at(v, 4), &i));
    assert_false(obm__json_int(obm__json_at(v, 6), &i));
    assert_false(obm__json_int(NULL, &i));
    assert_int_equal(i, 77);
    double d = 0;
    assert_true(obm__json_real(obm__json_at(v, 2), &d) && d == 4.0);
    assert_false(obm__json_real(obm__json_at(v, 6), &d));
    obm__json_free(v);
}

/* transformers writes int(1e30) for "no limit"; the other integers of that document must stay integers. */
static void test_long_integers(void **state) {
    (void)state;
    obm_json *v =
        parse("{\"model_max_length\": 1000000000000000019884624838656, \"a\": 9223372036854775807, "
              "\"b\": -9223372036854775808, \"s\": \"9999999999999999999999 \\\" 99999999999999999999\", \"r\": 1e5}");
    double d = 0;
    int64_t i = 0;
    assert_int_equal(obm__json_kind(obm__json_get(v, "model_max_length")), OBM_JSON_REAL);
    assert_true(obm__json_real(obm__json_get(v, "model_max_length"), &d) && d == 1e30);
    assert_false(obm__json_int(obm__json_get(v, "model_max_length"), &i));
    assert_int_equal(obm__json_kind(obm__json_get(v, "a")), OBM_JSON_INT);
    assert_true(obm__json_int(obm__json_get(v, "a"), &i) && i == INT64_MAX);
    assert_string_equal(obm__json_string(obm__json_get(v, "s")), "9999999999999999999999 \" 99999999999999999999");
    assert_true(obm__json_real(obm__json_get(v, "r"), &d) && d == 1e5);
    obm__json_free(v);
}

static void test_strings(void **state) {
    (void)state;
    obm_json *v = parse("[\"a\\u0000b\", \"plain\", \"\\ud83d\\ude00\"]");
    size_t n = 0;
    assert_null(obm__json_string(obm__json_at(v, 0)));
    assert_memory_equal(obm__json_string_n(obm__json_at(v, 0), &n), "a\0b", 3);
    assert_int_equal(n, 3);
    assert_string_equal(obm__json_string(obm__json_at(v, 1)), "plain");
    assert_string_equal(obm__json_string(obm__json_at(v, 2)), "\xf0\x9f\x98\x80");
    assert_null(obm__json_string_n(v, &n));
    obm__json_free(v);
}

static void test_refusals(void **state) {
    (void)state;
    refuse("{\"a\": 1, \"a\": 2}", 16, "duplicate");
    refuse("{\"a\": 1", 7, "line 1");
    refuse("[1] x", 5, "end of file expected");
    refuse("\"\xff\xfe\"", 4, "unable to decode byte");
    refuse("\"\xed\xa0\x80\"", 5, "unable to decode byte");
    refuse("[1,\n\n ,]", 8, "line 3, column 2");
    refuse("", 0, "line 1");
    refuse("[1e999]", 7, "overflow");
    refuse("{\"a\\u0000\": 1}", 14, "NUL");
}

/* Also behind a number, where jansson alone would skip it. */
static void test_raw_nul(void **state) {
    (void)state;
    static const struct {
        const char *text;
        size_t size;
        const char *said;
    } cases[] = {{"[2\0,3]", 6, "a NUL at byte 2"},
                 {"\0", 1, "byte 0"},
                 {"[\0]", 3, "byte 1"},
                 {"\"a\0\"", 4, "byte 2"},
                 {"{}\0", 3, "byte 2"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        obm_json *v;
        obm_error err;
        assert_int_equal(obm__json_parse(cases[i].text, cases[i].size, "t", &v, &err), OBM_E_FORMAT);
        assert_non_null(strstr(err.message, cases[i].said));
    }
}

static void test_depth(void **state) {
    (void)state;
    enum { DEPTH = 100000 };
    static char deep[DEPTH];
    memset(deep, '[', sizeof deep);
    refuse(deep, sizeof deep, "depth");
    for (int i = 0; i < 500; i++) deep[i] = '[', deep[999 - i] = ']';
    deep[1000] = 0;
    obm__json_free(parse(deep));
}

static void test_text(void **state) {
    (void)state;
    obm_json *v = obm__json_new_object(), *list = obm__json_new_array();
    assert_true(obm__json_set(v, "z", obm__json_new_int(INT64_MIN)));
    assert_true(obm__json_set(v, "eps", obm__json_new_real(1e-5)));
    assert_true(obm__json_set(v, "third", obm__json_new_real(1.0 / 3.0)));
    assert_true(obm__json_append(list, obm__json_new_bool(false)));
    assert_true(obm__json_append(list, obm__json_new_null()));
    assert_true(obm__json_append(list, obm__json_new_string("\xc3\xa4\"\n")));
    assert_true(obm__json_set(v, "a", list));
    assert_false(obm__json_set(v, "x", NULL));
    assert_false(obm__json_set(NULL, "x", obm__json_new_int(1)));
    assert_false(obm__json_set(v, "x", obm__json_new_string("\xff")));
    assert_false(obm__json_set(v, "x", obm__json_new_real(NAN)));
    char *text = obm__json_text(v, 0);
    assert_non_null(text);
    obm_json *back = parse(text);
    void *it = obm__json_first(back);
    assert_string_equal(obm__json_key(it), "z");
    it = obm__json_next(back, it);
    assert_string_equal(obm__json_key(it), "eps");
    double d = 0;
    assert_true(obm__json_real(obm__json_value(it), &d) && d == 1e-5);
    assert_true(obm__json_real(obm__json_get(back, "third"), &d) && d == 1.0 / 3.0);
    assert_string_equal(obm__json_string(obm__json_at(obm__json_get(back, "a"), 2)), "\xc3\xa4\"\n");
    obm_free(text);
    obm__json_free(back);
    obm_json *eps = obm__json_copy(obm__json_get(v, "eps"));
    text = obm__json_text(eps, 0);
    assert_string_equal(text, "1e-5");
    obm_free(text);
    obm__json_free(eps);
    obm__json_free(v);
}

/* What is absent has a kind too: a file that lacks a key must not be a crash. */
static void test_absent(void **state) {
    (void)state;
    assert_int_equal(obm__json_kind(NULL), OBM_JSON_NULL);
    assert_string_equal(obm__json_kind_name(NULL), "nothing");
    assert_false(obm__json_can_hold("\xff"));
    assert_true(obm__json_can_hold("\xc3\xb6"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_absent), cmocka_unit_test(test_kinds),   cmocka_unit_test(test_integers), cmocka_unit_test(test_long_integers),
        cmocka_unit_test(test_strings), cmocka_unit_test(test_refusals), cmocka_unit_test(test_depth),
        cmocka_unit_test(test_raw_nul), cmocka_unit_test(test_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
