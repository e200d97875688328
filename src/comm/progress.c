/* progress.c - how often to look. A look that moved data took longer than one that found nothing,
 * and more data will be there soon: the next look follows at once (to yield here would be to wait
 * for the computing thread's time slice). Otherwise the pauses double, so that a message that comes
 * much later costs little until then. */
#include "comm/progress.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "base/check.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum { PAUSE_MIN_NS = 10000, PAUSE_MAX_NS = 200000, IDLE_LOOK_NS = 4000 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t thread;
    bool running, stopping, sleeping; /* sleeping: the thread waits for wake */
    bool has_work;
    atomic_int num_waiting; /* threads that want the lock: a mutex alone is not fair to them */
    bool (*advance)(void);
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* With the lock held. False: the thread is to end. */
static bool wait_for_work(void)
{
    while (!state.has_work && !state.stopping) {
        state.sleeping = true;
        pthread_cond_wait(&state.wake, &state.lock);
        state.sleeping = false;
    }
    return !state.stopping;
}

static void *run(void *unused)
{
    long pause_ns = PAUSE_MIN_NS;

#ifdef _OPENMP
    omp_set_num_threads(1); /* the cores compute */
#endif
    pthread_mutex_lock(&state.lock);
    while (wait_for_work()) {
        const int64_t start = now_ns();
        bool moved;

        state.has_work = state.advance();
        moved = now_ns() - start > IDLE_LOOK_NS;
        pause_ns = moved ? PAUSE_MIN_NS : pause_ns < PAUSE_MAX_NS ? 2 * pause_ns : PAUSE_MAX_NS;
        pthread_mutex_unlock(&state.lock);
        if (!moved || atomic_load(&state.num_waiting) > 0) {
            nanosleep(&(struct timespec){.tv_nsec = pause_ns}, NULL);
        }
        pthread_mutex_lock(&state.lock);
    }
    pthread_mutex_unlock(&state.lock);
    return NULL;
}

void progress_start(bool (*advance)(void))
{
    state.advance = advance;
    state.stopping = false;
    CHECK(pthread_create(&state.thread, NULL, run, NULL) == 0, "no thread for communication");
    state.running = true;
}

void progress_stop(void)
{
    if (!state.running) {
        return;
    }
    pthread_mutex_lock(&state.lock);
    state.stopping = true;
    pthread_cond_signal(&state.wake);
    pthread_mutex_unlock(&state.lock);
    pthread_join(state.thread, NULL);
    state.running = false;
}

void progress_lock(void)
{
    atomic_fetch_add(&state.num_waiting, 1);
    pthread_mutex_lock(&state.lock);
    atomic_fetch_sub(&state.num_waiting, 1);
}

void progress_unlock(bool work)
{
    const bool wake = work && state.sleeping;

    state.has_work = work;
    pthread_mutex_unlock(&state.lock);
    if (wake) {
        pthread_cond_signal(&state.wake);
    }
}
