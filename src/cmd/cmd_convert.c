/* cadre convert: a Hugging Face Mixtral directory into a cadre checkpoint ("release": weights of no
 * iteration), or a cadre checkpoint into a Hugging Face directory. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "args/help.h"
#include "args/options.h"
#include "base/check.h"
#include "base/log.h"
#include "ckpt/checkpoint.h"
#include "ckpt/hf_export.h"
#include "ckpt/hf_mixtral.h"
#include "cmd/cmd.h"
#include "cmd/hf_options.h"

struct convert_options {
    char *from, *to, *to_format, *dtype;
    int64_t ckpt_step, make_vocab_size_divisible_by, max_shard_size_mb;
};

static const struct option_row rows[] = {
    OPTION_TEXT(struct convert_options, "--from", from, NULL, "convert",
                "what to convert: a Hugging Face directory, or a checkpoint directory (as --load)"),
    OPTION_TEXT(struct convert_options, "--to", to, NULL, "convert", "the new directory"),
    OPTION_ONE_OF(struct convert_options, "--to-format", to_format, NULL, "hf cadre", "convert",
                  "default: the other one"),
    OPTION_ONE_OF(struct convert_options, "--dtype", dtype, NULL, "fp32 bf16 fp16", "convert",
                  "type of the weights written; default: as they are"),
    OPTION_INTEGER(struct convert_options, "--ckpt-step", ckpt_step, "-1", -1, OPTION_NO_MAX,
                   "convert", "iteration of the checkpoint to read; -1: the newest"),
    OPTION_INTEGER(struct convert_options, "--make-vocab-size-divisible-by",
                   make_vocab_size_divisible_by, "128", 1, 1 << 30, "convert",
                   "to cadre: the vocabulary is padded with rows of zeros to a multiple of this"),
    OPTION_INTEGER(struct convert_options, "--max-shard-size-mb", max_shard_size_mb, "5000", 1,
                   1 << 30, "convert",
                   "to Hugging Face: most MB (10^6 bytes) of weights in a file"),
};
const struct option_table convert_table = OPTION_TABLE(
    "convert", "Converts a Hugging Face Mixtral model to a cadre checkpoint or back.", rows);

/* NUM_DTYPES: as they are. */
static enum dtype wanted_dtype(const struct convert_options *o)
{
    if (o->dtype == NULL) {
        return NUM_DTYPES;
    }
    return strcmp(o->dtype, "fp32") == 0   ? DTYPE_F32
           : strcmp(o->dtype, "bf16") == 0 ? DTYPE_BF16
                                           : DTYPE_F16;
}

static void print_counts(int num_read, int num_written, int num_unused, int num_missing)
{
    log_info("tensors: read %d, written %d, unused %d, missing %d", num_read, num_written,
             num_unused, num_missing);
}

/* ---- tokenizer files ---- */

static int copy_file(const char *from, const char *to)
{
    size_t length;
    char *bytes = path_read_file(from, 1 << 30, &length);
    int result;

    if (bytes == NULL) {
        return -1;
    }
    result = path_write_file_atomic(to, bytes, length);
    free(bytes);
    return result;
}

static int copy_tokenizer(const char *from, const char *to)
{
    static const char *names[] = {"tokenizer.model",       "tokenizer.json",
                                  "tokenizer_config.json", "special_tokens_map.json",
                                  "added_tokens.json",     "chat_template.jinja"};

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char source[PATH_LENGTH_MAX], target[PATH_LENGTH_MAX];

        TRY(path_format(source, "%s/%s", from, names[i]));
        TRY(path_format(target, "%s/%s", to, names[i]));
        if (path_exists(source)) {
            TRY(copy_file(source, target));
        }
    }
    return 0;
}

/* ---- to cadre ---- */

struct import {
    struct hf_mixtral *model;
    struct hf_model_tensor *tensors;
    struct ckpt_item *items;
    int num_tensors;
};

static int stage_tensor(void *context, const struct ckpt_item *item, void *host)
{
    const struct import *import = context;

    return hf_mixtral_read_box(import->model, &import->tensors[item - import->items], &item->box,
                               item->dtype, host);
}

static void make_items(struct import *import, enum dtype dtype)
{
    import->items = calloc((size_t)import->num_tensors, sizeof *import->items);
    CHECK(import->items != NULL, "out of memory");
    for (int i = 0; i < import->num_tensors; i++) {
        const struct hf_model_tensor *tensor = &import->tensors[i];
        struct ckpt_item *item = &import->items[i];

        *item = (struct ckpt_item){
            .name = tensor->name,
            .dtype = dtype != NUM_DTYPES ? dtype : hf_mixtral_dtype(import->model, tensor),
            .num_dims = tensor->num_dims,
            .box = box_whole(tensor->global_shape, tensor->num_dims)};
        memcpy(item->global_shape, tensor->global_shape, sizeof item->global_shape);
    }
}

