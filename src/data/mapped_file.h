/* mapped_file.h - a regular file mapped for reading. */
#ifndef CADRE_DATA_MAPPED_FILE_H
#define CADRE_DATA_MAPPED_FILE_H

#include <stdint.h>

struct mapped_file {
    const uint8_t *bytes; /* NULL when not open or empty */
    int64_t size_bytes;
};

int mapped_file_open(struct mapped_file *file, const char *path);
/* A zeroed or closed struct is fine. */
void mapped_file_close(struct mapped_file *file);

#endif
