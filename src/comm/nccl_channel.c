/* nccl_channel.c - why so much waits in queues. MPI's contract (comm.h) lets a rank issue a
 * collective long before the others do, in any order relative to other groups, and a message long
 * before its receiver wants it. NCCL's calls block the host while communicators are made and
 * connected, and a kernel that waits for its peer holds up all later ones of its communicator. So
 * communicators are nonblocking, calls are made when their communicator is free, and each pair of
 * ranks has a communicator a direction for messages.
 *
 * In a capture the same calls are made, and the same thread of NCCL's makes them: what they would
 * put on the stream becomes part of the graph, which the stream's events tie to the rest of it. Two
 * threads must not add to a graph at a time, so an issue returns when NCCL's thread is done; no
 * other rank is needed for that, since steps before the capture have connected all channels. A
 * captured event cannot be asked, so it is the graph's launches that are watched. */
#ifdef CADRE_NCCL
#include "comm/nccl_channel.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/check.h"
#include "base/clock.h"
#include "comm/comm_mpi.h"
#include "comm/launch.h"
#include "comm/rendezvous.h"
#include "ops/libraries_cuda.h"
#include "ops/ops.h"
#include "ops/ops_profile.h"

#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        CHECK(error_ == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error_));                 \
    } while (0)

enum {
    LAUNCH_SPINS = 1000, /* a launch takes NCCL's thread some 50 us; a sleep is as long at least */
    LAUNCH_PAUSE_NS = 20000,
    WATCH_PAUSE_NS = 50000000,
    SECOND_NS = 1000000000,
    /* A block of NCCL's takes a multiprocessor while it waits, and a rank may wait for several
     * messages at a time: they must leave room for the work that they wait for. */
    MESSAGE_BLOCKS_MAX = 4
};

struct nccl_channel {
    struct nccl_channel *next;
    struct nccl_channel_ends ends;
    struct rendezvous rendezvous; /* of messages within a host */
    const struct device *device;
    enum { CHANNEL_UNUSED, CHANNEL_FINDING, CHANNEL_JOINING, CHANNEL_READY } stage;
    struct comm_handle exchange; /* of id */
    ncclUniqueId id;
    ncclComm_t nccl;
    cudaStream_t stream;
    struct nccl_operation *queue; /* issued, not launched; oldest first */
};

/* One lock guards all of it, and all calls of NCCL. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t thread;
    bool stopping;
    struct nccl_channel *channels;
    struct nccl_operation *launched, *spare;
    bool is_capturing, has_captured;
    int num_captured; /* operations of the capture that were not waited for */
    struct stream *host_stream;
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* ---- failures ---- */

/* Kernels that wait for a peer end, then the job does; but an abort would wait for ever for a graph
 * that holds the communicator's work, and for a kernel whose stream waits for another rank.
 * channel: NULL for a graph. */
static void fail(struct nccl_channel *channel, const char *what, const char *why)
{
    const struct comm *host;

    if (channel == NULL) {
        PANIC("%s %s", what, why);
    }
    host = channel->ends.host;
    if (channel->nccl != NULL && !state.has_captured && !rendezvous_is_open()) {
        nccl_library()->ncclCommAbort(channel->nccl);
    }
    if (channel->ends.sender >= 0) {
        PANIC("%s in group %s of %d ranks, from its rank %d to its rank %d, %s", what, host->name,
              host->size, channel->ends.sender, channel->ends.receiver, why);
    }
    PANIC("%s in group %s of %d ranks %s", what, host->name, host->size, why);
}

/* Whether NCCL is still busy with an earlier call. */
static bool is_busy(struct nccl_channel *channel, const char *what, ncclResult_t result)
{
    if (result == ncclInProgress) {
        const ncclResult_t asked = nccl_library()->ncclCommGetAsyncError(channel->nccl, &result);

        result = asked != ncclSuccess ? asked : result;
    }
    if (result != ncclSuccess && result != ncclInProgress) {
        launch_let_rank_0_speak();
        fail(channel, what, nccl_library()->ncclGetErrorString(result));
    }
    return result == ncclInProgress;
}

