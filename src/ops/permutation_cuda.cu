/* Rows of tokens in the order of their experts, and back. A stable counting sort in three launches:
 * counts of each chunk of slots, where each chunk's rows of each expert begin, placement. Only
 * whole numbers meet in atomics, so the result is the same every time. */
#include "ops/ops_cuda_internal.cuh"

enum { CHUNK = 1024, CHUNK_WARPS = CHUNK / 32, BLOCK = 256, WARPS = BLOCK / 32 };

/* counts [chunks, E]: slots of each expert in a chunk. Shared memory: [E]. */
__global__ void expert_counts_kernel(int32_t *counts, const int32_t *indices, int64_t num_slots,
                                     int num_experts)
{
    extern __shared__ int32_t mine[];
    const int64_t slot = (int64_t)blockIdx.x * CHUNK + threadIdx.x;

    for (int e = threadIdx.x; e < num_experts; e += CHUNK) {
        mine[e] = 0;
    }
    __syncthreads();
    if (slot < num_slots && indices[slot] >= 0) {
        atomicAdd(&mine[indices[slot]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += CHUNK) {
        counts[(int64_t)blockIdx.x * num_experts + e] = mine[e];
    }
}

/* The calling warp's inclusive prefix sums. */
__device__ inline int warp_prefix(int x)
{
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, x, distance);

        x += (int)(threadIdx.x % 32) >= distance ? before : 0;
    }
    return x;
}

/* counts[chunk, e] := slots of e before the chunk; totals[e] = all of them. A warp an expert. */
__global__ void chunk_prefix_kernel(int32_t *counts, int32_t *totals, int num_chunks,
                                    int num_experts)
{
    const int lane = threadIdx.x % 32, e = blockIdx.x * WARPS + threadIdx.x / 32;
    int before = 0;

    if (e >= num_experts) {
        return;
    }
    for (int begin = 0; begin < num_chunks; begin += 32) {
        const int chunk = begin + lane;
        const int64_t at = (int64_t)chunk * num_experts + e;
        const int count = chunk < num_chunks ? counts[at] : 0, prefix = warp_prefix(count);

        if (chunk < num_chunks) {
            counts[at] = before + prefix - count;
        }
        before += __shfl_sync(0xffffffffu, prefix, 31);
    }
    if (lane == 0) {
        totals[e] = before;
    }
}

/* offsets [E+1] from totals, or multiples of the padded capacity. One warp. */
__global__ void offsets_kernel(int32_t *offsets, const int32_t *totals, int num_experts,
                               int64_t padded_capacity)
{
    const int lane = threadIdx.x % 32;
    int before = 0;

    for (int begin = 0; begin < num_experts; begin += 32) {
        const int e = begin + lane;
        int count = e < num_experts ? totals[e] : 0, prefix;

        if (padded_capacity > 0 && e < num_experts) {
            if (count > padded_capacity) {
                __trap(); /* router_drop was not called, or with another capacity */
            }
            count = (int)padded_capacity;
        }
        prefix = warp_prefix(count);
        if (e < num_experts) {
            offsets[e] = before + prefix - count;
        }
        before += __shfl_sync(0xffffffffu, prefix, 31);
    }
    if (lane == 0) {
        offsets[num_experts] = before;
    }
}

struct placement {
    int32_t *row_of, *row_token;
    float *row_prob;
    const int32_t *indices, *before, *offsets; /* before [chunks, E] */
    const float *probs;
    int64_t num_slots;
    int num_experts, topk;
};

/* A slot's row: where its expert begins, its slots in earlier chunks, in earlier warps of the
 * chunk, in earlier lanes of the warp. Shared memory: [CHUNK_WARPS][E] counts. */
__global__ void place_kernel(struct placement p)
{
    extern __shared__ uint16_t warp_counts[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t slot = (int64_t)blockIdx.x * CHUNK + threadIdx.x;
    const int expert = slot < p.num_slots ? p.indices[slot] : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, expert);
    const int rank = __popc(peers & ((1u << lane) - 1));
    int row = -1;

    for (int i = threadIdx.x; i < CHUNK_WARPS * p.num_experts; i += CHUNK) {
        warp_counts[i] = 0;
    }
    __syncthreads();
    if (expert >= 0 && rank == 0) {
        warp_counts[warp * p.num_experts + expert] = (uint16_t)__popc(peers);
    }
    __syncthreads();
    if (expert >= 0) {
        row = p.offsets[expert] + p.before[(int64_t)blockIdx.x * p.num_experts + expert] + rank;
        for (int w = 0; w < warp; w++) {
            row += warp_counts[w * p.num_experts + expert];
        }
        p.row_token[row] = (int32_t)(slot / p.topk);
        p.row_prob[row] = p.probs[slot];
    }
    if (slot < p.num_slots) {
        p.row_of[slot] = row;
    }
}

