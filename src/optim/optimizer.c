#include "optim/optimizer.h"

#include <stdlib.h>

#include "base/check.h"
#include "ops/ops.h"
#include "optim/param_gather.h"

/* ---- what this rank owns ---- */

static void add_shard(struct optimizer *optimizer, const struct param *param, int64_t begin,
                      int64_t end, int64_t state_start)
{
    optimizer->shards[optimizer->num_shards++] =
        (struct optimizer_shard){.param = param,
                                 .first = begin - param->start,
                                 .count = end - begin,
                                 .state_start = state_start};
}

static int64_t max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The parameters that have elements in the owned part of a bucket, in the order of the buffers. */
static void add_bucket_shards(struct optimizer *optimizer, const struct grad_bucket *bucket)
{
    for (int i = bucket->begin; i < bucket->end; i++) {
        const struct param *param = optimizer->params->params[optimizer->buckets->order[i]];
        const int64_t begin = max(param->start, bucket->own_start);
        const int64_t end = min(param->start + box_num_elements(&param->box),
                                bucket->own_start + bucket->own_count);

        if (begin < end) {
            add_shard(optimizer, param, begin, end,
                      optimizer->num_owned + begin - bucket->own_start);
        }
    }
    optimizer->num_owned += bucket->own_count;
}

static void build_shards(struct optimizer *optimizer)
{
    const struct param_list *params = optimizer->params;
    const struct grad_buckets *buckets = optimizer->buckets;

    for (int i = 0; buckets != NULL && i < buckets->num_buckets; i++) {
        add_bucket_shards(optimizer, &buckets->buckets[i]);
    }
    for (int i = 0; buckets == NULL && i < params->num_params; i++) {
        const struct param *param = params->params[i];

        add_shard(optimizer, param, param->start, param->start + box_num_elements(&param->box),
                  param->start);
    }
    if (buckets == NULL) {
        optimizer->num_owned = params->num_elements;
    }
}

/* Shards that follow each other, in the buffers and in the states, and share their facts become one
 * range; the paddings between them (zeros) come along. */
static void build_ranges(struct optimizer *optimizer)
{
    for (int i = 0; i < optimizer->num_shards; i++) {
        const struct optimizer_shard *shard = &optimizer->shards[i];
        const struct param *param = shard->param;
        const struct optimizer_range range = {.start = param->start + shard->first,
                                              .count = shard->count,
                                              .state_start = shard->state_start,
                                              .weight_decay = param->weight_decay,
                                              .decoupled_lr = param->decoupled_lr};
        struct optimizer_range *last = &optimizer->ranges[optimizer->num_ranges - 1];

        if (optimizer->num_ranges > 0 && last->weight_decay == range.weight_decay &&
            last->decoupled_lr == range.decoupled_lr &&
            last->start - last->state_start == range.start - range.state_start) {
            last->count = range.start + range.count - last->start;
        } else {
            optimizer->ranges[optimizer->num_ranges++] = range;
        }
    }
}

static struct tensor new_state(const struct optimizer *optimizer, struct stream *stream,
                               struct arena *run)
{
    struct tensor state = tensor_new(run, DTYPE_F32, optimizer->num_owned);

    op_fill_zero(stream, &state);
    return state;
}

void optimizer_init(struct optimizer *optimizer, const struct optimizer_config *config,
                    const struct param_list *params, struct grad_buckets *buckets,
                    struct stream *stream, struct arena *run)
{
    const size_t count = (size_t)params->num_params + 1;

    *optimizer = (struct optimizer){.config = *config,
                                    .params = params,
                                    .buckets = buckets,
                                    .shards = calloc(count, sizeof *optimizer->shards),
                                    .ranges = calloc(count, sizeof *optimizer->ranges)};
    CHECK(optimizer->shards != NULL && optimizer->ranges != NULL, "out of memory");
    build_shards(optimizer);
    build_ranges(optimizer);
    if (params->values.dtype != DTYPE_F32) {
        optimizer->master = new_state(optimizer, stream, run);
    }
    if (config->kind == OPTIMIZER_ADAM) {
        optimizer->exp_avg = new_state(optimizer, stream, run);
        optimizer->exp_avg_sq = new_state(optimizer, stream, run);
    } else if (config->momentum != 0.0f) {
        optimizer->exp_avg = new_state(optimizer, stream, run);
    }
}

