/* The flags of `cadre pretrain`: one row a flag, in the groups of --help. Defaults are those of the
 * seed (Megatron-Core, October 2024); flags that came later have the later default.
 *
 * A row is built (it sets its field), ALWAYS (the promise is kept with or without the flag) or
 * REFUSED. To build a refused one: give struct options a field, turn its row into a typed one. */
#include "args/options.h"

#define FIELD(field, type) OPTION_FIELD(struct options, field, type)

#define BODY(flag_, type_, offset_, default_, min_, max_, choices_, help_)                         \
    .flag = (flag_), .type = (type_), .offset = (offset_), .default_text = (default_),             \
    .min = (min_), .max = (max_), .choices = (choices_), .group = GROUP, .help = (help_)

#define SWITCH_BODY(flag, field, help)                                                             \
    BODY(flag, OPTION_FLAG, FIELD(field, bool), NULL, 0, 0, NULL, help)
#define INT_BODY(flag, field, value, min, max, help)                                               \
    BODY(flag, OPTION_INT, FIELD(field, int64_t), value, min, max, NULL, help)
#define FLOAT_BODY(flag, field, value, min, max, help)                                             \
    BODY(flag, OPTION_FLOAT, FIELD(field, double), value, min, max, NULL, help)
#define STRING_BODY(flag, field, value, help)                                                      \
    BODY(flag, OPTION_STRING, FIELD(field, char *), value, 0, 0, NULL, help)
#define CHOICE_BODY(flag, field, value, choices, help)                                             \
    BODY(flag, OPTION_CHOICE, FIELD(field, char *), value, 0, 0, choices, help)

#define SWITCH(...)                                                                                \
    {                                                                                              \
        SWITCH_BODY(__VA_ARGS__)                                                                   \
    }
#define NO_SWITCH(flag, field, help)                                                               \
    {                                                                                              \
        BODY(flag, OPTION_NO_FLAG, FIELD(field, bool), NULL, 0, 0, NULL, help)                     \
    }
#define INT(...)                                                                                   \
    {                                                                                              \
        INT_BODY(__VA_ARGS__)                                                                      \
    }
#define FLOAT(...)                                                                                 \
    {                                                                                              \
        FLOAT_BODY(__VA_ARGS__)                                                                    \
    }
#define STRING(...)                                                                                \
    {                                                                                              \
        STRING_BODY(__VA_ARGS__)                                                                   \
    }
#define CHOICE(...)                                                                                \
    {                                                                                              \
        CHOICE_BODY(__VA_ARGS__)                                                                   \
    }
#define STRINGS(flag, field, help)                                                                 \
    {                                                                                              \
        BODY(flag, OPTION_STRINGS, FIELD(field, struct option_strings), NULL, 0, 0, NULL, help)    \
    }
#define CHOICES(flag, field, value, choices, help)                                                 \
    {                                                                                              \
        BODY(flag, OPTION_CHOICES, FIELD(field, struct option_strings), value, 0, 0, choices,      \
             help)                                                                                 \
    }
#define INTS(flag, field, min, max, help)                                                          \
    {                                                                                              \
        BODY(flag, OPTION_INTS, FIELD(field, struct option_ints), NULL, min, max, NULL, help)      \
    }
#define FLOATS(flag, field, value, min, max, help)                                                 \
    {                                                                                              \
        BODY(flag, OPTION_FLOATS, FIELD(field, struct option_floats), value, min, max, NULL, help) \
    }

/* Rows that describe the model: saved in checkpoints, restored by --use-checkpoint-args. */
#define MODEL_SWITCH(...)                                                                          \
    {                                                                                              \
        .is_model_arg = true, SWITCH_BODY(__VA_ARGS__)                                             \
    }
#define MODEL_INT(...)                                                                             \
    {                                                                                              \
        .is_model_arg = true, INT_BODY(__VA_ARGS__)                                                \
    }
#define MODEL_FLOAT(...)                                                                           \
    {                                                                                              \
        .is_model_arg = true, FLOAT_BODY(__VA_ARGS__)                                              \
    }
#define MODEL_STRING(...)                                                                          \
    {                                                                                              \
        .is_model_arg = true, STRING_BODY(__VA_ARGS__)                                             \
    }
#define MODEL_CHOICE(...)                                                                          \
    {                                                                                              \
        .is_model_arg = true, CHOICE_BODY(__VA_ARGS__)                                             \
    }

#define NO_FIELD(status_, flag_, type_, default_, choices_, help_, reason_)                        \
    {                                                                                              \
        .status = (status_), .reason = (reason_),                                                  \
        BODY(flag_, type_, OPTION_NO_FIELD, default_, OPTION_NO_MIN, OPTION_NO_MAX, choices_,      \
             help_)                                                                                \
    }
#define ALWAYS(flag, help, reason)                                                                 \
    NO_FIELD(OPTION_ALWAYS, flag, OPTION_FLAG, NULL, NULL, help, reason)
#define ALWAYS_NO(flag, help, reason)                                                              \
    NO_FIELD(OPTION_ALWAYS, flag, OPTION_NO_FLAG, NULL, NULL, help, reason)
#define ALWAYS_INT(flag, value, help, reason)                                                      \
    NO_FIELD(OPTION_ALWAYS, flag, OPTION_INT, value, NULL, help, reason)
#define ALWAYS_CHOICE(flag, value, choices, help, reason)                                          \
    NO_FIELD(OPTION_ALWAYS, flag, OPTION_CHOICE, value, choices, help, reason)
#define REFUSED(flag, help, reason)                                                                \
    NO_FIELD(OPTION_REFUSED, flag, OPTION_FLAG, NULL, NULL, help, reason)
#define REFUSED_NO(flag, help, reason)                                                             \
    NO_FIELD(OPTION_REFUSED, flag, OPTION_NO_FLAG, NULL, NULL, help, reason)
#define REFUSED_INT(flag, value, help, reason)                                                     \
    NO_FIELD(OPTION_REFUSED, flag, OPTION_INT, value, NULL, help, reason)
#define REFUSED_FLOAT(flag, value, help, reason)                                                   \
    NO_FIELD(OPTION_REFUSED, flag, OPTION_FLOAT, value, NULL, help, reason)
#define REFUSED_STRING(flag, value, help, reason)                                                  \
    NO_FIELD(OPTION_REFUSED, flag, OPTION_STRING, value, NULL, help, reason)
