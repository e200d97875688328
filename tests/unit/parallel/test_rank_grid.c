/* The groups against the tables of the reference (Megatron's docstrings and tests), and the laws
 * every grouping must obey, for all sizes of up to 64 ranks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdbool.h>
#include <string.h>

#include "base/check.h"
#include "parallel/rank_grid.h"

enum { WORLD_MAX = 64 };

static struct rank_grid grid_of(struct rank_grid_sizes sizes)
{
    struct rank_grid grid;

    assert_int_equal(rank_grid_init(&grid, &sizes), 0);
    return grid;
}

static void assert_group(const struct rank_grid *grid, unsigned dims, int rank, int size,
                         const int *expected)
{
    int members[WORLD_MAX];

    assert_int_equal(rank_grid_size(grid, dims), size);
    rank_grid_members(grid, dims, rank, members);
    assert_memory_equal(members, expected, (size_t)size * sizeof(int));
}
#define ASSERT_GROUP(grid, dims, rank, ...)                                                        \
    assert_group(grid, dims, rank, (int)(sizeof((int[]){__VA_ARGS__}) / sizeof(int)),              \
                 (int[]){__VA_ARGS__})

/* Reference 4.2: W = 16, TP = 2, EP = 4. */
static void seed_example_of_16_ranks_has_the_documented_groups(void **state)
{
    const struct rank_grid g = grid_of(
        (struct rank_grid_sizes){.world = 16, .tp = 2, .cp = 1, .pp = 1, .ep = 4, .etp = 2});

    ASSERT_GROUP(&g, RANK_TP, 0, 0, 1);
    ASSERT_GROUP(&g, RANK_TP, 3, 2, 3);
    ASSERT_GROUP(&g, RANK_EP, 0, 0, 2, 4, 6);
    ASSERT_GROUP(&g, RANK_EP, 3, 1, 3, 5, 7);
    ASSERT_GROUP(&g, RANK_EP, 8, 8, 10, 12, 14);
    ASSERT_GROUP(&g, RANK_EDP, 0, 0, 8);
    ASSERT_GROUP(&g, RANK_EDP, 9, 1, 9);
    ASSERT_GROUP(&g, RANK_DP, 6, 0, 2, 4, 6, 8, 10, 12, 14);
    ASSERT_GROUP(&g, RANK_DP, 5, 1, 3, 5, 7, 9, 11, 13, 15);
    ASSERT_GROUP(&g, RANK_ETP | RANK_EP, 2, 0, 1, 2, 3, 4, 5, 6, 7);
    assert_int_equal(rank_grid_num_groups(&g, RANK_EP), 4);
    assert_int_equal(rank_grid_group(&g, RANK_EP, 12), 2);
    assert_int_equal(rank_grid_place(&g, RANK_EP, 12), 2);
}

/* Megatron's classic example: 16 GPUs, TP 2, PP 4. */
static void pipeline_is_the_slowest_dimension_by_default(void **state)
{
    const struct rank_grid g = grid_of(
        (struct rank_grid_sizes){.world = 16, .tp = 2, .cp = 1, .pp = 4, .ep = 1, .etp = 2});
    int members[2];

    ASSERT_GROUP(&g, RANK_PP, 0, 0, 4, 8, 12);
    ASSERT_GROUP(&g, RANK_PP, 7, 3, 7, 11, 15);
    ASSERT_GROUP(&g, RANK_DP, 0, 0, 2);
    ASSERT_GROUP(&g, RANK_DP, 15, 13, 15);
    ASSERT_GROUP(&g, RANK_TP | RANK_PP, 0, 0, 1, 4, 5, 8, 9, 12, 13);
    assert_int_equal(rank_grid_embedding_members(&g, 9, members), 2);
    assert_int_equal(members[0], 1);
    assert_int_equal(members[1], 13);
}

static void tp_pp_dp_mapping_puts_the_pipeline_inside_dp(void **state)
{
    const struct rank_grid g = grid_of((struct rank_grid_sizes){
        .world = 16, .tp = 2, .cp = 1, .pp = 4, .ep = 1, .etp = 2, .pp_before_dp = true});

    ASSERT_GROUP(&g, RANK_PP, 0, 0, 2, 4, 6);
    ASSERT_GROUP(&g, RANK_DP, 3, 3, 11);
    ASSERT_GROUP(&g, RANK_EDP, 3, 3, 11);
}

