/* device_select.h - the device that --device asks for. */
#ifndef CADRE_DEVICE_DEVICE_SELECT_H
#define CADRE_DEVICE_DEVICE_SELECT_H

#include "device/device.h"

/* name: "cpu"; "cuda", NULL with an error where there is no GPU to be had; or "auto", a GPU where
 * there is one, else the CPU. local_rank: this rank's number on its host, whose ranks take the GPUs
 * in turn; more ranks than GPUs share them. */
const struct device *device_select(const char *name, int local_rank);

#endif
