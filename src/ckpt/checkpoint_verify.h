/* checkpoint_verify.h - is a checkpoint complete and undamaged, and which one is, if not. */
#ifndef CADRE_CKPT_CHECKPOINT_VERIFY_H
#define CADRE_CKPT_CHECKPOINT_VERIFY_H

#include "base/path.h"
#include "ckpt/manifest.h"

/* Checks sizes of all files, and hashes of those whose index is part modulo num_parts. */
int checkpoint_verify_files(const char *path, const struct manifest *manifest, int part,
                            int num_parts);
/* The iteration of the newest complete checkpoint in directory, fully checked, whose name is not
 * `except` ("iter_0000020"; may be NULL); its path is written. Returns -2 if there is none, -1 for
 * "release". */
int64_t checkpoint_newest_complete(const char *directory, const char *except,
                                   char path[PATH_LENGTH_MAX]);
/* Appends to the recorded error which complete checkpoint there is instead. Returns -1. */
int checkpoint_offer_other(const char *directory, const char *except);

#endif
