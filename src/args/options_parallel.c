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

/* Section 5.6: stages without a number of their own share the rest evenly. layers[0..2] are those
 * of the first stage, of one in the middle and of the last. */
static int derive_stage_layers(const struct options *o, int64_t layers[3])
{
    const int64_t pp = o->pipeline_model_parallel_size;
    const int64_t first = o->decoder_first_pipeline_num_layers;
    const int64_t last = o->decoder_last_pipeline_num_layers;
    const int64_t num_sharing = pp - (first > 0) - (last > 0), rest = o->num_layers - first - last;

    if (first == 0 && last == 0) {
        TRY(options_check_divisible("--num-layers", o->num_layers, "--pipeline-model-parallel-size",
                                    pp));
    } else if (pp == 1) {
        return error_set("--decoder-%s-pipeline-num-layers %lld needs "
                         "--pipeline-model-parallel-size above 1",
                         first > 0 ? "first" : "last", (long long)(first > 0 ? first : last));
    } else if (rest < num_sharing || (num_sharing > 0 ? rest % num_sharing : rest) != 0) {
        return error_set("--num-layers %lld - %lld (--decoder-first-pipeline-num-layers) - %lld "
                         "(--decoder-last-pipeline-num-layers) leaves %lld layers for the %lld "
                         "other stages of --pipeline-model-parallel-size %lld: must be %s%lld",
                         (long long)o->num_layers, (long long)first, (long long)last,
                         (long long)rest, (long long)num_sharing, (long long)pp,
                         num_sharing > 0 ? "a positive multiple of " : "", (long long)num_sharing);
    }
    layers[1] = num_sharing > 0 ? rest / num_sharing : first;
    layers[0] = first > 0 ? first : layers[1];
    layers[2] = last > 0 ? last : layers[1];
    return 0;
}

/* Chunks on a stage, from either of the two flags that say it; 1 without them. */
static int derive_num_chunks(const struct options *o, const int64_t layers[3], int64_t *num_chunks)
{
    const int64_t chunk = o->num_layers_per_virtual_pipeline_stage;
    const int64_t chunks = o->num_virtual_stages_per_pipeline_rank;

    *num_chunks = chunks > 0 ? chunks : 1;
    if (chunk > 0 && chunks > 0) {
        return error_set("--num-layers-per-virtual-pipeline-stage %lld and "
                         "--num-virtual-stages-per-pipeline-rank %lld say the same thing: give one",
                         (long long)chunk, (long long)chunks);
    }
    if (chunk > 0 &&
        o->decoder_first_pipeline_num_layers + o->decoder_last_pipeline_num_layers > 0) {
        return error_set("--num-layers-per-virtual-pipeline-stage %lld: stages of different size "
                         "need --num-virtual-stages-per-pipeline-rank instead",
                         (long long)chunk);
    }
    if (chunk > 0) {
        TRY(options_check_divisible("number of layers per pipeline stage", layers[0],
                                    "--num-layers-per-virtual-pipeline-stage", chunk));
        *num_chunks = layers[0] / chunk;
    }
    for (int i = 0; i < 3; i++) {
        TRY(options_check_divisible("number of layers per pipeline stage", layers[i],
                                    "--num-virtual-stages-per-pipeline-rank", *num_chunks));
    }
    return 0;
}

