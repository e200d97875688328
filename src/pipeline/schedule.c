/* schedule.c - every schedule goes through the forwards in one order, the same on all stages, and
 * through the backwards in that order with the chunks reversed. So messages between two stages are
 * received in the order in which they are sent. Schedules differ only in how many forwards come
 * before the first backward. */
#include "pipeline/schedule.h"

#include <stdlib.h>

#include "base/check.h"
#include "pipeline/schedule_builder.h"

static int at_most(int value, int limit)
{
    return value < limit ? value : limit;
}

/* Microbatches in groups; within a group all of them through chunk 0, then chunk 1, ... (M5.5). The
 * last group may be smaller. */
static struct pipeline_step forward_step(const struct pipeline_shape *shape, int index)
{
    const int group = shape->microbatch_group_size;
    const int first = index / (group * shape->num_chunks) * group;
    const int size = at_most(shape->num_microbatches - first, group);
    const int place = index - first * shape->num_chunks;

    return (struct pipeline_step){PIPELINE_FORWARD, first + place % size, place / size};
}

static struct pipeline_step backward_step(const struct pipeline_shape *shape, int index)
{
    struct pipeline_step step = forward_step(shape, index);

    step.direction = PIPELINE_BACKWARD;
    step.chunk = shape->num_chunks - 1 - step.chunk;
    return step;
}

static void schedule_begin(struct pipeline_schedule *schedule, const struct pipeline_shape *shape,
                           int passes_of_microbatch)
{
    const int num_steps = passes_of_microbatch * shape->num_microbatches;

    CHECK(shape->stage >= 0 && shape->stage < shape->num_stages && shape->num_chunks >= 1 &&
              shape->num_microbatches >= 1,
          "stage %d of %d, %d chunks, %d microbatches", shape->stage, shape->num_stages,
          shape->num_chunks, shape->num_microbatches);
    *schedule = (struct pipeline_schedule){.shape = *shape};
    if (shape->microbatch_group_size == 0) {
        schedule->shape.microbatch_group_size = shape->num_stages;
    }
    schedule->steps = calloc((size_t)num_steps, sizeof *schedule->steps);
    CHECK(schedule->steps != NULL, "out of memory for %d steps", num_steps);
}

static void schedule_add(struct pipeline_schedule *schedule, struct pipeline_step step)
{
    schedule->steps[schedule->num_steps++] = step;
}

/* last: the step that ends a microbatch's stay on the stage. */
static void count_in_flight(struct pipeline_schedule *schedule, enum pipeline_direction last,
                            int last_chunk)
{
    int in_flight = 0, open = 0;

    for (int i = 0; i < schedule->num_steps; i++) {
        const struct pipeline_step *step = &schedule->steps[i];

        in_flight += step->direction == PIPELINE_FORWARD ? 1 : -1;
        open += step->direction == PIPELINE_FORWARD && step->chunk == 0 ? 1 : 0;
        if (in_flight > schedule->max_in_flight) {
            schedule->max_in_flight = in_flight;
        }
        if (open > schedule->max_open_microbatches) {
            schedule->max_open_microbatches = open;
        }
        open -= step->direction == last && step->chunk == last_chunk ? 1 : 0;
    }
}

void schedule_build(struct pipeline_schedule *schedule, const struct pipeline_shape *shape,
                    int num_warmup)
{
    const int num_forwards = shape->num_chunks * shape->num_microbatches;

    schedule_begin(schedule, shape, 2 * shape->num_chunks);
    num_warmup = at_most(num_warmup, num_forwards);
    for (int i = 0; i < num_forwards + num_warmup; i++) {
        if (i < num_forwards) {
            schedule_add(schedule, forward_step(&schedule->shape, i));
        }
        if (i >= num_warmup) {
            schedule_add(schedule, backward_step(&schedule->shape, i - num_warmup));
        }
    }
    count_in_flight(schedule, PIPELINE_BACKWARD, 0);
}

void schedule_forward_only(struct pipeline_schedule *schedule, const struct pipeline_shape *shape)
{
    schedule_begin(schedule, shape, shape->num_chunks);
    for (int i = 0; i < shape->num_chunks * shape->num_microbatches; i++) {
        schedule_add(schedule, forward_step(&schedule->shape, i));
    }
    count_in_flight(schedule, PIPELINE_FORWARD, shape->num_chunks - 1);
    schedule->max_in_flight = 1; /* nothing is kept */
}

int schedule_training(struct pipeline_schedule *schedule, const struct pipeline_shape *shape)
{
    if (shape->num_chunks > 1) {
        return schedule_interleaved(schedule, shape);
    }
    schedule_1f1b(schedule, shape);
    return 0;
}

void pipeline_schedule_free(struct pipeline_schedule *schedule)
{
    free(schedule->steps);
    schedule->steps = NULL;
}

bool pipeline_step_is_first(const struct pipeline_shape *shape, const struct pipeline_step *step)
{
    return shape->stage == 0 && step->chunk == 0;
}

bool pipeline_step_is_last(const struct pipeline_shape *shape, const struct pipeline_step *step)
{
    return shape->stage == shape->num_stages - 1 && step->chunk == shape->num_chunks - 1;
}
