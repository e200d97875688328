/* The safetensors reader and writer: canonical bytes, round trips, boxes, and every kind of bad
 * file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/check.h"
#include "base/path.h"
#include "ckpt/convert_dtype.h"
#include "ckpt/safetensors.h"
#include "ckpt/safetensors_writer.h"

static char directory[] = "/tmp/cadre_safetensors_XXXXXX";
static char path[PATH_LENGTH_MAX];

/* Writes a file of this header and num_data_bytes zeros, the header's length first. */
static void write_raw(const char *header, size_t num_data_bytes)
{
    const uint64_t length = strlen(header);
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    for (int i = 0; i < 8; i++) {
        fputc((int)(length >> 8 * i & 255), file);
    }
    fputs(header, file);
    for (size_t i = 0; i < num_data_bytes; i++) {
        fputc(0, file);
    }
    fclose(file);
}

static void assert_refused(const char *header, size_t num_data_bytes, const char *reason)
{
    write_raw(header, num_data_bytes);
    assert_null(safetensors_open(path));
    if (strstr(error_text(), reason) == NULL || strstr(error_text(), path) == NULL) {
        fail_msg("%s: \"%s\" does not say \"%s\"", header, error_text(), reason);
    }
}

static void assert_accepted(const char *header, size_t num_data_bytes, int num_tensors)
{
    struct safetensors *file;

    write_raw(header, num_data_bytes);
    file = safetensors_open(path);
    if (file == NULL) {
        fail_msg("%s: %s", header, error_text());
    }
    assert_int_equal(safetensors_num_tensors(file), num_tensors);
    safetensors_close(file);
}

static void a_written_file_has_the_reference_bytes(void **state)
{
    /* The format's own test vector, with the metadata that everybody writes. */
    static const char expected[] = "\x60\0\0\0\0\0\0\0"
                                   "{\"__metadata__\":{\"format\":\"pt\"},\"attn.0\":{\"dtype\":"
                                   "\"F32\",\"shape\":[1,2,3],\"data_offsets\":[0,24]}}   ";
    float values[6] = {0};
    const struct tensor tensor = tensor_of(values, DTYPE_F32, 1, 2, 3);
    const char *name = "attn.0";
    size_t length;
    char *bytes;

    assert_int_equal(safetensors_save(path, &name, &tensor, 1), 0);
    bytes = path_read_file(path, 1000, &length);
    assert_non_null(bytes);
    assert_int_equal(length, 8 + 0x60 + 24);
    assert_memory_equal(bytes, expected, 8 + 0x60);
    free(bytes);
}

static void tensors_are_ordered_by_type_then_name_and_read_back(void **state)
{
    const char *names[] = {"b", "a", "wide", "half"};
    float b[2] = {1, 2}, a[1] = {3};
    int64_t wide[1] = {-5};
    uint16_t half[3] = {7, 8, 9};
    const struct tensor tensors[] = {tensor_of(b, DTYPE_F32, 2), tensor_wrap(a, DTYPE_F32, NULL, 0),
                                     tensor_of(wide, DTYPE_I64, 1),
                                     tensor_of(half, DTYPE_BF16, 3, 1)};
    const char *order[] = {"wide", "a", "b", "half"};
    const struct safetensors_tensor *found;
    struct safetensors *file;
    uint16_t read[3];

    assert_int_equal(safetensors_save(path, names, tensors, 4), 0);
    file = safetensors_open(path);
    assert_non_null(file);
    assert_int_equal(safetensors_num_tensors(file), 4);
    for (int i = 0; i < 4; i++) {
        assert_string_equal(safetensors_at(file, i)->name, order[i]);
    }
    found = safetensors_find(file, "half");
    assert_int_equal(found->num_dims, 2);
    assert_int_equal(found->shape[0], 3);
    assert_int_equal(safetensors_read(file, found, read), 0);
    assert_memory_equal(read, half, sizeof half);
    assert_int_equal(safetensors_find(file, "a")->num_dims, 0);
    assert_null(safetensors_find(file, "c"));
    assert_string_equal(safetensors_metadata(file, "format"), "pt");
    assert_null(safetensors_metadata(file, "other"));
    safetensors_close(file);
}

