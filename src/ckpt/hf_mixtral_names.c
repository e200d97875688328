/* The map between Hugging Face's names and boxes of cadre's tensors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/hf_mixtral.h"
#include "ckpt/hf_mixtral_internal.h"

static void add_tensor(struct hf_model_tensor *tensors, int *count, enum hf_tensor_kind kind,
                       int layer, const char *suffix, int num_dims, const int64_t *shape)
{
    struct hf_model_tensor *tensor = &tensors[(*count)++];

    *tensor = (struct hf_model_tensor){.kind = (int)kind, .layer = layer, .num_dims = num_dims};
    if (layer >= 0) {
        snprintf(tensor->name, sizeof tensor->name, "decoder.layers.%d.%s", layer, suffix);
    } else {
        snprintf(tensor->name, sizeof tensor->name, "%s", suffix);
    }
    memcpy(tensor->global_shape, shape, (size_t)num_dims * sizeof *shape);
}

#define SHAPE(...)                                                                                 \
    (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[])             \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }

static void add_layer(struct hf_model_tensor *tensors, int *count, int layer,
                      const struct hf_mixtral_config *c)
{
    const int64_t A = c->num_attention_heads, G = c->num_key_value_heads, D = c->head_dim;
    const int64_t H = c->hidden_size, E = c->num_local_experts, F = c->intermediate_size;

    add_tensor(tensors, count, HF_INPUT_NORM, layer, "input_layernorm.weight", SHAPE(H));
    add_tensor(tensors, count, HF_QKV, layer, "self_attention.linear_qkv.weight",
               SHAPE(G, A / G + 2, D, H));
    add_tensor(tensors, count, HF_PROJ, layer, "self_attention.linear_proj.weight",
               SHAPE(H, A * D));
    add_tensor(tensors, count, HF_MLP_NORM, layer, "pre_mlp_layernorm.weight", SHAPE(H));
    add_tensor(tensors, count, HF_ROUTER, layer, "mlp.router.weight", SHAPE(E, H));
    add_tensor(tensors, count, HF_FC1, layer, "mlp.experts.linear_fc1.weight", SHAPE(E, 2, F, H));
    add_tensor(tensors, count, HF_FC2, layer, "mlp.experts.linear_fc2.weight", SHAPE(E, H, F));
}

struct hf_model_tensor *hf_mixtral_tensors(const struct hf_mixtral_config *config,
                                           int64_t padded_vocab_size, int *num_tensors)
{
    struct hf_model_tensor *tensors =
        calloc((size_t)config->num_hidden_layers * 7 + 3, sizeof *tensors);
    const int64_t H = config->hidden_size;

    CHECK(tensors != NULL, "out of memory");
    *num_tensors = 0;
    add_tensor(tensors, num_tensors, HF_EMBEDDING, -1, "embedding.word_embeddings.weight",
               SHAPE(padded_vocab_size, H));
    for (int layer = 0; layer < config->num_hidden_layers; layer++) {
        add_layer(tensors, num_tensors, layer, config);
    }
    add_tensor(tensors, num_tensors, HF_FINAL_NORM, -1, "decoder.final_layernorm.weight", SHAPE(H));
    if (!config->tie_word_embeddings) {
        add_tensor(tensors, num_tensors, HF_OUTPUT, -1, "output_layer.weight",
                   SHAPE(padded_vocab_size, H));
    }
    return tensors;
}

/* ---- parts ---- */

static const char *const part_names[] = {
    [HF_EMBEDDING] = "model.embed_tokens.weight",
    [HF_INPUT_NORM] = "input_layernorm.weight",
    [HF_PROJ] = "self_attn.o_proj.weight",
    [HF_MLP_NORM] = "post_attention_layernorm.weight",
    [HF_ROUTER] = "block_sparse_moe.gate.weight",
    [HF_FINAL_NORM] = "model.norm.weight",
    [HF_OUTPUT] = "lm_head.weight",
};

