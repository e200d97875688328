#include "reference.h"

struct shape {
    int64_t m, n, k;
};

/* Odd sizes, vectors, one row, a prime of rows, a deep sum: what experts get. */
static const struct shape shapes[] = {{1, 1, 1},    {1, 33, 7},     {5, 3, 64},   {17, 31, 13},
                                      {64, 96, 32}, {101, 64, 257}, {3, 2, 1500}, {130, 260, 70}};
enum { NUM_SHAPES = sizeof shapes / sizeof shapes[0] };

static struct tensor operand(enum dtype dtype, bool transpose, int64_t rows, int64_t columns)
{
    return transpose ? normal_tensor(1.0, dtype, columns, rows)
                     : normal_tensor(1.0, dtype, rows, columns);
}

/* start + op(a) op(b) + bias, start and bias may be NULL. */
static double *reference_matmul(const struct matmul *args, const double *start)
{
    const int64_t m = args->c->dim[0], n = args->c->dim[1];
    const int64_t k = args->a->dim[args->transpose_a ? 0 : 1];
    const double *a = doubles_of(args->a), *b = doubles_of(args->b);
    double *c = new_doubles(m * n);

    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = start != NULL ? start[i * n + j] : 0.0;

            for (int64_t l = 0; l < k; l++) {
                sum += a[args->transpose_a ? l * m + i : i * k + l] *
                       b[args->transpose_b ? j * k + l : l * n + j];
            }
            c[i * n + j] = sum + (args->bias != NULL ? tensor_get(args->bias, j) : 0.0);
        }
    }
    return c;
}

static void check_product(struct shape shape, enum dtype dtype, enum dtype dtype_c, int flags)
{
    const bool transpose_a = (flags & 1) != 0, transpose_b = (flags & 2) != 0;
    const bool accumulate = (flags & 4) != 0, with_bias = (flags & 8) != 0;
    struct tensor a = operand(dtype, transpose_a, shape.m, shape.k);
    struct tensor b = operand(dtype, transpose_b, shape.k, shape.n);
    struct tensor bias = normal_tensor(1.0, dtype, shape.n);
    struct tensor c = accumulate ? normal_tensor(1.0, dtype_c, shape.m, shape.n)
                                 : poisoned_tensor(dtype_c, shape.m, shape.n);
    const struct matmul args = {.c = &c,
                                .a = &a,
                                .b = &b,
                                .bias = with_bias ? &bias : NULL,
                                .transpose_a = transpose_a,
                                .transpose_b = transpose_b,
                                .accumulate = accumulate};
    const double *expected = reference_matmul(&args, accumulate ? doubles_of(&c) : NULL);

    WITH_THREADS(&c)
    {
        op_matmul(stream, &args);
    }
    assert_close(&c, expected, tolerance_of(dtype_c));
}

static void every_form_agrees_with_the_triple_loop(void **state)
{
    const enum dtype dtypes[][2] = {
        {DTYPE_F32, DTYPE_F32}, {DTYPE_BF16, DTYPE_BF16}, {DTYPE_BF16, DTYPE_F32}};

    for (int shape = 0; shape < NUM_SHAPES; shape++) {
        for (int dtype = 0; dtype < 3; dtype++) {
            for (int flags = 0; flags < 12; flags++) { /* a bias is not accumulated */
                check_product(shapes[shape], dtypes[dtype][0], dtypes[dtype][1], flags);
                reference_empty_arena(state);
            }
        }
    }
}

/* Weight gradients over many tokens. The library alone would give other bits with other threads. */
static void deep_weight_gradients_do_not_depend_on_the_threads(void **state)
{
    const struct shape deep[] = {{16, 16, 5001}, {64, 64, 2048}, {512, 8, 4096}, {8, 512, 1537}};

    for (int shape = 0; shape < 4; shape++) {
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            check_product(deep[shape], DTYPE_F32, DTYPE_F32, 1 + 4 * accumulate);
            check_product(deep[shape], DTYPE_BF16, DTYPE_F32, 1 + 4 * accumulate);
        }
        check_product(deep[shape], DTYPE_F32, DTYPE_F32, 1 + 8);
        reference_empty_arena(state);
    }
}

static void empty_products_are_zero_or_unchanged(void **state)
{
    struct tensor a = tensor_new(arena, DTYPE_BF16, 3, 0), b = tensor_new(arena, DTYPE_BF16, 0, 4);
    struct tensor none = tensor_new(arena, DTYPE_BF16, 0, 3), c = poisoned_tensor(DTYPE_BF16, 3, 4);
    struct tensor w = normal_tensor(1.0, DTYPE_BF16, 3, 4),
                  empty = tensor_new(arena, DTYPE_BF16, 0, 4);
    struct tensor bias = normal_tensor(1.0, DTYPE_BF16, 4),
                  sum = normal_tensor(1.0, DTYPE_F32, 3, 4);
    const double *before = doubles_of(&sum);

    op_matmul(stream, &(struct matmul){.c = &c, .a = &a, .b = &b});
    assert_close(&c, new_doubles(12), 0.0);
    op_matmul(stream, &(struct matmul){.c = &c, .a = &a, .b = &b, .bias = &bias});
    for (int64_t i = 0; i < 12; i++) {
        assert_true(tensor_get(&c, i) == tensor_get(&bias, i % 4));
    }
    op_matmul(stream, &(struct matmul){.c = &sum, .a = &a, .b = &b, .accumulate = true});
    assert_close(&sum, before, 0.0);
    op_matmul(stream, &(struct matmul){.c = &empty, .a = &none, .b = &w});
}

/* More shapes than the cache of primitives holds, twice: what was evicted is made again, and no
 * shape is taken for another. */
static void thousands_of_shapes_do_not_exhaust_the_cache(void **state)
{
    enum { DEEPEST = 700 };
    struct tensor a = zero_tensor(DTYPE_F32, 2, DEEPEST), c = poisoned_tensor(DTYPE_F32, 2, 2);

    for (int64_t i = 0; i < 2 * DEEPEST; i++) {
        tensor_set(&a, i, 1.0);
    }
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t k = 1; k <= DEEPEST; k++) {
            for (int64_t m = 1; m <= 2; m++) {
                const struct tensor left = tensor_of(a.data, DTYPE_F32, m, k);
                const struct tensor right = tensor_of(a.data, DTYPE_F32, k, 2);
                struct tensor product = tensor_of(c.data, DTYPE_F32, m, 2);

                op_matmul(stream, &(struct matmul){.c = &product, .a = &left, .b = &right});
                assert_true(tensor_get(&product, 2 * m - 1) == (double)k);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(every_form_agrees_with_the_triple_loop, reference_empty_arena),
        cmocka_unit_test_teardown(deep_weight_gradients_do_not_depend_on_the_threads,
                                  reference_empty_arena),
        cmocka_unit_test_teardown(empty_products_are_zero_or_unchanged, reference_empty_arena),
        cmocka_unit_test_teardown(thousands_of_shapes_do_not_exhaust_the_cache,
                                  reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
