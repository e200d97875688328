#include "ckpt/hf_config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"

static const int64_t config_max_bytes = 16 << 20;
enum { LAYERS_MAX = 4096, EXPERTS_MAX = 4096 };

/* ---- values ---- */

/* An integer in [min, max]. fallback < min: the key is required. null counts as absent. */
static int get_integer(const json_t *root, const char *key, int64_t min, int64_t max,
                       int64_t fallback, int64_t *value)
{
    const json_t *found = json_object_get(root, key);

    *value = fallback;
    if (found != NULL && !json_is_null(found)) {
        if (!json_is_integer(found)) {
            return error_set("%s is not an integer", key);
        }
        *value = json_integer_value(found);
    } else if (fallback < min) {
        return error_set("%s is missing", key);
    }
    if (*value < min || *value > max) {
        return error_set("%s is %lld, it must be between %lld and %lld", key, (long long)*value,
                         (long long)min, (long long)max);
    }
    return 0;
}

/* A finite number >= min; integers will do. */
static int get_number(const json_t *root, const char *key, double min, double fallback,
                      double *value)
{
    const json_t *found = json_object_get(root, key);

    *value = fallback;
    if (found == NULL || json_is_null(found)) {
        return 0;
    }
    if (!json_is_number(found)) {
        return error_set("%s is not a number", key);
    }
    *value = json_number_value(found);
    if (!isfinite(*value) || *value < min) {
        return error_set("%s is %g, it must be at least %g", key, *value, min);
    }
    return 0;
}

/* A token id; some models list several ends of text, of which the first counts. */
static int get_token(const json_t *root, const char *key, int64_t *token)
{
    const json_t *found = json_object_get(root, key);

    if (json_is_array(found)) {
        found = json_array_get(found, 0);
    }
    *token = HF_NO_TOKEN;
    if (found == NULL || json_is_null(found)) {
        return 0;
    }
    if (!json_is_integer(found) || json_integer_value(found) < HF_NO_TOKEN) {
        return error_set("%s is not a token id", key);
    }
    *token = json_integer_value(found);
    return 0;
}

static int expect_text(const json_t *root, const char *key, const char *expected,
                       const char *consequence)
{
    const json_t *found = json_object_get(root, key);

    if (found == NULL || json_is_null(found)) {
        return 0;
    }
    if (!json_is_string(found) || strcmp(json_string_value(found), expected) != 0) {
        return error_set("%s is %.60s, %s", key,
                         json_is_string(found) ? json_string_value(found) : "not a string",
                         consequence);
    }
    return 0;
}

/* ---- parts of the file ---- */

static int check_architecture(const json_t *root)
{
    const json_t *architectures = json_object_get(root, "architectures");
    const char *name = json_string_value(json_array_get(architectures, 0));

    if (name != NULL && strcmp(name, "MixtralForCausalLM") != 0) {
        return error_set("the architecture is %.60s; cadre converts MixtralForCausalLM", name);
    }
    if (name == NULL && json_object_get(root, "model_type") == NULL) {
        return error_set("neither architectures nor model_type says which model this is");
    }
    return expect_text(root, "model_type", "mixtral", "cadre converts mixtral");
}

static int read_sizes(struct hf_mixtral_config *c, const json_t *root)
{
    TRY(get_integer(root, "vocab_size", 1, INT32_MAX, 0, &c->vocab_size));
    TRY(get_integer(root, "hidden_size", 1, INT32_MAX, 0, &c->hidden_size));
    TRY(get_integer(root, "intermediate_size", 1, INT32_MAX, 0, &c->intermediate_size));
    TRY(get_integer(root, "num_hidden_layers", 1, LAYERS_MAX, 0, &c->num_hidden_layers));
    TRY(get_integer(root, "num_attention_heads", 1, 65536, 0, &c->num_attention_heads));
    TRY(get_integer(root, "num_key_value_heads", 1, 65536, c->num_attention_heads,
                    &c->num_key_value_heads));
    TRY(get_integer(root, "max_position_embeddings", 1, INT32_MAX, 0, &c->max_position_embeddings));
    TRY(get_integer(root, "num_local_experts", 1, EXPERTS_MAX, 8, &c->num_local_experts));
    TRY(get_integer(root, "num_experts_per_tok", 1, c->num_local_experts, 2,
                    &c->num_experts_per_tok));
    if (c->num_attention_heads % c->num_key_value_heads != 0) {
        return error_set("num_attention_heads (%lld) is not a multiple of num_key_value_heads "
                         "(%lld)",
                         (long long)c->num_attention_heads, (long long)c->num_key_value_heads);
    }
    TRY(get_integer(root, "head_dim", 1, 65536, c->hidden_size / c->num_attention_heads,
                    &c->head_dim));
    if (json_is_integer(json_object_get(root, "head_dim")) == 0 &&
        c->hidden_size % c->num_attention_heads != 0) {
        return error_set("hidden_size (%lld) is not a multiple of num_attention_heads (%lld), and "
                         "there is no head_dim",
                         (long long)c->hidden_size, (long long)c->num_attention_heads);
    }
    return 0;
}

