/* lm_loss: the head and its cross entropy, with a weight of its own and with the embedding's. */
#include "reference_nn.h"

enum { T = 9, H = 6, VOCAB = 11 };

struct head_case {
    struct lm_loss head;
    double *x, *weight;
};

static void init_head(struct lm_loss *head, struct param *tied)
{
    lm_loss_init(
        head, &world.params, &world.groups,
        &(struct lm_loss_config){
            .vocab_size = VOCAB, .hidden_size = H, .init_std = 0.02f, .tied = tied});
}

static double head_loss(const void *context)
{
    const struct head_case *c = context;

    return dot(reference_lm_loss(&c->head, c->x, T, H), c->weight, T);
}

static void check_head(struct head_case *c)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, T, H);
    struct tensor d_x = poisoned_tensor(DTYPE_F32, T, H);
    struct tensor loss = poisoned_tensor(DTYPE_F32, T);
    struct tensor logits = poisoned_tensor(DTYPE_F32, T, VOCAB);
    struct lm_loss_saved saved;

    world_fill_params(1.0);
    world_make_pass(T, 1, VOCAB);
    tensor_set(&world.pass.loss_weight, 3, 0.0); /* a masked token */
    c->x = doubles_of(&x);
    c->weight = doubles_of(&world.pass.loss_weight);
    lm_loss_logits(&c->head, &world.pass, &logits, &x);
    assert_close(&logits, reference_product(c->x, values_of(c->head.weight), NULL, T, H, VOCAB),
                 1e-5);
    lm_loss_forward(&c->head, &world.pass, &loss, &x, &saved);
    assert_close(&loss, reference_lm_loss(&c->head, c->x, T, H), 1e-5);
    lm_loss_backward(&c->head, &world.pass, &d_x, &saved);
    check_gradients(head_loss, c, c->x, &d_x);
    assert_scratch_is_empty();
}

static void a_head_of_its_own(void **state)
{
    struct head_case c;

    init_head(&c.head, NULL);
    assert_string_equal(c.head.weight->name, "output_layer.weight");
    check_head(&c);
}

static void a_head_tied_to_the_embedding(void **state)
{
    struct embedding_layer embedding;
    struct head_case c;

    embedding_layer_init(&embedding, &world.params, &world.groups,
                         &(struct embedding_config){.vocab_size = VOCAB, .hidden_size = H});
    init_head(&c.head, embedding.word);
    assert_int_equal(world.params.num_params, 1);
    check_head(&c);
}

/* Logits whose exponentials overflow a float. */
static void large_logits_stay_finite(void **state)
{
    struct tensor x = normal_tensor(100.0, DTYPE_F32, T, H);
    struct tensor d_x = poisoned_tensor(DTYPE_F32, T, H);
    struct tensor loss = poisoned_tensor(DTYPE_F32, T);
    struct lm_loss_saved saved;
    struct lm_loss head;

    init_head(&head, NULL);
    world_fill_params(10.0);
    world_make_pass(T, 1, VOCAB);
    lm_loss_forward(&head, &world.pass, &loss, &x, &saved);
    lm_loss_backward(&head, &world.pass, &d_x, &saved);
    for (int64_t t = 0; t < T; t++) {
        assert_true(tensor_get(&loss, t) >= 0.0 && isfinite(tensor_get(&loss, t)));
        assert_true(isfinite(tensor_get(&d_x, t * H)));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(a_head_of_its_own),
        layer_test(a_head_tied_to_the_embedding),
        layer_test(large_logits_stay_finite),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
