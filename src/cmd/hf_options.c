#include "cmd/hf_options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"

enum { DEFAULT_SEQ_LENGTH_MAX = 4096 };

/* ---- import ---- */

static int set_text(struct options *o, const char *flag, const char *text)
{
    return option_table_set(&options_table, flag, text, ORIGIN_CHECKPOINT, o, o->origins);
}

static int set_integer(struct options *o, const char *flag, int64_t value)
{
    char text[32];

    snprintf(text, sizeof text, "%lld", (long long)value);
    return set_text(o, flag, text);
}

static int set_number(struct options *o, const char *flag, double value)
{
    char text[32];

    snprintf(text, sizeof text, "%.17g", value);
    return set_text(o, flag, text);
}

static int import_sizes(struct options *o, const struct hf_mixtral_config *c)
{
    const int64_t seq_length = c->max_position_embeddings < DEFAULT_SEQ_LENGTH_MAX
                                   ? c->max_position_embeddings
                                   : DEFAULT_SEQ_LENGTH_MAX;
    const struct {
        const char *flag;
        int64_t value;
    } sizes[] = {{"--num-layers", c->num_hidden_layers},
                 {"--hidden-size", c->hidden_size},
                 {"--ffn-hidden-size", c->intermediate_size},
                 {"--num-attention-heads", c->num_attention_heads},
                 {"--kv-channels", c->head_dim},
                 {"--num-query-groups", c->num_key_value_heads},
                 {"--seq-length", seq_length},
                 {"--max-position-embeddings", c->max_position_embeddings},
                 {"--num-experts", c->num_local_experts},
                 {"--moe-router-topk", c->num_experts_per_tok},
                 {"--vocab-size", c->vocab_size}};

    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        TRY(set_integer(o, sizes[i].flag, sizes[i].value));
    }
    return 0;
}

int hf_options_import(struct options *o, const struct hf_mixtral_config *c,
                      const char *tokenizer_model)
{
    TRY(import_sizes(o, c));
    TRY(set_text(o, "--position-embedding-type", "rope"));
    TRY(set_text(o, "--normalization", "RMSNorm"));
    TRY(set_number(o, "--rotary-base", c->rope_theta));
    TRY(set_number(o, "--norm-epsilon", c->rms_norm_eps));
    TRY(set_text(o, "--swiglu", "true"));
    TRY(set_text(o, "--disable-bias-linear", "true"));
    if (c->num_key_value_heads != c->num_attention_heads) {
        TRY(set_text(o, "--group-query-attention", "true"));
    }
    if (!c->tie_word_embeddings) {
        TRY(set_text(o, "--untie-embeddings-and-output-weights", "true"));
    }
    if (tokenizer_model != NULL) {
        TRY(set_text(o, "--tokenizer-type", "Llama2Tokenizer"));
        TRY(set_text(o, "--tokenizer-model", tokenizer_model));
    }
    o->hf_top1_renormalized = c->num_experts_per_tok == 1;
    if (o->hf_top1_renormalized) {
        log_warn("this model sends each token to one expert with probability 1 (top-1, "
                 "renormalised): cadre computes the same, but its router learns nothing from the "
                 "loss");
    }
    return 0;
}

/* ---- export ---- */

struct requirement {
    bool holds;
    const char *what;
};

