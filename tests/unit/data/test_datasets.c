#include "data_test.h"

#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "data/datasets.h"

static const int32_t lengths[] = {30, 12, 0, 45, 7, 1, 60, 22, 0, 33};
enum { NUM_DOCUMENTS = 10, SEQ_LENGTH = 8 };

static const char *prefix;
static struct datasets_config config;

static int set_up(void **state)
{
    static char path[PATH_LENGTH_MAX];

    if (make_scratch(state) != 0) {
        return -1;
    }
    snprintf(path, sizeof path, "%s/set", scratch);
    prefix = path;
    write_counting_set(path, lengths, NUM_DOCUMENTS, TOKEN_U16);
    config = (struct datasets_config){
        .data_path = {&prefix, 1},
        .split = "1",
        .seq_length = SEQ_LENGTH,
        .seed = 1234,
        .vocab_size = 10000,
    };
    return 0;
}

static int tear_down(void **state)
{
    return remove_scratch(state);
}

static void build_train(struct datasets *sets, int64_t num_samples)
{
    const int64_t sizes[NUM_SPLITS] = {num_samples, 0, 0};

    assert_int_equal(datasets_build(sets, &config, sizes), 0);
}

/* Each step of S tokens of the stream of documents is one sample; documents are counted up, so a
 * token tells where it comes from. */
static void one_epoch_holds_every_token_once(void **state)
{
    struct datasets sets;
    int seen[10000] = {0}, num_seen = 0, num_tokens = 0;

    build_train(&sets, -1);
    for (int d = 0; d < NUM_DOCUMENTS; d++) {
        num_tokens += lengths[d];
    }
    assert_int_equal(sets.split[SPLIT_TRAIN]->num_samples, (num_tokens - 1) / SEQ_LENGTH);
    for (int64_t i = 0; i < sets.split[SPLIT_TRAIN]->num_samples; i++) {
        int32_t tokens[SEQ_LENGTH + 1];

        assert_int_equal(dataset_sample(sets.split[SPLIT_TRAIN], i, tokens), 0);
        for (int s = 0; s < SEQ_LENGTH; s++) { /* the last is the next sample's first */
            assert_int_equal(seen[tokens[s]]++, 0);
            assert_in_range(tokens[s] % 1000, 0, lengths[tokens[s] / 1000] - 1);
            num_seen++;
        }
    }
    assert_in_range(num_tokens - num_seen, 1, SEQ_LENGTH);
    datasets_free(&sets);
}

static int num_files(const char *directory, const char *part)
{
    DIR *folder = opendir(directory);
    int count = 0;

    for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;) {
        count += strstr(entry->d_name, part) != NULL;
    }
    if (folder != NULL) {
        closedir(folder);
    }
    return count;
}

/* Checksum of all samples of a build. */
static uint64_t sum_of_build(int64_t num_samples, bool *is_from_cache)
{
    struct datasets sets;
    uint64_t sum = 0;

    build_train(&sets, num_samples);
    *is_from_cache = sets.split[SPLIT_TRAIN]->sets[0].index.arrays[0].map.bytes != NULL;
    for (int64_t i = 0; i < sets.split[SPLIT_TRAIN]->num_samples; i++) {
        int32_t tokens[SEQ_LENGTH + 1];

        assert_int_equal(dataset_sample(sets.split[SPLIT_TRAIN], i, tokens), 0);
        for (int s = 0; s <= SEQ_LENGTH; s++) {
            sum = sum * 1000003 + (uint64_t)tokens[s];
        }
    }
    datasets_free(&sets);
    return sum;
}

static const char *default_cache(void)
{
    return scratch_path("cache/GPTdataset_indices");
}

static void an_index_is_cached_and_found_again(void **state)
{
    bool is_from_cache;
    uint64_t sum;

    sum = sum_of_build(100, &is_from_cache);
    assert_false(is_from_cache);
    assert_int_equal(num_files(default_cache(), ".npy"), 3);
    assert_int_equal(num_files(default_cache(), "description.txt"), 1);
    assert_true(sum_of_build(100, &is_from_cache) == sum);
    assert_true(is_from_cache);

    config.seed = 1235; /* other facts: another index */
    assert_true(sum_of_build(100, &is_from_cache) != sum);
    assert_false(is_from_cache);
}

