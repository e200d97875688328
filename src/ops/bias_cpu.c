/* The bias of a linear layer apart from its product, and the gradient of any bias. */
#include "ops/column_sums_cpu.h"
#include "ops/ops_cpu_internal.h"

void bias_forward_cpu(struct stream *stream, const struct bias_forward *a)
{
    const int64_t num_rows = a->y->dim[0], n = a->y->dim[1];
    const struct thread_floats buffers = thread_floats_new(stream, n);
    float *bias = scratch_floats(stream, n);

    floats_copy(bias, a->bias, 0, n);
#pragma omp parallel for schedule(static) if (num_rows * n >= OPS_PARALLEL_MIN)
    for (int64_t row = 0; row < num_rows; row++) {
        float *buffer = thread_floats_mine(&buffers);
        float *y = floats_place(a->y, row * n, buffer);

        if (y == buffer) {
            floats_copy(y, a->y, row * n, n);
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            y[i] += bias[i];
        }
        floats_put(a->y, row * n, n, y);
    }
}

void bias_backward_cpu(struct stream *stream, const struct bias_backward *a)
{
    const int64_t n = a->d_y->dim[1];
    const struct row_chunks chunks = row_chunks_of(a->d_y->dim[0]);
    const struct thread_floats buffers = thread_floats_new(stream, n);
    float *partial = scratch_floats(stream, chunks.count * n);

#pragma omp parallel for schedule(static) if (chunks.num_rows * n >= OPS_PARALLEL_MIN)
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
        float *restrict sum = partial + chunk * n;

        memset(sum, 0, (size_t)n * sizeof *sum);
        for (int64_t row = row_chunks_first(&chunks, chunk); row < row_chunks_end(&chunks, chunk);
             row++) {
            const float *d_y = floats_get(a->d_y, row * n, n, thread_floats_mine(&buffers));

#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                sum[i] += d_y[i];
            }
        }
    }
    column_sums_add(a->d_bias, partial, &chunks, n);
}
