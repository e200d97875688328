#include "train/model_setup.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"

static enum activation_kind activation_of(const struct options *o)
{
    if (o->swiglu) {
        return ACTIVATION_SWIGLU;
    }
    return o->squared_relu ? ACTIVATION_SQUARED_RELU : ACTIVATION_GELU;
}

static enum position_kind position_of(const struct options *o)
{
    if (strcmp(o->position_embedding_type, "rope") == 0) {
        return POSITION_ROPE;
    }
    return strcmp(o->position_embedding_type, "none") == 0 ? POSITION_NONE : POSITION_LEARNED;
}

static enum cp_comm_type cp_comm_type_of(const char *name)
{
    if (strcmp(name, "a2a") == 0) {
        return CP_COMM_A2A;
    }
    return strcmp(name, "all_gather") == 0 ? CP_COMM_ALL_GATHER : CP_COMM_P2P;
}

static void set_recompute(struct model_config *config, const struct options *o)
{
    config->recompute = RECOMPUTE_NONE;
    config->moe_layer_recompute = o->moe_layer_recompute;
    if (o->recompute_granularity == NULL) {
        return;
    }
    if (strcmp(o->recompute_granularity, "full") == 0) {
        config->recompute = strcmp(o->recompute_method, "block") == 0 ? RECOMPUTE_FULL_BLOCK
                                                                      : RECOMPUTE_FULL_UNIFORM;
        config->recompute_num_layers = (int)o->recompute_num_layers;
        return;
    }
    for (int i = 0; i < o->recompute_modules.num_items; i++) {
        /* core_attn needs nothing: the probabilities of attention are never kept. */
        config->moe_layer_recompute |= strcmp(o->recompute_modules.items[i], "moe") == 0;
    }
}

static const struct {
    const char *name;
    enum balance_type type;
} balance_names[] = {
    {"aux_loss", BALANCE_AUX_LOSS},
    {"seq_aux_loss", BALANCE_SEQ_AUX_LOSS},
    {"global_aux_loss", BALANCE_GLOBAL_AUX_LOSS},
};

static void set_balancing(struct model_config *config, const struct options *o)
{
    for (int i = 0; i < o->moe_router_load_balancing_type.num_items; i++) {
        const char *name = o->moe_router_load_balancing_type.items[i];

        config->sinkhorn |= strcmp(name, "sinkhorn") == 0;
        for (size_t b = 0; b < sizeof balance_names / sizeof balance_names[0]; b++) {
            if (strcmp(name, balance_names[b].name) == 0 && i < o->moe_aux_loss_coeff.num_items) {
                config->balance_coefficient[balance_names[b].type] =
                    (float)o->moe_aux_loss_coeff.items[i];
            }
        }
    }
}

/* Sinkhorn routing takes its probabilities over all experts: sigmoid for one expert a token, else
 * the softmax (M1.9). Imported top-1 models renormalise to 1, as transformers does. */
static struct router_rule router_rule_of(const struct model_config *config, const struct options *o)
{
    struct router_rule rule = {
        .score =
            strcmp(o->moe_router_score_function, "sigmoid") == 0 ? ROUTER_SIGMOID : ROUTER_SOFTMAX,
        .pre_softmax = o->moe_router_pre_softmax,
        .topk = (int)o->moe_router_topk,
        .num_groups = (int)o->moe_router_num_groups,
        .group_topk = (int)o->moe_router_group_topk,
        .scaling_factor = (float)o->moe_router_topk_scaling_factor,
    };

    if (config->sinkhorn) {
        rule.score = rule.topk == 1 ? ROUTER_SIGMOID : ROUTER_SOFTMAX;
        rule.pre_softmax = true;
    } else if (o->hf_top1_renormalized) {
        rule.pre_softmax = true;
        rule.renormalize = true;
    }
    return rule;
}

static enum dispatcher_kind dispatcher_of(const struct options *o)
{
    if (strcmp(o->moe_token_dispatcher_type, "alltoall") == 0) {
        return DISPATCHER_ALLTOALL;
    }
    return strcmp(o->moe_token_dispatcher_type, "alltoall_seq") == 0 ? DISPATCHER_ALLTOALL_SEQ
                                                                     : DISPATCHER_ALLGATHER;
}

