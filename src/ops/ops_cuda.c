/* The table of the CUDA backend. */
#include "ops/ops_cuda.h"

#include "base/check.h"
#ifdef CADRE_CUDA
#include "ops/libraries_cuda.h"

const struct ops *ops_cuda(void)
{
#define OPS_CUDA_ENTRY(name, args) .name = name##_cuda,
    static const struct ops table = {
        .backend = "cuda",
        OPS_LIST(OPS_CUDA_ENTRY).fill_zero = fill_zero_cuda,
    };
#undef OPS_CUDA_ENTRY
    return cublaslt_library() != NULL ? &table : NULL;
}
#else
const struct ops *ops_cuda(void)
{
    return FAIL_NULL("this cadre was built without CUDA");
}
#endif
