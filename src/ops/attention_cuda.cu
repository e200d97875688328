/* Attention: cuDNN's kernels where they take the call (attention_cudnn_cuda.h), and the kernels
 * below for every dtype, head size, mask and dropout.
 *
 * The kernels below work in tiles of 32 queries and 32 keys, without the [S, Skv] matrix (Dao et
 * al. 2022): the forward pass walks over keys with a running maximum and sum; backward recomputes
 * the probabilities from lse, once for the gradient of the queries and once for that of the keys,
 * so that every sum has one owner and a fixed order. Products run on the scalar units in f32. */
#include "ops/attention_cuda.cuh"

extern "C" {
#include "ops/attention_cudnn_cuda.h"
}

enum { TILE = 32, BLOCK = 256, LANES = BLOCK / TILE, HEAD_SIZE_MAX = 256 };

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
template <int COLUMNS, class T, class O, class D>
__global__ void __launch_bounds__(BLOCK) attention_forward_kernel(attention_args<T, O, D> a)
{
    extern __shared__ float shared[];
    const int64_t tile_floats = TILE * (a.d + 1), num_tiles = (a.s + TILE - 1) / TILE;
    float *q = shared, *k = q + tile_floats, *v = k + tile_floats, *p = v + tile_floats;
    const int64_t s0 = blockIdx.x % num_tiles * TILE, item = blockIdx.x / num_tiles;
    const head<attention_args<T, O, D>> h(a, item / a.num_heads, item % a.num_heads);
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t s = s0 + row, end = h.key_end(s0, TILE);
    float max = -INFINITY, sum = 0.0f, out[COLUMNS] = {0.0f};

    if (a.merge && s < a.s && a.lse[h.row(s)] != -INFINITY) { /* go on from the result so far */
        max = a.lse[h.row(s)];
        sum = 1.0f;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            if (lane + LANES * j < a.d) {
                out[j] = to_float(a.out_written[h.query_element(s) + lane + LANES * j]);
            }
        }
    }
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
            a.out_written[h.query_element(s) + lane + LANES * j] =
                from_float<O>(sum > 0.0f ? out[j] / sum : 0.0f);
        }
    }
    if (lane == 0) {
        a.lse_written[h.row(s)] = sum > 0.0f ? max + logf(sum) : -INFINITY;
    }
}

/* ---- backward ----
 *
 * With p = exp(score - lse), z the dropout factors and delta[s] = d_out[s] . out[s]:
 *   d_v[j] = sum_s p z d_out[s],   d_p = z (d_out[s] . v[j]),   d_score = p (d_p - delta[s]),
 *   d_q[s] = scale * sum_j d_score k[j],   d_k[j] = scale * sum_s d_score q[s]. */

/* delta [B,A,S]; a warp a row. */
template <class T, class O, class D>
__global__ void attention_delta_kernel(attention_args<T, O, D> a)
{
    const int64_t i = (int64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
    const int64_t item = i / a.s, s = i % a.s;
    float sum = 0.0f;

    if (item >= a.b * a.num_heads) {
        return;
    }
    const head<attention_args<T, O, D>> h(a, item / a.num_heads, item % a.num_heads);

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

template <class ARGS>
__device__ inline struct backward_weights weights_of(const head<ARGS> &h, const float *q,
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
template <int COLUMNS, class T, class O, class D>
__global__ void __launch_bounds__(BLOCK) attention_d_q_kernel(attention_args<T, O, D> a)
{
    extern __shared__ float shared[];
    const int64_t pitch = a.d + 1, tile_floats = TILE * pitch, num_tiles = (a.s + TILE - 1) / TILE;
    float *q = shared, *d_out = q + tile_floats, *k = d_out + tile_floats, *v = k + tile_floats;
    float *weights = v + tile_floats;
    const int64_t s0 = blockIdx.x % num_tiles * TILE, item = blockIdx.x / num_tiles;
    const head<attention_args<T, O, D>> h(a, item / a.num_heads, item % a.num_heads);
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t s = s0 + row, end = h.key_end(s0, TILE);
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
            attention_put(a, a.d_q, h.query_element(s) + lane + LANES * j, a.scale * d_q[j]);
        }
    }
}

/* Block: keys [j, j + TILE) of a group, over all its heads and the queries that see them. Keys from
 * kv_length on get zeros. Shared memory: tiles of k, v, q, d_out, two of weights. */
template <int COLUMNS, class T, class O, class D>
__global__ void __launch_bounds__(BLOCK) attention_d_kv_kernel(attention_args<T, O, D> a)
{
    extern __shared__ float shared[];
    const int64_t pitch = a.d + 1, tile_floats = TILE * pitch;
    const int64_t num_tiles = (a.s_kv + TILE - 1) / TILE, per_group = a.num_heads / a.num_groups;
    float *k = shared, *v = k + tile_floats, *q = v + tile_floats, *d_out = q + tile_floats;
    float *p = d_out + tile_floats, *d_score = p + TILE * TILE;
    const int64_t j0 = blockIdx.x % num_tiles * TILE, item = blockIdx.x / num_tiles;
    const int64_t batch = item / a.num_groups, group = item % a.num_groups;
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int64_t j = j0 + row, first = a.causal ? j0 + a.k_start - a.q_start : 0;
    const head<attention_args<T, O, D>> any(a, batch, group * per_group);
    float d_k[COLUMNS] = {0.0f}, d_v[COLUMNS] = {0.0f};

    load_tile(k, a.k, j0, a.kv_length, a.d, [&](int64_t i) { return any.key_element(i); });
    load_tile(v, a.v, j0, a.kv_length, a.d, [&](int64_t i) { return any.key_element(i); });
    for (int64_t i = 0; i < per_group && j0 < a.kv_length; i++) {
        const head<attention_args<T, O, D>> h(a, batch, group * per_group + i);

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
            attention_put(a, a.d_k, any.key_element(j) + lane + LANES * n, a.scale * d_k[n]);
            attention_put(a, a.d_v, any.key_element(j) + lane + LANES * n, d_v[n]);
        }
    }
}

