/* bench_ops [f32|bf16] [threads]: the ops of one training step, alone.
 *
 * Shapes of `cadre bench train-step`: 8 layers, H 512, F 1024, 8 experts top-2, 8 heads, S 512,
 * micro-batch 4, vocabulary 8192. Columns: time of one call, calls in a step of one microbatch,
 * their time, and the rate: GFLOP/s and the share of the GEMM roof (2048^3, same dtype, same run),
 * or GB/s for ops without products. Numbers are the best of several runs; with one thread they are
 * CPU time, which other work on the machine disturbs less. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ops/ops.h"

enum {
    L = 8,
    H = 512,
    F = 1024,
    E = 8,
    K = 2,
    A = 8,
    D = 64,
    S = 512,
    B = 4,
    V = 8192,
    T = S * B,
    R = T * K,
};

static struct stream *stream;
static struct arena *arena;
static enum dtype act;
static double roof_gflops, step_ms, step_gflop;

static clockid_t clock_kind = CLOCK_MONOTONIC;

static double now_ms(void)
{
    struct timespec t;

    clock_gettime(clock_kind, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Small normal numbers, the same in every run. */
static struct tensor random_tensor(enum dtype dtype, int64_t rows, int64_t columns)
{
    static uint64_t row;
    struct tensor x = tensor_new(arena, DTYPE_F32, rows, columns), cast;
    float *data = x.data;

    row++;
    for (int64_t i = 0; i < rows * columns; i++) {
        data[i] = 2.0f * rng_uniform((struct rng_key){1, 2}, row, (uint64_t)i) - 1.0f;
    }
    if (dtype == DTYPE_F32) {
        return x;
    }
    cast = tensor_new(arena, dtype, rows, columns);
    op_linear_combination(stream, &(struct linear_combination){.y = &cast, .x = &x, .a = 1.0f});
    return cast;
}

typedef void bench_call(const void *args);

/* Best time of a call; the first, which generates code and touches memory, does not count. */
static double time_ms(bench_call *call, const void *args)
{
    double best = 1e30, start = now_ms();

    call(args);
    for (int run = 0; run < 40 && (run < 3 || now_ms() - start < 400.0); run++) {
        const double begin = now_ms();

        call(args);
        best = now_ms() - begin < best ? now_ms() - begin : best;
    }
    return best;
}

static void report(const char *name, bench_call *call, const void *args, int calls, double gflop,
                   double mbytes)
{
    const double ms = time_ms(call, args);

    step_ms += ms * calls;
    step_gflop += gflop * calls;
    printf("%-34s %9.3f ms x %3d = %8.1f ms ", name, ms, calls, ms * calls);
    if (gflop > 0.0) {
        printf("%7.0f GFLOP/s %4.0f %%\n", gflop / ms * 1e3,
               100.0 * gflop / ms * 1e3 / roof_gflops);
    } else {
        printf("%7.1f GB/s\n", mbytes / ms);
    }
    fflush(stdout);
}

#define DEFINE_CALL(name, args)                                                                    \
    static inline void call_##name(const void *args_)                                              \
    {                                                                                              \
        op_##name(stream, args_);                                                                  \
    }
OPS_LIST(DEFINE_CALL)
#undef DEFINE_CALL

static void bench_product(const char *name, int64_t m, int64_t n, int64_t k, bool transpose_a,
                          bool transpose_b, bool accumulate, int calls)
{
    struct tensor a = transpose_a ? random_tensor(act, k, m) : random_tensor(act, m, k);
    struct tensor b = transpose_b ? random_tensor(act, n, k) : random_tensor(act, k, n);
    struct tensor c = random_tensor(accumulate ? DTYPE_F32 : act, m, n);
    const struct matmul args = {.c = &c,
                                .a = &a,
                                .b = &b,
                                .transpose_a = transpose_a,
                                .transpose_b = transpose_b,
                                .accumulate = accumulate};

    report(name, call_matmul, &args, calls, 2e-9 * (double)(m * n) * (double)k, 0.0);
}

/* y = x W^T, d_x = d_y W, d_W += d_y^T x. */
static void bench_linear(const char *name, int64_t rows, int64_t out, int64_t in, int calls)
{
    char text[64];

    snprintf(text, sizeof text, "%s forward", name);
    bench_product(text, rows, out, in, false, true, false, calls);
    snprintf(text, sizeof text, "%s input gradient", name);
    bench_product(text, rows, in, out, false, false, false, calls);
    snprintf(text, sizeof text, "%s weight gradient", name);
    bench_product(text, out, in, rows, true, false, true, calls);
}

