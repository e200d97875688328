/* Splits the qkv projection into heads and rotates q and k: a thread takes a pair of packs that
 * rotate into each other. */
#include "ops/ops_cuda_internal.cuh"

enum { BLOCK = 256 };

template <class T> struct qkv_args {
    T *q, *k, *v, *qkv;
    const float *table; /* [positions, P, 2] */
    const int32_t *position;
    int64_t num_tokens, num_groups, per_group, head_size, num_pairs;
    bool interleaved, backward;
};

/* Element 0 of head `head` (per_group query heads, then k, then v) of a group. */
template <class T>
__device__ inline T *head_of(const qkv_args<T> &a, int64_t token, int64_t group, int64_t head)
{
    const int64_t kv = (token * a.num_groups + group) * a.head_size;

    if (head < a.per_group) {
        return a.q + kv * a.per_group + head * a.head_size;
    }
    return head == a.per_group ? a.k + kv : a.v + kv;
}

/* Elements i and i' of a head, i < head_size / 2: the partners of a rotation, or, beyond the
 * rotated columns, any two that together cover what is left. */
template <class T> __global__ void qkv_split_kernel(qkv_args<T> a)
{
    const int64_t half = (a.head_size + 1) / 2, heads = a.per_group + 2;
    int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x, rest = i / half;
    const int64_t pair = i % half, head = rest % heads, group = rest / heads % a.num_groups;
    const int64_t token = rest / heads / a.num_groups;
    T *whole, *part;
    int64_t low, high;
    float x0, x1 = 0.0f;

    if (token >= a.num_tokens) {
        return;
    }
    whole = a.qkv + ((token * a.num_groups + group) * heads + head) * a.head_size;
    part = head_of(a, token, group, head);
    if (a.interleaved || pair >= a.num_pairs) {
        low = 2 * pair;
        high = 2 * pair + 1;
    } else {
        low = pair;
        high = pair + a.num_pairs;
    }
    x0 = to_float(a.backward ? part[low] : whole[low]);
    if (high < a.head_size) {
        x1 = to_float(a.backward ? part[high] : whole[high]);
    }
    if (pair < a.num_pairs && head <= a.per_group) {
        const float *cos_sin = a.table + ((int64_t)a.position[token] * a.num_pairs + pair) * 2;
        const float c = cos_sin[0], s = a.backward ? -cos_sin[1] : cos_sin[1];
        const float y0 = x0 * c - x1 * s;

        x1 = x1 * c + x0 * s;
        x0 = y0;
    }
    (a.backward ? whole : part)[low] = from_float<T>(x0);
    if (high < a.head_size) {
        (a.backward ? whole : part)[high] = from_float<T>(x1);
    }
}

/* The same, a pack of 16 bytes at a time, where heads and rotated halves are whole packs: a thread
 * takes pack `pair` of a head and its partner. Indices are of 32 bits, which divide faster. */
template <int N, class T> __global__ void qkv_split_packed_kernel(qkv_args<T> a)
{
    const uint32_t half = (uint32_t)a.head_size / 2 / N, heads = (uint32_t)a.per_group + 2;
    const uint32_t i = blockIdx.x * BLOCK + threadIdx.x, rest = i / half;
    const uint32_t pair = i % half * N, head = rest % heads, of_group = rest / heads;
    const int64_t group = of_group % (uint32_t)a.num_groups;
    const int64_t token = of_group / (uint32_t)a.num_groups;
    const T *from;
    T *to;
    float x0[N], x1[N];

    early_join();
    if (token >= a.num_tokens) {
        return;
    }
    to = a.qkv + ((token * a.num_groups + group) * heads + head) * a.head_size;
    from = head_of(a, token, group, head);
    if (!a.backward) {
        T *swap = (T *)from;

        from = to;
        to = swap;
    }
    load<N>(x0, from, pair);
    load<N>(x1, from, pair + a.head_size / 2);
    if (a.num_pairs > 0 && head <= a.per_group) {
        const float *cos_sin = a.table + ((int64_t)a.position[token] * a.num_pairs + pair) * 2;
        float rotation[2 * N];

#pragma unroll
        for (int j = 0; j < 2 * N; j += 4) {
            *(float4 *)(rotation + j) = *(const float4 *)(cos_sin + j);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float c = rotation[2 * j];
            const float s = a.backward ? -rotation[2 * j + 1] : rotation[2 * j + 1];
            const float y0 = x0[j] * c - x1[j] * s;

            x1[j] = x1[j] * c + x0[j] * s;
            x0[j] = y0;
        }
    }
    store<N>(to, pair, x0);
    store<N>(to, pair + a.head_size / 2, x1);
}

static void qkv_split_run(struct stream *stream, const struct qkv_split *op, bool backward)
{
    const int64_t head_size = op->q->dim[2];
    const int64_t num_pairs = op->table != NULL ? op->table->dim[1] : 0;

    WITH_ACT(op->q->dtype, {
        constexpr int N = 16 / sizeof(T);
        const bool packed = !op->interleaved && head_size % (2 * N) == 0 &&
                            (num_pairs == 0 || 2 * num_pairs == head_size) &&
                            packable(head_size, {op->q, op->k, op->v, op->qkv, op->table});
        qkv_args<T> a = {};

        a.q = data_of<T>(op->q);
        a.k = data_of<T>(op->k);
        a.v = data_of<T>(op->v);
        a.qkv = data_of<T>(op->qkv);
        a.table = data_of<float>(op->table);
        a.position = data_of<int32_t>(op->position);
        a.num_tokens = op->q->dim[0];
        a.num_groups = op->k->dim[1];
        a.per_group = op->q->dim[1] / op->k->dim[1];
        a.head_size = head_size;
        a.num_pairs = num_pairs;
        a.interleaved = op->interleaved;
        a.backward = backward;
        const int64_t num_heads = a.num_tokens * a.num_groups * (a.per_group + 2);

        if (packed) {
            const int64_t num_threads = num_heads * (head_size / 2 / N);

            CHECK(num_threads < UINT32_MAX - BLOCK, "%lld packs", (long long)num_threads);
            LAUNCH_EARLY(stream, (qkv_split_packed_kernel<N, T>), ceil_div(num_threads, BLOCK),
                         BLOCK, 0, a);
        } else {
            LAUNCH(stream, (qkv_split_kernel<T>),
                   ceil_div(num_heads * ((head_size + 1) / 2), BLOCK), BLOCK, 0, a);
        }
    });
}

extern "C" void qkv_split_forward_cuda(struct stream *stream, const struct qkv_split *op)
{
    qkv_split_run(stream, op, false);
}

extern "C" void qkv_split_backward_cuda(struct stream *stream, const struct qkv_split *op)
{
    qkv_split_run(stream, op, true);
}
