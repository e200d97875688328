/* comm_fake.h - groups whose other ranks do not exist (--fake-init-process-group): this process
 * computes what rank r of N would, on data of the right size. What others would send is made up:
 * gathered parts are this rank's own, rows exchanged are those sent, messages are random numbers,
 * sums are what this rank has. For measuring memory and the time of computation. */
#ifndef CADRE_COMM_COMM_FAKE_H
#define CADRE_COMM_COMM_FAKE_H

#include "comm/comm.h"

struct comm *comm_fake_create(const char *name, int rank, int size);

#endif
