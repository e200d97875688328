#include "comm/comm.h"

#include <inttypes.h>
#include <string.h>

#include "base/check.h"

void comm_destroy(struct comm *comm)
{
    if (comm != NULL) {
        comm->table->destroy(comm);
    }
}

/* False where nothing is to be moved: the device that only measures memory. */
static bool begin(struct comm *comm, const struct stream *stream, enum comm_kind kind)
{
    if (stream->device->kind == DEVICE_NULL) {
        return false;
    }
    if (comm->size > 1) {
        comm->counters[kind].num_calls++;
    }
    return true;
}

static const struct comm_handle nothing = {NULL, NULL};

struct comm_handle comm_all_reduce(struct comm *comm, struct stream *stream, struct tensor *x,
                                   enum comm_reduction reduction)
{
    if (!begin(comm, stream, COMM_ALL_REDUCE)) {
        return nothing;
    }
    return comm->table->all_reduce(comm, stream, x, reduction);
}

static int64_t sum(const int64_t *rows, int count)
{
    int64_t total = 0;

    for (int i = 0; i < count; i++) {
        CHECK(rows[i] >= 0, "%" PRId64 " rows for rank %d", rows[i], i);
        total += rows[i];
    }
    return total;
}

static void check_scaled(const struct comm *comm, const struct tensor *whole,
                         const struct tensor *part)
{
    CHECK(whole->dtype == part->dtype &&
              tensor_num_elements(whole) == comm->size * tensor_num_elements(part),
          "%s of %d ranks: %s against %s", comm->name, comm->size, tensor_describe(whole),
          tensor_describe(part));
}

static void check_parts(const struct comm *comm, const struct tensor *whole,
                        const struct tensor *part, const int64_t *rows)
{
    CHECK(whole->dtype == part->dtype && whole->num_dims >= 1 &&
              whole->num_dims == part->num_dims && whole->dim[0] == sum(rows, comm->size) &&
              part->dim[0] == rows[comm->rank],
          "%s of %d ranks: %s in parts against %s", comm->name, comm->size, tensor_describe(whole),
          tensor_describe(part));
    for (int i = 1; i < whole->num_dims; i++) {
        CHECK(whole->dim[i] == part->dim[i], "%s against %s", tensor_describe(whole),
              tensor_describe(part));
    }
}

struct comm_handle comm_all_gather(struct comm *comm, struct stream *stream, struct tensor *out,
                                   const struct tensor *in)
{
    check_scaled(comm, out, in);
    if (!begin(comm, stream, COMM_ALL_GATHER)) {
        return nothing;
    }
    return comm->table->all_gather(comm, stream, out, in, NULL);
}

struct comm_handle comm_all_gather_rows(struct comm *comm, struct stream *stream,
                                        struct tensor *out, const struct tensor *in,
                                        const int64_t *rows)
{
    check_parts(comm, out, in, rows);
    if (!begin(comm, stream, COMM_ALL_GATHER)) {
        return nothing;
    }
    return comm->table->all_gather(comm, stream, out, in, rows);
}

struct comm_handle comm_reduce_scatter(struct comm *comm, struct stream *stream, struct tensor *out,
                                       const struct tensor *in)
{
    check_scaled(comm, in, out);
    if (!begin(comm, stream, COMM_REDUCE_SCATTER)) {
        return nothing;
    }
    return comm->table->reduce_scatter(comm, stream, out, in, NULL);
}

struct comm_handle comm_reduce_scatter_rows(struct comm *comm, struct stream *stream,
                                            struct tensor *out, const struct tensor *in,
                                            const int64_t *rows)
{
    check_parts(comm, in, out, rows);
    if (!begin(comm, stream, COMM_REDUCE_SCATTER)) {
        return nothing;
    }
    return comm->table->reduce_scatter(comm, stream, out, in, rows);
}

struct comm_handle comm_all_to_all(struct comm *comm, struct stream *stream, struct tensor *out,
                                   const int64_t *recv_rows, const struct tensor *in,
                                   const int64_t *send_rows)
{
    CHECK(out->dtype == in->dtype && sum(recv_rows, comm->size) <= out->dim[0] &&
              sum(send_rows, comm->size) <= in->dim[0],
          "%s: %s to %s", comm->name, tensor_describe(in), tensor_describe(out));
    if (!begin(comm, stream, COMM_ALL_TO_ALL)) {
        return nothing;
    }
    return comm->table->all_to_all(comm, stream, out, recv_rows, in, send_rows);
}

struct comm_handle comm_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                  int root)
{
    CHECK(root >= 0 && root < comm->size, "root %d of %d", root, comm->size);
    if (!begin(comm, stream, COMM_BROADCAST)) {
        return nothing;
    }
    return comm->table->broadcast(comm, stream, x, root);
}

static void check_peer(const struct comm *comm, int peer)
{
    CHECK(peer >= 0 && peer < comm->size && peer != comm->rank, "%s: rank %d of %d and its peer %d",
          comm->name, comm->rank, comm->size, peer);
}

struct comm_handle comm_send(struct comm *comm, struct stream *stream, const struct tensor *x,
                             int to)
{
    check_peer(comm, to);
    if (!begin(comm, stream, COMM_SEND)) {
        return nothing;
    }
    return comm->table->send(comm, stream, x, to);
}

struct comm_handle comm_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                int from)
{
    check_peer(comm, from);
    if (!begin(comm, stream, COMM_RECEIVE)) {
        return nothing;
    }
    return comm->table->receive(comm, stream, x, from);
}

void comm_wait(struct comm_handle handle, struct stream *stream)
{
    if (handle.request != NULL) {
        handle.comm->table->wait(handle, stream);
    }
}

bool comm_is_emulated(const struct comm *comm)
{
    return comm->table->is_emulated;
}

const char *comm_kind_name(enum comm_kind kind)
{
    static const char *const names[NUM_COMM_KINDS] = {
        [COMM_ALL_REDUCE] = "all_reduce",
        [COMM_ALL_GATHER] = "all_gather",
        [COMM_REDUCE_SCATTER] = "reduce_scatter",
        [COMM_ALL_TO_ALL] = "all_to_all",
        [COMM_BROADCAST] = "broadcast",
        [COMM_SEND] = "send",
        [COMM_RECEIVE] = "receive",
    };

    return names[kind];
}

void comm_counters_reset(struct comm *comm)
{
    memset(comm->counters, 0, sizeof comm->counters);
}
