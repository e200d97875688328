/* comm_nccl.c, nccl_channel.c and rendezvous.c over a pretended NCCL and CUDA runtime, for machines
 * without several GPUs: what is called, with which sizes, and that nobody waits for ever. The
 * pretended NCCL moves the host's memory over MPI. As the real one does, it joins and connects
 * ranks in the background, and a communicator's work waits for the work before it. ranks: 2 3 4 */
#if defined CADRE_MPI && __has_include(<nccl.h>) && __has_include(<cublasLt.h>)

/* A build with CUDA has the real ones too. */
#define cudaDeviceGetStreamPriorityRange pretended_priorities
#define cudaDeviceSynchronize pretended_device_synchronize
#define cudaEventCreateWithFlags pretended_event_create
#define cudaEventDestroy pretended_event_destroy
#define cudaEventQuery pretended_event_query
#define cudaEventRecord pretended_event_record
#define cudaFree pretended_free
#define cudaGetDeviceProperties pretended_properties
#define cudaGetDriverEntryPointByVersion pretended_driver
#define cudaGetErrorString pretended_error_string
#define cudaGetLastError pretended_last_error
#define cudaIpcCloseMemHandle pretended_ipc_close
#define cudaIpcGetMemHandle pretended_ipc_get
#define cudaIpcOpenMemHandle pretended_ipc_open
#define cudaMalloc pretended_malloc
#define cudaMemset pretended_memset
#define cudaSetDevice pretended_set_device
#define cudaStreamCreateWithPriority pretended_stream_create
#define cudaStreamDestroy pretended_stream_destroy
#define cudaStreamSynchronize pretended_stream_synchronize
#define cudaStreamWaitEvent pretended_stream_wait
#define cudaThreadExchangeStreamCaptureMode pretended_capture_mode
#define device_cuda_share_multiprocessors pretended_share
#define nccl_library pretended_nccl
#define CADRE_NCCL

#include "../../src/comm/comm_nccl.c"
#undef CUDA_CHECK
#include "../../src/comm/rendezvous.c"
#undef CUDA_CHECK
#include "../../src/comm/nccl_channel.c"

#include <fcntl.h>
#include <mpi.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "comm/progress.h"
#include "comm/reduction.h"
#include "device_collectives.h"

enum { MESSAGES_MAX = 64, BLOCKED_MAX = 8, TAG_MIN = 1 << 20, TAGS_PER_COMM = 256 };

/* ---- a stream's work: groups of calls, one after the other ---- */

struct sum {
    void *parts[RANKS_MAX], *out;
    int64_t count;
    enum dtype dtype;
    enum comm_reduction reduction;
};

/* A group of calls of NCCL; without a comm, one thing that the stream does by itself. */
struct work {
    struct work *next;
    ncclComm_t comm;
    bool (*run)(struct work *work); /* the one thing; true when it is done */
    _Atomic uint32_t *at;
    uint32_t value;
    bool posted;
    int num_messages, num_sums;
    struct {
        void *data;
        int size_bytes, peer; /* in the world */
        bool is_receive;
    } messages[MESSAGES_MAX];
    MPI_Request requests[MESSAGES_MAX];
    struct sum sums[RANKS_MAX];
};

struct CUstream_st {
    struct CUstream_st *next;
    struct work *work;
    int64_t num_issued, num_done;
};

struct CUevent_st {
    cudaStream_t stream;
    int64_t after;    /* this much of the stream's work */
    bool is_captured; /* part of a graph: it cannot be asked */
};

struct ncclComm {
    int rank, size, root, number; /* root: the world rank that made the id */
    bool joined, finalizing;
    int num_polls; /* until the work is on the stream */
    int num_works;
    int world[RANKS_MAX];
    int places[RANKS_MAX][2]; /* root's: rank and world rank of the others */
    MPI_Request requests[2 * RANKS_MAX];
    int num_requests;
    struct work *open;       /* between ncclGroupStart and ncclGroupEnd */
    struct work *connecting; /* from there until it is on the stream */
    cudaStream_t stream;
};

