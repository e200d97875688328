/* ops_cpu.h - the CPU backend's functions, one for each op of ops.h: NAME_cpu(stream, args). They
 * trust their arguments, which op_NAME has checked, and may allocate from stream->scratch. */
#ifndef CADRE_OPS_OPS_CPU_H
#define CADRE_OPS_OPS_CPU_H

#include "ops/ops.h"

#define OPS_CPU_DECLARE(name, args)                                                                \
    void name##_cpu(struct stream *stream, const struct args *args_);
OPS_LIST(OPS_CPU_DECLARE)
#undef OPS_CPU_DECLARE
void fill_zero_cpu(struct stream *stream, struct tensor *x);

#endif
