/* The CPU's memory is not promised where the machine has not got it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/host_memory.h"
#include "device/device.h"

static void what_the_machine_has_is_given(void **state)
{
    const struct memory_source *memory = &device_cpu()->memory;
    char *bytes = memory->allocate(memory->context, 1 << 20);

    assert_non_null(bytes);
    bytes[(1 << 20) - 1] = 1;
    assert_int_equal(bytes[0], 0);
    memory->release(memory->context, bytes, 1 << 20);
}

static void more_than_the_machine_has_is_refused(void **state)
{
    const struct memory_source *memory = &device_cpu()->memory;
    const int64_t available_bytes = host_memory_available_bytes("");

    if (available_bytes == INT64_MAX) {
        skip();
    }
    assert_null(memory->allocate(memory->context, (size_t)available_bytes * 4));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_the_machine_has_is_given),
        cmocka_unit_test(more_than_the_machine_has_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
