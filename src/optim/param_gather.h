/* param_gather.h - with the distributed optimizer: after a step every rank gives the values it owns
 * to its group, an all_gather for each bucket: of N elements of s bytes in a group of n ranks each
 * rank sends s N (n-1)/n bytes. Without it nothing here does anything.
 *
 * With overlap_param_gather the buckets are gathered during the next forward pass, in the order in
 * which it needs them: the hook values_needed waits for the buckets of a layer and sends the next
 * ones off. Until then the others' parts of a bucket are those of the step before: whoever reads
 * parameters without the hooks (checkpoints, evaluation, the end) calls param_gather_finish first.
 */
#ifndef CADRE_OPTIM_PARAM_GATHER_H
#define CADRE_OPTIM_PARAM_GATHER_H

#include "optim/grad_buckets.h"

/* After optimizer_step. Without overlap all values are there when it returns. */
void param_gather_start(struct grad_buckets *buckets);
/* In its place, with overlap: the forward pass that needs the values gathers all of them. */
void param_gather_leave_to_forward(struct grad_buckets *buckets);
/* The parameters [begin, end) (registration indices) are about to be read. */
void param_gather_need(struct grad_buckets *buckets, int begin, int end);
/* All values are there when it returns. */
void param_gather_finish(struct grad_buckets *buckets);
/* In the place of finish: a graph has been launched, and all gathers are part of it. */
void param_gather_finished_by_graph(struct grad_buckets *buckets);

#endif
