#include "train/exit_signal.h"

#include <signal.h>

static volatile sig_atomic_t received;

static void on_signal(int number)
{
    received = 1;
}

void exit_signal_install(void)
{
    const struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};

    sigaction(SIGTERM, &action, NULL);
}

bool exit_signal_received(void)
{
    return received != 0;
}
