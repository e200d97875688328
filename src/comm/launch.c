#include "comm/launch.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/check.h"
#include "comm/comm_mpi.h"

static int this_rank = 0, num_ranks = 1, local_rank = 0;
static bool emulated = false;

enum { EMULATED_RANKS_MAX = 65536 };

/* Who sets what: Open MPI's mpirun and PRRTE; MPICH, Intel MPI and srun with pmi2; MVAPICH2; srun
 * for every step (SLURM_NTASKS alone is also set in batch scripts, where it means others). */
static const char *const size_variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
                                             "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"};

/* *value stays as it is where the variable is not set. */
static int read_number(const char *variable, long min, long max, const char *legal, int *value)
{
    const char *text = getenv(variable);
    char *end;
    long number;

    if (text == NULL) {
        return 0;
    }
    errno = 0;
    number = strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || number < min || number > max) {
        return error_set("environment variable %s is \"%s\"; legal: %s", variable, text, legal);
    }
    *value = (int)number;
    return 0;
}

int launch_size_from_environment(int *size)
{
    *size = 1;
    for (size_t i = 0; i < sizeof size_variables / sizeof *size_variables; i++) {
        if (getenv(size_variables[i]) != NULL) {
            return read_number(size_variables[i], 1, INT_MAX, "the number of processes", size);
        }
    }
    return 0;
}

int launch_emulate(void)
{
    int rank = 0, size = 0;
    char legal[64];

    if (num_ranks > 1) {
        return error_set("--fake-init-process-group: one process plays a rank of many, but the "
                         "launcher started %d: start cadre without it",
                         num_ranks);
    }
    TRY(read_number("WORLD_SIZE", 1, EMULATED_RANKS_MAX, "1 to 65536, the ranks of the job",
                    &size));
    if (size == 0) {
        return error_set("--fake-init-process-group: how many ranks? Set the environment variable "
                         "WORLD_SIZE, and RANK for another rank than 0, as in WORLD_SIZE=64 RANK=0 "
                         "cadre pretrain ...");
    }
    snprintf(legal, sizeof legal, "0 to %d (WORLD_SIZE - 1)", size - 1);
    TRY(read_number("RANK", 0, size - 1, legal, &rank));
    emulated = true;
    this_rank = rank;
    num_ranks = size;
    panic_configure(rank, NULL);
    return 0;
}

static void stop_all_ranks(void)
{
    comm_mpi_abort(1);
}

/* For the CUDA driver, which reads it when it starts. Of streams that share a queue one waits for
 * what stands before it in another: a rank's computing for a message that only comes when it has
 * computed. Whoever wants 1, as Megatron does, wants collectives to start in the order of the
 * calls; here each waits for what it needs. */
static void give_streams_their_own_queues(void)
{
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
}

int launch_init(int *argc, char ***argv)
{
    int expected, size;

    TRY(launch_size_from_environment(&expected));
    if (expected == 1) {
        return 0;
    }
    give_streams_their_own_queues();
    TRY(comm_mpi_start(argc, argv, &this_rank, &size));
    if (size != expected) {
        return error_set("the launcher started %d processes, but MPI joins %d of them: use the "
                         "launcher of the MPI that cadre was built with (mpirun, or srun with "
                         "--mpi=pmix or --mpi=pmi2)",
                         expected, size);
    }
    num_ranks = size;
    local_rank = comm_mpi_local_rank();
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

int launch_local_rank(void)
{
    return local_rank;
}

bool launch_is_emulated(void)
{
    return emulated;
}

void launch_finish(void)
{
    if (num_ranks > 1 && !emulated) {
        comm_mpi_finish();
    }
}

/* With many ranks to end them takes a second. But a rank that fails alone must speak before the
 * others have waited for it until their deadline. */
void launch_let_rank_0_speak(void)
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
    if (!emulated) {
        launch_let_rank_0_speak();
    }
    fflush(stdout);
    if (num_ranks == 1 || emulated) {
        fprintf(stderr, "cadre: error: %s\n", text);
        exit(1);
    }
    fprintf(stderr, "cadre: error: rank %d on host %s: %s\n", this_rank, host_name(), text);
    comm_mpi_abort(1);
}
