/* dispatcher_alltoall_seq.c - inside ETP, tokens are exchanged for parts of the hidden dim: each
 * rank then holds H/ETP features of all the group's tokens, and sends 1/ETP of every row over EP.
 * Before the experts the parts are gathered to whole rows; after them the rows are summed over ETP
 * and cut into parts again.
 *
 * A matrix [A,B*C] is also B*A parts of C features; swapping the two orders of the parts, (a, b)
 * and (b, a), is a row gather of [A*B, C]. With ETP = 1 all of this is left out. */
#include <stdlib.h>

#include "base/check.h"
#include "moe/dispatcher_plan.h"
#include "ops/ops.h"

static int num_parts(const struct pass *pass)
{
    return pass->groups->etp->size;
}

/* to = the parts in the order (b, a), from = the same in the order (a, b), a < num_a. */
static void swap_parts(const struct pass *pass, struct tensor *to, const struct tensor *from,
                       int64_t num_a)
{
    const int64_t n = from->dim[0], num_b = num_a > 0 ? n / num_a : 0;
    int32_t *host = malloc((size_t)n * sizeof *host + 1);
    struct tensor index;

    CHECK(host != NULL && n <= INT32_MAX, "%lld parts of rows", (long long)n);
    for (int64_t a = 0; a < num_a; a++) {
        for (int64_t b = 0; b < num_b; b++) {
            host[b * num_a + a] = (int32_t)(a * num_b + b);
        }
    }
    index = dispatch_index(pass, pass->scratch, host, n);
    free(host);
    op_row_gather(pass->stream, &(struct row_gather){.y = to, .x = from, .index = &index});
}

/* The same number of rows from and to every ETP rank. */
static void exchange_equal(const struct pass *pass, struct tensor *out, const struct tensor *in)
{
    struct comm *etp = pass->groups->etp;
    int64_t rows[DISPATCH_RANKS_MAX];

    for (int r = 0; r < etp->size; r++) {
        rows[r] = in->dim[0] / etp->size;
    }
    comm_wait(comm_all_to_all(etp, pass->stream, out, rows, in, rows), pass->stream);
}

/* x [T,H] of each ETP rank -> the features of this rank of all their tokens [T*ETP, H/ETP], in
 * scratch. */
static struct tensor tokens_to_features(const struct pass *pass, const struct tensor *x)
{
    const int64_t num_tokens = x->dim[0], etp = num_parts(pass), width = x->dim[1] / etp;
    struct tensor parts, swapped, features;

    if (etp == 1) {
        return *x;
    }
    parts = tensor_view(x, num_tokens * etp, width);
    swapped = tensor_new(pass->scratch, x->dtype, num_tokens * etp, width);
    swap_parts(pass, &swapped, &parts, num_tokens);
    features = tensor_new(pass->scratch, x->dtype, num_tokens * etp, width);
    exchange_equal(pass, &features, &swapped);
    return features;
}

/* The way back: y [T,H] from features [T*ETP, H/ETP]. */
static void features_to_tokens(const struct pass *pass, struct tensor *y,
                               const struct tensor *features)
{
    struct tensor parts =
        tensor_new(pass->scratch, features->dtype, features->dim[0], features->dim[1]);
    struct tensor swapped = tensor_view(y, features->dim[0], features->dim[1]);

    exchange_equal(pass, &parts, features);
    swap_parts(pass, &swapped, &parts, num_parts(pass));
}

/* Tokens [T,H] -> rows [R,H] in canonical order, in arena. */
static struct tensor tokens_out(const struct pass *pass, const struct dispatched *plan,
                                struct arena *arena, const struct tensor *x)
{
    const int64_t etp = num_parts(pass), num_rows = plan->num_rows, width = x->dim[1] / etp;
    struct tensor rows = tensor_new(arena, x->dtype, num_rows * etp, width);
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor features = tokens_to_features(pass, x);
    const struct tensor sent = dispatch_gather(pass, pass->scratch, &features, &plan->send_token);
    struct tensor received = tensor_new(pass->scratch, x->dtype, num_rows, width), parts;

    comm_wait(dispatch_rows_out(pass, plan, &received, &sent), pass->stream);
    parts = received;
    if (etp > 1) {
        parts = tensor_new(pass->scratch, x->dtype, num_rows * etp, width);
        comm_wait(comm_all_gather(pass->groups->etp, pass->stream, &parts, &received),
                  pass->stream);
    }
    op_row_gather(pass->stream,
                  &(struct row_gather){.y = &rows,
                                       .x = &parts,
                                       .index = etp == 1 ? &plan->arrival : &plan->arrival_part});
    arena_release(pass->scratch, mark);
    return tensor_view(&rows, num_rows, x->dim[1]);
}

