/* training_log.h - what a run tells while it trains: the iteration line, TensorBoard scalars,
 * timers, the live line (reference M11). */
#ifndef CADRE_TRAIN_TRAINING_LOG_H
#define CADRE_TRAIN_TRAINING_LOG_H

#include "train/iteration_line.h"
#include "train/progress.h"
#include "train/step.h"
#include "train/tensorboard.h"

enum { LOG_LOSSES_MAX = 1 + NUM_MOE_METRICS };

struct training_log {
    struct trainer *trainer;
    struct tensorboard *board; /* NULL without --tensorboard-dir */
    struct progress progress;
    int64_t num_iterations;           /* of the whole training */
    double loss_sums[LOG_LOSSES_MAX]; /* over the iterations of the interval */
    bool seen[LOG_LOSSES_MAX];
    int64_t num_advanced, num_nan; /* iterations of the interval */
};

int training_log_open(struct training_log *log, struct trainer *trainer, int64_t num_iterations);
void training_log_close(struct training_log *log);
/* After every step, in order; the next one may be under way. With --log-params-norm it must not be:
 * the parameters are read here. */
void training_log_step(struct training_log *log, const struct step_result *result);
/* The block of an evaluation; where: "iteration N", "iteration N on validation set", ... */
void training_log_validation(struct training_log *log, const char *where, double loss);

#endif
