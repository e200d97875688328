#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "comm/comm_create.h"
#include "comm/comm_fake.h"
#include "comm/launch.h"
#include "ops/ops.h"

enum { RANK = 2, SIZE = 4, OTHERS = SIZE - 1 };

static struct stream *stream;
static struct comm *comm;

static int set_up(void **state)
{
    stream = stream_create(device_cpu(), ops_cpu());
    comm = comm_fake_create("ep", RANK, SIZE);
    return 0;
}

static int tear_down(void **state)
{
    comm_destroy(comm);
    stream_destroy(stream);
    return 0;
}

static int64_t sent(enum comm_kind kind)
{
    return comm->counters[kind].sent_bytes;
}

static void it_says_that_it_is_emulated(void **state)
{
    struct comm *self = comm_self_create("tp");

    assert_true(comm_is_emulated(comm));
    assert_false(comm_is_emulated(self));
    comm_destroy(self);
}

static void sums_are_this_ranks(void **state)
{
    float data[5] = {1, 2, 3, 4, 5};
    struct tensor x = tensor_of(data, DTYPE_F32, 5);

    comm_wait(comm_all_reduce(comm, stream, &x, COMM_SUM), stream);
    assert_memory_equal(data, ((float[]){1, 2, 3, 4, 5}), sizeof data);
    /* The ranks reduce 1, 1, 1 and 2 of the five elements: rank 2 sends four, and one to three. */
    assert_int_equal(sent(COMM_ALL_REDUCE), (4 + OTHERS * 1) * 4);
}

static void gathered_parts_are_this_ranks(void **state)
{
    int32_t in[3] = {7, 8, 9}, out[3 * SIZE] = {0};
    const struct tensor from = tensor_of(in, DTYPE_I32, 3);
    struct tensor to = tensor_of(out, DTYPE_I32, 3 * SIZE);

    comm_wait(comm_all_gather(comm, stream, &to, &from), stream);
    for (int i = 0; i < 3 * SIZE; i++) {
        assert_int_equal(out[i], 7 + i % 3);
    }
    assert_int_equal(sent(COMM_ALL_GATHER), OTHERS * 12);
}

/* Parameters: a copy of this rank's norms in another rank's router would upset the routing. */
static void gathered_in_place_others_parts_stay(void **state)
{
    float data[2 * SIZE] = {0, 1, 2, 3, 4, 5, 6, 7};
    const float before[2 * SIZE] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct tensor all = tensor_of(data, DTYPE_F32, 2 * SIZE);
    const struct tensor own = tensor_rows(&all, 2 * RANK, 2);

    comm_wait(comm_all_gather(comm, stream, &all, &own), stream);
    assert_memory_equal(data, before, sizeof data);
}

static void uneven_parts_are_filled(void **state)
{
    const int64_t rows[SIZE] = {5, 0, 2, 1};
    int32_t in[2 * 2] = {1, 2, 3, 4}, out[8 * 2] = {0};
    const int32_t wanted[8 * 2] = {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 1, 2};
    const struct tensor from = tensor_of(in, DTYPE_I32, 2, 2);
    struct tensor to = tensor_of(out, DTYPE_I32, 8, 2);

    comm_wait(comm_all_gather_rows(comm, stream, &to, &from, rows), stream);
    assert_memory_equal(out, wanted, sizeof out);
}

static void a_scattered_sum_is_the_own_part(void **state)
{
    int32_t in[8] = {0, 1, 2, 3, 4, 5, 6, 7}, out[2] = {0};
    const struct tensor from = tensor_of(in, DTYPE_I32, 8);
    struct tensor to = tensor_of(out, DTYPE_I32, 2);

    comm_wait(comm_reduce_scatter(comm, stream, &to, &from), stream);
    assert_int_equal(out[0], 2 * RANK);
    assert_int_equal(out[1], 2 * RANK + 1);
    assert_int_equal(sent(COMM_REDUCE_SCATTER), 6 * 4);
}

static void scattered_rows_are_the_own_part(void **state)
{
    const int64_t rows[SIZE] = {3, 0, 2, 1};
    int32_t in[6] = {0, 1, 2, 3, 4, 5}, out[2] = {0};
    const struct tensor from = tensor_of(in, DTYPE_I32, 6);
    struct tensor to = tensor_of(out, DTYPE_I32, 2);

    comm_wait(comm_reduce_scatter_rows(comm, stream, &to, &from, rows), stream);
    assert_int_equal(out[0], 3);
    assert_int_equal(out[1], 4);
}

