/* Cutting a text at the matches of a pattern, the way the tokenizers library's Split and Digits do. */
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

obm_status obm__split_apply(const obm__split *split, obm__matching *m, const char *text, obm__span span,
                            obm__spans *out, obm_error *err) {
    const char *s = text + span.begin;
    size_t n = span.end - span.begin, from = 0, done = 0;
    bool matched = false, ok = true; /* matched: `done` is the end of a match, where an empty one does not count */
    cutter c = {.split = split, .base = span.begin, .out = out};
    while (ok && from <= n) {
        bool found;
        size_t begin, end, len;
        OBM_TRY(obm__regex_find(split->regex, m, s, n, from, &found, &begin, &end, err));
        if (!found) break;
        if (begin == end && matched && end == done) {
            if (from == n) break;
            obm__utf8_next(s + from, n - from, &len);
            from += len;
            continue;
        }
        ok = (begin == done || cut(&c, done, begin, false)) && cut(&c, begin, end, true);
        matched = true;
        from = done = end;
    }
    ok = ok && (done == n || cut(&c, done, n, false)) && emit(&c);
    return ok ? OBM_OK : obm__fail_nomem(err, n);
}
