/* hf_mixtral_internal.h - between hf_mixtral_names.c and hf_mixtral.c. */
#ifndef CADRE_CKPT_HF_MIXTRAL_INTERNAL_H
#define CADRE_CKPT_HF_MIXTRAL_INTERNAL_H

#include "ckpt/hf_mixtral.h"

enum hf_tensor_kind {
    HF_EMBEDDING,
    HF_INPUT_NORM,
    HF_QKV,
    HF_PROJ,
    HF_MLP_NORM,
    HF_ROUTER,
    HF_FC1,
    HF_FC2,
    HF_FINAL_NORM,
    HF_OUTPUT
};

/* All experts in one tensor, under transformers 5's names: gate_up_proj or down_proj. */
struct hf_part hf_mixtral_fused_part(const struct hf_model_tensor *tensor, bool transposed);

#endif
