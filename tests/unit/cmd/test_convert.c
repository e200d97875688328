/* cadre convert and cadre inspect, as commands: Hugging Face -> cadre -> Hugging Face is the same
 * bits. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "args/options.h"
#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "ckpt/hf_config.h"
#include "ckpt/hf_weights.h"
#include "ckpt/manifest.h"
#include "cmd/cmd.h"

static char directory[PATH_LENGTH_MAX];

static int make_directory(void **state)
{
    strcpy(directory, "/tmp/cadre_convert_XXXXXX");
    return mkdtemp(directory) != NULL ? 0 : -1;
}

static int remove_directory(void **state)
{
    return path_remove_tree(directory);
}

static void assert_error_says(const char *text)
{
    if (strstr(error_text(), text) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), text);
    }
}

/* Splits the line at blanks; "@" stands for the test's directory. */
static int run(int (*command)(int, char **), const char *line)
{
    char words[16][PATH_LENGTH_MAX], text[4096];
    char *argv[17] = {0};
    int argc = 0, result;

    snprintf(text, sizeof text, "%s", line);
    for (char *word = strtok(text, " "); word != NULL; word = strtok(NULL, " "), argc++) {
        const int length = snprintf(words[argc], sizeof words[argc], "%s%s",
                                    word[0] == '@' ? directory : "", word + (word[0] == '@'));

        assert_true(length < PATH_LENGTH_MAX);
        argv[argc] = words[argc];
    }
    result = command(argc, argv);
    fflush(stdout);
    return result;
}

/* As run, what it prints going to a file: the text, which the caller frees. */
static char *run_and_capture(int (*command)(int, char **), const char *line)
{
    char path[PATH_LENGTH_MAX];
    const int saved = dup(STDOUT_FILENO);
    size_t length;
    int fd, result;

    assert_int_equal(path_format(path, "%s/stdout", directory), 0);
    fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    fflush(stdout);
    dup2(fd, STDOUT_FILENO);
    result = run(command, line);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    close(fd);
    if (result != 0) {
        fail_msg("%s: %s", line, error_text());
    }
    return path_read_file(path, 1 << 20, &length);
}

static void assert_runs(const char *line)
{
    char *text = run_and_capture(cmd_convert, line);

    if (strstr(text, "unused 0, missing 0") == NULL) {
        fail_msg("%s prints %s", line, text);
    }
    free(text);
}

/* ---- round trips ---- */

static void assert_same_tensors(const char *left_path, const char *right_path)
{
    struct hf_weights *left = hf_weights_open(left_path), *right = hf_weights_open(right_path);

    assert_non_null(left);
    assert_non_null(right);
    assert_int_equal(hf_weights_num_tensors(left), hf_weights_num_tensors(right));
    for (int i = 0; i < hf_weights_num_tensors(left); i++) {
        const struct hf_tensor *a = hf_weights_at(left, i), *b = hf_weights_at(right, i);
        char *a_bytes = malloc((size_t)a->tensor->size_bytes);
        char *b_bytes = malloc((size_t)b->tensor->size_bytes);

        assert_string_equal(a->tensor->name, b->tensor->name);
        assert_string_equal(a->tensor->dtype_name, b->tensor->dtype_name);
        assert_int_equal(a->tensor->num_dims, b->tensor->num_dims);
        assert_memory_equal(a->tensor->shape, b->tensor->shape,
                            (size_t)a->tensor->num_dims * sizeof(int64_t));
        assert_int_equal(safetensors_read(a->file, a->tensor, a_bytes), 0);
        assert_int_equal(safetensors_read(b->file, b->tensor, b_bytes), 0);
        assert_memory_equal(a_bytes, b_bytes, (size_t)a->tensor->size_bytes);
        free(a_bytes);
        free(b_bytes);
    }
    hf_weights_close(left);
    hf_weights_close(right);
}

/* All that cadre knows of a config. */
static json_t *load_config(const char *path)
{
    struct hf_mixtral_config config;

    assert_int_equal(hf_config_read(&config, path), 0);
    return hf_config_json(&config);
}

