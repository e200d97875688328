/* Memory, streams and copies of one CUDA device.
 *
 * Copies from the host go through pinned staging memory: the caller's bytes are taken at once and
 * travel in stream order, so that filling the next step's batch does not wait for the device. A
 * slot of the staging memory is used again when its event says that it has been read. */
#ifdef CADRE_CUDA
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <string.h>

#include "base/check.h"
#include "device/device_cuda.h"

#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        const cudaError_t error_ = (call);                                                         \
        CHECK(error_ == cudaSuccess, "%s: %s", #call, cudaGetErrorString(error_));                 \
    } while (0)

enum { NUM_SLOTS = 4 };

static const size_t slot_bytes = (size_t)4 << 20;

static struct {
    pthread_mutex_t lock;
    struct {
        void *memory; /* pinned, or NULL before the first use */
        cudaEvent_t read;
    } slots[NUM_SLOTS];
    int next;
} staging = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct device cuda_device;

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

/* The next slot, once what it held has been read. */
static int staging_take(void)
{
    const int slot = staging.next;

    staging.next = (slot + 1) % NUM_SLOTS;
    if (staging.slots[slot].memory == NULL) {
        CUDA_CHECK(cudaMallocHost(&staging.slots[slot].memory, slot_bytes));
        CUDA_CHECK(cudaEventCreateWithFlags(&staging.slots[slot].read, cudaEventDisableTiming));
    } else {
        CUDA_CHECK(cudaEventSynchronize(staging.slots[slot].read));
    }
    return slot;
}

static void cuda_copy_from_host(void *native, void *memory, const void *host, size_t size_bytes)
{
    make_current();
    pthread_mutex_lock(&staging.lock);
    for (size_t done = 0; done < size_bytes; done += slot_bytes) {
        const size_t part = size_bytes - done < slot_bytes ? size_bytes - done : slot_bytes;
        const int slot = staging_take();

        memcpy(staging.slots[slot].memory, (const char *)host + done, part);
        CUDA_CHECK(cudaMemcpyAsync((char *)memory + done, staging.slots[slot].memory, part,
                                   cudaMemcpyHostToDevice, native));
        CUDA_CHECK(cudaEventRecord(staging.slots[slot].read, native));
    }
    pthread_mutex_unlock(&staging.lock);
}

/* Two parts are under way at a time: while one is copied out of its slot, the next one arrives. */
static void cuda_copy_to_host(void *native, void *host, const void *memory, size_t size_bytes)
{
    const size_t num_parts = (size_bytes + slot_bytes - 1) / slot_bytes;
    int slots[2] = {0, 0};

    make_current();
    pthread_mutex_lock(&staging.lock);
    for (size_t i = 0; i <= num_parts; i++) {
        if (i < num_parts) {
            const size_t done = i * slot_bytes, rest = size_bytes - done;
            const int slot = slots[i % 2] = staging_take();

            CUDA_CHECK(cudaMemcpyAsync(staging.slots[slot].memory, (const char *)memory + done,
                                       rest < slot_bytes ? rest : slot_bytes,
                                       cudaMemcpyDeviceToHost, native));
            CUDA_CHECK(cudaEventRecord(staging.slots[slot].read, native));
        }
        if (i > 0) {
            const size_t done = (i - 1) * slot_bytes, rest = size_bytes - done;
            const int slot = slots[(i - 1) % 2];

            CUDA_CHECK(cudaEventSynchronize(staging.slots[slot].read));
            memcpy((char *)host + done, staging.slots[slot].memory,
                   rest < slot_bytes ? rest : slot_bytes);
        }
    }
    pthread_mutex_unlock(&staging.lock);
}

static void cuda_copy(void *native, void *to, const void *from, size_t size_bytes)
{
    make_current();
    CUDA_CHECK(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToDevice, native));
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

const struct device *device_cuda(int index)
{
    const int count = device_cuda_count();
    int major = 0, minor = 0;

    if (index < 0 || index >= count) {
        return FAIL_NULL("no CUDA device %d: this machine has %d", index, count);
    }
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    if (major != 9) {
        return FAIL_NULL("CUDA device %d has compute capability %d.%d; cadre's kernels are for 9.0 "
                         "(H100, H200)",
                         index, major, minor);
    }
    cuda_device = (struct device){
        .kind = DEVICE_CUDA,
        .index = index,
        .memory = {cuda_allocate, cuda_release, NULL},
        .stream_open = cuda_stream_open,
        .stream_close = cuda_stream_close,
        .stream_wait = cuda_stream_wait,
        .copy_from_host = cuda_copy_from_host,
        .copy_to_host = cuda_copy_to_host,
        .copy = cuda_copy,
    };
    make_current();
    return &cuda_device;
}
#endif
