/* step_traffic.h - what every group sends in a training step, by the formulas of
 * docs/parallelism.md: from the flags (set_sizes) and from the rows that ranks send to experts
 * (all_rows), expect_step fills `expected`. For dist_bytes.c. */
#ifndef CADRE_TESTS_DIST_STEP_TRAFFIC_H
#define CADRE_TESTS_DIST_STEP_TRAFFIC_H

#include <string.h>

#include "args/options.h"
#include "dist_test.h"

/* ---- the sizes of a mapping ---- */

enum group {
    TP,
    CP,
    DP,
    PP,
    PP_BACKWARD,
    ETP,
    EP,
    EDP,
    ETP_EP,
    TP_CP,
    DP_CP,
    WORLD,
    EMBEDDING,
    NUM_GROUPS
};

static const char *const group_names[NUM_GROUPS] = {
    "tp",  "cp",     "dp",    "pp",    "pp-backward", "etp",      "ep",
    "edp", "etp-ep", "tp-cp", "dp-cp", "world",       "embedding"};

enum { LAYERS = 4, EXPERTS = 8, MICROBATCHES = 8 };

/* Letters as in docs/glossary.md. */
static struct {
    int64_t S, B, H, A, G, D, F, E, K, L, V, M, act;
    int64_t shared_ffn, num_chunks, capacity; /* capacity 0: dropless */
    bool sp, tied;
    int64_t T, t; /* tokens of a rank inside TP regions, and outside */
    int size[NUM_GROUPS], place[NUM_GROUPS];
} z;

static void set_group(enum group group, int size, int place)
{
    z.size[group] = size;
    z.place[group] = place;
}

/* Ranks are numbered tp-cp-dp-pp and etp-ep-edp-pp (or with pp before dp and edp). */
static void set_groups(const struct options *o)
{
    const int tp = (int)o->tensor_model_parallel_size, cp = (int)o->context_parallel_size;
    const int pp = (int)o->pipeline_model_parallel_size, world = launch_size(),
              rank = launch_rank();
    const int ep = o->moe_extended_tp ? 1 : (int)o->expert_model_parallel_size;
    const int etp = (int)(o->expert_tensor_parallel_size *
                          (o->moe_extended_tp ? o->expert_model_parallel_size : 1));
    const int dp = world / (tp * cp * pp), edp = world / (etp * ep * pp);
    const bool pp_first = o->use_tp_pp_dp_mapping;
    const int stage = pp_first ? rank / (tp * cp) % pp : rank / (tp * cp * dp);
    const int in_stage =
        pp_first ? rank % (tp * cp) + rank / (tp * cp * pp) * tp * cp : rank % (tp * cp * dp);

    set_group(TP, tp, in_stage % tp);
    set_group(CP, cp, in_stage / tp % cp);
    set_group(DP, dp, in_stage / (tp * cp));
    set_group(PP, pp, stage);
    set_group(PP_BACKWARD, pp, stage);
    set_group(ETP, etp, in_stage % etp);
    set_group(EP, ep, in_stage / etp % ep);
    set_group(EDP, edp, in_stage / (etp * ep));
    set_group(ETP_EP, etp * ep, in_stage % (etp * ep));
    set_group(TP_CP, tp * cp, in_stage % (tp * cp));
    set_group(DP_CP, dp * cp, in_stage / tp);
    set_group(WORLD, world, rank);
    set_group(EMBEDDING, pp > 1 && (stage == 0 || stage == pp - 1) ? 2 : 1,
              pp > 1 && stage == pp - 1 ? 1 : 0);
}

