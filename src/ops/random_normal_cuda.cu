/* A thread a number; in double like the CPU's, so that a seed gives the same model on both up to
 * the last bit of the logarithm and cosine. */
#include "ops/ops_cuda_internal.cuh"
#include "ops/random_normal.h"

enum { BLOCK = 256 };

__global__ void random_normal_kernel(float *x, const int64_t *token_id, struct rng_key key,
                                     int64_t num_elements, int64_t width)
{
    const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (i < num_elements) {
        x[i] = (float)rng_normal(key, (uint64_t)token_id[i / width], (uint64_t)(i % width));
    }
}

extern "C" void random_normal_cuda(struct stream *stream, const struct random_normal *a)
{
    const int64_t n = tensor_num_elements(a->x);

    LAUNCH(stream, random_normal_kernel, ceil_div(n, BLOCK), BLOCK, 0, data_of<float>(a->x),
           data_of<int64_t>(a->token_id), a->key, n, a->x->dim[1]);
}

template <class T>
__global__ void initial_normal_kernel(T *x, const __grid_constant__ struct initial_normal op,
                                      int64_t num_elements)
{
    const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (i < num_elements) {
        x[i] = from_float<T>(initial_normal_at(&op, i));
    }
}

extern "C" void initial_normal_cuda(struct stream *stream, const struct initial_normal *a)
{
    const int64_t n = tensor_num_elements(a->x);

    WITH_ACT(a->x->dtype, {
        LAUNCH(stream, initial_normal_kernel<T>, ceil_div(n, BLOCK), BLOCK, 0, data_of<T>(a->x), *a,
               n);
    });
}
