/* reduction.h - elementwise sum or maximum of several arrays in host memory, in the order given. */
#ifndef CADRE_COMM_REDUCTION_H
#define CADRE_COMM_REDUCTION_H

#include <stdint.h>

#include "comm/comm.h"
#include "tensor/dtype.h"

/* out[i] = sources[0][i] + sources[1][i] + ..., each [count] of dtype (f32, bf16, f64, i32, i64).
 * bf16 is summed in f32 and rounded once. out may be one of the sources. */
void reduction_apply(enum comm_reduction reduction, enum dtype dtype, void *out,
                     const void *const *sources, int num_sources, int64_t count);

#endif
