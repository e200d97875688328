/* train_checkpoint.h - the training state as a checkpoint: parameters, optimizer state, router
 * buffers as boxes; counters, schedule, seed and options as the manifest's state. */
#ifndef CADRE_TRAIN_TRAIN_CHECKPOINT_H
#define CADRE_TRAIN_TRAIN_CHECKPOINT_H

#include "ckpt/checkpoint.h"
#include "train/trainer.h"

/* Into --save as iter_X of the trainer's iteration. */
int train_checkpoint_save(struct trainer *trainer);
/* Reads what the options ask for (--finetune, --no-load-optim, --no-load-rng). */
int train_checkpoint_restore(struct trainer *trainer, const struct checkpoint *checkpoint);
/* Reads all parameters and buffers of a stage; the vocabulary's padding may differ. */
int train_checkpoint_read_model(struct transformer_stage *stage, struct stream *stream,
                                const struct checkpoint *checkpoint);

/* One parameter's box, read from anywhere into host memory (packed). */
struct param_reader {
    int (*read)(void *context, const struct param *param, void *host);
    void *context;
};
/* Every parameter of the list, through host memory, to the device. */
int param_list_read(struct param_list *params, struct stream *stream,
                    const struct param_reader *reader);

#endif
