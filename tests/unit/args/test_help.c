#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "args/help.h"
#include "args/options.h"
#include "base/check.h"

static const struct option_table *const tables[] = {&options_table};

/* Output of the documents' printers, as a malloc'd string. */
static char *document(void (*print)(const struct option_table *const *, int, FILE *))
{
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);

    print(tables, 1, out);
    fclose(out);
    return text;
}

static char *help(int argc, char **argv, bool *requested)
{
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);

    *requested = help_requested(&options_table, argc, argv, out);
    fclose(out);
    return text;
}

static void expect(const char *text, const char *part)
{
    if (strstr(text, part) == NULL) {
        fail_msg("'%s' is missing in\n%s", part, text);
    }
}

static void help_lists_every_flag_in_its_group(void **state)
{
    char *argv[] = {"pretrain", "--num-layers", "4", "--help"};
    bool requested;
    char *text = help(4, argv, &requested);

    assert_true(requested);
    for (int i = 0; i < options_table.num_rows; i++) {
        expect(text, options_table.rows[i].flag);
    }
    expect(text, "\nmoe:\n");
    expect(text, "  --moe-router-topk N\n"
                 "        experts that a token goes to (an integer from 1 to 65536; default 2)\n");
    expect(text, "        update rule (one of adam, sgd; default adam)\n");
    free(text);
}

static void help_lines_fit_80_columns(void **state)
{
    char *argv[] = {"pretrain", "--help"};
    bool requested;
    char *text = help(2, argv, &requested);

    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        if (strlen(line) > 80) {
            fail_msg("%s", line);
        }
    }
    free(text);
}

static void help_on_a_group_shows_it_alone(void **state)
{
    char *argv[] = {"pretrain", "--help", "moe"};
    bool requested;
    char *text = help(3, argv, &requested);

    assert_true(requested);
    expect(text, "--num-experts N");
    assert_null(strstr(text, "--hidden-size N"));
    free(text);
}

static void help_on_a_flag_says_why_it_is_refused(void **state)
{
    char *argv[] = {"pretrain", "--help", "--fp16"};
    bool requested;
    char *text = help(3, argv, &requested);

    expect(text, "not built, training is in fp32");
    free(text);
}

static void help_on_nothing_known_lists_the_groups(void **state)
{
    char *argv[] = {"pretrain", "--help", "cooking"};
    bool requested;
    char *text = help(3, argv, &requested);

    expect(text, "no help on 'cooking': legal are a flag or a group of flags: model, moe,");
    free(text);
}

static void no_help_is_given_unasked(void **state)
{
    char *argv[] = {"pretrain", "--num-layers", "4"};
    bool requested;
    char *text = help(3, argv, &requested);

    assert_false(requested);
    assert_string_equal(text, "");
    free(text);
}

static void the_man_page_escapes_hyphens_and_names_every_flag(void **state)
{
    char *text = document(help_print_man);

    expect(text, ".TH CADRE 1");
    expect(text, ".SH CADRE pretrain\n.SS model\n");
    expect(text, ".TP\n.B \\-\\-num\\-layers\\fR \\fIN\\fR\n");
    for (int i = 0; i < options_table.num_rows; i++) {
        char line[256] = ".B ";

        for (const char *c = options_table.rows[i].flag; *c != '\0'; c++) {
            strcat(line, *c == '-' ? "\\-" : (char[]){*c, '\0'});
        }
        expect(text, line);
    }
    free(text);
}

/* Runs the completion script in bash and returns the words offered, one a line. */
static void completes(const char *words, int position, const char *offered)
{
    char *script = document(help_print_completion);
    char command[65536], answer[16384] = "";
    size_t length;
    FILE *shell, *file = fopen("completion_test.bash", "w");

    assert_non_null(file);
    fputs(script, file);
    fclose(file);
    free(script);
    snprintf(command, sizeof command,
             "bash -c '. ./completion_test.bash; COMP_WORDS=(%s); COMP_CWORD=%d; _cadre; "
             "printf \"%%s\\n\" \"${COMPREPLY[@]}\"'",
             words, position);
    shell = popen(command, "r");
    assert_non_null(shell);
    length = fread(answer, 1, sizeof answer - 1, shell);
    answer[length] = '\0';
    pclose(shell);
    remove("completion_test.bash");
    if (strcmp(answer, offered) != 0) {
        fail_msg("%s: offered '%s', not '%s'", words, answer, offered);
    }
}

static void the_shell_completes_commands_flags_and_choices(void **state)
{
    completes("cadre pre", 1, "pretrain\n");
    completes("cadre pretrain --num-layers-", 2, "--num-layers-per-virtual-pipeline-stage\n");
    completes("cadre pretrain --optimizer \"\"", 3, "adam\nsgd\n");
    completes("cadre pretrain --bf16 --optimizer s", 4, "sgd\n");
    completes("cadre pretrain --load \"\"", 3, "\n"); /* bash then offers files */
    completes("cadre pretrain --fp1", 2, "\n");       /* refused flags are not offered */
}

static void the_page_of_flags_is_up_to_date(void **state)
{
    char *text = document(help_print_markdown);
    FILE *file = fopen(FIXTURES "/../../docs/flags.md", "r");
    char *page;
    size_t length;

    assert_non_null(file);
    page = calloc(1, 1 << 20);
    assert_non_null(page);
    length = fread(page, 1, (1 << 20) - 1, file);
    fclose(file);
    /* the page may go on with the tables of other commands */
    if (length < strlen(text) || strncmp(page, text, strlen(text)) != 0) {
        fail_msg("docs/flags.md is stale: cadre docs markdown > docs/flags.md");
    }
    free(page);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(help_lists_every_flag_in_its_group),
        cmocka_unit_test(help_lines_fit_80_columns),
        cmocka_unit_test(help_on_a_group_shows_it_alone),
        cmocka_unit_test(help_on_a_flag_says_why_it_is_refused),
        cmocka_unit_test(help_on_nothing_known_lists_the_groups),
        cmocka_unit_test(no_help_is_given_unasked),
        cmocka_unit_test(the_man_page_escapes_hyphens_and_names_every_flag),
        cmocka_unit_test(the_shell_completes_commands_flags_and_choices),
        cmocka_unit_test(the_page_of_flags_is_up_to_date),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
