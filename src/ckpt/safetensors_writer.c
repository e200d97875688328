/* The data is written strictly in file order, so that the hash of the file is computed while its
 * bytes are in the cache. The disk is sent what is written as it comes, else it would be idle until
 * the sync at the end. */
#include "ckpt/safetensors_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/checked.h"
#include "base/path.h"
#include "ckpt/safetensors_dtype.h"

static const size_t header_max_bytes = 100000000;
enum { PREFIX_BYTES = 8, PIECE_BYTES = 1 << 20, SEND_BYTES = 32 << 20 };

struct entry {
    char *name;
    enum dtype dtype;
    int num_dims;
    int64_t shape[TENSOR_DIMS_MAX];
    int64_t size_bytes;
    int declaration; /* position in the order of declare calls */
};

struct safetensors_writer {
    char path[PATH_LENGTH_MAX];
    int fd; /* -1: no file open */
    json_t *metadata;
    struct entry *entries; /* in file order once begun */
    int num_entries, capacity;
    int64_t data_bytes, appended_bytes, header_bytes;
    int64_t written_bytes, sent_bytes; /* of the file; sent: on their way to the disk */
    struct content_hash *hash;
};

struct safetensors_writer *safetensors_writer_create(void)
{
    struct safetensors_writer *writer = calloc(1, sizeof *writer);

    CHECK(writer != NULL, "out of memory");
    writer->fd = -1;
    writer->metadata = json_object();
    safetensors_writer_metadata(writer, "format", "pt");
    return writer;
}

void safetensors_writer_destroy(struct safetensors_writer *writer)
{
    char hash[CONTENT_HASH_TEXT_BYTES];

    if (writer == NULL) {
        return;
    }
    if (writer->fd >= 0) {
        close(writer->fd);
        unlink(writer->path);
    }
    if (writer->hash != NULL) {
        content_hash_finish(writer->hash, hash);
    }
    for (int i = 0; i < writer->num_entries; i++) {
        free(writer->entries[i].name);
    }
    free(writer->entries);
    json_decref(writer->metadata);
    free(writer);
}

void safetensors_writer_metadata(struct safetensors_writer *writer, const char *key,
                                 const char *value)
{
    CHECK(json_object_set_new(writer->metadata, key, json_string(value)) == 0,
          "metadata %s is not UTF-8", key);
}

void safetensors_writer_declare(struct safetensors_writer *writer, const char *name,
                                enum dtype dtype, const int64_t *shape, int num_dims)
{
    struct entry *entry;
    int64_t count;

    CHECK(writer->fd < 0, "declared after begin: %s", name);
    CHECK(num_dims <= TENSOR_DIMS_MAX && checked_product(shape, num_dims, &count), "shape of %s",
          name);
    if (writer->num_entries == writer->capacity) {
        writer->capacity = writer->capacity > 0 ? 2 * writer->capacity : 64;
        writer->entries =
            realloc(writer->entries, (size_t)writer->capacity * sizeof *writer->entries);
        CHECK(writer->entries != NULL, "out of memory");
    }
    entry = &writer->entries[writer->num_entries];
    *entry = (struct entry){.name = strdup(name),
                            .dtype = dtype,
                            .num_dims = num_dims,
                            .declaration = writer->num_entries};
    CHECK(entry->name != NULL, "out of memory");
    memcpy(entry->shape, shape, (size_t)num_dims * sizeof *shape);
    entry->size_bytes = count * dtype_size_bytes(dtype);
    writer->num_entries++;
}

/* ---- header ---- */

/* The canonical order: larger types first, then by name. */
static int compare_entries(const void *left, const void *right)
{
    const struct entry *a = left, *b = right;
    const int a_rank = safetensors_dtype_rank(a->dtype), b_rank = safetensors_dtype_rank(b->dtype);

    return a_rank != b_rank ? b_rank - a_rank : strcmp(a->name, b->name);
}

static json_t *entry_json(const struct entry *entry, int64_t begin)
{
    json_t *shape = json_array();

    for (int i = 0; i < entry->num_dims; i++) {
        json_array_append_new(shape, json_integer(entry->shape[i]));
    }
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype_name(entry->dtype), "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)(begin + entry->size_bytes));
}

/* The header's JSON, unpadded. The caller frees. */
static char *header_text(struct safetensors_writer *writer)
{
    json_t *header = json_object();
    char *text;

    json_object_set(header, "__metadata__", writer->metadata);
    writer->data_bytes = 0;
    for (int i = 0; i < writer->num_entries; i++) {
        const struct entry *entry = &writer->entries[i];

        CHECK(json_object_get(header, entry->name) == NULL, "%s declared twice", entry->name);
        CHECK(json_object_set_new(header, entry->name, entry_json(entry, writer->data_bytes)) == 0,
              "tensor name %s is not UTF-8", entry->name);
        writer->data_bytes += entry->size_bytes;
    }
    text = json_dumps(header, JSON_COMPACT);
    json_decref(header);
    CHECK(text != NULL, "out of memory");
    return text;
}

/* Starts the writing of what is in the page cache alone; what fails there is the sync's to report,
 * and so is a file system that cannot. */
