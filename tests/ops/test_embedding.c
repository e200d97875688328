#include "reference.h"

/* ids of a larger vocabulary: some belong to other ranks, before and after this one's rows. */
static void check_embedding(enum dtype dtype, int64_t t, int64_t v, int64_t h, int64_t vocab_start,
                            bool accumulate)
{
    struct tensor weight = normal_tensor(1.0, dtype, v, h), id = tensor_new(arena, DTYPE_I32, t);
    struct tensor y = accumulate ? normal_tensor(1.0, dtype, t, h) : poisoned_tensor(dtype, t, h);
    struct tensor d_y = normal_tensor(1.0, dtype, t, h);
    struct tensor d_weight = normal_tensor(1.0, DTYPE_F32, v, h);
    double *y_ref = accumulate ? doubles_of(&y) : new_doubles(t * h);
    double *d_weight_ref = doubles_of(&d_weight);

    for (int64_t i = 0; i < t; i++) {
        const int64_t row = random_below(v + 2 * vocab_start) - vocab_start;

        ((int32_t *)id.data)[i] = (int32_t)(row + vocab_start);
        for (int64_t j = 0; j < h && row >= 0 && row < v; j++) {
            y_ref[i * h + j] += tensor_get(&weight, row * h + j);
            d_weight_ref[row * h + j] += tensor_get(&d_y, i * h + j);
        }
    }
    WITH_THREADS(&y, &d_weight)
    {
        op_embedding_forward(stream, &(struct embedding){.y = &y,
                                                         .weight = &weight,
                                                         .id = &id,
                                                         .vocab_start = vocab_start,
                                                         .accumulate = accumulate});
        op_embedding_backward(
            stream, &(struct embedding_backward){
                        .d_weight = &d_weight, .d_y = &d_y, .id = &id, .vocab_start = vocab_start});
    }
    assert_close(&y, y_ref, tolerance_of(dtype));
    assert_close(&d_weight, d_weight_ref, tolerance_of(DTYPE_F32));
}

static void rows_are_gathered_and_their_gradients_summed(void **state)
{
    for (int variant = 0; variant < 4; variant++) {
        const enum dtype dtype = variant & 1 ? DTYPE_BF16 : DTYPE_F32;

        check_embedding(dtype, 1, 1, 1, 0, variant >= 2);
        check_embedding(dtype, 19, 7, 33, 0, variant >= 2);
        check_embedding(dtype, 301, 5, 130, 3, variant >= 2); /* many tokens meet in a row */
        check_embedding(dtype, 0, 5, 8, 0, variant >= 2);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(rows_are_gathered_and_their_gradients_summed,
                                  reference_empty_arena),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
