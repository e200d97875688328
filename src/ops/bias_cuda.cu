/* The gradient of a bias, and the second level of all sums over rows. */
#include "ops/column_sums_cuda.cuh"

enum { COLUMNS = 32, GROUPS = 16, ROWS_MIN = 64, PARTS_MAX = 256, BLOCK = 256 };

/* Partial sums of a thread that are on their way at a time. */
enum { PARTS_AT_ONCE = 9 };

/* Registers of a thread that leave this kernel's blocks room beside two of RMSNorm's backward. */
enum { SUMS_BLOCKS_A_MULTIPROCESSOR = 4 };

/* A block sums 32 columns: 16 groups of parts side by side, then the groups. */
__global__ void __launch_bounds__(COLUMNS *GROUPS, SUMS_BLOCKS_A_MULTIPROCESSOR)
    column_sums_kernel(float *sum, const float *partial, int num_parts, int64_t stride, int64_t n)
{
    __shared__ float sums[GROUPS][COLUMNS + 1];
    const int64_t first_column = (int64_t)blockIdx.x * COLUMNS;
    const int64_t column = first_column + threadIdx.x;
    const int half_warp = threadIdx.x / GROUPS, c = threadIdx.y * 2 + half_warp;
    float mine = 0.0f;

    early_join();
    for (int first = threadIdx.y; first < num_parts; first += PARTS_AT_ONCE * GROUPS) {
        const float *from = partial + first * stride + column;
        float x[PARTS_AT_ONCE];

#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++) {
            x[i] = first + i * GROUPS < num_parts && column < n ? *from : 0.0f;
            from += GROUPS * stride;
        }
#pragma unroll
        for (int i = 0; i < PARTS_AT_ONCE; i++) {
            mine += x[i];
        }
    }
    sums[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    mine = sums[threadIdx.x % GROUPS][c]; /* half a warp takes a column now */
#pragma unroll
    for (int distance = GROUPS / 2; distance > 0; distance /= 2) {
        mine += __shfl_xor_sync(0xffffffffu, mine, distance);
    }
    if (threadIdx.x % GROUPS == 0 && first_column + c < n) {
        sum[first_column + c] += mine;
    }
}

void column_sums_add(struct stream *stream, float *sum, const float *partial, int64_t num_parts,
                     int64_t stride, int64_t n)
{
    LAUNCH_EARLY(stream, column_sums_kernel, num_parts > 0 ? ceil_div(n, COLUMNS) : 0,
                 dim3(COLUMNS, GROUPS), 0, sum, partial, (int)num_parts, stride, n);
}

/* partial[part, n] = sums over the rows of part. */
template <int N, class T>
__global__ void bias_backward_kernel(float *partial, const T *d_y, int64_t num_rows,
                                     int64_t rows_per_part, int64_t width, int64_t num_tiles)
{
    const int64_t part = blockIdx.x / num_tiles;
    const int64_t column = (blockIdx.x % num_tiles * BLOCK + threadIdx.x) * N;
    const int64_t first = part * rows_per_part;
    const int64_t end = first + rows_per_part < num_rows ? first + rows_per_part : num_rows;
    float sum[N] = {0.0f};

    if (column >= width) {
        return;
    }
    for (int64_t row = first; row < end; row++) {
        float d[N];

        load<N>(d, d_y, row * width + column);
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum[j] += d[j];
        }
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        partial[part * width + column + j] = sum[j];
    }
}

extern "C" void bias_backward_cuda(struct stream *stream, const struct bias_backward *a)
{
    const int64_t num_rows = a->d_y->dim[0], width = a->d_y->dim[1];
    int64_t rows_per_part = ceil_div(num_rows, PARTS_MAX), num_parts;
    float *partial;

    rows_per_part = rows_per_part < ROWS_MIN ? ROWS_MIN : rows_per_part;
    num_parts = ceil_div(num_rows, rows_per_part);
    partial = (float *)arena_allocate(stream->scratch, (size_t)(num_parts * width) * 4);
    WITH_PACK(a->d_y->dtype, packable(width, {a->d_y}), {
        const int64_t num_tiles = ceil_div(width, BLOCK * N);

        LAUNCH(stream, (bias_backward_kernel<N, T>), num_parts * num_tiles, BLOCK, 0, partial,
               data_of<T>(a->d_y), num_rows, rows_per_part, width, num_tiles);
    });
    column_sums_add(stream, data_of<float>(a->d_bias), partial, num_parts, width, width);
}
