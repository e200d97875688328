/* What ranks save under one mapping, they load under every other, bit for bit: parameters and
 * optimizer states, whole or in shards. An error on one rank is everyone's, and the checkpoint
 * before it stays. ranks: 2 4 */
#include "dist_test.h"

#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "ckpt/checkpoint_layout.h"
#include "ckpt/param_items.h"

struct mapping {
    int tp, cp, pp, ep, etp;
    bool distributed;
    enum dtype dtype;
};

/* State 0 is the master: the values in f32. */
enum { NUM_LAYERS = 4, NUM_STATES = 3, PARAMS_MAX = 64 };

/* ---- a model: one parameter of each kind, no layers ---- */

struct kind {
    const char *name;
    int num_dims;
    int64_t shape[4];
    enum param_scope scope;
    int tp_dim; /* cut over TP, or ETP; -1: not cut */
};

/* Sizes that no other size divides where a mapping does not need it. */
static const struct kind layer_kinds[] = {
    {"norm.weight", 1, {7}, PARAM_DENSE, -1},
    {"qkv.weight", 3, {4, 3, 5}, PARAM_DENSE, 0},
    {"proj.weight", 2, {5, 8}, PARAM_DENSE, 1},
    {"router.weight", 2, {4, 7}, PARAM_DENSE, -1},
    {"experts.fc1.weight", 4, {4, 2, 4, 7}, PARAM_EXPERT, 2},
    {"experts.fc2.bias", 2, {4, 7}, PARAM_EXPERT, -1},
};
enum { NUM_LAYER_KINDS = sizeof layer_kinds / sizeof layer_kinds[0] };
/* Large enough to be written in shares. */
static const struct kind position_embedding = {"position", 2, {1031, 521}, PARAM_DENSE, -1};
static const struct kind embedding = {"embedding", 2, {12, 7}, PARAM_DENSE, 0};

struct model {
    struct mapping mapping;
    struct groups groups;
    struct param_list params;
    struct optimizer optimizer;
    struct tensor states[NUM_STATES];
    struct optimizer_shard shards[PARAMS_MAX];
    struct grad_buckets buckets; /* only says whether the optimizer is distributed */
};

static void add_param(struct model *model, const struct kind *kind, const char *name, bool is_copy)
{
    const struct groups *groups = &model->groups;
    const bool expert = kind->scope == PARAM_EXPERT;
    const struct comm *tp = expert ? groups->etp : groups->tp;
    struct param facts = {.num_dims = kind->num_dims, .scope = kind->scope, .is_copy = is_copy};

    snprintf(facts.name, sizeof facts.name, "%s", name);
    memcpy(facts.global_shape, kind->shape, sizeof kind->shape);
    facts.box = box_whole(kind->shape, kind->num_dims);
    if (expert) {
        facts.box = box_part(&facts.box, 0, groups->ep->rank, groups->ep->size);
    }
    if (kind->tp_dim >= 0) {
        facts.box = box_part(&facts.box, kind->tp_dim, tp->rank, tp->size);
    }
    param_add(&model->params, &facts);
}

static void add_params(struct model *model)
{
    const int stage = model->groups.pp->rank, num_stages = model->groups.pp->size;

    param_list_init(&model->params);
    if (stage == 0) {
        add_param(model, &embedding, "embedding.word_embeddings.weight", false);
        add_param(model, &position_embedding, "embedding.position_embeddings.weight", false);
    }
    for (int l = stage; l < NUM_LAYERS; l += num_stages) { /* as chunks of one layer */
        for (int k = 0; k < NUM_LAYER_KINDS; k++) {
            char name[PARAM_NAME_MAX];

            snprintf(name, sizeof name, "decoder.layers.%d.%s", l, layer_kinds[k].name);
            add_param(model, &layer_kinds[k], name, false);
        }
    }
    if (stage == num_stages - 1 && num_stages > 1) {
        add_param(model, &embedding, "embedding.word_embeddings.weight", true);
    }
    param_list_allocate(&model->params, arena, stream, model->mapping.dtype, false);
}

/* The run of n elements that part `index` of `count` holds: unequal, at odd places. */
static void odd_part(int64_t n, int index, int count, int64_t *first, int64_t *end)
{
    *first = index == 0 ? 0 : n * index / count + (n > 20 ? index : 0);
    *end = index + 1 == count ? n : n * (index + 1) / count + (n > 20 ? index + 1 : 0);
}

