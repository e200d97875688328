/* What comm_mpi.h is in a cadre that was built without MPI. */
#ifndef CADRE_MPI
#include <stdlib.h>

#include "base/check.h"
#include "comm/comm_mpi.h"

int comm_mpi_start(int *argc, char ***argv, int *rank, int *size)
{
    return error_set(
        "started as one of several processes, but this cadre was built without MPI: "
        "install libopenmpi-dev or libmpich-dev and build again, or start one process");
}

int comm_mpi_local_rank(void)
{
    return 0;
}

void comm_mpi_finish(void)
{
}

void comm_mpi_abort(int status)
{
    exit(status);
}

struct comm *comm_mpi_create(const char *name, int number, const int *members, int size)
{
    PANIC("group %s of %d ranks in a build without MPI", name, size);
}

void comm_mpi_gather(void *all, const void *mine, size_t size_bytes)
{
    PANIC("%zu bytes from all ranks in a build without MPI", size_bytes);
}

bool comm_mpi_is_idle(void)
{
    return true;
}

bool comm_mpi_is_complete(struct comm_handle handle)
{
    return true;
}

void comm_mpi_set_timeout(double seconds)
{
}

double comm_mpi_timeout(void)
{
    return 0.0;
}

void comm_mpi_set_limits(int64_t message_bytes, int64_t staging_bytes)
{
}
#endif