static void set_sizes(const struct options *o)
{
    const int64_t divisible = o->make_vocab_size_divisible_by * o->tensor_model_parallel_size;

    set_groups(o);
    z.S = o->seq_length;
    z.B = o->micro_batch_size;
    z.H = o->hidden_size;
    z.A = o->num_attention_heads;
    z.G = o->num_query_groups;
    z.D = o->kv_channels;
    z.F = o->num_experts > 0 ? o->moe_ffn_hidden_size : o->ffn_hidden_size;
    z.E = o->num_experts;
    z.K = o->moe_router_topk;
    z.L = o->num_layers;
    z.V = (o->vocab_size + divisible - 1) / divisible * divisible;
    z.M = o->global_batch_size / (z.B * z.size[DP]);
    z.act = o->bf16 ? 2 : 4;
    z.shared_ffn = o->moe_shared_expert_intermediate_size;
    z.num_chunks = o->num_layers_per_virtual_pipeline_stage > 0
                       ? z.L / z.size[PP] / o->num_layers_per_virtual_pipeline_stage
                       : 1;
    z.sp = o->sequence_parallel;
    z.tied = !o->untie_embeddings_and_output_weights;
    z.T = z.S / z.size[CP] * z.B;
    z.t = z.sp ? z.T / z.size[TP] : z.T;
    z.capacity =
        o->moe_expert_capacity_factor > 0
            ? (int64_t)ceil((double)(z.t * z.K) / (double)z.E * o->moe_expert_capacity_factor)
            : 0;
    CHECK(z.L <= LAYERS && z.E <= EXPERTS && z.M <= MICROBATCHES, "tables are too small");
}

/* ---- what each collective sends ---- */

static struct comm_counter expected[NUM_GROUPS][NUM_COMM_KINDS];

static void expect(enum group group, enum comm_kind kind, int64_t calls, int64_t bytes)
{
    if (z.size[group] > 1) {
        expected[group][kind].num_calls += calls;
        expected[group][kind].sent_bytes += bytes;
    }
}

/* Part r of n elements goes to rank r, who adds it up and sends the sum to the others: 2 (N-1)/N of
 * the bytes where N divides n; else parts differ by one element. */
static void expect_all_reduce(enum group group, int64_t n, int64_t item)
{
    const int64_t size = z.size[group], r = z.place[group];
    const int64_t own = n / size + n % size * (r + 1) / size - n % size * r / size;

    expect(group, COMM_ALL_REDUCE, 1, item * (n - own + (size - 1) * own));
}

static void expect_all_gather(enum group group, int64_t own_bytes)
{
    expect(group, COMM_ALL_GATHER, 1, (z.size[group] - 1) * own_bytes);
}

static void expect_reduce_scatter(enum group group, int64_t part_bytes)
{
    expect(group, COMM_REDUCE_SCATTER, 1, (z.size[group] - 1) * part_bytes);
}

/* Equal parts. */
static void expect_all_to_all(enum group group, int64_t bytes)
{
    expect(group, COMM_ALL_TO_ALL, 1, bytes / z.size[group] * (z.size[group] - 1));
}

static void expect_sends(enum group group, int64_t count, int64_t bytes)
{
    expect(group, COMM_SEND, count, bytes);
    expect(group, COMM_RECEIVE, count, 0);
}

/* ---- tensor parallelism ---- */

static void expect_enter(void)
{
    if (z.sp) {
        expect_all_gather(TP, z.t * z.H * z.act);
    }
}

static void expect_leave(void)
{
    if (z.sp) {
        expect_reduce_scatter(TP, z.t * z.H * z.act);
    } else {
        expect_all_reduce(TP, z.T * z.H, z.act);
    }
}

/* With --tp-comm-overlap a linear's tokens come rank by rank and its sums leave in four chunks: the
 * same bytes. */
static void expect_linear_enter(const struct options *o)
{
    if (o->tp_comm_overlap) {
        expect_sends(TP, z.size[TP] - 1, (z.size[TP] - 1) * z.t * z.H * z.act);
    } else {
        expect_enter();
    }
}

static void expect_linear_leave(const struct options *o)
{
    if (o->tp_comm_overlap) {
        expect(TP, COMM_REDUCE_SCATTER, 4, (z.size[TP] - 1) * z.t * z.H * z.act);
    } else {
        expect_leave();
    }
}

/* A block with a column and a row linear: attention, a dense MLP, a shared expert. Backward enters
 * twice, with the gradient and once more with the input, which is not kept for all tokens. */
static void expect_block_forward(const struct options *o)
{
    expect_linear_enter(o);
    expect_linear_leave(o);
}

