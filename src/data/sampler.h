/* sampler.h - which samples a data-parallel rank takes next (reference M9.5). */
#ifndef CADRE_DATA_SAMPLER_H
#define CADRE_DATA_SAMPLER_H

#include <stdint.h>

enum sampler_order {
    SAMPLER_SINGLE, /* in order, once: rank r has the r-th micro_batch_size of each chunk */
    SAMPLER_CYCLIC, /* for ever: each rank permutes a range of its own anew in every epoch */
};

struct sampler {
    enum sampler_order order;
    int64_t num_samples, micro_batch_size;
    int64_t rank, num_ranks;  /* data parallel */
    int64_t consumed_samples; /* by all ranks: where the next chunk begins */
    /* cyclic: the permutation of `epoch`, NULL before the first. torch.randperm, as the original.
     */
    uint32_t *permutation;
    int64_t epoch;
};

/* -1 if not even one chunk of micro_batch_size * num_ranks samples is there, or (cyclic) if
 * consumed_samples lies inside a chunk. */
int sampler_init(struct sampler *sampler, enum sampler_order order, int64_t num_samples,
                 int64_t consumed_samples, int64_t micro_batch_size, int64_t rank,
                 int64_t num_ranks);
/* indices [micro_batch_size]: samples of the data set; sample_ids: their numbers among all samples
 * the run consumes, which do not depend on how ranks are laid out. -1 when there is no full chunk
 * left (single). */
int sampler_next(struct sampler *sampler, int64_t *indices, int64_t *sample_ids);
void sampler_free(struct sampler *sampler);

#endif
