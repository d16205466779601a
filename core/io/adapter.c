/* adapter_config.json of a PEFT adapter: which settings decide the values, and which are refused because they would
 * change them in a way that is not known here.  The tensors are matched with a base in delta/adapter.c. */
#include "io.h"

#include <math.h>
#include <string.h>

/* ---- settings that say how an adapter came about; its tensors tell the rest ---- */

/* target_modules, exclude_modules, layers_to_transform and layers_pattern chose the modules when training began: the
 * file holds the tensors of exactly those.  bias and modules_to_save likewise: what they asked for is in the file. */
static const char *const harmless[] = {"alpha_pattern",
                                       "auto_mapping",
                                       "base_model_name_or_path",
                                       "bias",
                                       "corda_config",
                                       "eva_config",
                                       "exclude_modules",
                                       "fan_in_fan_out",
                                       "inference_mode",
                                       "init_lora_weights",
                                       "layers_pattern",
                                       "layers_to_transform",
                                       "loftq_config",
                                       "lora_alpha",
                                       "lora_dropout",
                                       "lora_ga_config",
                                       "megatron_config",
                                       "megatron_core",
                                       "modules_to_save",
                                       "parent_library",
                                       "peft_type",
                                       "peft_version",
                                       "qalora_group_size",
                                       "r",
                                       "rank_pattern",
                                       "revision",
                                       "runtime_config",
                                       "target_modules",
                                       "task_type",
                                       "use_rslora",
                                       "velora_config",
                                       "ensure_weight_tying"};

static const struct {
    const char *key, *what;
} refused[] = {{"use_dora", "DoRA"},
               {"use_qalora", "QALoRA"},
               {"use_bdlora", "block-diagonal LoRA"},
               {"lora_bias", "biases of LoRA layers"},
               {"layer_replication", "layers that are replicated"},
               {"trainable_token_indices", "single trained token rows"},
               {"target_parameters", "LoRA on bare parameters"},
               {"alora_invocation_tokens", "LoRA that begins at a token (aLoRA)"},
               {"arrow_config", "arrow routing"},
               {"kasa_config", "KaSA"},
               {"monteclora_config", "MonteCLoRA"}};

static bool is_one_of(const char *key, const char *const *names, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!strcmp(key, names[i])) return true;
    return false;
}

/* null, false, 0, "" and empty lists and objects leave a setting out. */
static bool is_set(const obm_json *v) {
    bool b;
    double x;
    const char *s;
    switch (obm__json_kind(v)) {
    case OBM_JSON_NULL:
        return false;
    case OBM_JSON_BOOL:
        return obm__json_bool(v, &b) && b;
    case OBM_JSON_INT:
    case OBM_JSON_REAL:
        return !obm__json_real(v, &x) || x != 0;
    case OBM_JSON_STRING:
        return !(s = obm__json_string(v)) || *s;
    default:
        return obm__json_size(v) > 0;
    }
}

static obm_status check_key(const obm__adapter *a, const char *key, const obm_json *v, obm_error *err) {
    if (!is_set(v) || is_one_of(key, harmless, sizeof harmless / sizeof *harmless)) return OBM_OK;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (!strcmp(key, refused[i].key))
            return obm__fail(err, OBM_E_UNSUPPORTED, "%s: %s: %s is not supported; merge the adapter with peft",
                             a->path, key, refused[i].what);
    return obm__fail(err, OBM_E_UNSUPPORTED,
                     "%s: the setting \"%.64s\" is not understood, and it may change the weights", a->path, key);
}

/* Some ways to initialise take a part out of the base's weights, so that base + B A is not the trained model. */
static obm_status check_init(const obm__adapter *a, obm_error *err) {
    static const char *const keep_base[] = {"gaussian", "eva", "orthogonal"};
    const obm_json *v = obm__json_get(a->root, "init_lora_weights");
    const char *s = obm__json_string(v);
    if (obm__json_kind(v) != OBM_JSON_STRING) return OBM_OK;
    if (s && is_one_of(s, keep_base, sizeof keep_base / sizeof *keep_base)) return OBM_OK;
    return obm__fail(err, OBM_E_UNSUPPORTED,
                     "%s: init_lora_weights: \"%.40s\" changed the base's weights before training; convert the adapter "
                     "to a plain LoRA when it is saved (peft: path_initial_model_for_weight_conversion)",
                     a->path, s ? s : "");
}

/* ---- settings that count ---- */

static obm_status expected(const obm__adapter *a, const char *key, const char *what, obm_error *err) {
    const obm_json *v = obm__json_get(a->root, key);
    double x;
    if (obm__json_real(v, &x))
        return obm__fail(err, OBM_E_FORMAT, "%s: %s: expected %s, found %g", a->path, key, what, x);
    return obm__fail(err, OBM_E_FORMAT, "%s: %s: expected %s, found %s", a->path, key, what,
                     v ? obm__json_kind_name(v) : "nothing");
}

