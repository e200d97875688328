/* The per-token tail of the cross entropy: [T] numbers, once the vocabulary's columns are summed.
 */
#include <math.h>

#include "ops/ops.h"
#include "ops/ops_cpu.h"

void softmax_rescale_cpu(struct stream *stream, const struct softmax_rescale *args)
{
    const float *local_max = args->local_max->data, *max = args->max->data;
    float *sum_exp = args->sum_exp->data;

    for (int64_t t = 0; t < args->sum_exp->dim[0]; t++) {
        sum_exp[t] *= expf(local_max[t] - max[t]);
    }
}

void token_loss_cpu(struct stream *stream, const struct token_loss *args)
{
    const float *max = args->max->data, *sum_exp = args->sum_exp->data;
    const float *target = args->target->data;
    float *loss = args->loss->data;

    for (int64_t t = 0; t < args->loss->dim[0]; t++) {
        loss[t] = logf(sum_exp[t]) + (max[t] - target[t]);
    }
}
