/* Any bytes as a .safetensors file, and as the header of one whose length field is right: opened,
 * searched and read, or refused. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/path.h"
#include "ckpt/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_file(int fd)
{
    char path[64];
    struct safetensors *file;

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    file = safetensors_open(path);
    for (int i = 0; file != NULL && i < safetensors_num_tensors(file); i++) {
        const struct safetensors_tensor *tensor = safetensors_at(file, i);
        char *bytes = malloc((size_t)tensor->size_bytes + 1);

        if (safetensors_find(file, tensor->name) != tensor ||
            safetensors_read(file, tensor, bytes) != 0) {
            abort(); /* what open accepts can be read */
        }
        free(bytes);
    }
    safetensors_close(file);
}

static void write_or_stop(int fd, const void *bytes, size_t length)
{
    if (fd < 0 || path_write_all(fd, "memory", bytes, length) != 0) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t zeros[256];
    const int whole = memfd_create("whole", 0), header = memfd_create("header", 0);
    uint8_t prefix[8];

    write_or_stop(whole, data, size);
    check_file(whole);
    for (int i = 0; i < 8; i++) {
        prefix[i] = (uint8_t)((uint64_t)size >> 8 * i);
    }
    write_or_stop(header, prefix, sizeof prefix);
    write_or_stop(header, data, size);
    write_or_stop(header, zeros, size > 0 ? data[size - 1] % 32 : 0); /* blanks may end a header */
    check_file(header);
    close(whole);
    close(header);
    return 0;
}
