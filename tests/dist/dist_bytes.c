/* What a training step sends: the calls and bytes of every group and kind of collective, on every
 * rank, equal the formulas of docs/parallelism.md. They are computed here from the flags alone, and
 * of rows that travel to experts from a routing computed here. What no formula explains fails: no
 * hidden gather. ranks: 1 2 4 8 */
#include "dist_run.h"
#include "dist_test.h"

#include <string.h>

#include "base/log.h"
#include "data/tokenizer.h"
#include "step_traffic.h"
#include "train/run_data.h"
#include "train/step.h"

static const char base_flags[] =
    "pretrain --num-layers 4 --hidden-size 32 --num-attention-heads 8 --group-query-attention "
    "--num-query-groups 4 --ffn-hidden-size 48 --seq-length 16 --max-position-embeddings 16 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 2 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 120 --make-vocab-size-divisible-by 32 "
    "--eval-iters 0 --device cpu";

static const char moe_flags[] = "--num-experts 8 --moe-router-topk 2 --moe-grouped-gemm "
                                "--moe-router-load-balancing-type aux_loss "
                                "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001";

#define TP2 "--tensor-model-parallel-size 2 --sequence-parallel "
#define TP4 "--tensor-model-parallel-size 4 --sequence-parallel "
#define PP2 "--pipeline-model-parallel-size 2 "
#define CP2 "--context-parallel-size 2 "
#define EP2 "--expert-model-parallel-size 2 "
#define EP4 "--expert-model-parallel-size 4 "
#define ETP1 "--expert-tensor-parallel-size 1 "
#define ETP2 "--expert-tensor-parallel-size 2 "
#define ZERO "--use-distributed-optimizer "
#define OVERLAP "--overlap-grad-reduce --overlap-param-gather "
#define ALLTOALL "--moe-token-dispatcher-type alltoall "
#define SEQ "--moe-token-dispatcher-type alltoall_seq "
/* Tokens choose experts at random, by their number: uneven, and known here. */
#define RANDOM "--moe-router-force-load-balancing "
#define DROP "--moe-expert-capacity-factor 1 "
#define PAD DROP "--moe-pad-expert-input-to-capacity "

struct mapping {
    int ranks; /* what the flags leave of them is data parallel */
    bool moe;
    const char *flags;
};

