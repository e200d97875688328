/* guarded_device.h - a CPU device whose memory nobody may touch but its ops and its copies: pages
 * are PROT_NONE in between. It stands for a GPU on machines without one: host code that reads or
 * writes device memory is stopped at the spot by SIGSEGV. It counts the times that the host waits,
 * and can capture: ops issued meanwhile do not run, and a launch calls guarded.replay, if set, which
 * issues them again. One thread may compute on it at a time. */
#ifndef CADRE_TESTS_TRAIN_GUARDED_DEVICE_H
#define CADRE_TESTS_TRAIN_GUARDED_DEVICE_H

#include <string.h>
#include <sys/mman.h>

#include "base/check.h"
#include "ops/ops.h"

enum { GUARDED_BLOCKS_MAX = 256 };

static struct {
    struct {
        void *memory;
        size_t size_bytes;
    } blocks[GUARDED_BLOCKS_MAX];
    int num_blocks, depth; /* depth: ops call ops */
    int num_waits;         /* for the stream, or for bytes of it */
    bool is_capturing;
    int num_captures, num_launches;
    void (*replay)(void *context);
    void *replay_context;
} guarded;

static void guarded_protect(int protection)
{
    for (int i = 0; i < guarded.num_blocks; i++) {
        CHECK(mprotect(guarded.blocks[i].memory, guarded.blocks[i].size_bytes, protection) == 0,
              "mprotect");
    }
}

static void guarded_enter(void)
{
    if (guarded.depth++ == 0) {
        guarded_protect(PROT_READ | PROT_WRITE);
    }
}

static void guarded_leave(void)
{
    if (--guarded.depth == 0) {
        guarded_protect(PROT_NONE);
    }
}

static void *guarded_allocate(void *context, size_t size_bytes)
{
    void *memory = mmap(NULL, size_bytes, guarded.depth > 0 ? PROT_READ | PROT_WRITE : PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    CHECK(memory != MAP_FAILED && guarded.num_blocks < GUARDED_BLOCKS_MAX, "guarded memory");
    guarded.blocks[guarded.num_blocks].memory = memory;
    guarded.blocks[guarded.num_blocks++].size_bytes = size_bytes;
    return memory;
}

static void guarded_release(void *context, void *memory, size_t size_bytes)
{
    for (int i = 0; i < guarded.num_blocks; i++) {
        if (guarded.blocks[i].memory == memory) {
            guarded.blocks[i] = guarded.blocks[--guarded.num_blocks];
            munmap(memory, size_bytes);
            return;
        }
    }
    PANIC("release of memory that was not allocated");
}

static void guarded_wait(void *native)
{
    CHECK(!guarded.is_capturing, "a wait while capturing");
    guarded.num_waits++;
}

static void guarded_copy(void *native, void *to, const void *from, size_t size_bytes)
{
    guarded_enter();
    memcpy(to, from, size_bytes);
    guarded_leave();
}

static void guarded_copy_from_host(void *native, void *to, const void *from, size_t size_bytes)
{
    CHECK(!guarded.is_capturing, "a copy from the host while capturing");
    guarded_copy(native, to, from, size_bytes);
}

static void guarded_copy_constant(void *native, void *to, const void *from, size_t size_bytes)
{
    if (!guarded.is_capturing) {
        guarded_copy(native, to, from, size_bytes);
    }
}

static void guarded_copy_to_host(void *native, void *to, const void *from, size_t size_bytes)
{
    guarded_wait(native);
    guarded_copy(native, to, from, size_bytes);
}

static void guarded_copy_within(void *native, void *to, const void *from, size_t size_bytes)
{
    if (!guarded.is_capturing) {
        guarded_copy(native, to, from, size_bytes);
    }
}

static void *guarded_read_start(void *native, const void *memory, size_t size_bytes)
{
    void *read;

    CHECK(!guarded.is_capturing, "a read while capturing");
    guarded_enter();
    read = device_cpu()->read_start(native, memory, size_bytes);
    guarded_leave();
    return read;
}

static void guarded_read_finish(void *read, void *host)
{
    guarded.num_waits++;
    device_cpu()->read_finish(read, host);
}

static void guarded_capture_begin(void *native)
{
    guarded.is_capturing = true;
    guarded.num_captures++;
}

static void *guarded_capture_end(void *native)
{
    guarded.is_capturing = false;
    return &guarded;
}

static void guarded_graph_launch(void *native, void *graph)
{
    guarded.num_launches++;
    if (guarded.replay != NULL) {
        guarded.replay(guarded.replay_context);
    }
}

static void guarded_graph_free(void *graph)
{
}

#define GUARDED_OP(name, args)                                                                     \
    static void name##_guarded(struct stream *stream, const struct args *args_)                    \
    {                                                                                              \
        if (guarded.is_capturing) {                                                                \
            return;                                                                                \
        }                                                                                          \
        guarded_enter();                                                                           \
        ops_cpu()->name(stream, args_);                                                            \
        guarded_leave();                                                                           \
    }
OPS_LIST(GUARDED_OP)
#undef GUARDED_OP

static void fill_zero_guarded(struct stream *stream, struct tensor *x)
{
    if (guarded.is_capturing) {
        return;
    }
    guarded_enter();
    ops_cpu()->fill_zero(stream, x);
    guarded_leave();
}

/* DEVICE_CUDA, so that whoever asks for the kind does what it does on a GPU. */
static const struct device *guarded_device(void)
{
    static struct device device;

    device = *device_cpu();
    device.kind = DEVICE_CUDA;
    device.memory = (struct memory_source){guarded_allocate, guarded_release, NULL};
    device.stream_wait = guarded_wait;
    device.copy_from_host = guarded_copy_from_host;
    device.copy_constant = guarded_copy_constant;
    device.copy_to_host = guarded_copy_to_host;
    device.copy = guarded_copy_within;
    device.read_start = guarded_read_start;
    device.read_finish = guarded_read_finish;
    device.capture_begin = guarded_capture_begin;
    device.capture_end = guarded_capture_end;
    device.graph_launch = guarded_graph_launch;
    device.graph_free = guarded_graph_free;
    return &device;
}

static const struct ops *guarded_ops(void)
{
#define GUARDED_ENTRY(name, args) .name = name##_guarded,
    static const struct ops table = {
        .backend = "guarded",
        OPS_LIST(GUARDED_ENTRY).fill_zero = fill_zero_guarded,
    };
#undef GUARDED_ENTRY
    return &table;
}

#endif
