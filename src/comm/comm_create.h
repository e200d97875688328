/* comm_create.h - the group of several ranks for this job's transport. Host memory goes over MPI;
 * a GPU's over NCCL where comm_nccl_start has chosen it, else through the host and MPI; and in an
 * emulation (launch_emulate) nowhere. */
#ifndef CADRE_COMM_COMM_CREATE_H
#define CADRE_COMM_COMM_CREATE_H

#include "comm/comm.h"

/* As comm_mpi_create: members are world ranks, among them this one; number is the group's. Needs no
 * communication. */
struct comm *comm_create(const char *name, int number, const int *members, int size);

#endif