/* M4.5.3; one chunk on a stage is no interleaving (M4.5.23). */
static int derive_pipeline(struct options *o)
{
    const int64_t pp = o->pipeline_model_parallel_size;
    const int64_t pp_above = o->overlap_p2p_communication ? 1 : 2;
    int64_t layers[3];

    TRY(derive_stage_layers(o, layers));
    TRY(derive_num_chunks(o, layers, &o->virtual_pipeline_size));
    if (o->virtual_pipeline_size > 1 && pp <= pp_above) {
        return error_set("--pipeline-model-parallel-size %lld: when interleaved schedule is used, "
                         "pipeline-model-parallel size should be greater than %lld%s",
                         (long long)pp, (long long)pp_above,
                         pp_above == 2 ? " with --no-overlap-p2p-communication" : "");
    }
    options_warn_unless(o, "--no-overlap-p2p-communication", o->virtual_pipeline_size > 1,
                        "--num-layers-per-virtual-pipeline-stage");
    options_warn_unless(o, "--microbatch-group-size-per-virtual-pipeline-stage",
                        o->virtual_pipeline_size > 1, "--num-layers-per-virtual-pipeline-stage");
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

/* The one spelling of a legal --cp-comm-type, NULL for others. */
static const char *cp_comm_type_from_text(const char *text)
{
    static const char *const legal[][2] = {
        {"p2p", "p2p"}, {"all_gather", "all_gather"}, {"allgather", "all_gather"}, {"a2a", "a2a"}};

    for (size_t i = 0; i < sizeof legal / sizeof legal[0]; i++) {
        if (strcmp(text, legal[i][0]) == 0) {
            return legal[i][1];
        }
    }
    return NULL;
}

const char *options_cp_comm_type(const struct options *o, int64_t layer)
{
    const struct option_strings *types = &o->cp_comm_type;

    return cp_comm_type_from_text(types->items[types->num_items == 1 ? 0 : layer]);
}

/* Section 7: a2a deals out heads, and the keys and values that go with them. */
static int check_head_exchange(const struct options *o)
{
    const int64_t tp = o->tensor_model_parallel_size, cp = o->context_parallel_size;

    TRY(options_check_divisible("--cp-comm-type a2a: --num-attention-heads / "
                                "--tensor-model-parallel-size",
                                o->num_attention_heads / tp, "--context-parallel-size", cp));
    return options_check_divisible("--cp-comm-type a2a: --num-query-groups / "
                                   "--tensor-model-parallel-size",
                                   o->num_query_groups / tp, "--context-parallel-size", cp);
}

static int check_cp_comm_type(const struct options *o)
{
    const struct option_strings *types = &o->cp_comm_type;

    if (types->num_items != 1 && types->num_items != o->num_layers) {
        return error_set("--cp-comm-type has %d values: must be one, or --num-layers %lld",
                         types->num_items, (long long)o->num_layers);
    }
    for (int i = 0; i < types->num_items; i++) {
        const char *type = cp_comm_type_from_text(types->items[i]);

        if (type == NULL) {
            return error_set("--cp-comm-type %s: %smust be p2p, all_gather or a2a", types->items[i],
                             strcmp(types->items[i], "a2a+p2p") == 0
                                 ? "context parallelism has one level in cadre; "
                                 : "");
        }
        if (strcmp(type, "a2a") == 0) {
            TRY(check_head_exchange(o));
        }
    }
    options_warn_unless(o, "--cp-comm-type", o->context_parallel_size > 1,
                        "--context-parallel-size");
    return 0;
}

/* M4.5.4; chunks of tokens are exchanged where tokens are shared out. */
static int check_overlap(const struct options *o)
{
    const int64_t tp = o->tensor_model_parallel_size;

    if (o->tp_comm_overlap && tp > 1 && !o->sequence_parallel) {
        return error_set(
            "--tp-comm-overlap with --tensor-model-parallel-size %lld: tensor parallel "
            "communication overlap can happen only when sequence parallelism is "
            "enabled; add --sequence-parallel",
            (long long)tp);
    }
    options_warn_unless(o, "--tp-comm-overlap", tp > 1, "--tensor-model-parallel-size");
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
    TRY(check_cp_comm_type(o));
    if (o->num_experts > 0) {
        TRY(check_expert_parallel(o));
    }
    if (o->num_experts > 0 && o->moe_extended_tp) {
        TRY(check_extended_tp(o));
    }
    TRY(derive_pipeline(o));
    return check_overlap(o);
}
