/* loader.h - microbatches of a data set, one after the other, for one data-parallel rank.
 *
 *     struct loader *loader = loader_open(sets.split[SPLIT_TRAIN], &config);
 *     const struct batch *batch;
 *
 *     TRY(loader_next(loader, &batch));   // valid until the next call
 *     loader_close(loader);
 *
 * The data set must outlive the loader. With num_workers > 0 a thread prepares microbatches ahead;
 * what comes out is the same. */
#ifndef CADRE_DATA_LOADER_H
#define CADRE_DATA_LOADER_H

#include <stdbool.h>
#include <stdint.h>

#include "data/datasets.h"
#include "data/sampler.h"

/* Arrays [S,B], sequence first: element s*B + b. */
struct batch {
    int64_t seq_length, num_sequences; /* S, B */
    int32_t *tokens, *labels;
    float *loss_mask;        /* 1: the token counts in the loss, 0: it does not */
    int32_t *position_ids;   /* s, or counted from the last end of document */
    int32_t *document_start; /* first position that s may attend to: 0, or after the last end of
                                document */
    int64_t *sample_ids;     /* [B] numbers of the samples among all that the run consumes */
};

struct loader_config {
    enum sampler_order order;
    int64_t micro_batch_size;
    int64_t data_parallel_rank, data_parallel_size;
    int64_t consumed_samples;
    bool eod_mask_loss, reset_position_ids, reset_attention_mask;
    int32_t eod; /* end of document */
    int32_t pad; /* -1: the tokenizer has none */
    int64_t num_workers;
};

struct loader;

/* NULL with error_set(). */
struct loader *loader_open(const struct dataset *dataset, const struct loader_config *config);
int loader_next(struct loader *loader, const struct batch **batch);
void loader_close(struct loader *loader); /* NULL is fine */

/* Fills column b of batch from tokens [S+1]: what loader_next does for each sample. */
void batch_set_column(struct batch *batch, int64_t b, const int32_t *tokens,
                      const struct loader_config *config);

#endif
