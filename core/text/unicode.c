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

static bool is_in(const uint32_t (*ranges)[2], size_t n, uint32_t c) {
    for (size_t i = 0; i < n; i++) {
        if (c >= ranges[i][0] && c <= ranges[i][1]) return true;
    }
    return false;
}

static bool is_newer_word(uint32_t c) { return is_in(newer_words, sizeof newer_words / sizeof *newer_words, c); }

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

/* Punctuation that Unicode 9 and later assigned or moved: the tokenizers library's table (of its crate
 * unicode-categories) is that of Unicode 8. */
static const uint32_t newer_punctuation[][2] = {
    {0x61d, 0x61d},     {0x9fd, 0x9fd},     {0xa76, 0xa76},     {0xc77, 0xc77},     {0xc84, 0xc84},
    {0x1b7d, 0x1b7e},   {0x2e43, 0x2e4f},   {0x2e52, 0x2e5d},   {0x10ead, 0x10ead}, {0x10f55, 0x10f59},
    {0x10f86, 0x10f89}, {0x1144b, 0x1144f}, {0x1145a, 0x1145b}, {0x1145d, 0x1145d}, {0x11660, 0x1166c},
    {0x116b9, 0x116b9}, {0x1183b, 0x1183b}, {0x11944, 0x11946}, {0x119e2, 0x119e2}, {0x11a3f, 0x11a46},
    {0x11a9a, 0x11a9c}, {0x11a9e, 0x11aa2}, {0x11b00, 0x11b09}, {0x11c41, 0x11c45}, {0x11c70, 0x11c71},
    {0x11ef7, 0x11ef8}, {0x11f43, 0x11f4f}, {0x11fff, 0x11fff}, {0x12ff1, 0x12ff2}, {0x16e97, 0x16e9a},
    {0x16fe2, 0x16fe2}, {0x1e95e, 0x1e95f},
};

bool obm__is_punctuation(uint32_t c) {
    if (c < 0x80)
        return (c > 0x20 && c < 0x30) || (c > 0x39 && c < 0x41) || (c > 0x5a && c < 0x61) || (c > 0x7a && c < 0x7f);
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_PC:
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO:
        return !is_in(newer_punctuation, sizeof newer_punctuation / sizeof *newer_punctuation, c);
    default:
        return c == 0x166d || c == 0x111c9; /* were punctuation then */
    }
}

void obm__put_char(uint32_t c, obm__buffer *out) {
    utf8proc_uint8_t bytes[4];
    obm__buffer_add(out, bytes, (size_t)utf8proc_encode_char((utf8proc_int32_t)c, bytes));
}

/* Capitals that Unicode 16 and 17 assigned, with what is added to get the small letter. */
static const struct {
    uint32_t first, last;
    int32_t add;
} newer_capitals[] = {
    {0x1c89, 0x1c89, 1},    {0xa7cb, 0xa7cb, -42343}, {0xa7cc, 0xa7cc, 1}, {0xa7ce, 0xa7ce, 1},
    {0xa7d2, 0xa7d2, 1},    {0xa7d4, 0xa7d4, 1},      {0xa7da, 0xa7da, 1}, {0xa7dc, 0xa7dc, -42561},
    {0x10d50, 0x10d65, 32}, {0x16ea0, 0x16eb8, 27},
};

static uint32_t lower(uint32_t c) {
    for (size_t i = 0; i < sizeof newer_capitals / sizeof *newer_capitals; i++) {
        if (c >= newer_capitals[i].first && c <= newer_capitals[i].last)
            return (uint32_t)((int32_t)c + newer_capitals[i].add);
    }
    return (uint32_t)utf8proc_tolower((utf8proc_int32_t)c);
}

void obm__lowercase(const char *s, size_t n, obm__buffer *out) {
    size_t len;
    for (size_t at = 0; at < n; at += len) {
        uint32_t c = obm__utf8_next(s + at, n - at, &len);
        obm__put_char(c == 0x130 ? 'i' : lower(c), out);
        if (c == 0x130) obm__put_char(0x307, out); /* SpecialCasing.txt: the only one that grows without a context */
    }
}

/* Characters whose decompositions or combining classes are newer than the tables of the tokenizers library (Unicode 9),
 * which leaves them alone and where they are. */
static const uint32_t newer_forms[][2] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},
    {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0xece, 0xece},     {0x1715, 0x1715},   {0x1abf, 0x1ace},
    {0x1df6, 0x1dfa},   {0x32ff, 0x32ff},   {0xa7f2, 0xa7f4},   {0xa82c, 0xa82c},   {0xab69, 0xab69},
    {0x10781, 0x107ba}, {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50},
    {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a},
    {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e030, 0x1e06d}, {0x1e08f, 0x1e08f},
    {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}, {0x1f16c, 0x1f16c},
    {0x1fbf0, 0x1fbf9},
};

static bool is_left_alone(uint32_t c) {
    return c >= newer_forms[0][0] && is_in(newer_forms, sizeof newer_forms / sizeof *newer_forms, c);
}

static obm_status normalize(int options, const char *s, size_t n, obm__buffer *out, obm_error *err) {
    utf8proc_uint8_t *result = NULL;
    if (n == 0) return OBM_OK;
    utf8proc_ssize_t len = n > INT_MAX ? UTF8PROC_ERROR_OVERFLOW
                                       : utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &result,
                                                      UTF8PROC_STABLE | (utf8proc_option_t)options);
    if (len == UTF8PROC_ERROR_NOMEM) return obm__fail_nomem(err, 4 * (uint64_t)n);
    if (len < 0) return obm__fail(err, OBM_E_FORMAT, "cannot normalize the text: %s", utf8proc_errmsg(len));
    obm__buffer_add(out, result, (size_t)len);
    free(result);
    return OBM_OK;
}

obm_status obm__normal_form(obm__form form, const char *s, size_t n, obm__buffer *out, obm_error *err) {
    static const int options[] = {UTF8PROC_COMPOSE, UTF8PROC_DECOMPOSE, UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
                                  UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT};
    size_t at = 0, from = 0, len = 0;
    while (at < n && (uint8_t)s[at] < 0x80) at++; /* ASCII is normal in every form */
    if (at < n) {
        for (at = 0; at < n; at += len) {
            if (!is_left_alone(obm__utf8_next(s + at, n - at, &len))) continue;
            OBM_TRY(normalize(options[form], s + from, at - from, out, err));
            obm__buffer_add(out, s + at, len);
            from = at + len;
        }
        OBM_TRY(normalize(options[form], s + from, n - from, out, err));
    } else {
        obm__buffer_add(out, s, n);
    }
    return out->failed ? obm__fail_nomem(err, n) : OBM_OK;
}
