#include "pipeline/executor.h"

#include <stdlib.h>

#include "base/check.h"

/* Which forward holds each slot. */
struct slots {
    struct pipeline_step *holder;
    bool *taken;
    int count;
};

static int take_slot(struct slots *slots, const struct pipeline_step *step)
{
    for (int i = 0; i < slots->count; i++) {
        if (!slots->taken[i]) {
            slots->taken[i] = true;
            slots->holder[i] = *step;
            return i;
        }
    }
    PANIC("microbatch %d of chunk %d would be forward number %d in flight", step->microbatch,
          step->chunk, slots->count + 1);
}

static int find_slot(const struct slots *slots, const struct pipeline_step *step)
{
    for (int i = 0; i < slots->count; i++) {
        if (slots->taken[i] && slots->holder[i].microbatch == step->microbatch &&
            slots->holder[i].chunk == step->chunk) {
            return i;
        }
    }
    PANIC("backward of microbatch %d of chunk %d comes before its forward", step->microbatch,
          step->chunk);
}

static bool has_backward(const struct pipeline_schedule *schedule)
{
    return schedule->num_steps > 0 &&
           schedule->steps[schedule->num_steps - 1].direction == PIPELINE_BACKWARD;
}

static int walk(const struct pipeline_schedule *schedule, const struct pipeline_work *work,
                struct slots *slots)
{
    const bool keep = has_backward(schedule);

    for (int i = 0; i < schedule->num_steps; i++) {
        const struct pipeline_step *step = &schedule->steps[i];

        if (step->direction == PIPELINE_FORWARD) {
            TRY(work->forward(work->context, step, keep ? take_slot(slots, step) : 0));
        } else {
            const int slot = find_slot(slots, step);

            TRY(work->backward(work->context, step, slot));
            slots->taken[slot] = false;
        }
    }
    return 0;
}

int pipeline_execute(const struct pipeline_schedule *schedule, const struct pipeline_work *work)
{
    struct slots slots = {.count = schedule->max_in_flight};
    int result;

    slots.holder = calloc((size_t)slots.count, sizeof *slots.holder);
    slots.taken = calloc((size_t)slots.count, sizeof *slots.taken);
    CHECK(slots.holder != NULL && slots.taken != NULL, "out of memory");
    result = walk(schedule, work, &slots);
    free(slots.holder);
    free(slots.taken);
    return result;
}
