/* megatron_data_case.h - checks the order of samples against golden files of Megatron.
 *
 * Each NAME.json describes data sets by a rule; NAME.safetensors holds what Megatron made of them:
 * SPLIT.document_index, sample_index, shuffle_index or SPLIT.blend_dataset_index,
 * blend_sample_index, the first token of every sample and all tokens of those picked. The data sets
 * are written anew, read back through datasets_build, and compared. Used by the oracle program and
 * by the unit test. The golden files are read here with few lines rather than with src/ckpt, which
 * the data folder lies above of. */
#ifndef CADRE_TESTS_MEGATRON_DATA_CASE_H
#define CADRE_TESTS_MEGATRON_DATA_CASE_H

#include <dirent.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"
#include "data/datasets.h"
#include "data/indexed_writer.h"
#include "data/numpy_random.h"

enum { GOLDEN_SETS_MAX = 8 };

struct golden {
    json_t *rule, *header;
    char *bytes; /* of the safetensors file */
    size_t num_bytes, data_start;
    int64_t num_compared; /* values that were equal */
    char failure[256];    /* the first difference; "" for none */
};

/* The I64 tensor SPLIT.NAME; NULL if the file has none. */
static inline const int64_t *golden_tensor(const struct golden *golden, const char *split,
                                           const char *name, int64_t *count)
{
    char key[96];
    const json_t *tensor, *offsets;
    int64_t first, end;

    snprintf(key, sizeof key, "%s.%s", split, name);
    tensor = json_object_get(golden->header, key);
    offsets = json_object_get(tensor, "data_offsets");
    if (tensor == NULL || strcmp(json_string_value(json_object_get(tensor, "dtype")), "I64") != 0) {
        return NULL;
    }
    first = json_integer_value(json_array_get(offsets, 0));
    end = json_integer_value(json_array_get(offsets, 1));
    if (first < 0 || end < first || (size_t)end > golden->num_bytes - golden->data_start ||
        (golden->data_start + (size_t)first) % 8 != 0) {
        return NULL;
    }
    *count = (end - first) / 8;
    return (const int64_t *)(golden->bytes + golden->data_start + first);
}

static inline int golden_open(struct golden *golden, const char *directory, const char *name)
{
    char path[PATH_LENGTH_MAX];
    json_error_t error;
    uint64_t header_bytes;

    *golden = (struct golden){0};
    TRY(path_format(path, "%s/%s.json", directory, name));
    golden->rule = json_load_file(path, 0, &error);
    TRY(path_format(path, "%s/%s.safetensors", directory, name));
    golden->bytes = path_read_file(path, 1 << 30, &golden->num_bytes);
    if (golden->rule == NULL || golden->bytes == NULL || golden->num_bytes < 8) {
        return error_set("cannot read the golden files of %s", name);
    }
    memcpy(&header_bytes, golden->bytes, 8);
    if (header_bytes > golden->num_bytes - 8) {
        return error_set("%s is cut short", path);
    }
    golden->header = json_loadb(golden->bytes + 8, header_bytes, 0, &error);
    golden->data_start = 8 + header_bytes;
    return golden->header != NULL ? 0 : error_set("%s has no header", path);
}

static inline void golden_close(struct golden *golden)
{
    json_decref(golden->rule);
    json_decref(golden->header);
    free(golden->bytes);
}

static inline int64_t rule_integer(const json_t *object, const char *key)
{
    return json_integer_value(json_object_get(object, key));
}

