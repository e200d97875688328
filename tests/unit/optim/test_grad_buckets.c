/* Where parameters lie in the buffers and which rank owns what: pure arithmetic, so groups of many
 * ranks are made up here. What is sent is tested by tests/dist/dist_optim.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "ops/ops.h"
#include "optim/optimizer.h"

struct world {
    struct groups groups;
    struct param_list params;
    struct stream *stream;
    struct arena *run;
};

static void world_create(struct world *w)
{
    groups_create_self(&w->groups);
    param_list_init(&w->params);
    w->stream = stream_create(device_null(), ops_null());
    w->run = arena_create("run", &device_null()->memory);
}

static void world_destroy(struct world *w)
{
    param_list_free(&w->params);
    arena_destroy(w->run);
    stream_destroy(w->stream);
    groups_destroy(&w->groups);
}

static void set_group(struct comm *comm, int rank, int size)
{
    comm->rank = rank;
    comm->size = size;
}

/* A vector of count elements. */
static struct param *add(struct world *w, const char *name, int64_t count)
{
    struct param facts = {.num_dims = 1, .global_shape = {count}, .weight_decay = true};

    snprintf(facts.name, sizeof facts.name, "%s", name);
    facts.box = box_whole(facts.global_shape, 1);
    return param_add(&w->params, &facts);
}

/* Two layers as a model registers them: sizes are primes, so that nothing fits by chance. */
static void add_model(struct world *w)
{
    add(w, "embedding", 1009)->shared_over_stages = true;
    for (int layer = 0; layer < 2; layer++) {
        char name[32];

        snprintf(name, sizeof name, "norm.%d", layer);
        add(w, name, 13)->sum_over_tp = true;
        snprintf(name, sizeof name, "qkv.%d", layer);
        add(w, name, 211);
        snprintf(name, sizeof name, "experts.%d", layer);
        add(w, name, 401)->scope = PARAM_EXPERT;
        snprintf(name, sizeof name, "proj.%d", layer);
        add(w, name, 67)->weight_decay = false;
    }
}

static struct grad_buckets lay_out(struct world *w, const struct grad_buckets_config *config)
{
    struct grad_buckets buckets;

    grad_buckets_init(&buckets, &w->params, &w->groups, w->stream, config);
    return buckets;
}

static void assert_order(const struct world *w, const char *const *names)
{
    for (int i = 0; i + 1 < w->params.num_params; i++) {
        const struct param *a = param_find(&w->params, names[i]);
        const struct param *b = param_find(&w->params, names[i + 1]);

        assert_true(a->start + box_num_elements(&a->box) <= b->start);
    }
}

static void test_classes_lie_apart_and_each_in_reverse_order(void **state)
{
    static const char *const names[] = {"proj.1", "qkv.1",     "proj.0",    "qkv.0",    "norm.1",
                                        "norm.0", "embedding", "experts.1", "experts.0"};
    struct world w;
    struct grad_buckets buckets;

    (void)state;
    world_create(&w);
    add_model(&w);
    buckets = lay_out(&w, &(struct grad_buckets_config){0});
    assert_int_equal(buckets.num_buckets, 4);
    assert_order(&w, names);
    assert_null(buckets.buckets[0].late);
    assert_ptr_equal(buckets.buckets[1].late, w.groups.tp);
    assert_ptr_equal(buckets.buckets[2].late, w.groups.embedding);
    assert_null(buckets.buckets[3].late);
    assert_ptr_equal(buckets.buckets[0].data, w.groups.dp_cp);
    assert_ptr_equal(buckets.buckets[3].data, w.groups.edp);
    grad_buckets_free(&buckets);
    world_destroy(&w);
}

/* Buckets lie end to end, parameters in them without overlap and at multiples of 64; the owned part
 * is the rank's of equal parts. */
