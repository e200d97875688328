/* Sinkhorn balancing in one cooperative launch: every block owns a slice of the tokens; an
 * iteration is one pass over the slice, one grid barrier, and the same sum of all blocks' partial
 * column sums in every block. The test for the end runs on the device, so that the host never
 * waits. */
#include <cooperative_groups.h>

#include "ops/ops_cuda_internal.cuh"

enum { BLOCK = 256, WARPS = BLOCK / 32 };

#define SCALE_EPSILON 1e-8f /* as in Megatron: a zero sum must not divide */

struct sinkhorn_args {
    float *assignment; /* [T,E] the kernel exp(logits - the row's maximum), then the result */
    const float *logits;
    double *partials; /* [2][blocks][E] */
    int64_t num_tokens, rows_per_block;
    int num_experts, max_iterations;
    float tolerance;
};

/* The block's rows: row scales, and the column sums under them into `out`. sums: [WARPS][E]. */
__device__ static void scale_rows(const struct sinkhorn_args &a, const float *column_scale,
                                  double *sums, double *out)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = blockIdx.x * a.rows_per_block;
    const int64_t end = min(first + a.rows_per_block, a.num_tokens);
    double *mine = sums + warp * a.num_experts;

    for (int e = lane; e < a.num_experts; e += 32) {
        mine[e] = 0.0;
    }
    for (int64_t t = first + warp; t < end; t += WARPS) {
        const float *row = a.assignment + t * a.num_experts;
        float sum = 0.0f, scale;

        for (int e = lane; e < a.num_experts; e += 32) {
            sum += row[e] * column_scale[e];
        }
        scale = 1.0f / (float)a.num_tokens / (warp_sum(sum) + SCALE_EPSILON);
        for (int e = lane; e < a.num_experts; e += 32) {
            mine[e] += (double)(scale * row[e]);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < a.num_experts; e += BLOCK) {
        double sum = 0.0;

        for (int w = 0; w < WARPS; w++) {
            sum += sums[w * a.num_experts + e];
        }
        out[e] = sum;
    }
}

__device__ static void exponentiate(const struct sinkhorn_args &a)
{
    const int lane = threadIdx.x % 32;
    const int64_t first = blockIdx.x * a.rows_per_block;
    const int64_t end = min(first + a.rows_per_block, a.num_tokens);

    for (int64_t t = first + threadIdx.x / 32; t < end; t += WARPS) {
        const float *from = a.logits + t * a.num_experts;
        float max = -INFINITY;

        for (int e = lane; e < a.num_experts; e += 32) {
            max = fmaxf(max, from[e]);
        }
        max = warp_max(max);
        for (int e = lane; e < a.num_experts; e += 32) {
            a.assignment[t * a.num_experts + e] = expf(from[e] - max);
        }
    }
}

/* assignment = row scale * kernel * column scale; the row scales are those of the last iteration,
 * which used the column scales before the last update (`previous`). */
__device__ static void apply_scales(const struct sinkhorn_args &a, const float *previous,
                                    const float *column_scale)
{
    const int lane = threadIdx.x % 32;
    const int64_t first = blockIdx.x * a.rows_per_block;
    const int64_t end = min(first + a.rows_per_block, a.num_tokens);

    for (int64_t t = first + threadIdx.x / 32; t < end; t += WARPS) {
        float *row = a.assignment + t * a.num_experts;
        float sum = 0.0f, scale;

        for (int e = lane; e < a.num_experts; e += 32) {
            sum += row[e] * previous[e];
        }
        scale = 1.0f / (float)a.num_tokens / (warp_sum(sum) + SCALE_EPSILON);
        for (int e = lane; e < a.num_experts; e += 32) {
            row[e] *= column_scale[e] * scale;
        }
    }
}

/* The new column scales from all blocks' partials. Returns the mean change. */
__device__ static double scale_columns(const struct sinkhorn_args &a, const double *partials,
                                       float *previous, float *column_scale, double *buffer)
{
    double change = 0.0;

    for (int e = threadIdx.x; e < a.num_experts; e += BLOCK) {
        double sum = 0.0;
        float scale;

        for (int b = 0; b < (int)gridDim.x; b++) {
            sum += partials[(int64_t)b * a.num_experts + e];
        }
        scale = 1.0f / (float)a.num_experts / ((float)sum + SCALE_EPSILON);
        previous[e] = column_scale[e];
        column_scale[e] = scale;
        change += fabs((double)previous[e] - (double)scale);
    }
    return block_sum(change, buffer) / (double)a.num_experts;
}

/* Shared memory: [WARPS][E] doubles, column scales and previous ones [E] floats each. */
__global__ void sinkhorn_kernel(struct sinkhorn_args a)
{
    extern __shared__ double work[];
    __shared__ double buffer[32];
    float *column_scale = (float *)(work + WARPS * a.num_experts);
    float *previous = column_scale + a.num_experts;
    const cooperative_groups::grid_group grid = cooperative_groups::this_grid();

    for (int e = threadIdx.x; e < a.num_experts; e += BLOCK) {
        column_scale[e] = 1.0f;
    }
    exponentiate(a);
    for (int iteration = 0; iteration < a.max_iterations; iteration++) {
        double *partials = a.partials + (int64_t)(iteration % 2) * gridDim.x * a.num_experts;
        double change;

        __syncthreads();
        scale_rows(a, column_scale, work, partials + (int64_t)blockIdx.x * a.num_experts);
        grid.sync();
        change = scale_columns(a, partials, previous, column_scale, buffer);
        if (!(change > (double)a.tolerance)) {
            break; /* the same sum in every block, so all leave together */
        }
    }
    __syncthreads();
    apply_scales(a, previous, column_scale);
}

extern "C" void router_sinkhorn_cuda(struct stream *stream, const struct router_sinkhorn *op)
{
    struct sinkhorn_args a = {};
    void *arguments[] = {&a};
    size_t shared_bytes;
    int64_t num_blocks;

    a.num_tokens = op->logits->dim[0];
    a.num_experts = (int)op->logits->dim[1];
    if (a.num_tokens == 0) {
        return;
    }
    shared_bytes = (size_t)a.num_experts * (WARPS * 8 + 2 * 4);
    CHECK(shared_bytes <= 200 * 1024, "sinkhorn over %d experts", a.num_experts);
    CUDA_CHECK(cudaFuncSetAttribute(sinkhorn_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared_bytes));
    a.rows_per_block = ceil_div(a.num_tokens, num_multiprocessors());
    a.rows_per_block = a.rows_per_block < WARPS ? WARPS : a.rows_per_block;
    num_blocks = ceil_div(a.num_tokens, a.rows_per_block); /* at most one a multiprocessor */
    a.assignment = data_of<float>(op->assignment);
    a.logits = data_of<float>(op->logits);
    a.partials =
        (double *)arena_allocate(stream->scratch, (size_t)(2 * num_blocks * a.num_experts) * 8);
    a.max_iterations = op->max_iterations;
    a.tolerance = op->tolerance;
    CUDA_CHECK(cudaLaunchCooperativeKernel(sinkhorn_kernel, dim3((unsigned)num_blocks), BLOCK,
                                           arguments, shared_bytes, (cudaStream_t)stream->native));
}
