/* index_cache.h - arrays that are slow to compute and the same for every process of a job, kept as
 * .npy files (numpy opens them) beside a description that says what they were computed from.
 *
 *     DIR/KEY-NAME-description.txt    the facts, then a line with the hash of each array
 *     DIR/KEY-NAME-document_index.npy ...
 *
 * KEY is a hash of the facts, so other facts are other files. Many processes may load and store at
 * once: files appear by rename, and every process writes the same bytes. Whatever is damaged,
 * incomplete or of an older format is not loaded, and so computed and stored again. */
#ifndef CADRE_DATA_INDEX_CACHE_H
#define CADRE_DATA_INDEX_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "data/mapped_file.h"

struct index_array {
    const char *name;  /* "document_index" */
    const char *dtype; /* numpy's: "<u4" */
    int item_bytes;
    int64_t num_rows;
    int num_columns; /* 0: one dimension */
    void *data;      /* malloc'd, or read-only inside map */
    struct mapped_file map;
};

int64_t index_array_bytes(const struct index_array *array);
/* malloc's data. -1 when out of memory, naming the array and its size. */
int index_array_allocate(struct index_array *array);
void index_array_free(struct index_array *array);

struct index_cache {
    const char *directory; /* NULL: nothing is loaded or stored */
    const char *name;      /* "GPTDataset-train" */
    const char *facts;     /* lines of text */
};

/* The arrays say everything but data. True if all of them were loaded. */
bool index_cache_load(const struct index_cache *cache, struct index_array *arrays, int num_arrays);
/* Failing to store is a warning: the arrays are in memory. */
void index_cache_store(const struct index_cache *cache, const struct index_array *arrays,
                       int num_arrays);

#endif
