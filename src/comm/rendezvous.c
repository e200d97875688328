#ifdef CADRE_NCCL
#include "comm/rendezvous.h"

#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "comm/comm_mpi.h"
#include "comm/launch.h"

#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        CHECK(error_ == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error_));                 \
    } while (0)

enum side { SENDER, RECEIVER, NUM_SIDES };

/* An allocation of its own: that is what a handle stands for. */
static const size_t smallest_bytes = (size_t)2 << 20;

typedef CUresult (*stream_value_function)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

/* Counters are [groups, ranks of the world, sides]. */
static struct {
    stream_value_function wait, write;
    uint32_t *mine;    /* on the device: how often the other rank, as that side, has come */
    uint32_t **theirs; /* [ranks] theirs, as this GPU sees it; NULL: on another host */
    uint32_t *counts;  /* on the host: how often this rank has, as that side */
} shared;

static size_t num_counters(void)
{
    return (size_t)COMM_MPI_GROUPS_MAX * (size_t)launch_size() * NUM_SIDES;
}

static size_t counter_of(int group, int rank, enum side side)
{
    return ((size_t)group * (size_t)launch_size() + (size_t)rank) * NUM_SIDES + (size_t)side;
}

/* ---- opening ---- */

static stream_value_function driver_function(const char *name)
{
    enum cudaDriverEntryPointQueryResult found;
    void *function = NULL;

    if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();
        return NULL;
    }
    return (stream_value_function)function;
}

/* What every rank tells the others: first its handle, then whether it could open theirs. */
struct offer {
    cudaIpcMemHandle_t handle;
    int32_t can;
};

static struct offer make_offer(void)
{
    const size_t wanted_bytes = num_counters() * sizeof *shared.mine;
    const size_t size_bytes = wanted_bytes > smallest_bytes ? wanted_bytes : smallest_bytes;
    struct offer offer = {0};

    shared.wait = driver_function("cuStreamWaitValue32");
    shared.write = driver_function("cuStreamWriteValue32");
    CUDA_CHECK(cudaMalloc((void **)&shared.mine, size_bytes));
    CUDA_CHECK(cudaMemset(shared.mine, 0, size_bytes));
    CUDA_CHECK(cudaDeviceSynchronize());
    offer.can = shared.wait != NULL && shared.write != NULL &&
                cudaIpcGetMemHandle(&offer.handle, shared.mine) == cudaSuccess;
    cudaGetLastError(); /* forget it */
    return offer;
}

/* False where one of this host's cannot be opened. */
static bool accept_offers(const struct offer *all, const char (*host)[HOST_NAME_LENGTH])
{
    const int rank = launch_rank();

    for (int r = 0; r < launch_size(); r++) {
        if (r == rank || strcmp(host[r], host[rank]) != 0) {
            continue;
        }
        if (!all[r].can || cudaIpcOpenMemHandle((void **)&shared.theirs[r], all[r].handle,
                                                cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
            cudaGetLastError(); /* forget it */
            shared.theirs[r] = NULL;
            return false;
        }
    }
    return true;
}

/* All ranks; nobody frees what others have open. */
static void close_all(void)
{
    struct offer mine = {0}, *all;

    if (!rendezvous_is_open()) {
        return;
    }
    for (int r = 0; r < launch_size(); r++) {
        if (shared.theirs[r] != NULL) {
            CUDA_CHECK(cudaIpcCloseMemHandle(shared.theirs[r]));
        }
    }
    all = calloc((size_t)launch_size(), sizeof *all);
    CHECK(all != NULL, "out of memory");
    comm_mpi_gather(all, &mine, sizeof mine);
    CUDA_CHECK(cudaFree(shared.mine));
    shared.mine = NULL;
    free(shared.theirs);
    free(shared.counts);
    free(all);
}

static bool all_can(const struct offer *all)
{
    for (int r = 0; r < launch_size(); r++) {
        if (!all[r].can) {
            return false;
        }
    }
    return true;
}

bool rendezvous_open(const struct device *device, const char (*host)[HOST_NAME_LENGTH])
{
    struct offer mine, *all = calloc((size_t)launch_size(), sizeof *all);
    bool possible;

    CUDA_CHECK(cudaSetDevice(device->index));
    close_all();
    shared.theirs = calloc((size_t)launch_size(), sizeof *shared.theirs);
    shared.counts = calloc(num_counters(), sizeof *shared.counts);
    CHECK(all != NULL && shared.theirs != NULL && shared.counts != NULL, "out of memory");
    mine = make_offer();
    comm_mpi_gather(all, &mine, sizeof mine);
    mine.can = mine.can && accept_offers(all, host);
    comm_mpi_gather(all, &mine, sizeof mine);
    possible = all_can(all);
    if (!possible) {
        close_all();
    }
    free(all);
    return possible;
}

bool rendezvous_is_open(void)
{
    return shared.mine != NULL;
}

/* ---- meeting ---- */

struct rendezvous rendezvous_with(const struct comm *host, int other, bool is_sender)
{
    const enum side mine = is_sender ? SENDER : RECEIVER, theirs = is_sender ? RECEIVER : SENDER;
    const int group = comm_mpi_group_number(host), rank = comm_mpi_world_rank(host, other);

    if (!rendezvous_is_open() || shared.theirs[rank] == NULL) {
        return (struct rendezvous){0};
    }
    return (struct rendezvous){
        .count = &shared.counts[counter_of(group, rank, mine)],
        .come = &shared.mine[counter_of(group, rank, theirs)],
        .tell = &shared.theirs[rank][counter_of(group, launch_rank(), mine)],
    };
}

/* Counters wrap around. */
void rendezvous_meet(const struct rendezvous *rendezvous, cudaStream_t stream)
{
    const uint32_t count = ++*rendezvous->count;
    CUresult result =
        shared.write(stream, (CUdeviceptr)rendezvous->tell, count, CU_STREAM_WRITE_VALUE_DEFAULT);

    CHECK(result == CUDA_SUCCESS, "cuStreamWriteValue32: %d", (int)result);
    result = shared.wait(stream, (CUdeviceptr)rendezvous->come, count, CU_STREAM_WAIT_VALUE_GEQ);
    CHECK(result == CUDA_SUCCESS, "cuStreamWaitValue32: %d", (int)result);
}
#endif
