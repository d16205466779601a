/* Chat templates: ChatML and those of style.c are built in; a model's own Jinja template is recognised as one of them
 * or refused, never run. */
#include "../io/io.h"
#include "text.h"

#include <string.h>

#define START "<|im_start|>"
#define END "<|im_end|>"

/* ---- recognising ---- */

/* Words of templates that print something else than plain ChatML somewhere. */
static const struct {
    const char *word, *obstacle;
} obstacles[] = {
    {"bos_token", "it prints bos_token"},
    {"trim", "it trims messages"},
    {"strip(", "it strips messages"},
    {"<think>", "it handles <think> blocks"},
    {"strftime_now", "it prints the date"},
    {"system_message", "it keeps the system message in a variable"},
    {"default_system", "it keeps a default system message in a variable"},
    {"[INST]", "it mixes in [INST]"},
};

/* One character of a Jinja string literal; at least one byte is left. */
static const char *unescape(const char *p, char *c) {
    *c = *p;
    if (*p != '\\' || !p[1]) return p + 1;
    *c = p[1] == 'n' ? '\n' : p[1] == 't' ? '\t' : p[1];
    return p + 2;
}

static bool starts_with(const char *p, const char *prefix) { return strncmp(p, prefix, strlen(prefix)) == 0; }

/* The literal (or, with quote 0, the text outside of tags) from p to its end. */
static void read_literal(const char *p, char quote, obm__buffer *out) {
    obm__buffer_add(out, "", 0);
    while (*p && (quote ? *p != quote : !starts_with(p, "{{") && !starts_with(p, "{%"))) {
        char c = *p;
        p = quote ? unescape(p, &c) : p + 1;
        obm__buffer_add(out, &c, 1);
    }
}

/* A default is a whole system turn in one piece of text: START system \n <default> END. */
static obm_status note_system(obm__chat *c, const char *at, obm_error *err) {
    const char *head = "system\n";
    char quote = at > c->source && (at[-1] == '\'' || at[-1] == '"') ? at[-1] : 0;
    obm__buffer literal = {0};
    read_literal(at + strlen(START), quote, &literal);
    obm_status status = literal.failed ? obm__fail_nomem(err, strlen(at)) : OBM_OK;
    char *end = status == OBM_OK && starts_with(literal.data, head) ? strstr(literal.data, END) : NULL;
    if (end) {
        *end = 0;
        const char *system = literal.data + strlen(head);
        if (c->system && strcmp(c->system, system) != 0)
            c->obstacle = "it has several default system messages";
        else if (!c->system && !(c->system = obm__strdup(system)))
            status = obm__fail_nomem(err, strlen(system));
    }
    obm__buffer_free(&literal);
    return status;
}

obm_status obm__chat_use(obm__chat *c, obm_error *err) {
    OBM_TRY(obm__style_recognise(c->source, &c->style, err));
    if (c->style) return OBM_OK;
    c->chatml = strstr(c->source, START) && strstr(c->source, END);
    for (size_t i = 0; i < sizeof obstacles / sizeof *obstacles && !c->obstacle; i++) {
        if (strstr(c->source, obstacles[i].word)) c->obstacle = obstacles[i].obstacle;
    }
    for (const char *at = c->source; (at = strstr(at, START)); at++) OBM_TRY(note_system(c, at, err));
    return OBM_OK;
}

/* ---- loading ---- */

const char *obm__chat_pick(const obm_json *value) {
    const char *text = obm__json_string(value);
    for (size_t i = 0; !text && i < obm__json_size(value); i++) {
        const obm_json *entry = obm__json_at(value, i);
        const char *name = obm__json_string(obm__json_get(entry, "name"));
        if (name && strcmp(name, "default") == 0) text = obm__json_string(obm__json_get(entry, "template"));
    }
    return text;
}

static obm_status load_config(obm__chat *c, const char *path, obm_error *err) {
    obm_json *config = NULL;
    OBM_TRY(obm__json_load(path, &config, err));
    const char *text = obm__chat_pick(obm__json_get(config, "chat_template"));
    if (text) c->source = obm__strdup(text);
    obm__json_free(config);
    return text && !c->source ? obm__fail_nomem(err, 0) : OBM_OK;
}

