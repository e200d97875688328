#include "train/memory_report.h"

#include "base/log.h"
#include "ops/ops.h"
#include "optim/grad_norm.h"
#include "train/trainer.h"

static void run_one_step(struct trainer *trainer)
{
    const struct optimizer_rates rates = trainer_rates(trainer);
    const struct pass pass = trainer_pass(trainer, true, 1.0f);

    transformer_stage_forward(&trainer->stage, &pass, &trainer->batch.loss, &trainer->stage_saved);
    transformer_stage_backward(&trainer->stage, &pass, &trainer->stage_saved);
    transformer_stage_finish_batch(&trainer->stage, trainer->stream);
    grad_norm_clip_scale(&trainer->stage.params, &trainer->groups, trainer->stream,
                         trainer->scratch, 1.0f, &trainer->grad_norm, &trainer->grad_scale);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
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

int memory_report_compute(struct memory_report *report, const struct options *options,
                          int64_t vocab_size)
{
    struct trainer trainer;

    if (trainer_create(&trainer, options, vocab_size, device_null(), ops_null(),
                       &(struct trainer_memory){0}) != 0) {
        trainer_destroy(&trainer);
        return -1;
    }
    run_one_step(&trainer);
    *report = (struct memory_report){
        .parameters_bytes = (int64_t)tensor_size_bytes(&trainer.stage.params.values),
        .gradients_bytes = (int64_t)tensor_size_bytes(&trainer.stage.params.grads),
        .optimizer_bytes = optimizer_bytes(&trainer),
        .run_bytes = (int64_t)arena_peak_bytes(trainer.run),
        .activations_bytes = (int64_t)arena_peak_bytes(trainer.saved),
        .scratch_bytes = (int64_t)arena_peak_bytes(trainer.scratch),
    };
    report->total_bytes = report->run_bytes + report->activations_bytes + report->scratch_bytes;
    trainer_destroy(&trainer);
    return 0;
}

void memory_report_print(const struct memory_report *report)
{
    const double mb = 1e6;

    log_info("memory of a step (MB): parameters %.1f, gradients %.1f, optimizer %.1f, activations "
             "of a microbatch %.1f, scratch %.1f, in all %.1f",
             (double)report->parameters_bytes / mb, (double)report->gradients_bytes / mb,
             (double)report->optimizer_bytes / mb, (double)report->activations_bytes / mb,
             (double)report->scratch_bytes / mb, (double)report->total_bytes / mb);
}
