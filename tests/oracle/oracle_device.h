/* oracle_device.h - a GPU whose results the host reads as if they were its own: memory that both
 * address, and ops that are done when they return. Slow, and the same arithmetic. */
#ifndef CADRE_TESTS_ORACLE_ORACLE_DEVICE_H
#define CADRE_TESTS_ORACLE_ORACLE_DEVICE_H

#include "base/check.h"
#include "device/device_cuda.h"
#include "device/device_select.h"
#include "ops/ops.h"

static const struct ops *oracle_real_ops;

#define ORACLE_OP(name, args)                                                                      \
    static inline void name##_oracle(struct stream *stream, const struct args *args_)              \
    {                                                                                              \
        oracle_real_ops->name(stream, args_);                                                      \
        stream_wait(stream);                                                                       \
    }
OPS_LIST(ORACLE_OP)
#undef ORACLE_OP

static inline void fill_zero_oracle(struct stream *stream, struct tensor *x)
{
    oracle_real_ops->fill_zero(stream, x);
    stream_wait(stream);
}

static inline const struct ops *oracle_ops(const struct ops *ops)
{
#define ORACLE_ENTRY(name, args) .name = name##_oracle,
    static const struct ops table = {
        .backend = "oracle",
        OPS_LIST(ORACLE_ENTRY).fill_zero = fill_zero_oracle,
    };
#undef ORACLE_ENTRY

    oracle_real_ops = ops;
    return &table;
}

static inline struct memory_source oracle_memory(const struct device *device)
{
    return device->kind == DEVICE_CUDA ? device_cuda_shared_memory() : device->memory;
}

#endif
