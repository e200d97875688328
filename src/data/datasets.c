#include "data/datasets.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "base/path.h"

void datasets_target_samples(int64_t num_samples[NUM_SPLITS], int64_t train_samples,
                             int64_t train_iters, int64_t global_batch_size, int64_t eval_interval,
                             int64_t eval_iters)
{
    const int64_t num_evaluations = eval_interval > 0 ? train_iters / eval_interval + 1 : 1;

    num_samples[SPLIT_TRAIN] = train_samples > 0 ? train_samples : train_iters * global_batch_size;
    num_samples[SPLIT_VALID] = num_evaluations * eval_iters * global_batch_size;
    num_samples[SPLIT_TEST] = eval_iters * global_batch_size;
}

/* A list of data sets, open. */
struct source_list {
    int num_sources;
    const struct token_source **sources;
    const char **prefixes;
    double *weights; /* normalised; unused without has_weights */
    bool has_weights;
};

static void source_list_free(struct source_list *list)
{
    free(list->sources);
    free(list->prefixes);
    free(list->weights);
    *list = (struct source_list){0};
}

static void *allocate(int count, size_t item_bytes)
{
    void *items = calloc(count > 0 ? (size_t)count : 1, item_bytes);

    CHECK(items != NULL, "out of memory");
    return items;
}

/* Hands a source over to the data sets, which close it in the end. */
static void keep_source(struct datasets *sets, struct token_source *source)
{
    sets->sources = realloc(sets->sources, (size_t)(sets->num_sources + 1) * sizeof source);
    CHECK(sets->sources != NULL, "out of memory");
    sets->sources[sets->num_sources++] = source;
}

static int source_list_open(struct source_list *list, struct datasets *sets,
                            const struct word_list *words)
{
    list->sources = allocate(words->num_words, sizeof *list->sources);
    list->prefixes = allocate(words->num_words, sizeof *list->prefixes);
    list->weights = allocate(words->num_words, sizeof *list->weights);
    list->num_sources = blend_parse(words->words, words->num_words, list->prefixes, list->weights,
                                    &list->has_weights);
    if (list->num_sources > BLEND_SETS_MAX) {
        return error_set("%d data sets are named, more than %d", list->num_sources, BLEND_SETS_MAX);
    }
    if (list->has_weights && blend_normalize(list->weights, list->num_sources) != 0) {
        return error_prepend("--data-path");
    }
    for (int i = 0; i < list->num_sources; i++) {
        struct token_source *source = token_source_open_indexed(list->prefixes[i]);

        if (source == NULL) {
            return -1;
        }
        keep_source(sets, source);
        list->sources[i] = source;
    }
    return 0;
}

/* Where the indices of a data set are cached. NULL: nowhere. */
static const char *cache_directory(const struct datasets_config *config, const char *prefix,
                                   char path[PATH_LENGTH_MAX])
{
    char parent[PATH_LENGTH_MAX];

    if (config->no_cache) {
        return NULL;
    }
    if (config->cache_directory != NULL) {
        return config->cache_directory;
    }
    if (path_parent(parent, prefix) != 0 ||
        path_format(path, "%s/cache/GPTdataset_indices", parent) != 0) {
        return NULL;
    }
    return path;
}

static void dataset_free(struct dataset *dataset)
{
    if (dataset == NULL) {
        return;
    }
    for (int i = 0; i < dataset->num_sets; i++) {
        gpt_dataset_close(&dataset->sets[i]);
    }
    if (dataset->is_blend) {
        blend_close(&dataset->blend);
    }
    free(dataset->sets);
    free(dataset);
}

