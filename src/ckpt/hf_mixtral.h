/* hf_mixtral.h - a Hugging Face Mixtral model seen as cadre's tensors.
 *
 * Every Hugging Face tensor is, element for element, a box of one of cadre's (packed, row-major):
 *
 *     self_attention.linear_qkv.weight [G, A/G+2, D, H]   q_proj [:, 0:A/G], k_proj [:, A/G],
 * v_proj [:, A/G+1] mlp.experts.linear_fc1.weight [E, 2, F, H]          expert e: w1 (gate) [e, 0],
 * w3 (up) [e, 1] mlp.experts.linear_fc2.weight [E, H, F]             expert e: w2 [e] embedding,
 * output layer [Vpad, H]                   the first vocab_size rows; the others are zero
 *
 * so importing and exporting are loops over parts. Three layouts of the experts are read: one
 * tensor an expert (Mixtral's own, which is also the one written), fused gate_up_proj [E,2I,H] and
 * down_proj [E,H,I] (transformers 5), and the same transposed ([E,H,2I], [E,I,H]); shapes tell
 * which. */
#ifndef CADRE_CKPT_HF_MIXTRAL_H
#define CADRE_CKPT_HF_MIXTRAL_H

#include "ckpt/hf_config.h"
#include "ckpt/hf_weights.h"
#include "tensor/box.h"

enum { HF_NAME_MAX = 160 };

/* A tensor of cadre's model. */
struct hf_model_tensor {
    char name[HF_NAME_MAX];
    int kind, layer; /* layer: -1 outside of layers */
    int num_dims;
    int64_t global_shape[TENSOR_DIMS_MAX];
};

/* The Hugging Face tensor that is box `box` of it. */
struct hf_part {
    char name[HF_NAME_MAX];
    int num_dims;
    int64_t shape[3];
    struct box box;
    bool transposed; /* the last two dims of the file's tensor are swapped against `shape` */
};

/* All tensors of the model in cadre's order; the caller frees. */
struct hf_model_tensor *hf_mixtral_tensors(const struct hf_mixtral_config *config,
                                           int64_t padded_vocab_size, int *num_tensors);
/* Its parts under Mixtral's own names; the caller frees. */
struct hf_part *hf_mixtral_parts(const struct hf_mixtral_config *config,
                                 const struct hf_model_tensor *tensor, int *num_parts);

/* A model opened for reading. */
struct hf_mixtral;

struct hf_mixtral *hf_mixtral_open(const char *directory);
void hf_mixtral_close(struct hf_mixtral *model);
const struct hf_mixtral_config *hf_mixtral_config(const struct hf_mixtral *model);

/* What the files hold against what config.json asks for. Buffers of old versions
 * (rotary_emb.inv_freq) are unused but not unexpected. */
struct hf_mixtral_inventory {
    int num_used, num_unused, num_missing, num_unexpected;
    char *missing, *unexpected; /* the first few names, each followed by "\n"; NULL: none */
};

/* To be taken before anything is read: -1 if a tensor has another shape than config.json says. */
int hf_mixtral_take_inventory(struct hf_mixtral *model, struct hf_mixtral_inventory *inventory);
void hf_mixtral_inventory_free(struct hf_mixtral_inventory *inventory);

/* The type of the tensor's parts in the files; f32 if they differ. */
enum dtype hf_mixtral_dtype(struct hf_mixtral *model, const struct hf_model_tensor *tensor);
/* Assembles a box of the tensor, as elements of dtype. */
int hf_mixtral_read_box(struct hf_mixtral *model, const struct hf_model_tensor *tensor,
                        const struct box *box, enum dtype dtype, void *to);

#endif
