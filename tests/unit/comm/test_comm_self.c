#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "comm/comm.h"
#include "comm/reduction.h"
#include "ops/ops.h"

static struct stream *stream;
static struct comm *self;

static int begin(void **state)
{
    stream = stream_create(device_cpu(), ops_cpu());
    self = comm_self_create("tp");
    return 0;
}

static int end(void **state)
{
    comm_destroy(self);
    stream_destroy(stream);
    return 0;
}

static void what_one_rank_gathers_is_its_own(void **state)
{
    int64_t from[3] = {1, -2, 3}, to[3] = {0};
    const int64_t rows[1] = {3};
    const struct tensor in = tensor_of(from, DTYPE_I64, 3);
    struct tensor out = tensor_of(to, DTYPE_I64, 3);

    comm_wait(comm_all_gather(self, stream, &out, &in), stream);
    assert_memory_equal(to, from, sizeof from);
    memset(to, 0, sizeof to);
    comm_wait(comm_reduce_scatter_rows(self, stream, &out, &in, rows), stream);
    assert_memory_equal(to, from, sizeof from);
    memset(to, 0, sizeof to);
    comm_wait(comm_all_to_all(self, stream, &out, rows, &in, rows), stream);
    assert_memory_equal(to, from, sizeof from);
}

static void one_rank_counts_nothing(void **state)
{
    float x[2] = {1, 2};
    struct tensor tensor = tensor_of(x, DTYPE_F32, 2);

    comm_wait(comm_all_reduce(self, stream, &tensor, COMM_SUM), stream);
    assert_true(x[0] == 1.0f && x[1] == 2.0f);
    assert_int_equal(self->counters[COMM_ALL_REDUCE].num_calls, 0);
}

/* 1e8 + 1 - 1e8 is 0 from the left and 1 in other orders. */
static void sums_go_from_the_first_source_to_the_last(void **state)
{
    const float a[1] = {1e8f}, b[1] = {1.0f}, c[1] = {-1e8f};
    const void *abc[] = {a, b, c}, *acb[] = {a, c, b};
    float out[1];

    reduction_apply(COMM_SUM, DTYPE_F32, out, abc, 3, 1);
    assert_true(out[0] == 0.0f);
    reduction_apply(COMM_SUM, DTYPE_F32, out, acb, 3, 1);
    assert_true(out[0] == 1.0f);
}

/* 256 + 1 rounds to 256 in bf16: rounded after every addend, the sum would stay there. */
static void bf16_is_rounded_once(void **state)
{
    const bf16_t big[1] = {bf16_from_float(256.0f)}, one[1] = {bf16_from_float(1.0f)};
    const void *sources[] = {big, one, one, one, one};
    bf16_t out[1];

    reduction_apply(COMM_SUM, DTYPE_BF16, out, sources, 5, 1);
    assert_true(bf16_to_float(out[0]) == 260.0f);
}

static void out_may_be_one_of_the_sources(void **state)
{
    enum { N = 70001 };
    int32_t *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
    const void *sources[] = {x, y, x};

    for (int i = 0; i < N; i++) {
        x[i] = i;
        y[i] = 2 * i + 1;
    }
    reduction_apply(COMM_SUM, DTYPE_I32, y, sources, 3, N);
    for (int i = 0; i < N; i++) {
        assert_int_equal(y[i], 4 * i + 1);
    }
    reduction_apply(COMM_MAX, DTYPE_I32, y, sources, 2, N);
    assert_int_equal(y[N - 1], 4 * (N - 1) + 1);
    free(x);
    free(y);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_one_rank_gathers_is_its_own),
        cmocka_unit_test(one_rank_counts_nothing),
        cmocka_unit_test(sums_go_from_the_first_source_to_the_last),
        cmocka_unit_test(bf16_is_rounded_once),
        cmocka_unit_test(out_may_be_one_of_the_sources),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
