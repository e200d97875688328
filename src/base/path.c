#include "base/path.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"

int path_format(char path[PATH_LENGTH_MAX], const char *format, ...)
{
    char text[PATH_LENGTH_MAX]; /* arguments may point into path */
    va_list args;
    int length;

    va_start(args, format);
    length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (length < 0 || length >= PATH_LENGTH_MAX) {
        return error_set("path of %d bytes is longer than %d: %.80s...", length,
                         PATH_LENGTH_MAX - 1, text);
    }
    memcpy(path, text, (size_t)length + 1);
    return 0;
}

bool path_exists(const char *path)
{
    struct stat info;

    return stat(path, &info) == 0;
}

bool path_is_directory(const char *path)
{
    struct stat info;

    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static int make_directory(const char *path)
{
    if (mkdir(path, 0777) == 0 || (errno == EEXIST && path_is_directory(path))) {
        return 0;
    }
    return error_set("cannot create directory %s: %s", path, strerror(errno));
}

int path_make_directories(const char *path)
{
    char partial[PATH_LENGTH_MAX];

    TRY(path_format(partial, "%s", path));
    for (char *slash = strchr(partial + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        TRY(make_directory(partial));
        *slash = '/';
    }
    return make_directory(partial);
}

static int remove_directory_contents(const char *path, DIR *directory)
{
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        char child[PATH_LENGTH_MAX];

        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) {
            continue;
        }
        TRY(path_format(child, "%s/%s", path, entry->d_name));
        TRY(path_remove_tree(child));
    }
    return 0;
}

int path_remove_tree(const char *path)
{
    struct stat info;

    if (lstat(path, &info) != 0) {
        return errno == ENOENT ? 0 : error_set("cannot look at %s: %s", path, strerror(errno));
    }
    if (S_ISDIR(info.st_mode)) {
        DIR *directory = opendir(path);
        int result;

        if (directory == NULL) {
            return error_set("cannot open directory %s: %s", path, strerror(errno));
        }
        result = remove_directory_contents(path, directory);
        closedir(directory);
        TRY(result);
        if (rmdir(path) != 0) {
            return error_set("cannot remove directory %s: %s", path, strerror(errno));
        }
        return 0;
    }
    if (unlink(path) != 0 && errno != ENOENT) {
        return error_set("cannot remove %s: %s", path, strerror(errno));
    }
    return 0;
}

int path_file_size(const char *path, int64_t *size_bytes)
{
    struct stat info;

    if (stat(path, &info) != 0) {
        return error_set("cannot open %s: %s", path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        return error_set("%s is not a regular file", path);
    }
    *size_bytes = info.st_size;
    return 0;
}

char *path_read_file(const char *path, int64_t max_bytes, size_t *length)
{
    int64_t size_bytes;
    char *bytes = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0) {
        return FAIL_NULL("cannot open %s: %s", path, strerror(errno));
    }
    if (path_file_size(path, &size_bytes) != 0) {
        goto out;
    }
    if (size_bytes > max_bytes) {
        error_set("%s holds %lld bytes, more than the %lld that are sensible for its kind", path,
                  (long long)size_bytes, (long long)max_bytes);
        goto out;
    }
    bytes = malloc((size_t)size_bytes + 1);
    CHECK(bytes != NULL, "out of memory for %lld bytes", (long long)size_bytes);
    if (path_read_all_at(fd, path, bytes, (size_t)size_bytes, 0) != 0) {
        free(bytes);
        bytes = NULL;
        goto out;
    }
    bytes[size_bytes] = '\0';
    *length = (size_t)size_bytes;
out:
    close(fd);
    return bytes;
}

int path_write_all(int fd, const char *path, const void *bytes, size_t length)
{
    const char *next = bytes;

    while (length > 0) {
        const ssize_t written = write(fd, next, length);

        if (written < 0 && errno == EINTR) {
            continue;
        }
        if (written < 0) {
            return error_set("cannot write %s: %s", path, strerror(errno));
        }
        next += written;
        length -= (size_t)written;
    }
    return 0;
}

int path_read_all_at(int fd, const char *path, void *bytes, size_t length, int64_t offset)
{
    char *next = bytes;

    while (length > 0) {
        const ssize_t got = pread(fd, next, length, offset);

        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return error_set("cannot read %s: %s", path, strerror(errno));
        }
        if (got == 0) {
            return error_set("%s ends %zu bytes too early (at byte %lld)", path, length,
                             (long long)offset);
        }
        next += got;
        offset += got;
        length -= (size_t)got;
    }
    return 0;
}

int path_sync_directory(const char *path)
{
    const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int result = 0;

    if (fd < 0) {
        return error_set("cannot open directory %s: %s", path, strerror(errno));
    }
    if (fsync(fd) != 0 && errno != EINVAL) { /* EINVAL: a file system without directory sync */
        result = error_set("cannot sync directory %s: %s", path, strerror(errno));
    }
    close(fd);
    return result;
}

int path_parent(char parent[PATH_LENGTH_MAX], const char *path)
{
    const char *slash = strrchr(path, '/');

    if (slash == NULL) {
        return path_format(parent, ".");
    }
    if (slash == path) {
        return path_format(parent, "/");
    }
    return path_format(parent, "%.*s", (int)(slash - path), path);
}

static int write_and_sync(int fd, const char *path, const void *bytes, size_t length)
{
    TRY(path_write_all(fd, path, bytes, length));
    if (fsync(fd) != 0) {
        return error_set("cannot sync %s: %s", path, strerror(errno));
    }
    return 0;
}

int path_write_file_atomic(const char *path, const void *bytes, size_t length)
{
    char temporary[PATH_LENGTH_MAX], parent[PATH_LENGTH_MAX];
    int fd, result;

    TRY(path_parent(parent, path));
    TRY(path_format(temporary, "%s.tmp.%ld", path, (long)getpid()));
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        return error_set("cannot create %s: %s", temporary, strerror(errno));
    }
    result = write_and_sync(fd, temporary, bytes, length);
    if (close(fd) != 0 && result == 0) {
        result = error_set("cannot close %s: %s", temporary, strerror(errno));
    }
    if (result == 0 && rename(temporary, path) != 0) {
        result = error_set("cannot rename %s to %s: %s", temporary, path, strerror(errno));
    }
    if (result != 0) {
        unlink(temporary);
        return -1;
    }
    return path_sync_directory(parent);
}
