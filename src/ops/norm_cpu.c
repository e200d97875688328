/* RMSNorm and LayerNorm, a row at a time. */
#include <math.h>

#include "ops/column_sums_cpu.h"
#include "ops/ops_cpu_internal.h"

/* The weight as applied: floats, with the 1 of layernorm-1p. */
static const float *norm_weight(struct stream *stream, const struct tensor *weight, bool one_plus)
{
    const int64_t h = weight->dim[0];
    float *w = scratch_floats(stream, h);

    floats_copy(w, weight, 0, h);
    if (one_plus) {
        for (int64_t i = 0; i < h; i++) {
            w[i] += 1.0f;
        }
    }
    return w;
}

static float mean_square_deviation(const float *x, float mean, int64_t n)
{
    float lanes[SUM_LANES] = {0.0f};
    int64_t i = 0;

    for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma omp simd
        for (int lane = 0; lane < SUM_LANES; lane++) {
            const float deviation = x[i + lane] - mean;

            lanes[lane] += deviation * deviation;
        }
    }
    for (; i < n; i++) {
        lanes[i % SUM_LANES] += (x[i] - mean) * (x[i] - mean);
    }
    return lanes_sum(lanes) / (float)n;
}

/* Row `row` of x + residual, rounded to its dtype since that is what later layers see. */
static const float *norm_input_row(const struct norm_forward *a, int64_t row, float *buffer)
{
    const int64_t h = a->x->dim[1], first = row * h;
    const float *x = floats_get(a->x, first, h, buffer), *residual;
    float *sum;

    if (a->residual == NULL) {
        return x;
    }
    residual = floats_get(a->residual, first, h, buffer + h);
    sum = floats_place(a->sum, first, buffer);
#pragma omp simd
    for (int64_t i = 0; i < h; i++) {
        sum[i] = x[i] + residual[i];
    }
    floats_put(a->sum, first, h, sum);
    return floats_get(a->sum, first, h, buffer);
}

static void norm_forward_row(const struct norm_forward *a, int64_t row, const float *w,
                             const float *bias, float *buffer)
{
    const int64_t h = a->x->dim[1];
    const float *x = norm_input_row(a, row, buffer);
    float *y = floats_place(a->y, row * h, buffer + h);
    const float mean = a->mean != NULL ? floats_sum(x, h) / (float)h : 0.0f;
    const float inv_std = 1.0f / sqrtf(mean_square_deviation(x, mean, h) + a->eps);

    ((float *)a->inv_std->data)[row] = inv_std;
    if (a->mean == NULL) {
#pragma omp simd
        for (int64_t i = 0; i < h; i++) {
            y[i] = x[i] * inv_std * w[i];
        }
    } else {
        ((float *)a->mean->data)[row] = mean;
#pragma omp simd
        for (int64_t i = 0; i < h; i++) {
            y[i] = (x[i] - mean) * inv_std * w[i] + bias[i];
        }
    }
    floats_put(a->y, row * h, h, y);
}

void norm_forward_cpu(struct stream *stream, const struct norm_forward *a)
{
    const int64_t num_rows = a->x->dim[0], h = a->x->dim[1];
    const float *w = norm_weight(stream, a->weight, a->one_plus);
    const float *bias = a->bias != NULL ? norm_weight(stream, a->bias, false) : NULL;
    const struct thread_floats buffers = thread_floats_new(stream, 2 * h);

#pragma omp parallel for schedule(static) if (num_rows * h >= OPS_PARALLEL_MIN)
    for (int64_t row = 0; row < num_rows; row++) {
        norm_forward_row(a, row, w, bias, thread_floats_mine(&buffers));
    }
}

/* With n = (x - mean) * inv_std and g = d_y * w:
 *   d_x = inv_std * (g - mean(g) - n * mean(g * n)), where mean(g) counts for LayerNorm only,
 *   d_w += d_y * n, d_b += d_y. buffer holds 4 h floats. */
static void norm_backward_row(const struct norm_backward *a, int64_t row, const float *w,
                              float *restrict d_w, float *restrict d_b, float *buffer)
{
    const int64_t h = a->x->dim[1], first = row * h;
    const float *x = floats_get(a->x, first, h, buffer);
    const float *d_y = floats_get(a->d_y, first, h, buffer + h);
    const float mean = a->mean != NULL ? ((const float *)a->mean->data)[row] : 0.0f;
    const float inv_std = ((const float *)a->inv_std->data)[row];
    float *restrict n = buffer + 2 * h, *restrict g = buffer + 3 * h;
    float mean_g = 0.0f, mean_gn;
    float *d_x;
    const float *d_residual = NULL;

#pragma omp simd
    for (int64_t i = 0; i < h; i++) {
        n[i] = (x[i] - mean) * inv_std;
        g[i] = d_y[i] * w[i];
        d_w[i] += d_y[i] * n[i];
    }
    if (d_b != NULL) {
        mean_g = floats_sum(g, h) / (float)h;
#pragma omp simd
        for (int64_t i = 0; i < h; i++) {
            d_b[i] += d_y[i];
        }
    }
    mean_gn = floats_dot(g, n, h) / (float)h;
    if (a->d_residual != NULL) {
        d_residual = floats_get(a->d_residual, first, h, buffer);
    }
    d_x = floats_place(a->d_x, first, buffer + h);
    for (int64_t i = 0; i < h; i++) {
        n[i] = inv_std * (g[i] - mean_g - n[i] * mean_gn);
    }
#pragma omp simd
    for (int64_t i = 0; i < h; i++) {
        d_x[i] = n[i] + (d_residual != NULL ? d_residual[i] : 0.0f);
    }
    floats_put(a->d_x, first, h, d_x);
}

void norm_backward_cpu(struct stream *stream, const struct norm_backward *a)
{
    const int64_t h = a->x->dim[1], stride = a->d_bias != NULL ? 2 * h : h;
    const struct row_chunks chunks = row_chunks_of(a->x->dim[0]);
    const float *w = norm_weight(stream, a->weight, a->one_plus);
    const struct thread_floats buffers = thread_floats_new(stream, 4 * h);
    float *partial = scratch_floats(stream, chunks.count * stride);

#pragma omp parallel for schedule(static) if (chunks.num_rows * h >= OPS_PARALLEL_MIN)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        float *d_w = partial + chunk * stride, *d_b = a->d_bias != NULL ? d_w + h : NULL;

        memset(d_w, 0, (size_t)stride * sizeof *d_w);
        for (int64_t row = row_chunks_first(&chunks, chunk); row < row_chunks_end(&chunks, chunk);
             row++) {
            norm_backward_row(a, row, w, d_w, d_b, thread_floats_mine(&buffers));
        }
    }
    column_sums_add(a->d_weight, partial, &chunks, stride);
    if (a->d_bias != NULL) {
        column_sums_add(a->d_bias, partial + h, &chunks, stride);
    }
}
