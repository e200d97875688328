#include "train/step.h"

#include <math.h>
#include <stdlib.h>

#include "base/check.h"
#include "ops/ops.h"
#include "optim/grad_norm.h"
#include "optim/param_gather.h"
#include "train/model_setup.h"
#include "train/walk.h"

static int forward_backward(struct batch_walk *walk)
{
    struct trainer *trainer = walk->trainer;
    int result;

    timers_start(&trainer->timers, "forward-backward", 1);
    result = captured_step_is_wanted(trainer->options) ? captured_step_run(&trainer->captured, walk)
                                                       : batch_walk_run(walk);
    timers_stop(&trainer->timers, "forward-backward", 1);
    return result;
}

static void update_parameters(struct trainer *trainer, struct step *step)
{
    const struct optimizer_rates rates = trainer_rates(trainer);

    timers_start(&trainer->timers, "optimizer", 1);
    grad_norm_clip_scale(&trainer->optimizer, &trainer->groups, trainer->stream, trainer->scratch,
                         (float)trainer->options->clip_grad, &trainer->grad_norm,
                         &trainer->grad_scale);
    step->grad_norm = stream_read_start(trainer->stream, trainer->grad_norm.data, sizeof(float));
    if (trainer->options->log_num_zeros_in_grad) {
        step->result.num_zeros = grad_num_zeros(&trainer->optimizer, &trainer->groups,
                                                trainer->stream, trainer->scratch);
    }
    timers_start(&trainer->timers, "optimizer-inner-step", 1);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
    timers_stop(&trainer->timers, "optimizer-inner-step", 1);
    if (captured_step_gathers(&trainer->captured, trainer->options)) {
        param_gather_leave_to_forward(&trainer->buckets);
    } else {
        param_gather_start(&trainer->buckets);
    }
    timers_stop(&trainer->timers, "optimizer", 1);
}

static int check(const struct trainer *trainer, const struct step_result *result, bool is_finite,
                 const char *what)
{
    if (is_finite || !trainer->options->check_for_nan_in_loss_and_grad) {
        return 0;
    }
    return error_set("iteration %lld: found NaN in %s (--no-check-for-nan-in-loss-and-grad goes on "
                     "regardless)",
                     (long long)result->iteration, what);
}

/* Over all ranks: every rank of a pipeline gets what its stages have; the ranks of a TP group have
 * the same. */
static void sum_up(const struct trainer *trainer, double *values, int count)
{
    trainer_sum(trainer, trainer->groups.dp_cp, values, count);
    trainer_sum(trainer, trainer->groups.pp, values, count);
}

/* What the hosts tell each other of a step. */
enum {
    SUM_LOSS,
    SUM_TOKENS,
    SUM_NAN,
    SUM_METRIC_USED, /* a stage without experts learns that others have them */
    NUM_SUMS = SUM_METRIC_USED + NUM_MOE_METRICS
};

/* Waits for the losses, then for the other ranks to have theirs. */
static int finish_losses(struct trainer *trainer, struct step *step)
{
    struct step_result *result = &step->result;
    struct loss_sums mine = {0};
    double sums[NUM_SUMS];

    loss_reading_finish(&step->loss, trainer->stream, &mine);
    TRY(check(trainer, result, !mine.is_nan, "local forward loss calculation"));
    sums[SUM_LOSS] = mine.loss;
    sums[SUM_TOKENS] = mine.num_tokens;
    sums[SUM_NAN] = mine.is_nan ? 1.0 : 0.0;
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        sums[SUM_METRIC_USED + m] = trainer->metrics.used[m] ? 1.0 : 0.0;
    }
    sum_up(trainer, sums, NUM_SUMS);
    result->loss_sum = sums[SUM_LOSS];
    result->num_tokens = sums[SUM_TOKENS];
    result->is_nan = sums[SUM_NAN] > 0.0;
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        result->has_metric[m] = sums[SUM_METRIC_USED + m] > 0.0;
    }
    return 0;
}

/* Gradients of sums become those of the mean over all tokens, whose number the hosts know. */
static void scale_by_tokens(struct trainer *trainer, const struct step *step)
{
    double num_tokens = loss_reading_num_tokens(&step->loss);

    sum_up(trainer, &num_tokens, 1);
    grad_buckets_scale(&trainer->buckets, (float)(1.0 / fmax(num_tokens, 1.0)));
}

