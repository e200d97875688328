/* mlp.h - the dense feed-forward block: fc1, activation, fc2. Also the shared expert. */
#ifndef CADRE_NN_MLP_H
#define CADRE_NN_MLP_H

#include "nn/linear.h"
#include "ops/ops.h"
#include "parallel/tp_region.h"

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

/* The same in steps, for a block without biases whose caller does other things while the tokens
 * enter and leave the TP region, and lets the block compute while others of its own messages are on
 * their way (shared experts). The tensors given to a step must live until the last one. What lives
 * between the steps is taken from pass->scratch by the first; the others give back what they take.
 */
struct mlp_steps {
    struct tp_gathering x, d_y;       /* on their way in */
    struct tensor partial;            /* of y or d_x, on its way out */
    struct tensor d_activated, d_pre; /* backward */
    struct comm_handle leaving;
};
/* x enters. */
void mlp_forward_enter(const struct mlp *mlp, const struct pass *pass, const struct tensor *x,
                       struct mlp_saved *saved, struct mlp_steps *steps);
/* x is here; fc1 and the activation. */
void mlp_forward_fc1(const struct mlp *mlp, const struct pass *pass, struct mlp_saved *saved,
                     struct mlp_steps *steps);
/* fc2; y leaves. */
void mlp_forward_fc2(const struct mlp *mlp, const struct pass *pass, struct tensor *y,
                     const struct mlp_saved *saved, struct mlp_steps *steps);
/* d_y and, once more, x enter. */
void mlp_backward_enter(const struct mlp *mlp, const struct pass *pass, const struct tensor *d_y,
                        const struct mlp_saved *saved, struct mlp_steps *steps);
/* d_y is here; the gradients of fc2 and of the activation. */
void mlp_backward_fc2(const struct mlp *mlp, const struct pass *pass, const struct mlp_saved *saved,
                      struct mlp_steps *steps);
/* The gradients of fc1; d_x leaves. */
void mlp_backward_fc1(const struct mlp *mlp, const struct pass *pass, struct tensor *d_x,
                      struct mlp_steps *steps);
/* y, or d_x, is here. */
void mlp_leave(const struct pass *pass, struct mlp_steps *steps);

#endif