static void add_shards(struct model *model)
{
    struct optimizer *optimizer = &model->optimizer;
    int64_t num_elements = 0;

    *optimizer = (struct optimizer){.config = {.kind = OPTIMIZER_ADAM}, .shards = model->shards};
    model->buckets.config.distributed_optimizer = model->mapping.distributed;
    optimizer->buckets = &model->buckets;
    for (int i = 0; i < model->params.num_params; i++) {
        const struct param *param = model->params.params[i];
        const struct comm *dp =
            param->scope == PARAM_EXPERT ? model->groups.edp : model->groups.dp_cp;
        int64_t first = 0, end = box_num_elements(&param->box);

        if (model->mapping.distributed) {
            odd_part(end, dp->rank, dp->size, &first, &end);
        }
        if (first < end) {
            model->shards[optimizer->num_shards++] =
                (struct optimizer_shard){param, first, end - first, num_elements + 3};
            num_elements += end - first + 3; /* paddings in between */
        }
    }
    for (int s = 0; s < NUM_STATES; s++) {
        model->states[s] = tensor_new(arena, DTYPE_F32, num_elements);
        memset(model->states[s].data, 0, tensor_size_bytes(&model->states[s]));
    }
    optimizer->params = &model->params;
    if (model->mapping.dtype != DTYPE_F32) {
        optimizer->master = model->states[0];
    }
    optimizer->exp_avg = model->states[1];
    optimizer->exp_avg_sq = model->states[2];
}

static void model_create(struct model *model, const struct mapping *mapping)
{
    const struct rank_grid_sizes sizes = {.world = launch_size(),
                                          .tp = mapping->tp,
                                          .cp = mapping->cp,
                                          .pp = mapping->pp,
                                          .ep = mapping->ep,
                                          .etp = mapping->etp};
    struct rank_grid grid;

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    *model = (struct model){.mapping = *mapping};
    groups_create(&model->groups, &grid, launch_rank(), false);
    add_params(model);
    add_shards(model);
}

static void model_destroy(struct model *model)
{
    param_list_free(&model->params);
    groups_destroy(&model->groups);
    dist_release();
}

/* ---- values: of (state, name, global element) ---- */

static struct rng_key values_key(int state, const struct param *param, int64_t iteration)
{
    return rng_key((uint64_t)iteration, param->name, (uint64_t)state);
}

static float element_value(struct rng_key key, const struct param *param, int64_t element)
{
    uint64_t index = 0, size = 1;

    for (int d = param->num_dims - 1; d >= 0; d--) {
        index += (uint64_t)(param->box.offset[d] + element % param->box.size[d]) * size;
        element /= param->box.size[d];
        size *= (uint64_t)param->global_shape[d];
    }
    return rng_to_uniform((uint32_t)rng_mix(((uint64_t)key.high << 32 | key.low) + index));
}

static float rounded(float value, enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? bf16_to_float(bf16_from_float(value)) : value;
}

static void set_values(struct model *model, int64_t iteration)
{
    for (int i = 0; i < model->params.num_params; i++) {
        struct param *param = model->params.params[i];
        const struct rng_key key = values_key(0, param, iteration);

        for (int64_t e = 0; e < tensor_num_elements(&param->value); e++) {
            dist_set(&param->value, e, element_value(key, param, e));
        }
    }
    for (int i = 0; i < model->optimizer.num_shards; i++) {
        const struct optimizer_shard *shard = &model->shards[i];

        for (int s = 0; s < NUM_STATES; s++) {
            const struct rng_key key = values_key(s, shard->param, iteration);
            float *state = (float *)model->states[s].data + shard->state_start;

            for (int64_t e = 0; e < shard->count; e++) {
                state[e] = element_value(key, shard->param, shard->first + e);
            }
        }
    }
}

/* How many values are not those of the iteration. */
static int64_t count_wrong(struct model *model, int64_t iteration, enum dtype saved_dtype)
{
    int64_t num_wrong = 0;

    for (int i = 0; i < model->params.num_params; i++) {
        const struct param *param = model->params.params[i];
        const struct rng_key key = values_key(0, param, iteration);

        for (int64_t e = 0; e < tensor_num_elements(&param->value); e++) {
            const float saved = rounded(element_value(key, param, e), saved_dtype);

            num_wrong += dist_get(&param->value, e) != rounded(saved, param->value.dtype);
        }
    }
    for (int i = 0; i < model->optimizer.num_shards; i++) {
        const struct optimizer_shard *shard = &model->shards[i];

        for (int s = model->mapping.dtype == DTYPE_F32 ? 1 : 0; s < NUM_STATES; s++) {
            const struct rng_key key = values_key(s, shard->param, iteration);
            const float *state = (const float *)model->states[s].data + shard->state_start;

            for (int64_t e = 0; e < shard->count; e++) {
                num_wrong += state[e] != element_value(key, shard->param, shard->first + e);
            }
        }
    }
    return num_wrong;
}

