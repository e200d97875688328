#include "data_test.h"

#include "data/indexed_dataset.h"

/* Three documents: of two sequences, of none, of one. */
static void write_example(const char *prefix)
{
    struct indexed_writer *writer = indexed_writer_open(prefix, TOKEN_U16);

    assert_int_equal(indexed_writer_add_sequence(writer, (int32_t[]){1, 2, 65535}, 3), 0);
    assert_int_equal(indexed_writer_add_sequence(writer, (int32_t[]){}, 0), 0);
    indexed_writer_end_document(writer);
    indexed_writer_end_document(writer);
    assert_int_equal(indexed_writer_add_sequence(writer, (int32_t[]){256}, 1), 0);
    indexed_writer_end_document(writer);
    assert_int_equal(indexed_writer_num_tokens(writer), 4);
    assert_int_equal(indexed_writer_finish(writer), 0);
}

/* The same, byte by byte, from the format's description. */
static const uint8_t example_idx[] = {
    'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, /* magic, version */
    8,   3,   0,   0,   0,   0,   0,   0, 0, 4, 0, 0, 0, 0, 0, 0, 0, /* dtype, sequences, document
                                                                        starts */
    3,   0,   0,   0,   0,   0,   0,   0, 1, 0, 0, 0,                /* lengths */
    0,   0,   0,   0,   0,   0,   0,   0, 6, 0, 0, 0, 0, 0, 0, 0, 6, 0,
    0,   0,   0,   0,   0,   0,                                   /* pointers */
    0,   0,   0,   0,   0,   0,   0,   0, 2, 0, 0, 0, 0, 0, 0, 0, /* documents */
    2,   0,   0,   0,   0,   0,   0,   0, 3, 0, 0, 0, 0, 0, 0, 0,
};
static const uint8_t example_bin[] = {1, 0, 2, 0, 0xff, 0xff, 0, 1};

enum { LENGTHS_AT = 34, POINTERS_AT = 46, DOCUMENTS_AT = 70 };

static void assert_file_holds(const char *path, const uint8_t *expected, size_t num_bytes)
{
    size_t length;
    char *found = path_read_file(path, 1 << 20, &length);

    assert_non_null(found);
    assert_int_equal(length, num_bytes);
    assert_memory_equal(found, expected, num_bytes);
    free(found);
}

static void files_are_megatrons_byte_for_byte(void **state)
{
    write_example(scratch_path("set"));
    assert_file_holds(scratch_path("set.idx"), example_idx, sizeof example_idx);
    assert_file_holds(scratch_path("set.bin"), example_bin, sizeof example_bin);
}

static void what_is_written_is_read_back(void **state)
{
    struct indexed_dataset set;
    int32_t tokens[3];

    write_example(scratch_path("set"));
    assert_int_equal(indexed_dataset_open(&set, scratch_path("set")), 0);
    assert_int_equal(set.num_sequences, 3);
    assert_int_equal(set.num_documents, 3);
    assert_int_equal(indexed_dataset_length(&set, 0), 3);
    assert_int_equal(indexed_dataset_length(&set, 1), 0);
    assert_int_equal(indexed_dataset_document_start(&set, 2), 2);
    assert_int_equal(indexed_dataset_read(&set, 0, 1, 2, tokens), 0);
    assert_int_equal(tokens[0], 2);
    assert_int_equal(tokens[1], 65535);
    assert_int_equal(indexed_dataset_read(&set, 1, 0, 0, tokens), 0);
    assert_int_equal(indexed_dataset_read(&set, 2, 0, 1, tokens), 0);
    assert_int_equal(tokens[0], 256);
    indexed_dataset_close(&set);
}

static void every_integer_type_is_read(void **state)
{
    static const enum token_dtype dtypes[] = {TOKEN_U8,  TOKEN_I8,  TOKEN_I16,
                                              TOKEN_I32, TOKEN_I64, TOKEN_U16};

    for (int t = 0; t < 6; t++) {
        struct indexed_writer *writer = indexed_writer_open(scratch_path("typed"), dtypes[t]);
        struct indexed_dataset set;
        int32_t tokens[3];

        assert_int_equal(indexed_writer_add_sequence(writer, (int32_t[]){7, 0, 127}, 3), 0);
        indexed_writer_end_document(writer);
        assert_int_equal(indexed_writer_finish(writer), 0);
        assert_int_equal(indexed_dataset_open(&set, scratch_path("typed")), 0);
        assert_int_equal(set.bin.size_bytes, 3 * token_dtype_bytes(dtypes[t]));
        assert_int_equal(indexed_dataset_read(&set, 0, 0, 3, tokens), 0);
        assert_memory_equal(tokens, ((int32_t[]){7, 0, 127}), sizeof tokens);
        indexed_dataset_close(&set);
    }
}

static void a_token_beyond_the_type_is_refused(void **state)
{
    struct indexed_writer *writer = indexed_writer_open(scratch_path("narrow"), TOKEN_U16);

    assert_int_equal(indexed_writer_add_sequence(writer, (int32_t[]){65536}, 1), -1);
    assert_error_mentions("token 65536 does not fit uint16");
    indexed_writer_abandon(writer);
    assert_false(path_exists(scratch_path("narrow.bin")));
    assert_false(path_exists(scratch_path("narrow.idx")));
}

static void the_type_follows_the_vocabulary(void **state)
{
    assert_int_equal(token_dtype_for_vocab(65499), TOKEN_U16);
    assert_int_equal(token_dtype_for_vocab(65500), TOKEN_I32);
}