static void expect_block_backward(const struct options *o)
{
    expect_linear_enter(o);
    expect_enter();
    expect_linear_leave(o);
}

static void expect_embedding(void)
{
    expect_leave();
    expect_enter();
}

/* Of the loss three numbers a token; the logits stay where they are. */
static void expect_head(void)
{
    expect_enter();
    for (int i = 0; i < 3; i++) {
        expect_all_reduce(TP, z.T, 4);
    }
    expect_enter();
    expect_leave();
}

/* ---- context parallelism ---- */

static void expect_attention_forward(const char *type, bool document_start)
{
    const int64_t cp = z.size[CP], tp = z.size[TP];
    const int64_t kv_bytes = 2 * z.T * z.G / tp * z.D * z.act;

    if (strcmp(type, "p2p") == 0) {
        expect_sends(CP, cp - 1, (cp - 1) * kv_bytes);
    } else if (strcmp(type, "all_gather") == 0) {
        expect_all_gather(CP, kv_bytes / 2);
        expect_all_gather(CP, kv_bytes / 2);
    } else {
        expect_all_to_all(CP, z.T * z.A / tp * z.D * z.act);
        expect_all_to_all(CP, kv_bytes / 2);
        expect_all_to_all(CP, kv_bytes / 2);
        expect_all_to_all(CP, z.T * z.A / tp * z.D * z.act);
        if (document_start) {
            expect_all_gather(CP, z.T * 4);
        }
    }
}

static void expect_attention_backward(const char *type, bool document_start)
{
    const int64_t cp = z.size[CP], kv_f32_bytes = 2 * z.T * z.G / z.size[TP] * z.D * 4;

    expect_attention_forward(type, document_start);
    if (strcmp(type, "p2p") == 0) {
        /* home to the ranks before this one only the half of their block that it sees */
        expect_sends(CP, cp - 1, (2 * (cp - 1) - z.place[CP]) * kv_f32_bytes / 2);
    } else if (strcmp(type, "all_gather") == 0) {
        expect_reduce_scatter(CP, kv_f32_bytes / 2);
        expect_reduce_scatter(CP, kv_f32_bytes / 2);
    }
}

/* ---- experts ---- */

/* Rows that each rank of the world sends to each expert, of the step that is counted. */
typedef int32_t row_table[MICROBATCHES][LAYERS][EXPERTS];
static row_table *all_rows;

/* Rows that the rank in place (ep, etp) of this rank's ETPxEP group sends to the experts of EP rank
 * to. */
static int64_t rows_to(int ep, int etp, int to, int64_t microbatch, int64_t layer)
{
    const int first = launch_rank() - z.place[ETP_EP];
    const int32_t *rows = all_rows[first + ep * z.size[ETP] + etp][microbatch][layer];
    const int64_t num_local = z.E / z.size[EP];
    int64_t total = 0;

    for (int64_t e = to * num_local; e < (to + 1) * num_local; e++) {
        total += rows[e];
    }
    return total;
}

/* The exchange of a layer's rows. */
struct row_counts {
    int64_t away;     /* that this rank sends to other EP ranks */
    int64_t back;     /* that it sends home to them */
    int64_t received; /* of all EP ranks, those of its own included */
    int64_t all;      /* that the ETP ranks received together: R */
};

static struct row_counts count_rows(int64_t microbatch, int64_t layer)
{
    const int ep = z.place[EP], etp = z.place[ETP];
    struct row_counts counts = {0};

    for (int peer = 0; peer < z.size[EP]; peer++) {
        counts.away += peer != ep ? rows_to(ep, etp, peer, microbatch, layer) : 0;
        counts.back += peer != ep ? rows_to(peer, etp, ep, microbatch, layer) : 0;
        counts.received += rows_to(peer, etp, ep, microbatch, layer);
        for (int t = 0; t < z.size[ETP]; t++) {
            counts.all += rows_to(peer, t, ep, microbatch, layer);
        }
    }
    return counts;
}

