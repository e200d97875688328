#include "train/microbatch.h"

#include <stdlib.h>

#include "base/check.h"
#include "parallel/context_parallel.h"
#include "parallel/tp_region.h"

int64_t microbatch_num_tokens(const struct groups *groups, const struct microbatch_sizes *sizes)
{
    return sizes->seq_length / groups->cp->size * sizes->num_sequences;
}

void microbatch_init(struct microbatch *microbatch, struct arena *run, const struct groups *groups,
                     const struct microbatch_sizes *sizes)
{
    const int64_t num_tokens = microbatch_num_tokens(groups, sizes);

    *microbatch = (struct microbatch){.number = -1};
    microbatch->loss_mask = calloc((size_t)num_tokens, sizeof *microbatch->loss_mask);
    CHECK(microbatch->loss_mask != NULL, "out of memory");
    microbatch->token = tensor_new(run, DTYPE_I32, num_tokens);
    microbatch->label = tensor_new(run, DTYPE_I32, num_tokens);
    microbatch->position = tensor_new(run, DTYPE_I32, num_tokens);
    if (sizes->has_document_start) {
        microbatch->document_start = tensor_new(run, DTYPE_I32, num_tokens);
    }
    microbatch->token_id = tensor_new(run, DTYPE_I64, tp_region_outside(groups, num_tokens));
    microbatch->sample_id = tensor_new(run, DTYPE_I64, sizes->num_sequences);
    microbatch->loss_weight = tensor_new(run, DTYPE_F32, num_tokens);
}

void microbatch_free(struct microbatch *microbatch)
{
    free(microbatch->loss_mask);
    microbatch->loss_mask = NULL;
}

/* The rank's rows of B elements of 4 bytes, out of from's S rows. */
static void take_rows(const struct groups *groups, const struct batch *batch, void *to,
                      const void *from)
{
    context_parallel_cut(to, from, (size_t)batch->num_sequences * 4, groups->cp->size,
                         groups->cp->rank, batch->seq_length);
}

static void upload_rows(struct stream *stream, const struct groups *groups,
                        const struct batch *batch, struct tensor *to, const void *from)
{
    void *host = malloc(tensor_size_bytes(to));

    CHECK(host != NULL, "out of memory");
    take_rows(groups, batch, host, from);
    stream_copy_from_host(stream, to->data, host, tensor_size_bytes(to));
    free(host);
}

/* token_id = sample_id * S + s: no layout, no order of calls changes a token's random numbers. */
static void upload_token_ids(struct microbatch *microbatch, struct stream *stream,
                             const struct groups *groups, const struct batch *batch)
{
    const int64_t count = microbatch->token_id.dim[0], num_sequences = batch->num_sequences;
    const int64_t first = count == microbatch->token.dim[0] ? 0 : groups->tp->rank * count;
    int64_t *ids = malloc((size_t)count * sizeof *ids);

    CHECK(ids != NULL, "out of memory");
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = (first + i) / num_sequences, b = (first + i) % num_sequences;

        ids[i] = batch->sample_ids[b] * batch->seq_length +
                 context_parallel_position(groups->cp->size, groups->cp->rank, batch->seq_length,
                                           row);
    }
    stream_copy_from_host(stream, microbatch->token_id.data, ids, (size_t)count * sizeof *ids);
    free(ids);
}

static double sum(const float *values, int64_t count)
{
    double total = 0.0;

    for (int64_t i = 0; i < count; i++) {
        total += (double)values[i];
    }
    return total;
}

void microbatch_upload(struct microbatch *microbatch, struct stream *stream,
                       const struct groups *groups, const struct batch *batch)
{
    microbatch->num_all_tokens = batch->seq_length * batch->num_sequences;
    microbatch->num_all_unmasked = sum(batch->loss_mask, microbatch->num_all_tokens);
    take_rows(groups, batch, microbatch->loss_mask, batch->loss_mask);
    upload_rows(stream, groups, batch, &microbatch->token, batch->tokens);
    upload_rows(stream, groups, batch, &microbatch->label, batch->labels);
    upload_rows(stream, groups, batch, &microbatch->position, batch->position_ids);
    if (microbatch->document_start.data != NULL) {
        upload_rows(stream, groups, batch, &microbatch->document_start, batch->document_start);
    }
    stream_copy_from_host(stream, microbatch->sample_id.data, batch->sample_ids,
                          tensor_size_bytes(&microbatch->sample_id));
    upload_token_ids(microbatch, stream, groups, batch);
}

void microbatch_set_loss_weight(struct microbatch *microbatch, struct stream *stream, double scale)
{
    const int64_t num_tokens = microbatch->loss_weight.dim[0];
    float *weight = malloc((size_t)num_tokens * sizeof *weight);

    CHECK(weight != NULL, "out of memory");
    for (int64_t t = 0; t < num_tokens; t++) {
        weight[t] = microbatch->loss_mask[t] * (float)scale;
    }
    stream_copy_from_host(stream, microbatch->loss_weight.data, weight,
                          (size_t)num_tokens * sizeof *weight);
    free(weight);
}

void microbatch_read_loss(const struct microbatch *microbatch, struct stream *stream,
                          const struct tensor *loss, double *loss_sum, double *num_tokens)
{
    const int64_t count = loss->dim[0];
    float *host = malloc((size_t)count * sizeof *host);

    CHECK(host != NULL, "out of memory");
    stream_wait(stream);
    stream_copy_to_host(stream, host, loss->data, (size_t)count * sizeof *host);
    *loss_sum = 0.0;
    for (int64_t t = 0; t < count; t++) {
        if (microbatch->loss_mask[t] != 0.0f) {
            *loss_sum += (double)host[t] * (double)microbatch->loss_mask[t];
        }
    }
    *num_tokens = sum(microbatch->loss_mask, count);
    free(host);
}