static pthread_mutex_t pretence = PTHREAD_MUTEX_INITIALIZER;
static cudaStream_t streams;
static ncclComm_t grouped;
static int group_depth;
static atomic_bool pretend_capture; /* the graph runs as it is captured */
static atomic_int num_connecting;   /* communicators with calls that are not on their stream yet */
static atomic_bool stop_pretending;

static int tag_of(const struct ncclComm *comm, int which)
{
    return TAG_MIN + (comm->root * 64 + comm->number) * TAGS_PER_COMM + which;
}

/* With MPI's lock. */
static void work_post(struct work *work)
{
    const int tag = tag_of(work->comm, 3 + work->comm->num_works++ % (TAGS_PER_COMM - 3));

    for (int i = 0; i < work->num_messages; i++) {
        void *data = work->messages[i].data;
        const int size_bytes = work->messages[i].size_bytes, peer = work->messages[i].peer;

        if (work->messages[i].is_receive) {
            MPI_Irecv(data, size_bytes, MPI_BYTE, peer, tag, MPI_COMM_WORLD, &work->requests[i]);
        } else {
            MPI_Isend(data, size_bytes, MPI_BYTE, peer, tag, MPI_COMM_WORLD, &work->requests[i]);
        }
    }
    work->posted = true;
}

static void work_finish(struct work *work)
{
    for (int i = 0; i < work->num_sums; i++) {
        struct sum *sum = &work->sums[i];

        reduction_apply(sum->reduction, sum->dtype, sum->out, (const void **)sum->parts,
                        work->comm->size, sum->count);
        for (int r = 0; r < work->comm->size; r++) {
            free(sum->parts[r]);
        }
    }
    free(work);
}

static bool work_is_done(struct work *work)
{
    int done;

    if (work->comm == NULL) {
        return work->run(work);
    }
    progress_lock();
    if (!work->posted) {
        work_post(work);
    }
    MPI_Testall(work->num_messages, work->requests, &done, MPI_STATUSES_IGNORE);
    progress_unlock(false);
    return done;
}

/* The GPU: it works while the host does other things. */
static void *pretended_gpu(void *unused)
{
    while (!stop_pretending) {
        pthread_mutex_lock(&pretence);
        for (cudaStream_t s = streams; s != NULL; s = s->next) {
            while (s->work != NULL && work_is_done(s->work)) {
                struct work *work = s->work;

                s->work = work->next;
                s->num_done++;
                work_finish(work);
            }
        }
        pthread_mutex_unlock(&pretence);
        usleep(20);
    }
    return NULL;
}

/* ---- CUDA ---- */

static void append(cudaStream_t s, struct work *work)
{
    struct work **link;

    pthread_mutex_lock(&pretence);
    for (link = &s->work; *link != NULL; link = &(*link)->next) {
    }
    *link = work;
    s->num_issued++;
    pthread_mutex_unlock(&pretence);
}

static void append_own(cudaStream_t s, struct work facts)
{
    struct work *work = calloc(1, sizeof *work);

    *work = facts;
    append(s, work);
}

static bool run_wait(struct work *work)
{
    return (int32_t)(atomic_load(work->at) - work->value) >= 0;
}

static bool run_write(struct work *work)
{
    atomic_store(work->at, work->value);
    return true;
}

static CUresult stream_wait_value(CUstream s, CUdeviceptr at, cuuint32_t value, unsigned flags)
{
    append_own(s, (struct work){.run = run_wait, .at = (_Atomic uint32_t *)at, .value = value});
    return CUDA_SUCCESS;
}

