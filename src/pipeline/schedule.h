/* schedule.h - a pipeline schedule is data: the list of forward and backward passes of one stage,
 * in order. Generators write it, the executor (executor.h) walks it, tests look at it. */
#ifndef CADRE_PIPELINE_SCHEDULE_H
#define CADRE_PIPELINE_SCHEDULE_H

#include <stdbool.h>
#include <stdint.h>

enum pipeline_direction { PIPELINE_FORWARD, PIPELINE_BACKWARD };

struct pipeline_step {
    enum pipeline_direction direction;
    int microbatch, chunk; /* chunk: of the model chunks on this stage */
};

struct pipeline_schedule {
    struct pipeline_step *steps;
    int num_steps;
    int max_in_flight; /* forwards whose backward is still to come: sets of saved activations */
};

/* One stage: every forward is followed by its backward. */
void schedule_no_pipeline(struct pipeline_schedule *schedule, int num_microbatches);
/* Forward passes only, for evaluation. */
void schedule_forward_only(struct pipeline_schedule *schedule, int num_microbatches);
void pipeline_schedule_free(struct pipeline_schedule *schedule);

#endif
