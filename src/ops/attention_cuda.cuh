/* attention_cuda.cuh - what attention's kernels share: the arguments of a call, and one head of it.
 *
 * attention_cuda.cu holds the op and the kernels for every dtype and size; attention_mma_cuda.cu
 * those on the matrix units; attention_cudnn_cuda.c calls cuDNN. */
#ifndef CADRE_OPS_ATTENTION_CUDA_CUH
#define CADRE_OPS_ATTENTION_CUDA_CUH

#include "ops/ops_cuda_internal.cuh"

/* O: what forward writes; D: what backward writes; each T or float. */
template <class T, class O, class D> struct attention_args {
    const T *q, *k, *v, *out, *d_out;
    O *out_written;
    D *d_q, *d_k, *d_v;
    float *lse_written, *delta;
    const float *lse;
    const int32_t *document_start;
    const int64_t *sample_id;
    struct dropout_rule dropout;
    float scale;
    bool causal, merge, accumulate;
    int64_t q_start, k_start, kv_length, head_start, num_heads_global;
    int64_t s, s_kv, b, num_heads, num_groups, d;
};

/* One (batch, head) of a call. */
template <class ARGS> struct head {
    const ARGS &a;
    int64_t batch, head_index, group;

    __device__ head(const ARGS &args, int64_t batch_, int64_t head_)
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
        if (s >= a.s || j >= a.kv_length || (a.causal && a.k_start + j > a.q_start + s)) {
            return false;
        }
        return a.document_start == NULL || a.k_start + j >= a.document_start[s * a.b + batch];
    }

    /* The row of the random numbers of query s. */
    __device__ uint64_t dropout_row(int64_t s) const
    {
        const uint64_t id = (uint64_t)a.sample_id[batch] * (uint64_t)a.num_heads_global +
                            (uint64_t)(a.head_start + head_index);

        return (id << 24) + (uint64_t)(a.q_start + s);
    }

    __device__ bool keeps(int64_t s, int64_t j) const
    {
        return rng_uniform(a.dropout.key, dropout_row(s), (uint64_t)(a.k_start + j)) >= a.dropout.p;
    }

    /* What a kept probability is multiplied with. */
    __device__ float kept_factor() const
    {
        return 1.0f / (1.0f - a.dropout.p);
    }

    /* What any probability is multiplied with. */
    __device__ float dropout_factor(int64_t s, int64_t j) const
    {
        return a.dropout.p == 0.0f || keeps(s, j) ? kept_factor() : 0.0f;
    }

    /* Keys that no query of [s, s + count) sees begin here. */
    __device__ int64_t key_end(int64_t s, int64_t count) const
    {
        const int64_t last = (s + count < a.s ? s + count : a.s) - 1;
        const int64_t diagonal = a.q_start + last + 1 - a.k_start;

        return a.causal && diagonal < a.kv_length ? diagonal : a.kv_length;
    }
};

template <class T, class O, class D>
__device__ inline void attention_put(const attention_args<T, O, D> &a, D *gradient, int64_t i,
                                     float value)
{
    gradient[i] = from_float<D>(a.accumulate ? to_float(gradient[i]) + value : value);
}

template <class T, class O, class D>
static inline attention_args<T, O, D> attention_args_of(const struct attention *op)
{
    attention_args<T, O, D> a = {};

    a.q = data_of<T>(op->q);
    a.k = data_of<T>(op->k);
    a.v = data_of<T>(op->v);
    a.out = data_of<T>(op->out);
    a.out_written = data_of<O>(op->out);
    a.lse = a.lse_written = data_of<float>(op->lse);
    a.document_start = data_of<int32_t>(op->document_start);
    a.sample_id = data_of<int64_t>(op->sample_id);
    a.dropout = op->dropout;
    a.scale = op->scale;
    a.causal = op->causal;
    a.merge = op->merge;
    a.q_start = op->q_start;
    a.k_start = op->k_start;
    a.kv_length = op->kv_length;
    a.head_start = op->head_start;
    a.num_heads_global = op->num_heads_global;
    a.s = op->q->dim[0];
    a.s_kv = op->k->dim[0];
    a.b = op->q->dim[1];
    a.num_heads = op->q->dim[2];
    a.num_groups = op->k->dim[2];
    a.d = op->q->dim[3];
    return a;
}

/* On the matrix units: bf16, heads of a multiple of 8 up to 128, any mask, dropout, parts of the
 * keys. False where the call is not of that kind, having done nothing. */
bool attention_forward_mma(struct stream *stream, const struct attention *op);
bool attention_backward_mma(struct stream *stream, const struct attention_backward *op);

#endif