static CUresult stream_write_value(CUstream s, CUdeviceptr at, cuuint32_t value, unsigned flags)
{
    append_own(s, (struct work){.run = run_write, .at = (_Atomic uint32_t *)at, .value = value});
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found)
{
    *function = strcmp(name, "cuStreamWaitValue32") == 0 ? (void *)stream_wait_value
                                                         : (void *)stream_write_value;
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* Memory that other processes can open by its name. */
enum { ALLOCATIONS_MAX = 64 };

static struct allocation {
    char name[64];
    void *memory;
    size_t size_bytes;
} allocations[ALLOCATIONS_MAX];

static void *map(const char *name, int flags, size_t size_bytes)
{
    const int descriptor = shm_open(name, flags, 0600);
    void *memory;

    CHECK(descriptor >= 0 && ((flags & O_CREAT) == 0 || ftruncate(descriptor, size_bytes) == 0),
          "%s", name);
    memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    CHECK(memory != MAP_FAILED, "%s", name);
    close(descriptor);
    return memory;
}

static struct allocation *allocation_of(const void *memory)
{
    int i = 0;

    while (allocations[i].memory != memory) {
        CHECK(++i < ALLOCATIONS_MAX, "no allocation at %p", memory);
    }
    return &allocations[i];
}

cudaError_t cudaMalloc(void **memory, size_t size_bytes)
{
    static int count;
    struct allocation *allocation = allocation_of(NULL);

    snprintf(allocation->name, sizeof allocation->name, "/dist_nccl-%d-%d", getpid(), count++);
    allocation->size_bytes = size_bytes;
    *memory = allocation->memory = map(allocation->name, O_CREAT | O_RDWR, size_bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory)
{
    struct allocation *allocation = allocation_of(memory);

    munmap(memory, allocation->size_bytes);
    shm_unlink(allocation->name);
    allocation->memory = NULL;
    return cudaSuccess;
}

cudaError_t cudaMemset(void *memory, int value, size_t size_bytes)
{
    memset(memory, value, size_bytes);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    return cudaSuccess;
}

void device_cuda_share_multiprocessors(void)
{
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *memory)
{
    memcpy(handle, allocation_of(memory)->name, sizeof *handle);
    return cudaSuccess;
}

static size_t open_bytes(void)
{
    return num_counters() * sizeof(uint32_t);
}

cudaError_t cudaIpcOpenMemHandle(void **memory, cudaIpcMemHandle_t handle, unsigned flags)
{
    *memory = map((const char *)&handle, O_RDWR, open_bytes());
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *memory)
{
    munmap(memory, open_bytes());
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int index)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error)
{
    return "pretended";
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int index)
{
    memset(properties, 0, sizeof *properties);
    properties->uuid.bytes[0] = (char)launch_rank();
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest)
{
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority)
{
    *s = calloc(1, sizeof **s);
    pthread_mutex_lock(&pretence);
    (*s)->next = streams;
    streams = *s;
    pthread_mutex_unlock(&pretence);
    return cudaSuccess;
}

static bool is_past(cudaStream_t s, int64_t after)
{
    bool past;

    pthread_mutex_lock(&pretence);
    past = s == NULL || s->num_done >= after;
    pthread_mutex_unlock(&pretence);
    return past;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    while (!is_past(s, s->num_issued)) {
        usleep(20);
    }
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    cudaStream_t *link = &streams;

    pthread_mutex_lock(&pretence);
    while (*link != s) {
        link = &(*link)->next;
    }
    *link = s->next;
    pthread_mutex_unlock(&pretence);
    free(s);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s)
{
    CHECK(!pretend_capture || num_connecting == 0, "two threads add to a graph");
    *event = (struct CUevent_st){s, s != NULL ? s->num_issued : 0, pretend_capture};
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    if (event->is_captured) {
        return cudaErrorCapturedEvent;
    }
    return is_past(event->stream, event->after) ? cudaSuccess : cudaErrorNotReady;
}

/* The test's own stream, NULL, works at once, in the host's place: it waits in device_wait. */
static struct CUevent_st blocked[BLOCKED_MAX];
static int num_blocked;

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags)
{
    if (s == NULL) {
        CHECK(num_blocked < BLOCKED_MAX, "too many waits");
        blocked[num_blocked++] = *event;
    }
    return cudaSuccess;
}

static void device_wait(struct comm_handle handle)
{
    comm_wait(handle, device_stream);
    for (; num_blocked > 0; num_blocked--) {
        while (!is_past(blocked[num_blocked - 1].stream, blocked[num_blocked - 1].after)) {
            usleep(20);
        }
    }
}

/* ---- NCCL ---- */

static const char *error_string(ncclResult_t result)
{
    return "pretended";
}

static ncclResult_t get_unique_id(ncclUniqueId *id)
{
    static int count;
    const int made[2] = {launch_rank(), count++};

    memset(id, 0, sizeof *id);
    memcpy(id->internal, made, sizeof made);
    return ncclSuccess;
}

