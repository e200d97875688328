#include "ops/ops.h"
#include "ops/ops_cuda.h"

const struct ops *ops_for(const struct device *device)
{
    switch (device->kind) {
    case DEVICE_NULL:
        return ops_null();
    case DEVICE_CUDA:
        return ops_cuda();
    case DEVICE_CPU:
        break;
    }
    return ops_cpu();
}
