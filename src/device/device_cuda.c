/* Memory, streams, copies and graphs of one CUDA device.
 *
 * Copies from the host go through pinned staging memory: the caller's bytes are taken at once and
 * travel in stream order, so that filling the next step's batch does not wait for the device. A
 * slot of the staging memory is filled by one copy after the other, and again from its beginning
 * when its event says that all of them have been read. */
#ifdef CADRE_CUDA
#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "device/device_cuda.h"

#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        CHECK(error_ == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error_));                 \
    } while (0)

enum { NUM_SLOTS = 4, HOPPER = 90 };

static const size_t slot_bytes = (size_t)4 << 20, read_step_bytes = (size_t)64 << 10;

struct staging_slot {
    char *memory; /* pinned, or NULL before the first use */
    size_t used_bytes;
    void *native;     /* the stream of its copies: one event speaks for all */
    cudaEvent_t read; /* after the last of them */
};

static struct {
    pthread_mutex_t lock;
    struct staging_slot slots[NUM_SLOTS];
    int current;
    struct cuda_read *free_reads;
} staging = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct device cuda_device;

/* Numbers that a graph reads from the host's memory, pinned and kept with it. */
struct constant {
    struct constant *next;
    void *pinned;
};

struct cuda_graph {
    cudaGraphExec_t executable;
    struct constant *constants;
};

static struct cuda_graph *capturing; /* NULL: no capture is under way */

/* The CUDA runtime's current device belongs to the calling thread, which may be any. */
static void make_current(void)
{
    CUDA_CHECK(cudaSetDevice(cuda_device.index));
}

static void *cuda_allocate(void *context, size_t size_bytes)
{
    void *memory = NULL;

    make_current();
    if (cudaMalloc(&memory, size_bytes) != cudaSuccess) {
        cudaGetLastError(); /* forget it: the arena reports */
        return NULL;
    }
    return memory;
}

static void cuda_release(void *context, void *memory, size_t size_bytes)
{
    make_current();
    CUDA_CHECK(cudaFree(memory));
}