/* Opens the example with num_bytes of its .idx overwritten at `at`. */
static int open_damaged(size_t at, const void *bytes, size_t num_bytes)
{
    uint8_t idx[sizeof example_idx];
    struct indexed_dataset set;
    int result;

    memcpy(idx, example_idx, sizeof idx);
    memcpy(idx + at, bytes, num_bytes);
    write_bytes(scratch_path("bad.idx"), idx, sizeof idx);
    write_bytes(scratch_path("bad.bin"), example_bin, sizeof example_bin);
    result = indexed_dataset_open(&set, scratch_path("bad"));
    if (result == 0) {
        indexed_dataset_close(&set);
    }
    return result;
}

static void each_lie_in_the_index_is_named(void **state)
{
    static const struct {
        size_t at;
        int64_t value;
        size_t num_bytes;
        const char *message;
    } lies[] = {
        {0, 'X', 1, "does not begin with MMIDIDX"},
        {9, 2, 8, "has version 2"},
        {17, 0, 1, "has dtype code 0"},
        {17, 9, 1, "has dtype code 9"},
        {18, 4, 8, "4 sequences and 3 documents take"},
        {18, -1, 8, "announces"},
        {18, INT64_MAX, 8, "announces"},
        {26, 5, 8, "3 sequences and 4 documents take"},
        {26, 0, 8, "announces"},
        {26, INT64_MAX, 8, "announces"},
        {LENGTHS_AT, -1, 4, "places sequence 0"},
        {LENGTHS_AT, 5, 4, "places sequence 0"},
        {LENGTHS_AT + 8, INT32_MAX, 4, "places sequence 2"},
        {POINTERS_AT, -2, 8, "places sequence 0"},
        {POINTERS_AT + 16, 7, 8, "places sequence 2"},
        {POINTERS_AT + 16, INT64_MAX, 8, "places sequence 2"},
        {DOCUMENTS_AT, 1, 8, "lets document 0 start at sequence 1"},
        {DOCUMENTS_AT + 8, 3, 8, "lets document 2 start at sequence 2"},
        {DOCUMENTS_AT + 8, -1, 8, "lets document 1 start at sequence -1"},
        {DOCUMENTS_AT + 24, 2, 8, "ends its documents at sequence 2 of 3"},
        {DOCUMENTS_AT + 24, 4, 8, "lets document 3 start at sequence 4"},
    };

    assert_int_equal(open_damaged(0, example_idx, 1), 0);
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        assert_int_equal(open_damaged(lies[i].at, &lies[i].value, lies[i].num_bytes), -1);
        assert_error_mentions(lies[i].message);
    }
}

static void every_truncation_is_an_error(void **state)
{
    struct indexed_dataset set;

    write_bytes(scratch_path("cut.bin"), example_bin, sizeof example_bin);
    for (size_t length = 0; length < sizeof example_idx; length++) {
        write_bytes(scratch_path("cut.idx"), example_idx, length);
        assert_int_equal(indexed_dataset_open(&set, scratch_path("cut")), -1);
    }
    write_bytes(scratch_path("cut.idx"), example_idx, sizeof example_idx);
    write_bytes(scratch_path("cut.bin"), example_bin, sizeof example_bin - 1);
    assert_int_equal(indexed_dataset_open(&set, scratch_path("cut")), -1);
    assert_int_equal(path_remove_tree(scratch_path("cut.bin")), 0);
    assert_int_equal(indexed_dataset_open(&set, scratch_path("cut")), -1);
    assert_error_mentions("cut.bin");
}

static void a_multimodal_set_is_refused_as_such(void **state)
{
    uint8_t idx[sizeof example_idx + 3] = {0};
    struct indexed_dataset set;

    memcpy(idx, example_idx, sizeof example_idx);
    write_bytes(scratch_path("modes.idx"), idx, sizeof idx);
    write_bytes(scratch_path("modes.bin"), example_bin, sizeof example_bin);
    assert_int_equal(indexed_dataset_open(&set, scratch_path("modes")), -1);
    assert_error_mentions("multimodal");
}

static void numbers_that_are_no_tokens_are_an_error(void **state)
{
    struct indexed_dataset set;
    uint8_t idx[sizeof example_idx];
    int32_t token;

    write_counting_set(scratch_path("signed"), (int32_t[]){1}, 1, TOKEN_I32);
    write_bytes(scratch_path("signed.bin"), (int32_t[]){-5}, 4);
    assert_int_equal(indexed_dataset_open(&set, scratch_path("signed")), 0);
    assert_int_equal(indexed_dataset_read(&set, 0, 0, 1, &token), -1);
    assert_error_mentions("holds token -5");
    indexed_dataset_close(&set);

    memcpy(idx, example_idx, sizeof idx);
    idx[17] = TOKEN_F32;
    idx[LENGTHS_AT] = 1;
    idx[LENGTHS_AT + 8] = 0;
    write_bytes(scratch_path("float.idx"), idx, sizeof idx);
    write_bytes(scratch_path("float.bin"), example_bin, sizeof example_bin);
    assert_int_equal(indexed_dataset_open(&set, scratch_path("float")), 0);
    assert_int_equal(indexed_dataset_read(&set, 0, 0, 1, &token), -1);
    assert_error_mentions("float32");
    indexed_dataset_close(&set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(files_are_megatrons_byte_for_byte),
        cmocka_unit_test(what_is_written_is_read_back),
        cmocka_unit_test(every_integer_type_is_read),
        cmocka_unit_test(a_token_beyond_the_type_is_refused),
        cmocka_unit_test(the_type_follows_the_vocabulary),
        cmocka_unit_test(each_lie_in_the_index_is_named),
        cmocka_unit_test(every_truncation_is_an_error),
        cmocka_unit_test(a_multimodal_set_is_refused_as_such),
        cmocka_unit_test(numbers_that_are_no_tokens_are_an_error),
    };

    return cmocka_run_group_tests(tests, make_scratch, remove_scratch);
}
