/* router.h - the top-k router: logits in f32 whatever the model's dtype, top-k, probabilities,
 * balancing losses, z-loss, drop by capacity (reference M1 and M2). */
#ifndef CADRE_MOE_ROUTER_H
#define CADRE_MOE_ROUTER_H

#include "moe/balance.h"
#include "nn/param.h"
#include "nn/pass.h"
#include "ops/ops.h"

struct router_config {
    const char *name; /* "decoder.layers.0.mlp.router" */
    int layer;        /* global number */
    int64_t hidden_size;
    int num_experts;
    struct router_rule rule;
    bool sinkhorn;         /* training: selection by Sinkhorn balancing */
    bool aux_has_own_topk; /* the balancing losses need a plain top-k of their own */
    struct balance_config balance;
    float z_loss_coefficient; /* 0: off */
    float jitter_eps;         /* 0: off */
    double capacity_factor;   /* 0: dropless */
    bool pad_to_capacity;
    enum drop_policy drop_policy;
    bool expert_bias;
    float bias_update_rate;
    bool force_load_balancing; /* random logits: benchmarks only */
    float init_std;
};

struct router {
    struct router_config config;
    struct param *weight; /* [E,H] */
    struct balance balance;
    struct tensor expert_bias;       /* [E] f32, a buffer that checkpoints keep; no data without */
    struct tensor tokens_per_expert; /* [E] f32: kept slots since the last bias update */
};

struct router_saved {
    struct tensor x;       /* what the logits were computed from: the caller's x, or jittered */
    struct tensor logits;  /* [T,E] f32 */
    struct tensor chosen;  /* [T,K] I32: the top-k */
    struct tensor indices; /* [T,K] I32: the top-k after the drop, -1 where dropped */
    struct tensor probs;   /* [T,K] f32, 0 where dropped */
    struct balance_saved balance;
};

void router_init(struct router *router, struct param_list *params, const struct groups *groups,
                 const struct router_config *config);
/* The buffers, once the run's memory exists. */
void router_allocate(struct router *router, struct stream *stream, struct arena *run);
void router_forward(struct router *router, const struct pass *pass, const struct tensor *x,
                    struct router_saved *saved);
/* d_x += from d_probs [T,K] f32 and from the balancing losses. */
void router_backward(const struct router *router, const struct pass *pass, struct tensor *d_x,
                     const struct tensor *d_probs, const struct router_saved *saved);
/* Slots per expert: ceil(T * K / E * factor), at most T; 0 when dropless (M2). */
int64_t router_capacity(const struct router *router, int64_t num_tokens);
/* After the last microbatch of a global batch: moves the expert bias by the counts (M1.12) and
 * starts the next batch's counts. */
void router_finish_batch(struct router *router, struct stream *stream, const struct groups *groups);

#endif
