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

static bool has_etp(const struct pass *pass)
{
    return pass->groups->etp->size > 1;
}

/* Rows have no other EP rank to go to: they are where they go. */
static bool stays(const struct pass *pass)
{
    return has_etp(pass) && pass->groups->ep->size == 1;
}

/* sent [num_sent,W] of all ranks -> this rank's rows in arrival order, arrived [R,W]. */
static struct dispatch_trip trip_out_start(const struct pass *pass, const struct dispatched *plan,
                                           struct tensor *arrived, const struct tensor *sent)
{
    const int64_t num_received = plan->exchange.num_received;
    struct dispatch_trip trip = {.to = *arrived, .between = *arrived};

    if (stays(pass)) {
        trip.between = tensor_rows(sent, 0, num_received);
        return trip;
    }
    if (has_etp(pass)) {
        trip.between = tensor_new(pass->scratch, sent->dtype, num_received, sent->dim[1]);
    }
    trip.handle = dispatch_rows_out(pass, plan, &trip.between, sent);
    return trip;
}

static void trip_out_finish(const struct pass *pass, const struct dispatched *plan,
                            struct dispatch_trip *trip)
{
    comm_wait(trip->handle, pass->stream);
    if (has_etp(pass)) {
        comm_wait(comm_all_gather_rows(pass->groups->etp, pass->stream, &trip->to, &trip->between,
                                       plan->exchange.etp_rows),
                  pass->stream);
    }
}

/* rows [R,W] in canonical order, partial sums over ETP -> trip.to, in scratch: [num_sent,W] as
 * sent. */
static struct dispatch_trip trip_home_start(const struct pass *pass, const struct dispatched *plan,
                                            const struct tensor *rows)
{
    const struct dispatch_exchange *exchange = &plan->exchange;
    const struct tensor arrived = dispatch_gather(pass, pass->scratch, rows, &plan->row_at);
    struct dispatch_trip trip = {.between = arrived};

    if (has_etp(pass)) {
        trip.between = tensor_new(pass->scratch, rows->dtype, exchange->num_received, rows->dim[1]);
        comm_wait(comm_reduce_scatter_rows(pass->groups->etp, pass->stream, &trip.between, &arrived,
                                           exchange->etp_rows),
                  pass->stream);
    }
    if (stays(pass)) {
        trip.to = trip.between;
        return trip;
    }
    trip.to = tensor_new(pass->scratch, rows->dtype, exchange->num_sent, rows->dim[1]);
    trip.handle = dispatch_rows_home(pass, plan, &trip.to, &trip.between);
    return trip;
}

/* Tokens [T,W] -> rows [R,W] in arrival order, arrived. */
static struct dispatch_trip tokens_out_start(const struct pass *pass, const struct dispatched *plan,
                                             struct tensor *arrived, const struct tensor *x)
{
    const struct tensor sent = dispatch_gather(pass, pass->scratch, x, &plan->send_token);

    return trip_out_start(pass, plan, arrived, &sent);
}

/* A number a row. */
static struct tensor column(const struct tensor *x)
{
    return tensor_view(x, x->dim[0], 1);
}

/* The tokens of all slots by expert, in scratch: gathered before it is known where they go. */
static struct tensor gather_slots(const struct pass *pass, const struct dispatch_input *input,
                                  const struct dispatched *plan,
                                  const struct dispatch_counting *counting)
{
    struct tensor slots =
        tensor_new(pass->scratch, input->x->dtype, plan->send_token.dim[0], input->x->dim[1]);

    op_row_gather(pass->stream, &(struct row_gather){.y = &slots,
                                                     .x = input->x,
                                                     .index = &plan->send_token,
                                                     .offsets = &counting->offsets});
    return slots;
}

/* The device gathers while the host waits for the counts; the host orders the rows while they
 * travel. */
static void alltoall_dispatch_start(const struct pass *pass, const struct dispatch_input *input,
                                    struct dispatched *out, struct dispatch_flight *flight)
{
    const struct dispatch_layout layout = layout_of(pass->groups, input->num_experts);
    struct dispatch_counting counting;
    struct tensor slots, prob, arrived;

