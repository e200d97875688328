#include "reference.h"

#include "ops/vector_math.h"

/* Vectorised as the ops use it. */
static void exps(float *y, const float *x, int64_t n)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        y[i] = fast_exp(x[i]);
    }
}

/* Every 4099th float: all exponents, both signs. */
static void fast_exp_is_within_1_1_ulp_of_the_true_value(void **state)
{
    enum { BLOCK = 1024 };
    float x[BLOCK], y[BLOCK];
    uint32_t bits = 0;

    while (bits < 0xff800000u - 4099u * BLOCK) {
        for (int i = 0; i < BLOCK; i++, bits += 4099) {
            x[i] = float_from_bits(bits);
        }
        exps(y, x, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            const double expected = exp((double)x[i]);
            const double ulp =
                fmax(ldexp(1.0, expected > 0.0 ? ilogb(expected) - 23 : -149), ldexp(1.0, -149));

            if (isnan(x[i])) {
                assert_true(isnan(y[i]));
            } else if (expected > 3.4028235e38) {
                assert_true(isinf(y[i]));
            } else if (fabs((double)y[i] - expected) > 1.1 * ulp) {
                fail_msg("exp(%.9g) = %.9g, not %.9g", (double)x[i], (double)y[i], expected);
            }
        }
    }
}

static void fast_exp_is_exact_at_its_limits(void **state)
{
    assert_true(fast_exp(0.0f) == 1.0f);
    assert_true(fast_exp(-INFINITY) == 0.0f);
    assert_true(isinf(fast_exp(INFINITY)));
    assert_true(isnan(fast_exp(NAN)));
    assert_true(fast_sigmoid(-INFINITY) == 0.0f);
    assert_true(fast_sigmoid(INFINITY) == 1.0f);
    assert_true(fast_sigmoid(0.0f) == 0.5f);
}

static void bf16_round_is_bf16_from_float(void **state)
{
    const uint32_t hard[] = {0x7f800000u, 0x7f800001u, 0xff800001u, 0x7fffffffu,
                             0x7f7fffffu, 0x3f808000u, 0x3f818000u, 0x00000001u};

    for (size_t i = 0; i < sizeof hard / sizeof hard[0]; i++) {
        assert_int_equal(bf16_round(float_from_bits(hard[i])),
                         bf16_from_float(float_from_bits(hard[i])));
    }
    for (uint32_t bits = 0; bits < 0xffff0000u; bits += 65521) {
        assert_int_equal(bf16_round(float_from_bits(bits)), bf16_from_float(float_from_bits(bits)));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fast_exp_is_within_1_1_ulp_of_the_true_value),
        cmocka_unit_test(fast_exp_is_exact_at_its_limits),
        cmocka_unit_test(bf16_round_is_bf16_from_float),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
