/* The rules of the model: sizes, positions, activations, routing. */
#include <string.h>

#include "args/options.h"
#include "args/options_rules.h"
#include "base/check.h"

/* Folds an old spelling into the flag that replaced it. */
static int fold_alias(struct options *o, const char *flag, int64_t *field, const char *alias,
                      int64_t alias_value)
{
    if (alias_value == 0) {
        return 0;
    }
    if (options_given(o, flag) && *field != alias_value) {
        return error_set("%s %lld and %s %lld are the same thing: give one", flag,
                         (long long)*field, alias, (long long)alias_value);
    }
    options_derive_int(o, flag, field, alias_value);
    return 0;
}

static int fold_old_spellings(struct options *o)
{
    TRY(fold_alias(o, "--num-layers", &o->num_layers, "--encoder-num-layers",
                   o->encoder_num_layers));
    TRY(fold_alias(o, "--seq-length", &o->seq_length, "--encoder-seq-length",
                   o->encoder_seq_length));
    if (o->use_rotary_position_embeddings) {
        TRY(options_derive_text(o, "--position-embedding-type", "rope"));
    }
    return 0;
}

/* M4.5.7 */
static int check_required(const struct options *o)
{
    const struct {
        const char *flag;
        int64_t value;
    } required[] = {
        {"--num-layers", o->num_layers},
        {"--hidden-size", o->hidden_size},
        {"--num-attention-heads", o->num_attention_heads},
        {"--seq-length", o->seq_length},
        {"--max-position-embeddings", o->max_position_embeddings},
    };
    char missing[256] = "";
    size_t used = 0;

    for (size_t i = 0; i < sizeof required / sizeof required[0]; i++) {
        if (required[i].value == 0) {
            used +=
                (size_t)snprintf(missing + used, sizeof missing - used, " %s", required[i].flag);
        }
    }
    if (used > 0) {
        return error_set("missing:%s (or --use-checkpoint-args with --load)", missing);
    }
    return 0;
}

/* M4.5.8 */
static int derive_sizes(struct options *o)
{
    const int64_t gated = 4 * o->hidden_size * 2 / 3 / 64 * 64;

    options_derive_int(o, "--ffn-hidden-size", &o->ffn_hidden_size,
                       o->swiglu ? gated : 4 * o->hidden_size);
    if (o->ffn_hidden_size == 0) {
        return error_set("--hidden-size %lld is too small to derive --ffn-hidden-size with "
                         "--swiglu: give it",
                         (long long)o->hidden_size);
    }
    if (!options_given(o, "--kv-channels")) {
        TRY(options_check_divisible("--hidden-size", o->hidden_size, "--num-attention-heads",
                                    o->num_attention_heads));
        options_derive_int(o, "--kv-channels", &o->kv_channels,
                           o->hidden_size / o->num_attention_heads);
    }
    if (!o->group_query_attention) {
        options_warn_unless(o, "--num-query-groups", o->num_query_groups == o->num_attention_heads,
                            "--group-query-attention");
        o->num_query_groups = o->num_attention_heads;
        options_mark_derived(o, "--num-query-groups");
    }
    return options_check_divisible("--num-attention-heads", o->num_attention_heads,
                                   "--num-query-groups", o->num_query_groups);
}

static int check_rope(const struct options *o)
{
    const int64_t rotated = (int64_t)((double)o->kv_channels * o->rotary_percent);

    if (rotated < 2 || rotated % 2 != 0) {
        return error_set("--rotary-percent %g of a head of %lld (--kv-channels) is %lld: must be "
                         "even and at least 2",
                         o->rotary_percent, (long long)o->kv_channels, (long long)rotated);
    }
    return 0;
}

/* M4.5.10, M4.5.14 */
static int check_positions(const struct options *o)
{
    static const char *const rope_flags[] = {"--rotary-base", "--rotary-percent",
                                             "--rotary-interleaved",
                                             "--rotary-seq-len-interpolation-factor"};
    const bool rope = strcmp(o->position_embedding_type, "rope") == 0;

    if (o->max_position_embeddings < o->seq_length) {
        return error_set("--max-position-embeddings %lld is less than --seq-length %lld",
                         (long long)o->max_position_embeddings, (long long)o->seq_length);
    }
    if (!o->position_embedding && !rope) {
        return error_set("--no-position-embedding is deprecated, use --position-embedding-type "
                         "(found %s; legal with it: rope)",
                         o->position_embedding_type);
    }
    for (size_t i = 0; i < sizeof rope_flags / sizeof rope_flags[0]; i++) {
        options_warn_unless(o, rope_flags[i], rope, "--position-embedding-type rope");
    }
    return rope ? check_rope(o) : 0;
}