static void assert_tiling(const struct world *w, const struct grad_buckets *buckets)
{
    int64_t end = 0;

    for (int b = 0; b < buckets->num_buckets; b++) {
        const struct grad_bucket *bucket = &buckets->buckets[b];
        const int num_parts = buckets->config.distributed_optimizer ? bucket->data->size : 1;
        int64_t used = bucket->start;

        assert_int_equal(bucket->start, end);
        for (int i = bucket->begin; i < bucket->end; i++) {
            const struct param *param = w->params.params[buckets->order[i]];

            assert_int_equal(buckets->bucket_of[buckets->order[i]], b);
            assert_true(param->start >= used);
            assert_int_equal(param->start % 64, 0);
            used = param->start + box_num_elements(&param->box);
        }
        end = bucket->start + bucket->count;
        assert_true(used <= end && end - used < 64 * (num_parts + 1));
        assert_int_equal(bucket->own_count * num_parts, bucket->count);
        assert_int_equal(bucket->own_count % 64, 0);
        assert_int_equal(bucket->own_start,
                         bucket->start +
                             (num_parts > 1 ? bucket->data->rank : 0) * bucket->own_count);
    }
    assert_int_equal(end, w->params.num_elements);
}

static void test_buckets_tile_the_buffers_for_every_group_and_size(void **state)
{
    const int64_t sizes[] = {1, 200, 500, 100000};

    (void)state;
    for (int n = 1; n <= 7; n++) {
        for (int distributed = 0; distributed < 2; distributed++) {
            for (int s = 0; s < 4; s++) {
                struct world w;
                struct grad_buckets buckets;

                world_create(&w);
                add_model(&w);
                set_group(w.groups.dp_cp, n - 1, n);
                set_group(w.groups.edp, 0, (n + 1) / 2);
                buckets = lay_out(
                    &w, &(struct grad_buckets_config){.distributed_optimizer = distributed == 1,
                                                      .overlap_grad_reduce = true,
                                                      .bucket_size = sizes[s]});
                assert_tiling(&w, &buckets);
                assert_int_equal(buckets.num_buckets, s == 0   ? 9
                                                      : s == 3 ? 4
                                                               : buckets.num_buckets);
                grad_buckets_free(&buckets);
                world_destroy(&w);
            }
        }
    }
}

static void test_a_bucket_closes_when_it_has_bucket_size_elements(void **state)
{
    struct world w;
    struct grad_buckets buckets;

    (void)state;
    world_create(&w);
    for (int i = 0; i < 5; i++) {
        char name[8];

        snprintf(name, sizeof name, "%d", i);
        add(&w, name, 64);
    }
    buckets =
        lay_out(&w, &(struct grad_buckets_config){.overlap_grad_reduce = true, .bucket_size = 128});
    assert_int_equal(buckets.num_buckets, 3);
    assert_int_equal(buckets.buckets[0].count, 128);
    assert_int_equal(buckets.buckets[1].count, 128);
    assert_int_equal(buckets.buckets[2].count, 64);
    grad_buckets_free(&buckets);
    world_destroy(&w);
}

/* 30e6 + 30e6 elements reach the default of 40e6, but not that of 61 ranks, 61e6. */
static void test_the_default_size_grows_with_the_group(void **state)
{
    (void)state;
    for (int many = 0; many < 2; many++) {
        struct world w;
        struct grad_buckets buckets;

        world_create(&w);
        add(&w, "a", 30000000);
        add(&w, "b", 30000000);
        add(&w, "c", 30000000);
        set_group(w.groups.dp_cp, 0, many ? 61 : 1);
        buckets = lay_out(&w, &(struct grad_buckets_config){.overlap_grad_reduce = true});
        assert_int_equal(buckets.num_buckets, many ? 1 : 2);
        grad_buckets_free(&buckets);
        world_destroy(&w);
    }
}

static void test_gathers_go_in_the_order_in_which_forward_needs_them(void **state)
{
    struct world w;
    struct grad_buckets buckets;
    int last = -1;

    (void)state;
    world_create(&w);
    add_model(&w);
    set_group(w.groups.dp_cp, 1, 2);
    buckets = lay_out(&w, &(struct grad_buckets_config){.distributed_optimizer = true,
                                                        .overlap_grad_reduce = true,
                                                        .overlap_param_gather = true,
                                                        .bucket_size = 100});
    for (int i = 0; i < buckets.num_buckets; i++) {
        const struct grad_bucket *bucket = &buckets.buckets[buckets.gather_order[i]];
        int first = w.params.num_params;

        for (int k = bucket->begin; k < bucket->end; k++) {
            first = buckets.order[k] < first ? buckets.order[k] : first;
        }
        assert_true(first > last);
        last = first;
    }
    grad_buckets_free(&buckets);
    world_destroy(&w);
}

