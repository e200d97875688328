/* Training steps on a device whose memory the host cannot touch (guarded_device.h): what a GPU
 * would need is there on any machine. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "guarded_run.h"
#include "train/evaluate.h"
#include "train/step.h"

/* Two steps and an evaluation. */
static void train_on_guarded_memory(const char *flags)
{
    struct guarded_run run;
    struct step_result result = {0};
    double loss = 0.0;

    guarded_run_open(&run, flags);
    for (int i = 0; i < 2; i++) {
        if (train_step(&run.trainer, run.data.train, &result) != 0) {
            fail_msg("%s: %s", flags, error_text());
        }
    }
    if (evaluate(&run.trainer, run.data.valid, 1, &loss) != 0) {
        fail_msg("%s: %s", flags, error_text());
    }
    assert_true(result.loss_sum > 0.0);
    assert_true(loss > 0.0);
    guarded_run_close(&run);
}

static void a_step_reaches_device_memory_by_ops_and_copies_only(void **state)
{
    static const char *const flags[] = {
        "",
        "--moe-grouped-gemm",
        "--moe-token-dispatcher-type alltoall",
        "--moe-token-dispatcher-type alltoall_seq",
        "--moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.0 "
        "--moe-pad-expert-input-to-capacity",
        "--moe-router-load-balancing-type seq_aux_loss",
        "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0",
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
        "--moe-shared-expert-intermediate-size 24 --swiglu --disable-bias-linear",
        "--moe-layer-freq 2 --normalization RMSNorm --position-embedding-type rope",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--reset-attention-mask --reset-position-ids --eod-mask-loss",
        "--calculate-per-token-loss --log-num-zeros-in-grad",
        "--optimizer sgd --untie-embeddings-and-output-weights",
    };

    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        train_on_guarded_memory(flags[i]);
    }
}

/* The guard itself: a child process that reads device memory must die of it. */
static void the_guard_bites(void **state)
{
    const struct device *device = guarded_device();
    volatile const char *memory = device->memory.allocate(NULL, 4096);
    const pid_t child = fork();
    int status = 0;

    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        _exit(memory[0] == 0 ? 0 : 1);
    }
    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(!WIFEXITED(status) || WEXITSTATUS(status) != 0);
    device->memory.release(NULL, (void *)(uintptr_t)memory, 4096);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_guard_bites),
        cmocka_unit_test(a_step_reaches_device_memory_by_ops_and_copies_only),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
