#include "train/train_checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "optim/param_gather.h"

enum { BIAS_NAME_MAX = 96 };

static struct checkpoint_ranks ranks_of(const struct trainer *trainer)
{
    return checkpoint_ranks_of(trainer->groups.world);
}

enum checkpoint_found train_checkpoint_find(const struct trainer *trainer,
                                            char path[PATH_LENGTH_MAX])
{
    const struct options *options = trainer->options;
    const struct checkpoint_ranks ranks = ranks_of(trainer);
    enum checkpoint_found found = CHECKPOINT_NONE;

    if (options->load != NULL) {
        found = checkpoint_find_together(&ranks, options->load, options->ckpt_step, path);
    }
    if (found == CHECKPOINT_NONE && options->finetune && options->pretrained_checkpoint != NULL) {
        found = checkpoint_find_together(&ranks, options->pretrained_checkpoint, -1, path);
    }
    return found;
}

/* ---- the routers' buffers ---- */

static void bias_name(char name[BIAS_NAME_MAX], const struct transformer_layer *layer)
{
    snprintf(name, BIAS_NAME_MAX, "decoder.layers.%d.mlp.router.expert_bias", layer->number);
}

static bool has_expert_bias(const struct transformer_layer *layer)
{
    return layer->is_moe && layer->moe.router.expert_bias.data != NULL;
}

/* Every rank of a stage holds the same. */
static void add_expert_biases(struct ckpt_item_list *list, const struct transformer_stage *stage)
{
    for (int i = 0; i < stage->place.num_layers; i++) {
        const struct transformer_layer *layer = &stage->layers[i];
        char name[BIAS_NAME_MAX];
        struct ckpt_item item = {.name = name, .dtype = DTYPE_F32, .num_dims = 1};

        if (!has_expert_bias(layer)) {
            continue;
        }
        bias_name(name, layer);
        item.global_shape[0] = layer->moe.router.config.num_experts;
        item.box = box_whole(item.global_shape, 1);
        item.data = layer->moe.router.expert_bias.data;
        ckpt_item_list_add(list, &item);
    }
}

static int read_expert_biases(struct transformer_stage *stage, struct stream *stream,
                              const struct checkpoint *checkpoint)
{
    for (int i = 0; i < stage->place.num_layers; i++) {
        struct transformer_layer *layer = &stage->layers[i];
        char name[BIAS_NAME_MAX];
        struct checkpoint_read read = {.name = name, .dtype = DTYPE_F32, .num_dims = 1};
        float *host;
        int result;

        if (!has_expert_bias(layer)) {
            continue;
        }
        bias_name(name, layer);
        read.global_shape[0] = layer->moe.router.config.num_experts;
        read.box = box_whole(read.global_shape, 1);
        host = malloc((size_t)read.global_shape[0] * sizeof *host);
        CHECK(host != NULL, "out of memory");
        result = checkpoint_read_box(checkpoint, &read, host);
        if (result == 0) {
            stream_copy_from_host(stream, layer->moe.router.expert_bias.data, host,
                                  (size_t)read.global_shape[0] * sizeof *host);
        }
        free(host);
        TRY(result);
    }
    return 0;
}

/* ---- saving ---- */

static void collect_items(struct ckpt_item_list *list, struct trainer *trainer)
{
    const struct groups *groups = &trainer->groups;

    ckpt_item_list_add_params(list, &trainer->params, groups);
    for (int i = 0; i < trainer->num_chunks; i++) {
        if (groups->tp->rank == 0 && groups->dp_cp->rank == 0) {
            add_expert_biases(list, &trainer->chunks[i]);
        }
    }
    if (trainer->options->save_optim) {
        ckpt_item_list_add_optimizer(list, &trainer->optimizer, groups);
    }
}

