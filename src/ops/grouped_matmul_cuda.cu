/* Grouped products on the scalar units, in f32: what runs where the matrix units cannot (F32,
 * widths that are no multiple of 8, biases). A block of 256 threads computes a tile of 64 x 64, 16
 * numbers a thread, from shared memory. */
#include "ops/grouped_matmul_cuda.cuh"

enum { TILE = 64, DEPTH = 16, BLOCK = 256, PER_THREAD = 4 };

/* A(m, k) = a[m * a_m + k * a_k], and so on. */
template <class T> struct operands {
    const T *a, *b;
    int64_t a_m, a_k, b_n, b_k;
};

/* acc += the product of depth range [0, depth), of which rows m < num_m and n < num_n exist. */
template <class T>
__device__ inline void tile_product(float (&acc)[PER_THREAD][PER_THREAD], const operands<T> &x,
                                    int64_t num_m, int64_t num_n, int64_t depth)
{
    __shared__ float a[DEPTH][TILE + 1], b[DEPTH][TILE + 1];
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;

    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * DEPTH; i += BLOCK) {
            /* neighbouring threads read along whichever index lies together in memory */
            const int am = x.a_k == 1 ? i / DEPTH : i % TILE;
            const int ak = x.a_k == 1 ? i % DEPTH : i / TILE;
            const int bn = x.b_k == 1 ? i / DEPTH : i % TILE;
            const int bk = x.b_k == 1 ? i % DEPTH : i / TILE;

            a[ak][am] = am < num_m && k0 + ak < depth
                            ? to_float(x.a[am * x.a_m + (k0 + ak) * x.a_k])
                            : 0.0f;
            b[bk][bn] = bn < num_n && k0 + bk < depth
                            ? to_float(x.b[bn * x.b_n + (k0 + bk) * x.b_k])
                            : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
#pragma unroll
                for (int j = 0; j < PER_THREAD; j++) {
                    acc[i][j] += a[k][row + 16 * i] * b[k][column + 16 * j];
                }
            }
        }
    }
}

template <class T, class C> struct rows_args {
    C *c;
    const T *a, *b, *bias;
    const int32_t *offsets;
    const float *row_scale;
    int64_t n, k;
    int num_experts;
    bool b_transposed;
};

template <class T, class C> __global__ void __launch_bounds__(BLOCK) rows_kernel(rows_args<T, C> x)
{
    const int64_t tiles_n = (x.n + TILE - 1) / TILE, n0 = blockIdx.x % tiles_n * TILE;
    int64_t tile = blockIdx.x / tiles_n, first, end;
    float acc[PER_THREAD][PER_THREAD] = {};
    int e = 0;

    for (;; e++) { /* the expert whose rows the tile lies in */
        if (e == x.num_experts) {
            return;
        }
        first = x.offsets[e];
        end = x.offsets[e + 1];
        if (tile < (end - first + TILE - 1) / TILE) {
            break;
        }
        tile -= (end - first + TILE - 1) / TILE;
    }
    first += tile * TILE;

    const T *b = x.b + e * x.n * x.k;
    const operands<T> operand = {x.a + first * x.k,
                                 b + (x.b_transposed ? n0 : n0 * x.k),
                                 x.k,
                                 1,
                                 x.b_transposed ? 1 : x.k,
                                 x.b_transposed ? x.n : 1};

    tile_product(acc, operand, end - first, x.n - n0, x.k);
    for (int i = 0; i < PER_THREAD; i++) {
        const int64_t row = first + threadIdx.x / 16 + 16 * i;

        for (int j = 0; j < PER_THREAD; j++) {
            const int64_t column = n0 + threadIdx.x % 16 + 16 * j;

            if (row < end && column < x.n) {
                const float bias = x.bias != NULL ? to_float(x.bias[e * x.n + column]) : 0.0f;
                const float scale = x.row_scale != NULL ? x.row_scale[row] : 1.0f;

                x.c[row * x.n + column] = from_float<C>(acc[i][j] + scale * bias);
            }
        }
    }
}

template <class T, class C>
static void rows_launch(struct stream *stream, const struct grouped_rows *args)
{
    const int64_t num_rows = args->a->dim[0], num_experts = args->offsets->dim[0] - 1;
    const int64_t n = args->c->dim[1], tiles = ceil_div(num_rows, TILE) + num_experts;
    const rows_args<T, C> x = {
        data_of<C>(args->c),
        data_of<T>(args->a),
        data_of<T>(args->b),
        data_of<T>(args->bias),
        data_of<int32_t>(args->offsets),
        data_of<float>(args->row_scale),
        n,
        args->a->dim[1],
        (int)num_experts,
        args->b_transposed,
    };

    LAUNCH(stream, (rows_kernel<T, C>), tiles * ceil_div(n, TILE), BLOCK, 0, x);
}

void grouped_rows_matmul(struct stream *stream, const struct grouped_rows *args)
{
    WITH_ACT(
        args->a->dtype,
        if (args->c->dtype == DTYPE_F32) { rows_launch<T, float>(stream, args); } else {
            rows_launch<T, bf16>(stream, args);
        });
}

template <class T>
__global__ void __launch_bounds__(BLOCK)
    weights_kernel(float *c, const T *a, const T *b, const int32_t *offsets, int64_t m, int64_t n,
                   bool overwrite)
{
    const int64_t tiles_m = (m + TILE - 1) / TILE, tiles_n = (n + TILE - 1) / TILE;
    const int64_t m0 = blockIdx.x / tiles_n % tiles_m * TILE, n0 = blockIdx.x % tiles_n * TILE;
    const int64_t e = blockIdx.x / tiles_n / tiles_m, first = offsets[e];
    const operands<T> operand = {a + first * m + m0, b + first * n + n0, 1, m, 1, n};
    float acc[PER_THREAD][PER_THREAD] = {};

    tile_product(acc, operand, m - m0, n - n0, offsets[e + 1] - first);
    for (int i = 0; i < PER_THREAD; i++) {
        const int64_t row = m0 + threadIdx.x / 16 + 16 * i;

        for (int j = 0; j < PER_THREAD; j++) {
            const int64_t column = n0 + threadIdx.x % 16 + 16 * j;

            if (row < m && column < n) {
                float *to = &c[(e * m + row) * n + column];

                *to = overwrite ? acc[i][j] : *to + acc[i][j];
            }
        }
    }
}

void grouped_weights_matmul(struct stream *stream, const struct grouped_weights *args)
{
    const int64_t num_experts = args->offsets->dim[0] - 1, m = args->a->dim[1];
    const int64_t n = args->b->dim[1];

    WITH_ACT(args->a->dtype, {
        LAUNCH(stream, (weights_kernel<T>), num_experts * ceil_div(m, TILE) * ceil_div(n, TILE),
               BLOCK, 0, data_of<float>(args->c), data_of<T>(args->a), data_of<T>(args->b),
               data_of<int32_t>(args->offsets), m, n, args->overwrite);
    });
}
