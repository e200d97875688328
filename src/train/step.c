#include "train/step.h"

#include <math.h>
#include <stdlib.h>

#include "base/check.h"
#include "ops/ops.h"
#include "optim/grad_norm.h"
#include "pipeline/executor.h"
#include "train/model_setup.h"

static void upload(struct trainer *trainer, struct tensor *to, const void *host)
{
    stream_copy_from_host(trainer->stream, to->data, host, tensor_size_bytes(to));
}

/* token_id = sample_id * S + s: no layout, no order of calls changes a token's random numbers. */
static void upload_token_ids(struct trainer *trainer, const struct batch *batch)
{
    const int64_t num_sequences = batch->num_sequences, seq_length = batch->seq_length;
    int64_t *ids = malloc((size_t)(seq_length * num_sequences) * sizeof *ids);

    CHECK(ids != NULL, "out of memory");
    for (int64_t s = 0; s < seq_length; s++) {
        for (int64_t b = 0; b < num_sequences; b++) {
            ids[s * num_sequences + b] = batch->sample_ids[b] * seq_length + s;
        }
    }
    upload(trainer, &trainer->batch.token_id, ids);
    free(ids);
}

static void upload_loss_weight(struct trainer *trainer, const struct batch *batch, float scale)
{
    const int64_t num_tokens = batch->num_sequences * batch->seq_length;
    float *weight = malloc((size_t)num_tokens * sizeof *weight);

    CHECK(weight != NULL, "out of memory");
    for (int64_t t = 0; t < num_tokens; t++) {
        weight[t] = batch->loss_mask[t] * scale;
    }
    upload(trainer, &trainer->batch.loss_weight, weight);
    free(weight);
}

void upload_batch(struct trainer *trainer, const struct batch *batch, float loss_scale)
{
    struct device_batch *device = &trainer->batch;

    upload(trainer, &device->token, batch->tokens);
    upload(trainer, &device->label, batch->labels);
    upload(trainer, &device->position, batch->position_ids);
    if (device->document_start.data != NULL) {
        upload(trainer, &device->document_start, batch->document_start);
    }
    upload(trainer, &device->sample_id, batch->sample_ids);
    upload_token_ids(trainer, batch);
    upload_loss_weight(trainer, batch, loss_scale);
}

static double mask_sum(const struct batch *batch)
{
    double sum = 0.0;

    for (int64_t t = 0; t < batch->num_sequences * batch->seq_length; t++) {
        sum += (double)batch->loss_mask[t];
    }
    return sum;
}

void read_loss(struct trainer *trainer, const struct batch *batch, double *loss_sum,
               double *num_tokens)
{
    const int64_t count = batch->num_sequences * batch->seq_length;
    float *loss = malloc((size_t)count * sizeof *loss);

    CHECK(loss != NULL, "out of memory");
    stream_wait(trainer->stream);
    stream_copy_to_host(trainer->stream, loss, trainer->batch.loss.data,
                        (size_t)count * sizeof *loss);
    *loss_sum = 0.0;
    for (int64_t t = 0; t < count; t++) {
        if (batch->loss_mask[t] != 0.0f) {
            *loss_sum += (double)loss[t] * (double)batch->loss_mask[t];
        }
    }
    *num_tokens = mask_sum(batch);
    free(loss);
}

/* One global batch on its way through the schedule. */
struct batch_walk {
    struct trainer *trainer;
    struct loader *loader;
    struct step_result *result;
    struct pass pass; /* of the microbatch in flight */
};

/* d(total)/d(loss of an unmasked token): the mean over the microbatch's tokens and the
 * microbatches, or 1 with --calculate-per-token-loss, whose division comes last. */
static float loss_scale(const struct batch_walk *walk, double num_unmasked)
{
    if (walk->trainer->options->calculate_per_token_loss) {
        return 1.0f;
    }
    return (float)(1.0 / (fmax(num_unmasked, 1.0) * (double)walk->result->num_microbatches));
}

/* Balancing losses are means over the microbatch: M1.8. */
static float aux_loss_scale(const struct batch_walk *walk, const struct batch *batch)
{
    if (walk->trainer->options->calculate_per_token_loss) {
        return (float)(batch->num_sequences * batch->seq_length);
    }
    return 1.0f / (float)walk->result->num_microbatches;
}

static int check_loss(const struct batch_walk *walk, double loss_sum)
{
    if (isfinite(loss_sum)) {
        return 0;
    }
    walk->result->is_nan = true;
    if (walk->trainer->options->check_for_nan_in_loss_and_grad) {
        return error_set("iteration %lld: found NaN in local forward loss calculation "
                         "(--no-check-for-nan-in-loss-and-grad goes on regardless)",
                         (long long)walk->trainer->iteration + 1);
    }
    return 0;
}