#define REFUSED_STRINGS(flag, value, help, reason)                                                 \
    NO_FIELD(OPTION_REFUSED, flag, OPTION_STRINGS, value, NULL, help, reason)

#define MAX OPTION_NO_MAX
#define RANKS_LIMIT 65536
#define SIZE_LIMIT 16777216 /* of one dimension of a weight: products of three fit in int64 */

static const char hint_only[] = "a choice of kernel; cadre's result is the same either way";
static const char overlap_only[] = "a matter of overlap; the result is the same either way";
static const char no_collector[] = "cadre has no garbage collector and no caching allocator";
static const char one_cross_entropy[] = "cross entropy is always fused, in fp32";
static const char only_rope[] = "rope, learned_absolute and none are the positions cadre has";
static const char no_latent_attention[] = "multi-latent attention does not exist yet";
static const char no_fp16[] = "training is in fp32, or in bf16 with --bf16 (needs no loss scale)";
static const char no_fp8[] = "training is in fp32, or in bf16 with --bf16";
static const char fp32_states[] = "gradients, master weights and moments are kept in fp32";
static const char no_stragglers[] = "there is no straggler detector";
static const char no_rerun[] = "there is no automatic re-run of suspicious iterations";
static const char no_flex[] = "dispatchers are allgather, alltoall and alltoall_seq";
static const char one_graph[] = "use --cuda-graph-impl full_iteration";
static const char no_profiler[] = "run it under perf or nsys; --timing-log-level 2 has the timers";
static const char no_wandb[] = "use --tensorboard-dir; wandb can sync from it";
static const char no_fsdp[] = "use --use-distributed-optimizer";
static const char numbers_of_layers[] = "use --decoder-first-pipeline-num-layers and "
                                        "--decoder-last-pipeline-num-layers";
static const char convert_command[] = "use `cadre convert`";
static const char safetensors_only[] = "the checkpoint is sharded safetensors, written in place";
static const char no_bpe_files[] = "use a SentencePiece tokenizer (--tokenizer-model) or "
                                   "NullTokenizer";
static const char old_device_limit[] = "use --moe-router-num-groups (the expert-parallel size) and "
                                       "--moe-router-group-topk";

