/* The table of the CPU backend, and its threads. */
#include "ops/ops_cpu.h"

#include <omp.h>

const struct ops *ops_cpu(void)
{
#define OPS_CPU_ENTRY(name, args) .name = name##_cpu,
    static const struct ops table = {
        .backend = "cpu",
        .fill_zero = fill_zero_cpu,
        OPS_LIST(OPS_CPU_ENTRY) /* .matmul = matmul_cpu, ... */
    };
#undef OPS_CPU_ENTRY
    return &table;
}

/* The matrix libraries follow: oneDNN is built for OpenMP, as the distributions do. */
void ops_cpu_set_num_threads(int num_threads)
{
    omp_set_num_threads(num_threads > 0 ? num_threads : omp_get_num_procs());
}
