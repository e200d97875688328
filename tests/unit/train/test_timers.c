/* Timers on a clock that only moves when told. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/check.h"
#include "train/timers.h"

static double now;

static double hand_clock(void)
{
    return now;
}

static void assert_seconds(double found, double expected)
{
    assert_true(fabs(found - expected) < 1e-12);
}

static void spans_add_up_until_reset(void **state)
{
    struct timers timers;

    timers_init(&timers, 0, hand_clock);
    now = 100;
    timers_start(&timers, "evaluate", 0);
    now += 1;
    timers_stop(&timers, "evaluate", 0);
    now += 10;
    timers_start(&timers, "evaluate", 0);
    now += 2;
    assert_seconds(timers_elapsed(&timers, "evaluate", false), 3); /* still running */
    timers_stop(&timers, "evaluate", 0);
    assert_seconds(timers_elapsed(&timers, "evaluate", true), 3);
    assert_seconds(timers_elapsed(&timers, "evaluate", false), 0);
    assert_seconds(timers_elapsed(&timers, "eval-time", false), 0);
}

static void a_running_timer_counts_on_after_a_reset(void **state)
{
    struct timers timers;

    timers_init(&timers, 0, hand_clock);
    timers_start(&timers, "interval-time", 0);
    now += 5;
    assert_seconds(timers_elapsed(&timers, "interval-time", true), 5);
    now += 2;
    assert_seconds(timers_elapsed(&timers, "interval-time", true), 2);
}

static void timers_above_the_log_level_are_not_kept(void **state)
{
    struct timers timers;

    timers_init(&timers, 1, hand_clock);
    for (int level = 0; level <= TIMER_LEVEL_MAX; level++) {
        static const char *const names[] = {"evaluate", "optimizer", "forward-compute"};

        timers_start(&timers, names[level], level);
        now += 1;
        timers_stop(&timers, names[level], level);
        assert_seconds(timers_elapsed(&timers, names[level], false), level <= 1 ? 1 : 0);
    }
    assert_int_equal(timers.num_timers, 2);
}

/* Two ranks; "optimizer" ran on the second only, "evaluate" on none. */
static const char *const names[] = {"forward-backward", "optimizer", "evaluate"};
static const double seconds[] = {4, 0, 0, 5, 0.5, 0};
static const struct timer_report report = {
    .names = names, .num_names = 3, .num_ranks = 2, .seconds = seconds, .num_spans = 10};

static void assert_report(enum timing_log_option option, const char *expected)
{
    char *text = timer_report_format(&report, option);

    assert_non_null(text);
    assert_string_equal(text, expected);
    free(text);
}

static void each_option_has_megatrons_format(void **state)
{
    assert_report(TIMING_LOG_MINMAX,
                  "(min, max) time across ranks (ms):\n"
                  "    forward-backward ...............................: (400.00, 500.00)\n"
                  "    optimizer ......................................: (50.00, 50.00)");
    assert_report(TIMING_LOG_MAX, "max time across ranks (ms):\n"
                                  "    forward-backward ...............................: 500.00\n"
                                  "    optimizer ......................................: 50.00");
    assert_report(TIMING_LOG_ALL, "times across ranks (ms):\n"
                                  "  forward-backward:\n"
                                  "     rank  0: 400.00\n"
                                  "     rank  1: 500.00\n"
                                  "  optimizer:\n"
                                  "     rank  1: 50.00");
}

static void nothing_timed_prints_nothing(void **state)
{
    struct timer_report empty = report;
    const double zeros[] = {0, 0, 0};

    empty.num_ranks = 1;
    empty.seconds = zeros;
    assert_null(timer_report_format(&empty, TIMING_LOG_MINMAX));
    assert_null(timer_report_format(&empty, TIMING_LOG_ALL));
}

static void the_system_clock_runs_forward(void **state)
{
    struct timers timers;
    const char *const one[] = {"evaluate"};
    double elapsed;

    timers_init(&timers, 0, NULL);
    timers_start(&timers, "evaluate", 0);
    timers_stop(&timers, "evaluate", 0);
    timers_read(&timers, one, 1, true, &elapsed);
    assert_true(elapsed > 0 && elapsed < 10);
}

static void all_reference_names_fit(void **state)
{
    struct timers timers;

    timers_init(&timers, 0, hand_clock);
    assert_int_equal(num_timer_names, 31);
    for (int i = 0; i < num_timer_names; i++) {
        timers_start(&timers, timer_names[i], 0);
    }
    assert_int_equal(timers.num_timers, num_timer_names);
}

static void options_are_parsed(void **state)
{
    enum timing_log_option option;

    assert_int_equal(timing_log_option_parse("max", &option), 0);
    assert_int_equal(option, TIMING_LOG_MAX);
    assert_int_equal(timing_log_option_parse("minmax", &option), 0);
    assert_int_equal(option, TIMING_LOG_MINMAX);
    assert_int_equal(timing_log_option_parse("all", &option), 0);
    assert_int_equal(option, TIMING_LOG_ALL);
    assert_int_equal(timing_log_option_parse("min", &option), -1);
    assert_non_null(strstr(error_text(), "\"min\""));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(spans_add_up_until_reset),
        cmocka_unit_test(a_running_timer_counts_on_after_a_reset),
        cmocka_unit_test(timers_above_the_log_level_are_not_kept),
        cmocka_unit_test(each_option_has_megatrons_format),
        cmocka_unit_test(nothing_timed_prints_nothing),
        cmocka_unit_test(the_system_clock_runs_forward),
        cmocka_unit_test(all_reference_names_fit),
        cmocka_unit_test(options_are_parsed),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
