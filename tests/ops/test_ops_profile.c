#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "ops/ops_profile.h"

/* What ops_profile_print prints. */
static void printed(char *text, size_t size, const struct op_roof *roof)
{
    FILE *file = tmpfile();
    size_t count;

    assert_non_null(file);
    ops_profile_print(file, roof);
    rewind(file);
    count = fread(text, 1, size - 1, file);
    text[count] = '\0';
    fclose(file);
}

static void ops_are_timed_between_start_and_stop(void **state)
{
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    struct arena *arena = arena_create("test", &device_cpu()->memory);
    struct tensor a = tensor_new(arena, DTYPE_F32, 5, 7), b = tensor_new(arena, DTYPE_F32, 7, 3);
    struct tensor c = tensor_new(arena, DTYPE_F32, 5, 3);
    const struct matmul product = {.c = &c, .a = &a, .b = &b};
    char text[4096];

    op_fill_zero(stream, &a);
    op_fill_zero(stream, &b);
    ops_profile_start(stream);
    op_matmul(stream, &product);
    op_fill_zero(stream, &a);
    op_matmul(stream, &product);
    ops_profile_stop(stream);
    op_fill_zero(stream, &b);
    assert_ptr_equal(stream->ops, ops_cpu());
    printed(text, sizeof text, &(struct op_roof){0});
    assert_non_null(strstr(text, "5 x 3 x 7                        2 calls"));
    assert_non_null(strstr(text, "fill_zero"));
    assert_non_null(strstr(text, " 3 calls"));
    assert_non_null(strstr(text, "FLOP/s"));
    assert_non_null(strstr(text, "B/s"));
    assert_null(strstr(text, "of the roof"));
    printed(text, sizeof text, &(struct op_roof){1e12, 1e11});
    assert_non_null(strstr(text, "% of the roof"));
    arena_destroy(arena);
    stream_destroy(stream);
}

static void a_profile_of_nothing_prints_nothing_but_that(void **state)
{
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    char text[512];

    ops_profile_start(stream);
    ops_profile_stop(stream);
    printed(text, sizeof text, &(struct op_roof){0});
    assert_non_null(strstr(text, "0 calls"));
    stream_destroy(stream);
}

static void a_trace_has_an_event_for_each_op(void **state)
{
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    struct arena *arena = arena_create("test", &device_cpu()->memory);
    struct tensor x = tensor_new(arena, DTYPE_F32, 8);
    char path[] = "/tmp/test_ops_profile_XXXXXX", text[2048];
    const int descriptor = mkstemp(path);
    int num_events = 0;
    ssize_t count;

    assert_true(descriptor >= 0);
    ops_profile_start(stream);
    op_fill_zero(stream, &x);
    op_add(stream, &(struct add){.y = &x, .u = &x, .v = &x});
    ops_profile_stop(stream);
    assert_int_equal(ops_profile_write_trace(path), 0);
    count = read(descriptor, text, sizeof text - 1);
    assert_true(count > 0);
    text[count] = '\0';
    for (const char *at = text; (at = strstr(at, "\"ph\":\"X\"")) != NULL; at++) {
        num_events++;
    }
    assert_int_equal(num_events, 2);
    assert_non_null(strstr(text, "\"name\":\"add\""));
    assert_int_equal(ops_profile_write_trace("/nowhere/trace.json"), -1);
    close(descriptor);
    unlink(path);
    arena_destroy(arena);
    stream_destroy(stream);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ops_are_timed_between_start_and_stop),
        cmocka_unit_test(a_profile_of_nothing_prints_nothing_but_that),
        cmocka_unit_test(a_trace_has_an_event_for_each_op),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
