/* RMSNorm and LayerNorm: a block a row; what a thread reads again it finds in the L1 cache. The
 * gradients of the weights are summed over rows in two levels: a block goes through many rows and
 * keeps its sums in shared memory, each element touched by one thread only. */
#include <cuda_pipeline.h>

#include "ops/column_sums_cuda.cuh"

enum {
    BLOCK = 256,
    BACKWARD_BLOCKS_MAX = 528,
    KEPT = 2, /* packs of a row of a thread that keeps them in registers */
    FORWARD_BLOCKS_A_MULTIPROCESSOR = 5
};

template <class T> struct norm_args {
    T *y, *sum, *d_x;
    const T *x, *residual, *weight, *bias, *d_y, *d_residual;
    float *mean_out, *inv_std_out, *partial;
    const float *mean, *inv_std;
    float eps;
    bool one_plus, layernorm;
    int64_t num_rows, width;
};

/* x + residual, rounded to its dtype since that is what later layers see. */
template <int N, class T>
__device__ inline void norm_input(float (&x)[N], const norm_args<T> &a, int64_t at)
{
    load<N>(x, a.x, at);
    if (a.residual != NULL) {
        float residual[N];

        load<N>(residual, a.residual, at);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = to_float(from_float<T>(x[j] + residual[j]));
        }
        store<N>(a.sum, at, x);
    }
}

template <int N, class T> __global__ void norm_forward_kernel(norm_args<T> a)
{
    __shared__ float buffer[32];
    const int64_t first = (int64_t)blockIdx.x * a.width;
    const T *from = a.residual != NULL ? a.sum : a.x;
    float total = 0.0f, square = 0.0f, mean = 0.0f, inv_std;

    for (int64_t i = threadIdx.x * N; i < a.width; i += BLOCK * N) {
        float x[N];

        norm_input<N>(x, a, first + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            total += x[j];
            square += x[j] * x[j];
        }
    }
    if (a.layernorm) {
        mean = block_sum(total, buffer) / (float)a.width;
        square = 0.0f;
        for (int64_t i = threadIdx.x * N; i < a.width; i += BLOCK * N) {
            float x[N];

            load<N>(x, from, first + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                square += (x[j] - mean) * (x[j] - mean);
            }
        }
    }
    inv_std = 1.0f / sqrtf(block_sum(square, buffer) / (float)a.width + a.eps);
    for (int64_t i = threadIdx.x * N; i < a.width; i += BLOCK * N) {
        float x[N], weight[N], bias[N] = {0.0f};

        load<N>(x, from, first + i);
        load<N>(weight, a.weight, i);
        if (a.bias != NULL) {
            load<N>(bias, a.bias, i);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float w = a.one_plus ? 1.0f + weight[j] : weight[j];

            x[j] = (x[j] - mean) * inv_std * w + bias[j];
        }
        store<N>(a.y, first + i, x);
    }
    if (threadIdx.x == 0) {
        a.inv_std_out[blockIdx.x] = inv_std;
        if (a.layernorm) {
            a.mean_out[blockIdx.x] = mean;
        }
    }
}

/* A thread's packs of a row; zeros beyond its end. */
template <class T> __device__ inline void kept_load(uint4 (&packs)[KEPT], const T *row, int width)
{
    constexpr int N = 16 / sizeof(T);

#pragma unroll
    for (int c = 0; c < KEPT; c++) {
        const int i = (c * BLOCK + (int)threadIdx.x) * N;

        packs[c] = i < width ? *reinterpret_cast<const uint4 *>(row + i) : uint4{};
    }
}

template <int N, class T> __device__ inline void place_read(float (&to)[N], const uint4 *place)
{
    load<N>(to, (const T *)place, 0);
}

/* x + residual (or x) of a row, rounded as in norm_input: all loads are on their way before the
 * first is waited for, and so are those of the weight. */
template <class T>
__device__ inline void kept_input(float (&x)[KEPT][16 / sizeof(T)], uint4 (&weight)[KEPT],
                                  const norm_args<T> &a, int64_t first)
{
    constexpr int N = 16 / sizeof(T);
    uint4 packs[KEPT], residuals[KEPT] = {};

    kept_load(packs, a.x + first, (int)a.width);
    if (a.residual != NULL) {
        kept_load(residuals, a.residual + first, (int)a.width);
    }
    kept_load(weight, a.weight, (int)a.width);
#pragma unroll
    for (int c = 0; c < KEPT; c++) {
        const int i = (c * BLOCK + (int)threadIdx.x) * N;
        float residual[N];

        place_read<N, T>(x[c], &packs[c]);
        if (a.residual == NULL) {
            continue;
        }
        place_read<N, T>(residual, &residuals[c]);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[c][j] = to_float(from_float<T>(x[c][j] + residual[j]));
        }
        if (i < (int)a.width) {
            store<N>(a.sum, first + i, x[c]);
        }
    }
}

