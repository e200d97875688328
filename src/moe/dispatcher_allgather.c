/* dispatcher_allgather.c - tokens, not rows, travel: every rank of ETPxEP gathers all of them with
 * their routing, and its experts' rows are an index into the gathered tokens, as in
 * dispatcher_local. The sums go home by one reduce-scatter, which adds the experts of other EP
 * ranks and the parts of ETP ranks at once. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "moe/dispatcher_plan.h"
#include "ops/ops.h"

/* The group's [T,N] in rank order, in arena: complete after the wait for handle. */
static struct tensor gather_start(const struct pass *pass, struct arena *arena,
                                  const struct tensor *x, struct comm_handle *handle)
{
    struct comm *group = pass->groups->etp_ep;
    struct tensor all = tensor_new(arena, x->dtype, x->dim[0] * group->size, x->dim[1]);

    *handle = comm_all_gather(group, pass->stream, &all, x);
    return all;
}

static struct tensor gather(const struct pass *pass, struct arena *arena, const struct tensor *x)
{
    struct comm_handle handle;
    const struct tensor all = gather_start(pass, arena, x, &handle);

    comm_wait(handle, pass->stream);
    return all;
}

/* Experts [first, first + count) become 0 .. count - 1, others -1; offsets [count + 1] get their
 * numbers of rows. */
static void keep_local(int32_t *indices, int64_t num_slots, int first, int count, int32_t *offsets)
{
    memset(offsets, 0, ((size_t)count + 1) * sizeof *offsets);
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int local = indices[slot] - first;
        const bool is_mine = local >= 0 && local < count;

        indices[slot] = is_mine ? local : -1;
        if (is_mine) {
            offsets[local + 1]++;
        }
    }
    for (int e = 0; e < count; e++) {
        offsets[e + 1] += offsets[e];
    }
}

/* As in dispatcher_plan.c: tokens of an emulated rank choose this rank's experts as often as this
 * rank's tokens choose the emulated rank's. indices: equal parts of the ranks of ETPxEP. */
static void mirror_choices(const struct groups *groups, int32_t *indices, int64_t num_slots,
                           int num_local)
{
    const int ep = groups->ep->size, num_experts = ep * num_local;
    const int64_t part = num_slots / groups->etp_ep->size;

    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int r = (int)(slot / part) / groups->etp->size;
        const int shift = (groups->ep->rank - r + ep) * num_local;

        indices[slot] = indices[slot] < 0 ? -1 : (indices[slot] + shift) % num_experts;
    }
}

/* In place; returns how many rows the local experts get. The host waits for the routing, since it
 * decides how much memory the rows take. */
static int64_t localize(const struct pass *pass, const struct dispatch_input *input,
                        struct tensor *indices, int num_local)
{
    const int64_t num_slots = tensor_num_elements(indices);
    const struct comm *ep = pass->groups->ep;
    const int first = ep->rank * num_local;
    int32_t *host, *offsets;
    int64_t num_kept;

    if (pass->stream->device->kind == DEVICE_NULL) {
        return dispatch_measured_rows(pass, num_slots);
    }
    host = malloc(tensor_size_bytes(indices) + ((size_t)num_local + 1) * sizeof *offsets);
    CHECK(host != NULL, "out of memory for the routing of %lld slots", (long long)num_slots);
    offsets = host + num_slots;
    stream_wait(pass->stream);
    stream_copy_to_host(pass->stream, host, indices->data, tensor_size_bytes(indices));
    if (comm_is_emulated(pass->groups->etp_ep)) {
        mirror_choices(pass->groups, host, num_slots, num_local);
    }
    keep_local(host, num_slots, first, num_local, offsets);
    stream_copy_from_host(pass->stream, indices->data, host, tensor_size_bytes(indices));
    num_kept = offsets[num_local];
    if (input->limit != NULL) {
        row_limit_check(input->limit, pass->dtype, num_slots / ep->size, first, num_local, offsets);
    }
    free(host);
    return num_kept;
}

static void index_rows(const struct pass *pass, struct dispatched *out,
                       const struct tensor *indices, const struct tensor *probs, int num_local,
                       int64_t padded_capacity)
{
    const int64_t num_slots =
        padded_capacity > 0 ? padded_capacity * num_local : tensor_num_elements(indices);

    out->row_token = tensor_new(pass->saved, DTYPE_I32, num_slots);
    out->row_prob = tensor_new(pass->saved, DTYPE_F32, num_slots);
    out->offsets = tensor_new(pass->saved, DTYPE_I32, num_local + 1);
    out->row_of = tensor_allocate(pass->saved, DTYPE_I32, indices->dim, 2);
    out->token_rows = padded_capacity > 0 ? (struct tensor){0} : out->row_of;
    op_permutation(pass->stream, &(struct permutation){.row_of = &out->row_of,
                                                       .row_token = &out->row_token,
                                                       .row_prob = &out->row_prob,
                                                       .offsets = &out->offsets,
                                                       .indices = indices,
                                                       .probs = probs,
                                                       .padded_capacity = padded_capacity});
}