/* One split of one source; num_samples as in gpt_index_config. */
static int open_part(struct dataset *dataset, const struct token_source *source, const char *prefix,
                     int which, const struct split *split, int64_t num_samples,
                     const struct datasets_config *config)
{
    char path[PATH_LENGTH_MAX];
    struct gpt_index_config index = {
        .seq_length = config->seq_length,
        .num_samples = num_samples,
        .seed = (uint32_t)config->seed,
        .split_name = split_names[which],
        .cache_directory = prefix == NULL ? NULL : cache_directory(config, prefix, path),
    };

    split_range(split, which, source->num_sequences, &index.first_sequence, &index.end_sequence);
    if (index.first_sequence == index.end_sequence) {
        return error_set("%s has %lld documents, and --split leaves none of them for %s; give it a "
                         "larger share, or a share of 0 for no such split",
                         source->name, (long long)source->num_sequences, split_names[which]);
    }
    TRY(gpt_dataset_open(&dataset->sets[dataset->num_sets], source, &index, config->vocab_size));
    dataset->num_sets++;
    return 0;
}

/* The order over the parts. Without weights each part has all its samples of one epoch and counts
 * by its size; with weights the total is the sum of what the parts were built for. */
static int open_blend(struct dataset *dataset, const struct source_list *list, int which,
                      int64_t num_samples, const struct datasets_config *config)
{
    char path[PATH_LENGTH_MAX];
    const int num_sets = dataset->num_sets;
    int64_t *available = allocate(num_sets, sizeof *available);
    double *weights = allocate(num_sets, sizeof *weights);
    int64_t total = 0;
    int result;

    for (int i = 0; i < num_sets; i++) {
        available[i] = gpt_dataset_num_samples(&dataset->sets[i]);
        weights[i] = list->has_weights ? list->weights[i] : (double)available[i];
        total +=
            list->has_weights ? blend_set_samples(list->weights[i], num_samples) : available[i];
    }
    if (!list->has_weights && num_samples >= 0 && num_samples < total) {
        total = num_samples;
    }
    result = blend_open(&dataset->blend, weights, available, num_sets, total, split_names[which],
                        cache_directory(config, list->prefixes[0], path));
    dataset->is_blend = result == 0;
    dataset->num_samples = total;
    free(available);
    free(weights);
    return result;
}

static int open_parts_and_blend(struct dataset *dataset, const struct source_list *list, int which,
                                const struct split *split, int64_t num_samples,
                                const struct datasets_config *config)
{
    const bool is_plain = list->num_sources == 1 && !list->has_weights;

    if (list->has_weights && num_samples < 0) {
        return error_set("weights of data sets need a number of samples");
    }
    for (int i = 0; i < list->num_sources; i++) {
        int64_t part = -1;

        if (is_plain) {
            part = num_samples;
        } else if (list->has_weights) {
            part = blend_set_samples(list->weights[i], num_samples);
        }
        TRY(open_part(dataset, list->sources[i], list->prefixes == NULL ? NULL : list->prefixes[i],
                      which, split, part, config));
    }
    if (is_plain) {
        dataset->num_samples = gpt_dataset_num_samples(&dataset->sets[0]);
        return 0;
    }
    return open_blend(dataset, list, which, num_samples, config);
}

static int build_split(struct datasets *sets, const struct source_list *list, int which,
                       const struct split *split, int64_t num_samples,
                       const struct datasets_config *config)
{
    struct dataset *dataset;

    if (!split_exists(split, which) || num_samples == 0) {
        return 0;
    }
    dataset = allocate(1, sizeof *dataset);
    sets->split[which] = dataset;
    dataset->seq_length = config->seq_length;
    dataset->sets = allocate(list->num_sources, sizeof *dataset->sets);
    TRY(open_parts_and_blend(dataset, list, which, split, num_samples, config));
    if (dataset->num_samples < num_samples) {
        log_warn("the %s data has %lld samples, and the run asks for %lld: data sets without "
                 "weights are seen once; weights let them repeat",
                 split_names[which], (long long)dataset->num_samples, (long long)num_samples);
    }
    return 0;
}

