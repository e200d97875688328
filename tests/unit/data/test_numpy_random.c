/* Golden numbers: numpy 1.26.4 and torch 2.11. */
#include "data_test.h"

#include "data/numpy_random.h"
#include "data/split.h"

/* sum of (i + 1) * items[i], modulo 2^64 */
static uint64_t checksum(const uint32_t *items, int64_t count)
{
    uint64_t sum = 0;

    for (int64_t i = 0; i < count; i++) {
        sum += (uint64_t)(i + 1) * items[i];
    }
    return sum;
}

static uint32_t *count_up(int64_t count)
{
    uint32_t *items = malloc((size_t)count * sizeof *items);

    for (int64_t i = 0; i < count; i++) {
        items[i] = (uint32_t)i;
    }
    return items;
}

static void shuffle_matches_numpy_up_to_ten_million(void **state)
{
    static const struct {
        int64_t count;
        uint32_t seed;
        uint64_t first, second; /* two arrays shuffled one after the other */
    } cases[] = {
        {1, 0u, 0ull, 0ull},
        {2, 7u, 2ull, 1ull},
        {10, 1234u, 242ull, 260ull},
        {1000, 4294967295u, 250435292ull, 248364347ull},
        {1000000, 99u, 250011239825001973ull, 250046148647072222ull},
        {10000000, 1234u, 10240762062657638544ull, 10189439773442825079ull},
    };

    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        const int64_t count = cases[c].count;
        uint32_t *first = count_up(count), *second = count_up(count);
        struct numpy_random random;

        numpy_random_seed(&random, cases[c].seed);
        numpy_random_shuffle(&random, first, count);
        numpy_random_shuffle(&random, second, count);
        assert_true(checksum(first, count) == cases[c].first);
        assert_true(checksum(second, count) == cases[c].second);
        free(first);
        free(second);
    }
}

static void randint_matches_numpy(void **state)
{
    static const int64_t small[] = {157, 254, 136, 261, 282, 152};
    static const int64_t large[] = {867663915883, 1069621364393, 593770158997};
    static const int64_t after[] = {7, 6, 0};
    struct numpy_random random;

    numpy_random_seed(&random, 3);
    for (int i = 0; i < 6; i++) {
        assert_int_equal(numpy_random_integer(&random, 5, 300), small[i]);
    }
    assert_int_equal(numpy_random_integer(&random, 0, 1), 0); /* draws nothing */
    for (int i = 0; i < 3; i++) {                             /* 64-bit draws */
        assert_int_equal(numpy_random_integer(&random, 0, 1ll << 40), large[i]);
    }
    for (int i = 0; i < 3; i++) {
        assert_int_equal(numpy_random_integer(&random, 0, 10), after[i]);
    }
}

static void randperm_matches_torch(void **state)
{
    static const uint32_t ten[] = {5, 0, 3, 4, 1, 7};
    static const uint32_t million[] = {124363, 509720, 495580, 180533, 933917, 234246};
    uint32_t *items = malloc(1000000 * sizeof *items);

    torch_randperm(items, 10, 7);
    assert_memory_equal(items, ten, sizeof ten);
    torch_randperm(items, 1000000, 12);
    assert_memory_equal(items, million, sizeof million);
    assert_int_equal(items[999999], 301472);
    free(items);
}

static void large_randperm_takes_64_bit_draws_like_torch(void **state)
{
    static const uint32_t expected[] = {91252029, 200188117, 283973398, 193777243};
    uint32_t *items = malloc(300000000ull * sizeof *items);

    if (items == NULL || getenv("CADRE_LARGE_TESTS") == NULL) {
        free(items);
        skip();
    }
    torch_randperm(items, 300000000, 5);
    assert_memory_equal(items, expected, sizeof expected);
    free(items);
}

static void mock_lengths_match_numpy(void **state)
{
    static const int32_t first[] = {3484, 2609, 2094, 1105, 1261, 168};
    int32_t *lengths = malloc(100000 * sizeof *lengths);

    numpy_mock_lengths(lengths, 100000);
    assert_memory_equal(lengths, first, sizeof first);
    assert_true(checksum((uint32_t *)lengths, 100000) == 10235530075780ull);
    free(lengths);
}

static void sums_match_numpy_to_the_last_bit(void **state)
{
    static const struct {
        int count;
        double sum;
    } cases[] = {
        {3, 0x1.9111111111110p-1},   {7, 0x1.5437437437437p+0},    {8, 0x1.6dd0dd0dd0dd0p+0},
        {9, 0x1.8516ae822df44p+0},   {100, 0x1.da81ad52b9b72p+1},  {128, 0x1.f96b70e38f84dp+1},
        {129, 0x1.fa65941081d6fp+1}, {1000, 0x1.7f32ac6b16780p+2},
    };
    double values[1000];

    for (int i = 0; i < 1000; i++) {
        values[i] = 1.0 / (i + 3);
    }
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        const double sum = numpy_sum(values, cases[c].count);

        assert_memory_equal(&sum, &cases[c].sum, sizeof sum);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shuffle_matches_numpy_up_to_ten_million),
        cmocka_unit_test(randint_matches_numpy),
        cmocka_unit_test(randperm_matches_torch),
        cmocka_unit_test(large_randperm_takes_64_bit_draws_like_torch),
        cmocka_unit_test(mock_lengths_match_numpy),
        cmocka_unit_test(sums_match_numpy_to_the_last_bit),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
