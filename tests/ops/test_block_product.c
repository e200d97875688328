#include "ops/block_product_cpu.h"
#include "reference.h"

/* b and c have rows longer than n; a is read along rows or columns. */
static void check_product(int64_t m, int64_t n, int64_t k, bool transposed, bool accumulate)
{
    const int64_t row = n + 3;
    struct tensor a = normal_tensor(1.0, DTYPE_F32, m * k),
                  b = normal_tensor(1.0, DTYPE_F32, k, row);
    struct tensor c =
        accumulate ? normal_tensor(1.0, DTYPE_F32, m, row) : poisoned_tensor(DTYPE_F32, m, row);
    const struct block_operand operand = {a.data, transposed ? 1 : k, transposed ? m : 1};
    double *expected = new_doubles(m * row);

    for (int64_t i = 0; i < m; i++) {
        tensor_set(&c, i * row + n, 5.0); /* beyond the block: stays */
        tensor_set(&c, i * row + n + 1, 5.0);
        tensor_set(&c, i * row + n + 2, 5.0);
        for (int64_t j = 0; j < row; j++) {
            double sum = accumulate || j >= n ? tensor_get(&c, i * row + j) : 0.0;

            for (int64_t l = 0; l < k && j < n; l++) {
                sum += tensor_get(&a, i * operand.row + l * operand.column) *
                       tensor_get(&b, l * row + j);
            }
            expected[i * row + j] = sum;
        }
    }
    block_product(c.data, row, operand, b.data, row, m, n, k, accumulate);
    assert_close(&c, expected, tolerance_of(DTYPE_F32));
}

static void blocks_agree_with_the_triple_loop(void **state)
{
    for (int64_t m = 1; m <= 15; m++) {
        for (int64_t n = BLOCK_VECTOR; n <= 6 * BLOCK_VECTOR; n += BLOCK_VECTOR) {
            for (int flags = 0; flags < 4; flags++) {
                check_product(m, n, 1, flags & 1, flags & 2);
                check_product(m, n, 37, flags & 1, flags & 2);
            }
        }
        reference_empty_arena(state);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(blocks_agree_with_the_triple_loop, reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
