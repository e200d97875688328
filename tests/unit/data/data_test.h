/* data_test.h - what the tests of this folder share: a folder to write in, small data sets. */
#ifndef CADRE_TESTS_DATA_TEST_H
#define CADRE_TESTS_DATA_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"
#include "data/indexed_writer.h"

static char scratch[] = "/tmp/cadre-data-test-XXXXXX";

static inline int make_scratch(void **state)
{
    strcpy(scratch + sizeof scratch - 7, "XXXXXX");
    return mkdtemp(scratch) != NULL ? 0 : -1;
}

static inline int remove_scratch(void **state)
{
    return path_remove_tree(scratch);
}

static inline const char *scratch_path(const char *name)
{
    static char paths[4][PATH_LENGTH_MAX]; /* of the last four calls */
    static int next;
    char *path = paths[next++ % 4];

    assert_int_equal(path_format(path, "%s/%s", scratch, name), 0);
    return path;
}

/* Document d holds lengths[d] tokens 1000*d, 1000*d + 1, ... */
static inline void write_counting_set(const char *prefix, const int32_t *lengths, int num_documents,
                                      enum token_dtype dtype)
{
    struct indexed_writer *writer = indexed_writer_open(prefix, dtype);

    assert_non_null(writer);
    for (int d = 0; d < num_documents; d++) {
        int32_t tokens[1000];

        for (int32_t i = 0; i < lengths[d]; i++) {
            tokens[i] = 1000 * d + i;
        }
        assert_int_equal(indexed_writer_add_sequence(writer, tokens, lengths[d]), 0);
        indexed_writer_end_document(writer);
    }
    assert_int_equal(indexed_writer_finish(writer), 0);
}

static inline void write_bytes(const char *path, const void *bytes, size_t num_bytes)
{
    assert_int_equal(path_write_file_atomic(path, bytes, num_bytes), 0);
}

#define assert_error_mentions(text) assert_non_null(strstr(error_text(), (text)))

#endif
