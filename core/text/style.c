/* Built-in chat templates other than ChatML as rows of a table, and telling which one a model's Jinja text is.  That
 * text is compared as a whole, never guessed from parts of it: a template that differs in one word is unknown. */
#include "text.h"

#include <string.h>

enum { SYSTEM, USER, ASSISTANT };

typedef enum system_rule {
    OWN_TURN, /* a turn like the others */
    IN_FIRST, /* in front of the first user's text */
    IN_LAST,  /* in front of the last message's text if that is a user's */
    ALWAYS,   /* a turn of its own in front of all, also without a system message */
    REFUSED   /* at the start, by name; later by the order of roles */
} system_rule;

/* In texts \1 is bos_token, \2 eos_token. */
struct obm__style {
    const char *name;
    uint64_t hash[3]; /* of the Jinja texts that are this; 0: none */
    const char *start;
    const char *open[3], *close[3]; /* around the text of a turn, by role; NULL: the role is passed over */
    const char *last;               /* closes the assistant's turn if it is the last message; NULL: as others */
    const char *before_system, *after_system; /* of IN_FIRST, IN_LAST and ALWAYS */
    system_rule system;
    bool trim[3];    /* the text, with the system's in it */
    bool trim_alone; /* without the system's */
    bool alternate, skip_empty_system;
    /* An assistant's <think> block goes, but after the last question, where the last turn always has one. */
    bool thinks;
    const char *generation, *otherwise; /* at the end, with add_generation and without */
};