static void context_ranks_sit_between_tensor_and_data(void **state)
{
    const struct rank_grid g = grid_of(
        (struct rank_grid_sizes){.world = 16, .tp = 2, .cp = 2, .pp = 2, .ep = 1, .etp = 2});

    ASSERT_GROUP(&g, RANK_CP, 0, 0, 2);
    ASSERT_GROUP(&g, RANK_DP, 0, 0, 4);
    ASSERT_GROUP(&g, RANK_DP | RANK_CP, 1, 1, 3, 5, 7);
    ASSERT_GROUP(&g, RANK_TP | RANK_CP, 13, 12, 13, 14, 15);
    ASSERT_GROUP(&g, RANK_PP, 5, 5, 13);
}

/* Reference 4.3: EP may span TP and CP ranks (EP = 8 with TP = 4, CP = 2, DP = 1). */
static void experts_may_span_tensor_and_context_ranks(void **state)
{
    const struct rank_grid g =
        grid_of((struct rank_grid_sizes){.world = 8, .tp = 4, .cp = 2, .pp = 1, .ep = 8, .etp = 1});

    ASSERT_GROUP(&g, RANK_EP, 5, 0, 1, 2, 3, 4, 5, 6, 7);
    ASSERT_GROUP(&g, RANK_EDP, 5, 5);
    ASSERT_GROUP(&g, RANK_DP, 5, 5);
}

/* --moe-extended-tp with TP 2, EP 2: every rank of TPxEP holds a slice of every expert. */
static void extended_tp_is_etp_over_tp_and_ep(void **state)
{
    const struct rank_grid g =
        grid_of((struct rank_grid_sizes){.world = 8, .tp = 2, .cp = 1, .pp = 1, .ep = 1, .etp = 4});

    ASSERT_GROUP(&g, RANK_ETP, 2, 0, 1, 2, 3);
    ASSERT_GROUP(&g, RANK_EP, 2, 2);
    ASSERT_GROUP(&g, RANK_EDP, 2, 2, 6);
}

static void embedding_group_of_one_stage_is_the_rank_itself(void **state)
{
    const struct rank_grid g =
        grid_of((struct rank_grid_sizes){.world = 4, .tp = 2, .cp = 1, .pp = 1, .ep = 1, .etp = 2});
    int members[2];

    assert_int_equal(rank_grid_embedding_members(&g, 3, members), 1);
    assert_int_equal(members[0], 3);
}

/* Every rank is in exactly one group of a kind: walking the groups from their first members meets
 * every rank once, in ascending order, where group and place say it is. */
static bool is_partition(const struct rank_grid *g, unsigned dims)
{
    const int size = rank_grid_size(g, dims), num_groups = rank_grid_num_groups(g, dims);
    int members[WORLD_MAX], num_met = 0, num_firsts = 0;
    bool met[WORLD_MAX] = {false}, ok = size * num_groups == g->world;

    for (int rank = 0; rank < g->world; rank++) {
        if (rank_grid_place(g, dims, rank) != 0) {
            continue;
        }
        ok = ok && rank_grid_group(g, dims, rank) == num_firsts++;
        rank_grid_members(g, dims, rank, members);
        for (int i = 0; i < size; i++) {
            ok = ok && (i == 0 || members[i - 1] < members[i]) && !met[members[i]] &&
                 rank_grid_group(g, dims, members[i]) == num_firsts - 1 &&
                 rank_grid_place(g, dims, members[i]) == i;
            met[members[i]] = true;
            num_met++;
        }
    }
    return ok && num_met == g->world && num_firsts == num_groups;
}

/* A stage is the same set of ranks in both grids. */
static void assert_stages_agree(const struct rank_grid *g)
{
    bool agree = true;

    for (int rank = 0; rank < g->world; rank++) {
        agree = agree && rank_grid_group(g, RANK_ETP | RANK_EP | RANK_EDP, rank) ==
                             rank_grid_place(g, RANK_PP, rank);
    }
    assert_true(agree);
}

/* All sets of dimensions of one grid. */
static void assert_partitions(const struct rank_grid *g, unsigned grid_dims)
{
    for (unsigned dims = 0; dims <= grid_dims; dims++) {
        if ((dims & ~grid_dims) == 0) {
            assert_true(is_partition(g, dims));
        }
    }
}