/* Gradients of this rank's microbatches become those of the global batch (M5.7). */
static void finish_gradients(struct trainer *trainer, const struct step *step)
{
    timers_start(&trainer->timers, "all-grads-sync", 1);
    grad_buckets_finish(&trainer->buckets);
    for (int i = 0; i < trainer->num_chunks; i++) {
        transformer_stage_finish_batch(&trainer->chunks[i], trainer->stream);
    }
    timers_stop(&trainer->timers, "all-grads-sync", 1);
    if (trainer->options->calculate_per_token_loss) {
        scale_by_tokens(trainer, step);
    }
}

static void advance(struct trainer *trainer, const struct batch_size *size)
{
    const struct flops_sizes flops = flops_sizes_from_config(&trainer->config, size->running);

    trainer->flops_so_far += flops_per_step_seed(&flops);
    trainer->iteration++;
    trainer->consumed_samples += size->running;
    trainer->schedule_samples += size->running;
    trainer->skipped_samples += size->global_batch_size - size->running;
}

static int run_step(struct trainer *trainer, struct loader *loader, const struct batch_size *size,
                    struct step *step)
{
    struct batch_walk walk = {.trainer = trainer,
                              .loader = loader,
                              .num_microbatches = size->num_microbatches,
                              .training = true};
    int result;

    param_list_clear_grads(&trainer->params, trainer->stream);
    grad_buckets_begin(&trainer->buckets);
    result = forward_backward(&walk);
    step->loss = walk.loss;
    TRY(result);
    finish_gradients(trainer, step);
    update_parameters(trainer, step);
    return 0;
}

int train_step_start(struct trainer *trainer, struct loader *loader, struct step *step)
{
    const struct batch_size size = batch_size_at(&trainer->batch_size, trainer->consumed_samples);
    struct step_result *result = &step->result;

    *step = (struct step){.result = {.num_samples = size.running,
                                     .num_microbatches = size.num_microbatches,
                                     .iteration = trainer->iteration + 1}};
    if (run_step(trainer, loader, &size, step) != 0) {
        train_step_free(trainer, step);
        return -1;
    }
    advance(trainer, &size);
    result->consumed_samples = trainer->consumed_samples;
    result->skipped_samples = trainer->skipped_samples;
    result->learning_rate = (double)trainer_rates(trainer).lr;
    return 0;
}

void train_step_read_metrics(struct trainer *trainer, struct step *step)
{
    struct moe_metrics *metrics = &trainer->metrics;

    if (trainer->config.num_experts == 0) {
        return;
    }
    moe_metrics_reduce(metrics, trainer->stream, &trainer->groups);
    step->moe_metrics =
        stream_read_start(trainer->stream, metrics->all.data, tensor_size_bytes(&metrics->all));
    moe_metrics_clear(metrics, trainer->stream);
}

static void finish_grad_norm(struct trainer *trainer, struct step *step)
{
    float norm = 0.0f;

    if (step->grad_norm != NULL) {
        stream_read_finish(trainer->stream, step->grad_norm, &norm);
        step->result.grad_norm = (double)norm;
        step->grad_norm = NULL;
    }
}

static void finish_metrics(struct trainer *trainer, struct step *step)
{
    if (step->moe_metrics != NULL) {
        step->result.moe_metrics = malloc(tensor_size_bytes(&trainer->metrics.all));
        CHECK(step->result.moe_metrics != NULL, "out of memory");
        stream_read_finish(trainer->stream, step->moe_metrics, step->result.moe_metrics);
        step->moe_metrics = NULL;
    }
}

int train_step_finish(struct trainer *trainer, struct step *step)
{
    TRY(finish_losses(trainer, step));
    finish_grad_norm(trainer, step);
    finish_metrics(trainer, step);
    return check(trainer, &step->result, isfinite(step->result.grad_norm), "the gradient norm");
}

void train_step_free(struct trainer *trainer, struct step *step)
{
    struct loss_sums unused = {0};

    loss_reading_finish(&step->loss, trainer->stream, &unused);
    finish_grad_norm(trainer, step);
    finish_metrics(trainer, step);
    free(step->result.moe_metrics);
    *step = (struct step){0};
}

int train_step(struct trainer *trainer, struct loader *loader, struct step_result *result)
{
    struct step step;
    int status;

    TRY(train_step_start(trainer, loader, &step));
    status = train_step_finish(trainer, &step);
    *result = step.result;
    train_step_free(trainer, &step);
    return status;
}
