#include "train/trainer.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "comm/launch.h"
#include "parallel/tp_region.h"
#include "train/model_setup.h"

static int configure(struct trainer *trainer, int64_t vocab_size)
{
    const struct options *options = trainer->options;

    TRY(model_config_from_options(&trainer->config, options, vocab_size));
    TRY(batch_size_config_from_options(&trainer->batch_size, options));
    TRY(lr_schedule_config_from_options(&trainer->lr_schedule, options));
    return 0;
}

static int create_groups(struct trainer *trainer)
{
    const struct options *options = trainer->options;
    const struct rank_grid_sizes sizes = rank_grid_sizes_from_options(options);
    struct rank_grid grid;

    TRY(rank_grid_init(&grid, &sizes));
    groups_create(&trainer->groups, &grid, launch_rank(), options->sequence_parallel);
    trainer->groups.tp_comm_overlap = options->tp_comm_overlap;
    return 0;
}

/* The host waits for what it asks of a CPU's stream; a GPU's stream would have to be waited for,
 * and the null device's moves nothing. */
static struct stream *create_host_stream(const struct trainer *trainer)
{
    return trainer->stream->device->kind == DEVICE_CUDA ? stream_create(device_cpu(), ops_cpu())
                                                        : trainer->stream;
}

static struct arena *create_arena(const struct trainer *trainer, const char *name, int64_t bytes)
{
    struct arena *arena = arena_create(name, &trainer->stream->device->memory);

    arena_reserve(arena, (size_t)bytes);
    return arena;
}

/* The chunks of this pipeline stage; every stage has as many. */
static int init_chunks(struct trainer *trainer)
{
    const struct options *o = trainer->options;
    const struct comm *pp = trainer->groups.pp;
    struct pipeline_place at = {.stage = pp->rank,
                                .num_stages = pp->size,
                                .num_chunks = (int)o->virtual_pipeline_size};

    trainer->chunks = calloc((size_t)at.num_chunks, sizeof *trainer->chunks);
    CHECK(trainer->chunks != NULL, "out of memory");
    for (; at.chunk < at.num_chunks; at.chunk++) {
        struct stage_place place = {
            .has_embedding = at.stage == 0 && at.chunk == 0,
            .has_head = at.stage == at.num_stages - 1 && at.chunk == at.num_chunks - 1};

        TRY(pipeline_layers(&at, trainer->config.num_layers,
                            (int)o->decoder_first_pipeline_num_layers,
                            (int)o->decoder_last_pipeline_num_layers, &place.first_layer,
                            &place.num_layers));
        transformer_stage_init(&trainer->chunks[at.chunk], &trainer->params, &trainer->groups,
                               &trainer->config, &place);
        trainer->num_chunks++;
    }
    return 0;
}

static void allocate_params(struct trainer *trainer)
{
    const struct options *o = trainer->options;
    const struct optimizer_config optimizer = optimizer_config_from_options(o);

    grad_buckets_init(&trainer->buckets, &trainer->params, &trainer->groups, trainer->stream,
                      &(struct grad_buckets_config){
                          .distributed_optimizer = o->use_distributed_optimizer,
                          .overlap_grad_reduce = o->overlap_grad_reduce,
                          .overlap_param_gather = o->overlap_param_gather,
                          .average = !o->calculate_per_token_loss,
                          .bucket_size = o->ddp_bucket_size});
    param_list_allocate(&trainer->params, trainer->run, trainer->stream, trainer->config.dtype,
                        true);
    for (int i = 0; i < trainer->num_chunks; i++) {
        transformer_stage_allocate(&trainer->chunks[i], trainer->stream, trainer->run);
    }
    optimizer_init(&trainer->optimizer, &optimizer, &trainer->params, &trainer->buckets,
                   trainer->stream, trainer->run);
}

static struct microbatch_sizes microbatch_sizes(const struct trainer *trainer)
{
    return (struct microbatch_sizes){.seq_length = trainer->config.seq_length,
                                     .num_sequences = trainer->options->micro_batch_size,
                                     .has_document_start = trainer->options->reset_attention_mask};
}

int64_t trainer_num_microbatches(const struct trainer *trainer)
{
    const struct options *o = trainer->options;

    return o->global_batch_size / (o->micro_batch_size * o->data_parallel_size);
}

