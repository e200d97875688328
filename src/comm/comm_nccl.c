/* comm_nccl.c - the collectives in NCCL's calls. Reductions are NCCL's own, which run in the links
 * and switches: their order of summation is NCCL's. Uneven parts are a group of calls, one a rank.
 */
#ifdef CADRE_NCCL
#include "comm/comm_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "comm/comm_mpi.h"
#include "comm/launch.h"
#include "comm/nccl_channel.h"
#include "comm/rendezvous.h"
#include "device/device_cuda.h"
#include "comm/traffic.h"
#include "ops/libraries_cuda.h"
#include "ops/ops.h"

static const struct device *chosen_device; /* NULL: NCCL is not chosen */
struct nccl {
    struct comm *host;
    struct nccl_channel *collectives;
    struct nccl_channel **to, **from; /* [size] messages: NULL before the first */
};

/* ---- the choice ---- */

/* What a rank tells the others. */
struct gpu {
    int32_t has_library;
    cudaUUID_t uuid;
    /* With NCCL_HOSTID: to NCCL, ranks of different hosts never share a GPU. */
    char host[HOST_NAME_LENGTH];
};

static struct gpu gpu_of(const struct device *device)
{
    const char *host_id = getenv("NCCL_HOSTID");
    char name[64] = "";
    struct cudaDeviceProp properties;
    struct gpu gpu;

    memset(&gpu, 0, sizeof gpu);
    CHECK(cudaGetDeviceProperties(&properties, device->index) == cudaSuccess, "device %d",
          device->index);
    gpu.has_library = nccl_library() != NULL;
    gpu.uuid = properties.uuid;
    gethostname(name, sizeof name - 1);
    snprintf(gpu.host, sizeof gpu.host, "%s %s", name, host_id != NULL ? host_id : "");
    return gpu;
}

static bool shares_gpu(const struct gpu *gpus, int rank)
{
    for (int r = 0; r < rank; r++) {
        if (memcmp(&gpus[r].uuid, &gpus[rank].uuid, sizeof gpus[r].uuid) == 0 &&
            strcmp(gpus[r].host, gpus[rank].host) == 0) {
            return true;
        }
    }
    return false;
}

/* Every rank decides from the same facts. */
static bool every_rank_can(const struct gpu *gpus)
{
    for (int r = 0; r < launch_size(); r++) {
        if (!gpus[r].has_library) {
            log_warn("GPUs exchange tensors through the host, which is slow: rank %d has no NCCL "
                     "(libnccl.so.2)",
                     r);
            return false;
        }
        if (shares_gpu(gpus, r)) {
            log_info("> ranks share GPUs: they exchange tensors through the host");
            return false;
        }
    }
    return true;
}

static void open_rendezvous(const struct device *device, const struct gpu *gpus)
{
    char(*hosts)[HOST_NAME_LENGTH] = calloc((size_t)launch_size(), sizeof *hosts);

    CHECK(hosts != NULL, "out of memory");
    for (int r = 0; r < launch_size(); r++) {
        memcpy(hosts[r], gpus[r].host, sizeof hosts[r]);
    }
    rendezvous_open(device, (const char(*)[HOST_NAME_LENGTH])hosts);
    free(hosts);
}

void comm_nccl_choose(const struct device *device)
{
    struct gpu mine, *gpus;

    chosen_device = NULL;
    if (device->kind != DEVICE_CUDA || launch_size() == 1 || launch_is_emulated()) {
        return;
    }
    gpus = calloc((size_t)launch_size(), sizeof *gpus);
    CHECK(gpus != NULL, "out of memory");
    mine = gpu_of(device);
    comm_mpi_gather(gpus, &mine, sizeof mine);
    if (every_rank_can(gpus)) {
        log_info("> GPUs exchange tensors over NCCL");
        chosen_device = device;
        open_rendezvous(device, gpus);
        device_cuda_share_multiprocessors();
    }
    free(gpus);
}

bool comm_nccl_is_chosen(void)
{
    return chosen_device != NULL;
}

/* ---- graphs ---- */

void comm_nccl_capture_begin(void)
{
    if (comm_nccl_is_chosen()) {
        nccl_channels_capture_begin();
    }
}

void comm_nccl_capture_end(void)
{
    if (comm_nccl_is_chosen()) {
        nccl_channels_capture_end();
    }
}

