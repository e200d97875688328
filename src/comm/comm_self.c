/* comm_self.c - the group of one rank: what is gathered or exchanged is what was given. */
#include <stdlib.h>

#include "base/check.h"
#include "comm/comm.h"

static const struct comm_handle complete = {NULL, NULL};

static void copy(struct stream *stream, struct tensor *out, const struct tensor *in)
{
    if (out->data != in->data) {
        stream_copy(stream, out->data, in->data, tensor_size_bytes(in));
    }
}

static struct comm_handle self_all_reduce(struct comm *comm, struct stream *stream,
                                          struct tensor *x, enum comm_reduction reduction)
{
    return complete;
}

static struct comm_handle self_copy(struct comm *comm, struct stream *stream, struct tensor *out,
                                    const struct tensor *in, const int64_t *rows)
{
    copy(stream, out, in);
    return complete;
}

static struct comm_handle self_all_to_all(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const int64_t *recv_rows,
                                          const struct tensor *in, const int64_t *send_rows)
{
    struct tensor to = tensor_rows(out, 0, recv_rows[0]);
    const struct tensor from = tensor_rows(in, 0, send_rows[0]);

    CHECK(recv_rows[0] == send_rows[0], "sends %lld rows to itself, receives %lld",
          (long long)send_rows[0], (long long)recv_rows[0]);
    copy(stream, &to, &from);
    return complete;
}

static struct comm_handle self_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                         int root)
{
    return complete;
}

static struct comm_handle self_send(struct comm *comm, struct stream *stream,
                                    const struct tensor *x, int to)
{
    PANIC("%s has one rank: nobody to send to", comm->name);
}

static struct comm_handle self_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                       int from)
{
    PANIC("%s has one rank: nobody to receive from", comm->name);
}

static void self_wait(struct comm_handle handle, struct stream *stream)
{
}

static void self_destroy(struct comm *comm)
{
    free(comm);
}

struct comm *comm_self_create(const char *name)
{
    static const struct comm_table self = {
        .transport = "self",
        .all_reduce = self_all_reduce,
        .all_gather = self_copy,
        .reduce_scatter = self_copy,
        .all_to_all = self_all_to_all,
        .broadcast = self_broadcast,
        .send = self_send,
        .receive = self_receive,
        .wait = self_wait,
        .destroy = self_destroy,
    };
    struct comm *comm = calloc(1, sizeof *comm);

    CHECK(comm != NULL, "out of memory");
    *comm = (struct comm){.table = &self, .name = name, .rank = 0, .size = 1};
    return comm;
}
