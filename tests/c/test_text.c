/* Text: the vectors of the tokenizers package, decoding in pieces, regexes that hang or differ, hostile files, chat
 * templates. */
#include "io/io.h"
#include "text/stream.h"
#include "text/text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define VECTORS OBM_SOURCE_DIR "/tests/vectors/tokenizers/"

static obm_tokenizer *open_tokenizer(const char *path) {
    obm_tokenizer *t = NULL;
    obm_error err;
    if (obm_tokenizer_open(NULL, path, &t, &err) != OBM_OK) fail_msg("%s", err.message);
    return t;
}

static obm_tokenizer *parse(const char *json) {
    obm_tokenizer *t = NULL;
    obm_error err;
    if (obm__tokenizer_parse(json, strlen(json), "test", &t, &err) != OBM_OK) fail_msg("%s", err.message);
    return t;
}

/* ---- vectors ---- */

static void check_ids(const obm_tokenizer *t, const obm_json *line, const char *text, size_t len, bool special) {
    const obm_json *expected = obm__json_at(line, special ? 2 : 1);
    int32_t *ids = NULL;
    size_t n = 0;
    obm_error err;
    if (obm_tokenizer_encode(t, text, len, special, &ids, &n, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_int_equal(n, obm__json_size(expected));
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        assert_true(obm__json_int(obm__json_at(expected, i), &id));
        if (ids[i] != id) fail_msg("\"%s\": id %zu is %d, expected %d", text, i, (int)ids[i], (int)id);
    }
    obm_free(ids);
}

/* The batch decode is the reference's, and what a stream gives adds up to it and is UTF-8 at every step. */
static void check_text(const obm_tokenizer *t, const obm_json *line, bool special, bool skip) {
    const obm_json *values = obm__json_at(line, special ? 2 : 1);
    size_t n = obm__json_size(values), len = 0, piece_len;
    int32_t *ids = calloc(n + 1, sizeof *ids);
    char *text = NULL;
    const char *piece;
    obm_error err;
    obm__decode_stream *s = NULL;
    obm__buffer streamed = {0};
    obm__buffer_text(&streamed, "");
    assert_int_equal(obm__decode_stream_new(t, skip, &s, &err), OBM_OK);
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        assert_true(obm__json_int(obm__json_at(values, i), &id));
        ids[i] = (int32_t)id;
        assert_int_equal(obm__decode_stream_push(s, ids[i], &piece, &piece_len, &err), OBM_OK);
        assert_int_equal(obm__utf8_check(piece, piece_len), piece_len);
        obm__buffer_add(&streamed, piece, piece_len);
    }
    assert_int_equal(obm__decode_stream_flush(s, &piece, &piece_len, &err), OBM_OK);
    obm__buffer_add(&streamed, piece, piece_len);
    obm__decode_stream_free(s);
    assert_int_equal(obm_tokenizer_decode(t, ids, n, skip, &text, &len, &err), OBM_OK);
    assert_int_equal(streamed.size, len);
    assert_memory_equal(streamed.data, text, len + 1);
    if (special && skip) {
        size_t expected_len = 0;
        const char *expected = obm__json_string_n(obm__json_at(line, 3), &expected_len);
        assert_int_equal(len, expected_len);
        assert_memory_equal(text, expected, len);
    }
    obm__buffer_free(&streamed);
    obm_free(text);
    free(ids);
}

static void check_line(const obm_tokenizer *t, const char *json, size_t size) {
    obm_json *line = NULL;
    obm_error err;
    size_t len = 0;
    if (obm__json_parse(json, size, "vectors", &line, &err) != OBM_OK) fail_msg("%s", err.message);
    const char *text = obm__json_string_n(obm__json_at(line, 0), &len);
    assert_non_null(text);
    check_ids(t, line, text, len, false);
    check_ids(t, line, text, len, true);
    check_text(t, line, true, true);
    check_text(t, line, false, false);
    obm__json_free(line);
}

