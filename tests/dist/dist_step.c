/* Steps of several ranks whose figures are read while the next step runs, on a device that counts
 * the host's waits (guarded_device.h): the same figures and parameters as step by step, on every
 * rank, and nothing is waited for but what was read. Tensors of that device go through the host, so
 * the starts wait; what a start waits for on GPUs is shown by test_step.c. ranks: 2 4 */
#include "../unit/train/guarded_device.h"
#include "dist_run.h"
#include "dist_test.h"

#include "base/log.h"
#include "train/run_data.h"
#include "train/step.h"

enum { NUM_STEPS = 4 };

static const char base_flags[] =
    "pretrain --num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 8 "
    "--vocab-size 120 --tokenizer-type NullTokenizer --mock-data --train-iters 8 --eval-iters 0 "
    "--lr 1e-3 --lr-decay-style constant --num-experts 4 --moe-router-topk 2 --swiglu "
    "--disable-bias-linear --moe-grouped-gemm --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3";

struct mapping {
    int ranks; /* it needs a multiple of these */
    const char *flags;
};

static const struct mapping mappings[] = {
    {2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"},
    {2, "--calculate-per-token-loss --eod-mask-loss"},
    {2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"},
    {2, "--context-parallel-size 2 --bf16"},
    {2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"},
    /* The second stage has no experts. */
    {2, "--pipeline-model-parallel-size 2 --moe-layer-freq ([1]*2+[0]*2)"},
    {4, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--calculate-per-token-loss --use-distributed-optimizer"},
};

/* What a run leaves. */
struct outcome {
    struct step_result results[NUM_STEPS]; /* moe_metrics: this struct's */
    char *params;
    size_t params_bytes;
};

static void free_outcome(struct outcome *outcome)
{
    for (int i = 0; i < NUM_STEPS; i++) {
        free(outcome->results[i].moe_metrics);
    }
    free(outcome->params);
}

/* Waits for the losses where they are, the gradient norm and the metrics: each is a read. */
static int finish(struct trainer *trainer, struct step *step, struct step_result *result)
{
    const int num_reads = 2 + (step->loss.read != NULL), before = guarded.num_waits;

    TRY(train_step_finish(trainer, step));
    if (guarded.num_waits - before != num_reads) {
        dist_failed("the host waited %d times for %d reads", guarded.num_waits - before, num_reads);
    }
    *result = step->result;
    step->result.moe_metrics = NULL;
    train_step_free(trainer, step);
    return 0;
}

static int run_steps(struct trainer *trainer, struct loader *loader, int num_behind,
                     struct outcome *outcome)
{
    struct step steps[2];

    for (int i = 0; i < NUM_STEPS + num_behind; i++) {
        if (i < NUM_STEPS) {
            TRY(train_step_start(trainer, loader, &steps[i % 2]));
            train_step_read_metrics(trainer, &steps[i % 2]);
        }
        if (i >= num_behind) {
            TRY(finish(trainer, &steps[(i - num_behind) % 2], &outcome->results[i - num_behind]));
        }
    }
    return 0;
}

static void keep_params(struct trainer *trainer, struct outcome *outcome)
{
    const struct tensor *values = &trainer->params.values;

    param_gather_finish(&trainer->buckets);
    outcome->params_bytes = tensor_size_bytes(values);
    outcome->params = malloc(outcome->params_bytes);
    CHECK(outcome->params != NULL, "out of memory");
    stream_copy_to_host(trainer->stream, outcome->params, values->data, outcome->params_bytes);
}

static int train(const struct options *options, int num_behind, struct outcome *outcome)
{
    struct run_data_request request = {.options = options, .num_iterations = 8};
    struct trainer trainer;
    struct run_data data = {0};

    *outcome = (struct outcome){0};
    TRY(run_data_open_tokenizer(&data, options));
    TRY(trainer_create(&trainer, options, tokenizer_vocab_size(data.tokenizer), guarded_device(),
                       guarded_ops(), &(struct trainer_memory){0}));
    request.data_parallel_rank = trainer.groups.dp->rank;
    TRY(run_data_open_sets(&data, &request));
    TRY(run_data_open_loaders(&data, &request));
    TRY(run_steps(&trainer, data.train, num_behind, outcome));
    keep_params(&trainer, outcome);
    trainer_destroy(&trainer);
    run_data_close(&data);
    return 0;
}

static bool same_metrics(const struct step_result *a, const struct step_result *b, int num_layers)
{
    return memcmp(a->moe_metrics, b->moe_metrics,
                  (size_t)(NUM_MOE_METRICS * num_layers) * sizeof(float)) == 0 &&
           memcmp(a->has_metric, b->has_metric, sizeof a->has_metric) == 0;
}

static void expect_same(const struct outcome *a, const struct outcome *b, int num_layers)
{
    for (int i = 0; i < NUM_STEPS; i++) {
        const struct step_result *x = &a->results[i], *y = &b->results[i];

        if (x->loss_sum != y->loss_sum || x->num_tokens != y->num_tokens ||
            x->grad_norm != y->grad_norm || !same_metrics(x, y, num_layers)) {
            dist_failed("step %d: loss %.9g and %.9g, tokens %g and %g, norm %.9g and %.9g", i,
                        x->loss_sum, y->loss_sum, x->num_tokens, y->num_tokens, x->grad_norm,
                        y->grad_norm);
        }
    }
    if (memcmp(a->params, b->params, a->params_bytes) != 0) {
        dist_failed("other parameters");
    }
}

/* Every rank logs alike, with experts or without. */
static void expect_known_everywhere(const struct step_result *result)
{
    const bool wanted[NUM_MOE_METRICS] = {[MOE_LOAD_BALANCING_LOSS] = true, [MOE_Z_LOSS] = true};

    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        if (result->has_metric[m] != wanted[m]) {
            dist_failed("%s is used: %d", moe_metric_name((enum moe_metric)m),
                        result->has_metric[m]);
        }
    }
    if (result->loss_sum <= 0.0 || result->num_tokens < 64.0 || result->grad_norm <= 0.0) {
        dist_failed("loss %g of %g tokens, norm %g", result->loss_sum, result->num_tokens,
                    result->grad_norm);
    }
}

static int run_mapping(const struct mapping *mapping, struct options *options)
{
    struct outcome at_once, later;

    TRY(dist_parse(options, base_flags, "", mapping->flags));
    TRY(train(options, 0, &at_once));
    TRY(train(options, 1, &later));
    expect_same(&at_once, &later, (int)options->num_layers);
    expect_known_everywhere(&later.results[NUM_STEPS - 1]);
    free_outcome(&at_once);
    free_outcome(&later);
    return 0;
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