static json_t *training_state(struct trainer *trainer)
{
    const struct lr_schedule_config *lr = &trainer->lr_schedule;

    return json_pack(
        "{s:o, s:I, s:I, s:I, s:I, s:f, s:I, s:{s:I}, s:{s:I, s:f, s:f, s:f, s:I, s:s}, s:{s:I}}",
        "args", options_to_json(trainer->options), "iteration", (json_int_t)trainer->iteration,
        "consumed_train_samples", (json_int_t)trainer->consumed_samples, "consumed_valid_samples",
        (json_int_t)trainer->consumed_valid_samples, "skipped_train_samples",
        (json_int_t)trainer->skipped_samples, "num_floating_point_operations_so_far",
        trainer->flops_so_far, "vocab_size", (json_int_t)trainer->config.vocab_size, "optimizer",
        "num_steps", (json_int_t)trainer->optimizer.num_steps, "opt_param_scheduler", "num_samples",
        (json_int_t)trainer->schedule_samples, "max_lr", lr->max_lr, "min_lr", lr->min_lr,
        "lr_warmup_samples", lr->warmup_samples, "lr_decay_samples", (json_int_t)lr->decay_samples,
        "lr_decay_style", lr_decay_style_name(lr->style), "rng", "seed",
        (json_int_t)trainer->random_seed);
}

static void copy_to_host(void *context, void *host, const void *data, size_t size_bytes)
{
    stream_copy_to_host(context, host, data, size_bytes);
}

/* The manifest's state; NULL on ranks whose state is not written. */
static json_t *state_to_write(struct trainer *trainer)
{
    json_t *state;

    if (trainer->groups.world->rank != 0) {
        return NULL;
    }
    state = training_state(trainer);
    CHECK(state != NULL, "the training state is no JSON");
    if (!trainer->options->save_rng) {
        json_object_del(state, "rng");
    }
    return state;
}

int train_checkpoint_save(struct trainer *trainer)
{
    struct ckpt_item_list list = {0};
    json_t *state = state_to_write(trainer);
    int result;

    param_gather_finish(&trainer->buckets);
    stream_wait(trainer->stream);
    collect_items(&list, trainer);
    log_info("saving checkpoint at iteration %7lld to %s in torch_dist format",
             (long long)trainer->iteration, trainer->options->save);
    result = checkpoint_save(&(struct checkpoint_save_request){
        .directory = trainer->options->save,
        .iteration = trainer->iteration,
        .items = list.items,
        .num_items = list.num_items,
        .copy = copy_to_host,
        .context = trainer->stream,
        .state = state,
        .ranks = ranks_of(trainer),
    });
    ckpt_item_list_free(&list);
    json_decref(state);
    if (result == 0) {
        log_info("  successfully saved checkpoint from iteration %7lld to %s",
                 (long long)trainer->iteration, trainer->options->save);
    }
    return result;
}

/* ---- restoring ---- */

int train_checkpoint_read_model(struct transformer_stage *stage, struct stream *stream,
                                const struct checkpoint *checkpoint)
{
    TRY(checkpoint_read_params(checkpoint, stage->params, stream));
    return read_expert_biases(stage, stream, checkpoint);
}

static int read_chunks(struct trainer *trainer, const struct checkpoint *checkpoint)
{
    TRY(checkpoint_read_params(checkpoint, &trainer->params, trainer->stream));
    for (int i = 0; i < trainer->num_chunks; i++) {
        TRY(read_expert_biases(&trainer->chunks[i], trainer->stream, checkpoint));
    }
    return 0;
}

static int64_t state_int(const json_t *state, const char *section, const char *key)
{
    const json_t *object = section != NULL ? json_object_get(state, section) : state;

    return json_integer_value(json_object_get(object, key));
}

static int restore_optimizer(struct trainer *trainer, const struct checkpoint *checkpoint)
{
    if (checkpoint_read_optimizer(checkpoint, &trainer->optimizer, trainer->stream) != 0) {
        return error_prepend("optimizer state (--no-load-optim goes on without it)");
    }
    trainer->optimizer.num_steps =
        state_int(checkpoint_state(checkpoint), "optimizer", "num_steps");
    return 0;
}

/* The schedule of the command line and the checkpoint's must agree, unless a flag says which wins
 * (M6.6). */
