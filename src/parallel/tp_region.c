#include "parallel/tp_region.h"

#include "base/check.h"

static bool cuts_tokens(const struct groups *groups)
{
    return groups->tp->size > 1 && groups->sequence_parallel;
}

int64_t tp_region_outside(const struct groups *groups, int64_t num_tokens)
{
    if (!cuts_tokens(groups)) {
        return num_tokens;
    }
    CHECK(num_tokens % groups->tp->size == 0, "%lld tokens on %d ranks", (long long)num_tokens,
          groups->tp->size);
    return num_tokens / groups->tp->size;
}

/* x with TP times as many rows. */
static struct tensor all_tokens(const struct groups *groups, struct arena *arena,
                                const struct tensor *x)
{
    int64_t dims[TENSOR_DIMS_MAX];

    for (int i = 0; i < x->num_dims; i++) {
        dims[i] = x->dim[i];
    }
    dims[0] *= groups->tp->size;
    return tensor_allocate(arena, x->dtype, dims, x->num_dims);
}

static const struct comm_handle complete = {NULL, NULL};

struct tp_gathering tp_region_gather_start(const struct groups *groups, struct stream *stream,
                                           struct arena *arena, const struct tensor *x)
{
    struct tp_gathering gathering = {.all = *x};

    if (cuts_tokens(groups)) {
        gathering.all = all_tokens(groups, arena, x);
        gathering.handle = comm_all_gather(groups->tp, stream, &gathering.all, x);
    }
    return gathering;
}

struct tensor tp_region_gather(const struct groups *groups, struct stream *stream,
                               struct arena *arena, const struct tensor *x)
{
    const struct tp_gathering gathering = tp_region_gather_start(groups, stream, arena, x);

    comm_wait(gathering.handle, stream);
    return gathering.all;
}

struct tensor tp_region_partial(const struct groups *groups, struct arena *arena,
                                const struct tensor *y)
{
    return cuts_tokens(groups) ? all_tokens(groups, arena, y) : *y;
}

struct comm_handle tp_region_reduce_start(const struct groups *groups, struct stream *stream,
                                          struct tensor *y, struct tensor *partial)
{
    if (cuts_tokens(groups)) {
        return comm_reduce_scatter(groups->tp, stream, y, partial);
    }
    return groups->tp->size > 1 ? comm_all_reduce(groups->tp, stream, y, COMM_SUM) : complete;
}

void tp_region_reduce(const struct groups *groups, struct stream *stream, struct tensor *y,
                      struct tensor *partial)
{
    comm_wait(tp_region_reduce_start(groups, stream, y, partial), stream);
}

bool tp_region_overlaps(const struct groups *groups)
{
    return groups->tp_comm_overlap && cuts_tokens(groups) &&
           groups->tp->size <= TP_OVERLAP_RANKS_MAX;
}

static int neighbour(const struct comm *tp, int distance)
{
    return (tp->rank + distance + tp->size) % tp->size;
}

void tp_region_arrivals_start(struct tp_arrivals *arrivals, const struct groups *groups,
                              struct stream *stream, struct arena *arena, const struct tensor *x)
{
    struct comm *tp = groups->tp;
    const int64_t num_tokens = x->dim[0];
    struct tensor own;

    arrivals->all = all_tokens(groups, arena, x);
    own = tensor_rows(&arrivals->all, tp->rank * num_tokens, num_tokens);
    for (int i = 1; i < tp->size; i++) {
        const int from = neighbour(tp, -i);
        struct tensor rows = tensor_rows(&arrivals->all, from * num_tokens, num_tokens);

        arrivals->receive[from] = comm_receive(tp, stream, &rows, from);
    }
    for (int i = 1; i < tp->size; i++) {
        const int to = neighbour(tp, i);

        arrivals->send[to] = comm_send(tp, stream, x, to);
    }
    stream_copy(stream, own.data, x->data, tensor_size_bytes(x));
}

int tp_region_arrival(struct tp_arrivals *arrivals, const struct groups *groups,
                      struct stream *stream, int i)
{
    const int from = neighbour(groups->tp, -i);

    if (i > 0) {
        comm_wait(arrivals->receive[from], stream);
    }
    return from;
}

void tp_region_arrivals_finish(struct tp_arrivals *arrivals, const struct groups *groups,
                               struct stream *stream)
{
    for (int i = 1; i < groups->tp->size; i++) {
        comm_wait(arrivals->send[neighbour(groups->tp, i)], stream);
    }
}
