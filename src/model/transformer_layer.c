#include "model/transformer_layer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* linear_proj and fc2 write into the residual stream: their std shrinks with its 2L summands. */
static float output_init_std(const struct model_config *config)
{
    return (float)(config->init_std / sqrt(2.0 * config->num_layers));
}

static void init_norm(struct norm *norm, struct param_list *params, const struct groups *groups,
                      const struct model_config *config, const char *name)
{
    norm_init(norm, params, groups,
              &(struct norm_config){.name = name,
                                    .kind = config->norm,
                                    .one_plus = config->norm_one_plus,
                                    .hidden_size = config->hidden_size,
                                    .eps = (float)config->norm_eps});
}

static void init_attention(struct transformer_layer *layer, struct param_list *params,
                           const struct groups *groups, const struct model_config *config,
                           const char *name)
{
    attention_layer_init(
        &layer->attention, params, groups,
        &(struct attention_config){.name = name,
                                   .layer = (uint64_t)layer->number,
                                   .hidden_size = config->hidden_size,
                                   .num_heads = config->num_heads,
                                   .num_groups = config->num_groups,
                                   .head_dim = config->head_dim,
                                   .qkv_bias = config->linear_bias || config->qkv_bias,
                                   .proj_bias = config->linear_bias,
                                   .rope_interleaved = config->rope_interleaved,
                                   .dropout = (float)config->attention_dropout,
                                   .init_std = (float)config->init_std,
                                   .proj_init_std = output_init_std(config),
                                   .cp_comm_type = config->cp_comm_type[layer->number]});
}

static struct mlp_config dense_mlp(const struct model_config *config, const char *name,
                                   int64_t ffn_hidden_size, bool bias)
{
    return (struct mlp_config){.name = name,
                               .hidden_size = config->hidden_size,
                               .ffn_hidden_size = ffn_hidden_size,
                               .activation = config->activation,
                               .bias = bias,
                               .init_std = (float)config->init_std,
                               .output_init_std = output_init_std(config)};
}

static struct router_config router_of(const struct model_config *config, const char *name,
                                      int layer)
{
    struct router_config router = {
        .name = name,
        .layer = layer,
        .hidden_size = config->hidden_size,
        .num_experts = config->num_experts,
        .rule = config->router_rule,
        .sinkhorn = config->sinkhorn,
        .aux_has_own_topk = config->expert_bias || config->router_rule.num_groups > 0,
        .balance = {.score = config->router_rule.score,
                    .topk = config->router_rule.topk,
                    .num_experts = config->num_experts,
                    .layer = layer},
        .z_loss_coefficient = config->z_loss_coefficient,
        .jitter_eps = config->jitter_eps,
        .capacity_factor = config->capacity_factor,
        .pad_to_capacity = config->pad_to_capacity,
        .drop_policy = config->drop_policy,
        .expert_bias = config->expert_bias,
        .bias_update_rate = config->bias_update_rate,
        .force_load_balancing = config->force_load_balancing,
        .init_std = (float)config->init_std,
    };

    memcpy(router.balance.coefficient, config->balance_coefficient,
           sizeof router.balance.coefficient);
    return router;
}

static void init_moe(struct transformer_layer *layer, struct param_list *params,
                     const struct groups *groups, const struct model_config *config,
                     const char *name)
{
    char router[PARAM_NAME_MAX], experts[PARAM_NAME_MAX], shared[PARAM_NAME_MAX];

    snprintf(router, sizeof router, "%s.router", name);
    snprintf(experts, sizeof experts, "%s.experts", name);
    snprintf(shared, sizeof shared, "%s.shared_experts", name);
    moe_layer_init(&layer->moe, params, groups,
                   &(struct moe_layer_config){
                       .router = router_of(config, router, layer->number),
                       .experts = {.name = experts,
                                   .hidden_size = config->hidden_size,
                                   .ffn_hidden_size = config->moe_ffn_hidden_size,
                                   .num_experts = config->num_experts,
                                   .activation = config->activation,
                                   .bias = config->linear_bias,
                                   .grouped = config->grouped_gemm,
                                   .init_std = (float)config->init_std,
                                   .output_init_std = output_init_std(config)},
                       .shared_expert =
                           dense_mlp(config, shared, config->shared_expert_ffn_hidden_size, false),
                       .dispatcher = config->dispatcher,
                       .recompute = config->moe_layer_recompute,
                       .shared_expert_overlap = config->shared_expert_overlap,
                       .rank_capacity_factor = config->rank_capacity_factor});
}

void transformer_layer_init(struct transformer_layer *layer, struct param_list *params,
                            const struct groups *groups, const struct model_config *config,
                            int number)
{
    char prefix[64], name[PARAM_NAME_MAX];

    *layer = (struct transformer_layer){
        .number = number,
        .hidden_dropout = (float)config->hidden_dropout,
        .is_moe = config->num_experts > 0 && config->is_moe_layer[number],
    };
    snprintf(prefix, sizeof prefix, "decoder.layers.%d", number);
    snprintf(name, sizeof name, "%s.input_layernorm", prefix);
    init_norm(&layer->input_norm, params, groups, config, name);
    snprintf(name, sizeof name, "%s.self_attention", prefix);
    init_attention(layer, params, groups, config, name);
    snprintf(name, sizeof name, "%s.pre_mlp_layernorm", prefix);
    init_norm(&layer->mlp_norm, params, groups, config, name);
    snprintf(name, sizeof name, "%s.mlp", prefix);
    if (layer->is_moe) {
        init_moe(layer, params, groups, config, name);
    } else {
        const struct mlp_config mlp =
            dense_mlp(config, name, config->ffn_hidden_size, config->linear_bias);

        mlp_init(&layer->mlp, params, groups, &mlp);
    }
}

