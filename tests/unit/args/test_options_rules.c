/* Each rule that joins several flags: reference/megatron.md section 4.5 (M4.5.n) and its kin. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <unistd.h>

#include "base/log.h"
#include "options_case.h"

static void accepted(const char *line, int world_size)
{
    struct options o;

    case_valid(&o, line, world_size);
    options_free(&o);
}

static void ranks_must_be_a_multiple_of_the_model(void **state) /* M4.5.1 */
{
    case_error(BASE_FLAGS "--tensor-model-parallel-size 2", 1,
               "world size (1) is not divisible by total_model_size 2");
    case_error(BASE_FLAGS "--tensor-model-parallel-size 2", 1, "mpirun -n 2 cadre pretrain");
    case_error(BASE_FLAGS "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                          "--context-parallel-size 2",
               12,
               "world size (12) is not divisible by total_model_size 8 "
               "(--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2 x "
               "--context-parallel-size 2)");
    accepted(BASE_FLAGS "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                        "--context-parallel-size 2",
             16);
}

static void the_grids_are_derived(void **state)
{
    struct options o;

    case_valid(&o,
               MOE_FLAGS "--tensor-model-parallel-size 2 --sequence-parallel "
                         "--pipeline-model-parallel-size 2 --context-parallel-size 2 "
                         "--expert-model-parallel-size 4",
               64);
    assert_int_equal(o.data_parallel_size, 8);
    assert_int_equal(o.expert_tensor_parallel_size, 2);
    assert_int_equal(o.expert_data_parallel_size, 4);
    assert_int_equal(o.global_batch_size, 16);
    options_free(&o);
    case_valid(&o,
               MOE_FLAGS "--tensor-model-parallel-size 4 --sequence-parallel "
                         "--expert-model-parallel-size 8 --expert-tensor-parallel-size 1",
               8); /* experts over more ranks than data parallelism has */
    assert_int_equal(o.data_parallel_size, 2);
    assert_int_equal(o.expert_data_parallel_size, 1);
    options_free(&o);
}

static void every_mapping_up_to_64_ranks_is_judged_by_divisibility(void **state)
{
    for (int world = 1; world <= 64; world++) {
        for (int ep = 1; ep <= 8; ep *= 2) {
            for (int pp = 1; pp <= 4; pp++) {
                struct options o;
                char line[1024];
                const bool legal = world % pp == 0 && world % (ep * pp) == 0 && 8 % pp == 0;

                snprintf(line, sizeof line,
                         MOE_FLAGS "--expert-model-parallel-size %d --pipeline-model-parallel-size "
                                   "%d",
                         ep, pp);
                assert_int_equal(case_parse(&o, line), 0);
                if ((options_validate(&o, world) == 0) != legal) {
                    fail_msg("world %d ep %d pp %d: %s", world, ep, pp, error_text());
                }
                options_free(&o);
            }
        }
    }
}

static void batches_are_whole_microbatches(void **state) /* M4.5.2 */
{
    struct options o;

    case_error(MODEL_FLAGS "--train-iters 1 --lr 1 --mock-data --vocab-size 9", 1,
               "missing: --micro-batch-size");
    case_error(BASE_FLAGS "--micro-batch-size 0", 1, "--micro-batch-size 0: must be an integer");
    case_error(BASE_FLAGS "--global-batch-size 10", 2,
               "global batch size (10) is not divisible by micro batch size (2) times data "
               "parallel size (2): legal are multiples of 4");
    case_error(BASE_FLAGS "--global-batch-size 2 --decrease-batch-size-if-needed", 2,
               "global batch size (2)");
    accepted(BASE_FLAGS "--global-batch-size 10 --decrease-batch-size-if-needed", 2);
    case_valid(&o, BASE_FLAGS, 1);
    assert_int_equal(o.global_batch_size, 2);
    options_free(&o);
}

#define SAMPLES_FLAGS                                                                              \
    MODEL_FLAGS "--micro-batch-size 2 --train-samples 100 --lr 1e-3 --mock-data --vocab-size 9 "

static void the_ramp_goes_in_whole_steps(void **state)
{
    case_error(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 4 2", 1, "has 2 values");
    case_error(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 4 3 10", 1,
               "--rampup-batch-size 4 3 10: the start must be");
    case_error(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 10 2 10", 1,
               "at most --global-batch-size 8");
    case_error(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 4 0 10", 1, "4 0 10");
    case_error(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 3 5 10", 1,
               "start (3) is not divisible");
    case_error(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 2 3 10", 1,
               "increment (3) is not divisible");
    accepted(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 2 3 10 "
                           "--decrease-batch-size-if-needed",
             1);
    accepted(SAMPLES_FLAGS "--global-batch-size 8 --rampup-batch-size 4 2 10", 1);
}

static void interleaving_needs_stages_and_even_chunks(void **state) /* M4.5.3 */
{
    struct options o;

    case_error(BASE_FLAGS "--num-layers-per-virtual-pipeline-stage 2", 1,
               "--pipeline-model-parallel-size 1: when interleaved schedule is used, "
               "pipeline-model-parallel size should be greater than 1");
    case_error(BASE_FLAGS "--num-layers-per-virtual-pipeline-stage 2 "
                          "--pipeline-model-parallel-size 2 --no-overlap-p2p-communication",
               2, "should be greater than 2 with --no-overlap-p2p-communication");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 3", 3,
               "--num-layers 8 is not divisible by --pipeline-model-parallel-size 3: for 8, legal "
               "are 1, 2, 4, 8");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 "
                          "--num-layers-per-virtual-pipeline-stage 3",
               2,
               "number of layers per pipeline stage 4 is not divisible by "
               "--num-layers-per-virtual-pipeline-stage 3: for 4, legal are 1, 2, 4");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 "
                          "--num-virtual-stages-per-pipeline-rank 3",
               2, "--num-virtual-stages-per-pipeline-rank 3");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 "
                          "--num-virtual-stages-per-pipeline-rank 2 "
                          "--num-layers-per-virtual-pipeline-stage 2",
               2, "say the same thing");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 --global-batch-size 6 "
                          "--num-layers-per-virtual-pipeline-stage 2",
               2,
               "number of microbatches (3) is not divisible by --pipeline-model-parallel-size (2) "
               "when using interleaved schedule: global batch size 6; legal are multiples of 4");
    case_valid(&o,
               BASE_FLAGS "--pipeline-model-parallel-size 2 --global-batch-size 8 "
                          "--num-layers-per-virtual-pipeline-stage 1",
               2);
    assert_int_equal(o.virtual_pipeline_size, 4);
    options_free(&o);
    case_valid(&o,
               BASE_FLAGS "--pipeline-model-parallel-size 2 --global-batch-size 6 "
                          "--num-layers-per-virtual-pipeline-stage 4",
               2); /* one chunk: like no interleaving */
    assert_int_equal(o.virtual_pipeline_size, 1);
    options_free(&o);
}

