/* train_checkpoint.h - the training state as a checkpoint: parameters, optimizer state, router
 * buffers as boxes; counters, schedule, seed and options as the manifest's state. */
#ifndef CADRE_TRAIN_TRAIN_CHECKPOINT_H
#define CADRE_TRAIN_TRAIN_CHECKPOINT_H

#include "ckpt/checkpoint.h"
#include "ckpt/param_items.h"
#include "train/trainer.h"

/* Everything here is called by all ranks; where one of them fails, all do, with one message. */

/* The checkpoint that --load means, or --pretrained-checkpoint where that has none (--finetune):
 * what rank 0 finds. */
enum checkpoint_found train_checkpoint_find(const struct trainer *trainer,
                                            char path[PATH_LENGTH_MAX]);
/* Into --save as iter_X of the trainer's iteration. */
int train_checkpoint_save(struct trainer *trainer);
/* Reads what the options ask for (--finetune, --no-load-optim, --no-load-rng). */
int train_checkpoint_restore(struct trainer *trainer, const struct checkpoint *checkpoint);
/* Reads all parameters and buffers of a model of one stage; the vocabulary's padding may differ. */
int train_checkpoint_read_model(struct transformer_stage *stage, struct stream *stream,
                                const struct checkpoint *checkpoint);

#endif
