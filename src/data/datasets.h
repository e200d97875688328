/* datasets.h - the training, validation and test data of a run.
 *
 *     struct datasets_config config = { ... };
 *     struct datasets sets;
 *
 *     datasets_target_samples(num_samples, ...);
 *     TRY(datasets_build(&sets, &config, num_samples));
 *     dataset_sample(sets.split[SPLIT_TRAIN], i, tokens);
 *     datasets_free(&sets);
 *
 * Sources, in this order: mock data; one list of data sets for each split; one list for all, cut by
 * `split`. A list is "p1 p2 ..." (every sample once) or "w1 p1 w2 p2 ..." (shares of the samples).
 */
#ifndef CADRE_DATA_DATASETS_H
#define CADRE_DATA_DATASETS_H

#include <stdbool.h>
#include <stdint.h>

#include "data/blend.h"
#include "data/gpt_dataset.h"
#include "data/split.h"

struct word_list {
    const char *const *words;
    int num_words;
};

struct datasets_config {
    bool mock;
    struct word_list data_path;              /* --data-path */
    struct word_list split_path[NUM_SPLITS]; /* --train-data-path and so on */
    const char *split;                       /* NULL: "969, 30, 1", or "1, 1, 1" for mock data */
    const char *cache_directory; /* NULL: <folder of the data set>/cache/GPTdataset_indices */
    bool no_cache;               /* nothing is read from or written to a cache */
    int64_t seq_length;
    int64_t seed;       /* 0 to 2^32 - 1: what numpy takes */
    int64_t vocab_size; /* tokens must be below it; 0: not checked, not for mock data */
    int32_t eod;        /* for mock data */
};

/* One split: a data set, or several blended. */
struct dataset {
    int64_t seq_length, num_samples;
    int num_sets;
    struct gpt_dataset *sets;
    bool is_blend;
    struct blend blend;
};

struct datasets {
    struct dataset *split[NUM_SPLITS]; /* NULL: none asked for, or a share of 0 */
    struct token_source **sources;
    int num_sources;
};

/* How many samples a run will draw from each split (reference M9.5). train_samples 0: from
 * train_iters. */
void datasets_target_samples(int64_t num_samples[NUM_SPLITS], int64_t train_samples,
                             int64_t train_iters, int64_t global_batch_size, int64_t eval_interval,
                             int64_t eval_iters);

/* num_samples: wanted in each split; negative: one epoch. A split that needs samples and has no
 * document is an error. */
int datasets_build(struct datasets *sets, const struct datasets_config *config,
                   const int64_t num_samples[NUM_SPLITS]);
void datasets_free(struct datasets *sets);

/* tokens [S+1] of sample i, 0 <= i < num_samples. Safe from several threads. */
int dataset_sample(const struct dataset *dataset, int64_t i, int32_t *tokens);

#endif