static void one_chunk_on_a_stage_is_legal_everywhere(void **state) /* M4.5.23 */
{
    static const char *const flags[] = {
        "--num-virtual-stages-per-pipeline-rank 1", "--num-layers-per-virtual-pipeline-stage 8",
        "--num-virtual-stages-per-pipeline-rank 1 --no-overlap-p2p-communication"};

    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        struct options o;
        char line[1024];

        snprintf(line, sizeof line, BASE_FLAGS "--global-batch-size 6 %s", flags[i]);
        case_valid(&o, line, 1);
        assert_int_equal(o.virtual_pipeline_size, 1);
        options_free(&o);
    }
}

#define INTERLEAVED_FLAGS                                                                          \
    "--num-layers 8 --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 "

static void groups_of_microbatches_keep_all_stages_busy(void **state) /* section 5.5, HEAD */
{
    struct options o;

    case_error(BASE_FLAGS INTERLEAVED_FLAGS
               "--global-batch-size 16 --microbatch-group-size-per-virtual-pipeline-stage 3",
               4,
               "--microbatch-group-size-per-virtual-pipeline-stage 3: must be at least "
               "--pipeline-model-parallel-size 4");
    case_error(BASE_FLAGS INTERLEAVED_FLAGS
               "--global-batch-size 16 --microbatch-group-size-per-virtual-pipeline-stage 9",
               4, "number of microbatches (8, of global batch size 16) in groups of 9");
    case_error(BASE_FLAGS INTERLEAVED_FLAGS
               "--global-batch-size 16 --microbatch-group-size-per-virtual-pipeline-stage 5",
               4, "must be at least one group, and leave none or at least 4");
    accepted(BASE_FLAGS INTERLEAVED_FLAGS
             "--global-batch-size 18 --microbatch-group-size-per-virtual-pipeline-stage 5",
             4);
    case_valid(&o, BASE_FLAGS INTERLEAVED_FLAGS "--global-batch-size 16", 4);
    assert_int_equal(o.microbatch_group_size_per_virtual_pipeline_stage, 4);
    options_free(&o);
    case_error(SAMPLES_FLAGS INTERLEAVED_FLAGS "--global-batch-size 16 --rampup-batch-size 8 4 10",
               4, "number of microbatches (6) is not divisible"); /* on the way up */
    accepted(SAMPLES_FLAGS INTERLEAVED_FLAGS "--global-batch-size 16 --rampup-batch-size 8 8 10",
             4);
}

static void the_first_and_last_stage_may_differ(void **state) /* section 5.6 */
{
    case_error(BASE_FLAGS "--decoder-first-pipeline-num-layers 2", 1,
               "--decoder-first-pipeline-num-layers 2 needs --pipeline-model-parallel-size above "
               "1");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1",
               4,
               "--num-layers 8 - 1 (--decoder-first-pipeline-num-layers) - 0 "
               "(--decoder-last-pipeline-num-layers) leaves 7 layers for the 3 other stages of "
               "--pipeline-model-parallel-size 4: must be a positive multiple of 3");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 8",
               2, "leaves 0 layers for the 1 other stages");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 3 "
                          "--decoder-first-pipeline-num-layers 4",
               2,
               "leaves 1 layers for the 0 other stages of --pipeline-model-parallel-size 2: "
               "must be 0");
    accepted(BASE_FLAGS "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 3 "
                        "--decoder-first-pipeline-num-layers 5",
             2);
    accepted(BASE_FLAGS "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 3 "
                        "--decoder-last-pipeline-num-layers 1",
             3);
    accepted(BASE_FLAGS "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2",
             4);
}

static void stages_of_different_size_are_interleaved_by_their_number_of_chunks(void **state)
{
    struct options o;

    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 2 "
                          "--num-layers-per-virtual-pipeline-stage 2",
               2, "need --num-virtual-stages-per-pipeline-rank instead");
    case_error(BASE_FLAGS "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 3 "
                          "--num-virtual-stages-per-pipeline-rank 2",
               2, "number of layers per pipeline stage 5 is not divisible by");
    case_error(BASE_FLAGS "--num-layers 9 --pipeline-model-parallel-size 2 "
                          "--decoder-last-pipeline-num-layers 3 "
                          "--num-virtual-stages-per-pipeline-rank 2",
               2, "number of layers per pipeline stage 3 is not divisible by");
    case_valid(&o,
               BASE_FLAGS "--global-batch-size 4 --pipeline-model-parallel-size 2 "
                          "--decoder-last-pipeline-num-layers 2 "
                          "--num-virtual-stages-per-pipeline-rank 2",
               2);
    assert_int_equal(o.virtual_pipeline_size, 2);
    options_free(&o);
}

static void context_parallel_exchange_is_one_type_or_one_a_layer(void **state) /* section 7 */
{
    struct options o;

    case_error(BASE_FLAGS "--context-parallel-size 2 --cp-comm-type a2a+p2p", 2,
               "--cp-comm-type a2a+p2p: context parallelism has one level in cadre; must be p2p, "
               "all_gather or a2a");
    case_error(BASE_FLAGS "--context-parallel-size 2 --cp-comm-type ring", 2,
               "--cp-comm-type ring: must be p2p, all_gather or a2a");
    case_error(BASE_FLAGS "--cp-comm-type p2p a2a", 2,
               "--cp-comm-type has 2 values: must be one, or --num-layers 8");
    case_valid(&o, BASE_FLAGS "--context-parallel-size 2", 2);
    assert_string_equal(options_cp_comm_type(&o, 7), "p2p");
    options_free(&o);
    case_valid(&o,
               BASE_FLAGS "--num-layers 3 --context-parallel-size 2 --cp-comm-type a2a allgather "
                          "all_gather",
               2);
    assert_string_equal(options_cp_comm_type(&o, 0), "a2a");
    assert_string_equal(options_cp_comm_type(&o, 1), "all_gather");
    assert_string_equal(options_cp_comm_type(&o, 2), "all_gather");
    options_free(&o);
}

static void a2a_deals_out_whole_heads(void **state)
{
    case_error(BASE_FLAGS "--context-parallel-size 2 --tensor-model-parallel-size 8 "
                          "--sequence-parallel --cp-comm-type a2a",
               16,
               "--cp-comm-type a2a: --num-attention-heads / --tensor-model-parallel-size 1 is not "
               "divisible by --context-parallel-size 2: for 1, legal are 1");
    case_error(BASE_FLAGS "--group-query-attention --num-query-groups 2 --context-parallel-size 4 "
                          "--cp-comm-type a2a",
               4,
               "--num-query-groups / --tensor-model-parallel-size 2 is not divisible by "
               "--context-parallel-size 4: for 2, legal are 1, 2");
    accepted(BASE_FLAGS "--group-query-attention --num-query-groups 2 --context-parallel-size 4",
             4);
    accepted(BASE_FLAGS "--context-parallel-size 2 --tensor-model-parallel-size 4 "
                        "--sequence-parallel --cp-comm-type a2a",
             8);
}

