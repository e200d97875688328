/* `cadre bench gemm|moe-layer|train-step [flags of pretrain]`: achieved GFLOP/s, and the share of
 * the roof, which is measured in the same run, before and after. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args/options.h"
#include "base/check.h"
#include "cmd/bench_measure.h"
#include "cmd/cmd.h"
#include "device/device_select.h"
#include "ops/ops.h"
#include "ops/ops_profile.h"
#include "optim/grad_norm.h"
#include "train/model_setup.h"
#include "train/trainer.h"

enum { STEP_WARMUPS = 1, STEP_REPEATS = 5 };

/* The model that the flags change: 8 layers of 8 experts, a peer of shared peers/torch_cpu_step.py.
 */
static const char *const default_flags[] = {
    "--num-layers",
    "8",
    "--hidden-size",
    "512",
    "--ffn-hidden-size",
    "1024",
    "--num-attention-heads",
    "8",
    "--seq-length",
    "512",
    "--max-position-embeddings",
    "512",
    "--micro-batch-size",
    "4",
    "--vocab-size",
    "8192",
    "--num-experts",
    "8",
    "--moe-router-topk",
    "2",
    "--moe-grouped-gemm",
    "--swiglu",
    "--disable-bias-linear",
    "--normalization",
    "RMSNorm",
    "--position-embedding-type",
    "rope",
    "--untie-embeddings-and-output-weights",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    "--lr",
    "1e-4",
    "--train-iters",
    "10",
    "--lr-decay-style",
    "constant",
    "--tokenizer-type",
    "NullTokenizer",
    "--mock-data",
};

enum { NUM_DEFAULT_FLAGS = sizeof default_flags / sizeof default_flags[0] };

/* The default flags, then the user's, which win. */
static int parse_flags(struct options *options, int argc, char **argv)
{
    const int count = 1 + NUM_DEFAULT_FLAGS + argc - 1;
    char **all = calloc((size_t)count + 1, sizeof *all);
    int result;

    CHECK(all != NULL, "out of memory");
    all[0] = argv[0];
    for (int i = 0; i < NUM_DEFAULT_FLAGS; i++) {
        all[1 + i] = (char *)default_flags[i];
    }
    for (int i = 1; i < argc; i++) {
        all[NUM_DEFAULT_FLAGS + i] = argv[i];
    }
    result = options_parse(options, count, all);
    free(all);
    TRY(result);
    return options_validate(options, 1);
}

static void print_rate(const char *what, double seconds, double gflops, double roof)
{
    printf("%-44s %10.2f ms %9.1f GFLOP/s  %5.1f %% of the roof\n", what, seconds * 1e3, gflops,
           100.0 * gflops / roof);
}

struct bench_device {
    const struct device *device;
    const struct ops *ops;
};

static int open_device(struct bench_device *on, const struct options *options)
{
    on->device = device_select(options->device, 0);
    on->ops = on->device != NULL ? ops_for(on->device) : NULL;
    return on->ops != NULL ? 0 : -1;
}

static int bench_gemm(const struct options *options)
{
    static const int64_t shapes[][3] = {{2048, 2048, 2048}, {2048, 1536, 512}, {2048, 512, 512},
                                        {512, 2048, 512},   {512, 512, 1024},  {2048, 8192, 512}};
    struct bench_device on;
    struct stream *stream;

    TRY(open_device(&on, options));
    stream = stream_create(on.device, on.ops);
    for (int d = 0; d < 2; d++) {
        const enum dtype dtype = d == 0 ? DTYPE_F32 : DTYPE_BF16;
        const double roof = bench_roof_gflops(stream, dtype);

        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            const int64_t *s = shapes[i];
            const double rate = bench_matmul_gflops(stream, dtype, s[0], s[1], s[2]);
            char name[64];

            snprintf(name, sizeof name, "gemm %s %lldx%lldx%lld", dtype_name(dtype),
                     (long long)s[0], (long long)s[1], (long long)s[2]);
            print_rate(name, 2.0 * (double)(s[0] * s[1] * s[2]) / rate / 1e9, rate, roof);
        }
    }
    stream_destroy(stream);
    return 0;
}

/* A trainer with a random microbatch on the device. */
struct bench_step {
    struct trainer trainer;
    struct arena *arena;
    struct moe_layer *moe;
    struct tensor x, y, d_x, d_y;
};