static void a_box_is_read_into_a_box_and_converted(void **state)
{
    /* Global [4,6]; the file holds rows 1..3, columns 2..5; wanted: rows 2..3, columns 0..4. */
    const struct box from = {2, {1, 2}, {3, 4}}, to = {2, {2, 0}, {2, 5}};
    float values[12], out[10];
    uint16_t out_bf16[10] = {0};
    const struct tensor tensor = tensor_of(values, DTYPE_F32, 3, 4);
    const char *name = "x";
    struct safetensors *file;
    struct box part;

    for (int i = 0; i < 12; i++) {
        values[i] = (float)((i / 4 + 1) * 10 + i % 4 + 2);
    }
    for (int i = 0; i < 10; i++) {
        out[i] = -1;
    }
    assert_int_equal(safetensors_save(path, &name, &tensor, 1), 0);
    file = safetensors_open(path);
    assert_true(box_intersect(&from, &to, &part));
    assert_int_equal(
        safetensors_read_box(file, safetensors_at(file, 0), &from, &part, out, &to, DTYPE_F32), 0);
    const float expected[10] = {-1, -1, 22, 23, 24, -1, -1, 32, 33, 34};
    assert_memory_equal(out, expected, sizeof out);
    assert_int_equal(safetensors_read_box(file, safetensors_at(file, 0), &from, &part, out_bf16,
                                          &to, DTYPE_BF16),
                     0);
    assert_true(bf16_to_float(out_bf16[9]) == 34.0f && out_bf16[5] == 0);
    assert_int_equal(
        safetensors_read_box(file, safetensors_at(file, 0), &from, &part, out, &to, DTYPE_I32), -1);
    assert_non_null(strstr(error_text(), "F32"));
    safetensors_close(file);
}

static void a_large_tensor_is_converted_in_pieces(void **state)
{
    const int64_t count = 1000003;
    const struct box whole = {1, {0}, {count}};
    float *values = malloc((size_t)count * sizeof *values);
    uint16_t *half = malloc((size_t)count * sizeof *half);
    const struct tensor tensor = tensor_of(values, DTYPE_F32, count);
    const char *name = "x";
    struct safetensors *file;

    for (int64_t i = 0; i < count; i++) {
        values[i] = (float)(i % 2048);
    }
    assert_int_equal(safetensors_save(path, &name, &tensor, 1), 0);
    file = safetensors_open(path);
    assert_int_equal(safetensors_read_box(file, safetensors_at(file, 0), &whole, &whole, half,
                                          &whole, DTYPE_F16),
                     0);
    for (int64_t i = 0; i < count; i++) {
        assert_true(f16_to_float(half[i]) == values[i]);
    }
    safetensors_close(file);
    free(values);
    free(half);
}

static void f16_and_bf16_survive_f32_bit_for_bit(void **state)
{
    uint16_t all[65536], back[65536];
    float wide[65536];

    for (int i = 0; i < 65536; i++) {
        all[i] = (uint16_t)i;
    }
    for (int k = 0; k < 2; k++) {
        const enum dtype dtype = k == 0 ? DTYPE_F16 : DTYPE_BF16;

        convert_dtype(wide, DTYPE_F32, all, dtype, 65536);
        convert_dtype(back, dtype, wide, DTYPE_F32, 65536);
        for (int i = 0; i < 65536; i++) {
            if (wide[i] == wide[i]) { /* NaNs stay NaNs, quieted */
                assert_int_equal(back[i], all[i]);
            } else {
                convert_dtype(wide + i, DTYPE_F32, back + i, dtype, 1);
                assert_true(wide[i] != wide[i]);
            }
        }
    }
    const float ties[4] = {2049.0f, 2051.0f, 1e6f, -1e-9f}; /* f16: even, even, infinity, zero */
    convert_dtype(back, DTYPE_F16, ties, DTYPE_F32, 4);
    assert_int_equal(back[0], 0x6800);
    assert_int_equal(back[1], 0x6802);
    assert_int_equal(back[2], 0x7c00);
    assert_int_equal(back[3], 0x8000);
}

