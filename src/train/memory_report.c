#include "train/memory_report.h"

#include <math.h>

#include "base/check.h"
#include "base/log.h"
#include "ops/ops.h"
#include "optim/grad_norm.h"
#include "optim/param_gather.h"
#include "parallel/tp_region.h"
#include "train/trainer.h"
#include "train/walk.h"

/* A step of the first few microbatches reaches every peak: the pipeline is full. */
static int64_t microbatches_to_fill(const struct trainer *trainer)
{
    const int64_t all = trainer_num_microbatches(trainer);
    const int64_t group = trainer->num_chunks > 1
                              ? trainer->options->microbatch_group_size_per_virtual_pipeline_stage
                              : 0;
    const int64_t enough = 2 * (group > 0 ? group : trainer->groups.pp->size);

    return all < enough || trainer->num_chunks > 1 ? all : enough;
}

static int run_one_step(struct trainer *trainer, double load)
{
    const struct optimizer_rates rates = trainer_rates(trainer);
    struct batch_walk walk = {.trainer = trainer,
                              .num_microbatches = microbatches_to_fill(trainer),
                              .training = true,
                              .measured_load = load};

    grad_buckets_begin(&trainer->buckets);
    TRY(batch_walk_run(&walk));
    grad_buckets_finish(&trainer->buckets);
    for (int i = 0; i < trainer->num_chunks; i++) {
        transformer_stage_finish_batch(&trainer->chunks[i], trainer->stream);
    }
    grad_norm_clip_scale(&trainer->optimizer, &trainer->groups, trainer->stream, trainer->scratch,
                         1.0f, &trainer->grad_norm, &trainer->grad_scale);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
    param_gather_start(&trainer->buckets);
    param_gather_finish(&trainer->buckets);
    return 0;
}

static int64_t optimizer_bytes(struct trainer *trainer)
{
    struct optimizer_state states[OPTIMIZER_STATES_MAX];
    const int count = optimizer_states(&trainer->optimizer, states);
    int64_t bytes = 0;

    for (int i = 0; i < count; i++) {
        bytes += (int64_t)tensor_size_bytes(states[i].tensor);
    }
    return bytes;
}

static void read_peaks(struct memory_report *report, struct trainer *trainer)
{
    *report = (struct memory_report){
        .parameters_bytes = (int64_t)tensor_size_bytes(&trainer->params.values),
        .gradients_bytes = (int64_t)tensor_size_bytes(&trainer->params.grads),
        .optimizer_bytes = optimizer_bytes(trainer),
        .run_bytes = (int64_t)arena_peak_bytes(trainer->run),
        .boundary_bytes = (int64_t)arena_peak_bytes(trainer->boundary),
        .scratch_bytes = (int64_t)arena_peak_bytes(trainer->scratch),
        .num_slots = trainer->num_slots,
    };
    for (int i = 0; i < trainer->num_slots; i++) {
        const int64_t peak = (int64_t)arena_peak_bytes(trainer->slots[i].saved);

        report->slot_bytes = peak > report->slot_bytes ? peak : report->slot_bytes;
    }
    report->activations_bytes = report->num_slots * report->slot_bytes;
    report->total_bytes = report->run_bytes + report->activations_bytes + report->boundary_bytes +
                          report->scratch_bytes;
}

static int64_t tokens_routed_by_a_rank(const struct trainer *trainer)
{
    const struct groups *groups = &trainer->groups;

    return tp_region_outside(groups, trainer->options->micro_batch_size *
                                         trainer->options->seq_length / groups->cp->size);
}

/* All tokens choose this rank's experts, as far as a token has choices, an expert's capacity and
 * --moe-expert-rank-capacity-factor allow it. */
static double most_uneven_load(const struct trainer *trainer)
{
    const struct model_config *config = &trainer->config;
    const int ep = trainer->groups.ep->size, topk = config->router_rule.topk;
    double load;

    if (config->num_experts == 0 || config->pad_to_capacity) {
        return 1.0;
    }
    load = ep * fmin(1.0, (double)(config->num_experts / ep) / topk);
    if (config->capacity_factor > 0.0) {
        const double slots = (double)(tokens_routed_by_a_rank(trainer) * topk);

        load = fmin(load, ceil(slots / config->num_experts * config->capacity_factor) *
                              config->num_experts / slots);
    }
    if (config->rank_capacity_factor > 0.0) {
        load = fmin(load, config->rank_capacity_factor);
    }
    return fmax(load, 1.0);
}

static int measure(struct memory_report *report, struct trainer *trainer)
{
    const double load = most_uneven_load(trainer);
    struct memory_report uneven;

    TRY(run_one_step(trainer, 1.0));
    read_peaks(report, trainer);
    if (load > 1.0) {
        TRY(run_one_step(trainer, load));
    }
    read_peaks(&uneven, trainer);
    report->most_uneven_load = load;
    report->most_uneven_bytes = uneven.total_bytes;
    return 0;
}

int memory_report_compute(struct memory_report *report, const struct options *options,
                          int64_t vocab_size)
{
    struct trainer trainer;
    int result = trainer_create(&trainer, options, vocab_size, device_null(), ops_null(),
                                &(struct trainer_memory){0});

    if (result == 0) {
        result = measure(report, &trainer);
    }
    trainer_destroy(&trainer);
    return result;
}

void memory_report_print(const struct memory_report *report)
{
    const double mb = 1e6;

    log_info("memory of a step (MB): parameters %.1f, gradients %.1f, optimizer %.1f, activations "
             "%.1f (%d x %.1f), scratch %.1f, in all %.1f",
             (double)report->parameters_bytes / mb, (double)report->gradients_bytes / mb,
             (double)report->optimizer_bytes / mb, (double)report->activations_bytes / mb,
             report->num_slots, (double)report->slot_bytes / mb, (double)report->scratch_bytes / mb,
             (double)report->total_bytes / mb);
    if (report->most_uneven_load > 1.0) {
        log_info("where this rank's experts get %.2f times the rows of even routing, the most that "
                 "can come: in all %.1f",
                 report->most_uneven_load, (double)report->most_uneven_bytes / mb);
    }
}
