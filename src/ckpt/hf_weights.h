/* hf_weights.h - the tensors of a Hugging Face directory: model.safetensors, or several files named
 * by model.safetensors.index.json. */
#ifndef CADRE_CKPT_HF_WEIGHTS_H
#define CADRE_CKPT_HF_WEIGHTS_H

#include <stdbool.h>

#include "ckpt/safetensors.h"

#define HF_SINGLE_FILE "model.safetensors"
#define HF_INDEX_FILE "model.safetensors.index.json"

struct hf_tensor {
    const struct safetensors *file;
    const struct safetensors_tensor *tensor;
    bool used; /* the caller's mark: what has no place in the model must not go unnoticed */
};

struct hf_weights;

bool hf_weights_are_at(const char *directory);
struct hf_weights *hf_weights_open(const char *directory);
void hf_weights_close(struct hf_weights *weights);
int hf_weights_num_tensors(const struct hf_weights *weights);
/* Sorted by name. */
struct hf_tensor *hf_weights_at(struct hf_weights *weights, int index);
/* The files that hold them. */
const struct safetensors *const *hf_weights_files(const struct hf_weights *weights, int *num_files);
/* NULL: no such tensor. */
struct hf_tensor *hf_weights_find(struct hf_weights *weights, const char *name);

#endif
