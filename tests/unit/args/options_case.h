/* options_case.h - one command line and what options_validate says to it. */
#ifndef CADRE_TESTS_OPTIONS_CASE_H
#define CADRE_TESTS_OPTIONS_CASE_H

#include <stdio.h>
#include <string.h>

#include "args/options.h"
#include "base/check.h"

/* A small legal run; the tests add to it. */
#define MODEL_FLAGS                                                                                \
    "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 32 "                     \
    "--max-position-embeddings 64 "
#define BASE_FLAGS                                                                                 \
    MODEL_FLAGS "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --mock-data "                     \
                "--tokenizer-type NullTokenizer --vocab-size 100 "
#define MOE_FLAGS BASE_FLAGS "--num-experts 8 --disable-bias-linear "

enum { CASE_WORDS_MAX = 256 };

/* Splits line at blanks and parses it; "|" inside a word stands for a blank. */
static int case_parse(struct options *o, const char *line)
{
    static char copy[8192];
    char *argv[CASE_WORDS_MAX] = {"pretrain"};
    int argc = 1;

    snprintf(copy, sizeof copy, "%s", line);
    assert_int_equal(options_init(o), 0);
    for (char *word = strtok(copy, " "); word != NULL; word = strtok(NULL, " ")) {
        assert_true(argc < CASE_WORDS_MAX);
        for (char *c = word; *c != '\0'; c++) {
            *c = (char)(*c == '|' ? ' ' : *c);
        }
        argv[argc++] = word;
    }
    return options_parse(o, argc, argv);
}

/* Both must succeed. */
static void case_valid(struct options *o, const char *line, int world_size)
{
    if (case_parse(o, line) != 0 || options_validate(o, world_size) != 0) {
        fail_msg("%s\non %d ranks: %s", line, world_size, error_text());
    }
}

/* Parsing or validation must fail with a message that holds text. */
static void case_error(const char *line, int world_size, const char *text)
{
    struct options o;

    error_clear();
    if (case_parse(&o, line) == 0 && options_validate(&o, world_size) == 0) {
        fail_msg("%s\non %d ranks: accepted, not refused with '%s'", line, world_size, text);
    }
    if (strstr(error_text(), text) == NULL) {
        fail_msg("%s\non %d ranks: said '%s', not '%s'", line, world_size, error_text(), text);
    }
    options_free(&o);
}

#endif
