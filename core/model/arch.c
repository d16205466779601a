/* The architecture table.  A new model_type is one row here: its tensor names, what it has beyond LLaMA, and the values
 * of keys that its config.json may lack, which are those of transformers' configuration classes. */
#include "model.h"

#include <stdio.h>
#include <string.h>

#define LAYER "model.layers.{}."
#define OUTER_NAMES \
    [OBM_EMBEDDING] = OBM_EMBEDDING_NAME, [OBM_FINAL_NORM] = "model.norm.weight", [OBM_HEAD] = OBM_HEAD_NAME
#define QKV_NAMES                                                                            \
    [OBM_Q] = LAYER "self_attn.q_proj.weight", [OBM_Q_BIAS] = LAYER "self_attn.q_proj.bias", \
    [OBM_K] = LAYER "self_attn.k_proj.weight", [OBM_K_BIAS] = LAYER "self_attn.k_proj.bias", \
    [OBM_V] = LAYER "self_attn.v_proj.weight", [OBM_V_BIAS] = LAYER "self_attn.v_proj.bias"
#define OUTPUT_NAMES                                                                         \
    [OBM_O] = LAYER "self_attn.o_proj.weight", [OBM_O_BIAS] = LAYER "self_attn.o_proj.bias", \
    [OBM_DOWN] = LAYER "mlp.down_proj.weight", [OBM_DOWN_BIAS] = LAYER "mlp.down_proj.bias"
#define GATE_UP_NAMES                                                                        \
    [OBM_GATE] = LAYER "mlp.gate_proj.weight", [OBM_GATE_BIAS] = LAYER "mlp.gate_proj.bias", \
    [OBM_UP] = LAYER "mlp.up_proj.weight", [OBM_UP_BIAS] = LAYER "mlp.up_proj.bias"
#define MATRIX_NAMES OUTER_NAMES, QKV_NAMES, OUTPUT_NAMES, GATE_UP_NAMES
/* Roles with one name share a tensor (obm__config_place). */
#define FUSED_NAMES                                                                            \
    [OBM_Q] = LAYER "self_attn.qkv_proj.weight", [OBM_K] = LAYER "self_attn.qkv_proj.weight",  \
    [OBM_V] = LAYER "self_attn.qkv_proj.weight", [OBM_GATE] = LAYER "mlp.gate_up_proj.weight", \
    [OBM_UP] = LAYER "mlp.gate_up_proj.weight"
#define QK_NORM_NAMES [OBM_Q_NORM] = LAYER "self_attn.q_norm.weight", [OBM_K_NORM] = LAYER "self_attn.k_norm.weight"
/* The norm's input is the residual stream, ... */
#define PRE_NORM_NAMES \
    [OBM_ATTENTION_NORM] = LAYER "input_layernorm.weight", [OBM_MLP_NORM] = LAYER "post_attention_layernorm.weight"
/* ... the block's output, */
#define POST_NORM_NAMES                                                                        \
    [OBM_ATTENTION_POST_NORM] = LAYER "post_attention_layernorm.weight", [OBM_MLP_POST_NORM] = \
                                                                             LAYER "post_feedforward_layernorm.weight"
/* ... or there are both. */
#define SANDWICH_NORM_NAMES                                                 \
    POST_NORM_NAMES, [OBM_ATTENTION_NORM] = LAYER "input_layernorm.weight", \
                     [OBM_MLP_NORM] = LAYER "pre_feedforward_layernorm.weight"

#define OPTIONAL_BIASES (OBM_HAS_ATTENTION_BIAS | OBM_HAS_MLP_BIAS)
#define TAIL_WINDOW (OBM_HAS_WINDOW | OBM_HAS_WINDOW_SWITCH | OBM_HAS_WINDOW_TAIL)
#define GEMMA                                                                                                        \
    (OBM_HAS_ATTENTION_BIAS | OBM_HAS_WINDOW | OBM_HAS_QUERY_SCALAR | OBM_HAS_LOGIT_CAP | OBM_HAS_SCALED_EMBEDDING | \
     OBM_HAS_HIDDEN_ACTIVATION)

