/* walk.h - a global batch on its way through this rank's schedule: loads and uploads microbatches,
 * runs forward and backward passes, starts the reading of the losses. Training and evaluation both
 * use it. Nothing in it waits for the device. */
#ifndef CADRE_TRAIN_WALK_H
#define CADRE_TRAIN_WALK_H

#include "train/loss_reading.h"
#include "train/trainer.h"

struct batch_walk {
    struct trainer *trainer;
    struct loader *loader;    /* NULL: memory is measured, nothing is read */
    int64_t num_microbatches; /* of this data-parallel rank */
    bool training;
    double measured_load;     /* of pass.h, where memory is measured */
    struct loss_reading loss; /* the caller finishes it */
};

/* Adds to the gradients in training. The caller finishes walk->loss, also after an error. */
int batch_walk_run(struct batch_walk *walk);

/* What it consists of, for who puts something else in the place of the passes. */
void batch_walk_begin(struct batch_walk *walk);
int batch_walk_load_all(struct batch_walk *walk); /* needs a place for each microbatch */
int batch_walk_pass_all(struct batch_walk *walk); /* loads what is not loaded yet */
void batch_walk_end(struct batch_walk *walk);     /* frees the places, starts walk->loss */

#endif
