#include "ckpt/content_hash.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/check.h"

enum { READ_BYTES = 4 << 20 };

struct content_hash {
    XXH3_state_t *state;
};

struct content_hash *content_hash_create(void)
{
    struct content_hash *hash = malloc(sizeof *hash);

    CHECK(hash != NULL, "out of memory");
    hash->state = XXH3_createState();
    CHECK(hash->state != NULL, "out of memory");
    XXH3_128bits_reset(hash->state);
    return hash;
}

void content_hash_add(struct content_hash *hash, const void *bytes, size_t length)
{
    XXH3_128bits_update(hash->state, bytes, length);
}

static void write_text(XXH128_hash_t value, char text[CONTENT_HASH_TEXT_BYTES])
{
    snprintf(text, CONTENT_HASH_TEXT_BYTES, "%016llx%016llx", (unsigned long long)value.high64,
             (unsigned long long)value.low64);
}

void content_hash_finish(struct content_hash *hash, char text[CONTENT_HASH_TEXT_BYTES])
{
    write_text(XXH3_128bits_digest(hash->state), text);
    XXH3_freeState(hash->state);
    free(hash);
}

void content_hash_of(const void *bytes, size_t length, char text[CONTENT_HASH_TEXT_BYTES])
{
    write_text(XXH3_128bits(bytes, length), text);
}

static int add_file(struct content_hash *hash, int fd, const char *path, char *buffer)
{
    for (;;) {
        const ssize_t got = read(fd, buffer, READ_BYTES);

        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return error_set("cannot read %s: %s", path, strerror(errno));
        }
        if (got == 0) {
            return 0;
        }
        content_hash_add(hash, buffer, (size_t)got);
    }
}

int content_hash_file(const char *path, char text[CONTENT_HASH_TEXT_BYTES])
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct content_hash *hash;
    char *buffer;
    int result;

    if (fd < 0) {
        return error_set("cannot open %s: %s", path, strerror(errno));
    }
    buffer = malloc(READ_BYTES);
    CHECK(buffer != NULL, "out of memory");
    hash = content_hash_create();
    result = add_file(hash, fd, path, buffer);
    content_hash_finish(hash, text);
    free(buffer);
    close(fd);
    return result;
}
