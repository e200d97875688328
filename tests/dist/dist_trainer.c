/* The trainer on several ranks: what it holds is what the mapping says. Optimizer states are cut
 * over data parallelism; as many sets of activations are kept as the schedule has forwards in
 * flight; the arenas of real steps are as large as the report made before them. ranks: 1 2 4 */
#include "dist_run.h"
#include "dist_test.h"

#include <string.h>

#include "base/log.h"
#include "data/tokenizer.h"
#include "train/memory_report.h"
#include "train/run_data.h"
#include "train/step.h"

enum { NUM_LAYERS = 8, GLOBAL_BATCH = 8, VOCAB = 120 };

static const char base_flags[] =
    "pretrain --num-layers 8 --hidden-size 64 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 4 --ffn-hidden-size 96 --seq-length 32 --max-position-embeddings 32 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--num-experts 4 --moe-router-topk 2 --moe-grouped-gemm --moe-aux-loss-coeff 0.01 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 2 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 120 --make-vocab-size-divisible-by 32 "
    "--eval-iters 0 --device cpu";

struct mapping {
    int ranks; /* this case needs a multiple of these */
    int num_chunks;
    const char *flags;
};

static const struct mapping mappings[] = {
    {1, 1, ""},
    {1, 1, "--bf16"},
    {2, 1, "--use-distributed-optimizer --bf16"},
    {2, 1, "--use-distributed-optimizer --expert-model-parallel-size 2 --bf16"},
    {2, 1,
     "--use-distributed-optimizer --tensor-model-parallel-size 2 --sequence-parallel "
     "--moe-token-dispatcher-type alltoall"},
    {2, 1, "--context-parallel-size 2 --use-distributed-optimizer"},
    {2, 1, "--pipeline-model-parallel-size 2 --bf16"},
    {2, 2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"},
    {4, 1, "--pipeline-model-parallel-size 4 --untie-embeddings-and-output-weights"},
    {4, 2,
     "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1 --bf16 "
     "--use-distributed-optimizer"},
    {4, 1,
     "--pipeline-model-parallel-size 2 --use-distributed-optimizer --bf16 "
     "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"},
};

/* 12 bytes an element of bf16 parameters, 8 of f32, whose master is the parameter itself. */
static void expect_optimizer_bytes(const struct trainer *trainer,
                                   const struct memory_report *report)
{
    const int64_t element = trainer->options->bf16 ? 12 : 8;
    const int64_t shares = trainer->options->use_distributed_optimizer;
    const int64_t paddings = element * 64 * (trainer->params.num_params + 64);
    int64_t wanted = 0;

    for (int i = 0; i < trainer->params.num_params; i++) {
        const struct param *param = trainer->params.params[i];
        const struct comm *group =
            param->scope == PARAM_EXPERT ? trainer->groups.edp : trainer->groups.dp_cp;

        wanted += element * box_num_elements(&param->box) / (shares ? group->size : 1);
    }
    if (report->optimizer_bytes < wanted - paddings ||
        report->optimizer_bytes > wanted + paddings) {
        dist_failed("optimizer of %lld bytes, wanted %lld: %s", (long long)report->optimizer_bytes,
                    (long long)wanted, trainer->options->bf16 ? "bf16" : "f32");
    }
}

/* M5.4, M5.5 */
static void expect_slots(const struct trainer *trainer, const struct mapping *mapping,
                         const struct memory_report *report)
{
    const struct comm *pp = trainer->groups.pp;
    const int num_microbatches = GLOBAL_BATCH / trainer->groups.dp->size;
    const int chunks = mapping->num_chunks;
    int wanted = chunks == 1 ? pp->size - pp->rank
                             : (chunks - 1) * pp->size + 2 * (pp->size - pp->rank - 1) + 1;

    wanted = wanted < num_microbatches * chunks ? wanted : num_microbatches * chunks;
    if (trainer->num_slots != wanted || report->num_slots != wanted) {
        dist_failed("%d sets of activations, wanted %d", trainer->num_slots, wanted);
    }
}

/* Which expert gets how many rows is not known beforehand: activations are not compared. */
static void expect_memory(const struct trainer *trainer, const struct memory_report *report)
{
    const int64_t run = (int64_t)arena_peak_bytes(trainer->run);
    const int64_t boundary = (int64_t)arena_peak_bytes(trainer->boundary);

    if (run != report->run_bytes) {
        dist_failed("%lld bytes for the run, reported %lld", (long long)run,
                    (long long)report->run_bytes);
    }
    if (boundary != report->boundary_bytes) {
        dist_failed("%lld bytes between stages, reported %lld", (long long)boundary,
                    (long long)report->boundary_bytes);
    }
    for (int i = 0; i < trainer->num_slots; i++) {
        if (arena_used_bytes(trainer->slots[i].saved) != 0) {
            dist_failed("slot %d of %d is not empty after a step", i, trainer->num_slots);
        }
    }
    for (int i = 0; i < trainer->num_microbatches; i++) {
        if (trainer->microbatches[i].number != -1) {
            dist_failed("microbatch %d is open after a step", trainer->microbatches[i].number);
        }
    }
}

static int run_steps(struct trainer *trainer, struct run_data *data)
{
    const struct run_data_request request = {.options = trainer->options,
                                             .data_parallel_rank = trainer->groups.dp->rank,
                                             .num_iterations = 2};
    struct step_result result;

    TRY(run_data_open_sets(data, &request));
    TRY(run_data_open_loaders(data, &request));
    TRY(train_step(trainer, data->train, &result));
    return train_step(trainer, data->train, &result);
}

static int run_mapping(const struct mapping *mapping, struct options *options)
{
    struct memory_report report;
    struct run_data data;
    struct trainer trainer;
    int64_t vocab_size;
    int result;

    TRY(dist_parse(options, base_flags, "", mapping->flags));
    TRY(run_data_open_tokenizer(&data, options));
    vocab_size = tokenizer_vocab_size(data.tokenizer);
    TRY(memory_report_compute(&report, options, vocab_size));
    TRY(trainer_create(&trainer, options, vocab_size, device_cpu(), ops_cpu(),
                       &(struct trainer_memory){0}));
    expect_optimizer_bytes(&trainer, &report);
    expect_slots(&trainer, mapping, &report);
    result = run_steps(&trainer, &data);
    expect_memory(&trainer, &report);
    run_data_close(&data);
    trainer_destroy(&trainer);
    return result;
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);

    log_configure(false);
    for (size_t i = 0; i < sizeof mappings / sizeof mappings[0]; i++) {
        struct options options;
        const int before = num_failures;

        if (size % mappings[i].ranks != 0) {
            continue;
        }
        dist_judge(run_mapping(&mappings[i], &options), before, mappings[i].flags);
        options_free(&options);
    }
    return dist_end();
}
