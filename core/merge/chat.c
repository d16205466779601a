/* Chat templates that a recipe names, as Jinja text for the result's files; and what the models' files hold. */
#include "../text/text.h"
#include "job.h"

#include <stdio.h>
#include <string.h>

/* The formats as their models' cards describe them, written plainly. */
static const char *const templates[][2] = {
    {"alpaca",
     "{% for message in messages %}"
     "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
     "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
     "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
     "{% endif %}{% endfor %}"
     "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"},
    {"chatml", "{% for message in messages %}"
               "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
               "{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"},
    {"exaone", "{% for message in messages %}"
               "{{ '[|' + message['role'] + '|]' + message['content'] }}"
               "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
               "{% endfor %}"
               "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"},
    {"llama3", "{{ bos_token }}{% for message in messages %}"
               "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
               "'<|eot_id|>' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"},
    {"mistral", "{{ bos_token }}{% for message in messages %}"
                "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
                "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
                "{% endfor %}"},
};

const char *obm__chat_name(size_t i) { return i < OBM_COUNT(templates) ? templates[i][0] : NULL; }

const char *obm__chat_named(const char *name) {
    for (size_t i = 0; i < OBM_COUNT(templates); i++)
        if (!strcmp(templates[i][0], name)) return templates[i][1];
    return NULL;
}

/* ---- what the models have ---- */

/* *out is owned, NULL without a template; surrounding space does not count. */
static obm_status read_template(const obm__texts *texts, char **out, obm_error *err) {
    char *jinja = NULL, *path = NULL, *text = NULL;
    bool found_all =
        obm__texts_find(texts, "chat_template.jinja", &jinja) && obm__texts_find(texts, "tokenizer_config.json", &path);
    obm_status status = found_all ? OBM_OK : obm__fail_nomem(err, strlen(texts->directory));
    if (status == OBM_OK && jinja && obm__file_exists(jinja)) {
        status = obm__file_read(jinja, &text, NULL, err);
    } else if (status == OBM_OK && path && obm__file_exists(path)) {
        obm_json *config = NULL;
        status = obm__json_load(path, &config, err);
        const char *found = status == OBM_OK ? obm__chat_pick(obm__json_get(config, "chat_template")) : NULL;
        if (found && !(text = obm__strdup(found))) status = obm__fail_nomem(err, strlen(found));
        obm__json_free(config);
    }
    if (status == OBM_OK && text) {
        size_t first = strspn(text, " \t\r\n"), end = strlen(text);
        while (end > first && strchr(" \t\r\n", text[end - 1])) end--;
        *out = obm__strndup(text + first, end - first);
        if (!*out) status = obm__fail_nomem(err, end);
    }
    obm_free(text);
    obm_free(jinja);
    obm_free(path);
    return status;
}

/* A template that an expert's files lack is the base's. */
static obm_status template_of(const obm__input *in, char **out, obm_error *err) {
    obm__texts texts = obm__input_texts(in);
    OBM_TRY(read_template(&texts, out, err));
    if (*out || !texts.own) return OBM_OK;
    texts.own = NULL;
    return read_template(&texts, out, err);
}

/* The one that most inputs have; of equals the first. */
static obm_status most_common(const obm__job *j, char **out, obm_error *err) {
    size_t n = j->n_inputs, best = 0, most = 0;
    char **all = obm__calloc(n, sizeof *all);
    if (!all) return obm__fail_nomem(err, n * sizeof *all);
    obm_status status = OBM_OK;
    for (size_t i = 0; status == OBM_OK && i < n; i++) status = template_of(&j->inputs[i], &all[i], err);
    for (size_t i = 0; status == OBM_OK && i < n; i++) {
        size_t count = 0;
        for (size_t k = 0; all[i] && *all[i] && k < n; k++) count += all[k] && !strcmp(all[i], all[k]);
        if (count > most) most = count, best = i;
    }
    if (status == OBM_OK && most) {
        *out = all[best];
        all[best] = NULL;
    }
    for (size_t i = 0; i < n; i++) obm_free(all[i]);
    obm_free(all);
    return status;
}

obm_status obm__chat_template(const obm__job *j, char **out, obm_error *err) {
    const char *wish = j->recipe->chat_template;
    *out = NULL;
    if (!wish) return OBM_OK;
    if (!strcmp(wish, "auto")) {
        OBM_TRY(most_common(j, out, err));
        if (!*out) obm__warn(j->ctx, "recipe: chat_template: auto: no model has a chat template");
        return OBM_OK;
    }
    const char *named = obm__chat_named(wish);
    *out = obm__strdup(named ? named : wish);
    return *out ? OBM_OK : obm__fail_nomem(err, strlen(wish));
}