static void overlapped_tensor_exchange_needs_sequence_parallelism(void **state)
{
    case_error(BASE_FLAGS "--tensor-model-parallel-size 2 --tp-comm-overlap", 2,
               "add --sequence-parallel");
    accepted(BASE_FLAGS "--tensor-model-parallel-size 2 --tp-comm-overlap --sequence-parallel", 2);
}

static void deadlines_may_be_fractions_of_a_minute(void **state)
{
    struct options o;

    case_error(BASE_FLAGS "--distributed-timeout-minutes 0", 1,
               "--distributed-timeout-minutes 0: must be a number above 0");
    case_valid(&o, BASE_FLAGS "--distributed-timeout-minutes 0.05", 1);
    assert_true(o.distributed_timeout_minutes == 0.05);
    options_free(&o);
    case_valid(&o, BASE_FLAGS, 1);
    assert_true(o.distributed_timeout_minutes == 10.0);
    options_free(&o);
}

static void overlapped_gather_needs_its_parts(void **state) /* M4.5.4 */
{
    case_error(BASE_FLAGS "--overlap-param-gather", 1,
               "--overlap-param-gather only supported with distributed optimizer");
    case_error(BASE_FLAGS "--overlap-param-gather --use-distributed-optimizer", 1,
               "--overlap-param-gather needs --overlap-grad-reduce");
    accepted(BASE_FLAGS "--overlap-param-gather --use-distributed-optimizer --overlap-grad-reduce",
             1);
}

static void fp16_is_refused(void **state) /* M4.5.5 */
{
    case_error(BASE_FLAGS "--bf16 --fp16", 1, "--fp16 is not built in cadre");
    accepted(BASE_FLAGS "--bf16", 1);
}

static void iterations_and_samples_do_not_mix(void **state) /* M4.5.6 */
{
    static const char *const iteration_flags[] = {
        "--lr-decay-iters 5", "--lr-warmup-iters 1",
        "--lr-decay-style WSD --lr-wsd-decay-samples 5 --lr-wsd-decay-iters 5"};
    static const char *const sample_flags[] = {"--lr-decay-samples 5", "--lr-warmup-samples 1",
                                               "--lr-wsd-decay-samples 5",
                                               "--rampup-batch-size 2 2 2"};
    char line[1024];

    for (size_t i = 0; i < sizeof iteration_flags / sizeof iteration_flags[0]; i++) {
        snprintf(line, sizeof line, SAMPLES_FLAGS "%s", iteration_flags[i]);
        case_error(line, 1, "cannot be used with --train-samples");
    }
    for (size_t i = 0; i < sizeof sample_flags / sizeof sample_flags[0]; i++) {
        snprintf(line, sizeof line, BASE_FLAGS "%s", sample_flags[i]);
        case_error(line, 1, "cannot be used with --train-iters");
    }
    case_error(BASE_FLAGS "--train-samples 10", 1, "--train-iters 10 and --train-samples 10");
    case_error(MODEL_FLAGS "--micro-batch-size 2 --lr 1 --mock-data --vocab-size 9", 1,
               "missing: --train-iters or --train-samples");
    case_error(BASE_FLAGS "--lr-warmup-fraction 0.1 --lr-warmup-iters 2", 1,
               "--lr-warmup-fraction 0.1 and --lr-warmup-iters 2: give one");
    case_error(SAMPLES_FLAGS "--lr-warmup-fraction 0.1 --lr-warmup-samples 2", 1,
               "--lr-warmup-fraction 0.1 and --lr-warmup-samples 2: give one");
    accepted(BASE_FLAGS "--lr-warmup-fraction 0.1", 1);
    accepted(SAMPLES_FLAGS "--lr-warmup-iters 0 --lr-warmup-samples 3", 1);
    accepted(MODEL_FLAGS "--micro-batch-size 2 --skip-train --mock-data --vocab-size 9", 1);
}

static void the_sizes_of_the_model_are_required(void **state) /* M4.5.7 */
{
    case_error("--hidden-size 64 --seq-length 8", 1,
               "missing: --num-layers --num-attention-heads --max-position-embeddings (or");
    case_error("", 1, "missing: --num-layers --hidden-size --num-attention-heads --seq-length");
}

static void sizes_are_derived(void **state) /* M4.5.8 */
{
    struct options o;

    case_valid(&o, BASE_FLAGS, 1);
    assert_int_equal(o.ffn_hidden_size, 256);
    assert_int_equal(o.kv_channels, 8);
    assert_int_equal(o.num_query_groups, 8);
    assert_int_equal(o.lr_decay_iters, 10);
    assert_true(o.start_weight_decay == 0.01 && o.end_weight_decay == 0.01);
    options_free(&o);
    case_valid(&o, BASE_FLAGS "--swiglu --hidden-size 4096 --group-query-attention", 1);
    assert_int_equal(o.ffn_hidden_size, 10880); /* int(16384 * 2/3 / 64) * 64 */
    assert_int_equal(o.num_query_groups, 1);
    options_free(&o);
    case_error(BASE_FLAGS "--num-attention-heads 5", 1,
               "--hidden-size 64 is not divisible by --num-attention-heads 5: for 64, legal are 1, "
               "2, 4, 8, 16, 32, 64");
    assert_null(strstr(error_text(), "..."));
    case_error(BASE_FLAGS "--hidden-size 720720 --num-attention-heads 17", 1, "72, 77, 78, 80, ");
    assert_non_null(strstr(error_text(), ", ..."));
    accepted(BASE_FLAGS "--num-attention-heads 5 --kv-channels 16", 1);
    case_error(BASE_FLAGS "--group-query-attention --num-query-groups 3", 1,
               "--num-attention-heads 8 is not divisible by --num-query-groups 3");
    case_error(BASE_FLAGS "--hidden-size 8 --swiglu", 1, "too small to derive --ffn-hidden-size");
}

static void context_parallelism_cuts_the_sequence_in_2cp(void **state) /* M4.5.9 */
{
    case_error(BASE_FLAGS "--context-parallel-size 2 --seq-length 30", 2,
               "--seq-length 30 should be a multiple of 2 * context-parallel-size if "
               "context-parallel-size > 1: --context-parallel-size 2 needs a multiple of 4");
    accepted(BASE_FLAGS "--context-parallel-size 2", 2);
    accepted(BASE_FLAGS "--seq-length 31", 1);
}

static void positions_cover_the_sequence(void **state) /* M4.5.10 */
{
    case_error(BASE_FLAGS "--seq-length 65", 1,
               "--max-position-embeddings 64 is less than --seq-length 65");
}

