#include "train/captured_step.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "comm/comm_nccl.h"
#include "comm/launch.h"
#include "ops/ops_profile.h"
#include "train/walk.h"

bool captured_step_is_wanted(const struct options *options)
{
    return strcmp(options->cuda_graph_impl, "full_iteration") == 0;
}

int captured_step_check(const struct options *options, const struct device *device)
{
    if (!captured_step_is_wanted(options) || device->kind == DEVICE_NULL) {
        return 0;
    }
    if (!device_can_capture(device)) {
        return error_set("--cuda-graph-impl full_iteration: there are no graphs on the CPU, which "
                         "--device %s chose; legal: none",
                         options->device);
    }
    if (options_passes_communicate(options) && !comm_nccl_is_chosen() && !launch_is_emulated()) {
        return error_set("--cuda-graph-impl full_iteration: forward and backward communicate, and "
                         "these GPUs exchange tensors through the host, which no graph can; it "
                         "needs NCCL and a GPU for each rank");
    }
    return 0;
}

static bool is_warm(const struct captured_step *captured, const struct options *options)
{
    return captured->num_steps >= options->cuda_graph_warmup_steps;
}

bool captured_step_gathers(const struct captured_step *captured, const struct options *options)
{
    return captured_step_is_wanted(options) && options->overlap_param_gather &&
           is_warm(captured, options);
}

int captured_step_pass_all(struct batch_walk *walk)
{
    struct grad_buckets *buckets = &walk->trainer->buckets;

    if (buckets->config.overlap_param_gather) {
        param_gather_leave_to_forward(buckets);
    }
    TRY(batch_walk_pass_all(walk));
    if (buckets->config.overlap_param_gather) {
        param_gather_finish(buckets);
    }
    if (buckets->config.overlap_grad_reduce) {
        grad_buckets_finish(buckets);
    }
    return 0;
}

/* ---- what --log-comm counts ---- */

static int num_counters(void)
{
    return groups_num_comms() * NUM_COMM_KINDS;
}

static struct comm_counter *counters_new(void)
{
    struct comm_counter *counters = calloc((size_t)num_counters(), sizeof *counters);

    CHECK(counters != NULL, "out of memory");
    return counters;
}

/* counters, read before the capture, become what it has added. */
static void counters_captured(struct comm_counter *counters, const struct groups *groups)
{
    struct comm_counter *now = counters_new();

    groups_read_counters(groups, now);
    for (int i = 0; i < num_counters(); i++) {
        counters[i].num_calls = now[i].num_calls - counters[i].num_calls;
        counters[i].sent_bytes = now[i].sent_bytes - counters[i].sent_bytes;
    }
    free(now);
}

/* ---- the graph ---- */

static bool runs_op_by_op(const struct captured_step *captured, const struct trainer *trainer)
{
    return !is_warm(captured, trainer->options) || ops_profile_is_running();
}

static int capture(struct captured_step *captured, struct batch_walk *walk)
{
    struct trainer *trainer = walk->trainer;

    if (captured->graph != NULL) {
        stream_wait(trainer->stream);
    }
    captured_step_free(captured, trainer->stream);
    captured->counters = counters_new();
    groups_read_counters(&trainer->groups, captured->counters);
    comm_nccl_capture_begin();
    stream_capture_begin(trainer->stream);
    TRY(captured_step_pass_all(walk));
    captured->graph = stream_capture_end(trainer->stream);
    comm_nccl_capture_end();
    counters_captured(captured->counters, &trainer->groups);
    captured->num_microbatches = walk->num_microbatches;
    return 0;
}

/* What the host knows is what it would know if it had issued the passes. */
static void launch(struct captured_step *captured, struct trainer *trainer)
{
    stream_graph_launch(trainer->stream, captured->graph);
    comm_nccl_graph_launched(trainer->stream);
    if (trainer->buckets.config.overlap_param_gather) {
        param_gather_finished_by_graph(&trainer->buckets);
    }
    if (trainer->buckets.config.overlap_grad_reduce) {
        grad_buckets_finished_by_graph(&trainer->buckets);
    }
}

static int run_graph(struct captured_step *captured, struct batch_walk *walk)
{
    if (captured->graph == NULL || captured->num_microbatches != walk->num_microbatches) {
        TRY(capture(captured, walk));
    } else {
        groups_add_counters(&walk->trainer->groups, captured->counters);
    }
    launch(captured, walk->trainer);
    return 0;
}

int captured_step_run(struct captured_step *captured, struct batch_walk *walk)
{
    batch_walk_begin(walk);
    TRY(batch_walk_load_all(walk));
    TRY(runs_op_by_op(captured, walk->trainer) ? batch_walk_pass_all(walk)
                                               : run_graph(captured, walk));
    batch_walk_end(walk);
    captured->num_steps++;
    return 0;
}

void captured_step_free(struct captured_step *captured, struct stream *stream)
{
    stream_graph_free(stream, captured->graph);
    free(captured->counters);
    captured->graph = NULL;
    captured->counters = NULL;
}
