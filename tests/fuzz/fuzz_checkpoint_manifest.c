/* Any bytes as metadata.json: as they are, and sealed with a right hash so that the content is
 * reached; what is accepted survives being written and read again. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/manifest.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const char *text, size_t length)
{
    struct manifest manifest, again;
    char *written;

    if (manifest_parse(&manifest, text, length) != 0) {
        return;
    }
    written = manifest_write(&manifest);
    if (manifest_parse(&again, written, strlen(written)) != 0 ||
        again.num_files != manifest.num_files || again.iteration != manifest.iteration ||
        !json_equal(again.state, manifest.state)) {
        abort();
    }
    free(written);
    manifest_free(&again);
    manifest_free(&manifest);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char hash[CONTENT_HASH_TEXT_BYTES];
    const size_t sealed_bytes = size + 128;
    char *sealed = malloc(sealed_bytes);
    int seal_length;

    check((const char *)data, size);
    content_hash_of(data, size, hash);
    memcpy(sealed, data, size);
    seal_length = snprintf(sealed + size, 128, ",\n  \"manifest_xxh3_128\": \"%s\"\n}\n", hash);
    check(sealed, size + (size_t)seal_length);
    free(sealed);
    return 0;
}
