#include "ckpt/checkpoint_shard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint_layout.h"
#include "ckpt/safetensors_writer.h"

static size_t item_bytes(const struct ckpt_item *item)
{
    return (size_t)box_num_elements(&item->box) * (size_t)dtype_size_bytes(item->dtype);
}

static json_t *dims_json(const int64_t *dims, int num_dims)
{
    json_t *array = json_array();

    for (int i = 0; i < num_dims; i++) {
        json_array_append_new(array, json_integer(dims[i]));
    }
    return array;
}

static void add_metadata(struct safetensors_writer *writer, const char *key, json_t *value)
{
    char *text = json_dumps(value, JSON_COMPACT);

    CHECK(text != NULL, "out of memory");
    safetensors_writer_metadata(writer, key, text);
    free(text);
    json_decref(value);
}

/* PyTorch's reader places each tensor by "saved_offsets"; the global shape is cadre's own addition.
 */
static void declare_items(struct safetensors_writer *writer, const struct ckpt_item **items,
                          int num_items)
{
    json_t *offsets = json_object(), *shapes = json_object();

    for (int i = 0; i < num_items; i++) {
        const struct ckpt_item *item = items[i];

        CHECK(item->num_dims > 0 && box_inside(&item->box, item->global_shape), "box of %s",
              item->name);
        safetensors_writer_declare(writer, item->name, item->dtype, item->box.size, item->num_dims);
        json_object_set_new(
            offsets, item->name,
            json_pack("{s:o}", "saved_offsets", dims_json(item->box.offset, item->num_dims)));
        json_object_set_new(shapes, item->name, dims_json(item->global_shape, item->num_dims));
    }
    add_metadata(writer, CHECKPOINT_SHARDING_KEY, offsets);
    safetensors_writer_metadata(writer, "DCP_VERSION", "1.0");
    add_metadata(writer, CHECKPOINT_SHAPE_KEY, shapes);
}

static int append_item(struct safetensors_writer *writer,
                       const struct checkpoint_save_request *request, const struct ckpt_item *item)
{
    const size_t size_bytes = item_bytes(item);
    void *host;
    int result;

    if (request->stage == NULL) {
        return safetensors_writer_append(writer, item->data, size_bytes);
    }
    host = malloc(size_bytes + 1);
    CHECK(host != NULL, "out of memory for %zu bytes of %s", size_bytes, item->name);
    result = request->stage(request->stage_context, item, host);
    if (result == 0) {
        result = safetensors_writer_append(writer, host, size_bytes);
    }
    free(host);
    return result;
}

static int write_items(struct safetensors_writer *writer,
                       const struct checkpoint_save_request *request,
                       const struct ckpt_item **items, const char *directory,
                       struct manifest_file *file)
{
    char path[PATH_LENGTH_MAX];

    TRY(path_format(path, "%s/%s", directory, file->name));
    TRY(safetensors_writer_begin(writer, path));
    for (int i = 0; i < safetensors_writer_num_tensors(writer); i++) {
        TRY(append_item(writer, request, items[safetensors_writer_at(writer, i)]));
    }
    return safetensors_writer_finish(writer, file->hash, &file->size_bytes);
}

int checkpoint_shard_write(const struct checkpoint_save_request *request, bool is_optimizer,
                           const char *directory, struct manifest_file *file)
{
    const struct ckpt_item **items = calloc((size_t)request->num_items + 1, sizeof *items);
    struct safetensors_writer *writer;
    int num_items = 0, result;

    CHECK(items != NULL, "out of memory");
    *file = (struct manifest_file){0};
    for (int i = 0; i < request->num_items; i++) {
        if (request->items[i].is_optimizer == is_optimizer) {
            items[num_items++] = &request->items[i];
        }
    }
    if (num_items == 0) {
        free(items);
        return 0;
    }
    /* PyTorch's name for rank i's part of file 1 of 1. */
    snprintf(file->name, sizeof file->name, "%sshard-%05d-model-00001-of-00001.safetensors",
             is_optimizer ? CHECKPOINT_OPTIMIZER_FOLDER "/" : "", request->ranks.rank + 1);
    writer = safetensors_writer_create();
    declare_items(writer, items, num_items);
    result = write_items(writer, request, items, directory, file);
    safetensors_writer_destroy(writer);
    free(items);
    return result;
}
