#include "train/walk.h"

#include <math.h>

#include "base/check.h"

/* The microbatch of a step: loaded when its first chunk here comes, kept until its last one is
 * done. */
static struct microbatch *find_microbatch(struct trainer *trainer, int number)
{
    for (int i = 0; i < trainer->num_microbatches; i++) {
        if (trainer->microbatches[i].number == number) {
            return &trainer->microbatches[i];
        }
    }
    return NULL;
}

/* d(total)/d(loss of an unmasked token): the mean over the microbatch's tokens and the
 * microbatches, or 1 with --calculate-per-token-loss, whose division comes last. The reduction of
 * gradients divides by DP and CP; under CP every rank has only a part of the tokens. */
static double loss_scale(const struct batch_walk *walk, const struct microbatch *microbatch)
{
    if (walk->trainer->options->calculate_per_token_loss) {
        return 1.0;
    }
    return (double)walk->trainer->groups.cp->size /
           (fmax(microbatch->num_all_unmasked, 1.0) * (double)walk->num_microbatches);
}

/* Balancing losses are means over the microbatch: M1.8. */
static float aux_loss_scale(const struct batch_walk *walk, const struct microbatch *microbatch)
{
    if (walk->trainer->options->calculate_per_token_loss) {
        return (float)microbatch->num_all_tokens;
    }
    return (float)walk->trainer->groups.cp->size / (float)walk->num_microbatches;
}

static bool reads_loss(const struct batch_walk *walk)
{
    const struct trainer *trainer = walk->trainer;

    return walk->loader != NULL && trainer->chunks[trainer->num_chunks - 1].place.has_head;
}

static int load_microbatch(struct batch_walk *walk, int number, struct microbatch **loaded)
{
    struct trainer *trainer = walk->trainer;
    struct microbatch *microbatch = find_microbatch(trainer, -1);
    const struct batch *batch;

    CHECK(microbatch != NULL, "more than %d microbatches are open", trainer->num_microbatches);
    microbatch->number = number;
    *loaded = microbatch;
    if (walk->loader == NULL) {
        return 0;
    }
    timers_start(&trainer->timers, "batch-generator", 2);
    TRY(loader_next(walk->loader, &batch));
    timers_stop(&trainer->timers, "batch-generator", 2);
    microbatch_take(microbatch, &trainer->groups, batch);
    microbatch_upload(microbatch, trainer->stream, loss_scale(walk, microbatch));
    if (reads_loss(walk)) {
        loss_reading_add(&walk->loss, number, microbatch->loss_mask);
    }
    return 0;
}

/* The row of the microbatch's losses, [T]. */
static struct tensor loss_of(const struct trainer *trainer, int number)
{
    const struct tensor row = tensor_rows(&trainer->losses, number, 1);

    return tensor_view(&row, trainer->losses.dim[1]);
}

static int forward(void *context, const struct pipeline_step *step, int slot_index,
                   const struct tensor *input, struct tensor *output)
{
    struct batch_walk *walk = context;
    struct trainer *trainer = walk->trainer;
    struct transformer_stage *chunk = &trainer->chunks[step->chunk];
    struct activation_slot *slot = &trainer->slots[slot_index];
    struct microbatch *microbatch = find_microbatch(trainer, step->microbatch);
    const struct param_hooks hooks = grad_buckets_hooks(&trainer->buckets, false);
    struct tensor loss;

    if (microbatch == NULL) {
        TRY(load_microbatch(walk, step->microbatch, &microbatch));
    }
    slot->pass = trainer_pass(trainer, microbatch, slot_index, walk->training,
                              aux_loss_scale(walk, microbatch));
    slot->pass.overwrite_grads = step->microbatch == 0;
    slot->pass.hooks = &hooks;
    slot->pass.measured_load = walk->measured_load;
    if (chunk->place.has_head) {
        loss = loss_of(trainer, step->microbatch);
    }
    timers_start(&trainer->timers, "forward-compute", 2);
    transformer_stage_forward(chunk, &slot->pass, input, output,
                              chunk->place.has_head ? &loss : NULL, &slot->stage_saved);
    timers_stop(&trainer->timers, "forward-compute", 2);
    slot->pass.hooks = NULL;
    if (!walk->training && step->chunk == trainer->num_chunks - 1) {
        microbatch->number = -1;
    }
    return 0;
}

static int backward(void *context, const struct pipeline_step *step, int slot_index,
                    const struct tensor *d_output, struct tensor *d_input)
{
    struct batch_walk *walk = context;
    struct trainer *trainer = walk->trainer;
    struct activation_slot *slot = &trainer->slots[slot_index];
    const bool is_last = step->microbatch == walk->num_microbatches - 1;
    const struct param_hooks hooks = grad_buckets_hooks(&trainer->buckets, is_last);

    slot->pass.hooks = &hooks;
    timers_start(&trainer->timers, "backward-compute", 2);
    transformer_stage_backward(&trainer->chunks[step->chunk], &slot->pass, d_output, d_input,
                               &slot->stage_saved);
    timers_stop(&trainer->timers, "backward-compute", 2);
    slot->pass.hooks = NULL;
    if (step->chunk == 0) {
        find_microbatch(trainer, step->microbatch)->number = -1;
    }
    return 0;
}

void batch_walk_begin(struct batch_walk *walk)
{
    if (reads_loss(walk)) {
        loss_reading_begin(&walk->loss, walk->num_microbatches, walk->trainer->losses.dim[1]);
    }
}

int batch_walk_load_all(struct batch_walk *walk)
{
    for (int i = 0; i < (int)walk->num_microbatches; i++) {
        struct microbatch *microbatch;

        TRY(load_microbatch(walk, i, &microbatch));
    }
    return 0;
}

int batch_walk_pass_all(struct batch_walk *walk)
{
    struct trainer *trainer = walk->trainer;
    const struct pipeline_transport transport = trainer_transport(trainer);
    struct pipeline_schedule schedule;
    int result;

    TRY(trainer_schedule(trainer, walk->num_microbatches, walk->training, &schedule));
    result = pipeline_execute(
        &schedule,
        &(struct pipeline_work){.forward = forward, .backward = backward, .context = walk},
        &transport);
    pipeline_schedule_free(&schedule);
    return result;
}

void batch_walk_end(struct batch_walk *walk)
{
    struct trainer *trainer = walk->trainer;

    for (int i = 0; i < trainer->num_microbatches; i++) {
        trainer->microbatches[i].number = -1;
    }
    if (reads_loss(walk)) {
        loss_reading_start(&walk->loss, trainer->stream, &trainer->losses);
    }
}

int batch_walk_run(struct batch_walk *walk)
{
    batch_walk_begin(walk);
    TRY(batch_walk_pass_all(walk));
    batch_walk_end(walk);
    return 0;
}
