/* `cadre bench gemm|moe-layer|train-step [flags of pretrain]`: achieved rates, and the share of the
 * roofs, which are measured in the same run. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args/options.h"
#include "base/check.h"
#include "base/log.h"
#include "cmd/bench_measure.h"
#include "cmd/cmd.h"
#include "comm/comm_mpi.h"
#include "comm/comm_nccl.h"
#include "comm/launch.h"
#include "device/device_select.h"
#include "ops/ops.h"
#include "ops/ops_profile.h"
#include "optim/grad_norm.h"
#include "parallel/tp_region.h"
#include "train/model_setup.h"
#include "train/trainer.h"

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
    TRY(options_validate(options, launch_size()));
    comm_mpi_set_timeout(60.0 * options->distributed_timeout_minutes);
    return 0;
}

static void print_rate(const char *what, double seconds, const struct op_cost *cost,
                       const struct op_roof *roof)
{
    if (!log_speaks()) {
        return;
    }
    printf("%-52s %10.3f ms", what, seconds * 1e3);
    op_rate_print(stdout, cost->flops / seconds, "FLOP");
    if (cost->bytes > 0.0) {
        op_rate_print(stdout, cost->bytes / seconds, "B");
    }
    printf("  %5.1f %% of the roof\n", 100.0 * op_cost_seconds(cost, roof) / seconds);
}

/* A line for the burst, and one for work that goes on where that was measured. */
static void print_rates(const char *what, const struct bench_seconds *seconds,
                        const struct op_cost *cost, const struct bench_roof *roof)
{
    char name[96];

    if (seconds->sustained <= 0.0) {
        print_rate(what, seconds->burst, cost, &roof->burst);
        return;
    }
    snprintf(name, sizeof name, "%s, burst", what);
    print_rate(name, seconds->burst, cost, &roof->burst);
    snprintf(name, sizeof name, "%s, sustained", what);
    print_rate(name, seconds->sustained, cost, &roof->sustained);
}

static void print_roof(const struct stream *stream, enum dtype dtype, const struct bench_roof *roof)
{
    const struct op_roof *const roofs[] = {&roof->burst, &roof->sustained};
    const int num_roofs = stream->device->kind == DEVICE_CUDA ? 2 : 1;

    for (int i = 0; i < num_roofs && log_speaks(); i++) {
        printf("roof%s: a %s product of %lld^3",
               num_roofs == 1 ? ""
               : i == 0       ? ", burst"
                              : ", sustained",
               dtype_name(dtype), (long long)bench_roof_size(stream->device));
        op_rate_print(stdout, roofs[i]->flops_per_second, "FLOP");
        printf(", a copy");
        op_rate_print(stdout, roofs[i]->bytes_per_second, "B");
        printf("\n");
    }
}

struct bench_device {
    const struct device *device;
    const struct ops *ops;
};

static int open_device(struct bench_device *on, const struct options *options)
{
    on->device = device_select(options->device, launch_local_rank());
    on->ops = on->device != NULL ? ops_for(on->device) : NULL;
    if (on->ops == NULL) {
        return -1;
    }
    if (strcmp(options->distributed_backend, "nccl") == 0) {
        comm_nccl_choose(on->device);
    }
    return 0;
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
        const struct bench_roof roof = bench_roof(stream, dtype);

        print_roof(stream, dtype, &roof);
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            const int64_t *s = shapes[i];
            const struct bench_seconds seconds = bench_matmul(stream, dtype, s[0], s[1], s[2]);
            const struct op_cost cost = {.flops = 2.0 * (double)(s[0] * s[1] * s[2])};
            char name[64];

            snprintf(name, sizeof name, "gemm %s %lldx%lldx%lld", dtype_name(dtype),
                     (long long)s[0], (long long)s[1], (long long)s[2]);
            print_rates(name, &seconds, &cost, &roof);
        }
    }
    stream_destroy(stream);
    return 0;
}

