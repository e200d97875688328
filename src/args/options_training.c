/* The rules of a training run: batch, length, learning rate, recompute, data, checkpoints. */
#include <string.h>

#include "args/options.h"
#include "args/options_rules.h"
#include "base/check.h"
#include "base/log.h"

/* Batch sizes must be whole microbatches on every data-parallel rank (M4.5.2). */
static int check_batch(const struct options *o, const char *what, int64_t size)
{
    const int64_t unit = o->micro_batch_size * o->data_parallel_size;

    if (size % unit != 0) {
        return error_set("%s (%lld) is not divisible by micro batch size (%lld) times data "
                         "parallel size (%lld): legal are multiples of %lld",
                         what, (long long)size, (long long)o->micro_batch_size,
                         (long long)o->data_parallel_size, (long long)unit);
    }
    return 0;
}

static int check_rampup(const struct options *o)
{
    const int64_t *ramp = o->rampup_batch_size.items; /* start, increment, samples */

    if (o->rampup_batch_size.num_items != 3) {
        return error_set("--rampup-batch-size has %d values: must be three, start increment "
                         "samples",
                         o->rampup_batch_size.num_items);
    }
    if (ramp[0] < 1 || ramp[1] < 1 || ramp[0] > o->global_batch_size ||
        (o->global_batch_size - ramp[0]) % ramp[1] != 0) {
        return error_set("--rampup-batch-size %lld %lld %lld: the start must be positive and at "
                         "most --global-batch-size %lld, and their difference a multiple of the "
                         "increment",
                         (long long)ramp[0], (long long)ramp[1], (long long)ramp[2],
                         (long long)o->global_batch_size);
    }
    if (o->decrease_batch_size_if_needed) {
        return 0;
    }
    TRY(check_batch(o, "--rampup-batch-size's start", ramp[0]));
    return check_batch(o, "--rampup-batch-size's increment", ramp[1]);
}

/* Section 5.5: the interleaved schedule goes through microbatches in groups; what is left over for
 * the last one must keep all stages busy, too. */
static int check_groups(const struct options *o, int64_t batch_size)
{
    const int64_t pp = o->pipeline_model_parallel_size;
    const int64_t unit = o->micro_batch_size * o->data_parallel_size;
    const int64_t num_microbatches = batch_size / unit;
    const int64_t group = o->microbatch_group_size_per_virtual_pipeline_stage;

    if (num_microbatches >= group &&
        (num_microbatches % group == 0 || num_microbatches % group >= pp)) {
        return 0;
    }
    if (group == pp) {
        return error_set("number of microbatches (%lld) is not divisible by "
                         "--pipeline-model-parallel-size (%lld) when using interleaved schedule: "
                         "global batch size %lld; legal are multiples of %lld",
                         (long long)num_microbatches, (long long)pp, (long long)batch_size,
                         (long long)(unit * pp));
    }
    return error_set("number of microbatches (%lld, of global batch size %lld) in groups of %lld "
                     "(--microbatch-group-size-per-virtual-pipeline-stage): must be at least one "
                     "group, and leave none or at least %lld (--pipeline-model-parallel-size)",
                     (long long)num_microbatches, (long long)batch_size, (long long)group,
                     (long long)pp);
}

/* Every size that the batch will have. */
static int check_interleaving(struct options *o)
{
    const int64_t *ramp = o->rampup_batch_size.items;
    const int64_t pp = o->pipeline_model_parallel_size;

    options_derive_int(o, "--microbatch-group-size-per-virtual-pipeline-stage",
                       &o->microbatch_group_size_per_virtual_pipeline_stage, pp);
    if (o->virtual_pipeline_size == 1) {
        return 0;
    }
    if (o->microbatch_group_size_per_virtual_pipeline_stage < pp) {
        return error_set(
            "--microbatch-group-size-per-virtual-pipeline-stage %lld: must be at least "
            "--pipeline-model-parallel-size %lld",
            (long long)o->microbatch_group_size_per_virtual_pipeline_stage, (long long)pp);
    }
    if (o->rampup_batch_size.num_items > 0) {
        for (int64_t size = ramp[0]; size < o->global_batch_size; size += ramp[1]) {
            TRY(check_groups(o, size));
        }
    }
    return check_groups(o, o->global_batch_size);
}

