#include "ckpt/hf_mixtral.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/checked.h"
#include "base/path.h"
#include "ckpt/convert_dtype.h"
#include "ckpt/hf_mixtral_internal.h"

enum expert_layout { EXPERTS_SINGLE, EXPERTS_FUSED, EXPERTS_FUSED_TRANSPOSED };
enum { LISTED_NAMES_MAX = 5 };

struct hf_mixtral {
    char path[PATH_LENGTH_MAX];
    struct hf_mixtral_config config;
    struct hf_weights *weights;
    enum expert_layout layout;
};

/* ---- finding ---- */

/* A part under its name, or with Mixtral's block called "mlp" as in transformers 5. */
static struct hf_tensor *find_part(struct hf_mixtral *model, const struct hf_part *part)
{
    static const char old_block[] = ".block_sparse_moe.", new_block[] = ".mlp.";
    struct hf_tensor *found = hf_weights_find(model->weights, part->name);
    const char *block = strstr(part->name, old_block);
    char renamed[HF_NAME_MAX];

    if (found != NULL || block == NULL) {
        return found;
    }
    snprintf(renamed, sizeof renamed, "%.*s%s%s", (int)(block - part->name), part->name, new_block,
             block + strlen(old_block));
    return hf_weights_find(model->weights, renamed);
}

static bool has_shape(const struct hf_tensor *found, const struct hf_part *part)
{
    const int last = part->num_dims - 1;

    if (found->tensor->num_dims != part->num_dims) {
        return false;
    }
    for (int i = 0; i <= last; i++) {
        const int from = part->transposed && i >= last - 1 ? 2 * last - 1 - i : i;

        if (found->tensor->shape[i] != part->shape[from]) {
            return false;
        }
    }
    return true;
}

/* The parts of a tensor as this model's files hold them; the caller frees. */
static struct hf_part *list_parts(const struct hf_mixtral *model,
                                  const struct hf_model_tensor *tensor, int *num_parts)
{
    struct hf_part *part;

    if (model->layout == EXPERTS_SINGLE || (tensor->kind != HF_FC1 && tensor->kind != HF_FC2)) {
        return hf_mixtral_parts(&model->config, tensor, num_parts);
    }
    part = malloc(sizeof *part);
    CHECK(part != NULL, "out of memory");
    *part = hf_mixtral_fused_part(tensor, model->layout == EXPERTS_FUSED_TRANSPOSED);
    *num_parts = 1;
    return part;
}

static int shape_error(const struct hf_tensor *found, const struct hf_part *part)
{
    char text[256] = "", wanted[128] = "";

    for (int i = 0; i < found->tensor->num_dims && strlen(text) < 200; i++) {
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%lld", i > 0 ? ", " : "",
                 (long long)found->tensor->shape[i]);
    }
    for (int i = 0; i < part->num_dims; i++) {
        snprintf(wanted + strlen(wanted), sizeof wanted - strlen(wanted), "%s%lld",
                 i > 0 ? ", " : "", (long long)part->shape[i]);
    }
    return error_set("%s: %s has shape [%s], config.json asks for [%s]",
                     safetensors_path(found->file), found->tensor->name, text, wanted);
}

/* ---- opening ---- */

/* One tensor of each kind decides, so a gate_up_proj that fits both ways (H = 2I) is decided by
 * down_proj. */
static int choose_layout(struct hf_mixtral *model)
{
    int num_tensors;
    struct hf_model_tensor *tensors =
        hf_mixtral_tensors(&model->config, model->config.vocab_size, &num_tensors);
    bool fits[2] = {true, true}, fused = false;
    char shape_text[HF_NAME_MAX] = "";

    for (int i = 0; i < num_tensors; i++) {
        const bool is_expert = tensors[i].kind == HF_FC1 || tensors[i].kind == HF_FC2;

        for (int transposed = 0; is_expert && transposed < 2; transposed++) {
            const struct hf_part part = hf_mixtral_fused_part(&tensors[i], transposed != 0);
            const struct hf_tensor *found = find_part(model, &part);

            if (found != NULL) {
                fused = true;
                fits[transposed] = fits[transposed] && has_shape(found, &part);
                snprintf(shape_text, sizeof shape_text, "%s", part.name);
            }
        }
    }
    free(tensors);
    model->layout = !fused ? EXPERTS_SINGLE : fits[0] ? EXPERTS_FUSED : EXPERTS_FUSED_TRANSPOSED;
    if (fused && fits[0] == fits[1]) {
        return error_set("%s: the shapes of the fused experts (such as %s) fit %s: [E, 2I, H] with "
                         "[E, H, I], and [E, H, 2I] with [E, I, H]",
                         model->path, shape_text, fits[0] ? "both layouts" : "neither layout");
    }
    return 0;
}

