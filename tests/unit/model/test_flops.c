/* The FLOPs formulas against numbers worked by hand, product by product. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <cmocka.h>

#include "model/flops.h"

static const struct flops_sizes mixtral_8x7b = {
    .batch_size = 256,
    .seq_length = 4096,
    .num_layers = 32,
    .num_moe_layers = 32,
    .hidden_size = 4096,
    .num_heads = 32,
    .num_query_groups = 8,
    .head_dim = 128,
    .ffn_hidden_size = 14336,
    .moe_ffn_hidden_size = 14336,
    .topk = 2,
    .vocab_size = 32000,
    .gated = true,
};

static void assert_close(double found, double expected)
{
    if (!(fabs(found - expected) <= 1e-12 * fabs(expected))) {
        fail_msg("found %.17g, expected %.17g", found, expected);
    }
}

static void mixtral_counts_as_the_reference_says(void **state)
{
    const double scale = 12.0 * 256 * 4096 * 32 * 4096 * 4096;
    const double seed = flops_per_step_seed(&mixtral_8x7b);
    const double head = flops_per_step_head(&mixtral_8x7b);

    /* Projections, attention core, two experts, logits. */
    assert_close(seed / scale, 1.25 + 1.0 + 10.5 + 32000 / (2.0 * 32 * 4096));
    assert_true(fabs(seed / scale - 12.87) < 0.005);
    /* The later formula counts half of the attention core. */
    assert_close(seed - head, scale * 0.5);
    assert_true(fabs(1 - head / seed - 0.039) < 0.0005);
}

/* 2 sequences of 4 tokens, H 8, 2 heads of 6, 1 group, 3 layers of which 2 MoE. */
static const struct flops_sizes small = {
    .batch_size = 2,
    .seq_length = 4,
    .num_layers = 3,
    .num_moe_layers = 2,
    .hidden_size = 8,
    .num_heads = 2,
    .num_query_groups = 1,
    .head_dim = 6,
    .ffn_hidden_size = 32,
    .moe_ffn_hidden_size = 10,
    .topk = 3,
    .shared_ffn_hidden_size = 5,
    .vocab_size = 100,
    .gated = false,
};

static void head_counts_each_layer_as_what_it_is(void **state)
{
    const double tokens = 8;
    /* q 8x12, k and v 8x6 each, out 12x8; scores and values, 12 each a pair, over 4/2 keys. */
    const double attention = 96 + 2 * 48 + 96 + 2 * 12 * 2;
    const double dense = 2 * 8 * 32, moe = 2 * 8 * (3 * 10 + 5), logits = 8 * 100;

    assert_close(flops_per_step_head(&small),
                 6 * tokens * (3 * attention + dense + 2 * moe + logits));
}

static void seed_counts_every_layer_as_moe(void **state)
{
    const double tokens = 8;
    const double attention = 96 + 2 * 48 + 96 + 2 * 12 * 4;
    const double moe = 2 * 8 * (3 * 10 + 5), logits = 8 * 100;

    assert_close(flops_per_step_seed(&small), 6 * tokens * (3 * (attention + moe) + logits));
}

static void gated_ffn_has_a_third_matrix(void **state)
{
    struct flops_sizes dense = small, gated;

    dense.num_moe_layers = 0;
    dense.shared_ffn_hidden_size = 0;
    gated = dense;
    gated.gated = true;
    assert_close(flops_per_step_head(&gated) - flops_per_step_head(&dense), 6.0 * 8 * 3 * 8 * 32);
    assert_close(flops_per_step_seed(&gated) - flops_per_step_seed(&dense), 6.0 * 8 * 3 * 8 * 32);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mixtral_counts_as_the_reference_says),
        cmocka_unit_test(head_counts_each_layer_as_what_it_is),
        cmocka_unit_test(seed_counts_every_layer_as_moe),
        cmocka_unit_test(gated_ffn_has_a_third_matrix),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
