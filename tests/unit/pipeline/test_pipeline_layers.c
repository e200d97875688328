/* Which layers a stage holds. */
#include "pipeline/layers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"

enum { STAGES_MAX = 8, CHUNKS_MAX = 4 };

static struct pipeline_place place_of(int stage, int num_stages, int chunk, int num_chunks)
{
    return (struct pipeline_place){
        .stage = stage, .num_stages = num_stages, .chunk = chunk, .num_chunks = num_chunks};
}

/* Chunk after chunk and stage after stage, the layers come in order, each once. */
static void expect_layers_in_order(int num_stages, int num_chunks, int num_layers, int first,
                                   int last)
{
    int next = 0;

    for (int chunk = 0; chunk < num_chunks; chunk++) {
        for (int stage = 0; stage < num_stages; stage++) {
            const struct pipeline_place place = place_of(stage, num_stages, chunk, num_chunks);
            int first_layer, count;

            assert_int_equal(pipeline_layers(&place, num_layers, first, last, &first_layer, &count),
                             0);
            assert_int_equal(first_layer, next);
            assert_true(count >= 1);
            if (first > 0 && stage == 0) {
                assert_int_equal(count, first / num_chunks);
            }
            if (last > 0 && stage == num_stages - 1) {
                assert_int_equal(count, last / num_chunks);
            }
            next += count;
        }
    }
    assert_int_equal(next, num_layers);
}

static void test_equal_stages_hold_the_reference_s_layers(void **state)
{
    for (int num_stages = 1; num_stages <= STAGES_MAX; num_stages++) {
        for (int num_chunks = 1; num_chunks <= CHUNKS_MAX; num_chunks++) {
            for (int each = 1; each <= 3; each++) {
                const int num_layers = num_stages * num_chunks * each;

                expect_layers_in_order(num_stages, num_chunks, num_layers, 0, 0);
                for (int stage = 0; stage < num_stages; stage++) {
                    const struct pipeline_place place =
                        place_of(stage, num_stages, num_chunks - 1, num_chunks);
                    int first_layer, count;

                    pipeline_layers(&place, num_layers, 0, 0, &first_layer, &count);
                    assert_int_equal(first_layer,
                                     (num_chunks - 1) * (num_layers / num_chunks) +
                                         stage * (num_layers / (num_stages * num_chunks)));
                    assert_int_equal(count, each);
                }
            }
        }
    }
}

static void test_uneven_stages_hold_every_layer_once(void **state)
{
    for (int num_stages = 3; num_stages <= 5; num_stages++) {
        for (int num_chunks = 1; num_chunks <= 3; num_chunks++) {
            for (int first = 1; first <= 3; first++) {
                for (int last = 1; last <= 3; last++) {
                    const int c = num_chunks;

                    expect_layers_in_order(num_stages, c, c * (first + last + 2 * (num_stages - 2)),
                                           c * first, c * last);
                    expect_layers_in_order(num_stages, c, c * (first + 2 * (num_stages - 1)),
                                           c * first, 0);
                    expect_layers_in_order(num_stages, c, c * (last + 2 * (num_stages - 1)), 0,
                                           c * last);
                }
            }
        }
    }
    expect_layers_in_order(2, 1, 7, 3, 4);
    expect_layers_in_order(2, 1, 7, 3, 0);
    expect_layers_in_order(2, 1, 7, 0, 2);
}

static void expect_refused(int num_stages, int num_chunks, int num_layers, int first, int last,
                           const char *words)
{
    const struct pipeline_place place = place_of(0, num_stages, 0, num_chunks);
    int first_layer, count;

    error_clear();
    assert_int_equal(pipeline_layers(&place, num_layers, first, last, &first_layer, &count), -1);
    if (strstr(error_text(), words) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", error_text(), words);
    }
}

static void test_what_does_not_divide_is_refused(void **state)
{
    expect_refused(4, 1, 10, 0, 0, "leaves 10 for 4 stages: must be positive and a multiple of 4");
    expect_refused(4, 1, 10, 3, 0, "leaves 7 for 3 stages");
    expect_refused(4, 1, 8, 3, 2, "leaves 3 for 2 stages");
    expect_refused(4, 1, 2, 0, 0, "multiple of 4");
    expect_refused(4, 1, 6, 3, 3, "leaves 0 for 2 stages: must be positive");
    expect_refused(4, 1, 5, 3, 3, "leaves -1");
    expect_refused(2, 1, 7, 3, 3, "leaves 1 for 0 stages: must be 0");
    expect_refused(1, 1, 7, 3, 0, "--pipeline-model-parallel-size of at least 2");
    expect_refused(2, 3, 8, 0, 0, "stage 0 has 4 layers: must be a multiple of the 3 chunks");
    expect_refused(2, 2, 8, 3, 5, "stage 0 has 3 layers");
    expect_refused(3, 2, 9, 2, 3, "stage 2 has 3 layers");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equal_stages_hold_the_reference_s_layers),
        cmocka_unit_test(test_uneven_stages_hold_every_layer_once),
        cmocka_unit_test(test_what_does_not_divide_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
