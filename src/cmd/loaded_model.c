#include "cmd/loaded_model.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "ckpt/hf_mixtral.h"
#include "ckpt/manifest.h"
#include "cmd/hf_options.h"
#include "device/device_select.h"
#include "ops/ops.h"
#include "train/model_setup.h"
#include "train/train_checkpoint.h"

enum { CHUNK_TOKENS_MAX = 8192 }; /* of one pass: bounds the memory of the activations */

/* The memory of a model whose options and vocabulary are known. */
static int build(struct loaded_model *model, int64_t vocab_size,
                 const struct loaded_model_request *request)
{
    const struct memory_source *memory = &request->device->memory;
    const int64_t num_positions = request->num_positions;
    struct stage_place place;

    TRY(options_validate_model(&model->options));
    TRY(model_config_from_options(&model->config, &model->options, vocab_size));
    model->config.seq_length = num_positions;
    if (model->config.position == POSITION_LEARNED && num_positions > model->config.max_positions) {
        model->config.seq_length = model->config.max_positions;
    }
    model->config.dtype = request->dtype;
    groups_create_self(&model->groups);
    model->stream = stream_create(request->device, request->ops);
    model->run = arena_create("run", memory);
    model->saved = arena_create("microbatch", memory);
    model->scratch = arena_create("call", memory);
    param_list_init(&model->params);
    place = stage_place_whole(&model->config);
    transformer_stage_init(&model->stage, &model->params, &model->groups, &model->config, &place);
    param_list_allocate(&model->params, model->run, model->stream, request->dtype, false);
    transformer_stage_allocate(&model->stage, model->stream, model->run);
    return 0;
}

static int load_checkpoint(struct loaded_model *model, const struct loaded_model_request *request)
{
    struct checkpoint *checkpoint = checkpoint_open(model->path, NULL);
    const json_t *state;
    int result;

    if (checkpoint == NULL) {
        return -1;
    }
    state = checkpoint_state(checkpoint);
    result = options_apply_json(&model->options, json_object_get(state, "args"));
    if (result == 0) {
        result = build(model, json_integer_value(json_object_get(state, "vocab_size")), request);
    }
    if (result == 0) {
        result = train_checkpoint_read_model(&model->stage, model->stream, checkpoint);
    }
    checkpoint_close(checkpoint);
    return result;
}

/* The Hugging Face model, and its tensors under cadre's names. */
struct hf_source {
    struct hf_mixtral *files;
    struct hf_model_tensor *tensors;
    int num_tensors;
};

static int read_hf_param(void *context, const struct param *param, void *host)
{
    const struct hf_source *source = context;

    for (int i = 0; i < source->num_tensors; i++) {
        if (strcmp(source->tensors[i].name, param->name) == 0) {
            return hf_mixtral_read_box(source->files, &source->tensors[i], &param->box,
                                       param->value.dtype, host);
        }
    }
    return error_set("the Hugging Face model has no %s", param->name);
}

/* The options of config.json; the tokenizer is the directory's own, where it has one. */
static int import_options(struct loaded_model *model, const struct hf_mixtral_config *config)
{
    char tokenizer[PATH_LENGTH_MAX];

    TRY(path_format(tokenizer, "%s/tokenizer.model", model->path));
    return hf_options_import(&model->options, config, path_exists(tokenizer) ? tokenizer : NULL);
}

static int load_hf_files(struct loaded_model *model, struct hf_source *source,
                         const struct loaded_model_request *request)
{
    const struct hf_mixtral_config *config = hf_mixtral_config(source->files);
    struct hf_mixtral_inventory inventory;

    TRY(hf_mixtral_take_inventory(source->files, &inventory));
    if (inventory.num_missing > 0 || inventory.num_unexpected > 0) {
        error_set("%s: %d tensors are missing and %d have no place in a Mixtral model", model->path,
                  inventory.num_missing, inventory.num_unexpected);
        hf_mixtral_inventory_free(&inventory);
        return -1;
    }
    hf_mixtral_inventory_free(&inventory);
    TRY(import_options(model, config));
    TRY(option_table_set(&options_table, "--make-vocab-size-divisible-by", "1", ORIGIN_CHECKPOINT,
                         &model->options, model->options.origins));
    TRY(build(model, config->vocab_size, request));
    source->tensors =
        hf_mixtral_tensors(config, model->config.padded_vocab_size, &source->num_tensors);
    return param_list_read(&model->params, model->stream,
                           &(struct param_reader){.read = read_hf_param, .context = source});
}

static int load_hf(struct loaded_model *model, const struct loaded_model_request *request)
{
    struct hf_source source = {.files = hf_mixtral_open(model->path)};
    int result;

    if (source.files == NULL) {
        return -1;
    }
    result = load_hf_files(model, &source, request);
    free(source.tensors);
    hf_mixtral_close(source.files);
    return result;
}

int loaded_model_choose_device(struct loaded_model_request *request, const char *name)
{
    request->device = device_select(name, 0);
    request->ops = request->device != NULL ? ops_for(request->device) : NULL;
    return request->ops != NULL ? 0 : -1;
}

