#include "train/train_checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"

enum { ITEM_NAME_MAX = PARAM_NAME_MAX + 32 };

/* The items of a save and the memory of their names. */
struct item_list {
    struct ckpt_item *items;
    char (*names)[ITEM_NAME_MAX];
    int num_items, capacity;
};

static void item_list_init(struct item_list *list, int capacity)
{
    *list = (struct item_list){.capacity = capacity};
    list->items = calloc((size_t)capacity, sizeof *list->items);
    list->names = calloc((size_t)capacity, sizeof *list->names);
    CHECK(list->items != NULL && list->names != NULL, "out of memory");
}

static void item_list_free(struct item_list *list)
{
    free(list->items);
    free(list->names);
}

static struct ckpt_item *add_item(struct item_list *list, enum dtype dtype, const void *data,
                                  bool is_optimizer)
{
    struct ckpt_item *item = &list->items[list->num_items];

    CHECK(list->num_items < list->capacity, "%d items", list->capacity);
    *item = (struct ckpt_item){.name = list->names[list->num_items++],
                               .dtype = dtype,
                               .data = data,
                               .is_optimizer = is_optimizer};
    return item;
}

static void set_shape(struct ckpt_item *item, const struct param *param)
{
    item->num_dims = param->num_dims;
    memcpy(item->global_shape, param->global_shape, sizeof item->global_shape);
    item->box = param->box;
}

static void add_param(struct item_list *list, const struct param *param)
{
    struct ckpt_item *item = add_item(list, param->value.dtype, param->value.data, false);

    snprintf((char *)item->name, ITEM_NAME_MAX, "%s", param->name);
    set_shape(item, param);
}

static void state_name(char name[ITEM_NAME_MAX], const struct optimizer_state *state,
                       const struct param *param)
{
    snprintf(name, ITEM_NAME_MAX, "optimizer.state.%s.%s", state->name, param->name);
}

static void add_optimizer_states(struct item_list *list, struct optimizer *optimizer,
                                 const struct param *param)
{
    struct optimizer_state states[OPTIMIZER_STATES_MAX];
    const int count = optimizer_states(optimizer, states);

    for (int i = 0; i < count; i++) {
        const struct tensor part = optimizer_state_of(states[i].tensor, param);
        struct ckpt_item *item = add_item(list, DTYPE_F32, part.data, true);

        state_name((char *)item->name, &states[i], param);
        set_shape(item, param);
    }
}

static void bias_name(char name[ITEM_NAME_MAX], const struct transformer_layer *layer)
{
    snprintf(name, ITEM_NAME_MAX, "decoder.layers.%d.mlp.router.expert_bias", layer->number);
}

static bool has_expert_bias(const struct transformer_layer *layer)
{
    return layer->is_moe && layer->moe.router.expert_bias.data != NULL;
}

static void add_expert_biases(struct item_list *list, struct transformer_stage *stage)
{
    for (int i = 0; i < stage->num_layers; i++) {
        struct transformer_layer *layer = &stage->layers[i];
        struct ckpt_item *item;

        if (!has_expert_bias(layer)) {
            continue;
        }
        item = add_item(list, DTYPE_F32, layer->moe.router.expert_bias.data, false);
        bias_name((char *)item->name, layer);
        item->num_dims = 1;
        item->global_shape[0] = layer->moe.router.config.num_experts;
        item->box = box_whole(item->global_shape, 1);
    }
}

