/* launch.h - how many processes this run has, and how it starts and ends.
 *
 * A process that mpirun or srun started as one of several joins MPI; one that was started alone
 * does not touch MPI at all. A command whose processes work together calls launch_init first
 * (without it they are so many runs apart); main calls launch_finish or launch_fail last. */
#ifndef CADRE_COMM_LAUNCH_H
#define CADRE_COMM_LAUNCH_H

#include <stdbool.h>

/* Joins MPI where the environment says so, and makes panic stop all ranks. Fails when the launcher
 * and MPI disagree, or cadre was built without MPI. */
int launch_init(int *argc, char ***argv);
int launch_rank(void);
int launch_size(void);
/* This rank's number among those of its host. */
int launch_local_rank(void);
/* From here on this process, which was started alone, counts as rank RANK (0 if not given) of
 * WORLD_SIZE, which the environment says; the groups of several ranks are emulated (comm_fake.h).
 * -1 with an error where that makes no sense. */
int launch_emulate(void);
bool launch_is_emulated(void);
/* What the launcher's environment says: 1 when this process was started alone. */
int launch_size_from_environment(int *size);

/* Leaves MPI, if launch_init joined it; all ranks must come here. */
void launch_finish(void);
/* Where all ranks fail alike, rank 0 speaks, and ends the others, which wait here, before they do.
 */
void launch_let_rank_0_speak(void);
/* Prints "cadre: error: TEXT", of several ranks with rank and host, and ends all ranks with exit
 * status 1. Where all ranks fail alike, such as for a wrong flag, rank 0 is given the time to say
 * it for all. */
void launch_fail(const char *text) __attribute__((noreturn));

#endif
