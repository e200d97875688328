#include "train/evaluate.h"

#include <math.h>

#include "base/check.h"
#include "train/walk.h"

int evaluate(struct trainer *trainer, struct loader *loader, int64_t num_iterations,
             double *mean_loss)
{
    struct loss_sums mine = {0};
    double sums[2];

    param_gather_finish(&trainer->buckets);
    for (int64_t i = 0; i < num_iterations; i++) {
        struct batch_walk walk = {.trainer = trainer,
                                  .loader = loader,
                                  .num_microbatches = trainer_num_microbatches(trainer)};
        const int result = batch_walk_run(&walk);

        loss_reading_finish(&walk.loss, trainer->stream, &mine);
        TRY(result);
    }
    sums[0] = mine.loss;
    sums[1] = mine.num_tokens;
    trainer_sum(trainer, trainer->groups.dp_cp, sums, 2);
    trainer_sum(trainer, trainer->groups.pp, sums, 2);
    *mean_loss = sums[0] / fmax(sums[1], 1.0);
    return 0;
}