static const char *name_of(const struct nccl_operation *op)
{
    return op->channel != NULL ? comm_kind_name(op->kind) : "a CUDA graph with communication";
}

/* As in comm_mpi.c, lower ranks speak first, so that one line comes. */
static void check_deadline(struct nccl_operation *op)
{
    const double limit = comm_mpi_timeout() + (launch_rank() < 8 ? launch_rank() : 8);
    char why[160];

    if (clock_seconds() - op->issued_at > limit) {
        snprintf(why, sizeof why, "is not complete after %g s (--distributed-timeout-minutes): %s",
                 comm_mpi_timeout(),
                 op->stage == NCCL_LAUNCHED ? "a rank has not come to it"
                                            : "its ranks have not found each other");
        fail(op->channel, name_of(op), why);
    }
}

/* ---- a channel's way to its first operation ---- */

static int first_rank(const struct nccl_channel *channel)
{
    return channel->ends.sender >= 0 ? channel->ends.sender : 0;
}

/* The first rank makes the id and tells the others. */
static void find_each_other(struct nccl_channel *channel)
{
    struct comm *host = channel->ends.host;
    struct tensor id = tensor_of(&channel->id, DTYPE_U8, sizeof channel->id);
    const bool is_first = host->rank == first_rank(channel);
    const enum comm_kind kind = channel->ends.sender < 0 ? COMM_BROADCAST : COMM_SEND;
    const int64_t counted = host->counters[kind].sent_bytes; /* not by what is sent here */

    if (is_first) {
        is_busy(channel, "ncclGetUniqueId", nccl_library()->ncclGetUniqueId(&channel->id));
    }
    if (channel->ends.sender < 0) {
        channel->exchange = comm_broadcast(host, state.host_stream, &id, first_rank(channel));
    } else if (is_first) {
        channel->exchange = comm_send(host, state.host_stream, &id, channel->ends.receiver);
    } else {
        channel->exchange = comm_receive(host, state.host_stream, &id, channel->ends.sender);
    }
    host->counters[kind].sent_bytes = counted;
    channel->stage = CHANNEL_FINDING;
}

static void join(struct nccl_channel *channel)
{
    const struct comm *host = channel->ends.host;
    const bool is_pair = channel->ends.sender >= 0;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;

    config.blocking = 0;
    if (is_pair) {
        config.maxCTAs = MESSAGE_BLOCKS_MAX;
    }
    comm_wait(channel->exchange, state.host_stream);
    is_busy(channel, "ncclCommInitRankConfig",
            nccl_library()->ncclCommInitRankConfig(
                &channel->nccl, is_pair ? 2 : host->size, channel->id,
                is_pair ? host->rank == channel->ends.receiver : host->rank, &config));
    channel->stage = CHANNEL_JOINING;
}

/* ---- operations ---- */

static void call_nccl(struct nccl_operation *op)
{
    const struct nccl_library *library = nccl_library();
    struct nccl_channel *channel = op->channel;
    const char *what = comm_kind_name(op->kind);
    ncclResult_t result;

    is_busy(channel, what, library->ncclGroupStart());
    result = op->launch(op, channel->nccl, channel->stream);
    if (result != ncclSuccess && result != ncclInProgress) {
        fail(channel, what, library->ncclGetErrorString(result));
    }
    is_busy(channel, what, library->ncclGroupEnd());
}

/* A graph would meet the same counts at every launch: its messages begin as they come. */
static bool meets(const struct nccl_operation *op)
{
    return op->channel->rendezvous.come != NULL && !op->captured;
}

static void enqueue(struct nccl_operation *op)
{
    struct nccl_channel *channel = op->channel;

    CUDA_CHECK(cudaStreamWaitEvent(channel->stream, op->ready, 0));
    if (meets(op)) {
        rendezvous_meet(&channel->rendezvous, channel->stream);
    }
    op->profiled = ops_profile_transfer_begin(channel->device, channel->stream);
    call_nccl(op);
    op->stage = NCCL_ENQUEUED;
}

