/* Copy, cast, scale, add, zero: bound by memory, so in blocks that pass through the cache once. */
#include "ops/ops_cpu_internal.h"

static int64_t num_blocks_of(int64_t n)
{
    return (n + OPS_BLOCK - 1) / OPS_BLOCK;
}

static int64_t block_size(int64_t first, int64_t n)
{
    return n - first < OPS_BLOCK ? n - first : OPS_BLOCK;
}

void linear_combination_cpu(struct stream *stream, const struct linear_combination *args)
{
    const int64_t n = tensor_num_elements(args->y);
    const float a = args->a, b = args->b;

#pragma omp parallel for schedule(static) if (n >= OPS_PARALLEL_MIN)
    for (int64_t block = 0; block < num_blocks_of(n); block++) {
        const int64_t first = block * OPS_BLOCK, count = block_size(first, n);
        float x_buffer[OPS_BLOCK], y_buffer[OPS_BLOCK];
        const float *x = floats_get(args->x, first, count, x_buffer);
        float *y = floats_place(args->y, first, y_buffer);

        if (b == 0.0f) { /* y may hold anything, NaN too */
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                y[i] = a * x[i];
            }
        } else {
            floats_copy(y, args->y, first, count);
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                y[i] = a * x[i] + b * y[i];
            }
        }
        floats_put(args->y, first, count, y);
    }
}

void add_cpu(struct stream *stream, const struct add *a)
{
    const int64_t n = tensor_num_elements(a->y);

#pragma omp parallel for schedule(static) if (n >= OPS_PARALLEL_MIN)
    for (int64_t block = 0; block < num_blocks_of(n); block++) {
        const int64_t first = block * OPS_BLOCK, count = block_size(first, n);
        float u_buffer[OPS_BLOCK], v_buffer[OPS_BLOCK];
        const float *u = floats_get(a->u, first, count, u_buffer);
        const float *v = floats_get(a->v, first, count, v_buffer);
        float *y = floats_place(a->y, first, u_buffer);

#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            y[i] = u[i] + v[i];
        }
        floats_put(a->y, first, count, y);
    }
}

void fill_zero_cpu(struct stream *stream, struct tensor *x)
{
    const size_t size_bytes = tensor_size_bytes(x), block_bytes = (size_t)1 << 20;
    const int64_t num_blocks = (int64_t)((size_bytes + block_bytes - 1) / block_bytes);

#pragma omp parallel for schedule(static) if (num_blocks > 1)
    for (int64_t block = 0; block < num_blocks; block++) {
        const size_t first = (size_t)block * block_bytes;

        memset((char *)x->data + first, 0,
               size_bytes - first < block_bytes ? size_bytes - first : block_bytes);
    }
}
