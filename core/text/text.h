/* Text to ids and back: what the files of core/text share, and what generation uses of it (special ids, streaming). */
#ifndef OBM_TEXT_H
#define OBM_TEXT_H

#include "../io/json.h"
#include "../sys/sys.h"

/* ---- unicode.c: the only file that includes utf8proc.h ---- */

/* Offset of the first byte that is not part of well-formed UTF-8 (RFC 3629), or n. */
size_t obm__utf8_check(const char *s, size_t n);
/* Code point at s and its length in bytes; s must be well-formed and n > 0. */
uint32_t obm__utf8_next(const char *s, size_t n, size_t *len);
/* Appends s with every maximal ill-formed subpart replaced by U+FFFD (Unicode 16, section 3.9, as Rust's from_utf8_lossy) and
 * returns the bytes used: all of them with `final`, else all but a character that may still be completed. */
size_t obm__utf8_lossy(const char *s, size_t n, bool final, obm__buffer *out);
bool obm__is_space(uint32_t c);   /* White_Space */
bool obm__is_word(uint32_t c);    /* \w of UTS 18: Alphabetic, Mark, Decimal_Number, Connector_Punctuation, Join_Control */
bool obm__is_punctuation(uint32_t c);   /* ASCII punctuation and category P as of Unicode 8, as in the tokenizers library */
void obm__put_char(uint32_t c, obm__buffer *out);
/* Both append; both equal the tokenizers library on every code point, whose tables are of other Unicode versions. */
void obm__lowercase(const char *s, size_t n, obm__buffer *out);   /* simple case mapping, and U+0130 to two */
typedef enum obm__form { OBM__NFC, OBM__NFD, OBM__NFKC, OBM__NFKD } obm__form;
obm_status obm__normal_form(obm__form form, const char *s, size_t n, obm__buffer *out, obm_error *err);

/* ---- regex.c: the only file that includes pcre2.h ---- */

/* A compiled pattern in the dialect of tokenizer.json (Oniguruma, Ruby syntax).  Immutable, share freely. */
typedef struct obm__regex obm__regex;
/* `where` names the source in messages.  Errors: FORMAT, UNSUPPORTED (constructs whose meaning differs), NOMEM. */
obm_status obm__regex_new(const char *pattern, size_t n, const char *where, obm__regex **out, obm_error *err);
/* The same for one that meets a few short texts: it is not compiled to machine code. */
obm_status obm__regex_new_rare(const char *pattern, size_t n, const char *where, obm__regex **out, obm_error *err);
obm_status obm__regex_new_literal(const char *text, size_t n, const char *where, obm__regex **out, obm_error *err);
void obm__regex_free(obm__regex *r);

/* What one thread needs to match; any number of patterns. */
typedef struct obm__matching obm__matching;
obm__matching *obm__matching_new(obm__pulse *pulse);   /* NULL: out of memory; pulse: borrowed, nullable */
obm_status obm__matching_look(obm__matching *m, obm_error *err);   /* at the pulse, every 1024th call; m nullable */
void obm__matching_free(obm__matching *m);
/* The first match in s[start, n); s is well-formed UTF-8.  Errors: FORMAT (the pattern backtracks without bound), NOMEM. */
obm_status obm__regex_find(const obm__regex *r, obm__matching *m, const char *s, size_t n, size_t start, bool *found,
                           size_t *begin, size_t *end, obm_error *err);

/* ---- split.c: cutting a text into words ---- */

typedef struct obm__span { size_t begin, end; } obm__span;
typedef struct obm__spans { obm__span *at; size_t count, capacity; } obm__spans;   /* zero-initialise */
bool obm__spans_add(obm__spans *s, size_t begin, size_t end);                       /* false: out of memory */
void obm__spans_free(obm__spans *s);