static int set_moe(struct model_config *config, const struct options *o)
{
    config->num_experts = (int)o->num_experts;
    if (config->num_experts == 0) {
        return 0;
    }
    TRY(options_moe_layer_pattern(o, config->is_moe_layer));
    config->moe_ffn_hidden_size = o->moe_ffn_hidden_size;
    config->shared_expert_ffn_hidden_size = o->moe_shared_expert_intermediate_size;
    set_balancing(config, o);
    config->router_rule = router_rule_of(config, o);
    config->z_loss_coefficient = (float)o->moe_z_loss_coeff;
    config->jitter_eps = (float)o->moe_input_jitter_eps;
    config->capacity_factor = o->moe_expert_capacity_factor;
    config->pad_to_capacity = o->moe_pad_expert_input_to_capacity;
    config->drop_policy =
        strcmp(o->moe_token_drop_policy, "position") == 0 ? DROP_BY_POSITION : DROP_BY_PROBS;
    config->expert_bias = o->moe_router_enable_expert_bias;
    config->bias_update_rate = (float)o->moe_router_bias_update_rate;
    config->force_load_balancing = o->moe_router_force_load_balancing;
    config->grouped_gemm = o->moe_grouped_gemm;
    config->dispatcher = dispatcher_of(o);
    config->shared_expert_overlap = o->moe_shared_expert_overlap;
    config->rank_capacity_factor = o->moe_expert_rank_capacity_factor;
    return 0;
}

int model_config_from_options(struct model_config *config, const struct options *o,
                              int64_t vocab_size)
{
    *config = (struct model_config){
        .num_layers = (int)o->num_layers,
        .hidden_size = o->hidden_size,
        .ffn_hidden_size = o->ffn_hidden_size,
        .num_heads = o->num_attention_heads,
        .num_groups = o->num_query_groups,
        .head_dim = o->kv_channels,
        .vocab_size = vocab_size,
        .padded_vocab_size = options_padded_vocab_size(o, vocab_size),
        .max_positions = o->max_position_embeddings,
        .seq_length = o->seq_length,
        .norm = strcmp(o->normalization, "RMSNorm") == 0 ? NORM_RMSNORM : NORM_LAYERNORM,
        .norm_one_plus = o->apply_layernorm_1p,
        .norm_eps = o->norm_epsilon,
        .activation = activation_of(o),
        .linear_bias = !o->disable_bias_linear,
        .tied_embeddings = !o->untie_embeddings_and_output_weights,
        .position = position_of(o),
        .rope_base = o->rotary_base,
        .rope_percent = o->rotary_percent,
        .rope_interpolation = o->rotary_seq_len_interpolation_factor > 0
                                  ? (double)o->rotary_seq_len_interpolation_factor
                                  : 1.0,
        .rope_interleaved = o->rotary_interleaved,
        .attention_dropout = o->attention_dropout,
        .hidden_dropout = o->hidden_dropout,
        .init_std = o->init_method_std,
        .dtype = o->bf16 ? DTYPE_BF16 : DTYPE_F32,
    };
    if (config->num_layers > MODEL_LAYERS_MAX) {
        return error_set("--num-layers is %d; at most %d are supported", config->num_layers,
                         MODEL_LAYERS_MAX);
    }
    for (int i = 0; i < config->num_layers; i++) {
        config->cp_comm_type[i] = cp_comm_type_of(options_cp_comm_type(o, i));
    }
    set_recompute(config, o);
    return set_moe(config, o);
}

/* --moe-extended-tp: the TP and EP ranks together shard each expert (M3.9). */
struct rank_grid_sizes rank_grid_sizes_from_options(const struct options *o)
{
    const int ep = (int)o->expert_model_parallel_size;
    const bool extended = o->num_experts > 0 && o->moe_extended_tp;

    return (struct rank_grid_sizes){
        .world = (int)o->world_size,
        .tp = (int)o->tensor_model_parallel_size,
        .cp = (int)o->context_parallel_size,
        .pp = (int)o->pipeline_model_parallel_size,
        .ep = extended ? 1 : ep,
        .etp = (int)o->expert_tensor_parallel_size * (extended ? ep : 1),
        .pp_before_dp = o->use_tp_pp_dp_mapping,
    };
}

