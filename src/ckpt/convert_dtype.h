/* convert_dtype.h - f32, bf16 and f16 into each other, as files need it. */
#ifndef CADRE_CKPT_CONVERT_DTYPE_H
#define CADRE_CKPT_CONVERT_DTYPE_H

#include <stdbool.h>
#include <stdint.h>

#include "tensor/dtype.h"

/* The same type is always possible. */
bool convert_dtype_possible(enum dtype to, enum dtype from);
/* Rounds to nearest, ties to even. The buffers do not overlap; no alignment is needed. */
void convert_dtype(void *to, enum dtype to_dtype, const void *from, enum dtype from_dtype,
                   int64_t count);

#endif
