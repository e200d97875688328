/* attention.h - causal self-attention with grouped queries (Ainslie et al. 2023): qkv projection,
 * rotary positions, softmax attention, output projection. With groups = heads it is multi-head
 * attention. */
#ifndef CADRE_NN_ATTENTION_H
#define CADRE_NN_ATTENTION_H

#include "nn/linear.h"

struct attention_config {
    const char *name; /* "decoder.layers.0.self_attention" */
    uint64_t layer;   /* global number, for the dropout mask */
    int64_t hidden_size, num_heads, num_groups, head_dim;
    bool qkv_bias, proj_bias;
    bool rope_interleaved;
    float dropout;
    float init_std, proj_init_std;
};

struct attention_layer {
    struct attention_config config;
    int64_t num_heads, num_groups; /* of this rank */
    struct linear qkv, proj;
};

/* Keys and values of the positions seen so far, for generation. */
struct kv_cache {
    struct tensor k, v; /* [max positions, B, G, D] */
    int64_t length;     /* positions filled before this pass */
};

struct attention_saved {
    struct tensor x; /* the input: the caller's */
    struct tensor q, k, v, out, lse;
};

void attention_layer_init(struct attention_layer *attention, struct param_list *params,
                          const struct groups *groups, const struct attention_config *config);
/* y, x [T,H]. rope is the table of rope.h, or has no data (no rotation). cache may be NULL. */
void attention_layer_forward(const struct attention_layer *attention, const struct pass *pass,
                             const struct tensor *rope, struct kv_cache *cache, struct tensor *y,
                             const struct tensor *x, struct attention_saved *saved);
void attention_layer_backward(const struct attention_layer *attention, const struct pass *pass,
                              const struct tensor *rope, struct tensor *d_x,
                              const struct tensor *d_y, const struct attention_saved *saved);

#endif
