#include "train/comm_log.h"

#include <stdlib.h>

#include "base/check.h"
#include "base/log.h"

/* [ranks][groups][kinds] of calls and bytes; every rank fills its row, and the sum has all. */
static double *gather_counters(const struct trainer *trainer, int num_counters)
{
    const struct comm *world = trainer->groups.world;
    const int num_values = world->size * num_counters * 2;
    double *values = calloc((size_t)num_values, sizeof *values);
    double *mine = values + (ptrdiff_t)world->rank * num_counters * 2;

    CHECK(values != NULL, "out of memory");
    for (int i = 0; i < num_counters; i++) {
        const struct comm *comm = groups_comm(&trainer->groups, i / NUM_COMM_KINDS);
        const struct comm_counter *counter = &comm->counters[i % NUM_COMM_KINDS];

        mine[2 * i] = (double)counter->num_calls;
        mine[2 * i + 1] = (double)counter->sent_bytes;
    }
    trainer_sum(trainer, trainer->groups.world, values, num_values);
    return values;
}

/* The largest of the ranks' values at index. */
static double largest(const double *values, int num_ranks, int row, int index)
{
    double most = 0.0;

    for (int rank = 0; rank < num_ranks; rank++) {
        const double value = values[(ptrdiff_t)rank * row + index];

        most = value > most ? value : most;
    }
    return most;
}

void comm_log_step(const struct trainer *trainer)
{
    const int num_ranks = trainer->groups.world->size;
    const int num_counters = groups_num_comms() * NUM_COMM_KINDS;
    double *values = gather_counters(trainer, num_counters);

    for (int i = 0; i < num_counters; i++) {
        const struct comm *comm = groups_comm(&trainer->groups, i / NUM_COMM_KINDS);
        const double calls = largest(values, num_ranks, 2 * num_counters, 2 * i);

        if (calls > 0.0) {
            log_info("comm %s (%d ranks) %s: %.0f calls, %.0f bytes sent by rank 0, %.0f by the "
                     "busiest",
                     comm->name, comm->size,
                     comm_kind_name((enum comm_kind)(i % NUM_COMM_KINDS)), calls,
                     values[2 * i + 1], largest(values, num_ranks, 2 * num_counters, 2 * i + 1));
        }
    }
    free(values);
}
