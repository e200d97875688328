/* `cadre generate`: continues a prompt, token by token, with a cache of keys and values. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args/help.h"
#include "base/check.h"
#include "cmd/cmd.h"
#include "cmd/loaded_model.h"
#include "cmd/token_sampler.h"
#include "data/tokenizer.h"
#include "ops/ops.h"

struct generate_options {
    char *load, *prompt, *dtype, *device, *tokenizer_type, *tokenizer_model;
    int64_t num_tokens, top_k, seed, num_threads;
    double temperature, top_p;
};

static const struct option_row rows[] = {
    OPTION_TEXT(struct generate_options, "--load", load, NULL, "generate",
                "directory of a cadre checkpoint or of a Hugging Face model"),
    OPTION_TEXT(struct generate_options, "--prompt", prompt, NULL, "generate",
                "the text to continue"),
    OPTION_INTEGER(struct generate_options, "--num-tokens", num_tokens, "64", 1, 1000000,
                   "generate", "most tokens to generate; the end of the document stops earlier"),
    OPTION_NUMBER(struct generate_options, "--temperature", temperature, "1.0", 0.0, 100.0,
                  "generate", "divides the logits; 0: always the most likely token"),
    OPTION_INTEGER(struct generate_options, "--top-k", top_k, "0", 0, OPTION_NO_MAX, "generate",
                   "choose among the k most likely tokens; 0: all"),
    OPTION_NUMBER(struct generate_options, "--top-p", top_p, "1.0", OPTION_ABOVE_ZERO, 1.0,
                  "generate", "choose among the likeliest tokens that hold this probability"),
    OPTION_INTEGER(struct generate_options, "--seed", seed, "1234", 0, OPTION_NO_MAX, "generate",
                   "the same seed draws the same text"),
    OPTION_ONE_OF(struct generate_options, "--dtype", dtype, "fp32", "fp32 bf16", "generate",
                  "what the model computes in"),
    OPTION_ONE_OF(struct generate_options, "--device", device, "auto", "cpu cuda auto", "generate",
                  "where to compute"),
    OPTION_TEXT(struct generate_options, "--tokenizer-type", tokenizer_type, NULL, "generate",
                "default: the checkpoint's"),
    OPTION_TEXT(struct generate_options, "--tokenizer-model", tokenizer_model, NULL, "generate",
                "default: the checkpoint's"),
    OPTION_INTEGER(struct generate_options, "--num-threads", num_threads, "0", 0, 4096, "generate",
                   "CPU threads; 0: all cores"),
};

const struct option_table generate_table =
    OPTION_TABLE("generate", "Samples text from a checkpoint.", rows);

/* One text on its way. */
struct generation {
    const struct generate_options *options;
    struct loaded_model *model;
    struct tokenizer *tokenizer;
    struct kv_cache *caches; /* [num_layers] */
    struct token_list tokens;
    size_t printed_bytes; /* of the decoded text */
};

static void create_caches(struct generation *g)
{
    const struct model_config *config = &g->model->config;

    g->caches = calloc((size_t)config->num_layers, sizeof *g->caches);
    CHECK(g->caches != NULL, "out of memory");
    for (int i = 0; i < config->num_layers; i++) {
        g->caches[i].k = tensor_new(g->model->run, config->dtype, config->seq_length, 1,
                                    config->num_groups, config->head_dim);
        g->caches[i].v = tensor_new(g->model->run, config->dtype, config->seq_length, 1,
                                    config->num_groups, config->head_dim);
    }
}

/* Runs the tokens from `first` on through the model; the last one's logits [V] go to `last`. */
static void run_tokens(struct generation *g, int64_t first, float *last)
{
    struct loaded_model *model = g->model;
    const struct arena_mark mark = arena_mark(model->saved);
    const int64_t count = g->tokens.count - first, vocab = model->config.padded_vocab_size;
    const struct pass pass = loaded_model_pass(model, g->tokens.ids + first, count, 1, first);
    struct tensor logits = tensor_new(model->saved, model->config.dtype, count, vocab);
    struct tensor wide = tensor_new(model->saved, DTYPE_F32, 1, vocab);
    const struct tensor row = tensor_rows(&logits, count - 1, 1);

    transformer_stage_logits(&model->stage, &pass, g->caches, &logits, NULL);
    op_linear_combination(model->stream,
                          &(struct linear_combination){.y = &wide, .x = &row, .a = 1.0f});
    stream_copy_to_host(model->stream, last, wide.data,
                        (size_t)model->config.vocab_size * sizeof *last);
    for (int i = 0; i < model->config.num_layers; i++) {
        g->caches[i].length = g->tokens.count;
    }
    arena_release(model->saved, mark);
}

/* Length of text without an unfinished UTF-8 character at its end, which the next token may finish.
 */
