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

struct tensor tp_region_gather(const struct groups *groups, struct stream *stream,
                               struct arena *arena, const struct tensor *x)
{
    struct tensor gathered;

    if (!cuts_tokens(groups)) {
        return *x;
    }
    gathered = all_tokens(groups, arena, x);
    comm_wait(comm_all_gather(groups->tp, stream, &gathered, x), stream);
    return gathered;
}

struct tensor tp_region_partial(const struct groups *groups, struct arena *arena,
                                const struct tensor *y)
{
    return cuts_tokens(groups) ? all_tokens(groups, arena, y) : *y;
}

void tp_region_reduce(const struct groups *groups, struct stream *stream, struct tensor *y,
                      struct tensor *partial)
{
    if (cuts_tokens(groups)) {
        comm_wait(comm_reduce_scatter(groups->tp, stream, y, partial), stream);
    } else if (groups->tp->size > 1) {
        comm_wait(comm_all_reduce(groups->tp, stream, y, COMM_SUM), stream);
    }
}
