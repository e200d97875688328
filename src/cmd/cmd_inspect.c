/* cadre inspect: what is in a checkpoint, in safetensors files, in a data set; and which tokens
 * training sees as its sample I. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args/help.h"
#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "ckpt/hf_weights.h"
#include "cmd/cmd.h"
#include "cmd/inspect_tensors.h"
#include "data/datasets.h"
#include "data/indexed_dataset.h"
#include "data/tokenizer.h"

struct inspect_options {
    char *path;
    bool hash;
    int64_t ckpt_step;
    struct option_strings data_path;
    int64_t seq_length, train_samples, seed, sample, vocab_size;
    char *split, *data_cache_path, *tokenizer_type, *tokenizer_model;
};

static const struct option_row rows[] = {
    OPTION_TEXT(struct inspect_options, "PATH", path, NULL, "tensors",
                "a checkpoint directory (as --load, or iter_X), a Hugging Face directory, a "
                ".safetensors file, or the .idx file of a data set"),
    OPTION_SWITCH(struct inspect_options, "--hash", hash, "tensors",
                  "a line a tensor: name dtype shape hash (XXH3-128 of all its bytes in global "
                  "order, however it is sharded)"),
    OPTION_INTEGER(struct inspect_options, "--ckpt-step", ckpt_step, "-1", -1, OPTION_NO_MAX,
                   "tensors", "iteration of the checkpoint; -1: the newest"),
    OPTION_TEXTS(struct inspect_options, "--data-path", data_path, "training samples",
                 "data sets, as for pretrain: prefixes, or weights and prefixes"),
    OPTION_INTEGER(struct inspect_options, "--sample", sample, "0", 0, OPTION_NO_MAX,
                   "training samples", "number of the sample, in the order training sees them"),
    OPTION_INTEGER(struct inspect_options, "--seq-length", seq_length, NULL, 1, 1 << 30,
                   "training samples", "tokens in a sequence"),
    OPTION_INTEGER(struct inspect_options, "--train-samples", train_samples, NULL, 1, OPTION_NO_MAX,
                   "training samples", "samples of the whole training: the order depends on it"),
    OPTION_INTEGER(struct inspect_options, "--seed", seed, "1234", 0, 4294967295.0,
                   "training samples", "seed of the training"),
    OPTION_TEXT(struct inspect_options, "--split", split, NULL, "training samples",
                "shares of training, validation and test; default 969, 30, 1"),
    OPTION_TEXT(struct inspect_options, "--data-cache-path", data_cache_path, NULL,
                "training samples", "folder of cached indices; default: none is used"),
    OPTION_TEXT(struct inspect_options, "--tokenizer-type", tokenizer_type, NULL,
                "training samples", "to print the sample's text, too"),
    OPTION_TEXT(struct inspect_options, "--tokenizer-model", tokenizer_model, NULL,
                "training samples", "the tokenizer's file"),
    OPTION_INTEGER(struct inspect_options, "--vocab-size", vocab_size, NULL, 1, 1 << 30,
                   "training samples", "of NullTokenizer"),
};
const struct option_table inspect_table = OPTION_TABLE(
    "inspect", "Shows what is in a checkpoint, a safetensors file or a data set.", rows);

/* ---- tensors ---- */

