#include "parallel/rank_grid.h"

#include <stdint.h>
#include <stdio.h>

#include "base/check.h"
#include "base/checked.h"

/* "1, 2, 4": the divisors of n, for messages. */
static const char *divisors_text(char *text, size_t size_bytes, int n)
{
    size_t length = 0;

    for (int d = 1; d <= n && length < size_bytes; d++) {
        if (n % d == 0) {
            length +=
                (size_t)snprintf(text + length, size_bytes - length, "%s%d", d == 1 ? "" : ", ", d);
        }
    }
    return text;
}

static int sizes_check_positive(const struct rank_grid_sizes *s)
{
    const struct {
        const char *name;
        int value;
    } rows[] = {
        {"world size", s->world},
        {"--tensor-model-parallel-size", s->tp},
        {"--context-parallel-size", s->cp},
        {"--pipeline-model-parallel-size", s->pp},
        {"--expert-model-parallel-size", s->ep},
        {"--expert-tensor-parallel-size", s->etp},
    };

    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        if (rows[i].value < 1) {
            return error_set("%s is %d, but must be at least 1", rows[i].name, rows[i].value);
        }
    }
    return 0;
}

/* What the dense dimensions multiply to must divide the world. */
static int sizes_check_dense(const struct rank_grid_sizes *s)
{
    const int64_t sizes[] = {s->tp, s->cp, s->pp};
    int64_t product;

    if (!checked_product(sizes, 3, &product) || s->world % product != 0) {
        return error_set("world size (%d) is not divisible by tensor-model-parallel-size (%d) x "
                         "context-parallel-size (%d) x pipeline-model-parallel-size (%d): launch a "
                         "multiple of their product with mpirun -n N, or lower them",
                         s->world, s->tp, s->cp, s->pp);
    }
    return 0;
}

/* What the expert dimensions multiply to must divide the world too. */
static int sizes_check_expert(const struct rank_grid_sizes *s)
{
    const int stage = s->world / s->pp; /* ranks of one pipeline stage */
    char legal[256];

    if (stage % s->etp != 0) {
        return error_set("expert-tensor-parallel-size (%d) does not divide the %d ranks of a "
                         "pipeline stage (world size %d / pipeline-model-parallel-size %d); legal: "
                         "%s",
                         s->etp, stage, s->world, s->pp,
                         divisors_text(legal, sizeof(legal), stage));
    }
    if (stage / s->etp % s->ep != 0) {
        return error_set("world size (%d) is not divisible by expert-tensor-parallel-size (%d) x "
                         "expert-model-parallel-size (%d) x pipeline-model-parallel-size (%d); "
                         "legal expert-model-parallel-size here: %s",
                         s->world, s->etp, s->ep, s->pp,
                         divisors_text(legal, sizeof(legal), stage / s->etp));
    }
    return 0;
}

/* With PP inside DP, a stage is the same set of ranks in both grids only if PP has the same stride.
 */
static int sizes_check_stages(const struct rank_grid_sizes *s)
{
    const int64_t dense = (int64_t)s->tp * s->cp, expert = (int64_t)s->etp * s->ep;

    if (s->pp_before_dp && s->pp > 1 && dense != expert) {
        return error_set("--use-tp-pp-dp-mapping with pipeline-model-parallel-size %d needs "
                         "tensor-model-parallel-size x context-parallel-size (%d x %d) equal to "
                         "expert-tensor-parallel-size x expert-model-parallel-size (%d x %d), so "
                         "that experts and attention have the same stages; drop the flag or make "
                         "them equal",
                         s->pp, s->tp, s->cp, s->etp, s->ep);
    }
    return 0;
}

/* Fills in the axes of one grid; dims and sizes are those of (tp|etp, cp|ep, dp|edp), pp goes
 * before the third or after it. */
static void axes_init(struct rank_axis axes[RANK_GRID_AXES], const enum rank_dims dims[3],
                      const int sizes[3], int pp, bool pp_before_dp)
{
    const int pp_at = pp_before_dp ? 2 : 3;
    int stride = 1;

    for (int i = 0, from = 0; i < RANK_GRID_AXES; i++) {
        const bool is_pp = i == pp_at;

        axes[i].dim = is_pp ? RANK_PP : dims[from];
        axes[i].size = is_pp ? pp : sizes[from];
        axes[i].stride = stride;
        stride *= axes[i].size;
        from += !is_pp;
    }
}