static void what_the_reference_accepts_is_accepted(void **state)
{
    assert_accepted("{}", 0, 0);
    assert_accepted(" \t\r\n{}  \n", 0, 0);
    assert_accepted("{\"x\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 1);
    assert_accepted("{\"x\":{\"dtype\":\"F32\",\"shape\":[2,0],\"data_offsets\":[0,0]}}", 0, 1);
    assert_accepted("{\"x\":{\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[0,2],\"more\":1}}", 2,
                    1);
    assert_accepted("{\"x\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[2,3]},"
                    "\"y\":{\"dtype\":\"U16\",\"shape\":[1],\"data_offsets\":[0,2]}}",
                    3, 2);
}

static void what_the_reference_refuses_is_refused(void **state)
{
    assert_refused("", 0, "not valid JSON");
    assert_refused("[]", 0, "not a JSON object");
    assert_refused("{} x", 0, "not valid JSON");
    assert_refused("{\"\xff\":{}}", 0, "not valid JSON");
    assert_refused("{\"x\":1}", 0, "not an object");
    assert_refused("{\"__metadata__\":{\"a\":1}}", 0, "not a string");
    assert_refused("{\"__metadata__\":[]}", 0, "not an object");
    assert_refused("{\"x\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype is missing");
    assert_refused("{\"x\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
                   "unknown dtype");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1,
                   "shape is missing");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,1]}}", 1,
                   "non-negative");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[1.0],\"data_offsets\":[0,1]}}", 1,
                   "non-negative");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1,
                   "two integers");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,0]}}", 1, "before");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,1]}}", 1,
                   "dtype and shape need 2");
    assert_refused("{\"x\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1,
                   "whole bytes");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],"
                   "\"data_offsets\":[0,0]}}",
                   0, "overflows");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[99999999999999999999],"
                   "\"data_offsets\":[0,0]}}",
                   0, "not valid JSON");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}", 2,
                   "expected at 0"); /* hole */
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
                   "\"y\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}",
                   2, "expected at 2"); /* the same bytes twice */
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 1,
                   "outside the file");
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 3,
                   "of 3 bytes"); /* bytes after the last tensor */
    assert_refused("{\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
                   "\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                   0, "duplicate");
}

static void a_header_length_beyond_the_file_is_refused(void **state)
{
    static const struct {
        const char *bytes;
        size_t length;
        const char *reason;
    } cases[] = {{"", 0, "too few"},
                 {"\1\0\0\0\0\0\0", 7, "too few"},
                 {"\3\0\0\0\0\0\0\0{}", 10, "has 2 after"},
                 {"\1\341\365\5\0\0\0\0{}", 10, "limit"},
                 {"\377\377\377\377\377\377\377\377{}", 10, "limit"}};

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(path_write_file_atomic(path, cases[i].bytes, cases[i].length), 0);
        assert_null(safetensors_open(path));
        assert_non_null(strstr(error_text(), cases[i].reason));
    }
    assert_null(safetensors_open("/nowhere/x.safetensors"));
    assert_non_null(strstr(error_text(), "/nowhere/x.safetensors"));
    assert_null(safetensors_open(directory));
}

static void every_truncation_is_refused(void **state)
{
    const char *names[] = {"a", "b"};
    float values[4] = {1, 2, 3, 4};
    const struct tensor tensors[] = {tensor_of(values, DTYPE_F32, 4),
                                     tensor_of(values, DTYPE_F32, 2, 2)};
    int64_t size_bytes;

    assert_int_equal(safetensors_save(path, names, tensors, 2), 0);
    assert_int_equal(path_file_size(path, &size_bytes), 0);
    for (int64_t length = size_bytes - 1; length >= 0; length--) {
        assert_int_equal(truncate(path, length), 0);
        assert_null(safetensors_open(path));
    }
}