static void another_data_set_under_the_same_name_is_noticed(void **state)
{
    int32_t changed[NUM_DOCUMENTS];
    bool is_from_cache;

    sum_of_build(100, &is_from_cache);
    memcpy(changed, lengths, sizeof changed);
    changed[0]--; /* as many tokens in all */
    changed[1]++;
    write_counting_set(prefix, changed, NUM_DOCUMENTS, TOKEN_U16);
    sum_of_build(100, &is_from_cache);
    assert_false(is_from_cache);
}

/* Damages every file of the cache in turn. */
static void a_damaged_cache_is_built_anew(void **state)
{
    static const char *const parts[] = {"document_index", "sample_index", "shuffle_index",
                                        "description"};
    bool is_from_cache;
    const uint64_t sum = sum_of_build(100, &is_from_cache);

    for (int damage = 0; damage < 3; damage++) {
        for (int p = 0; p < 4; p++) {
            char command[2 * PATH_LENGTH_MAX];
            static const char *const ways[] = {
                "f=$(echo %s/*%s*); printf x | dd of=\"$f\" bs=1 seek=%d conv=notrunc status=none",
                "truncate -s -1 %s/*%s*", "rm %s/*%s*"};

            snprintf(command, sizeof command, ways[damage], default_cache(), parts[p],
                     p == 3 ? 3 : 131);
            assert_int_equal(system(command), 0);
            assert_true(sum_of_build(100, &is_from_cache) == sum);
            assert_false(is_from_cache);
            assert_true(sum_of_build(100, &is_from_cache) == sum);
            assert_true(is_from_cache);
        }
    }
}

static void many_processes_may_start_at_once(void **state)
{
    enum { NUM_PROCESSES = 8 };
    pid_t children[NUM_PROCESSES];
    bool is_from_cache;
    uint64_t sum;

    config.no_cache = true;
    sum = sum_of_build(5000, &is_from_cache);
    config.no_cache = false;
    for (int p = 0; p < NUM_PROCESSES; p++) {
        children[p] = fork();
        if (children[p] == 0) {
            bool same = true;

            for (int i = 0; i < 5 && same; i++) {
                same = sum_of_build(5000, &is_from_cache) == sum;
            }
            _exit(same ? 0 : 1);
        }
    }
    for (int p = 0; p < NUM_PROCESSES; p++) {
        int status;

        assert_int_equal(waitpid(children[p], &status, 0), children[p]);
        assert_int_equal(status, 0);
    }
    assert_int_equal(num_files(default_cache(), ".tmp."), 0);
    assert_true(sum_of_build(5000, &is_from_cache) == sum);
    assert_true(is_from_cache);
}

static void a_cache_that_cannot_be_written_is_only_a_warning(void **state)
{
    bool is_from_cache;

    write_bytes(scratch_path("file"), "", 0);
    config.cache_directory = scratch_path("file");
    sum_of_build(100, &is_from_cache);
    assert_false(is_from_cache);
}

static void assert_build_fails(int64_t train, int64_t valid, int64_t test, const char *message)
{
    const int64_t sizes[NUM_SPLITS] = {train, valid, test};
    struct datasets sets;

    assert_int_equal(datasets_build(&sets, &config, sizes), -1);
    assert_error_mentions(message);
}

static void a_split_without_documents_is_an_error(void **state)
{
    struct datasets sets;

    config.split = "98,1,1";
    assert_build_fails(10, 10, 0, "leaves none of them for valid");
    config.split = "100,0,0"; /* no such split is wanted */
    assert_int_equal(datasets_build(&sets, &config, (int64_t[]){10, 10, 10}), 0);
    assert_null(sets.split[SPLIT_VALID]);
    datasets_free(&sets);
    config.split = "20,10,70"; /* document 2 is empty */
    assert_build_fails(10, 10, 10, "the valid split");
    assert_error_mentions("holds no token");
}

static void too_few_tokens_for_a_sample_is_an_error(void **state)
{
    config.seq_length = 1000;
    assert_build_fails(-1, 0, 0, "fewer than the 1001 of one sample");
}