/* The others tell the root who they are, who tells everyone. */
static ncclResult_t comm_init(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                              ncclConfig_t *config)
{
    ncclComm_t c = *comm = calloc(1, sizeof **comm);

    CHECK(config->blocking == 0, "the host would be blocked");
    memcpy(&c->root, id.internal, sizeof c->root);
    memcpy(&c->number, id.internal + sizeof c->root, sizeof c->number);
    c->rank = rank;
    c->size = size;
    c->places[rank][0] = rank;
    c->places[rank][1] = launch_rank();
    progress_lock();
    if (launch_rank() == c->root) {
        CHECK(rank == 0, "the root is rank %d", rank);
        for (int r = 1; r < size; r++) {
            MPI_Irecv(c->places[r], 2, MPI_INT, MPI_ANY_SOURCE, tag_of(c, 0), MPI_COMM_WORLD,
                      &c->requests[c->num_requests++]);
        }
    } else {
        MPI_Isend(c->places[rank], 2, MPI_INT, c->root, tag_of(c, 0), MPI_COMM_WORLD,
                  &c->requests[c->num_requests++]);
        MPI_Irecv(c->world, size, MPI_INT, c->root, tag_of(c, 1), MPI_COMM_WORLD,
                  &c->requests[c->num_requests++]);
    }
    progress_unlock(false);
    return ncclInProgress;
}

static void tell_everyone(ncclComm_t comm)
{
    for (int i = 0; i < comm->size; i++) {
        comm->world[comm->places[i][0]] = comm->places[i][1];
    }
    for (int r = 1; r < comm->size; r++) {
        MPI_Send(comm->world, comm->size, MPI_INT, comm->world[r], tag_of(comm, 1), MPI_COMM_WORLD);
    }
}

static void put_on_stream(ncclComm_t comm)
{
    append(comm->stream, comm->connecting);
    comm->connecting = NULL;
    num_connecting--;
}

static ncclResult_t get_async_error(ncclComm_t comm, ncclResult_t *result)
{
    int done = 1;

    if (!comm->joined) {
        progress_lock();
        MPI_Testall(comm->num_requests, comm->requests, &done, MPI_STATUSES_IGNORE);
        if (done && !comm->finalizing && launch_rank() == comm->root) {
            tell_everyone(comm);
        }
        progress_unlock(false);
        comm->joined = done;
    }
    if (comm->connecting != NULL && comm->num_polls-- == 0) {
        put_on_stream(comm);
    }
    *result = !done || comm->connecting != NULL ? ncclInProgress : ncclSuccess;
    return ncclSuccess;
}

/* Complete when every rank has come to it: the real one may wait for others. */
static ncclResult_t comm_finalize(ncclComm_t comm)
{
    progress_lock();
    comm->num_requests = 0;
    for (int r = 0; r < comm->size; r++) {
        MPI_Isend(NULL, 0, MPI_BYTE, comm->world[r], tag_of(comm, 2), MPI_COMM_WORLD,
                  &comm->requests[comm->num_requests++]);
        MPI_Irecv(NULL, 0, MPI_BYTE, comm->world[r], tag_of(comm, 2), MPI_COMM_WORLD,
                  &comm->requests[comm->num_requests++]);
    }
    progress_unlock(false);
    comm->finalizing = true;
    comm->joined = false;
    return ncclInProgress;
}

static ncclResult_t comm_abort(ncclComm_t comm)
{
    return ncclSuccess;
}

static ncclResult_t comm_free(ncclComm_t comm)
{
    CHECK(comm->joined, "destroyed before it was finalized");
    free(comm);
    return ncclSuccess;
}

static ncclResult_t group_start(void)
{
    group_depth++;
    return ncclSuccess;
}

static ncclResult_t group_end(void)
{
    ncclComm_t comm = grouped;

    group_depth--;
    grouped = NULL;
    if (comm == NULL) {
        return ncclSuccess;
    }
    comm->connecting = comm->open;
    num_connecting++;
    comm->open = NULL;
    comm->num_polls = comm->num_works % 3;
    return ncclInProgress;
}

static struct work *open_work(ncclComm_t comm, cudaStream_t s)
{
    CHECK(group_depth == 1 && comm->joined && (grouped == NULL || grouped == comm),
          "a call outside of a group, before joining or of a second communicator");
    if (comm->open == NULL) {
        comm->open = calloc(1, sizeof *comm->open);
        comm->open->comm = comm;
    }
    comm->stream = s;
    grouped = comm;
    return comm->open;
}