static void a_file_that_shrinks_while_open_is_an_error(void **state)
{
    const char *name = "a";
    float values[4] = {1, 2, 3, 4};
    const struct tensor tensor = tensor_of(values, DTYPE_F32, 4);
    struct safetensors *file;

    assert_int_equal(safetensors_save(path, &name, &tensor, 1), 0);
    file = safetensors_open(path);
    assert_int_equal(truncate(path, 90), 0);
    assert_int_equal(safetensors_read(file, safetensors_at(file, 0), values), -1);
    assert_non_null(strstr(error_text(), "too early"));
    safetensors_close(file);
}

static void an_unfinished_writer_leaves_nothing(void **state)
{
    const int64_t shape[1] = {2};
    struct safetensors_writer *writer = safetensors_writer_create();
    char other[PATH_LENGTH_MAX];

    assert_int_equal(path_format(other, "%s/unfinished", directory), 0);
    safetensors_writer_declare(writer, "x", DTYPE_F32, shape, 1);
    assert_int_equal(safetensors_writer_begin(writer, other), 0);
    assert_true(path_exists(other));
    safetensors_writer_destroy(writer);
    assert_false(path_exists(other));
}

static void the_hash_of_the_writer_is_that_of_the_file(void **state)
{
    const int64_t shape[1] = {3};
    struct safetensors_writer *writer = safetensors_writer_create();
    char hash[CONTENT_HASH_TEXT_BYTES], expected[CONTENT_HASH_TEXT_BYTES];
    int64_t size_bytes, expected_bytes;

    safetensors_writer_metadata(writer, "key", "value");
    safetensors_writer_declare(writer, "x", DTYPE_U8, shape, 1);
    assert_int_equal(safetensors_writer_begin(writer, path), 0);
    assert_int_equal(safetensors_writer_append(writer, "ab", 2), 0);
    assert_int_equal(safetensors_writer_append(writer, "c", 1), 0);
    assert_int_equal(safetensors_writer_finish(writer, hash, &size_bytes), 0);
    safetensors_writer_destroy(writer);
    assert_int_equal(content_hash_file(path, expected), 0);
    assert_string_equal(hash, expected);
    assert_int_equal(path_file_size(path, &expected_bytes), 0);
    assert_int_equal(size_bytes, expected_bytes);
    content_hash_of("", 0, hash); /* the published value of the empty input */
    assert_string_equal(hash, "99aa06d3014798d86001c324468d497f");
}

static void the_fixture_opens(void **state)
{
    struct safetensors *file = safetensors_open(FIXTURES "/mixtral-tiny/model.safetensors");

    assert_non_null(file);
    assert_non_null(safetensors_find(file, "model.layers.1.block_sparse_moe.experts.3.w2.weight"));
    safetensors_close(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_written_file_has_the_reference_bytes),
        cmocka_unit_test(tensors_are_ordered_by_type_then_name_and_read_back),
        cmocka_unit_test(a_box_is_read_into_a_box_and_converted),
        cmocka_unit_test(a_large_tensor_is_converted_in_pieces),
        cmocka_unit_test(f16_and_bf16_survive_f32_bit_for_bit),
        cmocka_unit_test(what_the_reference_accepts_is_accepted),
        cmocka_unit_test(what_the_reference_refuses_is_refused),
        cmocka_unit_test(a_header_length_beyond_the_file_is_refused),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(a_file_that_shrinks_while_open_is_an_error),
        cmocka_unit_test(an_unfinished_writer_leaves_nothing),
        cmocka_unit_test(the_hash_of_the_writer_is_that_of_the_file),
        cmocka_unit_test(the_fixture_opens),
    };
    int result;

    if (mkdtemp(directory) == NULL || path_format(path, "%s/x.safetensors", directory) != 0) {
        return 1;
    }
    result = cmocka_run_group_tests(tests, NULL, NULL);
    return path_remove_tree(directory) != 0 ? 1 : result;
}