/* Rows [R,H] in canonical order, partial sums over ETP -> this rank's features of them in arrival
 * order [R, H/ETP], in scratch. */
static struct tensor sum_parts(const struct pass *pass, const struct dispatched *plan,
                               const struct tensor *rows)
{
    const int64_t etp = num_parts(pass), width = rows->dim[1] / etp;
    struct tensor parts, sums;

    if (etp == 1) {
        return dispatch_gather(pass, pass->scratch, rows, &plan->row_at);
    }
    parts = tensor_view(rows, plan->num_rows * etp, width);
    parts = dispatch_gather(pass, pass->scratch, &parts, &plan->row_at_part);
    sums = tensor_new(pass->scratch, rows->dtype, plan->num_rows, width);
    comm_wait(comm_reduce_scatter(pass->groups->etp, pass->stream, &sums, &parts), pass->stream);
    return sums;
}

static void tokens_home(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                        const struct tensor *rows, const struct tensor *residual)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor received = sum_parts(pass, plan, rows);
    const int64_t width = received.dim[1];
    struct tensor sent = tensor_new(pass->scratch, rows->dtype, plan->exchange.num_sent, width);
    struct tensor features;

    comm_wait(dispatch_rows_home(pass, plan, &sent, &received), pass->stream);
    if (num_parts(pass) == 1) {
        op_row_sum(pass->stream,
                   &(struct row_sum){
                       .y = y, .rows = &sent, .row_of = &plan->row_of, .residual = residual});
    } else {
        features = tensor_new(pass->scratch, y->dtype, plan->row_of.dim[0], width);
        op_row_sum(pass->stream,
                   &(struct row_sum){.y = &features, .rows = &sent, .row_of = &plan->row_of});
        features_to_tokens(pass, y, &features);
        if (residual != NULL) {
            op_add(pass->stream, &(struct add){.y = y, .u = y, .v = residual});
        }
    }
    arena_release(pass->scratch, mark);
}

/* The order of parts from that of rows: row r's part j is gathered from rank j's row arrival[r]. */
static void plan_parts(const struct pass *pass, struct dispatched *plan)
{
    const int64_t etp = num_parts(pass), n = plan->num_rows;
    int32_t *arrival, *wanted, *back;

    if (etp == 1 || pass->stream->device->kind == DEVICE_NULL) {
        plan->arrival_part = tensor_new(pass->saved, DTYPE_I32, etp == 1 ? 0 : n * etp);
        plan->row_at_part = tensor_new(pass->saved, DTYPE_I32, etp == 1 ? 0 : n * etp);
        return;
    }
    arrival = malloc((size_t)n * sizeof *arrival + 1);
    wanted = malloc((size_t)(n * etp) * sizeof *wanted + 1);
    back = malloc((size_t)(n * etp) * sizeof *back + 1);
    CHECK(arrival != NULL && wanted != NULL && back != NULL && n * etp <= INT32_MAX,
          "%lld parts of rows", (long long)(n * etp));
    stream_copy_to_host(pass->stream, arrival, plan->arrival.data,
                        tensor_size_bytes(&plan->arrival));
    for (int64_t r = 0; r < n; r++) {
        for (int64_t j = 0; j < etp; j++) {
            wanted[r * etp + j] = (int32_t)(j * n + arrival[r]);
            back[j * n + arrival[r]] = (int32_t)(r * etp + j);
        }
    }
    plan->arrival_part = dispatch_index(pass, pass->saved, wanted, n * etp);
    plan->row_at_part = dispatch_index(pass, pass->saved, back, n * etp);
    free(arrival);
    free(wanted);
    free(back);
}

/* The group's [T,K] in rank order, in scratch. */
static struct tensor gather_routing(const struct pass *pass, const struct tensor *x)
{
    struct tensor all = tensor_new(pass->scratch, x->dtype, x->dim[0] * num_parts(pass), x->dim[1]);

    comm_wait(comm_all_gather(pass->groups->etp, pass->stream, &all, x), pass->stream);
    return all;
}

/* The probabilities of this rank's rows; every ETP rank sends all of them. */
static struct tensor probs_out(const struct pass *pass, const struct dispatched *plan,
                               const struct tensor *prob)
{
    const struct tensor sent = tensor_view(prob, prob->dim[0], 1);
    struct tensor received = tensor_new(pass->scratch, DTYPE_F32, plan->num_rows, 1);

    comm_wait(dispatch_rows_out(pass, plan, &received, &sent), pass->stream);
    received = dispatch_gather(pass, pass->saved, &received, &plan->arrival);
    return tensor_view(&received, plan->num_rows);
}