typedef enum obm__behavior {
    OBM__ISOLATED, OBM__REMOVED, OBM__MERGED_WITH_PREVIOUS, OBM__MERGED_WITH_NEXT, OBM__CONTIGUOUS
} obm__behavior;
typedef enum obm__cut_by {
    OBM__BY_REGEX, OBM__BY_SPACE, OBM__BY_PUNCTUATION,   /* a match is one character */
    OBM__BY_WORDS                                         /* \w+|[^\w\s]+ of Rust's regex crate */
} obm__cut_by;
typedef struct obm__split { obm__cut_by by; obm__regex *regex; obm__behavior behavior; bool invert; } obm__split;
/* The next match at or after *at as the library counts them: an empty one right behind the one before does not count.
 * Begin with {0}. */
typedef struct obm__matches { size_t at, done; bool matched; } obm__matches;
obm_status obm__matches_next(obm__matches *i, const obm__split *split, obm__matching *m, const char *s, size_t n, bool *found,
                             obm__span *match, obm_error *err);
/* Cuts text[span] and appends the non-empty parts, with the pattern seeing nothing outside of the span. */
obm_status obm__split_apply(const obm__split *split, obm__matching *m, const char *text, obm__span span, obm__spans *out,
                            obm_error *err);

/* ---- vocab.c: pieces by id, ids by piece ---- */

typedef struct obm__piece {
    const char *text;   /* NUL-terminated; NULL: no piece has this id */
    uint32_t len;
    bool in_model;      /* part of the BPE vocabulary, not only an added token */
    bool special;
    const char *decoded;   /* what it stands for in decoding where that is not `text`: an added token's normalized form */
    uint32_t decoded_len;
} obm__piece;
typedef struct obm__vocab {
    obm__piece *pieces;   // (size,), by id
    size_t size;
    int32_t *slots;       // open addressing, -1 free
    size_t mask;
    char **blocks;        /* the pieces' bytes */
    size_t n_blocks;
} obm__vocab;
/* From {"piece": id, ...} and the added tokens' array (nullable), whose ids must agree where both name a piece. */
obm_status obm__vocab_load(obm__vocab *v, const obm_json *model, const obm_json *added, const char *where, obm_error *err);
void obm__vocab_free(obm__vocab *v);
int32_t obm__vocab_find(const obm__vocab *v, const char *text, size_t len);   /* -1: none */
int32_t obm__vocab_find_in_model(const obm__vocab *v, const char *text, size_t len);   /* added tokens do not count */

/* An expert's ids mean what the base's do: of the ids below `rows`, those that both vocabularies name have the same piece.
 * MISMATCH names the expert (`task`), the id and both pieces; `where` is the expert's file. */
obm_status obm__vocab_check(const obm__vocab *base, const obm__vocab *own, int64_t rows, const char *task, const char *where,
                            obm_error *err);

/* ---- eos.c ---- */

/* "eos_token_id" of a config.json or generation_config.json: an id or a list.  *ids owned; absent or null leaves both
 * outputs as they are.  -1 (never) may stand in it. */
obm_status obm__eos_read(const obm_json *config, const char *where, int32_t **ids, size_t *n, obm_error *err);

/* ---- bpe.c ---- */

typedef struct obm__ids { int32_t *data; size_t count, capacity; bool failed; } obm__ids;   /* zero-initialise */
void obm__ids_add(obm__ids *ids, int32_t id);

/* GPT-2's bijection between bytes and printable characters. */
size_t obm__byte_to_char(uint8_t byte, char out[2]);   /* returns the length, 1 or 2 */
int obm__char_to_byte(uint32_t c);                     /* -1: not in the alphabet */

