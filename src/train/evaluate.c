#include "train/evaluate.h"

#include <math.h>

#include "base/check.h"
#include "pipeline/executor.h"
#include "train/step.h"

struct evaluation {
    struct trainer *trainer;
    struct loader *loader;
    double loss_sum, num_tokens;
};

static int microbatch_forward(void *context, const struct pipeline_step *step, int slot)
{
    struct evaluation *evaluation = context;
    struct trainer *trainer = evaluation->trainer;
    const struct pass pass = trainer_pass(trainer, false, 0.0f);
    const struct batch *batch;
    double loss_sum, num_tokens;

    TRY(loader_next(evaluation->loader, &batch));
    upload_batch(trainer, batch, 0.0f);
    transformer_stage_forward(&trainer->stage, &pass, &trainer->batch.loss, &trainer->stage_saved);
    read_loss(trainer, batch, &loss_sum, &num_tokens);
    evaluation->loss_sum += loss_sum;
    evaluation->num_tokens += num_tokens;
    return 0;
}

int evaluate(struct trainer *trainer, struct loader *loader, int64_t num_iterations,
             double *mean_loss)
{
    struct evaluation evaluation = {.trainer = trainer, .loader = loader};
    const int64_t num_microbatches =
        trainer->options->global_batch_size /
        (trainer->options->micro_batch_size * trainer->options->data_parallel_size);
    struct pipeline_schedule schedule;
    int result = 0;

    schedule_forward_only(&schedule, (int)num_microbatches);
    for (int64_t i = 0; i < num_iterations && result == 0; i++) {
        result = pipeline_execute(&schedule, &(struct pipeline_work){.forward = microbatch_forward,
                                                                     .context = &evaluation});
    }
    pipeline_schedule_free(&schedule);
    *mean_loss = evaluation.loss_sum / fmax(evaluation.num_tokens, 1.0);
    return result;
}