static void fill_ids(struct stream *stream, struct tensor *ids, int64_t modulus, bool ordered,
                     int64_t num_sequences)
{
    const int64_t count = tensor_num_elements(ids);
    const struct rng_key key = rng_key(1234, "bench tokens", 0);
    int32_t *host = malloc((size_t)count * sizeof *host);

    CHECK(host != NULL, "out of memory");
    for (int64_t t = 0; t < count; t++) {
        host[t] = ordered ? (int32_t)(t / num_sequences)
                          : (int32_t)(rng_uniform(key, 0, (uint64_t)t) * (float)modulus);
    }
    stream_copy_from_host(stream, ids->data, host, (size_t)count * sizeof *host);
    free(host);
}

static void fill_batch(struct trainer *trainer)
{
    struct microbatch *batch = &trainer->microbatches[0];
    const int64_t num_tokens = batch->token.dim[0], num_sequences = batch->sample_id.dim[0];
    float *weight = malloc((size_t)num_tokens * sizeof *weight);

    CHECK(weight != NULL, "out of memory");
    fill_ids(trainer->stream, &batch->token, trainer->config.vocab_size, false, num_sequences);
    fill_ids(trainer->stream, &batch->label, trainer->config.vocab_size, false, num_sequences);
    fill_ids(trainer->stream, &batch->position, 0, true, num_sequences);
    op_fill_zero(trainer->stream, &batch->token_id);
    op_fill_zero(trainer->stream, &batch->sample_id);
    for (int64_t t = 0; t < num_tokens; t++) {
        weight[t] = 1.0f / (float)num_tokens;
    }
    stream_copy_from_host(trainer->stream, batch->loss_weight.data, weight,
                          (size_t)num_tokens * sizeof *weight);
    free(weight);
}

static void forward_backward(struct trainer *trainer)
{
    const struct pass pass = trainer_pass(trainer, &trainer->microbatches[0], 0, true, 1.0f);
    struct stage_saved *saved = &trainer->slots[0].stage_saved;

    transformer_stage_forward(&trainer->chunks[0], &pass, NULL, NULL, &trainer->loss, saved);
    transformer_stage_backward(&trainer->chunks[0], &pass, NULL, NULL, saved);
}

static void run_forward_backward(void *context)
{
    struct trainer *trainer = &((struct bench_step *)context)->trainer;

    forward_backward(trainer);
    stream_wait(trainer->stream);
}

static void run_step(void *context)
{
    struct trainer *trainer = &((struct bench_step *)context)->trainer;
    const struct optimizer_rates rates = trainer_rates(trainer);

    op_fill_zero(trainer->stream, &trainer->params.grads);
    forward_backward(trainer);
    grad_norm_clip_scale(&trainer->optimizer, &trainer->groups, trainer->stream, trainer->scratch,
                         1.0f, &trainer->grad_norm, &trainer->grad_scale);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
    stream_wait(trainer->stream);
}

static int bench_train_step(const struct options *options)
{
    struct bench_device on;
    struct bench_step bench;
    struct flops_sizes sizes;
    double before, after, seconds, half, flops;

    TRY(open_device(&on, options));
    TRY(trainer_create(&bench.trainer, options, options->vocab_size, on.device, on.ops,
                       &(struct trainer_memory){0}));
    fill_batch(&bench.trainer);
    before = bench_roof_gflops(bench.trainer.stream, bench.trainer.config.dtype);
    seconds = bench_median_seconds(run_step, &bench, STEP_WARMUPS, STEP_REPEATS);
    half = bench_median_seconds(run_forward_backward, &bench, STEP_WARMUPS, STEP_REPEATS);
    after = bench_roof_gflops(bench.trainer.stream, bench.trainer.config.dtype);
    sizes = flops_sizes_from_config(&bench.trainer.config, options->micro_batch_size);
    flops = flops_per_step_head(&sizes);
    printf(
        "roof: gemm %s %lld^3 %.1f GFLOP/s before, %.1f after; FLOPs of a step (causal attention "
        "counted half): %.1f GFLOP\n",
        dtype_name(bench.trainer.config.dtype), (long long)bench_roof_size(on.device), before,
        after, flops / 1e9);
    print_rate("train-step (forward, backward, clip, Adam)", seconds, flops / seconds / 1e9,
               fmax(before, after));
    print_rate("forward, backward", half, flops / half / 1e9, fmax(before, after));
    if (options->profile) {
        ops_profile_start(bench.trainer.stream);
        run_step(&bench);
        ops_profile_stop(bench.trainer.stream);
        ops_profile_print(stdout);
    }
    printf("%.0f tokens/s\n", (double)(options->micro_batch_size * options->seq_length) / seconds);
    trainer_destroy(&bench.trainer);
    return 0;
}