typedef struct obm__merge { uint64_t pair; uint32_t rank; int32_t id; } obm__merge;
typedef struct obm__bpe {
    const obm__vocab *vocab;
    obm__merge *merges;     // open addressing by pair, rank UINT32_MAX free
    size_t mask;
    int32_t byte_ids[256];  /* id of the one-byte piece, -1 if the vocabulary lacks it */
    int32_t fallback[256];  /* id of <0x00> ... <0xFF>, -1 if the vocabulary lacks it or byte_fallback is off */
    int32_t unk;            /* -1: what has no piece is dropped, as the tokenizers library does */
    bool bytes;             /* symbols are bytes (a ByteLevel pre-tokenizer), else characters */
    bool fuse_unk, ignore_merges;
} obm__bpe;
/* model: the "model" object of tokenizer.json; vocab must outlive m. */
obm_status obm__bpe_load(obm__bpe *m, const obm__vocab *vocab, const obm_json *model, bool bytes, const char *where,
                         obm_error *err);
void obm__bpe_free(obm__bpe *m);

typedef struct obm__bpe_work obm__bpe_work;   /* scratch of one thread */
obm__bpe_work *obm__bpe_work_new(obm__pulse *pulse);   /* borrowed, nullable; looked at now and then */
void obm__bpe_work_free(obm__bpe_work *w);
/* Appends the ids of one word, UTF-8 unless m->bytes.  O(n log n). */
obm_status obm__bpe_encode(const obm__bpe *m, obm__bpe_work *w, const char *word, size_t n, obm__ids *out, obm_error *err);

/* ---- added.c: added tokens in the text ---- */

typedef struct obm__added {
    char *text;      /* what is looked for: normalized if the token says so */
    size_t len;
    int32_t id;
    uint32_t order;  /* of equal texts the lowest counts */
    bool single_word, lstrip, rstrip;
} obm__added;
typedef struct obm__added_set {
    obm__added *tokens;      // sorted by text, unique
    size_t count;
    uint32_t first[257];     /* tokens that start with byte b: [first[b], first[b + 1]) */
} obm__added_set;
void obm__added_set_index(obm__added_set *s);
void obm__added_set_free(obm__added_set *s);
/* The next token at or after *at, leftmost-longest.  NULL: none.  The span includes what lstrip and rstrip take; `taken` is
 * where the last token's span ended, *at is moved behind the match. */
const obm__added *obm__added_next(const obm__added_set *s, const char *text, size_t n, size_t taken, size_t *at, obm__span *span);

/* ---- parts.c: what the parts of tokenizer.json around the model have in common ---- */

const char *obm__part_type(const obm_json *part);   /* "none" without */
/* "WHERE: PART of type TYPE is not supported (KNOWN)". */
obm_status obm__part_unsupported(const char *where, const char *part, const char *type, const char *known, obm_error *err);
typedef obm_status (*obm__text_part_fn)(void *into, const obm_json *part, const char *where, obm_error *err);
/* Calls fn for the part, or for the members (under `key`) of a Sequence, which may nest; not for null. */
obm_status obm__part_each(const obm_json *part, const char *key, obm__text_part_fn fn, void *into, const char *where, obm_error *err);
/* {"Regex": ...} or {"String": ...} of a Split or Replace; `part` names it in messages. */
obm_status obm__part_pattern(const obm_json *pattern, const char *part, const char *where, obm__regex **out, obm_error *err);

/* ---- normalize.c ---- */

typedef enum obm__normal_kind {
    OBM__N_FORM, OBM__N_LOWERCASE, OBM__N_PREPEND, OBM__N_REPLACE, OBM__N_STRIP
} obm__normal_kind;
typedef struct obm__normal_step {
    obm__normal_kind kind;
    obm__form form;
    obm__regex *regex;    /* of REPLACE */
    char *text;           /* of PREPEND and REPLACE */
    size_t len;
    bool left, right;     /* of STRIP */
} obm__normal_step;
typedef struct obm__normalizer { obm__normal_step *steps; size_t n; } obm__normalizer;
obm_status obm__normalizer_load(obm__normalizer *z, const obm_json *part, const char *where, obm_error *err);
void obm__normalizer_free(obm__normalizer *z);
/* *out is text itself or lies in work.  *cut: the first character of the text is gone. */
obm_status obm__normalize(const obm__normalizer *z, obm__matching *m, obm__buffer work[2], const char *text, size_t n,
                          const char **out, size_t *out_n, bool *cut, obm_error *err);