static int check_layers(const struct options *o)
{
    if (o->swiglu && o->squared_relu) {
        return error_set("--swiglu and --squared-relu are both given: a layer has one activation");
    }
    if (o->apply_layernorm_1p && strcmp(o->normalization, "LayerNorm") != 0) {
        return error_set("--apply-layernorm-1p needs --normalization LayerNorm, found %s",
                         o->normalization);
    }
    return 0;
}

static int check_balancing(const struct options *o)
{
    const struct option_strings *types = &o->moe_router_load_balancing_type;

    for (int i = 0; i < types->num_items; i++) {
        const bool alone =
            strcmp(types->items[i], "none") == 0 || strcmp(types->items[i], "sinkhorn") == 0;

        if (alone && types->num_items > 1) {
            return error_set("--moe-router-load-balancing-type %s cannot be joined with others",
                             types->items[i]);
        }
        for (int j = 0; j < i; j++) {
            if (strcmp(types->items[i], types->items[j]) == 0) {
                return error_set("--moe-router-load-balancing-type has %s twice", types->items[i]);
            }
        }
    }
    if (o->moe_aux_loss_coeff.num_items != types->num_items) {
        return error_set("--moe-aux-loss-coeff has %d values, --moe-router-load-balancing-type has "
                         "%d: give one for each",
                         o->moe_aux_loss_coeff.num_items, types->num_items);
    }
    if (options_balances_by(o, "sinkhorn") && o->moe_aux_loss_coeff.items[0] > 0) {
        return error_set("--moe-aux-loss-coeff %g: sinkhorn routing does not support an auxiliary "
                         "loss; legal: 0",
                         o->moe_aux_loss_coeff.items[0]);
    }
    options_warn_unless(o, "--moe-aux-loss-coeff",
                        !options_balances_by(o, "none") || o->moe_aux_loss_coeff.items[0] == 0,
                        "a --moe-router-load-balancing-type other than none");
    return 0;
}

static int check_scores(const struct options *o)
{
    const bool sigmoid = strcmp(o->moe_router_score_function, "sigmoid") == 0;
    const bool sinkhorn = options_balances_by(o, "sinkhorn");

    if (o->moe_router_topk > o->num_experts) {
        return error_set("--moe-router-topk %lld is more than --num-experts %lld",
                         (long long)o->moe_router_topk, (long long)o->num_experts);
    }
    if (o->moe_router_topk == 1 && !sigmoid && !sinkhorn && !o->moe_router_pre_softmax &&
        !o->hf_top1_renormalized) {
        return error_set("--moe-router-topk 1: use --moe-router-pre-softmax when topk is 1 (the "
                         "softmax of one score is 1, the router would learn nothing)");
    }
    if (o->moe_router_enable_expert_bias && (!sigmoid || sinkhorn)) {
        return error_set("--moe-router-enable-expert-bias needs --moe-router-score-function "
                         "sigmoid without sinkhorn, found %s%s",
                         o->moe_router_score_function, sinkhorn ? " with sinkhorn" : "");
    }
    if (sigmoid && sinkhorn) {
        return error_set("--moe-router-score-function sigmoid: sinkhorn has scores of its own; "
                         "legal with it: softmax");
    }
    options_warn_unless(o, "--moe-router-pre-softmax", !sigmoid && !sinkhorn,
                        "softmax scores and a balancing type other than sinkhorn");
    options_warn_unless(o, "--moe-router-bias-update-rate", o->moe_router_enable_expert_bias,
                        "--moe-router-enable-expert-bias");
    return 0;
}

static int check_groups(const struct options *o)
{
    const int64_t groups = o->moe_router_num_groups, chosen = o->moe_router_group_topk;
    const int64_t topk = o->moe_router_topk;

    if (groups == 0 && chosen == 0) {
        return 0;
    }
    if (groups == 0 || chosen == 0) {
        return error_set("%s needs %s",
                         groups == 0 ? "--moe-router-group-topk" : "--moe-router-num-groups",
                         groups == 0 ? "--moe-router-num-groups" : "--moe-router-group-topk");
    }
    if (options_balances_by(o, "sinkhorn")) {
        return error_set("--moe-router-num-groups %lld: sinkhorn routes without groups",
                         (long long)groups);
    }
    TRY(options_check_divisible("--num-experts", o->num_experts, "--moe-router-num-groups",
                                groups));
    if (chosen > groups || chosen > topk) {
        return error_set("--moe-router-group-topk %lld: must be at most --moe-router-num-groups "
                         "%lld and --moe-router-topk %lld",
                         (long long)chosen, (long long)groups, (long long)topk);
    }
    /* a group's score is the sum of its topk / group-topk best experts */
    if (topk / chosen > o->num_experts / groups || chosen * (o->num_experts / groups) < topk) {
        return error_set("--moe-router-topk %lld does not fit in %lld groups of %lld experts",
                         (long long)topk, (long long)chosen, (long long)(o->num_experts / groups));
    }
    return 0;
}

