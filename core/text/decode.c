/* The decoder of tokenizer.json: pieces to text, step after step, each piece as it comes.  Steps that would have to
 * look back at text that has left already are refused. */
#include "text.h"

#include <string.h>

/* ---- loading ---- */

static obm_status load_replace(obm__decode_step *s, const obm_json *part, const char *where, obm_error *err) {
    const char *text = obm__json_string_n(obm__json_get(part, "content"), &s->len);
    if (!text) return obm__fail(err, OBM_E_FORMAT, "%s: decoder Replace has no \"content\" text", where);
    s->text = obm__strndup(text, s->len);
    if (!s->text) return obm__fail_nomem(err, s->len);
    return obm__part_pattern(obm__json_get(part, "pattern"), "decoder Replace", where, &s->regex, err);
}

static obm_status load_strip(obm__decode_step *s, const obm_json *part, const char *where, obm_error *err) {
    size_t n = 0, len = 0;
    int64_t start = 0, stop = 0;
    const char *text = obm__json_string_n(obm__json_get(part, "content"), &n);
    if (text && n) s->character = obm__utf8_next(text, n, &len);
    if (!len || len != n)
        return obm__fail(err, OBM_E_FORMAT, "%s: decoder Strip: \"content\" is not one character", where);
    bool ok = obm__json_int(obm__json_get(part, "start"), &start) && obm__json_int(obm__json_get(part, "stop"), &stop);
    if (!ok || start < 0 || stop < 0)
        return obm__fail(err, OBM_E_FORMAT, "%s: decoder Strip: start and stop are not integers from 0 on", where);
    s->start = (size_t)start;
    s->stop = (size_t)stop;
    if (s->fused && stop)
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s: decoder Strip with stop %lld behind Fuse is not supported", where,
                         (long long)stop);
    return OBM_OK;
}

static obm_status load_metaspace(obm__decode_step *s, const obm_json *part, const char *where, obm_error *err) {
    char replacement[5];
    obm__prepend prepend;
    size_t len;
    OBM_TRY(obm__metaspace_read(part, "decoder", where, &prepend, replacement, err));
    s->character = obm__utf8_next(replacement, strlen(replacement), &len);
    s->drop_first = prepend != OBM__PREPEND_NEVER;
    return OBM_OK;
}

static obm_status load_kind(obm__decode_step *s, const obm_json *part, const char *where, obm_error *err) {
    static const struct {
        const char *type;
        obm_status (*load)(obm__decode_step *s, const obm_json *part, const char *where, obm_error *err);
        bool behind_fuse; /* works on pieces of a piece */
    } kinds[] = {[OBM__D_REPLACE] = {"Replace", load_replace, false},
                 [OBM__D_BYTE_FALLBACK] = {"ByteFallback", NULL, false},
                 [OBM__D_FUSE] = {"Fuse", NULL, true},
                 [OBM__D_STRIP] = {"Strip", load_strip, true},
                 [OBM__D_METASPACE] = {"Metaspace", load_metaspace, true},
                 [OBM__D_BYTE_LEVEL] = {"ByteLevel", NULL, false}};
    const char *type = obm__part_type(part);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(type, kinds[i].type) != 0) continue;
        if (s->fused && !kinds[i].behind_fuse) {
            return obm__fail(err, OBM_E_UNSUPPORTED, "%s: decoder %s behind Fuse or ByteLevel is not supported", where,
                             type);
        }
        s->kind = (obm__decode_kind)i;
        return kinds[i].load ? kinds[i].load(s, part, where, err) : OBM_OK;
    }
    return obm__part_unsupported(where, "decoder", type,
                                 "ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Strip and Sequence are", err);
}

static void step_free(obm__decode_step *s) {
    obm__regex_free(s->regex);
    obm_free(s->text);
}

static obm_status load_step(void *into, const obm_json *part, const char *where, obm_error *err) {
    obm__decoder *d = into;
    obm__decode_step step = {0}, *steps = obm__realloc(d->steps, d->n + 1, sizeof *steps);
    if (!steps) return obm__fail_nomem(err, (d->n + 1) * sizeof *steps);
    d->steps = steps;
    for (size_t i = 0; i < d->n; i++) step.fused |= steps[i].kind == OBM__D_FUSE || steps[i].kind == OBM__D_BYTE_LEVEL;
    obm_status status = load_kind(&step, part, where, err);
    if (status == OBM_OK)
        steps[d->n++] = step;
    else
        step_free(&step);
    return status;
}

obm_status obm__decoder_load(obm__decoder *d, const obm_json *part, const char *where, obm_error *err) {
    *d = (obm__decoder){0};
    obm_status status = obm__part_each(part, "decoders", load_step, d, where, err);
    if (status != OBM_OK) obm__decoder_free(d);
    return status;
}

void obm__decoder_free(obm__decoder *d) {
    for (size_t i = 0; i < d->n; i++) step_free(&d->steps[i]);
    obm_free(d->steps);
    *d = (obm__decoder){0};
}

/* ---- decoding ---- */

