/* traffic.h - counts what leaves this rank in a collective (struct comm_counter), from its
 * arguments alone: the bytes that comm_mpi sends, so that --log-comm says the same over every
 * transport. Each returns what it has counted. */
#ifndef CADRE_COMM_TRAFFIC_H
#define CADRE_COMM_TRAFFIC_H

#include "comm/comm.h"

int64_t traffic_count_all_reduce(struct comm *comm, const struct tensor *x);
int64_t traffic_count_all_gather(struct comm *comm, const struct tensor *in);
int64_t traffic_count_reduce_scatter(struct comm *comm, const struct tensor *out,
                                     const struct tensor *in);
int64_t traffic_count_all_to_all(struct comm *comm, const struct tensor *in,
                                 const int64_t *send_rows);
int64_t traffic_count_broadcast(struct comm *comm, const struct tensor *x, int root);
int64_t traffic_count_send(struct comm *comm, const struct tensor *x);

#endif
