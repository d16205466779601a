/* The safetensors container: what is accepted, every way a header can lie, and the writer read back by other code. */
#include "io_fixture.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define TENSOR(name, dtype, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static obm_status parse(const char *header, size_t header_size, size_t n_data, obm__safetensors *out, obm_error *err) {
    size_t size;
    uint8_t *bytes = build_safetensors(header, header_size, NULL, n_data, &size);
    obm_status status = obm__safetensors_parse(bytes, size, "t.safetensors", out, err);
    free(bytes);
    return status;
}

static void release(obm__safetensors *s) {
    for (size_t i = 0; i < s->count; i++) obm_free(s->entries[i].name);
    obm_free(s->entries);
    obm__json_free(s->metadata);
}

static void test_accepted(void **state) {
    (void)state;
    static const struct {
        const char *header;
        size_t data, count;
    } cases[] = {
        {"{}", 0, 0},
        {"{\"__metadata__\":{\"format\":\"pt\"}}", 0, 0},
        {"{\"__metadata__\":null}", 0, 0},
        {"{" TENSOR("a", "F32", "[]", "[0,4]") "}", 4, 1},
        {"{" TENSOR("a", "F32", "[0]", "[0,0]") "}", 0, 1},
        {"{" TENSOR("", "U8", "[1]", "[0,1]") "}", 1, 1},
        {"{" TENSOR("b", "BF16", "[2,3]", "[4,16]") "," TENSOR("a", "F32", "[1]", "[0,4]") "}", 16, 2},
        {"{" TENSOR("b", "U8", "[0]", "[2,2]") "," TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("c", "U8", "[3]",
                                                                                                "[2,5]") "}",
         5, 3},
        {"{" TENSOR("a", "F64", "[1,1,1,1,1,1,1,1]", "[0,8]") "}      \n\t ", 8, 1},
        {"{\"a\":{\"data_offsets\":[0,1],\"more\":[1,{}],\"shape\":[1],\"dtype\":\"F8_E4M3\"}}", 1, 1},
        {"{" TENSOR("\\u00e4\\u0001", "BOOL", "[1]", "[0,1]") "}", 1, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        obm__safetensors s = {0};
        obm_error err;
        if (parse(cases[i].header, strlen(cases[i].header), cases[i].data, &s, &err) != OBM_OK)
            fail_msg("%s: %s", cases[i].header, err.message);
        assert_int_equal(s.count, cases[i].count);
        for (size_t j = 1; j < s.count; j++) assert_true(strcmp(s.entries[j - 1].name, s.entries[j].name) < 0);
        release(&s);
    }
}

static const struct {
    const char *header;
    size_t data;
    obm_status status;
    const char *said;
} hostile[] = {
    /* not a header at all */
    {"", 0, OBM_E_FORMAT, "does not begin with '{'"},
    {" {}", 0, OBM_E_FORMAT, "byte 8"},
    {"[]", 0, OBM_E_FORMAT, "does not begin"},
    {"{", 0, OBM_E_FORMAT, "not valid JSON"},
    {"{}{}", 0, OBM_E_FORMAT, "not valid JSON"},
    {"{\"a\":1}", 0, OBM_E_FORMAT, "tensor a: expected an object, found an integer"},
    {"{\"\xff\":{}}", 0, OBM_E_FORMAT, "not valid JSON"},
    {"{\"a\\u0000\":{}}", 0, OBM_E_FORMAT, "not valid JSON"},
    /* names */
    {"{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("a", "U8", "[1]", "[1,2]") "}", 2, OBM_E_FORMAT, "duplicate"},
    {"{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("\\u0061", "U8", "[1]", "[1,2]") "}", 2, OBM_E_FORMAT,
     "duplicate"},
    /* metadata */
    {"{\"__metadata__\":{\"a\":1}}", 0, OBM_E_FORMAT, "__metadata__.a: expected a string"},
    {"{\"__metadata__\":[]}", 0, OBM_E_FORMAT, "__metadata__: expected an object"},
    /* dtype */
    {"{" TENSOR("a", "F99", "[1]", "[0,1]") "}", 1, OBM_E_FORMAT, "unknown dtype \"F99\""},
    {"{" TENSOR("a", "f32", "[1]", "[0,4]") "}", 4, OBM_E_FORMAT, "unknown dtype"},
    {"{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, OBM_E_FORMAT,
     "dtype: expected a string, found an integer"},
    {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, OBM_E_FORMAT, "dtype: expected a string, found nothing"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, OBM_E_FORMAT, "duplicate"},
    /* shape */
    {"{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, OBM_E_FORMAT, "shape: expected an array, found nothing"},
    {"{" TENSOR("a", "U8", "1", "[0,1]") "}", 1, OBM_E_FORMAT, "shape: expected an array"},
    {"{" TENSOR("a", "U8", "[-1]", "[0,1]") "}", 1, OBM_E_FORMAT, "shape[0]: expected an integer >= 0"},
    {"{" TENSOR("a", "U8", "[1,1.0]", "[0,1]") "}", 1, OBM_E_FORMAT, "shape[1]"},
    {"{" TENSOR("a", "U8", "[\"1\"]", "[0,1]") "}", 1, OBM_E_FORMAT, "shape[0]"},
    {"{" TENSOR("a", "U8", "[null]", "[0,1]") "}", 1, OBM_E_FORMAT, "shape[0]"},
    {"{" TENSOR("a", "U8", "[18446744073709551617]", "[0,1]") "}", 1, OBM_E_FORMAT, "shape[0]"},
    {"{" TENSOR("a", "F32", "[4611686018427387904]", "[0,0]") "}", 0, OBM_E_FORMAT, "product is too large"},
    {"{" TENSOR("a", "U8", "[4294967296,4294967296]", "[0,0]") "}", 0, OBM_E_FORMAT, "product is too large"},
    {"{" TENSOR("a", "U8", "[0,4611686018427387904,8]", "[0,0]") "}", 0, OBM_E_FORMAT, "product is too large"},
    {"{" TENSOR("a", "F32", "[2305843009213693951]", "[0,4]") "}", 4, OBM_E_FORMAT,
     "its shape needs 9223372036854775804 bytes"},
    {"{" TENSOR("a", "U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]") "}", 1, OBM_E_UNSUPPORTED, "9 dimensions"},
    /* offsets of one tensor */
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, OBM_E_FORMAT, "data_offsets: expected two integers"},
    {"{" TENSOR("a", "U8", "[1]", "[0]") "}", 1, OBM_E_FORMAT, "data_offsets: expected two integers"},
    {"{" TENSOR("a", "U8", "[1]", "[0,1,2]") "}", 1, OBM_E_FORMAT, "data_offsets: expected two integers"},
    {"{" TENSOR("a", "U8", "[1]", "[-1,0]") "}", 1, OBM_E_FORMAT, "data_offsets: expected two integers"},
    {"{" TENSOR("a", "U8", "[1]", "[0.0,1]") "}", 1, OBM_E_FORMAT, "data_offsets: expected two integers"},
    {"{" TENSOR("a", "U8", "[1]", "{\"0\":1}") "}", 1, OBM_E_FORMAT, "data_offsets: expected two integers"},
    {"{" TENSOR("a", "U8", "[1]", "[1,0]") "}", 1, OBM_E_FORMAT, "[1, 0] are outside"},
    {"{" TENSOR("a", "U8", "[2]", "[0,2]") "}", 1, OBM_E_FORMAT,
     "truncated, the download or copy may be incomplete: expected 63 bytes, found 62"},
    {"{" TENSOR("a", "U8", "[1]", "[9223372036854775806,9223372036854775807]") "}", 1, OBM_E_FORMAT, "truncated"},
    {"{" TENSOR("a", "U8", "[1]", "[0,2]") "}", 2, OBM_E_FORMAT, "its shape needs 1 bytes, data_offsets hold 2"},
    {"{" TENSOR("a", "F32", "[1]", "[0,2]") "}", 2, OBM_E_FORMAT, "its shape needs 4 bytes"},
    /* offsets of all tensors together */
    {"{}", 1, OBM_E_FORMAT, "cover 0 bytes, the file holds 1"},
    {"{" TENSOR("a", "U8", "[1]", "[0,1]") "}", 2, OBM_E_FORMAT, "cover 1 bytes, the file holds 2"},
    {"{" TENSOR("a", "U8", "[1]", "[1,2]") "}", 2, OBM_E_FORMAT,
     "starts at byte 1 of the data, expected 0 (bytes that belong"},
    {"{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("b", "U8", "[1]", "[2,3]") "}", 3, OBM_E_FORMAT,
     "tensor b starts at byte 2"},
    {"{" TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("b", "U8", "[2]", "[1,3]") "}", 3, OBM_E_FORMAT,
     "overlaps another"},
    {"{" TENSOR("a", "U8", "[2]", "[0,2]") "," TENSOR("b", "U8", "[2]", "[0,2]") "}", 2, OBM_E_FORMAT,
     "overlaps another"},
    {"{" TENSOR("a", "U8", "[4]", "[0,4]") "," TENSOR("b", "U8", "[0]", "[2,2]") "}", 4, OBM_E_FORMAT,
     "overlaps another"},
    {"{" TENSOR("a", "U8", "[0]", "[1,1]") "}", 0, OBM_E_FORMAT, "truncated"},
};

