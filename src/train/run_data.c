#include "train/run_data.h"

#include <string.h>

#include "base/check.h"
#include "base/log.h"

int run_data_open_tokenizer(struct run_data *data, const struct options *options)
{
    memset(data, 0, sizeof *data);
    log_info("> building %s tokenizer ...", options->tokenizer_type);
    data->tokenizer = tokenizer_open(&(struct tokenizer_config){.type = options->tokenizer_type,
                                                                .model = options->tokenizer_model,
                                                                .vocab_size = options->vocab_size});
    return data->tokenizer != NULL ? 0 : -1;
}

static struct word_list words(const struct option_strings *strings)
{
    return (struct word_list){(const char *const *)strings->items, strings->num_items};
}

static int build_datasets(struct run_data *data, const struct options *options,
                          const int64_t num_samples[NUM_SPLITS])
{
    const struct datasets_config config = {
        .mock = options->mock_data,
        .data_path = words(&options->data_path),
        .split_path = {[SPLIT_TRAIN] = words(&options->train_data_path),
                       [SPLIT_VALID] = words(&options->valid_data_path),
                       [SPLIT_TEST] = words(&options->test_data_path)},
        .split = options->split,
        .cache_directory = options->data_cache_path,
        .seq_length = options->seq_length,
        .seed = options->seed,
        .vocab_size = tokenizer_vocab_size(data->tokenizer),
        .eod = tokenizer_eod(data->tokenizer),
    };

    log_info(" > datasets target sizes (minimum size):");
    log_info("    train:      %lld", (long long)num_samples[SPLIT_TRAIN]);
    log_info("    validation: %lld", (long long)num_samples[SPLIT_VALID]);
    log_info("    test:       %lld", (long long)num_samples[SPLIT_TEST]);
    return datasets_build(&data->sets, &config, num_samples);
}

static int open_loader(struct run_data *data, struct loader **loader, int split,
                       int64_t consumed_samples)
{
    struct loader_config config = data->loader;

    *loader = NULL;
    if (data->sets.split[split] == NULL) {
        return 0;
    }
    config.consumed_samples = consumed_samples;
    *loader = loader_open(data->sets.split[split], &config);
    return *loader != NULL ? 0 : -1;
}

int run_data_open_sets(struct run_data *data, const struct run_data_request *request)
{
    const struct options *options = request->options;
    int64_t num_samples[NUM_SPLITS];

    datasets_target_samples(num_samples, options->train_samples, request->num_iterations,
                            options->global_batch_size, options->eval_interval,
                            options->eval_iters);
    if (options->skip_train) {
        num_samples[SPLIT_TRAIN] = 0;
    }
    return build_datasets(data, options, num_samples);
}

int run_data_open_loaders(struct run_data *data, const struct run_data_request *request)
{
    const struct options *options = request->options;

    data->loader = (struct loader_config){
        .order = strcmp(options->dataloader_type, "cyclic") == 0 ? SAMPLER_CYCLIC : SAMPLER_SINGLE,
        .micro_batch_size = options->micro_batch_size,
        .data_parallel_rank = request->data_parallel_rank,
        .data_parallel_size = options->data_parallel_size,
        .eod_mask_loss = options->eod_mask_loss,
        .reset_position_ids = options->reset_position_ids,
        .reset_attention_mask = options->reset_attention_mask,
        .eod = tokenizer_eod(data->tokenizer),
        .pad = tokenizer_pad(data->tokenizer),
        .num_workers = options->num_workers,
    };
    TRY(open_loader(data, &data->train, SPLIT_TRAIN, request->consumed_samples));
    TRY(open_loader(data, &data->valid, SPLIT_VALID, request->consumed_valid_samples));
    return open_loader(data, &data->test, SPLIT_TEST, 0);
}

void run_data_close(struct run_data *data)
{
    loader_close(data->train);
    loader_close(data->valid);
    loader_close(data->test);
    datasets_free(&data->sets);
    tokenizer_close(data->tokenizer);
}
