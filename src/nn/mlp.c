#include "nn/mlp.h"

#include <stdio.h>

#include "base/check.h"

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

static void new_saved(const struct mlp *mlp, const struct pass *pass, const struct tensor *x,
                      struct mlp_saved *saved)
{
    const int64_t num_tokens = region_tokens(pass, x);

    saved->x = *x;
    saved->pre_activation = tensor_new(pass->saved, pass->dtype, num_tokens, mlp->fc1.out_features);
    saved->activated = tensor_new(pass->saved, pass->dtype, num_tokens, mlp->ffn_hidden_size);
}

static void activate(const struct mlp *mlp, const struct pass *pass, struct mlp_saved *saved)
{
    op_activation_forward(pass->stream, &(struct activation){.kind = mlp->activation,
                                                             .y = &saved->activated,
                                                             .x = &saved->pre_activation});
}

static void activation_gradient(const struct mlp *mlp, const struct pass *pass,
                                struct tensor *d_pre, const struct tensor *d_activated,
                                const struct mlp_saved *saved)
{
    op_activation_backward(pass->stream, &(struct activation){.kind = mlp->activation,
                                                              .x = &saved->pre_activation,
                                                              .d_y = d_activated,
                                                              .d_x = d_pre});
}

void mlp_forward(const struct mlp *mlp, const struct pass *pass, struct tensor *y,
                 const struct tensor *x, struct mlp_saved *saved)
{
    new_saved(mlp, pass, x, saved);
    linear_forward(&mlp->fc1, pass, &saved->pre_activation, x);
    activate(mlp, pass, saved);
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
    activation_gradient(mlp, pass, &d_pre, &d_activated, saved);
    linear_backward(&mlp->fc1, pass, d_x, &d_pre, &saved->x);
    arena_release(pass->scratch, mark);
}

/* The sums that leave are of the shape of x and y outside the region. */
static void start_steps(const struct mlp *mlp, const struct pass *pass,
                        const struct tensor *outside, struct mlp_steps *steps)
{
    const int64_t num_tokens = region_tokens(pass, outside);

    CHECK(mlp->fc1.bias == NULL && mlp->fc2.bias == NULL, "%s has biases", mlp->fc1.weight->name);
    *steps = (struct mlp_steps){0};
    if (num_tokens != outside->dim[0]) {
        steps->partial = tensor_new(pass->scratch, pass->dtype, num_tokens, outside->dim[1]);
    }
}

/* Where the products that leave as y are written: the partial sums, or y itself. */
static struct tensor *partial_of(struct mlp_steps *steps, struct tensor *y)
{
    return steps->partial.data != NULL ? &steps->partial : y;
}

void mlp_forward_enter(const struct mlp *mlp, const struct pass *pass, const struct tensor *x,
                       struct mlp_saved *saved, struct mlp_steps *steps)
{
    start_steps(mlp, pass, x, steps);
    new_saved(mlp, pass, x, saved);
    steps->x = tp_region_gather_start(pass->groups, pass->stream, pass->scratch, x);
}

void mlp_forward_fc1(const struct mlp *mlp, const struct pass *pass, struct mlp_saved *saved,
                     struct mlp_steps *steps)
{
    comm_wait(steps->x.handle, pass->stream);
    linear_region_forward(&mlp->fc1, pass, &saved->pre_activation, &steps->x.all);
    activate(mlp, pass, saved);
}

void mlp_forward_fc2(const struct mlp *mlp, const struct pass *pass, struct tensor *y,
                     const struct mlp_saved *saved, struct mlp_steps *steps)
{
    struct tensor *partial = partial_of(steps, y);

    linear_region_forward(&mlp->fc2, pass, partial, &saved->activated);
    steps->leaving = tp_region_reduce_start(pass->groups, pass->stream, y, partial);
}

void mlp_backward_enter(const struct mlp *mlp, const struct pass *pass, const struct tensor *d_y,
                        const struct mlp_saved *saved, struct mlp_steps *steps)
{
    const int64_t num_tokens = saved->activated.dim[0];

    start_steps(mlp, pass, d_y, steps);
    steps->d_activated = tensor_new(pass->scratch, pass->dtype, num_tokens, mlp->ffn_hidden_size);
    steps->d_pre = tensor_new(pass->scratch, pass->dtype, num_tokens, mlp->fc1.out_features);
    steps->d_y = tp_region_gather_start(pass->groups, pass->stream, pass->scratch, d_y);
    steps->x = tp_region_gather_start(pass->groups, pass->stream, pass->scratch, &saved->x);
}

void mlp_backward_fc2(const struct mlp *mlp, const struct pass *pass, const struct mlp_saved *saved,
                      struct mlp_steps *steps)
{
    comm_wait(steps->d_y.handle, pass->stream);
    linear_region_input_gradient(&mlp->fc2, pass, &steps->d_activated, &steps->d_y.all);
    linear_region_weight_gradient(&mlp->fc2, pass, &steps->d_y.all, &saved->activated);
    activation_gradient(mlp, pass, &steps->d_pre, &steps->d_activated, saved);
}

void mlp_backward_fc1(const struct mlp *mlp, const struct pass *pass, struct tensor *d_x,
                      struct mlp_steps *steps)
{
    struct tensor *partial = partial_of(steps, d_x);

    linear_region_input_gradient(&mlp->fc1, pass, partial, &steps->d_pre);
    steps->leaving = tp_region_reduce_start(pass->groups, pass->stream, d_x, partial);
    comm_wait(steps->x.handle, pass->stream);
    linear_region_weight_gradient(&mlp->fc1, pass, &steps->d_pre, &steps->x.all);
}

void mlp_leave(const struct pass *pass, struct mlp_steps *steps)
{
    comm_wait(steps->leaving, pass->stream);
}
