/* checkpoint_layout.h - names inside a checkpoint: what saving, finding and loading agree on. */
#ifndef CADRE_CKPT_CHECKPOINT_LAYOUT_H
#define CADRE_CKPT_CHECKPOINT_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CHECKPOINT_TRACKER "latest_checkpointed_iteration.txt"
#define CHECKPOINT_RELEASE "release"
#define CHECKPOINT_SHARDING_KEY "DCP_SHARDING_INFO"
#define CHECKPOINT_SHAPE_KEY "x_global_shape"
/* A file's boxes of one tensor have the keys "NAME", "NAME#1", "NAME#2", ... */
#define CHECKPOINT_BOX_MARK "#"
#define CHECKPOINT_OPTIMIZER_FOLDER "optimizer"

enum { CHECKPOINT_NAME_MAX = 256 };

/* "iter_0000020", or "release". */
void checkpoint_directory_name(char name[CHECKPOINT_NAME_MAX], int64_t iteration, bool release);
/* A save in progress works in NAME.tmp-HOST-PID; where directories cannot be exchanged, the one
 * being replaced waits as NAME.old-HOST-PID. */
void checkpoint_aside_name(char aside[CHECKPOINT_NAME_MAX], const char *name, const char *kind);

enum checkpoint_entry_kind { ENTRY_OTHER, ENTRY_COMPLETE, ENTRY_TEMPORARY, ENTRY_OLD };

struct checkpoint_entry {
    enum checkpoint_entry_kind kind;
    char name[CHECKPOINT_NAME_MAX]; /* "iter_0000020" of "iter_0000020.tmp-host-77" */
    int64_t iteration;              /* -1: release */
    bool is_local;                  /* the aside directory is of this host, */
    long pid;                       /* and this process */
};

/* What an entry of a directory of checkpoints is, by its name. */
void checkpoint_parse_entry(struct checkpoint_entry *entry, const char *file_name);

/* Set by tests only: called with the name of each stage of a save as it is reached. */
extern void (*checkpoint_test_hook)(const char *stage);
/* Cleared once a file system was met that cannot exchange two directories; tests clear it, too. */
extern bool checkpoint_can_exchange;

#endif
