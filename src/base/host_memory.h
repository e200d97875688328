/* host_memory.h - how much memory a program can still take on this machine. */
#ifndef CADRE_BASE_HOST_MEMORY_H
#define CADRE_BASE_HOST_MEMORY_H

#include <stdint.h>

/* Bytes: what Linux calls available, free swap with it, or what the control group (a container, a
 * Slurm job) leaves, if that is less. Pages that only cache files count as available. INT64_MAX
 * where nothing is known. root: "", or a directory that stands for "/". */
int64_t host_memory_available_bytes(const char *root);

#endif
