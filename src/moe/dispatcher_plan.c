#include "moe/dispatcher_plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ops/ops.h"

int dispatch_num_local(const struct dispatch_layout *layout)
{
    return layout->num_experts / layout->ep;
}

static int64_t count(const struct dispatch_layout *layout, const int32_t *counts, int s, int t,
                     int expert)
{
    return counts[(int64_t)(s * layout->etp + t) * layout->num_experts + expert];
}

/* Rows that rank (s, t) sends to the experts of EP rank `to`. */
static int64_t count_to(const struct dispatch_layout *layout, const int32_t *counts, int s, int t,
                        int to)
{
    const int num_local = dispatch_num_local(layout);
    int64_t total = 0;

    for (int e = to * num_local; e < (to + 1) * num_local; e++) {
        total += count(layout, counts, s, t, e);
    }
    return total;
}

static void plan_offsets(const struct dispatch_layout *layout, const int32_t *counts,
                         int32_t *offsets)
{
    const int num_local = dispatch_num_local(layout);

    offsets[0] = 0;
    for (int e = 0; e < num_local; e++) {
        int64_t end = offsets[e];

        for (int s = 0; s < layout->ep; s++) {
            for (int t = 0; t < layout->etp; t++) {
                end += count(layout, counts, s, t, layout->ep_rank * num_local + e);
            }
        }
        CHECK(end <= INT32_MAX, "%lld rows for the experts of one rank", (long long)end);
        offsets[e + 1] = (int32_t)end;
    }
}

void dispatch_plan_exchange(const struct dispatch_layout *layout, const int32_t *counts,
                            struct dispatch_exchange *exchange, int32_t *offsets)
{
    exchange->num_sent = exchange->num_received = exchange->num_rows = 0;
    for (int s = 0; s < layout->ep; s++) {
        exchange->send_rows[s] = count_to(layout, counts, layout->ep_rank, layout->etp_rank, s);
        exchange->recv_rows[s] = count_to(layout, counts, s, layout->etp_rank, layout->ep_rank);
        exchange->num_sent += exchange->send_rows[s];
        exchange->num_received += exchange->recv_rows[s];
    }
    for (int t = 0; t < layout->etp; t++) {
        exchange->etp_rows[t] = 0;
        for (int s = 0; s < layout->ep; s++) {
            exchange->etp_rows[t] += count_to(layout, counts, s, t, layout->ep_rank);
        }
        exchange->num_rows += exchange->etp_rows[t];
    }
    plan_offsets(layout, counts, offsets);
}

/* First row of the block (expert, s, t) in the order wanted: all blocks of the expert before it. */
static int64_t block_row(const struct dispatch_layout *layout, const int32_t *counts,
                         const int32_t *offsets, int s, int t, int local)
{
    const int expert = layout->ep_rank * dispatch_num_local(layout) + local;
    int64_t row = offsets[local];

    for (int source = 0; source < s * layout->etp + t; source++) {
        row += counts[(int64_t)source * layout->num_experts + expert];
    }
    return row;
}

void dispatch_plan_order(const struct dispatch_layout *layout, const int32_t *counts,
                         const int32_t *offsets, int32_t *arrival, int32_t *row_at)
{
    const int num_local = dispatch_num_local(layout);
    int32_t place = 0;

    for (int t = 0; t < layout->etp; t++) {
        for (int s = 0; s < layout->ep; s++) {
            for (int local = 0; local < num_local; local++) {
                const int64_t row = block_row(layout, counts, offsets, s, t, local);
                const int64_t n = count(layout, counts, s, t, layout->ep_rank * num_local + local);

                for (int64_t i = 0; i < n; i++) {
                    arrival[row + i] = place;
                    row_at[place++] = (int32_t)(row + i);
                }
            }
        }
    }
}

struct tensor dispatch_index(const struct pass *pass, struct arena *arena, const int32_t *index,
                             int64_t n)
{
    struct tensor tensor = tensor_new(arena, DTYPE_I32, n);

    /* With padding every step has the same; without it the host waits, which no graph can. */
    stream_copy_constant(pass->stream, tensor.data, index, tensor_size_bytes(&tensor));
    return tensor;
}

struct tensor dispatch_gather(const struct pass *pass, struct arena *arena, const struct tensor *x,
                              const struct tensor *index)
{
    struct tensor y = tensor_new(arena, x->dtype, index->dim[0], x->dim[1]);

    op_row_gather(pass->stream, &(struct row_gather){.y = &y, .x = x, .index = index});
    return y;
}

