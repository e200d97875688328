/* groups.c - one table says which dimensions each group joins; creating, destroying and counting
 * are loops over it. */
#include "parallel/groups.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "comm/comm_create.h"
#include "comm/comm_mpi.h"

struct group_row {
    size_t offset; /* of the pointer in struct groups */
    const char *name;
    unsigned dims; /* 0: not a set of dimensions */
};

#define GROUP(field, name, dims)                                                                   \
    {                                                                                              \
        offsetof(struct groups, field), name, dims                                                 \
    }

/* The order is the groups' numbers, the same on all ranks. */
static const struct group_row rows[] = {
    GROUP(tp, "tp", RANK_TP),
    GROUP(cp, "cp", RANK_CP),
    GROUP(dp, "dp", RANK_DP),
    GROUP(pp, "pp", RANK_PP),
    GROUP(pp_backward, "pp-backward", RANK_PP),
    GROUP(etp, "etp", RANK_ETP),
    GROUP(ep, "ep", RANK_EP),
    GROUP(edp, "edp", RANK_EDP),
    GROUP(etp_ep, "etp-ep", RANK_ETP | RANK_EP),
    GROUP(tp_cp, "tp-cp", RANK_TP | RANK_CP),
    GROUP(dp_cp, "dp-cp", RANK_DP | RANK_CP),
    GROUP(world, "world", RANK_DENSE_DIMS),
    GROUP(embedding, "embedding", 0),
};

enum { NUM_GROUPS = sizeof rows / sizeof *rows };
_Static_assert((int)NUM_GROUPS <= (int)COMM_MPI_GROUPS_MAX, "every group has a number of its own");

static struct comm **field(struct groups *groups, int number)
{
    return (struct comm **)((char *)groups + rows[number].offset);
}

void groups_create_self(struct groups *groups)
{
    memset(groups, 0, sizeof *groups);
    for (int number = 0; number < NUM_GROUPS; number++) {
        *field(groups, number) = comm_self_create(rows[number].name);
    }
}

/* The ranks that hold the tied embedding, or rank alone where its stage has none. */
static int embedding_members(const struct rank_grid *grid, int rank, int *members)
{
    const int stage = rank_grid_place(grid, RANK_PP, rank);

    if (stage != 0 && stage != rank_grid_size(grid, RANK_PP) - 1) {
        members[0] = rank;
        return 1;
    }
    return rank_grid_embedding_members(grid, rank, members);
}

static struct comm *create_group(const struct rank_grid *grid, int rank, int number, int *members)
{
    const struct group_row *row = &rows[number];
    int size;

    if (row->dims == 0) {
        size = embedding_members(grid, rank, members);
    } else {
        size = rank_grid_size(grid, row->dims);
        rank_grid_members(grid, row->dims, rank, members);
    }
    return size == 1 ? comm_self_create(row->name) : comm_create(row->name, number, members, size);
}

void groups_create(struct groups *groups, const struct rank_grid *grid, int rank,
                   bool sequence_parallel)
{
    int *members = calloc((size_t)grid->world + 1, sizeof *members);

    CHECK(members != NULL, "out of memory");
    memset(groups, 0, sizeof *groups);
    groups->sequence_parallel = sequence_parallel;
    for (int number = 0; number < NUM_GROUPS; number++) {
        *field(groups, number) = create_group(grid, rank, number, members);
    }
    free(members);
}

void groups_destroy(struct groups *groups)
{
    for (int number = 0; number < NUM_GROUPS; number++) {
        comm_destroy(*field(groups, number));
    }
    memset(groups, 0, sizeof *groups);
}

int groups_num_comms(void)
{
    return NUM_GROUPS;
}

const struct comm *groups_comm(const struct groups *groups, int number)
{
    return *(struct comm *const *)((const char *)groups + rows[number].offset);
}

void groups_reset_counters(struct groups *groups)
{
    for (int number = 0; number < NUM_GROUPS; number++) {
        comm_counters_reset(*field(groups, number));
    }
}

void groups_read_counters(const struct groups *groups, struct comm_counter *counters)
{
    for (int number = 0; number < NUM_GROUPS; number++) {
        memcpy(counters + number * NUM_COMM_KINDS, groups_comm(groups, number)->counters,
               NUM_COMM_KINDS * sizeof *counters);
    }
}

void groups_add_counters(struct groups *groups, const struct comm_counter *counters)
{
    for (int number = 0; number < NUM_GROUPS; number++) {
        for (int kind = 0; kind < NUM_COMM_KINDS; kind++) {
            struct comm_counter *counter = &(*field(groups, number))->counters[kind];

            counter->num_calls += counters[number * NUM_COMM_KINDS + kind].num_calls;
            counter->sent_bytes += counters[number * NUM_COMM_KINDS + kind].sent_bytes;
        }
    }
}
