#include "nn/mlp.h"

#include <stdio.h>

void mlp_init(struct mlp *mlp, struct param_list *params, const struct groups *groups,
              const struct mlp_config *config)
{
    const int64_t num_halves = config->activation == ACTIVATION_SWIGLU ? 2 : 1;
    char fc1_name[PARAM_NAME_MAX], fc2_name[PARAM_NAME_MAX];

    mlp->activation = config->activation;
    snprintf(fc1_name, sizeof fc1_name, "%s.linear_fc1", config->name);
    linear_init(&mlp->fc1, params, groups,
                &(struct linear_config){.name = fc1_name,
                                        .split = LINEAR_COLUMN,
                                        .num_out_dims = 2,
                                        .out_dims = {num_halves, config->ffn_hidden_size},
                                        .split_dim = 1,
                                        .in_features = config->hidden_size,
                                        .bias = config->bias,
                                        .init_std = config->init_std});
    snprintf(fc2_name, sizeof fc2_name, "%s.linear_fc2", config->name);
    linear_init(&mlp->fc2, params, groups,
                &(struct linear_config){.name = fc2_name,
                                        .split = LINEAR_ROW,
                                        .num_out_dims = 1,
                                        .out_dims = {config->hidden_size},
                                        .in_features = config->ffn_hidden_size,
                                        .bias = config->bias,
                                        .init_std = config->output_init_std});
    mlp->ffn_hidden_size = mlp->fc2.in_features;
}

static int64_t region_tokens(const struct pass *pass, const struct tensor *x)
{
    return pass->groups->sequence_parallel ? x->dim[0] * pass->groups->tp->size : x->dim[0];
}

void mlp_forward(const struct mlp *mlp, const struct pass *pass, struct tensor *y,
                 const struct tensor *x, struct mlp_saved *saved)
{
    const int64_t num_tokens = region_tokens(pass, x);

    saved->x = *x;
    saved->pre_activation = tensor_new(pass->saved, pass->dtype, num_tokens, mlp->fc1.out_features);
    saved->activated = tensor_new(pass->saved, pass->dtype, num_tokens, mlp->ffn_hidden_size);
    linear_forward(&mlp->fc1, pass, &saved->pre_activation, x);
    op_activation_forward(pass->stream, &(struct activation){.kind = mlp->activation,
                                                             .y = &saved->activated,
                                                             .x = &saved->pre_activation});
    linear_forward(&mlp->fc2, pass, y, &saved->activated);
}

void mlp_backward(const struct mlp *mlp, const struct pass *pass, struct tensor *d_x,
                  const struct tensor *d_y, const struct mlp_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = saved->activated.dim[0];
    struct tensor d_activated =
        tensor_new(pass->scratch, pass->dtype, num_tokens, mlp->ffn_hidden_size);
    struct tensor d_pre = tensor_new(pass->scratch, pass->dtype, num_tokens, mlp->fc1.out_features);

    linear_backward(&mlp->fc2, pass, &d_activated, d_y, &saved->activated);
    op_activation_backward(pass->stream, &(struct activation){.kind = mlp->activation,
                                                              .x = &saved->pre_activation,
                                                              .d_y = &d_activated,
                                                              .d_x = &d_pre});
    linear_backward(&mlp->fc1, pass, d_x, &d_pre, &saved->x);
    arena_release(pass->scratch, mark);
}