static void measure_roof(void)
{
    enum { N = 2048 };
    struct tensor a = random_tensor(act, N, N), b = random_tensor(act, N, N);
    struct tensor c = random_tensor(act, N, N);
    const struct matmul args = {.c = &c, .a = &a, .b = &b};

    roof_gflops = 2e-6 * N * N * N / time_ms(call_matmul, &args);
    printf("GEMM roof %d^3 %s: %.0f GFLOP/s\n", N, dtype_name(act), roof_gflops);
}

static void bench_attention(void)
{
    struct tensor q = random_tensor(act, T, H), k = random_tensor(act, T, H);
    struct tensor v = random_tensor(act, T, H), out = random_tensor(act, T, H);
    struct tensor d_out = random_tensor(act, T, H), d_q = random_tensor(act, T, H);
    struct tensor d_k = random_tensor(act, T, H), d_v = random_tensor(act, T, H);
    struct tensor *heads[] = {&q, &k, &v, &out, &d_out, &d_q, &d_k, &d_v};
    struct tensor lse = tensor_new(arena, DTYPE_F32, B, A, S);
    const double gflop = 2e-9 * 2.0 * B * A * D * (S * (S + 1.0) / 2.0); /* scores and values */
    struct attention forward = {.scale = 0.125f,
                                .causal = true,
                                .kv_length = S,
                                .q = &q,
                                .k = &k,
                                .v = &v,
                                .out = &out,
                                .lse = &lse};
    struct attention_backward backward;

    for (int i = 0; i < 8; i++) {
        *heads[i] = tensor_view(heads[i], S, B, A, D);
    }
    report("attention forward", call_attention_forward, &forward, L, gflop, 0.0);
    backward = (struct attention_backward){
        .forward = forward, .d_out = &d_out, .d_q = &d_q, .d_k = &d_k, .d_v = &d_v};
    report("attention backward", call_attention_backward, &backward, L, 2.5 * gflop, 0.0);
}

static void bench_norm(double act_mb)
{
    struct tensor x = random_tensor(act, T, H), y = random_tensor(act, T, H);
    struct tensor residual = random_tensor(act, T, H), sum = random_tensor(act, T, H);
    struct tensor weight = random_tensor(act, 1, H), d_weight = random_tensor(DTYPE_F32, 1, H);
    struct tensor inv_std = tensor_new(arena, DTYPE_F32, T);

    weight = tensor_view(&weight, H);
    d_weight = tensor_view(&d_weight, H);
    report("norm forward, residual", call_norm_forward,
           &(struct norm_forward){.kind = NORM_RMSNORM,
                                  .eps = 1e-5f,
                                  .y = &y,
                                  .inv_std = &inv_std,
                                  .sum = &sum,
                                  .x = &x,
                                  .residual = &residual,
                                  .weight = &weight},
           2 * L + 1, 0.0, 4.0 * act_mb);
    report("norm backward, residual", call_norm_backward,
           &(struct norm_backward){.kind = NORM_RMSNORM,
                                   .d_x = &residual,
                                   .d_weight = &d_weight,
                                   .d_y = &y,
                                   .x = &sum,
                                   .weight = &weight,
                                   .inv_std = &inv_std,
                                   .d_residual = &residual},
           2 * L + 1, 0.0, 4.0 * act_mb);
}

static void bench_qkv_split(double act_mb)
{
    struct tensor qkv = random_tensor(act, T, 3 * H), q = random_tensor(act, T, H);
    struct tensor k = random_tensor(act, T, H), v = random_tensor(act, T, H);
    struct tensor table = random_tensor(DTYPE_F32, S, D),
                  position = tensor_new(arena, DTYPE_I32, T);
    const struct qkv_split args = {
        .q = &q, .k = &k, .v = &v, .qkv = &qkv, .table = &table, .position = &position};

    q = tensor_view(&q, T, A, D);
    k = tensor_view(&k, T, A, D);
    v = tensor_view(&v, T, A, D);
    table = tensor_view(&table, S, D / 2, 2);
    for (int32_t t = 0; t < T; t++) {
        ((int32_t *)position.data)[t] = t / B;
    }
    report("qkv split and rope forward", call_qkv_split_forward, &args, L, 0.0, 6.0 * act_mb);
    report("qkv split and rope backward", call_qkv_split_backward, &args, L, 0.0, 6.0 * act_mb);
}

static void bench_loss(double logits_mb)
{
    struct tensor logits = random_tensor(act, T, V), label = tensor_new(arena, DTYPE_I32, T);
    struct tensor max = tensor_new(arena, DTYPE_F32, T), sum_exp = tensor_new(arena, DTYPE_F32, T);
    struct tensor target = tensor_new(arena, DTYPE_F32, T),
                  d_loss = tensor_new(arena, DTYPE_F32, T);

    for (int32_t t = 0; t < T; t++) {
        ((int32_t *)label.data)[t] = t;
        ((float *)d_loss.data)[t] = 1.0f;
    }
    report("cross entropy forward", call_cross_entropy_forward,
           &(struct cross_entropy){.max = &max,
                                   .sum_exp = &sum_exp,
                                   .target = &target,
                                   .logits = &logits,
                                   .label = &label},
           1, 0.0, logits_mb);
    report("cross entropy backward", call_cross_entropy_backward,
           &(struct cross_entropy_backward){.logits = &logits,
                                            .max = &max,
                                            .sum_exp = &sum_exp,
                                            .label = &label,
                                            .d_loss = &d_loss},
           1, 0.0, 2.0 * logits_mb);
}