static void *shared_allocate(void *context, size_t size_bytes)
{
    void *memory = NULL;

    make_current();
    if (cudaMallocHost(&memory, size_bytes) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    return memory;
}

static void shared_release(void *context, void *memory, size_t size_bytes)
{
    make_current();
    CUDA_CHECK(cudaFreeHost(memory));
}

struct memory_source device_cuda_shared_memory(void)
{
    return (struct memory_source){shared_allocate, shared_release, NULL};
}

static void *cuda_stream_open(void)
{
    cudaStream_t stream;

    make_current();
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

static void cuda_stream_close(void *native)
{
    make_current();
    CUDA_CHECK(cudaStreamSynchronize(native));
    CUDA_CHECK(cudaStreamDestroy(native));
}

static void cuda_stream_wait(void *native)
{
    make_current();
    CUDA_CHECK(cudaStreamSynchronize(native));
}

/* The slot after the current one, once what it held has been read. */
static struct staging_slot *next_slot(void)
{
    struct staging_slot *slot;

    staging.current = (staging.current + 1) % NUM_SLOTS;
    slot = &staging.slots[staging.current];
    if (slot->memory == NULL) {
        CUDA_CHECK(cudaMallocHost((void **)&slot->memory, slot_bytes));
        CUDA_CHECK(cudaEventCreateWithFlags(&slot->read, cudaEventDisableTiming));
    } else {
        CUDA_CHECK(cudaEventSynchronize(slot->read));
    }
    slot->used_bytes = 0;
    return slot;
}

/* Room for size_bytes <= slot_bytes at *memory. */
static struct staging_slot *staging_take(void *native, size_t size_bytes, char **memory)
{
    struct staging_slot *slot = &staging.slots[staging.current];

    CHECK(capturing == NULL, "a copy from or to the host inside of a captured graph");
    if (slot->memory == NULL || slot->native != native ||
        size_bytes > slot_bytes - slot->used_bytes) {
        slot = next_slot();
        slot->native = native;
    }
    *memory = slot->memory + slot->used_bytes;
    slot->used_bytes += (size_bytes + 255) / 256 * 256;
    return slot;
}

static void cuda_copy_from_host(void *native, void *memory, const void *host, size_t size_bytes)
{
    make_current();
    pthread_mutex_lock(&staging.lock);
    for (size_t done = 0; done < size_bytes; done += slot_bytes) {
        const size_t part = size_bytes - done < slot_bytes ? size_bytes - done : slot_bytes;
        char *pinned;
        struct staging_slot *slot = staging_take(native, part, &pinned);

        memcpy(pinned, (const char *)host + done, part);
        CUDA_CHECK(
            cudaMemcpyAsync((char *)memory + done, pinned, part, cudaMemcpyHostToDevice, native));
        CUDA_CHECK(cudaEventRecord(slot->read, native));
    }
    pthread_mutex_unlock(&staging.lock);
}

static void cuda_copy_constant(void *native, void *memory, const void *host, size_t size_bytes)
{
    struct constant *constant;

    if (capturing == NULL) {
        cuda_copy_from_host(native, memory, host, size_bytes);
        return;
    }
    constant = calloc(1, sizeof *constant);
    CHECK(constant != NULL, "out of memory");
    CUDA_CHECK(cudaMallocHost(&constant->pinned, size_bytes));
    memcpy(constant->pinned, host, size_bytes);
    CUDA_CHECK(
        cudaMemcpyAsync(memory, constant->pinned, size_bytes, cudaMemcpyHostToDevice, native));
    constant->next = capturing->constants;
    capturing->constants = constant;
}

/* Two parts are under way at a time: while one is copied out of its slot, the next one arrives. */
static void cuda_copy_to_host(void *native, void *host, const void *memory, size_t size_bytes)
{
    const size_t num_parts = (size_bytes + slot_bytes - 1) / slot_bytes;
    struct staging_slot *slots[2] = {NULL, NULL};
    char *pinned[2] = {NULL, NULL};

    make_current();
    pthread_mutex_lock(&staging.lock);
    for (size_t i = 0; i <= num_parts; i++) {
        if (i < num_parts) {
            const size_t done = i * slot_bytes, rest = size_bytes - done;
            const size_t part = rest < slot_bytes ? rest : slot_bytes;

            slots[i % 2] = staging_take(native, part, &pinned[i % 2]);
            CUDA_CHECK(cudaMemcpyAsync(pinned[i % 2], (const char *)memory + done, part,
                                       cudaMemcpyDeviceToHost, native));
            CUDA_CHECK(cudaEventRecord(slots[i % 2]->read, native));
        }
        if (i > 0) {
            const size_t done = (i - 1) * slot_bytes, rest = size_bytes - done;

            CUDA_CHECK(cudaEventSynchronize(slots[(i - 1) % 2]->read));
            memcpy((char *)host + done, pinned[(i - 1) % 2], rest < slot_bytes ? rest : slot_bytes);
        }
    }
    pthread_mutex_unlock(&staging.lock);
}

static void cuda_copy(void *native, void *to, const void *from, size_t size_bytes)
{
    make_current();
    CUDA_CHECK(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToDevice, native));
}

/* Pinned memory that a read goes to; kept for the next read when this one is finished. */
struct cuda_read {
    void *pinned;
    size_t capacity_bytes, size_bytes;
    cudaEvent_t arrived;
    struct cuda_read *next; /* in free_reads */
};

static struct cuda_read *read_new(size_t size_bytes)
{
    struct cuda_read *read = calloc(1, sizeof *read);

    CHECK(read != NULL, "out of memory");
    read->capacity_bytes = (size_bytes / read_step_bytes + 1) * read_step_bytes;
    CUDA_CHECK(cudaMallocHost(&read->pinned, read->capacity_bytes));
    CUDA_CHECK(cudaEventCreateWithFlags(&read->arrived, cudaEventDisableTiming));
    return read;
}

static struct cuda_read *read_take(size_t size_bytes)
{
    struct cuda_read **at = &staging.free_reads, *read;

    pthread_mutex_lock(&staging.lock);
    while (*at != NULL && (*at)->capacity_bytes < size_bytes) {
        at = &(*at)->next;
    }
    read = *at;
    if (read != NULL) {
        *at = read->next;
    }
    pthread_mutex_unlock(&staging.lock);
    return read != NULL ? read : read_new(size_bytes);
}

static void *cuda_read_start(void *native, const void *memory, size_t size_bytes)
{
    struct cuda_read *read;

    CHECK(capturing == NULL, "a read inside of a captured graph");
    make_current();
    read = read_take(size_bytes);
    read->size_bytes = size_bytes;
    CUDA_CHECK(cudaMemcpyAsync(read->pinned, memory, size_bytes, cudaMemcpyDeviceToHost, native));
    CUDA_CHECK(cudaEventRecord(read->arrived, native));
    return read;
}

static void cuda_read_finish(void *pending, void *host)
{
    struct cuda_read *read = pending;

    CUDA_CHECK(cudaEventSynchronize(read->arrived));
    memcpy(host, read->pinned, read->size_bytes);
    pthread_mutex_lock(&staging.lock);
    read->next = staging.free_reads;
    staging.free_reads = read;
    pthread_mutex_unlock(&staging.lock);
}

/* Relaxed: what a library allocates at its first call of a kind is allocated, not recorded; and
 * other threads may take part, as NCCL's do. */
static void cuda_capture_begin(void *native)
{
    CHECK(capturing == NULL, "a capture within a capture");
    capturing = calloc(1, sizeof *capturing);
    CHECK(capturing != NULL, "out of memory");
    make_current();
    CUDA_CHECK(cudaStreamBeginCapture(native, cudaStreamCaptureModeRelaxed));
}

/* The nodes keep the priorities of their streams: communication comes first. */
static void *cuda_capture_end(void *native)
{
    struct cuda_graph *captured = capturing;
    cudaGraph_t graph;

    capturing = NULL;
    CUDA_CHECK(cudaStreamEndCapture(native, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&captured->executable, graph,
                                    cudaGraphInstantiateFlagUseNodePriority));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaGraphUpload(captured->executable, native));
    return captured;
}

