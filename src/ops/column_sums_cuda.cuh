/* column_sums_cuda.cuh - the second level of sums over rows, whose first level leaves one partial
 * row a block. */
#ifndef CADRE_OPS_COLUMN_SUMS_CUDA_CUH
#define CADRE_OPS_COLUMN_SUMS_CUDA_CUH

#include "ops/ops_cuda_internal.cuh"

/* sum[n] += over part < num_parts of partial[part * stride + i], in an order that depends on
 * num_parts only. */
void column_sums_add(struct stream *stream, float *sum, const float *partial, int64_t num_parts,
                     int64_t stride, int64_t n);

#endif
