#include "ckpt/hf_export.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/hf_mixtral.h"
#include "ckpt/safetensors_writer.h"

/* A Hugging Face tensor to be written. */
struct piece {
    struct hf_part part;
    const struct hf_model_tensor *tensor;
    enum dtype dtype;
    int64_t size_bytes;
    int shard;
};

struct plan {
    struct hf_model_tensor *tensors;
    int num_tensors;
    struct piece *pieces;
    int num_pieces, num_shards;
    int64_t total_bytes, total_elements;
};

/* ---- planning ---- */

static bool has_tensor(const struct plan *plan, const char *name)
{
    for (int i = 0; i < plan->num_tensors; i++) {
        if (strcmp(plan->tensors[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

/* The checkpoint must hold exactly the model's tensors. */
static int check_tensors(const struct hf_export *request, const struct plan *plan)
{
    for (int i = 0; i < plan->num_tensors; i++) {
        if (checkpoint_find_tensor(request->checkpoint, plan->tensors[i].name) == NULL) {
            return error_set("the checkpoint has no tensor %s", plan->tensors[i].name);
        }
    }
    for (int i = 0; i < checkpoint_num_tensors(request->checkpoint); i++) {
        const struct checkpoint_tensor *tensor = checkpoint_tensor_at(request->checkpoint, i);

        if (!tensor->is_optimizer && !has_tensor(plan, tensor->name)) {
            return error_set("Mixtral has no place for the checkpoint's tensor %s", tensor->name);
        }
    }
    return 0;
}

static void add_pieces(const struct hf_export *request, struct plan *plan,
                       const struct hf_model_tensor *tensor)
{
    const enum dtype dtype = request->as_saved
                                 ? checkpoint_find_tensor(request->checkpoint, tensor->name)->dtype
                                 : request->dtype;
    int num_parts;
    struct hf_part *parts = hf_mixtral_parts(request->config, tensor, &num_parts);

    plan->pieces =
        realloc(plan->pieces, (size_t)(plan->num_pieces + num_parts) * sizeof *plan->pieces);
    CHECK(plan->pieces != NULL, "out of memory");
    for (int i = 0; i < num_parts; i++) {
        const int64_t count = box_num_elements(&parts[i].box);

        plan->pieces[plan->num_pieces++] =
            (struct piece){.part = parts[i],
                           .tensor = tensor,
                           .dtype = dtype,
                           .size_bytes = count * dtype_size_bytes(dtype)};
        plan->total_elements += count;
    }
    free(parts);
}

/* Fills shards in the model's order, each as far as it goes. */
static void assign_shards(const struct hf_export *request, struct plan *plan)
{
    int64_t filled_bytes = 0;

    plan->num_shards = 1;
    for (int i = 0; i < plan->num_pieces; i++) {
        struct piece *piece = &plan->pieces[i];

        if (filled_bytes > 0 && filled_bytes + piece->size_bytes > request->max_shard_bytes) {
            plan->num_shards++;
            filled_bytes = 0;
        }
        filled_bytes += piece->size_bytes;
        piece->shard = plan->num_shards - 1;
        plan->total_bytes += piece->size_bytes;
    }
}

static int make_plan(struct hf_export *request, struct plan *plan)
{
    const struct checkpoint_tensor *embedding =
        checkpoint_find_tensor(request->checkpoint, "embedding.word_embeddings.weight");

    if (embedding == NULL || embedding->global_shape[0] < request->config->vocab_size) {
        return error_set("the checkpoint has no embedding of %lld words",
                         (long long)request->config->vocab_size);
    }
    plan->tensors =
        hf_mixtral_tensors(request->config, embedding->global_shape[0], &plan->num_tensors);
    TRY(check_tensors(request, plan));
    for (int i = 0; i < plan->num_tensors; i++) {
        add_pieces(request, plan, &plan->tensors[i]);
    }
    assign_shards(request, plan);
    return 0;
}

/* ---- writing ---- */

static void shard_name(const struct plan *plan, int shard, char name[64])
{
    if (plan->num_shards == 1) {
        snprintf(name, 64, "%s", HF_SINGLE_FILE);
    } else {
        snprintf(name, 64, "model-%05d-of-%05d.safetensors", shard + 1, plan->num_shards);
    }
}

static int write_piece(const struct hf_export *request, struct safetensors_writer *writer,
                       const struct piece *piece)
{
    struct checkpoint_read read = {.name = piece->tensor->name,
                                   .dtype = piece->dtype,
                                   .num_dims = piece->tensor->num_dims,
                                   .box = piece->part.box};
    void *bytes = malloc((size_t)piece->size_bytes + 1);
    int result;

    CHECK(bytes != NULL, "out of memory for %lld bytes", (long long)piece->size_bytes);
    memcpy(read.global_shape, piece->tensor->global_shape, sizeof read.global_shape);
    result = checkpoint_read_box(request->checkpoint, &read, bytes);
    if (result == 0) {
        result = safetensors_writer_append(writer, bytes, (size_t)piece->size_bytes);
    }
    free(bytes);
    return result;
}

/* The shard's pieces are first .. first + num_pieces. */
static int stream_shard(const struct hf_export *request, struct safetensors_writer *writer,
                        const struct piece *first, const char *path)
{
    char hash[CONTENT_HASH_TEXT_BYTES];
    int64_t size_bytes;

    TRY(safetensors_writer_begin(writer, path));
    for (int i = 0; i < safetensors_writer_num_tensors(writer); i++) {
        TRY(write_piece(request, writer, &first[safetensors_writer_at(writer, i)]));
    }
    return safetensors_writer_finish(writer, hash, &size_bytes);
}

static int write_shard(const struct hf_export *request, const struct plan *plan, int shard)
{
    struct safetensors_writer *writer;
    char name[64], path[PATH_LENGTH_MAX];
    int first = 0, result;

    while (plan->pieces[first].shard != shard) {
        first++;
    }
    shard_name(plan, shard, name);
    TRY(path_format(path, "%s/%s", request->directory, name));
    writer = safetensors_writer_create();
    for (int i = first; i < plan->num_pieces && plan->pieces[i].shard == shard; i++) {
        const struct piece *piece = &plan->pieces[i];

        safetensors_writer_declare(writer, piece->part.name, piece->dtype, piece->part.shape,
                                   piece->part.num_dims);
    }
    result = stream_shard(request, writer, &plan->pieces[first], path);
    safetensors_writer_destroy(writer);
    return result;
}

/* 15 digits read better than 17 ("1e-05"); they are used where no number needs more. */
static char *dump_json(const json_t *value)
{
    const size_t flags = JSON_INDENT(2) | JSON_SORT_KEYS;
    char *text = json_dumps(value, flags | JSON_REAL_PRECISION(15));
    json_t *again = text != NULL ? json_loads(text, 0, NULL) : NULL;

    if (again == NULL || !json_equal(again, value)) {
        free(text);
        text = json_dumps(value, flags | JSON_REAL_PRECISION(17));
    }
    json_decref(again);
    CHECK(text != NULL, "out of memory");
    return text;
}

static int write_json(const char *directory, const char *name, json_t *value)
{
    char path[PATH_LENGTH_MAX];
    char *text = dump_json(value);
    size_t length = strlen(text);
    int result;

    json_decref(value);
    text[length++] = '\n'; /* in place of the NUL: files are bytes */
    result = path_format(path, "%s/%s", directory, name);
    if (result == 0) {
        result = path_write_file_atomic(path, text, length);
    }
    free(text);
    return result;
}

static int write_index(const struct hf_export *request, const struct plan *plan)
{
    json_t *map = json_object();
    json_t *root = json_pack("{s:{s:I, s:I}, s:o}", "metadata", "total_parameters",
                             (json_int_t)plan->total_elements, "total_size",
                             (json_int_t)plan->total_bytes, "weight_map", map);

    for (int i = 0; i < plan->num_pieces; i++) {
        char name[64];

        shard_name(plan, plan->pieces[i].shard, name);
        json_object_set_new(map, plan->pieces[i].part.name, json_string(name));
    }
    return write_json(request->directory, HF_INDEX_FILE, root);
}

static int write_all(struct hf_export *request, struct plan *plan)
{
    TRY(make_plan(request, plan));
    for (int shard = 0; shard < plan->num_shards; shard++) {
        TRY(write_shard(request, plan, shard));
    }
    if (plan->num_shards > 1) {
        TRY(write_index(request, plan));
    }
    TRY(write_json(request->directory, "config.json", hf_config_json(request->config)));
    request->num_read = plan->num_tensors;
    request->num_written = plan->num_pieces;
    return write_json(request->directory, "generation_config.json",
                      hf_generation_config_json(request->config));
}

int hf_export_write(struct hf_export *request)
{
    struct plan plan = {0};
    const int result = write_all(request, &plan);

    free(plan.tensors);
    free(plan.pieces);
    return result;
}