/* M3.2: tokens of H numbers, K probabilities and K choices go to all ranks. */
static void expect_allgather(bool backward)
{
    if (!backward) {
        expect_all_gather(ETP_EP, z.t * z.H * z.act);
        expect_all_gather(ETP_EP, z.t * z.K * 4);
        expect_all_gather(ETP_EP, z.t * z.K * 4);
        expect_reduce_scatter(ETP_EP, z.t * z.H * z.act);
    } else {
        expect_all_gather(ETP_EP, z.t * z.H * z.act);
        expect_reduce_scatter(ETP_EP, z.t * z.H * z.act);
        expect_reduce_scatter(ETP_EP, z.t * z.K * 4);
    }
}

/* Rows of row_bytes to their experts, and home. */
static void expect_rows_out(const struct row_counts *counts, int64_t row_bytes)
{
    expect(EP, COMM_ALL_TO_ALL, 1, counts->away * row_bytes);
    expect_all_gather(ETP, counts->received * row_bytes);
}

static void expect_rows_home(const struct row_counts *counts, int64_t row_bytes)
{
    expect(ETP, COMM_REDUCE_SCATTER, 1, (counts->all - counts->received) * row_bytes);
    expect(EP, COMM_ALL_TO_ALL, 1, counts->back * row_bytes);
}

/* M3.3: rows and their probabilities; without padding, the counts before. */
static void expect_alltoall(const struct row_counts *counts, bool padded, bool backward)
{
    if (!backward) {
        if (!padded) {
            expect_all_gather(ETP_EP, z.E * 4);
        }
        expect_rows_out(counts, 4);
        expect_rows_out(counts, z.H * z.act);
        expect_rows_home(counts, z.H * z.act);
    } else {
        expect_rows_out(counts, z.H * z.act);
        expect_rows_home(counts, 4);
        expect_rows_home(counts, z.H * z.act);
    }
}

/* M3.4: the ETP ranks' rows are all each one's, of H/ETP numbers. */
static struct row_counts count_rows_of_etp(int64_t microbatch, int64_t layer)
{
    const int ep = z.place[EP];
    struct row_counts counts = {0};

    for (int peer = 0; peer < z.size[EP]; peer++) {
        for (int etp = 0; etp < z.size[ETP]; etp++) {
            counts.away += peer != ep ? rows_to(ep, etp, peer, microbatch, layer) : 0;
            counts.back += peer != ep ? rows_to(peer, etp, ep, microbatch, layer) : 0;
            counts.all += rows_to(peer, etp, ep, microbatch, layer);
        }
    }
    return counts;
}

static void expect_features_out(const struct row_counts *counts)
{
    const int64_t part_bytes = z.H / z.size[ETP] * z.act;

    expect_all_to_all(ETP, z.t * z.H * z.act);
    expect(EP, COMM_ALL_TO_ALL, 1, counts->away * part_bytes);
    expect_all_gather(ETP, counts->all * part_bytes);
}

static void expect_features_home(const struct row_counts *counts)
{
    const int64_t part_bytes = z.H / z.size[ETP] * z.act;

    expect_reduce_scatter(ETP, counts->all * part_bytes);
    expect(EP, COMM_ALL_TO_ALL, 1, counts->back * part_bytes);
    expect_all_to_all(ETP, z.t * z.H * z.act);
}

static void expect_alltoall_seq(const struct row_counts *counts, bool padded, bool backward)
{
    if (!backward) {
        expect_all_gather(ETP, z.t * z.K * 4);
        expect_all_gather(ETP, z.t * z.K * 4);
        if (!padded) {
            expect_all_gather(EP, z.E * 4);
        }
        expect(EP, COMM_ALL_TO_ALL, 1, counts->away * 4);
        expect_features_out(counts);
        expect_features_home(counts);
    } else {
        expect_features_out(counts);
        expect_features_home(counts);
        expect(EP, COMM_ALL_TO_ALL, 1, counts->back * 4);
        expect_reduce_scatter(ETP, z.t * z.K * 4);
    }
}

static void expect_experts(const struct options *o, int64_t microbatch, int64_t layer,
                           bool backward)
{
    const bool padded = o->moe_pad_expert_input_to_capacity;
    struct row_counts counts;

    if (strcmp(o->moe_token_dispatcher_type, "allgather") == 0) {
        expect_allgather(backward);
    } else if (strcmp(o->moe_token_dispatcher_type, "alltoall") == 0) {
        counts = count_rows(microbatch, layer);
        expect_alltoall(&counts, padded, backward);
    } else {
        counts = count_rows_of_etp(microbatch, layer);
        expect_alltoall_seq(&counts, padded, backward);
    }
}

