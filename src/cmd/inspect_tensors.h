/* inspect_tensors.h - what `cadre inspect` prints of tensors: of a checkpoint, of safetensors
 * files. */
#ifndef CADRE_CMD_INSPECT_TENSORS_H
#define CADRE_CMD_INSPECT_TENSORS_H

#include <stdbool.h>

#include "ckpt/checkpoint.h"
#include "ckpt/safetensors.h"

/* Lines "name dtype shape bytes", then a sum; with_hash: lines "name dtype shape hash" and nothing
 * else, the hash being XXH3-128 of the tensor's bytes in global row-major order, however they are
 * cut up. */
int inspect_checkpoint(const struct checkpoint *checkpoint, bool with_hash);
int inspect_safetensors(const struct safetensors *const *files, int num_files, bool with_hash);

#endif
