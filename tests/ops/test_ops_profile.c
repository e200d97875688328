#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <math.h>
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

static void transfer(const char *name, const char *lane, int64_t size_bytes, void *mark)
{
    struct transfer facts = {.name = name, .size_bytes = size_bytes};

    assert_non_null(mark);
    snprintf(facts.lane, sizeof facts.lane, "%s", lane);
    ops_profile_transfer_end(device_cpu(), NULL, mark, &facts);
}

static void add(struct stream *stream, struct tensor *x)
{
    op_add(stream, &(struct add){.y = x, .u = x, .v = x});
}

/* What the table's last line says, in milliseconds. */
static void communication(double *moving, double *hidden, double *exposed)
{
    char text[4096];
    double whole, percent;
    const char *line;

    printed(text, sizeof text, &(struct op_roof){0});
    line = strstr(text, "communication ");
    assert_non_null(line);
    assert_int_equal(
        sscanf(line, "communication %lf ms of %lf: %lf ms hidden behind ops (%lf %%), %lf exposed",
               moving, &whole, hidden, &percent, exposed),
        5);
}

static void transfers_are_hidden_where_ops_run(void **state)
{
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    struct arena *arena = arena_create("test", &device_cpu()->memory);
    struct tensor x = tensor_new(arena, DTYPE_F32, 1 << 20);
    double moving, hidden, exposed;
    void *mark;

    op_fill_zero(stream, &x);
    assert_null(ops_profile_transfer_begin(device_cpu(), NULL));
    ops_profile_start(stream);
    mark = ops_profile_transfer_begin(device_cpu(), NULL);
    add(stream, &x);
    transfer("all_gather", "dp-cp (2 ranks)", 1000, mark);
    ops_profile_stop(stream);
    communication(&moving, &hidden, &exposed);
    assert_true(hidden > 0.0 && fabs(hidden + exposed - moving) < 0.002);

    ops_profile_start(stream);
    add(stream, &x);
    mark = ops_profile_transfer_begin(device_cpu(), NULL);
    usleep(2000);
    transfer("all_gather", "dp-cp (2 ranks)", 1000, mark);
    add(stream, &x);
    mark = ops_profile_transfer_begin(device_cpu(), NULL);
    ops_profile_stop(stream);
    transfer("all_gather", "dp-cp (2 ranks)", 1000, mark); /* too late: left out */
    communication(&moving, &hidden, &exposed);
    assert_true(hidden == 0.0 && exposed == moving && moving >= 2.0);
    arena_destroy(arena);
    stream_destroy(stream);
}

static void count_in(const char *text, const char *what, int expected)
{
    int count = 0;

    for (const char *at = text; (at = strstr(at, what)) != NULL; at++) {
        count++;
    }
    assert_int_equal(count, expected);
}

static void each_lane_of_transfers_is_named_once(void **state)
{
    struct stream *stream = stream_create(device_cpu(), ops_cpu());
    struct arena *arena = arena_create("test", &device_cpu()->memory);
    struct tensor x = tensor_new(arena, DTYPE_F32, 8);
    char path[] = "/tmp/test_ops_profile_XXXXXX", text[4096];
    const int descriptor = mkstemp(path);
    ssize_t count;

    ops_profile_start(stream);
    add(stream, &x);
    transfer("all_to_all", "ep (2 ranks)", 1000, ops_profile_transfer_begin(device_cpu(), NULL));
    transfer("all_reduce", "tp (4 ranks)", 77, ops_profile_transfer_begin(device_cpu(), NULL));
    transfer("all_to_all", "ep (2 ranks)", 234, ops_profile_transfer_begin(device_cpu(), NULL));
    ops_profile_stop(stream);
    assert_int_equal(ops_profile_write_trace(path), 0);
    count = read(descriptor, text, sizeof text - 1);
    assert_true(count > 0);
    text[count] = '\0';
    count_in(text, "\"ph\":\"X\"", 4);
    count_in(text, "\"ph\":\"M\"", 3);
    count_in(text, "\"args\":{\"name\":\"ep (2 ranks)\"}", 1);
    count_in(text, "\"name\":\"all_to_all\",\"ph\":\"X\",\"pid\":0,\"tid\":1,", 2);
    count_in(text, "\"name\":\"all_reduce\",\"ph\":\"X\",\"pid\":0,\"tid\":2,", 1);
    count_in(text, "\"sizes\":\"ep (2 ranks)\",\"bytes\":234}", 1);
    close(descriptor);
    unlink(path);
    arena_destroy(arena);
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
        cmocka_unit_test(transfers_are_hidden_where_ops_run),
        cmocka_unit_test(each_lane_of_transfers_is_named_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
