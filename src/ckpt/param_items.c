#include "ckpt/param_items.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { NAME_MAX_BYTES = PARAM_NAME_MAX + 64 };
/* A tensor is cut into shares for several writers as long as they stay this large. */
static const int64_t share_min_bytes = 1 << 20;

/* ---- the list ---- */

void ckpt_item_list_add(struct ckpt_item_list *list, const struct ckpt_item *item)
{
    if (list->num_items == list->capacity) {
        list->capacity = list->capacity > 0 ? 2 * list->capacity : 64;
        list->items = realloc(list->items, (size_t)list->capacity * sizeof *list->items);
        CHECK(list->items != NULL, "out of memory");
    }
    list->items[list->num_items] = *item;
    list->items[list->num_items].name = strdup(item->name);
    CHECK(list->items[list->num_items].name != NULL, "out of memory");
    list->num_items++;
}

void ckpt_item_list_free(struct ckpt_item_list *list)
{
    for (int i = 0; i < list->num_items; i++) {
        free((char *)list->items[i].name);
    }
    free(list->items);
    *list = (struct ckpt_item_list){0};
}

/* ---- who writes what ---- */

/* Elements of a parameter's box. */
struct run {
    int64_t first, count;
};

/* This rank among those that hold the same box of a parameter. */
struct replica {
    int index, count;
};

/* TP (ETP for experts) cuts the box. EP cuts the first dim of experts, nothing else cuts any. */
static bool is_cut_by_tp(const struct param *param)
{
    for (int i = param->scope == PARAM_EXPERT ? 1 : 0; i < param->num_dims; i++) {
        if (param->box.size[i] != param->global_shape[i]) {
            return true;
        }
    }
    return false;
}

static struct replica replica_over_tp(const struct param *param, const struct groups *groups)
{
    const struct comm *tp = param->scope == PARAM_EXPERT ? groups->etp : groups->tp;

    return is_cut_by_tp(param) ? (struct replica){0, 1} : (struct replica){tp->rank, tp->size};
}

static struct replica replica_of(const struct param *param, const struct groups *groups)
{
    const struct comm *dp = param->scope == PARAM_EXPERT ? groups->edp : groups->dp_cp;
    const struct replica tp = replica_over_tp(param, groups);

    return (struct replica){tp.index + tp.count * dp->rank, tp.count * dp->size};
}

/* The rows this replica writes, as a run. */
static struct run share_of(const struct param *param, const struct groups *groups, enum dtype dtype)
{
    const struct replica replica = replica_of(param, groups);
    const int64_t num_elements = box_num_elements(&param->box), rows = param->box.size[0];
    int64_t num_shares = num_elements * dtype_size_bytes(dtype) / share_min_bytes;
    int64_t begin, end;

    num_shares = num_shares < replica.count ? num_shares : replica.count;
    num_shares = num_shares < rows ? num_shares : rows;
    num_shares = num_shares > 1 ? num_shares : 1;
    if (replica.index >= num_shares || num_elements == 0) {
        return (struct run){0, 0};
    }
    begin = rows * replica.index / num_shares;
    end = rows * (replica.index + 1) / num_shares;
    return (struct run){begin * (num_elements / rows), (end - begin) * (num_elements / rows)};
}

/* Of a shard of the optimizer: the ranks that share out the states hold different runs, the others
 * hold the same. */
static struct run shard_share(const struct optimizer *optimizer,
                              const struct optimizer_shard *shard, const struct groups *groups)
{
    if (optimizer->buckets == NULL || !optimizer->buckets->config.distributed_optimizer) {
        return share_of(shard->param, groups, DTYPE_F32);
    }
    return replica_over_tp(shard->param, groups).index == 0
               ? (struct run){shard->first, shard->count}
               : (struct run){0, 0};
}

/* ---- saving ---- */

/* data: of the run's first element. */
static void add_run(struct ckpt_item_list *list, const struct param *param, const struct run *run,
                    const struct ckpt_item *facts, const char *data)
{
    struct box parts[BOX_RUN_PARTS_MAX];
    const int num_parts = box_from_run(&param->box, run->first, run->count, parts);

    for (int i = 0; i < num_parts; i++) {
        struct ckpt_item item = *facts;

        item.num_dims = param->num_dims;
        memcpy(item.global_shape, param->global_shape, sizeof item.global_shape);
        item.box = parts[i];
        item.data = data;
        ckpt_item_list_add(list, &item);
        data += box_num_elements(&parts[i]) * dtype_size_bytes(item.dtype);
    }
}

