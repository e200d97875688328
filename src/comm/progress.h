/* progress.h - a thread that moves collectives along while their rank computes: MPI's messages
 * advance only inside calls of MPI. One lock guards MPI and all operations in flight; whoever holds
 * it may call MPI (MPI_THREAD_SERIALIZED). */
#ifndef CADRE_COMM_PROGRESS_H
#define CADRE_COMM_PROGRESS_H

#include <stdbool.h>

/* Starts the thread. advance is called with the lock held; it returns whether operations remain in
 * flight. Without the thread, lock and unlock are still to be called. */
void progress_start(bool (*advance)(void));
/* Joins the thread, if there is one. */
void progress_stop(void);

void progress_lock(void);
/* work: there are operations for the thread to advance. A rank that waits advances them itself. */
void progress_unlock(bool work);

#endif
