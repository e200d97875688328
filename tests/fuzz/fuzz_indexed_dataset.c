/* Bytes as an .idx beside a .bin: the first byte times 4 is the size of .bin. Every token that the
 * index admits is read, and a training order is built over it. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/datasets.h"
#include "data/indexed_dataset.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char prefix[64];

static void write_file(const char *suffix, const uint8_t *bytes, size_t size)
{
    char path[80];
    FILE *file;

    snprintf(path, sizeof path, "%s.%s", prefix, suffix);
    file = fopen(path, "wb");
    if (file == NULL || (size > 0 && fwrite(bytes, 1, size, file) != size)) {
        abort();
    }
    fclose(file);
}

static void remove_files(void)
{
    char path[80];

    snprintf(path, sizeof path, "%s.idx", prefix);
    unlink(path);
    snprintf(path, sizeof path, "%s.bin", prefix);
    unlink(path);
}

static void read_all_sequences(void)
{
    struct indexed_dataset set;
    int32_t tokens[1024];

    if (indexed_dataset_open(&set, prefix) != 0) {
        return;
    }
    for (int64_t i = 0; i < set.num_sequences; i++) {
        if (indexed_dataset_length(&set, i) > 1024 ||
            indexed_dataset_read(&set, i, 0, indexed_dataset_length(&set, i), tokens) != 0) {
            continue;
        }
    }
    indexed_dataset_close(&set);
}

static void draw_samples(void)
{
    const char *path = prefix;
    const struct datasets_config config = {.data_path = {&path, 1},
                                           .split = "80,20",
                                           .seq_length = 5,
                                           .seed = 1,
                                           .vocab_size = 1000,
                                           .no_cache = true};
    struct datasets sets;
    int32_t tokens[6];

    if (datasets_build(&sets, &config, (int64_t[]){50, 2, 0}) != 0) {
        return;
    }
    for (int64_t i = 0; i < sets.split[SPLIT_TRAIN]->num_samples && i < 100; i++) {
        (void)dataset_sample(sets.split[SPLIT_TRAIN], i, tokens);
    }
    datasets_free(&sets);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t bin[255 * 4] = {1, 0, 2, 0, 250, 255, 0, 0};

    if (size == 0) {
        return 0;
    }
    if (prefix[0] == '\0') {
        snprintf(prefix, sizeof prefix, "/tmp/cadre-fuzz-indexed-%ld", (long)getpid());
        atexit(remove_files);
    }
    write_file("bin", bin, (size_t)data[0] * 4);
    write_file("idx", data + 1, size - 1);
    read_all_sequences();
    draw_samples();
    return 0;
}