static void rates_and_intervals_fit(void **state) /* M4.5.11 */
{
    case_error(BASE_FLAGS "--min-lr 0.5", 1, "--min-lr 0.5 is more than --lr 0.001");
    case_error(BASE_FLAGS "--lr-warmup-init 0.5", 1, "--lr-warmup-init 0.5 is more than --lr");
    case_error(MODEL_FLAGS "--micro-batch-size 2 --train-iters 1 --mock-data --vocab-size 9", 1,
               "missing: --lr");
    case_error(BASE_FLAGS "--save /tmp/x", 1, "--save /tmp/x needs --save-interval");
    accepted(BASE_FLAGS "--save /tmp/x --save-interval 5", 1);
    case_error(BASE_FLAGS "--lr-warmup-iters 10", 1,
               "--lr-warmup-iters 10: must be less than --lr-decay-iters 10");
    case_error(SAMPLES_FLAGS "--lr-warmup-samples 100", 1, "must be less than --lr-decay-samples");
}

static void wsd_needs_the_length_of_its_tail(void **state)
{
    case_error(BASE_FLAGS "--lr-decay-style WSD", 1,
               "--lr-decay-style WSD needs --lr-wsd-decay-iters from 1 to --lr-decay-iters 10");
    case_error(BASE_FLAGS "--lr-decay-style WSD --lr-wsd-decay-iters 11", 1, "found 11");
    accepted(BASE_FLAGS "--lr-decay-style WSD --lr-wsd-decay-iters 10", 1);
}

static void weight_decay_changes_between_two_values(void **state)
{
    struct options o;

    case_error(BASE_FLAGS "--start-weight-decay 0.1", 1,
               "--start-weight-decay needs --weight-decay-incr-style linear or cosine");
    case_error(BASE_FLAGS "--weight-decay-incr-style linear --start-weight-decay 0", 1,
               "--weight-decay-incr-style linear needs --start-weight-decay and");
    case_error(BASE_FLAGS "--weight-decay-incr-style cosine --start-weight-decay 1 "
                          "--end-weight-decay 0.5",
               1, "--start-weight-decay 1 is more than --end-weight-decay 0.5");
    case_valid(&o,
               BASE_FLAGS "--weight-decay-incr-style cosine --start-weight-decay 0 "
                          "--end-weight-decay 0.5",
               1);
    assert_true(o.start_weight_decay == 0.0 && o.end_weight_decay == 0.5);
    options_free(&o);
}

static void one_side_wins_over_the_schedule(void **state)
{
    case_error(BASE_FLAGS "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler", 1,
               "give one");
}

static void sequence_parallelism_is_off_with_one_tensor_rank(void **state) /* M4.5.13 */
{
    struct options o;

    case_valid(&o, BASE_FLAGS "--sequence-parallel", 1);
    assert_false(o.sequence_parallel);
    options_free(&o);
    case_valid(&o, BASE_FLAGS "--sequence-parallel --tensor-model-parallel-size 2", 2);
    assert_true(o.sequence_parallel);
    options_free(&o);
}

static void old_position_flags_mean_rope(void **state) /* M4.5.14 */
{
    struct options o;

    case_error(BASE_FLAGS "--no-position-embedding", 1,
               "--no-position-embedding is deprecated, use --position-embedding-type");
    accepted(BASE_FLAGS "--no-position-embedding --position-embedding-type rope", 1);
    case_valid(&o, BASE_FLAGS "--use-rotary-position-embeddings --no-position-embedding", 1);
    assert_string_equal(o.position_embedding_type, "rope");
    options_free(&o);
    case_error(BASE_FLAGS "--position-embedding-type rope --rotary-percent 0.4", 1,
               "--rotary-percent 0.4 of a head of 8 (--kv-channels) is 3: must be even");
    accepted(BASE_FLAGS "--position-embedding-type rope --rotary-interleaved", 1);
}

static void aliases_fold_into_their_flag(void **state)
{
    struct options o;

    case_valid(&o,
               "--encoder-num-layers 4 --encoder-seq-length 16 --hidden-size 64 "
               "--num-attention-heads 8 --max-position-embeddings 64 --micro-batch-size 1 "
               "--train-iters 1 --lr 1 --mock-data --vocab-size 9",
               1);
    assert_int_equal(o.num_layers, 4);
    assert_int_equal(o.seq_length, 16);
    assert_string_equal(o.tokenizer_type, "NullTokenizer");
    options_free(&o);
    case_error(BASE_FLAGS "--encoder-num-layers 4", 1,
               "--num-layers 8 and --encoder-num-layers 4 are the same thing");
    case_error(BASE_FLAGS "--encoder-seq-length 4", 1,
               "--seq-length 32 and --encoder-seq-length 4 are the same thing");
}

static void a_layer_has_one_activation_and_1p_needs_layernorm(void **state)
{
    case_error(BASE_FLAGS "--swiglu --squared-relu", 1, "--swiglu and --squared-relu");
    case_error(BASE_FLAGS "--normalization RMSNorm --apply-layernorm-1p", 1,
               "--apply-layernorm-1p needs --normalization LayerNorm, found RMSNorm");
}

static void zero_experts_is_a_dense_model(void **state) /* M4.5.15 */
{
    struct options o;
    bool is_moe[8];

    case_valid(&o, BASE_FLAGS "--num-experts 0 --moe-layer-freq 3", 1);
    assert_int_equal(o.num_experts, 0);
    assert_int_equal(options_moe_layer_pattern(&o, is_moe), 0);
    assert_false(is_moe[0]);
    options_free(&o);
}

static void experts_divide_over_their_ranks(void **state) /* M4.5.16 */
{
    case_error(BASE_FLAGS "--expert-model-parallel-size 2", 2,
               "--expert-model-parallel-size 2 needs --num-experts");
    case_error(MOE_FLAGS "--expert-model-parallel-size 3", 3,
               "--num-experts 8 is not divisible by --expert-model-parallel-size 3: for 8, legal "
               "are 1, 2, 4, 8");
    case_error(MOE_FLAGS "--expert-model-parallel-size 8", 4,
               "world size (4), data_parallel_size (4): not divisible by the experts' ranks, 8");
    accepted(MOE_FLAGS "--expert-model-parallel-size 8", 8);
    case_error(BASE_FLAGS "--num-experts -1", 1, "--num-experts -1: must be an integer from 0");
}

static void upcycling_needs_both_ends(void **state) /* M4.5.17 */
{
    struct options o;

    case_error(MOE_FLAGS "--moe-use-upcycling", 1, "the --save option must be specified");
    case_error(MOE_FLAGS "--moe-use-upcycling --save a --save-interval 1", 1,
               "--load must name the dense checkpoint");
    case_error(BASE_FLAGS "--moe-use-upcycling --save a --save-interval 1 --load b", 1,
               "--moe-use-upcycling needs --num-experts");
    case_valid(&o, MOE_FLAGS "--moe-use-upcycling --save a --save-interval 1 --load b", 1);
    assert_false(o.load_optim);
    assert_false(o.load_rng);
    assert_int_equal(o.moe_ffn_hidden_size, 256);
    options_free(&o);
}