static void check_vectors(const char *name) {
    char path[512];
    char *text = NULL;
    size_t size = 0, lines = 0;
    obm_error err;
    snprintf(path, sizeof path, VECTORS "%s.json", name);
    obm_tokenizer *t = open_tokenizer(path);
    snprintf(path, sizeof path, VECTORS "%s.jsonl", name);
    assert_int_equal(obm__file_read(path, &text, &size, &err), OBM_OK);
    for (char *at = text, *end; (end = strchr(at, '\n')); at = end + 1, lines++) check_line(t, at, (size_t)(end - at));
    assert_true(lines >= 150);
    obm_free(text);
    obm_tokenizer_free(t);
}

static void test_gpt2(void **state) {
    (void)state;
    check_vectors("gpt2");
}
static void test_llama3(void **state) {
    (void)state;
    check_vectors("llama3");
}
static void test_smollm2(void **state) {
    (void)state;
    check_vectors("smollm2");
}
static void test_qwen2(void **state) {
    (void)state;
    check_vectors("qwen2");
}

static void test_llama2(void **state) {
    (void)state;
    check_vectors("llama2");
}
static void test_metaspace_first(void **state) {
    (void)state;
    check_vectors("metaspace_first");
}
static void test_gemma(void **state) {
    (void)state;
    check_vectors("gemma");
}
static void test_phi3(void **state) {
    (void)state;
    check_vectors("phi3");
}
static void test_mixed(void **state) {
    (void)state;
    check_vectors("mixed");
}

/* ---- UTF-8 ---- */

static void lossy(const char *bytes, size_t n, const char *expected) {
    obm__buffer out = {0};
    obm__buffer_text(&out, "");
    assert_int_equal(obm__utf8_lossy(bytes, n, true, &out), n);
    assert_string_equal(out.data, expected);
    obm__buffer_free(&out);
}

#define FFFD "\xef\xbf\xbd"
/* The examples of the Unicode Standard 16, tables 3-8 to 3-11. */
static void test_lossy(void **state) {
    (void)state;
    lossy("\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41", 9, FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
    lossy("\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41", 9, FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
    lossy("\xf4\x91\x92\x93\xff\x41\x80\xbf\x42", 9, FFFD FFFD FFFD FFFD FFFD "A" FFFD FFFD "B");
    lossy("\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", 9, FFFD FFFD FFFD FFFD "A");
    lossy("x\xe2\x82", 3, "x" FFFD);
}

static void test_invalid_text(void **state) {
    (void)state;
    obm_tokenizer *t = open_tokenizer(VECTORS "gpt2.json");
    int32_t *ids = NULL;
    size_t n = 7;
    obm_error err;
    assert_int_equal(obm_tokenizer_encode(t, "abc\xff", 4, true, &ids, &n, &err), OBM_E_FORMAT);
    assert_string_equal(err.message, "the text is not UTF-8: byte 0xff at offset 3");
    assert_int_equal(obm_tokenizer_encode(t, "\xed\xa0\x80", 3, true, &ids, &n, NULL), OBM_E_FORMAT);
    assert_null(ids);
    assert_int_equal(n, 7);
    assert_int_equal(obm_tokenizer_encode(t, "", 0, true, &ids, &n, &err), OBM_OK);
    assert_int_equal(n, 0);
    assert_non_null(ids);
    obm_free(ids);
    obm_tokenizer_free(t);
}

static void test_pieces(void **state) {
    (void)state;
    obm_tokenizer *t = open_tokenizer(VECTORS "smollm2.json");
    int32_t eot = obm_tokenizer_id(t, "<|endoftext|>"), the = obm_tokenizer_id(t, "\xc4\xa0the"),
            size = (int32_t)obm_tokenizer_size(t);
    char *text = NULL;
    size_t len;
    obm_error err;
    assert_true(eot >= 0 && the >= 0);
    assert_string_equal(obm_tokenizer_piece(t, the), "\xc4\xa0the");
    assert_null(obm_tokenizer_piece(t, size));
    assert_null(obm_tokenizer_piece(t, -1));
    assert_int_equal(obm_tokenizer_id(t, "no such piece"), -1);
    assert_true(obm__tokenizer_is_special(t, eot));
    assert_false(obm__tokenizer_is_special(t, the));
    assert_false(obm__tokenizer_is_special(t, size));
    assert_int_equal(obm_tokenizer_decode(t, &size, 1, false, &text, &len, &err), OBM_E_ARG);
    assert_null(text);
    obm_tokenizer_free(t);
}

/* ---- small tokenizers ---- */

#define TAIL \
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},\"decoder\":{\"type\":\"ByteLevel\"}"
#define MODEL(vocab, merges) "\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}"

static void expect(const char *json, const char *text, size_t n, const int32_t *expected) {
    obm_tokenizer *t = parse(json);
    int32_t *ids = NULL;
    size_t count = 0;
    obm_error err;
    assert_int_equal(obm_tokenizer_encode(t, text, strlen(text), false, &ids, &count, &err), OBM_OK);
    assert_int_equal(count, n);
    if (n) assert_memory_equal(ids, expected, n * sizeof *ids);
    obm_free(ids);
    obm_tokenizer_free(t);
}

#define EXPECT(json, text, ...) \
    expect(json, text, sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t), (int32_t[]){__VA_ARGS__})

