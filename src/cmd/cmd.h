/* cmd.h - the subcommands. argv[0] is the subcommand's name. Each returns 0, or -1 with
 * error_set(), which main prints. */
#ifndef CADRE_CMD_CMD_H
#define CADRE_CMD_CMD_H

#include "args/option_table.h"

int cmd_pretrain(int argc, char **argv);
int cmd_preprocess(int argc, char **argv);
int cmd_convert(int argc, char **argv);
int cmd_logits(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_bench(int argc, char **argv);
/* Man page, completion and flag reference, for the build. */
int cmd_docs(int argc, char **argv);

extern const struct option_table preprocess_table, convert_table, logits_table, generate_table,
    inspect_table;

#endif
