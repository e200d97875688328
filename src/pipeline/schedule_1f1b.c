#include "base/check.h"
#include "pipeline/schedule_builder.h"

/* The first backward reaches this stage when the microbatch has been to the last stage and back:
 * meanwhile one forward for each stage behind this one (M5.4). */
void schedule_1f1b(struct pipeline_schedule *schedule, const struct pipeline_shape *shape)
{
    CHECK(shape->num_chunks == 1, "1F1B with %d chunks", shape->num_chunks);
    schedule_build(schedule, shape, shape->num_stages - shape->stage - 1);
}
