/* experts.h - this rank's experts: a feed-forward block each, as one grouped product or one after
 * another. */
#ifndef CADRE_MOE_EXPERTS_H
#define CADRE_MOE_EXPERTS_H

#include "moe/dispatcher.h"
#include "nn/param.h"
#include "ops/ops.h"

struct experts_config {
    const char *name; /* "decoder.layers.0.mlp.experts" */
    int64_t hidden_size, ffn_hidden_size;
    int num_experts;
    enum activation_kind activation;
    bool bias;
    bool grouped; /* --moe-grouped-gemm: one product over all experts; else one after another */
    float init_std, output_init_std;
};

struct experts {
    struct experts_config config;
    int num_local;                     /* experts of this rank: contiguous, E / EP */
    struct param *fc1, *fc2;           /* [E, 2 or 1, F, H], [E, H, F] */
    struct param *fc1_bias, *fc2_bias; /* [E, 2 or 1, F], [E, H]; NULL without */
};

struct experts_saved {
    struct tensor pre_activation; /* [R, F1] */
};

void experts_init(struct experts *experts, struct param_list *params, const struct groups *groups,
                  const struct experts_config *config);
/* y rows [R,H]. */
void experts_layer_forward(const struct experts *experts, const struct pass *pass, struct tensor *y,
                           const struct dispatched *rows, struct experts_saved *saved);
/* d_x rows [R,H], d_row_prob [R]; d_y as dispatcher->combine_backward gives it. */
void experts_layer_backward(const struct experts *experts, const struct pass *pass,
                            struct tensor *d_x, struct tensor *d_row_prob, const struct tensor *d_y,
                            const struct tensor *d_y_row_token, const struct dispatched *rows,
                            const struct experts_saved *saved);

#endif
