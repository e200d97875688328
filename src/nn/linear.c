#include "nn/linear.h"

#include <stdio.h>

#include "base/check.h"
#include "ops/ops.h"
#include "parallel/tp_region.h"

static struct param weight_facts(const struct groups *groups, const struct linear_config *config)
{
    struct param facts = {.num_dims = config->num_out_dims + 1,
                          .init = PARAM_INIT_NORMAL,
                          .init_std = config->init_std,
                          .weight_decay = true,
                          .decoupled_lr = config->decoupled_lr};
    const int dim = config->split == LINEAR_COLUMN ? config->split_dim : config->num_out_dims;

    snprintf(facts.name, sizeof facts.name, "%s.weight", config->name);
    for (int i = 0; i < config->num_out_dims; i++) {
        facts.global_shape[i] = config->out_dims[i];
    }
    facts.global_shape[config->num_out_dims] = config->in_features;
    facts.box = box_whole(facts.global_shape, facts.num_dims);
    facts.box = box_part(&facts.box, dim, groups->tp->rank, groups->tp->size);
    return facts;
}

/* A row linear's bias is added once, outside the region: every TP rank has it. */
static struct param bias_facts(const struct groups *groups, const struct linear_config *config)
{
    struct param facts = {.num_dims = config->num_out_dims,
                          .init = PARAM_INIT_ZEROS,
                          .sum_over_tp = config->split == LINEAR_ROW && groups->sequence_parallel};

    snprintf(facts.name, sizeof facts.name, "%s.bias", config->name);
    for (int i = 0; i < config->num_out_dims; i++) {
        facts.global_shape[i] = config->out_dims[i];
    }
    facts.box = box_whole(facts.global_shape, facts.num_dims);
    if (config->split == LINEAR_COLUMN) {
        facts.box = box_part(&facts.box, config->split_dim, groups->tp->rank, groups->tp->size);
    }
    return facts;
}

void linear_init(struct linear *linear, struct param_list *params, const struct groups *groups,
                 const struct linear_config *config)
{
    const struct param weight = weight_facts(groups, config);

    linear->split = config->split;
    linear->in_features = weight.box.size[weight.num_dims - 1];
    linear->out_features = box_num_elements(&weight.box) / linear->in_features;
    linear->weight = param_add(params, &weight);
    linear->bias = NULL;
    if (config->bias) {
        const struct param bias = bias_facts(groups, config);

        linear->bias = param_add(params, &bias);
    }
}

struct tensor linear_matrix(const struct tensor *weight, int64_t out_features, int64_t in_features)
{
    return tensor_view(weight, out_features, in_features);
}

static struct tensor bias_vector(const struct linear *linear, const struct tensor *bias)
{
    return tensor_view(bias, linear->out_features);
}

/* Inside the region: y = x W^T (+ b). */
static void product(const struct linear *linear, const struct pass *pass, struct tensor *y,
                    const struct tensor *x, bool with_bias)
{
    const struct tensor weight =
        linear_matrix(&linear->weight->value, linear->out_features, linear->in_features);
    struct tensor bias = {0};

    if (with_bias) {
        bias = bias_vector(linear, &linear->bias->value);
    }
    op_matmul(
        pass->stream,
        &(struct matmul){
            .c = y, .a = x, .b = &weight, .bias = with_bias ? &bias : NULL, .transpose_b = true});
}

void linear_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                    const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const bool bias = linear->bias != NULL;

    if (linear->split == LINEAR_COLUMN) {
        const struct tensor all = tp_region_gather(pass->groups, pass->stream, pass->scratch, x);

        product(linear, pass, y, &all, bias);
    } else {
        struct tensor partial = tp_region_partial(pass->groups, pass->scratch, y);
        const bool whole = pass->groups->tp->size == 1;

        product(linear, pass, &partial, x, bias && whole);
        tp_region_reduce(pass->groups, pass->stream, y, &partial);
        if (bias && !whole) {
            const struct tensor vector = bias_vector(linear, &linear->bias->value);

            op_bias_forward(pass->stream, &(struct bias_forward){.y = y, .bias = &vector});
        }
    }
    arena_release(pass->scratch, mark);
}

/* d_W += d_y^T x, d_b += column sums of d_y. */
static void weight_gradients(const struct linear *linear, const struct pass *pass,
                             const struct tensor *d_y, const struct tensor *x)
{
    struct tensor d_weight =
        linear_matrix(&linear->weight->grad, linear->out_features, linear->in_features);

    op_matmul(pass->stream,
              &(struct matmul){
                  .c = &d_weight, .a = d_y, .b = x, .transpose_a = true, .accumulate = true});
}

static void bias_gradient(const struct linear *linear, const struct pass *pass,
                          const struct tensor *d_y)
{
    if (linear->bias != NULL) {
        struct tensor d_bias = bias_vector(linear, &linear->bias->grad);

        op_bias_backward(pass->stream, &(struct bias_backward){.d_bias = &d_bias, .d_y = d_y});
    }
}

/* d_x = d_y W, inside the region. */
static void input_gradient(const struct linear *linear, const struct pass *pass, struct tensor *d_x,
                           const struct tensor *d_y)
{
    const struct tensor weight =
        linear_matrix(&linear->weight->value, linear->out_features, linear->in_features);

    op_matmul(pass->stream, &(struct matmul){.c = d_x, .a = d_y, .b = &weight});
}

void linear_backward(const struct linear *linear, const struct pass *pass, struct tensor *d_x,
                     const struct tensor *d_y, const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);

    bias_gradient(linear, pass, d_y);
    if (linear->split == LINEAR_COLUMN) {
        const struct tensor all = tp_region_gather(pass->groups, pass->stream, pass->scratch, x);

        if (d_x != NULL) {
            struct tensor partial = tp_region_partial(pass->groups, pass->scratch, d_x);

            input_gradient(linear, pass, &partial, d_y);
            tp_region_reduce(pass->groups, pass->stream, d_x, &partial);
        }
        weight_gradients(linear, pass, d_y, &all);
    } else {
        const struct tensor all = tp_region_gather(pass->groups, pass->stream, pass->scratch, d_y);

        if (d_x != NULL) {
            input_gradient(linear, pass, d_x, &all);
        }
        weight_gradients(linear, pass, &all, x);
    }
    arena_release(pass->scratch, mark);
}
