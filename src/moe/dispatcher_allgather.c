/* dispatcher_allgather.c - tokens, not rows, travel: every rank of ETPxEP gathers all of them with
 * their routing, and its experts' rows are an index into the gathered tokens, as in
 * dispatcher_local. The sums go home by one reduce-scatter, which adds the experts of other EP
 * ranks and the parts of ETP ranks at once. */
#include <stdlib.h>

#include "base/check.h"
#include "moe/dispatcher.h"
#include "ops/ops.h"

/* The group's [T,N] in rank order, in arena. */
static struct tensor gather(const struct pass *pass, struct arena *arena, const struct tensor *x)
{
    struct comm *group = pass->groups->etp_ep;
    struct tensor all = tensor_new(arena, x->dtype, x->dim[0] * group->size, x->dim[1]);

    comm_wait(comm_all_gather(group, pass->stream, &all, x), pass->stream);
    return all;
}

static void scatter_sum(const struct pass *pass, struct tensor *y, const struct tensor *all)
{
    comm_wait(comm_reduce_scatter(pass->groups->etp_ep, pass->stream, y, all), pass->stream);
}

/* Experts [first, first + count) become 0 .. count - 1, others -1. Returns how many were kept. */
static int64_t keep_local(int32_t *indices, int64_t num_slots, int first, int count)
{
    int64_t num_kept = 0;

    for (int64_t slot = 0; slot < num_slots; slot++) {
        const bool mine = indices[slot] >= first && indices[slot] < first + count;

        indices[slot] = mine ? indices[slot] - first : -1;
        num_kept += mine;
    }
    return num_kept;
}

/* In place; the host waits for the routing, since it decides how much memory the rows take. The
 * device that only measures memory routes evenly. */
static int64_t localize(const struct pass *pass, struct tensor *indices, int first, int count)
{
    const int64_t num_slots = tensor_num_elements(indices);
    int64_t num_kept;
    int32_t *host;

    if (pass->stream->device->kind == DEVICE_NULL) {
        return num_slots / pass->groups->ep->size;
    }
    host = malloc(tensor_size_bytes(indices) + 1);
    CHECK(host != NULL, "out of memory for the routing of %lld slots", (long long)num_slots);
    stream_wait(pass->stream);
    stream_copy_to_host(pass->stream, host, indices->data, tensor_size_bytes(indices));
    num_kept = keep_local(host, num_slots, first, count);
    stream_copy_from_host(pass->stream, indices->data, host, tensor_size_bytes(indices));
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
    op_permutation(pass->stream, &(struct permutation){.row_of = &out->row_of,
                                                       .row_token = &out->row_token,
                                                       .row_prob = &out->row_prob,
                                                       .offsets = &out->offsets,
                                                       .indices = indices,
                                                       .probs = probs,
                                                       .padded_capacity = padded_capacity});
}

static void allgather_dispatch(const struct pass *pass, const struct dispatch_input *input,
                               struct dispatched *out)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct comm *ep = pass->groups->ep;
    const int num_local = input->num_experts / ep->size;
    const int64_t capacity = input->padded_capacity * pass->groups->etp_ep->size;
    const struct tensor probs = gather(pass, pass->scratch, input->probs);
    struct tensor indices = gather(pass, pass->scratch, input->indices);
    const int64_t num_kept = localize(pass, &indices, ep->rank * num_local, num_local);

    out->x = gather(pass, pass->saved, input->x);
    index_rows(pass, out, &indices, &probs, num_local, capacity);
    out->num_rows = capacity > 0 ? out->row_token.dim[0] : num_kept;
    out->row_token = tensor_rows(&out->row_token, 0, out->num_rows);
    out->row_prob = tensor_rows(&out->row_prob, 0, out->num_rows);
    arena_release(pass->scratch, mark);
}

/* This rank's experts' part of every gathered token, then the sum over the group. */
static void tokens_home(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                        const struct tensor *rows)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor all = tensor_new(pass->scratch, y->dtype, plan->row_of.dim[0], y->dim[1]);

    op_row_sum(pass->stream, &(struct row_sum){.y = &all, .rows = rows, .row_of = &plan->row_of});
    scatter_sum(pass, y, &all);
    arena_release(pass->scratch, mark);
}

static void allgather_combine_backward(const struct pass *pass, const struct dispatched *plan,
                                       const struct tensor *d_y, struct tensor *d_rows,
                                       const struct tensor **row_token)
{
    *d_rows = gather(pass, pass->scratch, d_y);
    *row_token = &plan->row_token;
}

static void allgather_dispatch_backward(const struct pass *pass, const struct dispatched *plan,
                                        struct tensor *d_x, struct tensor *d_probs,
                                        const struct tensor *d_rows,
                                        const struct tensor *d_row_prob)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor all = tensor_allocate(pass->scratch, DTYPE_F32, plan->row_of.dim, 2);

    tokens_home(pass, plan, d_x, d_rows);
    op_slot_gather(
        pass->stream,
        &(struct slot_gather){.d_probs = &all, .d_row_prob = d_row_prob, .row_of = &plan->row_of});
    scatter_sum(pass, d_probs, &all);
    arena_release(pass->scratch, mark);
}

const struct dispatcher dispatcher_allgather = {
    .name = "allgather",
    .dispatch = allgather_dispatch,
    .combine = tokens_home,
    .combine_backward = allgather_combine_backward,
    .dispatch_backward = allgather_dispatch_backward,
};