static void end_profiled(const struct nccl_operation *op)
{
    const struct nccl_channel *channel = op->channel;
    const struct nccl_channel_ends *ends = &channel->ends;
    struct transfer transfer = {.name = comm_kind_name(op->kind), .size_bytes = op->moved_bytes};

    if (op->profiled == NULL) {
        return;
    }
    if (ends->sender >= 0) {
        snprintf(transfer.lane, sizeof transfer.lane, "%s (%d to %d)", ends->host->name,
                 ends->sender, ends->receiver);
    } else {
        snprintf(transfer.lane, sizeof transfer.lane, "%s (%d ranks)", ends->host->name,
                 ends->host->size);
    }
    ops_profile_transfer_end(channel->device, channel->stream, op->profiled, &transfer);
}

/* NCCL has put the oldest operation's work on the stream. */
static void pop_launched(struct nccl_channel *channel)
{
    struct nccl_operation *op = channel->queue;

    CUDA_CHECK(cudaEventRecord(op->done, channel->stream));
    end_profiled(op);
    op->stage = NCCL_LAUNCHED;
    channel->queue = op->next;
    if (!op->captured) {
        op->next = state.launched;
        state.launched = op;
    }
}

/* As far as it goes without waiting. */
static void advance(struct nccl_channel *channel)
{
    if (channel->queue != NULL && channel->stage == CHANNEL_UNUSED) {
        find_each_other(channel);
    }
    if (channel->stage == CHANNEL_FINDING && comm_mpi_is_complete(channel->exchange)) {
        join(channel);
    }
    if (channel->stage == CHANNEL_JOINING && !is_busy(channel, "joining", ncclInProgress)) {
        channel->stage = CHANNEL_READY;
    }
    while (channel->stage == CHANNEL_READY && channel->queue != NULL) {
        if (channel->queue->stage == NCCL_QUEUED) {
            enqueue(channel->queue);
        }
        if (is_busy(channel, comm_kind_name(channel->queue->kind), ncclInProgress)) {
            return;
        }
        pop_launched(channel);
    }
}

static void operation_free(struct nccl_operation *op)
{
    CUDA_CHECK(cudaEventDestroy(op->ready));
    CUDA_CHECK(cudaEventDestroy(op->done));
    free(op->in_begin);
    free(op->out_begin);
    free(op);
}

static bool is_done(const struct nccl_operation *op)
{
    const cudaError_t status = cudaEventQuery(op->done);

    CHECK(status == cudaSuccess || status == cudaErrorNotReady, "%s: %s", name_of(op),
          cudaGetErrorString(status));
    return status == cudaSuccess;
}

/* A graph holds operations of any channel. */
static void ask_for_errors(const struct nccl_operation *op)
{
    if (op->channel != NULL) {
        is_busy(op->channel, name_of(op), ncclInProgress);
        return;
    }
    for (struct nccl_channel *channel = state.channels; channel != NULL; channel = channel->next) {
        if (channel->stage == CHANNEL_READY) {
            is_busy(channel, name_of(op), ncclInProgress);
        }
    }
}

static void give_back(struct nccl_operation *op)
{
    op->next = state.spare;
    state.spare = op;
}

/* Operations that are done and waited for may be used again. */
static void watch_launched(void)
{
    struct nccl_operation **link = &state.launched;

    while (*link != NULL) {
        struct nccl_operation *op = *link;
        const bool done = is_done(op);

        if (!done) {
            ask_for_errors(op);
            check_deadline(op);
        }
        if (done && op->waited) {
            *link = op->next;
            give_back(op);
        } else {
            link = &op->next;
        }
    }
}

/* True where operations remain to be launched. */
static bool advance_all(void)
{
    bool work = false;

    for (struct nccl_channel *channel = state.channels; channel != NULL; channel = channel->next) {
        advance(channel);
        if (channel->queue != NULL) {
            check_deadline(channel->queue);
            work = true;
        }
    }
    return work;
}

/* ---- the thread ---- */

static void sleep_until_wanted(long pause_ns)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += pause_ns;
    until.tv_sec += until.tv_nsec / SECOND_NS;
    until.tv_nsec %= SECOND_NS;
    pthread_cond_timedwait(&state.wake, &state.lock, &until);
}