static void assert_same_config(const char *left_path, const char *right_path)
{
    json_t *left = load_config(left_path), *right = load_config(right_path);

    assert_true(json_equal(left, right));
    json_decref(left);
    json_decref(right);
}

static void assert_round_trip(const char *fixture, const char *import_flags,
                              const char *export_flags)
{
    char line[4096], exported[PATH_LENGTH_MAX];

    snprintf(line, sizeof line, "convert --from %s --to @/cadre %s", fixture, import_flags);
    assert_runs(line);
    snprintf(line, sizeof line, "convert --from @/cadre --to @/hf %s", export_flags);
    assert_runs(line);
    assert_int_equal(path_format(exported, "%s/hf", directory), 0);
    assert_same_tensors(fixture, exported);
    assert_same_config(fixture, exported);
}

static void a_single_file_comes_back_bit_for_bit(void **state)
{
    char path[PATH_LENGTH_MAX];

    assert_round_trip(FIXTURES "/mixtral-tiny", "", "");
    assert_int_equal(path_format(path, "%s/hf/generation_config.json", directory), 0);
    assert_true(path_exists(path));
}

static void bf16_shards_come_back_bit_for_bit(void **state)
{
    assert_round_trip(FIXTURES "/mixtral-tiny-sharded", "--make-vocab-size-divisible-by 100", "");
}

static void the_export_is_sharded_on_demand(void **state)
{
    static const char wide[] = FIXTURES "/mixtral-tiny-sharded";
    char path[PATH_LENGTH_MAX], source[PATH_LENGTH_MAX];

    assert_runs("convert --from " FIXTURES "/mixtral-tiny-sharded --to @/bf16");
    assert_runs("convert --from @/bf16 --to @/wide --dtype fp32 --max-shard-size-mb 1");
    assert_int_equal(path_format(path, "%s/wide/model-00002-of-00002.safetensors", directory), 0);
    assert_true(path_exists(path));
    assert_runs("convert --from @/wide --to @/cadre --dtype bf16");
    assert_runs("convert --from @/cadre --to @/hf");
    assert_int_equal(path_format(source, "%s/hf", directory), 0);
    assert_same_tensors(wide, source); /* bf16 -> f32 -> bf16 loses nothing */
}

/* ---- what is saved beside the weights ---- */

static void load_args(struct options *options, const char *name)
{
    char path[PATH_LENGTH_MAX], load[PATH_LENGTH_MAX];
    struct manifest manifest;

    assert_int_equal(path_format(load, "%s/%s", directory, name), 0);
    assert_int_equal(checkpoint_find(load, -1, path), CHECKPOINT_FOUND);
    assert_int_equal(manifest_read(&manifest, path), 0);
    assert_int_equal(options_init(options), 0);
    assert_int_equal(options_apply_json(options, json_object_get(manifest.state, "args")), 0);
    manifest_free(&manifest);
}

static void the_saved_options_describe_the_model(void **state)
{
    struct options o;

    assert_runs("convert --from " FIXTURES "/mixtral-tiny --to @/cadre");
    load_args(&o, "cadre");
    assert_int_equal(o.num_layers, 2);
    assert_int_equal(o.hidden_size, 64);
    assert_int_equal(o.ffn_hidden_size, 96);
    assert_int_equal(o.num_attention_heads, 4);
    assert_true(o.group_query_attention);
    assert_int_equal(o.num_query_groups, 2);
    assert_int_equal(o.kv_channels, 16);
    assert_int_equal(o.num_experts, 4);
    assert_int_equal(o.moe_router_topk, 2);
    assert_int_equal(o.seq_length, 64);
    assert_int_equal(o.vocab_size, 128);
    assert_true(o.rotary_base == 1e6 && o.norm_epsilon == 1e-5);
    assert_true(o.swiglu && o.disable_bias_linear && o.untie_embeddings_and_output_weights);
    assert_string_equal(o.normalization, "RMSNorm");
    assert_string_equal(o.position_embedding_type, "rope");
    assert_int_equal(options_validate_model(&o), 0);
    options_free(&o);
}

