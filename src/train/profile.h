/* profile.h - --profile: the ops of the steps from --profile-step-start to --profile-step-end, and
 * what NCCL moves beside them, timed on the device of rank 0. When the last of them
 * is done, a table goes to stdout and a Chrome trace to profile-steps-FIRST-LAST.json in the
 * TensorBoard directory, or where the run was started. */
#ifndef CADRE_TRAIN_PROFILE_H
#define CADRE_TRAIN_PROFILE_H

#include "train/trainer.h"

struct profile {
    bool is_running;
    int64_t first; /* step, from 1 */
};

/* Around each step; finish when the run ends, which may be before the last step. */
void profile_before_step(struct profile *profile, struct trainer *trainer);
int profile_after_step(struct profile *profile, struct trainer *trainer);
int profile_finish(struct profile *profile, struct trainer *trainer);

#endif
