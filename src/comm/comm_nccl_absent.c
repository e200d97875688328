/* What comm_nccl.h is in a cadre that was built without CUDA or NCCL. */
#ifndef CADRE_NCCL
#include "base/check.h"
#include "comm/comm_nccl.h"

void comm_nccl_choose(const struct device *device)
{
}

bool comm_nccl_is_chosen(void)
{
    return false;
}

struct comm *comm_nccl_create(struct comm *host)
{
    PANIC("group %s in a build without NCCL", host->name);
}

void comm_nccl_capture_begin(void)
{
}

void comm_nccl_capture_end(void)
{
}

void comm_nccl_graph_launched(struct stream *stream)
{
}
#endif
