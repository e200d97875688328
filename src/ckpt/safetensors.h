/* safetensors.h - reads .safetensors files: `u64 N, N bytes of JSON, packed data`.
 *
 *     struct safetensors *file = safetensors_open(path);
 *     const struct safetensors_tensor *x = safetensors_find(file, "x");
 *     safetensors_read(file, x, memory of x->size_bytes);
 *     safetensors_close(file);
 *
 * A file is bytes from outside: open accepts exactly what the format's reference reader accepts,
 * less duplicate keys. Reads use pread: they may run in several threads, and a file that shrinks
 * while open is an error, not a signal. */
#ifndef CADRE_CKPT_SAFETENSORS_H
#define CADRE_CKPT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "tensor/box.h"
#include "tensor/dtype.h"

struct safetensors;

struct safetensors_tensor {
    const char *name;
    const char *dtype_name; /* as in the file: "BF16", "F8_E4M3", ... */
    enum dtype dtype;       /* NUM_DTYPES when cadre has no such type */
    int num_dims;           /* not bounded by TENSOR_DIMS_MAX */
    const int64_t *shape;
    int64_t offset_bytes; /* from the start of the file; not aligned */
    int64_t size_bytes;
};

/* NULL with error_set() naming the file and what is wrong with it. */
struct safetensors *safetensors_open(const char *path);
void safetensors_close(struct safetensors *file); /* NULL is fine */

const char *safetensors_path(const struct safetensors *file);
int safetensors_num_tensors(const struct safetensors *file);
/* In the order of their data in the file. Everything returned lives until safetensors_close. */
const struct safetensors_tensor *safetensors_at(const struct safetensors *file, int index);
/* NULL: no such tensor (no error is set). */
const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name);
/* Value of a key of "__metadata__", or NULL. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);

/* All of the tensor's bytes. */
int safetensors_read(const struct safetensors *file, const struct safetensors_tensor *tensor,
                     void *to);
/* The bytes [first_byte, first_byte + num_bytes) of the tensor. */
int safetensors_read_range(const struct safetensors *file, const struct safetensors_tensor *tensor,
                           int64_t first_byte, int64_t num_bytes, void *to);
/* The tensor holds from_box (packed) of some global tensor; its elements of `part` are put into
 * `to`, which holds to_box (packed) with elements of to_dtype. Converts between f32, bf16 and f16.
 * part lies inside both boxes; the tensor's element count is that of from_box. */
int safetensors_read_box(const struct safetensors *file, const struct safetensors_tensor *tensor,
                         const struct box *from_box, const struct box *part, void *to,
                         const struct box *to_box, enum dtype to_dtype);

#endif
