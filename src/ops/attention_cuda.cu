/* Attention in tiles of 32 queries and 32 keys, without the [S, Skv] matrix (Dao et al. 2022): the
 * forward pass walks over keys with a running maximum and sum; backward recomputes the
 * probabilities from lse, once for the gradient of the queries and once for that of the keys, so
 * that every sum has one owner and a fixed order. Products run on the scalar units in f32: the
 * variant for every dtype, head size, mask and dropout. */
#include "ops/ops_cuda_internal.cuh"

enum { TILE = 32, BLOCK = 256, LANES = BLOCK / TILE, HEAD_SIZE_MAX = 256 };

template <class T> struct attention_args {
    const T *q, *k, *v, *out, *d_out;
    T *out_written, *d_q, *d_k, *d_v;
    float *lse_written, *delta;
    const float *lse;
    const int32_t *document_start;
    const int64_t *sample_id;
    struct dropout_rule dropout;
    float scale;
    bool causal;
    int64_t q_start, kv_length, head_start, num_heads_global;
    int64_t s, s_kv, b, num_heads, num_groups, d;
};

/* One (batch, head) of a call. */
template <class T> struct head {
    const attention_args<T> &a;
    int64_t batch, head_index, group;

    __device__ head(const attention_args<T> &args, int64_t batch_, int64_t head_)
        : a(args), batch(batch_), head_index(head_),
          group(head_ / (args.num_heads / args.num_groups))
    {
    }

    __device__ int64_t query_element(int64_t s) const
    {
        return ((s * a.b + batch) * a.num_heads + head_index) * a.d;
    }

    __device__ int64_t key_element(int64_t j) const
    {
        return ((j * a.b + batch) * a.num_groups + group) * a.d;
    }

    __device__ int64_t row(int64_t s) const
    {
        return (batch * a.num_heads + head_index) * a.s + s;
    }

    __device__ bool sees(int64_t s, int64_t j) const
    {
        if (s >= a.s || j >= a.kv_length || (a.causal && j > a.q_start + s)) {
            return false;
        }
        return a.document_start == NULL || j >= a.document_start[s * a.b + batch];
    }

    /* What a probability is multiplied with: 0 or 1 / (1 - p). */
    __device__ float dropout_factor(int64_t s, int64_t j) const
    {
        uint64_t id;

        if (a.dropout.p == 0.0f) {
            return 1.0f;
        }
        id = (uint64_t)a.sample_id[batch] * (uint64_t)a.num_heads_global +
             (uint64_t)(a.head_start + head_index);
        return rng_uniform(a.dropout.key, (id << 24) + (uint64_t)(a.q_start + s), (uint64_t)j) >=
                       a.dropout.p
                   ? 1.0f / (1.0f - a.dropout.p)
                   : 0.0f;
    }

    /* Keys that no query of the tile from s on sees begin here. */
    __device__ int64_t key_end(int64_t s) const
    {
        const int64_t last = (s + TILE < a.s ? s + TILE : a.s) - 1;
        const int64_t diagonal = a.q_start + last + 1;

        return a.causal && diagonal < a.kv_length ? diagonal : a.kv_length;
    }
};

/* tile [TILE][d + 1] = rows of x as floats, zeros from `end` on. element(row): first element. */
template <class T, class F>
__device__ inline void load_tile(float *tile, const T *x, int64_t first, int64_t end, int64_t d,
                                 F element)
{
    for (int i = threadIdx.x; i < TILE * (int)d; i += BLOCK) {
        const int row = i / (int)d, column = i % (int)d;

        tile[row * (d + 1) + column] =
            first + row < end ? to_float(x[element(first + row) + column]) : 0.0f;
    }
}