static void cuda_graph_launch(void *native, void *graph)
{
    const struct cuda_graph *captured = graph;

    make_current();
    CUDA_CHECK(cudaGraphLaunch(captured->executable, native));
}

static void cuda_graph_free(void *graph)
{
    struct cuda_graph *captured = graph;

    CUDA_CHECK(cudaGraphExecDestroy(captured->executable));
    while (captured->constants != NULL) {
        struct constant *constant = captured->constants;

        captured->constants = constant->next;
        CUDA_CHECK(cudaFreeHost(constant->pinned));
        free(constant);
    }
    free(captured);
}

static void cuda_range_begin(const char *name)
{
    nvtxRangePushA(name);
}

static void cuda_range_end(void)
{
    nvtxRangePop();
}

static void *cuda_mark(void *native)
{
    cudaEvent_t event;

    make_current();
    CUDA_CHECK(cudaEventCreate(&event));
    CUDA_CHECK(cudaEventRecord(event, native));
    return event;
}

static double cuda_mark_seconds(void *from, void *to)
{
    float milliseconds = 0.0f;

    CUDA_CHECK(cudaEventSynchronize(to));
    CUDA_CHECK(cudaEventElapsedTime(&milliseconds, from, to));
    return (double)milliseconds / 1e3;
}

static void cuda_mark_free(void *mark)
{
    CUDA_CHECK(cudaEventDestroy(mark));
}

int device_cuda_count(void)
{
    int count = 0;

    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return count;
}

/* 90 for 9.0. */
static int compute_capability(int index)
{
    int major = 0, minor = 0;

    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    return 10 * major + minor;
}

bool device_cuda_usable(int index)
{
    return index < device_cuda_count() && compute_capability(index) == HOPPER;
}

const struct device *device_cuda(int index)
{
    const int count = device_cuda_count();

    if (index < 0 || index >= count) {
        return FAIL_NULL("no CUDA device %d: this machine has %d; use --device cpu", index, count);
    }
    if (compute_capability(index) != HOPPER) {
        return FAIL_NULL("CUDA device %d has compute capability %d.%d; cadre's kernels are for 9.0 "
                         "(H100, H200)",
                         index, compute_capability(index) / 10, compute_capability(index) % 10);
    }
    cuda_device = (struct device){
        .kind = DEVICE_CUDA,
        .index = index,
        .memory = {cuda_allocate, cuda_release, NULL},
        .stream_open = cuda_stream_open,
        .stream_close = cuda_stream_close,
        .stream_wait = cuda_stream_wait,
        .copy_from_host = cuda_copy_from_host,
        .copy_constant = cuda_copy_constant,
        .copy_to_host = cuda_copy_to_host,
        .copy = cuda_copy,
        .read_start = cuda_read_start,
        .read_finish = cuda_read_finish,
        .capture_begin = cuda_capture_begin,
        .capture_end = cuda_capture_end,
        .graph_launch = cuda_graph_launch,
        .graph_free = cuda_graph_free,
        .range_begin = cuda_range_begin,
        .range_end = cuda_range_end,
        .mark = cuda_mark,
        .mark_seconds = cuda_mark_seconds,
        .mark_free = cuda_mark_free,
    };
    make_current();
    return &cuda_device;
}

void device_cuda_share_multiprocessors(void)
{
    cuda_device.shares_multiprocessors = true;
}
#endif
