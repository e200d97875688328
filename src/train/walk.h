/* walk.h - a global batch on its way through this rank's schedule: loads and uploads microbatches,
 * runs forward and backward passes, collects the loss. Training and evaluation both use it. */
#ifndef CADRE_TRAIN_WALK_H
#define CADRE_TRAIN_WALK_H

#include "train/trainer.h"

struct batch_walk {
    struct trainer *trainer;
    struct loader *loader;    /* NULL: memory is measured, nothing is read */
    int64_t num_microbatches; /* of this data-parallel rank */
    bool training;
    double measured_load;        /* of pass.h, where memory is measured */
    double loss_sum, num_tokens; /* of this rank's unmasked tokens, on the last stage */
    bool is_nan;                 /* the loss was not finite */
};

/* Adds to loss_sum and num_tokens, and in training to the gradients. A loss that is not finite is
 * an error unless its check is switched off. */
int batch_walk_run(struct batch_walk *walk);
/* loss_sum, num_tokens and is_nan over all ranks. */
void batch_walk_sum_over_ranks(struct batch_walk *walk);

#endif
