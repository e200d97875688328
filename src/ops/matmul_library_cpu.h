/* matmul_library_cpu.h - what matmul_cpu.c needs of a matrix library. One of matmul_onednn_cpu.c
 * and matmul_openblas_cpu.c is in the build. */
#ifndef CADRE_OPS_MATMUL_LIBRARY_CPU_H
#define CADRE_OPS_MATMUL_LIBRARY_CPU_H

#include <stdbool.h>

#include "ops/ops.h"

/* Does this machine multiply BF16 faster than F32? Otherwise matmul_library_run gets F32 only. */
bool matmul_library_has_bf16(void);
/* The product as ops.h defines it; no dim is zero. */
void matmul_library_run(struct stream *stream, const struct matmul *a);

#endif
