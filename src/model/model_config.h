/* model_config.h - the facts of a model, as the layers need them: what the options mean, worked
 * out. */
#ifndef CADRE_MODEL_MODEL_CONFIG_H
#define CADRE_MODEL_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "moe/balance.h"
#include "moe/dispatcher.h"
#include "nn/attention.h"
#include "ops/ops.h"

enum { MODEL_LAYERS_MAX = 4096 };

enum position_kind { POSITION_NONE, POSITION_LEARNED, POSITION_ROPE };
enum recompute_kind { RECOMPUTE_NONE, RECOMPUTE_FULL_UNIFORM, RECOMPUTE_FULL_BLOCK };

struct model_config {
    int num_layers;
    int64_t hidden_size, ffn_hidden_size;
    int64_t num_heads, num_groups, head_dim;
    int64_t vocab_size;        /* of the tokenizer */
    int64_t padded_vocab_size; /* rows of the embedding */
    int64_t max_positions, seq_length;
    enum norm_kind norm;
    bool norm_one_plus;
    double norm_eps;
    enum activation_kind activation;
    bool linear_bias, qkv_bias;
    bool tied_embeddings;
    enum position_kind position;
    double rope_base, rope_percent, rope_interpolation;
    bool rope_interleaved;
    enum cp_comm_type cp_comm_type[MODEL_LAYERS_MAX];
    double attention_dropout, hidden_dropout;
    double init_std; /* N(0, std); linear_proj and fc2: std / sqrt(2 * num_layers) */
    enum dtype dtype;

    /* mixture of experts */
    int num_experts;                     /* 0: a dense model */
    bool is_moe_layer[MODEL_LAYERS_MAX]; /* --moe-layer-freq */
    int64_t moe_ffn_hidden_size, shared_expert_ffn_hidden_size;
    struct router_rule router_rule;
    bool sinkhorn;
    float balance_coefficient[NUM_BALANCE_TYPES];
    float z_loss_coefficient, jitter_eps;
    double capacity_factor; /* 0: dropless */
    bool pad_to_capacity;
    enum drop_policy drop_policy;
    bool expert_bias;
    float bias_update_rate;
    bool force_load_balancing;
    bool grouped_gemm;
    enum dispatcher_kind dispatcher;
    bool moe_layer_recompute, shared_expert_overlap;
    double rank_capacity_factor; /* 0: what memory holds */

    enum recompute_kind recompute;
    int recompute_num_layers; /* uniform: layers per kept input; block: layers recomputed */
};

int model_config_num_moe_layers(const struct model_config *config);

#endif