/* The absolute path that the tokenizer's model will have beside the checkpoint; "" if there is
 * none. */
static int tokenizer_path(const struct convert_options *o, char path[PATH_LENGTH_MAX])
{
    char source[PATH_LENGTH_MAX];
    char *directory;

    path[0] = '\0';
    TRY(path_format(source, "%s/tokenizer.model", o->from));
    if (!path_exists(source)) {
        return 0;
    }
    directory = realpath(o->to, NULL);
    if (directory == NULL) {
        return error_set("cannot resolve %s: %s", o->to, strerror(errno));
    }
    const int result = path_format(path, "%s/tokenizer.model", directory);
    free(directory);
    return result;
}

/* What training finds in the checkpoint's manifest. */
static json_t *import_state(const struct convert_options *o, const struct hf_mixtral_config *config,
                            const char *tokenizer_model)
{
    struct options options;
    json_t *state = NULL;

    if (options_init(&options) != 0) {
        return NULL;
    }
    options.make_vocab_size_divisible_by = o->make_vocab_size_divisible_by;
    if (hf_options_import(&options, config, tokenizer_model[0] != '\0' ? tokenizer_model : NULL) ==
            0 &&
        options_validate_model(&options) == 0) {
        state = json_pack("{s:o, s:I, s:I, s:I, s:I, s:o}", "args", options_to_json(&options),
                          "iteration", (json_int_t)0, "consumed_train_samples", (json_int_t)0,
                          "consumed_valid_samples", (json_int_t)0, "vocab_size",
                          (json_int_t)config->vocab_size, "hf_config", hf_config_json(config));
    }
    options_free(&options);
    return state;
}

static int save_import(const struct convert_options *o, struct import *import)
{
    const struct hf_mixtral_config *config = hf_mixtral_config(import->model);
    const int64_t unit = o->make_vocab_size_divisible_by;
    const int64_t padded = (config->vocab_size + unit - 1) / unit * unit;
    struct checkpoint_save_request request = {
        .directory = o->to, .release = true, .stage = stage_tensor, .context = import};
    char tokenizer_model[PATH_LENGTH_MAX];
    int result;

    TRY(path_make_directories(o->to));
    TRY(copy_tokenizer(o->from, o->to));
    TRY(tokenizer_path(o, tokenizer_model));
    request.state = import_state(o, config, tokenizer_model);
    if (request.state == NULL) {
        return -1;
    }
    import->tensors = hf_mixtral_tensors(config, padded, &import->num_tensors);
    make_items(import, wanted_dtype(o));
    request.items = import->items;
    request.num_items = import->num_tensors;
    result = checkpoint_save(&request);
    json_decref(request.state);
    return result;
}

/* Names what does not match, and fails if anything does not. */
static int check_inventory(const struct hf_mixtral_inventory *inventory)
{
    if (inventory->num_missing > 0) {
        return error_set("%d tensors that config.json asks for are missing, such as %.*s",
                         inventory->num_missing, (int)strcspn(inventory->missing, "\n"),
                         inventory->missing);
    }
    if (inventory->num_unexpected > 0) {
        return error_set("%d tensors have no place in the model, such as %.*s",
                         inventory->num_unexpected, (int)strcspn(inventory->unexpected, "\n"),
                         inventory->unexpected);
    }
    return 0;
}

static int import_model(const struct convert_options *o, struct import *import)
{
    struct hf_mixtral_inventory inventory;
    int result;

    TRY(hf_mixtral_take_inventory(import->model, &inventory));
    result = check_inventory(&inventory);
    if (result == 0) {
        result = save_import(o, import);
    }
    print_counts(inventory.num_used, result == 0 ? import->num_tensors : 0, inventory.num_unused,
                 inventory.num_missing);
    hf_mixtral_inventory_free(&inventory);
    return result;
}

static int convert_to_cadre(const struct convert_options *o)
{
    struct import import = {0};
    char path[PATH_LENGTH_MAX];
    int result;

    TRY(path_format(path, "%s/latest_checkpointed_iteration.txt", o->to));
    if (path_exists(path)) {
        return error_set("--to %s holds checkpoints already; give a new directory", o->to);
    }
    import.model = hf_mixtral_open(o->from);
    if (import.model == NULL) {
        return -1;
    }
    result = import_model(o, &import);
    free(import.tensors);
    free(import.items);
    hf_mixtral_close(import.model);
    if (result == 0) {
        log_info("%s is a checkpoint now: cadre pretrain --load %s --use-checkpoint-args", o->to,
                 o->to);
    }
    return result;
}

/* ---- to Hugging Face ---- */

static bool is_empty_directory(const char *path)
{
    DIR *entries = opendir(path);
    int count = 0;

    if (entries == NULL) {
        return false;
    }
    while (count < 3 && readdir(entries) != NULL) {
        count++; /* "." and ".." */
    }
    closedir(entries);
    return count < 3;
}

