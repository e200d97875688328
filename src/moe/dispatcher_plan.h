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

/* How many rows go where, on its way between the ranks. */
struct dispatch_counting {
    struct dispatch_layout layout;
    struct comm *comm;         /* the ranks of the layout */
    struct tensor prob;        /* [T*K] f32 of all slots by expert, in scratch */
    struct tensor offsets;     /* [E+1] I32 of the slots by expert, in scratch */
    struct tensor all;         /* [ranks,E] I32: each rank's offsets but the first */
    struct comm_handle handle; /* of all */
    int32_t *counts;           /* [ranks,E] */
    int32_t *local_offsets;    /* [local experts + 1] */
};

/* Permutes this rank's slots by expert and sends their numbers off. Of the plan, row_of and
 * send_token, with room for all slots, are there. */
void dispatch_count_start(const struct pass *pass, const struct dispatch_layout *layout,
                          struct comm *comm, const struct dispatch_input *input,
                          struct dispatched *plan, struct dispatch_counting *counting);
/* The host waits for all ranks' numbers: exchange and num_rows are there, and send_token is cut to
 * what is sent. Returns the probabilities of the rows to send [num_sent], in scratch. */
struct tensor dispatch_count_finish(const struct pass *pass, const struct dispatch_input *input,
                                    struct dispatched *plan, struct dispatch_counting *counting);
/* The rest of the plan: offsets, arrival, row_at. Frees what the host had counted. */
void dispatch_order_rows(const struct pass *pass, struct dispatched *plan,
                         struct dispatch_counting *counting);
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
