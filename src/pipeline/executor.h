/* executor.h - walks a schedule. */
#ifndef CADRE_PIPELINE_EXECUTOR_H
#define CADRE_PIPELINE_EXECUTOR_H

#include "pipeline/schedule.h"

/* What the steps do. slot < max_in_flight tells forward where to keep what backward will need: a
 * forward's slot is free, its backward gets the same. Each returns 0, or -1 with an error, which
 * ends the walk. */
struct pipeline_work {
    int (*forward)(void *context, const struct pipeline_step *step, int slot);
    int (*backward)(void *context, const struct pipeline_step *step, int slot);
    void *context;
};

int pipeline_execute(const struct pipeline_schedule *schedule, const struct pipeline_work *work);

#endif
