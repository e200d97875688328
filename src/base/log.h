/* log.h - lines for a person. Results go to stdout, warnings to stderr. A rank other than the one
 * that speaks for the job (log_configure) prints nothing. */
#ifndef CADRE_BASE_LOG_H
#define CADRE_BASE_LOG_H

#include <stdbool.h>

#include "base/check.h"

void log_configure(bool speaks);
bool log_speaks(void);                                    /* for what prints by other means */
void log_info(const char *format, ...) PRINTF_LIKE(1, 2); /* adds the newline, flushes */
void log_warn(const char *format, ...) PRINTF_LIKE(1, 2); /* "cadre: warning: ..." on stderr */

#endif
