/* trainer.h - everything a training run holds: model, optimizer, memory, schedules, counters. */
#ifndef CADRE_TRAIN_TRAINER_H
#define CADRE_TRAIN_TRAINER_H

#include "args/options.h"
#include "model/transformer_stage.h"
#include "moe/metrics.h"
#include "optim/batch_size_schedule.h"
#include "optim/lr_schedule.h"
#include "optim/optimizer.h"
#include "train/timers.h"

/* The device's copy of one microbatch, and its loss. */
struct device_batch {
    struct tensor token, label, position, document_start; /* [T] I32 */
    struct tensor token_id, sample_id;                    /* [T], [B] I64 */
    struct tensor loss_weight;                            /* [T] f32 */
    struct tensor loss;                                   /* [T] f32, of the forward pass */
};

struct trainer {
    const struct options *options;
    struct model_config config;
    struct groups groups;
    struct stream *stream;
    struct arena *run, *saved, *scratch; /* by lifetime: the run, a microbatch, a call */
    struct transformer_stage stage;
    struct stage_saved stage_saved;
    struct device_batch batch;
    struct moe_metrics metrics;
    struct optimizer optimizer;
    struct tensor grad_norm, grad_scale; /* [1] f32 on the device */
    struct batch_size_config batch_size;
    struct lr_schedule_config lr_schedule;
    struct timers timers;

    uint64_t random_seed;     /* of dropout and jitter: --seed, or the checkpoint's */
    int64_t iteration;        /* completed */
    int64_t consumed_samples; /* of the training data */
    int64_t consumed_valid_samples;
    int64_t skipped_samples;
    int64_t schedule_samples; /* what the learning rate has seen */
    double flops_so_far;
};

/* How large the arenas are made at once; 0: they grow as needed. memory_report.h knows it
 * beforehand. */
struct trainer_memory {
    int64_t run_bytes, saved_bytes, scratch_bytes;
};

/* Memory on device for all of training, parameters initialised from --seed. vocab_size: the
 * tokenizer's. */
int trainer_create(struct trainer *trainer, const struct options *options, int64_t vocab_size,
                   const struct device *device, const struct ops *ops,
                   const struct trainer_memory *memory);
void trainer_destroy(struct trainer *trainer);

/* The rates of the next step. */
struct optimizer_rates trainer_rates(const struct trainer *trainer);
/* A pass over the microbatch in trainer->batch. */
struct pass trainer_pass(struct trainer *trainer, bool training, float aux_loss_scale);

#endif
