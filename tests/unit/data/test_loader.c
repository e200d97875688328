#include "data_test.h"

#include "data/loader.h"

enum { SEQ_LENGTH = 6, NUM_SAMPLES = 100 };

static struct datasets sets;

static int build_sets(void **state)
{
    static const int32_t lengths[] = {40, 50, 60, 70, 80, 90, 100, 110, 120};
    const char *prefix;

    if (make_scratch(state) != 0) {
        return -1;
    }
    prefix = scratch_path("set");
    write_counting_set(prefix, lengths, 9, TOKEN_U16);
    return datasets_build(&sets,
                          &(struct datasets_config){.data_path = {&prefix, 1},
                                                    .split = "1",
                                                    .seq_length = SEQ_LENGTH,
                                                    .seed = 3,
                                                    .no_cache = true},
                          (int64_t[]){NUM_SAMPLES, 0, 0});
}

static int free_sets(void **state)
{
    datasets_free(&sets);
    return remove_scratch(state);
}

static struct loader_config plain_config(void)
{
    return (struct loader_config){
        .micro_batch_size = 2, .data_parallel_size = 1, .eod = 9999, .pad = -1};
}

static void a_batch_is_sequence_first_and_labels_are_the_next_tokens(void **state)
{
    const struct loader_config config = plain_config();
    struct loader *loader = loader_open(sets.split[SPLIT_TRAIN], &config);
    const struct batch *batch;

    assert_non_null(loader);
    for (int64_t i = 0; i < 10; i += 2) {
        assert_int_equal(loader_next(loader, &batch), 0);
        assert_int_equal(batch->seq_length, SEQ_LENGTH);
        assert_int_equal(batch->num_sequences, 2);
        for (int64_t b = 0; b < 2; b++) {
            int32_t sample[SEQ_LENGTH + 1];

            assert_int_equal(batch->sample_ids[b], i + b);
            assert_int_equal(dataset_sample(sets.split[SPLIT_TRAIN], i + b, sample), 0);
            for (int s = 0; s < SEQ_LENGTH; s++) {
                assert_int_equal(batch->tokens[s * 2 + b], sample[s]);
                assert_int_equal(batch->labels[s * 2 + b], sample[s + 1]);
                assert_int_equal(batch->position_ids[s * 2 + b], s);
                assert_int_equal(batch->document_start[s * 2 + b], 0);
                assert_true(batch->loss_mask[s * 2 + b] == 1.0f);
            }
        }
    }
    loader_close(loader);
}

/* Column 1 of a batch of two, from tokens with ends of document (9) and pads (7). */
static void ends_of_document_mask_and_reset_as_asked(void **state)
{
    static const int32_t tokens[SEQ_LENGTH + 1] = {1, 9, 2, 3, 9, 7, 7};
    int32_t t[12], l[12], p[12], d[12];
    float m[12];
    int64_t ids[2];
    struct batch batch = {SEQ_LENGTH, 2, t, l, m, p, d, ids};
    struct loader_config config = {.eod = 9, .pad = 7};
    static const float pad_only[] = {1, 1, 1, 1, 0, 0}, both[] = {1, 0, 1, 1, 0, 0};
    static const int32_t positions[] = {0, 1, 0, 1, 2, 0}, starts[] = {0, 0, 2, 2, 2, 5};

    batch_set_column(&batch, 1, tokens, &config);
    for (int s = 0; s < SEQ_LENGTH; s++) {
        assert_true(m[2 * s + 1] == pad_only[s]);
        assert_int_equal(p[2 * s + 1], s);
        assert_int_equal(d[2 * s + 1], 0);
        assert_int_equal(t[2 * s + 1], tokens[s] == 7 ? 0 : tokens[s]);
        assert_int_equal(l[2 * s + 1], tokens[s + 1] == 7 ? 0 : tokens[s + 1]);
    }
    config.eod_mask_loss = config.reset_position_ids = config.reset_attention_mask = true;
    batch_set_column(&batch, 1, tokens, &config);
    for (int s = 0; s < SEQ_LENGTH; s++) {
        assert_true(m[2 * s + 1] == both[s]);
        assert_int_equal(p[2 * s + 1], positions[s]);
        assert_int_equal(d[2 * s + 1], starts[s]);
    }
    config.pad = -1; /* no pad token: 7 is like any other */
    batch_set_column(&batch, 1, tokens, &config);
    assert_int_equal(t[11], 7);
    assert_true(m[11] == 1.0f);
}

static void ranks_share_out_each_chunk(void **state)
{
    for (int64_t rank = 0; rank < 3; rank++) {
        struct loader_config config = plain_config();
        struct loader *loader;
        const struct batch *batch;

        config.data_parallel_rank = rank;
        config.data_parallel_size = 3;
        config.consumed_samples = 12;
        loader = loader_open(sets.split[SPLIT_TRAIN], &config);
        for (int64_t step = 0; step < 3; step++) {
            assert_int_equal(loader_next(loader, &batch), 0);
            assert_int_equal(batch->sample_ids[0], 12 + 6 * step + 2 * rank);
            assert_int_equal(batch->sample_ids[1], 12 + 6 * step + 2 * rank + 1);
        }
        loader_close(loader);
    }
}

