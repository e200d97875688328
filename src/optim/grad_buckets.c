/* grad_buckets.c - why this order of sums: the sum over data parallelism comes first, because a
 * bucket can start it as soon as backward is through; the sums over tp and the embedding group are
 * small, and with the distributed optimizer they then concern the owned part only. The mean is
 * taken last, of the owned part. All these are linear, so the order changes nothing but rounding.
 *
 * Megatron has one bucket per class on pipeline stages after the first; here every stage overlaps.
 */
#include "optim/grad_buckets.h"

#include <stdlib.h>

#include "base/check.h"
#include "ops/ops.h"
#include "optim/param_gather.h"

/* In the order of the buffers. */
enum bucket_class {
    BUCKET_DENSE,
    BUCKET_SUM_OVER_TP,
    BUCKET_SHARED_OVER_STAGES,
    BUCKET_EXPERTS,
    NUM_BUCKET_CLASSES
};

static enum bucket_class class_of(const struct param *param)
{
    CHECK((param->scope == PARAM_EXPERT) + param->sum_over_tp + param->shared_over_stages <= 1,
          "%s is of several classes", param->name);
    if (param->scope == PARAM_EXPERT) {
        return BUCKET_EXPERTS;
    }
    if (param->shared_over_stages) {
        return BUCKET_SHARED_OVER_STAGES;
    }
    return param->sum_over_tp ? BUCKET_SUM_OVER_TP : BUCKET_DENSE;
}

/* ---- layout ---- */

static void sort_params(struct grad_buckets *buckets)
{
    int count = 0;

    for (int kind = 0; kind < NUM_BUCKET_CLASSES; kind++) {
        for (int i = buckets->params->num_params - 1; i >= 0; i--) {
            if ((int)class_of(buckets->params->params[i]) == kind) {
                buckets->order[count++] = i;
            }
        }
    }
}

static int64_t bucket_size_of(const struct grad_buckets_config *config, const struct groups *groups)
{
    const int64_t per_rank = 1000000 * (int64_t)groups->dp_cp->size;

    if (!config->overlap_grad_reduce) {
        return INT64_MAX;
    }
    if (config->bucket_size > 0) {
        return config->bucket_size;
    }
    return per_rank > 40000000 ? per_rank : 40000000;
}

static int64_t round_up(int64_t x, int64_t multiple)
{
    return (x + multiple - 1) / multiple * multiple;
}

static struct grad_bucket *open_bucket(struct grad_buckets *buckets, const struct groups *groups,
                                       enum bucket_class kind, int begin)
{
    struct grad_bucket *bucket = &buckets->buckets[buckets->num_buckets++];

    *bucket = (struct grad_bucket){.start = buckets->params->num_elements,
                                   .begin = begin,
                                   .end = begin,
                                   .data = kind == BUCKET_EXPERTS ? groups->edp : groups->dp_cp};
    if (kind == BUCKET_SUM_OVER_TP) {
        bucket->late = groups->tp;
    } else if (kind == BUCKET_SHARED_OVER_STAGES) {
        bucket->late = groups->embedding;
    }
    return bucket;
}

static void add_to_bucket(struct grad_buckets *buckets, struct grad_bucket *bucket)
{
    const int index = buckets->order[bucket->end++];
    struct param *param = buckets->params->params[index];

    param->start = bucket->start + bucket->count;
    bucket->count += round_up(box_num_elements(&param->box), PARAM_ALIGNMENT_ELEMENTS);
    buckets->bucket_of[index] = (int)(bucket - buckets->buckets);
}

static void close_bucket(struct grad_buckets *buckets, struct grad_bucket *bucket)
{
    const bool is_shared_out = buckets->config.distributed_optimizer;
    const int64_t num_parts = is_shared_out ? bucket->data->size : 1;

    bucket->count = round_up(bucket->count, PARAM_ALIGNMENT_ELEMENTS * num_parts);
    bucket->own_count = bucket->count / num_parts;
    bucket->own_start =
        bucket->start + (is_shared_out ? bucket->data->rank : 0) * bucket->own_count;
    buckets->params->num_elements += bucket->count;
}

static void lay_out(struct grad_buckets *buckets, const struct groups *groups)
{
    struct param_list *params = buckets->params;
    const int64_t bucket_size = bucket_size_of(&buckets->config, groups);

    params->num_elements = 0;
    for (int i = 0; i < params->num_params;) {
        const enum bucket_class kind = class_of(params->params[buckets->order[i]]);
        struct grad_bucket *bucket = open_bucket(buckets, groups, kind, i);

        while (i < params->num_params && bucket->count < bucket_size &&
               class_of(params->params[buckets->order[i]]) == kind) {
            add_to_bucket(buckets, bucket);
            i++;
        }
        close_bucket(buckets, bucket);
    }
}

/* The forward pass needs a bucket when it comes to the first registered of its parameters, which is
 * the last in the buffers. */
static int first_need(const struct grad_buckets *buckets, int bucket)
{
    return buckets->order[buckets->buckets[bucket].end - 1];
}

static void sort_by_need(struct grad_buckets *buckets)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        int place = i;

        while (place > 0 &&
               first_need(buckets, buckets->gather_order[place - 1]) > first_need(buckets, i)) {
            buckets->gather_order[place] = buckets->gather_order[place - 1];
            place--;
        }
        buckets->gather_order[place] = i;
    }
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count + 1, size);

    CHECK(memory != NULL, "out of memory for gradient buckets");
    return memory;
}

