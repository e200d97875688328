/* hf_config.h - config.json of a Hugging Face Mixtral model, in the old and new spellings:
 * rope_theta or rope_parameters.rope_theta, torch_dtype or dtype, head_dim absent or null. */
#ifndef CADRE_CKPT_HF_CONFIG_H
#define CADRE_CKPT_HF_CONFIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "tensor/dtype.h"

enum { HF_NO_TOKEN = -1 };

struct hf_mixtral_config {
    int64_t vocab_size, hidden_size, intermediate_size;
    int64_t num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim;
    int64_t max_position_embeddings;
    int64_t num_local_experts, num_experts_per_tok;
    int64_t bos_token_id, eos_token_id, pad_token_id; /* HF_NO_TOKEN: null */
    double rms_norm_eps, rope_theta, initializer_range;
    double router_aux_loss_coef, router_jitter_noise, attention_dropout;
    bool tie_word_embeddings;
    enum dtype dtype; /* of the weights, as the file says */
};

/* Refuses other architectures, and whatever would silently compute something else. */
int hf_config_parse(struct hf_mixtral_config *config, const char *text, size_t length);
int hf_config_read(struct hf_mixtral_config *config, const char *directory);
/* config.json's content, with both spellings of what has two. */
json_t *hf_config_json(const struct hf_mixtral_config *config);
/* generation_config.json's content. */
json_t *hf_generation_config_json(const struct hf_mixtral_config *config);

#endif
