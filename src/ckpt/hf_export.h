/* hf_export.h - writes a checkpoint's weights as a Hugging Face Mixtral directory: config.json,
 * generation_config.json, model.safetensors or shards with an index. */
#ifndef CADRE_CKPT_HF_EXPORT_H
#define CADRE_CKPT_HF_EXPORT_H

#include "ckpt/checkpoint.h"
#include "ckpt/hf_config.h"

struct hf_export {
    const struct checkpoint *checkpoint;
    const struct hf_mixtral_config *config;
    const char *directory; /* exists; the files go straight into it */
    bool as_saved;         /* each tensor in the checkpoint's type; otherwise in dtype */
    enum dtype dtype;
    int64_t max_shard_bytes;   /* of tensor data; a larger tensor has a shard of its own */
    int num_read, num_written; /* set: cadre's tensors, Hugging Face's */
};

/* A tensor missing in the checkpoint, or one that Mixtral has no place for, is an error. */
int hf_export_write(struct hf_export *request);

#endif