static const obm__arch archs[] = {
    {.model_type = "llama", /* LLaMA 1-3, SmolLM, SmolLM2, TinyLlama */
     .names = {MATRIX_NAMES, PRE_NORM_NAMES},
     .has = OPTIONAL_BIASES},
    {.model_type = "mistral",
     .names = {MATRIX_NAMES, PRE_NORM_NAMES},
     .has = OBM_HAS_WINDOW,
     .default_window = 4096,
     .default_kv_heads = 8,
     .default_positions = 131072},
    {.model_type = "smollm3",
     .names = {MATRIX_NAMES, PRE_NORM_NAMES},
     .has = OPTIONAL_BIASES | OBM_HAS_WINDOW | OBM_HAS_WINDOW_SWITCH | OBM_HAS_NO_ROPE_LAYERS,
     .windows = OBM_WINDOW_NO_ROPE,
     .default_kv_heads = 4,
     .default_positions = 32768,
     .default_theta = 2e6,
     .default_tied = true},
    {.model_type = "qwen2", /* and Qwen2.5 */
     .names = {MATRIX_NAMES, PRE_NORM_NAMES},
     .has = OBM_HAS_QKV_BIAS | TAIL_WINDOW,
     .windows = OBM_WINDOW_TAIL,
     .default_window = 4096,
     .default_kv_heads = 32,
     .default_positions = 32768},
    {.model_type = "qwen3",
     .names = {MATRIX_NAMES, PRE_NORM_NAMES, QK_NORM_NAMES},
     .has = OBM_HAS_ATTENTION_BIAS | TAIL_WINDOW,
     .windows = OBM_WINDOW_TAIL,
     .default_window = 4096,
     .default_kv_heads = 32,
     .default_head_dim = 128,
     .default_positions = 32768},
    {.model_type = "gemma2",
     .names = {MATRIX_NAMES, SANDWICH_NORM_NAMES},
     .has = GEMMA | OBM_HAS_ATTENTION_CAP,
     .windows = OBM_WINDOW_ALTERNATE,
     .window_pattern = 2,
     .norm_offset = 1,
     .default_window = 4096,
     .default_kv_heads = 4,
     .default_head_dim = 256,
     .default_positions = 8192,
     .default_attention_cap = 50,
     .default_logit_cap = 30,
     .default_query_scalar = 256,
     .default_tied = true},
    {.model_type = "gemma3_text",
     .names = {MATRIX_NAMES, SANDWICH_NORM_NAMES, QK_NORM_NAMES},
     .has = GEMMA | OBM_HAS_WINDOW_PATTERN | OBM_HAS_LOCAL_ROPE,
     .windows = OBM_WINDOW_ALTERNATE,
     .window_pattern = 6,
     .norm_offset = 1,
     .default_window = 4096,
     .default_heads = 8,
     .default_kv_heads = 4,
     .default_head_dim = 256,
     .default_vocab = 262208,
     .default_positions = 131072,
     .default_theta = 1e6,
     .default_query_scalar = 256,
     .default_tied = true},
    /* Gemma 3 that sees images (4B and larger): its text part */
    {.model_type = "gemma3", .inner = "text_config", .inner_type = "gemma3_text"},
    {.model_type = "phi3", /* and Phi-3.5, Phi-4 */
     .names = {OUTER_NAMES, OUTPUT_NAMES, FUSED_NAMES, PRE_NORM_NAMES},
     .has = OBM_HAS_WINDOW | OBM_HAS_PARTIAL_ROPE | OBM_HAS_OLD_LONGROPE,
     .default_positions = 4096,
     .default_original_positions = 4096,
     .default_eps = 1e-5},
    {.model_type = "granite", .names = {MATRIX_NAMES, PRE_NORM_NAMES}, .has = OPTIONAL_BIASES | OBM_HAS_MULTIPLIERS},
    {.model_type = "olmo2",
     .names = {MATRIX_NAMES, POST_NORM_NAMES, QK_NORM_NAMES},
     .has = OBM_HAS_ATTENTION_BIAS | OBM_HAS_WHOLE_QK_NORM,
     .default_eps = 1e-5},
};
#define N_ARCHS (sizeof archs / sizeof *archs)

const obm__arch *obm__arch_find(const char *model_type) {
    for (size_t i = 0; i < N_ARCHS; i++)
        if (!strcmp(archs[i].model_type, model_type)) return &archs[i];
    return NULL;
}

void obm__arch_list(char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (size_t i = 0; i < N_ARCHS && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s", i ? ", " : "", archs[i].model_type);
}