static void *host_array(int64_t n)
{
    void *array = calloc((size_t)n + 1, sizeof(int32_t));

    CHECK(array != NULL, "out of memory for the plan of %lld rows", (long long)n);
    return array;
}

/* The slots by expert. Returns the permutation's row_prob and offsets, and row_token in
 * plan->send_token; these have room for all slots. */
static void permute(const struct pass *pass, const struct dispatch_input *input,
                    struct dispatched *plan, struct tensor *prob, struct tensor *offsets)
{
    const int64_t num_tokens = input->indices->dim[0], topk = input->indices->dim[1];
    const int64_t num_slots = input->padded_capacity > 0
                                  ? input->padded_capacity * input->num_experts
                                  : num_tokens * topk;

    plan->row_of = tensor_new(pass->saved, DTYPE_I32, num_tokens, topk);
    plan->send_token = tensor_new(pass->saved, DTYPE_I32, num_slots);
    *prob = tensor_new(pass->scratch, DTYPE_F32, num_slots);
    *offsets = tensor_new(pass->scratch, DTYPE_I32, input->num_experts + 1);
    op_permutation(pass->stream, &(struct permutation){.row_of = &plan->row_of,
                                                       .row_token = &plan->send_token,
                                                       .row_prob = prob,
                                                       .offsets = offsets,
                                                       .indices = input->indices,
                                                       .probs = input->probs,
                                                       .padded_capacity = input->padded_capacity});
}

int64_t dispatch_measured_rows(const struct pass *pass, int64_t num_slots)
{
    const double load = pass->measured_load > 0.0 ? pass->measured_load : 1.0;
    const double num_rows = floor((double)num_slots * load / pass->groups->ep->size);

    return num_rows < (double)num_slots ? (int64_t)num_rows : num_slots;
}

/* Part i of n of num_rows. */
static int32_t part_of(int64_t num_rows, int i, int n)
{
    return (int32_t)(num_rows * (i + 1) / n - num_rows * i / n);
}

/* Counts of a rank that nobody counted, for dispatch_measured_rows. */
static void measured_counts(const struct pass *pass, const struct dispatch_layout *layout,
                            int64_t num_slots, int32_t *counts)
{
    const int num_local = dispatch_num_local(layout), first = layout->ep_rank * num_local;
    const int64_t num_mine = dispatch_measured_rows(pass, num_slots);

    for (int e = 0; e < layout->num_experts; e++) {
        if (e >= first && e < first + num_local) {
            counts[e] = part_of(num_mine, e - first, num_local);
        } else {
            counts[e] = part_of(num_slots - num_mine, e < first ? e : e - num_local,
                                layout->num_experts - num_local);
        }
    }
}

/* all [ranks,E]: the ends of the experts' rows, of each rank. */
static void counts_from_ends(int32_t *all, int num_ranks, int num_experts)
{
    for (int r = 0; r < num_ranks; r++) {
        for (int e = num_experts - 1; e > 0; e--) {
            all[r * num_experts + e] -= all[r * num_experts + e - 1];
        }
    }
}

/* Ranks that do not exist send this one's experts what it sends to theirs: as much arrives as
 * leaves. counts: this rank's own, once for every rank. */
static void mirror_counts(const struct dispatch_layout *layout, int32_t *counts)
{
    const int num_experts = layout->num_experts, num_local = dispatch_num_local(layout);
    const int num_ranks = layout->ep * layout->etp;
    int32_t *own = host_array(num_experts);

    memcpy(own, counts, (size_t)num_experts * sizeof *own);
    for (int r = 0; r < num_ranks; r++) {
        const int shift = (r / layout->etp - layout->ep_rank + layout->ep) * num_local;

        for (int e = 0; e < num_experts; e++) {
            counts[r * num_experts + e] = own[(e + shift) % num_experts];
        }
    }
    free(own);
}

/* With padding, and where nothing is counted, all ranks' counts are known. */
static bool counts_are_known(const struct pass *pass, const struct dispatch_input *input)
{
    return input->padded_capacity > 0 || pass->stream->device->kind == DEVICE_NULL;
}

void dispatch_count_start(const struct pass *pass, const struct dispatch_layout *layout,
                          struct comm *comm, const struct dispatch_input *input,
                          struct dispatched *plan, struct dispatch_counting *counting)
{
    struct tensor ends;