static void test_hostile_headers(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        obm__safetensors s = {.count = 99};
        obm_error err;
        obm_status status = parse(hostile[i].header, strlen(hostile[i].header), hostile[i].data, &s, &err);
        if (status != hostile[i].status) fail_msg("%s gave %s", hostile[i].header, obm_status_name(status));
        if (!strstr(err.message, hostile[i].said) || strncmp(err.message, "t.safetensors: ", 15) != 0)
            fail_msg("%s: expected \"%s\" in \"%s\"", hostile[i].header, hostile[i].said, err.message);
        assert_int_equal(s.count, 99);
        assert_int_equal(parse(hostile[i].header, strlen(hostile[i].header), hostile[i].data, &s, NULL), status);
    }
}

static void test_header_length(void **state) {
    (void)state;
    uint8_t bytes[16] = {2, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
    obm__safetensors s;
    obm_error err;
    assert_int_equal(obm__safetensors_parse(bytes, 10, "t", &s, &err), OBM_OK);
    release(&s);
    for (int i = 1; i < 8; i++) { /* every byte of the length counts */
        bytes[i] = 0xff;
        assert_int_equal(obm__safetensors_parse(bytes, 10, "t", &s, &err), OBM_E_FORMAT);
        bytes[i] = 0;
    }
    memset(bytes, 0xff, 8);
    assert_int_equal(obm__safetensors_parse(bytes, 10, "t", &s, &err), OBM_E_FORMAT);
    assert_non_null(strstr(err.message, "a header of 18446744073709551615 bytes is announced, at most 100000000"));
}

static void test_deep_header(void **state) {
    (void)state;
    enum { DEPTH = 50000 };
    static char header[5 + DEPTH];
    memcpy(header, "{\"a\":", 5);
    memset(header + 5, '[', DEPTH);
    obm__safetensors s;
    assert_int_equal(parse(header, sizeof header, 0, &s, NULL), OBM_E_FORMAT);
}

#define SMALL \
    "{\"__metadata__\":{\"k\":\"v\"}," TENSOR("w", "BF16", "[2,2]", "[0,8]") "," TENSOR("b", "F32", "[1]", "[8,12]") "}"

/* A copy of exactly the prefix's size, so that a sanitizer sees any read beyond it. */
static void test_every_truncation(void **state) {
    (void)state;
    size_t size;
    uint8_t *whole = build_safetensors(SMALL, strlen(SMALL), NULL, 12, &size);
    obm__safetensors s;
    for (size_t n = 0; n < size; n++) {
        uint8_t *cut = malloc(n ? n : 1);
        assert_non_null(cut);
        memcpy(cut, whole, n);
        assert_int_equal(obm__safetensors_parse(cut, n, "t", &s, NULL), OBM_E_FORMAT);
        free(cut);
    }
    whole[size] = 0;
    assert_int_equal(obm__safetensors_parse(whole, size + 1, "t", &s, NULL), OBM_E_FORMAT);
    assert_int_equal(obm__safetensors_parse(whole, size, "t", &s, NULL), OBM_OK);
    assert_string_equal(obm__json_string(obm__json_get(s.metadata, "k")), "v");
    release(&s);
    free(whole);
}

/* Any single bit flipped in length and header: accepted or refused, never a crash or a read beyond the end. */
static void test_every_bit_flip(void **state) {
    (void)state;
    size_t size, accepted = 0;
    uint8_t *bytes = build_safetensors(SMALL, strlen(SMALL), NULL, 12, &size);
    for (size_t bit = 0; bit < 8 * (size - 12); bit++) {
        obm__safetensors s;
        bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        if (obm__safetensors_parse(bytes, size, "t", &s, NULL) == OBM_OK) {
            for (size_t i = 0; i < s.count; i++) assert_true((const uint8_t *)s.entries[i].t.data >= bytes);
            release(&s);
            accepted++;
        }
        bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    assert_in_range(accepted, 1, 8 * 16); /* letters of names, keys that are ignored, "k" and "v" */
    free(bytes);
}

/* The data part of a file with an odd header starts at an odd address; every reader must cope. */
static void test_unaligned(void **state) {
    (void)state;
    const float f32[3] = {1.5f, -2.0f, 0.25f};
    const double f64[3] = {1.5, -2.0, 0.25};
    const uint16_t f16[3] = {0x3e00, 0xc000, 0x3400}, bf16[3] = {0x3fc0, 0xc000, 0x3e80};
    const struct {
        const char *dtype;
        const void *data;
        size_t size;
    } cases[] = {
        {"F32", f32, sizeof f32}, {"F64", f64, sizeof f64}, {"F16", f16, sizeof f16}, {"BF16", bf16, sizeof bf16}};
    for (size_t i = 0; i < 4; i++) {
        for (int pad = 0; pad < 8; pad++) {
            char header[200];
            snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%zu]}}%*s",
                     cases[i].dtype, cases[i].size, pad, "");
            put_safetensors(in_dir("u.safetensors"), header, cases[i].data, cases[i].size);
            obm__safetensors *s;
            assert_int_equal(obm__safetensors_open(in_dir("u.safetensors"), &s, NULL), OBM_OK);
            float out[3];
            assert_int_equal(obm_tensor_read_f32(&s->entries[0].t, 0, 3, out, NULL), OBM_OK);
            assert_memory_equal(out, f32, sizeof f32);
            assert_int_equal(obm_tensor_read_f32(&s->entries[0].t, 1, 2, out, NULL), OBM_OK);
            assert_memory_equal(out, f32 + 1, 2 * sizeof *f32);
            obm__safetensors_free(s);
        }
    }
}

