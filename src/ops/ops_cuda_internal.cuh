/* ops_cuda_internal.cuh - what the CUDA kernels share: packs of 16 bytes as floats, sums in a fixed
 * order over a warp and a block, launches.
 *
 * Arithmetic is in f32 whatever the tensor holds. A row whose width is a multiple of a pack (8
 * bf16, 4 f32) is read and written 16 bytes a thread; any other width falls back to single elements
 * by the same kernel with packs of one. */
#ifndef CADRE_OPS_OPS_CUDA_INTERNAL_CUH
#define CADRE_OPS_OPS_CUDA_INTERNAL_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

extern "C" {
#include "base/check.h"
#include "base/rng.h"
#include "ops/ops_cuda.h"
}

typedef __nv_bfloat16 bf16;

#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        CHECK(error_ == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error_));                 \
    } while (0)

/* LAUNCH(stream, kernel, grid, block, shared bytes)(arguments...): nothing for an empty grid. The
 * kernel's name is in parentheses where it has commas. */
#define LAUNCH(stream_, kernel, grid, block, shared, ...)                                          \
    do {                                                                                           \
        const int64_t blocks_ = (grid);                                                            \
        CHECK(blocks_ <= INT32_MAX, "grid of %lld blocks", (long long)blocks_);                    \
        if (blocks_ > 0) {                                                                         \
            kernel<<<(unsigned)blocks_, (block), (shared), (cudaStream_t)(stream_)->native>>>(     \
                __VA_ARGS__);                                                                      \
            CUDA_CHECK(cudaGetLastError());                                                        \
        }                                                                                          \
    } while (0)

/* The same for a kernel that begins with early_join(): its blocks come to the multiprocessors while
 * the kernel before it in the stream ends (programmatic dependent launch). */
#define LAUNCH_EARLY(stream_, kernel, grid, block, shared, ...)                                    \
    do {                                                                                           \
        const int64_t blocks_ = (grid);                                                            \
        CHECK(blocks_ <= INT32_MAX, "grid of %lld blocks", (long long)blocks_);                    \
        if (blocks_ > 0) {                                                                         \
            cudaLaunchAttribute early_ = {};                                                       \
            cudaLaunchConfig_t config_ = {};                                                       \
                                                                                                   \
            early_.id = cudaLaunchAttributeProgrammaticStreamSerialization;                        \
            early_.val.programmaticStreamSerializationAllowed = 1;                                 \
            config_.gridDim = dim3((unsigned)blocks_);                                             \
            config_.blockDim = dim3(block);                                                        \
            config_.dynamicSmemBytes = (size_t)(shared);                                           \
            config_.stream = (cudaStream_t)(stream_)->native;                                      \
            config_.attrs = &early_;                                                               \
            config_.numAttrs = 1;                                                                  \
            CUDA_CHECK(cudaLaunchKernelEx(&config_, kernel, __VA_ARGS__));                         \
        }                                                                                          \
    } while (0)

/* Waits for what the stream did before, and lets the next kernel's blocks come. */
__device__ inline void early_join(void)
{
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
}

/* WITH_ACT(dtype, code): code with T as float or bf16. */
#define WITH_ACT(dtype_, ...)                                                                      \
    do {                                                                                           \
        if ((dtype_) == DTYPE_F32) {                                                               \
            using T = float;                                                                       \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            using T = bf16;                                                                        \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

/* WITH_PACK(dtype, whole, code): code with T, and N elements a pack: 16 bytes, or 1 where `whole`
 * (see packable) is false. */
#define WITH_PACK(dtype_, whole_, ...)                                                             \
    WITH_ACT(                                                                                      \
        dtype_,                                                                                    \
        if (whole_) {                                                                              \
            constexpr int N = 16 / sizeof(T);                                                      \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int N = 1;                                                                   \
            __VA_ARGS__;                                                                           \
        })

/* Whether rows of `width` elements of these tensors (NULLs are skipped) are whole aligned packs. */
static inline bool packable(int64_t width, std::initializer_list<const struct tensor *> tensors)
{
    for (const struct tensor *x : tensors) {
        if (x != NULL &&
            ((uintptr_t)x->data % 16 != 0 || width * dtype_size_bytes(x->dtype) % 16 != 0)) {
            return false;
        }
    }
    return true;
}

__device__ inline float to_float(float x)
{
    return x;
}

__device__ inline float to_float(bf16 x)
{
    return __bfloat162float(x);
}

template <class T> __device__ inline T from_float(float x)
{
    if constexpr (sizeof(T) == 2) {
        return __float2bfloat16_rn(x);
    } else {
        return x;
    }
}

template <class T, int N> struct alignas(sizeof(T) * N) pack {
    T values[N];
};

/* Elements [first, first + N) of x as floats. */
template <int N, class T> __device__ inline void load(float (&to)[N], const T *x, int64_t first)
{
    const pack<T, N> values = *reinterpret_cast<const pack<T, N> *>(x + first);

#pragma unroll
    for (int i = 0; i < N; i++) {
        to[i] = to_float(values.values[i]);
    }
}

template <int N, class T> __device__ inline void store(T *x, int64_t first, const float (&from)[N])
{
    pack<T, N> values;

#pragma unroll
    for (int i = 0; i < N; i++) {
        values.values[i] = from_float<T>(from[i]);
    }
    *reinterpret_cast<pack<T, N> *>(x + first) = values;
}

template <class V> __device__ inline V warp_sum(V x)
{
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
    return x;
}

__device__ inline float warp_max(float x)
{
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    return x;
}

/* The sum over the block's threads, in every thread. buffer: 32 values of shared memory. */
template <class V> __device__ inline V block_sum(V x, V *buffer)
{
    const int lane = threadIdx.x % 32, num_warps = blockDim.x / 32;

    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) {
        buffer[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_sum(lane < num_warps ? buffer[lane] : V(0));
}

static inline int64_t ceil_div(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

/* Multiprocessors of the current device, read once. */
static inline int num_multiprocessors(void)
{
    static int count;

    if (count == 0) {
        int device = 0;

        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    }
    return count;
}

template <class T> static inline T *data_of(const struct tensor *x)
{
    return x != NULL ? (T *)x->data : NULL;
}

#endif