void ckpt_item_list_add_params(struct ckpt_item_list *list, const struct param_list *params,
                               const struct groups *groups)
{
    for (int i = 0; i < params->num_params; i++) {
        const struct param *param = params->params[i];
        const enum dtype dtype = param->value.dtype;
        const struct run run = share_of(param, groups, dtype);

        if (!param->is_copy) {
            add_run(list, param, &run, &(struct ckpt_item){.name = param->name, .dtype = dtype},
                    (const char *)param->value.data + run.first * dtype_size_bytes(dtype));
        }
    }
}

static void state_name(char name[NAME_MAX_BYTES], const struct optimizer_state *state,
                       const struct param *param)
{
    snprintf(name, NAME_MAX_BYTES, "optimizer.state.%s.%s", state->name, param->name);
}

void ckpt_item_list_add_optimizer(struct ckpt_item_list *list, struct optimizer *optimizer,
                                  const struct groups *groups)
{
    struct optimizer_state states[OPTIMIZER_STATES_MAX];
    const int num_states = optimizer_states(optimizer, states);

    for (int i = 0; i < optimizer->num_shards; i++) {
        const struct optimizer_shard *shard = &optimizer->shards[i];
        const struct run run = shard_share(optimizer, shard, groups);
        char name[NAME_MAX_BYTES];

        for (int s = 0; s < num_states && !shard->param->is_copy; s++) {
            const float *data = optimizer_state_of(states[s].tensor, shard).data;

            state_name(name, &states[s], shard->param);
            add_run(list, shard->param, &run,
                    &(struct ckpt_item){.name = name, .dtype = DTYPE_F32, .is_optimizer = true},
                    (const char *)(data + run.first - shard->first));
        }
    }
}

/* ---- loading ---- */

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

int checkpoint_read_params(const struct checkpoint *checkpoint, struct param_list *params,
                           struct stream *stream)
{
    return param_list_read(
        params, stream, &(struct param_reader){.read = read_param, .context = (void *)checkpoint});
}

/* The shard's run of a state into host memory. */
static int read_shard(const struct checkpoint *checkpoint, const struct optimizer_shard *shard,
                      const struct optimizer_state *state, float *host)
{
    struct box parts[BOX_RUN_PARTS_MAX];
    const int num_parts = box_from_run(&shard->param->box, shard->first, shard->count, parts);
    char name[NAME_MAX_BYTES];
    struct checkpoint_read read;

    state_name(name, state, shard->param);
    if (strcmp(state->name, "param") == 0 && checkpoint_find_tensor(checkpoint, name) == NULL) {
        snprintf(name, sizeof name, "%s", shard->param->name); /* f32 weights are the masters */
    }
    read = read_of(name, shard->param, DTYPE_F32);
    for (int i = 0; i < num_parts; i++) {
        read.box = parts[i];
        TRY(checkpoint_read_box(checkpoint, &read, host));
        host += box_num_elements(&parts[i]);
    }
    return 0;
}

static int restore_shard(const struct checkpoint *checkpoint, const struct optimizer_shard *shard,
                         const struct optimizer_state *state, struct stream *stream)
{
    const size_t size_bytes = (size_t)shard->count * sizeof(float);
    float *device = optimizer_state_of(state->tensor, shard).data;
    float *host = malloc(size_bytes + 1);
    int result;

    CHECK(host != NULL, "out of memory for the optimizer state of %s", shard->param->name);
    stream_copy_to_host(stream, host, device, size_bytes); /* for rows that are not on disk */
    result = read_shard(checkpoint, shard, state, host);
    if (result == 0) {
        stream_copy_from_host(stream, device, host, size_bytes);
    }
    free(host);
    return result;
}

int checkpoint_read_optimizer(const struct checkpoint *checkpoint, struct optimizer *optimizer,
                              struct stream *stream)
{
    struct optimizer_state states[OPTIMIZER_STATES_MAX];
    const int num_states = optimizer_states(optimizer, states);

    for (int i = 0; i < optimizer->num_shards; i++) {
        for (int s = 0; s < num_states; s++) {
            TRY(restore_shard(checkpoint, &optimizer->shards[i], &states[s], stream));
        }
    }
    return 0;
}
