#include "train/evaluate.h"

#include <math.h>

#include "base/check.h"
#include "train/walk.h"

int evaluate(struct trainer *trainer, struct loader *loader, int64_t num_iterations,
             double *mean_loss)
{
    struct batch_walk walk = {.trainer = trainer,
                              .loader = loader,
                              .num_microbatches = trainer_num_microbatches(trainer)};

    param_gather_finish(&trainer->buckets);
    for (int64_t i = 0; i < num_iterations; i++) {
        TRY(batch_walk_run(&walk));
    }
    batch_walk_sum_over_ranks(&walk);
    *mean_loss = walk.loss_sum / fmax(walk.num_tokens, 1.0);
    return 0;
}
