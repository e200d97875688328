/* nccl_channel.h - an NCCL communicator with a CUDA stream of its own, and the operations on it.
 *
 * Issuing never blocks the host: a channel's ranks find each other and join (nonblocking NCCL), and
 * its operations are launched one after the other, while the host goes on; a thread sees to that,
 * and to operations that fail or take longer than --distributed-timeout-minutes, which stop the
 * job. Whoever waits for an operation waits on the host until it is launched, and on the stream
 * until it is done. */
#ifndef CADRE_COMM_NCCL_CHANNEL_H
#define CADRE_COMM_NCCL_CHANNEL_H

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <stdbool.h>

#include "comm/comm.h"

struct nccl_channel;

/* A collective between its issue and its wait. Its arguments are filled in by the issuer. */
struct nccl_operation {
    struct nccl_operation *next;
    struct nccl_channel *channel;
    enum comm_kind kind;
    /* Calls NCCL for the operation, within ncclGroupStart and ncclGroupEnd. */
    ncclResult_t (*launch)(const struct nccl_operation *op, ncclComm_t nccl, cudaStream_t stream);

    const char *in;
    char *out;
    enum dtype dtype;
    enum comm_reduction reduction;
    int rank, size, root;
    int64_t row_bytes, row_elements;
    bool uneven;
    int64_t *in_begin, *out_begin; /* [size + 1] rows, where parts are uneven or exchanged */
    int max_ranks;                 /* room in in_begin and out_begin */
    int64_t moved_bytes;           /* sent by this rank, or received in a message */

    /* nccl_channel.c's */
    cudaEvent_t ready, done;
    enum { NCCL_QUEUED, NCCL_ENQUEUED, NCCL_LAUNCHED } stage;
    bool waited;
    bool captured;    /* part of a graph: nothing of it happens before the graph is launched */
    double issued_at; /* seconds */
    void *profiled;   /* ops_profile_transfer_begin's */
};

/* What a channel is for: the group's collectives, or messages from one rank of it to another. */
struct nccl_channel_ends {
    struct comm *host;    /* the group for host memory, over which the ranks find each other */
    int sender, receiver; /* -1: collectives */
};

/* Nothing is sent before the first operation. */
struct nccl_channel *nccl_channel_create(const struct device *device,
                                         const struct nccl_channel_ends *ends);
/* Waits for its operations. */
void nccl_channel_destroy(struct nccl_channel *channel);

/* An operation for the work issued to the stream so far, with room for the ranks' parts. */
struct nccl_operation *nccl_operation_new(struct nccl_channel *channel, struct stream *stream,
                                          enum comm_kind kind);
/* The channel launches it in its turn. */
void nccl_operation_issue(struct nccl_operation *op);
/* The stream goes on when the operation is done; the operation is no longer the caller's. */
void nccl_operation_wait(struct nccl_operation *op, struct stream *stream);

/* Operations from begin to end become part of the graph that is captured meanwhile. Those before
 * begin must have been waited for, and those within before the end. */
void nccl_channels_capture_begin(void);
void nccl_channels_capture_end(void);
/* After each launch of a graph with operations on the stream: they are watched as others are. */
void nccl_channels_graph_launched(const struct device *device, struct stream *stream);

#endif