struct optimizer_config optimizer_config_from_options(const struct options *o)
{
    return (struct optimizer_config){
        .kind = strcmp(o->optimizer, "sgd") == 0 ? OPTIMIZER_SGD : OPTIMIZER_ADAM,
        .beta1 = (float)o->adam_beta1,
        .beta2 = (float)o->adam_beta2,
        .eps = (float)o->adam_eps,
        .momentum = (float)o->sgd_momentum,
    };
}

int batch_size_config_from_options(struct batch_size_config *config, const struct options *o)
{
    *config = (struct batch_size_config){
        .global_batch_size = o->global_batch_size,
        .micro_batch_size = o->micro_batch_size,
        .data_parallel_size = o->data_parallel_size,
        .ramps_up = o->rampup_batch_size.num_items == 3,
        .decreases_if_needed = o->decrease_batch_size_if_needed,
    };
    if (config->ramps_up) {
        config->rampup_start = o->rampup_batch_size.items[0];
        config->rampup_increment = o->rampup_batch_size.items[1];
        config->rampup_samples = o->rampup_batch_size.items[2];
    }
    return batch_size_check(config);
}

/* Iterations are counted in samples of the final batch size: the schedule knows samples only
 * (M6.6). */
static int64_t in_samples(const struct options *o, int64_t iterations, int64_t samples)
{
    return o->train_samples > 0 ? samples : iterations * o->global_batch_size;
}

static void set_weight_decay(struct lr_schedule_config *config, const struct options *o)
{
    const bool constant = config->weight_decay_style == WEIGHT_DECAY_CONSTANT;

    config->start_weight_decay = constant ? o->weight_decay : o->start_weight_decay;
    config->end_weight_decay = constant ? o->weight_decay : o->end_weight_decay;
    config->weight_decay_samples = in_samples(o, o->train_iters, o->train_samples);
}

int lr_schedule_config_from_options(struct lr_schedule_config *config, const struct options *o)
{
    *config = (struct lr_schedule_config){
        .init_lr = o->lr_warmup_init,
        .max_lr = o->lr,
        .min_lr = o->min_lr,
        .decay_samples = in_samples(o, o->lr_decay_iters, o->lr_decay_samples),
        .wsd_decay_samples = in_samples(o, o->lr_wsd_decay_iters, o->lr_wsd_decay_samples),
    };
    config->warmup_samples = o->lr_warmup_fraction > 0.0
                                 ? o->lr_warmup_fraction * (double)config->decay_samples
                                 : (double)in_samples(o, o->lr_warmup_iters, o->lr_warmup_samples);
    TRY(lr_decay_style_parse(o->lr_decay_style, &config->style));
    TRY(lr_wsd_style_parse(o->lr_wsd_decay_style, &config->wsd_style));
    TRY(weight_decay_style_parse(o->weight_decay_incr_style, &config->weight_decay_style));
    set_weight_decay(config, o);
    return lr_schedule_check(config);
}

int64_t training_num_iterations(const struct options *o, const struct batch_size_config *batch_size)
{
    int64_t iterations = 0;

    if (o->train_samples == 0) {
        return o->train_iters;
    }
    for (int64_t consumed = 0; consumed < o->train_samples; iterations++) {
        consumed += batch_size_at(batch_size, consumed).running;
    }
    return iterations;
}

struct flops_sizes flops_sizes_from_config(const struct model_config *config, int64_t batch_size)
{
    return (struct flops_sizes){
        .batch_size = batch_size,
        .seq_length = config->seq_length,
        .num_layers = config->num_layers,
        .num_moe_layers = model_config_num_moe_layers(config),
        .hidden_size = config->hidden_size,
        .num_heads = config->num_heads,
        .num_query_groups = config->num_groups,
        .head_dim = config->head_dim,
        .ffn_hidden_size = config->ffn_hidden_size,
        .moe_ffn_hidden_size = config->moe_ffn_hidden_size,
        .topk = config->router_rule.topk,
        .shared_ffn_hidden_size = config->shared_expert_ffn_hidden_size,
        .vocab_size = config->padded_vocab_size,
        .gated = config->activation == ACTIVATION_SWIGLU,
    };
}