void comm_nccl_graph_launched(struct stream *stream)
{
    if (comm_nccl_is_chosen()) {
        nccl_channels_graph_launched(chosen_device, stream);
    }
}

/* ---- operations ---- */

static int64_t row_elements(const struct tensor *x)
{
    int64_t count = 1;

    for (int i = 1; i < x->num_dims; i++) {
        count *= x->dim[i];
    }
    return count;
}

/* in and out in rows of `like`. */
static struct nccl_operation *operation_new(struct nccl_channel *channel, struct stream *stream,
                                            enum comm_kind kind, const struct tensor *in,
                                            struct tensor *out, const struct tensor *like)
{
    struct nccl_operation *op = nccl_operation_new(channel, stream, kind);

    op->in = in != NULL ? in->data : NULL;
    op->out = out != NULL ? out->data : NULL;
    op->dtype = like->dtype;
    op->row_elements = row_elements(like);
    op->row_bytes = op->row_elements * dtype_size_bytes(like->dtype);
    return op;
}

static void set_begin(int64_t *begin, const int64_t *rows, int size)
{
    begin[0] = 0;
    for (int r = 0; r < size; r++) {
        begin[r + 1] = begin[r] + rows[r];
    }
}

static bool are_equal(const int64_t *rows, int size)
{
    for (int r = 1; r < size; r++) {
        if (rows[r] != rows[0]) {
            return false;
        }
    }
    return true;
}

/* All rows together, in equal parts or these. Of equal parts NCCL makes one collective. */
static void set_parts(struct nccl_operation *op, int64_t *begin, int64_t num_elements,
                      const int64_t *rows)
{
    op->uneven = rows != NULL && !are_equal(rows, op->size);
    if (op->uneven) {
        set_begin(begin, rows, op->size);
        return;
    }
    op->row_elements = num_elements / op->size;
    op->row_bytes = op->row_elements * dtype_size_bytes(op->dtype);
}

static struct comm_handle issue(struct comm *comm, struct nccl_operation *op)
{
    nccl_operation_issue(op);
    return (struct comm_handle){comm, op};
}

static ncclDataType_t type_of(enum dtype dtype)
{
    switch (dtype) {
    case DTYPE_F32:
        return ncclFloat32;
    case DTYPE_BF16:
        return ncclBfloat16;
    case DTYPE_F64:
        return ncclFloat64;
    case DTYPE_I32:
        return ncclInt32;
    case DTYPE_I64:
        return ncclInt64;
    default:
        PANIC("no sum of %s", dtype_name(dtype));
    }
}

static ncclRedOp_t reduction_of(const struct nccl_operation *op)
{
    return op->reduction == COMM_MAX ? ncclMax : ncclSum;
}

/* The first failure of a group of calls; ncclInProgress is none. */
static ncclResult_t worse(ncclResult_t a, ncclResult_t b)
{
    return a != ncclSuccess && a != ncclInProgress ? a : b;
}

static ncclResult_t launch_all_reduce(const struct nccl_operation *op, ncclComm_t nccl,
                                      cudaStream_t stream)
{
    return nccl_library()->ncclAllReduce(op->in, op->out, (size_t)op->row_elements,
                                         type_of(op->dtype), reduction_of(op), nccl, stream);
}

static struct comm_handle nccl_all_reduce(struct comm *comm, struct stream *stream,
                                          struct tensor *x, enum comm_reduction reduction)
{
    struct nccl *nccl = comm->state;
    struct tensor row = tensor_view(x, 1, tensor_num_elements(x));
    struct nccl_operation *op =
        operation_new(nccl->collectives, stream, COMM_ALL_REDUCE, &row, &row, &row);

    op->moved_bytes = traffic_count_all_reduce(comm, x);
    op->reduction = reduction;
    op->launch = launch_all_reduce;
    return issue(comm, op);
}

/* Uneven: each rank's part is a broadcast of its own. */
static ncclResult_t launch_all_gather(const struct nccl_operation *op, ncclComm_t nccl,
                                      cudaStream_t stream)
{
    ncclResult_t result = ncclSuccess;

    if (!op->uneven) {
        return nccl_library()->ncclAllGather(op->in, op->out, (size_t)op->row_bytes, ncclUint8,
                                             nccl, stream);
    }
    for (int r = 0; r < op->size; r++) {
        char *part = op->out + op->out_begin[r] * op->row_bytes;
        const int64_t size_bytes = (op->out_begin[r + 1] - op->out_begin[r]) * op->row_bytes;

        if (size_bytes > 0) {
            result = worse(result, nccl_library()->ncclBroadcast(r == op->rank ? op->in : part,
                                                                 part, (size_t)size_bytes,
                                                                 ncclUint8, r, nccl, stream));
        }
    }
    return result;
}

