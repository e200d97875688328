#include "device/device.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "base/check.h"
#include "base/host_memory.h"

/* Pages straight from the kernel: zero until touched, so a reserved block costs nothing until used,
 * and huge pages where the kernel grants them. The kernel would promise more than it has and kill
 * the process that touches it, without a word: it is asked first what it has. */
static void *cpu_allocate(void *context, size_t size_bytes)
{
    void *memory;

    if ((uint64_t)size_bytes > (uint64_t)host_memory_available_bytes("")) {
        return NULL;
    }
    memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED) {
        return NULL;
    }
    madvise(memory, size_bytes, MADV_HUGEPAGE);
    return memory;
}

static void cpu_release(void *context, void *memory, size_t size_bytes)
{
    munmap(memory, size_bytes);
}

static void cpu_copy(void *native, void *to, const void *from, size_t size_bytes)
{
    memcpy(to, from, size_bytes);
}

/* Addresses are never dereferenced; any distinct aligned number will do. */
static void *null_allocate(void *context, size_t size_bytes)
{
    static uintptr_t next = (uintptr_t)1 << 46;

    next += (size_bytes + 4095) / 4096 * 4096;
    return (void *)(next - (size_bytes + 4095) / 4096 * 4096);
}

static void null_release(void *context, void *memory, size_t size_bytes)
{
}

static void null_copy_from_host(void *native, void *memory, const void *host, size_t size_bytes)
{
}

static void null_copy_to_host(void *native, void *host, const void *memory, size_t size_bytes)
{
    memset(host, 0, size_bytes);
}

/* Work has run when the caller goes on, so there is nothing to open or to wait for. */
static void *immediate_open(void)
{
    return NULL;
}

static void immediate_do_nothing(void *native)
{
}

struct immediate_read {
    size_t size_bytes;
    char bytes[];
};

static struct immediate_read *read_new(size_t size_bytes)
{
    struct immediate_read *read = calloc(1, sizeof *read + size_bytes);

    CHECK(read != NULL, "out of memory");
    read->size_bytes = size_bytes;
    return read;
}

static void *cpu_read_start(void *native, const void *memory, size_t size_bytes)
{
    struct immediate_read *read = read_new(size_bytes);

    memcpy(read->bytes, memory, size_bytes);
    return read;
}

static void *null_read_start(void *native, const void *memory, size_t size_bytes)
{
    return read_new(size_bytes);
}

static void immediate_read_finish(void *pending, void *host)
{
    struct immediate_read *read = pending;

    memcpy(host, read->bytes, read->size_bytes);
    free(read);
}

static void range_begin_nothing(const char *name)
{
}

static void range_end_nothing(void)
{
}

static void *immediate_mark(void *native)
{
    struct timespec *mark = malloc(sizeof *mark);

    CHECK(mark != NULL, "out of memory");
    clock_gettime(CLOCK_MONOTONIC, mark);
    return mark;
}

static double immediate_mark_seconds(void *from, void *to)
{
    const struct timespec *a = from, *b = to;

    return (double)(b->tv_sec - a->tv_sec) + (double)(b->tv_nsec - a->tv_nsec) * 1e-9;
}

const struct device *device_cpu(void)
{
    static const struct device cpu = {
        .kind = DEVICE_CPU,
        .memory = {cpu_allocate, cpu_release, NULL},
        .stream_open = immediate_open,
        .stream_close = immediate_do_nothing,
        .stream_wait = immediate_do_nothing,
        .copy_from_host = cpu_copy,
        .copy_constant = cpu_copy,
        .copy_to_host = cpu_copy,
        .copy = cpu_copy,
        .read_start = cpu_read_start,
        .read_finish = immediate_read_finish,
        .range_begin = range_begin_nothing,
        .range_end = range_end_nothing,
        .mark = immediate_mark,
        .mark_seconds = immediate_mark_seconds,
        .mark_free = free,
    };
    return &cpu;
}

const struct device *device_null(void)
{
    static const struct device null = {
        .kind = DEVICE_NULL,
        .memory = {null_allocate, null_release, NULL},
        .stream_open = immediate_open,
        .stream_close = immediate_do_nothing,
        .stream_wait = immediate_do_nothing,
        .copy_from_host = null_copy_from_host,
        .copy_constant = null_copy_from_host,
        .copy_to_host = null_copy_to_host,
        .copy = null_copy_from_host,
        .read_start = null_read_start,
        .read_finish = immediate_read_finish,
        .range_begin = range_begin_nothing,
        .range_end = range_end_nothing,
        .mark = immediate_mark,
        .mark_seconds = immediate_mark_seconds,
        .mark_free = free,
    };
    return &null;
}

struct stream *stream_create(const struct device *device, const struct ops *ops)
{
    struct stream *stream = calloc(1, sizeof *stream);

    CHECK(stream != NULL, "out of memory");
    stream->device = device;
    stream->ops = ops;
    stream->scratch = arena_create("op scratch", &device->memory);
    stream->native = device->stream_open();
    return stream;
}

void stream_destroy(struct stream *stream)
{
    if (stream != NULL) {
        stream->device->stream_close(stream->native);
        arena_destroy(stream->scratch);
        free(stream);
    }
}

void stream_wait(struct stream *stream)
{
    stream->device->stream_wait(stream->native);
}

void stream_copy_from_host(struct stream *stream, void *memory, const void *host, size_t size)
{
    stream->device->copy_from_host(stream->native, memory, host, size);
}

void stream_copy_constant(struct stream *stream, void *memory, const void *host, size_t size)
{
    stream->device->copy_constant(stream->native, memory, host, size);
}

void stream_copy_to_host(struct stream *stream, void *host, const void *memory, size_t size)
{
    stream->device->copy_to_host(stream->native, host, memory, size);
}

void stream_copy(struct stream *stream, void *to, const void *from, size_t size)
{
    stream->device->copy(stream->native, to, from, size);
}

void *stream_read_start(struct stream *stream, const void *memory, size_t size)
{
    return stream->device->read_start(stream->native, memory, size);
}

void stream_read_finish(struct stream *stream, void *read, void *host)
{
    stream->device->read_finish(read, host);
}

bool device_can_capture(const struct device *device)
{
    return device->capture_begin != NULL;
}

void stream_capture_begin(struct stream *stream)
{
    stream->device->capture_begin(stream->native);
}

void *stream_capture_end(struct stream *stream)
{
    return stream->device->capture_end(stream->native);
}

void stream_graph_launch(struct stream *stream, void *graph)
{
    stream->device->graph_launch(stream->native, graph);
}

void stream_graph_free(struct stream *stream, void *graph)
{
    if (graph != NULL) {
        stream->device->graph_free(graph);
    }
}

void *stream_mark(struct stream *stream)
{
    return stream->device->mark(stream->native);
}

double stream_mark_seconds(struct stream *stream, void *from, void *to)
{
    return stream->device->mark_seconds(from, to);
}

void stream_mark_free(struct stream *stream, void *mark)
{
    stream->device->mark_free(mark);
}
