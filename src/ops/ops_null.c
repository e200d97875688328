/* The backend of DEVICE_NULL: op_NAME has checked the arguments, nothing is left to do. */
#include "ops/ops.h"

#define OPS_NULL_DEFINE(name, args)                                                                \
    static void name##_null(struct stream *stream, const struct args *args_)                       \
    {                                                                                              \
    }
OPS_LIST(OPS_NULL_DEFINE)
#undef OPS_NULL_DEFINE

static void fill_zero_null(struct stream *stream, struct tensor *x)
{
}

const struct ops *ops_null(void)
{
#define OPS_NULL_ENTRY(name, args) .name = name##_null,
    static const struct ops table = {
        .backend = "null",
        .fill_zero = fill_zero_null,
        OPS_LIST(OPS_NULL_ENTRY) /* .matmul = matmul_null, ... */
    };
#undef OPS_NULL_ENTRY
    return &table;
}
