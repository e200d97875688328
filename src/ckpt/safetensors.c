/* The header is parsed once into a table sorted by position; names and metadata stay owned by the
 * JSON tree. All memory is proportional to the header, which is bounded before it is allocated. */
#include "ckpt/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"
#include "base/checked.h"
#include "base/path.h"
#include "ckpt/box_runs.h"
#include "ckpt/convert_dtype.h"
#include "ckpt/safetensors_dtype.h"

static const int64_t header_max_bytes = 100000000; /* of the reference reader and writer */
enum { PREFIX_BYTES = 8, STAGING_BYTES = 1 << 20 };

struct safetensors {
    char path[PATH_LENGTH_MAX];
    int fd;
    json_t *header;
    struct safetensors_tensor *tensors; /* sorted by position */
    struct safetensors_tensor **by_name;
    int64_t *shapes; /* of all tensors, one after another */
    int num_tensors;
    int64_t data_start, data_size_bytes;
};

/* ---- header ---- */

static uint64_t little_endian_u64(const unsigned char *bytes)
{
    uint64_t value = 0;

    for (int i = 7; i >= 0; i--) {
        value = value << 8 | bytes[i];
    }
    return value;
}

static json_t *parse_header(const char *text, size_t length)
{
    json_error_t error;
    json_t *header = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);

    if (header == NULL) {
        return FAIL_NULL("the header is not valid JSON: %s at byte %d", error.text, error.position);
    }
    if (!json_is_object(header)) {
        json_decref(header);
        return FAIL_NULL("the header is not a JSON object");
    }
    return header;
}

static int read_header(struct safetensors *file)
{
    unsigned char prefix[PREFIX_BYTES];
    struct stat info;
    int64_t length;
    char *text;
    int result;

    if (fstat(file->fd, &info) != 0) {
        return error_set("cannot look at it: %s", strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        return error_set("not a regular file");
    }
    if (info.st_size < PREFIX_BYTES) {
        return error_set("%lld bytes are too few for a safetensors file", (long long)info.st_size);
    }
    TRY(path_read_all_at(file->fd, file->path, prefix, sizeof prefix, 0));
    if (little_endian_u64(prefix) > (uint64_t)header_max_bytes) {
        return error_set("the header claims %llu bytes, more than the format's limit of %lld",
                         (unsigned long long)little_endian_u64(prefix),
                         (long long)header_max_bytes);
    }
    length = (int64_t)little_endian_u64(prefix);
    if (length > info.st_size - PREFIX_BYTES) {
        return error_set("the header claims %lld bytes, the file has %lld after it",
                         (long long)length, (long long)(info.st_size - PREFIX_BYTES));
    }
    file->data_start = PREFIX_BYTES + length;
    file->data_size_bytes = info.st_size - file->data_start;
    text = malloc((size_t)length + 1);
    CHECK(text != NULL, "out of memory for %lld bytes", (long long)length);
    result = path_read_all_at(file->fd, file->path, text, (size_t)length, PREFIX_BYTES);
    if (result == 0) {
        file->header = parse_header(text, (size_t)length);
        result = file->header != NULL ? 0 : -1;
    }
    free(text);
    return result;
}

static int check_metadata(const json_t *metadata)
{
    const char *key;
    json_t *value;

    if (!json_is_object(metadata)) {
        return error_set("__metadata__ is not an object");
    }
    json_object_foreach((json_t *)metadata, key, value)
    {
        if (!json_is_string(value)) {
            return error_set("__metadata__: the value of \"%.200s\" is not a string", key);
        }
    }
    return 0;
}

/* ---- entries ---- */

static int get_size(const json_t *value, const char *what, int64_t *size)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0) {
        return error_set("%s holds something other than a non-negative integer", what);
    }
    *size = json_integer_value(value);
    return 0;
}

/* The shape and the type must account for exactly the bytes between the offsets. */
static int check_size(const struct safetensors_tensor *tensor, int bits)
{
    int64_t count, size_bits;

    if (!checked_product(tensor->shape, tensor->num_dims, &count) ||
        !checked_mul(count, bits, &size_bits)) {
        return error_set("the shape overflows");
    }
    if (size_bits % 8 != 0) {
        return error_set("%lld elements of %d bits do not fill whole bytes", (long long)count,
                         bits);
    }
    if (size_bits / 8 != tensor->size_bytes) {
        return error_set("data_offsets span %lld bytes, dtype and shape need %lld",
                         (long long)tensor->size_bytes, (long long)(size_bits / 8));
    }
    return 0;
}

