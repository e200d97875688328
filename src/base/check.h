/* check.h - the two ways to fail.
 *
 * What the user caused (flags, files, sizes in a header) is an error: the function records one
 * message with error_set() and returns -1 (or NULL); callers pass the code up, adding context with
 * error_prepend() where that helps; main prints the message once and exits non-zero.
 *
 * What must not happen (a broken invariant, a failing CUDA, NCCL or MPI call) stops the whole job
 * at the spot: CHECK and panic never return. They are never used on bytes from outside. */
#ifndef CADRE_BASE_CHECK_H
#define CADRE_BASE_CHECK_H

#include <stdbool.h>

#define PRINTF_LIKE(fmt, first) __attribute__((format(printf, fmt, first)))

/* Records the calling thread's error message (at most 2047 bytes, one line). Returns -1. */
int error_set(const char *format, ...) PRINTF_LIKE(1, 2);
/* Puts "text: " in front of the recorded message. Returns -1. */
int error_prepend(const char *format, ...) PRINTF_LIKE(1, 2);
/* The recorded message, "" if none. Valid until the thread's next error_ call. */
const char *error_text(void);
void error_clear(void);

/* `return error_set(...)` reads well in functions returning int; for pointers: */
#define FAIL_NULL(...) (error_set(__VA_ARGS__), NULL)
/* Passes a failure of an int-returning call up unchanged. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        if ((call) != 0) {                                                                         \
            return -1;                                                                             \
        }                                                                                          \
    } while (0)

/* Ends the whole job: prints rank, host, place and text to stderr, then runs the hook (MPI_Abort
 * under MPI) or abort(). */
void panic(const char *file, int line, const char *condition, const char *format, ...)
    __attribute__((noreturn)) PRINTF_LIKE(4, 5);
/* rank is printed by panic; hook may be NULL. */
void panic_configure(int rank, void (*hook)(void));

/* This machine's, for messages. */
const char *host_name(void);

#define PANIC(...) panic(__FILE__, __LINE__, NULL, __VA_ARGS__)
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0)) {                                                   \
            panic(__FILE__, __LINE__, #condition, __VA_ARGS__);                                    \
        }                                                                                          \
    } while (0)

#endif
