/* The rules of the mapping onto ranks. Two grids over the same ranks: the dense one, tp x cp x dp x
 * pp, and the one of the experts, etp x ep x edp x pp. Nothing here assumes one process. */
#include <string.h>

#include "args/options.h"
#include "args/options_rules.h"
#include "base/check.h"

/* M4.5.1 */
static int derive_dense_grid(struct options *o)
{
    const int64_t tp = o->tensor_model_parallel_size, pp = o->pipeline_model_parallel_size;
    const int64_t cp = o->context_parallel_size, model_size = tp * pp * cp;

    if (o->world_size % model_size != 0) {
        return error_set("world size (%lld) is not divisible by total_model_size %lld "
                         "(--tensor-model-parallel-size %lld x --pipeline-model-parallel-size %lld "
                         "x --context-parallel-size %lld): launch a multiple of %lld ranks, as in "
                         "mpirun -n %lld cadre pretrain ...",
                         (long long)o->world_size, (long long)model_size, (long long)tp,
                         (long long)pp, (long long)cp, (long long)model_size,
                         (long long)model_size);
    }
    o->data_parallel_size = o->world_size / model_size;
    return 0;
}

/* M4.5.1, M4.5.16; with section 4.3's folding: experts spread over any ranks of a stage. */
static int derive_expert_grid(struct options *o)
{
    const int64_t ep = o->expert_model_parallel_size, pp = o->pipeline_model_parallel_size;
    int64_t etp, model_size;

    options_derive_int(o, "--expert-tensor-parallel-size", &o->expert_tensor_parallel_size,
                       o->tensor_model_parallel_size);
    etp = o->expert_tensor_parallel_size;
    if (ep > 1 && o->num_experts == 0) {
        return error_set("--expert-model-parallel-size %lld needs --num-experts", (long long)ep);
    }
    if (o->num_experts > 0) {
        TRY(options_check_divisible("--num-experts", o->num_experts, "--expert-model-parallel-size",
                                    ep));
    }
    model_size = etp * ep * pp;
    if (o->world_size % model_size != 0) {
        return error_set("world size (%lld), data_parallel_size (%lld): not divisible by the "
                         "experts' ranks, %lld (--expert-tensor-parallel-size %lld x "
                         "--expert-model-parallel-size %lld x --pipeline-model-parallel-size "
                         "%lld): launch a multiple of %lld ranks, as in mpirun -n %lld cadre "
                         "pretrain ...",
                         (long long)o->world_size, (long long)o->data_parallel_size,
                         (long long)model_size, (long long)etp, (long long)ep, (long long)pp,
                         (long long)model_size, (long long)model_size);
    }
    o->expert_data_parallel_size = o->world_size / model_size;
    return 0;
}

/* M4.5.18; the grids must agree on the pipeline groups. */
static int check_rank_order(const struct options *o)
{
    if (!o->use_tp_pp_dp_mapping) {
        return 0;
    }
    if (o->context_parallel_size * o->expert_model_parallel_size > 1) {
        return error_set("--use-tp-pp-dp-mapping can't be used with context or expert "
                         "parallelism: --context-parallel-size %lld, --expert-model-parallel-size "
                         "%lld; legal: 1 and 1",
                         (long long)o->context_parallel_size,
                         (long long)o->expert_model_parallel_size);
    }
    if (o->expert_tensor_parallel_size != o->tensor_model_parallel_size) {
        return error_set("--use-tp-pp-dp-mapping needs --expert-tensor-parallel-size %lld to equal "
                         "--tensor-model-parallel-size %lld",
                         (long long)o->expert_tensor_parallel_size,
                         (long long)o->tensor_model_parallel_size);
    }
    return 0;
}

/* M4.5.20 */
static int check_tensor_parallel(const struct options *o)
{
    const int64_t tp = o->tensor_model_parallel_size;
    const char *by = "--tensor-model-parallel-size";

    TRY(options_check_divisible("--num-attention-heads", o->num_attention_heads, by, tp));
    TRY(options_check_divisible("--num-query-groups", o->num_query_groups, by, tp));
    TRY(options_check_divisible("--ffn-hidden-size", o->ffn_hidden_size, by, tp));
    if (o->sequence_parallel) {
        TRY(options_check_divisible("--seq-length / --context-parallel-size",
                                    o->seq_length / o->context_parallel_size, by, tp));
    }
    return 0;
}

/* M4.5.16, M4.5.20, M4.5.23 */
static int check_expert_parallel(const struct options *o)
{
    const int64_t tp = o->tensor_model_parallel_size, etp = o->expert_tensor_parallel_size;

    if (tp > 1 && !o->sequence_parallel) {
        return error_set("--tensor-model-parallel-size %lld with --num-experts %lld: when using "
                         "expert parallelism and tensor parallelism, sequence parallelism must be "
                         "used; add --sequence-parallel",
                         (long long)tp, (long long)o->num_experts);
    }
    if (etp > 1 && !o->disable_bias_linear) {
        return error_set("--expert-tensor-parallel-size %lld: biases in experts are only supported "
                         "with 1; add --disable-bias-linear",
                         (long long)etp);
    }
    TRY(options_check_divisible("--moe-ffn-hidden-size", o->moe_ffn_hidden_size,
                                "--expert-tensor-parallel-size", etp));
    return options_check_divisible("--moe-shared-expert-intermediate-size",
                                   o->moe_shared_expert_intermediate_size,
                                   "--tensor-model-parallel-size", tp);
}