static void add_message(struct work *work, const void *data, size_t size_bytes, int peer,
                        bool is_receive)
{
    CHECK(work->num_messages < MESSAGES_MAX, "too many messages");
    work->messages[work->num_messages].data = (void *)data;
    work->messages[work->num_messages].size_bytes = (int)size_bytes;
    work->messages[work->num_messages].peer = work->comm->world[peer];
    work->messages[work->num_messages++].is_receive = is_receive;
}

static size_t bytes_of(size_t count, ncclDataType_t type)
{
    return count * (type == ncclUint8                          ? 1
                    : type == ncclBfloat16                     ? 2
                    : type == ncclFloat32 || type == ncclInt32 ? 4
                                                               : 8);
}

static ncclResult_t send(const void *data, size_t count, ncclDataType_t type, int peer,
                         ncclComm_t comm, cudaStream_t s)
{
    add_message(open_work(comm, s), data, bytes_of(count, type), peer, false);
    return ncclSuccess;
}

static ncclResult_t receive(void *data, size_t count, ncclDataType_t type, int peer,
                            ncclComm_t comm, cudaStream_t s)
{
    add_message(open_work(comm, s), data, bytes_of(count, type), peer, true);
    return ncclSuccess;
}

static ncclResult_t broadcast(const void *in, void *out, size_t count, ncclDataType_t type,
                              int root, ncclComm_t comm, cudaStream_t s)
{
    struct work *work = open_work(comm, s);

    if (comm->rank != root) {
        return receive(out, count, type, root, comm, s);
    }
    memmove(out, in, bytes_of(count, type));
    for (int r = 0; r < comm->size; r++) {
        if (r != root) {
            add_message(work, in, bytes_of(count, type), r, false);
        }
    }
    return ncclSuccess;
}

static ncclResult_t all_gather(const void *in, void *out, size_t count, ncclDataType_t type,
                               ncclComm_t comm, cudaStream_t s)
{
    for (int r = 0; r < comm->size; r++) {
        char *part = (char *)out + (size_t)r * bytes_of(count, type);

        broadcast(r == comm->rank ? in : part, part, count, type, r, comm, s);
    }
    return ncclInProgress;
}

/* The sum of what all send here; with all_reduce, everybody does that for itself. */
static ncclResult_t reduce(const void *in, void *out, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t s)
{
    static const enum dtype dtypes[] = {[ncclFloat32] = DTYPE_F32,
                                        [ncclBfloat16] = DTYPE_BF16,
                                        [ncclFloat64] = DTYPE_F64,
                                        [ncclInt32] = DTYPE_I32,
                                        [ncclInt64] = DTYPE_I64};
    struct work *work = open_work(comm, s);
    const size_t size_bytes = bytes_of(count, type);
    struct sum *sum;

    if (comm->rank != root) {
        return send(in, count, type, root, comm, s);
    }
    sum = &work->sums[work->num_sums++];
    *sum = (struct sum){.out = out,
                        .count = (int64_t)count,
                        .dtype = dtypes[type],
                        .reduction = op == ncclMax ? COMM_MAX : COMM_SUM};
    for (int r = 0; r < comm->size; r++) {
        sum->parts[r] = malloc(size_bytes + 1);
        if (r == root) {
            memcpy(sum->parts[r], in, size_bytes);
        } else {
            add_message(work, sum->parts[r], size_bytes, r, true);
        }
    }
    return ncclSuccess;
}

static ncclResult_t all_reduce(const void *in, void *out, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t s)
{
    for (int r = 0; r < comm->size; r++) {
        reduce(in, out, count, type, op, r, comm, s);
    }
    return ncclInProgress;
}

static ncclResult_t reduce_scatter(const void *in, void *out, size_t count, ncclDataType_t type,
                                   ncclRedOp_t op, ncclComm_t comm, cudaStream_t s)
{
    for (int r = 0; r < comm->size; r++) {
        reduce((const char *)in + (size_t)r * bytes_of(count, type), out, count, type, op, r, comm,
               s);
    }
    return ncclInProgress;
}

