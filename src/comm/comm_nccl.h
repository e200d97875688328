/* comm_nccl.h - groups of ranks over NCCL, for tensors of GPUs, one rank a GPU. In a build without
 * it the same functions choose it never (comm_nccl_absent.c). */
#ifndef CADRE_COMM_COMM_NCCL_H
#define CADRE_COMM_COMM_NCCL_H

#include <stdbool.h>

#include "comm/comm.h"

/* Whether the groups created from now on exchange tensors of device over NCCL: where every rank of
 * the job has a GPU of its own and the library. All ranks must call it alike. */
void comm_nccl_choose(const struct device *device);
bool comm_nccl_is_chosen(void);

/* The group of host's ranks, who find each other over host when they first need to: creating it
 * needs no communication. host stays the caller's. */
struct comm *comm_nccl_create(struct comm *host);

#endif
