#include "data/mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/check.h"

static int map_descriptor(struct mapped_file *file, int fd, const char *path)
{
    struct stat info;
    void *bytes;

    if (fstat(fd, &info) != 0) {
        return error_set("cannot look at %s: %s", path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        return error_set("%s is not a regular file", path);
    }
    file->size_bytes = info.st_size;
    if (info.st_size == 0) { /* mmap refuses an empty range */
        return 0;
    }
    bytes = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED) {
        return error_set("cannot map %s: %s", path, strerror(errno));
    }
    file->bytes = bytes;
    return 0;
}

int mapped_file_open(struct mapped_file *file, const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    int result;

    *file = (struct mapped_file){0};
    if (fd < 0) {
        return error_set("cannot open %s: %s", path, strerror(errno));
    }
    result = map_descriptor(file, fd, path);
    close(fd); /* the mapping stays */
    return result;
}

void mapped_file_close(struct mapped_file *file)
{
    if (file->bytes != NULL) {
        munmap((void *)file->bytes, (size_t)file->size_bytes);
    }
    *file = (struct mapped_file){0};
}
