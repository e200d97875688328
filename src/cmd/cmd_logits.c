/* `cadre logits`: tokens [B,S] I64 of a safetensors file -> logits [B,S,V] F32 in another. */
#include <stdlib.h>
#include <string.h>

#include "args/help.h"
#include "base/check.h"
#include "base/log.h"
#include "ckpt/safetensors.h"
#include "ckpt/safetensors_writer.h"
#include "cmd/cmd.h"
#include "cmd/loaded_model.h"
#include "ops/ops.h"

struct logits_options {
    char *load, *tokens, *out, *dtype, *device;
    int64_t num_threads;
};

static const struct option_row rows[] = {
    OPTION_TEXT(struct logits_options, "--load", load, NULL, "logits",
                "directory of a cadre checkpoint or of a Hugging Face model"),
    OPTION_TEXT(struct logits_options, "--tokens", tokens, NULL, "logits",
                "safetensors file with `tokens`, I64 [B,S]"),
    OPTION_TEXT(struct logits_options, "--out", out, NULL, "logits",
                "safetensors file to write `logits`, F32 [B,S,V], to"),
    OPTION_ONE_OF(struct logits_options, "--dtype", dtype, "fp32", "fp32 bf16", "logits",
                  "what the model computes in"),
    OPTION_ONE_OF(struct logits_options, "--device", device, "auto", "cpu cuda auto", "logits",
                  "where to compute"),
    OPTION_INTEGER(struct logits_options, "--num-threads", num_threads, "0", 0, 4096, "logits",
                   "CPU threads; 0: all cores"),
};

const struct option_table logits_table =
    OPTION_TABLE("logits", "Runs tokens through a checkpoint and writes the logits.", rows);

/* tokens [B,S] of the input file. */
struct token_table {
    int64_t *ids;
    int64_t num_sequences, seq_length;
};

static int read_tokens(struct token_table *tokens, const char *path)
{
    struct safetensors *file = safetensors_open(path);
    const struct safetensors_tensor *tensor;
    int result = 0;

    if (file == NULL) {
        return -1;
    }
    tensor = safetensors_find(file, "tokens");
    if (tensor == NULL || tensor->dtype != DTYPE_I64 || tensor->num_dims != 2 ||
        tensor->shape[0] < 1 || tensor->shape[1] < 1) {
        result = error_set("%s: expected a tensor `tokens`, I64 of two dims [B,S]", path);
    } else {
        tokens->num_sequences = tensor->shape[0];
        tokens->seq_length = tensor->shape[1];
        tokens->ids = malloc((size_t)tensor->size_bytes);
        CHECK(tokens->ids != NULL, "out of memory for %s", path);
        result = safetensors_read(file, tensor, tokens->ids);
    }
    safetensors_close(file);
    return result;
}

static int write_logits(struct loaded_model *model, const struct token_table *tokens,
                        const char *path)
{
    const int64_t vocab = model->config.vocab_size, seq_length = tokens->seq_length;
    const char *name = "logits";
    struct tensor logits;
    float *all = malloc((size_t)(tokens->num_sequences * seq_length * vocab) * sizeof *all);
    int result;

    if (all == NULL) {
        return error_set("out of memory for the logits of %lld tokens",
                         (long long)(tokens->num_sequences * seq_length));
    }
    result = loaded_model_logits(model, tokens->ids, tokens->num_sequences, seq_length, all);
    logits = tensor_of(all, DTYPE_F32, tokens->num_sequences, seq_length, vocab);
    if (result == 0) {
        result = safetensors_save(path, &name, &logits, 1);
    }
    free(all);
    return result;
}

static int run_model(const struct logits_options *options, const struct token_table *tokens)
{
    struct loaded_model_request request = {
        .directory = options->load,
        .num_positions = tokens->seq_length,
        .dtype = strcmp(options->dtype, "bf16") == 0 ? DTYPE_BF16 : DTYPE_F32};
    struct loaded_model model;
    int result;

    TRY(loaded_model_choose_device(&request, options->device));
    result = loaded_model_open(&model, &request);
    if (result == 0) {
        result = write_logits(&model, tokens, options->out);
    }
    if (result == 0) {
        log_info("wrote logits [%lld, %lld, %lld] of %s to %s", (long long)tokens->num_sequences,
                 (long long)tokens->seq_length, (long long)model.config.vocab_size, model.path,
                 options->out);
    }
    loaded_model_close(&model);
    return result;
}

static int run(struct logits_options *options, int argc, char **argv)
{
    struct token_table tokens = {0};
    int result;

    TRY(option_table_parse(&logits_table, argc, argv, options, NULL));
    if (options->load == NULL || options->tokens == NULL || options->out == NULL) {
        return error_set("cadre logits needs --load, --tokens and --out");
    }
    ops_cpu_set_num_threads((int)options->num_threads);
    result = read_tokens(&tokens, options->tokens);
    if (result == 0) {
        result = run_model(options, &tokens);
    }
    free(tokens.ids);
    return result;
}

int cmd_logits(int argc, char **argv)
{
    struct logits_options options;
    int result;

    if (help_requested(&logits_table, argc, argv, stdout)) {
        return 0;
    }
    TRY(option_table_init(&logits_table, &options, NULL));
    result = run(&options, argc, argv);
    option_table_free(&logits_table, &options);
    return result;
}
