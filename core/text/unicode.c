/* UTF-8 and the few character properties the tokenizer needs; the only file that includes utf8proc.h. */
#include "text.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* Length of the well-formed character at s (Unicode 16, table 3-7), or 0; then *bad is the length of the maximal
 * ill-formed subpart and *open says that more bytes could still complete it. */
static size_t sequence(const uint8_t *s, size_t n, size_t *bad, bool *open) {
    uint8_t b = s[0], low = 0x80, high = 0xbf;
    size_t need = b < 0x80 ? 1 : b < 0xc2 ? 0 : b < 0xe0 ? 2 : b < 0xf0 ? 3 : b < 0xf5 ? 4 : 0;
    *bad = 1;
    *open = false;
    if (need == 0) return 0;
    if (b == 0xe0) low = 0xa0;
    if (b == 0xed) high = 0x9f;
    if (b == 0xf0) low = 0x90;
    if (b == 0xf4) high = 0x8f;
    for (size_t i = 1; i < need; i++) {
        if (i == n) {
            *open = true;
            return 0;
        }
        if (s[i] < low || s[i] > high) return 0;
        *bad = i + 1;
        low = 0x80;
        high = 0xbf;
    }
    return need;
}

size_t obm__utf8_check(const char *s, size_t n) {
    size_t at = 0, bad;
    bool open;
    while (at < n) {
        size_t len = sequence((const uint8_t *)s + at, n - at, &bad, &open);
        if (len == 0) return at;
        at += len;
    }
    return n;
}

uint32_t obm__utf8_next(const char *s, size_t n, size_t *len) {
    utf8proc_int32_t c = 0;
    utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)s, n < 4 ? (utf8proc_ssize_t)n : 4, &c);
    *len = used > 0 ? (size_t)used : 1;
    return (uint32_t)c;
}

size_t obm__utf8_lossy(const char *s, size_t n, bool final, obm__buffer *out) {
    size_t at = 0, kept = 0, bad;
    bool open;
    while (at < n) {
        size_t len = sequence((const uint8_t *)s + at, n - at, &bad, &open);
        if (len == 0) {
            obm__buffer_add(out, s + kept, at - kept);
            if (open && !final) return at;
            obm__buffer_text(out, "\xef\xbf\xbd");
            kept = at + bad;
            len = bad;
        }
        at += len;
    }
    obm__buffer_add(out, s + kept, n - kept);
    return n;
}

bool obm__is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* Other_Alphabetic outside of the Mark categories: the circled and squared Latin letters. */
static bool is_enclosed_letter(uint32_t c) {
    return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
           (c >= 0x1f170 && c <= 0x1f189);
}

/* Word characters that Unicode 15.1 and 16 assigned (UnicodeData.txt): Rust's regex crate knows them, utf8proc 2.8 does
 * not. */
static const uint32_t newer_words[][2] = {
    {0x897, 0x897},     {0x1c89, 0x1c8a},   {0xa7cb, 0xa7cd},   {0xa7da, 0xa7dc},   {0x105c0, 0x105f3},
    {0x10d40, 0x10d65}, {0x10d69, 0x10d6d}, {0x10d6f, 0x10d85}, {0x10ec2, 0x10ec4}, {0x10efc, 0x10efc},
    {0x11380, 0x11389}, {0x1138b, 0x1138b}, {0x1138e, 0x1138e}, {0x11390, 0x113b5}, {0x113b7, 0x113c0},
    {0x113c2, 0x113c2}, {0x113c5, 0x113c5}, {0x113c7, 0x113ca}, {0x113cc, 0x113d3}, {0x113e1, 0x113e2},
    {0x116d0, 0x116e3}, {0x11bc0, 0x11be0}, {0x11bf0, 0x11bf9}, {0x11f5a, 0x11f5a}, {0x13460, 0x143fa},
    {0x16100, 0x16139}, {0x16d40, 0x16d6c}, {0x16d70, 0x16d79}, {0x18cff, 0x18cff}, {0x1ccf0, 0x1ccf9},
    {0x1e5d0, 0x1e5fa}, {0x2ebf0, 0x2ee5d},
};

static bool is_newer_word(uint32_t c) {
    for (size_t i = 0; i < sizeof newer_words / sizeof *newer_words; i++) {
        if (c >= newer_words[i][0] && c <= newer_words[i][1]) return true;
    }
    return false;
}

bool obm__is_word(uint32_t c) {
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        return c == 0x200c || c == 0x200d || is_enclosed_letter(c) || is_newer_word(c);
    }
}

obm_status obm__nfc(const char *s, size_t n, obm__buffer *out, obm_error *err) {
    size_t ascii = 0;
    while (ascii < n && (uint8_t)s[ascii] < 0x80) ascii++;
    if (ascii == n) {
        obm__buffer_add(out, s, n);
        return out->failed ? obm__fail_nomem(err, n) : OBM_OK;
    }
    utf8proc_uint8_t *composed = NULL;
    utf8proc_ssize_t len = n > INT_MAX ? UTF8PROC_ERROR_OVERFLOW
                                       : utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &composed,
                                                      UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (len == UTF8PROC_ERROR_NOMEM) return obm__fail_nomem(err, 4 * (uint64_t)n);
    if (len < 0) return obm__fail(err, OBM_E_FORMAT, "cannot normalize the text: %s", utf8proc_errmsg(len));
    obm__buffer_add(out, composed, (size_t)len);
    free(composed);
    return out->failed ? obm__fail_nomem(err, (uint64_t)len) : OBM_OK;
}