/* token j of document d = (d*7919 + j*31 + 17) % 50000, lengths from RandomState.randint */
static inline int golden_write_set(const json_t *set, const char *prefix)
{
    const bool is_narrow = rule_integer(set, "token_bytes") == 2;
    struct indexed_writer *writer = indexed_writer_open(prefix, is_narrow ? TOKEN_U16 : TOKEN_I32);
    const int64_t num_documents = rule_integer(set, "documents");
    const int64_t low = rule_integer(set, "length_low"), high = rule_integer(set, "length_high");
    int32_t *tokens = calloc((size_t)high, sizeof *tokens);
    struct numpy_random random;
    int result = writer == NULL ? -1 : 0;

    numpy_random_seed(&random, (uint32_t)rule_integer(set, "length_seed"));
    for (int64_t d = 0; result == 0 && d < num_documents; d++) {
        const int64_t length = numpy_random_integer(&random, low, high);

        for (int64_t j = 0; j < length; j++) {
            tokens[j] = (int32_t)((d * 7919 + j * 31 + 17) % 50000);
        }
        result = indexed_writer_add_sequence(writer, tokens, length);
        indexed_writer_end_document(writer);
    }
    free(tokens);
    if (result != 0) {
        indexed_writer_abandon(writer);
        return -1;
    }
    return indexed_writer_finish(writer);
}

/* Compares one value; remembers the first that differs. */
static inline void golden_expect(struct golden *golden, const char *split, const char *name,
                                 int64_t i, int64_t found, int64_t expected)
{
    if (found == expected) {
        golden->num_compared++;
    } else if (golden->failure[0] == '\0') {
        snprintf(golden->failure, sizeof golden->failure,
                 "%s.%s[%" PRId64 "] is %" PRId64 ", not %" PRId64, split, name, i, found,
                 expected);
    }
}

/* What dataset holds at position i of the array called name. */
static inline int64_t golden_found(const struct dataset *dataset, const char *name, int64_t i)
{
    const struct gpt_index *index = &dataset->sets[0].index;

    if (strcmp(name, "document_index") == 0) {
        return i < index->num_entries ? (int64_t)index->document_index[i] : -1;
    }
    if (strcmp(name, "sample_index") == 0) {
        const struct sample_start *start = &index->sample_index[i / 2];

        return i / 2 <= index->num_samples ? (int64_t)(i % 2 == 0 ? start->entry : start->offset)
                                           : -1;
    }
    if (strcmp(name, "shuffle_index") == 0) {
        return i < index->num_samples ? (int64_t)index->shuffle_index[i] : -1;
    }
    if (!dataset->is_blend || i >= dataset->blend.num_samples) {
        return -1;
    }
    return strcmp(name, "blend_dataset_index") == 0 ? dataset->blend.set_index[i]
                                                    : dataset->blend.sample_index[i];
}

static inline void golden_compare_split(struct golden *golden, const struct dataset *dataset,
                                        const char *split)
{
    static const char *const arrays[] = {"document_index", "sample_index", "shuffle_index",
                                         "blend_dataset_index", "blend_sample_index"};
    const int64_t num_tokens = dataset->seq_length + 1;
    int32_t *tokens = calloc((size_t)num_tokens, sizeof *tokens);
    int64_t count, num_picked;
    const int64_t *picked = golden_tensor(golden, split, "picked", &num_picked);
    const int64_t *expected = golden_tensor(golden, split, "length", &count);

    golden_expect(golden, split, "length", 0, dataset->num_samples, expected[0]);
    for (size_t a = 0; a < sizeof arrays / sizeof arrays[0]; a++) {
        expected = golden_tensor(golden, split, arrays[a], &count);
        for (int64_t i = 0; expected != NULL && i < count; i++) {
            golden_expect(golden, split, arrays[a], i, golden_found(dataset, arrays[a], i),
                          expected[i]);
        }
    }
    expected = golden_tensor(golden, split, "first_token_of_every_sample", &count);
    for (int64_t i = 0; i < count && i < dataset->num_samples; i++) {
        golden_expect(golden, split, "sample", i, dataset_sample(dataset, i, tokens), 0);
        golden_expect(golden, split, "first_token_of_every_sample", i, tokens[0], expected[i]);
    }
    expected = golden_tensor(golden, split, "tokens", &count);
    for (int64_t p = 0; p < num_picked && picked[p] < dataset->num_samples; p++) {
        golden_expect(golden, split, "sample", p, dataset_sample(dataset, picked[p], tokens), 0);
        for (int64_t j = 0; j < num_tokens; j++) {
            golden_expect(golden, split, "tokens", p * num_tokens + j, tokens[j],
                          expected[p * num_tokens + j]);
        }
    }
    free(tokens);
}