__global__ void fill_padding_kernel(int32_t *row_token, float *row_prob, const int32_t *totals,
                                    int64_t padded_capacity, int64_t num_rows)
{
    const int64_t row = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (row < num_rows && row % padded_capacity >= totals[row / padded_capacity]) {
        row_token[row] = 0;
        row_prob[row] = 0.0f;
    }
}

extern "C" void permutation_cuda(struct stream *stream, const struct permutation *op)
{
    const int64_t num_slots = tensor_num_elements(op->indices);
    const int64_t num_experts = op->offsets->dim[0] - 1, num_chunks = ceil_div(num_slots, CHUNK);
    const int64_t shared_bytes = CHUNK_WARPS * num_experts * 2;
    int32_t *counts =
        (int32_t *)arena_allocate(stream->scratch, (size_t)(num_chunks * num_experts) * 4);
    int32_t *totals = (int32_t *)arena_allocate(stream->scratch, (size_t)num_experts * 4);
    const struct placement p = {
        data_of<int32_t>(op->row_of),
        data_of<int32_t>(op->row_token),
        data_of<float>(op->row_prob),
        data_of<int32_t>(op->indices),
        counts,
        data_of<int32_t>(op->offsets),
        data_of<float>(op->probs),
        num_slots,
        (int)num_experts,
        (int)op->indices->dim[1],
    };

    CHECK(shared_bytes <= 200 * 1024, "permutation over %lld experts", (long long)num_experts);
    CUDA_CHECK(cudaFuncSetAttribute(place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared_bytes));
    LAUNCH(stream, expert_counts_kernel, num_chunks, CHUNK, num_experts * 4, counts, p.indices,
           num_slots, (int)num_experts);
    LAUNCH(stream, chunk_prefix_kernel, ceil_div(num_experts, WARPS), BLOCK, 0, counts, totals,
           (int)num_chunks, (int)num_experts);
    LAUNCH(stream, offsets_kernel, 1, 32, 0, data_of<int32_t>(op->offsets), totals,
           (int)num_experts, op->padded_capacity);
    LAUNCH(stream, place_kernel, num_chunks, CHUNK, shared_bytes, p);
    if (op->padded_capacity > 0) {
        const int64_t num_rows = op->padded_capacity * num_experts;

        LAUNCH(stream, fill_padding_kernel, ceil_div(num_rows, BLOCK), BLOCK, 0, p.row_token,
               p.row_prob, totals, op->padded_capacity, num_rows);
    }
}

__global__ void slot_gather_kernel(float *d_probs, const float *d_row_prob, const int32_t *row_of,
                                   int64_t num_slots)
{
    const int64_t slot = (int64_t)blockIdx.x * BLOCK + threadIdx.x;

    if (slot < num_slots) {
        d_probs[slot] = row_of[slot] >= 0 ? d_row_prob[row_of[slot]] : 0.0f;
    }
}

extern "C" void slot_gather_cuda(struct stream *stream, const struct slot_gather *op)
{
    const int64_t num_slots = tensor_num_elements(op->row_of);

    LAUNCH(stream, slot_gather_kernel, ceil_div(num_slots, BLOCK), BLOCK, 0,
           data_of<float>(op->d_probs), data_of<float>(op->d_row_prob),
           data_of<int32_t>(op->row_of), num_slots);
}

enum { IN_FLIGHT = 4 }; /* loads of a lane before its first store */

/* A warp a row; bytes are copied as they are. num_used: the device's number of rows in use, or NULL
 * for all. */
