/* reference_model.h - the transformer layer and the whole model as plain loops in double precision,
 * and the small models that the tests build. */
#ifndef CADRE_TESTS_LAYERS_REFERENCE_MODEL_H
#define CADRE_TESTS_LAYERS_REFERENCE_MODEL_H

#include "model/transformer_stage.h"
#include "reference_moe.h"

static inline struct rope_config reference_rope_of(const struct model_config *config)
{
    return (struct rope_config){.base = config->rope_base,
                                .percent = config->rope_percent,
                                .interpolation_factor = config->rope_interpolation,
                                .head_dim = config->head_dim,
                                .num_positions =
                                    config->position == POSITION_ROPE ? config->seq_length : 0};
}

/* y[T,H] = h + mlp(norm2 h), h = x + attention(norm1 x); *losses += what a router adds. */
static inline double *reference_layer(const struct transformer_layer *layer,
                                      const struct rope_config *rope, const struct routing *routing,
                                      const double *x, int64_t t, int64_t h, double *losses)
{
    const uint64_t number = (uint64_t)layer->number;
    double *branch = reference_attention(&layer->attention, rope,
                                         reference_norm(&layer->input_norm, x, t, h), t);
    double *sum = new_doubles(t * h), *normed;

    reference_dropout(branch, "attention_branch_dropout", number, layer->hidden_dropout, t, h);
    for (int64_t i = 0; i < t * h; i++) {
        sum[i] = x[i] + branch[i];
    }
    normed = reference_norm(&layer->mlp_norm, sum, t, h);
    branch = layer->is_moe ? reference_moe(&layer->moe, routing, normed, t, losses)
                           : reference_mlp(&layer->mlp, normed, t);
    reference_dropout(branch, "mlp_branch_dropout", number, layer->hidden_dropout, t, h);
    for (int64_t i = 0; i < t * h; i++) {
        sum[i] += branch[i];
    }
    return sum;
}

/* loss[T] of the pass's tokens and labels; routing [num_layers]. */
static inline double *reference_stage(const struct transformer_stage *stage,
                                      const struct routing *routing, int64_t t, double *losses)
{
    const struct rope_config rope = reference_rope_of(&stage->config);
    const int64_t h = stage->config.hidden_size;
    double *x = reference_embedding(&stage->embedding, t, h);

    for (int i = 0; i < stage->place.num_layers; i++) {
        x = reference_layer(&stage->layers[i], &rope, &routing[i], x, t, h, losses);
    }
    return reference_lm_loss(&stage->head, reference_norm(&stage->final_norm, x, t, h), t, h);
}

enum { MODEL_S = 6, MODEL_B = 2, MODEL_T = MODEL_S * MODEL_B, MODEL_VOCAB = 13, MODEL_H = 8 };

/* GPT-2's kind: LayerNorm, learned positions, GELU, biases, tied embeddings, dropout. No experts.
 */
static inline struct model_config gpt_config(int num_layers)
{
    return (struct model_config){.num_layers = num_layers,
                                 .hidden_size = MODEL_H,
                                 .ffn_hidden_size = 10,
                                 .num_heads = 2,
                                 .num_groups = 2,
                                 .head_dim = 4,
                                 .vocab_size = MODEL_VOCAB,
                                 .padded_vocab_size = MODEL_VOCAB,
                                 .max_positions = MODEL_S + 2,
                                 .seq_length = MODEL_S,
                                 .norm = NORM_LAYERNORM,
                                 .norm_eps = 1e-5,
                                 .activation = ACTIVATION_GELU,
                                 .linear_bias = true,
                                 .tied_embeddings = true,
                                 .position = POSITION_LEARNED,
                                 .attention_dropout = 0.2,
                                 .hidden_dropout = 0.3,
                                 .init_std = 0.02,
                                 .dtype = DTYPE_F32};
}

/* Mixtral's kind: RMSNorm, rope, grouped queries, SwiGLU, experts in all layers but the first. */
static inline struct model_config mixtral_config(int num_layers)
{
    struct model_config config = gpt_config(num_layers);

    config.num_heads = 4;
    config.norm = NORM_RMSNORM;
    config.activation = ACTIVATION_SWIGLU;
    config.linear_bias = false;
    config.tied_embeddings = false;
    config.position = POSITION_ROPE;
    config.rope_base = 100.0;
    config.rope_percent = 1.0;
    config.rope_interpolation = 1.0;
    config.attention_dropout = config.hidden_dropout = 0.0;
    config.num_experts = 4;
    config.moe_ffn_hidden_size = 7;
    config.router_rule = (struct router_rule){.topk = 2, .scaling_factor = 1.0f};
    config.balance_coefficient[BALANCE_AUX_LOSS] = 0.1f;
    config.z_loss_coefficient = 0.05f;
    config.grouped_gemm = true;
    for (int i = 1; i < num_layers; i++) {
        config.is_moe_layer[i] = true;
    }
    return config;
}

/* Everything else: layernorm-1p, interleaved rope on half of the head, qkv biases, squared ReLU,
 * sigmoid scores with bias and groups, capacity, shared expert, jitter, dropout; all layers have
 * experts. */
static inline struct model_config unusual_config(int num_layers)
{
    struct model_config config = mixtral_config(num_layers);

    config.norm = NORM_LAYERNORM;
    config.norm_one_plus = true;
    config.activation = ACTIVATION_SQUARED_RELU;
    config.qkv_bias = true;
    config.rope_interleaved = true;
    config.rope_percent = 0.5;
    config.rope_interpolation = 2.0;
    config.attention_dropout = 0.1;
    config.hidden_dropout = 0.2;
    config.shared_expert_ffn_hidden_size = 5;
    config.router_rule.score = ROUTER_SIGMOID;
    config.router_rule.num_groups = 2;
    config.router_rule.group_topk = 2;
    config.router_rule.scaling_factor = 1.5f;
    config.balance_coefficient[BALANCE_SEQ_AUX_LOSS] = 0.2f;
    config.balance_coefficient[BALANCE_GLOBAL_AUX_LOSS] = 0.3f;
    config.jitter_eps = 0.1f;
    config.capacity_factor = 1.0;
    config.expert_bias = true;
    config.bias_update_rate = 0.01f;
    config.grouped_gemm = false;
    config.is_moe_layer[0] = true;
    return config;
}

#endif