void grad_buckets_init(struct grad_buckets *buckets, struct param_list *params,
                       const struct groups *groups, struct stream *stream,
                       const struct grad_buckets_config *config)
{
    const size_t count = (size_t)params->num_params;

    CHECK(params->values.data == NULL, "buckets are laid out before memory is allocated");
    CHECK(config->distributed_optimizer || !config->overlap_param_gather,
          "only the distributed optimizer gathers parameters");
    *buckets = (struct grad_buckets){
        .config = *config,
        .params = params,
        .stream = stream,
        .factor = config->average ? (float)(1.0 / groups->dp_cp->size) : 1.0f,
        .buckets = allocate(count, sizeof *buckets->buckets),
        .order = allocate(count, sizeof *buckets->order),
        .bucket_of = allocate(count, sizeof *buckets->bucket_of),
        .gather_order = allocate(count, sizeof *buckets->gather_order),
    };
    sort_params(buckets);
    lay_out(buckets, groups);
    sort_by_need(buckets);
    grad_buckets_begin(buckets);
}

void grad_buckets_free(struct grad_buckets *buckets)
{
    free(buckets->buckets);
    free(buckets->order);
    free(buckets->bucket_of);
    free(buckets->gather_order);
    *buckets = (struct grad_buckets){0};
}

/* ---- reduction ---- */

static struct tensor own_grads(const struct grad_buckets *buckets, const struct grad_bucket *bucket)
{
    return tensor_rows(&buckets->params->grads, bucket->own_start, bucket->own_count);
}

static void reduce_over_data(struct grad_buckets *buckets, struct grad_bucket *bucket)
{
    struct tensor all = tensor_rows(&buckets->params->grads, bucket->start, bucket->count);
    struct tensor own = own_grads(buckets, bucket);

    bucket->grads = GRADS_REDUCING;
    bucket->reduction = (struct comm_handle){NULL, NULL};
    if (bucket->data->size == 1) {
        return;
    }
    bucket->reduction = buckets->config.distributed_optimizer
                            ? comm_reduce_scatter(bucket->data, buckets->stream, &own, &all)
                            : comm_all_reduce(bucket->data, buckets->stream, &all, COMM_SUM);
}

static void scale(struct grad_buckets *buckets, struct grad_bucket *bucket, float factor)
{
    struct tensor own = own_grads(buckets, bucket);

    if (factor != 1.0f) {
        op_linear_combination(buckets->stream,
                              &(struct linear_combination){.y = &own, .x = &own, .a = factor});
    }
}

/* After reduce_over_data: its result becomes the mean, and the sum over the late group begins. */
static void average(struct grad_buckets *buckets, struct grad_bucket *bucket)
{
    struct tensor own = own_grads(buckets, bucket);

    comm_wait(bucket->reduction, buckets->stream);
    bucket->reduction = (struct comm_handle){NULL, NULL};
    scale(buckets, bucket, buckets->factor);
    if (bucket->late != NULL && bucket->late->size > 1) {
        bucket->reduction = comm_all_reduce(bucket->late, buckets->stream, &own, COMM_SUM);
    }
}

void grad_buckets_begin(struct grad_buckets *buckets)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        struct grad_bucket *bucket = &buckets->buckets[i];

        CHECK(bucket->grads != GRADS_REDUCING, "bucket %d of the step before was not finished", i);
        bucket->grads = GRADS_OWN;
        bucket->num_pending = bucket->end - bucket->begin;
    }
}

static void grads_ready(void *context, int begin, int end)
{
    struct grad_buckets *buckets = context;

    for (int i = begin; i < end; i++) {
        struct grad_bucket *bucket = &buckets->buckets[buckets->bucket_of[i]];

        CHECK(bucket->num_pending > 0, "%s: its gradient was final before",
              buckets->params->params[i]->name);
        if (--bucket->num_pending == 0) {
            reduce_over_data(buckets, bucket);
        }
    }
}

static void values_needed(void *context, int begin, int end)
{
    param_gather_need(context, begin, end);
}

struct param_hooks grad_buckets_hooks(struct grad_buckets *buckets, bool is_last_microbatch)
{
    const bool reports = buckets->config.overlap_grad_reduce && is_last_microbatch;

    return (struct param_hooks){.values_needed =
                                    buckets->config.overlap_param_gather ? values_needed : NULL,
                                .grads_ready = reports ? grads_ready : NULL,
                                .context = buckets};
}

void grad_buckets_finish(struct grad_buckets *buckets)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        if (buckets->buckets[i].grads == GRADS_OWN) {
            reduce_over_data(buckets, &buckets->buckets[i]);
        }
    }
    for (int i = 0; i < buckets->num_buckets; i++) {
        if (buckets->buckets[i].grads == GRADS_REDUCING) {
            average(buckets, &buckets->buckets[i]);
        }
    }
    for (int i = 0; i < buckets->num_buckets; i++) {
        if (buckets->buckets[i].grads == GRADS_REDUCING) {
            comm_wait(buckets->buckets[i].reduction, buckets->stream);
            buckets->buckets[i].grads = GRADS_REDUCED;
        }
    }
}

void grad_buckets_finished_by_graph(struct grad_buckets *buckets)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        buckets->buckets[i].grads = GRADS_REDUCED;
    }
}

void grad_buckets_scale(struct grad_buckets *buckets, float factor)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        scale(buckets, &buckets->buckets[i], factor);
    }
}