/* ---- saving and loading ---- */

static int save(struct model *model, const char *directory, int64_t iteration)
{
    struct ckpt_item_list list = {0};
    struct checkpoint_save_request request = {.directory = directory,
                                              .iteration = iteration,
                                              .ranks = checkpoint_ranks_of(model->groups.world)};
    int result;

    set_values(model, iteration);
    ckpt_item_list_add_params(&list, &model->params, &model->groups);
    ckpt_item_list_add_optimizer(&list, &model->optimizer, &model->groups);
    request.items = list.items;
    request.num_items = list.num_items;
    request.state = launch_rank() == 0 ? json_object() : NULL;
    result = checkpoint_save(&request);
    json_decref(request.state);
    ckpt_item_list_free(&list);
    return result;
}

static int load(struct model *model, const char *directory, int64_t iteration)
{
    const struct checkpoint_ranks ranks = checkpoint_ranks_of(model->groups.world);
    char path[PATH_LENGTH_MAX];
    struct checkpoint *checkpoint;
    int result;

    /* Only rank 0 looks. */
    if (checkpoint_find_together(&ranks, launch_rank() == 0 ? directory : "/nowhere", iteration,
                                 path) != CHECKPOINT_FOUND) {
        return error_set("not found: %s", error_text());
    }
    checkpoint = checkpoint_open(path, &ranks);
    TRY(checkpoint == NULL);
    result = checkpoint_read_params(checkpoint, &model->params, stream);
    if (result == 0) {
        result = checkpoint_read_optimizer(checkpoint, &model->optimizer, stream);
    }
    checkpoint_close(checkpoint);
    return checkpoint_ranks_agree(&ranks, result);
}

static const struct mapping mappings_of_2[] = {
    {1, 1, 1, 1, 1, false, DTYPE_F32}, {1, 1, 1, 1, 1, true, DTYPE_BF16},
    {2, 1, 1, 2, 1, true, DTYPE_F32},  {1, 1, 2, 1, 1, false, DTYPE_BF16},
    {1, 2, 1, 1, 2, true, DTYPE_BF16},
};
static const struct mapping mappings_of_4[] = {
    {1, 1, 1, 1, 1, false, DTYPE_F32}, {1, 1, 1, 4, 1, true, DTYPE_BF16},
    {2, 1, 1, 2, 2, true, DTYPE_F32},  {4, 1, 1, 1, 4, false, DTYPE_BF16},
    {1, 1, 4, 1, 1, true, DTYPE_F32},  {1, 2, 2, 2, 1, true, DTYPE_BF16},
    {2, 2, 1, 4, 1, false, DTYPE_F32}, {2, 1, 2, 1, 1, true, DTYPE_F32},
};

static const struct mapping *mapping_at(int index)
{
    return launch_size() == 2 ? &mappings_of_2[index] : &mappings_of_4[index];
}

static int num_mappings(void)
{
    return launch_size() == 2 ? sizeof mappings_of_2 / sizeof mappings_of_2[0]
                              : sizeof mappings_of_4 / sizeof mappings_of_4[0];
}

/* Iteration i is saved under mapping i - 1. */
static void test_every_mapping_loads_every_other(const char *directory)
{
    struct model model;

    for (int i = 0; i < num_mappings(); i++) {
        model_create(&model, mapping_at(i));
        if (save(&model, directory, i + 1) != 0) {
            dist_failed("mapping %d: %s", i, error_text());
        }
        model_destroy(&model);
    }
    for (int to = 0; to < num_mappings(); to++) {
        for (int from = 0; from < num_mappings(); from++) {
            int64_t num_wrong;

            model_create(&model, mapping_at(to));
            if (load(&model, directory, from + 1) != 0) {
                dist_failed("mapping %d from %d: %s", to, from, error_text());
            } else if ((num_wrong = count_wrong(&model, from + 1, mapping_at(from)->dtype)) != 0) {
                dist_failed("mapping %d from %d: %lld wrong values", to, from,
                            (long long)num_wrong);
            }
            model_destroy(&model);
        }
    }
}

/* ---- errors ---- */

