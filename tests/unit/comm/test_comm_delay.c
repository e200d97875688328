/* CADRE_COMM_DELAY_MS: which texts are delays of which groups, and which are errors. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "comm/delay.h"

static void groups_have_the_delays_given(void **state)
{
    assert_int_equal(comm_delay_parse("dp-cp:20,ep:5.5"), 0);
    assert_true(comm_delay_of("dp-cp").seconds == 1e-3 * 20.0);
    assert_true(comm_delay_of("ep").seconds == 1e-3 * 5.5);
    assert_true(comm_delay_of("dp").seconds == 0.0);
}

static void a_link_takes_its_time_a_byte(void **state)
{
    assert_int_equal(comm_delay_parse("pp:4/MB,ep:5"), 0);
    assert_true(comm_delay_of("pp").seconds_per_byte == 1e-9 * 4.0);
    assert_true(comm_delay_of("pp").seconds == 0.0);
    assert_true(comm_delay_of("ep").seconds_per_byte == 0.0);
}

static void all_is_every_group_not_named_before(void **state)
{
    assert_int_equal(comm_delay_parse("ep:3,all:1"), 0);
    assert_true(comm_delay_of("ep").seconds == 1e-3 * 3.0);
    assert_true(comm_delay_of("tp").seconds == 1e-3 * 1.0);
}

static void no_text_is_no_delay(void **state)
{
    assert_int_equal(comm_delay_parse("all:1"), 0);
    assert_int_equal(comm_delay_parse(NULL), 0);
    assert_true(comm_delay_of("tp").seconds == 0.0);
    assert_int_equal(comm_delay_parse(""), 0);
    assert_true(comm_delay_of("tp").seconds == 0.0);
}

static void other_texts_are_named_in_the_error(void **state)
{
    static const char *const texts[] = {"tp",
                                        "tp:",
                                        ":5",
                                        "tp:5ms",
                                        "tp:-1",
                                        "tp:nan",
                                        "ep:1,,tp:2",
                                        "tp:inf",
                                        "tp:1 ",
                                        "tp:1;ep:2",
                                        "tp:1/GB",
                                        "tp:/MB",
                                        "a-name-that-is-longer-than-any-group-has:1"};

    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        error_clear();
        assert_int_equal(comm_delay_parse(texts[i]), -1);
        assert_non_null(strstr(error_text(), "GROUP:MS"));
    }
    assert_int_equal(comm_delay_parse("ep:1,tp:x"), -1);
    assert_non_null(strstr(error_text(), "'tp:x'"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_have_the_delays_given),
        cmocka_unit_test(a_link_takes_its_time_a_byte),
        cmocka_unit_test(all_is_every_group_not_named_before),
        cmocka_unit_test(no_text_is_no_delay),
        cmocka_unit_test(other_texts_are_named_in_the_error),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