/* Section 3.9, M4.5.20. */
static int check_extended_tp(const struct options *o)
{
    const int64_t ranks = o->tensor_model_parallel_size * o->expert_model_parallel_size;

    if (strcmp(o->moe_token_dispatcher_type, "allgather") != 0) {
        return error_set("--moe-extended-tp only works with --moe-token-dispatcher-type allgather, "
                         "found %s",
                         o->moe_token_dispatcher_type);
    }
    if (options_given(o, "--expert-tensor-parallel-size") &&
        o->expert_tensor_parallel_size != o->tensor_model_parallel_size) {
        return error_set("--moe-extended-tp and --expert-tensor-parallel-size %lld both say how "
                         "experts are sharded: give one",
                         (long long)o->expert_tensor_parallel_size);
    }
    return options_check_divisible("--moe-ffn-hidden-size", o->moe_ffn_hidden_size,
                                   "tensor x expert parallel size", ranks);
}

/* M4.5.3, for the number of layers in a chunk. */
static int derive_chunks(struct options *o, int64_t layers_per_stage)
{
    const int64_t pp = o->pipeline_model_parallel_size;
    const int64_t pp_above = o->overlap_p2p_communication ? 1 : 2;
    const int64_t chunk = o->num_layers_per_virtual_pipeline_stage;
    const int64_t chunks = o->num_virtual_stages_per_pipeline_rank;

    if (chunk > 0 && chunks > 0) {
        return error_set("--num-layers-per-virtual-pipeline-stage %lld and "
                         "--num-virtual-stages-per-pipeline-rank %lld say the same thing: give one",
                         (long long)chunk, (long long)chunks);
    }
    if (chunk == 0 && chunks == 0) {
        return 0;
    }
    if (pp <= pp_above) {
        return error_set("--pipeline-model-parallel-size %lld: when interleaved schedule is used, "
                         "pipeline-model-parallel size should be greater than %lld%s",
                         (long long)pp, (long long)pp_above,
                         pp_above == 2 ? " with --no-overlap-p2p-communication" : "");
    }
    if (chunk > 0) {
        TRY(options_check_divisible("number of layers per pipeline stage", layers_per_stage,
                                    "--num-layers-per-virtual-pipeline-stage", chunk));
        o->virtual_pipeline_size = layers_per_stage / chunk;
        return 0;
    }
    TRY(options_check_divisible("number of layers per pipeline stage", layers_per_stage,
                                "--num-virtual-stages-per-pipeline-rank", chunks));
    o->virtual_pipeline_size = chunks;
    return 0;
}

static int derive_pipeline(struct options *o)
{
    o->virtual_pipeline_size = 1;
    TRY(options_check_divisible("--num-layers", o->num_layers, "--pipeline-model-parallel-size",
                                o->pipeline_model_parallel_size));
    TRY(derive_chunks(o, o->num_layers / o->pipeline_model_parallel_size));
    options_warn_unless(o, "--no-overlap-p2p-communication", o->virtual_pipeline_size > 1,
                        "--num-layers-per-virtual-pipeline-stage");
    return 0;
}

/* M4.5.9 */
static int check_context_parallel(const struct options *o)
{
    const int64_t cp = o->context_parallel_size;

    if (cp > 1 && o->seq_length % (2 * cp) != 0) {
        return error_set("--seq-length %lld should be a multiple of 2 * context-parallel-size if "
                         "context-parallel-size > 1: --context-parallel-size %lld needs a multiple "
                         "of %lld",
                         (long long)o->seq_length, (long long)cp, (long long)(2 * cp));
    }
    return 0;
}

/* M4.5.4 */
static int check_overlap(const struct options *o)
{
    if (o->overlap_param_gather && !o->use_distributed_optimizer) {
        return error_set("--overlap-param-gather only supported with distributed optimizer: add "
                         "--use-distributed-optimizer");
    }
    if (o->overlap_param_gather && !o->overlap_grad_reduce) {
        return error_set("--overlap-param-gather needs --overlap-grad-reduce");
    }
    return 0;
}

int options_validate_parallel(struct options *o, int world_size)
{
    o->world_size = world_size;
    TRY(derive_dense_grid(o));
    TRY(derive_expert_grid(o));
    TRY(check_rank_order(o));
    if (o->tensor_model_parallel_size == 1 && o->sequence_parallel) {
        o->sequence_parallel = false; /* M4.5.13: silently */
        options_mark_derived(o, "--sequence-parallel");
    }
    TRY(check_context_parallel(o));
    TRY(check_tensor_parallel(o));
    if (o->num_experts > 0) {
        TRY(check_expert_parallel(o));
    }
    if (o->num_experts > 0 && o->moe_extended_tp) {
        TRY(check_extended_tp(o));
    }
    TRY(derive_pipeline(o));
    return check_overlap(o);
}
