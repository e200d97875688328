/* device_select.h - the device that --device asks for. */
#ifndef CADRE_DEVICE_DEVICE_SELECT_H
#define CADRE_DEVICE_DEVICE_SELECT_H

#include "device/device.h"

/* name: "cpu"; "cuda", NULL with an error where there is no GPU to be had; or "auto", a GPU where
 * there is one, else the CPU. num_ranks: of the whole run; several ranks compute on CPUs, since
 * comm_mpi sends the host's memory. */
const struct device *device_select(const char *name, int num_ranks);

#endif