/* A trainer with a random microbatch on the device. */
struct bench_step {
    struct trainer trainer;
    void *graph; /* of forward and backward; NULL: they run op by op */
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

/* Every token of every rank is one of its own. */
static void fill_token_ids(struct stream *stream, struct tensor *token_id)
{
    const int64_t count = tensor_num_elements(token_id);
    int64_t *host = malloc((size_t)count * sizeof *host);

    CHECK(host != NULL, "out of memory");
    for (int64_t t = 0; t < count; t++) {
        host[t] = launch_rank() * count + t;
    }
    stream_copy_from_host(stream, token_id->data, host, (size_t)count * sizeof *host);
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
    fill_token_ids(trainer->stream, &batch->token_id);
    op_fill_zero(trainer->stream, &batch->sample_id);
    for (int64_t t = 0; t < num_tokens; t++) {
        weight[t] = 1.0f / (float)num_tokens;
    }
    stream_copy_from_host(trainer->stream, batch->loss_weight.data, weight,
                          (size_t)num_tokens * sizeof *weight);
    free(weight);
}

static void issue_passes(struct trainer *trainer)
{
    struct pass pass = trainer_pass(trainer, &trainer->microbatches[0], 0, true, 1.0f);
    const struct tensor loss = tensor_view(&trainer->losses, tensor_num_elements(&trainer->losses));
    struct tensor first = tensor_rows(&loss, 0, trainer->losses.dim[1]);
    struct stage_saved *saved = &trainer->slots[0].stage_saved;

    pass.overwrite_grads = true;
    transformer_stage_forward(&trainer->chunks[0], &pass, NULL, NULL, &first, saved);
    transformer_stage_backward(&trainer->chunks[0], &pass, NULL, NULL, saved);
}

static void forward_backward(struct bench_step *bench)
{
    if (bench->graph != NULL) {
        stream_graph_launch(bench->trainer.stream, bench->graph);
    } else {
        issue_passes(&bench->trainer);
    }
}

static void run_forward_backward(void *context)
{
    struct bench_step *bench = context;

    forward_backward(bench);
    stream_wait(bench->trainer.stream);
}

static void run_step(void *context)
{
    struct bench_step *bench = context;
    struct trainer *trainer = &bench->trainer;
    const struct optimizer_rates rates = trainer_rates(trainer);

    param_list_clear_grads(&trainer->params, trainer->stream);
    forward_backward(bench);
    grad_norm_clip_scale(&trainer->optimizer, &trainer->groups, trainer->stream, trainer->scratch,
                         1.0f, &trainer->grad_norm, &trainer->grad_scale);
    optimizer_step(&trainer->optimizer, trainer->stream, &rates, &trainer->grad_scale);
    stream_wait(trainer->stream);
}

static void capture_passes(struct bench_step *bench)
{
    stream_capture_begin(bench->trainer.stream);
    issue_passes(&bench->trainer);
    bench->graph = stream_capture_end(bench->trainer.stream);
}

struct step_seconds {
    struct bench_seconds whole, passes;
};

static struct step_seconds time_step(struct bench_step *bench)
{
    struct stream *stream = bench->trainer.stream;

