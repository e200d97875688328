/* embedding: word table, learned positions, dropout. The vocabulary is small, so that tokens
 * repeat. */
#include "reference_nn.h"

enum { S = 6, B = 2, T = S * B, H = 7, VOCAB = 5 };

struct embedding_case {
    struct embedding_layer embedding;
    double *d_y;
};

static double embedding_loss(const void *context)
{
    const struct embedding_case *c = context;

    return dot(reference_embedding(&c->embedding, T, H), c->d_y, T * H);
}

static void check_embedding(int64_t num_positions, float dropout, bool documents)
{
    struct tensor d_y, y = poisoned_tensor(DTYPE_F32, T, H);
    struct embedding_case c;

    embedding_layer_init(&c.embedding, &world.params, &world.groups,
                         &(struct embedding_config){.vocab_size = VOCAB,
                                                    .hidden_size = H,
                                                    .num_positions = num_positions,
                                                    .dropout = dropout});
    world_fill_params(1.0);
    world_make_pass(S, B, VOCAB);
    if (documents) {
        world_cut_documents(4);
    }
    d_y = normal_tensor(1.0, DTYPE_F32, T, H);
    c.d_y = doubles_of(&d_y);
    embedding_layer_forward(&c.embedding, &world.pass, &y);
    assert_close(&y, reference_embedding(&c.embedding, T, H), 1e-6);
    embedding_layer_backward(&c.embedding, &world.pass, &d_y);
    check_gradients(embedding_loss, &c, NULL, NULL);
    assert_scratch_is_empty();
}

static void words_alone(void **state)
{
    check_embedding(0, 0.0f, false);
}

static void words_and_positions_with_dropout(void **state)
{
    check_embedding(S, 0.3f, false);
}

static void positions_begin_anew_with_each_document(void **state)
{
    check_embedding(S + 3, 0.0f, true);
}

static void evaluation_drops_nothing(void **state)
{
    struct tensor y = poisoned_tensor(DTYPE_F32, T, H);
    struct embedding_layer embedding;

    embedding_layer_init(
        &embedding, &world.params, &world.groups,
        &(struct embedding_config){.vocab_size = VOCAB, .hidden_size = H, .dropout = 0.5f});
    world_fill_params(1.0);
    world_make_pass(S, B, VOCAB);
    world.pass.training = false;
    embedding_layer_forward(&embedding, &world.pass, &y);
    for (int64_t i = 0; i < T * H; i++) {
        const int64_t token = (int64_t)tensor_get(&world.pass.token, i / H);

        assert_true(tensor_get(&y, i) == tensor_get(&embedding.word->value, token * H + i % H));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(words_alone),
        layer_test(words_and_positions_with_dropout),
        layer_test(positions_begin_anew_with_each_document),
        layer_test(evaluation_drops_nothing),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
