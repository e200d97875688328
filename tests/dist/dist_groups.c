/* Every group of a rank over MPI has the members that the rank grid says: a sum over it of one bit
 * per rank. ranks: 4 8 */
#include "dist_test.h"

#include "parallel/groups.h"

static int64_t bits_of(const struct rank_grid *grid, unsigned dims)
{
    int members[16];
    int64_t bits = 0;

    rank_grid_members(grid, dims, launch_rank(), members);
    for (int i = 0; i < rank_grid_size(grid, dims); i++) {
        bits |= (int64_t)1 << members[i];
    }
    return bits;
}

static void expect_members(struct comm *comm, int64_t wanted)
{
    struct tensor bits = tensor_new(arena, DTYPE_I64, 1);
    struct tensor order = tensor_new(arena, DTYPE_I64, 1), all;

    ((int64_t *)bits.data)[0] = (int64_t)1 << launch_rank();
    ((int64_t *)order.data)[0] = launch_rank();
    comm_wait(comm_all_reduce(comm, stream, &bits, COMM_SUM), stream);
    if (((int64_t *)bits.data)[0] != wanted) {
        dist_failed("group %s has the ranks 0x%llx, wanted 0x%llx", comm->name,
                    (long long)((int64_t *)bits.data)[0], (long long)wanted);
    }
    all = tensor_new(arena, DTYPE_I64, comm->size);
    comm_wait(comm_all_gather(comm, stream, &all, &order), stream);
    for (int r = 1; r < comm->size; r++) {
        if (((int64_t *)all.data)[r - 1] >= ((int64_t *)all.data)[r]) {
            dist_failed("group %s is not in the order of its ranks", comm->name);
        }
    }
}

static void test_grid(int tp, int cp, int pp, int ep, int etp)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = tp, .cp = cp, .pp = pp, .ep = ep, .etp = etp};
    struct rank_grid grid;
    struct groups groups;
    int members[2];
    int64_t embedding = (int64_t)1 << launch_rank();

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    groups_create(&groups, &grid, launch_rank(), tp > 1);
    expect_members(groups.tp, bits_of(&grid, RANK_TP));
    expect_members(groups.cp, bits_of(&grid, RANK_CP));
    expect_members(groups.dp, bits_of(&grid, RANK_DP));
    expect_members(groups.pp, bits_of(&grid, RANK_PP));
    expect_members(groups.pp_backward, bits_of(&grid, RANK_PP));
    expect_members(groups.etp, bits_of(&grid, RANK_ETP));
    expect_members(groups.ep, bits_of(&grid, RANK_EP));
    expect_members(groups.edp, bits_of(&grid, RANK_EDP));
    expect_members(groups.etp_ep, bits_of(&grid, RANK_ETP | RANK_EP));
    expect_members(groups.tp_cp, bits_of(&grid, RANK_TP | RANK_CP));
    expect_members(groups.dp_cp, bits_of(&grid, RANK_DP | RANK_CP));
    expect_members(groups.world, ((int64_t)1 << launch_size()) - 1);
    if (rank_grid_place(&grid, RANK_PP, launch_rank()) % (pp > 1 ? pp - 1 : 1) == 0) {
        const int count = rank_grid_embedding_members(&grid, launch_rank(), members);

        embedding = (int64_t)1 << members[0];
        embedding |= (int64_t)1 << members[count - 1];
    }
    expect_members(groups.embedding, embedding);
    if (groups.sequence_parallel != (tp > 1)) {
        dist_failed("sequence parallelism was lost");
    }
    groups_destroy(&groups);
    dist_release();
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);

    test_grid(1, 1, 1, 1, 1);
    test_grid(2, 1, 1, 2, 2);
    test_grid(2, 2, 1, 4, 1);
    test_grid(1, 1, 4, 1, 1);
    test_grid(2, 1, 2, 1, 2);
    test_grid(1, 2, 2, 2, 1);
    if (size == 8) {
        test_grid(2, 1, 2, 2, 2);
        test_grid(2, 2, 2, 4, 1);
    }
    return dist_end();
}