static int validate_batch(struct options *o)
{
    if (o->micro_batch_size == 0) {
        return error_set("missing: --micro-batch-size");
    }
    options_derive_int(o, "--global-batch-size", &o->global_batch_size,
                       o->micro_batch_size * o->data_parallel_size);
    if (!o->decrease_batch_size_if_needed) {
        TRY(check_batch(o, "global batch size", o->global_batch_size));
    } else if (o->global_batch_size < o->micro_batch_size * o->data_parallel_size) {
        return check_batch(o, "global batch size", o->global_batch_size);
    }
    if (o->rampup_batch_size.num_items > 0) {
        TRY(check_rampup(o));
    }
    return check_interleaving(o);
}

/* M4.5.6: a run is counted in iterations or in samples, and so is everything in it. */
static int check_family(const struct options *o)
{
    const struct {
        const char *flag;
        bool used;
        bool by_samples;
    } flags[] = {
        {"--lr-decay-iters", o->lr_decay_iters > 0, false},
        {"--lr-warmup-iters", o->lr_warmup_iters > 0, false},
        {"--lr-wsd-decay-iters", o->lr_wsd_decay_iters > 0, false},
        {"--lr-decay-samples", o->lr_decay_samples > 0, true},
        {"--lr-warmup-samples", o->lr_warmup_samples > 0, true},
        {"--lr-wsd-decay-samples", o->lr_wsd_decay_samples > 0, true},
        {"--rampup-batch-size", o->rampup_batch_size.num_items > 0, true},
    };
    const bool by_samples = o->train_samples > 0;

    if (o->train_iters > 0 && o->train_samples > 0) {
        return error_set("--train-iters %lld and --train-samples %lld: give one",
                         (long long)o->train_iters, (long long)o->train_samples);
    }
    if (o->train_iters == 0 && o->train_samples == 0 && !o->skip_train) {
        return error_set("missing: --train-iters or --train-samples");
    }
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        if (flags[i].used && flags[i].by_samples != by_samples) {
            return error_set("%s cannot be used with %s: a run is counted in iterations or in "
                             "samples, not both",
                             flags[i].flag, by_samples ? "--train-samples" : "--train-iters");
        }
    }
    return 0;
}

/* Section 6.6: the warmup must end before the decay does. */
static int check_schedule_lengths(struct options *o)
{
    const bool by_samples = o->train_samples > 0;
    const char *unit = by_samples ? "samples" : "iters";
    int64_t warmup, decay, tail;

    options_derive_int(o, by_samples ? "--lr-decay-samples" : "--lr-decay-iters",
                       by_samples ? &o->lr_decay_samples : &o->lr_decay_iters,
                       by_samples ? o->train_samples : o->train_iters);
    warmup = by_samples ? o->lr_warmup_samples : o->lr_warmup_iters;
    decay = by_samples ? o->lr_decay_samples : o->lr_decay_iters;
    tail = by_samples ? o->lr_wsd_decay_samples : o->lr_wsd_decay_iters;
    if (o->lr_warmup_fraction > 0 && warmup > 0) {
        return error_set("--lr-warmup-fraction %g and --lr-warmup-%s %lld: give one",
                         o->lr_warmup_fraction, unit, (long long)warmup);
    }
    if (decay > 0 && warmup >= decay) {
        return error_set("--lr-warmup-%s %lld: must be less than --lr-decay-%s %lld", unit,
                         (long long)warmup, unit, (long long)decay);
    }
    if (strcmp(o->lr_decay_style, "WSD") == 0 && (tail == 0 || tail > decay)) {
        return error_set("--lr-decay-style WSD needs --lr-wsd-decay-%s from 1 to --lr-decay-%s "
                         "%lld, found %lld",
                         unit, unit, (long long)decay, (long long)tail);
    }
    return 0;
}