void transformer_layer_allocate(struct transformer_layer *layer, struct stream *stream,
                                struct arena *run)
{
    if (layer->is_moe) {
        moe_layer_allocate(&layer->moe, stream, run);
    }
}

enum branch { ATTENTION_BRANCH, MLP_BRANCH };

/* The mask of a branch's dropout. p = 0 outside training. */
static struct dropout_rule branch_dropout(const struct transformer_layer *layer,
                                          const struct pass *pass, enum branch branch)
{
    return (struct dropout_rule){
        .p = pass->training ? layer->hidden_dropout : 0.0f,
        .key =
            rng_key(pass->seed,
                    branch == ATTENTION_BRANCH ? "attention_branch_dropout" : "mlp_branch_dropout",
                    (uint64_t)layer->number)};
}

/* y = dropout(x) (+ residual); y may be x. */
static void drop(const struct pass *pass, struct dropout_rule rule, struct tensor *y,
                 const struct tensor *x, const struct tensor *residual)
{
    if (rule.p > 0.0f) {
        op_dropout(
            pass->stream,
            &(struct dropout){
                .y = y, .x = x, .residual = residual, .token_id = &pass->token_id, .rule = rule});
    } else if (residual != NULL) {
        op_add(pass->stream, &(struct add){.y = y, .u = x, .v = residual});
    }
}

/* y = dropout(mlp(x)) + residual; branch is memory like y. */
static void mlp_branch_forward(struct transformer_layer *layer, const struct pass *pass,
                               struct tensor *y, const struct tensor *x,
                               const struct tensor *residual, struct tensor *branch,
                               struct transformer_layer_saved *saved)
{
    const struct dropout_rule rule = branch_dropout(layer, pass, MLP_BRANCH);

    if (layer->is_moe && rule.p == 0.0f) { /* the sum over a token's experts takes it in */
        moe_layer_forward(&layer->moe, pass, y, x, residual, &saved->moe);
        return;
    }
    if (layer->is_moe) {
        moe_layer_forward(&layer->moe, pass, branch, x, NULL, &saved->moe);
    } else {
        mlp_forward(&layer->mlp, pass, branch, x, &saved->mlp);
    }
    drop(pass, rule, y, branch, residual);
}

void transformer_layer_forward(struct transformer_layer *layer, const struct pass *pass,
                               const struct tensor *rope, struct kv_cache *cache, struct tensor *y,
                               const struct tensor *x, struct transformer_layer_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = x->dim[0], hidden = x->dim[1];
    struct tensor normed1 = tensor_new(pass->saved, pass->dtype, num_tokens, hidden);
    struct tensor normed2 = tensor_new(pass->saved, pass->dtype, num_tokens, hidden);
    struct tensor branch = tensor_new(pass->scratch, pass->dtype, num_tokens, hidden);

    norm_forward(&layer->input_norm, pass, &normed1, x, NULL, &saved->input_norm);
    attention_layer_forward(&layer->attention, pass, rope, cache, &branch, &normed1,
                            &saved->attention);
    drop(pass, branch_dropout(layer, pass, ATTENTION_BRANCH), &branch, &branch, NULL);
    norm_forward(&layer->mlp_norm, pass, &normed2, &branch, x, &saved->mlp_norm);
    mlp_branch_forward(layer, pass, y, &normed2, &saved->mlp_norm.x, &branch, saved);
    arena_release(pass->scratch, mark);
}

/* d_normed from d_branch. */
static void mlp_branch_backward(struct transformer_layer *layer, const struct pass *pass,
                                struct tensor *d_normed, const struct tensor *d_branch,
                                const struct transformer_layer_saved *saved)
{
    if (layer->is_moe) {
        moe_layer_backward(&layer->moe, pass, d_normed, d_branch, &saved->moe);
    } else {
        mlp_backward(&layer->mlp, pass, d_normed, d_branch, &saved->mlp);
    }
}

/* The gradient of a branch's output: d itself, or d through the dropout mask, in memory. */
static struct tensor branch_gradient(const struct pass *pass, struct dropout_rule rule,
                                     const struct tensor *d, struct tensor *memory)
{
    if (rule.p == 0.0f) {
        return *d;
    }
    drop(pass, rule, memory, d, NULL);
    return *memory;
}

void transformer_layer_backward(struct transformer_layer *layer, const struct pass *pass,
                                const struct tensor *rope, struct tensor *d_x,
                                const struct tensor *d_y,
                                const struct transformer_layer_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = d_y->dim[0], hidden = d_y->dim[1];
    struct tensor masked = tensor_new(pass->scratch, pass->dtype, num_tokens, hidden);
    struct tensor d_normed = tensor_new(pass->scratch, pass->dtype, num_tokens, hidden);
    struct tensor d_branch =
        branch_gradient(pass, branch_dropout(layer, pass, MLP_BRANCH), d_y, &masked);

    mlp_branch_backward(layer, pass, &d_normed, &d_branch, saved);
    norm_backward(&layer->mlp_norm, pass, d_x, &d_normed, d_y, &saved->mlp_norm);
    d_branch = branch_gradient(pass, branch_dropout(layer, pass, ATTENTION_BRANCH), d_x, &masked);
    attention_layer_backward(&layer->attention, pass, rope, &d_normed, &d_branch,
                             &saved->attention);
    norm_backward(&layer->input_norm, pass, d_x, &d_normed, d_x, &saved->input_norm);
    arena_release(pass->scratch, mark);
}