static int count_weights(const struct checkpoint *checkpoint)
{
    int count = 0;

    for (int i = 0; i < checkpoint_num_tensors(checkpoint); i++) {
        count += !checkpoint_tensor_at(checkpoint, i)->is_optimizer;
    }
    return count;
}

/* The type that config.json names: that of most of the weights, the embedding's. */
static enum dtype config_dtype(const struct checkpoint *checkpoint, enum dtype wanted)
{
    const struct checkpoint_tensor *embedding =
        checkpoint_find_tensor(checkpoint, "embedding.word_embeddings.weight");

    return wanted != NUM_DTYPES || embedding == NULL ? wanted : embedding->dtype;
}

static int export_into(const struct convert_options *o, const struct checkpoint *checkpoint,
                       const char *directory)
{
    const enum dtype dtype = wanted_dtype(o);
    struct hf_mixtral_config config;
    struct hf_export request = {.checkpoint = checkpoint,
                                .config = &config,
                                .directory = directory,
                                .as_saved = dtype == NUM_DTYPES,
                                .dtype = dtype,
                                .max_shard_bytes = o->max_shard_size_mb * 1000000};

    TRY(hf_options_export(&config, checkpoint_state(checkpoint)));
    config.dtype = config_dtype(checkpoint, dtype);
    TRY(path_make_directories(directory));
    TRY(hf_export_write(&request));
    TRY(copy_tokenizer(o->from, directory));
    print_counts(request.num_read, request.num_written,
                 count_weights(checkpoint) - request.num_read, 0);
    return path_sync_directory(directory);
}

/* Under another name first, so that a directory of this name is complete. */
static int export_checkpoint(const struct convert_options *o, const struct checkpoint *checkpoint)
{
    char temporary[PATH_LENGTH_MAX], parent[PATH_LENGTH_MAX], message[2048];
    int result;

    TRY(path_format(temporary, "%s.tmp-%ld", o->to, (long)getpid()));
    TRY(path_parent(parent, o->to));
    result = export_into(o, checkpoint, temporary);
    if (result == 0 && rename(temporary, o->to) != 0) {
        result = error_set("cannot rename %s to %s: %s", temporary, o->to, strerror(errno));
    }
    if (result != 0) {
        snprintf(message, sizeof message, "%s", error_text());
        path_remove_tree(temporary);
        return error_set("%s", message);
    }
    return path_sync_directory(parent);
}

static int convert_to_hf(const struct convert_options *o)
{
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;
    int result;

    if (path_exists(o->to) && !is_empty_directory(o->to)) {
        return error_set("--to %s exists already; give a new directory", o->to);
    }
    TRY(checkpoint_find(o->from, o->ckpt_step, path));
    checkpoint = checkpoint_open(path, NULL);
    if (checkpoint == NULL) {
        return -1;
    }
    result = export_checkpoint(o, checkpoint);
    checkpoint_close(checkpoint);
    return result;
}

/* ---- command ---- */

static bool is_cadre(const char *directory)
{
    char path[PATH_LENGTH_MAX];

    return checkpoint_is_at(directory) ||
           (path_format(path, "%s/latest_checkpointed_iteration.txt", directory) == 0 &&
            path_exists(path));
}

static void strip_slashes(char *path)
{
    size_t length = strlen(path);

    while (length > 1 && path[length - 1] == '/') {
        path[--length] = '\0';
    }
}

static int convert(const struct convert_options *o)
{
    const char *to_format;

    if (o->from == NULL || o->to == NULL) {
        return error_set("convert needs --from DIR and --to DIR");
    }
    strip_slashes(o->from);
    strip_slashes(o->to);
    if (hf_weights_are_at(o->from)) {
        to_format = "cadre";
    } else if (is_cadre(o->from)) {
        to_format = "hf";
    } else {
        return error_set("--from %s is neither a Hugging Face directory (model.safetensors, or its "
                         "index) nor a cadre checkpoint",
                         o->from);
    }
    if (o->to_format != NULL && strcmp(o->to_format, to_format) != 0) {
        return error_set("--from %s has the format of --to-format %s already", o->from,
                         o->to_format);
    }
    return strcmp(to_format, "hf") == 0 ? convert_to_hf(o) : convert_to_cadre(o);
}

int cmd_convert(int argc, char **argv)
{
    struct convert_options options;
    int result;

    if (help_requested(&convert_table, argc, argv, stdout)) {
        return 0;
    }
    TRY(option_table_init(&convert_table, &options, NULL));
    result = option_table_parse(&convert_table, argc, argv, &options, NULL);
    if (result == 0) {
        result = convert(&options);
    }
    option_table_free(&convert_table, &options);
    return result;
}
