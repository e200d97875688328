/* safetensors_dtype.h - the element types of the safetensors format: shared by reader and writer.
 */
#ifndef CADRE_CKPT_SAFETENSORS_DTYPE_H
#define CADRE_CKPT_SAFETENSORS_DTYPE_H

#include "tensor/dtype.h"

struct safetensors_dtype {
    const char *name;
    int bits;
    enum dtype dtype; /* NUM_DTYPES: only files know this type */
};

/* NULL: the format has no such type. */
const struct safetensors_dtype *safetensors_dtype_find(const char *name);
/* Place in the canonical order of types: files are written with the highest rank first. */
int safetensors_dtype_rank(enum dtype dtype);

#endif
