/* options.h - every flag of `cadre pretrain`, and the rules that join several of them.
 *
 *     struct options o;
 *
 *     TRY(options_init(&o));
 *     TRY(options_parse(&o, argc, argv));              // argv[0] is the command's name
 *     TRY(options_apply_json(&o, saved_config));       // only with --use-checkpoint-args
 *     TRY(options_validate(&o, world_size));           // fills in what is derived
 *     ...
 *     options_free(&o);
 *
 * A field is named like its flag ("--no-load-optim" is load_optim, true by default). A number that
 * is not given and has no default is 0; a string is NULL. Choices are their strings. After
 * options_validate every size of the model is filled in. */
#ifndef CADRE_ARGS_OPTIONS_H
#define CADRE_ARGS_OPTIONS_H

#include "args/option_table.h"

enum { OPTIONS_MAX_ROWS = 448, OPTIONS_MAX_LAYERS = 4096 };

struct options {
    /* model */
    int64_t num_layers, hidden_size, ffn_hidden_size, num_attention_heads, kv_channels;
    bool group_query_attention;
    int64_t num_query_groups; /* = num_attention_heads without group_query_attention */
    int64_t seq_length, max_position_embeddings;
    int64_t encoder_num_layers, encoder_seq_length;          /* aliases, folded in by validation */
    char *position_embedding_type;                           /* learned_absolute, rope, none */
    bool position_embedding, use_rotary_position_embeddings; /* old spellings, folded in */
    double rotary_base, rotary_percent;
    bool rotary_interleaved;
    int64_t rotary_seq_len_interpolation_factor; /* 0: none */
    char *normalization;                         /* LayerNorm, RMSNorm */
    double norm_epsilon;
    bool apply_layernorm_1p, swiglu, squared_relu; /* neither activation: GELU (tanh form) */
    bool disable_bias_linear, untie_embeddings_and_output_weights;
    double attention_dropout, hidden_dropout, init_method_std;
    int64_t make_vocab_size_divisible_by;

    /* moe */
    int64_t num_experts;  /* 0: dense */
    char *moe_layer_freq; /* see options_moe_layer_pattern */
    int64_t moe_ffn_hidden_size, moe_router_topk;
    struct option_strings moe_router_load_balancing_type;
    struct option_floats moe_aux_loss_coeff;       /* one for each balancing type */
    double moe_z_loss_coeff, moe_input_jitter_eps; /* 0: off */
    bool moe_router_pre_softmax;
    char *moe_router_score_function;                      /* softmax, sigmoid */
    double moe_router_topk_scaling_factor;                /* 1 when not given */
    int64_t moe_router_num_groups, moe_router_group_topk; /* 0: no groups */
    bool moe_router_enable_expert_bias;
    double moe_router_bias_update_rate;
    bool moe_router_force_load_balancing;
    char *moe_token_dispatcher_type;   /* allgather, alltoall, alltoall_seq */
    double moe_expert_capacity_factor; /* 0: dropless */
    bool moe_pad_expert_input_to_capacity;
    double moe_expert_rank_capacity_factor; /* 0: no limit */
    char *moe_token_drop_policy;            /* probs, position */
    bool moe_grouped_gemm, moe_layer_recompute, moe_per_layer_logging;
    int64_t moe_shared_expert_intermediate_size; /* 0: no shared expert */
    bool moe_shared_expert_overlap, moe_use_upcycling;
    int64_t moe_upcycling_granularity;

    /* training */
    int64_t micro_batch_size, global_batch_size;
    struct option_ints rampup_batch_size; /* start, increment, samples; empty: constant */
    bool decrease_batch_size_if_needed;
    int64_t train_iters, train_samples;           /* one of them is 0 */
    int64_t exit_interval, exit_duration_in_mins; /* 0: off */
    bool exit_signal_handler, skip_train;
    int64_t eval_interval, eval_iters, seed;
    bool calculate_per_token_loss, check_for_nan_in_loss_and_grad;
    bool recompute_activations;  /* old spelling, folded in */
    char *recompute_granularity; /* NULL, full, selective */
    char *recompute_method;      /* NULL, uniform, block */
    int64_t recompute_num_layers;
    struct option_strings recompute_modules; /* of selective: core_attn, moe */
    char *dataloader_type;                   /* single, cyclic */

    /* optimizer and learning rate */
    char *optimizer; /* adam, sgd */
    double adam_beta1, adam_beta2, adam_eps, sgd_momentum, clip_grad;
    double weight_decay, start_weight_decay, end_weight_decay;
    char *weight_decay_incr_style; /* constant, linear, cosine */
    double lr, min_lr, lr_warmup_init;
    char *lr_decay_style; /* constant, linear, cosine, inverse-square-root, WSD */
    int64_t lr_decay_iters, lr_decay_samples;
    double lr_warmup_fraction; /* 0: not given */
    int64_t lr_warmup_iters, lr_warmup_samples;
    char *lr_wsd_decay_style; /* exponential, linear, cosine, minus_sqrt */
    int64_t lr_wsd_decay_iters, lr_wsd_decay_samples;
    bool override_opt_param_scheduler, use_checkpoint_opt_param_scheduler;

