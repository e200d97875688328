/* many_runs FILE: training runs one after the other in one process, or on the ranks of one job, of
 * which the start (a GPU's context, its libraries, MPI) is the larger part where a run is small.
 * Each line of FILE: a name, and the flags of `cadre pretrain`. What a run says goes to NAME.log;
 * NAME.ok is made when it has ended well. Any other end is the job's. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "args/options.h"
#include "base/check.h"
#include "base/log.h"
#include "base/path.h"
#include "comm/comm_mpi.h"
#include "comm/launch.h"
#include "train/train.h"

enum { WORDS_MAX = 256, LINE_MAX_BYTES = 16384 };

/* The name, where a command line has the command, then the flags: pointers into line. */
static int split(char *line, char *words[WORDS_MAX])
{
    int count = 0;

    for (char *word = strtok(line, " \n"); word != NULL; word = strtok(NULL, " \n")) {
        CHECK(count < WORDS_MAX, "more than %d words", WORDS_MAX);
        words[count++] = word;
    }
    return count;
}

/* All ranks' output from here on. */
static int redirect_output(const char *name)
{
    char path[PATH_LENGTH_MAX];
    int fd;

    TRY(path_format(path, "%s.log", name));
    fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) {
        return error_set("cannot create %s", path);
    }
    fflush(NULL);
    CHECK(dup2(fd, STDOUT_FILENO) >= 0 && dup2(fd, STDERR_FILENO) >= 0, "dup2");
    close(fd);
    return 0;
}

static int run(int argc, char **argv)
{
    struct options options;
    int result;

    TRY(options_init(&options));
    result = options_parse(&options, argc, argv);
    if (result == 0) {
        result = options_validate(&options, launch_size());
    }
    if (result == 0) {
        comm_mpi_set_timeout(60.0 * options.distributed_timeout_minutes);
        result = train(&options);
    }
    options_free(&options);
    return result;
}

static int run_line(char *line)
{
    char *words[WORDS_MAX], path[PATH_LENGTH_MAX];
    const int count = split(line, words);

    if (count == 0) {
        return 0;
    }
    TRY(redirect_output(words[0]));
    TRY(run(count, words));
    TRY(path_format(path, "%s.ok", words[0]));
    return launch_rank() == 0 ? path_write_file_atomic(path, "", 0) : 0;
}

static int run_lines(const char *path)
{
    FILE *file = fopen(path, "r");
    char line[LINE_MAX_BYTES];
    int result = 0;

    if (file == NULL) {
        return error_set("%s cannot be opened", path);
    }
    while (result == 0 && fgets(line, sizeof line, file) != NULL) {
        result = run_line(line);
    }
    fclose(file);
    return result;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fputs("usage: many_runs FILE\n", stderr);
        return 2;
    }
    if (launch_init(&argc, &argv) != 0) {
        launch_fail(error_text());
    }
    log_configure(launch_rank() == 0);
    if (run_lines(argv[1]) != 0) {
        launch_fail(error_text());
    }
    launch_finish();
    return 0;
}
