/* device.h - where memory lives and work runs.
 *
 * A stream is an order of work on a device: ops are issued to a stream and run in the order issued.
 * On the CPU they run at once, in the caller; on CUDA later, and the host waits only where the
 * layer code says so (stream_wait). DEVICE_NULL measures: its memory has addresses but no bytes and
 * its ops do nothing, so that running a step on it yields the exact sizes of every arena. */
#ifndef CADRE_DEVICE_DEVICE_H
#define CADRE_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/arena.h"

struct ops;

enum device_kind { DEVICE_CPU, DEVICE_NULL, DEVICE_CUDA };

struct device {
    enum device_kind kind;
    int index;
    bool shares_multiprocessors; /* transfers between ranks may hold some while a kernel runs */
    struct memory_source memory;
    /* What the stream_ functions below do. native is struct stream's. */
    void *(*stream_open)(void); /* returns native */
    void (*stream_close)(void *native);
    void (*stream_wait)(void *native);
    void (*copy_from_host)(void *native, void *device_memory, const void *host, size_t size_bytes);
    void (*copy_to_host)(void *native, void *host, const void *device_memory, size_t size_bytes);
    void (*copy)(void *native, void *to, const void *from, size_t size_bytes);
    void (*copy_constant)(void *native, void *device_memory, const void *host, size_t size_bytes);
    void *(*read_start)(void *native, const void *device_memory, size_t size_bytes);
    void (*read_finish)(void *read, void *host);
    /* NULL where work runs at once: nothing can be captured. */
    void (*capture_begin)(void *native);
    void *(*capture_end)(void *native);
    void (*graph_launch)(void *native, void *graph);
    void (*graph_free)(void *graph);
    void (*range_begin)(const char *name); /* for a profiler of the device's maker */
    void (*range_end)(void);
    void *(*mark)(void *native); /* returns the mark */
    double (*mark_seconds)(void *from, void *to);
    void (*mark_free)(void *mark);
};

struct stream {
    const struct device *device;
    const struct ops *ops;
    struct arena *scratch; /* of one op call: released when the op returns */
    void *native;          /* cudaStream_t, or NULL */
};

const struct device *device_cpu(void);
const struct device *device_null(void);

struct stream *stream_create(const struct device *device, const struct ops *ops);
void stream_destroy(struct stream *stream);
/* The host waits until all work issued to the stream is done. */
void stream_wait(struct stream *stream);
/* Host to device and back, in stream order; when they return, the host's memory may be used again.
 */
void stream_copy_from_host(struct stream *stream, void *memory, const void *host, size_t size);
void stream_copy_to_host(struct stream *stream, void *host, const void *memory, size_t size);
/* As stream_copy_from_host, for what is the same in every step: in a capture the bytes become part
 * of the graph. */
void stream_copy_constant(struct stream *stream, void *memory, const void *host, size_t size);
/* A read that the host waits for later: the bytes are those of this moment in the stream's work,
 * which goes on. Each start has its finish. */
void *stream_read_start(struct stream *stream, const void *memory, size_t size);
void stream_read_finish(struct stream *stream, void *read, void *host);
/* Within the device, in stream order. */
void stream_copy(struct stream *stream, void *to, const void *from, size_t size);

/* Work issued between begin and end does not run: it becomes a graph, which runs each time that it
 * is launched, on the same addresses and with the same numbers in its calls. Nothing in it may copy
 * from or to the host but constants, or wait. One graph is captured at a time. */
bool device_can_capture(const struct device *device);
void stream_capture_begin(struct stream *stream);
void *stream_capture_end(struct stream *stream); /* returns the graph */
void stream_graph_launch(struct stream *stream, void *graph);
/* NULL is fine. Its last launch must be done. */
void stream_graph_free(struct stream *stream, void *graph);

/* A moment in the stream's work, for measuring; the stream_mark_seconds from one to a later one
 * waits for both. */
void *stream_mark(struct stream *stream);
double stream_mark_seconds(struct stream *stream, void *from, void *to);
void stream_mark_free(struct stream *stream, void *mark);

#endif