/* RMSNorm of rows of at most KEPT packs a thread, which stay in registers. */
template <class T>
__global__ void __launch_bounds__(BLOCK, FORWARD_BLOCKS_A_MULTIPROCESSOR)
    rmsnorm_forward_kernel(norm_args<T> a)
{
    constexpr int N = 16 / sizeof(T);
    __shared__ float buffer[32];
    const int64_t first = (int64_t)blockIdx.x * a.width;
    uint4 weight[KEPT];
    float x[KEPT][N], square = 0.0f, inv_std;

    early_join();
    kept_input(x, weight, a, first);
#pragma unroll
    for (int i = 0; i < KEPT * N; i++) {
        square += x[i / N][i % N] * x[i / N][i % N];
    }
    inv_std = 1.0f / sqrtf(block_sum(square, buffer) / (float)a.width + a.eps);
#pragma unroll
    for (int c = 0; c < KEPT; c++) {
        const int i = (c * BLOCK + (int)threadIdx.x) * N;
        float w[N];

        place_read<N, T>(w, &weight[c]);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[c][j] = x[c][j] * inv_std * (a.one_plus ? 1.0f + w[j] : w[j]);
        }
        if (i < (int)a.width) {
            store<N>(a.y, first + i, x[c]);
        }
    }
    if (threadIdx.x == 0) {
        a.inv_std_out[blockIdx.x] = inv_std;
    }
}

/* Whether the kernels that keep a row in registers do it. */
template <int N> static bool fits_registers(enum norm_kind kind, int64_t width)
{
    return N > 1 && kind == NORM_RMSNORM && width <= KEPT * BLOCK * N;
}

extern "C" void norm_forward_cuda(struct stream *stream, const struct norm_forward *op)
{
    const int64_t width = op->x->dim[1];

    WITH_PACK(op->x->dtype,
              packable(width, {op->x, op->residual, op->sum, op->y, op->weight, op->bias}), {
                  norm_args<T> a = {};

                  a.y = data_of<T>(op->y);
                  a.sum = data_of<T>(op->sum);
                  a.x = data_of<T>(op->x);
                  a.residual = data_of<T>(op->residual);
                  a.weight = data_of<T>(op->weight);
                  a.bias = data_of<T>(op->bias);
                  a.mean_out = data_of<float>(op->mean);
                  a.inv_std_out = data_of<float>(op->inv_std);
                  a.eps = op->eps;
                  a.one_plus = op->one_plus;
                  a.layernorm = op->kind == NORM_LAYERNORM;
                  a.width = width;
                  if (fits_registers<N>(op->kind, width)) {
                      LAUNCH_EARLY(stream, (rmsnorm_forward_kernel<T>), op->x->dim[0], BLOCK, 0, a);
                  } else {
                      LAUNCH(stream, (norm_forward_kernel<N, T>), op->x->dim[0], BLOCK, 0, a);
                  }
              });
}

/* With n = (x - mean) * inv_std and g = d_y * w:
 *   d_x = inv_std * (g - mean(g) - n * mean(g * n)), where mean(g) counts for LayerNorm only,
 *   d_w += d_y * n, d_b += d_y. Shared memory: the block's sums of d_w and d_b. */