static obm_status load_jinja(obm__chat *c, const char *path, obm_error *err) {
    size_t size = 0;
    OBM_TRY(obm__file_read(path, &c->source, &size, err));
    size_t bad = obm__utf8_check(c->source, size);
    if (bad < size || strlen(c->source) != size) {
        return obm__fail(err, OBM_E_FORMAT, "%s: not UTF-8 text at byte %zu", path,
                         bad < size ? bad : strlen(c->source));
    }
    return OBM_OK;
}

/* Tries one file; sets c->source and c->name where it has a template. */
static obm_status load_from(obm__chat *c, const char *path,
                            obm_status (*load)(obm__chat *c, const char *path, obm_error *err), obm_error *err) {
    if (c->source || !path || !obm__file_exists(path)) return OBM_OK;
    OBM_TRY(load(c, path, err));
    if (!c->source) return OBM_OK;
    c->name = obm__strdup(path);
    return c->name ? OBM_OK : obm__fail_nomem(err, strlen(path));
}

/* A token is its text, or {"content": text, ...}. */
static bool copy_token(const obm_json *value, char **out) {
    const char *text = obm__json_string(value);
    if (!text) text = obm__json_string(obm__json_get(value, "content"));
    return !text || (*out = obm__strdup(text)) != NULL;
}