/* ---- pretokenize.c ---- */

typedef enum obm__prepend { OBM__PREPEND_ALWAYS, OBM__PREPEND_FIRST, OBM__PREPEND_NEVER } obm__prepend;
/* Reads "prepend_scheme" and the older "add_prefix_space" of a Metaspace and its replacement (UTF-8, a NUL behind). */
obm_status obm__metaspace_read(const obm_json *part, const char *what, const char *where, obm__prepend *prepend,
                               char replacement[5], obm_error *err);
typedef struct obm__pre_step {
    bool metaspace;          /* else only `split` counts */
    obm__prepend prepend;
    char replacement[5];     /* of the space */
    obm__split split;        /* of METASPACE: regex NULL for "split": false */
} obm__pre_step;
typedef struct obm__pretokenizer {
    obm__pre_step *steps;    /* in order, before ByteLevel */
    size_t n;
    bool has_metaspace, bytes /* ByteLevel comes last */, prefix_space;
    obm__regex *words;       /* ByteLevel's own pattern, NULL: use_regex is false */
} obm__pretokenizer;
obm_status obm__pretokenizer_load(obm__pretokenizer *p, const obm_json *part, const char *where, obm_error *err);
void obm__pretokenizer_free(obm__pretokenizer *p);
/* What one thread needs to cut texts. */
typedef struct obm__words { obm__matching *matching; obm__spans spans, next; obm__buffer spaced, prefixed; } obm__words;
void obm__words_free(obm__words *w);
/* Calls fn with each word of the text; `first`: it begins where the whole input does. */
typedef obm_status (*obm__word_fn)(void *user, const char *word, size_t n, obm_error *err);
obm_status obm__pretokenize(const obm__pretokenizer *p, obm__words *w, const char *text, size_t n, bool first, obm__word_fn fn,
                            void *user, obm_error *err);

/* ---- postprocess.c ---- */

typedef struct obm__postprocessor { int32_t *before, *after; size_t n_before, n_after; } obm__postprocessor;
obm_status obm__postprocessor_load(obm__postprocessor *p, const obm_json *part, const char *where, obm_error *err);
void obm__postprocessor_free(obm__postprocessor *p);

/* ---- decode.c ---- */

typedef enum obm__decode_kind {
    OBM__D_REPLACE, OBM__D_BYTE_FALLBACK, OBM__D_FUSE, OBM__D_STRIP, OBM__D_METASPACE, OBM__D_BYTE_LEVEL
} obm__decode_kind;
typedef struct obm__decode_step {
    obm__decode_kind kind;
    bool fused;           /* behind Fuse or ByteLevel: everything is one piece */
    obm__regex *regex;    /* of REPLACE */
    char *text;           /* of REPLACE */
    size_t len;
    uint32_t character;   /* of STRIP and METASPACE */
    size_t start, stop;   /* of STRIP: how many at either end */
    bool drop_first;      /* of METASPACE: the first piece loses them */
} obm__decode_step;
typedef struct obm__decoder { obm__decode_step *steps; size_t n; } obm__decoder;   /* no steps: joined by spaces */
obm_status obm__decoder_load(obm__decoder *d, const obm_json *part, const char *where, obm_error *err);
void obm__decoder_free(obm__decoder *d);

typedef struct obm__decoding obm__decoding;   /* one text on its way through the steps; borrows the decoder */
/* eager: characters of a run of byte pieces come out one by one, though the library turns all of a run that is ill-formed
 * somewhere into U+FFFD. */
