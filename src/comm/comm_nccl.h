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

/* Around the capture of a graph (device.h), where NCCL is chosen: the collectives of all groups
 * become part of it. Those before begin must have been waited for, and those within before the end.
 */
void comm_nccl_capture_begin(void);
void comm_nccl_capture_end(void);
/* After each launch of such a graph on the stream: errors and --distributed-timeout-minutes hold
 * for it as for a collective. */
void comm_nccl_graph_launched(struct stream *stream);

#endif
