#include "ops/column_sums_cpu.h"

#include "ops/ops_cpu_internal.h"

enum { CHUNKS_MAX = 64, CHUNK_ROWS_MIN = 16 };

struct row_chunks row_chunks_of(int64_t num_rows)
{
    const int64_t even = (num_rows + CHUNKS_MAX - 1) / CHUNKS_MAX;
    const int64_t size = even > CHUNK_ROWS_MIN ? even : CHUNK_ROWS_MIN;

    return (struct row_chunks){num_rows, size, (num_rows + size - 1) / size};
}

int64_t row_chunks_first(const struct row_chunks *chunks, int64_t chunk)
{
    return chunk * chunks->size;
}

int64_t row_chunks_end(const struct row_chunks *chunks, int64_t chunk)
{
    const int64_t end = (chunk + 1) * chunks->size;

    return end < chunks->num_rows ? end : chunks->num_rows;
}

void column_sums_add(struct tensor *total, const float *partial, const struct row_chunks *chunks,
                     int64_t stride)
{
    const int64_t n = tensor_num_elements(total), num_blocks = (n + OPS_BLOCK - 1) / OPS_BLOCK;
    float *restrict sum = total->data;

#pragma omp parallel for schedule(static) if (chunks->count * n >= OPS_PARALLEL_MIN)
    for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t end = (block + 1) * OPS_BLOCK < n ? (block + 1) * OPS_BLOCK : n;

        for (int64_t chunk = 0; chunk < chunks->count; chunk++) {
#pragma omp simd
            for (int64_t i = block * OPS_BLOCK; i < end; i++) {
                sum[i] += partial[chunk * stride + i];
            }
        }
    }
}
