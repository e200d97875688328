/* ops_cuda.h - the CUDA backend's functions, one for each op of ops.h: NAME_cuda(stream, args).
 * They trust their arguments, which op_NAME has checked, may allocate from stream->scratch, only
 * launch, and never wait: nothing but a stream's order makes a result visible. */
#ifndef CADRE_OPS_OPS_CUDA_H
#define CADRE_OPS_OPS_CUDA_H

#include "ops/ops.h"

/* The table, or NULL with an error in a build without CUDA or where cuBLASLt is not installed. */
const struct ops *ops_cuda(void);

#define OPS_CUDA_DECLARE(name, args)                                                               \
    void name##_cuda(struct stream *stream, const struct args *args_);
OPS_LIST(OPS_CUDA_DECLARE)
#undef OPS_CUDA_DECLARE
void fill_zero_cuda(struct stream *stream, struct tensor *x);

#endif
