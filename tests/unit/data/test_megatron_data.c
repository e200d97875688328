/* The order of samples against golden files of Megatron (tests/fixtures/megatron-data). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../../oracle/megatron_data_case.h"

static void every_golden_case_is_equal(void **state)
{
    assert_int_equal(golden_run_directory(FIXTURES "/megatron-data", stdout), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_golden_case_is_equal)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