static void run_moe_layer(void *context)
{
    struct bench_step *bench = context;
    struct trainer *trainer = &bench->trainer;
    const struct pass pass = trainer_pass(trainer, &trainer->microbatches[0], 0, true, 1.0f);
    const struct arena_mark mark = arena_mark(pass.saved);
    struct moe_saved saved;

    moe_layer_forward(bench->moe, &pass, &bench->y, &bench->x, &saved);
    moe_layer_backward(bench->moe, &pass, &bench->d_x, &bench->d_y, &saved);
    arena_release(pass.saved, mark);
    stream_wait(trainer->stream);
}

static int find_moe_layer(struct bench_step *bench)
{
    struct transformer_stage *model = &bench->trainer.chunks[0];

    for (int i = 0; i < model->place.num_layers; i++) {
        if (model->layers[i].is_moe) {
            bench->moe = &model->layers[i].moe;
            return 0;
        }
    }
    return error_set("no layer of this model has experts");
}

static int time_moe_layer(struct bench_step *bench, const struct options *options)
{
    struct trainer *trainer = &bench->trainer;
    const struct model_config *config = &trainer->config;
    const int64_t num_tokens = options->micro_batch_size * options->seq_length;
    const double halves = config->activation == ACTIVATION_SWIGLU ? 3.0 : 2.0;
    const double flops = 6.0 * halves * (double)(num_tokens * config->router_rule.topk) *
                         (double)(config->hidden_size * config->moe_ffn_hidden_size);
    struct tensor *const tensors[] = {&bench->x, &bench->y, &bench->d_x, &bench->d_y};
    double roof, seconds;

    TRY(find_moe_layer(bench));
    bench->arena = arena_create("bench", &trainer->stream->device->memory);
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        *tensors[i] = tensor_new(bench->arena, config->dtype, num_tokens, config->hidden_size);
        bench_fill_normal(trainer->stream, tensors[i], "bench activations");
    }
    roof = bench_roof_gflops(trainer->stream, config->dtype);
    seconds = bench_median_seconds(run_moe_layer, bench, STEP_WARMUPS, STEP_REPEATS);
    print_rate("moe-layer (forward, backward)", seconds, flops / seconds / 1e9, roof);
    arena_destroy(bench->arena);
    return 0;
}

static int bench_moe_layer(const struct options *options)
{
    struct bench_device on;
    struct bench_step bench;
    int result;

    TRY(open_device(&on, options));
    TRY(trainer_create(&bench.trainer, options, options->vocab_size, on.device, on.ops,
                       &(struct trainer_memory){0}));
    fill_batch(&bench.trainer);
    result = time_moe_layer(&bench, options);
    trainer_destroy(&bench.trainer);
    return result;
}

static const struct {
    const char *name;
    int (*run)(const struct options *options);
} benches[] = {
    {"gemm", bench_gemm},
    {"moe-layer", bench_moe_layer},
    {"train-step", bench_train_step},
};

static int run_bench(const char *name, struct options *options, int argc, char **argv)
{
    for (size_t i = 0; i < sizeof benches / sizeof benches[0]; i++) {
        if (strcmp(name, benches[i].name) == 0) {
            TRY(parse_flags(options, argc, argv));
            ops_cpu_set_num_threads((int)options->num_threads);
            return benches[i].run(options);
        }
    }
    return error_set("cadre bench takes gemm, moe-layer or train-step, not %s", name);
}

int cmd_bench(int argc, char **argv)
{
    struct options options;
    int result;

    if (argc < 2 || strcmp(argv[1], "--help") == 0) {
        puts("usage: cadre bench gemm|moe-layer|train-step [flags of pretrain]\n\n"
             "Prints the achieved rate and its share of the 2048^3 matrix product of the same "
             "type,\n"
             "measured in the same run. Default model: 8 layers, H 512, F 1024, 8 experts top-2,\n"
             "8 heads, S 512, micro-batch 4, vocabulary 8192, fp32 (--bf16 for bf16).");
        return argc < 2 ? error_set("cadre bench needs the name of a benchmark") : 0;
    }
    TRY(options_init(&options));
    result = run_bench(argv[1], &options, argc - 1, argv + 1);
    options_free(&options);
    return result;
}
