#include "train/step.h"

#include <math.h>

#include "base/check.h"
#include "ops/ops.h"
#include "optim/grad_norm.h"
#include "optim/param_gather.h"
#include "train/model_setup.h"
#include "train/walk.h"

static int forward_backward(struct batch_walk *walk)
{
    struct timers *timers = &walk->trainer->timers;
    int result;

    timers_start(timers, "forward-backward", 1);
    result = batch_walk_run(walk);
    timers_stop(timers, "forward-backward", 1);
    return result;
}

static int read_grad_norm(struct trainer *trainer, struct step_result *result)
{
    float norm;

    stream_wait(trainer->stream);
    stream_copy_to_host(trainer->stream, &norm, trainer->grad_norm.data, sizeof norm);
    result->grad_norm = (double)norm;
    if (!isfinite(norm) && trainer->options->check_for_nan_in_loss_and_grad) {
        return error_set("iteration %lld: found NaN in the gradient norm "
                         "(--no-check-for-nan-in-loss-and-grad goes on regardless)",
                         (long long)trainer->iteration + 1);
    }
    return 0;
}

static int update_parameters(struct trainer *trainer, struct step_result *result)
{
    const struct optimizer_rates rates = trainer_rates(trainer);

    timers_start(&trainer->timers, "optimizer", 1);
    grad_norm_clip_scale(&trainer->optimizer, &trainer->groups, trainer->stream, trainer->scratch,
                         (float)trainer->options->clip_grad, &trainer->grad_norm,
                         &trainer->grad_scale);
    TRY(read_grad_norm(trainer, result));
    if (trainer->options->log_num_zeros_in_grad) {
        result->num_zeros = grad_num_zeros(&trainer->optimizer, &trainer->groups, trainer->stream,
                                           trainer->scratch);
    }
    timers_start(&trainer->timers, "optimizer-inner-step", 1);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
    timers_stop(&trainer->timers, "optimizer-inner-step", 1);
    param_gather_start(&trainer->buckets);
    timers_stop(&trainer->timers, "optimizer", 1);
    return 0;
}

/* Gradients of this rank's microbatches become those of the global batch (M5.7). */
static void finish_gradients(struct trainer *trainer, const struct step_result *result)
{
    timers_start(&trainer->timers, "all-grads-sync", 1);
    grad_buckets_finish(&trainer->buckets);
    for (int i = 0; i < trainer->num_chunks; i++) {
        transformer_stage_finish_batch(&trainer->chunks[i], trainer->stream);
    }
    timers_stop(&trainer->timers, "all-grads-sync", 1);
    if (trainer->options->calculate_per_token_loss) {
        /* gradients of sums become those of the mean over all tokens */
        grad_buckets_scale(&trainer->buckets, (float)(1.0 / fmax(result->num_tokens, 1.0)));
    }
}

int train_step(struct trainer *trainer, struct loader *loader, struct step_result *result)
{
    const struct batch_size size = batch_size_at(&trainer->batch_size, trainer->consumed_samples);
    struct batch_walk walk = {.trainer = trainer,
                              .loader = loader,
                              .num_microbatches = size.num_microbatches,
                              .training = true};
    struct flops_sizes flops;

    op_fill_zero(trainer->stream, &trainer->params.grads);
    grad_buckets_begin(&trainer->buckets);
    TRY(forward_backward(&walk));
    batch_walk_sum_over_ranks(&walk);
    *result = (struct step_result){.loss_sum = walk.loss_sum,
                                   .num_tokens = walk.num_tokens,
                                   .is_nan = walk.is_nan,
                                   .num_samples = size.running,
                                   .num_microbatches = size.num_microbatches};
    finish_gradients(trainer, result);
    TRY(update_parameters(trainer, result));
    flops = flops_sizes_from_config(&trainer->config, size.running);
    trainer->flops_so_far += flops_per_step_seed(&flops);
    trainer->iteration++;
    trainer->consumed_samples += size.running;
    trainer->schedule_samples += size.running;
    trainer->skipped_samples += size.global_batch_size - size.running;
    return 0;
}
