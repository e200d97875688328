/* metrics.h - what MoE layers report for the log, one slot a layer, summed over microbatches
 * (M1.15). */
#ifndef CADRE_MOE_METRICS_H
#define CADRE_MOE_METRICS_H

#include <stdbool.h>

#include "parallel/groups.h"
#include "tensor/tensor.h"

enum moe_metric {
    MOE_LOAD_BALANCING_LOSS,
    MOE_SEQ_LOAD_BALANCING_LOSS,
    MOE_GLOBAL_LOAD_BALANCING_LOSS,
    MOE_Z_LOSS,
    NUM_MOE_METRICS
};

struct moe_metrics {
    struct tensor all;                   /* [NUM_MOE_METRICS, num_layers] f32 on the device */
    struct tensor sums[NUM_MOE_METRICS]; /* [num_layers] each, in all */
    bool used[NUM_MOE_METRICS];          /* by a layer of this rank */
    int num_layers; /* of the whole model: a pipeline stage fills the slots of its own layers */
};

/* "load_balancing_loss", "z_loss", ...: the reference's names. */
const char *moe_metric_name(enum moe_metric metric);
void moe_metrics_init(struct moe_metrics *metrics, struct stream *stream, struct arena *arena,
                      int num_layers);
/* Adds value [1] f32 to the layer's slot. metrics may be NULL. */
void moe_metrics_add(struct moe_metrics *metrics, struct stream *stream, enum moe_metric metric,
                     int layer, const struct tensor *value);
void moe_metrics_clear(struct moe_metrics *metrics, struct stream *stream);
/* Makes the sums of all ranks those that one process would have: over the layers of all stages and
 * the tokens of a microbatch; the mean over data-parallel ranks. All ranks call it, layers or not,
 * before `all` is read and cleared. Which metrics are used is not asked here: it would take the
 * host's time. */
void moe_metrics_reduce(struct moe_metrics *metrics, struct stream *stream,
                        const struct groups *groups);

#endif