static int restore_schedule(struct trainer *trainer, const json_t *scheduler)
{
    const struct options *options = trainer->options;
    struct lr_schedule_config *lr = &trainer->lr_schedule;
    const struct {
        const char *key;
        double *value;
    } values[] = {{"max_lr", &lr->max_lr},
                  {"min_lr", &lr->min_lr},
                  {"lr_warmup_samples", &lr->warmup_samples}};

    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        const double saved = json_number_value(json_object_get(scheduler, values[i].key));

        if (options->use_checkpoint_opt_param_scheduler) {
            *values[i].value = saved;
        } else if (saved != *values[i].value && !options->override_opt_param_scheduler) {
            return error_set("%s of the checkpoint is %g, of the flags %g: make them equal, or say "
                             "which wins by --override-opt_param-scheduler or "
                             "--use-checkpoint-opt_param-scheduler",
                             values[i].key, saved, *values[i].value);
        }
    }
    if (options->use_checkpoint_opt_param_scheduler) {
        lr->decay_samples = state_int(scheduler, NULL, "lr_decay_samples");
        TRY(lr_decay_style_parse(json_string_value(json_object_get(scheduler, "lr_decay_style")),
                                 &lr->style));
    }
    trainer->schedule_samples = state_int(scheduler, NULL, "num_samples");
    return 0;
}

/* What Megatron compares (M8.7); everything else shows as a missing tensor or another shape. */
static int check_args(const struct options *options, const json_t *saved)
{
    static const char *const keys[] = {"num_layers", "hidden_size", "num_attention_heads",
                                       "position_embedding_type"};
    json_t *mine = options_to_json(options);
    int result = 0;

    for (size_t i = 0; i < sizeof keys / sizeof keys[0] && result == 0; i++) {
        const json_t *theirs = json_object_get(saved, keys[i]);
        const json_t *ours = json_object_get(mine, keys[i]);

        if (theirs != NULL && ours != NULL && !json_equal(theirs, ours)) {
            char *a = json_dumps(theirs, JSON_ENCODE_ANY), *b = json_dumps(ours, JSON_ENCODE_ANY);

            result = error_set("%s value from checkpoint (%s) is not equal to the input argument "
                               "value (%s)",
                               keys[i], a, b);
            free(a);
            free(b);
        }
    }
    json_decref(mine);
    return result;
}

static int restore_progress(struct trainer *trainer, const json_t *state)
{
    trainer->iteration = state_int(state, NULL, "iteration");
    trainer->consumed_samples = state_int(state, NULL, "consumed_train_samples");
    trainer->consumed_valid_samples = state_int(state, NULL, "consumed_valid_samples");
    trainer->skipped_samples = state_int(state, NULL, "skipped_train_samples");
    trainer->flops_so_far =
        json_number_value(json_object_get(state, "num_floating_point_operations_so_far"));
    if (trainer->iteration < 0 || trainer->consumed_samples < 0) {
        return error_set("the checkpoint's counters are negative: iteration %lld, "
                         "consumed samples %lld",
                         (long long)trainer->iteration, (long long)trainer->consumed_samples);
    }
    if (trainer->options->load_rng && json_object_get(state, "rng") != NULL) {
        trainer->random_seed = (uint64_t)state_int(state, "rng", "seed");
    }
    return 0;
}

/* Of this rank. */
static int restore(struct trainer *trainer, const struct checkpoint *checkpoint)
{
    const struct options *options = trainer->options;
    const json_t *state = checkpoint_state(checkpoint);
    const json_t *scheduler = json_object_get(state, "opt_param_scheduler");

    TRY(check_args(options, json_object_get(state, "args")));
    TRY(read_chunks(trainer, checkpoint));
    optimizer_reset_masters(&trainer->optimizer, trainer->stream);
    if (options->finetune) {
        return 0;
    }
    TRY(restore_progress(trainer, state));
    if (!options->load_optim || scheduler == NULL) {
        return 0;
    }
    TRY(restore_optimizer(trainer, checkpoint));
    return restore_schedule(trainer, scheduler);
}

int train_checkpoint_restore(struct trainer *trainer, const struct checkpoint *checkpoint)
{
    const struct checkpoint_ranks ranks = ranks_of(trainer);

    return checkpoint_ranks_agree(&ranks, restore(trainer, checkpoint));
}