const struct nccl_library *nccl_library(void)
{
    static const struct nccl_library library = {.ncclAllGather = all_gather,
                                                .ncclAllReduce = all_reduce,
                                                .ncclBroadcast = broadcast,
                                                .ncclCommAbort = comm_abort,
                                                .ncclCommDestroy = comm_free,
                                                .ncclCommFinalize = comm_finalize,
                                                .ncclCommGetAsyncError = get_async_error,
                                                .ncclCommInitRankConfig = comm_init,
                                                .ncclGetErrorString = error_string,
                                                .ncclGetUniqueId = get_unique_id,
                                                .ncclGroupEnd = group_end,
                                                .ncclGroupStart = group_start,
                                                .ncclRecv = receive,
                                                .ncclReduce = reduce,
                                                .ncclReduceScatter = reduce_scatter,
                                                .ncclSend = send};

    return &library;
}

static struct tensor device_copy(const struct tensor *host)
{
    return *host;
}

/* They are the same bytes. */
static void device_read(const struct tensor *on_device, struct tensor *host)
{
}

static void device_release(void)
{
}

static void some_of_each(void)
{
    all_reduce_and_broadcast(DTYPE_F32, 31);
    gather_and_scatter(DTYPE_BF16, 17);
    messages(DTYPE_F32, 5);
}

/* Collectives of a graph are never asked whether they are done, but its launches are; they leave
 * nothing behind, and others come after them. */
static void a_graph_is_watched_by_its_launches(const struct device *device)
{
    int members[RANKS_MAX];

    for (int r = 0; r < launch_size(); r++) {
        members[r] = r;
    }
    group = comm_create("captured", 0, members, launch_size());
    device_stream = stream_create(device, ops_cpu());
    some_of_each();
    some_of_each(); /* the pretended NCCL is slow at every third work of a communicator */
    comm_nccl_capture_begin();
    pretend_capture = true;
    some_of_each();
    pretend_capture = false;
    comm_nccl_capture_end();
    for (int i = 0; i < 3; i++) {
        comm_nccl_graph_launched(device_stream);
        usleep(2 * WATCH_PAUSE_NS / 1000);
    }
    some_of_each();
    pthread_mutex_lock(&state.lock);
    for (const struct nccl_operation *op = state.launched; op != NULL; op = op->next) {
        if (op->captured || op->channel == NULL) {
            dist_failed("%s is still watched", name_of(op));
        }
    }
    pthread_mutex_unlock(&state.lock);
    stream_destroy(device_stream);
    comm_destroy(group);
}

/* Of every message one way, both ranks have come as often; and messages did meet. */
static void every_rendezvous_was_kept(void)
{
    int64_t num_met = 0;

    for (size_t i = 0; i < num_counters(); i += NUM_SIDES) {
        num_met += shared.counts[i + SENDER];
        if (shared.mine[i + RECEIVER] != shared.counts[i + SENDER] ||
            shared.mine[i + SENDER] != shared.counts[i + RECEIVER]) {
            dist_failed("counter %zu: %u messages sent and %u received here, there %u and %u", i,
                        shared.counts[i + SENDER], shared.counts[i + RECEIVER],
                        shared.mine[i + SENDER], shared.mine[i + RECEIVER]);
        }
    }
    if (num_met == 0) {
        dist_failed("no message was begun together");
    }
}

int main(int argc, char **argv)
{
    struct device device = *device_cpu();
    pthread_t gpu;

    device.kind = DEVICE_CUDA;
    dist_begin(argc, argv);
    CHECK(pthread_create(&gpu, NULL, pretended_gpu, NULL) == 0, "no thread");
    comm_nccl_choose(&device);
    if (!comm_nccl_is_chosen()) {
        dist_failed("every rank has a GPU of its own, but NCCL is not chosen");
    }
    run_device_collectives(&device, 30011);
    every_rendezvous_was_kept();
    a_graph_is_watched_by_its_launches(&device);
    close_all();
    stop_pretending = true;
    pthread_join(gpu, NULL);
    return dist_end();
}
#else
#include <stdio.h>

int main(void)
{
    puts("nccl.h or cublasLt.h was not found: skipped");
    return 0;
}
#endif