/* The kernels that are handed file data directly give the same bits at odd addresses, on every ISA. */
static void test_unaligned_kernels(void **state) {
    (void)state;
    enum { ROWS = 5, N = 83 };
    static uint16_t w16[ROWS * N];
    static float w32[ROWS * N], x[N];
    static uint8_t moved[sizeof w32 + 8];
    for (size_t i = 0; i < ROWS * N; i++)
        w16[i] = (uint16_t)(0x3c00 + i * 7919 % 500), w32[i] = (float)(i * 7919 % 500) - 250.0f;
    for (size_t i = 0; i < N; i++) x[i] = 1.0f / (float)(i + 1);
    for (const obm_kernels *const *k = obm_kernels_list(); *k; k++) {
        float expected[3][ROWS], wide[2][ROWS * N], y[ROWS], out[ROWS * N];
        (*k)->rows_bf16(expected[0], w16, N, ROWS, x, N);
        (*k)->rows_f16(expected[1], w16, N, ROWS, x, N);
        (*k)->rows_f32(expected[2], w32, N, ROWS, x, N);
        (*k)->bf16_to_f32(wide[0], w16, ROWS * N);
        (*k)->f16_to_f32(wide[1], w16, ROWS * N);
        for (size_t shift = 1; shift < 8; shift++) {
            const void *at = moved + shift;
            memcpy(moved + shift, w16, sizeof w16);
            (*k)->rows_bf16(y, at, N, ROWS, x, N);
            assert_memory_equal(y, expected[0], sizeof y);
            (*k)->rows_f16(y, at, N, ROWS, x, N);
            assert_memory_equal(y, expected[1], sizeof y);
            (*k)->bf16_to_f32(out, at, ROWS * N);
            assert_memory_equal(out, wide[0], sizeof out);
            (*k)->f16_to_f32(out, at, ROWS * N);
            assert_memory_equal(out, wide[1], sizeof out);
            memcpy(moved + shift, w32, sizeof w32);
            (*k)->rows_f32(y, at, N, ROWS, x, N);
            assert_memory_equal(y, expected[2], sizeof y);
        }
    }
}

