/* Regexes of tokenizer.json, which are written for Oniguruma, on PCRE2 (the only file that includes pcre2.h): patterns
 * are rewritten where the two differ and refused where the difference cannot be bridged. */
#define PCRE2_CODE_UNIT_WIDTH 8

#include "text.h"

#include <pcre2.h>
#include <stdio.h>
#include <string.h>

struct obm__regex {
    pcre2_code *code;
    char *where;
};

struct obm__matching {
    obm__pulse *pulse;
    unsigned calls;
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

/* Backtracking steps of one match.  The patterns in use need a few per character of one word (a run of a million spaces
 * is one word); nested quantifiers, (a+)+, reach this within a second. */
#define MATCH_LIMIT_BASE 1000000u
#define MATCH_LIMIT_PER_BYTE 16u
#define HEAP_LIMIT_KIB (256u * 1024u)

/* Unicode's White_Space; PCRE2's \s has U+180E on top. */
#define SPACE "\\t-\\r\\x{85}\\p{Z}"

/* Characters of a general category that Unicode 15, 15.1 and 16 assigned (UnicodeData.txt of both).  The tokenizers
 * library knows them, PCRE2 10.42 does not; naming them twice is harmless. */
static const struct {
    const char *category, *ranges;
} newer[] = {
    {"L", "\\x{1c89}-\\x{1c8a}\\x{a7cb}-\\x{a7cd}\\x{a7da}-\\x{a7dc}\\x{105c0}-\\x{105f3}\\x{10d4a}-\\x{10d65}"
          "\\x{10d6f}-\\x{10d85}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}"
          "\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}\\x{113d3}\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}"
          "\\x{11f12}-\\x{11f33}\\x{1342f}\\x{13441}-\\x{13446}\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}"
          "\\x{16d40}-\\x{16d6c}\\x{18cff}\\x{1b132}\\x{1b155}\\x{1df25}-\\x{1df2a}\\x{1e030}-\\x{1e06d}"
          "\\x{1e4d0}-\\x{1e4eb}\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"},
    {"Lu", "\\x{1c89}\\x{a7cb}-\\x{a7cc}\\x{a7da}\\x{a7dc}\\x{10d50}-\\x{10d65}"},
    {"Ll", "\\x{1c8a}\\x{a7cd}\\x{a7db}\\x{10d70}-\\x{10d85}\\x{1df25}-\\x{1df2a}"},
    {"Lm", "\\x{10d4e}\\x{10d6f}\\x{16d40}-\\x{16d42}\\x{16d6b}-\\x{16d6c}\\x{1e030}-\\x{1e06d}\\x{1e4eb}"},
    {"Lo", "\\x{105c0}-\\x{105f3}\\x{10d4a}-\\x{10d4d}\\x{10d4f}\\x{10ec2}-\\x{10ec4}\\x{1123f}-\\x{11240}"
           "\\x{11380}-\\x{11389}\\x{1138b}\\x{1138e}\\x{11390}-\\x{113b5}\\x{113b7}\\x{113d1}\\x{113d3}"
           "\\x{11bc0}-\\x{11be0}\\x{11f02}\\x{11f04}-\\x{11f10}\\x{11f12}-\\x{11f33}\\x{1342f}\\x{13441}-\\x{13446}"
           "\\x{13460}-\\x{143fa}\\x{16100}-\\x{1611d}\\x{16d43}-\\x{16d6a}\\x{18cff}\\x{1b132}\\x{1b155}"
           "\\x{1e4d0}-\\x{1e4ea}\\x{1e5d0}-\\x{1e5ed}\\x{1e5f0}\\x{2b739}\\x{2ebf0}-\\x{2ee5d}\\x{31350}-\\x{323af}"},
    {"M", "\\x{897}\\x{cf3}\\x{ece}\\x{10d69}-\\x{10d6d}\\x{10efc}-\\x{10eff}\\x{11241}\\x{113b8}-\\x{113c0}"
          "\\x{113c2}\\x{113c5}\\x{113c7}-\\x{113ca}\\x{113cc}-\\x{113d0}\\x{113d2}\\x{113e1}-\\x{113e2}"
          "\\x{11f00}-\\x{11f01}\\x{11f03}\\x{11f34}-\\x{11f3a}\\x{11f3e}-\\x{11f42}\\x{11f5a}\\x{13440}"
          "\\x{13447}-\\x{13455}\\x{1611e}-\\x{1612f}\\x{1e08f}\\x{1e4ec}-\\x{1e4ef}\\x{1e5ee}-\\x{1e5ef}"},
    {"N", "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}"
          "\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1d2c0}-\\x{1d2d3}"
          "\\x{1e4f0}-\\x{1e4f9}\\x{1e5f1}-\\x{1e5fa}"},
    {"Nd", "\\x{10d40}-\\x{10d49}\\x{116d0}-\\x{116e3}\\x{11bf0}-\\x{11bf9}\\x{11f50}-\\x{11f59}"
           "\\x{16130}-\\x{16139}\\x{16d70}-\\x{16d79}\\x{1ccf0}-\\x{1ccf9}\\x{1e4f0}-\\x{1e4f9}"
           "\\x{1e5f1}-\\x{1e5fa}"},
    {"P", "\\x{1b4e}-\\x{1b4f}\\x{1b7f}\\x{10d6e}\\x{113d4}-\\x{113d5}\\x{113d7}-\\x{113d8}\\x{11b00}-\\x{11b09}"
          "\\x{11be1}\\x{11f43}-\\x{11f4f}\\x{16d6d}-\\x{16d6f}\\x{1e5ff}"},
    {"S", "\\x{2427}-\\x{2429}\\x{2ffc}-\\x{2fff}\\x{31e4}-\\x{31e5}\\x{31ef}\\x{10d8e}-\\x{10d8f}"
          "\\x{1cc00}-\\x{1ccef}\\x{1cd00}-\\x{1ceb3}\\x{1f6dc}\\x{1f774}-\\x{1f776}\\x{1f77b}-\\x{1f77f}\\x{1f7d9}"
          "\\x{1f8b2}-\\x{1f8bb}\\x{1f8c0}-\\x{1f8c1}\\x{1fa75}-\\x{1fa77}\\x{1fa87}-\\x{1fa89}\\x{1fa8f}"
          "\\x{1faad}-\\x{1faaf}\\x{1fabb}-\\x{1fabf}\\x{1fac6}\\x{1face}-\\x{1facf}\\x{1fada}-\\x{1fadc}\\x{1fadf}"
          "\\x{1fae8}-\\x{1fae9}\\x{1faf7}-\\x{1faf8}\\x{1fbcb}-\\x{1fbef}"},
};

/* ---- rewriting ---- */

typedef struct rewrite {
    const char *p, *end, *where;
    obm__buffer out;
    bool in_class;
    obm_error *err;
} rewrite;

static obm_status refuse(const rewrite *w, const char *what) {
    return obm__fail(w->err, OBM_E_UNSUPPORTED, "%s: %s in a regex is not supported", w->where, what);
}

static const char *newer_ranges(const char *category, size_t n) {
    for (size_t i = 0; i < sizeof newer / sizeof *newer; i++) {
        if (strlen(newer[i].category) == n && memcmp(newer[i].category, category, n) == 0) return newer[i].ranges;
    }
    return "";
}

/* A set given as the inside of a class, in or outside of one. */
static obm_status put_set(rewrite *w, bool negated, const char *set, size_t n, const char *more) {
    if (w->in_class && negated) return refuse(w, "a negated set inside a class");
    if (!w->in_class) obm__buffer_text(&w->out, negated ? "[^" : "[");
    obm__buffer_add(&w->out, set, n);
    obm__buffer_text(&w->out, more);
    if (!w->in_class) obm__buffer_text(&w->out, "]");
    return OBM_OK;
}

/* \p{X} and \P{X}; w->p is behind the letter. */
static obm_status put_property(rewrite *w, bool negated) {
    if (w->p == w->end || *w->p != '{') return refuse(w, "\\p without braces");
    const char *name = w->p + 1, *close = memchr(name, '}', (size_t)(w->end - name));
    if (!close) return obm__fail(w->err, OBM_E_FORMAT, "%s: \\p{ without } in a regex", w->where);
    w->p = close + 1;
    if (name < close && *name == '^') {
        name++;
        negated = !negated;
    }
    const char *ranges = newer_ranges(name, (size_t)(close - name));
    if (w->in_class && negated) { /* here the newer characters stay in the set: a class has no difference */
        obm__buffer_text(&w->out, "\\P{");
        obm__buffer_add(&w->out, name, (size_t)(close - name));
        obm__buffer_text(&w->out, "}");
        return OBM_OK;
    }
    char set[72];
    int n = close - name < 64 ? snprintf(set, sizeof set, "\\p{%.*s}", (int)(close - name), name) : -1;
    return n < 0 ? refuse(w, "a property of more than 63 letters") : put_set(w, negated, set, (size_t)n, ranges);
}

/* \uHHHH */
static obm_status put_code_point(rewrite *w) {
    for (int i = 0; i < 4; i++) {
        if (w->p + i >= w->end || !memchr("0123456789abcdefABCDEF", w->p[i], 22)) {
            return obm__fail(w->err, OBM_E_FORMAT, "%s: \\u without four hex digits in a regex", w->where);
        }
    }
    obm__buffer_printf(&w->out, "\\x{%.4s}", w->p);
    w->p += 4;
    return OBM_OK;
}

static obm_status put_escape(rewrite *w) {
    if (w->p + 1 >= w->end) return obm__fail(w->err, OBM_E_FORMAT, "%s: a regex ends in \\", w->where);
    char c = w->p[1], name[3] = {'\\', c, 0};
    w->p += 2;
    switch (c) {
    case 's':
        return put_set(w, false, SPACE, strlen(SPACE), "");
    case 'S':
        if (w->in_class) obm__buffer_text(&w->out, "\\S\\x{180e}");
        return w->in_class ? OBM_OK : put_set(w, true, SPACE, strlen(SPACE), "");
    case 'd':
    case 'D':
        return put_set(w, c == 'D', "\\p{Nd}", 6, newer_ranges("Nd", 2));
    case 'p':
    case 'P':
        return put_property(w, c == 'P');
    case 'u':
        return put_code_point(w);
    case 'v':
        obm__buffer_text(&w->out, "\\x0b");
        return OBM_OK;
    case 'x':
        if (w->p == w->end || (*w->p != '{' && !(*w->p >= '0' && *w->p <= '7')))
            return refuse(w, "\\x of a single byte");
        break;
    case 'n':
    case 'r':
    case 't':
    case 'f':
    case 'a':
    case 'e':
    case 'A':
    case 'z':
    case 'Z':
    case '0':
        break;
    default:
        if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return refuse(w, name);
    }
    obm__buffer_add(&w->out, name, 2);
    return OBM_OK;
}

/* Groups whose flags mean the same on both sides: (?i: and (?-i:, look-around, atomic, names. */
static obm_status check_group(const rewrite *w) {
    if (w->end - w->p < 3 || w->p[1] != '?') return w->end - w->p >= 2 && w->p[1] == '*' ? refuse(w, "(*") : OBM_OK;
    if (strchr(":=!><", w->p[2])) return OBM_OK;
    for (const char *f = w->p + 2; f < w->end && *f != ':' && *f != ')'; f++) {
        if (*f != 'i' && *f != '-') return refuse(w, "a group other than (?i:, (?:, (?=, (?!, (?<=, (?<!, (?>");
    }
    return OBM_OK;
}

/* {n,m}+ repeats the repetition in Ruby syntax and is possessive in PCRE2; {,m} is literal in PCRE2. */
static obm_status check_repetition(const rewrite *w) {
    const char *q = w->p + 1;
    if (q < w->end && *q == ',') return refuse(w, "{,n}");
    while (q < w->end && ((*q >= '0' && *q <= '9') || *q == ',')) q++;
    if (q < w->end && *q == '}' && q + 1 < w->end && q[1] == '+') return refuse(w, "{n,m}+");
    return OBM_OK;
}

static obm_status rewrite_one(rewrite *w) {
    char c = *w->p;
    if (c == '\\') return put_escape(w);
    if (w->in_class) {
        if (c == '[') return refuse(w, "[ inside a class");
        if (c == '&' && w->p + 1 < w->end && w->p[1] == '&') return refuse(w, "&& inside a class");
        if (c == ']') w->in_class = false;
    } else if (c == '(') {
        OBM_TRY(check_group(w));
    } else if (c == '{') {
        OBM_TRY(check_repetition(w));
    } else if (c == '[') {
        w->in_class = true;
        bool negated = w->p + 1 < w->end && w->p[1] == '^';
        if (w->p + 1 + negated < w->end && w->p[1 + negated] == ']') return refuse(w, "] at the start of a class");
        if (negated) {
            obm__buffer_text(&w->out, "[");
            w->p++;
            c = '^';
        }
    }
    obm__buffer_add(&w->out, &c, 1);
    w->p++;
    return OBM_OK;
}

/* ---- compiling ---- */

static obm_status compile(const char *pattern, size_t n, uint32_t options, const char *where, obm__regex **out,
                          obm_error *err) {
    int code = 0;
    PCRE2_SIZE offset = 0;
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    obm__regex *r = obm__calloc(1, sizeof *r);
    if (!context || !r || !(r->where = obm__strdup(where))) {
        pcre2_compile_context_free(context);
        obm__regex_free(r);
        return obm__fail_nomem(err, sizeof *r);
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_max_pattern_length(context, 65536);
    r->code = pcre2_compile((PCRE2_SPTR)pattern, n, options | PCRE2_UTF, &code, &offset, context);
    pcre2_compile_context_free(context);
    if (!r->code) {
        PCRE2_UCHAR reason[160] = "";
        pcre2_get_error_message(code, reason, sizeof reason);
        obm__regex_free(r);
        if (code == PCRE2_ERROR_HEAP_FAILED) return obm__fail_nomem(err, n);
        return obm__fail(err, OBM_E_FORMAT, "%s: a regex does not compile: %s", where, (const char *)reason);
    }
    *out = r;
    return OBM_OK;
}

/* To machine code; a build or system without JIT interprets. */
static void speed_up(obm__regex *r) { pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE); }

/* MULTILINE: ^ and $ are always about lines in Ruby syntax. */
#define RUBY (PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C)

static obm_status rewrite_all(const char *pattern, size_t n, const char *where, obm__buffer *out, obm_error *err) {
    rewrite w = {.p = pattern, .end = pattern + n, .where = where, .err = err};
    obm_status status = OBM_OK;
    if (obm__utf8_check(pattern, n) != n) return obm__fail(err, OBM_E_FORMAT, "%s: a regex is not UTF-8", where);
    obm__buffer_add(&w.out, "", 0);
    while (w.p < w.end && status == OBM_OK) status = rewrite_one(&w);
    if (status == OBM_OK && w.out.failed) status = obm__fail_nomem(err, n);
    if (status == OBM_OK) *out = w.out;
    else obm__buffer_free(&w.out);
    return status;
}

obm_status obm__regex_new_rare(const char *pattern, size_t n, const char *where, obm__regex **out, obm_error *err) {
    obm__buffer text;
    OBM_TRY(rewrite_all(pattern, n, where, &text, err));
    obm_status status = compile(text.data, text.size, RUBY, where, out, err);
    obm__buffer_free(&text);
    return status;
}

obm_status obm__regex_new(const char *pattern, size_t n, const char *where, obm__regex **out, obm_error *err) {
    OBM_TRY(obm__regex_new_rare(pattern, n, where, out, err));
    speed_up(*out);
    return OBM_OK;
}

obm_status obm__regex_new_literal(const char *text, size_t n, const char *where, obm__regex **out, obm_error *err) {
    if (obm__utf8_check(text, n) != n) return obm__fail(err, OBM_E_FORMAT, "%s: a pattern is not UTF-8", where);
    OBM_TRY(compile(text, n, PCRE2_LITERAL, where, out, err));
    speed_up(*out);
    return OBM_OK;
}

void obm__regex_free(obm__regex *r) {
    if (!r) return;
    pcre2_code_free(r->code);
    obm_free(r->where);
    obm_free(r);
}

/* ---- matching ---- */

/* A match takes some hundred nanoseconds: this many are well below a millisecond. */
#define MATCHES_PER_LOOK 1024

obm_status obm__matching_look(obm__matching *m, obm_error *err) {
    return m && m->pulse && ++m->calls % MATCHES_PER_LOOK == 0 ? obm__pulse_check(m->pulse, err) : OBM_OK;
}

obm__matching *obm__matching_new(obm__pulse *pulse) {
    obm__matching *m = obm__calloc(1, sizeof *m);
    if (!m) return NULL;
    m->pulse = pulse;
    m->data = pcre2_match_data_create(1, NULL);
    m->context = pcre2_match_context_create(NULL);
    m->stack = pcre2_jit_stack_create(32 * 1024, 8 * 1024 * 1024, NULL); /* NULL without JIT */
    if (!m->data || !m->context) {
        obm__matching_free(m);
        return NULL;
    }
    pcre2_set_heap_limit(m->context, HEAP_LIMIT_KIB);
    if (m->stack) pcre2_jit_stack_assign(m->context, NULL, m->stack);
    return m;
}

void obm__matching_free(obm__matching *m) {
    if (!m) return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    pcre2_jit_stack_free(m->stack);
    obm_free(m);
}

obm_status obm__regex_find(const obm__regex *r, obm__matching *m, const char *s, size_t n, size_t start, bool *found,
                           size_t *begin, size_t *end, obm_error *err) {
    uint64_t limit = MATCH_LIMIT_BASE + MATCH_LIMIT_PER_BYTE * (uint64_t)n;
    pcre2_set_match_limit(m->context, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    int code = pcre2_match(r->code, (PCRE2_SPTR)s, n, start, PCRE2_NO_UTF_CHECK, m->data, m->context);
    if (code == PCRE2_ERROR_NOMATCH) {
        *found = false;
        return OBM_OK;
    }
    if (code == PCRE2_ERROR_NOMEMORY) return obm__fail_nomem(err, n);
    const PCRE2_SIZE *at = pcre2_get_ovector_pointer(m->data);
    if (code < 0 || at[0] < start || at[1] < at[0] || at[1] > n) {
        PCRE2_UCHAR reason[160] = "the match ends before it starts";
        if (code < 0) pcre2_get_error_message(code, reason, sizeof reason);
        return obm__fail(err, OBM_E_FORMAT, "%s: a regex cannot be matched at byte %zu of a text of %zu: %s", r->where,
                         start, n, (const char *)reason);
    }
    *found = true;
    *begin = at[0];
    *end = at[1];
    return OBM_OK;
}
