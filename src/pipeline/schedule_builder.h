/* schedule_builder.h - what the generators of schedules share. Not for users of schedules. */
#ifndef CADRE_PIPELINE_SCHEDULE_BUILDER_H
#define CADRE_PIPELINE_SCHEDULE_BUILDER_H

#include "pipeline/schedule.h"

/* Writes num_warmup forwards, then one forward and one backward in turn, then the backwards left,
 * and counts what is in flight. */
void schedule_build(struct pipeline_schedule *schedule, const struct pipeline_shape *shape,
                    int num_warmup);

#endif