static void allgather_dispatch_start(const struct pass *pass, const struct dispatch_input *input,
                                     struct dispatched *out, struct dispatch_flight *flight)
{
    const int num_local = input->num_experts / pass->groups->ep->size;
    const int64_t capacity = input->padded_capacity * pass->groups->etp_ep->size;
    struct tensor indices, probs;
    int64_t num_kept;

    flight->mark = arena_mark(pass->scratch);
    out->x = gather_start(pass, pass->saved, input->x, &flight->rows.handle);
    probs = gather(pass, pass->scratch, input->probs);
    indices = gather(pass, pass->scratch, input->indices);
    num_kept = localize(pass, input, &indices, num_local);
    index_rows(pass, out, &indices, &probs, num_local, capacity);
    out->num_rows = capacity > 0 ? out->row_token.dim[0] : num_kept;
    out->row_token = tensor_rows(&out->row_token, 0, out->num_rows);
    out->row_prob = tensor_rows(&out->row_prob, 0, out->num_rows);
}

static void allgather_dispatch_finish(const struct pass *pass, struct dispatched *out,
                                      struct dispatch_flight *flight)
{
    comm_wait(flight->rows.handle, pass->stream);
    arena_release(pass->scratch, flight->mark);
}

/* This rank's experts' part of every gathered token, then the sum over the group. */
static void tokens_home_start(const struct pass *pass, const struct dispatched *plan,
                              struct tensor *y, const struct tensor *rows,
                              struct dispatch_flight *flight)
{
    struct tensor all;

    flight->mark = arena_mark(pass->scratch);
    all = tensor_new(pass->scratch, y->dtype, plan->row_of.dim[0], y->dim[1]);
    op_row_sum(pass->stream, &(struct row_sum){.y = &all, .rows = rows, .row_of = &plan->row_of});
    flight->rows.handle = comm_reduce_scatter(pass->groups->etp_ep, pass->stream, y, &all);
}

static void allgather_combine_start(const struct pass *pass, const struct dispatched *plan,
                                    struct tensor *y, const struct tensor *rows,
                                    const struct tensor *residual, struct dispatch_flight *flight)
{
    tokens_home_start(pass, plan, y, rows, flight);
}

static void allgather_combine_finish(const struct pass *pass, const struct dispatched *plan,
                                     struct tensor *y, const struct tensor *residual,
                                     struct dispatch_flight *flight)
{
    comm_wait(flight->rows.handle, pass->stream);
    if (residual != NULL) {
        op_add(pass->stream, &(struct add){.y = y, .u = y, .v = residual});
    }
    arena_release(pass->scratch, flight->mark);
}

static void allgather_combine_backward_start(const struct pass *pass, const struct dispatched *plan,
                                             const struct tensor *d_y, struct tensor *d_rows,
                                             struct dispatch_flight *flight)
{
    *d_rows = gather_start(pass, pass->scratch, d_y, &flight->rows.handle);
}

static void allgather_combine_backward_finish(const struct pass *pass,
                                              const struct dispatched *plan, struct tensor *d_rows,
                                              const struct tensor **row_token,
                                              struct dispatch_flight *flight)
{
    comm_wait(flight->rows.handle, pass->stream);
    *row_token = &plan->row_token;
}

static void allgather_dispatch_backward_start(const struct pass *pass,
                                              const struct dispatched *plan, struct tensor *d_x,
                                              struct tensor *d_probs, const struct tensor *d_rows,
                                              const struct tensor *d_row_prob,
                                              struct dispatch_flight *flight)
{
    struct tensor all;

    tokens_home_start(pass, plan, d_x, d_rows, flight);
    all = tensor_allocate(pass->scratch, DTYPE_F32, plan->row_of.dim, 2);
    op_slot_gather(
        pass->stream,
        &(struct slot_gather){.d_probs = &all, .d_row_prob = d_row_prob, .row_of = &plan->row_of});
    flight->probs.handle = comm_reduce_scatter(pass->groups->etp_ep, pass->stream, d_probs, &all);
}

static void allgather_dispatch_backward_finish(const struct pass *pass,
                                               const struct dispatched *plan, struct tensor *d_x,
                                               struct tensor *d_probs,
                                               struct dispatch_flight *flight)
{
    comm_wait(flight->rows.handle, pass->stream);
    comm_wait(flight->probs.handle, pass->stream);
    arena_release(pass->scratch, flight->mark);
}

const struct dispatcher dispatcher_allgather = {
    .name = "allgather",
    .dispatch_start = allgather_dispatch_start,
    .dispatch_finish = allgather_dispatch_finish,
    .combine_start = allgather_combine_start,
    .combine_finish = allgather_combine_finish,
    .combine_backward_start = allgather_combine_backward_start,
    .combine_backward_finish = allgather_combine_backward_finish,
    .dispatch_backward_start = allgather_dispatch_backward_start,
    .dispatch_backward_finish = allgather_dispatch_backward_finish,
};
