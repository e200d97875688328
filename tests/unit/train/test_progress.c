/* The live line as text. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "train/progress.h"

static const struct progress_view half = {
    .num_done = 250,
    .num_total = 500,
    .note = "loss 3.214",
    .rate = 12345,
    .rate_unit = "tok",
    .seconds_left = 250,
};

static void assert_view(const struct progress_view *view, int columns, const char *expected)
{
    char line[256];

    progress_format(line, sizeof line, view, columns);
    assert_string_equal(line, expected);
    assert_true((int)strlen(line) < columns);
}

static void the_bar_fills_what_the_rest_leaves(void **state)
{
    assert_view(&half, 80,
                "250/500 [============>            ]  50%  loss 3.214  12.3k tok/s  0:04:10 left");
    assert_view(&half, 200,
                "250/500 [====================>                   ]  50%  loss 3.214  12.3k tok/s  "
                "0:04:10 left");
}

static void a_narrow_terminal_gets_no_bar_and_a_cut_line(void **state)
{
    assert_view(&half, 60, "250/500  50%  loss 3.214  12.3k tok/s  0:04:10 left");
    assert_view(&half, 20, "250/500  50%  loss ");
    assert_view(&half, 1, "");
}

static void what_is_not_known_is_left_out(void **state)
{
    const struct progress_view start = {
        .num_total = 500, .note = "", .rate_unit = "tok", .seconds_left = -1};

    assert_view(&start, 40, "0/500 [>                         ]   0%");
}

static void hundred_percent_is_for_the_end(void **state)
{
    struct progress_view view = {
        .num_done = 999, .num_total = 1000, .note = "", .rate_unit = "", .seconds_left = -1};

    assert_view(&view, 31, "999/1000 [=============>]  99%");
    view.num_done = 1000;
    assert_view(&view, 32, "1000/1000 [==============] 100%");
}

static void rates_and_times_stay_short(void **state)
{
    struct progress_view view = half;

    view.rate = 1.5e6;
    view.seconds_left = 3 * 86400 + 5 * 3600;
    view.note = "";
    assert_view(&view, 50, "250/500  50%  1.50M tok/s  3d 05h left");
    view.rate = 999.7; /* rounds to the next unit, not to "1000" */
    view.seconds_left = 59.7;
    assert_view(&view, 50, "250/500  50%  1.00k tok/s  0:01:00 left");
}

static void nothing_is_shown_in_a_pipe(void **state)
{
    struct progress progress;

    progress_begin(&progress, 0, 10, "tok");
    progress.on = false; /* as in a pipe: the test itself may run on a terminal */
    progress_update(&progress, 1, 100, "");
    assert_int_equal(progress.view.num_done, 0);
    progress_clear();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_bar_fills_what_the_rest_leaves),
        cmocka_unit_test(a_narrow_terminal_gets_no_bar_and_a_cut_line),
        cmocka_unit_test(what_is_not_known_is_left_out),
        cmocka_unit_test(hundred_percent_is_for_the_end),
        cmocka_unit_test(rates_and_times_stay_short),
        cmocka_unit_test(nothing_is_shown_in_a_pipe),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
