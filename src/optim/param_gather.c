/* param_gather.c - all_gathers are issued in one order on all ranks, that of first need; a wait for
 * one of them sends off the next. Two are under way at a time: a layer's dense parameters and its
 * experts' lie in two buckets, of different groups. More would only slow the first one down. */
#include "optim/param_gather.h"

#include "base/check.h"

enum { GATHERS_UNDER_WAY = 2 };

static bool is_needed(const struct grad_buckets *buckets, const struct grad_bucket *bucket)
{
    return buckets->config.distributed_optimizer && bucket->data->size > 1;
}

static void gather_next(struct grad_buckets *buckets)
{
    struct grad_bucket *bucket = &buckets->buckets[buckets->gather_order[buckets->num_gathered++]];
    struct tensor all = tensor_rows(&buckets->params->values, bucket->start, bucket->count);
    const struct tensor own =
        tensor_rows(&buckets->params->values, bucket->own_start, bucket->own_count);

    if (bucket->values == VALUES_STALE) {
        bucket->gather = comm_all_gather(bucket->data, buckets->stream, &all, &own);
        bucket->values = VALUES_GATHERING;
    }
}

static int num_under_way(const struct grad_buckets *buckets)
{
    int count = 0;

    for (int i = 0; i < buckets->num_gathered; i++) {
        count += buckets->buckets[buckets->gather_order[i]].values == VALUES_GATHERING;
    }
    return count;
}

/* As many as may be under way. */
static void gather_ahead(struct grad_buckets *buckets)
{
    while (buckets->num_gathered < buckets->num_buckets &&
           num_under_way(buckets) < GATHERS_UNDER_WAY) {
        gather_next(buckets);
    }
}

static void wait_for(struct grad_buckets *buckets, struct grad_bucket *bucket)
{
    while (bucket->values == VALUES_STALE) {
        gather_next(buckets);
    }
    if (bucket->values == VALUES_GATHERING) {
        comm_wait(bucket->gather, buckets->stream);
        bucket->values = VALUES_GATHERED;
    }
}

void param_gather_leave_to_forward(struct grad_buckets *buckets)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        struct grad_bucket *bucket = &buckets->buckets[i];

        CHECK(bucket->values != VALUES_GATHERING, "bucket %d is still being gathered", i);
        bucket->values = is_needed(buckets, bucket) ? VALUES_STALE : VALUES_GATHERED;
    }
    buckets->num_gathered = 0;
}

void param_gather_start(struct grad_buckets *buckets)
{
    param_gather_leave_to_forward(buckets);
    if (buckets->config.overlap_param_gather) {
        gather_ahead(buckets);
    } else {
        param_gather_finish(buckets);
    }
}

void param_gather_need(struct grad_buckets *buckets, int begin, int end)
{
    for (int i = begin; i < end; i++) {
        struct grad_bucket *bucket = &buckets->buckets[buckets->bucket_of[i]];

        if (bucket->values != VALUES_GATHERED) {
            wait_for(buckets, bucket);
            gather_ahead(buckets);
        }
    }
}

void param_gather_finish(struct grad_buckets *buckets)
{
    while (buckets->num_gathered < buckets->num_buckets) {
        gather_next(buckets);
    }
    for (int i = 0; i < buckets->num_buckets; i++) {
        wait_for(buckets, &buckets->buckets[i]);
    }
}

void param_gather_finished_by_graph(struct grad_buckets *buckets)
{
    for (int i = 0; i < buckets->num_buckets; i++) {
        buckets->buckets[i].values = VALUES_GATHERED;
    }
    buckets->num_gathered = buckets->num_buckets;
}
