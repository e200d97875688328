#include <stdio.h>
#include <string.h>

#include "args/help.h"
#include "args/options.h"
#include "base/check.h"
#include "base/log.h"
#include "ckpt/checkpoint.h"
#include "ckpt/manifest.h"
#include "cmd/cmd.h"
#include "comm/comm_mpi.h"
#include "comm/launch.h"
#include "train/train.h"

/* --use-checkpoint-args: the model's options come from the checkpoint's, where no flag was given.
 */
static int apply_checkpoint_args(struct options *options)
{
    char path[PATH_LENGTH_MAX];
    struct manifest manifest;
    int result;

    if (!options->use_checkpoint_args) {
        return 0;
    }
    if (options->load == NULL) {
        return error_set("--use-checkpoint-args needs --load");
    }
    switch (checkpoint_find(options->load, options->ckpt_step, path)) {
    case CHECKPOINT_ERROR:
        return -1;
    case CHECKPOINT_NONE:
        return error_set("--use-checkpoint-args: %s holds no checkpoint", options->load);
    case CHECKPOINT_FOUND:
        break;
    }
    TRY(manifest_read(&manifest, path));
    result = options_apply_json(options, json_object_get(manifest.state, "args"));
    manifest_free(&manifest);
    return result;
}

static int run(struct options *options, int argc, char **argv)
{
    TRY(options_parse(options, argc, argv));
    TRY(apply_checkpoint_args(options));
    if (options->fake_init_process_group) {
        TRY(launch_emulate());
    }
    TRY(options_validate(options, launch_size()));
    comm_mpi_set_timeout(60.0 * options->distributed_timeout_minutes);
    if (log_speaks()) {
        (options->print_config ? options_print_config : options_print)(options, stdout);
    }
    if (launch_is_emulated()) {
        log_warn("an emulation of rank %d of %d: memory and time of its computation are real, "
                 "communication takes none, losses mean nothing",
                 launch_rank(), launch_size());
    }
    return options->print_config ? 0 : train(options);
}

int cmd_pretrain(int argc, char **argv)
{
    struct options options;
    int result;

    TRY(launch_init(&argc, &argv));
    log_configure(launch_rank() == 0);
    if (help_requested(&options_table, argc, argv, log_speaks() ? stdout : NULL)) {
        return 0;
    }
    TRY(options_init(&options));
    result = run(&options, argc, argv);
    options_free(&options);
    return result;
}
