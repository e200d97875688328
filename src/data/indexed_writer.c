/* .bin is renamed before .idx, and an old .idx is deleted before either: whoever sees an .idx sees
 * the .bin that belongs to it. */
#include "data/indexed_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"

enum { BUFFER_BYTES = 1 << 20 };

struct file_writer {
    char path[PATH_LENGTH_MAX]; /* the temporary name */
    int fd;                     /* -1: not created */
    size_t num_buffered;
    uint8_t buffer[BUFFER_BYTES];
};

struct indexed_writer {
    char prefix[PATH_LENGTH_MAX];
    enum token_dtype dtype;
    int64_t num_sequences, sequences_capacity;
    int64_t num_documents, documents_capacity;
    int64_t num_tokens;
    int32_t *lengths;
    int64_t *document_ends; /* sequences up to the end of each document */
    struct file_writer bin, idx;
};

static int file_writer_create(struct file_writer *file, const char *prefix, const char *suffix)
{
    file->fd = -1;
    TRY(path_format(file->path, "%s.%s.tmp.%ld", prefix, suffix, (long)getpid()));
    file->fd = open(file->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file->fd < 0) {
        return error_set("cannot create %s: %s", file->path, strerror(errno));
    }
    return 0;
}

static int file_writer_flush(struct file_writer *file)
{
    TRY(path_write_all(file->fd, file->path, file->buffer, file->num_buffered));
    file->num_buffered = 0;
    return 0;
}

static int file_writer_put(struct file_writer *file, const void *bytes, size_t num_bytes)
{
    if (file->num_buffered + num_bytes > BUFFER_BYTES) {
        TRY(file_writer_flush(file));
    }
    memcpy(file->buffer + file->num_buffered, bytes, num_bytes);
    file->num_buffered += num_bytes;
    return 0;
}

static int file_writer_sync(struct file_writer *file)
{
    TRY(file_writer_flush(file));
    if (fsync(file->fd) != 0) {
        return error_set("cannot sync %s: %s", file->path, strerror(errno));
    }
    return 0;
}

static void file_writer_remove(struct file_writer *file)
{
    if (file->fd >= 0) {
        close(file->fd);
        unlink(file->path);
        file->fd = -1;
    }
}

static int file_writer_rename(struct file_writer *file, const char *path)
{
    if (rename(file->path, path) != 0) {
        return error_set("cannot rename %s to %s: %s", file->path, path, strerror(errno));
    }
    close(file->fd); /* synced: nothing is left to fail */
    file->fd = -1;
    return 0;
}

struct indexed_writer *indexed_writer_open(const char *prefix, enum token_dtype dtype)
{
    struct indexed_writer *writer = calloc(1, sizeof *writer);

    CHECK(writer != NULL, "out of memory");
    CHECK(token_dtype_bytes(dtype) != 0 && dtype != TOKEN_F32 && dtype != TOKEN_F64, "dtype %d",
          (int)dtype);
    writer->bin.fd = writer->idx.fd = -1;
    writer->dtype = dtype;
    if (path_format(writer->prefix, "%s", prefix) != 0 ||
        file_writer_create(&writer->bin, prefix, "bin") != 0 ||
        file_writer_create(&writer->idx, prefix, "idx") != 0) {
        indexed_writer_abandon(writer);
        return NULL;
    }
    return writer;
}

static bool token_fits(enum token_dtype dtype, int32_t token)
{
    switch (dtype) {
    case TOKEN_U8:
        return token >= 0 && token <= UINT8_MAX;
    case TOKEN_I8:
        return token >= INT8_MIN && token <= INT8_MAX;
    case TOKEN_I16:
        return token >= INT16_MIN && token <= INT16_MAX;
    case TOKEN_U16:
        return token >= 0 && token <= UINT16_MAX;
    default:
        return true;
    }
}

/* The array at *items with room for one more item of item_bytes. */
static void grow(void **items, int64_t count, int64_t *capacity, size_t item_bytes)
{
    if (count < *capacity) {
        return;
    }
    *capacity = *capacity == 0 ? 1024 : 2 * *capacity;
    *items = realloc(*items, (size_t)*capacity * item_bytes);
    CHECK(*items != NULL, "out of memory for an index of %lld entries", (long long)*capacity);
}

