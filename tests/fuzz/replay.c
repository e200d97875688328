/* The main of a fuzz target that is built without libFuzzer: runs the target on every file of the
 * corpus, on all prefixes' worth of truncation and on small damages of each, the same ones every
 * time.
 *
 *     fuzz_X CORPUS-DIRECTORY
 *
 * A target that survives says so; one that does not crashes, or is caught by a sanitizer. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"

enum { INPUT_MAX_BYTES = 1 << 20, DAMAGES_PER_FILE = 200 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A small generator of its own, so that the damages never change with the library's. */
static uint32_t random_next(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

/* Runs the target on a copy of exactly size bytes: reading past the end is caught. */
static void run_copy(const uint8_t *bytes, size_t size)
{
    uint8_t *copy = calloc(1, size > 0 ? size : 1);

    CHECK(copy != NULL, "out of memory (%zu bytes)", size);
    memcpy(copy, bytes, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

/* Cuts off the tail, or changes one to four bytes: a bit, or an extreme value. */
static void run_damaged(const uint8_t *bytes, size_t size, uint32_t *state)
{
    static const uint8_t extremes[] = {0x00, 0x7f, 0x80, 0xff};
    uint8_t *copy = malloc(size);

    CHECK(copy != NULL, "out of memory (%zu bytes)", size);
    memcpy(copy, bytes, size);
    if (random_next(state) % 4 == 0) {
        run_copy(copy, random_next(state) % size);
    } else {
        for (uint32_t n = 1 + random_next(state) % 4; n > 0; n--) {
            uint8_t *byte = &copy[random_next(state) % size];

            *byte = random_next(state) % 2 == 0 ? (uint8_t)(*byte ^ 1u << random_next(state) % 8)
                                                : extremes[random_next(state) % 4];
        }
        run_copy(copy, size);
    }
    free(copy);
}

static int replay_file(const char *path)
{
    size_t size;
    uint32_t state = 0x9e3779b9;
    char *bytes = path_read_file(path, INPUT_MAX_BYTES, &size);

    if (bytes == NULL) {
        return -1;
    }
    run_copy((const uint8_t *)bytes, size);
    for (int i = 0; i < DAMAGES_PER_FILE && size > 0; i++) {
        run_damaged((const uint8_t *)bytes, size, &state);
    }
    free(bytes);
    return 0;
}

/* Returns the number of files, -1 on error. In alphabetical order. */
static int replay_directory(const char *directory)
{
    struct dirent **entries;
    const int num_entries = scandir(directory, &entries, NULL, alphasort);
    int num_files = 0;

    if (num_entries < 0) {
        return error_set("%s: cannot be listed", directory);
    }
    for (int i = 0; i < num_entries; i++) {
        char path[PATH_LENGTH_MAX];

        if (num_files >= 0 && entries[i]->d_name[0] != '.') {
            const int failed = path_format(path, "%s/%s", directory, entries[i]->d_name) != 0 ||
                               replay_file(path) != 0;

            num_files = failed ? -1 : num_files + 1;
        }
        free(entries[i]);
    }
    free(entries);
    return num_files;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s CORPUS-DIRECTORY\n", argv[0]);
        return 2;
    }
    run_copy((const uint8_t *)"", 0);

    const int num_files = replay_directory(argv[1]);

    if (num_files <= 0) {
        fprintf(stderr, "%s: %s\n", argv[0], num_files < 0 ? error_text() : "the corpus is empty");
        return 1;
    }
    printf("%d files, each with %d damages\n", num_files, DAMAGES_PER_FILE);
    return 0;
}
