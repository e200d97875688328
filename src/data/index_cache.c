/* Files are not synced: after a power loss a hash does not match, and the array is computed again.
 */
#include "data/index_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/check.h"
#include "base/log.h"
#include "base/path.h"

enum { NPY_HEADER_BYTES = 128, DESCRIPTION_BYTES_MAX = 1 << 16 };

int64_t index_array_bytes(const struct index_array *array)
{
    return array->num_rows * (array->num_columns == 0 ? 1 : array->num_columns) * array->item_bytes;
}

int index_array_allocate(struct index_array *array)
{
    const int64_t num_bytes = index_array_bytes(array);

    array->map = (struct mapped_file){0};
    array->data = malloc(num_bytes > 0 ? (size_t)num_bytes : 1);
    if (array->data == NULL) {
        return error_set("out of memory for a %s of %lld bytes", array->name, (long long)num_bytes);
    }
    return 0;
}

void index_array_free(struct index_array *array)
{
    if (array->map.bytes != NULL) {
        mapped_file_close(&array->map);
    } else {
        free(array->data);
    }
    array->data = NULL;
}

/* Version 1.0 of the format: magic, u16 length of what follows, a Python dictionary padded with
 * spaces up to a newline. 128 bytes in all, so that the data is aligned for any item. */
static void format_npy_header(const struct index_array *array, char header[NPY_HEADER_BYTES])
{
    char shape[64];
    int length;

    if (array->num_columns == 0) {
        snprintf(shape, sizeof shape, "(%lld,)", (long long)array->num_rows);
    } else {
        snprintf(shape, sizeof shape, "(%lld, %d)", (long long)array->num_rows, array->num_columns);
    }
    memset(header, ' ', NPY_HEADER_BYTES);
    memcpy(header, "\x93NUMPY\x01\x00", 8);
    header[8] = NPY_HEADER_BYTES - 10;
    header[9] = 0;
    length =
        snprintf(header + 10, NPY_HEADER_BYTES - 10,
                 "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", array->dtype, shape);
    header[10 + length] = ' ';
    header[NPY_HEADER_BYTES - 1] = '\n';
}

static int format_path(char path[PATH_LENGTH_MAX], const struct index_cache *cache,
                       const char *suffix)
{
    const XXH128_hash_t key = XXH3_128bits(cache->facts, strlen(cache->facts));

    return path_format(path, "%s/%016llx%016llx-%s-%s", cache->directory,
                       (unsigned long long)key.high64, (unsigned long long)key.low64, cache->name,
                       suffix);
}

static int format_array_path(char path[PATH_LENGTH_MAX], const struct index_cache *cache,
                             const struct index_array *array)
{
    char suffix[64];

    snprintf(suffix, sizeof suffix, "%s.npy", array->name);
    return format_path(path, cache, suffix);
}

/* The facts and the hashes of the arrays: what description.txt must hold. The caller frees. */
static char *describe(const struct index_cache *cache, const struct index_array *arrays,
                      int num_arrays)
{
    char *text = malloc(DESCRIPTION_BYTES_MAX);
    int length;

    CHECK(text != NULL, "out of memory");
    length = snprintf(text, DESCRIPTION_BYTES_MAX, "%s", cache->facts);
    for (int i = 0; i < num_arrays; i++) {
        CHECK(length < DESCRIPTION_BYTES_MAX / 2, "facts of %d bytes", length);
        length += snprintf(
            text + length, (size_t)(DESCRIPTION_BYTES_MAX - length), "%s xxh3 %016llx\n",
            arrays[i].name,
            (unsigned long long)XXH3_64bits(arrays[i].data, (size_t)index_array_bytes(&arrays[i])));
    }
    return text;
}