static void send_to_disk(struct safetensors_writer *writer)
{
    if (writer->written_bytes - writer->sent_bytes >= SEND_BYTES) {
        sync_file_range(writer->fd, writer->sent_bytes, writer->written_bytes - writer->sent_bytes,
                        SYNC_FILE_RANGE_WRITE);
        writer->sent_bytes = writer->written_bytes;
    }
}

/* write(2) in pieces, hashed while each is in the cache. */
static int put(struct safetensors_writer *writer, const void *bytes, size_t length)
{
    const char *next = bytes;

    while (length > 0) {
        const size_t piece = length < PIECE_BYTES ? length : PIECE_BYTES;

        content_hash_add(writer->hash, next, piece);
        TRY(path_write_all(writer->fd, writer->path, next, piece));
        writer->written_bytes += (int64_t)piece;
        send_to_disk(writer);
        next += piece;
        length -= piece;
    }
    return 0;
}

static int write_header(struct safetensors_writer *writer)
{
    char *text = header_text(writer);
    const size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    unsigned char prefix[PREFIX_BYTES];
    int result;

    if (padded > header_max_bytes) {
        free(text);
        return error_set("%s: a header of %zu bytes is over the format's limit of %zu",
                         writer->path, padded, header_max_bytes);
    }
    for (int i = 0; i < PREFIX_BYTES; i++) {
        prefix[i] = (unsigned char)(padded >> 8 * i);
    }
    writer->header_bytes = (int64_t)(PREFIX_BYTES + padded);
    result = put(writer, prefix, sizeof prefix);
    if (result == 0) {
        result = put(writer, text, length);
    }
    if (result == 0) {
        result = put(writer, "       ", padded - length);
    }
    free(text);
    return result;
}

int safetensors_writer_begin(struct safetensors_writer *writer, const char *path)
{
    TRY(path_format(writer->path, "%s", path));
    writer->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (writer->fd < 0) {
        return error_set("cannot create %s: %s", path, strerror(errno));
    }
    writer->hash = content_hash_create();
    if (writer->num_entries > 0) {
        qsort(writer->entries, (size_t)writer->num_entries, sizeof *writer->entries,
              compare_entries);
    }
    return write_header(writer);
}

/* ---- data ---- */

int safetensors_writer_num_tensors(const struct safetensors_writer *writer)
{
    return writer->num_entries;
}

int safetensors_writer_at(const struct safetensors_writer *writer, int index)
{
    CHECK(index >= 0 && index < writer->num_entries, "tensor %d of %d", index, writer->num_entries);
    return writer->entries[index].declaration;
}

int safetensors_writer_append(struct safetensors_writer *writer, const void *bytes, size_t length)
{
    writer->appended_bytes += (int64_t)length;
    CHECK(writer->appended_bytes <= writer->data_bytes, "%s: more data than declared",
          writer->path);
    return put(writer, bytes, length);
}

int safetensors_writer_finish(struct safetensors_writer *writer, char hash[CONTENT_HASH_TEXT_BYTES],
                              int64_t *size_bytes)
{
    const int fd = writer->fd;

    CHECK(writer->appended_bytes == writer->data_bytes, "%s: %lld of %lld bytes", writer->path,
          (long long)writer->appended_bytes, (long long)writer->data_bytes);
    if (fsync(fd) != 0) {
        return error_set("cannot sync %s: %s", writer->path, strerror(errno));
    }
    writer->fd = -1;
    if (close(fd) != 0) {
        error_set("cannot close %s: %s", writer->path, strerror(errno));
        unlink(writer->path);
        return -1;
    }
    content_hash_finish(writer->hash, hash);
    writer->hash = NULL;
    *size_bytes = writer->header_bytes + writer->data_bytes;
    return 0;
}

/* ---- all at once ---- */

static int save_tensors(struct safetensors_writer *writer, const char *path,
                        const struct tensor *tensors)
{
    char hash[CONTENT_HASH_TEXT_BYTES];
    int64_t size_bytes;

    TRY(safetensors_writer_begin(writer, path));
    for (int i = 0; i < writer->num_entries; i++) {
        const struct tensor *tensor = &tensors[safetensors_writer_at(writer, i)];

        TRY(safetensors_writer_append(writer, tensor->data, tensor_size_bytes(tensor)));
    }
    return safetensors_writer_finish(writer, hash, &size_bytes);
}

int safetensors_save(const char *path, const char *const *names, const struct tensor *tensors,
                     int num_tensors)
{
    char temporary[PATH_LENGTH_MAX], parent[PATH_LENGTH_MAX];
    struct safetensors_writer *writer = safetensors_writer_create();
    int result = path_parent(parent, path);

    for (int i = 0; i < num_tensors; i++) {
        safetensors_writer_declare(writer, names[i], tensors[i].dtype, tensors[i].dim,
                                   tensors[i].num_dims);
    }
    if (result == 0) {
        result = path_format(temporary, "%s.tmp.%ld", path, (long)getpid());
    }
    if (result == 0) {
        result = save_tensors(writer, temporary, tensors);
    }
    safetensors_writer_destroy(writer);
    TRY(result);
    if (rename(temporary, path) != 0) {
        error_set("cannot rename %s to %s: %s", temporary, path, strerror(errno));
        unlink(temporary);
        return -1;
    }
    return path_sync_directory(parent);
}
