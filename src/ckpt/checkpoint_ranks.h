/* checkpoint_ranks.h - what the ranks that save or load a checkpoint together tell each other:
 * little, and only in this file's functions, which all of them must call alike. */
#ifndef CADRE_CKPT_CHECKPOINT_RANKS_H
#define CADRE_CKPT_CHECKPOINT_RANKS_H

#include <stddef.h>

#include "comm/comm.h"

/* The ranks that save or load one checkpoint together (on a shared file system). All zero, or a
 * NULL pointer to it: one rank. */
struct checkpoint_ranks {
    int rank, num_ranks;
    /* all[num_ranks][size_bytes] = each rank's `mine`. NULL with one rank. */
    void (*all_gather)(void *context, const void *mine, void *all, size_t size_bytes);
    void *context;
};

/* The ranks of a group whose transport takes host memory. */
struct checkpoint_ranks checkpoint_ranks_of(struct comm *comm);

int checkpoint_ranks_count(const struct checkpoint_ranks *ranks);
int checkpoint_ranks_index(const struct checkpoint_ranks *ranks);
void checkpoint_ranks_gather(const struct checkpoint_ranks *ranks, const void *mine, void *all,
                             size_t size_bytes);
/* Every rank's bytes become rank 0's. */
void checkpoint_ranks_share(const struct checkpoint_ranks *ranks, void *bytes, size_t size_bytes);
/* 0 where result is 0 on every rank. Otherwise -1 and the same recorded error on all: that of the
 * first rank that failed, which is named unless all say the same. */
int checkpoint_ranks_agree(const struct checkpoint_ranks *ranks, int result);
/* Every rank's recorded error becomes rank 0's. */
void checkpoint_ranks_share_error(const struct checkpoint_ranks *ranks);

#endif
