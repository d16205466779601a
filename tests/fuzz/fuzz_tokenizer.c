/* Bytes as a tokenizer.json: refused with a message, or opened and then able to encode and decode without a crash or a
 * hang. */
#include "text/stream.h"
#include "text/text.h"

#include <stdlib.h>
#include <string.h>

#define MAX_INPUT 65536 /* compiling many regexes is slow, not interesting */

/* Every step of a stream gives whole characters. */
static void stream(const obm_tokenizer *t, const int32_t *ids, size_t n) {
    obm__decode_stream *s = NULL;
    const char *text;
    size_t len;
    if (obm__decode_stream_new(t, false, &s, NULL) != OBM_OK) return;
    for (size_t i = 0; i <= n; i++) {
        obm_status status = i < n ? obm__decode_stream_push(s, ids[i], &text, &len, NULL)
                                  : obm__decode_stream_flush(s, &text, &len, NULL);
        if (status != OBM_OK) break;
        if (obm__utf8_check(text, len) != len) abort();
    }
    obm__decode_stream_free(s);
}

/* Ids that no text gives: all of a small vocabulary, in order and backwards. */
static void any_order(const obm_tokenizer *t) {
    int32_t ids[512];
    size_t size = obm_tokenizer_size(t), n = size < 256 ? size : 256, len = 0;
    char *text = NULL;
    for (size_t i = 0; i < n; i++) {
        ids[i] = (int32_t)i;
        ids[2 * n - 1 - i] = (int32_t)i;
    }
    stream(t, ids, 2 * n);
    if (obm_tokenizer_decode(t, ids, 2 * n, true, &text, &len, NULL) == OBM_OK && obm__utf8_check(text, len) != len)
        abort();
    obm_free(text);
}

static void round_trip(const obm_tokenizer *t, const char *text, size_t n) {
    int32_t *ids = NULL;
    size_t count = 0, len = 0;
    char *back = NULL;
    if (obm_tokenizer_encode(t, text, n, true, &ids, &count, NULL) != OBM_OK) return;
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || (size_t)ids[i] >= obm_tokenizer_size(t)) abort();
    }
    if (obm_tokenizer_decode(t, ids, count, false, &back, &len, NULL) == OBM_OK && obm__utf8_check(back, len) != len)
        abort();
    stream(t, ids, count);
    obm_free(back);
    obm_free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const texts[] = {"", "Hello, it's 1234 o'clock\n\n  x\t",
                                        "e\xcc\x81\xe4\xbd\xa0\xf0\x9f\x98\x80 <|im_start|>",
                                        "aaaaaaaaaaaaaaaaaaaaaaaa          "};
    obm_tokenizer *t = NULL;
    obm_error err;
    if (size > MAX_INPUT) return 0;
    if (obm__tokenizer_parse((const char *)data, size, "fuzz", &t, &err) != OBM_OK) return 0;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) round_trip(t, texts[i], strlen(texts[i]));
    any_order(t);
    obm_tokenizer_free(t);
    return 0;
}