/* M4.5.11 */
static int check_learning_rates(const struct options *o)
{
    if (!options_given(o, "--lr")) {
        return o->skip_train ? 0 : error_set("missing: --lr");
    }
    if (o->min_lr > o->lr) {
        return error_set("--min-lr %g is more than --lr %g", o->min_lr, o->lr);
    }
    if (o->lr_warmup_init > o->lr) {
        return error_set("--lr-warmup-init %g is more than --lr %g", o->lr_warmup_init, o->lr);
    }
    return 0;
}

static int validate_weight_decay(struct options *o)
{
    const bool start = options_given(o, "--start-weight-decay");
    const bool end = options_given(o, "--end-weight-decay");

    if (strcmp(o->weight_decay_incr_style, "constant") == 0) {
        if (start || end) {
            return error_set("%s needs --weight-decay-incr-style linear or cosine, found constant",
                             start ? "--start-weight-decay" : "--end-weight-decay");
        }
        options_derive_float(o, "--start-weight-decay", &o->start_weight_decay, o->weight_decay);
        options_derive_float(o, "--end-weight-decay", &o->end_weight_decay, o->weight_decay);
        return 0;
    }
    if (!start || !end) {
        return error_set("--weight-decay-incr-style %s needs --start-weight-decay and "
                         "--end-weight-decay",
                         o->weight_decay_incr_style);
    }
    if (o->start_weight_decay > o->end_weight_decay) {
        return error_set("--start-weight-decay %g is more than --end-weight-decay %g",
                         o->start_weight_decay, o->end_weight_decay);
    }
    return 0;
}

static int validate_optimizer(struct options *o)
{
    const bool adam = strcmp(o->optimizer, "adam") == 0;
    const bool wsd = strcmp(o->lr_decay_style, "WSD") == 0;

    TRY(check_family(o));
    TRY(check_schedule_lengths(o));
    TRY(check_learning_rates(o));
    TRY(validate_weight_decay(o));
    if (o->override_opt_param_scheduler && o->use_checkpoint_opt_param_scheduler) {
        return error_set("--override-opt_param-scheduler and "
                         "--use-checkpoint-opt_param-scheduler: give one");
    }
    options_warn_unless(o, "--adam-beta1", adam, "--optimizer adam");
    options_warn_unless(o, "--adam-beta2", adam, "--optimizer adam");
    options_warn_unless(o, "--adam-eps", adam, "--optimizer adam");
    options_warn_unless(o, "--sgd-momentum", !adam, "--optimizer sgd");
    options_warn_unless(o, "--lr-wsd-decay-style", wsd, "--lr-decay-style WSD");
    options_warn_unless(o, "--lr-wsd-decay-iters", wsd, "--lr-decay-style WSD");
    options_warn_unless(o, "--lr-wsd-decay-samples", wsd, "--lr-decay-style WSD");
    return 0;
}

static int fold_recompute_activations(struct options *o)
{
    if (!o->recompute_activations) {
        return 0;
    }
    if (o->recompute_granularity != NULL && strcmp(o->recompute_granularity, "selective") != 0) {
        return error_set("--recompute-activations means --recompute-granularity selective, found "
                         "%s",
                         o->recompute_granularity);
    }
    return options_derive_text(o, "--recompute-granularity", "selective");
}

/* M4.5.21 */
static int check_full_recompute(const struct options *o)
{
    if (o->recompute_method == NULL) {
        return error_set("--recompute-granularity full needs --recompute-method uniform or block");
    }
    if (o->recompute_num_layers == 0) {
        return error_set("--recompute-method %s needs --recompute-num-layers", o->recompute_method);
    }
    if (o->recompute_num_layers > o->num_layers) {
        return error_set("--recompute-num-layers %lld is more than --num-layers %lld",
                         (long long)o->recompute_num_layers, (long long)o->num_layers);
    }
    if (o->recompute_modules.num_items > 0) {
        return error_set("--recompute-modules %s needs --recompute-granularity selective, found "
                         "full",
                         o->recompute_modules.items[0]);
    }
    return 0;
}

