/* Adam, SGD, sums over gradient ranges: bound by memory. Sums are by chunks of a fixed size, added
 * in order, in double, so that they depend on the number of elements only. */
#include "ops/ops_cuda_internal.cuh"

enum { BLOCK = 256, SUM_CHUNK = 65536 };

struct adam_factors {
    float lr, beta1, beta2, eps, weight_decay;
    float correction1, correction2; /* 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t) */
};

/* m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, p -= lr (m' / (sqrt(v') + eps) + wd p). */
template <int N, class P>
__global__ void adam_kernel(P *param, float *master, float *exp_avg, float *exp_avg_sq,
                            const float *grad, const float *grad_scale, struct adam_factors f,
                            int64_t num_packs)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    float g[N], p[N], m[N], v[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(g, grad, i);
    load<N>(p, master, i);
    load<N>(m, exp_avg, i);
    load<N>(v, exp_avg_sq, i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        const float scaled = g[j] * *grad_scale;

        m[j] = f.beta1 * m[j] + (1.0f - f.beta1) * scaled;
        v[j] = f.beta2 * v[j] + (1.0f - f.beta2) * scaled * scaled;
        p[j] -= f.lr * (m[j] * f.correction1 / (sqrtf(v[j]) * f.correction2 + f.eps) +
                        f.weight_decay * p[j]);
    }
    store<N>(master, i, p);
    store<N>(exp_avg, i, m);
    store<N>(exp_avg_sq, i, v);
    if ((void *)param != (void *)master) {
        store<N>(param, i, p);
    }
}

extern "C" void adam_step_cuda(struct stream *stream, const struct adam_step *a)
{
    const int64_t n = tensor_num_elements(a->master);
    const double t = (double)a->step;
    const struct adam_factors factors = {
        a->lr,
        a->beta1,
        a->beta2,
        a->eps,
        a->weight_decay,
        (float)(1.0 / (1.0 - pow((double)a->beta1, t))),
        (float)(1.0 / sqrt(1.0 - pow((double)a->beta2, t))),
    };
    const bool whole = n % 4 == 0 && (uintptr_t)a->param->data % 16 == 0 &&
                       packable(4, {a->master, a->exp_avg, a->exp_avg_sq, a->grad});

    WITH_ACT(
        a->param->dtype,
        if (whole) {
            LAUNCH(stream, (adam_kernel<4, T>), ceil_div(n / 4, BLOCK), BLOCK, 0,
                   data_of<T>(a->param), data_of<float>(a->master), data_of<float>(a->exp_avg),
                   data_of<float>(a->exp_avg_sq), data_of<float>(a->grad),
                   data_of<float>(a->grad_scale), factors, n / 4);
        } else {
            LAUNCH(stream, (adam_kernel<1, T>), ceil_div(n, BLOCK), BLOCK, 0, data_of<T>(a->param),
                   data_of<float>(a->master), data_of<float>(a->exp_avg),
                   data_of<float>(a->exp_avg_sq), data_of<float>(a->grad),
                   data_of<float>(a->grad_scale), factors, n);
        });
}

template <class P>
__global__ void sgd_kernel(P *param, float *master, float *momentum_buffer, const float *grad,
                           const float *grad_scale, float lr, float momentum, float weight_decay,
                           bool first_step, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    float p, step;

    if (i >= n) {
        return;
    }
    p = master[i];
    step = grad[i] * *grad_scale + weight_decay * p;
    if (momentum_buffer != NULL) {
        if (!first_step) {
            step += momentum * momentum_buffer[i];
        }
        momentum_buffer[i] = step;
    }
    p -= lr * step;
    master[i] = p;
    if ((void *)param != (void *)master) {
        param[i] = from_float<P>(p);
    }
}

extern "C" void sgd_step_cuda(struct stream *stream, const struct sgd_step *a)
{
    const int64_t n = tensor_num_elements(a->master);

    WITH_ACT(a->param->dtype, {
        LAUNCH(stream, (sgd_kernel<T>), ceil_div(n, BLOCK), BLOCK, 0, data_of<T>(a->param),
               data_of<float>(a->master), data_of<float>(a->momentum_buffer),
               data_of<float>(a->grad), data_of<float>(a->grad_scale), a->lr, a->momentum,
               a->weight_decay, a->first_step, n);
    });
}

/* partial[chunk] = sum of x^2, or number of zeros, of SUM_CHUNK elements. */
template <int N, class T>
__global__ void chunk_sums_kernel(double *partial, const T *x, int64_t n, bool count_zeros)
{
    __shared__ double buffer[32];
    const int64_t first = (int64_t)blockIdx.x * SUM_CHUNK;
    const int64_t end = first + SUM_CHUNK < n ? first + SUM_CHUNK : n;
    double sum = 0.0;

    for (int64_t i = first + threadIdx.x * N; i < end; i += BLOCK * N) {
        float values[N];

        load<N>(values, x, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const double value = (double)values[j];

            sum += count_zeros ? (value == 0.0 ? 1.0 : 0.0) : value * value;
        }
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

__global__ void partials_add_kernel(double *sum, const double *partial, int64_t num_partials)
{
    __shared__ double buffer[32];
    double mine = 0.0;

    for (int64_t i = threadIdx.x; i < num_partials; i += blockDim.x) {
        mine += partial[i];
    }
    mine = block_sum(mine, buffer);
    if (threadIdx.x == 0) {
        *sum += mine;
    }
}

static void tensor_sum(struct stream *stream, double *sum, const struct tensor *x, bool count_zeros)
{
    const int64_t n = tensor_num_elements(x), num_chunks = ceil_div(n, SUM_CHUNK);
    double *partial = (double *)arena_allocate(stream->scratch, (size_t)num_chunks * 8);

    WITH_PACK(x->dtype, packable(n, {x}), {
        LAUNCH(stream, (chunk_sums_kernel<N, T>), num_chunks, BLOCK, 0, partial, data_of<T>(x), n,
               count_zeros);
    });
    LAUNCH(stream, partials_add_kernel, num_chunks > 0 ? 1 : 0, 1024, 0, sum, partial, num_chunks);
}

extern "C" void square_sum_cuda(struct stream *stream, const struct square_sum *a)
{
    tensor_sum(stream, data_of<double>(a->sum), a->x, false);
}

extern "C" void zero_count_cuda(struct stream *stream, const struct zero_count *a)
{
    tensor_sum(stream, data_of<double>(a->count), a->x, true);
}

__global__ void clip_scale_kernel(float *norm, float *scale, const double *sum, float max_norm)
{
    const float value = (float)sqrt(*sum), factor = max_norm / (value + 1e-6f);

    *norm = value;
    *scale = max_norm > 0.0f && factor < 1.0f ? factor : 1.0f;
}

extern "C" void clip_scale_cuda(struct stream *stream, const struct clip_scale *a)
{
    LAUNCH(stream, clip_scale_kernel, 1, 1, 0, data_of<float>(a->norm), data_of<float>(a->scale),
           data_of<double>(a->sum), a->max_norm);
}
