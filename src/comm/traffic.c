#include "comm/traffic.h"

static int64_t count(struct comm *comm, enum comm_kind kind, int64_t size_bytes)
{
    comm->counters[kind].sent_bytes += size_bytes;
    return size_bytes;
}

static int64_t bytes_of(const struct tensor *x)
{
    return (int64_t)tensor_size_bytes(x);
}

/* Every rank reduces a part, equal but for one element, which then goes to all others. */
int64_t traffic_count_all_reduce(struct comm *comm, const struct tensor *x)
{
    const int64_t n = tensor_num_elements(x), size = comm->size, rank = comm->rank;
    const int64_t begin = n / size * rank + n % size * rank / size;
    const int64_t end = n / size * (rank + 1) + n % size * (rank + 1) / size;
    const int64_t own = end - begin;

    return count(comm, COMM_ALL_REDUCE, (n - own + (size - 1) * own) * dtype_size_bytes(x->dtype));
}

int64_t traffic_count_all_gather(struct comm *comm, const struct tensor *in)
{
    return count(comm, COMM_ALL_GATHER, (comm->size - 1) * bytes_of(in));
}

int64_t traffic_count_reduce_scatter(struct comm *comm, const struct tensor *out,
                                     const struct tensor *in)
{
    return count(comm, COMM_REDUCE_SCATTER, bytes_of(in) - bytes_of(out));
}

int64_t traffic_count_all_to_all(struct comm *comm, const struct tensor *in,
                                 const int64_t *send_rows)
{
    int64_t rows = 0, row_bytes = dtype_size_bytes(in->dtype);

    for (int i = 1; i < in->num_dims; i++) {
        row_bytes *= in->dim[i];
    }
    for (int r = 0; r < comm->size; r++) {
        rows += r != comm->rank ? send_rows[r] : 0;
    }
    return count(comm, COMM_ALL_TO_ALL, rows * row_bytes);
}

int64_t traffic_count_broadcast(struct comm *comm, const struct tensor *x, int root)
{
    return count(comm, COMM_BROADCAST, comm->rank == root ? (comm->size - 1) * bytes_of(x) : 0);
}

int64_t traffic_count_send(struct comm *comm, const struct tensor *x)
{
    return count(comm, COMM_SEND, bytes_of(x));
}