static int validate_recompute(struct options *o)
{
    const char *granularity;

    TRY(fold_recompute_activations(o));
    granularity = o->recompute_granularity;
    if (granularity != NULL && strcmp(granularity, "full") == 0) {
        return check_full_recompute(o);
    }
    if (o->recompute_method != NULL) {
        return error_set("--recompute-method %s needs --recompute-granularity full, found %s",
                         o->recompute_method, granularity == NULL ? "none" : granularity);
    }
    if (o->recompute_num_layers > 0) {
        return error_set("--recompute-num-layers %lld needs --recompute-granularity full",
                         (long long)o->recompute_num_layers);
    }
    if (granularity == NULL) {
        options_warn_unless(o, "--recompute-modules", false, "--recompute-granularity selective");
        return 0;
    }
    if (o->recompute_modules.num_items == 0) {
        return options_derive_text(o, "--recompute-modules", "core_attn");
    }
    return 0;
}

/* M4.5.19 */
static int validate_data(struct options *o)
{
    const bool per_split = o->train_data_path.num_items > 0 || o->valid_data_path.num_items > 0 ||
                           o->test_data_path.num_items > 0;
    const bool whole = o->data_path.num_items > 0;
    const int num_sources = o->mock_data + whole + per_split;

    if (num_sources != 1) {
        return error_set("a single data source must be provided, found %d:%s%s%s; legal: one of "
                         "--data-path, --train/valid/test-data-path, --mock-data",
                         num_sources, whole ? " --data-path" : "",
                         per_split ? " --train/valid/test-data-path" : "",
                         o->mock_data ? " --mock-data" : "");
    }
    if (per_split && o->train_data_path.num_items == 0 && !o->skip_train) {
        return error_set("missing: --train-data-path (beside --valid-data-path or "
                         "--test-data-path)");
    }
    if (per_split && options_given(o, "--split")) {
        return error_set("--split %s needs --data-path: --train/valid/test-data-path are split "
                         "already",
                         o->split);
    }
    if (whole && o->split == NULL) {
        log_warn("--split is not given: using 969, 30, 1 for --data-path");
        return options_derive_text(o, "--split", "969, 30, 1");
    }
    return 0;
}

static int validate_tokenizer(struct options *o)
{
    if (o->tokenizer_type == NULL) {
        if (o->vocab_size == 0) {
            return error_set("missing: --tokenizer-type (with --tokenizer-model, or NullTokenizer "
                             "with --vocab-size)");
        }
        TRY(options_derive_text(o, "--tokenizer-type", "NullTokenizer"));
    }
    if (strcmp(o->tokenizer_type, "NullTokenizer") == 0) {
        options_warn_unless(o, "--tokenizer-model", false, "a tokenizer type that reads one");
        return o->vocab_size > 0 ? 0
                                 : error_set("--tokenizer-type NullTokenizer needs --vocab-size");
    }
    options_warn_unless(o, "--vocab-size", false, "--tokenizer-type NullTokenizer");
    return o->tokenizer_model != NULL
               ? 0
               : error_set("--tokenizer-type %s needs --tokenizer-model", o->tokenizer_type);
}

/* M4.5.17 */
static int validate_upcycling(struct options *o)
{
    if (!o->moe_use_upcycling) {
        return 0;
    }
    if (o->save == NULL) {
        return error_set("--moe-use-upcycling: the --save option must be specified, it is where "
                         "the new checkpoint goes");
    }
    if (o->load == NULL) {
        return error_set("--moe-use-upcycling: --load must name the dense checkpoint");
    }
    if (o->load_optim) {
        log_warn("upcycling starts with a fresh optimizer: --no-load-optim is on");
        o->load_optim = false;
        options_mark_derived(o, "--no-load-optim");
    }
    if (o->load_rng) {
        log_warn("upcycling starts with a fresh random state: --no-load-rng is on");
        o->load_rng = false;
        options_mark_derived(o, "--no-load-rng");
    }
    return 0;
}

