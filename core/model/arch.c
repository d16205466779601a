/* The architecture table.  A new model_type whose layers are built like LLaMA's is one row here. */
#include "model.h"

#include <stdio.h>
#include <string.h>

#define LAYER "model.layers.{}."
#define LLAMA_NAMES                                                                                     \
    {                                                                                                   \
        [OBM_Q] = LAYER "self_attn.q_proj.weight", [OBM_Q_BIAS] = LAYER "self_attn.q_proj.bias",        \
        [OBM_K] = LAYER "self_attn.k_proj.weight", [OBM_K_BIAS] = LAYER "self_attn.k_proj.bias",        \
        [OBM_V] = LAYER "self_attn.v_proj.weight", [OBM_V_BIAS] = LAYER "self_attn.v_proj.bias",        \
        [OBM_O] = LAYER "self_attn.o_proj.weight", [OBM_O_BIAS] = LAYER "self_attn.o_proj.bias",        \
        [OBM_GATE] = LAYER "mlp.gate_proj.weight", [OBM_GATE_BIAS] = LAYER "mlp.gate_proj.bias",        \
        [OBM_UP] = LAYER "mlp.up_proj.weight", [OBM_UP_BIAS] = LAYER "mlp.up_proj.bias",                \
        [OBM_DOWN] = LAYER "mlp.down_proj.weight", [OBM_DOWN_BIAS] = LAYER "mlp.down_proj.bias",        \
        [OBM_ATTENTION_NORM] = LAYER "input_layernorm.weight",                                          \
        [OBM_MLP_NORM] = LAYER "post_attention_layernorm.weight", [OBM_EMBEDDING] = OBM_EMBEDDING_NAME, \
        [OBM_FINAL_NORM] = "model.norm.weight", [OBM_HEAD] = OBM_HEAD_NAME,                             \
    }

/* Defaults are those of transformers' LlamaConfig and MistralConfig: a key that a config.json lacks has these values
 * there. */
static const obm__arch archs[] = {
    {.model_type = "llama",
     .names = LLAMA_NAMES,
     .default_positions = 2048}, /* LLaMA 1-3, SmolLM, SmolLM2, TinyLlama */
    {.model_type = "mistral",
     .names = LLAMA_NAMES,
     .sliding_window = true,
     .default_window = 4096,
     .default_kv_heads = 8,
     .default_positions = 131072},
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
