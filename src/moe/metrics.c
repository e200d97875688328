#include "moe/metrics.h"

#include "ops/ops.h"

const char *moe_metric_name(enum moe_metric metric)
{
    static const char *const names[NUM_MOE_METRICS] = {
        [MOE_LOAD_BALANCING_LOSS] = "load_balancing_loss",
        [MOE_SEQ_LOAD_BALANCING_LOSS] = "seq_load_balancing_loss",
        [MOE_GLOBAL_LOAD_BALANCING_LOSS] = "global_load_balancing_loss",
        [MOE_Z_LOSS] = "z_loss",
    };

    return names[metric];
}

void moe_metrics_init(struct moe_metrics *metrics, struct stream *stream, struct arena *arena,
                      int num_layers)
{
    metrics->num_layers = num_layers;
    metrics->all = tensor_new(arena, DTYPE_F32, NUM_MOE_METRICS, num_layers);
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        metrics->sums[m] = tensor_rows(&metrics->all, m, 1);
        metrics->sums[m] = tensor_view(&metrics->sums[m], num_layers);
        metrics->used[m] = false;
    }
    moe_metrics_clear(metrics, stream);
}

void moe_metrics_add(struct moe_metrics *metrics, struct stream *stream, enum moe_metric metric,
                     int layer, const struct tensor *value)
{
    struct tensor slot;

    if (metrics == NULL) {
        return;
    }
    metrics->used[metric] = true;
    slot = tensor_rows(&metrics->sums[metric], layer, 1);
    op_linear_combination(
        stream, &(struct linear_combination){.y = &slot, .x = value, .a = 1.0f, .b = 1.0f});
}

void moe_metrics_clear(struct moe_metrics *metrics, struct stream *stream)
{
    op_fill_zero(stream, &metrics->all);
}

/* The ranks of tp_cp have parts of a balancing loss (M1.7), but each its own mean of the z-loss. */
static float share_of_rank(const struct groups *groups, enum moe_metric metric)
{
    const int num_means = groups->dp->size * (metric == MOE_Z_LOSS ? groups->tp_cp->size : 1);

    return 1.0f / (float)num_means;
}

void moe_metrics_reduce(struct moe_metrics *metrics, struct stream *stream,
                        const struct groups *groups)
{
    if (groups->world->size == 1) {
        return;
    }
    comm_wait(comm_all_reduce(groups->world, stream, &metrics->all, COMM_SUM), stream);
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        op_linear_combination(
            stream, &(struct linear_combination){.y = &metrics->sums[m],
                                                 .x = &metrics->sums[m],
                                                 .a = share_of_rank(groups, (enum moe_metric)m)});
    }
}
