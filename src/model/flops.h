/* flops.h - model FLOPs of one training step (forward and backward), by the two formulas that
 * published Megatron figures use. Neither counts the router, the norms or recomputation. For the
 * same speed the head figure is the lower one; say which is printed. */
#ifndef CADRE_MODEL_FLOPS_H
#define CADRE_MODEL_FLOPS_H

#include <stdbool.h>
#include <stdint.h>

struct flops_sizes {
    int64_t batch_size; /* sequences in the global batch */
    int64_t seq_length;
    int64_t num_layers;
    int64_t num_moe_layers; /* of num_layers; 0 is a dense model */
    int64_t hidden_size;
    int64_t num_heads;
    int64_t num_query_groups; /* num_heads without grouped-query attention */
    int64_t head_dim;
    int64_t ffn_hidden_size;     /* of a dense layer */
    int64_t moe_ffn_hidden_size; /* of one expert */
    int64_t topk;
    int64_t shared_ffn_hidden_size; /* 0 without shared experts */
    int64_t vocab_size;             /* padded */
    bool gated;                     /* SwiGLU: fc1 is twice as wide */
};

/* The formula of the seed version (Oct 2024): counts the full S x S of causal attention, and every
 * layer as MoE if there is one. */
double flops_per_step_seed(const struct flops_sizes *sizes);
/* The formula of later versions (2026): causal attention counts half, each layer as what it is. */
double flops_per_step_head(const struct flops_sizes *sizes);

#endif