static void test_merge_order(void **state) {
    (void)state;
    /* "aaa": of equal ranks the leftmost goes first; "abc": rank decides, not position. */
    EXPECT("{" MODEL("{\"a\":0,\"b\":1,\"c\":2,\"aa\":3,\"bc\":4,\"ab\":5}", "[\"a a\",[\"b\",\"c\"],\"a b\"]") "," TAIL
                                                                                                                "}",
           "aaa", 3, 0);
    EXPECT("{" MODEL("{\"a\":0,\"b\":1,\"c\":2,\"aa\":3,\"bc\":4,\"ab\":5}", "[\"a a\",[\"b\",\"c\"],\"a b\"]") "," TAIL
                                                                                                                "}",
           "abcab", 0, 4, 5);
    /* No piece for d, no unknown token: it is dropped; with one it is that, or one for a run of them. */
    EXPECT("{" MODEL("{\"a\":0,\"b\":1}", "[]") "," TAIL "}", "addb", 0, 1);
    EXPECT("{\"model\":{\"type\":\"BPE\",\"unk_token\":\"b\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[]}," TAIL "}",
           "adda", 0, 1, 1, 0);
    EXPECT("{\"model\":{\"type\":\"BPE\",\"unk_token\":\"b\",\"fuse_unk\":true,\"vocab\":{\"a\":0,\"b\":1},\"merges\":["
           "]}," TAIL "}",
           "adda", 0, 1, 0);
}

/* A word of a million letters: quadratic merging would take hours. */
static void check_long_word(const char *json) {
    const size_t n = 1000000;
    char *text = malloc(n);
    memset(text, 'a', n);
    obm_tokenizer *t = parse(json);
    int32_t *ids = NULL;
    size_t count = 0;
    obm_error err;
    assert_int_equal(obm_tokenizer_encode(t, text, n, false, &ids, &count, &err), OBM_OK);
    assert_int_equal(count, n / 4);
    for (size_t i = 0; i < count; i++) assert_int_equal(ids[i], 2);
    obm_free(ids);
    obm_tokenizer_free(t);
    free(text);
}

static void test_long_word(void **state) {
    (void)state;
#define DOUBLING MODEL("{\"a\":0,\"aa\":1,\"aaaa\":2}", "[\"a a\",\"aa aa\"]")
    check_long_word("{" DOUBLING "," TAIL "}");
    check_long_word("{" DOUBLING "}");
}

/* ---- characters and byte fallback ---- */

#define FALLBACK(options, bytes)                                                      \
    "{\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"byte_fallback\":true" options \
    ",\"vocab\":{\"?\":0,\"a\":1," bytes "\"\xe2\x96\x81\":9},\"merges\":[]}}"
