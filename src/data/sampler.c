#include "data/sampler.h"

#include <stdlib.h>

#include "base/check.h"
#include "data/numpy_random.h"

static int64_t chunk_samples(const struct sampler *sampler)
{
    return sampler->micro_batch_size * sampler->num_ranks;
}

/* Samples that a cyclic epoch takes: whole chunks. */
static int64_t epoch_samples(const struct sampler *sampler)
{
    return sampler->num_samples - sampler->num_samples % chunk_samples(sampler);
}

int sampler_init(struct sampler *sampler, enum sampler_order order, int64_t num_samples,
                 int64_t consumed_samples, int64_t micro_batch_size, int64_t rank,
                 int64_t num_ranks)
{
    CHECK(micro_batch_size > 0 && rank >= 0 && rank < num_ranks && consumed_samples >= 0,
          "micro batch %lld, rank %lld of %lld, consumed %lld", (long long)micro_batch_size,
          (long long)rank, (long long)num_ranks, (long long)consumed_samples);
    *sampler = (struct sampler){
        .order = order,
        .num_samples = num_samples,
        .micro_batch_size = micro_batch_size,
        .rank = rank,
        .num_ranks = num_ranks,
        .consumed_samples = consumed_samples,
    };
    if (epoch_samples(sampler) == 0) {
        return error_set(
            "%lld samples are too few for one microbatch of %lld on %lld data-parallel "
            "ranks",
            (long long)num_samples, (long long)micro_batch_size, (long long)num_ranks);
    }
    if (order == SAMPLER_CYCLIC &&
        consumed_samples % epoch_samples(sampler) % chunk_samples(sampler) != 0) {
        return error_set("--dataloader-type cyclic cannot continue after %lld samples: that is not "
                         "a multiple of micro batch %lld times %lld data-parallel ranks",
                         (long long)consumed_samples, (long long)micro_batch_size,
                         (long long)num_ranks);
    }
    return 0;
}

static void permute_epoch(struct sampler *sampler, int64_t epoch)
{
    const int64_t count = epoch_samples(sampler) / sampler->num_ranks;

    if (sampler->permutation == NULL) {
        sampler->permutation = malloc((size_t)count * sizeof sampler->permutation[0]);
        CHECK(sampler->permutation != NULL, "out of memory for a permutation of %lld samples",
              (long long)count);
    } else if (sampler->epoch == epoch) {
        return;
    }
    torch_randperm(sampler->permutation, count, (uint32_t)epoch);
    sampler->epoch = epoch;
}

static void next_cyclic(struct sampler *sampler, int64_t *indices)
{
    const int64_t in_epoch = sampler->consumed_samples % epoch_samples(sampler);
    const int64_t range_start = sampler->rank * (epoch_samples(sampler) / sampler->num_ranks);

    permute_epoch(sampler, sampler->consumed_samples / epoch_samples(sampler));
    for (int64_t b = 0; b < sampler->micro_batch_size; b++) {
        indices[b] = range_start + sampler->permutation[in_epoch / sampler->num_ranks + b];
    }
}

int sampler_next(struct sampler *sampler, int64_t *indices, int64_t *sample_ids)
{
    const int64_t first = sampler->consumed_samples + sampler->rank * sampler->micro_batch_size;

    if (sampler->order == SAMPLER_SINGLE &&
        sampler->consumed_samples + chunk_samples(sampler) > sampler->num_samples) {
        return error_set("the data is used up: %lld of its %lld samples are consumed, and the next "
                         "microbatch takes %lld",
                         (long long)sampler->consumed_samples, (long long)sampler->num_samples,
                         (long long)chunk_samples(sampler));
    }
    for (int64_t b = 0; b < sampler->micro_batch_size; b++) {
        sample_ids[b] = indices[b] = first + b;
    }
    if (sampler->order == SAMPLER_CYCLIC) {
        next_cyclic(sampler, indices);
    }
    sampler->consumed_samples += chunk_samples(sampler);
    return 0;
}

void sampler_free(struct sampler *sampler)
{
    free(sampler->permutation);
    sampler->permutation = NULL;
}
