/* comm_mpi.h - groups of ranks over MPI. Host memory only. All MPI calls of the project are in
 * comm_mpi.c; without MPI at build time, comm_mpi_absent.c says so. */
#ifndef CADRE_COMM_COMM_MPI_H
#define CADRE_COMM_COMM_MPI_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"

enum { COMM_MPI_GROUPS_MAX = 32 };

/* MPI_Init; rank and size are those of the world. */
int comm_mpi_start(int *argc, char ***argv, int *rank, int *size);
/* This rank's number among those of its host. All ranks must call it. */
int comm_mpi_local_rank(void);
void comm_mpi_finish(void);
/* Ends every rank of the job. */
void comm_mpi_abort(int status) __attribute__((noreturn));

/* The group of the world ranks members[size], of which this rank is one; all of them create it with
 * the same number < COMM_MPI_GROUPS_MAX. Two groups of the same number must not share two ranks:
 * "tp" of all ranks may have one number. Needs no communication. */
struct comm *comm_mpi_create(const char *name, int number, const int *members, int size);
/* Of such a group: its number, and the rank in the world of one of its ranks. */
int comm_mpi_group_number(const struct comm *comm);
int comm_mpi_world_rank(const struct comm *comm, int rank);
/* all [ranks] = what each rank of the world calls its own; waits for them. */
void comm_mpi_gather(void *all, const void *mine, size_t size_bytes);

/* Whether every operation issued has moved its data, though nobody may have waited for it yet: for
 * tests of the progress made while a rank computes. */
bool comm_mpi_is_idle(void);
/* Whether the wait for a handle would return at once. */
bool comm_mpi_is_complete(struct comm_handle handle);
/* How long a wait may take before the job is stopped (--distributed-timeout-minutes). */
void comm_mpi_set_timeout(double seconds);
double comm_mpi_timeout(void); /* seconds */
/* For tests, the same on all ranks. Larger messages are sent in pieces (MPI counts in int; 1 GiB),
 * and a reduction holds this much of other ranks' data at once (16 MiB). */
void comm_mpi_set_limits(int64_t message_bytes, int64_t staging_bytes);

#endif