    flight->mark = arena_mark(pass->scratch);
    dispatch_count_start(pass, &layout, pass->groups->etp_ep, input, out, &counting);
    slots = gather_slots(pass, input, out, &counting);
    prob = dispatch_count_finish(pass, input, out, &counting);
    prob = column(&prob);
    out->x = tensor_new(pass->saved, input->x->dtype, out->num_rows, input->x->dim[1]);
    arrived = tensor_new(pass->scratch, DTYPE_F32, out->num_rows, 1);
    flight->rows = trip_out_start(pass, out, &out->x, &slots);
    flight->probs = trip_out_start(pass, out, &arrived, &prob);
    dispatch_order_rows(pass, out, &counting);
    out->row_token = out->arrival;
    out->token_rows = (struct tensor){0};
}

static void alltoall_dispatch_finish(const struct pass *pass, struct dispatched *out,
                                     struct dispatch_flight *flight)
{
    struct tensor row_prob;

    trip_out_finish(pass, out, &flight->rows);
    trip_out_finish(pass, out, &flight->probs);
    row_prob = dispatch_gather(pass, pass->saved, &flight->probs.to, &out->arrival);
    out->row_prob = tensor_view(&row_prob, out->num_rows);
    arena_release(pass->scratch, flight->mark);
}

static void alltoall_combine_start(const struct pass *pass, const struct dispatched *plan,
                                   struct tensor *y, const struct tensor *rows,
                                   const struct tensor *residual, struct dispatch_flight *flight)
{
    flight->mark = arena_mark(pass->scratch);
    flight->rows = trip_home_start(pass, plan, rows);
}

static void sum_rows(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                     const struct tensor *residual, struct dispatch_trip *trip)
{
    comm_wait(trip->handle, pass->stream);
    op_row_sum(pass->stream,
               &(struct row_sum){
                   .y = y, .rows = &trip->to, .row_of = &plan->row_of, .residual = residual});
}

static void alltoall_combine_finish(const struct pass *pass, const struct dispatched *plan,
                                    struct tensor *y, const struct tensor *residual,
                                    struct dispatch_flight *flight)
{
    sum_rows(pass, plan, y, residual, &flight->rows);
    arena_release(pass->scratch, flight->mark);
}

static void alltoall_combine_backward_start(const struct pass *pass, const struct dispatched *plan,
                                            const struct tensor *d_y, struct tensor *d_rows,
                                            struct dispatch_flight *flight)
{
    *d_rows = tensor_new(pass->scratch, d_y->dtype, plan->num_rows, d_y->dim[1]);
    flight->mark = arena_mark(pass->scratch);
    flight->rows = tokens_out_start(pass, plan, d_rows, d_y);
}

static void alltoall_combine_backward_finish(const struct pass *pass, const struct dispatched *plan,
                                             struct tensor *d_rows, const struct tensor **row_token,
                                             struct dispatch_flight *flight)
{
    trip_out_finish(pass, plan, &flight->rows);
    arena_release(pass->scratch, flight->mark);
    *row_token = &plan->arrival;
}

static void alltoall_dispatch_backward_start(const struct pass *pass, const struct dispatched *plan,
                                             struct tensor *d_x, struct tensor *d_probs,
                                             const struct tensor *d_rows,
                                             const struct tensor *d_row_prob,
                                             struct dispatch_flight *flight)
{
    const struct tensor d_prob = column(d_row_prob);

    flight->mark = arena_mark(pass->scratch);
    flight->rows = trip_home_start(pass, plan, d_rows);
    flight->probs = trip_home_start(pass, plan, &d_prob);
}

static void alltoall_dispatch_backward_finish(const struct pass *pass,
                                              const struct dispatched *plan, struct tensor *d_x,
                                              struct tensor *d_probs,
                                              struct dispatch_flight *flight)
{
    struct tensor d_prob;

    sum_rows(pass, plan, d_x, NULL, &flight->rows);
    comm_wait(flight->probs.handle, pass->stream);
    d_prob = tensor_view(&flight->probs.to, flight->probs.to.dim[0]);
    op_slot_gather(
        pass->stream,
        &(struct slot_gather){.d_probs = d_probs, .d_row_prob = &d_prob, .row_of = &plan->row_of});
    arena_release(pass->scratch, flight->mark);
}

const struct dispatcher dispatcher_alltoall = {
    .name = "alltoall",
    .dispatch_start = alltoall_dispatch_start,
    .dispatch_finish = alltoall_dispatch_finish,
    .combine_start = alltoall_combine_start,
    .combine_finish = alltoall_combine_finish,
    .combine_backward_start = alltoall_combine_backward_start,
    .combine_backward_finish = alltoall_combine_backward_finish,
    .dispatch_backward_start = alltoall_dispatch_backward_start,
    .dispatch_backward_finish = alltoall_dispatch_backward_finish,
};