static void collect_items(struct item_list *list, struct trainer *trainer)
{
    const struct param_list *params = &trainer->stage.params;

    item_list_init(list,
                   params->num_params * (1 + OPTIMIZER_STATES_MAX) + trainer->stage.num_layers);
    for (int i = 0; i < params->num_params; i++) {
        add_param(list, params->params[i]);
    }
    add_expert_biases(list, &trainer->stage);
    for (int i = 0; i < params->num_params && trainer->options->save_optim; i++) {
        add_optimizer_states(list, &trainer->optimizer, params->params[i]);
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

static int stage_item(void *context, const struct ckpt_item *item, void *host)
{
    struct stream *stream = context;
    const size_t size_bytes =
        (size_t)box_num_elements(&item->box) * (size_t)dtype_size_bytes(item->dtype);

    stream_copy_to_host(stream, host, item->data, size_bytes);
    return 0;
}

int train_checkpoint_save(struct trainer *trainer)
{
    struct item_list list;
    json_t *state = training_state(trainer);
    int result;

    CHECK(state != NULL, "the training state is no JSON");
    if (!trainer->options->save_rng) {
        json_object_del(state, "rng");
    }
    collect_items(&list, trainer);
    stream_wait(trainer->stream);
    log_info("saving checkpoint at iteration %7lld to %s in torch_dist format",
             (long long)trainer->iteration, trainer->options->save);
    result = checkpoint_save(&(struct checkpoint_save_request){
        .directory = trainer->options->save,
        .iteration = trainer->iteration,
        .items = list.items,
        .num_items = list.num_items,
        .stage = stage_item,
        .stage_context = trainer->stream,
        .state = state,
    });
    item_list_free(&list);
    json_decref(state);
    if (result == 0) {
        log_info("  successfully saved checkpoint from iteration %7lld to %s",
                 (long long)trainer->iteration, trainer->options->save);
    }
    return result;
}

int param_list_read(struct param_list *params, struct stream *stream,
                    const struct param_reader *reader)
{
    for (int i = 0; i < params->num_params; i++) {
        struct param *param = params->params[i];
        const size_t size_bytes = tensor_size_bytes(&param->value);
        void *host = malloc(size_bytes + 1);
        int result;

        CHECK(host != NULL, "out of memory for %s", param->name);
        stream_copy_to_host(stream, host, param->value.data, size_bytes);
        result = reader->read(reader->context, param, host);
        if (result == 0) {
            stream_copy_from_host(stream, param->value.data, host, size_bytes);
        }
        free(host);
        TRY(result);
    }
    return 0;
}

static bool is_vocabulary(const struct param *param)
{
    return strcmp(param->name, "embedding.word_embeddings.weight") == 0 ||
           strcmp(param->name, "output_layer.weight") == 0;
}

static struct checkpoint_read read_of(const char *name, const struct param *param, enum dtype dtype)
{
    struct checkpoint_read read = {.name = name,
                                   .dtype = dtype,
                                   .num_dims = param->num_dims,
                                   .box = param->box,
                                   .allow_dim0_difference = is_vocabulary(param)};

    memcpy(read.global_shape, param->global_shape, sizeof read.global_shape);
    return read;
}

static int read_param(void *context, const struct param *param, void *host)
{
    const struct checkpoint_read read = read_of(param->name, param, param->value.dtype);

    return checkpoint_read_box(context, &read, host);
}

static int read_expert_biases(struct transformer_stage *stage, struct stream *stream,
                              const struct checkpoint *checkpoint)
{
    for (int i = 0; i < stage->num_layers; i++) {
        struct transformer_layer *layer = &stage->layers[i];
        char name[ITEM_NAME_MAX];
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
        stream_copy_from_host(stream, layer->moe.router.expert_bias.data, host,
                              (size_t)read.global_shape[0] * sizeof *host);
        free(host);
        TRY(result);
    }
    return 0;
}

int train_checkpoint_read_model(struct transformer_stage *stage, struct stream *stream,
                                const struct checkpoint *checkpoint)
{
    TRY(param_list_read(&stage->params, stream,
                        &(struct param_reader){.read = read_param, .context = (void *)checkpoint}));
    return read_expert_biases(stage, stream, checkpoint);
}

static int read_state(struct trainer *trainer, const struct checkpoint *checkpoint,
                      const struct optimizer_state *state, const struct param *param)
{
    char name[ITEM_NAME_MAX];
    const struct tensor part = optimizer_state_of(state->tensor, param);
    const size_t size_bytes = tensor_size_bytes(&part);
    struct checkpoint_read read;
    void *host = calloc(1, size_bytes + 1);
    int result;

    CHECK(host != NULL, "out of memory for the optimizer state of %s", param->name);
    state_name(name, state, param);
    read = read_of(name, param, DTYPE_F32);
    result = checkpoint_read_box(checkpoint, &read, host);
    if (result == 0) {
        stream_copy_from_host(trainer->stream, part.data, host, size_bytes);
    }
    free(host);
    return result;
}

static int64_t state_int(const json_t *state, const char *section, const char *key)
{
    const json_t *object = section != NULL ? json_object_get(state, section) : state;

    return json_integer_value(json_object_get(object, key));
}

static int restore_optimizer(struct trainer *trainer, const struct checkpoint *checkpoint)
{
    struct optimizer_state states[OPTIMIZER_STATES_MAX];
    const int count = optimizer_states(&trainer->optimizer, states);
    const struct param_list *params = &trainer->stage.params;

    for (int i = 0; i < params->num_params; i++) {
        for (int s = 0; s < count; s++) {
            if (read_state(trainer, checkpoint, &states[s], params->params[i]) != 0) {
                return error_prepend("optimizer state (--no-load-optim goes on without it)");
            }
        }
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

int train_checkpoint_restore(struct trainer *trainer, const struct checkpoint *checkpoint)
{
    const struct options *options = trainer->options;
    const json_t *state = checkpoint_state(checkpoint);
    const json_t *scheduler = json_object_get(state, "opt_param_scheduler");

    TRY(check_args(options, json_object_get(state, "args")));
    TRY(train_checkpoint_read_model(&trainer->stage, trainer->stream, checkpoint));
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
