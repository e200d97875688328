/* comm_staged.c - the device's own copies to and from the host (device.h) go through pinned memory
 * in pieces. The host waits for the stream at issue: MPI reads its memory. */
#include "comm/comm_staged.h"

#include <stdlib.h>

#include "base/check.h"
#include "ops/ops.h"

/* A tensor's bytes on the host, for the time of a collective. */
struct host_copy {
    struct tensor host, device;
    size_t capacity_bytes;
};

/* A collective between its issue and its wait. */
struct operation {
    struct operation *next; /* in the list of spare ones */
    struct host_copy in, out;
    bool has_out; /* out goes back to the device */
    struct comm_handle handle;
};

struct staged {
    struct comm *host;
    struct stream *host_stream;
    struct operation *spare;
};

static struct operation *operation_new(struct comm *comm)
{
    struct staged *staged = comm->state;
    struct operation *op = staged->spare;

    if (op != NULL) {
        staged->spare = op->next;
    } else {
        op = calloc(1, sizeof *op);
        CHECK(op != NULL, "out of memory");
    }
    op->has_out = false;
    return op;
}

/* Room on the host for device's bytes. */
static void make_room(struct host_copy *copy, const struct tensor *device)
{
    const size_t size_bytes = tensor_size_bytes(device);
    void *memory = copy->host.data;

    if (memory == NULL || size_bytes > copy->capacity_bytes) {
        free(memory);
        memory = malloc(size_bytes + 1);
        CHECK(memory != NULL, "out of memory for a collective: %zu bytes", size_bytes);
        copy->capacity_bytes = size_bytes;
    }
    copy->device = *device;
    copy->host = *device;
    copy->host.data = memory;
}

static const struct tensor *bring(struct host_copy *copy, struct stream *stream,
                                  const struct tensor *device)
{
    make_room(copy, device);
    if (tensor_size_bytes(device) > 0) {
        stream_copy_to_host(stream, copy->host.data, device->data, tensor_size_bytes(device));
    }
    return &copy->host;
}

static struct tensor *result(struct operation *op, const struct tensor *device)
{
    make_room(&op->out, device);
    op->has_out = true;
    return &op->out.host;
}

static struct comm_handle issued(struct comm *comm, struct operation *op, struct comm_handle handle)
{
    op->handle = handle;
    return (struct comm_handle){comm, op};
}

static struct comm_handle staged_all_reduce(struct comm *comm, struct stream *stream,
                                            struct tensor *x, enum comm_reduction reduction)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);

    bring(&op->out, stream, x);
    op->has_out = true;
    return issued(comm, op,
                  staged->host->table->all_reduce(staged->host, staged->host_stream, &op->out.host,
                                                  reduction));
}

static struct comm_handle staged_all_gather(struct comm *comm, struct stream *stream,
                                            struct tensor *out, const struct tensor *in,
                                            const int64_t *rows)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);
    const struct tensor *host_in = bring(&op->in, stream, in);

    return issued(comm, op,
                  staged->host->table->all_gather(staged->host, staged->host_stream,
                                                  result(op, out), host_in, rows));
}

static struct comm_handle staged_reduce_scatter(struct comm *comm, struct stream *stream,
                                                struct tensor *out, const struct tensor *in,
                                                const int64_t *rows)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);
    const struct tensor *host_in = bring(&op->in, stream, in);

    return issued(comm, op,
                  staged->host->table->reduce_scatter(staged->host, staged->host_stream,
                                                      result(op, out), host_in, rows));
}

/* Rows of out beyond those received stay as they are. */
static struct tensor received_rows(const struct comm *comm, const struct tensor *out,
                                   const int64_t *recv_rows)
{
    int64_t count = 0;

    for (int r = 0; r < comm->size; r++) {
        count += recv_rows[r];
    }
    return tensor_rows(out, 0, count);
}

static struct comm_handle staged_all_to_all(struct comm *comm, struct stream *stream,
                                            struct tensor *out, const int64_t *recv_rows,
                                            const struct tensor *in, const int64_t *send_rows)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);
    const struct tensor received = received_rows(comm, out, recv_rows);
    const struct tensor *host_in = bring(&op->in, stream, in);

    return issued(comm, op,
                  staged->host->table->all_to_all(staged->host, staged->host_stream,
                                                  result(op, &received), recv_rows, host_in,
                                                  send_rows));
}

static struct comm_handle staged_broadcast(struct comm *comm, struct stream *stream,
                                           struct tensor *x, int root)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);

    if (comm->rank == root) {
        bring(&op->out, stream, x);
    } else {
        result(op, x);
    }
    return issued(
        comm, op,
        staged->host->table->broadcast(staged->host, staged->host_stream, &op->out.host, root));
}

static struct comm_handle staged_send(struct comm *comm, struct stream *stream,
                                      const struct tensor *x, int to)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);
    const struct tensor *host_x = bring(&op->in, stream, x);

    return issued(comm, op,
                  staged->host->table->send(staged->host, staged->host_stream, host_x, to));
}

static struct comm_handle staged_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                         int from)
{
    struct staged *staged = comm->state;
    struct operation *op = operation_new(comm);

    return issued(
        comm, op,
        staged->host->table->receive(staged->host, staged->host_stream, result(op, x), from));
}

static void staged_wait(struct comm_handle handle, struct stream *stream)
{
    struct staged *staged = handle.comm->state;
    struct operation *op = handle.request;

    comm_wait(op->handle, staged->host_stream);
    if (op->has_out && tensor_size_bytes(&op->out.device) > 0) {
        stream_copy_from_host(stream, op->out.device.data, op->out.host.data,
                              tensor_size_bytes(&op->out.device));
    }
    op->next = staged->spare;
    staged->spare = op;
}

static void staged_destroy(struct comm *comm)
{
    struct staged *staged = comm->state;

    while (staged->spare != NULL) {
        struct operation *op = staged->spare;

        staged->spare = op->next;
        free(op->in.host.data);
        free(op->out.host.data);
        free(op);
    }
    stream_destroy(staged->host_stream);
    free(staged);
    free(comm);
}

struct comm *comm_staged_create(struct comm *host)
{
    static const struct comm_table table = {
        .transport = "staged",
        .all_reduce = staged_all_reduce,
        .all_gather = staged_all_gather,
        .reduce_scatter = staged_reduce_scatter,
        .all_to_all = staged_all_to_all,
        .broadcast = staged_broadcast,
        .send = staged_send,
        .receive = staged_receive,
        .wait = staged_wait,
        .destroy = staged_destroy,
    };
    struct comm *comm = calloc(1, sizeof *comm);
    struct staged *staged = calloc(1, sizeof *staged);

    CHECK(comm != NULL && staged != NULL, "out of memory");
    staged->host = host;
    staged->host_stream = stream_create(device_cpu(), ops_cpu());
    *comm = (struct comm){.table = &table,
                          .name = host->name,
                          .rank = host->rank,
                          .size = host->size,
                          .state = staged};
    return comm;
}