/* M4.5.11 */
static int validate_checkpoint(struct options *o)
{
    if (o->fake_init_process_group && o->save != NULL) {
        return error_set("--save %s with --fake-init-process-group: what an emulated rank computes "
                         "is no training; leave one out",
                         o->save);
    }
    if (o->save != NULL && o->save_interval == 0) {
        return error_set("--save %s needs --save-interval", o->save);
    }
    if (o->use_checkpoint_args && o->load == NULL) {
        return error_set("--use-checkpoint-args needs --load");
    }
    if (o->ckpt_step >= 0 && o->load == NULL) {
        return error_set("--ckpt-step %lld needs --load", (long long)o->ckpt_step);
    }
    if (o->pretrained_checkpoint != NULL && !o->finetune) {
        return error_set("--pretrained-checkpoint %s needs --finetune", o->pretrained_checkpoint);
    }
    options_warn_unless(o, "--save-interval", o->save != NULL, "--save");
    options_warn_unless(o, "--exit-on-missing-checkpoint", o->load != NULL, "--load");
    options_warn_unless(o, "--finetune", o->load != NULL || o->pretrained_checkpoint != NULL,
                        "--load");
    return validate_upcycling(o);
}

static int validate_profile(const struct options *o)
{
    options_warn_unless(o, "--profile-step-start", o->profile, "--profile");
    options_warn_unless(o, "--profile-step-end", o->profile, "--profile");
    if (o->profile && o->profile_step_start >= o->profile_step_end) {
        return error_set("--profile-step-end %lld must be above --profile-step-start %lld",
                         (long long)o->profile_step_end, (long long)o->profile_step_start);
    }
    return 0;
}

bool options_passes_communicate(const struct options *o)
{
    const int64_t num_ranks = o->tensor_model_parallel_size * o->pipeline_model_parallel_size *
                              o->context_parallel_size * o->expert_model_parallel_size *
                              o->expert_tensor_parallel_size;

    return num_ranks > 1 ||
           (o->data_parallel_size > 1 && (o->overlap_grad_reduce || o->overlap_param_gather ||
                                          options_balances_by(o, "global_aux_loss")));
}

/* A graph is replayed without the host, which must not be told how many rows experts get. */
static int check_graph_experts(const struct options *o)
{
    const bool is_cut = o->expert_model_parallel_size > 1;
    const bool needs_no_host = o->moe_pad_expert_input_to_capacity &&
                               strcmp(o->moe_token_dispatcher_type, "alltoall") == 0;

    if (o->num_experts == 0 || needs_no_host ||
        o->expert_model_parallel_size * o->expert_tensor_parallel_size == 1) {
        return 0;
    }
    return error_set("--cuda-graph-impl full_iteration: experts on several ranks wait for the host "
                     "to learn the routing: found %s %lld; legal: 1, or "
                     "--moe-pad-expert-input-to-capacity and --moe-token-dispatcher-type "
                     "alltoall",
                     is_cut ? "--expert-model-parallel-size" : "--expert-tensor-parallel-size",
                     (long long)(is_cut ? o->expert_model_parallel_size
                                        : o->expert_tensor_parallel_size));
}

static int validate_cuda_graph(const struct options *o)
{
    const bool wanted = strcmp(o->cuda_graph_impl, "none") != 0;

    options_warn_unless(o, "--cuda-graph-warmup-steps", wanted, "--cuda-graph-impl full_iteration");
    if (!wanted) {
        return 0;
    }
    if (strcmp(o->cuda_graph_impl, "full_iteration") != 0) {
        return error_set("--cuda-graph-impl %s: graphs of parts of a model are not supported; "
                         "legal: none, full_iteration",
                         o->cuda_graph_impl);
    }
    if (strcmp(o->device, "cpu") == 0) {
        return error_set("--cuda-graph-impl full_iteration: there are no graphs on the CPU, found "
                         "--device cpu; legal: cuda, auto");
    }
    if (o->timing_log_level > 1) {
        return error_set("--cuda-graph-impl full_iteration runs all passes as one: "
                         "--timing-log-level %lld cannot time each; legal: 0, 1",
                         (long long)o->timing_log_level);
    }
    return check_graph_experts(o);
}

int options_validate_training(struct options *o)
{
    TRY(validate_profile(o));
    TRY(validate_cuda_graph(o));
    TRY(validate_batch(o));
    TRY(validate_optimizer(o));
    TRY(validate_recompute(o));
    TRY(validate_data(o));
    TRY(validate_tokenizer(o));
    return validate_checkpoint(o);
}
