/* hf_index.h - model.safetensors.index.json: which file holds which tensor. */
#ifndef CADRE_CKPT_HF_INDEX_H
#define CADRE_CKPT_HF_INDEX_H

#include <jansson.h>
#include <stddef.h>

struct hf_index {
    json_t *root; /* owns the names */
    const char **tensor_names;
    const char **file_names; /* [num_tensors]: plain names, in the index's own directory */
    int num_tensors;
};

/* A file name that leads out of the directory is refused. On success the caller calls
 * hf_index_free. */
int hf_index_parse(struct hf_index *index, const char *text, size_t length);
void hf_index_free(struct hf_index *index);

#endif