static size_t complete_length(const char *text, size_t length)
{
    static const char replacement[] = "\xEF\xBF\xBD";

    while (length >= 3 && memcmp(text + length - 3, replacement, 3) == 0) {
        length -= 3;
    }
    return length;
}

static int print_new_text(struct generation *g, bool last)
{
    size_t length;
    char *text = tokenizer_decode(g->tokenizer, g->tokens.ids, g->tokens.count, &length);

    if (text == NULL) {
        return -1;
    }
    if (!last) {
        length = complete_length(text, length);
    }
    if (length > g->printed_bytes) {
        fwrite(text + g->printed_bytes, 1, length - g->printed_bytes, stdout);
        fflush(stdout);
        g->printed_bytes = length;
    }
    free(text);
    return 0;
}

static int generate(struct generation *g)
{
    const struct token_sampler sampler = {.temperature = g->options->temperature,
                                          .top_k = g->options->top_k,
                                          .top_p = g->options->top_p,
                                          .seed = (uint64_t)g->options->seed};
    float *logits = malloc((size_t)g->model->config.vocab_size * sizeof *logits);
    int64_t first = 0;
    int result = 0;

    CHECK(logits != NULL, "out of memory");
    for (int64_t i = 0; i < g->options->num_tokens && result == 0; i++) {
        int32_t token;

        if (g->tokens.count > g->model->config.seq_length) {
            result = error_set("the model has learned %lld positions, and the text has grown to "
                               "%lld tokens",
                               (long long)g->model->config.seq_length, (long long)g->tokens.count);
            break;
        }
        run_tokens(g, first, logits);
        first = g->tokens.count;
        token = token_sampler_choose(&sampler, logits, g->model->config.vocab_size, i);
        if (token == tokenizer_eod(g->tokenizer)) {
            break;
        }
        token_list_append(&g->tokens, &token, 1);
        result = print_new_text(g, false);
    }
    free(logits);
    return result == 0 ? print_new_text(g, true) : -1;
}

static int open_tokenizer(struct generation *g, const struct options *saved)
{
    const struct generate_options *options = g->options;

    g->tokenizer = tokenizer_open(&(struct tokenizer_config){
        .type = options->tokenizer_type != NULL ? options->tokenizer_type : saved->tokenizer_type,
        .model =
            options->tokenizer_model != NULL ? options->tokenizer_model : saved->tokenizer_model,
        .vocab_size = saved->vocab_size});
    if (g->tokenizer == NULL) {
        return error_prepend("the checkpoint's tokenizer (--tokenizer-type and --tokenizer-model "
                             "name another)");
    }
    return 0;
}

/* Every id of the tokenizer must be a row of the embedding. */
static int encode_prompt(struct generation *g)
{
    const int64_t vocab_size = g->model->config.vocab_size;

    if (tokenizer_vocab_size(g->tokenizer) > vocab_size) {
        return error_set("the tokenizer has %lld ids, the model %lld",
                         (long long)tokenizer_vocab_size(g->tokenizer), (long long)vocab_size);
    }
    TRY(tokenizer_encode(g->tokenizer, g->options->prompt, strlen(g->options->prompt), &g->tokens));
    if (g->tokens.count == 0) {
        return error_set("--prompt has no tokens");
    }
    return 0;
}

/* Memory is for as many positions as the text may get: a token is at least a byte of it. */
static int run_model(struct generation *g)
{
    struct loaded_model *model = g->model;
    const struct generate_options *options = g->options;
    struct loaded_model_request request = {
        .directory = options->load,
        .num_positions = (int64_t)strlen(options->prompt) + 2 + options->num_tokens,
        .dtype = strcmp(options->dtype, "bf16") == 0 ? DTYPE_BF16 : DTYPE_F32};

    TRY(loaded_model_choose_device(&request, options->device));
    TRY(loaded_model_open(model, &request));
    TRY(open_tokenizer(g, &model->options));
    TRY(encode_prompt(g));
    create_caches(g);
    TRY(print_new_text(g, false));
    TRY(generate(g));
    putchar('\n');
    return 0;
}

static int run(struct generate_options *options, int argc, char **argv)
{
    struct loaded_model model = {0};
    struct generation g = {.options = options, .model = &model};
    int result;

    TRY(option_table_parse(&generate_table, argc, argv, options, NULL));
    if (options->load == NULL || options->prompt == NULL) {
        return error_set("cadre generate needs --load and --prompt");
    }
    ops_cpu_set_num_threads((int)options->num_threads);
    result = run_model(&g);
    token_list_free(&g.tokens);
    tokenizer_close(g.tokenizer);
    free(g.caches);
    loaded_model_close(&model);
    return result;
}

int cmd_generate(int argc, char **argv)
{
    struct generate_options options;
    int result;

    if (help_requested(&generate_table, argc, argv, stdout)) {
        return 0;
    }
    TRY(option_table_init(&generate_table, &options, NULL));
    result = run(&options, argc, argv);
    option_table_free(&generate_table, &options);
    return result;
}
