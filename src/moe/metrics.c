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
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        metrics->sums[m] = tensor_new(arena, DTYPE_F32, num_layers);
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
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        op_fill_zero(stream, &metrics->sums[m]);
    }
}

void moe_metrics_read(const struct moe_metrics *metrics, struct stream *stream,
                      enum moe_metric metric, float *values)
{
    stream_copy_to_host(stream, values, metrics->sums[metric].data,
                        tensor_size_bytes(&metrics->sums[metric]));
}
