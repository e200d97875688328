/* run_data.h - the tokenizer and the three loaders of a run. */
#ifndef CADRE_TRAIN_RUN_DATA_H
#define CADRE_TRAIN_RUN_DATA_H

#include "args/options.h"
#include "data/datasets.h"
#include "data/loader.h"
#include "data/tokenizer.h"

struct run_data {
    struct tokenizer *tokenizer;
    struct datasets sets;
    struct loader_config loader;         /* of training; evaluation starts at its own count */
    struct loader *train, *valid, *test; /* NULL: no such data */
};

/* The tokenizer alone: the model's vocabulary comes from it. */
int run_data_open_tokenizer(struct run_data *data, const struct options *options);

struct run_data_request {
    const struct options *options;
    int64_t data_parallel_rank;
    int64_t num_iterations; /* of training */
    int64_t consumed_samples, consumed_valid_samples;
};

/* Data sets: their indices are built, or read where the cache has them. With several ranks the
 * first one comes before the others, which then find the cache filled. */
int run_data_open_sets(struct run_data *data, const struct run_data_request *request);
/* The loaders, from the counts of samples consumed before. */
int run_data_open_loaders(struct run_data *data, const struct run_data_request *request);
void run_data_close(struct run_data *data);

#endif
