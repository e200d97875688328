#include "moe/dispatcher.h"

const struct dispatcher *dispatcher_select(enum dispatcher_kind kind, const struct groups *groups)
{
    static const struct dispatcher *const dispatchers[] = {
        [DISPATCHER_ALLGATHER] = &dispatcher_allgather,
        [DISPATCHER_ALLTOALL] = &dispatcher_alltoall,
        [DISPATCHER_ALLTOALL_SEQ] = &dispatcher_alltoall_seq,
    };

    return groups->etp_ep->size == 1 ? &dispatcher_local : dispatchers[kind];
}