static struct comm_handle nccl_all_gather(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const struct tensor *in,
                                          const int64_t *rows)
{
    struct nccl *nccl = comm->state;
    struct nccl_operation *op =
        operation_new(nccl->collectives, stream, COMM_ALL_GATHER, in, out, out);

    op->moved_bytes = traffic_count_all_gather(comm, in);
    set_parts(op, op->out_begin, tensor_num_elements(out), rows);
    op->launch = launch_all_gather;
    return issue(comm, op);
}

static ncclResult_t launch_reduce_scatter(const struct nccl_operation *op, ncclComm_t nccl,
                                          cudaStream_t stream)
{
    const ncclDataType_t type = type_of(op->dtype);
    ncclResult_t result = ncclSuccess;

    if (!op->uneven) {
        return nccl_library()->ncclReduceScatter(op->in, op->out, (size_t)op->row_elements, type,
                                                 ncclSum, nccl, stream);
    }
    for (int r = 0; r < op->size; r++) {
        const int64_t count = (op->in_begin[r + 1] - op->in_begin[r]) * op->row_elements;

        if (count > 0) {
            result =
                worse(result,
                      nccl_library()->ncclReduce(op->in + op->in_begin[r] * op->row_bytes, op->out,
                                                 (size_t)count, type, ncclSum, r, nccl, stream));
        }
    }
    return result;
}

static struct comm_handle nccl_reduce_scatter(struct comm *comm, struct stream *stream,
                                              struct tensor *out, const struct tensor *in,
                                              const int64_t *rows)
{
    struct nccl *nccl = comm->state;
    struct nccl_operation *op =
        operation_new(nccl->collectives, stream, COMM_REDUCE_SCATTER, in, out, in);

    op->moved_bytes = traffic_count_reduce_scatter(comm, out, in);
    set_parts(op, op->in_begin, tensor_num_elements(in), rows);
    op->launch = launch_reduce_scatter;
    return issue(comm, op);
}

static ncclResult_t launch_all_to_all(const struct nccl_operation *op, ncclComm_t nccl,
                                      cudaStream_t stream)
{
    const struct nccl_library *library = nccl_library();
    ncclResult_t result = ncclSuccess;

    for (int r = 0; r < op->size; r++) {
        const char *in = op->in + op->in_begin[r] * op->row_bytes;
        char *out = op->out + op->out_begin[r] * op->row_bytes;
        const size_t sent = (size_t)((op->in_begin[r + 1] - op->in_begin[r]) * op->row_bytes);
        const size_t received = (size_t)((op->out_begin[r + 1] - op->out_begin[r]) * op->row_bytes);

        if (sent > 0) {
            result = worse(result, library->ncclSend(in, sent, ncclUint8, r, nccl, stream));
        }
        if (received > 0) {
            result = worse(result, library->ncclRecv(out, received, ncclUint8, r, nccl, stream));
        }
    }
    return result;
}

static struct comm_handle nccl_all_to_all(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const int64_t *recv_rows,
                                          const struct tensor *in, const int64_t *send_rows)
{
    struct nccl *nccl = comm->state;
    struct nccl_operation *op =
        operation_new(nccl->collectives, stream, COMM_ALL_TO_ALL, in, out, in);

    CHECK(row_elements(out) == row_elements(in) && recv_rows[comm->rank] == send_rows[comm->rank],
          "%s: %s to %s", comm->name, tensor_describe(in), tensor_describe(out));
    op->moved_bytes = traffic_count_all_to_all(comm, in, send_rows);
    set_begin(op->in_begin, send_rows, comm->size);
    set_begin(op->out_begin, recv_rows, comm->size);
    op->launch = launch_all_to_all;
    return issue(comm, op);
}

static ncclResult_t launch_broadcast(const struct nccl_operation *op, ncclComm_t nccl,
                                     cudaStream_t stream)
{
    return nccl_library()->ncclBroadcast(op->in, op->out, (size_t)op->row_bytes, ncclUint8,
                                         op->root, nccl, stream);
}

static struct comm_handle nccl_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                         int root)
{
    struct nccl *nccl = comm->state;
    struct tensor row = tensor_view(x, 1, tensor_num_elements(x));
    struct nccl_operation *op =
        operation_new(nccl->collectives, stream, COMM_BROADCAST, &row, &row, &row);

