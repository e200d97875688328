/* Copy, cast, scale, add, activations, dropout, jitter: bound by memory, 16 bytes a thread. */
#include "ops/ops_cuda_internal.cuh"

enum { BLOCK = 256 };

template <int N, class X, class Y>
__global__ void linear_combination_kernel(Y *y, const X *x, float a, float b, int64_t num_packs)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    float out[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(out, x, i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        out[j] *= a;
    }
    if (b != 0.0f) { /* else y may hold anything, NaN too */
        float old[N];

        load<N>(old, y, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            out[j] += b * old[j];
        }
    }
    store<N>(y, i, out);
}

template <class X, class Y>
static void linear_combination_launch(struct stream *stream, const struct linear_combination *a)
{
    const int64_t n = tensor_num_elements(a->y);
    const uintptr_t alignment = (uintptr_t)a->x->data | (uintptr_t)a->y->data;

    if (n % 4 == 0 && alignment % 16 == 0) {
        LAUNCH(stream, (linear_combination_kernel<4, X, Y>), ceil_div(n / 4, BLOCK), BLOCK, 0,
               data_of<Y>(a->y), data_of<X>(a->x), a->a, a->b, n / 4);
    } else {
        LAUNCH(stream, (linear_combination_kernel<1, X, Y>), ceil_div(n, BLOCK), BLOCK, 0,
               data_of<Y>(a->y), data_of<X>(a->x), a->a, a->b, n);
    }
}

extern "C" void linear_combination_cuda(struct stream *stream, const struct linear_combination *a)
{
    WITH_ACT(
        a->x->dtype,
        if (a->y->dtype == DTYPE_F32) { linear_combination_launch<T, float>(stream, a); } else {
            linear_combination_launch<T, bf16>(stream, a);
        });
}

template <int N, class T>
__global__ void add_kernel(T *y, const T *u, const T *v, int64_t num_packs)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    float left[N], right[N];

    early_join();
    if (i >= num_packs * N) {
        return;
    }
    load<N>(left, u, i);
    load<N>(right, v, i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        left[j] += right[j];
    }
    store<N>(y, i, left);
}

extern "C" void add_cuda(struct stream *stream, const struct add *a)
{
    const int64_t n = tensor_num_elements(a->y);

    WITH_PACK(a->y->dtype, packable(n, {a->y, a->u, a->v}), {
        LAUNCH_EARLY(stream, (add_kernel<N, T>), ceil_div(n / N, BLOCK), BLOCK, 0, data_of<T>(a->y),
                     data_of<T>(a->u), data_of<T>(a->v), n / N);
    });
}

extern "C" void fill_zero_cuda(struct stream *stream, struct tensor *x)
{
    CUDA_CHECK(cudaMemsetAsync(x->data, 0, tensor_size_bytes(x), (cudaStream_t)stream->native));
}

/* ---- activations ---- */

#include "ops/activation_cuda.cuh"

template <int N, class T, enum activation_kind kind>
__global__ void activation_forward_kernel(T *y, const T *x, int64_t num_packs, int64_t width)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    const int64_t row = i / width, column = i % width;
    const int64_t first = kind == ACTIVATION_SWIGLU ? row * 2 * width + column : i;
    float in[N], up[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(in, x, first);
    if (kind == ACTIVATION_SWIGLU) {
        load<N>(up, x, first + width);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        in[j] = activation_value<kind>(in[j], kind == ACTIVATION_SWIGLU ? up[j] : 0.0f);
    }
    store<N>(y, i, in);
}

template <int N, class T, enum activation_kind kind>
__global__ void activation_backward_kernel(T *d_x, const T *d_y, const T *x, int64_t num_packs,
                                           int64_t width)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    const int64_t row = i / width, column = i % width;
    const int64_t first = kind == ACTIVATION_SWIGLU ? row * 2 * width + column : i;
    float in[N], up[N], d[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(in, x, first);
    load<N>(d, d_y, i);
    if (kind == ACTIVATION_SWIGLU) {
        load<N>(up, x, first + width);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        const struct activation_slopes slopes =
            activation_slopes_of<kind>(in[j], kind == ACTIVATION_SWIGLU ? up[j] : 0.0f);

        in[j] = d[j] * slopes.d_x;
        up[j] = d[j] * slopes.d_up;
    }
    store<N>(d_x, first, in);
    if (kind == ACTIVATION_SWIGLU) {
        store<N>(d_x, first + width, up);
    }
}

