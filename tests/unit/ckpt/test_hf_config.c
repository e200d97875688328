/* config.json and model.safetensors.index.json: both spellings, and everything that must be
 * refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/check.h"
#include "ckpt/hf_config.h"
#include "ckpt/hf_index.h"

static json_t *small_config(void)
{
    return json_pack("{s:[s], s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i}", "architectures",
                     "MixtralForCausalLM", "model_type", "mixtral", "vocab_size", 100,
                     "hidden_size", 64, "intermediate_size", 96, "num_hidden_layers", 2,
                     "num_attention_heads", 4, "num_key_value_heads", 2, "max_position_embeddings",
                     128);
}

static int parse(struct hf_mixtral_config *config, json_t *root)
{
    char *text = json_dumps(root, JSON_ENCODE_ANY);
    const int result = hf_config_parse(config, text, strlen(text));

    free(text);
    json_decref(root);
    return result;
}

/* Sets key to value (stolen) in a good config and expects the reason. */
static void assert_refused(const char *key, json_t *value, const char *reason)
{
    struct hf_mixtral_config config;
    json_t *root = small_config();

    json_object_set_new(root, key, value);
    assert_int_equal(parse(&config, root), -1);
    if (strstr(error_text(), reason) == NULL) {
        fail_msg("%s: \"%s\" does not say \"%s\"", key, error_text(), reason);
    }
}

static void absent_values_have_mixtral_s_defaults(void **state)
{
    struct hf_mixtral_config config;

    assert_int_equal(parse(&config, small_config()), 0);
    assert_int_equal(config.head_dim, 16);
    assert_int_equal(config.num_local_experts, 8);
    assert_int_equal(config.num_experts_per_tok, 2);
    assert_true(config.rope_theta == 1e6 && config.rms_norm_eps == 1e-5);
    assert_false(config.tie_word_embeddings);
    assert_int_equal(config.pad_token_id, HF_NO_TOKEN);
}

static void old_and_new_spellings_mean_the_same(void **state)
{
    struct hf_mixtral_config config;
    json_t *old = small_config(), *new = small_config();

    json_object_set_new(old, "rope_theta", json_integer(12345));
    json_object_set_new(old, "torch_dtype", json_string("bfloat16"));
    json_object_set_new(old, "rope_scaling", json_null());
    json_object_set_new(old, "head_dim", json_null());
    assert_int_equal(parse(&config, old), 0);
    assert_true(config.rope_theta == 12345.0 && config.dtype == DTYPE_BF16);
    json_object_set_new(new, "rope_parameters",
                        json_pack("{s:f, s:s}", "rope_theta", 777.5, "rope_type", "default"));
    json_object_set_new(new, "dtype", json_string("float16"));
    json_object_set_new(new, "head_dim", json_integer(32));
    json_object_set_new(new, "eos_token_id", json_pack("[i, i]", 7, 8));
    assert_int_equal(parse(&config, new), 0);
    assert_true(config.rope_theta == 777.5 && config.dtype == DTYPE_F16);
    assert_int_equal(config.head_dim, 32);
    assert_int_equal(config.eos_token_id, 7);
}

static void what_is_written_is_read_back_and_has_both_spellings(void **state)
{
    struct hf_mixtral_config config, again;
    json_t *root = small_config(), *written, *rewritten;

    json_object_set_new(root, "rope_theta", json_real(1e4));
    json_object_set_new(root, "rms_norm_eps", json_real(1e-6));
    json_object_set_new(root, "router_aux_loss_coef", json_real(0.02));
    json_object_set_new(root, "tie_word_embeddings", json_true());
    json_object_set_new(root, "bos_token_id", json_integer(1));
    assert_int_equal(parse(&config, root), 0);
    written = hf_config_json(&config);
    assert_true(json_number_value(json_object_get(written, "rope_theta")) == 1e4);
    assert_true(json_number_value(json_object_get(json_object_get(written, "rope_parameters"),
                                                  "rope_theta")) == 1e4);
    assert_string_equal(json_string_value(json_object_get(written, "dtype")), "float32");
    assert_string_equal(json_string_value(json_object_get(written, "torch_dtype")), "float32");
    assert_int_equal(parse(&again, json_incref(written)), 0);
    rewritten = hf_config_json(&again);
    assert_true(json_equal(rewritten, written));
    json_decref(rewritten);
    json_decref(written);
}

