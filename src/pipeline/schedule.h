/* schedule.h - a pipeline schedule is data: the list of forward and backward passes of one stage,
 * in order. Generators write it, the executor (executor.h) walks it, tests look at it.
 *
 * Within a chunk, forwards come in the order of the microbatches, and so do backwards: microbatch
 * num_microbatches - 1 is a chunk's last backward. A microbatch is open on a stage from its first
 * forward (chunk 0) to its last backward (chunk 0); microbatches open and close in order, so that
 * microbatch % max_open_microbatches is free when one opens. */
#ifndef CADRE_PIPELINE_SCHEDULE_H
#define CADRE_PIPELINE_SCHEDULE_H

#include <stdbool.h>
#include <stdint.h>

enum pipeline_direction { PIPELINE_FORWARD, PIPELINE_BACKWARD };

struct pipeline_step {
    enum pipeline_direction direction;
    int microbatch, chunk; /* chunk: of the model chunks on this stage */
};

/* What a schedule is made for. */
struct pipeline_shape {
    int stage, num_stages;
    int num_chunks; /* on every stage; 1: not interleaved */
    int num_microbatches;
    int microbatch_group_size; /* of the interleaved schedule; 0: num_stages */
};

struct pipeline_schedule {
    struct pipeline_shape shape; /* the group size is filled in */
    struct pipeline_step *steps;
    int num_steps;
    int max_in_flight; /* forwards whose backward is still to come: sets of saved activations */
    int max_open_microbatches;
};

/* The schedule that training with this shape takes: 1F1B with one chunk on a stage, interleaved
 * with several. */
int schedule_training(struct pipeline_schedule *schedule, const struct pipeline_shape *shape);
/* Forward passes only, for evaluation; any number of microbatches is legal. */
void schedule_forward_only(struct pipeline_schedule *schedule, const struct pipeline_shape *shape);

/* One chunk on each stage: one forward, one backward. At most num_stages - stage microbatches are
 * in flight; with one stage every forward is followed by its backward. */
void schedule_1f1b(struct pipeline_schedule *schedule, const struct pipeline_shape *shape);
/* Several chunks on each of several stages. Fails where the microbatches do not form groups. At
 * most (num_chunks - 1) * group + 2 * (num_stages - stage - 1) + 1 forwards are in flight. */
int schedule_interleaved(struct pipeline_schedule *schedule, const struct pipeline_shape *shape);
void pipeline_schedule_free(struct pipeline_schedule *schedule);

/* The step is on the first chunk of the first stage, or the last chunk of the last. */
bool pipeline_step_is_first(const struct pipeline_shape *shape, const struct pipeline_step *step);
bool pipeline_step_is_last(const struct pipeline_shape *shape, const struct pipeline_step *step);

#endif