/* Section 2 of the reference, M4.5.20. */
static int check_capacity(struct options *o)
{
    if (options_given(o, "--moe-expert-capacity-factor") && o->moe_expert_capacity_factor == 0) {
        return error_set("--moe-expert-capacity-factor 0 would drop every token: must be above 0, "
                         "or negative for none dropped");
    }
    if (o->moe_expert_capacity_factor < 0) {
        o->moe_expert_capacity_factor = 0;
    }
    if (o->moe_expert_capacity_factor == 0) {
        if (o->moe_pad_expert_input_to_capacity) {
            return error_set("--moe-pad-expert-input-to-capacity needs a positive "
                             "--moe-expert-capacity-factor");
        }
        options_warn_unless(o, "--moe-token-drop-policy", false, "--moe-expert-capacity-factor");
        return 0;
    }
    if (strcmp(o->moe_token_dispatcher_type, "allgather") == 0) {
        return error_set("--moe-expert-capacity-factor %g only works with the alltoall token "
                         "dispatcher: --moe-token-dispatcher-type is allgather; legal: alltoall, "
                         "alltoall_seq",
                         o->moe_expert_capacity_factor);
    }
    if (options_balances_by(o, "sinkhorn")) {
        return error_set("--moe-expert-capacity-factor %g does not work with "
                         "--moe-router-load-balancing-type sinkhorn",
                         o->moe_expert_capacity_factor);
    }
    return 0;
}

static int check_shared_expert(const struct options *o)
{
    const bool exists = o->moe_shared_expert_intermediate_size > 0;

    if (exists && !o->disable_bias_linear) {
        return error_set("--moe-shared-expert-intermediate-size %lld: shared experts have no "
                         "biases; add --disable-bias-linear",
                         (long long)o->moe_shared_expert_intermediate_size);
    }
    if (o->moe_shared_expert_overlap && strcmp(o->moe_token_dispatcher_type, "alltoall") != 0) {
        return error_set("--moe-shared-expert-overlap only works with the alltoall token "
                         "dispatcher: --moe-token-dispatcher-type is %s",
                         o->moe_token_dispatcher_type);
    }
    options_warn_unless(o, "--moe-shared-expert-overlap", exists,
                        "--moe-shared-expert-intermediate-size");
    return 0;
}

/* Section 8.10: granularity = dense FFN size / expert FFN size. */
static int derive_expert_size(struct options *o)
{
    const int64_t granularity = o->moe_use_upcycling ? o->moe_upcycling_granularity : 1;

    TRY(options_check_divisible("--ffn-hidden-size", o->ffn_hidden_size,
                                "--moe-upcycling-granularity", granularity));
    options_derive_int(o, "--moe-ffn-hidden-size", &o->moe_ffn_hidden_size,
                       o->ffn_hidden_size / granularity);
    if (o->moe_use_upcycling && o->moe_ffn_hidden_size * granularity != o->ffn_hidden_size) {
        return error_set("--moe-ffn-hidden-size %lld: must be --ffn-hidden-size %lld / "
                         "--moe-upcycling-granularity %lld",
                         (long long)o->moe_ffn_hidden_size, (long long)o->ffn_hidden_size,
                         (long long)granularity);
    }
    options_warn_unless(o, "--moe-upcycling-granularity", o->moe_use_upcycling,
                        "--moe-use-upcycling");
    return options_check_divisible("--num-experts", o->num_experts, "--moe-upcycling-granularity",
                                   granularity);
}

static int check_moe(struct options *o)
{
    bool is_moe_layer[OPTIONS_MAX_LAYERS];

    TRY(check_balancing(o));
    TRY(check_scores(o));
    TRY(check_groups(o));
    TRY(check_capacity(o));
    TRY(check_shared_expert(o));
    TRY(derive_expert_size(o));
    options_derive_float(o, "--moe-router-topk-scaling-factor", &o->moe_router_topk_scaling_factor,
                         1.0);
    return options_moe_layer_pattern(o, is_moe_layer);
}

/* A dense model: flags of experts do nothing, as in Megatron, except those that ask for experts. */
static int check_dense(const struct options *o)
{
    if (o->moe_use_upcycling) {
        return error_set("--moe-use-upcycling needs --num-experts");
    }
    for (int i = 0; i < options_table.num_rows; i++) {
        const struct option_row *row = &options_table.rows[i];

        if (strcmp(row->group, "moe") == 0 && strcmp(row->flag, "--num-experts") != 0) {
            options_warn_unless(o, row->flag, false, "--num-experts");
        }
    }
    return 0;
}

int options_validate_model(struct options *o)
{
    TRY(fold_old_spellings(o));
    TRY(check_required(o));
    TRY(derive_sizes(o));
    TRY(check_positions(o));
    TRY(check_layers(o));
    return o->num_experts > 0 ? check_moe(o) : check_dense(o);
}
