/* Cross entropy over a large vocabulary: one pass over the logits forward, one in place backward. A
 * block takes a row; a thread keeps a sum of exponentials relative to the maximum it has seen and
 * rescales it when that rises (Milakov and Gimelshein 2018). */
#include "ops/ops_cuda_internal.cuh"

enum { BLOCK = 512 };

struct running {
    float max, sum;
};

__device__ inline struct running running_join(struct running a, struct running b)
{
    const float max = fmaxf(a.max, b.max);
    /* -inf - -inf would be NaN: an empty side has the sum zero */
    const float left = a.sum > 0.0f ? a.sum * expf(a.max - max) : 0.0f;
    const float right = b.sum > 0.0f ? b.sum * expf(b.max - max) : 0.0f;

    return {max, left + right};
}

__device__ inline struct running running_warp(struct running mine)
{
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        mine = running_join(mine, {__shfl_xor_sync(0xffffffffu, mine.max, distance),
                                   __shfl_xor_sync(0xffffffffu, mine.sum, distance)});
    }
    return mine;
}

template <int N, class T>
__global__ void cross_entropy_forward_kernel(float *max, float *sum_exp, float *target,
                                             const T *logits, const int32_t *label,
                                             int64_t vocab_start, int64_t width)
{
    __shared__ struct running warps[BLOCK / 32];
    const int64_t first = blockIdx.x * width;
    struct running mine = {-INFINITY, 0.0f};

    for (int64_t i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float x[N], top = mine.max, sum = 0.0f;

        load<N>(x, logits, first + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            top = fmaxf(top, x[j]);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum += expf(x[j] - top);
        }
        mine.sum = mine.sum * expf(mine.max - top) + sum;
        mine.max = top;
    }
    mine = running_warp(mine);
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = mine;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        mine = threadIdx.x < BLOCK / 32 ? warps[threadIdx.x] : running{-INFINITY, 0.0f};
        mine = running_warp(mine);
    }
    if (threadIdx.x == 0) {
        const int64_t column = label[blockIdx.x] - vocab_start;

        max[blockIdx.x] = mine.max;
        sum_exp[blockIdx.x] = mine.sum;
        target[blockIdx.x] =
            column >= 0 && column < width ? to_float(logits[first + column]) : 0.0f;
    }
}

extern "C" void cross_entropy_forward_cuda(struct stream *stream, const struct cross_entropy *a)
{
    const int64_t width = a->logits->dim[1];

    WITH_PACK(a->logits->dtype, packable(width, {a->logits}), {
        LAUNCH(stream, (cross_entropy_forward_kernel<N, T>), a->logits->dim[0], BLOCK, 0,
               data_of<float>(a->max), data_of<float>(a->sum_exp), data_of<float>(a->target),
               data_of<T>(a->logits), data_of<int32_t>(a->label), a->vocab_start, width);
    });
}

template <int N, class T>
__global__ void cross_entropy_backward_kernel(T *logits, const float *max, const float *sum_exp,
                                              const int32_t *label, const float *d_loss,
                                              int64_t vocab_start, int64_t width)
{
    const int64_t row = blockIdx.x, first = row * width, column = label[row] - vocab_start;
    const float top = max[row], d = d_loss[row], scale = d / sum_exp[row];

    for (int64_t i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float x[N];

        load<N>(x, logits, first + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = expf(x[j] - top) * scale - (i + j == column ? d : 0.0f);
        }
        store<N>(logits, first + i, x);
    }
}

extern "C" void cross_entropy_backward_cuda(struct stream *stream,
                                            const struct cross_entropy_backward *a)
{
    const int64_t width = a->logits->dim[1];

    WITH_PACK(a->logits->dtype, packable(width, {a->logits}), {
        LAUNCH(stream, (cross_entropy_backward_kernel<N, T>), a->logits->dim[0], BLOCK, 0,
               data_of<T>(a->logits), data_of<float>(a->max), data_of<float>(a->sum_exp),
               data_of<int32_t>(a->label), data_of<float>(a->d_loss), a->vocab_start, width);
    });
}

__global__ void softmax_rescale_kernel(float *sum_exp, const float *local_max, const float *max,
                                       int64_t n)
{
    const int64_t t = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (t < n) {
        sum_exp[t] *= expf(local_max[t] - max[t]);
    }
}

extern "C" void softmax_rescale_cuda(struct stream *stream, const struct softmax_rescale *a)
{
    const int64_t n = a->sum_exp->dim[0];

    LAUNCH(stream, softmax_rescale_kernel, ceil_div(n, BLOCK), BLOCK, 0, data_of<float>(a->sum_exp),
           data_of<float>(a->local_max), data_of<float>(a->max), n);
}

__global__ void token_loss_kernel(float *loss, const float *max, const float *sum_exp,
                                  const float *target, int64_t n)
{
    const int64_t t = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (t < n) {
        loss[t] = logf(sum_exp[t]) + (max[t] - target[t]);
    }
}

extern "C" void token_loss_cuda(struct stream *stream, const struct token_loss *a)
{
    const int64_t n = a->loss->dim[0];

    LAUNCH(stream, token_loss_kernel, ceil_div(n, BLOCK), BLOCK, 0, data_of<float>(a->loss),
           data_of<float>(a->max), data_of<float>(a->sum_exp), data_of<float>(a->target), n);
}