static bool load_array(const struct index_cache *cache, struct index_array *array)
{
    char path[PATH_LENGTH_MAX], header[NPY_HEADER_BYTES];

    if (format_array_path(path, cache, array) != 0 || !path_exists(path) ||
        mapped_file_open(&array->map, path) != 0) {
        return false;
    }
    format_npy_header(array, header);
    if (array->map.size_bytes != NPY_HEADER_BYTES + index_array_bytes(array) ||
        memcmp(array->map.bytes, header, NPY_HEADER_BYTES) != 0) {
        mapped_file_close(&array->map);
        return false;
    }
    array->data = (void *)(array->map.bytes + NPY_HEADER_BYTES);
    return true;
}

static bool description_matches(const struct index_cache *cache, const struct index_array *arrays,
                                int num_arrays)
{
    char path[PATH_LENGTH_MAX];
    char *found, *expected;
    size_t length;
    bool matches;

    if (format_path(path, cache, "description.txt") != 0 || !path_exists(path) ||
        (found = path_read_file(path, DESCRIPTION_BYTES_MAX, &length)) == NULL) {
        return false;
    }
    expected = describe(cache, arrays, num_arrays);
    matches = length == strlen(expected) && memcmp(found, expected, length) == 0;
    free(found);
    free(expected);
    return matches;
}

bool index_cache_load(const struct index_cache *cache, struct index_array *arrays, int num_arrays)
{
    int num_loaded = 0;

    if (cache->directory == NULL) {
        return false;
    }
    while (num_loaded < num_arrays && load_array(cache, &arrays[num_loaded])) {
        num_loaded++;
    }
    if (num_loaded == num_arrays && description_matches(cache, arrays, num_arrays)) {
        return true;
    }
    for (int i = 0; i < num_loaded; i++) {
        index_array_free(&arrays[i]);
    }
    error_clear(); /* a cache that cannot be used is no error */
    return false;
}

/* A file of header and data under a name of its own, then renamed: hosts that share the directory
 * may have processes of the same id, hence the clock in the name. */
static int write_and_rename(const char *path, const void *header, size_t header_bytes,
                            const void *data, size_t data_bytes)
{
    char temporary[PATH_LENGTH_MAX];
    struct timespec now;
    int fd, result;

    clock_gettime(CLOCK_REALTIME, &now);
    TRY(path_format(temporary, "%s.tmp.%ld.%lld%09ld", path, (long)getpid(), (long long)now.tv_sec,
                    now.tv_nsec));
    fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) {
        return error_set("cannot create %s: %s", temporary, strerror(errno));
    }
    result = path_write_all(fd, temporary, header, header_bytes);
    if (result == 0) {
        result = path_write_all(fd, temporary, data, data_bytes);
    }
    if (close(fd) != 0 && result == 0) {
        result = error_set("cannot close %s: %s", temporary, strerror(errno));
    }
    if (result == 0 && rename(temporary, path) != 0) {
        result = error_set("cannot rename %s to %s: %s", temporary, path, strerror(errno));
    }
    if (result != 0) {
        unlink(temporary);
    }
    return result;
}

static int store_array(const struct index_cache *cache, const struct index_array *array)
{
    char path[PATH_LENGTH_MAX], header[NPY_HEADER_BYTES];

    TRY(format_array_path(path, cache, array));
    format_npy_header(array, header);
    return write_and_rename(path, header, sizeof header, array->data,
                            (size_t)index_array_bytes(array));
}

static int store_all(const struct index_cache *cache, const struct index_array *arrays,
                     int num_arrays)
{
    char path[PATH_LENGTH_MAX];
    char *text;
    int result;

    TRY(path_make_directories(cache->directory));
    for (int i = 0; i < num_arrays; i++) {
        TRY(store_array(cache, &arrays[i]));
    }
    TRY(format_path(path, cache, "description.txt"));
    text = describe(cache, arrays, num_arrays);
    result = write_and_rename(path, "", 0, text, strlen(text));
    free(text);
    return result;
}

void index_cache_store(const struct index_cache *cache, const struct index_array *arrays,
                       int num_arrays)
{
    if (cache->directory != NULL && store_all(cache, arrays, num_arrays) != 0) {
        log_warn("the index of the samples is not cached, so every start computes it again (%s); "
                 "--data-cache-path names another folder",
                 error_text());
        error_clear();
    }
}