template <int N, class T> __global__ void norm_backward_kernel(norm_args<T> a)
{
    extern __shared__ float sums[];
    __shared__ float buffer[32];
    float *d_w = sums, *d_b = sums + a.width;
    const int64_t stride = a.layernorm ? 2 * a.width : a.width;

    for (int64_t i = threadIdx.x; i < stride; i += BLOCK) {
        sums[i] = 0.0f;
    }
    __syncthreads();
    for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
        const int64_t first = row * a.width;
        const float mean = a.layernorm ? a.mean[row] : 0.0f, inv_std = a.inv_std[row];
        float sum_g = 0.0f, sum_gn = 0.0f;

        for (int64_t i = threadIdx.x * N; i < a.width; i += BLOCK * N) {
            float x[N], d_y[N], weight[N];

            load<N>(x, a.x, first + i);
            load<N>(d_y, a.d_y, first + i);
            load<N>(weight, a.weight, i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float w = a.one_plus ? 1.0f + weight[j] : weight[j];
                const float n = (x[j] - mean) * inv_std, g = d_y[j] * w;

                d_w[i + j] += d_y[j] * n;
                if (a.layernorm) {
                    d_b[i + j] += d_y[j];
                }
                sum_g += g;
                sum_gn += g * n;
            }
        }
        sum_gn = block_sum(sum_gn, buffer) / (float)a.width;
        sum_g = a.layernorm ? block_sum(sum_g, buffer) / (float)a.width : 0.0f;
        for (int64_t i = threadIdx.x * N; i < a.width; i += BLOCK * N) {
            float x[N], d_y[N], weight[N], residual[N] = {0.0f};

            load<N>(x, a.x, first + i);
            load<N>(d_y, a.d_y, first + i);
            load<N>(weight, a.weight, i);
            if (a.d_residual != NULL) {
                load<N>(residual, a.d_residual, first + i);
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float w = a.one_plus ? 1.0f + weight[j] : weight[j];
                const float n = (x[j] - mean) * inv_std;

                x[j] = inv_std * (d_y[j] * w - sum_g - n * sum_gn) + residual[j];
            }
            store<N>(a.d_x, first + i, x);
        }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < stride; i += BLOCK) {
        a.partial[blockIdx.x * stride + i] = sums[i];
    }
}

/* Rows on their way at a time to the kernel below. */
enum { ROWS_AHEAD = 3, ROW_TENSORS = 3, BLOCKS_A_MULTIPROCESSOR = 2 };

static const int rmsnorm_backward_bytes = ROWS_AHEAD * ROW_TENSORS * KEPT * BLOCK * 16;

/* This thread's packs of a row of x, d_y and d_residual, copied to its places (BLOCK apart) while
 * it works on other rows. */
template <class T>
__device__ inline void row_copy_start(uint4 *places, const norm_args<T> &a, int64_t row)
{
    const T *const from[ROW_TENSORS] = {a.x, a.d_y, a.d_residual};
    constexpr int N = 16 / sizeof(T);

#pragma unroll
    for (int k = 0; k < ROW_TENSORS * KEPT; k++) {
        const int64_t i = (k % KEPT * BLOCK + threadIdx.x) * N;

        if (row < a.num_rows && i < a.width && from[k / KEPT] != NULL) {
            __pipeline_memcpy_async(places + k * BLOCK, from[k / KEPT] + row * a.width + i, 16);
        }
    }
    __pipeline_commit();
}

/* d_x of a row from its sum of g * n / width; the residual is the third tensor of its places. */
template <class T>
__device__ inline void rmsnorm_row_finish(const norm_args<T> &a, const uint4 *places,
                                          const float (&w)[KEPT][16 / sizeof(T)], int64_t row,
                                          float sum)
{
    constexpr int N = 16 / sizeof(T);
    const float inv_std = a.inv_std[row];

#pragma unroll
    for (int c = 0; c < KEPT; c++) {
        const int64_t i = (c * BLOCK + threadIdx.x) * N;
        float x[N], d_y[N], residual[N] = {0.0f};

        if (i >= a.width) {
            continue;
        }
        place_read<N, T>(x, places + c * BLOCK);
        place_read<N, T>(d_y, places + (KEPT + c) * BLOCK);
        if (a.d_residual != NULL) {
            place_read<N, T>(residual, places + (2 * KEPT + c) * BLOCK);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = inv_std * (d_y[j] * w[c][j] - x[j] * inv_std * sum) + residual[j];
        }
        store<N>(a.d_x, row * a.width + i, x);
    }
}

/* The same for RMSNorm rows of at most KEPT packs a thread: a row is read once, and the sums of d_w
 * stay in registers. Shared memory: [ROWS_AHEAD][ROW_TENSORS][KEPT][BLOCK] packs; a thread touches
 * its own only. */
