/* comm_log.h - --log-comm: what a step sent, by group and kind of collective. docs/parallelism.md
 * has the formulas. */
#ifndef CADRE_TRAIN_COMM_LOG_H
#define CADRE_TRAIN_COMM_LOG_H

#include "train/trainer.h"

/* Called by all ranks right after a step that began with groups_reset_counters. Rank 0 prints a
 * line for each group and kind:
 *
 *     comm tp (2 ranks) all_gather: 24 calls, 98304 bytes sent by rank 0, 98304 by the busiest
 */
void comm_log_step(const struct trainer *trainer);

#endif
