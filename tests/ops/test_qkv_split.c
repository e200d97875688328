#include "reference.h"

struct split_case {
    int64_t t, num_heads, num_groups, d, num_pairs; /* num_pairs < 0: no table */
    bool interleaved;
};

enum { NUM_POSITIONS = 11 };

/* Element (token, row of the projection) of qkv goes to q, k or v, rotated when it is in a pair. */
static void reference_split(const struct split_case *c, const double *qkv, const double *table,
                            const int32_t *position, double *out[3])
{
    const int64_t per_group = c->num_heads / c->num_groups;

    for (int64_t t = 0; t < c->t; t++) {
        for (int64_t row = 0; row < c->num_heads + 2 * c->num_groups; row++) {
            const int64_t group = row / (per_group + 2), in_group = row % (per_group + 2);
            const int kind = in_group < per_group ? 0 : in_group == per_group ? 1 : 2;
            const double *x = qkv + (t * (c->num_heads + 2 * c->num_groups) + row) * c->d;
            double *y = kind == 0
                            ? out[0] + (t * c->num_heads + group * per_group + in_group) * c->d
                            : out[kind] + (t * c->num_groups + group) * c->d;

            for (int64_t i = 0; i < c->d; i++) {
                y[i] = x[i];
            }
            for (int64_t i = 0; i < c->num_pairs && kind < 2; i++) {
                const int64_t i0 = c->interleaved ? 2 * i : i;
                const int64_t i1 = c->interleaved ? 2 * i + 1 : i + c->num_pairs;
                const double *cos_sin = table + (position[t] * c->num_pairs + i) * 2;

                y[i0] = x[i0] * cos_sin[0] - x[i1] * cos_sin[1];
                y[i1] = x[i1] * cos_sin[0] + x[i0] * cos_sin[1];
            }
        }
    }
}

static void check_split(struct split_case c, enum dtype dtype)
{
    const int64_t pairs = c.num_pairs > 0 ? c.num_pairs : 0;
    const int64_t qkv_size = (c.num_heads + 2 * c.num_groups) * c.d;
    struct tensor qkv = normal_tensor(1.0, dtype, c.t, qkv_size);
    struct tensor back = poisoned_tensor(dtype, c.t, qkv_size);
    struct tensor q = poisoned_tensor(dtype, c.t, c.num_heads, c.d);
    struct tensor k = poisoned_tensor(dtype, c.t, c.num_groups, c.d);
    struct tensor v = poisoned_tensor(dtype, c.t, c.num_groups, c.d);
    struct tensor table = tensor_new(arena, DTYPE_F32, NUM_POSITIONS, pairs, 2);
    struct tensor position = tensor_new(arena, DTYPE_I32, c.t);
    struct qkv_split args = {.q = &q,
                             .k = &k,
                             .v = &v,
                             .qkv = &qkv,
                             .table = c.num_pairs >= 0 ? &table : NULL,
                             .position = c.num_pairs >= 0 ? &position : NULL,
                             .interleaved = c.interleaved};
    double *out[3] = {new_doubles(c.t * c.num_heads * c.d), new_doubles(c.t * c.num_groups * c.d),
                      new_doubles(c.t * c.num_groups * c.d)};

    for (int64_t i = 0; i < NUM_POSITIONS * pairs; i++) {
        const double angle = random_normal_number();

        tensor_set(&table, 2 * i, cos(angle));
        tensor_set(&table, 2 * i + 1, sin(angle));
    }
    for (int64_t t = 0; t < c.t; t++) {
        tensor_set(&position, t, (double)random_below(NUM_POSITIONS));
    }
    reference_split(&c, doubles_of(&qkv), doubles_of(&table), position.data, out);
    WITH_THREADS(&q, &k, &v)
    {
        op_qkv_split_forward(stream, &args);
    }
    assert_close(&q, out[0], tolerance_of(dtype));
    assert_close(&k, out[1], tolerance_of(dtype));
    assert_close(&v, out[2], tolerance_of(dtype));

    /* A rotation's transpose is its inverse: backward of forward gives the input back. */
    args.qkv = &back;
    WITH_THREADS(&back)
    {
        op_qkv_split_backward(stream, &args);
    }
    assert_close(&back, doubles_of(&qkv), tolerance_of(dtype));
}

static void every_layout_splits_rotates_and_comes_back(void **state)
{
    const struct split_case cases[] = {
        {1, 1, 1, 2, 1, false},  {3, 4, 4, 6, 3, false},   {5, 4, 2, 10, 3, true},
        {7, 6, 1, 16, 4, false}, {33, 8, 2, 64, 32, true}, {65, 8, 8, 64, 32, false},
        {9, 4, 2, 12, 0, false}, {9, 4, 2, 7, -1, false},  {0, 2, 2, 8, 4, false},
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        check_split(cases[i], DTYPE_F32);
        check_split(cases[i], DTYPE_BF16);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(every_layout_splits_rotates_and_comes_back,
                                  reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
