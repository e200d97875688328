/* comm_staged.h - a group for tensors of a device, over one that takes the host's: what is sent is
 * copied to the host when the collective is issued, what has come is copied to the device at the
 * wait. Ranks may share a GPU. */
#ifndef CADRE_COMM_COMM_STAGED_H
#define CADRE_COMM_COMM_STAGED_H

#include "comm/comm.h"

/* host stays the caller's, and counts what is sent. */
struct comm *comm_staged_create(struct comm *host);

#endif
