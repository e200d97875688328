/* Cross entropy over a large vocabulary: one pass over the logits, which are the largest
 * activation. The sum of exponentials is kept relative to the maximum seen so far and rescaled when
 * a block raises it (Milakov and Gimelshein 2018). Blocks are fixed, so the bits are too. */
#include <math.h>

#include "ops/ops_cpu_internal.h"

static float exp_sum(const float *x, float max, int64_t n)
{
    float lanes[SUM_LANES] = {0.0f};
    int64_t i = 0;

    for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            lanes[lane] += fast_exp(x[i + lane] - max);
        }
    }
    for (; i < n; i++) {
        lanes[i % SUM_LANES] += fast_exp(x[i] - max);
    }
    return lanes_sum(lanes);
}

/* max and sum_exp of one row. */
static void row_statistics(const struct tensor *logits, int64_t row, float *max_of_row,
                           float *sum_of_row)
{
    const int64_t v = logits->dim[1];
    float buffer[OPS_BLOCK];
    float max = -INFINITY, sum = 0.0f;

    for (int64_t first = 0; first < v; first += OPS_BLOCK) {
        const int64_t n = v - first < OPS_BLOCK ? v - first : OPS_BLOCK;
        const float *x = floats_get(logits, row * v + first, n, buffer);
        const float block_max = floats_max(x, n);

        if (block_max > max) {
            sum *= fast_exp(max - block_max);
            max = block_max;
        }
        sum += exp_sum(x, max, n);
    }
    *max_of_row = max;
    *sum_of_row = sum;
}

/* A row of d_logits, which may be the logits, from its statistics. */
static void gradient_row(struct tensor *d_logits, const struct tensor *logits, int64_t row,
                         int64_t column, float max, float sum_exp, float d_loss)
{
    const int64_t v = logits->dim[1];
    const float scale = d_loss / sum_exp;
    float buffer[OPS_BLOCK];

    for (int64_t first = 0; first < v; first += OPS_BLOCK) {
        const int64_t n = v - first < OPS_BLOCK ? v - first : OPS_BLOCK;
        const float *x = floats_get(logits, row * v + first, n, buffer);
        float *d_x = floats_place(d_logits, row * v + first, buffer);

#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            d_x[i] = fast_exp(x[i] - max) * scale;
        }
        if (column >= first && column < first + n) {
            d_x[column - first] -= d_loss;
        }
        floats_put(d_logits, row * v + first, n, d_x);
    }
}

void cross_entropy_forward_cpu(struct stream *stream, const struct cross_entropy *a)
{
    const int64_t num_tokens = a->logits->dim[0], v = a->logits->dim[1];
    float *max = a->max->data, *sum_exp = a->sum_exp->data, *target = a->target->data;
    const int32_t *label = a->label->data;

#pragma omp parallel for schedule(static) if (num_tokens * v >= OPS_PARALLEL_MIN)
    for (int64_t token = 0; token < num_tokens; token++) {
        const int64_t column = label[token] - a->vocab_start;
        const bool mine = column >= 0 && column < v;

        row_statistics(a->logits, token, &max[token], &sum_exp[token]);
        target[token] = mine ? float_get(a->logits, token * v + column) : 0.0f;
        if (a->d_logits != NULL) {
            gradient_row(a->d_logits, a->logits, token, column, max[token], sum_exp[token],
                         ((const float *)a->d_loss->data)[token]);
        }
    }
}

void cross_entropy_backward_cpu(struct stream *stream, const struct cross_entropy_backward *a)
{
    const int64_t num_tokens = a->logits->dim[0];
    const float *max = a->max->data, *sum_exp = a->sum_exp->data, *d_loss = a->d_loss->data;
    const int32_t *label = a->label->data;

#pragma omp parallel for schedule(static) if (num_tokens * a->logits->dim[1] >= OPS_PARALLEL_MIN)
    for (int64_t token = 0; token < num_tokens; token++) {
        gradient_row(a->logits, a->logits, token, label[token] - a->vocab_start, max[token],
                     sum_exp[token], d_loss[token]);
    }
}
