/* model_setup.h - what validated options mean for the model, the optimizer and the schedules. */
#ifndef CADRE_TRAIN_MODEL_SETUP_H
#define CADRE_TRAIN_MODEL_SETUP_H

#include "args/options.h"
#include "model/flops.h"
#include "model/model_config.h"
#include "optim/batch_size_schedule.h"
#include "optim/lr_schedule.h"
#include "optim/optimizer.h"
#include "parallel/rank_grid.h"

/* vocab_size: of the tokenizer, before padding. */
int model_config_from_options(struct model_config *config, const struct options *options,
                              int64_t vocab_size);
struct rank_grid_sizes rank_grid_sizes_from_options(const struct options *options);
struct optimizer_config optimizer_config_from_options(const struct options *options);
int batch_size_config_from_options(struct batch_size_config *config, const struct options *options);
int lr_schedule_config_from_options(struct lr_schedule_config *config,
                                    const struct options *options);
/* Iterations of the whole training; with --train-samples, as many as the batch ramp makes of them.
 */
int64_t training_num_iterations(const struct options *options,
                                const struct batch_size_config *batch_size);
struct flops_sizes flops_sizes_from_config(const struct model_config *config, int64_t batch_size);

#endif
