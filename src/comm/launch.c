#include "comm/launch.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/check.h"
#include "comm/comm_mpi.h"

static int this_rank = 0, num_ranks = 1;

/* Who sets what: Open MPI's mpirun and PRRTE; MPICH, Intel MPI and srun with pmi2; MVAPICH2; srun
 * for every step (SLURM_NTASKS alone is also set in batch scripts, where it means others). */
static const char *const size_variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
                                             "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"};

int launch_size_from_environment(int *size)
{
    *size = 1;
    for (size_t i = 0; i < sizeof size_variables / sizeof *size_variables; i++) {
        const char *text = getenv(size_variables[i]);
        char *end;
        long value;

        if (text == NULL) {
            continue;
        }
        errno = 0;
        value = strtol(text, &end, 10);
        if (errno != 0 || end == text || *end != '\0' || value < 1 || value > INT_MAX) {
            return error_set("environment variable %s is \"%s\"; legal: the number of processes",
                             size_variables[i], text);
        }
        *size = (int)value;
        return 0;
    }
    return 0;
}

static void stop_all_ranks(void)
{
    comm_mpi_abort(1);
}

int launch_init(int *argc, char ***argv)
{
    int expected, size;

    TRY(launch_size_from_environment(&expected));
    if (expected == 1) {
        return 0;
    }
    TRY(comm_mpi_start(argc, argv, &this_rank, &size));
    if (size != expected) {
        return error_set("the launcher started %d processes, but MPI joins %d of them: use the "
                         "launcher of the MPI that cadre was built with (mpirun, or srun with "
                         "--mpi=pmix or --mpi=pmi2)",
                         expected, size);
    }
    num_ranks = size;
    panic_configure(this_rank, stop_all_ranks);
    return 0;
}

int launch_rank(void)
{
    return this_rank;
}

int launch_size(void)
{
    return num_ranks;
}

void launch_finish(void)
{
    if (num_ranks > 1) {
        comm_mpi_finish();
    }
}

/* Where all ranks fail alike, rank 0 speaks, and the others are ended before they do; with many
 * ranks that takes a second. But a rank that fails alone must speak before the others have waited
 * for it until their deadline. */
static void let_rank_0_speak(void)
{
    const double deadline = comm_mpi_timeout();
    const double seconds = deadline / 4.0 < 2.0 ? deadline / 4.0 : 2.0;
    const long delay_ms = (long)(1e3 * seconds) + 10L * (this_rank < 50 ? this_rank : 50);

    if (this_rank > 0) {
        nanosleep(
            &(struct timespec){.tv_sec = delay_ms / 1000, .tv_nsec = delay_ms % 1000 * 1000000},
            NULL);
    }
}

void launch_fail(const char *text)
{
    let_rank_0_speak();
    fflush(stdout);
    if (num_ranks == 1) {
        fprintf(stderr, "cadre: error: %s\n", text);
        exit(1);
    }
    fprintf(stderr, "cadre: error: rank %d on host %s: %s\n", this_rank, host_name(), text);
    comm_mpi_abort(1);
}
