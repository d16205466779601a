/* Decoding while ids arrive: what comes out is whole characters, and in the end what obm_tokenizer_decode gives.  The one
 * exception: of a run of <0x..> pieces that is ill-formed, obm_tokenizer_decode (as the tokenizers library) makes U+FFFD for
 * every byte, when the stream has given the characters that it began with. */
#ifndef OBM_TEXT_STREAM_H
#define OBM_TEXT_STREAM_H

#include "../sys/sys.h"

typedef struct obm__decode_stream obm__decode_stream;   /* one thread at a time; borrows the tokenizer */

obm_status obm__decode_stream_new(const obm_tokenizer *t, bool skip_special, obm__decode_stream **out, obm_error *err);
void obm__decode_stream_free(obm__decode_stream *s);
/* *text (NUL-terminated, borrowed until the next call) is what this id completes, often nothing.  Errors: ARG, NOMEM. */
obm_status obm__decode_stream_push(obm__decode_stream *s, int32_t id, const char **text, size_t *len, obm_error *err);
/* The rest: a character cut short comes out as U+FFFD.  The stream is then as new. */
obm_status obm__decode_stream_flush(obm__decode_stream *s, const char **text, size_t *len, obm_error *err);

#endif
