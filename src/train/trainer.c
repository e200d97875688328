#include "train/trainer.h"

#include <string.h>

#include "base/check.h"
#include "train/model_setup.h"

static int configure(struct trainer *trainer, int64_t vocab_size)
{
    const struct options *options = trainer->options;

    TRY(model_config_from_options(&trainer->config, options, vocab_size));
    TRY(batch_size_config_from_options(&trainer->batch_size, options));
    TRY(lr_schedule_config_from_options(&trainer->lr_schedule, options));
    return 0;
}

static void allocate_batch(struct trainer *trainer)
{
    struct device_batch *batch = &trainer->batch;
    struct arena *run = trainer->run;
    const int64_t num_sequences = trainer->options->micro_batch_size;
    const int64_t num_tokens = num_sequences * trainer->config.seq_length;

    batch->token = tensor_new(run, DTYPE_I32, num_tokens);
    batch->label = tensor_new(run, DTYPE_I32, num_tokens);
    batch->position = tensor_new(run, DTYPE_I32, num_tokens);
    if (trainer->options->reset_attention_mask) {
        batch->document_start = tensor_new(run, DTYPE_I32, num_tokens);
    }
    batch->token_id = tensor_new(run, DTYPE_I64, num_tokens);
    batch->sample_id = tensor_new(run, DTYPE_I64, num_sequences);
    batch->loss_weight = tensor_new(run, DTYPE_F32, num_tokens);
    batch->loss = tensor_new(run, DTYPE_F32, num_tokens);
}

static void allocate_run(struct trainer *trainer)
{
    const struct optimizer_config optimizer = optimizer_config_from_options(trainer->options);

    transformer_stage_allocate(&trainer->stage, trainer->stream, trainer->run, true);
    optimizer_init(&trainer->optimizer, &optimizer, &trainer->stage.params, trainer->stream,
                   trainer->run);
    allocate_batch(trainer);
    moe_metrics_init(&trainer->metrics, trainer->stream, trainer->run, trainer->config.num_layers);
    trainer->grad_norm = tensor_new(trainer->run, DTYPE_F32, 1);
    trainer->grad_scale = tensor_new(trainer->run, DTYPE_F32, 1);
}

static struct arena *create_arena(const char *name, const struct device *device, int64_t bytes)
{
    struct arena *arena = arena_create(name, &device->memory);

    arena_reserve(arena, (size_t)bytes);
    return arena;
}

int trainer_create(struct trainer *trainer, const struct options *options, int64_t vocab_size,
                   const struct device *device, const struct ops *ops,
                   const struct trainer_memory *memory)
{
    memset(trainer, 0, sizeof *trainer);
    trainer->options = options;
    trainer->random_seed = (uint64_t)options->seed;
    TRY(configure(trainer, vocab_size));
    groups_create_self(&trainer->groups);
    trainer->stream = stream_create(device, ops);
    trainer->run = create_arena("run", device, memory->run_bytes);
    trainer->saved = create_arena("microbatch", device, memory->saved_bytes);
    trainer->scratch = create_arena("call", device, memory->scratch_bytes);
    transformer_stage_init(&trainer->stage, &trainer->groups, &trainer->config);
    stage_saved_init(&trainer->stage_saved, &trainer->stage);
    allocate_run(trainer);
    param_list_initialize(&trainer->stage.params, trainer->stream, (uint64_t)options->seed);
    optimizer_reset_masters(&trainer->optimizer, trainer->stream);
    timers_init(&trainer->timers, (int)options->timing_log_level, NULL);
    return 0;
}

void trainer_destroy(struct trainer *trainer)
{
    if (trainer->stream == NULL) {
        return;
    }
    optimizer_free(&trainer->optimizer);
    stage_saved_free(&trainer->stage_saved);
    transformer_stage_free(&trainer->stage);
    arena_destroy(trainer->run);
    arena_destroy(trainer->saved);
    arena_destroy(trainer->scratch);
    stream_destroy(trainer->stream);
    groups_destroy(&trainer->groups);
    trainer->stream = NULL;
}

struct optimizer_rates trainer_rates(const struct trainer *trainer)
{
    const float lr = (float)lr_schedule_lr(&trainer->lr_schedule, trainer->schedule_samples);

    return (struct optimizer_rates){.lr = lr,
                                    .decoupled_lr = lr,
                                    .weight_decay = (float)lr_schedule_weight_decay(
                                        &trainer->lr_schedule, trainer->schedule_samples)};
}

struct pass trainer_pass(struct trainer *trainer, bool training, float aux_loss_scale)
{
    const struct device_batch *batch = &trainer->batch;

    return (struct pass){.stream = trainer->stream,
                         .groups = &trainer->groups,
                         .saved = trainer->saved,
                         .scratch = trainer->scratch,
                         .dtype = trainer->config.dtype,
                         .training = training,
                         .seed = trainer->random_seed,
                         .num_sequences = batch->sample_id.dim[0],
                         .token = batch->token,
                         .label = batch->label,
                         .position = batch->position,
                         .token_id = batch->token_id,
                         .sample_id = batch->sample_id,
                         .document_start = batch->document_start,
                         .loss_weight = batch->loss_weight,
                         .aux_loss_scale = aux_loss_scale,
                         .metrics = training ? &trainer->metrics : NULL};
}
