/* step.h - one training step: forward and backward of every microbatch, clip, optimizer. */
#ifndef CADRE_TRAIN_STEP_H
#define CADRE_TRAIN_STEP_H

#include "data/loader.h"
#include "train/trainer.h"

struct step_result {
    double loss_sum;   /* over unmasked tokens of the global batch */
    double num_tokens; /* unmasked */
    double grad_norm;
    double num_zeros; /* with --log-num-zeros-in-grad */
    bool is_nan;      /* the loss was not finite */
    int64_t num_samples, num_microbatches;
};

/* Takes the next global batch from the loader. On return gradients, parameters, schedule and
 * counters have moved on by a step. A NaN in loss or gradients is an error unless its check is
 * switched off. */
int train_step(struct trainer *trainer, struct loader *loader, struct step_result *result);

#endif
