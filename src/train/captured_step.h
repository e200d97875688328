/* captured_step.h - --cuda-graph-impl full_iteration: forward and backward of all microbatches of a
 * step as one launch.
 *
 * The first steps run op by op (--cuda-graph-warmup-steps): arenas grow to their size, libraries
 * choose their algorithms, ranks find each other. Then the passes of a step are captured once, and
 * launched in each step until the number of microbatches changes. What differs from step to step is
 * in memory that the graph reads: microbatches are uploaded before the launch, each to a place of
 * its own, and the losses are read after it.
 *
 * What ranks send each other within the passes is part of the graph, over NCCL: with
 * --overlap-grad-reduce all of the reduction of gradients, with --overlap-param-gather all gathers
 * of parameters. Otherwise these stay outside, as do clipping and the optimizer. */
#ifndef CADRE_TRAIN_CAPTURED_STEP_H
#define CADRE_TRAIN_CAPTURED_STEP_H

#include <stdbool.h>
#include <stdint.h>

struct batch_walk;
struct comm_counter;
struct device;
struct options;
struct stream;

struct captured_step {
    int64_t num_steps;             /* run so far */
    int64_t num_microbatches;      /* of the graph */
    void *graph;                   /* NULL: not captured */
    struct comm_counter *counters; /* [groups][kinds]: what a launch moves */
};

bool captured_step_is_wanted(const struct options *options);
/* An error where the flags want it and the device or the transport cannot. */
int captured_step_check(const struct options *options, const struct device *device);
/* What batch_walk_run does. A step that --profile looks at runs op by op. */
int captured_step_run(struct captured_step *captured, struct batch_walk *walk);
/* What of a step is captured, in the order of the stream. */
int captured_step_pass_all(struct batch_walk *walk);
/* After a run: whether the next step gathers the parameters in its graph. */
bool captured_step_gathers(const struct captured_step *captured, const struct options *options);
void captured_step_free(struct captured_step *captured, struct stream *stream);

#endif
