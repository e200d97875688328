/* dispatcher_plan.h - who sends how many rows to whom, and in which order they are wanted. Pure
 * arithmetic on counts, on the host.
 *
 * counts[s * etp + t][e] is how many rows the rank with EP rank s and ETP rank t sends to expert e.
 * Rows arrive by (t, s, expert, token) and are wanted by (expert, s, t, token): by expert, then in
 * the order of the ranks' numbers, which is that of the tokens. */
#ifndef CADRE_MOE_DISPATCHER_PLAN_H
#define CADRE_MOE_DISPATCHER_PLAN_H

#include <stdint.h>

#include "moe/dispatcher.h"

struct dispatch_layout {
    int num_experts, ep, etp;
    int ep_rank, etp_rank;
};

int dispatch_num_local(const struct dispatch_layout *layout);
/* offsets [local experts + 1]: the rows of each local expert. */
void dispatch_plan_exchange(const struct dispatch_layout *layout, const int32_t *counts,
                            struct dispatch_exchange *exchange, int32_t *offsets);
/* arrival [R]: place in arrival order of a row; row_at [R]: its inverse. */
void dispatch_plan_order(const struct dispatch_layout *layout, const int32_t *counts,
                         const int32_t *offsets, int32_t *arrival, int32_t *row_at);

/* On the device that only measures memory: how many of num_slots, an equal number from every rank
 * that sends here, are for this rank's experts: their even share, or pass->measured_load of it. */
int64_t dispatch_measured_rows(const struct pass *pass, int64_t num_slots);

/* The steps that alltoall and alltoall_seq share. */

/* Permutes this rank's slots by expert, exchanges the counts over comm (the ranks of the layout)
 * and fills in the plan: row_of, send_token, exchange, offsets, arrival, row_at, num_rows. Returns
 * the probabilities of the rows to send [num_sent], in scratch. */
struct tensor dispatch_plan_make(const struct pass *pass, const struct dispatch_layout *layout,
                                 struct comm *comm, const struct dispatch_input *input,
                                 struct dispatched *plan);
/* received [num_received,W] from the EP ranks' sent [num_sent,W], and the way back; complete after
 * the wait. */
struct comm_handle dispatch_rows_out(const struct pass *pass, const struct dispatched *plan,
                                     struct tensor *received, const struct tensor *sent);
struct comm_handle dispatch_rows_home(const struct pass *pass, const struct dispatched *plan,
                                      struct tensor *sent, const struct tensor *received);
/* A new tensor [n] I32 in arena with these numbers. */
struct tensor dispatch_index(const struct pass *pass, struct arena *arena, const int32_t *index,
                             int64_t n);
/* A new tensor in arena of the rows index[r] of x. */
struct tensor dispatch_gather(const struct pass *pass, struct arena *arena, const struct tensor *x,
                              const struct tensor *index);

#endif