/* ---- calls ---- */

template <class ARGS>
static void attention_launch(struct stream *stream, void (*kernel)(ARGS), const ARGS &a,
                             int64_t num_items, int64_t length, int num_tiles, int num_weights)
{
    const size_t shared_bytes =
        ((size_t)(num_tiles * TILE) * (size_t)(a.d + 1) + (size_t)(num_weights * TILE * TILE)) * 4;

    CHECK(a.d <= HEAD_SIZE_MAX, "attention heads of %lld, at most %d", (long long)a.d,
          HEAD_SIZE_MAX);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared_bytes));
    LAUNCH(stream, kernel, num_items * ceil_div(length, TILE), BLOCK, shared_bytes, a);
}

/* ---- cuDNN for parts of the keys: into temporary memory, then added to the result so far ---- */

/* A warp a row (b, a, s) of part [S,B,A,D] and part_lse [B,A,S]. */
template <class O>
__global__ void attention_merge_kernel(O *out, float *lse, const bf16 *part, const float *part_lse,
                                       int64_t s, int64_t b, int64_t num_heads, int64_t d,
                                       bool merge)
{
    const int64_t i = (int64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
    const int64_t item = i / s, batch = item / num_heads, head = item % num_heads;
    const int64_t first = ((i % s * b + batch) * num_heads + head) * d;
    float old_lse, top, sum, old_factor, factor;

    if (item >= b * num_heads) {
        return;
    }
    old_lse = merge ? lse[i] : -INFINITY;
    top = fmaxf(old_lse, part_lse[i]);
    old_factor = old_lse == -INFINITY ? 0.0f : expf(old_lse - top);
    factor = expf(part_lse[i] - top); /* cuDNN is given calls where every query sees a key */
    sum = old_factor + factor;
    for (int64_t c = first + threadIdx.x % 32; c < first + d; c += 32) {
        const float old = old_factor > 0.0f ? old_factor * to_float(out[c]) : 0.0f;

        out[c] = from_float<O>((old + factor * to_float(part[c])) / sum);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        lse[i] = top + logf(sum);
    }
}

static struct tensor like(struct stream *stream, const struct tensor *x, enum dtype dtype)
{
    return tensor_allocate(stream->scratch, dtype, x->dim, x->num_dims);
}

static bool merge_by_cudnn(struct stream *stream, const struct attention *op)
{
    struct attention part = *op;
    struct tensor out, lse;
    const int64_t num_rows = op->q->dim[0] * op->q->dim[1] * op->q->dim[2];
    const int64_t num_blocks = ceil_div(num_rows, BLOCK / 32);

    part.merge = false;
    if (!attention_is_for_cudnn(&part)) {
        return false;
    }
    out = like(stream, op->out, DTYPE_BF16);
    lse = like(stream, op->lse, DTYPE_F32);
    part.out = &out;
    part.lse = &lse;
    if (!attention_forward_cudnn(stream, &part)) {
        return false;
    }
    if (op->out->dtype == DTYPE_F32) {
        LAUNCH(stream, attention_merge_kernel<float>, num_blocks, BLOCK, 0, data_of<float>(op->out),
               data_of<float>(op->lse), data_of<bf16>(&out), data_of<float>(&lse), op->q->dim[0],
               op->q->dim[1], op->q->dim[2], op->q->dim[3], op->merge);
    } else {
        LAUNCH(stream, attention_merge_kernel<bf16>, num_blocks, BLOCK, 0, data_of<bf16>(op->out),
               data_of<float>(op->lse), data_of<bf16>(&out), data_of<float>(&lse), op->q->dim[0],
               op->q->dim[1], op->q->dim[2], op->q->dim[3], op->merge);
    }
    return true;
}

static void add_to(struct stream *stream, struct tensor *sum, const struct tensor *x)
{
    const struct linear_combination op = {.y = sum, .x = x, .a = 1.0f, .b = 1.0f};

    linear_combination_cuda(stream, &op);
}

static bool accumulate_by_cudnn(struct stream *stream, const struct attention_backward *op)
{
    struct attention_backward part = *op;
    struct tensor d_q, d_k, d_v;

    if (!attention_is_for_cudnn(&op->forward)) {
        return false;
    }
    d_q = like(stream, op->d_q, DTYPE_BF16);
    d_k = like(stream, op->d_k, DTYPE_BF16);
    d_v = like(stream, op->d_v, DTYPE_BF16);
    part.accumulate = false;
    part.d_q = &d_q;
    part.d_k = &d_k;
    part.d_v = &d_v;
    if (!attention_backward_cudnn(stream, &part)) {
        return false;
    }
    add_to(stream, op->d_q, &d_q);
    add_to(stream, op->d_k, &d_k);
    add_to(stream, op->d_v, &d_v);
    return true;
}

/* ---- the ops ---- */

template <class T, class O> static void forward(struct stream *stream, const struct attention *op)
{
    const attention_args<T, O, T> a = attention_args_of<T, O, T>(op);

    attention_launch(stream,
                     a.d <= 128 ? attention_forward_kernel<16, T, O, T>
                                : attention_forward_kernel<32, T, O, T>,
                     a, a.b * a.num_heads, a.s, 3, 1);
}

extern "C" void attention_forward_cuda(struct stream *stream, const struct attention *op)
{
    const bool plain = !op->merge && op->out->dtype == op->q->dtype;

    if ((plain ? attention_forward_cudnn(stream, op) : merge_by_cudnn(stream, op)) ||
        attention_forward_mma(stream, op)) {
        return;
    }
    WITH_ACT(op->q->dtype, {
        if (op->out->dtype == op->q->dtype) {
            forward<T, T>(stream, op);
        } else {
            forward<T, float>(stream, op);
        }
    });
}

template <class T, class D>
static void backward(struct stream *stream, const struct attention_backward *op)
{
    attention_args<T, T, D> a = attention_args_of<T, T, D>(&op->forward);
    const int64_t num_rows = a.b * a.num_heads * a.s;
    const bool narrow = a.d <= 128;

    a.d_out = data_of<T>(op->d_out);
    a.d_q = data_of<D>(op->d_q);
    a.d_k = data_of<D>(op->d_k);
    a.d_v = data_of<D>(op->d_v);
    a.accumulate = op->accumulate;
    a.delta = (float *)arena_allocate(stream->scratch, (size_t)num_rows * 4);
    LAUNCH(stream, (attention_delta_kernel<T, T, D>), ceil_div(num_rows, BLOCK / 32), BLOCK, 0, a);
    attention_launch(stream,
                     narrow ? attention_d_q_kernel<16, T, T, D> : attention_d_q_kernel<32, T, T, D>,
                     a, a.b * a.num_heads, a.s, 4, 1);
    attention_launch(
        stream, narrow ? attention_d_kv_kernel<16, T, T, D> : attention_d_kv_kernel<32, T, T, D>, a,
        a.b * a.num_groups, a.s_kv, 4, 2);
}

extern "C" void attention_backward_cuda(struct stream *stream, const struct attention_backward *op)
{
    if ((op->accumulate ? accumulate_by_cudnn(stream, op) : attention_backward_cudnn(stream, op)) ||
        attention_backward_mma(stream, op)) {
        return;
    }
    WITH_ACT(op->forward.q->dtype, {
        if (op->d_q->dtype == op->forward.q->dtype) {
            backward<T, T>(stream, op);
        } else {
            backward<T, float>(stream, op);
        }
    });
}