int rank_grid_init(struct rank_grid *grid, const struct rank_grid_sizes *s)
{
    const enum rank_dims dense[] = {RANK_TP, RANK_CP, RANK_DP};
    const enum rank_dims expert[] = {RANK_ETP, RANK_EP, RANK_EDP};

    TRY(sizes_check_positive(s));
    TRY(sizes_check_dense(s));
    TRY(sizes_check_expert(s));
    TRY(sizes_check_stages(s));
    grid->world = s->world;
    axes_init(grid->dense, dense, (int[]){s->tp, s->cp, s->world / (s->tp * s->cp * s->pp)}, s->pp,
              s->pp_before_dp);
    axes_init(grid->expert, expert, (int[]){s->etp, s->ep, s->world / (s->etp * s->ep * s->pp)},
              s->pp, s->pp_before_dp);
    return 0;
}

static const struct rank_axis *axes_of(const struct rank_grid *grid, unsigned dims)
{
    const bool dense = (dims & ~(unsigned)RANK_DENSE_DIMS) == 0;

    CHECK(dense || (dims & ~(unsigned)RANK_EXPERT_DIMS) == 0,
          "dims 0x%x mix the dense and the expert grid", dims);
    return dense ? grid->dense : grid->expert;
}

/* The mixed-radix number made of rank's coordinates in the axes that are in dims. */
static int axes_number(const struct rank_axis *axes, unsigned dims, int rank)
{
    int number = 0, stride = 1;

    for (int i = 0; i < RANK_GRID_AXES; i++) {
        if (axes[i].dim & dims) {
            number += rank / axes[i].stride % axes[i].size * stride;
            stride *= axes[i].size;
        }
    }
    return number;
}

int rank_grid_size(const struct rank_grid *grid, unsigned dims)
{
    const struct rank_axis *axes = axes_of(grid, dims);
    int size = 1;

    for (int i = 0; i < RANK_GRID_AXES; i++) {
        size *= axes[i].dim & dims ? axes[i].size : 1;
    }
    return size;
}

int rank_grid_num_groups(const struct rank_grid *grid, unsigned dims)
{
    return grid->world / rank_grid_size(grid, dims);
}

int rank_grid_group(const struct rank_grid *grid, unsigned dims, int rank)
{
    return axes_number(axes_of(grid, dims), ~dims, rank);
}

int rank_grid_place(const struct rank_grid *grid, unsigned dims, int rank)
{
    return axes_number(axes_of(grid, dims), dims, rank);
}

void rank_grid_members(const struct rank_grid *grid, unsigned dims, int rank, int *members)
{
    const struct rank_axis *axes = axes_of(grid, dims);
    const int size = rank_grid_size(grid, dims);
    int first = rank;

    CHECK(rank >= 0 && rank < grid->world, "rank %d of %d", rank, grid->world);
    for (int i = 0; i < RANK_GRID_AXES; i++) {
        if (axes[i].dim & dims) {
            first -= rank / axes[i].stride % axes[i].size * axes[i].stride;
        }
    }
    for (int m = 0; m < size; m++) {
        int rest = m;

        members[m] = first;
        for (int i = 0; i < RANK_GRID_AXES; i++) {
            if (axes[i].dim & dims) {
                members[m] += rest % axes[i].size * axes[i].stride;
                rest /= axes[i].size;
            }
        }
    }
}

int rank_grid_embedding_members(const struct rank_grid *grid, int rank, int members[2])
{
    const int num_stages = rank_grid_size(grid, RANK_PP);
    int stride = 1;

    for (int i = 0; i < RANK_GRID_AXES; i++) {
        stride = grid->dense[i].dim == RANK_PP ? grid->dense[i].stride : stride;
    }
    members[0] = rank - rank_grid_place(grid, RANK_PP, rank) * stride;
    members[1] = members[0] + (num_stages - 1) * stride;
    return num_stages == 1 ? 1 : 2;
}
