/* safetensors_writer.h - writes .safetensors files: declare every tensor, then stream their data.
 *
 *     w = safetensors_writer_create();
 *     safetensors_writer_declare(w, "x", DTYPE_F32, shape, num_dims);  ... for each
 *     safetensors_writer_begin(w, path);
 *     for i in file order: append all bytes of tensor safetensors_writer_at(w, i)
 *     safetensors_writer_finish(w, hash);      -- complete and synced to disk
 *     safetensors_writer_destroy(w);           -- removes the file unless finished
 *
 * The file is canonical: the bytes that the format's own library writes for the same tensors. The
 * directory entry is the caller's to sync; safetensors_save does it all for tensors in memory. */
#ifndef CADRE_CKPT_SAFETENSORS_WRITER_H
#define CADRE_CKPT_SAFETENSORS_WRITER_H

#include <stddef.h>
#include <stdint.h>

#include "ckpt/content_hash.h"
#include "tensor/tensor.h"

struct safetensors_writer;

struct safetensors_writer *safetensors_writer_create(void);
void safetensors_writer_destroy(struct safetensors_writer *writer);
/* An entry of "__metadata__"; "format": "pt" is always there. */
void safetensors_writer_metadata(struct safetensors_writer *writer, const char *key,
                                 const char *value);
/* The name must be new. Returns nothing: a name declared twice is the caller's bug. */
void safetensors_writer_declare(struct safetensors_writer *writer, const char *name,
                                enum dtype dtype, const int64_t *shape, int num_dims);
/* Creates (or truncates) the file and writes the header. */
int safetensors_writer_begin(struct safetensors_writer *writer, const char *path);

int safetensors_writer_num_tensors(const struct safetensors_writer *writer);
/* Which declaration (0, 1, ... in order of the calls) is the index-th tensor in the file. */
int safetensors_writer_at(const struct safetensors_writer *writer, int index);
/* The next bytes of the data; a tensor may come in pieces. */
int safetensors_writer_append(struct safetensors_writer *writer, const void *bytes, size_t length);
/* Syncs and closes; gives the hash and size of the whole file. */
int safetensors_writer_finish(struct safetensors_writer *writer, char hash[CONTENT_HASH_TEXT_BYTES],
                              int64_t *size_bytes);

/* Writes the tensors (host memory) to path: atomic and durable. */
int safetensors_save(const char *path, const char *const *names, const struct tensor *tensors,
                     int num_tensors);

#endif