typedef struct progress {
    size_t pieces;    /* that this step was given */
    size_t stripped;  /* of a fused Strip; SIZE_MAX: something else has come */
    bool broken;      /* the run of bytes is ill-formed */
    obm__buffer held; /* bytes that are not yet a character, or a run of them */
    obm__buffer made; /* what becomes of a piece */
} progress;

struct obm__decoding {
    const obm__decoder *decoder;
    bool eager;
    obm__matching *matching; /* NULL without a Replace */
    size_t pieces;
    obm__buffer *out; /* of the call */
    progress at[];    // (steps,)
};

obm_status obm__decoding_new(const obm__decoder *d, bool eager, obm__decoding **out, obm_error *err) {
    size_t size;
    if (!obm__mul(d->n, sizeof(progress), &size) || !obm__add(size, sizeof(obm__decoding), &size))
        return obm__fail_nomem(err, UINT64_MAX);
    obm__decoding *s = obm__calloc(1, size);
    if (!s) return obm__fail_nomem(err, size);
    s->decoder = d;
    s->eager = eager;
    bool replaces = false;
    for (size_t i = 0; i < d->n; i++) replaces |= d->steps[i].kind == OBM__D_REPLACE;
    if (replaces && !(s->matching = obm__matching_new(NULL))) {
        obm__decoding_free(s);
        return obm__fail_nomem(err, size);
    }
    *out = s;
    return OBM_OK;
}

void obm__decoding_free(obm__decoding *s) {
    if (!s) return;
    for (size_t i = 0; i < s->decoder->n; i++) {
        obm__buffer_free(&s->at[i].held);
        obm__buffer_free(&s->at[i].made);
    }
    obm__matching_free(s->matching);
    obm_free(s);
}

static obm_status give(obm__decoding *s, size_t step, const char *text, size_t n, obm_error *err);

static obm_status give_made(obm__decoding *s, size_t step, obm_error *err) {
    obm__buffer *made = &s->at[step].made;
    if (made->failed) return obm__fail_nomem(err, made->size);
    return give(s, step + 1, made->data, made->size, err);
}

static obm_status give_replaced(obm__decoding *s, size_t step, const char *text, size_t n, obm_error *err) {
    const obm__decode_step *d = &s->decoder->steps[step];
    const obm__split split = {.regex = d->regex};
    obm__buffer *made = &s->at[step].made;
    obm__matches matches = {0};
    obm__span match;
    size_t done = 0;
    bool found;
    for (;;) {
        OBM_TRY(obm__matches_next(&matches, &split, s->matching, text, n, &found, &match, err));
        if (!found) break;
        obm__buffer_add(made, text + done, match.begin - done);
        obm__buffer_add(made, d->text, d->len);
        done = match.end;
    }
    obm__buffer_add(made, text + done, n - done);
    return give_made(s, step, err);
}

static obm_status give_stripped(obm__decoding *s, size_t step, const char *text, size_t n, obm_error *err) {
    const obm__decode_step *d = &s->decoder->steps[step];
    size_t own = 0, *stripped = d->fused ? &s->at[step].stripped : &own, len, begin = 0;
    while (begin < n && *stripped < d->start && obm__utf8_next(text + begin, n - begin, &len) == d->character) {
        begin += len;
        ++*stripped;
    }
    if (begin < n) *stripped = SIZE_MAX;
    for (size_t i = 0; i < d->stop && n > begin; i++) {
        size_t last = n - 1;
        while (last > begin && ((uint8_t)text[last] & 0xc0) == 0x80) last--;
        if (obm__utf8_next(text + last, n - last, &len) != d->character) break;
        n = last;
    }
    return give(s, step + 1, text + begin, n - begin, err);
}

static obm_status give_spaced(obm__decoding *s, size_t step, const char *text, size_t n, obm_error *err) {
    const obm__decode_step *d = &s->decoder->steps[step];
    obm__buffer *made = &s->at[step].made;
    bool drop = d->drop_first && (d->fused || s->at[step].pieces == 1);
    for (size_t at = 0, len; at < n; at += len) {
        if (obm__utf8_next(text + at, n - at, &len) != d->character)
            obm__buffer_add(made, text + at, len);
        else if (!drop)
            obm__buffer_text(made, " ");
    }
    return give_made(s, step, err);
}

/* ---- bytes ---- */