/* The whole tensor, or its first vocab_size rows, as one part of the same dims. */
static void add_plain_part(struct hf_part *part, const struct hf_model_tensor *tensor,
                           const struct hf_mixtral_config *config)
{
    const char *name = part_names[tensor->kind];

    part->box = box_whole(tensor->global_shape, tensor->num_dims);
    if (tensor->kind == HF_EMBEDDING || tensor->kind == HF_OUTPUT) {
        part->box.size[0] = config->vocab_size;
    }
    part->num_dims = tensor->num_dims;
    memcpy(part->shape, part->box.size, (size_t)tensor->num_dims * sizeof part->shape[0]);
    if (tensor->layer >= 0) {
        snprintf(part->name, sizeof part->name, "model.layers.%d.%s", tensor->layer, name);
    } else {
        snprintf(part->name, sizeof part->name, "%s", name);
    }
}

/* q, k and v of every group: slices of the second dim of [G, A/G+2, D, H]. */
static void add_qkv_parts(struct hf_part *parts, const struct hf_model_tensor *tensor)
{
    static const char *names[3] = {"q_proj", "k_proj", "v_proj"};
    const int64_t *shape = tensor->global_shape;
    const int64_t heads_per_group = shape[1] - 2;

    for (int i = 0; i < 3; i++) {
        struct hf_part *part = &parts[i];

        part->box = box_whole(shape, 4);
        part->box.offset[1] = i == 0 ? 0 : heads_per_group + i - 1;
        part->box.size[1] = i == 0 ? heads_per_group : 1;
        part->num_dims = 2;
        part->shape[0] = shape[0] * part->box.size[1] * shape[2];
        part->shape[1] = shape[3];
        snprintf(part->name, sizeof part->name, "model.layers.%d.self_attn.%s.weight",
                 tensor->layer, names[i]);
    }
}

/* Expert e: w1 and w3 of [E, 2, F, H], or w2 of [E, H, F]. */
static void add_expert_part(struct hf_part *part, const struct hf_model_tensor *tensor, int expert,
                            int half)
{
    const int last = tensor->num_dims - 1;
    const int number = tensor->kind == HF_FC2 ? 2 : half == 0 ? 1 : 3;

    part->box = box_whole(tensor->global_shape, tensor->num_dims);
    part->box.offset[0] = expert;
    part->box.size[0] = 1;
    if (tensor->kind == HF_FC1) {
        part->box.offset[1] = half;
        part->box.size[1] = 1;
    }
    part->num_dims = 2;
    part->shape[0] = tensor->global_shape[last - 1];
    part->shape[1] = tensor->global_shape[last];
    snprintf(part->name, sizeof part->name,
             "model.layers.%d.block_sparse_moe.experts.%d.w%d.weight", tensor->layer, expert,
             number);
}

static int count_parts(const struct hf_model_tensor *tensor)
{
    switch (tensor->kind) {
    case HF_QKV:
        return 3;
    case HF_FC1:
        return (int)tensor->global_shape[0] * 2;
    case HF_FC2:
        return (int)tensor->global_shape[0];
    default:
        return 1;
    }
}

struct hf_part *hf_mixtral_parts(const struct hf_mixtral_config *config,
                                 const struct hf_model_tensor *tensor, int *num_parts)
{
    struct hf_part *parts;

    *num_parts = count_parts(tensor);
    parts = calloc((size_t)*num_parts, sizeof *parts);
    CHECK(parts != NULL, "out of memory");
    if (tensor->kind == HF_QKV) {
        add_qkv_parts(parts, tensor);
    } else if (tensor->kind == HF_FC1 || tensor->kind == HF_FC2) {
        const int halves = tensor->kind == HF_FC1 ? 2 : 1;

        for (int i = 0; i < *num_parts; i++) {
            add_expert_part(&parts[i], tensor, i / halves, i % halves);
        }
    } else {
        add_plain_part(parts, tensor, config);
    }
    return parts;
}

struct hf_part hf_mixtral_fused_part(const struct hf_model_tensor *tensor, bool transposed)
{
    struct hf_part part = {.num_dims = 3, .transposed = transposed};

    part.box = box_whole(tensor->global_shape, tensor->num_dims);
    part.shape[0] = tensor->global_shape[0];
    if (tensor->kind == HF_FC1) {
        part.shape[1] = 2 * tensor->global_shape[2];
        part.shape[2] = tensor->global_shape[3];
    } else {
        part.shape[1] = tensor->global_shape[1];
        part.shape[2] = tensor->global_shape[2];
    }
    snprintf(part.name, sizeof part.name, "model.layers.%d.mlp.experts.%s", tensor->layer,
             tensor->kind == HF_FC1 ? "gate_up_proj" : "down_proj");
    return part;
}
