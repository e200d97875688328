#include "nn/norm.h"

#include <stdio.h>

static struct param *add_vector(struct param_list *params, const struct groups *groups,
                                const struct norm_config *config, const char *suffix,
                                enum param_init init)
{
    struct param facts = {.num_dims = 1,
                          .global_shape = {config->hidden_size},
                          .init = init,
                          .sum_over_tp = groups->sequence_parallel};

    snprintf(facts.name, sizeof facts.name, "%s.%s", config->name, suffix);
    facts.box = box_whole(facts.global_shape, 1);
    return param_add(params, &facts);
}

void norm_init(struct norm *norm, struct param_list *params, const struct groups *groups,
               const struct norm_config *config)
{
    *norm = (struct norm){.kind = config->kind, .one_plus = config->one_plus, .eps = config->eps};
    norm->weight = add_vector(params, groups, config, "weight",
                              config->one_plus ? PARAM_INIT_ZEROS : PARAM_INIT_ONES);
    if (config->kind == NORM_LAYERNORM) {
        norm->bias = add_vector(params, groups, config, "bias", PARAM_INIT_ZEROS);
    }
}

void norm_forward(const struct norm *norm, const struct pass *pass, struct tensor *y,
                  const struct tensor *x, const struct tensor *residual, struct norm_saved *saved)
{
    const bool layernorm = norm->kind == NORM_LAYERNORM;

    saved->x = *x;
    if (residual != NULL) {
        saved->x = tensor_new(pass->saved, x->dtype, x->dim[0], x->dim[1]);
    }
    saved->inv_std = tensor_new(pass->saved, DTYPE_F32, x->dim[0]);
    if (layernorm) {
        saved->mean = tensor_new(pass->saved, DTYPE_F32, x->dim[0]);
    }
    op_norm_forward(pass->stream, &(struct norm_forward){
                                      .kind = norm->kind,
                                      .one_plus = norm->one_plus,
                                      .eps = norm->eps,
                                      .y = y,
                                      .inv_std = &saved->inv_std,
                                      .mean = layernorm ? &saved->mean : NULL,
                                      .sum = residual != NULL ? &saved->x : NULL,
                                      .x = x,
                                      .residual = residual,
                                      .weight = &norm->weight->value,
                                      .bias = layernorm ? &norm->bias->value : NULL,
                                  });
}

void norm_backward(const struct norm *norm, const struct pass *pass, struct tensor *d_x,
                   const struct tensor *d_y, const struct tensor *d_residual,
                   const struct norm_saved *saved)
{
    const bool layernorm = norm->kind == NORM_LAYERNORM;

    op_norm_backward(pass->stream, &(struct norm_backward){
                                       .kind = norm->kind,
                                       .one_plus = norm->one_plus,
                                       .d_x = d_x,
                                       .d_weight = &norm->weight->grad,
                                       .d_bias = layernorm ? &norm->bias->grad : NULL,
                                       .d_y = d_y,
                                       .x = &saved->x,
                                       .weight = &norm->weight->value,
                                       .inv_std = &saved->inv_std,
                                       .mean = layernorm ? &saved->mean : NULL,
                                       .d_residual = d_residual,
                                   });
}