/* The shards of all ranks of a group are every element once, in states without holes. */
static void test_shards_of_a_group_cover_each_parameter_once(void **state)
{
    int64_t covered[9] = {0};
    struct world w;

    (void)state;
    for (int rank = 0; rank < 5; rank++) {
        struct grad_buckets buckets;
        struct optimizer optimizer;
        int64_t owned = 0;

        world_create(&w);
        add_model(&w);
        set_group(w.groups.dp_cp, rank, 5);
        set_group(w.groups.edp, rank, 5);
        buckets = lay_out(&w, &(struct grad_buckets_config){.distributed_optimizer = true,
                                                            .overlap_grad_reduce = true,
                                                            .bucket_size = 300});
        param_list_allocate(&w.params, w.run, w.stream, DTYPE_BF16, true);
        optimizer_init(&optimizer, &(struct optimizer_config){0}, &w.params, &buckets, w.stream,
                       w.run);
        for (int i = 0; i < optimizer.num_shards; i++) {
            const struct optimizer_shard *shard = &optimizer.shards[i];

            for (int p = 0; p < 9; p++) {
                if (w.params.params[p] == shard->param) {
                    assert_int_equal(shard->first, covered[p]); /* ranks own in order */
                    covered[p] += shard->count;
                }
            }
        }
        for (int i = 0; i < buckets.num_buckets; i++) {
            owned += buckets.buckets[i].own_count;
        }
        assert_int_equal(optimizer.num_owned, owned);
        assert_int_equal(tensor_size_bytes(&optimizer.master), 4 * owned);
        assert_int_equal(owned * 5, w.params.num_elements);
        optimizer_free(&optimizer);
        grad_buckets_free(&buckets);
        if (rank < 4) {
            world_destroy(&w);
        }
    }
    for (int p = 0; p < 9; p++) {
        assert_int_equal(covered[p], box_num_elements(&w.params.params[p]->box));
    }
    world_destroy(&w);
}

/* ---- clearing ---- */

/* The fills that an op table saw, in order. */
static struct {
    int64_t first, count;
} fills[16];
static int num_fills;
static const float *first_grad;

static void record_fill(struct stream *stream, struct tensor *x)
{
    (void)stream;
    assert_true(num_fills < 16);
    fills[num_fills].first = (const float *)x->data - first_grad;
    fills[num_fills++].count = x->dim[0];
}

static void assert_fill(int i, const struct world *w, const char *first, int64_t count)
{
    assert_int_equal(fills[i].first, param_find(&w->params, first)->start);
    assert_int_equal(fills[i].count, count);
}

/* Products lie between what is added to. */
static void add_sequence(struct world *w)
{
    add(w, "embedding", 1009);
    add(w, "norm.0", 13);
    add(w, "qkv", 211)->grad_is_product = true;
    add(w, "bias", 64);
    add(w, "norm.1", 65);
    add(w, "proj", 67)->grad_is_product = true;
    add(w, "norm.2", 13);
}

static void test_clearing_leaves_out_products_and_joins_neighbours(void **state)
{
    struct ops recording = *ops_null();

    (void)state;
    recording.fill_zero = record_fill;
    for (int variant = 0; variant < 2; variant++) {
        struct grad_buckets buckets = {0};
        struct world w;

        world_create(&w);
        add_sequence(&w);
        if (variant == 1) {
            buckets = lay_out(&w, &(struct grad_buckets_config){0});
        }
        param_list_allocate(&w.params, w.run, w.stream, DTYPE_F32, true);
        first_grad = w.params.grads.data;
        num_fills = 0;
        w.stream->ops = &recording;
        param_list_clear_grads(&w.params, w.stream);
        assert_int_equal(num_fills, 3);
        assert_fill(0, &w, variant == 0 ? "embedding" : "norm.0", 1024 + 64);
        assert_fill(1, &w, variant == 0 ? "bias" : "norm.1", 64 + 128);
        assert_fill(2, &w, "norm.2", 64);
        grad_buckets_free(&buckets);
        world_destroy(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_classes_lie_apart_and_each_in_reverse_order),
        cmocka_unit_test(test_buckets_tile_the_buffers_for_every_group_and_size),
        cmocka_unit_test(test_a_bucket_closes_when_it_has_bucket_size_elements),
        cmocka_unit_test(test_the_default_size_grows_with_the_group),
        cmocka_unit_test(test_gathers_go_in_the_order_in_which_forward_needs_them),
        cmocka_unit_test(test_clearing_leaves_out_products_and_joins_neighbours),
        cmocka_unit_test(test_shards_of_a_group_cover_each_parameter_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