__device__ inline float tile_dot(const float *x, const float *y, int64_t d)
{
    float sum = 0.0f;

    for (int i = 0; i < (int)d; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

/* Over the LANES threads that share a row. */
__device__ inline float row_max(float x)
{
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    return x;
}

__device__ inline float row_sum(float x)
{
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
    return x;
}

/* acc[j] += sum over i of weights[i] * tile[i][lane + LANES j]. */
template <int COLUMNS>
__device__ inline void accumulate_tile(float (&acc)[COLUMNS], const float *weights,
                                       const float *tile, int lane, int64_t d)
{
    for (int i = 0; i < TILE; i++) {
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            if (lane + LANES * j < d) {
                acc[j] += weights[i] * tile[i * (d + 1) + lane + LANES * j];
            }
        }
    }
}

/* Block: a head's queries [s, s + TILE); thread: query threadIdx / LANES, keys and columns lane +
 * LANES i. Shared memory: tiles of q, k, v, probabilities. */
template <class T, int COLUMNS>
__global__ void __launch_bounds__(BLOCK) attention_forward_kernel(attention_args<T> a)
{
    extern __shared__ float shared[];
    const int64_t tile_floats = TILE * (a.d + 1), num_tiles = (a.s + TILE - 1) / TILE;
    float *q = shared, *k = q + tile_floats, *v = k + tile_floats, *p = v + tile_floats;
    const int64_t s0 = blockIdx.x % num_tiles * TILE, item = blockIdx.x / num_tiles;
    const head<T> h(a, item / a.num_heads, item % a.num_heads);
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t s = s0 + row, end = h.key_end(s0);
    float max = -INFINITY, sum = 0.0f, out[COLUMNS] = {0.0f};

    load_tile(q, a.q, s0, a.s, a.d, [&](int64_t i) { return h.query_element(i); });
    for (int64_t j0 = 0; j0 < end; j0 += TILE) {
        float scores[TILE / LANES], top = max, factor, added = 0.0f;

        __syncthreads();
        load_tile(k, a.k, j0, end, a.d, [&](int64_t i) { return h.key_element(i); });
        load_tile(v, a.v, j0, end, a.d, [&](int64_t i) { return h.key_element(i); });
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / LANES; i++) {
            const int key = lane + LANES * i;

            scores[i] = h.sees(s, j0 + key)
                            ? a.scale * tile_dot(q + row * (a.d + 1), k + key * (a.d + 1), a.d)
                            : -INFINITY;
            top = fmaxf(top, scores[i]);
        }
        top = row_max(top);
        factor = max == -INFINITY ? 0.0f : expf(max - top);
#pragma unroll
        for (int i = 0; i < TILE / LANES; i++) {
            const int key = lane + LANES * i;
            const float e = scores[i] == -INFINITY ? 0.0f : expf(scores[i] - top);

            added += e;
            p[row * TILE + key] = e > 0.0f ? e * h.dropout_factor(s, j0 + key) : 0.0f;
        }
        sum = sum * factor + row_sum(added);
        max = top;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            out[j] *= factor;
        }
        accumulate_tile<COLUMNS>(out, p + row * TILE, v, lane, a.d);
    }
    if (s >= a.s) {
        return;
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        if (lane + LANES * j < a.d) {
            a.out_written[h.query_element(s) + lane + LANES * j] = from_float<T>(out[j] / sum);
        }
    }
    if (lane == 0) {
        a.lse_written[h.row(s)] = max + logf(sum);
    }
}

/* ---- backward ----
 *
 * With p = exp(score - lse), z the dropout factors and delta[s] = d_out[s] . out[s]:
 *   d_v[j] = sum_s p z d_out[s],   d_p = z (d_out[s] . v[j]),   d_score = p (d_p - delta[s]),
 *   d_q[s] = scale * sum_j d_score k[j],   d_k[j] = scale * sum_s d_score q[s]. */