/* Bounds the work by the size of the files, whatever config.json claims. */
static int check_counts(const struct hf_mixtral *model)
{
    const struct hf_mixtral_config *c = &model->config;
    int64_t least;

    if (!checked_mul(c->num_hidden_layers, 9, &least) ||
        least > hf_weights_num_tensors(model->weights)) {
        return error_set("%s: %lld layers need more than the %d tensors there are", model->path,
                         (long long)c->num_hidden_layers, hf_weights_num_tensors(model->weights));
    }
    return 0;
}

struct hf_mixtral *hf_mixtral_open(const char *directory)
{
    struct hf_mixtral *model = calloc(1, sizeof *model);

    CHECK(model != NULL, "out of memory");
    if (path_format(model->path, "%s", directory) != 0 ||
        hf_config_read(&model->config, directory) != 0) {
        hf_mixtral_close(model);
        return NULL;
    }
    model->weights = hf_weights_open(directory);
    if (model->weights == NULL || check_counts(model) != 0 || choose_layout(model) != 0) {
        hf_mixtral_close(model);
        return NULL;
    }
    return model;
}

void hf_mixtral_close(struct hf_mixtral *model)
{
    if (model != NULL) {
        hf_weights_close(model->weights);
        free(model);
    }
}

const struct hf_mixtral_config *hf_mixtral_config(const struct hf_mixtral *model)
{
    return &model->config;
}

/* ---- inventory ---- */

static void list_name(char **list, int count, const char *name)
{
    const size_t length = *list != NULL ? strlen(*list) : 0;

    if (count > LISTED_NAMES_MAX) {
        return;
    }
    *list = realloc(*list, length + strlen(name) + 5);
    CHECK(*list != NULL, "out of memory");
    sprintf(*list + length, "%s\n", count < LISTED_NAMES_MAX ? name : "...");
}

static bool is_known_buffer(const char *name)
{
    static const char suffix[] = ".rotary_emb.inv_freq";
    const size_t length = strlen(name);

    return length > strlen(suffix) && strcmp(name + length - strlen(suffix), suffix) == 0;
}

static int mark_parts(struct hf_mixtral *model, const struct hf_model_tensor *tensor,
                      struct hf_mixtral_inventory *inventory)
{
    int num_parts, result = 0;
    struct hf_part *parts = list_parts(model, tensor, &num_parts);

    for (int i = 0; i < num_parts && result == 0; i++) {
        struct hf_tensor *found = find_part(model, &parts[i]);

        if (found == NULL) {
            list_name(&inventory->missing, inventory->num_missing++, parts[i].name);
        } else if (!has_shape(found, &parts[i])) {
            result = shape_error(found, &parts[i]);
        } else {
            found->used = true;
            inventory->num_used++;
        }
    }
    free(parts);
    return result;
}

static void list_unused(struct hf_mixtral *model, struct hf_mixtral_inventory *inventory)
{
    for (int i = 0; i < hf_weights_num_tensors(model->weights); i++) {
        const struct hf_tensor *tensor = hf_weights_at(model->weights, i);

        if (tensor->used) {
            continue;
        }
        inventory->num_unused++;
        if (!is_known_buffer(tensor->tensor->name)) {
            list_name(&inventory->unexpected, inventory->num_unexpected++, tensor->tensor->name);
        }
    }
}

int hf_mixtral_take_inventory(struct hf_mixtral *model, struct hf_mixtral_inventory *inventory)
{
    int num_tensors, result = 0;
    struct hf_model_tensor *tensors =
        hf_mixtral_tensors(&model->config, model->config.vocab_size, &num_tensors);

    *inventory = (struct hf_mixtral_inventory){0};
    for (int i = 0; i < num_tensors && result == 0; i++) {
        result = mark_parts(model, &tensors[i], inventory);
    }
    list_unused(model, inventory);
    free(tensors);
    if (result != 0) {
        hf_mixtral_inventory_free(inventory);
    }
    return result;
}

void hf_mixtral_inventory_free(struct hf_mixtral_inventory *inventory)
{
    free(inventory->missing);
    free(inventory->unexpected);
    *inventory = (struct hf_mixtral_inventory){0};
}

