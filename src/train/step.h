/* step.h - one training step: forward and backward of every microbatch, clip, optimizer.
 *
 * A step is started and finished. The start issues all its work, and the moment that is done
 * parameters, schedule and counters are those of the next step, which may be started before the
 * figures of this one are read:
 *
 *     train_step_start(trainer, loader, &step);       the host waits for nothing
 *     train_step_read_metrics(trainer, &step);        for the log
 *     train_step_finish(trainer, &step);              waits; step.result is complete
 *     train_step_free(trainer, &step);                also instead of finish
 *
 * The start of a step waits for the device all the same where experts on other ranks need to be
 * told how many rows come, where a flag asks for figures that the device has (timers above level 0,
 * --log-num-zeros-in-grad), and where GPUs exchange tensors through the host. With several ranks,
 * hosts wait for each other in a finish, and with --calculate-per-token-loss in a start. */
#ifndef CADRE_TRAIN_STEP_H
#define CADRE_TRAIN_STEP_H

#include "data/loader.h"
#include "train/loss_reading.h"
#include "train/trainer.h"

struct step_result {
    double loss_sum;   /* over unmasked tokens of the global batch */
    double num_tokens; /* unmasked */
    double grad_norm;
    double num_zeros; /* with --log-num-zeros-in-grad */
    bool is_nan;      /* the loss was not finite */
    int64_t num_samples, num_microbatches;
    /* After the step. */
    int64_t iteration, consumed_samples, skipped_samples;
    double learning_rate;
    float *moe_metrics; /* [NUM_MOE_METRICS, num_layers], the step's; NULL: not read */
    bool has_metric[NUM_MOE_METRICS]; /* a layer of any rank reports it */
};

struct step {
    struct step_result result;
    struct loss_reading loss;
    void *grad_norm, *moe_metrics; /* reads; NULL: none under way */
};

/* Takes the next global batch from the loader. */
int train_step_start(struct trainer *trainer, struct loader *loader, struct step *step);
/* Starts the reading of the step's MoE metrics and clears them. All ranks call it. */
void train_step_read_metrics(struct trainer *trainer, struct step *step);
/* A NaN in loss or gradients is an error unless its check is switched off: nothing of the trainer
 * may be saved then, though the update has been made. */
int train_step_finish(struct trainer *trainer, struct step *step);
void train_step_free(struct trainer *trainer, struct step *step);

/* Start and finish. */
int train_step(struct trainer *trainer, struct loader *loader, struct step_result *result);

#endif
