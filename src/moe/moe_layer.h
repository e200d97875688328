/* moe_layer.h - the mixture-of-experts block: router, dispatch, experts, combine, shared experts.
 *
 * With --moe-shared-expert-overlap the shared expert computes while rows travel (M3.8):
 *
 *   forward                                     backward
 *   x enters TP         | router                d_y, x enter TP     |
 *   fc1, activation     | dispatch              fc2, activation     | combine, backward
 *                       | experts                                   | experts
 *   fc2, y leaves TP    | combine               fc1, d_x leaves TP  | dispatch, backward
 *
 * The results have the same bits. */
#ifndef CADRE_MOE_MOE_LAYER_H
#define CADRE_MOE_MOE_LAYER_H

#include "moe/dispatcher.h"
#include "moe/experts.h"
#include "moe/router.h"
#include "nn/mlp.h"

struct moe_layer_config {
    struct router_config router;
    struct experts_config experts;
    struct mlp_config shared_expert; /* ffn_hidden_size 0: none */
    enum dispatcher_kind dispatcher;
    bool recompute;              /* --moe-layer-recompute: keep the input, run forward again */
    bool shared_expert_overlap;  /* --moe-shared-expert-overlap; needs a shared expert */
    double rank_capacity_factor; /* --moe-expert-rank-capacity-factor; 0: none (row_limit.h) */
};

struct moe_layer {
    bool recompute, shared_expert_overlap;
    struct row_limit row_limit;
    const struct dispatcher *dispatcher;
    struct router router;
    struct experts experts;
    bool has_shared_expert;
    struct mlp shared_expert; /* a dense block: cut over TP, replicated over EP */
};

struct moe_saved {
    struct tensor x; /* the caller's */
    struct router_saved router;
    struct dispatched rows;
    struct experts_saved experts;
    struct mlp_saved shared_expert;
};

void moe_layer_init(struct moe_layer *moe, struct param_list *params, const struct groups *groups,
                    const struct moe_layer_config *config);
void moe_layer_allocate(struct moe_layer *moe, struct stream *stream, struct arena *run);
/* y = moe(x), + residual unless NULL. */
void moe_layer_forward(struct moe_layer *moe, const struct pass *pass, struct tensor *y,
                       const struct tensor *x, const struct tensor *residual,
                       struct moe_saved *saved);
void moe_layer_backward(struct moe_layer *moe, const struct pass *pass, struct tensor *d_x,
                        const struct tensor *d_y, const struct moe_saved *saved);

#endif
