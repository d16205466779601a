/* Hashes against published vectors: NIST CAVP / FIPS 180-4 examples for SHA-256, xxhsum for XXH3-128. */
#include "io/io.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void sha256_is(const void *bytes, size_t n, const char *expected) {
    char hex[65];
    assert_int_equal(obm__sha256_of(bytes, n, NULL, hex, NULL), OBM_OK);
    assert_string_equal(hex, expected);
}

static void test_sha256_short(void **state) {
    (void)state;
    sha256_is(NULL, 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    sha256_is("\xd3", 1, "28969cdfa74a12c82f3bad960b0b000aca2ac329deea5c2328ebc6f2ba9802c1");
    sha256_is("abc", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    sha256_is("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56,
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    sha256_is("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrst"
              "nopqrstu",
              112, "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
}

static void test_sha256_million(void **state) {
    (void)state;
    static char a[1000000];
    memset(a, 'a', sizeof a);
    sha256_is(a, sizeof a, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/* Lengths around the block and around the room for the length; values from hashlib. */
static void test_sha256_padding(void **state) {
    (void)state;
    char a[128];
    memset(a, 'a', sizeof a);
    sha256_is(a, 55, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318");
    sha256_is(a, 63, "7d3e74a05d7db15bce4ad9ec0658ea98e3f06eeecf16b4c6fff2da457ddc2f34");
    sha256_is(a, 64, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
    sha256_is(a, 119, "31eba51c313a5c08226adf18d4a359cfdfd8d2e816b13f4af952f7ea6584dcfb");
    sha256_is(a, 120, "2f3d335432c70b580af0e8e1b3674a7c020d683aa5f73aaaedfdc55af904c21c");
}

static void test_xxh3(void **state) {
    (void)state;
    char hex[33], streamed[33];
    obm__xxh3_of(NULL, 0, hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    obm__xxh3_of("abc", 3, hex);
    assert_string_equal(hex, "06b05ab6733a618578af5f94892f3950");
    static uint8_t bytes[100003];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(i * 2654435761u >> 24);
    obm__xxh3_of(bytes, sizeof bytes, hex);
    for (size_t step = 1; step < 70000; step = 3 * step + 1) {
        obm__xxh3 *h = obm__xxh3_new();
        assert_non_null(h);
        for (size_t at = 0; at < sizeof bytes; at += step)
            obm__xxh3_add(h, bytes + at, at + step < sizeof bytes ? step : sizeof bytes - at);
        obm__xxh3_add(h, NULL, 0);
        obm__xxh3_end(h, streamed);
        assert_string_equal(streamed, hex);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sha256_short),
        cmocka_unit_test(test_sha256_million),
        cmocka_unit_test(test_sha256_padding),
        cmocka_unit_test(test_xxh3),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