    return (struct step_seconds){.whole = bench_median(stream, run_step, bench),
                                 .passes = bench_median(stream, run_forward_backward, bench)};
}

static void print_step(const struct step_seconds *seconds, const char *how,
                       const struct op_cost *cost, const struct bench_roof *roof)
{
    char name[64];

    snprintf(name, sizeof name, "step (forward, backward, clip, Adam)%s", how);
    print_rates(name, &seconds->whole, cost, roof);
    snprintf(name, sizeof name, "forward, backward%s", how);
    print_rates(name, &seconds->passes, cost, roof);
}

/* Each op of the work; on a CPU where --profile asks for it. */
static void profile_ops(struct bench_step *bench, void (*work)(void *context),
                        const struct bench_roof *roof)
{
    struct trainer *trainer = &bench->trainer;
    const bool on_gpu = trainer->stream->device->kind == DEVICE_CUDA;

    if (!on_gpu && !trainer->options->profile) {
        return;
    }
    ops_profile_start(trainer->stream);
    work(bench);
    ops_profile_stop(trainer->stream);
    if (log_speaks()) {
        ops_profile_print(stdout, on_gpu ? &roof->sustained : &roof->burst);
    }
}

static void time_captured(struct bench_step *bench, const struct op_cost *cost,
                          const struct bench_roof *roof)
{
    struct stream *stream = bench->trainer.stream;
    struct step_seconds seconds;

    if (!device_can_capture(stream->device)) {
        return;
    }
    capture_passes(bench);
    seconds = time_step(bench);
    print_step(&seconds, ", graph", cost, roof);
    stream_graph_free(stream, bench->graph);
    bench->graph = NULL;
}

static int bench_train_step(const struct options *options)
{
    struct bench_device on;
    struct bench_step bench = {0};
    struct trainer *trainer = &bench.trainer;
    struct step_seconds seconds;
    struct flops_sizes sizes;
    struct bench_roof roof;
    struct op_cost cost;

    TRY(open_device(&on, options));
    TRY(trainer_create(trainer, options, options->vocab_size, on.device, on.ops,
                       &(struct trainer_memory){0}));
    fill_batch(trainer);
    roof = bench_roof(trainer->stream, trainer->config.dtype);
    print_roof(trainer->stream, trainer->config.dtype, &roof);
    sizes = flops_sizes_from_config(&trainer->config, options->micro_batch_size);
    cost = (struct op_cost){.flops = flops_per_step_head(&sizes)};
    seconds = time_step(&bench);
    printf("FLOPs of a step (causal attention counted half): %.1f GFLOP\n", cost.flops / 1e9);
    print_step(&seconds, "", &cost, &roof);
    time_captured(&bench, &cost, &roof);
    profile_ops(&bench, run_step, &roof);
    printf("%.0f tokens/s\n",
           (double)(options->micro_batch_size * options->seq_length) / seconds.whole.burst);
    trainer_destroy(trainer);
    return 0;
}

enum { NUM_MOMENTS = 3, PARTS_WARM_UPS = 5, PARTS_RUNS = 21 };

/* moments: before, after forward, after backward. */
static void pass_moe_layer(struct bench_step *bench, void *moments[NUM_MOMENTS])
{
    struct trainer *trainer = &bench->trainer;
    const struct pass pass = trainer_pass(trainer, &trainer->microbatches[0], 0, true, 1.0f);
    const struct arena_mark mark = arena_mark(pass.saved);
    struct moe_saved saved;

    moments[0] = stream_mark(trainer->stream);
    moe_layer_forward(bench->moe, &pass, &bench->y, &bench->x, NULL, &saved);
    moments[1] = stream_mark(trainer->stream);
    moe_layer_backward(bench->moe, &pass, &bench->d_x, &bench->d_y, &saved);
    moments[2] = stream_mark(trainer->stream);
    arena_release(pass.saved, mark);
    stream_wait(trainer->stream);
}

static void free_moments(struct bench_step *bench, void *moments[NUM_MOMENTS])
{
    for (int m = 0; m < NUM_MOMENTS; m++) {
        stream_mark_free(bench->trainer.stream, moments[m]);
    }
}

static void run_moe_layer(void *context)
{
    void *moments[NUM_MOMENTS];

    pass_moe_layer(context, moments);
    free_moments(context, moments);
}

/* Medians on the device. All ranks run as often: they exchange tokens. */
static void time_moe_parts(struct bench_step *bench, double *forward, double *backward)
{
    struct stream *stream = bench->trainer.stream;
    double forwards[PARTS_RUNS], backwards[PARTS_RUNS];
    void *moments[NUM_MOMENTS];

    for (int i = 0; i < PARTS_WARM_UPS; i++) {
        run_moe_layer(bench);
    }
    for (int i = 0; i < PARTS_RUNS; i++) {
        pass_moe_layer(bench, moments);
        forwards[i] = stream_mark_seconds(stream, moments[0], moments[1]);
        backwards[i] = stream_mark_seconds(stream, moments[1], moments[2]);
        free_moments(bench, moments);
    }
    *forward = bench_middle(forwards, PARTS_RUNS);
    *backward = bench_middle(backwards, PARTS_RUNS);
}

static void print_moe_parts(struct bench_step *bench, const struct op_cost *cost,
                            const struct bench_roof *roof)
{
    const struct op_cost third = {.flops = cost->flops / 3.0};
    const struct op_cost rest = {.flops = cost->flops - third.flops};
    double forward, backward;

    time_moe_parts(bench, &forward, &backward);
    print_rate("moe-layer, forward", forward, &third, &roof->burst);
    print_rate("moe-layer, backward", backward, &rest, &roof->burst);
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
    const int64_t num_tokens =
        tp_region_outside(&trainer->groups, options->micro_batch_size * options->seq_length /
                                                trainer->groups.cp->size);
    const double halves = config->activation == ACTIVATION_SWIGLU ? 3.0 : 2.0;
    const double flops = 6.0 * halves * (double)(num_tokens * config->router_rule.topk) *
                         (double)(config->hidden_size * config->moe_ffn_hidden_size);
    struct tensor *const tensors[] = {&bench->x, &bench->y, &bench->d_x, &bench->d_y};
    const struct op_cost cost = {.flops = flops};
    struct bench_roof roof;
    struct bench_seconds seconds;

    TRY(find_moe_layer(bench));
    bench->arena = arena_create("bench", &trainer->stream->device->memory);
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        *tensors[i] = tensor_new(bench->arena, config->dtype, num_tokens, config->hidden_size);
        bench_fill_normal(trainer->stream, tensors[i], "bench activations");
    }
    roof = bench_roof(trainer->stream, config->dtype);
    print_roof(trainer->stream, config->dtype, &roof);
    print_moe_parts(bench, &cost, &roof);
    if (launch_size() == 1) {
        seconds = bench_median(trainer->stream, run_moe_layer, bench);
        print_rates("moe-layer (forward, backward)", &seconds, &cost, &roof);
    }
    profile_ops(bench, run_moe_layer, &roof);
    arena_destroy(bench->arena);
    return 0;
}