static int check_mixtral(const struct options *o)
{
    bool is_moe_layer[OPTIONS_MAX_LAYERS];
    bool all_moe = true;

    TRY(options_moe_layer_pattern(o, is_moe_layer));
    for (int64_t i = 0; i < o->num_layers; i++) {
        all_moe = all_moe && is_moe_layer[i];
    }
    const struct requirement requirements[] = {
        {all_moe, "experts in every layer (--num-experts, --moe-layer-freq)"},
        {strcmp(o->normalization, "RMSNorm") == 0, "--normalization RMSNorm"},
        {o->swiglu, "--swiglu"},
        {o->disable_bias_linear, "--disable-bias-linear"},
        {strcmp(o->position_embedding_type, "rope") == 0, "--position-embedding-type rope"},
        {o->rotary_percent == 1.0, "--rotary-percent 1.0"},
        {!o->rotary_interleaved, "no --rotary-interleaved"},
        {o->rotary_seq_len_interpolation_factor <= 1, "no --rotary-seq-len-interpolation-factor"},
        {o->moe_shared_expert_intermediate_size == 0, "no shared experts"},
        {strcmp(o->moe_router_score_function, "softmax") == 0,
         "--moe-router-score-function softmax"},
        {!o->moe_router_pre_softmax || o->moe_router_topk == o->num_experts,
         "no --moe-router-pre-softmax (its chosen probabilities always sum to 1)"},
        {o->moe_router_topk_scaling_factor == 0 || o->moe_router_topk_scaling_factor == 1.0,
         "no --moe-router-topk-scaling-factor"},
        {o->moe_router_num_groups == 0, "no --moe-router-num-groups"},
        {!o->moe_router_enable_expert_bias, "no --moe-router-enable-expert-bias"},
    };

    for (size_t i = 0; i < sizeof requirements / sizeof requirements[0]; i++) {
        if (!requirements[i].holds) {
            return error_set("the model cannot be written as Mixtral, which has %s",
                             requirements[i].what);
        }
    }
    return 0;
}

/* Sinkhorn routing is no model argument, but its model is no Mixtral. */
static int check_balancing(const json_t *args)
{
    const json_t *types = json_object_get(args, "moe_router_load_balancing_type");
    size_t i;
    json_t *type;

    json_array_foreach(types, i, type)
    {
        if (json_is_string(type) && strcmp(json_string_value(type), "sinkhorn") == 0) {
            return error_set("the model cannot be written as Mixtral, which has no sinkhorn "
                             "routing");
        }
    }
    return 0;
}

static void copy_options(struct hf_mixtral_config *c, const struct options *o)
{
    c->hidden_size = o->hidden_size;
    c->intermediate_size = o->moe_ffn_hidden_size;
    c->num_hidden_layers = o->num_layers;
    c->num_attention_heads = o->num_attention_heads;
    c->num_key_value_heads = o->num_query_groups;
    c->head_dim = o->kv_channels;
    c->max_position_embeddings = o->max_position_embeddings;
    c->num_local_experts = o->num_experts;
    c->num_experts_per_tok = o->moe_router_topk;
    c->rms_norm_eps = o->norm_epsilon;
    c->rope_theta = o->rotary_base;
    c->tie_word_embeddings = !o->untie_embeddings_and_output_weights;
}

/* What cadre has no option for: from the config that the model was imported from, if it was. */
static int start_config(struct hf_mixtral_config *c, const json_t *state)
{
    const json_t *saved = json_object_get(state, "hf_config");
    char *text;
    int result;

    *c = (struct hf_mixtral_config){.bos_token_id = 1,
                                    .eos_token_id = 2,
                                    .pad_token_id = HF_NO_TOKEN,
                                    .initializer_range = 0.02,
                                    .router_aux_loss_coef = 0.001};
    if (saved == NULL) {
        return 0;
    }
    text = json_dumps(saved, 0);
    CHECK(text != NULL, "out of memory");
    result = hf_config_parse(c, text, strlen(text));
    free(text);
    return result;
}

static int64_t true_vocab_size(const struct options *o, const json_t *state)
{
    const json_t *saved = json_object_get(state, "vocab_size");

    return json_is_integer(saved) ? json_integer_value(saved) : o->vocab_size;
}

static int export_options(struct hf_mixtral_config *config, struct options *o, const json_t *state)
{
    const json_t *args = json_object_get(state, "args");

    if (args == NULL) {
        return error_set("the checkpoint has no saved options");
    }
    TRY(options_apply_json(o, args));
    TRY(options_validate_model(o));
    TRY(check_mixtral(o));
    TRY(check_balancing(args));
    TRY(start_config(config, state));
    copy_options(config, o);
    config->vocab_size = true_vocab_size(o, state);
    return config->vocab_size > 0 ? 0 : error_set("the checkpoint does not say its vocabulary");
}

int hf_options_export(struct hf_mixtral_config *config, const json_t *state)
{
    struct options options;
    int result;

    TRY(options_init(&options));
    result = export_options(config, &options, state);
    options_free(&options);
    return result;
}