template <class V>
__global__ void row_gather_kernel(V *y, const V *x, const int32_t *index, const int32_t *num_used,
                                  int64_t num_rows, int64_t width)
{
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int64_t end = num_used != NULL ? *num_used : num_rows;
    const V *from;

    if (row >= end) {
        return;
    }
    from = x + index[row] * width;
    for (int64_t i = threadIdx.x % 32; i < width; i += 32 * IN_FLIGHT) {
        V values[IN_FLIGHT];

#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) {
            if (i + 32 * j < width) {
                values[j] = from[i + 32 * j];
            }
        }
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) {
            if (i + 32 * j < width) {
                y[row * width + i + 32 * j] = values[j];
            }
        }
    }
}

/* The same by tokens: a warp reads a row of x once and writes all its copies. */
template <class V>
__global__ void row_spread_kernel(V *y, const V *x, const int32_t *token_rows, int64_t num_tokens,
                                  int topk, int64_t width)
{
    const int64_t token = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int32_t *rows = token_rows + token * topk;

    if (token >= num_tokens) {
        return;
    }
    for (int64_t i = threadIdx.x % 32; i < width; i += 32 * IN_FLIGHT) {
        V values[IN_FLIGHT];

#pragma unroll
        for (int j = 0; j < IN_FLIGHT; j++) {
            if (i + 32 * j < width) {
                values[j] = x[token * width + i + 32 * j];
            }
        }
        for (int k = 0; k < topk; k++) {
            const int64_t row = rows[k];

#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) {
                if (row >= 0 && i + 32 * j < width) {
                    y[row * width + i + 32 * j] = values[j];
                }
            }
        }
    }
}

template <class V> static void row_gather_run(struct stream *stream, const struct row_gather *op)
{
    const int64_t num_rows = op->index->dim[0], num_tokens = op->x->dim[0];
    const int64_t width = op->x->dim[1] * dtype_size_bytes(op->x->dtype) / (int64_t)sizeof(V);
    const int32_t *num_used =
        op->offsets != NULL ? data_of<int32_t>(op->offsets) + op->offsets->dim[0] - 1 : NULL;

    if (op->token_rows != NULL) {
        LAUNCH(stream, row_spread_kernel<V>, ceil_div(num_tokens, WARPS), BLOCK, 0,
               data_of<V>(op->y), data_of<V>(op->x), data_of<int32_t>(op->token_rows), num_tokens,
               (int)op->token_rows->dim[1], width);
    } else {
        LAUNCH(stream, row_gather_kernel<V>, ceil_div(num_rows, WARPS), BLOCK, 0, data_of<V>(op->y),
               data_of<V>(op->x), data_of<int32_t>(op->index), num_used, num_rows, width);
    }
}

extern "C" void row_gather_cuda(struct stream *stream, const struct row_gather *op)
{
    if (packable(op->x->dim[1], {op->x, op->y})) {
        row_gather_run<uint4>(stream, op);
    } else {
        row_gather_run<uint16_t>(stream, op);
    }
}

/* A block a token. Two rows and the residual are loaded before any is added, to keep more bytes in
 * flight. */
template <int N, class T>
__global__ void row_sum_kernel(T *y, const T *rows, const int32_t *row_of, const T *residual,
                               int topk, int64_t width)
{
    const int32_t *mine = row_of + (int64_t)blockIdx.x * topk;
    const int64_t first = blockIdx.x * width;

    early_join();
    for (int64_t i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float sum[N] = {0.0f}, last[N] = {0.0f};

        if (residual != NULL) {
            load<N>(last, residual, first + i);
        }
        for (int k = 0; k < topk; k += 2) {
            const int32_t row0 = mine[k], row1 = k + 1 < topk ? mine[k + 1] : -1;
            float x0[N] = {0.0f}, x1[N] = {0.0f};

            if (row0 >= 0) {
                load<N>(x0, rows, row0 * width + i);
            }
            if (row1 >= 0) {
                load<N>(x1, rows, row1 * width + i);
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] = sum[j] + x0[j] + x1[j];
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum[j] += last[j];
        }
        store<N>(y, first + i, sum);
    }
}

extern "C" void row_sum_cuda(struct stream *stream, const struct row_sum *op)
{
    const int64_t width = op->y->dim[1];

    WITH_PACK(op->y->dtype, packable(width, {op->y, op->rows, op->residual}), {
        LAUNCH_EARLY(stream, (row_sum_kernel<N, T>), op->y->dim[0], BLOCK, 0, data_of<T>(op->y),
                     data_of<T>(op->rows), data_of<int32_t>(op->row_of), data_of<T>(op->residual),
                     (int)op->row_of->dim[1], width);
    });
}