void optimizer_free(struct optimizer *optimizer)
{
    free(optimizer->shards);
    free(optimizer->ranges);
    optimizer->shards = NULL;
    optimizer->ranges = NULL;
}

/* ---- steps ---- */

/* A range of every buffer and state. */
struct range_tensors {
    struct tensor param, master, exp_avg, exp_avg_sq, grad;
};

static struct tensor range_of(const struct tensor *state, const struct optimizer_range *range)
{
    return state->data != NULL ? tensor_rows(state, range->state_start, range->count) : *state;
}

static struct range_tensors range_tensors(const struct optimizer *optimizer,
                                          const struct optimizer_range *range)
{
    const struct param_list *params = optimizer->params;
    struct range_tensors r = {.param = tensor_rows(&params->values, range->start, range->count),
                              .master = range_of(&optimizer->master, range),
                              .exp_avg = range_of(&optimizer->exp_avg, range),
                              .exp_avg_sq = range_of(&optimizer->exp_avg_sq, range),
                              .grad = tensor_rows(&params->grads, range->start, range->count)};

    if (optimizer->master.data == NULL) {
        r.master = r.param;
    }
    return r;
}

void optimizer_reset_masters(struct optimizer *optimizer, struct stream *stream)
{
    for (int i = 0; i < optimizer->num_ranges && optimizer->master.data != NULL; i++) {
        struct range_tensors r = range_tensors(optimizer, &optimizer->ranges[i]);

        op_linear_combination(
            stream, &(struct linear_combination){.y = &r.master, .x = &r.param, .a = 1.0f});
    }
}

static void step_range(struct optimizer *optimizer, struct stream *stream,
                       const struct optimizer_range *range, float lr, float weight_decay,
                       const struct tensor *grad_scale)
{
    const struct optimizer_config *config = &optimizer->config;
    struct range_tensors r = range_tensors(optimizer, range);

    if (config->kind == OPTIMIZER_ADAM) {
        op_adam_step(stream, &(struct adam_step){.param = &r.param,
                                                 .master = &r.master,
                                                 .exp_avg = &r.exp_avg,
                                                 .exp_avg_sq = &r.exp_avg_sq,
                                                 .grad = &r.grad,
                                                 .grad_scale = grad_scale,
                                                 .lr = lr,
                                                 .beta1 = config->beta1,
                                                 .beta2 = config->beta2,
                                                 .eps = config->eps,
                                                 .weight_decay = weight_decay,
                                                 .step = optimizer->num_steps});
    } else {
        op_sgd_step(stream, &(struct sgd_step){.param = &r.param,
                                               .master = &r.master,
                                               .momentum_buffer =
                                                   config->momentum != 0.0f ? &r.exp_avg : NULL,
                                               .grad = &r.grad,
                                               .grad_scale = grad_scale,
                                               .lr = lr,
                                               .momentum = config->momentum,
                                               .weight_decay = weight_decay,
                                               .first_step = optimizer->num_steps == 1});
    }
}

void optimizer_step(struct optimizer *optimizer, struct stream *stream,
                    const struct optimizer_rates *rates, const struct tensor *grad_scale)
{
    if (optimizer->buckets != NULL) {
        param_gather_finish(optimizer->buckets); /* nothing, where all parameters were used */
    }
    optimizer->num_steps++;
    for (int i = 0; i < optimizer->num_ranges; i++) {
        const struct optimizer_range *range = &optimizer->ranges[i];

        step_range(optimizer, stream, range, range->decoupled_lr ? rates->decoupled_lr : rates->lr,
                   range->weight_decay ? rates->weight_decay : 0.0f, grad_scale);
    }
}

int optimizer_states(struct optimizer *optimizer, struct optimizer_state *states)
{
    int count = 0;

    if (optimizer->master.data != NULL) {
        states[count++] = (struct optimizer_state){"param", &optimizer->master};
    }
    if (optimizer->exp_avg.data != NULL) {
        states[count++] = (struct optimizer_state){"exp_avg", &optimizer->exp_avg};
    }
    if (optimizer->exp_avg_sq.data != NULL) {
        states[count++] = (struct optimizer_state){"exp_avg_sq", &optimizer->exp_avg_sq};
    }
    return count;
}

struct tensor optimizer_state_of(const struct tensor *state, const struct optimizer_shard *shard)
{
    return tensor_rows(state, shard->state_start, shard->count);
}
