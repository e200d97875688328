/* gpt_dataset.h - samples of S+1 tokens from one source, in the order of a gpt_index. */
#ifndef CADRE_DATA_GPT_DATASET_H
#define CADRE_DATA_GPT_DATASET_H

#include <stdint.h>

#include "data/gpt_index.h"
#include "data/token_source.h"

struct gpt_dataset {
    const struct token_source *source; /* not owned */
    struct gpt_index index;
    int64_t seq_length; /* S */
    int64_t vocab_size; /* tokens must be below it; 0: not checked */
};

int gpt_dataset_open(struct gpt_dataset *set, const struct token_source *source,
                     const struct gpt_index_config *config, int64_t vocab_size);
void gpt_dataset_close(struct gpt_dataset *set);

int64_t gpt_dataset_num_samples(const struct gpt_dataset *set);
/* tokens [S+1] of the i-th sample of training. Safe from several threads. */
int gpt_dataset_sample(const struct gpt_dataset *set, int64_t i, int32_t *tokens);

#endif