static void create_slots(struct trainer *trainer, int num_slots, int64_t bytes)
{
    int num_layers = 0;

    for (int i = 0; i < trainer->num_chunks; i++) {
        const int count = trainer->chunks[i].place.num_layers;

        num_layers = count > num_layers ? count : num_layers;
    }
    trainer->slots = calloc((size_t)num_slots, sizeof *trainer->slots);
    CHECK(trainer->slots != NULL, "out of memory");
    trainer->num_slots = num_slots;
    for (int i = 0; i < num_slots; i++) {
        trainer->slots[i].saved = create_arena(trainer, "microbatch", bytes);
        stage_saved_init(&trainer->slots[i].stage_saved, num_layers);
    }
}

static void create_microbatches(struct trainer *trainer, int count)
{
    const struct microbatch_sizes sizes = microbatch_sizes(trainer);

    trainer->microbatches = calloc((size_t)count, sizeof *trainer->microbatches);
    CHECK(trainer->microbatches != NULL, "out of memory");
    trainer->num_microbatches = count;
    for (int i = 0; i < count; i++) {
        microbatch_init(&trainer->microbatches[i], trainer->run, &trainer->groups, &sizes);
    }
}

/* As much as the schedules of the largest global batch need: training's and evaluation's. */
static int create_activations(struct trainer *trainer, const struct trainer_memory *memory)
{
    const struct microbatch_sizes sizes = microbatch_sizes(trainer);
    const int64_t num_microbatches = trainer_num_microbatches(trainer);
    struct pipeline_schedule training, evaluation;
    int num_open;

    TRY(trainer_schedule(trainer, num_microbatches, true, &training));
    TRY(trainer_schedule(trainer, num_microbatches, false, &evaluation));
    num_open = training.max_open_microbatches > evaluation.max_open_microbatches
                   ? training.max_open_microbatches
                   : evaluation.max_open_microbatches;
    if (captured_step_is_wanted(trainer->options)) {
        num_open = (int)num_microbatches;
    }
    create_slots(trainer, training.max_in_flight, memory->slot_bytes);
    create_microbatches(trainer, num_open);
    trainer->boundary = create_arena(trainer, "boundary", memory->boundary_bytes);
    if (trainer->chunks[trainer->num_chunks - 1].place.has_head) {
        trainer->losses = tensor_new(trainer->run, DTYPE_F32, num_microbatches,
                                     microbatch_num_tokens(&trainer->groups, &sizes));
    }
    pipeline_schedule_free(&training);
    pipeline_schedule_free(&evaluation);
    return 0;
}

int trainer_create(struct trainer *trainer, const struct options *options, int64_t vocab_size,
                   const struct device *device, const struct ops *ops,
                   const struct trainer_memory *memory)
{
    memset(trainer, 0, sizeof *trainer);
    trainer->options = options;
    trainer->random_seed = (uint64_t)options->seed;
    TRY(configure(trainer, vocab_size));
    TRY(captured_step_check(options, device));
    TRY(create_groups(trainer));
    /* One call for all experts: between one call for each, the host would wait for the routing. */
    trainer->config.grouped_gemm |= device->kind == DEVICE_CUDA;
    trainer->stream = stream_create(device, ops);
    trainer->host_stream = create_host_stream(trainer);
    trainer->run = create_arena(trainer, "run", memory->run_bytes);
    trainer->scratch = create_arena(trainer, "call", memory->scratch_bytes);
    param_list_init(&trainer->params);
    TRY(init_chunks(trainer));
    allocate_params(trainer);
    TRY(create_activations(trainer, memory));
    moe_metrics_init(&trainer->metrics, trainer->stream, trainer->run, trainer->config.num_layers);
    trainer->grad_norm = tensor_new(trainer->run, DTYPE_F32, 1);
    trainer->grad_scale = tensor_new(trainer->run, DTYPE_F32, 1);
    param_list_initialize(&trainer->params, trainer->stream, (uint64_t)options->seed);
    optimizer_reset_masters(&trainer->optimizer, trainer->stream);
    timers_init(&trainer->timers, (int)options->timing_log_level, NULL);
    timers_wait_for(&trainer->timers, trainer->stream);
    return 0;
}

static void free_activations(struct trainer *trainer)
{
    for (int i = 0; i < trainer->num_slots; i++) {
        stage_saved_free(&trainer->slots[i].stage_saved);
        arena_destroy(trainer->slots[i].saved);
    }
    for (int i = 0; i < trainer->num_microbatches; i++) {
        microbatch_free(&trainer->microbatches[i]);
    }
    free(trainer->slots);
    free(trainer->microbatches);
}