obm_status obm__decoding_new(const obm__decoder *d, bool eager, obm__decoding **out, obm_error *err);
void obm__decoding_free(obm__decoding *s);
/* Both append to `out` what is complete; after the end it is as new. */
obm_status obm__decoding_push(obm__decoding *s, const char *piece, size_t n, obm__buffer *out, obm_error *err);
obm_status obm__decoding_end(obm__decoding *s, obm__buffer *out, obm_error *err);

/* ---- template.c ---- */

typedef struct obm__style obm__style;   /* a built-in template, style.c */
/* The one whose Jinja text this is but for spaces inside of tags and comments; NULL: unknown.  Errors: NOMEM. */
obm_status obm__style_recognise(const char *jinja, const obm__style **out, obm_error *err);
const obm__style *obm__style_find(const char *name);   /* NULL: none */
const char *obm__style_name(const obm__style *s);
const char *obm__style_names(void);                    /* "llama2, mistral, ..." for messages */
/* *out: the static name of a built-in template, ChatML among them.  ARG lists the known ones. */
obm_status obm__template_find(const char *name, const char **out, obm_error *err);
/* bos, eos: nullable.  Errors as the Jinja template raises them: ARG. */
obm_status obm__style_render(const obm__style *s, const char *bos, const char *eos, const obm_message *messages, size_t n,
                             bool add_generation, obm__buffer *out, obm_error *err);

typedef struct obm__chat {
    char *source;            /* the Jinja text, NULL without */
    char *name;              /* of where it came from, for messages */
    char *bos, *eos;         /* bos_token and eos_token of tokenizer_config.json, NULL without */
    char *system;            /* what the template says when no system message comes first, NULL: nothing */
    bool chatml;
    const obm__style *style; /* another built-in that it is; then `chatml` is false */
    const char *obstacle;    /* why the built-in cannot stand in for it; static, NULL if it can */
} obm__chat;
/* Paths of chat_template.jinja and tokenizer_config.json; NULL, or nothing there: without. */
typedef struct obm__chat_files { const char *jinja, *config; } obm__chat_files;
/* The template of the first place that has one (in a place the jinja file wins, as in transformers), bos and eos of the
 * first place that has a tokenizer_config.json.  None at all is fine. */
obm_status obm__chat_load(obm__chat *c, const obm__chat_files *places, size_t n, obm_error *err);
/* The template in the value of a config's "chat_template": a string, or the one named "default" of
 * [{"name": ..., "template": ...}, ...]; borrowed, NULL without. */
const char *obm__chat_pick(const obm_json *value);
obm_status obm__chat_use(obm__chat *c, obm_error *err);   /* recognises c->source */
void obm__chat_free(obm__chat *c);

/* ---- tokenizer.c ---- */

struct obm_tokenizer {
    const obm_context *ctx;   /* whose interrupt long texts ask; NULL: nobody's */
    obm__vocab vocab;
    obm__bpe bpe;
    obm__normalizer normalizer;
    obm__pretokenizer pretokenizer;
    obm__postprocessor postprocessor;
    obm__decoder decoder;
    obm__added_set raw, normalized;
    obm__chat chat;
};
/* tokenizer.json at `path`, the chat part from the places. */
obm_status obm__tokenizer_load(const char *path, const obm__chat_files *places, size_t n, obm_tokenizer **out,
                               obm_error *err);
/* What to do about a folder without tokenizer.json, to end a message with: "" if it has no other tokenizer. */
const char *obm__tokenizer_hint(const char *directory);
/* From memory, without a chat template. */
obm_status obm__tokenizer_parse(const char *json, size_t size, const char *where, obm_tokenizer **out, obm_error *err);
bool obm__tokenizer_is_special(const obm_tokenizer *t, int32_t id);   /* false for ids out of range */
/* Gives the piece to the decoder.  Errors: ARG (id out of range). */
obm_status obm__tokenizer_push(const obm_tokenizer *t, obm__decoding *s, int32_t id, bool skip_special, obm__buffer *out,
                               obm_error *err);

#endif
