#include "device/device_select.h"

#include <string.h>

#include "base/check.h"
#include "device/device_cuda.h"

const struct device *device_select(const char *name, int local_rank)
{
    const int count = device_cuda_count(), index = count > 0 ? local_rank % count : 0;

    if (strcmp(name, "cpu") == 0) {
        return device_cpu();
    }
    if (strcmp(name, "auto") == 0) {
        return device_cuda_usable(index) ? device_cuda(index) : device_cpu();
    }
    if (strcmp(name, "cuda") != 0) {
        return FAIL_NULL("--device %s: legal: cpu, cuda, auto", name);
    }
    return device_cuda(index);
}
