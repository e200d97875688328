/* column_sums_cpu.h - sums over rows whose bits do not depend on the number of threads: rows form
 * chunks whose size depends on their number only, a chunk is summed by one thread, the chunks' sums
 * are added in order.
 *
 *     const struct row_chunks chunks = row_chunks_of(num_rows);
 *     float *partial = scratch_floats(stream, chunks.count * n);
 *     for each chunk, in parallel: partial[chunk * n ...] = sum of its rows
 *     column_sums_add(total, partial, &chunks, n);
 *
 * A chunk's rows are row_chunks_first .. row_chunks_end - 1. */
#ifndef CADRE_OPS_COLUMN_SUMS_CPU_H
#define CADRE_OPS_COLUMN_SUMS_CPU_H

#include "ops/ops.h"

struct row_chunks {
    int64_t num_rows, size, count;
};

struct row_chunks row_chunks_of(int64_t num_rows);
int64_t row_chunks_first(const struct row_chunks *chunks, int64_t chunk);
int64_t row_chunks_end(const struct row_chunks *chunks, int64_t chunk);
/* total[n] f32 += sum over chunks of partial[chunk * stride + i]. */
void column_sums_add(struct tensor *total, const float *partial, const struct row_chunks *chunks,
                     int64_t stride);

#endif