#define E_ACUTE "\"<0xC3>\":2,\"<0xA9>\":3,"

static void test_fallback(void **state) {
    (void)state;
    EXPECT(FALLBACK("", E_ACUTE), "a\xc3\xa9", 1, 2, 3);
    EXPECT(FALLBACK("", E_ACUTE), "a\xc3\xa8z", 1, 0, 0); /* not all bytes have a piece: unknown, once each */
    EXPECT(FALLBACK(",\"fuse_unk\":true", E_ACUTE), "zza", 0, 1);
    EXPECT(FALLBACK(",\"fuse_unk\":true", E_ACUTE), "z\xc3\xa9za", 2, 3, 0, 1); /* the library's order */
}

/* Decodes `ids`, whole and as a stream; NULL for pieces: nothing comes with that id. */
static void decodes(const char *decoder, const int32_t *ids, size_t n, const char *whole, const char *const *pieces) {
    char json[1024], *text = NULL;
    size_t len = 0;
    obm_error err;
    obm__decode_stream *s = NULL;
    snprintf(json, sizeof json,
             "{\"decoder\":%s,\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{\"a\":0,"
             "\"\xe2\x96\x81\xe2\x96\x81\":1,\"<0xF0>\":2,\"<0x9F>\":3,\"<0x99>\":4,\"<0x82>\":5},\"merges\":[]}}",
             decoder);
    obm_tokenizer *t = parse(json);
    assert_int_equal(obm_tokenizer_decode(t, ids, n, false, &text, &len, &err), OBM_OK);
    assert_string_equal(text, whole);
    obm_free(text);
    assert_int_equal(obm__decode_stream_new(t, false, &s, &err), OBM_OK);
    for (size_t i = 0; i <= n; i++) {
        const char *piece;
        assert_int_equal(i < n ? obm__decode_stream_push(s, ids[i], &piece, &len, &err)
                               : obm__decode_stream_flush(s, &piece, &len, &err),
                         OBM_OK);
        assert_string_equal(piece, pieces[i]);
    }
    obm__decode_stream_free(s);
    obm_tokenizer_free(t);
}

#define DECODES(decoder, whole, n, ids, ...) \
    decodes(decoder, (int32_t[])ids, n, whole, (const char *const[]){__VA_ARGS__})
#define IDS(...) \
    { __VA_ARGS__ }
#define SPACES "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\xe2\x96\x81\"},\"content\":\" \"}"
#define LLAMA                                                                                          \
    "{\"type\":\"Sequence\",\"decoders\":[" SPACES ",{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"}," \
    "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}"
#define METASPACE(scheme) "{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"" scheme "\"}"

static void test_stream(void **state) {
    (void)state;
    DECODES(LLAMA, " a  \xf0\x9f\x99\x82", 7, IDS(1, 0, 1, 2, 3, 4, 5), " ", "a", "  ", "", "", "", "\xf0\x9f\x99\x82",
            "");
    DECODES(LLAMA, FFFD FFFD "a", 3, IDS(2, 3, 0), "", "", FFFD FFFD "a", "");
    DECODES(LLAMA, FFFD FFFD, 2, IDS(2, 3), "", "", FFFD FFFD);
    /* Ill-formed behind a whole character: the stream cannot take that back. */
    DECODES(LLAMA, FFFD FFFD FFFD FFFD FFFD "a", 6, IDS(2, 3, 4, 5, 3, 0), "", "", "", "\xf0\x9f\x99\x82", FFFD, "a",
            "");
    DECODES(METASPACE("always"), "a  ", 3, IDS(1, 0, 1), "", "a", "  ", "");
    DECODES(METASPACE("never"), "  a", 2, IDS(1, 0), "  ", "a", "");
    DECODES("null", "a a", 2, IDS(0, 0), "a", " a", "");
}