static void other_models_are_refused(void **state)
{
    assert_refused("architectures", json_pack("[s]", "LlamaForCausalLM"), "LlamaForCausalLM");
    assert_refused("model_type", json_string("qwen3_moe"), "qwen3_moe");
    assert_refused("hidden_act", json_string("gelu"), "gelu");
    assert_refused("rope_scaling", json_pack("{s:s, s:i}", "type", "yarn", "factor", 4), "yarn");
    assert_refused("rope_parameters", json_pack("{s:s}", "rope_type", "linear"), "linear");
    assert_refused("sliding_window", json_integer(64), "sliding_window (64)");
    assert_refused("quantization_config", json_object(), "quantized");
    assert_refused("dtype", json_string("float8_e4m3fn"), "float8_e4m3fn");
}

static void senseless_values_are_refused(void **state)
{
    assert_refused("vocab_size", json_integer(0), "vocab_size is 0");
    assert_refused("vocab_size", json_null(), "vocab_size is missing");
    assert_refused("hidden_size", json_real(64.0), "not an integer");
    assert_refused("hidden_size", json_integer(66), "multiple of num_attention_heads");
    assert_refused("hidden_size", json_integer(INT64_MAX), "hidden_size is 9223372036854775807");
    assert_refused("num_key_value_heads", json_integer(3), "multiple of num_key_value_heads");
    assert_refused("num_hidden_layers", json_integer(1000000), "num_hidden_layers");
    assert_refused("num_experts_per_tok", json_integer(9), "between 1 and 8");
    assert_refused("num_local_experts", json_integer(1), "num_experts_per_tok is 2");
    assert_refused("rms_norm_eps", json_integer(-1), "rms_norm_eps");
    assert_refused("rope_theta", json_string("1e6"), "not a number");
    assert_refused("rope_parameters", json_integer(1), "not an object");
    assert_refused("tie_word_embeddings", json_integer(1), "tie_word_embeddings");
    assert_refused("bos_token_id", json_string("<s>"), "not a token id");
}

static void what_is_no_object_is_refused(void **state)
{
    struct hf_mixtral_config config;

    assert_int_equal(hf_config_parse(&config, "[]", 2), -1);
    assert_int_equal(hf_config_parse(&config, "{", 1), -1);
    assert_int_equal(hf_config_parse(&config, "{\"a\":1,\"a\":1}", 13), -1);
    assert_int_equal(hf_config_parse(&config, "{}", 2), -1);
    assert_int_equal(hf_config_parse(&config, "", 0), -1);
}

static void assert_index_refused(const char *text, const char *reason)
{
    struct hf_index index;

    assert_int_equal(hf_index_parse(&index, text, strlen(text)), -1);
    if (strstr(error_text(), reason) == NULL) {
        fail_msg("%s: \"%s\" does not say \"%s\"", text, error_text(), reason);
    }
}

static void an_index_names_files_of_its_own_directory_only(void **state)
{
    static const char good[] =
        "{\"metadata\":{},\"weight_map\":{\"a\":\"x.safetensors\",\"b\":\"y..safetensors\"}}";
    struct hf_index index;

    assert_int_equal(hf_index_parse(&index, good, strlen(good)), 0);
    assert_int_equal(index.num_tensors, 2);
    assert_string_equal(index.tensor_names[1], "b");
    assert_string_equal(index.file_names[0], "x.safetensors");
    hf_index_free(&index);
    assert_index_refused("{}", "weight_map is missing");
    assert_index_refused("{\"weight_map\":[]}", "not an object");
    assert_index_refused("{\"weight_map\":{\"a\":1}}", "not a string");
    assert_index_refused("{\"weight_map\":{\"a\":\"../x\"}}", "plain file name");
    assert_index_refused("{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "plain file name");
    assert_index_refused("{\"weight_map\":{\"a\":\"..\"}}", "plain file name");
    assert_index_refused("{\"weight_map\":{\"a\":\"\"}}", "plain file name");
    assert_index_refused("{\"weight_map\":{\"a\":\"x\",\"a\":\"y\"}}", "duplicate");
    assert_index_refused("{\"weight_map\":", "end of file");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(absent_values_have_mixtral_s_defaults),
        cmocka_unit_test(old_and_new_spellings_mean_the_same),
        cmocka_unit_test(what_is_written_is_read_back_and_has_both_spellings),
        cmocka_unit_test(other_models_are_refused),
        cmocka_unit_test(senseless_values_are_refused),
        cmocka_unit_test(what_is_no_object_is_refused),
        cmocka_unit_test(an_index_names_files_of_its_own_directory_only),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