static void test_open(void **state) {
    (void)state;
    obm__safetensors *s = (obm__safetensors *)&s;
    obm_error err;
    assert_int_equal(obm__safetensors_open(in_dir("absent.safetensors"), &s, &err), OBM_E_IO);
    assert_non_null(strstr(err.message, "absent.safetensors: No such file"));
    assert_int_not_equal(err.os_errno, 0);
    assert_int_equal(obm__safetensors_open(fixture_dir, &s, &err), OBM_E_IO);
    assert_non_null(strstr(err.message, "is a folder"));
    assert_int_equal(mkfifo(in_dir("pipe"), 0600), 0);
    assert_int_equal(obm__safetensors_open(in_dir("pipe"), &s, &err), OBM_E_IO);
    put_text(in_dir("empty"), "");
    assert_int_equal(obm__safetensors_open(in_dir("empty"), &s, &err), OBM_E_FORMAT);
    assert_non_null(strstr(err.message, "found 0 bytes"));
    assert_ptr_equal(s, &s);
    put_safetensors(in_dir("ok.safetensors"), SMALL, NULL, 12);
    assert_int_equal(obm__safetensors_open(in_dir("ok.safetensors"), &s, &err), OBM_OK);
    assert_null(obm__safetensors_find(s, "nope"));
    const obm__st_entry *e = obm__safetensors_find(s, "w");
    assert_non_null(e);
    assert_int_equal(e->t.dtype, OBM_BF16);
    assert_int_equal(e->t.ndim, 2);
    assert_int_equal(e->t.shape[1], 2);
    assert_memory_equal(e->t.data, ((uint8_t[]){0, 1, 2, 3, 4, 5, 6, 7}), 8);
    assert_memory_equal(obm__safetensors_find(s, "b")->t.data, ((uint8_t[]){8, 9, 10, 11}), 4);
    obm__safetensors_free(s);
}

