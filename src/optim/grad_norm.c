/* grad_norm.c - each distinct element counts on one rank, and one sum goes over the world:
 *
 * - over data parallelism shards are distinct with the distributed optimizer; without it all ranks
 *   of the group have the same, and each counts its share of them, which also divides the work;
 * - over TP (experts: ETP) a parameter is cut or replicated, which its box tells, and a replicated
 *   one counts on the first rank of the group only;
 * - the copy of a tied embedding on the last stage does not count. */
#include "optim/grad_norm.h"

#include <math.h>

#include "ops/ops.h"

/* Into how many boxes like this rank's the parameter is cut. */
static int64_t num_parts(const struct param *param)
{
    int64_t parts = 1;

    for (int i = 0; i < param->num_dims; i++) {
        parts *= param->global_shape[i] / param->box.size[i];
    }
    return parts;
}

static bool counts_here(const struct param *param, const struct groups *groups)
{
    if (param->is_copy) {
        return false;
    }
    if (param->scope == PARAM_EXPERT) {
        return groups->etp->rank == 0 || num_parts(param) == groups->etp_ep->size;
    }
    return groups->tp->rank == 0 || num_parts(param) == groups->tp->size;
}

enum sum_kind { SUM_GRAD_SQUARES, SUM_VALUE_SQUARES, SUM_GRAD_ZEROS };

/* What this rank counts of a shard, in the buffers of values and gradients. */
static void counted_part(const struct optimizer *optimizer, const struct groups *groups,
                         const struct optimizer_shard *shard, int64_t *start, int64_t *count)
{
    const struct comm *data = shard->param->scope == PARAM_EXPERT ? groups->edp : groups->dp_cp;
    const bool is_distinct =
        optimizer->buckets != NULL && optimizer->buckets->config.distributed_optimizer;
    const int64_t begin = is_distinct ? 0 : shard->count * data->rank / data->size;
    const int64_t end = is_distinct ? shard->count : shard->count * (data->rank + 1) / data->size;

    *start = shard->param->start + shard->first + begin;
    *count = end - begin;
}

static void add_shard(const struct optimizer *optimizer, const struct groups *groups,
                      struct stream *stream, enum sum_kind kind,
                      const struct optimizer_shard *shard, struct tensor *sum)
{
    const struct param_list *params = optimizer->params;
    const struct tensor *buffer = kind == SUM_VALUE_SQUARES ? &params->values : &params->grads;
    struct tensor x;
    int64_t start, count;

    counted_part(optimizer, groups, shard, &start, &count);
    if (count == 0) {
        return;
    }
    x = tensor_rows(buffer, start, count);
    if (kind == SUM_GRAD_ZEROS) {
        op_zero_count(stream, &(struct zero_count){.count = sum, .x = &x});
    } else {
        op_square_sum(stream, &(struct square_sum){.sum = sum, .x = &x});
    }
}

/* The sum over all distinct elements of the model, the same on all ranks, in scratch memory. */
static struct tensor global_sum(const struct optimizer *optimizer, const struct groups *groups,
                                struct stream *stream, struct arena *scratch, enum sum_kind kind)
{
    struct tensor sum = tensor_new(scratch, DTYPE_F64, 1);

    op_fill_zero(stream, &sum);
    for (int i = 0; i < optimizer->num_shards; i++) {
        if (counts_here(optimizer->shards[i].param, groups)) {
            add_shard(optimizer, groups, stream, kind, &optimizer->shards[i], &sum);
        }
    }
    comm_wait(comm_all_reduce(groups->world, stream, &sum, COMM_SUM), stream);
    return sum;
}

void grad_norm_clip_scale(const struct optimizer *optimizer, const struct groups *groups,
                          struct stream *stream, struct arena *scratch, float max_norm,
                          struct tensor *norm, struct tensor *scale)
{
    const struct arena_mark mark = arena_mark(scratch);
    const struct tensor sum = global_sum(optimizer, groups, stream, scratch, SUM_GRAD_SQUARES);

    op_clip_scale(stream, &(struct clip_scale){
                              .norm = norm, .scale = scale, .sum = &sum, .max_norm = max_norm});
    arena_release(scratch, mark);
}

static double read_global_sum(const struct optimizer *optimizer, const struct groups *groups,
                              struct stream *stream, struct arena *scratch, enum sum_kind kind)
{
    const struct arena_mark mark = arena_mark(scratch);
    const struct tensor sum = global_sum(optimizer, groups, stream, scratch, kind);
    double value;

    stream_wait(stream);
    stream_copy_to_host(stream, &value, sum.data, sizeof value);
    arena_release(scratch, mark);
    return value;
}

double params_norm(const struct optimizer *optimizer, const struct groups *groups,
                   struct stream *stream, struct arena *scratch)
{
    return sqrt(read_global_sum(optimizer, groups, stream, scratch, SUM_VALUE_SQUARES));
}

double grad_num_zeros(const struct optimizer *optimizer, const struct groups *groups,
                      struct stream *stream, struct arena *scratch)
{
    return read_global_sum(optimizer, groups, stream, scratch, SUM_GRAD_ZEROS);
}