#define UPCYCLING_FLAGS MOE_FLAGS "--moe-use-upcycling --save a --save-interval 1 --load b "

static void granular_upcycling_cuts_the_dense_layer(void **state)
{
    struct options o;

    case_valid(&o, UPCYCLING_FLAGS "--moe-upcycling-granularity 4", 1);
    assert_int_equal(o.moe_ffn_hidden_size, 64);
    options_free(&o);
    case_error(UPCYCLING_FLAGS "--moe-upcycling-granularity 3", 1,
               "--ffn-hidden-size 256 is not divisible by --moe-upcycling-granularity 3");
    case_error(UPCYCLING_FLAGS "--moe-upcycling-granularity 16", 1,
               "--num-experts 8 is not divisible by --moe-upcycling-granularity 16");
    case_error(UPCYCLING_FLAGS "--moe-upcycling-granularity 2 --moe-ffn-hidden-size 100", 1,
               "--moe-ffn-hidden-size 100: must be --ffn-hidden-size 256 / ");
}

static void the_other_rank_order_has_limits(void **state) /* M4.5.18 */
{
    case_error(MOE_FLAGS "--use-tp-pp-dp-mapping --expert-model-parallel-size 2", 2,
               "--use-tp-pp-dp-mapping can't be used with context or expert parallelism: "
               "--context-parallel-size 1, --expert-model-parallel-size 2");
    case_error(BASE_FLAGS "--use-tp-pp-dp-mapping --context-parallel-size 2", 2,
               "--context-parallel-size 2, --expert-model-parallel-size 1");
    case_error(MOE_FLAGS "--use-tp-pp-dp-mapping --tensor-model-parallel-size 2 "
                         "--sequence-parallel --expert-tensor-parallel-size 1",
               2, "needs --expert-tensor-parallel-size 1 to equal");
    accepted(BASE_FLAGS "--use-tp-pp-dp-mapping --pipeline-model-parallel-size 2", 4);
}

#define NO_DATA_FLAGS                                                                              \
    MODEL_FLAGS "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --vocab-size 100 "

static void there_is_one_source_of_data(void **state) /* M4.5.19 */
{
    struct options o;

    case_error(NO_DATA_FLAGS, 1, "a single data source must be provided, found 0");
    case_error(BASE_FLAGS "--data-path x", 1,
               "a single data source must be provided, found 2: --data-path --mock-data");
    case_error(NO_DATA_FLAGS "--data-path x --train-data-path y", 1,
               "found 2: --data-path --train");
    case_error(NO_DATA_FLAGS "--valid-data-path y", 1, "missing: --train-data-path");
    case_error(NO_DATA_FLAGS "--train-data-path y --split 1,1,1", 1, "--split 1,1,1 needs");
    case_valid(&o, NO_DATA_FLAGS "--data-path x", 1);
    assert_string_equal(o.split, "969, 30, 1");
    options_free(&o);
    case_valid(&o, NO_DATA_FLAGS "--data-path x --split 8,1,1", 1);
    assert_string_equal(o.split, "8,1,1");
    options_free(&o);
    accepted(NO_DATA_FLAGS "--train-data-path a --valid-data-path b --test-data-path c", 1);
}

static void tokenizers_have_what_they_need(void **state)
{
    static const char flags[] = MODEL_FLAGS "--micro-batch-size 2 --train-iters 10 --lr 1e-3 "
                                            "--mock-data ";
    char line[1024];

    snprintf(line, sizeof line, "%s", flags);
    case_error(line, 1, "missing: --tokenizer-type");
    snprintf(line, sizeof line, "%s--tokenizer-type Llama2Tokenizer", flags);
    case_error(line, 1, "--tokenizer-type Llama2Tokenizer needs --tokenizer-model");
    snprintf(line, sizeof line, "%s--tokenizer-type NullTokenizer", flags);
    case_error(line, 1, "--tokenizer-type NullTokenizer needs --vocab-size");
    snprintf(line, sizeof line, "%s--tokenizer-type GPT2BPETokenizer", flags);
    case_error(line, 1, "must be one of Llama2Tokenizer, SentencePieceTokenizer");
}

static void tensor_ranks_divide_heads_and_widths(void **state) /* M4.5.20 */
{
    case_error(BASE_FLAGS "--tensor-model-parallel-size 3", 3,
               "--num-attention-heads 8 is not divisible by --tensor-model-parallel-size 3: for 8, "
               "legal are 1, 2, 4, 8");
    case_error(BASE_FLAGS "--tensor-model-parallel-size 4 --group-query-attention "
                          "--num-query-groups 2",
               4,
               "--num-query-groups 2 is not divisible by --tensor-model-parallel-size 4: for 2, "
               "legal are 1, 2");
    case_error(BASE_FLAGS "--tensor-model-parallel-size 4 --ffn-hidden-size 6", 4,
               "--ffn-hidden-size 6 is not divisible");
    case_error(BASE_FLAGS "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 30", 4,
               "--seq-length / --context-parallel-size 30 is not divisible");
    accepted(BASE_FLAGS "--tensor-model-parallel-size 4 --seq-length 30", 4);
    case_error(MOE_FLAGS "--tensor-model-parallel-size 2 --sequence-parallel "
                         "--moe-ffn-hidden-size 33",
               2, "--moe-ffn-hidden-size 33 is not divisible by --expert-tensor-parallel-size 2");
    case_error(MOE_FLAGS "--tensor-model-parallel-size 2 --sequence-parallel "
                         "--moe-shared-expert-intermediate-size 33",
               2, "--moe-shared-expert-intermediate-size 33 is not divisible");
}

static void tensor_and_expert_ranks_need_sequence_parallelism(void **state) /* M4.5.20 */
{
    case_error(MOE_FLAGS "--tensor-model-parallel-size 2 --expert-model-parallel-size 2", 4,
               "when using expert parallelism and tensor parallelism, sequence parallelism must "
               "be used");
    accepted(MOE_FLAGS "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
                       "--sequence-parallel",
             4);
}

static void expert_biases_need_whole_experts(void **state) /* M4.5.23 */
{
    case_error(BASE_FLAGS "--num-experts 8 --tensor-model-parallel-size 2 --sequence-parallel", 2,
               "--expert-tensor-parallel-size 2: biases in experts are only supported with 1");
    accepted(BASE_FLAGS "--num-experts 8 --tensor-model-parallel-size 2 --sequence-parallel "
                        "--expert-tensor-parallel-size 1",
             2);
}