    op->moved_bytes = traffic_count_broadcast(comm, x, root);
    op->root = root;
    op->launch = launch_broadcast;
    return issue(comm, op);
}

/* Of a channel for messages, the sender is rank 0 and the receiver rank 1. */
static ncclResult_t launch_send(const struct nccl_operation *op, ncclComm_t nccl,
                                cudaStream_t stream)
{
    return nccl_library()->ncclSend(op->in, (size_t)op->row_bytes, ncclUint8, 1, nccl, stream);
}

static ncclResult_t launch_receive(const struct nccl_operation *op, ncclComm_t nccl,
                                   cudaStream_t stream)
{
    return nccl_library()->ncclRecv(op->out, (size_t)op->row_bytes, ncclUint8, 0, nccl, stream);
}

static struct nccl_channel *message_channel(struct nccl_channel **channel, struct comm *host,
                                            int sender, int receiver)
{
    if (*channel == NULL) {
        *channel =
            nccl_channel_create(chosen_device, &(struct nccl_channel_ends){host, sender, receiver});
    }
    return *channel;
}

static struct comm_handle nccl_send(struct comm *comm, struct stream *stream,
                                    const struct tensor *x, int to)
{
    struct nccl *nccl = comm->state;
    const struct tensor row = tensor_view(x, 1, tensor_num_elements(x));
    struct nccl_operation *op =
        operation_new(message_channel(&nccl->to[to], nccl->host, comm->rank, to), stream, COMM_SEND,
                      &row, NULL, &row);

    op->moved_bytes = traffic_count_send(comm, x);
    op->launch = launch_send;
    return issue(comm, op);
}

static struct comm_handle nccl_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                       int from)
{
    struct nccl *nccl = comm->state;
    struct tensor row = tensor_view(x, 1, tensor_num_elements(x));
    struct nccl_operation *op =
        operation_new(message_channel(&nccl->from[from], nccl->host, from, comm->rank), stream,
                      COMM_RECEIVE, NULL, &row, &row);

    op->moved_bytes = op->row_bytes;
    op->launch = launch_receive;
    return issue(comm, op);
}

static void nccl_wait(struct comm_handle handle, struct stream *stream)
{
    nccl_operation_wait(handle.request, stream);
}

static void message_channel_destroy(struct nccl_channel *channel)
{
    if (channel != NULL) {
        nccl_channel_destroy(channel);
    }
}

/* A communicator may wait for its other rank to be destroyed as well, so the pairs of ranks have an
 * order, and so have a pair's two: that to the higher rank first. */
static void nccl_destroy(struct comm *comm)
{
    struct nccl *nccl = comm->state;

    for (int r = 0; r < comm->size; r++) {
        message_channel_destroy(comm->rank < r ? nccl->to[r] : nccl->from[r]);
        message_channel_destroy(comm->rank < r ? nccl->from[r] : nccl->to[r]);
    }
    nccl_channel_destroy(nccl->collectives);
    free(nccl->to);
    free(nccl->from);
    free(nccl);
    free(comm);
}

struct comm *comm_nccl_create(struct comm *host)
{
    static const struct comm_table table = {
        .transport = "nccl",
        .all_reduce = nccl_all_reduce,
        .all_gather = nccl_all_gather,
        .reduce_scatter = nccl_reduce_scatter,
        .all_to_all = nccl_all_to_all,
        .broadcast = nccl_broadcast,
        .send = nccl_send,
        .receive = nccl_receive,
        .wait = nccl_wait,
        .destroy = nccl_destroy,
    };
    struct comm *comm = calloc(1, sizeof *comm);
    struct nccl *nccl = calloc(1, sizeof *nccl);

    CHECK(comm != NULL && nccl != NULL, "out of memory");
    *comm = (struct comm){
        .table = &table, .name = host->name, .rank = host->rank, .size = host->size, .state = nccl};
    nccl->host = host;
    nccl->to = calloc((size_t)host->size, sizeof *nccl->to);
    nccl->from = calloc((size_t)host->size, sizeof *nccl->from);
    CHECK(nccl->to != NULL && nccl->from != NULL, "out of memory");
    nccl->collectives =
        nccl_channel_create(chosen_device, &(struct nccl_channel_ends){host, -1, -1});
    return comm;
}
#endif