static void seq_dispatch_start(const struct pass *pass, const struct dispatch_input *input,
                               struct dispatched *out, struct dispatch_flight *flight)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct comm *ep = pass->groups->ep;
    const struct dispatch_layout layout = {
        .num_experts = input->num_experts, .ep = ep->size, .etp = 1, .ep_rank = ep->rank};
    const struct tensor indices = gather_routing(pass, input->indices);
    const struct tensor probs = gather_routing(pass, input->probs);
    const struct dispatch_input all = {.indices = &indices,
                                       .probs = &probs,
                                       .num_experts = input->num_experts,
                                       .limit = input->limit,
                                       .padded_capacity = input->padded_capacity * num_parts(pass)};
    struct dispatch_counting counting;
    struct tensor prob;

    CHECK(input->x->dim[1] % num_parts(pass) == 0, "%lld features on %d ranks",
          (long long)input->x->dim[1], num_parts(pass));
    dispatch_count_start(pass, &layout, ep, &all, out, &counting);
    prob = dispatch_count_finish(pass, &all, out, &counting);
    dispatch_order_rows(pass, out, &counting);
    plan_parts(pass, out);
    out->row_prob = probs_out(pass, out, &prob);
    out->x = tokens_out(pass, out, pass->saved, input->x);
    out->row_token = (struct tensor){0};
    out->token_rows = (struct tensor){0};
    arena_release(pass->scratch, mark);
}

static void seq_dispatch_finish(const struct pass *pass, struct dispatched *out,
                                struct dispatch_flight *flight)
{
}

static void seq_combine_start(const struct pass *pass, const struct dispatched *plan,
                              struct tensor *y, const struct tensor *rows,
                              const struct tensor *residual, struct dispatch_flight *flight)
{
    tokens_home(pass, plan, y, rows, residual);
}

static void seq_combine_finish(const struct pass *pass, const struct dispatched *plan,
                               struct tensor *y, const struct tensor *residual,
                               struct dispatch_flight *flight)
{
}

static void seq_combine_backward_start(const struct pass *pass, const struct dispatched *plan,
                                       const struct tensor *d_y, struct tensor *d_rows,
                                       struct dispatch_flight *flight)
{
    *d_rows = tokens_out(pass, plan, pass->scratch, d_y);
}

static void seq_combine_backward_finish(const struct pass *pass, const struct dispatched *plan,
                                        struct tensor *d_rows, const struct tensor **row_token,
                                        struct dispatch_flight *flight)
{
    *row_token = NULL;
}

/* Each ETP rank's d_row_prob is that of its part of F: summed while each gets its own tokens'. */
static void probs_home(const struct pass *pass, const struct dispatched *plan,
                       struct tensor *d_probs, const struct tensor *d_row_prob)
{
    const struct tensor column = tensor_view(d_row_prob, plan->num_rows, 1);
    const struct tensor received = dispatch_gather(pass, pass->scratch, &column, &plan->row_at);
    struct tensor sent = tensor_new(pass->scratch, DTYPE_F32, plan->exchange.num_sent, 1);
    struct tensor all = tensor_allocate(pass->scratch, DTYPE_F32, plan->row_of.dim, 2);

    comm_wait(dispatch_rows_home(pass, plan, &sent, &received), pass->stream);
    sent = tensor_view(&sent, sent.dim[0]);
    op_slot_gather(
        pass->stream,
        &(struct slot_gather){.d_probs = &all, .d_row_prob = &sent, .row_of = &plan->row_of});
    comm_wait(comm_reduce_scatter(pass->groups->etp, pass->stream, d_probs, &all), pass->stream);
}

static void seq_dispatch_backward_start(const struct pass *pass, const struct dispatched *plan,
                                        struct tensor *d_x, struct tensor *d_probs,
                                        const struct tensor *d_rows,
                                        const struct tensor *d_row_prob,
                                        struct dispatch_flight *flight)
{
    const struct arena_mark mark = arena_mark(pass->scratch);

    tokens_home(pass, plan, d_x, d_rows, NULL);
    probs_home(pass, plan, d_probs, d_row_prob);
    arena_release(pass->scratch, mark);
}

static void seq_dispatch_backward_finish(const struct pass *pass, const struct dispatched *plan,
                                         struct tensor *d_x, struct tensor *d_probs,
                                         struct dispatch_flight *flight)
{
}

const struct dispatcher dispatcher_alltoall_seq = {
    .name = "alltoall_seq",
    .dispatch_start = seq_dispatch_start,
    .dispatch_finish = seq_dispatch_finish,
    .combine_start = seq_combine_start,
    .combine_finish = seq_combine_finish,
    .combine_backward_start = seq_combine_backward_start,
    .combine_backward_finish = seq_combine_backward_finish,
    .dispatch_backward_start = seq_dispatch_backward_start,
    .dispatch_backward_finish = seq_dispatch_backward_finish,
};
