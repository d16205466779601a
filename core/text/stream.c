/* Decoding while ids arrive: bytes wait until they make up whole characters. */
#include "stream.h"
#include "text.h"

#include <string.h>

struct obm__decode_stream {
    const obm_tokenizer *tokenizer;
    bool skip_special;
    obm__buffer bytes; /* of pieces, not yet decoded: at most 3 between calls */
    obm__buffer text;  /* what the last call returned */
};

obm_status obm__decode_stream_new(const obm_tokenizer *t, bool skip_special, obm__decode_stream **out, obm_error *err) {
    obm__decode_stream *s = obm__calloc(1, sizeof *s);
    if (!s) return obm__fail_nomem(err, sizeof *s);
    s->tokenizer = t;
    s->skip_special = skip_special;
    *out = s;
    return OBM_OK;
}

void obm__decode_stream_free(obm__decode_stream *s) {
    if (!s) return;
    obm__buffer_free(&s->bytes);
    obm__buffer_free(&s->text);
    obm_free(s);
}

static obm_status decode(obm__decode_stream *s, bool final, const char **text, size_t *len, obm_error *err) {
    s->text.size = 0;
    obm__buffer_add(&s->text, "", 0);
    size_t used = s->bytes.size ? obm__utf8_lossy(s->bytes.data, s->bytes.size, final, &s->text) : 0;
    if (s->text.failed) return obm__fail_nomem(err, s->bytes.size);
    s->bytes.size -= used;
    if (used) memmove(s->bytes.data, s->bytes.data + used, s->bytes.size);
    *text = s->text.data;
    *len = s->text.size;
    return OBM_OK;
}

obm_status obm__decode_stream_push(obm__decode_stream *s, int32_t id, const char **text, size_t *len, obm_error *err) {
    OBM_TRY(obm__tokenizer_bytes(s->tokenizer, id, s->skip_special, &s->bytes, err));
    return decode(s, false, text, len, err);
}

obm_status obm__decode_stream_flush(obm__decode_stream *s, const char **text, size_t *len, obm_error *err) {
    return decode(s, true, text, len, err);
}