static void requests_beyond_the_index_are_an_error(void **state)
{
    assert_build_fails(INT64_MAX / 2, 0, 0, "more than can be counted");
    assert_build_fails(1ll << 40, 0, 0, "more than an index of 32 bits counts");
    config.seed = -1;
    assert_build_fails(1, 0, 0, "--seed is -1");
    config.seed = 1ll << 32;
    assert_build_fails(1, 0, 0, "--seed is 4294967296");
}

static void a_token_beyond_the_vocabulary_is_named(void **state)
{
    struct datasets sets;
    int32_t tokens[SEQ_LENGTH + 1];
    int num_failures = 0;

    config.vocab_size = 9032; /* the last token of the last document is 9032 */
    build_train(&sets, 500);
    for (int64_t i = 0; i < sets.split[SPLIT_TRAIN]->num_samples; i++) {
        if (dataset_sample(sets.split[SPLIT_TRAIN], i, tokens) != 0) {
            num_failures++;
            assert_error_mentions("sequence 9 holds token 9032 at position 32");
        }
    }
    assert_true(num_failures > 0);
    datasets_free(&sets);
}

static void splits_are_parsed_like_megatrons(void **state)
{
    struct split split;
    int64_t first, end;

    assert_int_equal(split_parse(&split, "969, 30, 1"), 0);
    split_range(&split, SPLIT_VALID, 1000, &first, &end);
    assert_int_equal(first, 969);
    assert_int_equal(end, 999);
    assert_int_equal(split_parse(&split, "1/1"), 0);
    split_range(&split, SPLIT_TRAIN, 5, &first, &end); /* 2.5 goes to even */
    assert_int_equal(end, 2);
    assert_false(split_exists(&split, SPLIT_TEST));
    assert_int_equal(split_parse(&split, "0.5,.25 .25"), 0);
    split_range(&split, SPLIT_TEST, 8, &first, &end);
    assert_int_equal(first, 6);
    assert_int_equal(end, 8);
    assert_int_equal(split_parse(&split, ""), -1);
    assert_int_equal(split_parse(&split, "0,0,0"), -1);
    assert_int_equal(split_parse(&split, "1,2,3,4"), -1);
    assert_int_equal(split_parse(&split, "1.2.3"), -1);
    assert_int_equal(split_parse(&split, "9,-1"), -1);
    assert_int_equal(split_parse(&split, "."), -1);
}

static void each_split_may_have_a_list_of_its_own(void **state)
{
    const char *other = scratch_path("other");
    struct datasets sets;
    int32_t tokens[SEQ_LENGTH + 1];

    write_counting_set(other, (int32_t[]){200}, 1, TOKEN_I32);
    config.data_path.num_words = 0;
    config.split_path[SPLIT_TRAIN] = (struct word_list){&prefix, 1};
    config.split_path[SPLIT_VALID] = (struct word_list){&other, 1};
    assert_int_equal(datasets_build(&sets, &config, (int64_t[]){50, 3, 5}), 0);
    assert_int_equal(sets.split[SPLIT_VALID]->num_samples, 199 / SEQ_LENGTH);
    assert_int_equal(dataset_sample(sets.split[SPLIT_VALID], 0, tokens), 0);
    assert_int_equal(tokens[0] / 1000, 0);
    assert_null(sets.split[SPLIT_TEST]);
    datasets_free(&sets);
    config.split_path[SPLIT_TRAIN].num_words = config.split_path[SPLIT_VALID].num_words = 0;
    assert_build_fails(1, 1, 1, "no data");
}

static void blends_without_weights_see_every_sample_once(void **state)
{
    const char *words[] = {prefix, scratch_path("second"), scratch_path("third")};
    int64_t seen[3] = {0};
    struct datasets sets;
    const struct dataset *train;

    write_counting_set(words[1], (int32_t[]){500}, 1, TOKEN_U16);
    write_counting_set(words[2], (int32_t[]){9}, 1, TOKEN_U16);
    config.data_path = (struct word_list){words, 3};
    build_train(&sets, -1);
    train = sets.split[SPLIT_TRAIN];
    for (int64_t i = 0; i < train->num_samples; i++) {
        assert_int_equal(train->blend.sample_index[i], seen[train->blend.set_index[i]]++);
    }
    for (int s = 0; s < 3; s++) {
        assert_int_equal(seen[s], gpt_dataset_num_samples(&train->sets[s]));
    }
    datasets_free(&sets);
}