    CHECK(layout->num_experts % layout->ep == 0, "%d experts on %d ranks", layout->num_experts,
          layout->ep);
    CHECK(layout->ep <= DISPATCH_RANKS_MAX && layout->etp <= DISPATCH_RANKS_MAX,
          "expert-parallel groups of %d and %d ranks; at most %d are supported", layout->ep,
          layout->etp, DISPATCH_RANKS_MAX);
    *counting = (struct dispatch_counting){.layout = *layout, .comm = comm};
    permute(pass, input, plan, &counting->prob, &counting->offsets);
    if (!counts_are_known(pass, input)) {
        ends = tensor_rows(&counting->offsets, 1, layout->num_experts);
        counting->all =
            tensor_new(pass->scratch, DTYPE_I32, (int64_t)comm->size * layout->num_experts);
        counting->handle = comm_all_gather(comm, pass->stream, &counting->all, &ends);
    }
}

static void known_counts(const struct pass *pass, const struct dispatch_input *input,
                         struct dispatch_counting *counting)
{
    const int num_experts = counting->layout.num_experts;
    int32_t *counts = counting->counts;

    if (input->padded_capacity > 0) {
        for (int e = 0; e < num_experts; e++) {
            counts[e] = (int32_t)input->padded_capacity;
        }
    } else {
        measured_counts(pass, &counting->layout, counting->prob.dim[0], counts);
    }
    for (int64_t i = num_experts; i < (int64_t)counting->comm->size * num_experts; i++) {
        counts[i] = counts[i % num_experts];
    }
}

/* The one wait of the host: memory and messages depend on how many rows come. */
static void read_counts(const struct pass *pass, struct dispatch_counting *counting)
{
    comm_wait(counting->handle, pass->stream);
    stream_copy_to_host(pass->stream, counting->counts, counting->all.data,
                        tensor_size_bytes(&counting->all));
    counts_from_ends(counting->counts, counting->comm->size, counting->layout.num_experts);
    if (comm_is_emulated(counting->comm)) {
        mirror_counts(&counting->layout, counting->counts);
    }
}

struct tensor dispatch_count_finish(const struct pass *pass, const struct dispatch_input *input,
                                    struct dispatched *plan, struct dispatch_counting *counting)
{
    const struct dispatch_layout *layout = &counting->layout;
    const int num_local = dispatch_num_local(layout);
    const int64_t num_slots = counting->prob.dim[0]; /* with even routing, rows as well */

    counting->counts = host_array((int64_t)counting->comm->size * layout->num_experts);
    counting->local_offsets = host_array(num_local + 1);
    if (counts_are_known(pass, input)) {
        known_counts(pass, input, counting);
    } else {
        read_counts(pass, counting);
    }
    dispatch_plan_exchange(layout, counting->counts, &plan->exchange, counting->local_offsets);
    if (input->limit != NULL) {
        row_limit_check(input->limit, pass->dtype, num_slots * layout->etp,
                        layout->ep_rank * num_local, num_local, counting->local_offsets);
    }
    plan->num_rows = plan->exchange.num_rows;
    plan->send_token = tensor_rows(&plan->send_token, 0, plan->exchange.num_sent);
    return tensor_rows(&counting->prob, 0, plan->exchange.num_sent);
}

void dispatch_order_rows(const struct pass *pass, struct dispatched *plan,
                         struct dispatch_counting *counting)
{
    const struct dispatch_layout *layout = &counting->layout;
    int32_t *arrival = host_array(plan->num_rows), *row_at = host_array(plan->num_rows);

    dispatch_plan_order(layout, counting->counts, counting->local_offsets, arrival, row_at);
    plan->offsets =
        dispatch_index(pass, pass->saved, counting->local_offsets, dispatch_num_local(layout) + 1);
    plan->arrival = dispatch_index(pass, pass->saved, arrival, plan->num_rows);
    plan->row_at = dispatch_index(pass, pass->saved, row_at, plan->num_rows);
    free(arrival);
    free(row_at);
    free(counting->local_offsets);
    free(counting->counts);
}

struct comm_handle dispatch_rows_out(const struct pass *pass, const struct dispatched *plan,
                                     struct tensor *received, const struct tensor *sent)
{
    return comm_all_to_all(pass->groups->ep, pass->stream, received, plan->exchange.recv_rows, sent,
                           plan->exchange.send_rows);
}

struct comm_handle dispatch_rows_home(const struct pass *pass, const struct dispatched *plan,
                                      struct tensor *sent, const struct tensor *received)
{
    return comm_all_to_all(pass->groups->ep, pass->stream, sent, plan->exchange.send_rows, received,
                           plan->exchange.recv_rows);
}
