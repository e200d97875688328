/* attention.h - causal self-attention with grouped queries (Ainslie et al. 2023): qkv projection,
 * rotary positions, softmax attention, output projection. With groups = heads it is multi-head
 * attention.
 *
 * Under context parallelism a rank holds its positions of each sequence
 * (parallel/context_parallel.h), and the CP group exchanges what attention needs in one of three
 * ways. Bytes a rank sends per layer, where T are its tokens, A its heads and G its groups (after
 * TP), D the head_dim, act the bytes of an activation, r its rank in the group:
 *
 *   p2p         keys and values travel round the ring, an exchange in flight while the block before
 *               it is worked on; in backward again, and their gradients go home in f32, of lower
 *               ranks' blocks only the half that is seen
 *     forward   (CP-1) * 2TGD * act
 *     backward  (CP-1) * 2TGD * act + (CP-1 - r/2) * 2TGD * 4
 *   all_gather  keys and values are gathered before attention, in backward again; their gradients
 *               are reduce-scattered in f32
 *     forward   (CP-1) * 2TGD * act
 *     backward  (CP-1) * 2TGD * (act + 4)
 *   a2a         a rank gets the whole sequences of 1/CP of the heads; A and G must be multiples of
 *               CP. With document_start, that is gathered in forward and in backward
 *     forward   (CP-1)/CP * (2A + 2G)TD * act [+ (CP-1) * T * 4]
 *     backward  as much */
#ifndef CADRE_NN_ATTENTION_H
#define CADRE_NN_ATTENTION_H

#include "nn/linear.h"

enum cp_comm_type { CP_COMM_P2P, CP_COMM_ALL_GATHER, CP_COMM_A2A };

struct attention_config {
    const char *name; /* "decoder.layers.0.self_attention" */
    uint64_t layer;   /* global number, for the dropout mask */
    int64_t hidden_size, num_heads, num_groups, head_dim;
    bool qkv_bias, proj_bias;
    bool rope_interleaved;
    float dropout;
    float init_std, proj_init_std;
    enum cp_comm_type cp_comm_type; /* with CP > 1 */
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

/* T is this rank's tokens. With CP_COMM_A2A q, k, v and lse are of S*B tokens and A/CP, G/CP heads.
 */
struct attention_saved {
    struct tensor x;         /* the input: the caller's */
    struct tensor q;         /* [T,A,D] */
    struct tensor k, v;      /* [T,G,D], v right behind k; or rows of the cache */
    struct tensor out;       /* [T,A,D] */
    struct tensor lse;       /* [B,A,S]; p2p and all_gather: [2,B,A,S/2], a part for each chunk */
    struct tensor heads_out; /* CP_COMM_A2A: out before heads went home, [S*B,A/CP,D] */
};

void attention_layer_init(struct attention_layer *attention, struct param_list *params,
                          const struct groups *groups, const struct attention_config *config);
/* y, x [T,H]. rope is the table of rope.h, for positions of the whole sequence, or has no data (no
 * rotation). cache may be NULL, and must be with CP > 1. */
void attention_layer_forward(const struct attention_layer *attention, const struct pass *pass,
                             const struct tensor *rope, struct kv_cache *cache, struct tensor *y,
                             const struct tensor *x, struct attention_saved *saved);
void attention_layer_backward(const struct attention_layer *attention, const struct pass *pass,
                              const struct tensor *rope, struct tensor *d_x,
                              const struct tensor *d_y, const struct attention_saved *saved);

#endif
