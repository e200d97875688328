/* batch_size_schedule.h - the global batch size as a pure function of the samples consumed:
 * constant, or --rampup-batch-size START INCREMENT SAMPLES. */
#ifndef CADRE_OPTIM_BATCH_SIZE_SCHEDULE_H
#define CADRE_OPTIM_BATCH_SIZE_SCHEDULE_H

#include <stdbool.h>
#include <stdint.h>

struct batch_size_config {
    int64_t global_batch_size; /* the final one */
    int64_t micro_batch_size;
    int64_t data_parallel_size;
    bool ramps_up;
    int64_t rampup_start;     /* batch size at sample 0 */
    int64_t rampup_increment; /* added at even distances, until global_batch_size */
    int64_t rampup_samples;   /* after so many samples the final size is reached */
    bool decreases_if_needed; /* round down to a multiple of micro_batch * data_parallel */
};

struct batch_size {
    int64_t global_batch_size; /* as scheduled */
    int64_t running;           /* what the next step takes; less than scheduled only when rounded */
    int64_t num_microbatches;  /* of each data-parallel rank */
};

/* 0, or -1 with error_set() for the first contradiction, sizes that the ramp meets on its way
 * included. batch_size_at needs a config that passed. */
int batch_size_check(const struct batch_size_config *config);
/* The batch of the step that starts after consumed_samples. global_batch_size - running counts as
 * skipped samples. */
struct batch_size batch_size_at(const struct batch_size_config *config, int64_t consumed_samples);

#endif