/* Its queries must not end another thread's capture of a graph. */
static void *run(void *device)
{
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;

    CUDA_CHECK(cudaSetDevice(((const struct device *)device)->index));
    CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    pthread_mutex_lock(&state.lock);
    while (!state.stopping) {
        const bool work = advance_all();

        watch_launched();
        if (work) {
            pthread_mutex_unlock(&state.lock);
            nanosleep(&(struct timespec){.tv_nsec = LAUNCH_PAUSE_NS}, NULL);
            pthread_mutex_lock(&state.lock);
        } else {
            sleep_until_wanted(WATCH_PAUSE_NS);
        }
    }
    pthread_mutex_unlock(&state.lock);
    return NULL;
}

static void start(const struct device *device)
{
    state.stopping = false;
    state.host_stream = stream_create(device_cpu(), ops_cpu());
    CHECK(pthread_create(&state.thread, NULL, run, (void *)device) == 0,
          "no thread for communication");
}

/* The last channel is gone. */
static void stop(void)
{
    pthread_mutex_lock(&state.lock);
    state.stopping = true;
    pthread_cond_signal(&state.wake);
    pthread_mutex_unlock(&state.lock);
    pthread_join(state.thread, NULL);
    while (state.spare != NULL) {
        struct nccl_operation *op = state.spare;

        state.spare = op->next;
        operation_free(op);
    }
    stream_destroy(state.host_stream);
}

/* ---- what others call ---- */

/* Its blocks come before those of the kernels that compute and have not started. */
static cudaStream_t stream_open(void)
{
    int lowest, highest;
    cudaStream_t stream;

    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest));
    return stream;
}

struct nccl_channel *nccl_channel_create(const struct device *device,
                                         const struct nccl_channel_ends *ends)
{
    struct nccl_channel *channel = calloc(1, sizeof *channel);

    CHECK(channel != NULL, "out of memory");
    channel->device = device;
    channel->ends = *ends;
    if (ends->sender >= 0) {
        const bool is_sender = ends->host->rank == ends->sender;

        channel->rendezvous =
            rendezvous_with(ends->host, is_sender ? ends->receiver : ends->sender, is_sender);
    }
    CUDA_CHECK(cudaSetDevice(device->index));
    channel->stream = stream_open();
    if (state.channels == NULL) {
        start(device);
    }
    pthread_mutex_lock(&state.lock);
    channel->next = state.channels;
    state.channels = channel;
    pthread_mutex_unlock(&state.lock);
    return channel;
}

static void remove_from_list(struct nccl_channel *channel)
{
    struct nccl_channel **link = &state.channels;

    while (*link != channel) {
        link = &(*link)->next;
    }
    *link = channel->next;
}

void nccl_channel_destroy(struct nccl_channel *channel)
{
    pthread_mutex_lock(&state.lock);
    CHECK(channel->queue == NULL, "%s of %s was never waited for",
          comm_kind_name(channel->queue->kind), channel->ends.host->name);
    CUDA_CHECK(cudaStreamSynchronize(channel->stream));
    watch_launched();
    for (const struct nccl_operation *op = state.launched; op != NULL; op = op->next) {
        CHECK(op->channel != channel, "%s of %s was never waited for", comm_kind_name(op->kind),
              channel->ends.host->name);
    }
    if (channel->nccl != NULL) {
        is_busy(channel, "ncclCommFinalize", nccl_library()->ncclCommFinalize(channel->nccl));
        while (is_busy(channel, "ncclCommFinalize", ncclInProgress)) {
            sched_yield();
        }
        is_busy(channel, "ncclCommDestroy", nccl_library()->ncclCommDestroy(channel->nccl));
    }
    remove_from_list(channel);
    pthread_mutex_unlock(&state.lock);
    CUDA_CHECK(cudaStreamDestroy(channel->stream));
    free(channel);
    if (state.channels == NULL) {
        stop();
    }
}

static struct nccl_operation *allocate_operation(void)
{
    struct nccl_operation *op = calloc(1, sizeof *op);

    CHECK(op != NULL, "out of memory");
    CUDA_CHECK(cudaEventCreateWithFlags(&op->ready, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&op->done, cudaEventDisableTiming));
    return op;
}

static struct nccl_operation *take_operation(void)
{
    struct nccl_operation *op;

