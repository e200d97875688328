/* dispatcher_alltoall.c - rows travel one by one: permute by expert, all-to-all over EP, gather the
 * ETP ranks' rows, and home the same way with the steps and sums reversed. The rows stay in arrival
 * order in memory; plan->arrival makes the canonical order of them inside the expert product. */
#include "moe/dispatcher_plan.h"
#include "ops/ops.h"

static struct dispatch_layout layout_of(const struct groups *groups, int num_experts)
{
    return (struct dispatch_layout){.num_experts = num_experts,
                                    .ep = groups->ep->size,
                                    .etp = groups->etp->size,
                                    .ep_rank = groups->ep->rank,
                                    .etp_rank = groups->etp->rank};
}

/* sent [num_sent,W] of all ranks -> this rank's rows in arrival order, arrived [R,W]. */
static void travel_out(const struct pass *pass, const struct dispatched *plan,
                       struct tensor *arrived, const struct tensor *sent)
{
    const struct dispatch_exchange *exchange = &plan->exchange;
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor received;

    if (pass->groups->etp->size == 1) {
        dispatch_rows_out(pass, plan, arrived, sent);
        return;
    }
    received = tensor_new(pass->scratch, sent->dtype, exchange->num_received, sent->dim[1]);
    dispatch_rows_out(pass, plan, &received, sent);
    comm_wait(comm_all_gather_rows(pass->groups->etp, pass->stream, arrived, &received,
                                   exchange->etp_rows),
              pass->stream);
    arena_release(pass->scratch, mark);
}

/* rows [R,W] in canonical order, partial sums over ETP -> a new tensor in scratch: [num_sent,W] as
 * sent. */
static struct tensor travel_home(const struct pass *pass, const struct dispatched *plan,
                                 const struct tensor *rows)
{
    const struct dispatch_exchange *exchange = &plan->exchange;
    struct tensor sent = tensor_new(pass->scratch, rows->dtype, exchange->num_sent, rows->dim[1]);
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor arrived = dispatch_gather(pass, pass->scratch, rows, &plan->row_at);
    struct tensor received = arrived;

    if (pass->groups->etp->size > 1) {
        received = tensor_new(pass->scratch, rows->dtype, exchange->num_received, rows->dim[1]);
        comm_wait(comm_reduce_scatter_rows(pass->groups->etp, pass->stream, &received, &arrived,
                                           exchange->etp_rows),
                  pass->stream);
    }
    dispatch_rows_home(pass, plan, &sent, &received);
    arena_release(pass->scratch, mark);
    return sent;
}

/* Tokens [T,W] -> rows [R,W] in arrival order, in arena. */
static struct tensor tokens_out(const struct pass *pass, const struct dispatched *plan,
                                struct arena *arena, const struct tensor *x)
{
    struct tensor arrived = tensor_new(arena, x->dtype, plan->num_rows, x->dim[1]);
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor sent = dispatch_gather(pass, pass->scratch, x, &plan->send_token);

    travel_out(pass, plan, &arrived, &sent);
    arena_release(pass->scratch, mark);
    return arrived;
}

/* Rows -> the sums of each token's. */
static void tokens_home(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                        const struct tensor *rows)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor sent = travel_home(pass, plan, rows);

    op_row_sum(pass->stream, &(struct row_sum){.y = y, .rows = &sent, .row_of = &plan->row_of});
    arena_release(pass->scratch, mark);
}

static void alltoall_dispatch(const struct pass *pass, const struct dispatch_input *input,
                              struct dispatched *out)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct dispatch_layout layout = layout_of(pass->groups, input->num_experts);
    struct tensor prob = dispatch_plan_make(pass, &layout, pass->groups->etp_ep, input, out);
    struct tensor arrived = tensor_new(pass->scratch, DTYPE_F32, out->num_rows, 1);

    prob = tensor_view(&prob, prob.dim[0], 1);
    travel_out(pass, out, &arrived, &prob);
    arrived = dispatch_gather(pass, pass->saved, &arrived, &out->arrival);
    out->row_prob = tensor_view(&arrived, out->num_rows);
    out->x = tokens_out(pass, out, pass->saved, input->x);
    out->row_token = out->arrival;
    arena_release(pass->scratch, mark);
}

static void alltoall_combine_backward(const struct pass *pass, const struct dispatched *plan,
                                      const struct tensor *d_y, struct tensor *d_rows,
                                      const struct tensor **row_token)
{
    *d_rows = tokens_out(pass, plan, pass->scratch, d_y);
    *row_token = &plan->arrival;
}

static void alltoall_dispatch_backward(const struct pass *pass, const struct dispatched *plan,
                                       struct tensor *d_x, struct tensor *d_probs,
                                       const struct tensor *d_rows, const struct tensor *d_row_prob)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor column = tensor_view(d_row_prob, plan->num_rows, 1);
    struct tensor sent;

    tokens_home(pass, plan, d_x, d_rows);
    sent = travel_home(pass, plan, &column);
    sent = tensor_view(&sent, sent.dim[0]);
    op_slot_gather(
        pass->stream,
        &(struct slot_gather){.d_probs = d_probs, .d_row_prob = &sent, .row_of = &plan->row_of});
    arena_release(pass->scratch, mark);
}

const struct dispatcher dispatcher_alltoall = {
    .name = "alltoall",
    .dispatch = alltoall_dispatch,
    .combine = tokens_home,
    .combine_backward = alltoall_combine_backward,
    .dispatch_backward = alltoall_dispatch_backward,
};