/* ---- writing ---- */

static int entries_in_dir(const char *part) {
    char command[256];
    snprintf(command, sizeof command, "ls -A %s | grep -c -F -- '%s'", fixture_dir, part);
    FILE *f = popen(command, "r");
    int n = -1;
    if (!f || fscanf(f, "%d", &n) != 1) n = -1;
    if (f) pclose(f);
    return n;
}

static obm__st_writer *writer_of_three(const char *path) {
    obm__st_writer *w;
    assert_int_equal(obm__st_writer_new(path, &w, NULL), OBM_OK);
    assert_int_equal(obm__st_writer_declare(w, "z", OBM_F32, 1, (int64_t[]){2}, NULL), OBM_OK);
    assert_int_equal(obm__st_writer_declare(w, "empty", OBM_I64, 2, (int64_t[]){0, 5}, NULL), OBM_OK);
    assert_int_equal(obm__st_writer_declare(w, "a\xc3\xa4", OBM_U8, 0, NULL, NULL), OBM_OK);
    assert_int_equal(obm__st_writer_metadata(w, "format", "pt", NULL), OBM_OK);
    return w;
}

static void test_write(void **state) {
    (void)state;
    const char *path = in_dir("written.safetensors");
    obm__st_writer *w = writer_of_three(path);
    obm_error err;
    assert_int_equal(obm__st_writer_begin(w, &err), OBM_OK);
    assert_int_equal(obm__st_writer_write(w, "\1\2\3", 3, &err), OBM_OK);
    assert_int_equal(obm__st_writer_write(w, "\4\5\6\7\10\11", 6, &err), OBM_OK);
    assert_int_equal(access(path, F_OK), -1);
    char hash[33], again[33];
    uint64_t size = obm__st_writer_size(w);
    assert_int_equal(obm__st_writer_finish(w, hash, &err), OBM_OK);
    obm__st_writer_free(w);
    assert_int_equal(entries_in_dir("written.safetensors.tmp"), 0);

    char *bytes;
    size_t n;
    assert_int_equal(obm__file_read(path, &bytes, &n, NULL), OBM_OK);
    assert_int_equal(n, size);
    obm__xxh3_of(bytes, n, again);
    assert_string_equal(hash, again);
    size_t header = (uint8_t)bytes[0] + 256u * (uint8_t)bytes[1];
    assert_int_equal((8 + header) % 64, 0);
    assert_int_equal(n, 8 + header + 9);
    static const char expected[] = "{\"__metadata__\": {\"format\": \"pt\"}, "
                                   "\"z\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}, "
                                   "\"empty\": {\"dtype\": \"I64\", \"shape\": [0, 5], \"data_offsets\": [8, 8]}, "
                                   "\"a\xc3\xa4\": {\"dtype\": \"U8\", \"shape\": [], \"data_offsets\": [8, 9]}}";
    assert_memory_equal(bytes + 8, expected, sizeof expected - 1);
    for (size_t i = sizeof expected - 1; i < header; i++) assert_int_equal(bytes[8 + i], ' ');
    assert_memory_equal(bytes + 8 + header, "\1\2\3\4\5\6\7\10\11", 9);
    obm_free(bytes);
}

