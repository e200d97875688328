/* A rank whose experts get too many rows stops, and says what and why; others go on. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/arena.h"
#include "base/check.h"
#include "moe/row_limit.h"

static void *no_memory(void *context, size_t size_bytes)
{
    return NULL;
}

static void release_nothing(void *context, void *address, size_t size_bytes)
{
}

/* What a check that stops the process prints; empty if it does not stop. With then_allocate, what
 * an allocation after it prints that fails. */
static const char *message_of(const struct row_limit *limit, int64_t even_rows, int first_expert,
                              int num_local, const int32_t *offsets, bool then_allocate)
{
    const struct memory_source source = {no_memory, release_nothing, NULL};
    static char text[4096];
    size_t length = 0;
    int ends[2], status;
    ssize_t count;
    pid_t child;

    assert_int_equal(pipe(ends), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        dup2(ends[1], STDERR_FILENO);
        row_limit_check(limit, DTYPE_BF16, even_rows, first_expert, num_local, offsets);
        if (then_allocate) {
            arena_allocate(arena_create("microbatch", &source), 1000000000);
        }
        _exit(0);
    }
    close(ends[1]);
    while ((count = read(ends[0], text + length, sizeof text - 1 - length)) > 0) {
        length += (size_t)count;
    }
    text[length] = '\0';
    close(ends[0]);
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status) ? length == 0 : length > 0);
    return text;
}

static void the_limit_is_the_factor_of_the_even_load(void **state)
{
    assert_int_equal(row_limit_rows(1.5, 10), 15);
    assert_int_equal(row_limit_rows(1.01, 10), 11);
    assert_int_equal(row_limit_rows(0.0, 10), 0);
}

static void rows_up_to_the_limit_pass(void **state)
{
    const struct row_limit limit = {
        .layer = 3, .rank_capacity_factor = 2.0, .row_elements = 1000000};
    const int32_t offsets[] = {0, 0, 20};

    assert_string_equal(message_of(&limit, 10, 4, 2, offsets, false), "");
}

static void one_row_more_is_an_error_that_names_layer_expert_and_flag(void **state)
{
    const struct row_limit limit = {
        .layer = 3, .rank_capacity_factor = 2.0, .row_elements = 1000000};
    const int32_t offsets[] = {0, 1, 21};
    const char *text = message_of(&limit, 10, 4, 2, offsets, false);

    assert_non_null(strstr(text, "layer 3: 21 rows (42.0 MB) are routed to this rank's experts 4 "
                                 "to 5 (expert 5 alone: 20), where even routing brings 10 (20.0 "
                                 "MB); --moe-expert-rank-capacity-factor 2 allows 20: raise it"));
    assert_non_null(strstr(text, "--micro-batch-size"));
}

static void without_a_limit_uneven_routing_is_named_where_memory_runs_out(void **state)
{
    const struct row_limit limit = {.layer = 7, .row_elements = 1000};
    const int32_t offsets[] = {0, 100000};
    const char *text;

    assert_string_equal(message_of(&limit, 10, 0, 1, offsets, false), "");
    text = message_of(&limit, 10, 0, 1, offsets, true);
    assert_non_null(strstr(text, "out of memory: arena microbatch asked for 1000.0 MB more; the "
                                 "most uneven routing so far was in layer 7: 100000 rows"));
    assert_non_null(strstr(text, "--moe-expert-capacity-factor"));
}

static void even_routing_is_not_blamed(void **state)
{
    const struct row_limit limit = {.layer = 7, .row_elements = 1000};
    const int32_t offsets[] = {0, 5, 10};
    const char *text = message_of(&limit, 10, 0, 2, offsets, true);

    assert_non_null(strstr(text, "out of memory"));
    assert_null(strstr(text, "routing"));
}

static void a_rank_without_rows_passes(void **state)
{
    const struct row_limit limit = {.layer = 7, .rank_capacity_factor = 1.0, .row_elements = 1000};
    const int32_t offsets[] = {0, 0, 0};

    assert_string_equal(message_of(&limit, 0, 0, 2, offsets, false), "");
    assert_string_equal(message_of(&limit, 8, 0, 2, offsets, false), "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_limit_is_the_factor_of_the_even_load),
        cmocka_unit_test(rows_up_to_the_limit_pass),
        cmocka_unit_test(one_row_more_is_an_error_that_names_layer_expert_and_flag),
        cmocka_unit_test(without_a_limit_uneven_routing_is_named_where_memory_runs_out),
        cmocka_unit_test(even_routing_is_not_blamed),
        cmocka_unit_test(a_rank_without_rows_passes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