static int parse_offsets(struct safetensors_tensor *tensor, const json_t *offsets)
{
    int64_t begin = 0, end = 0;

    if (!json_is_array(offsets) || json_array_size(offsets) != 2) {
        return error_set("data_offsets is not an array of two integers");
    }
    TRY(get_size(json_array_get(offsets, 0), "data_offsets", &begin));
    TRY(get_size(json_array_get(offsets, 1), "data_offsets", &end));
    if (end < begin) {
        return error_set("data_offsets end (%lld) before they begin (%lld)", (long long)end,
                         (long long)begin);
    }
    tensor->offset_bytes = begin; /* relative to the data, until all are checked */
    tensor->size_bytes = end - begin;
    return 0;
}

/* Writes the dims to *shapes and moves it past them. */
static int parse_entry(struct safetensors_tensor *tensor, const json_t *entry, int64_t **shapes)
{
    const json_t *dtype = json_object_get(entry, "dtype");
    const json_t *shape = json_object_get(entry, "shape");
    const struct safetensors_dtype *type;

    if (!json_is_object(entry)) {
        return error_set("its entry is not an object");
    }
    if (!json_is_string(dtype)) {
        return error_set("dtype is missing or not a string");
    }
    type = safetensors_dtype_find(json_string_value(dtype));
    if (type == NULL) {
        return error_set("unknown dtype \"%.60s\"", json_string_value(dtype));
    }
    if (!json_is_array(shape)) {
        return error_set("shape is missing or not an array");
    }
    tensor->dtype = type->dtype;
    tensor->dtype_name = type->name;
    tensor->num_dims = (int)json_array_size(shape);
    tensor->shape = *shapes;
    for (int i = 0; i < tensor->num_dims; i++) {
        TRY(get_size(json_array_get(shape, (size_t)i), "shape", *shapes));
        ++*shapes;
    }
    TRY(parse_offsets(tensor, json_object_get(entry, "data_offsets")));
    return check_size(tensor, type->bits);
}

static int compare_positions(const void *left, const void *right)
{
    const struct safetensors_tensor *a = left, *b = right;

    if (a->offset_bytes != b->offset_bytes) {
        return a->offset_bytes < b->offset_bytes ? -1 : 1;
    }
    if (a->size_bytes != b->size_bytes) {
        return a->size_bytes < b->size_bytes ? -1 : 1;
    }
    return strcmp(a->name, b->name);
}

static int compare_names(const void *left, const void *right)
{
    return strcmp((*(struct safetensors_tensor *const *)left)->name,
                  (*(struct safetensors_tensor *const *)right)->name);
}

/* The data is covered exactly once: no holes, no sharing, nothing after the last tensor. */
static int check_layout(struct safetensors *file)
{
    int64_t end = 0;

    for (int i = 0; i < file->num_tensors; i++) {
        struct safetensors_tensor *tensor = &file->tensors[i];

        if (tensor->offset_bytes != end) {
            return error_set("tensor %.200s: data begins at %lld, expected at %lld", tensor->name,
                             (long long)tensor->offset_bytes, (long long)end);
        }
        if (tensor->size_bytes > file->data_size_bytes - end) {
            return error_set("tensor %.200s: data ends outside the file", tensor->name);
        }
        end += tensor->size_bytes;
        tensor->offset_bytes += file->data_start;
    }
    if (end != file->data_size_bytes) {
        return error_set("the tensors end at byte %lld of %lld bytes of data", (long long)end,
                         (long long)file->data_size_bytes);
    }
    return 0;
}

static void allocate_tables(struct safetensors *file)
{
    const char *name;
    json_t *entry;
    size_t num_entries = 0, num_dims = 0;

    json_object_foreach(file->header, name, entry)
    {
        num_entries++;
        num_dims += json_array_size(json_object_get(entry, "shape"));
    }
    file->tensors = calloc(num_entries + 1, sizeof *file->tensors);
    file->by_name = calloc(num_entries + 1, sizeof *file->by_name);
    file->shapes = calloc(num_dims + 1, sizeof *file->shapes);
    CHECK(file->tensors != NULL && file->by_name != NULL && file->shapes != NULL, "out of memory");
}

static int parse_tensors(struct safetensors *file)
{
    int64_t *shapes;
    const char *name;
    json_t *entry;

    allocate_tables(file);
    shapes = file->shapes;
    json_object_foreach(file->header, name, entry)
    {
        struct safetensors_tensor *tensor = &file->tensors[file->num_tensors];

        if (strcmp(name, "__metadata__") == 0) {
            TRY(check_metadata(entry));
            continue;
        }
        tensor->name = name;
        if (parse_entry(tensor, entry, &shapes) != 0) {
            return error_prepend("tensor %.200s", name);
        }
        file->num_tensors++;
    }
    qsort(file->tensors, (size_t)file->num_tensors, sizeof *file->tensors, compare_positions);
    for (int i = 0; i < file->num_tensors; i++) {
        file->by_name[i] = &file->tensors[i];
    }
    qsort(file->by_name, (size_t)file->num_tensors, sizeof(struct safetensors_tensor *),
          compare_names);
    return check_layout(file);
}