int indexed_writer_add_sequence(struct indexed_writer *writer, const int32_t *tokens, int64_t count)
{
    if (count > INT32_MAX || writer->num_sequences >= INT32_MAX) {
        return error_set(
            "%s: a sequence of %lld tokens as number %lld: the format holds at most %d "
            "of either",
            writer->prefix, (long long)count, (long long)writer->num_sequences, INT32_MAX);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t wide = tokens[i]; /* little endian: its first bytes are the narrow value */

        if (!token_fits(writer->dtype, tokens[i])) {
            return error_set("%s: token %d does not fit %s", writer->prefix, tokens[i],
                             token_dtype_name(writer->dtype));
        }
        TRY(file_writer_put(&writer->bin, &wide, (size_t)token_dtype_bytes(writer->dtype)));
    }
    grow((void **)&writer->lengths, writer->num_sequences, &writer->sequences_capacity,
         sizeof writer->lengths[0]);
    writer->lengths[writer->num_sequences++] = (int32_t)count;
    writer->num_tokens += count;
    return 0;
}

void indexed_writer_end_document(struct indexed_writer *writer)
{
    grow((void **)&writer->document_ends, writer->num_documents, &writer->documents_capacity,
         sizeof writer->document_ends[0]);
    writer->document_ends[writer->num_documents++] = writer->num_sequences;
}

int64_t indexed_writer_num_tokens(const struct indexed_writer *writer)
{
    return writer->num_tokens;
}

static int write_index(struct indexed_writer *writer)
{
    const uint64_t version = 1, num_sequences = (uint64_t)writer->num_sequences;
    const uint64_t num_starts = (uint64_t)writer->num_documents + 1;
    const uint8_t code = (uint8_t)writer->dtype;
    int64_t pointer = 0, first = 0;

    TRY(file_writer_put(&writer->idx, "MMIDIDX\0", 9));
    TRY(file_writer_put(&writer->idx, &version, 8));
    TRY(file_writer_put(&writer->idx, &code, 1));
    TRY(file_writer_put(&writer->idx, &num_sequences, 8));
    TRY(file_writer_put(&writer->idx, &num_starts, 8));
    for (int64_t i = 0; i < writer->num_sequences; i++) {
        TRY(file_writer_put(&writer->idx, &writer->lengths[i], 4));
    }
    for (int64_t i = 0; i < writer->num_sequences; i++) {
        TRY(file_writer_put(&writer->idx, &pointer, 8));
        pointer += (int64_t)writer->lengths[i] * token_dtype_bytes(writer->dtype);
    }
    TRY(file_writer_put(&writer->idx, &first, 8));
    for (int64_t d = 0; d < writer->num_documents; d++) {
        TRY(file_writer_put(&writer->idx, &writer->document_ends[d], 8));
    }
    return 0;
}

static int finish(struct indexed_writer *writer)
{
    char bin[PATH_LENGTH_MAX], idx[PATH_LENGTH_MAX], parent[PATH_LENGTH_MAX];

    TRY(path_format(bin, "%s.bin", writer->prefix));
    TRY(path_format(idx, "%s.idx", writer->prefix));
    TRY(path_parent(parent, writer->prefix));
    TRY(write_index(writer));
    TRY(file_writer_sync(&writer->bin));
    TRY(file_writer_sync(&writer->idx));
    TRY(path_remove_tree(idx));
    TRY(file_writer_rename(&writer->bin, bin));
    TRY(file_writer_rename(&writer->idx, idx));
    return path_sync_directory(parent);
}

int indexed_writer_finish(struct indexed_writer *writer)
{
    const int result = finish(writer);

    indexed_writer_abandon(writer);
    return result;
}

void indexed_writer_abandon(struct indexed_writer *writer)
{
    if (writer == NULL) {
        return;
    }
    file_writer_remove(&writer->bin);
    file_writer_remove(&writer->idx);
    free(writer->lengths);
    free(writer->document_ends);
    free(writer);
}
