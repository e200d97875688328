/* comm_create.c - a group of real ranks is two: one for tensors of the host (checkpoints exchange
 * them, and NCCL's ranks find each other with them), one for those of the GPU. */
#include "comm/comm_create.h"

#include <stdlib.h>

#include "base/check.h"
#include "comm/comm_fake.h"
#include "comm/comm_mpi.h"
#include "comm/comm_nccl.h"
#include "comm/comm_staged.h"
#include "comm/launch.h"

/* A collective between its issue and its wait: the side's handle. */
struct pair_handle {
    struct comm_handle handle;
    struct pair_handle *next; /* in spare */
};

struct pair {
    struct comm *host, *device;
    struct pair_handle *spare;
};

/* The group for memory of the stream's device. */
static struct comm *side(const struct comm *comm, const struct stream *stream)
{
    const struct pair *pair = comm->state;

    return stream->device->kind == DEVICE_CPU ? pair->host : pair->device;
}

/* What a side has counted becomes the group's, and so does its handle. */
static struct comm_handle issued(struct comm *comm, enum comm_kind kind, struct comm_handle handle)
{
    struct pair *pair = comm->state;
    int64_t *const counts[] = {&pair->host->counters[kind].sent_bytes,
                               &pair->device->counters[kind].sent_bytes};
    struct pair_handle *mine = pair->spare;

    for (int i = 0; i < 2; i++) {
        comm->counters[kind].sent_bytes += *counts[i];
        *counts[i] = 0;
    }
    if (mine != NULL) {
        pair->spare = mine->next;
    } else {
        mine = malloc(sizeof *mine);
        CHECK(mine != NULL, "out of memory");
    }
    mine->handle = handle;
    return (struct comm_handle){comm, mine};
}

static struct comm_handle pair_all_reduce(struct comm *comm, struct stream *stream,
                                          struct tensor *x, enum comm_reduction reduction)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_ALL_REDUCE, to->table->all_reduce(to, stream, x, reduction));
}

static struct comm_handle pair_all_gather(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const struct tensor *in,
                                          const int64_t *rows)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_ALL_GATHER, to->table->all_gather(to, stream, out, in, rows));
}

static struct comm_handle pair_reduce_scatter(struct comm *comm, struct stream *stream,
                                              struct tensor *out, const struct tensor *in,
                                              const int64_t *rows)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_REDUCE_SCATTER, to->table->reduce_scatter(to, stream, out, in, rows));
}

static struct comm_handle pair_all_to_all(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const int64_t *recv_rows,
                                          const struct tensor *in, const int64_t *send_rows)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_ALL_TO_ALL,
                  to->table->all_to_all(to, stream, out, recv_rows, in, send_rows));
}

static struct comm_handle pair_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                         int root)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_BROADCAST, to->table->broadcast(to, stream, x, root));
}

static struct comm_handle pair_send(struct comm *comm, struct stream *stream,
                                    const struct tensor *x, int to_rank)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_SEND, to->table->send(to, stream, x, to_rank));
}

static struct comm_handle pair_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                       int from)
{
    struct comm *to = side(comm, stream);

    return issued(comm, COMM_RECEIVE, to->table->receive(to, stream, x, from));
}

static void pair_wait(struct comm_handle handle, struct stream *stream)
{
    struct pair *pair = handle.comm->state;
    struct pair_handle *mine = handle.request;

    comm_wait(mine->handle, stream);
    mine->next = pair->spare;
    pair->spare = mine;
}

static void pair_destroy(struct comm *comm)
{
    struct pair *pair = comm->state;

    while (pair->spare != NULL) {
        struct pair_handle *mine = pair->spare;

        pair->spare = mine->next;
        free(mine);
    }
    comm_destroy(pair->device);
    comm_destroy(pair->host);
    free(pair);
    free(comm);
}

static struct comm *create_pair(const char *name, int number, const int *members, int size)
{
    static const struct comm_table table = {
        .transport = "mpi",
        .all_reduce = pair_all_reduce,
        .all_gather = pair_all_gather,
        .reduce_scatter = pair_reduce_scatter,
        .all_to_all = pair_all_to_all,
        .broadcast = pair_broadcast,
        .send = pair_send,
        .receive = pair_receive,
        .wait = pair_wait,
        .destroy = pair_destroy,
    };
    struct comm *comm = calloc(1, sizeof *comm);
    struct pair *pair = calloc(1, sizeof *pair);

    CHECK(comm != NULL && pair != NULL, "out of memory");
    pair->host = comm_mpi_create(name, number, members, size);
    pair->device =
        comm_nccl_is_chosen() ? comm_nccl_create(pair->host) : comm_staged_create(pair->host);
    *comm = (struct comm){
        .table = &table, .name = name, .rank = pair->host->rank, .size = size, .state = pair};
    return comm;
}

static int place_of_this_rank(const char *name, const int *members, int size)
{
    for (int i = 0; i < size; i++) {
        if (members[i] == launch_rank()) {
            return i;
        }
    }
    PANIC("rank %d is not in its group %s", launch_rank(), name);
}

struct comm *comm_create(const char *name, int number, const int *members, int size)
{
    return launch_is_emulated()
               ? comm_fake_create(name, place_of_this_rank(name, members, size), size)
               : create_pair(name, number, members, size);
}
