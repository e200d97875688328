/* rendezvous.h - two GPUs of one host begin a message together. A kernel of NCCL's that waits for
 * the other rank holds multiprocessors, and products that fill the GPU wait for these. So the
 * streams wait instead, for counters in each other's memory, and the kernels come when both ranks
 * have come. */
#ifndef CADRE_COMM_RENDEZVOUS_H
#define CADRE_COMM_RENDEZVOUS_H

#include <cuda_runtime_api.h>
#include <stdbool.h>

#include "comm/comm.h"

enum { HOST_NAME_LENGTH = 128 };

/* host[r] names the host of the world's rank r. All ranks call it; false, on all, where the GPUs of
 * a host do not reach each other's memory: then there are no rendezvous. Opens anew where it was
 * open. */
bool rendezvous_open(const struct device *device, const char (*host)[HOST_NAME_LENGTH]);
bool rendezvous_is_open(void);

/* Messages one way between this rank and another of a group for host memory (comm_mpi.h). */
struct rendezvous {
    uint32_t *count;      /* of those that the stream has come to */
    const uint32_t *come; /* where the other rank says so; NULL: it is on another host */
    uint32_t *tell;       /* where this one does, in the other's memory */
};

struct rendezvous rendezvous_with(const struct comm *host, int other, bool is_sender);
/* The stream tells the other rank that it has come to the next message, and waits for it. */
void rendezvous_meet(const struct rendezvous *rendezvous, cudaStream_t stream);

#endif
