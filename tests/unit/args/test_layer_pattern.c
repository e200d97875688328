#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "args/options.h"
#include "base/check.h"

/* layers is a string of 0 and 1. */
static void expect_layers(const char *text, const char *layers)
{
    bool is_moe[OPTIONS_MAX_LAYERS];
    const int64_t num_layers = (int64_t)strlen(layers);

    if (options_parse_layer_pattern(text, num_layers, is_moe) != 0) {
        fail_msg("%s", error_text());
    }
    for (int64_t i = 0; i < num_layers; i++) {
        if (is_moe[i] != (layers[i] == '1')) {
            fail_msg("%s: layer %lld", text, (long long)i);
        }
    }
}

static void expect_error(const char *text, int64_t num_layers, const char *message)
{
    bool is_moe[OPTIONS_MAX_LAYERS];

    assert_int_equal(options_parse_layer_pattern(text, num_layers, is_moe), -1);
    if (strstr(error_text(), message) == NULL) {
        fail_msg("%s: said '%s', not '%s'", text, error_text(), message);
    }
}

static void an_integer_makes_every_nth_layer_moe(void **state)
{
    expect_layers("1", "1111");
    expect_layers("2", "10101");
    expect_layers("3", "100100");
    expect_layers("9", "1000");
    expect_layers("(1+1)*2", "10001");
}

static void a_list_says_it_layer_by_layer(void **state)
{
    expect_layers("[0,1,1]", "011");
    expect_layers("([0]*3+[1]*5)", "00011111");
    expect_layers(" ( [ 0 , 1 ] * 2 ) + 2*[1] ", "010111");
    expect_layers("[0]+[1]*3+[0]", "01110");
    expect_layers("([0,1]+[1])*2", "011011");
    expect_layers("[1]*0+[0]+[]", "0");
    expect_layers("2*2*[1]", "1111");
}

static void a_list_of_the_wrong_length_is_an_error(void **state)
{
    expect_error("[0]*3+[1]*4", 8, "has 7 entries: must be --num-layers, 8");
    expect_error("[]", 2, "has 0 entries");
}

static void what_is_no_pattern_is_an_error(void **state)
{
    static const char *const bad[] = {
        "",      "x",     "0x2",    "-1",         "1.5",    "[0",       "[0)",   "(0",  "[0]*",
        "+[0]",  "[0]+",  "[0][1]", "[2]",        "[-1]",   "[[0]]",    "[0,]",  "[,]", "[0]*[1]",
        "[0]+1", "1+[0]", "2 2",    "__import__", "[0]*3)", "lambda:0", "[1]**2"};

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        expect_error(bad[i], 2, "--moe-layer-freq");
    }
    expect_error("0", 2, "must be at least 1");
    expect_error("[2,0]", 2, "a layer is 0 (dense) or 1 (experts)");
    expect_error("[0]*[1]", 1, "a list times a list");
    expect_error("[0]+1", 2, "a list plus a number");
    expect_error("[0]+x", 2, "a number is missing at 'x'");
    expect_error("[0]*2 [1]", 2, "something is left over at '[1]'");
}

static void a_pattern_cannot_grow_without_bound(void **state)
{
    static char longest[2 * 5000 + 2];
    char deep[64];

    expect_error("[0]*4097", 2, "a number is too large");
    expect_error("[0]*4096*4096*4096*4096*4096*4096", 2, "too many layers");
    expect_error("4096*4096*[0]", 2, "a number is too large");
    expect_error("[0]*4096+[1]", 2, "too many layers");
    expect_error("4096+4096", 2, "a number is too large");
    expect_error("99999999999999999999999999", 2, "a number is too large");
    memcpy(longest, "[0", 2);
    for (size_t i = 2; i < sizeof longest - 2; i += 2) { /* 5000 entries */
        memcpy(longest + i, ",0", 2);
    }
    memcpy(longest + sizeof longest - 2, "]", 2);
    expect_error(longest, 2, "too many layers");
    memset(deep, '(', sizeof deep - 1);
    deep[sizeof deep - 1] = '\0';
    expect_error(deep, 2, "too many parentheses");
}

static void a_list_of_4096_layers_is_read(void **state)
{
    static bool is_moe[OPTIONS_MAX_LAYERS];

    assert_int_equal(options_parse_layer_pattern("[0,1]*2048", 4096, is_moe), 0);
    assert_false(is_moe[4094]);
    assert_true(is_moe[4095]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_integer_makes_every_nth_layer_moe),
        cmocka_unit_test(a_list_says_it_layer_by_layer),
        cmocka_unit_test(a_list_of_the_wrong_length_is_an_error),
        cmocka_unit_test(what_is_no_pattern_is_an_error),
        cmocka_unit_test(a_pattern_cannot_grow_without_bound),
        cmocka_unit_test(a_list_of_4096_layers_is_read),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
