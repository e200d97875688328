/* path.h - file names and durable file operations. Every function that returns int gives 0, or -1
 * with error_set() naming the path and the system's reason. */
#ifndef CADRE_BASE_PATH_H
#define CADRE_BASE_PATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PATH_LENGTH_MAX = 4096 };

/* Writes "format" into path; fails when it does not fit. */
int path_format(char path[PATH_LENGTH_MAX], const char *format, ...)
    __attribute__((format(printf, 2, 3)));
bool path_exists(const char *path);
bool path_is_directory(const char *path);
/* Creates path and its missing parents (mode 0777 & ~umask); an existing directory is fine. */
int path_make_directories(const char *path);
/* Deletes a file, or a directory with all it holds. A missing path is fine. Never follows links. */
int path_remove_tree(const char *path);
/* Size of a regular file in bytes. */
int path_file_size(const char *path, int64_t *size_bytes);

/* The whole file as a malloc'd, NUL-terminated buffer (the NUL is not counted in *length). Refuses
 * files of more than max_bytes before allocating. The caller frees. NULL on error. */
char *path_read_file(const char *path, int64_t max_bytes, size_t *length);

/* write(2) until all bytes are out; retries EINTR and short writes. */
int path_write_all(int fd, const char *path, const void *bytes, size_t length);
/* pread(2) until all bytes are in; end of file is an error. */
int path_read_all_at(int fd, const char *path, void *bytes, size_t length, int64_t offset);
/* fsync of a directory, so that names created or renamed in it survive a power loss. */
int path_sync_directory(const char *path);
/* Atomic and durable: writes a temporary file beside path, syncs it, renames it over path, syncs
 * the directory. A reader sees the old content or the new, never a mixture. */
int path_write_file_atomic(const char *path, const void *bytes, size_t length);
/* The directory part of path ("." if it has none). */
int path_parent(char parent[PATH_LENGTH_MAX], const char *path);

#endif