static const struct option_row rows[] = {
#define GROUP "model"
    MODEL_INT("--num-layers", num_layers, NULL, 1, OPTIONS_MAX_LAYERS, "transformer layers"),
    MODEL_INT("--hidden-size", hidden_size, NULL, 1, SIZE_LIMIT, "width of the residual stream"),
    MODEL_INT("--ffn-hidden-size", ffn_hidden_size, NULL, 1, SIZE_LIMIT,
              "width of the feed-forward layer; 4 x hidden size if not given, with --swiglu 2/3 of "
              "that, rounded down to a multiple of 64"),
    MODEL_INT("--num-attention-heads", num_attention_heads, NULL, 1, SIZE_LIMIT, "attention heads"),
    MODEL_INT("--kv-channels", kv_channels, NULL, 1, SIZE_LIMIT,
              "size of a head; hidden size / heads if not given"),
    MODEL_SWITCH("--group-query-attention", group_query_attention,
                 "share keys and values between heads (see --num-query-groups)"),
    MODEL_INT("--num-query-groups", num_query_groups, "1", 1, SIZE_LIMIT,
              "key-value heads; needs --group-query-attention, else as many as heads"),
    MODEL_INT("--seq-length", seq_length, NULL, 1, SIZE_LIMIT, "tokens in a sequence"),
    MODEL_INT("--max-position-embeddings", max_position_embeddings, NULL, 1, SIZE_LIMIT,
              "largest position the model knows; at least the sequence length"),
    INT("--encoder-num-layers", encoder_num_layers, NULL, 1, OPTIONS_MAX_LAYERS,
        "old spelling of --num-layers"),
    INT("--encoder-seq-length", encoder_seq_length, NULL, 1, SIZE_LIMIT,
        "old spelling of --seq-length"),
    MODEL_CHOICE("--position-embedding-type", position_embedding_type, "learned_absolute",
                 "learned_absolute rope none", "how positions enter the model"),
    NO_SWITCH("--no-position-embedding", position_embedding,
              "old flag, accepted with rope only: no learned positions"),
    SWITCH("--use-rotary-position-embeddings", use_rotary_position_embeddings,
           "old spelling of --position-embedding-type rope"),
    MODEL_FLOAT("--rotary-base", rotary_base, "10000", 1, MAX, "rope: the base of the periods"),
    MODEL_FLOAT("--rotary-percent", rotary_percent, "1.0", OPTION_ABOVE_ZERO, 1,
                "rope: share of a head that is rotated"),
    MODEL_SWITCH("--rotary-interleaved", rotary_interleaved,
                 "rope: rotate neighbours (2i, 2i+1) instead of halves (i, i + d/2)"),
    MODEL_INT("--rotary-seq-len-interpolation-factor", rotary_seq_len_interpolation_factor, NULL, 1,
              MAX, "rope: divide positions by this"),
    MODEL_CHOICE("--normalization", normalization, "LayerNorm", "LayerNorm RMSNorm",
                 "kind of norm"),
    MODEL_FLOAT("--norm-epsilon", norm_epsilon, "1e-05", OPTION_ABOVE_ZERO, 1,
                "added to the variance in norms"),
    MODEL_SWITCH("--apply-layernorm-1p", apply_layernorm_1p,
                 "store norm weights as w, apply 1 + w"),
    MODEL_SWITCH("--swiglu", swiglu, "gated SiLU in the feed-forward layers (default: GELU)"),
    MODEL_SWITCH("--squared-relu", squared_relu, "squared ReLU in the feed-forward layers"),
    MODEL_SWITCH("--disable-bias-linear", disable_bias_linear, "no biases in linear layers"),
    MODEL_SWITCH("--untie-embeddings-and-output-weights", untie_embeddings_and_output_weights,
                 "give the output layer a weight of its own"),
    FLOAT("--attention-dropout", attention_dropout, "0.1", 0, OPTION_BELOW_ONE,
          "dropout of attention probabilities"),
    FLOAT("--hidden-dropout", hidden_dropout, "0.1", 0, OPTION_BELOW_ONE,
          "dropout after the embedding, attention and feed-forward layers"),
    FLOAT("--init-method-std", init_method_std, "0.02", 0, 1e6,
          "standard deviation of initial weights"),
    MODEL_INT("--make-vocab-size-divisible-by", make_vocab_size_divisible_by, "128", 1, SIZE_LIMIT,
              "the vocabulary is padded to a multiple of this times the tensor-parallel size"),
    REFUSED("--use-rope-scaling", "Llama 3.1 frequency scaling", only_rope),
    REFUSED_FLOAT("--rope-scaling-factor", "8.0", "its factor", only_rope),
    REFUSED("--openai-gelu", "OpenAI's GELU", "activations are GELU, --swiglu, --squared-relu"),
    REFUSED("--add-qkv-bias", "bias in QKV only", "biases are on everywhere or nowhere"),
    REFUSED("--qk-layernorm", "norm on queries and keys", "attention has no such norm"),
    REFUSED("--multi-latent-attention", "multi-latent attention", no_latent_attention),
    REFUSED_INT("--q-lora-rank", NULL, "rank of latent queries", no_latent_attention),
    REFUSED_INT("--kv-lora-rank", "32", "rank of latent keys", no_latent_attention),
    REFUSED_INT("--qk-head-dim", "128", "unrotated part of a latent head", no_latent_attention),
    REFUSED_INT("--qk-pos-emb-head-dim", "64", "rotated part of a latent head",
                no_latent_attention),
    REFUSED_INT("--v-head-dim", "128", "size of a latent value head", no_latent_attention),
    REFUSED_FLOAT("--rotary-scaling-factor", "1.0", "yarn factor", no_latent_attention),
    REFUSED("--init-method-xavier-uniform", "Xavier initialisation", "weights start normal"),
    REFUSED_INT("--mtp-num-layers", NULL, "multi-token prediction depth",
                "the model predicts one token ahead"),
    REFUSED_FLOAT("--mtp-loss-scaling-factor", "0.1", "weight of its loss",
                  "the model predicts one token ahead"),
    ALWAYS("--use-mcore-models", "Megatron-Core's models", "they are what cadre implements"),
    ALWAYS_CHOICE("--transformer-impl", "transformer_engine", "local transformer_engine",
                  "kernel library of the layers", hint_only),
#undef GROUP

#define GROUP "moe"
    MODEL_INT("--num-experts", num_experts, NULL, 0, 65536,
              "experts in a mixture-of-experts layer; 0: dense"),
    MODEL_STRING("--moe-layer-freq", moe_layer_freq, "1",
                 "which layers have experts: n for every n-th from the first, or a list such as "
                 "([0]*3+[1]*5)"),
    MODEL_INT("--moe-ffn-hidden-size", moe_ffn_hidden_size, NULL, 1, SIZE_LIMIT,
              "width of an expert; --ffn-hidden-size if not given"),
    MODEL_INT("--moe-router-topk", moe_router_topk, "2", 1, 65536, "experts that a token goes to"),
    CHOICES("--moe-router-load-balancing-type", moe_router_load_balancing_type, "aux_loss",
            "aux_loss seq_aux_loss global_aux_loss sinkhorn none",
            "how experts are kept busy; several losses may be given"),
    FLOATS("--moe-aux-loss-coeff", moe_aux_loss_coeff, "0.0", 0, MAX,
           "weight of the balancing loss (1e-2 is a start), one for each type"),
    FLOAT("--moe-z-loss-coeff", moe_z_loss_coeff, NULL, 0, MAX,
          "weight of the router's z-loss (1e-3 is a start)"),
    FLOAT("--moe-input-jitter-eps", moe_input_jitter_eps, NULL, 0, OPTION_BELOW_ONE,
          "multiply the router's input by uniform noise in 1 - eps .. 1 + eps"),
    MODEL_SWITCH("--moe-router-pre-softmax", moe_router_pre_softmax,
                 "softmax over all experts before top-k, instead of over the chosen ones"),
    MODEL_CHOICE("--moe-router-score-function", moe_router_score_function, "softmax",
                 "softmax sigmoid", "from router logits to scores"),
    MODEL_FLOAT("--moe-router-topk-scaling-factor", moe_router_topk_scaling_factor, NULL,
                OPTION_ABOVE_ZERO, MAX, "multiplies the chosen probabilities"),
    MODEL_INT("--moe-router-num-groups", moe_router_num_groups, NULL, 1, 65536,
              "group-limited routing: number of expert groups"),
    MODEL_INT("--moe-router-group-topk", moe_router_group_topk, NULL, 1, 65536,
              "group-limited routing: groups a token may use"),
    MODEL_SWITCH("--moe-router-enable-expert-bias", moe_router_enable_expert_bias,
                 "balance by a bias on the scores instead of a loss (sigmoid scores)"),
    FLOAT("--moe-router-bias-update-rate", moe_router_bias_update_rate, "0.001", 0, MAX,
          "step of that bias"),
    SWITCH("--moe-router-force-load-balancing", moe_router_force_load_balancing,
           "benchmarks only: route at random, so that the load is even"),
    CHOICE("--moe-token-dispatcher-type", moe_token_dispatcher_type, "allgather",
           "allgather alltoall alltoall_seq", "how tokens travel to experts"),
    FLOAT("--moe-expert-capacity-factor", moe_expert_capacity_factor, NULL, OPTION_NO_MIN, MAX,
          "drop tokens beyond this times the even load; negative or not given: none dropped"),
    SWITCH("--moe-pad-expert-input-to-capacity", moe_pad_expert_input_to_capacity,
           "fixed-size expert inputs; needs --moe-expert-capacity-factor"),
    CHOICE("--moe-token-drop-policy", moe_token_drop_policy, "probs", "probs position",
           "drop the tokens of lowest probability, or the last ones"),
    FLOAT("--moe-expert-rank-capacity-factor", moe_expert_rank_capacity_factor, NULL, 1, MAX,
          "stop with a message when a rank's experts get more than this times the even load; not "
          "given: a rank takes whatever comes"),
    SWITCH("--moe-grouped-gemm", moe_grouped_gemm,
           "one grouped product over the local experts instead of a loop"),
    SWITCH("--moe-layer-recompute", moe_layer_recompute,
           "keep only the input of a moe layer, recompute it in backward"),
    SWITCH("--moe-per-layer-logging", moe_per_layer_logging,
           "write balancing metrics for every layer to TensorBoard"),
    MODEL_INT("--moe-shared-expert-intermediate-size", moe_shared_expert_intermediate_size, NULL, 1,
              SIZE_LIMIT, "total width of the experts that see every token"),
    SWITCH("--moe-shared-expert-overlap", moe_shared_expert_overlap,
           "run the shared experts while tokens travel; alltoall dispatcher only"),
    SWITCH("--moe-use-upcycling", moe_use_upcycling,
           "make a moe checkpoint from the dense one in --load, save it, train on"),
    INT("--moe-upcycling-granularity", moe_upcycling_granularity, "1", 1, 65536,
        "cut the dense feed-forward layer into so many experts"),
    SWITCH("--moe-extended-tp", moe_extended_tp,
           "shard every expert over tensor x expert ranks; allgather dispatcher only"),
    REFUSED("--moe-shared-expert-gate", "sigmoid gate on the shared expert",
            "the shared expert's output is added as it is"),
    REFUSED_INT("--moe-router-topk-limited-devices", NULL, "device-limited routing",
                old_device_limit),
    ALWAYS_CHOICE("--moe-router-dtype", "fp32", "fp32", "the router's arithmetic",
                  "the router always computes in fp32"),
    REFUSED_FLOAT("--moe-router-quantile-balancing-ema", "0.0", "quantile balancing",
                  "see --moe-router-load-balancing-type for what exists"),
    REFUSED_FLOAT("--moe-router-force-biased", NULL, "benchmarks: skewed routing",
                  "use --moe-router-force-load-balancing for benchmarks"),
    REFUSED("--moe-router-padding-for-quantization", "pad the routing map", no_fp8),
    ALWAYS("--moe-router-fusion", "fused router kernels", hint_only),
    ALWAYS("--moe-permute-fusion", "fused permute kernels", hint_only),
    REFUSED("--moe-apply-probs-on-input", "probabilities on the expert's input",
            "probabilities are applied to the activation, before the second product"),
    REFUSED_INT("--moe-latent-size", NULL, "latent experts", "experts work on the full width"),
    REFUSED("--moe-enable-deepep", "DeepEP dispatcher", no_flex),
    REFUSED_STRING("--moe-flex-dispatcher-backend", "deepep", "flex dispatcher", no_flex),
    REFUSED_INT("--moe-flex-dispatcher-num-sms", NULL, "flex dispatcher", no_flex),
    REFUSED("--moe-paged-stash", "paged activation stash", "there are no CUDA graphs to need it"),
    REFUSED("--moe-enable-routing-replay", "record and replay routing",
            "routing is deterministic, but not recorded"),
    REFUSED("--overlap-moe-expert-parallel-comm", "overlap of dispatch over microbatches",
            "use --moe-shared-expert-overlap"),
    REFUSED("--delay-wgrad-compute", "weight gradients apart from input gradients",
            "they are computed together"),
    REFUSED("--overlap-dispatch-backward-with-experts-wgrad", "local overlap in backward",
            "they are computed together"),
    REFUSED("--moe-single-grouped-weight", "one tensor for all local experts",
            "checkpoints name each expert's weights the same way for every implementation"),
#undef GROUP

#define GROUP "training"
    INT("--micro-batch-size", micro_batch_size, NULL, 1, SIZE_LIMIT,
        "sequences in one forward pass of a data-parallel rank"),
    INT("--global-batch-size", global_batch_size, NULL, 1, SIZE_LIMIT,
        "sequences in a step; micro batch x data-parallel size if not given"),
    INTS("--rampup-batch-size", rampup_batch_size, 0, MAX,
         "start, increment and samples: let the global batch grow over so many samples"),
    SWITCH("--decrease-batch-size-if-needed", decrease_batch_size_if_needed,
           "while ramping up, round the batch down to a multiple of micro batch x data-parallel"),
    INT("--train-iters", train_iters, NULL, 1, MAX, "iterations to train (or --train-samples)"),
    INT("--train-samples", train_samples, NULL, 1, MAX, "samples to train (or --train-iters)"),
    INT("--exit-interval", exit_interval, NULL, 1, MAX,
        "save and exit when the iteration is divisible by this"),
    INT("--exit-duration-in-mins", exit_duration_in_mins, NULL, 1, MAX,
        "save and exit after so many minutes"),
    SWITCH("--exit-signal-handler", exit_signal_handler, "save and exit on SIGTERM"),
    SWITCH("--skip-train", skip_train, "evaluate only"),
    INT("--eval-interval", eval_interval, "1000", 1, MAX, "iterations between validations"),
    INT("--eval-iters", eval_iters, "100", 0, MAX, "iterations of a validation; 0: none"),
    INT("--seed", seed, "1234", 0, 4294967295.0,
        "of weights, data order, dropout; the same run for the same seed"),
    SWITCH("--calculate-per-token-loss", calculate_per_token_loss,
           "weigh every token of the global batch alike, not every microbatch"),
    NO_SWITCH("--no-check-for-nan-in-loss-and-grad", check_for_nan_in_loss_and_grad,
              "go on when the loss or a gradient is not a number"),
    SWITCH("--recompute-activations", recompute_activations,
           "old spelling of --recompute-granularity selective"),
    CHOICE("--recompute-granularity", recompute_granularity, NULL, "full selective",
           "recompute in backward instead of keeping: whole layers, or --recompute-modules"),
    CHOICE("--recompute-method", recompute_method, NULL, "uniform block",
           "full: chunks of --recompute-num-layers layers, or only the first so many"),
    INT("--recompute-num-layers", recompute_num_layers, NULL, 1, OPTIONS_MAX_LAYERS,
        "full: layers in a chunk (uniform) or layers recomputed (block)"),
    CHOICES("--recompute-modules", recompute_modules, NULL, "core_attn moe",
            "selective: what is recomputed; core_attn if not given"),
    CHOICE("--dataloader-type", dataloader_type, "single", "single cyclic",
           "one pass in the data set's order, or shuffled epochs"),
    REFUSED("--data-parallel-random-init", "another start for each data-parallel rank",
            "the same seed gives the same weights under every mapping"),
    REFUSED("--distribute-saved-activations", "spread kept inputs over tensor ranks",
            "use --sequence-parallel"),
    ALWAYS("--use-flash-attn", "flash attention", "attention never stores its S x S matrix"),
    ALWAYS_CHOICE("--attention-backend", "auto", "auto flash fused unfused local",
                  "attention kernel", hint_only),
    ALWAYS_NO("--no-masked-softmax-fusion", "softmax kernel", hint_only),
    ALWAYS_NO("--no-bias-gelu-fusion", "GELU kernel", hint_only),
    ALWAYS_NO("--no-bias-swiglu-fusion", "SwiGLU kernel", hint_only),
    ALWAYS_NO("--no-bias-dropout-fusion", "dropout kernel", hint_only),
    ALWAYS_NO("--no-rope-fusion", "rope kernel", hint_only),
    ALWAYS_NO("--no-persist-layer-norm", "norm kernel", hint_only),
    ALWAYS_NO("--no-gradient-accumulation-fusion", "weight gradient kernel", hint_only),
    ALWAYS("--cross-entropy-loss-fusion", "loss kernel", one_cross_entropy),
    ALWAYS_CHOICE("--cross-entropy-fusion-impl", "native", "native te", "loss kernel",
                  one_cross_entropy),
    ALWAYS("--deterministic-mode", "the same bits in every run", "cadre is always deterministic"),
    ALWAYS("--manual-gc", "collect Python's garbage at fixed iterations", no_collector),
    ALWAYS_INT("--manual-gc-interval", "0", "iterations between collections", no_collector),
    ALWAYS_CHOICE("--empty-unused-memory-level", "0", "0 1 2", "give cached memory back",
                  no_collector),
    ALWAYS_INT("--train-sync-interval", NULL, "wait for the device every so many iterations",
               "on the CPU every operation is complete when the next begins"),
    REFUSED_INT("--check-weight-hash-across-dp-replicas-interval", NULL,
                "compare the replicas' weights", "compare `cadre inspect --hash` of checkpoints"),
    CHOICE("--cuda-graph-impl", cuda_graph_impl, "none",
           "none full_iteration local transformer_engine",
           "full_iteration: forward and backward of a step are one launch of a CUDA graph"),
    INT("--cuda-graph-warmup-steps", cuda_graph_warmup_steps, "3", 1, MAX,
        "steps of a run before the graph is captured"),
    REFUSED("--enable-cuda-graph", "a CUDA graph a layer", one_graph),
    REFUSED("--external-cuda-graph", "a CUDA graph a layer", one_graph),
    REFUSED_STRINGS("--cuda-graph-scope", NULL, "parts of a layer in CUDA graphs", one_graph),
    REFUSED_STRINGS("--cuda-graph-modules", NULL, "parts of a layer in CUDA graphs", one_graph),
    SWITCH("--profile", profile,
           "time ops and transfers of some steps on rank 0's device; table, Chrome trace, NVTX"),
    INT("--profile-step-start", profile_step_start, "10", 0, INT32_MAX,
        "steps before the first profiled one"),
    INT("--profile-step-end", profile_step_end, "12", 1, INT32_MAX, "the last profiled step"),
    REFUSED_STRINGS("--profile-ranks", "0", "profiled ranks", no_profiler),
    REFUSED("--use-pytorch-profiler", "PyTorch's profiler", no_profiler),
    REFUSED_STRINGS("--iterations-to-skip", NULL, "iterations without an update",
                    "every iteration trains"),
    REFUSED_INT("--eval-global-batch-size", NULL, "global batch of validation",
                "validation uses --global-batch-size"),
    REFUSED("--full-validation", "the whole validation set each time", "use --eval-iters"),
    REFUSED("--multiple-validation-sets", "report validation sets apart",
            "validation sets are blended into one figure"),
#undef GROUP

#define GROUP "optimizer"
    CHOICE("--optimizer", optimizer, "adam", "adam sgd", "update rule"),
    FLOAT("--adam-beta1", adam_beta1, "0.9", 0, OPTION_BELOW_ONE, "decay of the first moment"),
    FLOAT("--adam-beta2", adam_beta2, "0.999", 0, OPTION_BELOW_ONE, "decay of the second moment"),
    FLOAT("--adam-eps", adam_eps, "1e-08", 0, 1, "added to the root of the second moment"),
    FLOAT("--sgd-momentum", sgd_momentum, "0.9", 0, OPTION_BELOW_ONE, "momentum of sgd"),
    FLOAT("--clip-grad", clip_grad, "1.0", 0, MAX, "largest global gradient norm; 0: no clipping"),
    FLOAT("--weight-decay", weight_decay, "0.01", 0, MAX,
          "decoupled weight decay of all but biases and norm weights"),
    FLOAT("--start-weight-decay", start_weight_decay, NULL, 0, MAX,
          "weight decay at the start, where it changes"),
    FLOAT("--end-weight-decay", end_weight_decay, NULL, 0, MAX,
          "weight decay at the end, where it changes"),
    CHOICE("--weight-decay-incr-style", weight_decay_incr_style, "constant",
           "constant linear cosine", "how weight decay changes"),
    FLOAT("--lr", lr, NULL, 0, MAX, "highest learning rate"),
    FLOAT("--min-lr", min_lr, "0.0", 0, MAX, "lowest learning rate"),
    CHOICE("--lr-decay-style", lr_decay_style, "linear",
           "constant linear cosine inverse-square-root WSD",
           "shape of the learning rate after warmup"),
    INT("--lr-decay-iters", lr_decay_iters, NULL, 1, MAX,
        "iterations until --min-lr; --train-iters if not given"),
    INT("--lr-decay-samples", lr_decay_samples, NULL, 1, MAX,
        "samples until --min-lr; --train-samples if not given"),
    FLOAT("--lr-warmup-fraction", lr_warmup_fraction, NULL, 0, OPTION_BELOW_ONE,
          "warmup as a share of the decay length"),
    INT("--lr-warmup-iters", lr_warmup_iters, "0", 0, MAX, "iterations of linear warmup"),
    INT("--lr-warmup-samples", lr_warmup_samples, "0", 0, MAX, "samples of linear warmup"),
    FLOAT("--lr-warmup-init", lr_warmup_init, "0.0", 0, MAX, "learning rate at step 0"),
    CHOICE("--lr-wsd-decay-style", lr_wsd_decay_style, "exponential",
           "exponential linear cosine minus_sqrt", "WSD: shape of the final decay"),
    INT("--lr-wsd-decay-iters", lr_wsd_decay_iters, NULL, 1, MAX,
        "WSD: iterations of the final decay"),
    INT("--lr-wsd-decay-samples", lr_wsd_decay_samples, NULL, 1, MAX,
        "WSD: samples of the final decay"),
    SWITCH("--override-opt_param-scheduler", override_opt_param_scheduler,
           "on resume the command line's schedule wins over the checkpoint's"),
    SWITCH("--use-checkpoint-opt_param-scheduler", use_checkpoint_opt_param_scheduler,
           "on resume the checkpoint's schedule wins over the command line's"),
    REFUSED_FLOAT("--decoupled-lr", NULL, "learning rate of the embedding and output layer",
                  "all parameters share --lr"),
    REFUSED_FLOAT("--decoupled-min-lr", NULL, "its lowest value", "all parameters share --min-lr"),
    REFUSED("--use-precision-aware-optimizer", "optimizer states in low precision", fp32_states),
    REFUSED_STRING("--main-grads-dtype", "fp32", "type of gradients", fp32_states),
    REFUSED_STRING("--main-params-dtype", "fp32", "type of master weights", fp32_states),
    REFUSED_STRING("--exp-avg-dtype", "fp32", "type of the first moment", fp32_states),
    REFUSED_STRING("--exp-avg-sq-dtype", "fp32", "type of the second moment", fp32_states),
    REFUSED("--optimizer-cpu-offload", "optimizer on the CPU", "states live on the device"),
    REFUSED_FLOAT("--optimizer-offload-fraction", "1.0", "share of states offloaded",
                  "states live on the device"),
#undef GROUP

#define GROUP "precision"
    SWITCH("--bf16", bf16, "weights and activations in bf16; master weights and gradients in fp32"),
    REFUSED("--fp16", "fp16 with loss scaling", no_fp16),
    REFUSED_FLOAT("--loss-scale", NULL, "fixed loss scale", no_fp16),
    REFUSED_FLOAT("--initial-loss-scale", "4294967296", "first loss scale", no_fp16),
    REFUSED_FLOAT("--min-loss-scale", "1.0", "lowest loss scale", no_fp16),
    REFUSED_FLOAT("--loss-scale-window", "1000", "steps before it grows", no_fp16),
    REFUSED_INT("--hysteresis", "2", "overflows before it shrinks", no_fp16),
    ALWAYS("--accumulate-allreduce-grads-in-fp32", "gradients in fp32", fp32_states),
    REFUSED("--grad-reduce-in-bf16", "gradients in bf16", fp32_states),
    ALWAYS("--attention-softmax-in-fp32", "softmax in fp32", "softmax is always in fp32"),
    REFUSED("--apply-query-key-layer-scaling", "scale scores by the layer number",
            "it helps fp16 only, and training is in fp32 or bf16"),
    REFUSED("--fp16-lm-cross-entropy", "loss in fp16", one_cross_entropy),
    REFUSED("--fp32-residual-connection", "residual stream in fp32",
            "the residual stream has the type of the activations"),
    REFUSED_STRING("--fp8-format", NULL, "fp8 training", no_fp8),
    REFUSED_STRING("--fp8-recipe", NULL, "fp8 training", no_fp8),
    REFUSED("--fp8-param-gather", "fp8 training", no_fp8),
#undef GROUP

#define GROUP "parallel"
    INT("--tensor-model-parallel-size", tensor_model_parallel_size, "1", 1, RANKS_LIMIT,
        "ranks that share the matrices of a layer"),
    INT("--pipeline-model-parallel-size", pipeline_model_parallel_size, "1", 1, RANKS_LIMIT,
        "pipeline stages"),
    INT("--context-parallel-size", context_parallel_size, "1", 1, RANKS_LIMIT,
        "ranks that share a sequence"),
    INT("--expert-model-parallel-size", expert_model_parallel_size, "1", 1, RANKS_LIMIT,
        "ranks that share the experts of a layer"),
    INT("--expert-tensor-parallel-size", expert_tensor_parallel_size, NULL, 1, RANKS_LIMIT,
        "ranks that share the matrices of an expert; the tensor-parallel size if not given"),
    INT("--num-layers-per-virtual-pipeline-stage", num_layers_per_virtual_pipeline_stage, NULL, 1,
        OPTIONS_MAX_LAYERS, "layers in a model chunk of the interleaved schedule"),
    INT("--num-virtual-stages-per-pipeline-rank", num_virtual_stages_per_pipeline_rank, NULL, 1,
        OPTIONS_MAX_LAYERS, "the same, given as chunks on a pipeline stage"),
    INT("--microbatch-group-size-per-virtual-pipeline-stage",
        microbatch_group_size_per_virtual_pipeline_stage, NULL, 1, MAX,
        "interleaved schedule: microbatches that pass a chunk before the next chunk's turn; the "
        "pipeline size if not given"),
    INT("--decoder-first-pipeline-num-layers", decoder_first_pipeline_num_layers, NULL, 1,
        OPTIONS_MAX_LAYERS, "layers of the first stage; the other stages share the rest evenly"),
    INT("--decoder-last-pipeline-num-layers", decoder_last_pipeline_num_layers, NULL, 1,
        OPTIONS_MAX_LAYERS, "layers of the last stage; the other stages share the rest evenly"),
    SWITCH("--sequence-parallel", sequence_parallel,
           "split norms and dropout over tensor ranks too; off with one tensor rank"),
    SWITCH("--tp-comm-overlap", tp_comm_overlap,
           "sequence parallelism: exchange tokens in pieces, during the products they feed"),
    {.group = GROUP,
     .flag = "--cp-comm-type",
     .type = OPTION_STRINGS,
     .offset = FIELD(cp_comm_type, struct option_strings),
     .default_text = "p2p",
     .help = "context parallelism: p2p (keys and values go round a ring), all_gather (each rank "
             "gets all of them) or a2a (heads for positions); one for all layers, or one for each"},
    SWITCH("--use-distributed-optimizer", use_distributed_optimizer,
           "shard optimizer states over data-parallel ranks"),
    SWITCH("--overlap-grad-reduce", overlap_grad_reduce, "reduce gradients during backward"),
    SWITCH("--overlap-param-gather", overlap_param_gather,
           "gather updated parameters during forward; needs the distributed optimizer"),
    NO_SWITCH("--no-overlap-p2p-communication", overlap_p2p_communication,
              "interleaved schedule: send and receive one after the other"),
    SWITCH("--use-tp-pp-dp-mapping", use_tp_pp_dp_mapping,
           "number ranks with pipeline stages before data-parallel replicas"),
    INT("--ddp-bucket-size", ddp_bucket_size, NULL, 1, MAX, "parameters in a gradient bucket"),
    CHOICE(
        "--distributed-backend", distributed_backend, "nccl", "nccl gloo",
        "how GPUs exchange tensors: NCCL, where every rank has a GPU of its own and the library is "
        "installed, else MPI; or through the host (gloo), which is always MPI"),
    SWITCH(
        "--fake-init-process-group", fake_init_process_group,
        "one process plays rank RANK of WORLD_SIZE (environment); the others are made up: for the "
        "memory and speed of a mapping, losses mean nothing"),
    ALWAYS_INT("--local-rank", "0", "set by some launchers", "the rank comes from the launcher"),
    FLOAT("--distributed-timeout-minutes", distributed_timeout_minutes, "10", OPTION_ABOVE_ZERO,
          MAX, "the job is stopped when a rank waits longer than this for another; 0.5 is legal"),
    SWITCH("--log-comm", log_comm, "print the calls and bytes of a step, by group and collective"),
    REFUSED("--ddp-average-in-collective", "average inside the collective",
            "gradients are scaled before they are summed"),
    ALWAYS_NO("--no-align-grad-reduce", "alignment of gradient reduction over stages",
              overlap_only),
    ALWAYS_NO("--no-align-param-gather", "alignment of parameter gathers over stages",
              overlap_only),
    ALWAYS_NO("--no-async-tensor-model-parallel-allreduce", "overlap of a tensor-parallel sum",
              overlap_only),
    REFUSED("--overlap-param-gather-with-optimizer-step", "gather during the optimizer step",
            "use --overlap-param-gather"),
    REFUSED_STRING("--pipeline-model-parallel-layout", NULL, "layers of every stage",
                   numbers_of_layers),
    REFUSED("--account-for-embedding-in-pipeline-split", "count the embedding as a layer",
            numbers_of_layers),
    REFUSED("--account-for-loss-in-pipeline-split", "count the loss as a layer", numbers_of_layers),
    REFUSED("--standalone-embedding-stage", "embedding on a stage of its own", numbers_of_layers),
    REFUSED_STRINGS("--hierarchical-context-parallel-sizes", NULL, "context parallelism in levels",
                    "context parallelism has one level"),
    REFUSED_INT("--num-distributed-optimizer-instances", "1", "replicas of optimizer shards",
                "states are sharded over all data-parallel ranks"),
    REFUSED_STRING("--data-parallel-sharding-strategy", "optim_grads_params", "FSDP", no_fsdp),
    REFUSED("--use-megatron-fsdp", "FSDP", no_fsdp),
    REFUSED("--defer-embedding-wgrad-compute", "output layer's weight gradient at the end",
            "it is computed with the rest"),
#undef GROUP

#define GROUP "data"
    STRINGS("--data-path", data_path,
            "data sets (path without .bin), or weight path pairs; cut by --split"),
    STRINGS("--train-data-path", train_data_path, "the same for training only"),
    STRINGS("--valid-data-path", valid_data_path, "the same for validation only"),
    STRINGS("--test-data-path", test_data_path, "the same for testing only"),
    SWITCH("--mock-data", mock_data, "made-up data"),
    STRING("--split", split, NULL,
           "shares of training, validation, test of --data-path; 969, 30, 1 if not given"),
    STRING("--data-cache-path", data_cache_path, NULL,
           "where sample indices are cached; beside the data if not given"),
    MODEL_CHOICE("--tokenizer-type", tokenizer_type, NULL,
                 "Llama2Tokenizer SentencePieceTokenizer GPTSentencePieceTokenizer NullTokenizer",
                 "kind of tokenizer; NullTokenizer: text is token numbers"),
    MODEL_STRING("--tokenizer-model", tokenizer_model, NULL, "the tokenizer's file"),
    MODEL_INT("--vocab-size", vocab_size, NULL, 1, SIZE_LIMIT, "vocabulary of NullTokenizer"),
    SWITCH("--reset-position-ids", reset_position_ids,
           "count positions from each document's start"),
    SWITCH("--reset-attention-mask", reset_attention_mask, "attend within a document only"),
    SWITCH("--eod-mask-loss", eod_mask_loss, "no loss where the input is an end of document"),
    INT("--num-workers", num_workers, "2", 0, 1024, "threads that prepare batches ahead; 0: none"),
    ALWAYS_INT("--num-dataset-builder-threads", "1", "threads that build indices",
               "indices are built as fast as the disk delivers, with the same result"),
    ALWAYS_NO("--no-create-attention-mask-in-dataloader", "no mask in the batch",
              "the causal mask is never stored"),
    REFUSED_NO("--no-mmap-bin-files", "read instead of map", "data is always mapped"),
    REFUSED_STRING("--vocab-file", NULL, "GPT-2 or BERT vocabulary", no_bpe_files),
    REFUSED_STRING("--merge-file", NULL, "GPT-2 merges", no_bpe_files),
    REFUSED_INT("--vocab-extra-ids", "0", "extra tokens", "the tokenizer's file lists all tokens"),
    REFUSED_STRING("--tiktoken-pattern", NULL, "Tiktoken pattern", no_bpe_files),
    REFUSED_STRING("--s3-cache-path", NULL, "index cache of S3 data", "data is read from files"),
#undef GROUP

#define GROUP "checkpoint"
    STRING("--save", save, NULL, "directory to save checkpoints in"),
    INT("--save-interval", save_interval, NULL, 1, MAX, "iterations between checkpoints"),
    STRING("--load", load, NULL, "directory to resume from"),
    INT("--ckpt-step", ckpt_step, "-1", 0, MAX, "load this iteration; -1: the newest"),
    SWITCH("--finetune", finetune, "load weights only, start at iteration 0"),
    STRING("--pretrained-checkpoint", pretrained_checkpoint, NULL,
           "with --finetune: loaded where --load has no checkpoint"),
    NO_SWITCH("--no-load-optim", load_optim, "load neither optimizer nor learning-rate schedule"),
    NO_SWITCH("--no-load-rng", load_rng, "do not load the random state"),
    NO_SWITCH("--no-save-optim", save_optim, "leave the optimizer out of checkpoints"),
    NO_SWITCH("--no-save-rng", save_rng, "leave the random state out of checkpoints"),
    SWITCH("--exit-on-missing-checkpoint", exit_on_missing_checkpoint,
           "fail if --load has no checkpoint, instead of starting anew"),
    SWITCH("--use-checkpoint-args", use_checkpoint_args,
           "take the model's flags from the checkpoint; typed ones win"),
    CHOICE("--ckpt-format", ckpt_format, "torch_dist", "torch_dist",
           "distributed checkpoint: in cadre, sharded safetensors"),
    ALWAYS("--auto-detect-ckpt-format", "find out what --load holds",
           "cadre always looks at what is there"),
    ALWAYS_NO("--no-ckpt-fully-parallel-save", "who writes what",
              "every box is written once; the checkpoint is the same"),
    ALWAYS("--ckpt-fully-parallel-load", "who reads what", "every rank reads its own boxes"),
    ALWAYS("--ckpt-assume-constant-structure", "keep the plan of a save",
           "the plan is the parameter list"),
    ALWAYS("--dist-ckpt-optim-fully-reshardable", "optimizer states free of the mapping",
           "optimizer states are always saved as boxes of global tensors"),
    REFUSED_STRING("--dist-ckpt-strictness", "assume_ok_unexpected", "policy for unknown tensors",
                   "a missing or misshapen tensor is always an error"),
    REFUSED("--async-save", "save in the background", "saving is complete when training goes on"),
    REFUSED("--use-persistent-ckpt-worker", "keep the background writer",
            "saving is complete when training goes on"),
    REFUSED("--no-initialization", "leave weights uninitialised", "weights are always initialised"),
    REFUSED_STRING("--ckpt-convert-format", NULL, "convert and exit", convert_command),
    REFUSED_STRING("--ckpt-convert-save", NULL, "where to convert to", convert_command),
    REFUSED_INT("--non-persistent-save-interval", NULL, "iterations between cheap checkpoints",
                safetensors_only),
    REFUSED_STRING("--non-persistent-ckpt-type", NULL, "kind of cheap checkpoints",
                   safetensors_only),
    REFUSED_INT("--save-retain-interval", NULL, "which checkpoints to keep",
                "no checkpoint is ever deleted"),
    REFUSED("--load-main-params-from-ckpt", "master weights from model weights",
            "use --no-load-optim"),
#undef GROUP

#define GROUP "logging"
    INT("--log-interval", log_interval, "100", 1, MAX, "iterations between log lines"),
    SWITCH("--log-throughput", log_throughput, "add TFLOP/s to log lines"),
    SWITCH("--log-params-norm", log_params_norm, "add the norm of the parameters"),
    SWITCH("--log-num-zeros-in-grad", log_num_zeros_in_grad,
           "add the number of gradient elements that are zero"),
    INT("--timing-log-level", timing_log_level, "0", 0, 2,
        "timers: 0 the iteration, 1 its main parts, 2 every pass"),
    CHOICE("--timing-log-option", timing_log_option, "minmax", "max minmax all",
           "timers over ranks"),
    STRING("--tensorboard-dir", tensorboard_dir, NULL, "where TensorBoard events go"),
    INT("--tensorboard-log-interval", tensorboard_log_interval, "1", 1, MAX,
        "iterations between TensorBoard points"),
    SWITCH("--log-timers-to-tensorboard", log_timers_to_tensorboard, "write timers"),
    NO_SWITCH("--no-log-loss-scale-to-tensorboard", log_loss_scale_to_tensorboard,
              "leave the loss scale out"),
    SWITCH("--log-validation-ppl-to-tensorboard", log_validation_ppl_to_tensorboard,
           "write validation perplexity"),
    SWITCH("--log-memory-to-tensorboard", log_memory_to_tensorboard, "write memory use"),
    SWITCH("--log-world-size-to-tensorboard", log_world_size_to_tensorboard,
           "write the number of ranks"),
    ALWAYS_INT("--tensorboard-queue-size", "1000", "points kept before they are written",
               "points are written with every log line"),
    ALWAYS_NO("--no-barrier-with-level-1-timing", "no barrier around timers",
              "timers never wait for other ranks"),
    REFUSED_STRING("--wandb-project", NULL, "Weights & Biases", no_wandb),
    REFUSED_STRING("--wandb-exp-name", NULL, "Weights & Biases", no_wandb),
    REFUSED("--log-progress", "progress.txt", "log lines carry the progress"),
    REFUSED_INT("--logging-level", NULL, "level of Python's logging", "there is one level"),
    REFUSED("--log-straggler", "straggler detector", no_stragglers),
    REFUSED("--disable-straggler-on-startup", "straggler detector", no_stragglers),
    REFUSED_INT("--straggler-ctrlr-port", "65535", "straggler detector", no_stragglers),
    REFUSED_INT("--straggler-minmax-count", "1", "straggler detector", no_stragglers),
    REFUSED("--enable-ft-package", "heartbeats", "restart the same command; it resumes"),
    REFUSED_STRING("--rerun-mode", "disabled", "re-run suspicious iterations", no_rerun),
    REFUSED_INT("--error-injection-rate", "0", "fault injection", no_rerun),
    REFUSED_STRING("--error-injection-type", "transient_error", "fault injection", no_rerun),
    REFUSED("--check-for-spiky-loss", "re-run on a spike", no_rerun),
    REFUSED("--check-for-large-grads", "re-run on a large gradient", no_rerun),
#undef GROUP

#define GROUP "machine"
    CHOICE("--device", device, "auto", "cpu cuda auto", "where to compute"),
    {.environment = "OMP_NUM_THREADS",
     INT_BODY("--num-threads", num_threads, "0", 0, 65536, "CPU threads; 0: all cores")},
    SWITCH("--print-config", print_config, "print every value and where it comes from, then exit"),
#undef GROUP
};

const struct option_table options_table = OPTION_TABLE(
    "pretrain", "Trains a transformer, dense or with mixture-of-experts layers, on text.", rows);

_Static_assert(sizeof(rows) / sizeof(rows[0]) <= OPTIONS_MAX_ROWS, "raise OPTIONS_MAX_ROWS");
