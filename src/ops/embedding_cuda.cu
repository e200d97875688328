/* Embedding: a gather of rows. Its gradient adds rows that may meet in one place, without atomics:
 * tokens of one id form a list in token order, and the block of the list's first token adds it up.
 */
#include "ops/ops_cuda_internal.cuh"

enum { BLOCK = 256 };

template <int N, class T>
__global__ void embedding_forward_kernel(T *y, const T *weight, const int32_t *id, int vocab_start,
                                         int64_t num_ids, int64_t width, bool accumulate)
{
    const int64_t row = (int64_t)id[blockIdx.x] - vocab_start, first = blockIdx.x * width;
    const bool mine = row >= 0 && row < num_ids;

    for (int64_t i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float out[N] = {0.0f};

        if (mine) {
            load<N>(out, weight, row * width + i);
        }
        if (accumulate) {
            float old[N];

            load<N>(old, y, first + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                out[j] += old[j];
            }
        }
        store<N>(y, first + i, out);
    }
}

extern "C" void embedding_forward_cuda(struct stream *stream, const struct embedding *a)
{
    const int64_t width = a->y->dim[1];

    WITH_PACK(a->y->dtype, packable(width, {a->y, a->weight}), {
        LAUNCH(stream, (embedding_forward_kernel<N, T>), a->y->dim[0], BLOCK, 0, data_of<T>(a->y),
               data_of<T>(a->weight), data_of<int32_t>(a->id), (int)a->vocab_start,
               a->weight->dim[0], width, a->accumulate);
    });
}

enum { WARPS = BLOCK / 32, LOOKS = 4 };

/* The first token after `token` with its id, for the calling warp; -1 if there is none. */
__device__ inline int following_token(const int32_t *id, int token, int num_tokens)
{
    const int32_t mine = id[token];

    for (int begin = token + 1; begin < num_tokens; begin += 32 * LOOKS) {
        bool same[LOOKS];

#pragma unroll
        for (int j = 0; j < LOOKS; j++) {
            const int other = begin + 32 * j + threadIdx.x % 32;

            same[j] = other < num_tokens && id[other] == mine;
        }
#pragma unroll
        for (int j = 0; j < LOOKS; j++) {
            const unsigned found = __ballot_sync(0xffffffffu, same[j]);

            if (found != 0) {
                return begin + 32 * j + __ffs(found) - 1;
            }
        }
    }
    return -1;
}

/* next[t] = the following token with the id of t, or -1; is_later[t], zeroed before = whether one
 * comes before. A warp a token looks at those after it: at most T^2 / 2 comparisons. */
__global__ void token_lists_kernel(int32_t *next, bool *is_later, const int32_t *id, int num_tokens)
{
    const int token = blockIdx.x * WARPS + threadIdx.x / 32;
    int following;

    if (token >= num_tokens) {
        return;
    }
    following = following_token(id, token, num_tokens);
    if (threadIdx.x % 32 == 0) {
        next[token] = following;
        if (following >= 0) {
            is_later[following] = true;
        }
    }
}

template <int N, class T>
__global__ void embedding_backward_kernel(float *d_weight, const T *d_y, const int32_t *id,
                                          const int32_t *next, const bool *is_later,
                                          int vocab_start, int64_t num_ids, int64_t width)
{
    const int64_t row = (int64_t)id[blockIdx.x] - vocab_start;

    if (is_later[blockIdx.x] || row < 0 || row >= num_ids) {
        return;
    }
    for (int64_t i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float sum[N];

        load<N>(sum, d_weight, row * width + i);
        for (int32_t token = blockIdx.x; token >= 0; token = next[token]) {
            float d[N];

            load<N>(d, d_y, token * width + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] += d[j];
            }
        }
        store<N>(d_weight, row * width + i, sum);
    }
}

extern "C" void embedding_backward_cuda(struct stream *stream, const struct embedding_backward *a)
{
    const int64_t num_tokens = a->d_y->dim[0], width = a->d_y->dim[1];
    int32_t *next = (int32_t *)arena_allocate(stream->scratch, (size_t)num_tokens * 4);
    bool *is_later = (bool *)arena_allocate(stream->scratch, (size_t)num_tokens);
    const int32_t *id = data_of<int32_t>(a->id);
    /* a pack of d_y is up to 32 bytes of d_weight */
    const bool whole = packable(width, {a->d_y}) && (uintptr_t)a->d_weight->data % 32 == 0;

    CUDA_CHECK(cudaMemsetAsync(is_later, 0, (size_t)num_tokens, (cudaStream_t)stream->native));
    LAUNCH(stream, token_lists_kernel, ceil_div(num_tokens, WARPS), BLOCK, 0, next, is_later, id,
           (int)num_tokens);
    WITH_PACK(a->d_y->dtype, whole, {
        LAUNCH(stream, (embedding_backward_kernel<N, T>), num_tokens, BLOCK, 0,
               data_of<float>(a->d_weight), data_of<T>(a->d_y), id, next, is_later,
               (int)a->vocab_start, a->d_weight->dim[0], width);
    });
}
