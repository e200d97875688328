#include "moe/experts.h"

#include <stdio.h>

#include "base/check.h"

/* EP cuts the experts, ETP the FFN dim of each (ffn_dim < 0: not cut). */
static struct param *add_expert_param(struct param_list *params, const struct groups *groups,
                                      const struct experts_config *config, const char *suffix,
                                      struct param facts, int ffn_dim)
{
    snprintf(facts.name, sizeof facts.name, "%s.%s", config->name, suffix);
    facts.scope = PARAM_EXPERT;
    facts.global_shape[0] = config->num_experts;
    facts.box = box_whole(facts.global_shape, facts.num_dims);
    facts.box = box_part(&facts.box, 0, groups->ep->rank, groups->ep->size);
    if (ffn_dim >= 0) {
        facts.box = box_part(&facts.box, ffn_dim, groups->etp->rank, groups->etp->size);
    }
    return param_add(params, &facts);
}

void experts_init(struct experts *experts, struct param_list *params, const struct groups *groups,
                  const struct experts_config *config)
{
    const int64_t halves = config->activation == ACTIVATION_SWIGLU ? 2 : 1;
    const int64_t hidden = config->hidden_size, ffn = config->ffn_hidden_size;

    *experts =
        (struct experts){.config = *config, .num_local = config->num_experts / groups->ep->size};
    experts->fc1 = add_expert_param(params, groups, config, "linear_fc1.weight",
                                    (struct param){.num_dims = 4,
                                                   .global_shape = {0, halves, ffn, hidden},
                                                   .init_std = config->init_std,
                                                   .weight_decay = true,
                                                   .grad_is_product = true},
                                    2);
    experts->fc2 = add_expert_param(params, groups, config, "linear_fc2.weight",
                                    (struct param){.num_dims = 3,
                                                   .global_shape = {0, hidden, ffn},
                                                   .init_std = config->output_init_std,
                                                   .weight_decay = true,
                                                   .grad_is_product = true},
                                    2);
    if (config->bias) {
        experts->fc1_bias = add_expert_param(params, groups, config, "linear_fc1.bias",
                                             (struct param){.num_dims = 3,
                                                            .global_shape = {0, halves, ffn},
                                                            .init = PARAM_INIT_ZEROS},
                                             2);
        experts->fc2_bias = add_expert_param(
            params, groups, config, "linear_fc2.bias",
            (struct param){.num_dims = 2, .global_shape = {0, hidden}, .init = PARAM_INIT_ZEROS},
            -1);
    }
}

/* Parameter values (or gradients) of the experts [first, first + count), in the shapes of the op.
 */
struct expert_weights {
    struct tensor fc1, fc2, fc1_bias, fc2_bias;
};

static struct tensor expert_slice(const struct param *param, bool grad, int first, int count)
{
    return param != NULL ? tensor_rows(grad ? &param->grad : &param->value, first, count)
                         : (struct tensor){0};
}

static struct expert_weights expert_weights(const struct experts *experts, bool grad, int first,
                                            int count)
{
    const int64_t hidden = experts->fc2->value.dim[1], ffn = experts->fc2->value.dim[2];
    const int64_t fc1_rows = experts->fc1->value.dim[1] * ffn;
    struct expert_weights weights = {
        .fc1 = expert_slice(experts->fc1, grad, first, count),
        .fc2 = expert_slice(experts->fc2, grad, first, count),
        .fc1_bias = expert_slice(experts->fc1_bias, grad, first, count),
        .fc2_bias = expert_slice(experts->fc2_bias, grad, first, count),
    };

    weights.fc1 = tensor_view(&weights.fc1, count, fc1_rows, hidden);
    if (experts->fc1_bias != NULL) {
        weights.fc1_bias = tensor_view(&weights.fc1_bias, count, fc1_rows);
    }
    return weights;
}

static struct tensor *optional(struct tensor *tensor)
{
    return tensor->data != NULL ? tensor : NULL;
}

/* One call of the op over the experts [first, first + count), whose rows are `rows`. */
static void forward_group(const struct experts *experts, const struct pass *pass, int first,
                          int count, struct tensor *y, struct tensor *pre_activation,
                          struct dispatched *rows)
{
    struct expert_weights weights = expert_weights(experts, false, first, count);

    op_experts_forward(pass->stream,
                       &(struct experts_forward){.activation = experts->config.activation,
                                                 .y = y,
                                                 .pre_activation = pre_activation,
                                                 .x = &rows->x,
                                                 .row_token = optional(&rows->row_token),
                                                 .token_rows = optional(&rows->token_rows),
                                                 .offsets = &rows->offsets,
                                                 .row_prob = &rows->row_prob,
                                                 .fc1 = &weights.fc1,
                                                 .fc2 = &weights.fc2,
                                                 .fc1_bias = optional(&weights.fc1_bias),
                                                 .fc2_bias = optional(&weights.fc2_bias)});
}

static void backward_group(const struct experts *experts, const struct pass *pass, int first,
                           int count, struct experts_backward *call, struct dispatched *rows,
                           struct tensor *pre_activation)
{
    struct expert_weights weights = expert_weights(experts, false, first, count);
    struct expert_weights grads = expert_weights(experts, true, first, count);

