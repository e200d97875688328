#include "train/captured_step.h"

#include <string.h>

#include "base/check.h"
#include "ops/ops_profile.h"
#include "train/walk.h"

bool captured_step_is_wanted(const struct options *options)
{
    return strcmp(options->cuda_graph_impl, "full_iteration") == 0;
}

int captured_step_check(const struct options *options, const struct device *device)
{
    if (captured_step_is_wanted(options) && device->kind != DEVICE_NULL &&
        !device_can_capture(device)) {
        return error_set("--cuda-graph-impl full_iteration: there are no graphs on the CPU, which "
                         "--device %s chose; legal: none",
                         options->device);
    }
    return 0;
}

static bool runs_op_by_op(const struct captured_step *captured, const struct trainer *trainer)
{
    return captured->num_steps < trainer->options->cuda_graph_warmup_steps ||
           ops_profile_is_running();
}

static int capture(struct captured_step *captured, struct batch_walk *walk)
{
    struct stream *stream = walk->trainer->stream;

    if (captured->graph != NULL) {
        stream_wait(stream);
    }
    captured_step_free(captured, stream);
    stream_capture_begin(stream);
    TRY(batch_walk_pass_all(walk));
    captured->graph = stream_capture_end(stream);
    captured->num_microbatches = walk->num_microbatches;
    return 0;
}

int captured_step_run(struct captured_step *captured, struct batch_walk *walk)
{
    batch_walk_begin(walk);
    TRY(batch_walk_load_all(walk));
    if (runs_op_by_op(captured, walk->trainer)) {
        TRY(batch_walk_pass_all(walk));
    } else {
        if (captured->graph == NULL || captured->num_microbatches != walk->num_microbatches) {
            TRY(capture(captured, walk));
        }
        stream_graph_launch(walk->trainer->stream, captured->graph);
    }
    batch_walk_end(walk);
    captured->num_steps++;
    return 0;
}

void captured_step_free(struct captured_step *captured, struct stream *stream)
{
    stream_graph_free(stream, captured->graph);
    captured->graph = NULL;
}