/* WITH_KIND(kind, code): code with KIND as a constant. */
#define WITH_KIND(kind_, ...)                                                                      \
    do {                                                                                           \
        if ((kind_) == ACTIVATION_SWIGLU) {                                                        \
            constexpr enum activation_kind KIND = ACTIVATION_SWIGLU;                               \
            __VA_ARGS__;                                                                           \
        } else if ((kind_) == ACTIVATION_GELU) {                                                   \
            constexpr enum activation_kind KIND = ACTIVATION_GELU;                                 \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr enum activation_kind KIND = ACTIVATION_SQUARED_RELU;                         \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

extern "C" void activation_forward_cuda(struct stream *stream, const struct activation *a)
{
    const int64_t n = tensor_num_elements(a->y), width = a->y->dim[1];

    WITH_PACK(a->y->dtype, packable(width, {a->y, a->x}), WITH_KIND(a->kind, {
                  LAUNCH(stream, (activation_forward_kernel<N, T, KIND>), ceil_div(n / N, BLOCK),
                         BLOCK, 0, data_of<T>(a->y), data_of<T>(a->x), n / N, width);
              }));
}

extern "C" void activation_backward_cuda(struct stream *stream, const struct activation *a)
{
    const int64_t n = tensor_num_elements(a->d_y), width = a->d_y->dim[1];

    WITH_PACK(a->d_y->dtype, packable(width, {a->d_x, a->d_y, a->x}), WITH_KIND(a->kind, {
                  LAUNCH(stream, (activation_backward_kernel<N, T, KIND>), ceil_div(n / N, BLOCK),
                         BLOCK, 0, data_of<T>(a->d_x), data_of<T>(a->d_y), data_of<T>(a->x), n / N,
                         width);
              }));
}

/* ---- what draws random numbers: one call of the generator serves four neighbouring elements ----
 */

/* factor[j] = uniform(key, row, column + j). */
template <int N>
__device__ inline void uniforms(float (&u)[N], struct rng_key key, uint64_t row, int64_t column)
{
    if constexpr (N == 1) {
        u[0] = rng_uniform(key, row, (uint64_t)column);
    } else {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            uint32_t bits[4];

            rng_philox(bits, key, row, (uint64_t)(column + j) / 4);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u[j + k] = rng_to_uniform(bits[k]);
            }
        }
    }
}

template <int N, class T>
__global__ void dropout_kernel(T *y, const T *x, const T *residual, const int64_t *token_id,
                               struct dropout_rule rule, int64_t num_packs, int64_t width)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    float out[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(out, x, i);
    if (rule.p > 0.0f) {
        const float kept = 1.0f / (1.0f - rule.p);
        float u[N];

        uniforms<N>(u, rule.key, (uint64_t)token_id[i / width], i % width);
#pragma unroll
        for (int j = 0; j < N; j++) {
            out[j] *= u[j] >= rule.p ? kept : 0.0f;
        }
    }
    if (residual != NULL) {
        float add[N];

        load<N>(add, residual, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            out[j] += add[j];
        }
    }
    store<N>(y, i, out);
}

extern "C" void dropout_cuda(struct stream *stream, const struct dropout *a)
{
    const int64_t n = tensor_num_elements(a->y), width = a->y->dim[1];

    WITH_PACK(a->y->dtype, packable(width, {a->y, a->x, a->residual}), {
        LAUNCH(stream, (dropout_kernel<N, T>), ceil_div(n / N, BLOCK), BLOCK, 0, data_of<T>(a->y),
               data_of<T>(a->x), data_of<T>(a->residual), data_of<int64_t>(a->token_id), a->rule,
               n / N, width);
    });
}

template <int N, class T>
__global__ void jitter_kernel(T *y, const T *x, const int64_t *token_id, float eps,
                              struct rng_key key, int64_t num_packs, int64_t width)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    float out[N], u[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(out, x, i);
    uniforms<N>(u, key, (uint64_t)token_id[i / width], i % width);
#pragma unroll
    for (int j = 0; j < N; j++) {
        out[j] *= 1.0f - eps + 2.0f * eps * u[j];
    }
    store<N>(y, i, out);
}

extern "C" void jitter_cuda(struct stream *stream, const struct jitter *a)
{
    const int64_t n = tensor_num_elements(a->y), width = a->y->dim[1];

    WITH_PACK(a->y->dtype, packable(width, {a->y, a->x}), {
        LAUNCH(stream, (jitter_kernel<N, T>), ceil_div(n / N, BLOCK), BLOCK, 0, data_of<T>(a->y),
               data_of<T>(a->x), data_of<int64_t>(a->token_id), a->eps, a->key, n / N, width);
    });
}

template <int N, class T>
__global__ void bias_forward_kernel(T *y, const T *bias, int64_t num_packs, int64_t width)
{
    const int64_t i = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
    float out[N], add[N];

    if (i >= num_packs * N) {
        return;
    }
    load<N>(out, y, i);
    load<N>(add, bias, i % width);
#pragma unroll
    for (int j = 0; j < N; j++) {
        out[j] += add[j];
    }
    store<N>(y, i, out);
}

extern "C" void bias_forward_cuda(struct stream *stream, const struct bias_forward *a)
{
    const int64_t n = tensor_num_elements(a->y), width = a->y->dim[1];

    WITH_PACK(a->y->dtype, packable(width, {a->y, a->bias}), {
        LAUNCH(stream, (bias_forward_kernel<N, T>), ceil_div(n / N, BLOCK), BLOCK, 0,
               data_of<T>(a->y), data_of<T>(a->bias), n / N, width);
    });
}