static void rows_exchanged_are_those_sent(void **state)
{
    const int64_t send_rows[SIZE] = {1, 0, 2, 1}, recv_rows[SIZE] = {3, 1, 2, 0};
    float in[4] = {10, 20, 21, 30}, out[7];
    const struct tensor from = tensor_of(in, DTYPE_F32, 4, 1);
    struct tensor to = tensor_of(out, DTYPE_F32, 7, 1);

    memset(out, 0xff, sizeof out); /* NaN */
    comm_wait(comm_all_to_all(comm, stream, &to, recv_rows, &from, send_rows), stream);
    assert_memory_equal(out, ((float[]){10, 10, 10}), 3 * sizeof *out);
    assert_true(out[3] > -1.0f && out[3] < 1.0f); /* from a rank that got nothing: made up */
    assert_memory_equal(out + 4, ((float[]){20, 21}), 2 * sizeof *out);
    assert_true(isnan(out[6])); /* behind the rows received */
    assert_int_equal(sent(COMM_ALL_TO_ALL), 2 * 4);
}

/* Not zeros, which would send all tokens to the first experts: rows differ. */
static void messages_are_random_numbers(void **state)
{
    enum { ROWS = 300, WIDTH = 512, N = ROWS * WIDTH };
    float *x = calloc(N, sizeof *x);
    bf16_t *y = calloc(N, sizeof *y);
    struct tensor a = tensor_of(x, DTYPE_F32, ROWS, WIDTH), b = tensor_of(y, DTYPE_BF16, N);
    double sum = 0.0, squares = 0.0;

    comm_wait(comm_send(comm, stream, &a, 3), stream);
    comm_wait(comm_receive(comm, stream, &a, 1), stream);
    comm_wait(comm_receive(comm, stream, &b, 1), stream);
    for (int i = 0; i < N; i++) {
        sum += x[i];
        squares += x[i] * x[i];
        assert_true(bf16_to_float(y[i]) - x[i] < 1e-3f && x[i] - bf16_to_float(y[i]) < 1e-3f);
    }
    assert_true(squares / N > 0.5e-4 && squares / N < 2e-4 && sum / N > -1e-3 && sum / N < 1e-3);
    for (int row = 1; row < ROWS; row++) {
        assert_memory_not_equal(x, x + row * WIDTH, WIDTH * sizeof *x);
    }
    assert_int_equal(sent(COMM_SEND), N * 4);
    free(x);
    free(y);
}

static void a_broadcast_comes_from_its_root(void **state)
{
    int64_t number = 5;
    struct tensor x = tensor_of(&number, DTYPE_I64, 1);

    comm_wait(comm_broadcast(comm, stream, &x, RANK), stream);
    assert_int_equal(number, 5);
    assert_int_equal(sent(COMM_BROADCAST), OTHERS * 8);
    comm_wait(comm_broadcast(comm, stream, &x, 0), stream);
    assert_int_equal(number, 0);
    assert_int_equal(sent(COMM_BROADCAST), OTHERS * 8);
}

static void assert_refused(const char *size, const char *rank, const char *text)
{
    size != NULL ? setenv("WORLD_SIZE", size, 1) : unsetenv("WORLD_SIZE");
    rank != NULL ? setenv("RANK", rank, 1) : unsetenv("RANK");
    assert_int_equal(launch_emulate(), -1);
    if (strstr(error_text(), text) == NULL) {
        fail_msg("\"%s\" is not in \"%s\"", text, error_text());
    }
    assert_false(launch_is_emulated());
}

/* The last test: afterwards this process is rank 5. */
static void the_environment_says_who_is_played(void **state)
{
    const int members[] = {1, 5, 9};
    struct comm *group;

    assert_refused(NULL, NULL, "WORLD_SIZE");
    assert_refused("0", NULL, "WORLD_SIZE is \"0\"");
    assert_refused("65537", NULL, "WORLD_SIZE is \"65537\"");
    assert_refused("16", "16", "RANK is \"16\"; legal: 0 to 15");
    assert_refused("16", "-1", "RANK is \"-1\"");
    setenv("RANK", "5", 1);
    assert_int_equal(launch_emulate(), 0);
    assert_true(launch_is_emulated());
    assert_int_equal(launch_rank(), 5);
    assert_int_equal(launch_size(), 16);
    assert_int_equal(launch_local_rank(), 0);
    group = comm_create("dp", 3, members, 3);
    assert_true(comm_is_emulated(group));
    assert_int_equal(group->rank, 1);
    assert_int_equal(group->size, 3);
    comm_destroy(group);
    launch_finish();
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(it_says_that_it_is_emulated),
        TEST(sums_are_this_ranks),
        TEST(gathered_parts_are_this_ranks),
        TEST(gathered_in_place_others_parts_stay),
        TEST(uneven_parts_are_filled),
        TEST(a_scattered_sum_is_the_own_part),
        TEST(scattered_rows_are_the_own_part),
        TEST(rows_exchanged_are_those_sent),
        TEST(messages_are_random_numbers),
        TEST(a_broadcast_comes_from_its_root),
        TEST(the_environment_says_who_is_played),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
