/* Cross entropy over a large vocabulary: one pass over the logits forward, one backward, or one for
 * both. A block takes a row; a thread keeps a sum of exponentials relative to the maximum it has
 * seen and rescales it when that rises (Milakov and Gimelshein 2018). */
#include <cuda_pipeline.h>

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

template <int N, class T>
__global__ void cross_entropy_backward_kernel(T *d_logits, const T *logits, const float *max,
                                              const float *sum_exp, const int32_t *label,
                                              const float *d_loss, int64_t vocab_start,
                                              int64_t width)
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
        store<N>(d_logits, first + i, x);
    }
}

/* ---- both passes at once ---- */

enum { KEPT_ROW_BYTES_MAX = 96 * 1024 }; /* two on a multiprocessor */

template <class T> struct whole_rows {
    float *max, *sum_exp, *target;
    T *d_logits;
    const T *logits;
    const float *d_loss;
    const int32_t *label;
    int vocab_start, width;
};

/* The maximum over the block's threads, in every thread. buffer: 32 values of shared memory. */
__device__ inline float block_max(float x, float *buffer)
{
    const int lane = threadIdx.x % 32;

    x = warp_max(x);
    if (lane == 0) {
        buffer[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_max(lane < BLOCK / 32 ? buffer[lane] : -INFINITY);
}

/* The maximum of a thread's packs of a row. */
template <class T> __device__ inline float row_max(const T *row, int width)
{
    constexpr int N = 16 / sizeof(T);
    float top = -INFINITY;

    for (int i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float x[N];

        load<N>(x, row, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            top = fmaxf(top, x[j]);
        }
    }
    return top;
}

template <class T> __device__ inline float row_sum_exp(const T *row, int width, float top)
{
    constexpr int N = 16 / sizeof(T);
    float sum = 0.0f;

    for (int i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float x[N];

        load<N>(x, row, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum += expf(x[j] - top);
        }
    }
    return sum;
}

template <class T>
__device__ inline void row_gradient(T *d_logits, const T *row, int width, int column, float top,
                                    float sum, float d)
{
    constexpr int N = 16 / sizeof(T);
    const float scale = d / sum;

    for (int i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float x[N];

        load<N>(x, row, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = expf(x[j] - top) * scale - (i + j == column ? d : 0.0f);
        }
        store<N>(d_logits, i, x);
    }
}

/* A row waits in shared memory, where a thread touches its own packs only. */
template <class T> __global__ void __launch_bounds__(BLOCK) cross_entropy_kernel(whole_rows<T> a)
{
    constexpr int N = 16 / sizeof(T);
    extern __shared__ uint4 staged[];
    __shared__ float buffer[2][32];
    T *kept = (T *)staged;
    const int64_t row = blockIdx.x;
    const int column = a.label[row] - a.vocab_start;
    const T *from = a.logits + row * a.width;
    const float d = a.d_loss[row];
    float top, sum, target = 0.0f;

    for (int i = threadIdx.x * N; i < a.width; i += BLOCK * N) {
        __pipeline_memcpy_async(kept + i, from + i, 16);
    }
    __pipeline_commit();
    if (column >= 0 && column < a.width) {
        target = to_float(from[column]); /* before d_logits may take its place */
    }
    __pipeline_wait_prior(0);
    top = block_max(row_max(kept, a.width), buffer[0]);
    sum = block_sum(row_sum_exp(kept, a.width, top), buffer[1]);
    row_gradient(a.d_logits + row * a.width, kept, a.width, column, top, sum, d);
    if (threadIdx.x == 0) {
        a.max[row] = top;
        a.sum_exp[row] = sum;
        a.target[row] = target;
    }
}

/* ---- launches ---- */

template <int N, class T>
static void forward_launch(struct stream *stream, const struct cross_entropy *a)
{
    LAUNCH(stream, (cross_entropy_forward_kernel<N, T>), a->logits->dim[0], BLOCK, 0,
           data_of<float>(a->max), data_of<float>(a->sum_exp), data_of<float>(a->target),
           data_of<T>(a->logits), data_of<int32_t>(a->label), a->vocab_start, a->logits->dim[1]);
}

template <int N, class T>
static void backward_launch(struct stream *stream, struct tensor *d_logits,
                            const struct tensor *logits, const struct cross_entropy_backward *a)
{
    LAUNCH(stream, (cross_entropy_backward_kernel<N, T>), logits->dim[0], BLOCK, 0,
           data_of<T>(d_logits), data_of<T>(logits), data_of<float>(a->max),
           data_of<float>(a->sum_exp), data_of<int32_t>(a->label), data_of<float>(a->d_loss),
           a->vocab_start, logits->dim[1]);
}

template <class T>
static void whole_rows_launch(struct stream *stream, const struct cross_entropy *a)
{
    const int row_bytes = (int)a->logits->dim[1] * (int)sizeof(T);
    const struct whole_rows<T> rows = {
        data_of<float>(a->max), data_of<float>(a->sum_exp), data_of<float>(a->target),
            data_of<T>(a->d_logits), data_of<T>(a->logits), data_of<float>(a->d_loss),
            data_of<int32_t>(a->label), (int)a->vocab_start, (int)a->logits->dim[1]
    };

    CUDA_CHECK(cudaFuncSetAttribute(
        cross_entropy_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, KEPT_ROW_BYTES_MAX));
    LAUNCH(stream, cross_entropy_kernel<T>, a->logits->dim[0], BLOCK, row_bytes, rows);
}

template <int N, class T>
static void both_launch(struct stream *stream, const struct cross_entropy *a)
{
    const struct cross_entropy_backward backward = {NULL,     a->max,    a->sum_exp,
                                                    a->label, a->d_loss, a->vocab_start};

    if (N > 1 && a->logits->dim[1] * (int64_t)sizeof(T) <= KEPT_ROW_BYTES_MAX) {
        whole_rows_launch<T>(stream, a);
        return;
    }
    forward_launch<N, T>(stream, a);
    backward_launch<N, T>(stream, a->d_logits, a->logits, &backward);
}

extern "C" void cross_entropy_forward_cuda(struct stream *stream, const struct cross_entropy *a)
{
    WITH_PACK(
        a->logits->dtype, packable(a->logits->dim[1], {a->logits, a->d_logits}),
        if (a->d_logits != NULL) { both_launch<N, T>(stream, a); } else {
            forward_launch<N, T>(stream, a);
        });
}

extern "C" void cross_entropy_backward_cuda(struct stream *stream,
                                            const struct cross_entropy_backward *a)
{
    WITH_PACK(a->logits->dtype, packable(a->logits->dim[1], {a->logits}),
              { backward_launch<N, T>(stream, a->logits, a->logits, a); });
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
