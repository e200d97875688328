/* groups.h - the communicators of this rank: one per group of the dense grid (tp, cp, dp, pp) and
 * of the expert grid (etp, ep, edp, pp), and the joined groups that some sums run over (reference
 * M4). */
#ifndef CADRE_PARALLEL_GROUPS_H
#define CADRE_PARALLEL_GROUPS_H

#include <stdbool.h>

#include "comm/comm.h"
#include "parallel/rank_grid.h"

struct groups {
    struct comm *tp, *cp, *dp, *pp;
    struct comm *pp_backward; /* the ranks of pp again, for gradients (pipeline/executor.h) */
    struct comm *etp, *ep, *edp;
    struct comm *etp_ep;    /* the ranks that own all experts together: the allgather dispatcher */
    struct comm *tp_cp;     /* the ranks that share a sequence: balancing losses */
    struct comm *dp_cp;     /* dense gradients (expert gradients: edp) */
    struct comm *embedding; /* first and last stage, for tied embeddings; one rank on the others */
    struct comm *world;
    bool sequence_parallel; /* activations between TP regions are cut along the tokens */
    bool tp_comm_overlap;   /* --tp-comm-overlap: set by the caller after groups_create */
};

/* Every group has this one rank. */
void groups_create_self(struct groups *groups);
/* The groups of a rank of the grid, by comm_create where they have several ranks. Nothing is sent.
 */
void groups_create(struct groups *groups, const struct rank_grid *grid, int rank,
                   bool sequence_parallel);
void groups_destroy(struct groups *groups);

/* For what looks at every group, such as their counters (--log-comm). */
int groups_num_comms(void);
const struct comm *groups_comm(const struct groups *groups, int number);
void groups_reset_counters(struct groups *groups);
/* counters[groups_num_comms()][NUM_COMM_KINDS] of all groups. */
void groups_read_counters(const struct groups *groups, struct comm_counter *counters);
void groups_add_counters(struct groups *groups, const struct comm_counter *counters);

#endif