    call->forward = (struct experts_forward){.activation = experts->config.activation,
                                             .pre_activation = pre_activation,
                                             .x = &rows->x,
                                             .row_token = optional(&rows->row_token),
                                             .token_rows = optional(&rows->token_rows),
                                             .offsets = &rows->offsets,
                                             .row_prob = &rows->row_prob,
                                             .fc1 = &weights.fc1,
                                             .fc2 = &weights.fc2,
                                             .fc1_bias = optional(&weights.fc1_bias),
                                             .fc2_bias = optional(&weights.fc2_bias)};
    call->overwrite_grads = pass->overwrite_grads;
    call->d_fc1 = &grads.fc1;
    call->d_fc2 = &grads.fc2;
    call->d_fc1_bias = optional(&grads.fc1_bias);
    call->d_fc2_bias = optional(&grads.fc2_bias);
    op_experts_backward(pass->stream, call);
}

/* The rows of one expert, for the one-after-another variant: [begin, end) of all rows. */
struct expert_rows {
    int64_t begin, count;
    struct dispatched rows;
    int32_t offsets[2];
};

/* The host learns the offsets: on a GPU this is the wait that the grouped variant avoids. */
static void read_offsets(const struct pass *pass, const struct tensor *offsets, int32_t *host)
{
    stream_wait(pass->stream);
    stream_copy_to_host(pass->stream, host, offsets->data, tensor_size_bytes(offsets));
}

static void select_rows(struct expert_rows *one, const struct pass *pass,
                        const struct dispatched *rows, const int32_t *offsets)
{
    one->begin = offsets[0];
    one->count = offsets[1] - offsets[0];
    one->rows = *rows;
    if (rows->row_token.data != NULL) {
        one->rows.row_token = tensor_rows(&rows->row_token, one->begin, one->count);
    } else {
        one->rows.x = tensor_rows(&rows->x, one->begin, one->count);
    }
    one->rows.token_rows = (struct tensor){0};
    one->rows.row_prob = tensor_rows(&rows->row_prob, one->begin, one->count);
    one->offsets[0] = 0;
    one->offsets[1] = (int32_t)one->count;
    one->rows.offsets = tensor_new(pass->scratch, DTYPE_I32, 2);
    stream_copy_from_host(pass->stream, one->rows.offsets.data, one->offsets, sizeof one->offsets);
}

enum { LOCAL_EXPERTS_MAX = 4096 };

void experts_layer_forward(const struct experts *experts, const struct pass *pass, struct tensor *y,
                           const struct dispatched *rows, struct experts_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t fc1_rows = experts->fc1->value.dim[1] * experts->fc1->value.dim[2];
    struct dispatched all = *rows;
    int32_t offsets[LOCAL_EXPERTS_MAX + 1];

    saved->pre_activation = tensor_new(pass->saved, pass->dtype, rows->num_rows, fc1_rows);
    if (experts->config.grouped) {
        forward_group(experts, pass, 0, experts->num_local, y, &saved->pre_activation, &all);
        return;
    }
    CHECK(experts->num_local <= LOCAL_EXPERTS_MAX, "%d local experts", experts->num_local);
    read_offsets(pass, &rows->offsets, offsets);
    for (int e = 0; e < experts->num_local; e++) {
        struct expert_rows one;
        struct tensor y_rows, pre_rows;

        select_rows(&one, pass, rows, &offsets[e]);
        y_rows = tensor_rows(y, one.begin, one.count);
        pre_rows = tensor_rows(&saved->pre_activation, one.begin, one.count);
        forward_group(experts, pass, e, 1, &y_rows, &pre_rows, &one.rows);
    }
    arena_release(pass->scratch, mark);
}

void experts_layer_backward(const struct experts *experts, const struct pass *pass,
                            struct tensor *d_x, struct tensor *d_row_prob, const struct tensor *d_y,
                            const struct tensor *d_y_row_token, const struct dispatched *rows,
                            const struct experts_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor pre_activation = saved->pre_activation;
    struct dispatched all = *rows;
    int32_t offsets[LOCAL_EXPERTS_MAX + 1];

    if (experts->config.grouped) {
        backward_group(
            experts, pass, 0, experts->num_local,
            &(struct experts_backward){
                .d_y = d_y, .d_y_row_token = d_y_row_token, .d_x = d_x, .d_row_prob = d_row_prob},
            &all, &pre_activation);
        return;
    }
    read_offsets(pass, &rows->offsets, offsets);
    for (int e = 0; e < experts->num_local; e++) {
        struct expert_rows one;
        struct tensor d_x_rows, d_prob_rows, d_y_rows = *d_y, d_y_tokens, pre_rows;

        select_rows(&one, pass, rows, &offsets[e]);
        d_x_rows = tensor_rows(d_x, one.begin, one.count);
        d_prob_rows = tensor_rows(d_row_prob, one.begin, one.count);
        pre_rows = tensor_rows(&pre_activation, one.begin, one.count);
        if (d_y_row_token != NULL) {
            d_y_tokens = tensor_rows(d_y_row_token, one.begin, one.count);
        } else {
            d_y_rows = tensor_rows(d_y, one.begin, one.count);
        }
        backward_group(
            experts, pass, e, 1,
            &(struct experts_backward){.d_y = &d_y_rows,
                                       .d_y_row_token = d_y_row_token != NULL ? &d_y_tokens : NULL,
                                       .d_x = &d_x_rows,
                                       .d_row_prob = &d_prob_rows},
            &one.rows, &pre_rows);
    }
    arena_release(pass->scratch, mark);
}
