/* attention: grouped queries, rotary positions of every kind, documents, dropout, the KV cache. */
#include "reference_nn.h"

enum { S = 6, B = 2, T = S * B, H = 10, HEADS = 4, D = 6 };

struct attention_case {
    struct attention_layer attention;
    struct rope_config rope; /* num_positions 0: no rotation */
    struct tensor table;
    double *x, *d_y;
};

static double attention_loss(const void *context)
{
    const struct attention_case *c = context;

    return dot(reference_attention(&c->attention, &c->rope, c->x, T), c->d_y, T * H);
}

static struct attention_config small_config(int64_t num_groups)
{
    return (struct attention_config){.name = "self_attention",
                                     .layer = 3,
                                     .hidden_size = H,
                                     .num_heads = HEADS,
                                     .num_groups = num_groups,
                                     .head_dim = D};
}

static void build(struct attention_case *c, const struct attention_config *config,
                  const struct rope_config *rope)
{
    attention_layer_init(&c->attention, &world.params, &world.groups, config);
    world_fill_params(0.6);
    world_make_pass(S, B, 2);
    c->rope = *rope;
    c->table = (struct tensor){0};
    if (rope->num_positions > 0) {
        c->table = rope_table(stream, world.run, rope);
    }
}

static void check_attention(struct attention_case *c)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H), y = poisoned_tensor(DTYPE_F32, T, H);
    struct tensor d_y = normal_tensor(1.0, DTYPE_F32, T, H);
    struct tensor d_x = poisoned_tensor(DTYPE_F32, T, H);
    struct attention_saved saved;

    c->x = doubles_of(&x);
    c->d_y = doubles_of(&d_y);
    attention_layer_forward(&c->attention, &world.pass, &c->table, NULL, &y, &x, &saved);
    assert_close(&y, reference_attention(&c->attention, &c->rope, c->x, T), 1e-5);
    attention_layer_backward(&c->attention, &world.pass, &c->table, &d_x, &d_y, &saved);
    check_gradients(attention_loss, c, c->x, &d_x);
    assert_scratch_is_empty();
}

static const struct rope_config no_rope = {0};

static struct rope_config plain_rope(void)
{
    return (struct rope_config){.base = 100.0,
                                .percent = 1.0,
                                .interpolation_factor = 1.0,
                                .head_dim = D,
                                .num_positions = S};
}

static void multi_head_without_positions(void **state)
{
    const struct attention_config config = small_config(HEADS);
    struct attention_case c;

    build(&c, &config, &no_rope);
    check_attention(&c);
}

static void grouped_queries_with_rope_and_biases(void **state)
{
    struct attention_config config = small_config(2);
    const struct rope_config rope = plain_rope();
    struct attention_case c;

    config.qkv_bias = true;
    config.proj_bias = true;
    build(&c, &config, &rope);
    check_attention(&c);
}

static void one_group_with_interleaved_rope(void **state)
{
    struct attention_config config = small_config(1);
    const struct rope_config rope = plain_rope();
    struct attention_case c;

    config.rope_interleaved = true;
    build(&c, &config, &rope);
    check_attention(&c);
}

static void rope_of_a_part_of_the_head_with_interpolation(void **state)
{
    const struct attention_config config = small_config(2);
    struct rope_config rope = plain_rope();
    struct attention_case c;

    rope.percent = 0.7; /* 4 of 6 dims */
    rope.interpolation_factor = 2.5;
    build(&c, &config, &rope);
    check_attention(&c);
}

static void documents_do_not_see_each_other(void **state)
{
    const struct attention_config config = small_config(2);
    const struct rope_config rope = plain_rope();
    struct attention_case c;

    build(&c, &config, &rope);
    world_cut_documents(4);
    check_attention(&c);
}

static void dropout_takes_the_mask_of_the_global_element(void **state)
{
    struct attention_config config = small_config(2);
    struct attention_case c;

    config.dropout = 0.4f;
    build(&c, &config, &no_rope);
    check_attention(&c);
}

/* Positions [first, first + count) through the cache. */
static void one_piece(struct attention_case *c, struct kv_cache *cache, const struct tensor *x,
                      struct tensor *y, int64_t first, int64_t count)
{
    const struct tensor x_rows = tensor_rows(x, first * B, count * B);
    struct tensor y_rows = tensor_rows(y, first * B, count * B);
    struct attention_saved saved;
    struct pass pass = world.pass;

    pass.token = tensor_rows(&world.pass.token, first * B, count * B);
    pass.position = tensor_rows(&world.pass.position, first * B, count * B);
    cache->length = first;
    attention_layer_forward(&c->attention, &pass, &c->table, cache, &y_rows, &x_rows, &saved);
}

static void pieces_through_the_cache_give_the_whole_pass(void **state)
{
    const struct attention_config config = small_config(2);
    const struct rope_config rope = plain_rope();
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H), y = poisoned_tensor(DTYPE_F32, T, H);
    struct kv_cache cache = {.k = poisoned_tensor(DTYPE_F32, S + 2, B, 2, D),
                             .v = poisoned_tensor(DTYPE_F32, S + 2, B, 2, D)};
    struct attention_case c;

    build(&c, &config, &rope);
    world.pass.training = false;
    one_piece(&c, &cache, &x, &y, 0, 3);
    one_piece(&c, &cache, &x, &y, 3, 1);
    one_piece(&c, &cache, &x, &y, 4, 2);
    assert_close(&y, reference_attention(&c.attention, &c.rope, doubles_of(&x), T), 1e-5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(multi_head_without_positions),
        layer_test(grouped_queries_with_rope_and_biases),
        layer_test(one_group_with_interleaved_rope),
        layer_test(rope_of_a_part_of_the_head_with_interpolation),
        layer_test(documents_do_not_see_each_other),
        layer_test(dropout_takes_the_mask_of_the_global_element),
        layer_test(pieces_through_the_cache_give_the_whole_pass),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
