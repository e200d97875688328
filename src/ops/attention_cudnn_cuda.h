/* attention_cudnn_cuda.h - attention by cuDNN's fused kernels, where it has them: bf16, heads of a
 * multiple of 8 up to 128, all keys or causal to the end of the keys, no documents, no dropout, 64
 * queries or more. A build without cuDNN's headers has the same functions, which take nothing. */
#ifndef CADRE_OPS_ATTENTION_CUDNN_CUDA_H
#define CADRE_OPS_ATTENTION_CUDNN_CUDA_H

#include <stdbool.h>

#include "ops/ops.h"

/* Whether the call is of that kind; out, lse and accumulate do not matter. */
bool attention_is_for_cudnn(const struct attention *op);
/* Each returns false where the call is not of that kind or cuDNN refuses it, having done nothing;
 * all tensors but lse are bf16. */
bool attention_forward_cudnn(struct stream *stream, const struct attention *op);
bool attention_backward_cudnn(struct stream *stream, const struct attention_backward *op);

#endif