/* ---- reading ---- */

enum dtype hf_mixtral_dtype(struct hf_mixtral *model, const struct hf_model_tensor *tensor)
{
    int num_parts;
    struct hf_part *parts = list_parts(model, tensor, &num_parts);
    enum dtype dtype = NUM_DTYPES;

    for (int i = 0; i < num_parts; i++) {
        const struct hf_tensor *found = find_part(model, &parts[i]);

        if (found != NULL && dtype != found->tensor->dtype) {
            dtype = dtype == NUM_DTYPES ? found->tensor->dtype : DTYPE_F32;
        }
    }
    free(parts);
    return dtype != NUM_DTYPES ? dtype : DTYPE_F32;
}

/* [cols, rows] -> [rows, cols] */
static void transpose(void *to, const void *from, int64_t rows, int64_t cols, int element_bytes)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c++) {
            memcpy((char *)to + (r * cols + c) * element_bytes,
                   (const char *)from + (c * rows + r) * element_bytes, (size_t)element_bytes);
        }
    }
}

/* One expert of a transposed tensor: its matrix is turned around in memory. */
static int read_transposed_expert(const struct hf_tensor *found, const struct hf_part *part,
                                  int64_t expert, const struct box *wanted, enum dtype dtype,
                                  void *to)
{
    const int64_t rows = part->shape[1], cols = part->shape[2], count = rows * cols;
    const int from_bytes = dtype_size_bytes(found->tensor->dtype);
    struct box expert_box = part->box, common;
    char *raw = malloc((size_t)(count * from_bytes)),
         *turned = malloc((size_t)(count * from_bytes));
    char *converted = malloc((size_t)(count * dtype_size_bytes(dtype)));
    int result;

    CHECK(raw != NULL && turned != NULL && converted != NULL, "out of memory");
    expert_box.offset[0] = expert;
    expert_box.size[0] = 1;
    result = safetensors_read_range(found->file, found->tensor, expert * count * from_bytes,
                                    count * from_bytes, raw);
    if (result == 0 && box_intersect(&expert_box, wanted, &common)) {
        transpose(turned, raw, rows, cols, from_bytes);
        convert_dtype(converted, dtype, turned, found->tensor->dtype, count);
        box_copy(to, wanted, converted, &expert_box, &common, dtype_size_bytes(dtype));
    }
    free(raw);
    free(turned);
    free(converted);
    return result;
}

static int read_transposed(const struct hf_tensor *found, const struct hf_part *part,
                           const struct box *wanted, enum dtype dtype, void *to)
{
    if (!convert_dtype_possible(dtype, found->tensor->dtype)) {
        return error_set("%s: %s has dtype %s, which cannot be read as %s",
                         safetensors_path(found->file), found->tensor->name,
                         found->tensor->dtype_name, dtype_name(dtype));
    }
    for (int64_t e = wanted->offset[0]; e < wanted->offset[0] + wanted->size[0]; e++) {
        TRY(read_transposed_expert(found, part, e, wanted, dtype, to));
    }
    return 0;
}

static int read_part(struct hf_mixtral *model, const struct hf_part *part, const struct box *wanted,
                     enum dtype dtype, void *to)
{
    const struct hf_tensor *found = find_part(model, part);
    struct box common;

    if (!box_intersect(&part->box, wanted, &common)) {
        return 0;
    }
    if (found == NULL) {
        return error_set("%s has no tensor %s", model->path, part->name);
    }
    if (!has_shape(found, part)) {
        return shape_error(found, part);
    }
    if (part->transposed) {
        return read_transposed(found, part, wanted, dtype, to);
    }
    return safetensors_read_box(found->file, found->tensor, &part->box, &common, to, wanted, dtype);
}

int hf_mixtral_read_box(struct hf_mixtral *model, const struct hf_model_tensor *tensor,
                        const struct box *box, enum dtype dtype, void *to)
{
    int num_parts, result = 0;
    struct hf_part *parts = list_parts(model, tensor, &num_parts);

    if (tensor->kind == HF_EMBEDDING || tensor->kind == HF_OUTPUT) { /* the vocabulary's padding */
        memset(to, 0, (size_t)(box_num_elements(box) * dtype_size_bytes(dtype)));
    }
    for (int i = 0; i < num_parts && result == 0; i++) {
        result = read_part(model, &parts[i], box, dtype, to);
    }
    free(parts);
    return result;
}