static void weights_give_shares_and_bad_ones_are_refused(void **state)
{
    const char *words[] = {"3", prefix, "1", prefix};
    struct datasets sets;
    const struct dataset *train;
    int64_t num_first = 0;

    config.data_path = (struct word_list){words, 4};
    build_train(&sets, 1000);
    train = sets.split[SPLIT_TRAIN];
    assert_int_equal(train->num_samples, 754 + 252);
    for (int64_t i = 0; i < train->num_samples; i++) {
        num_first += train->blend.set_index[i] == 0;
    }
    assert_in_range(num_first, 754, 755);
    datasets_free(&sets);
    words[0] = "-1";
    assert_build_fails(10, 0, 0, "weight -1 of data set 1");
    words[0] = "nan";
    assert_build_fails(10, 0, 0, "weight");
    words[0] = words[2] = "0";
    assert_build_fails(10, 0, 0, "sum to 0");
}

static void words_are_weights_only_if_every_other_one_is_a_number(void **state)
{
    const char *prefixes[4];
    double weights[4];
    bool has_weights;

    assert_int_equal(blend_parse((const char *[]){"a", "b"}, 2, prefixes, weights, &has_weights),
                     2);
    assert_false(has_weights);
    assert_int_equal(blend_parse((const char *[]){"1", "b"}, 2, prefixes, weights, &has_weights),
                     1);
    assert_true(has_weights);
    assert_string_equal(prefixes[0], "b");
    assert_int_equal(
        blend_parse((const char *[]){"1", "b", "c"}, 3, prefixes, weights, &has_weights), 3);
    assert_false(has_weights);
    assert_int_equal(
        blend_parse((const char *[]){"1", "b", "c", "d"}, 4, prefixes, weights, &has_weights), 4);
    assert_string_equal(prefixes[0], "1");
}

static void mock_data_needs_no_files(void **state)
{
    struct datasets sets;
    int32_t tokens[65];

    config = (struct datasets_config){
        .mock = true, .seq_length = 64, .seed = 1, .vocab_size = 100, .eod = 99};
    assert_int_equal(datasets_build(&sets, &config, (int64_t[]){1000, 100, 100}), 0);
    for (int which = 0; which < NUM_SPLITS; which++) {
        assert_non_null(sets.split[which]);
        for (int64_t i = 0; i < 100; i++) {
            assert_int_equal(dataset_sample(sets.split[which], i, tokens), 0);
            for (int s = 0; s < 64; s++) { /* counts up modulo 100, except around an end */
                assert_true(tokens[s + 1] == (tokens[s] + 1) % 100 || tokens[s] == 99 ||
                            tokens[s + 1] == 99);
            }
        }
    }
    datasets_free(&sets);
}

static void target_sizes_are_megatrons(void **state)
{
    int64_t sizes[NUM_SPLITS];

    datasets_target_samples(sizes, 0, 1000, 32, 100, 10);
    assert_int_equal(sizes[SPLIT_TRAIN], 32000);
    assert_int_equal(sizes[SPLIT_VALID], 11 * 10 * 32);
    assert_int_equal(sizes[SPLIT_TEST], 320);
    datasets_target_samples(sizes, 777, 1000, 32, 100, 10);
    assert_int_equal(sizes[SPLIT_TRAIN], 777);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(one_epoch_holds_every_token_once),
        TEST(an_index_is_cached_and_found_again),
        TEST(another_data_set_under_the_same_name_is_noticed),
        TEST(a_damaged_cache_is_built_anew),
        TEST(many_processes_may_start_at_once),
        TEST(a_cache_that_cannot_be_written_is_only_a_warning),
        TEST(a_split_without_documents_is_an_error),
        TEST(too_few_tokens_for_a_sample_is_an_error),
        TEST(requests_beyond_the_index_are_an_error),
        TEST(a_token_beyond_the_vocabulary_is_named),
        TEST(splits_are_parsed_like_megatrons),
        TEST(each_split_may_have_a_list_of_its_own),
        TEST(blends_without_weights_see_every_sample_once),
        TEST(weights_give_shares_and_bad_ones_are_refused),
        TEST(words_are_weights_only_if_every_other_one_is_a_number),
        TEST(mock_data_needs_no_files),
        TEST(target_sizes_are_megatrons),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
