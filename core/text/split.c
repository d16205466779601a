/* Cutting a text at the matches of a pattern or at characters of a kind, the way the tokenizers library does. */
#include "text.h"

#include <string.h>

bool obm__spans_add(obm__spans *s, size_t begin, size_t end) {
    if (s->count == s->capacity) {
        size_t capacity = s->capacity ? 2 * s->capacity : 64;
        obm__span *at = obm__realloc(s->at, capacity, sizeof *at);
        if (!at) return false;
        s->at = at;
        s->capacity = capacity;
    }
    s->at[s->count++] = (obm__span){begin, end};
    return true;
}

void obm__spans_free(obm__spans *s) {
    obm_free(s->at);
    *s = (obm__spans){0};
}

/* Decides, piece by piece from left to right, which neighbours belong together. */
typedef struct cutter {
    const obm__split *split;
    size_t base;       /* of the span in the text */
    obm__span pending; /* not yet appended */
    bool has_pending, pending_matched, previous_match;
    obm__spans *out;
} cutter;

static bool emit(cutter *c) {
    bool ok = !c->has_pending || c->pending.begin == c->pending.end ||
              obm__spans_add(c->out, c->base + c->pending.begin, c->base + c->pending.end);
    c->has_pending = false;
    return ok;
}

static bool joins(const cutter *c, bool match) {
    switch (c->split->behavior) {
    case OBM__CONTIGUOUS:
        return match == c->previous_match;
    case OBM__MERGED_WITH_PREVIOUS:
        return match && !c->previous_match;
    /* The library goes from right to left here: a match takes in what follows it unless that is a match itself. */
    case OBM__MERGED_WITH_NEXT:
        return !match && c->pending_matched;
    default:
        return false;
    }
}

/* One piece [begin, end), a match or what lies between two. */
static bool cut(cutter *c, size_t begin, size_t end, bool match) {
    match ^= c->split->invert;
    bool ok = true;
    if (c->has_pending && joins(c, match)) {
        c->pending.end = end;
    } else {
        ok = emit(c);
        c->pending = (obm__span){begin, end};
        c->has_pending = !(match && c->split->behavior == OBM__REMOVED);
    }
    c->pending_matched = match;
    c->previous_match = match;
    return ok;
}

/* ---- matches ---- */

typedef enum { SPACE, WORD, OTHER } kind;

static kind kind_of(uint32_t c) { return obm__is_space(c) ? SPACE : obm__is_word(c) ? WORD : OTHER; }

/* The next run of word characters, or of characters that are neither that nor space. */
static bool find_run(const char *s, size_t n, size_t from, obm__span *match) {
    size_t len;
    kind k = SPACE;
    while (from < n && (k = kind_of(obm__utf8_next(s + from, n - from, &len))) == SPACE) from += len;
    *match = (obm__span){from, from};
    while (match->end < n && kind_of(obm__utf8_next(s + match->end, n - match->end, &len)) == k) match->end += len;
    return from < n;
}

static bool find_char(bool (*is)(uint32_t), const char *s, size_t n, size_t from, obm__span *match) {
    size_t len;
    while (from < n) {
        bool found = is(obm__utf8_next(s + from, n - from, &len));
        *match = (obm__span){from, from + len};
        if (found) return true;
        from += len;
    }
    return false;
}

static obm_status find(const obm__split *split, obm__matching *m, const char *s, size_t n, size_t from, bool *found,
                       obm__span *match, obm_error *err) {
    switch (split->by) {
    case OBM__BY_SPACE:
        *found = find_char(obm__is_space, s, n, from, match);
        return OBM_OK;
    case OBM__BY_PUNCTUATION:
        *found = find_char(obm__is_punctuation, s, n, from, match);
        return OBM_OK;
    case OBM__BY_WORDS:
        *found = find_run(s, n, from, match);
        return OBM_OK;
    default:
        return obm__regex_find(split->regex, m, s, n, from, found, &match->begin, &match->end, err);
    }
}

obm_status obm__matches_next(obm__matches *i, const obm__split *split, obm__matching *m, const char *s, size_t n,
                             bool *found, obm__span *match, obm_error *err) {
    OBM_TRY(obm__matching_look(m, err));
    while (i->at <= n) {
        size_t len;
        OBM_TRY(find(split, m, s, n, i->at, found, match, err));
        if (!*found) return OBM_OK;
        if (match->begin < match->end || !i->matched || match->end != i->done) {
            i->matched = true;
            i->at = i->done = match->end;
            return OBM_OK;
        }
        if (i->at == n) break;
        obm__utf8_next(s + i->at, n - i->at, &len);
        i->at += len;
    }
    *found = false;
    return OBM_OK;
}

obm_status obm__split_apply(const obm__split *split, obm__matching *m, const char *text, obm__span span,
                            obm__spans *out, obm_error *err) {
    const char *s = text + span.begin;
    size_t n = span.end - span.begin, done = 0;
    bool found = true, ok = true;
    obm__matches matches = {0};
    obm__span match;
    cutter c = {.split = split, .base = span.begin, .out = out};
    while (ok) {
        OBM_TRY(obm__matches_next(&matches, split, m, s, n, &found, &match, err));
        if (!found) break;
        ok = (match.begin == done || cut(&c, done, match.begin, false)) && cut(&c, match.begin, match.end, true);
        done = match.end;
    }
    ok = ok && (done == n || cut(&c, done, n, false)) && emit(&c);
    return ok ? OBM_OK : obm__fail_nomem(err, n);
}
