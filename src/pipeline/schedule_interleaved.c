/* schedule_interleaved.c - M5.5, with the rules of Megatron's HEAD: a group may be larger than the
 * number of stages, and when there are just enough microbatches for one group, the last stages
 * begin with backwards as early as with many (Megatron 0.9 ran all forwards first, which takes the
 * same time and more memory). */
#include "base/check.h"
#include "pipeline/schedule_builder.h"

#define MICROBATCHES                                                                               \
    "--global-batch-size / (--micro-batch-size * data-parallel size) = %d microbatches"

/* A group smaller than the number of stages would wait for its own first microbatch to come around.
 */
static int check_groups(const struct pipeline_shape *shape, int group)
{
    const int count = shape->num_microbatches, rest = count % group;

    if (shape->num_stages < 2) {
        return error_set("--num-layers-per-virtual-pipeline-stage: the interleaved schedule needs "
                         "--pipeline-model-parallel-size of at least 2, not %d",
                         shape->num_stages);
    }
    if (group < shape->num_stages) {
        return error_set("--microbatch-group-size-per-virtual-pipeline-stage %d: must be at least "
                         "--pipeline-model-parallel-size %d",
                         group, shape->num_stages);
    }
    if (group == shape->num_stages && rest != 0) {
        return error_set(MICROBATCHES ": must be a multiple of --pipeline-model-parallel-size %d "
                                      "with --num-layers-per-virtual-pipeline-stage",
                         count, group);
    }
    if (group > count || (rest > 0 && rest < shape->num_stages)) {
        return error_set(MICROBATCHES
                         ": groups of --microbatch-group-size-per-virtual-pipeline-stage %d leave "
                         "%d; must leave 0, or at least --pipeline-model-parallel-size %d after "
                         "one whole group",
                         count, group, rest, shape->num_stages);
    }
    return 0;
}

int schedule_interleaved(struct pipeline_schedule *schedule, const struct pipeline_shape *shape)
{
    const int group =
        shape->microbatch_group_size > 0 ? shape->microbatch_group_size : shape->num_stages;

    TRY(check_groups(shape, group));
    /* Until the last chunk's first forward; and a step forth and a step back for each stage behind
     * this one, so that neither direction waits for the other. */
    schedule_build(schedule, shape,
                   (shape->num_chunks - 1) * group + 2 * (shape->num_stages - shape->stage - 1));
    return 0;
}