/* All ranks failed with the same words, which contain these. */
static void expect_shared_error(struct comm *world, int result, const char *word, const char *other)
{
    const struct checkpoint_ranks ranks = checkpoint_ranks_of(world);
    char mine[1024], first[1024];

    snprintf(mine, sizeof mine, "%s", error_text());
    memcpy(first, mine, sizeof first);
    checkpoint_ranks_share(&ranks, first, sizeof first);
    if (result == 0 || strcmp(mine, first) != 0 || strstr(mine, word) == NULL ||
        strstr(mine, other) == NULL) {
        dist_failed("result %d, error \"%s\" of rank 0's \"%s\", wanted %s, %s", result, mine,
                    first, word, other);
    }
}

/* A file size limit stands for a full disk: write(2) fails in the middle of a file. */
static int save_with_full_disk(struct model *model, const char *directory, int faulty_rank)
{
    struct rlimit limit, small;
    int result;

    getrlimit(RLIMIT_FSIZE, &limit);
    small = (struct rlimit){2000, limit.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    if (launch_rank() == faulty_rank) {
        setrlimit(RLIMIT_FSIZE, &small);
    }
    result = save(model, directory, 100);
    setrlimit(RLIMIT_FSIZE, &limit);
    return result;
}

static void test_an_error_on_one_rank_is_everyones(const char *directory)
{
    struct model model;
    char tracker[PATH_LENGTH_MAX], rank_name[32];
    int result;

    model_create(&model, &(struct mapping){.tp = launch_size(),
                                           .cp = 1,
                                           .pp = 1,
                                           .ep = 1,
                                           .etp = launch_size(),
                                           .dtype = DTYPE_F32});
    for (int rank = 0; rank < launch_size(); rank++) {
        result = save_with_full_disk(&model, directory, rank);
        snprintf(rank_name, sizeof rank_name, "rank %d: ", rank);
        expect_shared_error(model.groups.world, result, rank_name, "File too large");
        if (load(&model, directory, -1) != 0 ||
            count_wrong(&model, num_mappings(), mapping_at(num_mappings() - 1)->dtype) != 0) {
            dist_failed("after rank %d failed: %s", rank, error_text());
        }
    }
    expect_shared_error(model.groups.world, load(&model, directory, 77), "iter_0000077",
                        "--ckpt-step");
    if (path_format(tracker, "%s/%s", directory, CHECKPOINT_TRACKER) == 0 && launch_rank() == 0) {
        path_write_file_atomic(tracker, "nonsense", 8);
    }
    expect_shared_error(model.groups.world, load(&model, directory, -1), "nonsense", "--ckpt-step");
    model_destroy(&model);
}

/* In the hash of a file that another rank than 0 checks. */
static void test_damage_is_everyones_error(const char *directory)
{
    struct model model;
    char path[PATH_LENGTH_MAX];

    if (launch_rank() == 0 &&
        path_format(path, "%s/iter_0000001/optimizer/shard-00001-model-00001-of-00001.safetensors",
                    directory) == 0) {
        FILE *file = fopen(path, "r+b");

        fseek(file, -1, SEEK_END);
        fputc('x', file);
        fclose(file);
    }
    model_create(&model, mapping_at(0));
    expect_shared_error(model.groups.world, load(&model, directory, 1), "is damaged: rank ",
                        "--ckpt-step");
    model_destroy(&model);
}

/* A parameter that is missing where one rank looks for it. */
static void test_a_missing_tensor_is_everyones_error(const char *directory)
{
    const struct kind other = {"other", 1, {3}, PARAM_DENSE, -1};
    struct model model;
    char rank_name[32];

    model_create(&model, mapping_at(0));
    param_list_free(&model.params);
    param_list_init(&model.params);
    model.optimizer.num_shards = 0;
    if (launch_rank() == launch_size() - 1) {
        add_param(&model, &other, "nowhere.weight", false);
    }
    param_list_allocate(&model.params, arena, stream, DTYPE_F32, false);
    snprintf(rank_name, sizeof rank_name, "rank %d: ", launch_size() - 1);
    expect_shared_error(model.groups.world, load(&model, directory, 1), rank_name,
                        "no tensor nowhere.weight");
    model_destroy(&model);
}

int main(int argc, char **argv)
{
    char directory[64];

    dist_begin(argc, argv);
    /* The ranks of one mpirun have the same parent. */
    snprintf(directory, sizeof directory, "/tmp/cadre_dist_checkpoint_%ld", (long)getppid());
    test_every_mapping_loads_every_other(directory);
    test_a_missing_tensor_is_everyones_error(directory);
    test_damage_is_everyones_error(directory);
    test_an_error_on_one_rank_is_everyones(directory);
    if (launch_rank() == 0 && path_remove_tree(directory) != 0) {
        dist_failed("%s", error_text());
    }
    return dist_end();
}
