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
/* Data sets and loaders, from the counts of samples consumed before. num_iterations: of training.
 */
int run_data_open(struct run_data *data, const struct options *options, int64_t num_iterations,
                  int64_t consumed_samples, int64_t consumed_valid_samples);
void run_data_close(struct run_data *data);

#endif