/* The tokens that chose each expert; the z-loss needs nothing. */
static void expect_balancing_losses(const struct options *o)
{
    for (int i = 0; i < o->moe_router_load_balancing_type.num_items; i++) {
        const char *type = o->moe_router_load_balancing_type.items[i];

        expect_all_reduce(TP_CP, strcmp(type, "seq_aux_loss") == 0 ? z.B * z.E : z.E, 4);
        if (strcmp(type, "global_aux_loss") == 0) {
            expect_all_reduce(DP, z.E, 4);
        }
    }
}

static void expect_moe_forward(const struct options *o, int64_t microbatch, int64_t layer)
{
    expect_balancing_losses(o);
    expect_experts(o, microbatch, layer, false);
    if (z.shared_ffn > 0) {
        expect_block_forward(o);
    }
}

static void expect_moe_backward(const struct options *o, int64_t microbatch, int64_t layer)
{
    if (o->moe_layer_recompute) {
        expect_moe_forward(o, microbatch, layer);
    }
    expect_experts(o, microbatch, layer, true);
    if (z.shared_ffn > 0) {
        expect_block_backward(o);
    }
}

/* ---- a microbatch ---- */

static void expect_layer_forward(const struct options *o, int64_t microbatch, int64_t layer)
{
    expect_attention_forward(options_cp_comm_type(o, layer), o->reset_attention_mask);
    expect_block_forward(o);
    if (z.E > 0) {
        expect_moe_forward(o, microbatch, layer);
    } else {
        expect_block_forward(o);
    }
}

static void expect_layer_backward(const struct options *o, int64_t microbatch, int64_t layer)
{
    expect_attention_backward(options_cp_comm_type(o, layer), o->reset_attention_mask);
    expect_block_backward(o);
    if (z.E > 0) {
        expect_moe_backward(o, microbatch, layer);
    } else {
        expect_block_backward(o);
    }
}

/* The i-th layer of a chunk forgets what it computed. */
static bool is_recomputed(const struct options *o, int64_t i)
{
    return o->recompute_granularity != NULL &&
           (strcmp(o->recompute_method, "uniform") == 0 || i < o->recompute_num_layers);
}

static int64_t layers_of_chunk(void)
{
    return z.L / (z.size[PP] * z.num_chunks);
}

static void expect_chunk_microbatch(const struct options *o, int64_t chunk, int64_t microbatch)
{
    const int64_t first = (chunk * z.size[PP] + z.place[PP]) * layers_of_chunk();
    const bool has_embedding = first == 0, has_head = first + layers_of_chunk() == z.L;
    const int64_t boundary_bytes = z.t * z.H * z.act;

    expect(PP, COMM_RECEIVE, !has_embedding, 0);
    expect(PP, COMM_SEND, !has_head, has_head ? 0 : boundary_bytes);
    expect(PP_BACKWARD, COMM_RECEIVE, !has_head, 0);
    expect(PP_BACKWARD, COMM_SEND, !has_embedding, has_embedding ? 0 : boundary_bytes);
    if (has_embedding) {
        expect_embedding();
    }
    for (int64_t i = 0; i < layers_of_chunk(); i++) {
        expect_layer_forward(o, microbatch, first + i);
        if (is_recomputed(o, i)) {
            expect_layer_forward(o, microbatch, first + i);
        }
        expect_layer_backward(o, microbatch, first + i);
    }
    if (has_head) {
        expect_head();
    }
}

/* ---- gradients and parameters ---- */

enum param_class { DENSE, SUM_OVER_TP, SHARED_OVER_STAGES, EXPERT, NUM_CLASSES };

static int64_t class_elements[NUM_CLASSES]; /* of the bucket that is open; 0: none */