#define REPLACEMENT "\xef\xbf\xbd"

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* <0xHH>; like Rust's from_str_radix, "+H" is a number too.  -1: no byte. */
static int byte_of(const char *s, size_t n) {
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>') return -1;
    int high = s[3] == '+' ? 0 : hex_digit(s[3]), low = hex_digit(s[4]);
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

static obm_status give_replacements(obm__decoding *s, size_t step, size_t n, obm_error *err) {
    for (size_t i = 0; i < n; i++) OBM_TRY(give(s, step + 1, REPLACEMENT, strlen(REPLACEMENT), err));
    return OBM_OK;
}

/* The run of bytes is over: a text, or ill-formed and then U+FFFD for every byte, as the library has it. */
static obm_status end_run(obm__decoding *s, size_t step, obm_error *err) {
    obm__buffer *held = &s->at[step].held;
    size_t n = held->size;
    s->at[step].broken = false;
    held->size = 0;
    if (n == 0) return OBM_OK;
    if (obm__utf8_check(held->data, n) == n) return give(s, step + 1, held->data, n, err);
    return give_replacements(s, step, n, err);
}

/* The held bytes once they are a character, or cannot become one. */
static obm_status give_early(obm__decoding *s, size_t step, obm_error *err) {
    progress *p = &s->at[step];
    obm__buffer *lossy = &p->made;
    size_t n = p->held.size;
    bool whole = obm__utf8_check(p->held.data, n) == n;
    /* Not lossy to the end: what stays may still be completed. */
    if (!whole && !p->broken) p->broken = obm__utf8_lossy(p->held.data, n, false, lossy) > 0;
    lossy->size = 0;
    if (lossy->failed) return obm__fail_nomem(err, n);
    if (!whole && !p->broken) return OBM_OK;
    p->held.size = 0;
    return p->broken ? give_replacements(s, step, n, err) : give(s, step + 1, p->held.data, n, err);
}

static obm_status give_fallback(obm__decoding *s, size_t step, const char *text, size_t n, obm_error *err) {
    const obm__decoder *d = s->decoder;
    progress *p = &s->at[step];
    int byte = byte_of(text, n);
    if (byte < 0) {
        OBM_TRY(end_run(s, step, err));
        return give(s, step + 1, text, n, err);
    }
    char c = (char)byte;
    obm__buffer_add(&p->held, &c, 1);
    if (p->held.failed) return obm__fail_nomem(err, p->held.size);
    /* A step that looks at whole pieces needs the whole run. */
    bool parts_will_do = step + 1 == d->n || d->steps[step + 1].kind == OBM__D_FUSE;
    return s->eager && parts_will_do ? give_early(s, step, err) : OBM_OK;
}

/* A piece of the byte alphabet only is those bytes; any other is its own text, whole, as the library has it. */
static void hold_bytes(obm__buffer *held, const char *text, size_t n) {
    size_t start = held->size, at = 0, len;
    while (at < n) {
        int byte = obm__char_to_byte(obm__utf8_next(text + at, n - at, &len));
        if (byte < 0) {
            held->size = start;
            obm__buffer_add(held, text, n);
            return;
        }
        char c = (char)byte;
        obm__buffer_add(held, &c, 1);
        at += len;
    }
}

/* What of the held bytes is characters, with `final` all of them. */
static obm_status give_lossy(obm__decoding *s, size_t step, bool final, obm_error *err) {
    progress *p = &s->at[step];
    p->made.size = 0;
    obm__buffer_add(&p->made, "", 0);
    size_t used = p->held.size ? obm__utf8_lossy(p->held.data, p->held.size, final, &p->made) : 0;
    if (p->held.failed) return obm__fail_nomem(err, p->held.size);
    p->held.size -= used;
    if (used) memmove(p->held.data, p->held.data + used, p->held.size);
    return give_made(s, step, err);
}

/* ---- the way through ---- */

static obm_status give(obm__decoding *s, size_t step, const char *text, size_t n, obm_error *err) {
    if (step == s->decoder->n) {
        obm__buffer_add(s->out, text, n);
        return s->out->failed ? obm__fail_nomem(err, n) : OBM_OK;
    }
    progress *p = &s->at[step];
    p->pieces++;
    p->made.size = 0;
    obm__buffer_add(&p->made, "", 0);
    switch (s->decoder->steps[step].kind) {
    case OBM__D_REPLACE:
        return give_replaced(s, step, text, n, err);
    case OBM__D_BYTE_FALLBACK:
        return give_fallback(s, step, text, n, err);
    case OBM__D_STRIP:
        return give_stripped(s, step, text, n, err);
    case OBM__D_METASPACE:
        return give_spaced(s, step, text, n, err);
    case OBM__D_BYTE_LEVEL:
        hold_bytes(&p->held, text, n);
        return give_lossy(s, step, false, err);
    default:
        return give(s, step + 1, text, n, err);
    }
}

obm_status obm__decoding_push(obm__decoding *s, const char *piece, size_t n, obm__buffer *out, obm_error *err) {
    s->out = out;
    if (s->decoder->n == 0 && s->pieces++) obm__buffer_text(out, " ");
    return give(s, 0, piece, n, err);
}

obm_status obm__decoding_end(obm__decoding *s, obm__buffer *out, obm_error *err) {
    s->out = out;
    s->pieces = 0;
    for (size_t i = 0; i < s->decoder->n; i++) {
        obm__decode_kind kind = s->decoder->steps[i].kind;
        if (kind == OBM__D_BYTE_FALLBACK) OBM_TRY(end_run(s, i, err));
        if (kind == OBM__D_BYTE_LEVEL) OBM_TRY(give_lossy(s, i, true, err));
        s->at[i].pieces = s->at[i].stripped = 0;
    }
    return OBM_OK;
}