static void test_write_misuse(void **state) {
    (void)state;
    const char *path = in_dir("misused.safetensors");
    obm__st_writer *w = writer_of_three(path);
    obm_error err;
    assert_int_equal(obm__st_writer_write(w, "x", 1, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_finish(w, NULL, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_declare(w, "n", OBM_F32, 1, (int64_t[]){-1}, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_declare(w, "n", OBM_F32, 9, (int64_t[9]){0}, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_declare(w, "n", (obm_dtype)99, 1, (int64_t[]){1}, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_declare(w, "n", OBM_F64, 2, (int64_t[]){INT64_MAX, 3}, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_begin(w, &err), OBM_OK);
    assert_int_equal(obm__st_writer_begin(w, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_declare(w, "n", OBM_F32, 1, (int64_t[]){1}, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_write(w, "0123456789", 10, &err), OBM_E_ARG);
    assert_int_equal(obm__st_writer_write(w, "01234567", 8, &err), OBM_OK);
    assert_int_equal(obm__st_writer_finish(w, NULL, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "8 of 9 declared bytes"));
    assert_int_equal(entries_in_dir("misused.safetensors"), 1);
    obm__st_writer_free(w);
    assert_int_equal(entries_in_dir("misused.safetensors"), 0);

    w = writer_of_three(path);
    assert_int_equal(obm__st_writer_declare(w, "z", OBM_F32, 1, (int64_t[]){1}, &err), OBM_OK);
    assert_int_equal(obm__st_writer_begin(w, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "tensor z: the name is taken"));
    obm__st_writer_free(w);
    assert_int_equal(entries_in_dir("misused.safetensors"), 0);
}

/* ---- plain files ---- */

static void test_files(void **state) {
    (void)state;
    obm_error err;
    char *text;
    size_t size;
    const char *path = in_dir("a/b//c/file.txt");
    assert_int_equal(obm__file_write(path, "x", 1, &err), OBM_E_IO);
    assert_int_equal(obm__make_directory(in_dir("a/b//c/"), &err), OBM_OK);
    assert_int_equal(obm__make_directory(in_dir("a/b//c/"), &err), OBM_OK);
    assert_int_equal(obm__file_write(path, "one", 3, &err), OBM_OK);
    assert_int_equal(obm__file_write(path, "second\0", 7, &err), OBM_OK);
    assert_int_equal(obm__file_read(path, &text, &size, &err), OBM_OK);
    assert_int_equal(size, 7);
    assert_memory_equal(text, "second\0\0", 8);
    obm_free(text);
    assert_true(obm__file_exists(path));
    assert_false(obm__file_exists(in_dir("a")));
    assert_true(obm__is_directory(in_dir("a")));
    assert_int_equal(obm__make_directory(in_dir("a/b/c/file.txt/d"), &err), OBM_E_IO);
    assert_int_equal(obm__make_directory(in_dir("a/b/c/file.txt"), &err), OBM_E_IO);
    char *joined = obm__path_join("/x/", "y"), *dir = obm__path_directory("/y"), *bare = obm__path_directory("y");
    assert_string_equal(joined, "/x/y");
    assert_string_equal(dir, "/");
    assert_string_equal(bare, ".");
    obm_free(joined), obm_free(dir), obm_free(bare);
}

static size_t files_in(const char *dir) {
    size_t n = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
    if (d) closedir(d);
    return n;
}

/* What does not fit says so before anything of it is written, or, where a file system reserves nothing, with the write.
 */
static void test_no_room(void **state) {
    (void)state;
    const int64_t shape[1] = {1 << 20};
    static const uint8_t bytes[1 << 20];
    struct rlimit before;
    obm__st_writer *w;
    obm_error err;
    char dir[512], path[600];
    snprintf(dir, sizeof dir, "%s", in_dir("no room"));
    snprintf(path, sizeof path, "%s/a.safetensors", dir);
    assert_int_equal(mkdir(dir, 0700), 0);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &(struct rlimit){4096, before.rlim_max}), 0);
    assert_int_equal(obm__st_writer_new(path, &w, &err), OBM_OK);
    assert_int_equal(obm__st_writer_declare(w, "t", OBM_U8, 1, shape, &err), OBM_OK);
    obm_status status = obm__st_writer_begin(w, &err);
    if (status == OBM_OK) status = obm__st_writer_write(w, bytes, sizeof bytes, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, handler);
    assert_int_equal(status, OBM_E_IO);
    assert_non_null(strstr(err.message, "cannot write"));
    assert_non_null(strstr(err.message, "File too large"));
    obm__st_writer_free(w);
    assert_int_equal(files_in(dir), 0);
}

/* As long as what was declared, whatever was reserved, and only that. */
static void test_reserved_size(void **state) {
    (void)state;
    const int64_t shape[1] = {100000};
    static const uint8_t bytes[100000] = {1};
    obm__st_writer *w;
    struct stat st;
    obm_error err;
    assert_int_equal(obm__st_writer_new(in_dir("reserved"), &w, &err), OBM_OK);
    assert_int_equal(obm__st_writer_declare(w, "t", OBM_U8, 1, shape, &err), OBM_OK);
    assert_int_equal(obm__st_writer_begin(w, &err), OBM_OK);
    uint64_t size = obm__st_writer_size(w);
    assert_int_equal(obm__st_writer_write(w, bytes, sizeof bytes, &err), OBM_OK);
    assert_int_equal(obm__st_writer_finish(w, NULL, &err), OBM_OK);
    obm__st_writer_free(w);
    assert_int_equal(stat(in_dir("reserved"), &st), 0);
    assert_int_equal(st.st_size, size);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accepted),
        cmocka_unit_test(test_hostile_headers),
        cmocka_unit_test(test_header_length),
        cmocka_unit_test(test_deep_header),
        cmocka_unit_test(test_every_truncation),
        cmocka_unit_test(test_every_bit_flip),
        cmocka_unit_test(test_unaligned),
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_write),
        cmocka_unit_test(test_write_misuse),
        cmocka_unit_test(test_no_room),
        cmocka_unit_test(test_reserved_size),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_unaligned_kernels),
    };
    return cmocka_run_group_tests(tests, fixture_make, fixture_remove);
}
