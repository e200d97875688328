#include "ckpt/checkpoint_ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ops/ops.h"

enum { ERROR_BYTES = 2048 };

static void gather_over_comm(void *context, const void *mine, void *all, size_t size_bytes)
{
    struct comm *comm = context;
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    const struct tensor in = tensor_of((void *)mine, DTYPE_U8, (int64_t)size_bytes);
    struct tensor out = tensor_of(all, DTYPE_U8, comm->size * (int64_t)size_bytes);

    comm_wait(comm_all_gather(comm, stream, &out, &in), stream);
    stream_destroy(stream);
}

struct checkpoint_ranks checkpoint_ranks_of(struct comm *comm)
{
    return (struct checkpoint_ranks){.rank = comm->rank,
                                     .num_ranks = comm->size,
                                     .all_gather = gather_over_comm,
                                     .context = comm};
}

int checkpoint_ranks_count(const struct checkpoint_ranks *ranks)
{
    return ranks != NULL && ranks->num_ranks > 1 ? ranks->num_ranks : 1;
}

int checkpoint_ranks_index(const struct checkpoint_ranks *ranks)
{
    return checkpoint_ranks_count(ranks) > 1 ? ranks->rank : 0;
}

void checkpoint_ranks_gather(const struct checkpoint_ranks *ranks, const void *mine, void *all,
                             size_t size_bytes)
{
    if (checkpoint_ranks_count(ranks) > 1) {
        ranks->all_gather(ranks->context, mine, all, size_bytes);
    } else {
        memcpy(all, mine, size_bytes);
    }
}

static void *allocate_for_all(const struct checkpoint_ranks *ranks, size_t size_bytes)
{
    void *all = calloc((size_t)checkpoint_ranks_count(ranks), size_bytes);

    CHECK(all != NULL, "out of memory");
    return all;
}

void checkpoint_ranks_share(const struct checkpoint_ranks *ranks, void *bytes, size_t size_bytes)
{
    void *all = allocate_for_all(ranks, size_bytes);

    checkpoint_ranks_gather(ranks, bytes, all, size_bytes);
    memcpy(bytes, all, size_bytes);
    free(all);
}

/* The recorded errors of all ranks, ERROR_BYTES each; the caller frees. */
static char *gather_errors(const struct checkpoint_ranks *ranks)
{
    char mine[ERROR_BYTES];
    char *all = allocate_for_all(ranks, ERROR_BYTES);

    snprintf(mine, sizeof mine, "%s", error_text());
    checkpoint_ranks_gather(ranks, mine, all, sizeof mine);
    return all;
}

static void adopt_error(const struct checkpoint_ranks *ranks, const int *results)
{
    const int count = checkpoint_ranks_count(ranks);
    char *texts = gather_errors(ranks);
    int first = 0;
    bool shared = true;

    while (results[first] == 0) {
        first++;
    }
    for (int r = 0; r < count; r++) {
        shared = shared && results[r] != 0 &&
                 strcmp(texts + r * ERROR_BYTES, texts + first * ERROR_BYTES) == 0;
    }
    error_set("%s", texts + first * ERROR_BYTES);
    if (!shared) {
        error_prepend("rank %d", first);
    }
    free(texts);
}

int checkpoint_ranks_agree(const struct checkpoint_ranks *ranks, int result)
{
    const int count = checkpoint_ranks_count(ranks);
    int *results = allocate_for_all(ranks, sizeof result);
    bool failed = false;

    checkpoint_ranks_gather(ranks, &result, results, sizeof result);
    for (int r = 0; r < count; r++) {
        failed = failed || results[r] != 0;
    }
    if (failed) {
        adopt_error(ranks, results);
    }
    free(results);
    return failed ? -1 : 0;
}

void checkpoint_ranks_share_error(const struct checkpoint_ranks *ranks)
{
    char *texts = gather_errors(ranks);

    error_set("%s", texts);
    free(texts);
}
