#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static bool speaks_for_job = true;

void log_configure(bool speaks)
{
    speaks_for_job = speaks;
}

bool log_speaks(void)
{
    return speaks_for_job;
}

static void print_line(FILE *file, const char *prefix, const char *format, va_list args)
{
    flockfile(file);
    fputs(prefix, file);
    vfprintf(file, format, args);
    fputc('\n', file);
    fflush(file);
    funlockfile(file);
}

void log_info(const char *format, ...)
{
    va_list args;

    if (!speaks_for_job) {
        return;
    }
    va_start(args, format);
    print_line(stdout, "", format, args);
    va_end(args);
}

void log_warn(const char *format, ...)
{
    va_list args;

    if (!speaks_for_job) {
        return;
    }
    va_start(args, format);
    print_line(stderr, "cadre: warning: ", format, args);
    va_end(args);
}