static obm_status load_tokens(obm__chat *c, const char *path, obm_error *err) {
    obm_json *config = NULL;
    OBM_TRY(obm__json_load(path, &config, err));
    bool ok = copy_token(obm__json_get(config, "bos_token"), &c->bos) &&
              copy_token(obm__json_get(config, "eos_token"), &c->eos);
    obm__json_free(config);
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

obm_status obm__chat_load(obm__chat *c, const obm__chat_files *places, size_t n, obm_error *err) {
    for (size_t i = 0; i < n; i++) {
        if (!places[i].config || !obm__file_exists(places[i].config)) continue;
        OBM_TRY(load_tokens(c, places[i].config, err));
        break;
    }
    for (size_t i = 0; i < n; i++) {
        OBM_TRY(load_from(c, places[i].jinja, load_jinja, err));
        OBM_TRY(load_from(c, places[i].config, load_config, err));
    }
    return c->source ? obm__chat_use(c, err) : OBM_OK;
}

void obm__chat_free(obm__chat *c) {
    obm_free(c->source);
    obm_free(c->name);
    obm_free(c->system);
    obm_free(c->bos);
    obm_free(c->eos);
    *c = (obm__chat){0};
}

/* ---- rendering ---- */

/* The built-in template whose marks a text has, the more special ones first. */
static const char *nearest(const char *source) {
    static const struct {
        const char *mark, *and_mark, *name;
    } marks[] = {
        {"<|start_header_id|>", "Cutting Knowledge", "llama3.1"},
        {"<|start_header_id|>", "", "llama3"},
        {"<start_of_turn>", "first_user_prefix", "gemma3"},
        {"<start_of_turn>", "", "gemma"},
        {"<|im_sep|>", "", "phi4"},
        {"<|im_start|>", "enable_thinking", "qwen3"},
        {"<|im_start|>", "", "chatml"},
        {"<|start_of_role|>", "", "granite"},
        {"<|end|>", "'<|' + message['role'] + '|>'", "phi4mini"},
        {"<|end|>", "", "phi3"},
        {"<|assistant|>", "eos_token", "olmo2"},
        {"[INST]", "<<SYS>>", "llama2"},
        {"[INST]", "", "mistral"},
    };
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (strstr(source, marks[i].mark) && strstr(source, marks[i].and_mark)) return marks[i].name;
    return NULL;
}

static obm_status check_template(const obm__chat *c, obm_error *err) {
    if (!c->source) {
        return obm__fail(err, OBM_E_UNSUPPORTED,
                         "the model has no chat template (neither chat_template.jinja nor chat_template in "
                         "tokenizer_config.json); a built-in one can be given by name: %s",
                         obm__style_names());
    }
    if (c->style) return OBM_OK;
    if (!c->chatml || c->obstacle) {
        const char *name = nearest(c->source);
        return obm__fail(
            err, OBM_E_UNSUPPORTED,
            "%s: the chat template is none of the built-in ones%s%s; if one of them fits%s%s%s, give its name: %s",
            c->name, c->chatml ? ", not plain ChatML: " : "", c->chatml ? c->obstacle : "",
            name ? " (it has the marks of " : "", name ? name : "", name ? ")" : "", obm__style_names());
    }
    return OBM_OK;
}

static obm_status check_messages(const obm_message *messages, size_t n, obm_error *err) {
    if (n == 0 || !messages) return obm__fail(err, OBM_E_ARG, "a chat needs at least one message");
    for (size_t i = 0; i < n; i++) {
        const char *role = messages[i].role;
        if (!role || !messages[i].content) return obm__fail(err, OBM_E_ARG, "message %zu has no role or no content", i);
        if (strcmp(role, "tool") == 0)
            return obm__fail(err, OBM_E_UNSUPPORTED, "message %zu: the role tool is not supported", i);
        if (strcmp(role, "system") && strcmp(role, "user") && strcmp(role, "assistant")) {
            return obm__fail(err, OBM_E_ARG, "message %zu: unknown role \"%.64s\" (system, user, assistant)", i, role);
        }
    }
    return OBM_OK;
}

static void add_turn(obm__buffer *out, const char *role, const char *content) {
    obm__buffer_text(out, START);
    obm__buffer_text(out, role);
    obm__buffer_text(out, "\n");
    obm__buffer_text(out, content);
    obm__buffer_text(out, END "\n");
}

static void render_chatml(const char *system, const obm_message *messages, size_t n, bool add_generation,
                          obm__buffer *out) {
    if (system && strcmp(messages[0].role, "system") != 0) add_turn(out, "system", system);
    for (size_t i = 0; i < n; i++) add_turn(out, messages[i].role, messages[i].content);
    if (add_generation) obm__buffer_text(out, START "assistant\n");
}

/* A token that a file without bos_token or eos_token leaves out is the usual one, if the vocabulary has it. */
static const char *or_usual(const obm_tokenizer *t, const char *own, const char *const usual[3]) {
    for (int i = 0; !own && i < 3; i++) {
        if (obm_tokenizer_id(t, usual[i]) >= 0) own = usual[i];
    }
    return own;
}

obm_status obm__template_find(const char *name, const char **out, obm_error *err) {
    const obm__style *style = obm__style_find(name);
    if (!style && strcmp(name, "chatml") != 0)
        return obm__fail(err, OBM_E_ARG, "no built-in chat template is called \"%.64s\" (%s)", name,
                         obm__style_names());
    *out = style ? obm__style_name(style) : "chatml";
    return OBM_OK;
}

static obm_status render_named(const obm_tokenizer *t, const char *name, const obm_message *messages, size_t n,
                               bool add_generation, obm__buffer *out, obm_error *err) {
    static const char *const bos[] = {"<|begin_of_text|>", "<bos>", "<s>"}, *const eos[] = {"<|end_of_text|>", "<eos>",
                                                                                            "</s>"};
    const obm__style *style = obm__style_find(name);
    OBM_TRY(obm__template_find(name, &name, err));
    if (style)
        return obm__style_render(style, or_usual(t, t->chat.bos, bos), or_usual(t, t->chat.eos, eos), messages, n,
                                 add_generation, out, err);
    render_chatml(NULL, messages, n, add_generation, out);
    return OBM_OK;
}

obm_status obm_tokenizer_builtin_template(const obm_tokenizer *t, const char *name, const obm_message *messages,
                                          size_t n, bool add_generation, char **text, obm_error *err) {
    obm__buffer out = {0};
    obm_status status = OBM_OK;
    const obm__chat *c = &t->chat;
    if (!name) OBM_TRY(check_template(c, err));
    OBM_TRY(check_messages(messages, n, err));
    obm__buffer_add(&out, "", 0);
    if (name)
        OBM_GO(render_named(t, name, messages, n, add_generation, &out, err));
    else if (c->style)
        OBM_GO(obm__style_render(c->style, c->bos, c->eos, messages, n, add_generation, &out, err));
    else
        render_chatml(c->system, messages, n, add_generation, &out);
    if (out.failed) OBM_GO(obm__fail_nomem(err, out.size));
    *text = out.data;
    out.data = NULL;
done:
    obm__buffer_free(&out);
    return status;
}

obm_status obm_tokenizer_apply_template(const obm_tokenizer *t, const obm_message *messages, size_t n,
                                        bool add_generation, char **text, obm_error *err) {
    return obm_tokenizer_builtin_template(t, NULL, messages, n, add_generation, text, err);
}

const char *obm_tokenizer_template_name(const obm_tokenizer *t) {
    if (t->chat.style) return obm__style_name(t->chat.style);
    return t->chat.chatml && !t->chat.obstacle ? "chatml" : NULL;
}