int loaded_model_open(struct loaded_model *model, const struct loaded_model_request *request)
{
    memset(model, 0, sizeof *model);
    TRY(options_init(&model->options));
    if (hf_weights_are_at(request->directory)) {
        TRY(path_format(model->path, "%s", request->directory));
        return load_hf(model, request);
    }
    switch (checkpoint_find(request->directory, -1, model->path)) {
    case CHECKPOINT_FOUND:
        return load_checkpoint(model, request);
    case CHECKPOINT_NONE:
        return error_set("%s holds neither a cadre checkpoint nor a Hugging Face model",
                         request->directory);
    default:
        return -1;
    }
}

void loaded_model_close(struct loaded_model *model)
{
    if (model->stream != NULL) {
        transformer_stage_free(&model->stage);
        param_list_free(&model->params);
        arena_destroy(model->run);
        arena_destroy(model->saved);
        arena_destroy(model->scratch);
        stream_destroy(model->stream);
        groups_destroy(&model->groups);
    }
    options_free(&model->options);
}

struct pass loaded_model_pass(struct loaded_model *model, const int32_t *tokens, int64_t num_tokens,
                              int64_t num_sequences, int64_t first_position)
{
    struct pass pass = {.stream = model->stream,
                        .groups = &model->groups,
                        .saved = model->saved,
                        .scratch = model->scratch,
                        .dtype = model->config.dtype,
                        .num_sequences = num_sequences,
                        .token = tensor_new(model->saved, DTYPE_I32, num_tokens),
                        .position = tensor_new(model->saved, DTYPE_I32, num_tokens),
                        .token_id = tensor_new(model->saved, DTYPE_I64, num_tokens)};
    int32_t *positions = malloc((size_t)num_tokens * sizeof *positions);

    CHECK(positions != NULL, "out of memory");
    for (int64_t t = 0; t < num_tokens; t++) {
        positions[t] = (int32_t)(first_position + t / num_sequences);
    }
    stream_copy_from_host(model->stream, pass.token.data, tokens,
                          (size_t)num_tokens * sizeof *tokens);
    stream_copy_from_host(model->stream, pass.position.data, positions,
                          (size_t)num_tokens * sizeof *positions);
    op_fill_zero(model->stream, &pass.token_id);
    free(positions);
    return pass;
}

static int check_tokens(const struct loaded_model *model, const int64_t *tokens,
                        int64_t num_sequences, int64_t seq_length)
{
    const int64_t vocab_size = model->config.vocab_size;

    if (seq_length > model->config.seq_length) {
        return error_set("sequences of %lld tokens, and the model has room for %lld positions",
                         (long long)seq_length, (long long)model->config.seq_length);
    }
    for (int64_t i = 0; i < num_sequences * seq_length; i++) {
        if (tokens[i] < 0 || tokens[i] >= vocab_size) {
            return error_set("token %lld at [%lld, %lld] is not in the vocabulary of %lld",
                             (long long)tokens[i], (long long)(i / seq_length),
                             (long long)(i % seq_length), (long long)vocab_size);
        }
    }
    return 0;
}

/* logits [count,S,V] of tokens [count,S]. */
static void run_chunk(struct loaded_model *model, const int64_t *tokens, int64_t count,
                      int64_t seq_length, float *out)
{
    const struct arena_mark mark = arena_mark(model->saved);
    const int64_t num_tokens = count * seq_length;
    const int64_t padded = model->config.padded_vocab_size, vocab = model->config.vocab_size;
    int32_t *ids = malloc((size_t)num_tokens * sizeof *ids);
    struct tensor logits, wide;
    struct pass pass;

    CHECK(ids != NULL, "out of memory");
    for (int64_t t = 0; t < num_tokens; t++) {
        ids[t] = (int32_t)tokens[(t % count) * seq_length + t / count];
    }
    pass = loaded_model_pass(model, ids, num_tokens, count, 0);
    logits = tensor_new(model->saved, model->config.dtype, num_tokens, padded);
    wide = tensor_new(model->saved, DTYPE_F32, num_tokens, padded);
    transformer_stage_logits(&model->stage, &pass, NULL, &logits, NULL);
    op_linear_combination(model->stream,
                          &(struct linear_combination){.y = &wide, .x = &logits, .a = 1.0f});
    for (int64_t t = 0; t < num_tokens; t++) {
        stream_copy_to_host(model->stream, out + ((t % count) * seq_length + t / count) * vocab,
                            (const float *)wide.data + t * padded, (size_t)vocab * sizeof *out);
    }
    free(ids);
    arena_release(model->saved, mark);
}

int loaded_model_logits(struct loaded_model *model, const int64_t *tokens, int64_t num_sequences,
                        int64_t seq_length, float *logits)
{
    const int64_t fitting = CHUNK_TOKENS_MAX / seq_length, most = fitting > 0 ? fitting : 1;

    TRY(check_tokens(model, tokens, num_sequences, seq_length));
    for (int64_t first = 0; first < num_sequences; first += most) {
        const int64_t left = num_sequences - first;

        run_chunk(model, tokens + first * seq_length, left < most ? left : most, seq_length,
                  logits + first * seq_length * model->config.vocab_size);
    }
    return 0;
}