template <class T>
__global__ void __launch_bounds__(BLOCK, BLOCKS_A_MULTIPROCESSOR)
    rmsnorm_backward_kernel(norm_args<T> a)
{
    constexpr int N = 16 / sizeof(T), ROW_PLACES = ROW_TENSORS * KEPT * BLOCK;
    extern __shared__ uint4 staged[];
    __shared__ float buffer[32];
    float w[KEPT][N] = {}, d_w[KEPT][N] = {};
    int slot = 0;

    early_join();
#pragma unroll
    for (int c = 0; c < KEPT; c++) {
        const int64_t i = (c * BLOCK + threadIdx.x) * N;

        if (i < a.width) {
            load<N>(w[c], a.weight, i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                w[c][j] += a.one_plus ? 1.0f : 0.0f;
            }
        }
    }
    for (int ahead = 0; ahead < ROWS_AHEAD; ahead++) {
        row_copy_start(staged + ahead * ROW_PLACES + threadIdx.x, a,
                       blockIdx.x + (int64_t)ahead * gridDim.x);
    }
    for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
        uint4 *places = staged + slot * ROW_PLACES + threadIdx.x;
        const float inv_std = a.inv_std[row];
        float sum = 0.0f;

        __pipeline_wait_prior(ROWS_AHEAD - 1);
#pragma unroll
        for (int c = 0; c < KEPT; c++) {
            float x[N] = {0.0f}, d_y[N] = {0.0f};

            if ((c * BLOCK + threadIdx.x) * N < a.width) {
                place_read<N, T>(x, places + c * BLOCK);
                place_read<N, T>(d_y, places + (KEPT + c) * BLOCK);
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                d_w[c][j] += d_y[j] * x[j] * inv_std;
                sum += d_y[j] * w[c][j] * (x[j] * inv_std);
            }
        }
        sum = block_sum(sum, buffer) / (float)a.width;
        rmsnorm_row_finish(a, places, w, row, sum);
        row_copy_start(places, a, row + (int64_t)ROWS_AHEAD * gridDim.x);
        slot = slot + 1 < ROWS_AHEAD ? slot + 1 : 0;
    }
#pragma unroll
    for (int c = 0; c < KEPT; c++) {
        const int64_t i = (c * BLOCK + threadIdx.x) * N;

        if (i < a.width) {
            store<N>(a.partial, blockIdx.x * a.width + i, d_w[c]);
        }
    }
}

template <class T>
static void rmsnorm_backward_launch(struct stream *stream, int64_t num_blocks,
                                    const norm_args<T> &a)
{
    CUDA_CHECK(cudaFuncSetAttribute(rmsnorm_backward_kernel<T>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    rmsnorm_backward_bytes));
    LAUNCH_EARLY(stream, (rmsnorm_backward_kernel<T>), num_blocks, BLOCK, rmsnorm_backward_bytes,
                 a);
}

template <int N, class T>
static void norm_backward_launch(struct stream *stream, const struct norm_backward *op)
{
    const int64_t width = op->x->dim[1], num_rows = op->x->dim[0];
    const bool in_registers = fits_registers<N>(op->kind, width);
    const int64_t blocks_max =
        in_registers ? BLOCKS_A_MULTIPROCESSOR * num_multiprocessors() : BACKWARD_BLOCKS_MAX;
    const int64_t num_blocks = num_rows < blocks_max ? num_rows : blocks_max;
    const int64_t stride = op->kind == NORM_LAYERNORM ? 2 * width : width;
    const size_t shared_bytes = (size_t)stride * sizeof(float);
    norm_args<T> a = {};

    a.d_x = data_of<T>(op->d_x);
    a.d_y = data_of<T>(op->d_y);
    a.d_residual = data_of<T>(op->d_residual);
    a.x = data_of<T>(op->x);
    a.weight = data_of<T>(op->weight);
    a.mean = data_of<float>(op->mean);
    a.inv_std = data_of<float>(op->inv_std);
    a.one_plus = op->one_plus;
    a.layernorm = op->kind == NORM_LAYERNORM;
    a.num_rows = num_rows;
    a.width = width;
    a.partial = (float *)arena_allocate(stream->scratch, (size_t)(num_blocks * stride) * 4);
    if (in_registers) {
        rmsnorm_backward_launch(stream, num_blocks, a);
    } else {
        CHECK(shared_bytes <= 227 * 1024 - 256, "norm of %lld columns", (long long)width);
        CUDA_CHECK(cudaFuncSetAttribute(norm_backward_kernel<N, T>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)shared_bytes));
        LAUNCH(stream, (norm_backward_kernel<N, T>), num_blocks, BLOCK, shared_bytes, a);
    }
    column_sums_add(stream, data_of<float>(op->d_weight), a.partial, num_blocks, stride, width);
    if (a.layernorm) {
        column_sums_add(stream, data_of<float>(op->d_bias), a.partial + width, num_blocks, stride,
                        width);
    }
}

extern "C" void norm_backward_cuda(struct stream *stream, const struct norm_backward *op)
{
    WITH_PACK(op->x->dtype,
              packable(op->x->dim[1], {op->x, op->d_x, op->d_y, op->d_residual, op->weight}),
              { norm_backward_launch<N, T>(stream, op); });
}
