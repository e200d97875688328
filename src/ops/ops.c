/* op_NAME: checks, then the stream's table. An op's scratch lives as long as its call. */
#include "ops/ops.h"

#include "base/check.h"
#include "ops/ops_check.h"

#define OPS_DEFINE(name, args)                                                                     \
    void op_##name(struct stream *stream, const struct args *args_)                                \
    {                                                                                              \
        const struct arena_mark mark = arena_mark(stream->scratch);                                \
                                                                                                   \
        check_##name(args_);                                                                       \
        stream->ops->name(stream, args_);                                                          \
        arena_release(stream->scratch, mark);                                                      \
    }
OPS_LIST(OPS_DEFINE)
#undef OPS_DEFINE

void op_fill_zero(struct stream *stream, struct tensor *x)
{
    CHECK(x != NULL, "nothing to fill");
    stream->ops->fill_zero(stream, x);
}
