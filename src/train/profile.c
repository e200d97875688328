#include "train/profile.h"

#include <stdio.h>

#include "base/check.h"
#include "base/log.h"
#include "base/path.h"
#include "ops/ops_profile.h"

void profile_before_step(struct profile *profile, struct trainer *trainer)
{
    const struct options *options = trainer->options;

    if (options->profile && !profile->is_running && trainer->groups.world->rank == 0 &&
        trainer->iteration >= options->profile_step_start &&
        trainer->iteration < options->profile_step_end) {
        profile->is_running = true;
        profile->first = trainer->iteration + 1;
        ops_profile_start(trainer->stream);
    }
}

int profile_after_step(struct profile *profile, struct trainer *trainer)
{
    return trainer->iteration >= trainer->options->profile_step_end
               ? profile_finish(profile, trainer)
               : 0;
}

int profile_finish(struct profile *profile, struct trainer *trainer)
{
    const char *directory = trainer->options->tensorboard_dir;
    char path[PATH_LENGTH_MAX];

    if (!profile->is_running) {
        return 0;
    }
    profile->is_running = false;
    ops_profile_stop(trainer->stream);
    ops_profile_print(stdout, &(struct op_roof){0});
    TRY(path_format(path, "%s/profile-steps-%lld-%lld.json", directory != NULL ? directory : ".",
                    (long long)profile->first, (long long)trainer->iteration));
    TRY(ops_profile_write_trace(path));
    log_info("profile of steps %lld to %lld: %s", (long long)profile->first,
             (long long)trainer->iteration, path);
    return 0;
}