static int check_window(const struct hf_mixtral_config *c, const json_t *root)
{
    int64_t window = 0;

    TRY(get_integer(root, "sliding_window", 1, INT64_MAX, INT64_MAX, &window));
    if (window < c->max_position_embeddings) {
        return error_set("sliding_window (%lld) is smaller than max_position_embeddings (%lld); "
                         "cadre's attention sees all positions. Lower max_position_embeddings to "
                         "the window to convert the model for sequences up to it",
                         (long long)window, (long long)c->max_position_embeddings);
    }
    return 0;
}

/* transformers 5 moved rope_theta and rope_scaling into rope_parameters, "type" into "rope_type".
 */
static int read_rope(struct hf_mixtral_config *c, const json_t *root)
{
    static const char consequence[] = "cadre converts the default rope only";
    static const char *keys[] = {"rope_parameters", "rope_scaling"};

    TRY(get_number(root, "rope_theta", 1.0, 1e6, &c->rope_theta));
    for (int i = 0; i < 2; i++) {
        const json_t *found = json_object_get(root, keys[i]);

        if (found == NULL || json_is_null(found)) {
            continue;
        }
        if (!json_is_object(found)) {
            return error_set("%s is not an object", keys[i]);
        }
        TRY(expect_text(found, "rope_type", "default", consequence));
        TRY(expect_text(found, "type", "default", consequence));
        TRY(get_number(found, "rope_theta", 1.0, c->rope_theta, &c->rope_theta));
    }
    return 0;
}

static int read_dtype(struct hf_mixtral_config *c, const json_t *root)
{
    static const struct {
        const char *name;
        enum dtype dtype;
    } names[] = {{"float32", DTYPE_F32}, {"bfloat16", DTYPE_BF16}, {"float16", DTYPE_F16}};
    const char *key = json_object_get(root, "dtype") != NULL ? "dtype" : "torch_dtype";
    const char *text = json_string_value(json_object_get(root, key));

    c->dtype = DTYPE_F32;
    if (text == NULL) {
        return 0;
    }
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, names[i].name) == 0) {
            c->dtype = names[i].dtype;
            return 0;
        }
    }
    return error_set("%s is %.60s; cadre converts float32, bfloat16 and float16", key, text);
}

static int read_rest(struct hf_mixtral_config *c, const json_t *root)
{
    const json_t *tie = json_object_get(root, "tie_word_embeddings");

    TRY(expect_text(root, "hidden_act", "silu", "cadre converts silu"));
    TRY(get_number(root, "rms_norm_eps", 0.0, 1e-5, &c->rms_norm_eps));
    TRY(get_number(root, "initializer_range", 0.0, 0.02, &c->initializer_range));
    TRY(get_number(root, "router_aux_loss_coef", 0.0, 0.001, &c->router_aux_loss_coef));
    TRY(get_number(root, "router_jitter_noise", 0.0, 0.0, &c->router_jitter_noise));
    TRY(get_number(root, "attention_dropout", 0.0, 0.0, &c->attention_dropout));
    TRY(get_token(root, "bos_token_id", &c->bos_token_id));
    TRY(get_token(root, "eos_token_id", &c->eos_token_id));
    TRY(get_token(root, "pad_token_id", &c->pad_token_id));
    if (tie != NULL && !json_is_boolean(tie)) {
        return error_set("tie_word_embeddings is neither true nor false");
    }
    c->tie_word_embeddings = json_is_true(tie);
    if (json_object_get(root, "quantization_config") != NULL) {
        return error_set("the weights are quantized (quantization_config); cadre does not read "
                         "those");
    }
    return 0;
}