/* delta [B,A,S]; a warp a row. */
template <class T> __global__ void attention_delta_kernel(attention_args<T> a)
{
    const int64_t i = (int64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
    const int64_t item = i / a.s, s = i % a.s;
    float sum = 0.0f;

    if (item >= a.b * a.num_heads) {
        return;
    }
    const head<T> h(a, item / a.num_heads, item % a.num_heads);

    for (int64_t c = threadIdx.x % 32; c < a.d; c += 32) {
        sum += to_float(a.out[h.query_element(s) + c]) * to_float(a.d_out[h.query_element(s) + c]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        a.delta[h.row(s)] = sum;
    }
}

struct backward_weights {
    float p_dropped, d_score;
};

template <class T>
__device__ inline struct backward_weights weights_of(const head<T> &h, const float *q,
                                                     const float *k, const float *v,
                                                     const float *d_out, int64_t s, int64_t j)
{
    float p, z;

    if (!h.sees(s, j)) {
        return {0.0f, 0.0f};
    }
    p = expf(h.a.scale * tile_dot(q, k, h.a.d) - h.a.lse[h.row(s)]);
    z = h.dropout_factor(s, j);
    return {p * z, p * (z * tile_dot(d_out, v, h.a.d) - h.a.delta[h.row(s)])};
}

/* Block: queries [s, s + TILE) of a head. Shared memory: tiles of q, d_out, k, v, weights. */
template <class T, int COLUMNS>
__global__ void __launch_bounds__(BLOCK) attention_d_q_kernel(attention_args<T> a)
{
    extern __shared__ float shared[];
    const int64_t pitch = a.d + 1, tile_floats = TILE * pitch, num_tiles = (a.s + TILE - 1) / TILE;
    float *q = shared, *d_out = q + tile_floats, *k = d_out + tile_floats, *v = k + tile_floats;
    float *weights = v + tile_floats;
    const int64_t s0 = blockIdx.x % num_tiles * TILE, item = blockIdx.x / num_tiles;
    const head<T> h(a, item / a.num_heads, item % a.num_heads);
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t s = s0 + row, end = h.key_end(s0);
    float d_q[COLUMNS] = {0.0f};

    load_tile(q, a.q, s0, a.s, a.d, [&](int64_t i) { return h.query_element(i); });
    load_tile(d_out, a.d_out, s0, a.s, a.d, [&](int64_t i) { return h.query_element(i); });
    for (int64_t j0 = 0; j0 < end; j0 += TILE) {
        __syncthreads();
        load_tile(k, a.k, j0, end, a.d, [&](int64_t i) { return h.key_element(i); });
        load_tile(v, a.v, j0, end, a.d, [&](int64_t i) { return h.key_element(i); });
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / LANES; i++) {
            const int key = lane + LANES * i;

            weights[row * TILE + key] =
                weights_of(h, q + row * pitch, k + key * pitch, v + key * pitch,
                           d_out + row * pitch, s, j0 + key)
                    .d_score;
        }
        __syncwarp();
        accumulate_tile<COLUMNS>(d_q, weights + row * TILE, k, lane, a.d);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        if (s < a.s && lane + LANES * j < a.d) {
            a.d_q[h.query_element(s) + lane + LANES * j] = from_float<T>(a.scale * d_q[j]);
        }
    }
}

/* Block: keys [j, j + TILE) of a group, over all its heads and the queries that see them. Keys from
 * kv_length on get zeros. Shared memory: tiles of k, v, q, d_out, two of weights. */
template <class T, int COLUMNS>
__global__ void __launch_bounds__(BLOCK) attention_d_kv_kernel(attention_args<T> a)
{
    extern __shared__ float shared[];
    const int64_t pitch = a.d + 1, tile_floats = TILE * pitch;
    const int64_t num_tiles = (a.s_kv + TILE - 1) / TILE, per_group = a.num_heads / a.num_groups;
    float *k = shared, *v = k + tile_floats, *q = v + tile_floats, *d_out = q + tile_floats;
    float *p = d_out + tile_floats, *d_score = p + TILE * TILE;
    const int64_t j0 = blockIdx.x % num_tiles * TILE, item = blockIdx.x / num_tiles;
    const int64_t batch = item / a.num_groups, group = item % a.num_groups;
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t j = j0 + row, first = a.causal ? j0 - a.q_start : 0;
    const head<T> any(a, batch, group * per_group);
    float d_k[COLUMNS] = {0.0f}, d_v[COLUMNS] = {0.0f};

    load_tile(k, a.k, j0, a.kv_length, a.d, [&](int64_t i) { return any.key_element(i); });
    load_tile(v, a.v, j0, a.kv_length, a.d, [&](int64_t i) { return any.key_element(i); });
    for (int64_t i = 0; i < per_group && j0 < a.kv_length; i++) {
        const head<T> h(a, batch, group * per_group + i);

        for (int64_t s0 = first > 0 ? first / TILE * TILE : 0; s0 < a.s; s0 += TILE) {
            __syncthreads();
            load_tile(q, a.q, s0, a.s, a.d, [&](int64_t n) { return h.query_element(n); });
            load_tile(d_out, a.d_out, s0, a.s, a.d, [&](int64_t n) { return h.query_element(n); });
            __syncthreads();
#pragma unroll
            for (int n = 0; n < TILE / LANES; n++) {
                const int query = lane + LANES * n;
                const struct backward_weights w =
                    weights_of(h, q + query * pitch, k + row * pitch, v + row * pitch,
                               d_out + query * pitch, s0 + query, j);

                p[row * TILE + query] = w.p_dropped;
                d_score[row * TILE + query] = w.d_score;
            }
            __syncwarp();
            accumulate_tile<COLUMNS>(d_v, p + row * TILE, d_out, lane, a.d);
            accumulate_tile<COLUMNS>(d_k, d_score + row * TILE, q, lane, a.d);
        }
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        if (j < a.s_kv && lane + LANES * n < a.d) {
            a.d_k[any.key_element(j) + lane + LANES * n] = from_float<T>(a.scale * d_k[n]);
            a.d_v[any.key_element(j) + lane + LANES * n] = from_float<T>(d_v[n]);
        }
    }
}

template <class T> static attention_args<T> args_of(const struct attention *op)
{
    attention_args<T> a = {};

    a.q = data_of<T>(op->q);
    a.k = data_of<T>(op->k);
    a.v = data_of<T>(op->v);
    a.out = a.out_written = data_of<T>(op->out);
    a.lse = a.lse_written = data_of<float>(op->lse);
    a.document_start = data_of<int32_t>(op->document_start);
    a.sample_id = data_of<int64_t>(op->sample_id);
    a.dropout = op->dropout;
    a.scale = op->scale;
    a.causal = op->causal;
    a.q_start = op->q_start;
    a.kv_length = op->kv_length;
    a.head_start = op->head_start;
    a.num_heads_global = op->num_heads_global;
    a.s = op->q->dim[0];
    a.s_kv = op->k->dim[0];
    a.b = op->q->dim[1];
    a.num_heads = op->q->dim[2];
    a.num_groups = op->k->dim[2];
    a.d = op->q->dim[3];
    CHECK(a.d <= HEAD_SIZE_MAX, "attention heads of %lld, at most %d", (long long)a.d,
          HEAD_SIZE_MAX);
    return a;
}

template <class T>
static void attention_launch(struct stream *stream, void (*kernel)(attention_args<T>),
                             const attention_args<T> &a, int64_t num_items, int64_t length,
                             int num_tiles, int num_weights)
{
    const size_t shared_bytes =
        ((size_t)(num_tiles * TILE) * (size_t)(a.d + 1) + (size_t)(num_weights * TILE * TILE)) * 4;

    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared_bytes));
    LAUNCH(stream, kernel, num_items * ceil_div(length, TILE), BLOCK, shared_bytes, a);
}

