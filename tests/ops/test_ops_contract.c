/* The contract checks of ops.h, and the backend that does nothing else. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "reference.h"

/* Runs `call` in a child and returns what it wrote to stderr; fails unless it was stopped. */
static const char *stopped_message(void (*call)(void))
{
    static char text[1024];
    int pipe_ends[2], status;
    size_t length = 0;
    ssize_t count;
    pid_t child;

    fflush(stdout);
    fflush(stderr);
    assert_int_equal(pipe(pipe_ends), 0);
    child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        dup2(pipe_ends[1], STDERR_FILENO);
        call();
        _exit(0);
    }
    close(pipe_ends[1]);
    while ((count = read(pipe_ends[0], text + length, sizeof text - 1 - length)) > 0) {
        length += (size_t)count;
    }
    text[length] = '\0';
    close(pipe_ends[0]);
    waitpid(child, &status, 0);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    return text;
}

static void multiply_wrong_shape(void)
{
    struct tensor a = zero_tensor(DTYPE_F32, 2, 3), b = zero_tensor(DTYPE_F32, 4, 5);
    struct tensor c = zero_tensor(DTYPE_F32, 2, 5);

    op_matmul(stream, &(struct matmul){.c = &c, .a = &a, .b = &b});
}

static void multiply_mixed_dtypes(void)
{
    struct tensor a = zero_tensor(DTYPE_F32, 2, 3), b = zero_tensor(DTYPE_BF16, 3, 5);
    struct tensor c = zero_tensor(DTYPE_F32, 2, 5);

    op_matmul(stream, &(struct matmul){.c = &c, .a = &a, .b = &b});
}

static void normalise_without_weight(void)
{
    struct tensor x = zero_tensor(DTYPE_F32, 2, 3), inv_std = zero_tensor(DTYPE_F32, 2);

    op_norm_forward(stream, &(struct norm_forward){
                                .kind = NORM_RMSNORM, .y = &x, .inv_std = &inv_std, .x = &x});
}

static void attend_past_the_keys(void)
{
    struct tensor q = zero_tensor(DTYPE_F32, 3, 1, 1, 4), lse = zero_tensor(DTYPE_F32, 1, 1, 3);
    struct tensor out = zero_tensor(DTYPE_F32, 3, 1, 1, 4);

    op_attention_forward(stream, &(struct attention){.causal = true,
                                                     .q_start = 1,
                                                     .kv_length = 3,
                                                     .q = &q,
                                                     .k = &q,
                                                     .v = &q,
                                                     .out = &out,
                                                     .lse = &lse});
}

static void broken_arguments_stop_with_names_and_shapes(void **state)
{
    assert_non_null(
        strstr(stopped_message(multiply_wrong_shape), "F32 [4, 5], expected F32 [3, 5]"));
    assert_non_null(strstr(stopped_message(multiply_mixed_dtypes), "BF16 [3, 5]"));
    assert_non_null(strstr(stopped_message(normalise_without_weight), "a->weight is no tensor"));
    assert_non_null(strstr(stopped_message(attend_past_the_keys), "queries to 4, keys to 3"));
}

static void null_backend_checks_and_touches_nothing(void **state)
{
    struct stream *null = stream_create(device_null(), ops_null());
    struct arena *nowhere = arena_create("nowhere", &device_null()->memory);
    struct tensor a = tensor_new(nowhere, DTYPE_F32, 2, 3),
                  b = tensor_new(nowhere, DTYPE_F32, 3, 5);
    struct tensor c = tensor_new(nowhere, DTYPE_F32, 2, 5);

    op_matmul(null, &(struct matmul){.c = &c, .a = &a, .b = &b});
    op_fill_zero(null, &c);
    op_add(null, &(struct add){.y = &c, .u = &c, .v = &c});
    arena_destroy(nowhere);
    stream_destroy(null);
}

static void scratch_is_given_back(void **state)
{
    struct tensor x = normal_tensor(1.0, DTYPE_BF16, 50, 60), d_w = zero_tensor(DTYPE_F32, 60);
    const size_t before = arena_used_bytes(stream->scratch);

    op_bias_backward(stream, &(struct bias_backward){.d_bias = &d_w, .d_y = &x});
    assert_int_equal(arena_used_bytes(stream->scratch), before);
    assert_true(arena_peak_bytes(stream->scratch) > before);
}

static void every_op_of_the_cpu_table_is_there(void **state)
{
#define CHECK_ENTRY(name, args) assert_non_null(ops_cpu()->name);
    OPS_LIST(CHECK_ENTRY)
#undef CHECK_ENTRY
    assert_non_null(ops_cpu()->fill_zero);
    assert_string_equal(ops_cpu()->backend, "cpu");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(broken_arguments_stop_with_names_and_shapes,
                                  reference_empty_arena),
        cmocka_unit_test(null_backend_checks_and_touches_nothing),
        cmocka_unit_test_teardown(scratch_is_given_back, reference_empty_arena),
        cmocka_unit_test(every_op_of_the_cpu_table_is_there),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