static int parse_root(struct hf_mixtral_config *config, const json_t *root)
{
    if (!json_is_object(root)) {
        return error_set("not a JSON object");
    }
    TRY(check_architecture(root));
    TRY(read_sizes(config, root));
    TRY(check_window(config, root));
    TRY(read_rope(config, root));
    TRY(read_dtype(config, root));
    return read_rest(config, root);
}

/* ---- interface ---- */

int hf_config_parse(struct hf_mixtral_config *config, const char *text, size_t length)
{
    json_error_t error;
    json_t *root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);
    int result;

    *config = (struct hf_mixtral_config){0};
    if (root == NULL) {
        return error_set("line %d: %s", error.line, error.text);
    }
    result = parse_root(config, root);
    json_decref(root);
    return result;
}

int hf_config_read(struct hf_mixtral_config *config, const char *directory)
{
    char path[PATH_LENGTH_MAX];
    size_t length;
    char *text;
    int result;

    TRY(path_format(path, "%s/config.json", directory));
    text = path_read_file(path, config_max_bytes, &length);
    if (text == NULL) {
        return -1;
    }
    result = hf_config_parse(config, text, length);
    free(text);
    return result == 0 ? 0 : error_prepend("%s", path);
}

static const char *torch_name(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? "bfloat16" : dtype == DTYPE_F16 ? "float16" : "float32";
}

static void set_token(json_t *root, const char *key, int64_t token)
{
    json_object_set_new(root, key, token == HF_NO_TOKEN ? json_null() : json_integer(token));
}

json_t *hf_config_json(const struct hf_mixtral_config *c)
{
    json_t *root = json_pack("{s:[s], s:s, s:s, s:s, s:s, s:b, s:n, s:b}", "architectures",
                             "MixtralForCausalLM", "model_type", "mixtral", "hidden_act", "silu",
                             "torch_dtype", torch_name(c->dtype), "dtype", torch_name(c->dtype),
                             "tie_word_embeddings", c->tie_word_embeddings, "sliding_window",
                             "output_router_logits", 0);
    const struct {
        const char *key;
        int64_t value;
    } integers[] = {{"vocab_size", c->vocab_size},
                    {"hidden_size", c->hidden_size},
                    {"intermediate_size", c->intermediate_size},
                    {"num_hidden_layers", c->num_hidden_layers},
                    {"num_attention_heads", c->num_attention_heads},
                    {"num_key_value_heads", c->num_key_value_heads},
                    {"head_dim", c->head_dim},
                    {"max_position_embeddings", c->max_position_embeddings},
                    {"num_local_experts", c->num_local_experts},
                    {"num_experts_per_tok", c->num_experts_per_tok}};
    const struct {
        const char *key;
        double value;
    } numbers[] = {{"rms_norm_eps", c->rms_norm_eps},
                   {"rope_theta", c->rope_theta},
                   {"initializer_range", c->initializer_range},
                   {"router_aux_loss_coef", c->router_aux_loss_coef},
                   {"router_jitter_noise", c->router_jitter_noise},
                   {"attention_dropout", c->attention_dropout}};

    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++) {
        json_object_set_new(root, integers[i].key, json_integer(integers[i].value));
    }
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        json_object_set_new(root, numbers[i].key, json_real(numbers[i].value));
    }
    json_object_set_new(
        root, "rope_parameters",
        json_pack("{s:s, s:f}", "rope_type", "default", "rope_theta", c->rope_theta));
    set_token(root, "bos_token_id", c->bos_token_id);
    set_token(root, "eos_token_id", c->eos_token_id);
    set_token(root, "pad_token_id", c->pad_token_id);
    return root;
}

json_t *hf_generation_config_json(const struct hf_mixtral_config *c)
{
    json_t *root = json_pack("{s:b}", "_from_model_config", 1);

    set_token(root, "bos_token_id", c->bos_token_id);
    set_token(root, "eos_token_id", c->eos_token_id);
    return root;
}
