/* A training step with slow groups (comm/delay.h): do the flags that overlap communication with
 * computation hide what they can? Products and attention take a time of their own, as on an
 * accelerator: they sleep, so that other programs on this machine do not disturb. At least half of
 * the delay that can be hidden must be. ranks: 2 */
#include "dist_run.h"
#include "dist_test.h"

#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/log.h"
#include "comm/delay.h"
#include "data/tokenizer.h"
#include "train/run_data.h"
#include "train/step.h"

enum { NUM_STEPS = 3 };

static const char base_flags[] =
    "pretrain --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 "
    "--seq-length 16 --max-position-embeddings 16 --position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 3 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 120 --eval-iters 0 --device cpu "
    "--attention-dropout 0 --hidden-dropout 0";

struct overlap {
    const char *name, *delay;
    const char *flags; /* of both runs */
    const char *with, *without;
    double hideable_seconds; /* of the delay, in one step */
};

static const struct overlap overlaps[] = {
    /* 4 buckets, 0.36 MB of them sent by each rank; the last one, with the first layer and the
     * embedding, comes when backward is over */
    {"gradients", "dp-cp:100/MB", "--use-distributed-optimizer --ddp-bucket-size 40000",
     "--overlap-grad-reduce", "", 0.027},
    /* the same buckets; the one with the embedding is needed at once */
    {"parameters", "dp-cp:100/MB",
     "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 40000",
     "--overlap-param-gather", "", 0.027},
    /* forward: keys and values; backward: these again, and their gradients on the way home */
    {"context ring", "cp:8", "--context-parallel-size 2", "--cp-comm-type p2p", NULL,
     4 * 4 * 3 * 0.008},
    /* 4 layers, 2 microbatches: dispatch and combine in forward have one product of 2 ms each to
     * hide behind, in backward two */
    {"shared experts", "ep:8",
     "--num-experts 4 --moe-grouped-gemm --expert-model-parallel-size 2 "
     "--moe-token-dispatcher-type alltoall --moe-shared-expert-intermediate-size 128",
     "--moe-shared-expert-overlap", "", 4 * 2 * 6 * 0.002},
    /* 4 microbatches in 2 chunks: 8 forwards and backwards on a rank, of which all but the first
     * and last few wait for a message */
    {"pipeline", "pp:8,pp-backward:8",
     "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", "", "serial",
     8 * 0.008},
};

static void sleep_ms(long ms)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000 * ms}, NULL);
}

static void slow_matmul(struct stream *on, const struct matmul *args)
{
    ops_cpu()->matmul(on, args);
    sleep_ms(2);
}

static void slow_attention_forward(struct stream *on, const struct attention *args)
{
    ops_cpu()->attention_forward(on, args);
    sleep_ms(9);
}

static void slow_attention_backward(struct stream *on, const struct attention_backward *args)
{
    ops_cpu()->attention_backward(on, args);
    sleep_ms(9);
}

static struct ops slow;

static int parse(struct options *options, const char *flags, const char *more)
{
    const bool serial = strcmp(more, "serial") == 0;

    TRY(dist_parse(options, base_flags, flags, serial ? "" : more));
    if (serial) {
        options->overlap_p2p_communication = false; /* Megatron's rules want three stages for it */
    }
    return 0;
}

/* The fastest step after the first: what disturbs only adds. */
static int time_steps(struct trainer *trainer, struct run_data *data, double *seconds)
{
    const struct run_data_request request = {.options = trainer->options,
                                             .data_parallel_rank = trainer->groups.dp->rank,
                                             .num_iterations = NUM_STEPS};

    TRY(run_data_open_sets(data, &request));
    TRY(run_data_open_loaders(data, &request));
    *seconds = INFINITY;
    for (int i = 0; i < NUM_STEPS; i++) {
        struct step_result result;
        double start;

        trainer_barrier(trainer);
        start = clock_seconds();
        TRY(train_step(trainer, data->train, &result));
        if (i > 0) {
            *seconds = fmin(*seconds, clock_seconds() - start);
        }
    }
    return 0;
}

static int step_seconds(const char *delay, const char *flags, const char *more, double *seconds)
{
    struct options options;
    struct run_data data;
    struct trainer trainer;
    int result;

    TRY(comm_delay_parse(delay));
    TRY(parse(&options, flags, more));
    TRY(run_data_open_tokenizer(&data, &options));
    TRY(trainer_create(&trainer, &options, tokenizer_vocab_size(data.tokenizer), device_cpu(),
                       &slow, &(struct trainer_memory){0}));
    result = time_steps(&trainer, &data, seconds);
    run_data_close(&data);
    trainer_destroy(&trainer);
    options_free(&options);
    return result;
}

/* What the delay adds to a step with the overlap; without it, all of it or what is measured. */
static int check_overlap(const struct overlap *o)
{
    double plain, with, without, hidden;

    TRY(step_seconds("", o->flags, o->with, &plain));
    TRY(step_seconds(o->delay, o->flags, o->with, &with));
    hidden = plain + o->hideable_seconds - with;
    if (o->without != NULL) {
        TRY(step_seconds(o->delay, o->flags, o->without, &without));
        hidden = without - with;
    }
    if (launch_rank() == 0) {
        printf("%s: %.0f ms without delay, %.0f ms with it, %.0f ms of %.0f hidden\n", o->name,
               1e3 * plain, 1e3 * with, 1e3 * hidden, 1e3 * o->hideable_seconds);
    }
    if (hidden < 0.5 * o->hideable_seconds) {
        dist_failed("%s: %.0f ms of %.0f were hidden", o->name, 1e3 * hidden,
                    1e3 * o->hideable_seconds);
    }
    return 0;
}

int main(int argc, char **argv)
{
    dist_begin(argc, argv);
    log_configure(false);
    slow = *ops_cpu();
    slow.matmul = slow_matmul;
    slow.attention_forward = slow_attention_forward;
    slow.attention_backward = slow_attention_backward;
    for (size_t i = 0; i < sizeof overlaps / sizeof overlaps[0]; i++) {
        if (check_overlap(&overlaps[i]) != 0) {
            launch_fail(error_text());
        }
    }
    return dist_end();
}
