/* delay.h - an artificial slowness of groups, to see in tests whether communication is hidden
 * behind computation.
 *
 * The environment variable CADRE_COMM_DELAY_MS, read when MPI starts, holds entries GROUP:MS or
 * GROUP:MS/MB separated by commas, "dp-cp:20,ep:5.5/MB"; group names are those of --log-comm, "all"
 * is every group. MS is a latency: a collective of the group is complete no earlier than MS
 * milliseconds after its issue, a message no earlier than MS after both sides have issued it (by
 * the clock of one host). MS/MB is the time of a link that this rank's 10^6 bytes pass one after
 * another. Results do not change. */
#ifndef CADRE_COMM_DELAY_H
#define CADRE_COMM_DELAY_H

/* Replaces all delays; NULL or "": none. Fails when text is not of that form. */
int comm_delay_parse(const char *text);
struct comm_delay {
    double seconds, seconds_per_byte;
};

/* Of a group; zero without. */
struct comm_delay comm_delay_of(const char *group);

#endif
