/* groups.h - the communicators of this rank: one per group of the dense grid (tp, cp, dp, pp) and
 * of the expert grid (etp, ep, edp, pp), and the joined groups that some sums run over (reference
 * M4). */
#ifndef CADRE_PARALLEL_GROUPS_H
#define CADRE_PARALLEL_GROUPS_H

#include <stdbool.h>
#include <stdio.h>

#include "comm/comm.h"
#include "parallel/rank_grid.h"

struct groups {
    struct comm *tp, *cp, *dp, *pp;
    struct comm *etp, *ep, *edp;
    struct comm *etp_ep;    /* the ranks that own all experts together: the allgather dispatcher */
    struct comm *tp_cp;     /* the ranks that share a sequence: balancing losses */
    struct comm *dp_cp;     /* dense gradients (expert gradients: edp) */
    struct comm *tp_pp;     /* the ranks that hold the dense parameters once: their norm */
    struct comm *etp_ep_pp; /* the ranks that hold the experts once: their norm */
    struct comm *embedding; /* first and last stage, for tied embeddings; one rank on the others */
    struct comm *world;
    bool sequence_parallel; /* activations between TP regions are cut along the tokens */
};

/* Every group has this one rank. */
void groups_create_self(struct groups *groups);
/* The groups of a rank of the grid, over MPI where they have several ranks. Nothing is sent. */
void groups_create(struct groups *groups, const struct rank_grid *grid, int rank,
                   bool sequence_parallel);
void groups_destroy(struct groups *groups);

/* Bytes and calls since the last reset, a line per group and kind (--log-comm). */
void groups_print_counters(const struct groups *groups, FILE *out);
void groups_reset_counters(struct groups *groups);

#endif
