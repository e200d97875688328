/* trainer.h - everything a training run holds on this rank: model chunks, optimizer, memory,
 * schedules, counters. */
#ifndef CADRE_TRAIN_TRAINER_H
#define CADRE_TRAIN_TRAINER_H

#include "args/options.h"
#include "model/transformer_stage.h"
#include "moe/metrics.h"
#include "optim/batch_size_schedule.h"
#include "optim/lr_schedule.h"
#include "optim/optimizer.h"
#include "optim/param_gather.h"
#include "pipeline/executor.h"
#include "pipeline/layers.h"
#include "train/captured_step.h"
#include "train/microbatch.h"
#include "train/timers.h"

/* What a forward pass leaves for its backward. */
struct activation_slot {
    struct arena *saved;
    struct stage_saved stage_saved;
    struct pass pass;
};

struct trainer {
    const struct options *options;
    struct model_config config;
    struct groups groups;
    struct stream *stream;
    struct stream *host_stream; /* what ranks tell each other from host to host */
    /* By lifetime: the run, activations between stages, a call; the microbatches' are in slots. */
    struct arena *run, *boundary, *scratch;
    struct param_list params; /* of all chunks */
    struct transformer_stage *chunks;
    int num_chunks;
    struct activation_slot *slots; /* as many as the schedule has forwards in flight */
    int num_slots;
    struct microbatch *microbatches; /* as many as the schedule has open at once */
    int num_microbatches;
    struct tensor losses; /* [M,T] f32 of a global batch's tokens, where the head is */
    struct moe_metrics metrics;
    struct grad_buckets buckets;
    struct optimizer optimizer;
    struct tensor grad_norm, grad_scale; /* [1] f32 on the device */
    struct batch_size_config batch_size;
    struct lr_schedule_config lr_schedule;
    struct timers timers;
    struct captured_step captured; /* --cuda-graph-impl full_iteration */

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
    int64_t run_bytes, slot_bytes, boundary_bytes, scratch_bytes; /* slot: of each */
};

/* Memory on device for all of training, parameters initialised from --seed. vocab_size: the
 * tokenizer's. */
int trainer_create(struct trainer *trainer, const struct options *options, int64_t vocab_size,
                   const struct device *device, const struct ops *ops,
                   const struct trainer_memory *memory);
void trainer_destroy(struct trainer *trainer);

/* Of a full global batch, on each data-parallel rank. */
int64_t trainer_num_microbatches(const struct trainer *trainer);
/* This rank's schedule for a global batch of num_microbatches: forward and backward, or forward
 * only for evaluation. */
int trainer_schedule(const struct trainer *trainer, int64_t num_microbatches, bool training,
                     struct pipeline_schedule *schedule);
/* How its activations move. */
struct pipeline_transport trainer_transport(const struct trainer *trainer);
/* The rates of the next step. */
struct optimizer_rates trainer_rates(const struct trainer *trainer);
/* A pass over a microbatch, whose activations are kept in the slot. */
struct pass trainer_pass(struct trainer *trainer, const struct microbatch *microbatch, int slot,
                         bool training, float aux_loss_scale);
/* values[count] = their sums over the ranks of the group. Hosts wait for each other, not for a
 * device. */
void trainer_sum(const struct trainer *trainer, struct comm *comm, double *values, int count);
/* No rank goes on before all have come. */
void trainer_barrier(const struct trainer *trainer);
/* Bytes in use and the peak, over all arenas of this rank. */
void trainer_memory_bytes(const struct trainer *trainer, size_t *used, size_t *peak);

#endif
