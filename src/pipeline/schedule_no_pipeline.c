#include <stdlib.h>

#include "base/check.h"
#include "pipeline/schedule.h"

static void allocate_steps(struct pipeline_schedule *schedule, int num_steps)
{
    schedule->steps = calloc((size_t)num_steps, sizeof *schedule->steps);
    CHECK(schedule->steps != NULL, "out of memory for %d steps", num_steps);
    schedule->num_steps = num_steps;
    schedule->max_in_flight = 1;
}

void schedule_no_pipeline(struct pipeline_schedule *schedule, int num_microbatches)
{
    allocate_steps(schedule, 2 * num_microbatches);
    for (int m = 0; m < num_microbatches; m++) {
        schedule->steps[2 * m] = (struct pipeline_step){PIPELINE_FORWARD, m, 0};
        schedule->steps[2 * m + 1] = (struct pipeline_step){PIPELINE_BACKWARD, m, 0};
    }
}

void schedule_forward_only(struct pipeline_schedule *schedule, int num_microbatches)
{
    allocate_steps(schedule, num_microbatches);
    for (int m = 0; m < num_microbatches; m++) {
        schedule->steps[m] = (struct pipeline_step){PIPELINE_FORWARD, m, 0};
    }
}

void pipeline_schedule_free(struct pipeline_schedule *schedule)
{
    free(schedule->steps);
    schedule->steps = NULL;
}
