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

/* next[t] = the following token with the id of t, or -1; first[t] = whether none comes before. Each
 * token looks at all others: T^2 comparisons of numbers in shared memory, 0.1 ms for 32k tokens. */
__global__ void token_lists_kernel(int32_t *next, bool *first, const int32_t *id, int num_tokens)
{
    __shared__ int32_t others[BLOCK];
    const int token = blockIdx.x * BLOCK + threadIdx.x;
    const int32_t mine = token < num_tokens ? id[token] : -1;
    int32_t following = -1;
    bool is_first = true;

    for (int begin = 0; begin < num_tokens; begin += BLOCK) {
        const int count = num_tokens - begin < BLOCK ? num_tokens - begin : BLOCK;

        __syncthreads();
        if ((int)threadIdx.x < count) {
            others[threadIdx.x] = id[begin + threadIdx.x];
        }
        __syncthreads();
        for (int i = 0; i < count; i++) {
            if (others[i] == mine) {
                is_first = is_first && begin + i >= token;
                following = following < 0 && begin + i > token ? begin + i : following;
            }
        }
    }
    if (token < num_tokens) {
        next[token] = following;
        first[token] = is_first;
    }
}

template <int N, class T>
__global__ void embedding_backward_kernel(float *d_weight, const T *d_y, const int32_t *id,
                                          const int32_t *next, const bool *is_first,
                                          int vocab_start, int64_t num_ids, int64_t width)
{
    const int64_t row = (int64_t)id[blockIdx.x] - vocab_start;

    if (!is_first[blockIdx.x] || row < 0 || row >= num_ids) {
        return;
    }
    for (int64_t i = threadIdx.x * N; i < width; i += BLOCK * N) {
        float sum[N];

#pragma unroll
        for (int j = 0; j < N; j++) {
            sum[j] = d_weight[row * width + i + j];
        }
        for (int32_t token = blockIdx.x; token >= 0; token = next[token]) {
            float d[N];

            load<N>(d, d_y, token * width + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] += d[j];
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            d_weight[row * width + i + j] = sum[j];
        }
    }
}

extern "C" void embedding_backward_cuda(struct stream *stream, const struct embedding_backward *a)
{
    const int64_t num_tokens = a->d_y->dim[0], width = a->d_y->dim[1];
    int32_t *next = (int32_t *)arena_allocate(stream->scratch, (size_t)num_tokens * 4);
    bool *first = (bool *)arena_allocate(stream->scratch, (size_t)num_tokens);
    const int32_t *id = data_of<int32_t>(a->id);

    LAUNCH(stream, token_lists_kernel, ceil_div(num_tokens, BLOCK), BLOCK, 0, next, first, id,
           (int)num_tokens);
    WITH_PACK(a->d_y->dtype, packable(width, {a->d_y}), {
        LAUNCH(stream, (embedding_backward_kernel<N, T>), num_tokens, BLOCK, 0,
               data_of<float>(a->d_weight), data_of<T>(a->d_y), id, next, first,
               (int)a->vocab_start, a->d_weight->dim[0], width);
    });
}