static obm_status read_flag(const obm__adapter *a, const char *key, bool *out, obm_error *err) {
    const obm_json *v = obm__json_get(a->root, key);
    if (obm__json_kind(v) == OBM_JSON_NULL || obm__json_bool(v, out)) return OBM_OK;
    return expected(a, key, "true or false", err);
}

static bool is_rank(const obm_json *v, int64_t *out) {
    return obm__json_kind(v) == OBM_JSON_INT && obm__json_int(v, out) && *out > 0 && *out <= INT32_MAX;
}

static bool is_alpha(const obm_json *v, double *out) { return obm__json_real(v, out) && isfinite(*out); }

static obm_status read_pattern(const obm__adapter *a, const char *key, bool ranks, const obm_json **out,
                               obm_error *err) {
    const obm_json *v = obm__json_get(a->root, key);
    if (obm__json_kind(v) == OBM_JSON_NULL) return OBM_OK;
    if (obm__json_kind(v) != OBM_JSON_OBJECT) return expected(a, key, "an object", err);
    for (void *it = obm__json_first(v); it; it = obm__json_next(v, it)) {
        int64_t rank;
        double alpha;
        if (ranks ? is_rank(obm__json_value(it), &rank) : is_alpha(obm__json_value(it), &alpha)) continue;
        return obm__fail(err, OBM_E_FORMAT, "%s: %s: \"%.80s\": expected %s", a->path, key, obm__json_key(it),
                         ranks ? "an integer > 0" : "a finite number");
    }
    *out = v;
    return OBM_OK;
}

static obm_status read_settings(obm__adapter *a, obm_error *err) {
    const char *type = obm__json_string(obm__json_get(a->root, "peft_type"));
    if (!type) return expected(a, "peft_type", "\"LORA\"", err);
    if (strcmp(type, "LORA"))
        return obm__fail(err, OBM_E_UNSUPPORTED,
                         "%s: peft_type: \"%.40s\" adapters are not supported, only \"LORA\"; merge it with peft",
                         a->path, type);
    for (void *it = obm__json_first(a->root); it; it = obm__json_next(a->root, it))
        OBM_TRY(check_key(a, obm__json_key(it), obm__json_value(it), err));
    OBM_TRY(check_init(a, err));
    if (!is_rank(obm__json_get(a->root, "r"), &a->rank)) return expected(a, "r", "an integer > 0", err);
    if (!is_alpha(obm__json_get(a->root, "lora_alpha"), &a->alpha))
        return expected(a, "lora_alpha", "a finite number", err);
    OBM_TRY(read_flag(a, "use_rslora", &a->rslora, err));
    OBM_TRY(read_flag(a, "fan_in_fan_out", &a->transposed, err));
    OBM_TRY(read_flag(a, "ensure_weight_tying", &a->keeps_tie, err));
    OBM_TRY(read_pattern(a, "rank_pattern", true, &a->rank_pattern, err));
    return read_pattern(a, "alpha_pattern", false, &a->alpha_pattern, err);
}

/* ---- life ---- */

static obm_status load(obm__adapter *a, const char *directory, obm_error *err) {
    size_t size;
    if (!(a->path = obm__path_join(directory, OBM_ADAPTER_CONFIG))) return obm__fail_nomem(err, strlen(directory));
    OBM_TRY(obm__file_read(a->path, &a->text, &size, err));
    OBM_TRY(obm__json_parse(a->text, size, a->path, &a->root, err));
    if (obm__json_kind(a->root) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: expected an object, found %s", a->path, obm__json_kind_name(a->root));
    return read_settings(a, err);
}

obm_status obm__adapter_load(const char *directory, obm__adapter **out, obm_error *err) {
    obm__adapter *a = obm__calloc(1, sizeof *a);
    if (!a) return obm__fail_nomem(err, sizeof *a);
    obm_status status = load(a, directory, err);
    if (status != OBM_OK) {
        obm__adapter_free(a);
        return status;
    }
    *out = a;
    return OBM_OK;
}

void obm__adapter_free(obm__adapter *a) {
    if (!a) return;
    obm__json_free(a->root);
    obm_free(a->text);
    obm_free(a->path);
    obm_free(a);
}

bool obm__adapter_here(const char *directory, bool *out) {
    char *path = obm__path_join(directory, OBM_ADAPTER_CONFIG);
    if (path) *out = obm__file_exists(path);
    obm_free(path);
    return path != NULL;
}
