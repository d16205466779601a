/* From a prompt in any of its forms to the ids that run.  What a router sees of it is core/route's. */
#include "../text/text.h"
#include "model.h"

#include <string.h>

static obm_status need_tokenizer(const obm__prompter *how, obm_error *err) {
    if (how->tokenizer) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s: no tokenizer.json here, so prompts must be token ids%s",
                     obm_checkpoint_path(how->m->base), obm__tokenizer_hint(how->m->base->directory));
}

static obm_status render(const obm__prompter *how, const obm_message *messages, size_t n, char **text, obm_error *err) {
    const char *rendered = NULL;
    obm_error own = {0};
    if (how->template_name)
        return obm_tokenizer_builtin_template(how->tokenizer, how->template_name, messages, n, true, text, err);
    if (how->render) {
        obm_status status = how->render(how->render_user, how->tokenizer, messages, n, &rendered, &own);
        if (status != OBM_OK)
            return obm__fail(err, status, "%s", own.message[0] ? own.message : "the template callback failed");
    }
    if (!rendered) return obm_tokenizer_apply_template(how->tokenizer, messages, n, true, text, err);
    *text = obm__strdup(rendered);
    return *text ? OBM_OK : obm__fail_nomem(err, strlen(rendered));
}

obm_status obm__prompt_text(const obm__prompter *how, const obm_prompt *p, bool chat, char **text, bool *special,
                            obm_error *err) {
    *text = NULL;
    *special = false;
    if (p->ids) return OBM_OK;
    OBM_TRY(need_tokenizer(how, err));
    /* A template spells the special tokens out; plain text gets those of the post-processor. */
    if (p->messages) return render(how, p->messages, p->n_messages, text, err);
    if (!p->text) return obm__fail(err, OBM_E_ARG, "the prompt has neither text nor messages nor ids");
    obm_message turn = {"user", p->text};
    if (p->chat || chat) return render(how, &turn, 1, text, err);
    *special = true;
    *text = obm__strdup(p->text);
    return *text ? OBM_OK : obm__fail_nomem(err, strlen(p->text));
}

static obm_status copy_ids(const obm_prompt *p, int32_t **ids, size_t *n, obm_error *err) {
    int32_t *copy = obm__calloc(p->n_ids, sizeof *copy);
    if (!copy) return obm__fail_nomem(err, p->n_ids * sizeof *copy);
    if (p->n_ids) memcpy(copy, p->ids, p->n_ids * sizeof *copy);
    *ids = copy;
    *n = p->n_ids;
    return OBM_OK;
}

obm_status obm__prompt_ids(const obm__prompter *how, const obm_prompt *p, bool chat, int32_t **ids, size_t *n,
                           obm_error *err) {
    char *text;
    bool special;
    OBM_TRY(obm__prompt_text(how, p, chat, &text, &special, err));
    if (!text) return copy_ids(p, ids, n, err);
    size_t length = strlen(text);
    obm_status status = obm_tokenizer_encode(how->tokenizer, text, length, special, ids, n, err);
    obm_free(text);
    if (status != OBM_OK || *n) return status;
    obm_free(*ids);
    *ids = NULL;
    return obm__fail(err, OBM_E_ARG,
                     "the prompt is %s: expected at least one token, and the tokenizer puts none (no BOS) in front",
                     length ? "no token long" : "empty");
}