static inline void golden_compare(struct golden *golden, const struct datasets *sets)
{
    int64_t count;

    for (int which = 0; which < NUM_SPLITS; which++) {
        const bool expected = golden_tensor(golden, split_names[which], "length", &count) != NULL;

        golden_expect(golden, split_names[which], "exists", 0, sets->split[which] != NULL,
                      expected);
        if (expected && sets->split[which] != NULL) {
            golden_compare_split(golden, sets->split[which], split_names[which]);
        }
    }
}

/* Writes the data sets into folder and compares. -1 with error_set() if that cannot be done; a
 * difference is in golden->failure. */
static inline int golden_run(struct golden *golden, const char *folder)
{
    const json_t *rule = golden->rule, *sets = json_object_get(rule, "sets");
    const json_t *weights = json_object_get(rule, "weights");
    static char prefixes[GOLDEN_SETS_MAX][PATH_LENGTH_MAX], numbers[GOLDEN_SETS_MAX][32];
    const char *words[2 * GOLDEN_SETS_MAX];
    const int num_sets = (int)json_array_size(sets);
    struct datasets_config config = {
        .split = json_string_value(json_object_get(rule, "split")),
        .seq_length = rule_integer(rule, "seq_length"),
        .seed = rule_integer(rule, "seed"),
        .vocab_size = 50000,
    };
    int64_t num_samples[NUM_SPLITS];
    struct datasets built;
    int num_words = 0;

    CHECK(num_sets > 0 && num_sets <= GOLDEN_SETS_MAX, "%d sets", num_sets);
    for (int i = 0; i < num_sets; i++) {
        TRY(path_format(prefixes[i], "%s/set%d", folder, i));
        TRY(golden_write_set(json_array_get(sets, (size_t)i), prefixes[i]));
        if (json_is_array(weights)) {
            snprintf(numbers[i], sizeof numbers[i], "%.17g",
                     json_number_value(json_array_get(weights, (size_t)i)));
            words[num_words++] = numbers[i];
        }
        words[num_words++] = prefixes[i];
    }
    config.data_path = (struct word_list){words, num_words};
    for (int which = 0; which < NUM_SPLITS; which++) {
        const json_t *size = json_array_get(json_object_get(rule, "sizes"), (size_t)which);

        num_samples[which] = json_is_null(size) ? -1 : json_integer_value(size);
    }
    TRY(datasets_build(&built, &config, num_samples));
    golden_compare(golden, &built);
    datasets_free(&built);
    return 0;
}

/* Every case of a directory, a line each: "ok NAME ..." or "FAIL NAME ...". Returns the number of
 * failures, or -1 if there is no case. */
static inline int golden_run_directory(const char *directory, FILE *out)
{
    struct dirent **entries;
    const int num_entries = scandir(directory, &entries, NULL, alphasort);
    int num_cases = 0, num_failures = 0;

    for (int i = 0; i < num_entries; i++) {
        char *name = entries[i]->d_name, *suffix = strstr(name, ".json");
        char folder[] = "/tmp/cadre-megatron-data-XXXXXX";
        struct golden golden = {0};

        if (suffix != NULL && mkdtemp(folder) != NULL) {
            *suffix = '\0';
            num_cases++;
            if (golden_open(&golden, directory, name) != 0 || golden_run(&golden, folder) != 0) {
                snprintf(golden.failure, sizeof golden.failure, "%s", error_text());
            }
            num_failures += golden.failure[0] != '\0';
            fprintf(out, "%s megatron-data/%s %s", golden.failure[0] == '\0' ? "ok" : "FAIL", name,
                    golden.failure);
            fprintf(out, "(%" PRId64 " values equal)\n", golden.num_compared);
            golden_close(&golden);
            path_remove_tree(folder);
        }
        free(entries[i]);
    }
    if (num_entries >= 0) {
        free(entries);
    }
    return num_cases > 0 ? num_failures : -1;
}

#endif
