#include "train/upcycle.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "moe/upcycle.h"
#include "train/train_checkpoint.h"

struct upcycling {
    const struct checkpoint *dense;
    struct upcycle_plan plan;
    struct trainer *trainer;
};

/* Where the parameter lies in its layer: "decoder.layers.3.mlp.experts.linear_fc1.weight" is
 * "linear_fc1.weight" of the experts of layer 3. NULL: no parameter of experts. */
static const char *expert_part(const char *name)
{
    const char *found = strstr(name, ".mlp.experts.");

    return found != NULL ? found + strlen(".mlp.experts.") : NULL;
}

/* What this rank holds of one expert, in the dense tensor: without the expert dim, and its FFN dim
 * is g times as long. */
static struct checkpoint_read dense_read(const struct upcycling *u, const struct param *param,
                                         int ffn_dim, int shard)
{
    struct checkpoint_read read = {.dtype = DTYPE_F32, .num_dims = param->num_dims - 1};

    read.box.num_dims = read.num_dims;
    for (int i = 1; i < param->num_dims; i++) {
        read.global_shape[i - 1] = param->global_shape[i];
        read.box.offset[i - 1] = param->box.offset[i];
        read.box.size[i - 1] = param->box.size[i];
    }
    if (ffn_dim >= 0) {
        read.box.offset[ffn_dim] += shard * read.global_shape[ffn_dim];
        read.global_shape[ffn_dim] *= u->plan.granularity;
    }
    return read;
}

static void store(const struct param *param, void *host, int64_t first, const float *values,
                  int64_t count, double scale)
{
    for (int64_t i = 0; i < count; i++) {
        const float value = (float)((double)values[i] * scale);

        if (param->value.dtype == DTYPE_BF16) {
            ((bf16_t *)host)[first + i] = bf16_from_float(value);
        } else {
            ((float *)host)[first + i] = value;
        }
    }
}

/* Every local expert is its shard of the dense block, scaled. */
static int read_experts(const struct upcycling *u, const struct param *param, const char *part,
                        void *host)
{
    const bool is_fc2_bias = strcmp(part, "linear_fc2.bias") == 0;
    const int ffn_dim = is_fc2_bias ? -1 : 1; /* of [2,F,H], [H,F] and [2,F] alike */
    const double scale = is_fc2_bias ? 1.0 : upcycle_weight_scale(&u->plan);
    const int64_t count = box_num_elements(&param->box) / param->box.size[0];
    float *values = malloc((size_t)count * sizeof *values);
    char name[PARAM_NAME_MAX];
    int result = 0;

    CHECK(values != NULL, "out of memory");
    snprintf(name, sizeof name, "%.*s.mlp.%s", (int)(strstr(param->name, ".mlp.") - param->name),
             param->name, part);
    for (int64_t e = 0; e < param->box.size[0] && result == 0; e++) {
        const int shard = upcycle_shard(&u->plan, (int)(param->box.offset[0] + e));
        struct checkpoint_read read = dense_read(u, param, ffn_dim, shard);

        read.name = name;
        result = checkpoint_read_box(u->dense, &read, values);
        if (result == 0) {
            store(param, host, e * count, values, count, scale);
        }
    }
    free(values);
    return result;
}

/* host holds the initial rows; the row of a virtual copy is repeated for its experts. */
static void repeat_router_rows(const struct upcycling *u, const struct param *param, void *host)
{
    const size_t row_bytes =
        (size_t)param->value.dim[1] * (size_t)dtype_size_bytes(param->value.dtype);

    for (int e = u->plan.num_experts - 1; e >= 0; e--) {
        memmove((char *)host + (size_t)e * row_bytes,
                (char *)host + (size_t)upcycle_router_row(&u->plan, e) * row_bytes, row_bytes);
    }
}

static int read_upcycled(void *context, const struct param *param, void *host)
{
    const struct upcycling *u = context;
    const char *part = expert_part(param->name);
    struct checkpoint_read read = {.name = param->name,
                                   .dtype = param->value.dtype,
                                   .num_dims = param->num_dims,
                                   .box = param->box};

    if (part != NULL) {
        return read_experts(u, param, part, host);
    }
    if (strstr(param->name, ".mlp.router.") != NULL) {
        repeat_router_rows(u, param, host);
        return 0;
    }
    if (strstr(param->name, ".mlp.shared_experts.") != NULL) {
        return 0; /* stays as it was drawn */
    }
    memcpy(read.global_shape, param->global_shape, sizeof read.global_shape);
    read.allow_dim0_difference = strcmp(param->name, "output_layer.weight") == 0 ||
                                 strcmp(param->name, "embedding.word_embeddings.weight") == 0;
    return checkpoint_read_box(u->dense, &read, host);
}

int upcycle_restore(struct trainer *trainer, const struct checkpoint *dense)
{
    const struct model_config *config = &trainer->config;
    struct upcycling u = {.dense = dense,
                          .plan = {.num_experts = config->num_experts,
                                   .granularity = (int)trainer->options->moe_upcycling_granularity,
                                   .topk = config->router_rule.topk,
                                   .pre_softmax = config->router_rule.pre_softmax,
                                   .activation = config->activation},
                          .trainer = trainer};

    if (config->num_experts == 0) {
        return error_set("--moe-use-upcycling needs --num-experts");
    }
    if (checkpoint_find_tensor(dense, "decoder.layers.0.mlp.router.weight") != NULL) {
        return error_set("--moe-use-upcycling wants a dense checkpoint; this one has experts (drop "
                         "the flag to go on training it)");
    }
    log_info("upcycling the dense model to %d experts of FFN size %lld", config->num_experts,
             (long long)config->moe_ffn_hidden_size);
    TRY(param_list_read(&trainer->params, trainer->stream,
                        &(struct param_reader){.read = read_upcycled, .context = &u}));
    optimizer_reset_masters(&trainer->optimizer, trainer->stream);
    return 0;
}
