#include "moe/dispatcher.h"
#include "ops/ops.h"

static void local_dispatch_start(const struct pass *pass, const struct dispatch_input *input,
                                 struct dispatched *out, struct dispatch_flight *flight)
{
    const int64_t num_tokens = input->indices->dim[0], topk = input->indices->dim[1];

    out->num_rows = input->padded_capacity > 0 ? input->padded_capacity * input->num_experts
                                               : num_tokens * topk;
    out->x = *input->x;
    out->row_token = tensor_new(pass->saved, DTYPE_I32, out->num_rows);
    out->row_prob = tensor_new(pass->saved, DTYPE_F32, out->num_rows);
    out->offsets = tensor_new(pass->saved, DTYPE_I32, input->num_experts + 1);
    out->row_of = tensor_new(pass->saved, DTYPE_I32, num_tokens, topk);
    out->token_rows = input->padded_capacity > 0 ? (struct tensor){0} : out->row_of;
    op_permutation(pass->stream, &(struct permutation){.row_of = &out->row_of,
                                                       .row_token = &out->row_token,
                                                       .row_prob = &out->row_prob,
                                                       .offsets = &out->offsets,
                                                       .indices = input->indices,
                                                       .probs = input->probs,
                                                       .padded_capacity = input->padded_capacity});
}

static void local_dispatch_finish(const struct pass *pass, struct dispatched *out,
                                  struct dispatch_flight *flight)
{
}

static void local_combine_start(const struct pass *pass, const struct dispatched *plan,
                                struct tensor *y, const struct tensor *rows,
                                const struct tensor *residual, struct dispatch_flight *flight)
{
    op_row_sum(
        pass->stream,
        &(struct row_sum){.y = y, .rows = rows, .row_of = &plan->row_of, .residual = residual});
}

static void local_combine_finish(const struct pass *pass, const struct dispatched *plan,
                                 struct tensor *y, const struct tensor *residual,
                                 struct dispatch_flight *flight)
{
}

static void local_combine_backward_start(const struct pass *pass, const struct dispatched *plan,
                                         const struct tensor *d_y, struct tensor *d_rows,
                                         struct dispatch_flight *flight)
{
    *d_rows = *d_y;
}

static void local_combine_backward_finish(const struct pass *pass, const struct dispatched *plan,
                                          struct tensor *d_rows, const struct tensor **row_token,
                                          struct dispatch_flight *flight)
{
    *row_token = &plan->row_token;
}

static void local_dispatch_backward_start(const struct pass *pass, const struct dispatched *plan,
                                          struct tensor *d_x, struct tensor *d_probs,
                                          const struct tensor *d_rows,
                                          const struct tensor *d_row_prob,
                                          struct dispatch_flight *flight)
{
    op_row_sum(pass->stream, &(struct row_sum){.y = d_x, .rows = d_rows, .row_of = &plan->row_of});
    op_slot_gather(pass->stream, &(struct slot_gather){.d_probs = d_probs,
                                                       .d_row_prob = d_row_prob,
                                                       .row_of = &plan->row_of});
}

static void local_dispatch_backward_finish(const struct pass *pass, const struct dispatched *plan,
                                           struct tensor *d_x, struct tensor *d_probs,
                                           struct dispatch_flight *flight)
{
}

const struct dispatcher dispatcher_local = {
    .name = "local",
    .dispatch_start = local_dispatch_start,
    .dispatch_finish = local_dispatch_finish,
    .combine_start = local_combine_start,
    .combine_finish = local_combine_finish,
    .combine_backward_start = local_combine_backward_start,
    .combine_backward_finish = local_combine_backward_finish,
    .dispatch_backward_start = local_dispatch_backward_start,
    .dispatch_backward_finish = local_dispatch_backward_finish,
};
