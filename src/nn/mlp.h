/* mlp.h - the dense feed-forward block: fc1, activation, fc2. Also the shared expert. */
#ifndef CADRE_NN_MLP_H
#define CADRE_NN_MLP_H

#include "nn/linear.h"
#include "ops/ops.h"

struct mlp_config {
    const char *name; /* "decoder.layers.0.mlp": .linear_fc1 and .linear_fc2 are appended */
    int64_t hidden_size, ffn_hidden_size;
    enum activation_kind activation;
    bool bias;
    float init_std, output_init_std;
};

struct mlp {
    enum activation_kind activation;
    int64_t ffn_hidden_size; /* of this rank */
    struct linear fc1, fc2;
};

struct mlp_saved {
    struct tensor x;              /* the caller's */
    struct tensor pre_activation; /* [T, 2F or F] */
    struct tensor activated;      /* [T, F] */
};

void mlp_init(struct mlp *mlp, struct param_list *params, const struct groups *groups,
              const struct mlp_config *config);
void mlp_forward(const struct mlp *mlp, const struct pass *pass, struct tensor *y,
                 const struct tensor *x, struct mlp_saved *saved);
void mlp_backward(const struct mlp *mlp, const struct pass *pass, struct tensor *d_x,
                  const struct tensor *d_y, const struct mlp_saved *saved);

#endif
