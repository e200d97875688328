/* clock.h - a clock that only goes forward. */
#ifndef CADRE_BASE_CLOCK_H
#define CADRE_BASE_CLOCK_H

/* Seconds since some moment in the past. */
double clock_seconds(void);

#endif
