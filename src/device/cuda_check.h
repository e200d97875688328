/* cuda_check.h - for calls of the CUDA runtime that fail only where something is broken. */
#ifndef CADRE_DEVICE_CUDA_CHECK_H
#define CADRE_DEVICE_CUDA_CHECK_H

#include <cuda_runtime_api.h>

#include "base/check.h"

#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        CHECK(error_ == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error_));                 \
    } while (0)

#endif