void trainer_destroy(struct trainer *trainer)
{
    if (trainer->stream == NULL) {
        return;
    }
    param_gather_finish(&trainer->buckets);
    captured_step_free(&trainer->captured, trainer->stream);
    free_activations(trainer);
    optimizer_free(&trainer->optimizer);
    grad_buckets_free(&trainer->buckets);
    for (int i = 0; i < trainer->num_chunks; i++) {
        transformer_stage_free(&trainer->chunks[i]);
    }
    free(trainer->chunks);
    param_list_free(&trainer->params);
    arena_destroy(trainer->run);
    arena_destroy(trainer->boundary);
    arena_destroy(trainer->scratch);
    if (trainer->host_stream != trainer->stream) {
        stream_destroy(trainer->host_stream);
    }
    stream_destroy(trainer->stream);
    groups_destroy(&trainer->groups);
    trainer->stream = NULL;
}

int trainer_schedule(const struct trainer *trainer, int64_t num_microbatches, bool training,
                     struct pipeline_schedule *schedule)
{
    const struct pipeline_shape shape = {
        .stage = trainer->groups.pp->rank,
        .num_stages = trainer->groups.pp->size,
        .num_chunks = trainer->num_chunks,
        .num_microbatches = (int)num_microbatches,
        .microbatch_group_size =
            (int)trainer->options->microbatch_group_size_per_virtual_pipeline_stage};

    if (training) {
        return schedule_training(schedule, &shape);
    }
    schedule_forward_only(schedule, &shape);
    return 0;
}

struct pipeline_transport trainer_transport(const struct trainer *trainer)
{
    const struct microbatch_sizes sizes = microbatch_sizes(trainer);
    const int64_t num_tokens = microbatch_num_tokens(&trainer->groups, &sizes);

    return (struct pipeline_transport){
        .forward = trainer->groups.pp,
        .backward = trainer->groups.pp_backward,
        .stream = trainer->stream,
        .arena = trainer->boundary,
        .dtype = trainer->config.dtype,
        .num_rows = tp_region_outside(&trainer->groups, num_tokens),
        .hidden_size = trainer->config.hidden_size,
        .overlap = trainer->num_chunks > 1 && trainer->options->overlap_p2p_communication};
}

struct optimizer_rates trainer_rates(const struct trainer *trainer)
{
    const float lr = (float)lr_schedule_lr(&trainer->lr_schedule, trainer->schedule_samples);

    return (struct optimizer_rates){.lr = lr,
                                    .decoupled_lr = lr,
                                    .weight_decay = (float)lr_schedule_weight_decay(
                                        &trainer->lr_schedule, trainer->schedule_samples)};
}

struct pass trainer_pass(struct trainer *trainer, const struct microbatch *microbatch, int slot,
                         bool training, float aux_loss_scale)
{
    return (struct pass){.stream = trainer->stream,
                         .groups = &trainer->groups,
                         .saved = trainer->slots[slot].saved,
                         .scratch = trainer->scratch,
                         .dtype = trainer->config.dtype,
                         .training = training,
                         .seed = trainer->random_seed,
                         .num_sequences = microbatch->sample_id.dim[0],
                         .token = microbatch->token,
                         .label = microbatch->label,
                         .position = microbatch->position,
                         .token_id = microbatch->token_id,
                         .sample_id = microbatch->sample_id,
                         .document_start = microbatch->document_start,
                         .loss_weight = microbatch->loss_weight,
                         .aux_loss_scale = aux_loss_scale,
                         .metrics = training ? &trainer->metrics : NULL};
}

void trainer_memory_bytes(const struct trainer *trainer, size_t *used, size_t *peak)
{
    const struct arena *const arenas[] = {trainer->run, trainer->boundary, trainer->scratch,
                                          trainer->stream->scratch};

    *used = 0;
    *peak = 0;
    for (size_t i = 0; i < sizeof arenas / sizeof arenas[0]; i++) {
        *used += arena_used_bytes(arenas[i]);
        *peak += arena_peak_bytes(arenas[i]);
    }
    for (int i = 0; i < trainer->num_slots; i++) {
        *used += arena_used_bytes(trainer->slots[i].saved);
        *peak += arena_peak_bytes(trainer->slots[i].saved);
    }
}

void trainer_sum(const struct trainer *trainer, struct comm *comm, double *values, int count)
{
    struct tensor sum = tensor_of(values, DTYPE_F64, count);

    if (comm->size > 1) {
        comm_wait(comm_all_reduce(comm, trainer->host_stream, &sum, COMM_SUM),
                  trainer->host_stream);
    }
}

void trainer_barrier(const struct trainer *trainer)
{
    double none = 0.0;

    trainer_sum(trainer, trainer->groups.world, &none, 1);
}
