/* guarded_device.h - a CPU device whose memory nobody may touch but its ops and its copies: pages
 * are PROT_NONE in between. It stands for a GPU on machines without one: host code that reads or
 * writes device memory is stopped at the spot by SIGSEGV. One thread may compute on it at a time.
 */
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

static void guarded_copy(void *native, void *to, const void *from, size_t size_bytes)
{
    guarded_enter();
    memcpy(to, from, size_bytes);
    guarded_leave();
}

static void *guarded_read_start(void *native, const void *memory, size_t size_bytes)
{
    void *read;

    guarded_enter();
    read = device_cpu()->read_start(native, memory, size_bytes);
    guarded_leave();
    return read;
}

#define GUARDED_OP(name, args)                                                                     \
    static void name##_guarded(struct stream *stream, const struct args *args_)                    \
    {                                                                                              \
        guarded_enter();                                                                           \
        ops_cpu()->name(stream, args_);                                                            \
        guarded_leave();                                                                           \
    }
OPS_LIST(GUARDED_OP)
#undef GUARDED_OP

static void fill_zero_guarded(struct stream *stream, struct tensor *x)
{
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
    device.copy_from_host = guarded_copy;
    device.copy_to_host = guarded_copy;
    device.copy = guarded_copy;
    device.read_start = guarded_read_start;
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