#define HEADER(role) "<|start_header_id|>" role "<|end_header_id|>\n\n"
/* Of each name the first is what the name means by itself. */
static const obm__style styles[] = {
    /* Llama-2-chat */
    {.name = "llama2",
     .hash = {0xfb7f40fe141bf7fe, 0x553aa5ea2df94e62},
     .start = "",
     .open = {NULL, "\1[INST] ", " "},
     .close = {NULL, " [/INST]", " \2"},
     .before_system = "<<SYS>>\n",
     .after_system = "\n<</SYS>>\n\n",
     .system = IN_FIRST,
     .trim = {false, true, true},
     .alternate = true,
     .generation = "",
     .otherwise = ""},
    /* Mistral-7B-Instruct-v0.2 and Mixtral */
    {.name = "mistral",
     .hash = {0x83b328d245ac4715},
     .start = "\1",
     .open = {NULL, "[INST] ", ""},
     .close = {NULL, " [/INST]", "\2"},
     .system = REFUSED,
     .alternate = true,
     .generation = "",
     .otherwise = ""},
    /* Mistral-7B-Instruct-v0.1 */
    {.name = "mistral",
     .hash = {0xa552be650ed13046},
     .start = "\1",
     .open = {NULL, "[INST] ", ""},
     .close = {NULL, " [/INST]", "\2 "},
     .system = REFUSED,
     .alternate = true,
     .generation = "",
     .otherwise = ""},
    /* their later revision, with a system message */
    {.name = "mistral",
     .hash = {0xc415279fa4def0f9},
     .start = "\1",
     .open = {NULL, " [INST] ", " "},
     .close = {NULL, " [/INST]", "\2"},
     .before_system = "",
     .after_system = "\n\n",
     .system = IN_FIRST,
     .alternate = true,
     .generation = "",
     .otherwise = ""},
    /* Mistral-7B-Instruct-v0.3, Mistral-Large-2407 */
    {.name = "mistral",
     .hash = {0xc9b1f807d0a91fe3},
     .start = "\1",
     .open = {NULL, "[INST] ", " "},
     .close = {NULL, "[/INST]", "\2"},
     .before_system = "",
     .after_system = "\n\n",
     .system = IN_LAST,
     .trim = {false, false, true},
     .alternate = true,
     .generation = "",
     .otherwise = ""},
    /* Mistral-Nemo */
    {.name = "mistral",
     .hash = {0x2373febfd7efc61f},
     .start = "\1",
     .open = {NULL, "[INST]", ""},
     .close = {NULL, "[/INST]", "\2"},
     .before_system = "",
     .after_system = "\n\n",
     .system = IN_LAST,
     .alternate = true,
     .generation = "",
     .otherwise = ""},
    /* Llama-3-Instruct */
    {.name = "llama3",
     .hash = {0xce268613ebb08359},
     .start = "\1",
     .open = {HEADER("system"), HEADER("user"), HEADER("assistant")},
     .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .trim = {true, true, true},
     .generation = HEADER("assistant"),
     .otherwise = ""},
    /* its first revision, which opens the assistant's turn in any case */
    {.name = "llama3",
     .hash = {0x6533d4995aab8acf},
     .start = "\1",
     .open = {HEADER("system"), HEADER("user"), HEADER("assistant")},
     .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .trim = {true, true, true},
     .generation = HEADER("assistant"),
     .otherwise = HEADER("assistant")},
    /* Llama 3.1 and 3.3 without tools; the date is what their texts say where the caller gives none */
    {.name = "llama3.1",
     .hash = {0x3246b9b80acd3e4e, 0xc85e1d73261632ac},
     .start = "\1",
     .open = {HEADER("system"), HEADER("user"), HEADER("assistant")},
     .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .before_system = HEADER("system") "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
     .after_system = "<|eot_id|>",
     .system = ALWAYS,
     .trim = {true, true, true},
     .generation = HEADER("assistant"),
     .otherwise = ""},
    /* Qwen3 without tools */
    {.name = "qwen3",
     .hash = {0x521dd2c87f60fc75, 0x4033f72a6a5cebc2},
     .start = "",
     .open = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
     .close = {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},
     .thinks = true,
     .generation = "<|im_start|>assistant\n",
     .otherwise = ""},
    /* Gemma 1 and 2 */
    {.name = "gemma",
     .hash = {0x82aacbf2ba6ef2c0},
     .start = "\1",
     .open = {NULL, "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = {NULL, "<end_of_turn>\n", "<end_of_turn>\n"},
     .system = REFUSED,
     .trim = {true, true, true},
     .alternate = true,
     .generation = "<start_of_turn>model\n",
     .otherwise = ""},
    /* Gemma 3 */
    {.name = "gemma3",
     .hash = {0x37027cdc3c29d533},
     .start = "\1",
     .open = {NULL, "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = {NULL, "<end_of_turn>\n", "<end_of_turn>\n"},
     .before_system = "",
     .after_system = "\n\n",
     .system = IN_FIRST,
     .trim = {false, true, true},
     .trim_alone = true,
     .alternate = true,
     .generation = "<start_of_turn>model\n",
     .otherwise = ""},
    /* Gemma-7b-it's first revision has no bos_token */
    {.name = "gemma",
     .hash = {0x44c9eed7f645550c},
     .start = "",
     .open = {NULL, "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = {NULL, "<end_of_turn>\n", "<end_of_turn>\n"},
     .system = REFUSED,
     .trim = {true, true, true},
     .alternate = true,
     .generation = "<start_of_turn>model\n",
     .otherwise = ""},
    /* Phi-3.5-mini, Phi-3-mini since July 2024 */
    {.name = "phi3",
     .hash = {0xc2f22ae9faf7616b},
     .start = "",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {"<|end|>\n", "<|end|>\n", "<|end|>\n"},
     .skip_empty_system = true,
     .generation = "<|assistant|>\n",
     .otherwise = "\2"},
    /* Phi-3-small */
    {.name = "phi3",
     .hash = {0xc68f03aed5941ff2},
     .start = "\1",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {"<|end|>\n", "<|end|>\n", "<|end|>\n"},
     .generation = "<|assistant|>\n",
     .otherwise = "\2"},
    /* Phi-3-mini's and Phi-3-medium's first revisions: the user's turn opens the assistant's, a system message is
       passed over */
    {.name = "phi3",
     .hash = {0x786ee7f064d7d1f2},
     .start = "\1",
     .open = {NULL, "<|user|>\n", ""},
     .close = {NULL, "<|end|>\n<|assistant|>\n", "<|end|>\n"},
     .generation = "",
     .otherwise = ""},
    {.name = "phi3",
     .hash = {0xd3d162d3c2029b7e},
     .start = "",
     .open = {NULL, "<|user|>\n", ""},
     .close = {NULL, "<|end|>\n<|assistant|>\n", "<|end|>\n"},
     .generation = "",
     .otherwise = ""},
    /* Phi-4-mini */
    {.name = "phi4mini",
     .hash = {0x96b89451582dd16b},
     .start = "",
     .open = {"<|system|>", "<|user|>", "<|assistant|>"},
     .close = {"<|end|>", "<|end|>", "<|end|>"},
     .generation = "<|assistant|>",
     .otherwise = "\2"},
    /* Phi-4 */
    {.name = "phi4",
     .hash = {0xc75a88326d66c489},
     .start = "",
     .open = {"<|im_start|>system<|im_sep|>", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>"},
     .close = {"<|im_end|>", "<|im_end|>", "<|im_end|>"},
     .generation = "<|im_start|>assistant<|im_sep|>",
     .otherwise = ""},
    /* OLMo 2 and Tulu */
    {.name = "olmo2",
     .hash = {0x681f89fb95de5e16},
     .start = "\1",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {"\n", "\n", "\2\n"},
     .last = "\2",
     .generation = "<|assistant|>\n",
     .otherwise = ""},
    /* Granite 3.0 */
    {.name = "granite",
     .hash = {0x9e1b90d2f4316378},
     .start = "",
     .open = {"<|start_of_role|>system<|end_of_role|>", "<|start_of_role|>user<|end_of_role|>",
              "<|start_of_role|>assistant<|end_of_role|>"},
     .close = {"<|end_of_text|>\n", "<|end_of_text|>\n", "<|end_of_text|>\n"},
     .generation = "<|start_of_role|>assistant<|end_of_role|>",
     .otherwise = ""},
};
#define COUNT (sizeof styles / sizeof *styles)

const char *obm__style_name(const obm__style *s) { return s->name; }
const char *obm__style_names(void) {
    return "llama2, mistral, llama3, llama3.1, chatml, qwen3, gemma, gemma3, phi3, phi4, phi4mini, granite, olmo2";
}

const obm__style *obm__style_find(const char *name) {
    for (size_t i = 0; i < COUNT; i++) {
        if (strcmp(styles[i].name, name) == 0) return &styles[i];
    }
    return NULL;
}

/* ---- recognising ---- */

typedef struct reader {
    const char *p, *start;
    bool strip, block; /* the tag before ends in -, or is one after which a newline is dropped */
    obm__buffer out;
} reader;

static bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

/* The text up to the next tag as Jinja prints it with trim_blocks and lstrip_blocks, as transformers sets them. */
static void read_text(reader *r) {
    const char *begin = r->p, *end = begin, *line;
    while (*end && !(end[0] == '{' && (end[1] == '{' || end[1] == '%' || end[1] == '#'))) end++;
    r->p = end;
    if (r->strip) {
        while (begin < end && is_blank(*begin)) begin++;
    } else if (r->block && begin < end && *begin == '\n') {
        begin++;
    }
    if (*end && end[2] == '-') {
        while (end > begin && is_blank(end[-1])) end--;
    } else if (*end && end[1] != '{') {
        for (line = end; line > begin && (line[-1] == ' ' || line[-1] == '\t');) line--;
        if (line == r->start || line[-1] == '\n') end = line;
    }
    if (!*end && end > begin && end[-1] == '\n') end--; /* keep_trailing_newline is off */
    if (end == begin) return;
    obm__buffer_text(&r->out, "\3");
    obm__buffer_add(&r->out, begin, (size_t)(end - begin));
}

/* A string, in one form for both kinds of quotes. */
static void read_string(reader *r) {
    char quote = *r->p++;
    obm__buffer_text(&r->out, "\4");
    while (*r->p && *r->p != quote) {
        char c = *r->p++;
        if (c == '\\' && *r->p) {
            c = *r->p++;
            if (c == 'n') c = '\n';
        }
        obm__buffer_add(&r->out, &c, 1);
    }
    if (*r->p) r->p++;
    obm__buffer_text(&r->out, "\4");
}

static bool is_name(char c) { return c == '_' || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z'); }

/* The inside of {{ }} or {% %}: without spaces but where they part two names. */
static void read_tag(reader *r) {
    const char *close = r->p[1] == '{' ? "}}" : "%}";
    bool spaced = false;
    r->block = r->p[1] != '{';
    obm__buffer_text(&r->out, r->block ? "\5" : "\6");
    r->p += 2 + (r->p[2] == '-');
    while (*r->p && strncmp(r->p, close, 2) != 0 && !(r->p[0] == '-' && strncmp(r->p + 1, close, 2) == 0)) {
        if (is_blank(*r->p)) {
            spaced = true;
            r->p++;
            continue;
        }
        if (spaced && is_name(*r->p) && r->out.size && r->out.data && is_name(r->out.data[r->out.size - 1]))
            obm__buffer_text(&r->out, " ");
        spaced = false;
        if (*r->p == '\'' || *r->p == '"')
            read_string(r);
        else
            obm__buffer_add(&r->out, r->p++, 1);
    }
    obm__buffer_text(&r->out, *r->p ? "" : "\7"); /* never closed */
    r->strip = *r->p == '-';
    r->p += *r->p ? 2 + (*r->p == '-') : 0;
}

static void read_comment(reader *r) {
    const char *end = strstr(r->p, "#}");
    r->strip = end && end[-1] == '-';
    r->block = true;
    r->p = end ? end + 2 : r->p + strlen(r->p);
}

/* FNV-1a, 64 bit: nobody gains by a text that collides. */
static uint64_t fnv(const char *s, size_t n) {
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * 0x100000001b3u;
    return h;
}

obm_status obm__style_recognise(const char *jinja, const obm__style **out, obm_error *err) {
    reader r = {.p = jinja, .start = jinja};
    while (*r.p) {
        read_text(&r);
        if (!*r.p) break;
        if (r.p[1] == '#')
            read_comment(&r);
        else
            read_tag(&r);
    }
    obm__buffer_add(&r.out, "", 0);
    if (r.out.failed) {
        obm__buffer_free(&r.out);
        return obm__fail_nomem(err, strlen(jinja));
    }
    uint64_t hash = fnv(r.out.data, r.out.size);
    obm__buffer_free(&r.out);
    *out = NULL;
    for (size_t i = 0; i < COUNT; i++) {
        for (int k = 0; k < 3; k++) {
            if (styles[i].hash[k] && styles[i].hash[k] == hash) *out = &styles[i];
        }
    }
    return OBM_OK;
}

/* ---- rendering ---- */

typedef struct printer {
    const obm__style *s;
    const char *bos, *eos;
    const char *system;          /* to be put into a user's turn; NULL: none */
    const obm_message *question; /* the last one */
    obm__buffer *out;
} printer;

static void put(const printer *p, const char *text) {
    for (; *text; text++) {
        if (*text == 1 || *text == 2)
            obm__buffer_text(p->out, *text == 1 ? p->bos : p->eos);
        else
            obm__buffer_add(p->out, text, 1);
    }
}

/* Python's str.strip: White_Space and the four separators of ASCII. */
static bool is_stripped(uint32_t c) { return obm__is_space(c) || (c >= 0x1c && c <= 0x1f); }

/* Strips what has been printed from `begin` on. */
static void trim(obm__buffer *out, size_t begin) {
    size_t from = begin, end = begin, len;
    if (out->failed) return;
    while (from < out->size && is_stripped(obm__utf8_next(out->data + from, out->size - from, &len))) from += len;
    for (size_t at = end = from; at < out->size; at += len) {
        if (!is_stripped(obm__utf8_next(out->data + at, out->size - at, &len))) end = at + len;
    }
    memmove(out->data + begin, out->data + from, end - from);
    out->size = begin + (end - from);
}

static int role_of(const obm_message *m) {
    return strcmp(m->role, "system") == 0 ? SYSTEM : strcmp(m->role, "user") == 0 ? USER : ASSISTANT;
}

/* ---- thoughts ---- */

#define THINK "<think>"
#define THOUGHT "</think>"

static bool wrapped(const char *text, const char *head, const char *tail) {
    size_t n = strlen(text), h = strlen(head), t = strlen(tail);
    return n >= h && n >= t && !strncmp(text, head, h) && !strcmp(text + n - t, tail);
}

/* The last message that asks: a user's that is no answer of a tool.  Without one, the last of all. */
static size_t last_question(const obm_message *messages, size_t n) {
    for (size_t i = n; i-- > 0;)
        if (role_of(&messages[i]) == USER && !wrapped(messages[i].content, "<tool_response>", "</tool_response>"))
            return i;
    return n ? n - 1 : 0;
}

static const char *skip_newlines(const char *s) { return s + strspn(s, "\n"); }

/* What lies between the last THINK before the first THOUGHT and that, without newlines around; NULL: nothing. */
static const char *find_thought(const char *text, size_t *n) {
    const char *end = strstr(text, THOUGHT), *begin = text, *at = text;
    if (!end) return NULL;
    while (end > text && end[-1] == '\n') end--;
    for (; (at = strstr(at, THINK)) && at + strlen(THINK) <= end; at += strlen(THINK)) begin = at + strlen(THINK);
    begin = begin < end ? skip_newlines(begin) : end;
    *n = begin < end ? (size_t)(end - begin) : 0;
    return *n ? begin : NULL;
}

static const char *after_thoughts(const char *text) {
    const char *at = text, *rest = text;
    while ((at = strstr(at, THOUGHT))) rest = at += strlen(THOUGHT);
    return rest == text ? text : skip_newlines(rest);
}

static void put_answer(const printer *p, const char *text, bool answers, bool last) {
    size_t n = 0;
    const char *thought = find_thought(text, &n), *rest = after_thoughts(text);
    if (answers && (last || thought)) {
        obm__buffer_text(p->out, THINK "\n");
        if (thought) obm__buffer_add(p->out, thought, n);
        obm__buffer_text(p->out, "\n" THOUGHT "\n\n");
        rest = skip_newlines(rest);
    }
    obm__buffer_text(p->out, rest);
}

/* ---- turns ---- */

static void put_turn(const printer *p, const obm_message *m, bool with_system, bool last) {
    int role = role_of(m);
    const obm__style *s = p->s;
    if (!s->open[role] || (role == SYSTEM && s->skip_empty_system && !*m->content)) return;
    put(p, s->open[role]);
    size_t begin = p->out->size;
    if (with_system && p->system) {
        put(p, s->before_system);
        obm__buffer_text(p->out, p->system);
        put(p, s->after_system);
        if (s->trim_alone) begin = p->out->size;
    }
    if (s->thinks && role == ASSISTANT)
        put_answer(p, m->content, m > p->question, last);
    else
        obm__buffer_text(p->out, m->content);
    if (s->trim[role]) trim(p->out, begin);
    put(p, last && role == ASSISTANT && s->last ? s->last : s->close[role]);
}

static void put_system(const printer *p) {
    put(p, p->s->before_system);
    size_t begin = p->out->size;
    if (p->system) obm__buffer_text(p->out, p->system);
    if (p->s->trim[SYSTEM]) trim(p->out, begin);
    put(p, p->s->after_system);
}

static obm_status check_order(const obm__style *s, const obm_message *messages, size_t n, size_t first,
                              obm_error *err) {
    if (s->system == REFUSED && n && role_of(&messages[0]) == SYSTEM)
        return obm__fail(err, OBM_E_ARG, "the chat template %s has no system messages", s->name);
    for (size_t i = first; s->alternate && i < n; i++) {
        if ((role_of(&messages[i]) == USER) != ((i - first) % 2 == 0) || role_of(&messages[i]) == SYSTEM) {
            return obm__fail(
                err, OBM_E_ARG, "message %zu: in the chat template %s roles must alternate user, assistant%s, found %s",
                i, s->name, s->system == REFUSED ? "" : " after an optional system message", messages[i].role);
        }
    }
    return OBM_OK;
}

obm_status obm__style_render(const obm__style *s, const char *bos, const char *eos, const obm_message *messages,
                             size_t n, bool add_generation, obm__buffer *out, obm_error *err) {
    printer p = {s, bos ? bos : "", eos ? eos : "", NULL, messages + last_question(messages, n), out};
    bool begins = n && role_of(&messages[0]) == SYSTEM, apart = s->system != OWN_TURN && s->system != REFUSED;
    size_t first = begins && apart;
    if (first) p.system = messages[0].content;
    OBM_TRY(check_order(s, messages, n, first, err));
    put(&p, s->start);
    if (s->system == ALWAYS) put_system(&p);
    for (size_t i = first; i < n; i++) {
        bool here = role_of(&messages[i]) == USER &&
                    ((s->system == IN_FIRST && i == first) || (s->system == IN_LAST && i + 1 == n));
        put_turn(&p, &messages[i], here, i + 1 == n);
    }
    put(&p, add_generation ? s->generation : s->otherwise);
    return out->failed ? obm__fail_nomem(err, out->size) : OBM_OK;
}