/* A file cut short is not valid JSON at any byte; the message names it. */
static void test_cut_short(void **state) {
    (void)state;
    static const char *const files[] = {
        "{" DOUBLING "," TAIL "}", FALLBACK("", E_ACUTE),
        "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"_\"},"
        "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"_\"}]},"
        "\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"_\"},\"behavior\":\"Removed\"},"
        "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"A\"}}]},"
        "\"decoder\":" LLAMA ",\"added_tokens\":[{\"id\":3,\"content\":\"<s>\",\"special\":true}]," DOUBLING "}"};
    for (size_t f = 0; f < sizeof files / sizeof *files; f++) {
        size_t size = strlen(files[f]);
        obm_tokenizer_free(parse(files[f]));
        for (size_t n = 0; n < size; n++) {
            obm_tokenizer *t = NULL;
            obm_error err = {0};
            assert_int_equal(obm__tokenizer_parse(files[f], n, "t.json", &t, &err), OBM_E_FORMAT);
            assert_non_null(strstr(err.message, "t.json"));
            assert_null(t);
        }
    }
}

/* ---- regexes ---- */

static obm_status compile(const char *pattern, obm_error *err) {
    obm__regex *r = NULL;
    obm_status status = obm__regex_new(pattern, strlen(pattern), "test", &r, err);
    obm__regex_free(r);
    return status;
}

static void test_regex_refused(void **state) {
    (void)state;
    static const char *const unsupported[] = {"\\w+",  "a\\b",   "\\h",   "[a[b]]", "[a-z&&[aeiou]]", "a{1,3}+",
                                              "a{,3}", "(?m:.)", "(?x)a", "\\x80",  "[^\\D]"};
    static const char *const broken[] = {"(", "[a", "a\\", "\\p{", "\\p{Nope}", "\\u12", "*"};
    obm_error err;
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++) {
        if (compile(unsupported[i], &err) != OBM_E_UNSUPPORTED) fail_msg("%s was not refused", unsupported[i]);
        assert_non_null(strstr(err.message, "test: "));
    }
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        if (compile(broken[i], &err) != OBM_E_FORMAT) fail_msg("%s was not refused", broken[i]);
    }
}

static void test_regex_backtracking(void **state) {
    (void)state;
    obm__regex *r = NULL;
    obm__matching *m = obm__matching_new(NULL);
    char text[65];
    bool found;
    size_t begin, end;
    obm_error err;
    memset(text, 'a', 64);
    text[64] = 0;
    assert_int_equal(obm__regex_new("(a+)+(?:b|\\d)", 13, "test", &r, &err), OBM_OK);
    obm_status status = obm__regex_find(r, m, text, 64, 0, &found, &begin, &end, &err);
    assert_int_equal(status, OBM_E_FORMAT);
    assert_non_null(strstr(err.message, "match limit"));
    obm__regex_free(r);
    obm__matching_free(m);
}

/* ---- files that are not for us ---- */

static void refuse(const char *json, obm_status code, const char *said) {
    obm_tokenizer *t = NULL;
    obm_error err = {0};
    assert_int_equal(obm__tokenizer_parse(json, strlen(json), "t.json", &t, &err), code);
    assert_null(t);
    assert_non_null(strstr(err.message, "t.json"));
    if (!strstr(err.message, said)) fail_msg("expected \"%s\" in \"%s\"", said, err.message);
}