static const struct mapping mappings[] = {
    {1, true, ""},
    /* gradients and parameters */
    {2, false, ""},
    {4, true, "--untie-embeddings-and-output-weights --calculate-per-token-loss"},
    {4, true, ZERO OVERLAP "--bf16"},
    {2, true, "--overlap-grad-reduce --ddp-bucket-size 1"},
    {4, true, ZERO OVERLAP "--ddp-bucket-size 1 --bf16"},
    {4, true, TP2 ZERO},
    {2, true, "--moe-router-enable-expert-bias --moe-router-score-function sigmoid"},
    {2, true,
     "--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss "
     "--moe-aux-loss-coeff 0.01 0.01 0.01"},
    {4, true,
     TP2 CP2 "--moe-router-load-balancing-type seq_aux_loss global_aux_loss "
             "--moe-aux-loss-coeff 0.01 0.01"},
    /* tensor and sequence parallelism */
    {2, false, "--tensor-model-parallel-size 2"},
    {4, false, "--tensor-model-parallel-size 4 --untie-embeddings-and-output-weights"},
    {2, false, TP2 "--bf16"},
    {4, false, TP4 ZERO OVERLAP},
    {2, false, TP2 "--tp-comm-overlap"},
    {4, true, TP4 "--tp-comm-overlap --moe-shared-expert-intermediate-size 48"},
    {2, false,
     TP2 "--recompute-granularity full --recompute-method block "
         "--recompute-num-layers 3"},
    /* experts */
    {4, true, EP2},
    {2, true, TP2 "--bf16"},
    {4, true, TP2 EP2 "--moe-shared-expert-intermediate-size 48"},
    {4, true, TP2 EP4 ETP1},
    {4, true, TP2 EP2 "--moe-extended-tp"},
    {2, true, ETP2},
    {2, true, EP2 ALLTOALL RANDOM},
    {4, true, EP4 ALLTOALL RANDOM DROP "--bf16"},
    {4, true, EP4 ALLTOALL PAD ZERO OVERLAP},
    {2, true, ETP2 ALLTOALL RANDOM},
    {4, true, EP2 ETP2 ALLTOALL PAD},
    {4, true, TP2 EP2 ALLTOALL RANDOM "--bf16"},
    {4, true, TP4 EP4 ETP1 ALLTOALL RANDOM},
    {4, true, CP2 EP4 ALLTOALL RANDOM},
    {2, true, TP2 ALLTOALL RANDOM "--moe-layer-recompute --moe-shared-expert-intermediate-size 48"},
    {2, true,
     TP2 ALLTOALL RANDOM "--moe-shared-expert-overlap "
                         "--moe-shared-expert-intermediate-size 48"},
    {2, true, EP2 SEQ RANDOM},
    {4, true, TP2 EP2 SEQ RANDOM "--bf16"},
    {4, true, TP2 EP2 SEQ PAD},
    {4, true, TP4 SEQ RANDOM DROP},
    /* the pipeline */
    {2, true, PP2},
    {4, false, PP2 "--bf16 --untie-embeddings-and-output-weights"},
    {4, true, "--pipeline-model-parallel-size 4 --use-distributed-optimizer"},
    {2, true, PP2 "--num-layers-per-virtual-pipeline-stage 1"},
    {4, true, TP2 PP2 ZERO OVERLAP "--num-layers-per-virtual-pipeline-stage 1 --bf16"},
    {8, false, PP2 "--tensor-model-parallel-size 2 --use-tp-pp-dp-mapping"},
    {8, true, TP2 PP2 EP4 ETP1 ALLTOALL RANDOM ZERO OVERLAP},
    {8, true, PP2 EP2 ETP2 SEQ RANDOM "--bf16"},
    /* context parallelism */
    {2, false, CP2},
    {4, true, "--context-parallel-size 4 --bf16"},
    {2, true, CP2 "--cp-comm-type all_gather"},
    {4, false, "--context-parallel-size 4 --cp-comm-type all_gather --bf16"},
    {4, true, CP2 "--cp-comm-type a2a --calculate-per-token-loss"},
    {4, true, TP2 CP2 "--cp-comm-type a2a --reset-attention-mask --bf16"},
    {4, true,
     CP2 PP2 "--cp-comm-type p2p p2p all_gather a2a --recompute-granularity full "
             "--recompute-method uniform --recompute-num-layers 1"},
    {8, true, TP2 CP2 ZERO OVERLAP "--expert-model-parallel-size 8 " ETP1},
    {8, true, TP2 CP2 PP2 EP2 ALLTOALL RANDOM ZERO OVERLAP "--bf16"},
};

/* ---- comparison ---- */

static enum group find_group(const char *name)
{
    for (int group = 0; group < NUM_GROUPS; group++) {
        if (strcmp(name, group_names[group]) == 0) {
            return (enum group)group;
        }
    }
    PANIC("no formula knows group %s", name);
}

static void compare(const struct comm *comm)
{
    const enum group group = find_group(comm->name);

    if (comm->size != z.size[group] || comm->rank != z.place[group]) {
        dist_failed("%s: rank %d of %d, wanted %d of %d", comm->name, comm->rank, comm->size,
                    z.place[group], z.size[group]);
        return;
    }
    for (int kind = 0; kind < NUM_COMM_KINDS; kind++) {
        const struct comm_counter *got = &comm->counters[kind], *wanted = &expected[group][kind];

        if (got->num_calls != wanted->num_calls || got->sent_bytes != wanted->sent_bytes) {
            dist_failed("%s (%d ranks) %s: %lld calls, %lld bytes; wanted %lld, %lld", comm->name,
                        comm->size, comm_kind_name((enum comm_kind)kind), (long long)got->num_calls,
                        (long long)got->sent_bytes, (long long)wanted->num_calls,
                        (long long)wanted->sent_bytes);
        }
    }
}

/* ---- the routing ---- */

/* sample * S + position of token i of this rank: zigzag over CP, then cut over TP. */
static uint64_t token_id(const struct batch *batch, int64_t i)
{
    const int64_t cp = z.size[CP], half = z.S / (2 * cp), own = z.sp ? z.place[TP] * z.t : 0;
    const int64_t s = (own + i) / z.B, b = (own + i) % z.B;
    const int64_t chunk = s < half ? z.place[CP] : 2 * cp - 1 - z.place[CP];

    return (uint64_t)(batch->sample_ids[b] * z.S + chunk * half + s % half);
}