static void a_thread_changes_nothing_and_the_end_is_an_error(void **state)
{
    struct loader_config config = plain_config();
    struct loader *plain, *threaded;
    const struct batch *a, *b;
    const int64_t num_samples = sets.split[SPLIT_TRAIN]->num_samples;

    config.micro_batch_size = 7;
    plain = loader_open(sets.split[SPLIT_TRAIN], &config);
    config.num_workers = 2;
    threaded = loader_open(sets.split[SPLIT_TRAIN], &config);
    for (int64_t i = 0; i < num_samples / 7; i++) { /* what does not fill a batch is dropped */
        assert_int_equal(loader_next(plain, &a), 0);
        assert_int_equal(loader_next(threaded, &b), 0);
        assert_memory_equal(a->tokens, b->tokens, 7 * SEQ_LENGTH * sizeof(int32_t));
        assert_memory_equal(a->sample_ids, b->sample_ids, 7 * sizeof(int64_t));
    }
    for (int i = 0; i < 3; i++) {
        assert_int_equal(loader_next(plain, &a), -1);
        assert_error_mentions("the data is used up");
        assert_int_equal(loader_next(threaded, &b), -1);
        assert_error_mentions("the data is used up");
    }
    loader_close(plain);
    loader_close(threaded);
}

static void a_loader_with_a_thread_may_be_closed_at_any_time(void **state)
{
    for (int num_taken = 0; num_taken < 6; num_taken++) {
        struct loader_config config = plain_config();
        struct loader *loader;
        const struct batch *batch;

        config.num_workers = 1;
        loader = loader_open(sets.split[SPLIT_TRAIN], &config);
        for (int i = 0; i < num_taken; i++) {
            assert_int_equal(loader_next(loader, &batch), 0);
        }
        loader_close(loader);
    }
}

/* 11 samples in chunks of 2 on one rank: epochs of 10. */
static void cyclic_order_is_torchs_and_starts_anew_each_epoch(void **state)
{
    int64_t indices[2], ids[2], all[2][10], seen = 0;
    struct sampler sampler;

    assert_int_equal(sampler_init(&sampler, SAMPLER_CYCLIC, 11, 0, 2, 0, 1), 0);
    for (int i = 0; i < 10; i++) {
        assert_int_equal(sampler_next(&sampler, indices, ids), 0);
        assert_int_equal(ids[1], 2 * i + 1);
        memcpy(&all[i / 5][2 * (i % 5)], indices, sizeof indices);
    }
    /* torch.randperm(10) of seed 0, torch 2.11 */
    assert_memory_equal(all[0], ((int64_t[]){4, 1, 7, 5, 3, 9}), 6 * sizeof(int64_t));
    for (int i = 0; i < 10; i++) {
        seen |= 1ll << all[1][i];
    }
    assert_int_equal(seen, 1023);
    assert_memory_not_equal(all[0], all[1], sizeof all[0]);
    sampler_free(&sampler);

    assert_int_equal(sampler_init(&sampler, SAMPLER_CYCLIC, 11, 14, 2, 0, 1), 0); /* resumed */
    assert_int_equal(sampler_next(&sampler, indices, ids), 0);
    assert_memory_equal(indices, &all[1][4], sizeof indices);
    sampler_free(&sampler);
}

static void cyclic_ranks_have_ranges_of_their_own(void **state)
{
    int64_t indices[3], ids[3];
    struct sampler sampler;

    for (int64_t rank = 0; rank < 2; rank++) {
        assert_int_equal(sampler_init(&sampler, SAMPLER_CYCLIC, 40, 0, 3, rank, 2), 0);
        for (int i = 0; i < 30; i++) {
            assert_int_equal(sampler_next(&sampler, indices, ids), 0);
            for (int b = 0; b < 3; b++) {
                assert_in_range(indices[b], 18 * rank, 18 * rank + 17);
            }
        }
        sampler_free(&sampler);
    }
}

static void samplers_refuse_what_they_cannot_serve(void **state)
{
    struct sampler sampler;

    assert_int_equal(sampler_init(&sampler, SAMPLER_SINGLE, 3, 0, 2, 0, 2), -1);
    assert_error_mentions("too few");
    assert_int_equal(sampler_init(&sampler, SAMPLER_CYCLIC, 10, 3, 2, 0, 1), -1);
    assert_error_mentions("cannot continue after 3 samples");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_batch_is_sequence_first_and_labels_are_the_next_tokens),
        cmocka_unit_test(ends_of_document_mask_and_reset_as_asked),
        cmocka_unit_test(ranks_share_out_each_chunk),
        cmocka_unit_test(a_thread_changes_nothing_and_the_end_is_an_error),
        cmocka_unit_test(a_loader_with_a_thread_may_be_closed_at_any_time),
        cmocka_unit_test(cyclic_order_is_torchs_and_starts_anew_each_epoch),
        cmocka_unit_test(cyclic_ranks_have_ranges_of_their_own),
        cmocka_unit_test(samplers_refuse_what_they_cannot_serve),
    };

    return cmocka_run_group_tests(tests, build_sets, free_sets);
}
