/* row_limit.h - how many rows a rank's experts may get. Without drops, routing decides that: in the
 * worst case all slots of all ranks that send here, EP times the even load. A rank that gets more
 * than the limit stops the job before the rows take memory, with a message that says which layer
 * and expert it was and what can be done. Without a limit the memory is the limit: the most uneven
 * routing so far is part of the out-of-memory message (base/arena.h). */
#ifndef CADRE_MOE_ROW_LIMIT_H
#define CADRE_MOE_ROW_LIMIT_H

#include "nn/pass.h"

struct row_limit {
    int layer;                   /* global number, for the message */
    double rank_capacity_factor; /* of the even load; 0: what memory holds */
    int64_t row_elements;        /* what a row takes in forward and backward, for the message */
};

/* The most rows that the factor allows where even routing brings even_rows; 0: no limit. */
int64_t row_limit_rows(double rank_capacity_factor, int64_t even_rows);
/* offsets [num_local + 1], on the host: the rows of this rank's experts, of which the first is
 * number first_expert. */
void row_limit_check(const struct row_limit *limit, enum dtype dtype, int64_t even_rows,
                     int first_expert, int num_local, const int32_t *offsets);

#endif