    pthread_mutex_lock(&state.lock);
    op = state.spare;
    if (op != NULL) {
        state.spare = op->next;
    }
    pthread_mutex_unlock(&state.lock);
    return op != NULL ? op : allocate_operation();
}

static void make_room(struct nccl_operation *op, int num_ranks)
{
    if (num_ranks > op->max_ranks) {
        free(op->in_begin);
        free(op->out_begin);
        op->in_begin = calloc((size_t)num_ranks + 1, sizeof *op->in_begin);
        op->out_begin = calloc((size_t)num_ranks + 1, sizeof *op->out_begin);
        CHECK(op->in_begin != NULL && op->out_begin != NULL, "out of memory");
        op->max_ranks = num_ranks;
    }
}

struct nccl_operation *nccl_operation_new(struct nccl_channel *channel, struct stream *stream,
                                          enum comm_kind kind)
{
    struct nccl_operation *op;

    CUDA_CHECK(cudaSetDevice(channel->device->index));
    op = take_operation();
    make_room(op, channel->ends.host->size);
    op->channel = channel;
    op->kind = kind;
    op->rank = channel->ends.host->rank;
    op->size = channel->ends.host->size;
    op->uneven = false;
    op->stage = NCCL_QUEUED;
    op->waited = false;
    op->captured = state.is_capturing;
    op->issued_at = clock_seconds();
    CUDA_CHECK(cudaEventRecord(op->ready, stream->native));
    return op;
}

/* With the lock, which is given up meanwhile. */
static void await_launch(struct nccl_operation *op)
{
    for (int i = 0; op->stage != NCCL_LAUNCHED; i++) {
        pthread_mutex_unlock(&state.lock);
        if (i < LAUNCH_SPINS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){.tv_nsec = LAUNCH_PAUSE_NS}, NULL);
        }
        pthread_mutex_lock(&state.lock);
        advance(op->channel);
    }
}

void nccl_operation_issue(struct nccl_operation *op)
{
    struct nccl_operation **link;

    pthread_mutex_lock(&state.lock);
    link = &op->channel->queue;
    while (*link != NULL) {
        link = &(*link)->next;
    }
    *link = op;
    op->next = NULL;
    state.num_captured += op->captured;
    advance(op->channel);
    if (op->channel->queue != NULL) {
        pthread_cond_signal(&state.wake);
    }
    if (op->captured) {
        CHECK(op->channel->stage == CHANNEL_READY, "%s of %s is the first, in a capture",
              name_of(op), op->channel->ends.host->name);
        await_launch(op);
    }
    pthread_mutex_unlock(&state.lock);
}

void nccl_operation_wait(struct nccl_operation *op, struct stream *stream)
{
    pthread_mutex_lock(&state.lock);
    await_launch(op);
    CUDA_CHECK(cudaStreamWaitEvent(stream->native, op->done, 0));
    op->waited = true;
    if (op->captured) {
        state.num_captured--;
        give_back(op);
    }
    pthread_mutex_unlock(&state.lock);
}

void nccl_channels_capture_begin(void)
{
    pthread_mutex_lock(&state.lock);
    for (const struct nccl_channel *channel = state.channels; channel != NULL;
         channel = channel->next) {
        CHECK(channel->queue == NULL, "%s of %s was not waited for before a capture",
              name_of(channel->queue), channel->ends.host->name);
    }
    state.is_capturing = true;
    state.has_captured = true;
    pthread_mutex_unlock(&state.lock);
}

void nccl_channels_capture_end(void)
{
    CHECK(state.num_captured == 0, "%d captured operations were not waited for",
          state.num_captured);
    state.is_capturing = false;
}

void nccl_channels_graph_launched(const struct device *device, struct stream *stream)
{
    struct nccl_operation *op;

    CUDA_CHECK(cudaSetDevice(device->index));
    op = take_operation();
    op->channel = NULL;
    op->captured = false;
    op->stage = NCCL_LAUNCHED;
    op->waited = true;
    op->issued_at = clock_seconds();
    CUDA_CHECK(cudaEventRecord(op->done, stream->native));
    pthread_mutex_lock(&state.lock);
    op->next = state.launched;
    state.launched = op;
    pthread_mutex_unlock(&state.lock);
}
#endif
