/* What device_cuda.h is in a cadre that was built without CUDA. */
#ifndef CADRE_CUDA
#include "base/check.h"
#include "device/device_cuda.h"

int device_cuda_count(void)
{
    return 0;
}

bool device_cuda_usable(int index)
{
    return false;
}

struct memory_source device_cuda_shared_memory(void)
{
    PANIC("a build without CUDA");
}

const struct device *device_cuda(int index)
{
    return FAIL_NULL("this cadre was built without CUDA: put nvcc on the PATH and build again, or "
                     "use --device cpu");
}

void device_cuda_share_multiprocessors(void)
{
    PANIC("a build without CUDA");
}
#endif