static void extended_tp_shards_every_expert(void **state) /* M4.5.20 */
{
    case_error(MOE_FLAGS "--moe-extended-tp --moe-token-dispatcher-type alltoall", 1,
               "--moe-extended-tp only works with --moe-token-dispatcher-type allgather, found "
               "alltoall");
    case_error(MOE_FLAGS "--moe-extended-tp --expert-model-parallel-size 4 "
                         "--moe-ffn-hidden-size 6",
               4, "--moe-ffn-hidden-size 6 is not divisible by tensor x expert parallel size 4");
    case_error(MOE_FLAGS "--moe-extended-tp --expert-tensor-parallel-size 2", 2, "give one");
    accepted(MOE_FLAGS "--moe-extended-tp --expert-model-parallel-size 4", 4);
}

static void shared_experts_have_no_bias_and_overlap_needs_alltoall(void **state) /* M4.5.20 */
{
    case_error(MOE_FLAGS "--moe-shared-expert-intermediate-size 0", 1,
               "--moe-shared-expert-intermediate-size 0: must be an integer from 1");
    case_error(BASE_FLAGS "--num-experts 8 --moe-shared-expert-intermediate-size 64", 1,
               "shared experts have no biases; add --disable-bias-linear");
    case_error(MOE_FLAGS "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap", 1,
               "--moe-shared-expert-overlap only works with the alltoall token dispatcher: "
               "--moe-token-dispatcher-type is allgather");
    accepted(MOE_FLAGS "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-overlap "
                       "--moe-token-dispatcher-type alltoall",
             1);
}

static void capacity_needs_alltoall_and_no_sinkhorn(void **state) /* M4.5.20, section 2 */
{
    struct options o;

    case_error(MOE_FLAGS "--moe-expert-capacity-factor 1.0", 1,
               "--moe-expert-capacity-factor 1 only works with the alltoall token dispatcher: "
               "--moe-token-dispatcher-type is allgather; legal: alltoall, alltoall_seq");
    case_error(MOE_FLAGS "--moe-expert-capacity-factor 1.0 --moe-token-dispatcher-type alltoall "
                         "--moe-router-load-balancing-type sinkhorn",
               1, "does not work with --moe-router-load-balancing-type sinkhorn");
    case_error(MOE_FLAGS "--moe-pad-expert-input-to-capacity", 1,
               "--moe-pad-expert-input-to-capacity needs a positive --moe-expert-capacity-factor");
    case_error(MOE_FLAGS "--moe-expert-capacity-factor 0", 1, "would drop every token");
    case_valid(&o, MOE_FLAGS "--moe-expert-capacity-factor -1", 1);
    assert_true(o.moe_expert_capacity_factor == 0.0);
    options_free(&o);
    accepted(MOE_FLAGS "--moe-expert-capacity-factor 1.5 --moe-token-dispatcher-type alltoall_seq "
                       "--moe-pad-expert-input-to-capacity --moe-token-drop-policy position",
             1);
}

static void recompute_flags_belong_together(void **state) /* M4.5.21 */
{
    struct options o;

    case_error(BASE_FLAGS "--recompute-granularity full", 1,
               "--recompute-granularity full needs --recompute-method uniform or block");
    case_error(BASE_FLAGS "--recompute-granularity full --recompute-method block", 1,
               "--recompute-method block needs --recompute-num-layers");
    case_error(BASE_FLAGS "--recompute-granularity full --recompute-method block "
                          "--recompute-num-layers 9",
               1, "--recompute-num-layers 9 is more than --num-layers 8");
    case_error(BASE_FLAGS "--recompute-granularity full --recompute-method block "
                          "--recompute-num-layers 1 --recompute-modules moe",
               1, "--recompute-modules moe needs --recompute-granularity selective");
    case_error(BASE_FLAGS "--recompute-granularity selective --recompute-method uniform", 1,
               "--recompute-method uniform needs --recompute-granularity full, found selective");
    case_error(BASE_FLAGS "--recompute-method uniform", 1, "found none");
    case_error(BASE_FLAGS "--recompute-num-layers 1", 1, "needs --recompute-granularity full");
    case_error(BASE_FLAGS "--recompute-granularity full --recompute-activations", 1,
               "--recompute-activations means --recompute-granularity selective, found full");
    case_error(BASE_FLAGS "--distribute-saved-activations", 1, "is not built in cadre");
    case_valid(&o, BASE_FLAGS "--recompute-activations", 1);
    assert_string_equal(o.recompute_granularity, "selective");
    assert_string_equal(o.recompute_modules.items[0], "core_attn");
    options_free(&o);
    case_valid(&o, BASE_FLAGS "--recompute-granularity selective --recompute-modules moe", 1);
    assert_int_equal(o.recompute_modules.num_items, 1);
    assert_string_equal(o.recompute_modules.items[0], "moe");
    options_free(&o);
    case_valid(&o, BASE_FLAGS, 1);
    assert_int_equal(o.recompute_modules.num_items, 0);
    options_free(&o);
    accepted(BASE_FLAGS "--recompute-granularity full --recompute-method uniform "
                        "--recompute-num-layers 2",
             1);
}

static void top_1_needs_a_router_that_can_learn(void **state) /* section 1.4 */
{
    struct options o;

    case_error(MOE_FLAGS "--moe-router-topk 1", 1, "use --moe-router-pre-softmax when topk is 1");
    accepted(MOE_FLAGS "--moe-router-topk 1 --moe-router-pre-softmax", 1);
    accepted(MOE_FLAGS "--moe-router-topk 1 --moe-router-score-function sigmoid", 1);
    accepted(MOE_FLAGS "--moe-router-topk 1 --moe-router-load-balancing-type sinkhorn", 1);
    assert_int_equal(case_parse(&o, MOE_FLAGS "--moe-router-topk 1"), 0);
    o.hf_top1_renormalized = true;
    assert_int_equal(options_validate(&o, 1), 0);
    options_free(&o);
    case_error(MOE_FLAGS "--moe-router-topk 9", 1,
               "--moe-router-topk 9 is more than --num-experts");
}

static void balancing_types_and_coefficients_pair_up(void **state) /* section 1.7, 1.9 */
{
    case_error(MOE_FLAGS "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 1e-2", 1,
               "--moe-aux-loss-coeff 0.01: sinkhorn routing does not support an auxiliary loss");
    case_error(MOE_FLAGS "--moe-router-load-balancing-type None", 1,
               "must be one of aux_loss, seq_aux_loss, global_aux_loss, sinkhorn, none");
    case_error(MOE_FLAGS "--moe-router-load-balancing-type aux_loss none", 1,
               "none cannot be joined with others");
    case_error(MOE_FLAGS "--moe-router-load-balancing-type aux_loss seq_aux_loss "
                         "--moe-aux-loss-coeff 1",
               1, "--moe-aux-loss-coeff has 1 values, --moe-router-load-balancing-type has 2");
    case_error(MOE_FLAGS "--moe-router-load-balancing-type aux_loss aux_loss "
                         "--moe-aux-loss-coeff 1 1",
               1, "has aux_loss twice");
    accepted(MOE_FLAGS "--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss "
                       "--moe-aux-loss-coeff 1e-2 1e-3 0",
             1);
}

