#include "ckpt/checkpoint_shard.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint_layout.h"
#include "ckpt/safetensors_writer.h"

/* Of an item that is copied; two pieces are under way at a time. */
static const size_t piece_size_bytes = (size_t)32 << 20;

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

static void declare_item(struct safetensors_writer *writer, const struct ckpt_item *item,
                         const char *key, json_t *offsets, json_t *shapes)
{
    safetensors_writer_declare(writer, key, item->dtype, item->box.size, item->num_dims);
    json_object_set_new(
        offsets, key,
        json_pack("{s:o}", "saved_offsets", dims_json(item->box.offset, item->num_dims)));
    json_object_set_new(shapes, key, dims_json(item->global_shape, item->num_dims));
}

/* PyTorch's reader places each tensor by "saved_offsets"; the global shape is cadre's own addition,
 * and so are the keys of further boxes of a name, which therefore no weights may have. */
static void declare_items(struct safetensors_writer *writer, const struct ckpt_item **items,
                          int num_items)
{
    json_t *offsets = json_object(), *shapes = json_object();
    int number = 0; /* of the box among those of its name */

    for (int i = 0; i < num_items; i++) {
        const struct ckpt_item *item = items[i];
        char key[CHECKPOINT_NAME_MAX];

        CHECK(item->num_dims > 0 && box_inside(&item->box, item->global_shape), "box of %s",
              item->name);
        CHECK(strlen(item->name) < sizeof key - 16 &&
                  strpbrk(item->name, CHECKPOINT_BOX_MARK) == NULL,
              "tensor name %s", item->name);
        number = i > 0 && strcmp(items[i - 1]->name, item->name) == 0 ? number + 1 : 0;
        CHECK(number == 0 || item->is_optimizer, "several boxes of %s", item->name);
        snprintf(key, sizeof key, "%s", item->name);
        if (number > 0) {
            snprintf(key, sizeof key, "%s" CHECKPOINT_BOX_MARK "%d", item->name, number);
        }
        declare_item(writer, item, key, offsets, shapes);
    }
    add_metadata(writer, CHECKPOINT_SHARDING_KEY, offsets);
    safetensors_writer_metadata(writer, "DCP_VERSION", "1.0");
    add_metadata(writer, CHECKPOINT_SHAPE_KEY, shapes);
}

static int append_staged(struct safetensors_writer *writer,
                         const struct checkpoint_save_request *request,
                         const struct ckpt_item *item)
{
    const size_t size_bytes = item_bytes(item);
    void *host = malloc(size_bytes + 1);
    int result;

    CHECK(host != NULL, "out of memory for %zu bytes of %s", size_bytes, item->name);
    result = request->stage(request->context, item, host);
    if (result == 0) {
        result = safetensors_writer_append(writer, host, size_bytes);
    }
    free(host);
    return result;
}

static size_t piece_bytes(size_t size_bytes, size_t piece)
{
    const size_t rest = size_bytes - piece * piece_size_bytes;

    return rest < piece_size_bytes ? rest : piece_size_bytes;
}

/* While the calling thread writes a piece, another one copies the next. */
static int append_copied(struct safetensors_writer *writer,
                         const struct checkpoint_save_request *request,
                         const struct ckpt_item *item, char *buffers)
{
    const size_t size_bytes = item_bytes(item);
    const size_t num_pieces = (size_bytes + piece_size_bytes - 1) / piece_size_bytes;
    int result = 0;

#pragma omp parallel num_threads(omp_get_max_threads() > 1 ? 2 : 1)
    for (size_t i = 0; i <= num_pieces; i++) {
        if (i < num_pieces && omp_get_thread_num() == omp_get_num_threads() - 1) {
            request->copy(request->context, buffers + i % 2 * piece_size_bytes,
                          (const char *)item->data + i * piece_size_bytes,
                          piece_bytes(size_bytes, i));
        }
        if (i > 0 && omp_get_thread_num() == 0 && result == 0) {
            result = safetensors_writer_append(writer, buffers + (i - 1) % 2 * piece_size_bytes,
                                               piece_bytes(size_bytes, i - 1));
        }
#pragma omp barrier
    }
    return result;
}

static int append_item(struct safetensors_writer *writer,
                       const struct checkpoint_save_request *request, const struct ckpt_item *item,
                       char *buffers)
{
    if (request->stage != NULL) {
        return append_staged(writer, request, item);
    }
    if (request->copy != NULL) {
        return append_copied(writer, request, item, buffers);
    }
    return safetensors_writer_append(writer, item->data, item_bytes(item));
}

static int write_items(struct safetensors_writer *writer,
                       const struct checkpoint_save_request *request,
                       const struct ckpt_item **items, const char *directory,
                       struct manifest_file *file)
{
    char path[PATH_LENGTH_MAX], *buffers;
    int result = 0;

    TRY(path_format(path, "%s/%s", directory, file->name));
    TRY(safetensors_writer_begin(writer, path));
    buffers = malloc(2 * piece_size_bytes);
    CHECK(buffers != NULL, "out of memory");
    for (int i = 0; i < safetensors_writer_num_tensors(writer) && result == 0; i++) {
        result = append_item(writer, request, items[safetensors_writer_at(writer, i)], buffers);
    }
    free(buffers);
    return result == 0 ? safetensors_writer_finish(writer, file->hash, &file->size_bytes) : -1;
}

/* By name; boxes of one name as they are in the request. */
static int compare_items(const void *left, const void *right)
{
    const struct ckpt_item *a = *(const struct ckpt_item *const *)left;
    const struct ckpt_item *b = *(const struct ckpt_item *const *)right;
    const int order = strcmp(a->name, b->name);

    return order != 0 ? order : (a > b) - (a < b);
}

/* The request's items of the kind, sorted; the caller frees. */
static const struct ckpt_item **select_items(const struct checkpoint_save_request *request,
                                             bool is_optimizer, int *num_items)
{
    const struct ckpt_item **items = calloc((size_t)request->num_items + 1, sizeof *items);

    CHECK(items != NULL, "out of memory");
    *num_items = 0;
    for (int i = 0; i < request->num_items; i++) {
        if (request->items[i].is_optimizer == is_optimizer) {
            items[(*num_items)++] = &request->items[i];
        }
    }
    qsort(items, (size_t)*num_items, sizeof *items, compare_items);
    return items;
}

int checkpoint_shard_write(const struct checkpoint_save_request *request, bool is_optimizer,
                           const char *directory, struct manifest_file *file)
{
    int num_items, result = 0;
    const struct ckpt_item **items = select_items(request, is_optimizer, &num_items);

    *file = (struct manifest_file){0};
    if (num_items > 0) {
        struct safetensors_writer *writer = safetensors_writer_create();

        /* PyTorch's name for rank i's part of file 1 of 1. */
        snprintf(file->name, sizeof file->name, "%sshard-%05d-model-00001-of-00001.safetensors",
                 is_optimizer ? CHECKPOINT_OPTIMIZER_FOLDER "/" : "",
                 checkpoint_ranks_index(&request->ranks) + 1);
        declare_items(writer, items, num_items);
        result = write_items(writer, request, items, directory, file);
        safetensors_writer_destroy(writer);
    }
    free(items);
    return result;
}
