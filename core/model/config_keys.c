/*
 * Which keys of a config.json are understood.  Every key is looked at: one that could change results and is not
 * understood is refused by name, so that no model runs wrongly in silence.  It reads no values.
 *
 * The rule: a key is fine if it says nothing about results (it tells of training, sampling, files or libraries), if the
 * architecture reads it, if it has the value at which it changes nothing, or if it is null, false or empty.
 */
#include "config.h"

#include <string.h>

/* Read, or known to be ignored, whatever the architecture. */
#define ALL (~0u)

typedef struct known_key {
    const char *key;
    unsigned has;   /* read by architectures with one of these */
    double neutral; /* for the others */
} known_key;

static const known_key keys[] = {
    {"model_type", ALL, 0},
    {"vocab_size", ALL, 0},
    {"hidden_size", ALL, 0},
    {"intermediate_size", ALL, 0},
    {"num_hidden_layers", ALL, 0},
    {"num_attention_heads", ALL, 0},
    {"num_key_value_heads", ALL, 0},
    {"head_dim", ALL, 0},
    {"max_position_embeddings", ALL, 0},
    {"original_max_position_embeddings", ALL, 0},
    {"rms_norm_eps", ALL, 0},
    {"tie_word_embeddings", ALL, 0},
    {"eos_token_id", ALL, 0},
    {"rope_theta", ALL, 0},
    {"rope_scaling", ALL, 0},
    {"rope_parameters", ALL, 0},
    {"layer_types", ALL, 0},
    {"hidden_act", ALL, 0},
    {"hidden_activation", OBM_HAS_HIDDEN_ACTIVATION, 0},
    {"attention_bias", OBM_HAS_ATTENTION_BIAS | OBM_HAS_QKV_BIAS, 0},
    {"mlp_bias", OBM_HAS_MLP_BIAS, 0},
    {"sliding_window", ALL, 0}, /* transformers does not look at it where the architecture has no windows */
    {"use_sliding_window", OBM_HAS_WINDOW_SWITCH, 0},
    {"max_window_layers", ALL, 0}, /* the same */
    {"sliding_window_pattern", OBM_HAS_WINDOW_PATTERN, 0},
    {"no_rope_layers", OBM_HAS_NO_ROPE_LAYERS, 0},
    {"no_rope_layer_interval", OBM_HAS_NO_ROPE_LAYERS, 0},
    {"rope_local_base_freq", OBM_HAS_LOCAL_ROPE, 0},
    {"partial_rotary_factor", OBM_HAS_PARTIAL_ROPE, 1},
    {"query_pre_attn_scalar", OBM_HAS_QUERY_SCALAR, 0},
    {"attn_logit_softcapping", OBM_HAS_ATTENTION_CAP, 0},
    {"final_logit_softcapping", OBM_HAS_LOGIT_CAP, 0},
    {"embedding_multiplier", OBM_HAS_MULTIPLIERS, 1},
    {"residual_multiplier", OBM_HAS_MULTIPLIERS, 1},
    {"attention_multiplier", OBM_HAS_MULTIPLIERS, 0},
    {"logits_scaling", OBM_HAS_MULTIPLIERS, 1},
    {"logit_scale", 0, 1},
    {"is_causal", 0, 1},
    {"full_attn_mod", 0, 1},      /* Phi-4-mini: every layer attends to all */
    {"interpolate_factor", 0, 1}, /* the same model */
    {"num_local_experts", 0, 0},
    {"num_experts", 0, 0},
    {"num_nextn_predict_layers", 0, 0},
};

/* Training, sampling, files, libraries: transformers' PretrainedConfig and what fine-tuning tools leave behind. */
static const char *const harmless[] = {
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cls_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_flash_attention_2",
    "use_flash_attn",
};

/* Beside the config of a text model: what sees images, and the ids that stand for them. */
static const char *const outer_keys[] = {
    "boi_token_id", "boi_token_index", "eoi_token_id",        "eoi_token_index",
    "eos_token_id", "image_token_id",  "image_token_index",   "mm_tokens_per_image",
    "model_type",   "text_config",     "tie_word_embeddings", "vision_config",
};

/* In rope_scaling and rope_parameters; those that a type does not read say nothing there. */
static const char *const rope_keys[] = {
    "rope_type",        "type",         "rope_theta",  "factor",          "original_max_position_embeddings",
    "attention_factor", "beta_fast",    "beta_slow",   "mscale",          "mscale_all_dim",
    "truncate",         "short_factor", "long_factor", "low_freq_factor", "high_freq_factor",
    "finetuned",
};

static bool listed(const char *const *list, size_t n, const char *key) {
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i], key)) return true;
    return false;
}
#define LISTED(list, key) listed(list, sizeof list / sizeof *list, key)

/* null, false, {} or []. */
static bool says_nothing(const obm_json *v) {
    obm_json_kind kind = obm__json_kind(v);
    bool flag;
    if (kind == OBM_JSON_OBJECT || kind == OBM_JSON_ARRAY) return obm__json_size(v) == 0;
    return obm__absent(v) || (obm__json_bool(v, &flag) && !flag);
}

static bool is_neutral(const obm_json *v, double neutral) {
    bool flag;
    double value;
    if (obm__json_bool(v, &flag)) return flag == (neutral != 0);
    return obm__json_real(v, &value) && value == neutral;
}

static bool is_understood(const char *key, const obm_json *v, const obm__arch *arch) {
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (strcmp(keys[i].key, key)) continue;
        return keys[i].has == ALL || (arch->has & keys[i].has) || is_neutral(v, keys[i].neutral);
    }
    return key[0] == '_' || LISTED(harmless, key); /* transformers' private attributes begin with _ */
}

obm_status obm__check_keys(const obm__reader *r, const obm__arch *arch) {
    for (void *it = obm__json_first(r->json); it; it = obm__json_next(r->json, it)) {
        const obm_json *v = obm__json_value(it);
        if (!says_nothing(v) && !is_understood(obm__json_key(it), v, arch))
            return obm__refuse_key(r, obm__json_key(it), v);
    }
    return OBM_OK;
}

/* Besides those, what repeats the inner config. */
obm_status obm__check_outer_keys(const obm__reader *r, const obm_json *inner) {
    for (void *it = obm__json_first(r->json); it; it = obm__json_next(r->json, it)) {
        const char *key = obm__json_key(it);
        const obm_json *v = obm__json_value(it), *same = obm__json_get(inner, key);
        bool known = key[0] == '_' || LISTED(outer_keys, key) || LISTED(harmless, key);
        if (!known && !says_nothing(v) && !(same && obm__json_equal(v, same))) return obm__refuse_key(r, key, v);
    }
    return OBM_OK;
}

obm_status obm__check_rope_keys(const obm__reader *r, const obm__arch *arch) {
    for (void *it = obm__json_first(r->json); it; it = obm__json_next(r->json, it)) {
        const char *key = obm__json_key(it);
        const obm_json *v = obm__json_value(it);
        bool partial =
            !strcmp(key, "partial_rotary_factor") && ((arch->has & OBM_HAS_PARTIAL_ROPE) || is_neutral(v, 1));
        if (!says_nothing(v) && !partial && !LISTED(rope_keys, key)) return obm__refuse_key(r, key, v);
    }
    return OBM_OK;
}