static void bench_embedding(double act_mb)
{
    struct tensor weight = random_tensor(act, V, H), d_weight = random_tensor(DTYPE_F32, V, H);
    struct tensor y = random_tensor(act, T, H), id = tensor_new(arena, DTYPE_I32, T);

    for (int32_t t = 0; t < T; t++) {
        ((int32_t *)id.data)[t] = t * 7919 % V;
    }
    report("embedding forward", call_embedding_forward,
           &(struct embedding){.y = &y, .weight = &weight, .id = &id}, 1, 0.0, 2.0 * act_mb);
    report("embedding backward", call_embedding_backward,
           &(struct embedding_backward){.d_weight = &d_weight, .d_y = &y, .id = &id}, 1, 0.0,
           act_mb + 2.0 * T * H * 4e-6);
}

/* Rows as unevenly spread over the experts as an untrained router does. */
static void bench_experts(double act_mb)
{
    struct tensor x = random_tensor(act, T, H), y = random_tensor(act, R, H);
    struct tensor h = random_tensor(act, R, 2 * F), d_x = random_tensor(act, R, H);
    struct tensor fc1 = random_tensor(act, E * 2 * F, H), fc2 = random_tensor(act, E * H, F);
    struct tensor d_fc1 = random_tensor(DTYPE_F32, E * 2 * F, H);
    struct tensor d_fc2 = random_tensor(DTYPE_F32, E * H, F), out = random_tensor(act, T, H);
    struct tensor offsets = tensor_new(arena, DTYPE_I32, E + 1);
    struct tensor row_token = tensor_new(arena, DTYPE_I32, R),
                  row_of = tensor_new(arena, DTYPE_I32, T, K);
    struct tensor row_prob = tensor_new(arena, DTYPE_F32, R),
                  d_row_prob = tensor_new(arena, DTYPE_F32, R);
    const int32_t ends[E + 1] = {0, 481, 1030, 1507, 2110, 2583, 3071, 3645, R};
    const double gflop = 2e-9 * R * 3.0 * F * H;
    struct experts_forward forward = {.activation = ACTIVATION_SWIGLU,
                                      .y = &y,
                                      .pre_activation = &h,
                                      .x = &x,
                                      .row_token = &row_token,
                                      .offsets = &offsets,
                                      .row_prob = &row_prob,
                                      .fc1 = &fc1,
                                      .fc2 = &fc2};

    fc1 = tensor_view(&fc1, E, 2 * F, H);
    fc2 = tensor_view(&fc2, E, H, F);
    d_fc1 = tensor_view(&d_fc1, E, 2 * F, H);
    d_fc2 = tensor_view(&d_fc2, E, H, F);
    memcpy(offsets.data, ends, sizeof ends);
    for (int32_t r = 0; r < R; r++) {
        ((int32_t *)row_token.data)[r] = r * 1031 % T;
        ((int32_t *)row_of.data)[r] = r * 1033 % R;
        ((float *)row_prob.data)[r] = 0.5f;
    }
    report("experts forward", call_experts_forward, &forward, L, gflop, 0.0);
    report("experts backward", call_experts_backward,
           &(struct experts_backward){.forward = forward,
                                      .d_y = &x,
                                      .d_y_row_token = &row_token,
                                      .d_x = &d_x,
                                      .d_row_prob = &d_row_prob,
                                      .d_fc1 = &d_fc1,
                                      .d_fc2 = &d_fc2},
           L, 2.0 * gflop, 0.0);
    report("row sum (combine)", call_row_sum,
           &(struct row_sum){.y = &out, .rows = &y, .row_of = &row_of}, 2 * L, 0.0, 3.0 * act_mb);
}