static int bench_moe_layer(const struct options *options)
{
    struct bench_device on;
    struct bench_step bench = {0};
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
    bool of_several_ranks;
} benches[] = {
    {"gemm", bench_gemm, false},
    {"moe-layer", bench_moe_layer, true},
    {"train-step", bench_train_step, false},
};

static int run_bench(const char *name, struct options *options, int argc, char **argv)
{
    for (size_t i = 0; i < sizeof benches / sizeof benches[0]; i++) {
        if (strcmp(name, benches[i].name) == 0) {
            if (launch_size() > 1 && !benches[i].of_several_ranks) {
                return error_set("cadre bench %s is for one process, not %d; for several: cadre "
                                 "bench moe-layer, cadre pretrain --profile",
                                 name, launch_size());
            }
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

    TRY(launch_init(&argc, &argv));
    log_configure(launch_rank() == 0);
    if (argc < 2 || strcmp(argv[1], "--help") == 0) {
        puts(
            "usage: cadre bench gemm|moe-layer|train-step [flags of pretrain]\n\n"
            "Prints times, rates, and their share of the roofs, which are measured in the same\n"
            "run: a matrix product of the same type (2048^3 on a CPU, 8192^3 on a GPU), and a\n"
            "copy. On a GPU after a rest (burst) and after a second of work (sustained), each\n"
            "op, and a step as a CUDA graph; on a CPU the ops with --profile. moe-layer runs on\n"
            "several ranks too (mpirun -n N), each with a micro-batch of tokens. Default model: 8\n"
            "layers, H 512, F 1024, 8 experts top-2, 8 heads, S 512, micro-batch 4, vocabulary\n"
            "8192, fp32 (--bf16 for bf16).");
        return argc < 2 ? error_set("cadre bench needs the name of a benchmark") : 0;
    }
    TRY(options_init(&options));
    result = run_bench(argv[1], &options, argc - 1, argv + 1);
    options_free(&options);
    return result;
}
