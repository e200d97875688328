#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/check.h"
#include "device/device_cuda.h"
#include "device/device_select.h"

static void assert_refused(const char *name, int local_rank, const char *text)
{
    assert_null(device_select(name, local_rank));
    if (strstr(error_text(), text) == NULL) {
        fail_msg("\"%s\" is not in \"%s\"", text, error_text());
    }
}

static void the_cpu_is_always_there(void **state)
{
    assert_ptr_equal(device_select("cpu", 0), device_cpu());
    assert_ptr_equal(device_select("cpu", 8), device_cpu());
}

static void auto_takes_a_usable_gpu(void **state)
{
    const struct device *device = device_select("auto", 0);

    assert_non_null(device);
    assert_int_equal(device->kind, device_cuda_usable(0) ? DEVICE_CUDA : DEVICE_CPU);
}

static void cuda_without_a_gpu_is_an_error(void **state)
{
    if (device_cuda_usable(0)) {
        assert_int_equal(device_select("cuda", 0)->kind, DEVICE_CUDA);
    } else {
        assert_refused("cuda", 0, "use --device cpu");
    }
}

static void ranks_of_a_host_take_its_gpus_in_turn(void **state)
{
    const int count = device_cuda_count();

    for (int local_rank = 0; local_rank < 3; local_rank++) {
        const struct device *device = device_select("auto", local_rank);

        if (count > 0 && device_cuda_usable(local_rank % count)) {
            assert_int_equal(device->index, local_rank % count);
        } else {
            assert_ptr_equal(device, device_cpu());
        }
    }
}

static void other_names_are_refused(void **state)
{
    assert_refused("gpu", 0, "--device gpu: legal: cpu, cuda, auto");
}

static void a_read_has_the_bytes_of_its_start(void **state)
{
    struct stream *stream = stream_create(device_cpu(), NULL);
    int32_t number = 5, got = 0, later = 0;
    void *first = stream_read_start(stream, &number, sizeof number), *second;

    number = 6;
    second = stream_read_start(stream, &number, sizeof number);
    number = 7;
    stream_read_finish(stream, second, &later);
    stream_read_finish(stream, first, &got);
    assert_int_equal(got, 5);
    assert_int_equal(later, 6);
    stream_destroy(stream);
}

static void marks_measure_time(void **state)
{
    struct stream *stream = stream_create(device_cpu(), NULL);
    void *from = stream_mark(stream), *to;

    usleep(2000);
    to = stream_mark(stream);
    assert_true(stream_mark_seconds(stream, from, to) >= 0.002);
    stream_mark_free(stream, from);
    stream_mark_free(stream, to);
    stream_destroy(stream);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_cpu_is_always_there),
        cmocka_unit_test(auto_takes_a_usable_gpu),
        cmocka_unit_test(cuda_without_a_gpu_is_an_error),
        cmocka_unit_test(ranks_of_a_host_take_its_gpus_in_turn),
        cmocka_unit_test(other_names_are_refused),
        cmocka_unit_test(a_read_has_the_bytes_of_its_start),
        cmocka_unit_test(marks_measure_time),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
