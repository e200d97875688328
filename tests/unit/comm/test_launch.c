#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/check.h"
#include "comm/launch.h"

static const char *const variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
                                        "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"};

static int clear_environment(void **state)
{
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) {
        unsetenv(variables[i]);
    }
    error_clear();
    return 0;
}

static int size_of_environment(void)
{
    int size = -1;

    assert_int_equal(launch_size_from_environment(&size), 0);
    return size;
}

static void a_process_started_alone_is_one(void **state)
{
    assert_int_equal(size_of_environment(), 1);
}

static void every_launcher_is_understood(void **state)
{
    for (int i = 0; i < 4; i++) {
        clear_environment(NULL);
        setenv(variables[i], "12", 1);
        assert_int_equal(size_of_environment(), 12);
    }
}

/* In a batch script SLURM_NTASKS is what the steps may use: the script itself is one process. */
static void a_slurm_batch_script_is_one_process(void **state)
{
    setenv("SLURM_NTASKS", "8", 1);
    assert_int_equal(size_of_environment(), 1);
}

/* mpirun within a Slurm allocation: the launcher nearest to the process counts. */
static void mpirun_counts_before_slurm(void **state)
{
    setenv("SLURM_STEP_NUM_TASKS", "8", 1);
    setenv("OMPI_COMM_WORLD_SIZE", "2", 1);
    assert_int_equal(size_of_environment(), 2);
}

static void nonsense_is_an_error_that_names_the_variable(void **state)
{
    static const char *const bad[] = {"", "two", "0", "-1", "3x", "99999999999999999999"};
    int size;

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        setenv("PMI_SIZE", bad[i], 1);
        assert_int_equal(launch_size_from_environment(&size), -1);
        assert_non_null(strstr(error_text(), "PMI_SIZE"));
    }
}

static void one_process_starts_without_a_transport(void **state)
{
    char name[] = "cadre", *arguments[] = {name, NULL}, **argv = arguments;
    int argc = 1;

    assert_int_equal(launch_init(&argc, &argv), 0);
    assert_int_equal(launch_rank(), 0);
    assert_int_equal(launch_size(), 1);
    launch_finish();
}

#ifdef CADRE_MPI
#include <mpi.h>

static void one_process_does_not_touch_mpi(void **state)
{
    int initialized = -1;

    one_process_starts_without_a_transport(state);
    MPI_Initialized(&initialized);
    assert_int_equal(initialized, 0);
}
#endif

#define TEST(function) cmocka_unit_test_setup(function, clear_environment)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_process_started_alone_is_one),
        TEST(every_launcher_is_understood),
        TEST(a_slurm_batch_script_is_one_process),
        TEST(mpirun_counts_before_slurm),
        TEST(nonsense_is_an_error_that_names_the_variable),
        TEST(one_process_starts_without_a_transport),
#ifdef CADRE_MPI
        TEST(one_process_does_not_touch_mpi),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
