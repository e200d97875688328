/* device_cuda.h - NVIDIA Hopper GPUs (compute capability 9.0). In a build without CUDA the same
 * functions report that there is none. */
#ifndef CADRE_DEVICE_DEVICE_CUDA_H
#define CADRE_DEVICE_DEVICE_CUDA_H

#include <stdbool.h>

#include "device/device.h"

/* GPUs that this build could run on; 0 without CUDA, driver or GPU. */
int device_cuda_count(void);
/* Whether device_cuda(index) would return a GPU. */
bool device_cuda_usable(int index);
/* Pinned memory of the host at addresses that the GPU uses too, across the bus. */
struct memory_source device_cuda_shared_memory(void);
/* GPU `index`, made current for the process, which uses one GPU. NULL with an error where there is
 * none or it is not a Hopper. */
const struct device *device_cuda(int index);
/* From here on the process's GPU shares its multiprocessors. */
void device_cuda_share_multiprocessors(void);

#endif