static int64_t round_up(int64_t n, int64_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

static void expect_bucket(const struct options *o, enum param_class kind)
{
    const enum group data = kind == EXPERT ? EDP : DP_CP;
    const int64_t parts = o->use_distributed_optimizer ? z.size[data] : 1;
    const int64_t n = round_up(class_elements[kind], 64 * parts), own = n / parts;

    if (n > 0 && o->use_distributed_optimizer) {
        expect_reduce_scatter(data, own * 4);
        expect_all_gather(data, own * z.act);
    } else if (n > 0) {
        expect_all_reduce(data, n, 4);
    }
    if (n > 0 && kind == SUM_OVER_TP) {
        expect_all_reduce(TP, own, 4);
    } else if (n > 0 && kind == SHARED_OVER_STAGES) {
        expect_all_reduce(EMBEDDING, own, 4);
    }
    class_elements[kind] = 0;
}

/* A class is one bucket, or with the smallest bucket size every parameter is. */
static void add_param(const struct options *o, enum param_class kind, int64_t num_elements)
{
    class_elements[kind] += round_up(num_elements, 64);
    if (o->ddp_bucket_size == 1) {
        expect_bucket(o, kind);
    }
}

static void add_layer_params(const struct options *o)
{
    const enum param_class replicated = z.sp ? SUM_OVER_TP : DENSE;
    const int64_t tp = z.size[TP], share = (int64_t)z.size[EP] * z.size[ETP];

    add_param(o, replicated, z.H);
    add_param(o, DENSE, (z.A + 2 * z.G) * z.D / tp * z.H);
    add_param(o, DENSE, z.H * z.A * z.D / tp);
    add_param(o, replicated, z.H);
    if (z.E == 0) {
        add_param(o, DENSE, 2 * z.F / tp * z.H);
        add_param(o, DENSE, z.H * z.F / tp);
        return;
    }
    add_param(o, replicated, z.E * z.H);
    add_param(o, EXPERT, z.E * 2 * z.F * z.H / share);
    add_param(o, EXPERT, z.E * z.H * z.F / share);
    if (z.shared_ffn > 0) {
        add_param(o, DENSE, 2 * z.shared_ffn / tp * z.H);
        add_param(o, DENSE, z.H * z.shared_ffn / tp);
    }
}

static void expect_parameters(const struct options *o)
{
    const int64_t embedding = z.V / z.size[TP] * z.H;
    const bool is_first = z.place[PP] == 0, is_last = z.place[PP] == z.size[PP] - 1;

    if (is_first) {
        add_param(o, z.tied && !is_last ? SHARED_OVER_STAGES : DENSE, embedding);
    }
    for (int64_t i = 0; i < layers_of_chunk() * z.num_chunks; i++) {
        add_layer_params(o);
    }
    if (is_last) {
        add_param(o, z.sp ? SUM_OVER_TP : DENSE, z.H);
    }
    if (is_last && !(z.tied && is_first)) {
        add_param(o, z.tied ? SHARED_OVER_STAGES : DENSE, embedding);
    }
    for (int kind = 0; kind < NUM_CLASSES; kind++) {
        expect_bucket(o, (enum param_class)kind);
    }
}

/* ---- a step ---- */

static void expect_step(const struct options *o)
{
    memset(expected, 0, sizeof expected);
    for (int64_t microbatch = 0; microbatch < z.M; microbatch++) {
        for (int64_t chunk = 0; chunk < z.num_chunks; chunk++) {
            expect_chunk_microbatch(o, chunk, microbatch);
        }
    }
    expect_parameters(o);
    /* loss, tokens, whether one was NaN, which of four metrics are used */
    expect_all_reduce(DP_CP, 7, 8);
    expect_all_reduce(PP, 7, 8);
    if (o->calculate_per_token_loss) {
        expect_all_reduce(DP_CP, 1, 8);
        expect_all_reduce(PP, 1, 8);
    }
    expect_all_reduce(WORLD, 1, 8); /* gradient norm */
    for (int64_t i = 0; o->moe_router_enable_expert_bias && i < z.L / z.size[PP]; i++) {
        expect_all_reduce(TP_CP, z.E, 4);
        expect_all_reduce(DP, z.E, 4);
    }
}

#endif
