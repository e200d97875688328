/* upcycle.h - --moe-use-upcycling: a dense checkpoint becomes a mixture-of-experts model
 * (Komatsuzaki et al. 2023; granular: He et al. 2024), reference M8.10. */
#ifndef CADRE_TRAIN_UPCYCLE_H
#define CADRE_TRAIN_UPCYCLE_H

#include "ckpt/checkpoint.h"
#include "train/trainer.h"

/* Fills the trainer's parameters from a dense checkpoint; training starts at iteration 0. */
int upcycle_restore(struct trainer *trainer, const struct checkpoint *dense);

#endif