#define AB MODEL("{\"a\":0,\"b\":1}", "[]")
static void test_refused(void **state) {
    (void)state;
    refuse("{", OBM_E_FORMAT, "not valid JSON");
    refuse("[]", OBM_E_FORMAT, "found none");
    refuse("{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}," TAIL "}", OBM_E_UNSUPPORTED, "Unigram");
    refuse("{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}," TAIL "}", OBM_E_UNSUPPORTED, "WordPiece");
    refuse("{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{},\"merges\":[]}," TAIL "}",
           OBM_E_UNSUPPORTED, "byte_fallback");
    refuse("{\"model\":{\"type\":\"BPE\",\"dropout\":0.1,\"vocab\":{},\"merges\":[]}," TAIL "}", OBM_E_UNSUPPORTED,
           "dropout");
    refuse("{\"model\":{\"type\":\"BPE\",\"end_of_word_suffix\":\"</w>\",\"vocab\":{},\"merges\":[]}," TAIL "}",
           OBM_E_UNSUPPORTED, "end_of_word_suffix");
    refuse("{" AB ",\"pre_tokenizer\":{\"type\":\"Metaspace\"}}", OBM_E_FORMAT, "Metaspace: \"replacement\"");
    refuse("{" AB ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"often\"}}",
           OBM_E_FORMAT, "found often");
    refuse("{" AB ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"add_prefix_space\":false}}",
           OBM_E_FORMAT, "found always");
    refuse("{" AB ",\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}}", OBM_E_UNSUPPORTED,
           "pre_tokenizer of type BertPreTokenizer");
    refuse("{" AB ",\"normalizer\":{\"type\":\"Precompiled\"}," TAIL "}", OBM_E_UNSUPPORTED,
           "normalizer of type Precompiled");
    refuse("{" AB ",\"normalizer\":{\"type\":\"Prepend\"}," TAIL "}", OBM_E_FORMAT, "\"prepend\"");
    refuse("{" AB ",\"normalizer\":{\"type\":\"Replace\",\"content\":\"\"}," TAIL "}", OBM_E_FORMAT, "pattern");
    refuse("{" AB
           ",\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"ByteFallback\"}]}}",
           OBM_E_UNSUPPORTED, "ByteFallback behind Fuse");
    refuse("{" AB ",\"decoder\":{\"type\":\"Strip\",\"content\":\"\",\"start\":0,\"stop\":0}}", OBM_E_FORMAT, "Strip");
    refuse("{" AB ",\"post_processor\":{\"type\":\"BertProcessing\"}," TAIL "}", OBM_E_UNSUPPORTED, "BertProcessing");
    refuse("{" AB ",\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"WordPiece\"}}",
           OBM_E_UNSUPPORTED, "WordPiece");
    refuse("{" MODEL("{\"a\":0,\"b\":0}", "[]") "," TAIL "}", OBM_E_FORMAT, "same id");
    refuse("{" MODEL("{\"a\":-1}", "[]") "," TAIL "}", OBM_E_FORMAT, "\"a\"");
    refuse("{" MODEL("{\"a\":2000000000}", "[]") "," TAIL "}", OBM_E_FORMAT, "\"a\"");
    refuse("{" MODEL("{\"a\":0,\"b\":1}", "[\"a b\"]") "," TAIL "}", OBM_E_FORMAT, "\"ab\"");
    refuse("{" MODEL("{\"a\":0,\"b\":1}", "[\"a\"]") "," TAIL "}", OBM_E_FORMAT, "merges[0]");
    refuse("{" AB ",\"added_tokens\":[{\"id\":1,\"content\":\"x\"}]," TAIL "}", OBM_E_FORMAT, "added token \"x\"");
    refuse("{" AB ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"s\"}},{"
           "\"Sequence\":{\"id\":\"A\"}}],"
           "\"special_tokens\":{\"s\":{\"ids\":[9]}}}," TAIL "}",
           OBM_E_FORMAT, "id 9");
}

/* ---- chat templates ---- */

/* Puts the files into a fresh folder, opens it, removes them. */
static obm_tokenizer *open_with(const char *config, const char *jinja) {
    char dir[] = "/tmp/obm-text-XXXXXX", path[3][64];
    char *json = NULL;
    size_t size = 0;
    obm_error err;
    assert_non_null(mkdtemp(dir));
    snprintf(path[0], sizeof path[0], "%s/tokenizer.json", dir);
    snprintf(path[1], sizeof path[1], "%s/tokenizer_config.json", dir);
    snprintf(path[2], sizeof path[2], "%s/chat_template.jinja", dir);
    assert_int_equal(obm__file_read(VECTORS "smollm2.json", &json, &size, &err), OBM_OK);
    assert_int_equal(obm__file_write(path[0], json, size, &err), OBM_OK);
    if (config) assert_int_equal(obm__file_write(path[1], config, strlen(config), &err), OBM_OK);
    if (jinja) assert_int_equal(obm__file_write(path[2], jinja, strlen(jinja), &err), OBM_OK);
    obm_tokenizer *t = open_tokenizer(dir);
    for (int i = 0; i < 3; i++) unlink(path[i]);
    rmdir(dir);
    obm_free(json);
    return t;
}

