/* evaluate.h - the mean loss over held-out data: sum over unmasked tokens / their number (M11.7).
 * No dropout, no balancing losses; Sinkhorn routers choose by plain top-k. */
#ifndef CADRE_TRAIN_EVALUATE_H
#define CADRE_TRAIN_EVALUATE_H

#include "data/loader.h"
#include "train/trainer.h"

/* num_iterations global batches from the loader. */
int evaluate(struct trainer *trainer, struct loader *loader, int64_t num_iterations,
             double *mean_loss);

#endif