static void expert_bias_needs_sigmoid(void **state) /* section 1.12 */
{
    case_error(MOE_FLAGS "--moe-router-enable-expert-bias", 1,
               "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid");
    accepted(MOE_FLAGS "--moe-router-enable-expert-bias --moe-router-score-function sigmoid", 1);
    case_error(MOE_FLAGS "--moe-router-load-balancing-type sinkhorn --moe-router-score-function "
                         "sigmoid",
               1, "sinkhorn has scores of its own");
}

static void groups_hold_the_experts_chosen(void **state) /* section 1.6 */
{
    case_error(MOE_FLAGS "--moe-router-group-topk 2", 1,
               "--moe-router-group-topk needs --moe-router-num-groups");
    case_error(MOE_FLAGS "--moe-router-num-groups 2", 1,
               "--moe-router-num-groups needs --moe-router-group-topk");
    case_error(MOE_FLAGS "--moe-router-num-groups 3 --moe-router-group-topk 1", 1,
               "--num-experts 8 is not divisible by --moe-router-num-groups 3");
    case_error(MOE_FLAGS "--moe-router-num-groups 2 --moe-router-group-topk 4 --moe-router-topk 4",
               1, "--moe-router-group-topk 4: must be at most --moe-router-num-groups 2");
    case_error(MOE_FLAGS "--moe-router-num-groups 4 --moe-router-group-topk 4", 1,
               "and --moe-router-topk 2");
    case_error(MOE_FLAGS "--moe-router-num-groups 8 --moe-router-group-topk 1", 1,
               "--moe-router-topk 2 does not fit in 1 groups of 1 experts");
    case_error(MOE_FLAGS "--moe-router-num-groups 4 --moe-router-group-topk 2 "
                         "--moe-router-load-balancing-type sinkhorn",
               1, "sinkhorn routes without groups");
    accepted(MOE_FLAGS "--moe-router-num-groups 4 --moe-router-group-topk 2", 1);
}

static void the_router_computes_in_fp32(void **state)
{
    accepted(MOE_FLAGS "--moe-router-dtype fp32", 1);
    case_error(MOE_FLAGS "--moe-router-dtype fp64", 1, "--moe-router-dtype fp64: must be fp32");
}

static void a_scaling_factor_given_is_kept(void **state)
{
    struct options o;

    case_valid(&o, MOE_FLAGS "--moe-router-topk-scaling-factor 2.5", 1);
    assert_true(o.moe_router_topk_scaling_factor == 2.5);
    options_free(&o);
}

/* Validates line with stderr going to a file, and gives what was written there. */
static void warnings_of(const char *line, char *text, size_t text_bytes)
{
    struct options o;
    const int saved = dup(STDERR_FILENO);
    FILE *file = tmpfile();
    size_t length;

    assert_non_null(file);
    log_configure(true);
    dup2(fileno(file), STDERR_FILENO);
    case_valid(&o, line, 1);
    fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(saved);
    rewind(file);
    length = fread(text, 1, text_bytes - 1, file);
    text[length] = '\0';
    fclose(file);
    options_free(&o);
}

static void a_flag_without_effect_is_a_warning(void **state)
{
    static const char *const cases[][2] = {
        {BASE_FLAGS "--moe-router-topk 4",
         "cadre: warning: --moe-router-topk has no effect without --num-experts\n"},
        {BASE_FLAGS "--rotary-base 5e5",
         "--rotary-base has no effect without --position-embedding-type rope"},
        {BASE_FLAGS "--num-query-groups 4",
         "--num-query-groups has no effect without --group-query-attention"},
        {BASE_FLAGS "--sgd-momentum 0.5", "--sgd-momentum has no effect without --optimizer sgd"},
        {BASE_FLAGS "--optimizer sgd --adam-eps 1e-6", "--adam-eps has no effect without"},
        {BASE_FLAGS "--lr-wsd-decay-iters 2", "--lr-wsd-decay-iters has no effect without"},
        {BASE_FLAGS "--save-interval 2", "--save-interval has no effect without --save"},
        {BASE_FLAGS "--finetune", "--finetune has no effect without --load"},
        {BASE_FLAGS "--recompute-modules moe", "--recompute-modules has no effect without"},
        {MOE_FLAGS "--moe-token-drop-policy position", "--moe-token-drop-policy has no effect"},
        {MOE_FLAGS "--moe-upcycling-granularity 2", "--moe-upcycling-granularity has no effect"},
        {MOE_FLAGS "--moe-router-bias-update-rate 2", "--moe-router-bias-update-rate has no"},
        {MOE_FLAGS "--moe-router-load-balancing-type none --moe-aux-loss-coeff 1",
         "--moe-aux-loss-coeff has no effect without"},
    };
    char text[4096];

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        warnings_of(cases[i][0], text, sizeof text);
        if (strstr(text, cases[i][1]) == NULL) {
            fail_msg("%s: warned '%s'", cases[i][0], text);
        }
    }
}

static void a_run_without_idle_flags_warns_of_nothing(void **state)
{
    char text[4096];

    warnings_of(MOE_FLAGS "--num-experts 4 --moe-router-topk 2", text, sizeof text);
    assert_string_equal(text, "");
    warnings_of(BASE_FLAGS "--num-experts 0", text, sizeof text);
    assert_string_equal(text, "");
}

static void a_bad_layer_pattern_is_found_early(void **state)
{
    case_error(MOE_FLAGS "--moe-layer-freq [0]*3+[1]*4", 1, "must be --num-layers, 8");
}

static void checkpoint_flags_need_a_directory(void **state)
{
    case_error(BASE_FLAGS "--use-checkpoint-args", 1, "--use-checkpoint-args needs --load");
    case_error(BASE_FLAGS "--ckpt-step 5", 1, "--ckpt-step 5 needs --load");
    case_error(BASE_FLAGS "--pretrained-checkpoint x", 1, "needs --finetune");
    case_error(BASE_FLAGS "--ckpt-format torch", 1, "--ckpt-format torch: must be torch_dist");
}

/* The flags behind base, which ask for a graph. */
static void graph_accepted(const char *base, const char *flags, int world_size)
{
    char line[1024];

    snprintf(line, sizeof line, "%s--cuda-graph-impl full_iteration %s", base, flags);
    accepted(line, world_size);
}

static void graph_error(const char *base, const char *flags, int world_size, const char *expected)
{
    char line[1024];

    snprintf(line, sizeof line, "%s--cuda-graph-impl full_iteration %s", base, flags);
    case_error(line, world_size, expected);
}