extern "C" void attention_forward_cuda(struct stream *stream, const struct attention *op)
{
    WITH_ACT(op->q->dtype, {
        const attention_args<T> a = args_of<T>(op);

        attention_launch<T>(
            stream, a.d <= 128 ? attention_forward_kernel<T, 16> : attention_forward_kernel<T, 32>,
            a, a.b * a.num_heads, a.s, 3, 1);
    });
}

extern "C" void attention_backward_cuda(struct stream *stream, const struct attention_backward *op)
{
    WITH_ACT(op->d_q->dtype, {
        attention_args<T> a = args_of<T>(&op->forward);
        const int64_t num_rows = a.b * a.num_heads * a.s;

        a.d_out = data_of<T>(op->d_out);
        a.d_q = data_of<T>(op->d_q);
        a.d_k = data_of<T>(op->d_k);
        a.d_v = data_of<T>(op->d_v);
        a.delta = (float *)arena_allocate(stream->scratch, (size_t)num_rows * 4);
        LAUNCH(stream, attention_delta_kernel<T>, ceil_div(num_rows, BLOCK / 32), BLOCK, 0, a);
        attention_launch<T>(stream,
                            a.d <= 128 ? attention_d_q_kernel<T, 16> : attention_d_q_kernel<T, 32>,
                            a, a.b * a.num_heads, a.s, 4, 1);
        attention_launch<T>(
            stream, a.d <= 128 ? attention_d_kv_kernel<T, 16> : attention_d_kv_kernel<T, 32>, a,
            a.b * a.num_groups, a.s_kv, 4, 2);
    });
}
