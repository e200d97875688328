#include "base/check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ERROR_TEXT_MAX = 2048 };

static _Thread_local char error_buffer[ERROR_TEXT_MAX];
static int panic_rank;
static void (*panic_hook)(void);

static void one_line(char *text)
{
    for (; *text != '\0'; text++) {
        if (*text == '\n' || *text == '\r') {
            *text = ' ';
        }
    }
}

int error_set(const char *format, ...)
{
    char text[ERROR_TEXT_MAX]; /* arguments may point into error_buffer */
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    one_line(text);
    memcpy(error_buffer, text, sizeof text);
    return -1;
}

int error_prepend(const char *format, ...)
{
    char prefix[ERROR_TEXT_MAX], text[2 * ERROR_TEXT_MAX];
    va_list args;

    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    snprintf(text, sizeof text, "%s: %s", prefix, error_buffer);
    return error_set("%.*s", ERROR_TEXT_MAX - 1, text);
}

const char *error_text(void)
{
    return error_buffer;
}

void error_clear(void)
{
    error_buffer[0] = '\0';
}

void panic_configure(int rank, void (*hook)(void))
{
    panic_rank = rank;
    panic_hook = hook;
}

const char *host_name(void)
{
    static char name[256];

    if (gethostname(name, sizeof name - 1) != 0 || name[0] == '\0') {
        return "unknown";
    }
    return name;
}

/* One write, or the launcher puts its own lines in between. */
void panic(const char *file, int line, const char *condition, const char *format, ...)
{
    char text[ERROR_TEXT_MAX];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    one_line(text);
    fflush(stdout);
    fprintf(stderr, "cadre: rank %d on host %s stopped at %s:%d: %s%s%s%s\n", panic_rank,
            host_name(), file, line, condition != NULL ? "not (" : "",
            condition != NULL ? condition : "", condition != NULL ? "): " : "", text);
    fflush(stderr);
    if (panic_hook != NULL) {
        panic_hook();
    }
    abort();
}