/* The single-file fixture with one key of its config changed, as @/changed. */
static void copy_with(const char *key, json_t *value)
{
    char path[PATH_LENGTH_MAX], link_path[PATH_LENGTH_MAX];
    json_error_t error;
    json_t *root = json_load_file(FIXTURES "/mixtral-tiny/config.json", 0, &error);

    assert_int_equal(path_format(path, "%s/changed", directory), 0);
    assert_int_equal(path_make_directories(path), 0);
    assert_int_equal(path_format(link_path, "%s/model.safetensors", path), 0);
    unlink(link_path);
    assert_int_equal(symlink(FIXTURES "/mixtral-tiny/model.safetensors", link_path), 0);
    assert_int_equal(path_format(path, "%s/changed/config.json", directory), 0);
    json_object_set_new(root, key, value);
    assert_int_equal(json_dump_file(root, path, 0), 0);
    json_decref(root);
}

static void top_1_is_converted_and_marked(void **state)
{
    char original[PATH_LENGTH_MAX], exported[PATH_LENGTH_MAX];

    copy_with("num_experts_per_tok", json_integer(1));
    assert_runs("convert --from @/changed --to @/cadre");
    assert_runs("convert --from @/cadre --to @/hf");
    assert_int_equal(path_format(original, "%s/changed", directory), 0);
    assert_int_equal(path_format(exported, "%s/hf", directory), 0);
    assert_same_config(original, exported);
}

static void tokenizer_files_come_along(void **state)
{
    char path[PATH_LENGTH_MAX], expected[PATH_LENGTH_MAX];
    struct options o;

    copy_with("vocab_size", json_integer(128));
    assert_int_equal(path_format(path, "%s/changed/tokenizer.model", directory), 0);
    assert_int_equal(path_write_file_atomic(path, "model", 5), 0);
    assert_runs("convert --from @/changed --to @/cadre");
    assert_runs("convert --from @/cadre --to @/hf");
    assert_int_equal(path_format(path, "%s/hf/tokenizer.model", directory), 0);
    assert_true(path_exists(path));
    load_args(&o, "cadre");
    assert_string_equal(o.tokenizer_type, "Llama2Tokenizer");
    assert_int_equal(path_format(expected, "%s/cadre/tokenizer.model", directory), 0);
    assert_string_equal(o.tokenizer_model, expected);
    options_free(&o);
}

/* ---- refusals ---- */

static void mismatches_fail_and_leave_nothing(void **state)
{
    char path[PATH_LENGTH_MAX];

    copy_with("num_hidden_layers", json_integer(1));
    assert_int_equal(run(cmd_convert, "convert --from @/changed --to @/cadre"), -1);
    assert_error_says("19 tensors have no place in the model, such as model.layers.1.");
    copy_with("num_hidden_layers", json_integer(3));
    assert_int_equal(run(cmd_convert, "convert --from @/changed --to @/cadre"), -1);
    assert_error_says("19 tensors that config.json asks for are missing, such as model.layers.2.");
    copy_with("intermediate_size", json_integer(95));
    assert_int_equal(run(cmd_convert, "convert --from @/changed --to @/cadre"), -1);
    assert_error_says("config.json asks for [95, 64]");
    assert_int_equal(path_format(path, "%s/cadre", directory), 0);
    assert_false(path_exists(path));
}

static void existing_targets_are_not_overwritten(void **state)
{
    assert_runs("convert --from " FIXTURES "/mixtral-tiny --to @/cadre");
    assert_int_equal(run(cmd_convert, "convert --from " FIXTURES "/mixtral-tiny --to @/cadre"), -1);
    assert_error_says("holds checkpoints already");
    assert_int_equal(run(cmd_convert, "convert --from @/cadre --to @"), -1);
    assert_error_says("exists already");
    assert_int_equal(run(cmd_convert, "convert --from @/cadre --to @/x --to-format cadre"), -1);
    assert_error_says("--to-format cadre already");
    assert_int_equal(run(cmd_convert, "convert --from @ --to @/x"), -1);
    assert_error_says("neither a Hugging Face directory");
    assert_int_equal(run(cmd_convert, "convert --from @"), -1);
    assert_error_says("--to DIR");
}

