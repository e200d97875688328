/* checkpoint_shard.h - one safetensors file of a checkpoint: a rank's boxes. */
#ifndef CADRE_CKPT_CHECKPOINT_SHARD_H
#define CADRE_CKPT_CHECKPOINT_SHARD_H

#include "ckpt/checkpoint.h"
#include "ckpt/manifest.h"

/* Writes the request's items of this kind to directory/file->name, synced, and fills in the file's
 * size and hash. A kind without items writes no file and leaves file->name empty. */
int checkpoint_shard_write(const struct checkpoint_save_request *request, bool is_optimizer,
                           const char *directory, struct manifest_file *file);

#endif