/* Calls visit for all sizes of worlds of up to max ranks, legal or not. */
static void for_all_sizes(int max, void (*visit)(const struct rank_grid_sizes *sizes))
{
    struct rank_grid_sizes s;

    for (s.world = 1; s.world <= max; s.world++) {
        for (s.tp = 1; s.tp <= s.world; s.tp++) {
            for (s.cp = 1; s.tp * s.cp <= s.world; s.cp++) {
                for (s.pp = 1; s.tp * s.cp * s.pp <= s.world; s.pp++) {
                    for (s.etp = 1; s.etp * s.pp <= s.world; s.etp++) {
                        for (s.ep = 1; s.ep * s.etp * s.pp <= s.world; s.ep++) {
                            s.pp_before_dp = false;
                            visit(&s);
                            s.pp_before_dp = true;
                            visit(&s);
                        }
                    }
                }
            }
        }
    }
}

static bool sizes_are_legal(const struct rank_grid_sizes *s)
{
    return s->world % (s->tp * s->cp * s->pp) == 0 && s->world % (s->etp * s->ep * s->pp) == 0 &&
           (!s->pp_before_dp || s->pp == 1 || s->tp * s->cp == s->etp * s->ep);
}

static void visit_laws(const struct rank_grid_sizes *sizes)
{
    struct rank_grid grid;

    if (sizes_are_legal(sizes)) {
        assert_int_equal(rank_grid_init(&grid, sizes), 0);
        assert_stages_agree(&grid);
        /* One grid does not depend on the sizes of the other: once for each is enough. */
        if (sizes->etp * sizes->ep == 1) {
            assert_partitions(&grid, RANK_DENSE_DIMS);
        }
        if (sizes->tp * sizes->cp == 1) {
            assert_partitions(&grid, RANK_EXPERT_DIMS);
        }
    } else {
        assert_int_equal(rank_grid_init(&grid, sizes), -1);
    }
}

static void groupings_obey_the_laws_for_all_sizes_up_to_64(void **state)
{
    for_all_sizes(WORLD_MAX, visit_laws);
}

static void assert_refused(struct rank_grid_sizes sizes, const char *text)
{
    struct rank_grid grid;

    assert_int_equal(rank_grid_init(&grid, &sizes), -1);
    if (strstr(error_text(), text) == NULL) {
        fail_msg("\"%s\" is not in \"%s\"", text, error_text());
    }
}

static void sizes_that_do_not_fit_are_refused_with_the_values(void **state)
{
    assert_refused(
        (struct rank_grid_sizes){.world = 1, .tp = 2, .cp = 1, .pp = 2, .ep = 1, .etp = 2},
        "world size (1) is not divisible by tensor-model-parallel-size (2)");
    assert_refused(
        (struct rank_grid_sizes){.world = 8, .tp = 0, .cp = 1, .pp = 1, .ep = 1, .etp = 1},
        "--tensor-model-parallel-size is 0");
    assert_refused(
        (struct rank_grid_sizes){.world = 12, .tp = 1, .cp = 1, .pp = 2, .ep = 4, .etp = 1},
        "legal expert-model-parallel-size here: 1, 2, 3, 6");
    assert_refused(
        (struct rank_grid_sizes){.world = 12, .tp = 1, .cp = 1, .pp = 2, .ep = 1, .etp = 4},
        "expert-tensor-parallel-size (4) does not divide the 6 ranks");
    assert_refused(
        (struct rank_grid_sizes){
            .world = 16, .tp = 2, .cp = 1, .pp = 2, .ep = 4, .etp = 2, .pp_before_dp = true},
        "--use-tp-pp-dp-mapping");
    assert_refused(
        (struct rank_grid_sizes){
            .world = 8, .tp = 1 << 30, .cp = 1 << 30, .pp = 1 << 30, .ep = 1, .etp = 1},
        "is not divisible");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(seed_example_of_16_ranks_has_the_documented_groups),
        cmocka_unit_test(pipeline_is_the_slowest_dimension_by_default),
        cmocka_unit_test(tp_pp_dp_mapping_puts_the_pipeline_inside_dp),
        cmocka_unit_test(context_ranks_sit_between_tensor_and_data),
        cmocka_unit_test(experts_may_span_tensor_and_context_ranks),
        cmocka_unit_test(extended_tp_is_etp_over_tp_and_ep),
        cmocka_unit_test(embedding_group_of_one_stage_is_the_rank_itself),
        cmocka_unit_test(groupings_obey_the_laws_for_all_sizes_up_to_64),
        cmocka_unit_test(sizes_that_do_not_fit_are_refused_with_the_values),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