/* A checkpoint of no tensors whose options are Mixtral's but for one. */
static void save_with_option(const char *key, json_t *value)
{
    char path[PATH_LENGTH_MAX];
    struct checkpoint_save_request request = {.directory = path, .iteration = 1};
    struct options o;
    json_t *args;

    load_args(&o, "cadre");
    args = options_to_json(&o);
    options_free(&o);
    json_object_set_new(args, key, value);
    request.state = json_pack("{s:o}", "args", args);
    assert_int_equal(path_format(path, "%s/other", directory), 0);
    assert_int_equal(checkpoint_save(&request), 0);
    json_decref(request.state);
}

static void models_that_are_no_mixtral_are_not_exported(void **state)
{
    const struct {
        const char *key;
        json_t *value;
        const char *reason;
    } cases[] = {{"normalization", json_string("LayerNorm"), "RMSNorm"},
                 {"swiglu", json_false(), "--swiglu"},
                 {"num_experts", json_integer(0), "experts in every layer"},
                 {"moe_layer_freq", json_string("2"), "experts in every layer"},
                 {"moe_router_pre_softmax", json_true(), "pre-softmax"},
                 {"moe_shared_expert_intermediate_size", json_integer(32), "shared"},
                 {"moe_router_load_balancing_type", json_pack("[s]", "sinkhorn"), "sinkhorn"},
                 {"normalization", json_string("RMSNorm"), "no embedding"}};

    assert_runs("convert --from " FIXTURES "/mixtral-tiny --to @/cadre");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        save_with_option(cases[i].key, cases[i].value);
        assert_int_equal(run(cmd_convert, "convert --from @/other --to @/hf"), -1);
        assert_error_says(cases[i].reason);
    }
}

/* ---- inspect ---- */

static void hashes_do_not_depend_on_sharding(void **state)
{
    char *sharded, *exported, *first, *again;

    sharded = run_and_capture(cmd_inspect, "inspect --hash " FIXTURES "/mixtral-tiny-sharded");
    assert_runs("convert --from " FIXTURES "/mixtral-tiny-sharded --to @/cadre");
    assert_runs("convert --from @/cadre --to @/hf");
    exported = run_and_capture(cmd_inspect, "inspect @/hf/model.safetensors --hash");
    assert_string_equal(exported, sharded);
    free(sharded);
    free(exported);
    first = run_and_capture(cmd_inspect, "inspect --hash @/cadre");
    again = run_and_capture(cmd_inspect, "inspect --hash @/cadre/release");
    assert_string_equal(first, again);
    assert_non_null(strstr(first, "decoder.layers.1.mlp.experts.linear_fc1.weight BF16 "
                                  "[8,2,128,64] "));
    free(first);
    free(again);
}

static void a_listing_has_sizes_and_a_sum(void **state)
{
    char *text;

    assert_runs("convert --from " FIXTURES "/mixtral-tiny --to @/cadre");
    text = run_and_capture(cmd_inspect, "inspect @/cadre");
    assert_non_null(strstr(text, "embedding.word_embeddings.weight F32 [128,64] 32768\n"));
    assert_non_null(strstr(text, "17 tensors, "));
    free(text);
    assert_int_equal(run(cmd_inspect, "inspect"), -1);
    assert_int_equal(run(cmd_inspect, "inspect /nowhere"), -1);
    assert_error_says("/nowhere");
    assert_int_equal(run(cmd_inspect, "inspect /proc/self/fd"), -1);
    assert_error_says("neither a checkpoint nor");
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_single_file_comes_back_bit_for_bit),
        TEST(bf16_shards_come_back_bit_for_bit),
        TEST(the_export_is_sharded_on_demand),
        TEST(the_saved_options_describe_the_model),
        TEST(top_1_is_converted_and_marked),
        TEST(tokenizer_files_come_along),
        TEST(mismatches_fail_and_leave_nothing),
        TEST(existing_targets_are_not_overwritten),
        TEST(models_that_are_no_mixtral_are_not_exported),
        TEST(hashes_do_not_depend_on_sharding),
        TEST(a_listing_has_sizes_and_a_sum),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
