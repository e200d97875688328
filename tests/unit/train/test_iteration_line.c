/* The log lines, character by character. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "train/iteration_line.h"

static const struct named_loss losses[] = {
    {"lm loss", 10.37832}, {"load_balancing_loss", 0}, {"z_loss", NAN}};

/* The values of a line that a Megatron user posted (reference M11.1); 2024-09-20 19:41:04 UTC. */
static const struct iteration_line posted = {
    .now = 1726861264,
    .iteration = 2,
    .num_iterations = 100,
    .consumed_samples = 512,
    .elapsed_ms = 13477.5,
    .has_throughput = true,
    .throughput_tflops = 201.6,
    .learning_rate = 4e-7,
    .global_batch_size = 256,
    .losses = losses,
    .num_losses = 3,
    .loss_scale = 1,
    .has_grad_norm = true,
    .grad_norm = 1.712,
    .has_num_zeros = true,
};

static void assert_line(const struct iteration_line *line, const char *expected)
{
    char *text = iteration_line_format(line);

    assert_string_equal(text, expected);
    free(text);
}

static void a_posted_megatron_line_comes_out_the_same(void **state)
{
    assert_line(&posted,
                " [2024-09-20 19:41:04] iteration        2/     100 | consumed samples:          "
                "512 | elapsed time per iteration (ms): 13477.5 | throughput per GPU "
                "(TFLOP/s/GPU): 201.6 | learning rate: 4.000000E-07 | global batch size:   256 | "
                "lm loss: 1.037832E+01 | loss scale: 1.0 | grad norm: 1.712 | num zeros: 0.0 | "
                "number of skipped iterations:   0 | number of nan iterations:   0 |");
}

static void every_field_has_its_place(void **state)
{
    const struct named_loss all[] = {
        {"lm loss", 1}, {"load_balancing_loss", 1.023456}, {"z_loss", INFINITY}};
    struct iteration_line line = posted;

    line.skipped_samples = 24;
    line.has_throughput = false;
    line.has_decoupled_learning_rate = true;
    line.decoupled_learning_rate = 1.5e-3;
    line.losses = all;
    line.grad_norm = -NAN;
    line.has_num_zeros = false;
    line.has_params_norm = true;
    line.params_norm = 1234.5678;
    line.num_skipped_iterations = 3;
    line.num_nan_iterations = 1000;
    assert_line(&line,
                " [2024-09-20 19:41:04] iteration        2/     100 | consumed samples:          "
                "512 | skipped samples:           24 | elapsed time per iteration (ms): 13477.5 | "
                "learning rate: 4.000000E-07 | decoupled learning rate: 1.500000E-03 | global "
                "batch size:   256 | lm loss: 1.000000E+00 | load_balancing_loss: 1.023456E+00 | "
                "z_loss: INF | loss scale: 1.0 | grad norm: nan | params norm: 1234.568 | number "
                "of skipped iterations:   3 | number of nan iterations: 1000 |");
}

static void validation_stands_between_dashes(void **state)
{
    const struct named_loss loss = {"lm loss", 2};
    char *text = validation_line_format("iteration 10", &loss, 1);

    assert_string_equal(
        text, "---------------------------------------------------------------------------"
              "-------------------\n"
              " validation loss at iteration 10 | lm loss value: 2.000000E+00 | lm loss "
              "PPL: 7.389056E+00 | \n"
              "---------------------------------------------------------------------------"
              "-------------------");
    free(text);
}

static void perplexity_is_bounded(void **state)
{
    assert_true(validation_perplexity(1) == exp(1));
    assert_true(validation_perplexity(21) == exp(20));
    assert_true(validation_perplexity(INFINITY) == exp(20));
    assert_true(isnan(validation_perplexity(NAN)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_posted_megatron_line_comes_out_the_same),
        cmocka_unit_test(every_field_has_its_place),
        cmocka_unit_test(validation_stands_between_dashes),
        cmocka_unit_test(perplexity_is_bounded),
    };

    setenv("TZ", "UTC", 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
