/* rank_grid.h - which ranks work together. Pure arithmetic, no communication.
 *
 * The same ranks are numbered by two grids ("parallel folding"), dimensions named from fastest to
 * slowest: the dense grid tp-cp-dp-pp for attention, norms and embeddings, and the expert grid
 * etp-ep-edp-pp for the experts. DP and EDP are what is left of the world. A pipeline stage is the
 * same set of ranks in both.
 *
 * Special cases: Megatron-Core 0.9 cuts EP out of DP, which is ETP = TP here (with CP > 1 it put
 * the CP ranks between the EP ranks; here EP ranks are neighbours: the same sizes and numbers).
 * --moe-extended-tp, where every rank owns a slice of all experts, is ETP = TP * EP with EP = 1. */
#ifndef CADRE_PARALLEL_RANK_GRID_H
#define CADRE_PARALLEL_RANK_GRID_H

#include <stdbool.h>

/* Sets of dimensions are sums: RANK_DP | RANK_CP. A set stays within one grid; RANK_PP is in both.
 */
enum rank_dims {
    RANK_TP = 1 << 0,
    RANK_CP = 1 << 1,
    RANK_DP = 1 << 2,
    RANK_PP = 1 << 3,
    RANK_ETP = 1 << 4,
    RANK_EP = 1 << 5,
    RANK_EDP = 1 << 6,
};

enum {
    RANK_DENSE_DIMS = RANK_TP | RANK_CP | RANK_DP | RANK_PP,
    RANK_EXPERT_DIMS = RANK_ETP | RANK_EP | RANK_EDP | RANK_PP,
    RANK_GRID_AXES = 4,
};

struct rank_grid_sizes {
    int world, tp, cp, pp, ep, etp;
    bool pp_before_dp; /* --use-tp-pp-dp-mapping: tp-cp-pp-dp and etp-ep-pp-edp */
};

/* One dimension of a grid: coordinate = rank / stride % size. */
struct rank_axis {
    enum rank_dims dim;
    int size, stride;
};

struct rank_grid {
    int world;
    struct rank_axis dense[RANK_GRID_AXES], expert[RANK_GRID_AXES]; /* fastest first */
};

/* Fails when the sizes do not fit the world or each other, naming the values and what would fit. */
int rank_grid_init(struct rank_grid *grid, const struct rank_grid_sizes *sizes);

/* Ranks in a group over dims (for one dimension: its size), and how many such groups there are. */
int rank_grid_size(const struct rank_grid *grid, unsigned dims);
int rank_grid_num_groups(const struct rank_grid *grid, unsigned dims);

/* The group over dims that rank is in: all ranks that agree with it in the other dimensions.
 * Its index among the groups (they are listed in the order of the other dimensions), rank's place
 * in it (for one dimension: the coordinate), and its members in ascending order. members holds
 * rank_grid_size(grid, dims) ranks. */
int rank_grid_group(const struct rank_grid *grid, unsigned dims, int rank);
int rank_grid_place(const struct rank_grid *grid, unsigned dims, int rank);
void rank_grid_members(const struct rank_grid *grid, unsigned dims, int rank, int *members);

/* The ranks that hold the tied embedding: the first and the last stage of rank's pipeline (one rank
 * when PP = 1). Returns how many; a rank of a stage between gets its pipeline's too. */
int rank_grid_embedding_members(const struct rank_grid *grid, int rank, int members[2]);

#endif