/* ---- interface ---- */

struct safetensors *safetensors_open(const char *path)
{
    struct safetensors *file = calloc(1, sizeof *file);

    CHECK(file != NULL, "out of memory");
    file->fd = -1;
    if (path_format(file->path, "%s", path) != 0) {
        free(file);
        return NULL;
    }
    file->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (file->fd < 0) {
        error_set("cannot open %s: %s", path, strerror(errno));
        safetensors_close(file);
        return NULL;
    }
    if (read_header(file) != 0 || parse_tensors(file) != 0) {
        error_prepend("%s", path);
        safetensors_close(file);
        return NULL;
    }
    return file;
}

void safetensors_close(struct safetensors *file)
{
    if (file == NULL) {
        return;
    }
    if (file->fd >= 0) {
        close(file->fd);
    }
    json_decref(file->header);
    free(file->tensors);
    free(file->by_name);
    free(file->shapes);
    free(file);
}

const char *safetensors_path(const struct safetensors *file)
{
    return file->path;
}

int safetensors_num_tensors(const struct safetensors *file)
{
    return file->num_tensors;
}

const struct safetensors_tensor *safetensors_at(const struct safetensors *file, int index)
{
    CHECK(index >= 0 && index < file->num_tensors, "tensor %d of %d", index, file->num_tensors);
    return &file->tensors[index];
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    const struct safetensors_tensor wanted = {.name = name}, *key = &wanted;
    struct safetensors_tensor **found =
        bsearch(&key, file->by_name, (size_t)file->num_tensors, sizeof key, compare_names);

    return found != NULL ? *found : NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key)
{
    return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}

int safetensors_read(const struct safetensors *file, const struct safetensors_tensor *tensor,
                     void *to)
{
    return safetensors_read_range(file, tensor, 0, tensor->size_bytes, to);
}

int safetensors_read_range(const struct safetensors *file, const struct safetensors_tensor *tensor,
                           int64_t first_byte, int64_t num_bytes, void *to)
{
    CHECK(first_byte >= 0 && num_bytes >= 0 && first_byte <= tensor->size_bytes - num_bytes,
          "bytes %lld + %lld of %lld", (long long)first_byte, (long long)num_bytes,
          (long long)tensor->size_bytes);
    return path_read_all_at(file->fd, file->path, to, (size_t)num_bytes,
                            tensor->offset_bytes + first_byte);
}

/* `count` elements from element `from_index` of the tensor on, converted through a staging buffer.
 */
static int read_converted(const struct safetensors *file, const struct safetensors_tensor *tensor,
                          int64_t from_index, int64_t count, void *to, enum dtype to_dtype,
                          void *staging)
{
    const int from_bytes = dtype_size_bytes(tensor->dtype), to_bytes = dtype_size_bytes(to_dtype);
    const int64_t piece_max = STAGING_BYTES / from_bytes;

    for (int64_t done = 0; done < count;) {
        const int64_t piece = count - done < piece_max ? count - done : piece_max;

        TRY(safetensors_read_range(file, tensor, (from_index + done) * from_bytes,
                                   piece * from_bytes, staging));
        convert_dtype((char *)to + done * to_bytes, to_dtype, staging, tensor->dtype, piece);
        done += piece;
    }
    return 0;
}

int safetensors_read_box(const struct safetensors *file, const struct safetensors_tensor *tensor,
                         const struct box *from_box, const struct box *part, void *to,
                         const struct box *to_box, enum dtype to_dtype)
{
    const int to_bytes = dtype_size_bytes(to_dtype);
    struct box_runs runs;
    void *staging = NULL;
    int result = 0;

    if (tensor->dtype != to_dtype && !convert_dtype_possible(to_dtype, tensor->dtype)) {
        return error_set("%s: tensor %.200s has dtype %s, which cannot be read as %s", file->path,
                         tensor->name, tensor->dtype_name, dtype_name(to_dtype));
    }
    if (tensor->dtype != to_dtype) {
        staging = malloc(STAGING_BYTES);
        CHECK(staging != NULL, "out of memory");
    }
    box_runs_begin(&runs, part, from_box, to_box);
    while (result == 0 && box_runs_next(&runs)) {
        char *at = (char *)to + runs.to_index * to_bytes;

        result = staging == NULL ? safetensors_read_range(file, tensor, runs.from_index * to_bytes,
                                                          runs.count * to_bytes, at)
                                 : read_converted(file, tensor, runs.from_index, runs.count, at,
                                                  to_dtype, staging);
    }
    free(staging);
    return result;
}
