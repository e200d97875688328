#include "optim/optimizer.h"

#include <stdlib.h>

#include "base/check.h"
#include "ops/ops.h"

/* Neighbours in the buffers that share their facts become one range; paddings (zeros) come along.
 */
static void build_ranges(struct optimizer *optimizer)
{
    const struct param_list *params = optimizer->params;

    optimizer->ranges = calloc((size_t)params->num_params + 1, sizeof *optimizer->ranges);
    CHECK(optimizer->ranges != NULL, "out of memory");
    for (int i = 0; i < params->num_params; i++) {
        const struct param *param = params->params[i];
        const int64_t end =
            i + 1 < params->num_params ? params->params[i + 1]->start : params->num_elements;
        struct optimizer_range *last = &optimizer->ranges[optimizer->num_ranges - 1];

        if (optimizer->num_ranges > 0 && last->weight_decay == param->weight_decay &&
            last->decoupled_lr == param->decoupled_lr) {
            last->count = end - last->start;
            continue;
        }
        optimizer->ranges[optimizer->num_ranges++] =
            (struct optimizer_range){.start = param->start,
                                     .count = end - param->start,
                                     .weight_decay = param->weight_decay,
                                     .decoupled_lr = param->decoupled_lr};
    }
}

static struct tensor new_state(const struct param_list *params, struct stream *stream,
                               struct arena *run)
{
    struct tensor state = tensor_new(run, DTYPE_F32, params->num_elements);

    op_fill_zero(stream, &state);
    return state;
}

void optimizer_init(struct optimizer *optimizer, const struct optimizer_config *config,
                    const struct param_list *params, struct stream *stream, struct arena *run)
{
    *optimizer = (struct optimizer){.config = *config, .params = params};
    build_ranges(optimizer);
    optimizer->master = params->values;
    if (params->values.dtype != DTYPE_F32) {
        optimizer->master = new_state(params, stream, run);
    }
    if (config->kind == OPTIMIZER_ADAM) {
        optimizer->exp_avg = new_state(params, stream, run);
        optimizer->exp_avg_sq = new_state(params, stream, run);
    } else if (config->momentum != 0.0f) {
        optimizer->exp_avg = new_state(params, stream, run);
    }
}

void optimizer_free(struct optimizer *optimizer)
{
    free(optimizer->ranges);
    optimizer->ranges = NULL;
}

static void convert(struct stream *stream, struct tensor *to, const struct tensor *from)
{
    if (to->data != from->data) {
        op_linear_combination(stream, &(struct linear_combination){.y = to, .x = from, .a = 1.0f});
    }
}

void optimizer_reset_masters(struct optimizer *optimizer, struct stream *stream)
{
    convert(stream, &optimizer->master, &optimizer->params->values);
}

/* A range of every buffer. */
struct range_tensors {
    struct tensor param, master, exp_avg, exp_avg_sq, grad;
};

static struct tensor range_of(const struct tensor *buffer, const struct optimizer_range *range)
{
    return buffer->data != NULL ? tensor_rows(buffer, range->start, range->count) : *buffer;
}

static void step_range(struct optimizer *optimizer, struct stream *stream,
                       const struct optimizer_range *range, float lr, float weight_decay,
                       const struct tensor *grad_scale)
{
    const struct optimizer_config *config = &optimizer->config;
    struct range_tensors r = {.param = range_of(&optimizer->params->values, range),
                              .master = range_of(&optimizer->master, range),
                              .exp_avg = range_of(&optimizer->exp_avg, range),
                              .exp_avg_sq = range_of(&optimizer->exp_avg_sq, range),
                              .grad = range_of(&optimizer->params->grads, range)};

    if (config->kind == OPTIMIZER_ADAM) {
        op_adam_step(stream, &(struct adam_step){.param = &r.param,
                                                 .master = &r.master,
                                                 .exp_avg = &r.exp_avg,
                                                 .exp_avg_sq = &r.exp_avg_sq,
                                                 .grad = &r.grad,
                                                 .grad_scale = grad_scale,
                                                 .lr = lr,
                                                 .beta1 = config->beta1,
                                                 .beta2 = config->beta2,
                                                 .eps = config->eps,
                                                 .weight_decay = weight_decay,
                                                 .step = optimizer->num_steps});
    } else {
        op_sgd_step(stream, &(struct sgd_step){.param = &r.param,
                                               .master = &r.master,
                                               .momentum_buffer =
                                                   config->momentum != 0.0f ? &r.exp_avg : NULL,
                                               .grad = &r.grad,
                                               .grad_scale = grad_scale,
                                               .lr = lr,
                                               .momentum = config->momentum,
                                               .weight_decay = weight_decay,
                                               .first_step = optimizer->num_steps == 1});
    }
}

void optimizer_step(struct optimizer *optimizer, struct stream *stream,
                    const struct optimizer_rates *rates, const struct tensor *grad_scale)
{
    optimizer->num_steps++;
    for (int i = 0; i < optimizer->num_ranges; i++) {
        const struct optimizer_range *range = &optimizer->ranges[i];

        step_range(optimizer, stream, range, range->decoupled_lr ? rates->decoupled_lr : rates->lr,
                   range->weight_decay ? rates->weight_decay : 0.0f, grad_scale);
    }
}

int optimizer_states(struct optimizer *optimizer, struct optimizer_state *states)
{
    int count = 0;

    if (optimizer->master.data != optimizer->params->values.data) {
        states[count++] = (struct optimizer_state){"param", &optimizer->master};
    }
    if (optimizer->exp_avg.data != NULL) {
        states[count++] = (struct optimizer_state){"exp_avg", &optimizer->exp_avg};
    }
    if (optimizer->exp_avg_sq.data != NULL) {
        states[count++] = (struct optimizer_state){"exp_avg_sq", &optimizer->exp_avg_sq};
    }
    return count;
}

struct tensor optimizer_state_of(const struct tensor *state, const struct param *param)
{
    const struct tensor part = tensor_rows(state, param->start, box_num_elements(&param->box));

    return tensor_reshape(&part, param->box.size, param->num_dims);
}