static int build_mock(struct datasets *sets, const struct datasets_config *config,
                      const int64_t num_samples[NUM_SPLITS])
{
    struct token_source *source = token_source_open_mock(config->vocab_size, config->eod);
    const struct token_source *only = source;
    const struct source_list list = {.num_sources = 1, .sources = &only};
    struct split split;

    keep_source(sets, source);
    TRY(split_parse(&split, config->split != NULL ? config->split : "1, 1, 1"));
    for (int which = 0; which < NUM_SPLITS; which++) {
        TRY(build_split(sets, &list, which, &split, num_samples[which], config));
    }
    return 0;
}

static int build_from_one_list(struct datasets *sets, const struct datasets_config *config,
                               const int64_t num_samples[NUM_SPLITS])
{
    struct source_list list = {0};
    struct split split;
    int result = split_parse(&split, config->split != NULL ? config->split : "969, 30, 1");

    if (result == 0) {
        result = source_list_open(&list, sets, &config->data_path);
    }
    for (int which = 0; result == 0 && which < NUM_SPLITS; which++) {
        result = build_split(sets, &list, which, &split, num_samples[which], config);
    }
    source_list_free(&list);
    return result;
}

static int build_from_own_list(struct datasets *sets, const struct datasets_config *config,
                               int which, int64_t num_samples)
{
    struct source_list list = {0};
    struct split whole = {.bounds = {0.0}};
    int result = 0;

    for (int i = which + 1; i <= NUM_SPLITS; i++) {
        whole.bounds[i] = 1.0;
    }
    if (config->split_path[which].num_words > 0 && num_samples != 0) {
        result = source_list_open(&list, sets, &config->split_path[which]);
        if (result == 0) {
            /* a weight says nothing about a single set here; --data-path takes it as a blend */
            list.has_weights = list.has_weights && list.num_sources > 1;
            result = build_split(sets, &list, which, &whole, num_samples, config);
        }
    }
    source_list_free(&list);
    return result;
}

static int build(struct datasets *sets, const struct datasets_config *config,
                 const int64_t num_samples[NUM_SPLITS])
{
    bool has_own_lists = false;

    if (config->seed < 0 || config->seed > UINT32_MAX) {
        return error_set("--seed is %lld; the order of samples takes 0 to %u",
                         (long long)config->seed, UINT32_MAX);
    }
    if (config->mock) {
        return build_mock(sets, config, num_samples);
    }
    if (config->data_path.num_words > 0) {
        return build_from_one_list(sets, config, num_samples);
    }
    for (int which = 0; which < NUM_SPLITS; which++) {
        has_own_lists = has_own_lists || config->split_path[which].num_words > 0;
        TRY(build_from_own_list(sets, config, which, num_samples[which]));
    }
    if (!has_own_lists) {
        return error_set("no data: give --data-path, --train-data-path or --mock-data");
    }
    return 0;
}

int datasets_build(struct datasets *sets, const struct datasets_config *config,
                   const int64_t num_samples[NUM_SPLITS])
{
    *sets = (struct datasets){0};
    if (build(sets, config, num_samples) != 0) {
        datasets_free(sets);
        return -1;
    }
    return 0;
}

void datasets_free(struct datasets *sets)
{
    for (int which = 0; which < NUM_SPLITS; which++) {
        dataset_free(sets->split[which]);
    }
    for (int i = 0; i < sets->num_sources; i++) {
        token_source_close(sets->sources[i]);
    }
    free(sets->sources);
    *sets = (struct datasets){0};
}

int dataset_sample(const struct dataset *dataset, int64_t i, int32_t *tokens)
{
    CHECK(i >= 0 && i < dataset->num_samples, "sample %lld of %lld", (long long)i,
          (long long)dataset->num_samples);
    if (!dataset->is_blend) {
        return gpt_dataset_sample(&dataset->sets[0], i, tokens);
    }
    return gpt_dataset_sample(&dataset->sets[dataset->blend.set_index[i]],
                              dataset->blend.sample_index[i], tokens);
}
