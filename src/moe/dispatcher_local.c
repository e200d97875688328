#include "moe/dispatcher.h"
#include "ops/ops.h"

static void local_dispatch(const struct pass *pass, const struct dispatch_input *input,
                           struct dispatched *out)
{
    const int64_t num_tokens = input->indices->dim[0], topk = input->indices->dim[1];

    out->num_rows = input->padded_capacity > 0 ? input->padded_capacity * input->num_experts
                                               : num_tokens * topk;
    out->x = *input->x;
    out->row_token = tensor_new(pass->saved, DTYPE_I32, out->num_rows);
    out->row_prob = tensor_new(pass->saved, DTYPE_F32, out->num_rows);
    out->offsets = tensor_new(pass->saved, DTYPE_I32, input->num_experts + 1);
    out->row_of = tensor_new(pass->saved, DTYPE_I32, num_tokens, topk);
    op_permutation(pass->stream, &(struct permutation){.row_of = &out->row_of,
                                                       .row_token = &out->row_token,
                                                       .row_prob = &out->row_prob,
                                                       .offsets = &out->offsets,
                                                       .indices = input->indices,
                                                       .probs = input->probs,
                                                       .padded_capacity = input->padded_capacity});
}

static void local_combine(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                          const struct tensor *rows)
{
    op_row_sum(pass->stream, &(struct row_sum){.y = y, .rows = rows, .row_of = &plan->row_of});
}

static void local_combine_backward(const struct pass *pass, const struct dispatched *plan,
                                   const struct tensor *d_y, struct tensor *d_rows,
                                   const struct tensor **row_token)
{
    *d_rows = *d_y;
    *row_token = &plan->row_token;
}

static void local_dispatch_backward(const struct pass *pass, const struct dispatched *plan,
                                    struct tensor *d_x, struct tensor *d_probs,
                                    const struct tensor *d_rows, const struct tensor *d_row_prob)
{
    op_row_sum(pass->stream, &(struct row_sum){.y = d_x, .rows = d_rows, .row_of = &plan->row_of});
    op_slot_gather(pass->stream, &(struct slot_gather){.d_probs = d_probs,
                                                       .d_row_prob = d_row_prob,
                                                       .row_of = &plan->row_of});
}

const struct dispatcher dispatcher_local = {
    .name = "local",
    .dispatch = local_dispatch,
    .combine = local_combine,
    .combine_backward = local_combine_backward,
    .dispatch_backward = local_dispatch_backward,
};