    /* precision */
    bool bf16;

    /* parallel */
    int64_t tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size;
    int64_t expert_model_parallel_size, expert_tensor_parallel_size;
    int64_t num_layers_per_virtual_pipeline_stage, num_virtual_stages_per_pipeline_rank;
    int64_t microbatch_group_size_per_virtual_pipeline_stage;
    int64_t decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers; /* 0: as others */
    bool sequence_parallel, use_distributed_optimizer, overlap_grad_reduce, overlap_param_gather;
    bool overlap_p2p_communication, tp_comm_overlap, moe_extended_tp, use_tp_pp_dp_mapping;
    struct option_strings cp_comm_type; /* see options_cp_comm_type */
    int64_t ddp_bucket_size;            /* 0: the default rule */
    char *distributed_backend;          /* nccl, gloo */
    double distributed_timeout_minutes;
    bool fake_init_process_group; /* this process plays one rank of many: launch_emulate */
    bool log_comm;

    /* data */
    struct option_strings data_path, train_data_path, valid_data_path, test_data_path;
    char *split, *data_cache_path;
    bool mock_data, reset_position_ids, reset_attention_mask, eod_mask_loss;
    int64_t num_workers;
    char *tokenizer_type, *tokenizer_model;
    int64_t vocab_size;

    /* checkpoint */
    char *save, *load, *pretrained_checkpoint, *ckpt_format;
    int64_t save_interval, ckpt_step; /* ckpt_step -1: the newest */
    bool finetune, load_optim, load_rng, save_optim, save_rng;
    bool exit_on_missing_checkpoint, use_checkpoint_args;

    /* logging */
    int64_t log_interval;
    bool log_throughput, log_params_norm, log_num_zeros_in_grad;
    bool profile;
    char *cuda_graph_impl; /* none, full_iteration; refused: local, transformer_engine */
    int64_t cuda_graph_warmup_steps;
    int64_t profile_step_start, profile_step_end;
    int64_t timing_log_level;
    char *timing_log_option; /* max, minmax, all */
    char *tensorboard_dir;
    int64_t tensorboard_log_interval;
    bool log_timers_to_tensorboard, log_loss_scale_to_tensorboard;
    bool log_validation_ppl_to_tensorboard, log_memory_to_tensorboard;
    bool log_world_size_to_tensorboard;

    /* machine */
    char *device;        /* for device_select */
    int64_t num_threads; /* 0: all cores (OpenMP's default) */
    bool print_config;

    /* Not flags. hf_top1_renormalized: the model was imported from Hugging Face with top-1 routing
     * over renormalised probabilities (always 1), which is refused when asked for by flags. */
    bool hf_top1_renormalized;

    /* Filled in by options_validate. */
    int64_t world_size, data_parallel_size, expert_data_parallel_size;
    int64_t virtual_pipeline_size; /* model chunks on a pipeline stage; 1: no interleaving */

    enum option_origin origins[OPTIONS_MAX_ROWS]; /* of options_table's rows */
};

extern const struct option_table options_table;

/* options_init: all defaults; then the struct must be freed, and not be copied. */
int options_init(struct options *o);
int options_parse(struct options *o, int argc, char **argv);
void options_free(struct options *o);

/* True if the flag's value comes from the command line, the environment or a checkpoint. */
bool options_given(const struct options *o, const char *flag);

/* Checks every rule and fills in what is derived, before anything is allocated. world_size is the
 * number of ranks launched. -1 with one line that names the flags, the values and what is legal. */
int options_validate(struct options *o, int world_size);
/* The part of it that concerns the model alone: for commands that load a model and do not train. */
int options_validate_model(struct options *o);
/* The stages of options_validate, after options_validate_model; each in a file of its own. */
int options_validate_parallel(struct options *o, int world_size);
int options_validate_training(struct options *o);

/* is_moe_layer[i], i < num_layers <= OPTIONS_MAX_LAYERS, from --moe-layer-freq: an integer n makes
 * layers 0, n, 2n ... MoE; a list such as ([0]*3+[1]*5) says it layer by layer. All false when
 * num_experts is 0. */
int options_moe_layer_pattern(const struct options *o, bool *is_moe_layer);
/* The same from its parts. */
int options_parse_layer_pattern(const char *text, int64_t num_layers, bool *is_moe_layer);

/* "p2p", "all_gather" or "a2a": how layer exchanges keys and values under context parallelism. */
const char *options_cp_comm_type(const struct options *o, int64_t layer);

/* Whether ranks send each other anything within the forward and backward passes of a step. */
bool options_passes_communicate(const struct options *o);

/* vocab_size rounded up to --make-vocab-size-divisible-by times the tensor-parallel size. */
int64_t options_padded_vocab_size(const struct options *o, int64_t vocab_size);

json_t *options_to_json(const struct options *o);
int options_apply_json(struct options *o, const json_t *object);

/* The block of arguments that Megatron prints at start: sorted, dotted, values as Python has them.
 */
void options_print(const struct options *o, FILE *out);
/* --print-config: name, value and origin, in groups. */
void options_print_config(const struct options *o, FILE *out);

#endif