/* --moe-router-force-load-balancing: the K largest of E normal numbers. */
static void route_token(uint64_t seed, uint64_t token, int64_t layer, int32_t *rows)
{
    const struct rng_key key = rng_key(seed, "router_force", (uint64_t)layer);
    double logits[EXPERTS];

    for (int64_t e = 0; e < z.E; e++) {
        logits[e] = rng_normal(key, token, (uint64_t)e);
    }
    for (int64_t k = 0; k < z.K; k++) {
        int64_t best = 0;

        for (int64_t e = 1; e < z.E; e++) {
            best = logits[e] > logits[best] ? e : best;
        }
        rows[best]++;
        logits[best] = -INFINITY;
    }
}

static void route_microbatch(const struct options *o, const struct batch *batch,
                             int32_t rows[LAYERS][EXPERTS])
{
    for (int64_t layer = 0; layer < z.L; layer++) {
        for (int64_t i = 0; i < z.t; i++) {
            route_token((uint64_t)o->seed, token_id(batch, i), layer, rows[layer]);
        }
        for (int64_t e = 0; e < z.E && z.capacity > 0; e++) {
            rows[layer][e] = o->moe_pad_expert_input_to_capacity || rows[layer][e] > z.capacity
                                 ? (int32_t)z.capacity
                                 : rows[layer][e];
        }
    }
}

/* Fills all_rows for the second step. */
static int route(const struct options *o, struct loader *loader, struct comm *world)
{
    int64_t num_rows = (int64_t)(sizeof(row_table) / sizeof(int32_t));
    struct tensor own = tensor_new(arena, DTYPE_I32, num_rows);
    struct tensor all = tensor_new(arena, DTYPE_I32, world->size * num_rows);
    row_table *rows = own.data;
    const struct batch *batch;

    memset(rows, 0, sizeof *rows);
    for (int64_t i = 0; i < 2 * z.M; i++) {
        TRY(loader_next(loader, &batch));
        if (i >= z.M) {
            route_microbatch(o, batch, (*rows)[i - z.M]);
        }
    }
    comm_wait(comm_all_gather(world, stream, &all, &own), stream);
    all_rows = all.data;
    return 0;
}

/* ---- runs ---- */

static int open_loader(struct run_data *data, const struct options *options)
{
    const struct run_data_request request = {
        .options = options, .data_parallel_rank = z.place[DP], .num_iterations = 2};

    TRY(run_data_open_tokenizer(data, options));
    TRY(run_data_open_sets(data, &request));
    return run_data_open_loaders(data, &request);
}

static int count_second_step(struct trainer *trainer, const struct options *options)
{
    struct run_data data, same_data;
    struct step_result result;

    TRY(open_loader(&data, options));
    TRY(open_loader(&same_data, options));
    TRY(route(options, same_data.train, trainer->groups.world));
    TRY(train_step(trainer, data.train, &result));
    groups_reset_counters(&trainer->groups);
    TRY(train_step(trainer, data.train, &result));
    run_data_close(&data);
    run_data_close(&same_data);
    return 0;
}

static int run_mapping(const struct mapping *mapping, struct options *options)
{
    struct trainer trainer;

    TRY(dist_parse(options, base_flags, mapping->moe ? moe_flags : "", mapping->flags));
    CHECK(options->num_experts == 0 || options->moe_router_force_load_balancing ||
              options->moe_pad_expert_input_to_capacity ||
              strcmp(options->moe_token_dispatcher_type, "allgather") == 0,
          "the routing must be known: %s", mapping->flags);
    set_sizes(options);
    TRY(trainer_create(&trainer, options, options->vocab_size, device_cpu(), ops_cpu(),
                       &(struct trainer_memory){0}));
    TRY(count_second_step(&trainer, options));
    expect_step(options);
    for (int i = 0; i < groups_num_comms(); i++) {
        compare(groups_comm(&trainer.groups, i));
    }
    trainer_destroy(&trainer);
    return 0;
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);

    log_configure(false);
    for (size_t i = 0; i < sizeof mappings / sizeof mappings[0]; i++) {
        struct options options;
        const int before = num_failures;

        if (size != mappings[i].ranks) {
            continue;
        }
        dist_judge(run_mapping(&mappings[i], &options), before, mappings[i].flags);
        options_free(&options);
        dist_release();
    }
    return dist_end();
}