static void renders(obm_tokenizer *t, const obm_message *messages, size_t n, bool generation, const char *expected) {
    char *text = NULL;
    obm_error err;
    if (obm_tokenizer_apply_template(t, messages, n, generation, &text, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_string_equal(text, expected);
    obm_free(text);
}

static const obm_message hello[] = {{"user", "Hi"}, {"assistant", "Ho"}};
static const obm_message with_system[] = {{"system", "S"}, {"user", "Hi"}};

#define LOOP                                                                                               \
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

static void test_template_plain(void **state) {
    (void)state;
    obm_tokenizer *t = open_with(NULL, "{% for message in messages %}" LOOP);
    renders(t, hello, 2, false, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n");
    renders(t, with_system, 2, true,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_non_null(strstr(obm_tokenizer_template(t), "message['role']"));
    obm_tokenizer_free(t);
}

/* SmolLM2-Instruct's form: the default sits in one literal, here with an escaped quote. */
static void test_template_default(void **state) {
    (void)state;
    obm_tokenizer *t = open_with(
        "{\"chat_template\":\"{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou\\\\'re a helpful AI assistant<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\"}",
        NULL);
    renders(t, hello, 1, true,
            "<|im_start|>system\nYou're a helpful AI "
            "assistant<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    renders(t, with_system, 2, false, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n");
    obm_tokenizer_free(t);
}

/* Qwen2.5's form: a branch for tools, and a system message that is concatenated is no default. */
static void test_template_branches(void **state) {
    (void)state;
    obm_tokenizer *t =
        open_with("{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"x\"},{\"name\":\"default\",\"template\":\""
                  "{%- if tools %}{{- '<|im_start|>system\\\\n' }}{{- 'You are Qwen.' }}{{- '# Tools<|im_end|>\\\\n' "
                  "}}{%- else %}"
                  "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\\\n' + messages[0]['content'] + "
                  "'<|im_end|>\\\\n' }}{%- else %}"
                  "{{- '<|im_start|>system\\\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
                  "assistant.<|im_end|>\\\\n' }}{%- endif %}{%- endif %}"
                  "\"}]}",
                  NULL);
    renders(t, hello, 1, false,
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
            "assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n");
    obm_tokenizer_free(t);
}

static void refuses(const char *jinja, const char *said) {
    obm_tokenizer *t = open_with("{}", jinja);
    char *text = NULL;
    obm_error err;
    assert_int_equal(obm_tokenizer_apply_template(t, hello, 1, true, &text, &err), OBM_E_UNSUPPORTED);
    assert_null(text);
    if (!strstr(err.message, said)) fail_msg("expected \"%s\" in \"%s\"", said, err.message);
    obm_tokenizer_free(t);
}

static void test_template_refused(void **state) {
    (void)state;
    refuses(NULL, "no chat template");
    refuses("{{ '[INST] ' + content }}", "none of the built-in ones");
    refuses("{{ bos_token }}{% for message in messages %}" LOOP, "bos_token");
    refuses("{{ '<|im_start|>system\\nA<|im_end|>\\n' }}{{ '<|im_start|>system\\nB<|im_end|>\\n' }}",
            "several default system messages");
    obm_tokenizer *t = open_with(NULL, "{% for message in messages %}" LOOP);
    const obm_message tool = {"tool", "x"}, unknown = {"narrator", "x"};
    char *text = NULL;
    assert_int_equal(obm_tokenizer_apply_template(t, &tool, 1, true, &text, NULL), OBM_E_UNSUPPORTED);
    assert_int_equal(obm_tokenizer_apply_template(t, &unknown, 1, true, &text, NULL), OBM_E_ARG);
    assert_int_equal(obm_tokenizer_apply_template(t, hello, 0, true, &text, NULL), OBM_E_ARG);
    obm_tokenizer_free(t);
}

/* Recognised by its whole text; other text around the same marks is not. */
static void test_template_llama3(void **state) {
    (void)state;
    char *jinja = NULL, *text = NULL;
    size_t size = 0;
    obm_error err;
    const obm_message odd = {"user", " \t\xc2\xa0 "};
    assert_int_equal(obm__file_read(OBM_SOURCE_DIR "/tests/vectors/templates/llama3.jinja", &jinja, &size, &err), OBM_OK);
    obm_tokenizer *t = open_with("{\"bos_token\":\"<B>\"}", jinja);
    assert_string_equal(obm_tokenizer_template_name(t), "llama3");
    renders(t, with_system, 2, true,
            "<B><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
    renders(t, &odd, 1, false, "<B><|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>");
    assert_int_equal(obm_tokenizer_builtin_template(t, "alpaca", &odd, 1, true, &text, &err), OBM_E_ARG);
    assert_int_equal(obm_tokenizer_builtin_template(t, "mistral", with_system, 2, true, &text, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "no system messages"));
    obm_tokenizer_free(t);
    jinja[size - 3] = 0;
    refuses(jinja, "give its name");
    obm_free(jinja);
    t = open_with(NULL, NULL);
    assert_null(obm_tokenizer_template_name(t));
    assert_int_equal(obm_tokenizer_builtin_template(t, "llama2", hello, 2, true, &text, &err), OBM_OK);
    assert_string_equal(text, "[INST] Hi [/INST] Ho ");
    obm_free(text);
    obm_tokenizer_free(t);
}

/* Thoughts go, but after the last question, where the last turn always has some. */
static void test_template_qwen3(void **state) {
    (void)state;
    obm_tokenizer *t = open_with(NULL, NULL);
    obm_error err;
    char *text;
    const obm_message chat[] = {{"user", "a"},
                                {"assistant", "<think>\nwhy\n</think>\n\nso"},
                                {"user", "b"},
                                {"assistant", "<think>x<think>\n\nhm\n\n</think>c</think>\n\nd"},
                                {"assistant", "\ne"}};
    assert_int_equal(obm_tokenizer_builtin_template(t, "qwen3", chat, 3, true, &text, &err), OBM_OK);
    assert_string_equal(text, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
                              "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n");
    obm_free(text);
    assert_int_equal(obm_tokenizer_builtin_template(t, "qwen3", chat + 2, 3, false, &text, &err), OBM_OK);
    assert_string_equal(text, "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nd<|im_end|>\n"
                              "<|im_start|>assistant\n<think>\n\n</think>\n\ne<|im_end|>\n");
    obm_free(text);
    obm_tokenizer_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_llama3),
        cmocka_unit_test(test_smollm2),
        cmocka_unit_test(test_qwen2),
        cmocka_unit_test(test_llama2),
        cmocka_unit_test(test_metaspace_first),
        cmocka_unit_test(test_gemma),
        cmocka_unit_test(test_phi3),
        cmocka_unit_test(test_mixed),
        cmocka_unit_test(test_lossy),
        cmocka_unit_test(test_invalid_text),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_merge_order),
        cmocka_unit_test(test_long_word),
        cmocka_unit_test(test_fallback),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_cut_short),
        cmocka_unit_test(test_regex_refused),
        cmocka_unit_test(test_regex_backtracking),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_template_plain),
        cmocka_unit_test(test_template_default),
        cmocka_unit_test(test_template_branches),
        cmocka_unit_test(test_template_refused),
        cmocka_unit_test(test_template_llama3),
        cmocka_unit_test(test_template_qwen3),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
