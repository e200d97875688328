#include "device/device_select.h"

#include <string.h>

#include "base/check.h"
#include "device/device_cuda.h"

const struct device *device_select(const char *name, int num_ranks)
{
    if (strcmp(name, "cpu") == 0) {
        return device_cpu();
    }
    if (strcmp(name, "auto") == 0) {
        return num_ranks == 1 && device_cuda_usable(0) ? device_cuda(0) : device_cpu();
    }
    if (strcmp(name, "cuda") != 0) {
        return FAIL_NULL("--device %s: legal: cpu, cuda, auto", name);
    }
    if (num_ranks > 1) {
        return FAIL_NULL("--device cuda runs one rank so far, this run has %d; use --device cpu",
                         num_ranks);
    }
    return device_cuda(0);
}
