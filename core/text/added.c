/* Finding added tokens in a text: leftmost-longest over a sorted list. */
#include "text.h"

#include <stdlib.h>
#include <string.h>

static int compare_text(const obm__added *a, const obm__added *b) {
    size_t n = a->len < b->len ? a->len : b->len;
    int order = memcmp(a->text, b->text, n);
    return order ? order : (a->len > b->len) - (a->len < b->len);
}

static int compare(const void *a, const void *b) {
    const obm__added *x = a, *y = b;
    int order = compare_text(x, y);
    return order ? order : (x->order > y->order) - (x->order < y->order);
}

void obm__added_set_index(obm__added_set *s) {
    size_t kept = 0;
    if (s->count) qsort(s->tokens, s->count, sizeof *s->tokens, compare);
    for (size_t i = 0; i < s->count; i++) {
        if (s->tokens[i].len == 0 || (kept && compare_text(&s->tokens[kept - 1], &s->tokens[i]) == 0)) {
            obm_free(s->tokens[i].text);
        } else {
            s->tokens[kept++] = s->tokens[i];
        }
    }
    s->count = kept;
    memset(s->first, 0, sizeof s->first);
    for (size_t i = 0; i < kept; i++) s->first[(uint8_t)s->tokens[i].text[0] + 1] = (uint32_t)(i + 1);
    for (int b = 1; b <= 256; b++) {
        if (s->first[b] < s->first[b - 1]) s->first[b] = s->first[b - 1];
    }
}

void obm__added_set_free(obm__added_set *s) {
    for (size_t i = 0; i < s->count; i++) obm_free(s->tokens[i].text);
    obm_free(s->tokens);
    *s = (obm__added_set){0};
}

/* First token in [low, high) whose byte at `depth` is at least `byte`; tokens that end there sort first. */
static size_t lower(const obm__added_set *s, size_t low, size_t high, size_t depth, int byte) {
    while (low < high) {
        size_t middle = (low + high) / 2;
        const obm__added *t = &s->tokens[middle];
        if (t->len <= depth || (uint8_t)t->text[depth] < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The longest token that the text starts with. */
static const obm__added *longest(const obm__added_set *s, const char *text, size_t n) {
    const obm__added *best = NULL;
    size_t low = s->first[(uint8_t)text[0]], high = s->first[(uint8_t)text[0] + 1];
    for (size_t depth = 1; low < high; depth++) {
        if (s->tokens[low].len == depth) best = &s->tokens[low];
        if (depth == n) break;
        int byte = (uint8_t)text[depth];
        low = lower(s, low, high, depth, byte);
        high = lower(s, low, high, depth, byte + 1);
    }
    return best;
}

static size_t char_before(const char *text, size_t at, uint32_t *c) {
    size_t begin = at - 1, len;
    while (begin > 0 && ((uint8_t)text[begin] & 0xc0) == 0x80) begin--;
    *c = obm__utf8_next(text + begin, at - begin, &len);
    return begin;
}

static bool is_single_word(const char *text, size_t n, size_t begin, size_t end) {
    uint32_t c;
    size_t len;
    if (begin > 0) {
        char_before(text, begin, &c);
        if (obm__is_word(c)) return false;
    }
    return end == n || !obm__is_word(obm__utf8_next(text + end, n - end, &len));
}

static size_t skip_space_back(const char *text, size_t floor, size_t at) {
    uint32_t c;
    while (at > floor) {
        size_t begin = char_before(text, at, &c);
        if (!obm__is_space(c)) break;
        at = begin;
    }
    return at;
}

static size_t skip_space(const char *text, size_t n, size_t at) {
    size_t len;
    while (at < n && obm__is_space(obm__utf8_next(text + at, n - at, &len))) at += len;
    return at;
}

const obm__added *obm__added_next(const obm__added_set *s, const char *text, size_t n, size_t taken, size_t *at,
                                  obm__span *span) {
    while (*at < n) {
        size_t begin = *at;
        const obm__added *t = longest(s, text + begin, n - begin);
        *at = t ? begin + t->len : begin + 1;
        if (!t || (t->single_word && !is_single_word(text, n, begin, begin + t->len))) continue;
        span->begin = t->lstrip ? skip_space_back(text, taken, begin) : begin;
        span->end = t->rstrip ? skip_space(text, n, begin + t->len) : begin + t->len;
        return t;
    }
    return NULL;
}
