/* The zigzag cut of a sequence, for all sizes of up to 12 ranks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

#include "ops/ops.h"
#include "parallel/context_parallel.h"

enum { CP_MAX = 12, CHUNK_MAX = 3, LENGTH_MAX = 2 * CP_MAX * CHUNK_MAX };

static void chunks_are_the_documented_ones(void **state)
{
    const int64_t rank_1_of_3[4] = {2, 3, 8, 9}; /* chunks 1 and 4 of six of two tokens */

    for (int64_t i = 0; i < 4; i++) {
        assert_int_equal(context_parallel_position(3, 1, 12, i), rank_1_of_3[i]);
    }
    assert_int_equal(context_parallel_position(1, 0, 7, 6), 6);
}

static void every_position_is_on_one_rank(void **state)
{
    for (int cp = 1; cp <= CP_MAX; cp++) {
        for (int64_t chunk = 1; chunk <= CHUNK_MAX; chunk++) {
            const int64_t length = 2 * cp * chunk;
            int seen[LENGTH_MAX] = {0};

            for (int rank = 0; rank < cp; rank++) {
                for (int64_t i = 0; i < length / cp; i++) {
                    seen[context_parallel_position(cp, rank, length, i)]++;
                }
            }
            for (int64_t i = 0; i < length; i++) {
                assert_int_equal(seen[i], 1);
            }
        }
    }
}

/* The number of (query, key) pairs, keys up to the query. */
static void every_rank_has_the_same_causal_work(void **state)
{
    for (int cp = 1; cp <= CP_MAX; cp++) {
        const int64_t length = 2 * cp * CHUNK_MAX;

        for (int rank = 0; rank < cp; rank++) {
            int64_t work = 0;

            for (int64_t i = 0; i < length / cp; i++) {
                work += context_parallel_position(cp, rank, length, i) + 1;
            }
            assert_int_equal(work * cp, length * (length + 1) / 2);
        }
    }
}

static void the_cut_takes_the_rows_of_the_positions(void **state)
{
    int32_t full[LENGTH_MAX][3], local[LENGTH_MAX][3];

    for (int32_t i = 0; i < LENGTH_MAX * 3; i++) {
        full[i / 3][i % 3] = i;
    }
    for (int cp = 1; cp <= CP_MAX; cp++) {
        const int64_t length = cp == 1 ? 7 : 2 * cp * CHUNK_MAX;

        for (int rank = 0; rank < cp; rank++) {
            memset(local, 0xff, sizeof local);
            context_parallel_cut(local, full, sizeof full[0], cp, rank, length);
            for (int64_t i = 0; i < length / cp; i++) {
                const int64_t position = context_parallel_position(cp, rank, length, i);

                assert_memory_equal(local[i], full[position], sizeof full[0]);
            }
            assert_int_equal(local[length / cp][0], -1);
        }
    }
}

static void parts_of_ranks_come_in_order_and_back(void **state)
{
    struct stream *stream = stream_create(device_cpu(), ops_cpu());

    for (int cp = 1; cp <= CP_MAX; cp++) {
        const int64_t length = 2 * cp * CHUNK_MAX;
        int32_t values[LENGTH_MAX], parts[LENGTH_MAX], again[LENGTH_MAX], back[LENGTH_MAX];
        struct tensor sequence = tensor_of(again, DTYPE_I32, length);
        struct tensor by_rank = tensor_of(parts, DTYPE_I32, length);
        struct tensor result = tensor_of(back, DTYPE_I32, length);

        for (int32_t i = 0; i < length; i++) {
            values[i] = 5 * i;
        }
        for (int rank = 0; rank < cp; rank++) {
            context_parallel_cut(parts + rank * length / cp, values, sizeof values[0], cp, rank,
                                 length);
        }
        context_parallel_to_sequence(stream, cp, &sequence, &by_rank);
        assert_memory_equal(again, values, (size_t)length * sizeof values[0]);
        context_parallel_to_ranks(stream, cp, &result, &sequence);
        assert_memory_equal(back, parts, (size_t)length * sizeof values[0]);
    }
    stream_destroy(stream);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chunks_are_the_documented_ones),
        cmocka_unit_test(every_position_is_on_one_rank),
        cmocka_unit_test(every_rank_has_the_same_causal_work),
        cmocka_unit_test(the_cut_takes_the_rows_of_the_positions),
        cmocka_unit_test(parts_of_ranks_come_in_order_and_back),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