static void bench_router(void)
{
    struct tensor logits = random_tensor(DTYPE_F32, T, E),
                  d_logits = random_tensor(DTYPE_F32, T, E);
    struct tensor probs = random_tensor(DTYPE_F32, T, K),
                  indices = tensor_new(arena, DTYPE_I32, T, K);
    struct tensor counts = random_tensor(DTYPE_F32, 1, E), sums = random_tensor(DTYPE_F32, 1, E);
    struct tensor row_of = tensor_new(arena, DTYPE_I32, T, K),
                  row_token = tensor_new(arena, DTYPE_I32, R);
    struct tensor row_prob = tensor_new(arena, DTYPE_F32, R);
    struct tensor offsets = tensor_new(arena, DTYPE_I32, E + 1);
    const struct router_rule rule = {.topk = K, .scaling_factor = 1.0f};
    const double mb = T * E * 4e-6;

    report("router top-k forward", call_router_topk_forward,
           &(struct router_topk){
               .rule = rule, .probs = &probs, .indices = &indices, .logits = &logits},
           L, 0.0, mb);
    report("router balance", call_router_balance,
           &(struct router_balance){
               .counts = &counts, .score_sums = &sums, .logits = &logits, .indices = &indices},
           L, 0.0, mb);
    report("router backward, with a balancing loss", call_router_backward,
           &(struct router_backward){.rule = rule,
                                     .d_logits = &d_logits,
                                     .logits = &logits,
                                     .d_probs = &probs,
                                     .indices = &indices,
                                     .balance = {{&counts, 0.01f}},
                                     .num_balance_terms = 1},
           L, 0.0, 2.0 * mb);
    report("permutation", call_permutation,
           &(struct permutation){.row_of = &row_of,
                                 .row_token = &row_token,
                                 .row_prob = &row_prob,
                                 .offsets = &offsets,
                                 .indices = &indices,
                                 .probs = &probs},
           L, 0.0, mb);
}

/* On a part of the parameters too large for the caches, scaled to a step's 117 million. */
static void bench_optimizer(void)
{
    enum { ROWS = 4096, COLUMNS = 4096 };
    const int64_t n = (int64_t)ROWS * COLUMNS;
    const double total = L * (E * 3.0 * F * H + 4.0 * H * H) + 2.0 * V * H;
    const int calls = (int)(total / (double)n + 0.5);
    struct tensor master = random_tensor(DTYPE_F32, ROWS, COLUMNS), param = master;
    struct tensor mean = random_tensor(DTYPE_F32, ROWS, COLUMNS);
    struct tensor square = tensor_new(arena, DTYPE_F32, n),
                  grad = random_tensor(DTYPE_F32, ROWS, COLUMNS);
    struct tensor scale = random_tensor(DTYPE_F32, 1, 1), sum = tensor_new(arena, DTYPE_F64, 1);
    const double mb = (double)n * (act == DTYPE_BF16 ? 30e-6 : 28e-6);

    if (act == DTYPE_BF16) {
        param = tensor_new(arena, DTYPE_BF16, n);
    }
    master = tensor_view(&master, n);
    param = tensor_view(&param, n);
    mean = tensor_view(&mean, n);
    grad = tensor_view(&grad, n);
    scale = tensor_view(&scale, 1);
    op_fill_zero(stream, &square);
    op_fill_zero(stream, &sum);
    report("adam, 16.8 M parameters", call_adam_step,
           &(struct adam_step){.param = &param,
                               .master = &master,
                               .exp_avg = &mean,
                               .exp_avg_sq = &square,
                               .grad = &grad,
                               .grad_scale = &scale,
                               .lr = 1e-6f,
                               .beta1 = 0.9f,
                               .beta2 = 0.95f,
                               .eps = 1e-8f,
                               .step = 3},
           calls, 0.0, mb);
    report("square sum, 16.8 M", call_square_sum, &(struct square_sum){.sum = &sum, .x = &grad},
           calls, 0.0, (double)n * 4e-6);
    report("zero gradients, 16.8 M", call_linear_combination,
           &(struct linear_combination){.y = &grad, .x = &grad, .a = 0.0f}, calls, 0.0,
           (double)n * 8e-6);
}

int main(int argc, char **argv)
{
    double act_mb;

    act = argc > 1 && strcmp(argv[1], "bf16") == 0 ? DTYPE_BF16 : DTYPE_F32;
    if (argc > 2 && atoi(argv[2]) == 1) {
        clock_kind = CLOCK_PROCESS_CPUTIME_ID;
    }
    ops_cpu_set_num_threads(argc > 2 ? atoi(argv[2]) : 0);
    stream = stream_create(device_cpu(), ops_cpu());
    arena = arena_create("bench", &device_cpu()->memory);
    act_mb = T * H * (double)dtype_size_bytes(act) * 1e-6;
    measure_roof();
    bench_linear("qkv", T, 3 * H, H, L);
    bench_linear("attention output", T, H, H, L);
    bench_linear("lm head", T, V, H, 1);
    bench_attention();
    bench_experts(act_mb);
    bench_norm(act_mb);
    bench_qkv_split(act_mb);
    bench_router();
    bench_embedding(act_mb);
    bench_loss(act_mb * V / H);
    bench_optimizer();
    printf("sum: %.0f ms, %.1f GFLOP, %.1f %% of the GEMM roof\n", step_ms, step_gflop,
           100.0 * step_gflop / step_ms * 1e3 / roof_gflops);
    return 0;
}
