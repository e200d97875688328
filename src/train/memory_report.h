/* memory_report.h - how much memory a step takes on this rank, known before anything is allocated:
 * the step is run on DEVICE_NULL, by the same code, and its arenas tell their peaks. */
#ifndef CADRE_TRAIN_MEMORY_REPORT_H
#define CADRE_TRAIN_MEMORY_REPORT_H

#include "args/options.h"

struct memory_report {
    int64_t parameters_bytes, gradients_bytes, optimizer_bytes;
    int64_t run_bytes;         /* all of the run arena: the above and the buffers */
    int64_t slot_bytes;        /* peak of what one forward pass keeps for its backward */
    int num_slots;             /* forward passes in flight: the pipeline schedule's count */
    int64_t activations_bytes; /* of all slots */
    int64_t boundary_bytes;    /* peak of what moves between pipeline stages */
    int64_t scratch_bytes;     /* peak within calls */
    int64_t total_bytes;
    /* The most rows that a rank's experts can get, in even loads, and what a step takes then. Where
     * routing is even, and where the load cannot be otherwise, 1 and total_bytes. */
    double most_uneven_load;
    int64_t most_uneven_bytes;
};

/* What a step takes that has even loads, and what the worst one takes. */
int memory_report_compute(struct memory_report *report, const struct options *options,
                          int64_t vocab_size);
void memory_report_print(const struct memory_report *report);

#endif
