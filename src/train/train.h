/* train.h - `cadre pretrain`: data, model, checkpoint, the training loop, evaluation. */
#ifndef CADRE_TRAIN_TRAIN_H
#define CADRE_TRAIN_TRAIN_H

#include "args/options.h"

/* Validated options. 0: trained, or left as an --exit- flag says. */
int train(const struct options *options);

#endif
