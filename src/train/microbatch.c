#include "train/microbatch.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "parallel/context_parallel.h"
#include "parallel/tp_region.h"

int64_t microbatch_num_tokens(const struct groups *groups, const struct microbatch_sizes *sizes)
{
    return sizes->seq_length / groups->cp->size * sizes->num_sequences;
}

/* The tensor of count numbers after those of the block so far. */
static struct tensor place(struct tensor *block, size_t *used_bytes, enum dtype dtype,
                           int64_t count)
{
    const struct tensor tensor =
        tensor_of((void *)((uintptr_t)block->data + *used_bytes), dtype, count);

    *used_bytes += (tensor_size_bytes(&tensor) + ARENA_ALIGNMENT_BYTES - 1) /
                   ARENA_ALIGNMENT_BYTES * ARENA_ALIGNMENT_BYTES;
    return tensor;
}

/* All tensors in the block; returns its size. */
static size_t lay_out(struct microbatch *microbatch, const struct groups *groups,
                      const struct microbatch_sizes *sizes)
{
    const int64_t num_tokens = microbatch_num_tokens(groups, sizes);
    struct tensor *block = &microbatch->block;
    size_t used = 0;

    microbatch->token = place(block, &used, DTYPE_I32, num_tokens);
    microbatch->label = place(block, &used, DTYPE_I32, num_tokens);
    microbatch->position = place(block, &used, DTYPE_I32, num_tokens);
    if (sizes->has_document_start) {
        microbatch->document_start = place(block, &used, DTYPE_I32, num_tokens);
    }
    microbatch->token_id = place(block, &used, DTYPE_I64, tp_region_outside(groups, num_tokens));
    microbatch->sample_id = place(block, &used, DTYPE_I64, sizes->num_sequences);
    microbatch->loss_weight = place(block, &used, DTYPE_F32, num_tokens);
    return used;
}

void microbatch_init(struct microbatch *microbatch, struct arena *run, const struct groups *groups,
                     const struct microbatch_sizes *sizes)
{
    const int64_t num_tokens = microbatch_num_tokens(groups, sizes);
    size_t size_bytes;

    *microbatch = (struct microbatch){.number = -1};
    size_bytes = lay_out(microbatch, groups, sizes);
    microbatch->block = tensor_new(run, DTYPE_I32, (int64_t)(size_bytes / sizeof(int32_t)));
    lay_out(microbatch, groups, sizes);
    microbatch->loss_mask = calloc((size_t)num_tokens, sizeof *microbatch->loss_mask);
    microbatch->host = calloc(1, size_bytes);
    CHECK(microbatch->loss_mask != NULL && microbatch->host != NULL, "out of memory");
}

void microbatch_free(struct microbatch *microbatch)
{
    free(microbatch->loss_mask);
    free(microbatch->host);
    microbatch->loss_mask = NULL;
    microbatch->host = NULL;
}

/* Where the tensor's numbers are on the host. */
static void *host_of(const struct microbatch *microbatch, const struct tensor *tensor)
{
    return microbatch->host + ((char *)tensor->data - (char *)microbatch->block.data);
}

/* The rank's rows of B elements of 4 bytes, out of from's S rows. */
static void take_rows(const struct groups *groups, const struct batch *batch, void *to,
                      const void *from)
{
    context_parallel_cut(to, from, (size_t)batch->num_sequences * 4, groups->cp->size,
                         groups->cp->rank, batch->seq_length);
}

/* token_id = sample_id * S + s: no layout, no order of calls changes a token's random numbers. */
static void take_token_ids(const struct microbatch *microbatch, const struct groups *groups,
                           const struct batch *batch)
{
    const int64_t count = microbatch->token_id.dim[0], num_sequences = batch->num_sequences;
    const int64_t first = count == microbatch->token.dim[0] ? 0 : groups->tp->rank * count;
    int64_t *ids = host_of(microbatch, &microbatch->token_id);

    for (int64_t i = 0; i < count; i++) {
        const int64_t row = (first + i) / num_sequences, b = (first + i) % num_sequences;

        ids[i] =
            batch->sample_ids[b] * batch->seq_length +
            context_parallel_position(groups->cp->size, groups->cp->rank, batch->seq_length, row);
    }
}

static double count_unmasked(const struct batch *batch)
{
    double total = 0.0;

    for (int64_t i = 0; i < batch->seq_length * batch->num_sequences; i++) {
        total += (double)batch->loss_mask[i];
    }
    return total;
}

void microbatch_take(struct microbatch *microbatch, const struct groups *groups,
                     const struct batch *batch)
{
    microbatch->num_all_tokens = batch->seq_length * batch->num_sequences;
    microbatch->num_all_unmasked = count_unmasked(batch);
    take_rows(groups, batch, microbatch->loss_mask, batch->loss_mask);
    take_rows(groups, batch, host_of(microbatch, &microbatch->token), batch->tokens);
    take_rows(groups, batch, host_of(microbatch, &microbatch->label), batch->labels);
    take_rows(groups, batch, host_of(microbatch, &microbatch->position), batch->position_ids);
    if (microbatch->document_start.data != NULL) {
        take_rows(groups, batch, host_of(microbatch, &microbatch->document_start),
                  batch->document_start);
    }
    memcpy(host_of(microbatch, &microbatch->sample_id), batch->sample_ids,
           tensor_size_bytes(&microbatch->sample_id));
    take_token_ids(microbatch, groups, batch);
}

void microbatch_upload(struct microbatch *microbatch, struct stream *stream, double scale)
{
    float *weight = host_of(microbatch, &microbatch->loss_weight);

    for (int64_t t = 0; t < microbatch->loss_weight.dim[0]; t++) {
        weight[t] = microbatch->loss_mask[t] * (float)scale;
    }
    stream_copy_from_host(stream, microbatch->block.data, microbatch->host,
                          tensor_size_bytes(&microbatch->block));
}