static bool has_suffix(const char *text, const char *suffix)
{
    const size_t length = strlen(text), suffix_length = strlen(suffix);

    return length > suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

static int inspect_file(const char *path, bool with_hash)
{
    struct safetensors *file = safetensors_open(path);
    int result;

    if (file == NULL) {
        return -1;
    }
    result = inspect_safetensors((const struct safetensors *const *)&file, 1, with_hash);
    safetensors_close(file);
    return result;
}

static int inspect_checkpoint_at(const char *path, bool with_hash)
{
    struct checkpoint *checkpoint = checkpoint_open(path, NULL);
    int result;

    if (checkpoint == NULL) {
        return -1;
    }
    if (!with_hash) {
        printf("checkpoint %s, iteration %" PRId64 "\n", path, checkpoint_iteration(checkpoint));
    }
    result = inspect_checkpoint(checkpoint, with_hash);
    checkpoint_close(checkpoint);
    return result;
}

/* The model's files only, whatever else lies in the directory. */
static int inspect_hf(const char *directory, bool with_hash)
{
    struct hf_weights *weights = hf_weights_open(directory);
    const struct safetensors *const *files;
    int num_files, result;

    if (weights == NULL) {
        return -1;
    }
    files = hf_weights_files(weights, &num_files);
    result = inspect_safetensors(files, num_files, with_hash);
    hf_weights_close(weights);
    return result;
}

/* Every .safetensors file in the directory; the caller closes and frees them, also on failure. */
static int open_all_files(const char *directory, struct safetensors ***files, int *num_files)
{
    DIR *entries = opendir(directory);
    int result = 0;

    if (entries == NULL) {
        return error_set("cannot open directory %s: %s", directory, strerror(errno));
    }
    for (struct dirent *entry; result == 0 && (entry = readdir(entries)) != NULL;) {
        char path[PATH_LENGTH_MAX];

        if (!has_suffix(entry->d_name, ".safetensors")) {
            continue;
        }
        *files = realloc(*files, (size_t)(*num_files + 1) * sizeof **files);
        CHECK(*files != NULL, "out of memory");
        result = path_format(path, "%s/%s", directory, entry->d_name);
        (*files)[*num_files] = result == 0 ? safetensors_open(path) : NULL;
        result = (*files)[*num_files] != NULL ? 0 : -1;
        *num_files += result == 0;
    }
    closedir(entries);
    return result;
}

static int inspect_all_files(const char *directory, bool with_hash)
{
    struct safetensors **files = NULL;
    int num_files = 0;
    int result = open_all_files(directory, &files, &num_files);

    if (result == 0 && num_files == 0) {
        result = error_set("%s holds neither a checkpoint nor .safetensors files", directory);
    }
    if (result == 0) {
        result =
            inspect_safetensors((const struct safetensors *const *)files, num_files, with_hash);
    }
    for (int i = 0; i < num_files; i++) {
        safetensors_close(files[i]);
    }
    free(files);
    return result;
}

static int inspect_directory(const struct inspect_options *o)
{
    char path[PATH_LENGTH_MAX];

    if (hf_weights_are_at(o->path)) {
        return inspect_hf(o->path, o->hash);
    }
    switch (checkpoint_find(o->path, o->ckpt_step, path)) {
    case CHECKPOINT_FOUND:
        return inspect_checkpoint_at(path, o->hash);
    case CHECKPOINT_NONE:
        return inspect_all_files(o->path, o->hash);
    default:
        return -1;
    }
}

/* ---- data ---- */

static int inspect_index(const char *path)
{
    struct indexed_dataset set;
    char prefix[PATH_LENGTH_MAX];
    int64_t num_tokens = 0;

    TRY(path_format(prefix, "%.*s", (int)(strlen(path) - strlen(".idx")), path));
    TRY(indexed_dataset_open(&set, prefix));
    for (int64_t i = 0; i < set.num_sequences; i++) {
        num_tokens += indexed_dataset_length(&set, i);
    }
    printf("data set %s: %s tokens, %" PRId64 " documents, %" PRId64 " sequences, %" PRId64
           " tokens\n",
           prefix, token_dtype_name((int)set.dtype), set.num_documents, set.num_sequences,
           num_tokens);
    indexed_dataset_close(&set);
    return 0;
}

static int print_text(const struct inspect_options *o, const int32_t *tokens)
{
    const struct tokenizer_config config = {
        .type = o->tokenizer_type, .model = o->tokenizer_model, .vocab_size = o->vocab_size};
    struct tokenizer *tokenizer = tokenizer_open(&config);
    char *text;

    if (tokenizer == NULL) {
        return -1;
    }
    text = tokenizer_decode(tokenizer, tokens, o->seq_length + 1, NULL);
    tokenizer_close(tokenizer);
    if (text == NULL) {
        return -1;
    }
    puts(text);
    free(text);
    return 0;
}

static int print_sample(const struct inspect_options *o, const struct dataset *dataset)
{
    int32_t *tokens;
    int result;

    if (dataset == NULL) {
        return error_set("--split %s leaves nothing for training",
                         o->split != NULL ? o->split : "969, 30, 1");
    }
    if (o->sample >= dataset->num_samples) {
        return error_set("--sample %" PRId64 ": training has the samples 0 to %" PRId64, o->sample,
                         dataset->num_samples - 1);
    }
    tokens = malloc((size_t)(o->seq_length + 1) * sizeof *tokens);
    CHECK(tokens != NULL, "out of memory");
    result = dataset_sample(dataset, o->sample, tokens);
    for (int64_t i = 0; result == 0 && i <= o->seq_length; i++) {
        printf("%" PRId32 "%c", tokens[i], i < o->seq_length ? ' ' : '\n');
    }
    if (result == 0 && o->tokenizer_type != NULL) {
        result = print_text(o, tokens);
    }
    free(tokens);
    return result;
}

static int inspect_sample(const struct inspect_options *o)
{
    const struct datasets_config config = {
        .data_path = {(const char *const *)o->data_path.items, o->data_path.num_items},
        .split = o->split,
        .cache_directory = o->data_cache_path,
        .no_cache = o->data_cache_path == NULL,
        .seq_length = o->seq_length,
        .seed = o->seed};
    const int64_t num_samples[NUM_SPLITS] = {[SPLIT_TRAIN] =
                                                 o->train_samples > 0 ? o->train_samples : -1};
    struct datasets sets;
    int result;

    if (o->seq_length == 0) {
        return error_set("--data-path needs --seq-length");
    }
    TRY(datasets_build(&sets, &config, num_samples));
    result = print_sample(o, sets.split[SPLIT_TRAIN]);
    datasets_free(&sets);
    return result;
}

/* ---- command ---- */

static int inspect(const struct inspect_options *o)
{
    if (o->data_path.num_items > 0) {
        return o->path == NULL ? inspect_sample(o)
                               : error_set("inspect takes PATH or --data-path, not both");
    }
    if (o->path == NULL) {
        return error_set("inspect needs a PATH, or --data-path with --seq-length");
    }
    if (path_is_directory(o->path)) {
        return inspect_directory(o);
    }
    return has_suffix(o->path, ".idx") ? inspect_index(o->path) : inspect_file(o->path, o->hash);
}

int cmd_inspect(int argc, char **argv)
{
    struct inspect_options options;
    int result;

    if (help_requested(&inspect_table, argc, argv, stdout)) {
        return 0;
    }
    TRY(option_table_init(&inspect_table, &options, NULL));
    result = option_table_parse(&inspect_table, argc, argv, &options, NULL);
    if (result == 0) {
        result = inspect(&options);
    }
    option_table_free(&inspect_table, &options);
    return result;
}
