/* The documents that are written from the option rows: `cadre docs man|completion|markdown`. */
#include <stdio.h>
#include <string.h>

#include "args/help.h"
#include "args/options.h"
#include "base/check.h"
#include "cmd/cmd.h"

int cmd_docs(int argc, char **argv)
{
    const struct option_table *const tables[] = {&options_table, &preprocess_table, &convert_table,
                                                 &logits_table,  &generate_table,   &inspect_table};
    const int num_tables = sizeof tables / sizeof tables[0];
    const char *what = argc == 2 ? argv[1] : "";

    if (strcmp(what, "man") == 0) {
        help_print_man(tables, num_tables, stdout);
    } else if (strcmp(what, "completion") == 0) {
        help_print_completion(tables, num_tables, stdout);
    } else if (strcmp(what, "markdown") == 0) {
        help_print_markdown(tables, num_tables, stdout);
    } else {
        return error_set("cadre docs takes man, completion or markdown");
    }
    return 0;
}