static int microbatch_forward(void *context, const struct pipeline_step *step, int slot)
{
    struct batch_walk *walk = context;
    struct trainer *trainer = walk->trainer;
    const struct batch *batch;
    double loss_sum, num_tokens;

    timers_start(&trainer->timers, "batch-generator", 2);
    TRY(loader_next(walk->loader, &batch));
    timers_stop(&trainer->timers, "batch-generator", 2);
    upload_batch(trainer, batch, loss_scale(walk, mask_sum(batch)));
    walk->pass = trainer_pass(trainer, true, aux_loss_scale(walk, batch));
    timers_start(&trainer->timers, "forward-compute", 2);
    transformer_stage_forward(&trainer->stage, &walk->pass, &trainer->batch.loss,
                              &trainer->stage_saved);
    timers_stop(&trainer->timers, "forward-compute", 2);
    read_loss(trainer, batch, &loss_sum, &num_tokens);
    walk->result->loss_sum += loss_sum;
    walk->result->num_tokens += num_tokens;
    return check_loss(walk, loss_sum);
}

static int microbatch_backward(void *context, const struct pipeline_step *step, int slot)
{
    struct batch_walk *walk = context;

    timers_start(&walk->trainer->timers, "backward-compute", 2);
    transformer_stage_backward(&walk->trainer->stage, &walk->pass, &walk->trainer->stage_saved);
    timers_stop(&walk->trainer->timers, "backward-compute", 2);
    return 0;
}

static int forward_backward(struct batch_walk *walk)
{
    struct trainer *trainer = walk->trainer;
    struct pipeline_schedule schedule;
    int result;

    timers_start(&trainer->timers, "forward-backward", 1);
    schedule_no_pipeline(&schedule, (int)walk->result->num_microbatches);
    result = pipeline_execute(&schedule, &(struct pipeline_work){.forward = microbatch_forward,
                                                                 .backward = microbatch_backward,
                                                                 .context = walk});
    pipeline_schedule_free(&schedule);
    timers_stop(&trainer->timers, "forward-backward", 1);
    return result;
}

/* With --calculate-per-token-loss: gradients of sums become those of the mean over all tokens. */
static void normalise_per_token(struct trainer *trainer, double num_tokens)
{
    struct tensor grads = trainer->stage.params.grads;

    op_linear_combination(trainer->stream,
                          &(struct linear_combination){
                              .y = &grads, .x = &grads, .a = (float)(1.0 / fmax(num_tokens, 1.0))});
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
    grad_norm_clip_scale(&trainer->stage.params, &trainer->groups, trainer->stream,
                         trainer->scratch, (float)trainer->options->clip_grad, &trainer->grad_norm,
                         &trainer->grad_scale);
    TRY(read_grad_norm(trainer, result));
    if (trainer->options->log_num_zeros_in_grad) {
        result->num_zeros = grad_num_zeros(&trainer->stage.params, &trainer->groups,
                                           trainer->stream, trainer->scratch);
    }
    timers_start(&trainer->timers, "optimizer-inner-step", 1);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
    timers_stop(&trainer->timers, "optimizer-inner-step", 1);
    timers_stop(&trainer->timers, "optimizer", 1);
    return 0;
}

int train_step(struct trainer *trainer, struct loader *loader, struct step_result *result)
{
    const struct batch_size size = batch_size_at(&trainer->batch_size, trainer->consumed_samples);
    struct batch_walk walk = {.trainer = trainer, .loader = loader, .result = result};
    struct flops_sizes flops;

    *result = (struct step_result){.num_samples = size.running,
                                   .num_microbatches = size.num_microbatches};
    op_fill_zero(trainer->stream, &trainer->stage.params.grads);
    TRY(forward_backward(&walk));
    transformer_stage_finish_batch(&trainer->stage, trainer->stream);
    if (trainer->options->calculate_per_token_loss) {
        normalise_per_token(trainer, result->num_tokens);
    }
    TRY(update_parameters(trainer, result));
    flops = flops_sizes_from_config(&trainer->config, size.running);
    trainer->flops_so_far += flops_per_step_seed(&flops);
    trainer->iteration++;
    trainer->consumed_samples += size.running;
    trainer->schedule_samples += size.running;
    trainer->skipped_samples += size.global_batch_size - size.running;
    return 0;
}
