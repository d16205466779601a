/* Decoding while ids arrive: bytes wait until they make up whole characters. */
#include "stream.h"
#include "text.h"

struct obm__decode_stream {
    const obm_tokenizer *tokenizer;
    bool skip_special;
    obm__decoding *decoding;
    obm__buffer text; /* what the last call returned */
};

obm_status obm__decode_stream_new(const obm_tokenizer *t, bool skip_special, obm__decode_stream **out, obm_error *err) {
    obm__decode_stream *s = obm__calloc(1, sizeof *s);
    if (!s) return obm__fail_nomem(err, sizeof *s);
    s->tokenizer = t;
    s->skip_special = skip_special;
    obm_status status = obm__decoding_new(&t->decoder, true, &s->decoding, err);
    if (status == OBM_OK)
        *out = s;
    else
        obm__decode_stream_free(s);
    return status;
}

void obm__decode_stream_free(obm__decode_stream *s) {
    if (!s) return;
    obm__decoding_free(s->decoding);
    obm__buffer_free(&s->text);
    obm_free(s);
}

static obm_status start(obm__decode_stream *s, obm_error *err) {
    s->text.size = 0;
    obm__buffer_add(&s->text, "", 0);
    return s->text.failed ? obm__fail_nomem(err, 1) : OBM_OK;
}

obm_status obm__decode_stream_push(obm__decode_stream *s, int32_t id, const char **text, size_t *len, obm_error *err) {
    OBM_TRY(start(s, err));
    OBM_TRY(obm__tokenizer_push(s->tokenizer, s->decoding, id, s->skip_special, &s->text, err));
    *text = s->text.data;
    *len = s->text.size;
    return OBM_OK;
}

obm_status obm__decode_stream_flush(obm__decode_stream *s, const char **text, size_t *len, obm_error *err) {
    OBM_TRY(start(s, err));
    OBM_TRY(obm__decoding_end(s->decoding, &s->text, err));
    *text = s->text.data;
    *len = s->text.size;
    return OBM_OK;
}
