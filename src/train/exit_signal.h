/* exit_signal.h - --exit-signal-handler: SIGTERM asks for a checkpoint and an orderly end. */
#ifndef CADRE_TRAIN_EXIT_SIGNAL_H
#define CADRE_TRAIN_EXIT_SIGNAL_H

#include <stdbool.h>

void exit_signal_install(void);
bool exit_signal_received(void);

#endif