static void a_graph_holds_whole_steps(void **state)
{
    graph_accepted(BASE_FLAGS, "", 1);
    graph_accepted(BASE_FLAGS, "", 4);
    graph_accepted(MOE_FLAGS, "", 1);
    graph_accepted(BASE_FLAGS, "--timing-log-level 1", 1);
    graph_error(BASE_FLAGS, "--timing-log-level 2", 1,
                "--timing-log-level 2 cannot time each; legal: 0, 1");
    graph_error(BASE_FLAGS, "--device cpu", 1, "there are no graphs on the CPU");
    case_error(BASE_FLAGS "--cuda-graph-impl local", 1, "legal: none, full_iteration");
    case_error(BASE_FLAGS "--cuda-graph-impl transformer_engine", 1, "legal: none, full_iteration");
    case_error(BASE_FLAGS "--cuda-graph-impl full", 1, "full_iteration");
    case_error(BASE_FLAGS "--cuda-graph-scope attn", 1, "use --cuda-graph-impl full_iteration");
    case_error(BASE_FLAGS "--cuda-graph-warmup-steps 0", 1, "at least 1");
}

/* All that ranks send without the host's knowing how much. */
static void a_graph_communicates_where_no_host_waits(void **state)
{
    graph_accepted(BASE_FLAGS, "--tensor-model-parallel-size 2", 2);
    graph_accepted(BASE_FLAGS, "--pipeline-model-parallel-size 2", 2);
    graph_accepted(BASE_FLAGS, "--context-parallel-size 2", 2);
    graph_accepted(BASE_FLAGS, "--overlap-grad-reduce", 2);
    graph_accepted(MOE_FLAGS,
                   "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01", 2);
    graph_error(MOE_FLAGS, "--expert-model-parallel-size 2", 2,
                "found --expert-model-parallel-size 2; legal: 1, or");
    graph_error(MOE_FLAGS, "--tensor-model-parallel-size 2 --sequence-parallel", 2,
                "found --expert-tensor-parallel-size 2; legal: 1, or");
    graph_accepted(MOE_FLAGS,
                   "--tensor-model-parallel-size 2 --sequence-parallel "
                   "--expert-tensor-parallel-size 1",
                   2);
    graph_accepted(MOE_FLAGS,
                   "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
                   "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
                   2);
    graph_error(MOE_FLAGS,
                "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
                "--moe-expert-capacity-factor 1.0",
                2, "legal: 1, or --moe-pad-expert-input-to-capacity");
    graph_error(MOE_FLAGS,
                "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall_seq "
                "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
                2, "and --moe-token-dispatcher-type alltoall");
}

static void the_device_is_chosen_when_the_run_starts(void **state)
{
    struct options o;

    case_valid(&o, BASE_FLAGS, 1);
    assert_string_equal(o.device, "auto");
    options_free(&o);
    case_valid(&o, BASE_FLAGS "--device cuda", 1);
    assert_string_equal(o.device, "cuda");
    options_free(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_must_be_a_multiple_of_the_model),
        cmocka_unit_test(the_grids_are_derived),
        cmocka_unit_test(every_mapping_up_to_64_ranks_is_judged_by_divisibility),
        cmocka_unit_test(batches_are_whole_microbatches),
        cmocka_unit_test(the_ramp_goes_in_whole_steps),
        cmocka_unit_test(interleaving_needs_stages_and_even_chunks),
        cmocka_unit_test(overlapped_gather_needs_its_parts),
        cmocka_unit_test(one_chunk_on_a_stage_is_legal_everywhere),
        cmocka_unit_test(groups_of_microbatches_keep_all_stages_busy),
        cmocka_unit_test(the_first_and_last_stage_may_differ),
        cmocka_unit_test(stages_of_different_size_are_interleaved_by_their_number_of_chunks),
        cmocka_unit_test(context_parallel_exchange_is_one_type_or_one_a_layer),
        cmocka_unit_test(a2a_deals_out_whole_heads),
        cmocka_unit_test(overlapped_tensor_exchange_needs_sequence_parallelism),
        cmocka_unit_test(deadlines_may_be_fractions_of_a_minute),
        cmocka_unit_test(fp16_is_refused),
        cmocka_unit_test(iterations_and_samples_do_not_mix),
        cmocka_unit_test(the_sizes_of_the_model_are_required),
        cmocka_unit_test(sizes_are_derived),
        cmocka_unit_test(context_parallelism_cuts_the_sequence_in_2cp),
        cmocka_unit_test(positions_cover_the_sequence),
        cmocka_unit_test(rates_and_intervals_fit),
        cmocka_unit_test(wsd_needs_the_length_of_its_tail),
        cmocka_unit_test(weight_decay_changes_between_two_values),
        cmocka_unit_test(one_side_wins_over_the_schedule),
        cmocka_unit_test(sequence_parallelism_is_off_with_one_tensor_rank),
        cmocka_unit_test(old_position_flags_mean_rope),
        cmocka_unit_test(aliases_fold_into_their_flag),
        cmocka_unit_test(a_layer_has_one_activation_and_1p_needs_layernorm),
        cmocka_unit_test(zero_experts_is_a_dense_model),
        cmocka_unit_test(experts_divide_over_their_ranks),
        cmocka_unit_test(upcycling_needs_both_ends),
        cmocka_unit_test(granular_upcycling_cuts_the_dense_layer),
        cmocka_unit_test(the_other_rank_order_has_limits),
        cmocka_unit_test(there_is_one_source_of_data),
        cmocka_unit_test(tokenizers_have_what_they_need),
        cmocka_unit_test(tensor_ranks_divide_heads_and_widths),
        cmocka_unit_test(tensor_and_expert_ranks_need_sequence_parallelism),
        cmocka_unit_test(expert_biases_need_whole_experts),
        cmocka_unit_test(extended_tp_shards_every_expert),
        cmocka_unit_test(shared_experts_have_no_bias_and_overlap_needs_alltoall),
        cmocka_unit_test(capacity_needs_alltoall_and_no_sinkhorn),
        cmocka_unit_test(recompute_flags_belong_together),
        cmocka_unit_test(top_1_needs_a_router_that_can_learn),
        cmocka_unit_test(balancing_types_and_coefficients_pair_up),
        cmocka_unit_test(expert_bias_needs_sigmoid),
        cmocka_unit_test(groups_hold_the_experts_chosen),
        cmocka_unit_test(the_router_computes_in_fp32),
        cmocka_unit_test(a_scaling_factor_given_is_kept),
        cmocka_unit_test(a_flag_without_effect_is_a_warning),
        cmocka_unit_test(a_run_without_idle_flags_warns_of_nothing),
        cmocka_unit_test(a_bad_layer_pattern_is_found_early),
        cmocka_unit_test(checkpoint_flags_need_a_directory),
        cmocka_unit_test(a_graph_holds_whole_steps),
        cmocka_unit_test(a_graph_communicates_where_no_host_waits),
        cmocka_unit_test(the_device_is_chosen_when_the_run_starts),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
