/* A save that is killed or that fails at any system call leaves a complete checkpoint.
 *
 * This file defines the system calls that change a file system, in front of libc's: it counts them,
 * and at the chosen one kills the process or reports an error. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include "checkpoint_fixture.h"
#include "ckpt/checkpoint_layout.h"

static char directory[PATH_LENGTH_MAX];

/* ---- the system calls ---- */

enum fault { FAULT_NONE, FAULT_KILL, FAULT_ERROR, FAULT_SHORT_WRITE };
static enum fault fault;
static int fault_call, fault_errno, num_calls;

/* True: this call is the chosen one. */
static bool strike(void)
{
    if (fault == FAULT_NONE || num_calls++ != fault_call) {
        return false;
    }
    if (fault == FAULT_KILL) {
        kill(getpid(), SIGKILL);
    }
    errno = fault_errno;
    return true;
}

static bool fails(void)
{
    return strike() && fault != FAULT_SHORT_WRITE;
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    const bool struck = strike();

    if (struck && fault == FAULT_SHORT_WRITE) {
        length = (length + 1) / 2;
    } else if (struck) {
        return -1;
    }
    return syscall(SYS_write, fd, bytes, length);
}

int fsync(int fd)
{
    return fails() ? -1 : (int)syscall(SYS_fsync, fd);
}

int rename(const char *from, const char *to)
{
    return fails() ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags)
{
    return fails() ? -1 : (int)syscall(SYS_renameat2, from_fd, from, to_fd, to, flags);
}

int mkdir(const char *path, mode_t mode)
{
    return fails() ? -1 : (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int unlink(const char *path)
{
    return fails() ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int rmdir(const char *path)
{
    return fails() ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}

/* ---- helpers ---- */

static int make_directory(void **state)
{
    /* In memory where that is possible: hundreds of saves, each with ten syncs. */
    const char *parent = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";

    fault = FAULT_NONE;
    snprintf(directory, sizeof directory, "%s/cadre_crash_XXXXXX", parent);
    return mkdtemp(directory) != NULL ? 0 : -1;
}

static int remove_directory(void **state)
{
    fault = FAULT_NONE;
    return path_remove_tree(directory);
}

static void arm(enum fault kind, int call, int error)
{
    fault = kind;
    fault_call = call;
    fault_errno = error;
    num_calls = 0;
}

/* In a child: saves with the fault. Returns the wait status. */
static int save_in_child(int64_t iteration, bool exchange, enum fault kind, int call)
{
    const pid_t child = fork();
    int status;

    assert_true(child >= 0);
    if (child == 0) {
        checkpoint_can_exchange = exchange;
        arm(kind, call, 0);
        _exit(fixture_save(directory, iteration, NULL) == 0 ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static bool has_temporary(void)
{
    DIR *entries = opendir(directory);
    bool found = false;

    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        found = found || strstr(entry->d_name, ".tmp") != NULL;
    }
    closedir(entries);
    return found;
}

/* ---- killed ---- */

/* Saves `iteration` over a directory whose last complete checkpoint is `previous`, killed at the
 * first, second, ... call, until a save survives. */
static void kill_at_every_call(int64_t previous, int64_t iteration, bool exchange)
{
    bool survived = false;
    int call = 0;

    for (; !survived; call++) {
        int64_t loaded;

        survived = !WIFSIGNALED(save_in_child(iteration, exchange, FAULT_KILL, call));
        loaded = fixture_load(directory, -1);
        if (loaded != previous && loaded != iteration) {
            fail_msg("killed at call %d of a save of %lld after %lld: %s", call,
                     (long long)iteration, (long long)previous, error_text());
        }
    }
    assert_true(call > 15); /* the calls are counted at all */
    assert_int_equal(fixture_load(directory, -1), iteration);
    assert_int_equal(fixture_save(directory, iteration + 1, NULL), 0);
    assert_false(has_temporary()); /* what the dead left is cleared */
}

static void killed_at_any_call_the_previous_or_the_new_one_loads(void **state)
{
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    kill_at_every_call(10, 20, true);
}

static void killed_while_replacing_the_same_iteration_it_still_loads(void **state)
{
    for (int exchange = 0; exchange < 2; exchange++) {
        assert_int_equal(fixture_save(directory, 20, NULL), 0);
        kill_at_every_call(20, 20, exchange != 0);
    }
}

static void killed_during_the_first_save_there_is_nothing_or_the_new_one(void **state)
{
    bool survived = false;

    for (int call = 0; !survived; call++) {
        char path[PATH_LENGTH_MAX];

        survived = !WIFSIGNALED(save_in_child(10, true, FAULT_KILL, call));
        if (checkpoint_find(directory, -1, path) != CHECKPOINT_NONE) {
            assert_int_equal(fixture_load(directory, -1), 10);
        }
    }
    assert_int_equal(fixture_load(directory, -1), 10);
}

static const char *killing_stage;

static void stage_kill(const char *stage)
{
    if (strcmp(stage, killing_stage) == 0) {
        kill(getpid(), SIGKILL);
    }
}

static void killed_at_each_stage_the_previous_or_the_new_one_loads(void **state)
{
    static const char *stages[] = {"weights",   "optimizer", "manifest", "publish",
                                   "exchanged", "tracker",   "done"};

    assert_int_equal(fixture_save(directory, 20, NULL), 0); /* in place: to be replaced */
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    for (int i = 0; i < 7; i++) {
        const pid_t child = fork();
        int status;

        if (child == 0) {
            killing_stage = stages[i];
            checkpoint_test_hook = stage_kill;
            _exit(fixture_save(directory, 20, NULL));
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(fixture_load(directory, -1), i < 6 ? 10 : 20);
    }
}

static int64_t microseconds_of_a_save(void)
{
    struct timespec begin, end;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    assert_int_equal(fixture_save(directory, 1, NULL), 0);
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (end.tv_sec - begin.tv_sec) * 1000000 + (end.tv_nsec - begin.tv_nsec) / 1000;
}

static void killed_at_random_times_the_last_complete_one_loads(void **state)
{
    const int64_t save_us = microseconds_of_a_save();
    int64_t last = 1;

    for (int round = 0; round < 100; round++) {
        const pid_t child = fork();
        int64_t loaded;
        int status;

        if (child == 0) {
            for (int64_t i = last; fixture_save(directory, i, NULL) == 0; i++) {
            }
            _exit(1);
        }
        usleep((useconds_t)(300 + save_us * (round * 37 % 101) / 25)); /* up to four saves */
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        loaded = fixture_load(directory, -1);
        if (loaded < last) {
            fail_msg("round %d: %lld after %lld: %s", round, (long long)loaded, (long long)last,
                     error_text());
        }
        last = loaded;
    }
    assert_true(last > 10);
}

/* ---- one of two ranks killed ---- */

/* The ranks are processes joined by a socket. One whose peer is gone is stopped, as MPI does. */
struct peer {
    int rank, socket;
};

static void gather_with_peer(void *context, const void *mine, void *all, size_t size_bytes)
{
    const struct peer *peer = context;
    char *own = (char *)all + (size_t)peer->rank * size_bytes;
    char *other = (char *)all + (size_t)(1 - peer->rank) * size_bytes;

    memcpy(own, mine, size_bytes);
    if (send(peer->socket, mine, size_bytes, MSG_NOSIGNAL) != (ssize_t)size_bytes ||
        recv(peer->socket, other, size_bytes, MSG_WAITALL) != (ssize_t)size_bytes) {
        kill(getpid(), SIGKILL);
    }
}

/* Forks one rank; sockets[1 - rank] is the other's end. */
static pid_t start_rank(int rank, const int sockets[2], enum fault kind, int call)
{
    const pid_t child = fork();

    assert_true(child >= 0);
    if (child == 0) {
        struct peer peer = {rank, sockets[rank]};
        const struct checkpoint_ranks ranks = {rank, 2, gather_with_peer, &peer};

        close(sockets[1 - rank]);
        arm(kind, call, ENOSPC);
        _exit(fixture_save(directory, 20, &ranks) == 0 ? 0 : 1);
    }
    return child;
}

/* Two ranks save; the victim has the fault. Returns its wait status. */
static int save_as_two_ranks(int victim, enum fault kind, int call)
{
    int sockets[2], status[2];
    pid_t children[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
    for (int r = 0; r < 2; r++) {
        children[r] = start_rank(r, sockets, r == victim ? kind : FAULT_NONE, call);
    }
    close(sockets[0]);
    close(sockets[1]);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(waitpid(children[r], &status[r], 0), children[r]);
    }
    assert_int_equal(status[0] == 0, status[1] == 0); /* both have saved, or none */
    return status[victim];
}

static void killed_on_one_rank_the_previous_or_the_new_one_loads(void **state)
{
    for (int victim = 0; victim < 2; victim++) {
        bool survived = false;
        int call = 0;

        assert_int_equal(fixture_save(directory, 20, NULL), 0); /* in place: to be replaced */
        assert_int_equal(fixture_save(directory, 10, NULL), 0);
        for (; !survived; call++) {
            int64_t loaded;

            survived = !WIFSIGNALED(save_as_two_ranks(victim, FAULT_KILL, call));
            loaded = fixture_load(directory, -1);
            assert_true(loaded == 20 || loaded == 10);
            assert_true(loaded == 10 || victim == 0 || survived);
        }
        assert_true(call > 4);
        assert_int_equal(fixture_load(directory, -1), 20);
    }
    assert_int_equal(fixture_save(directory, 21, NULL), 0);
    assert_false(has_temporary());
}

static void failing_on_one_rank_the_save_is_given_up_by_both(void **state)
{
    for (int victim = 0; victim < 2; victim++) {
        bool saved = false;

        for (int call = 0; !saved; call++) {
            int64_t loaded;

            assert_int_equal(fixture_save(directory, 10, NULL), 0);
            saved = save_as_two_ranks(victim, FAULT_ERROR, call) == 0;
            loaded = fixture_load(directory, -1);
            assert_true(loaded == (saved ? 20 : 10) || (victim == 0 && loaded == 20));
        }
    }
    assert_false(has_temporary());
}

/* ---- failing ---- */

/* One save after another, each with one call that fails. The reason may be lost only by a save that
 * succeeds all the same. */
static void fail_at_every_call(enum fault kind, int error, const char *reason)
{
    int num_failed = 0;

    for (int call = 0;; call++) {
        int result;
        int64_t loaded;

        arm(kind, call, error);
        result = fixture_save(directory, 20, NULL);
        fault = FAULT_NONE;
        if (result != 0 &&
            (strstr(error_text(), reason) == NULL || strstr(error_text(), directory) == NULL)) {
            fail_msg("call %d: %s", call, error_text());
        }
        num_failed += result != 0;
        loaded = fixture_load(directory, -1);
        assert_true(loaded == 20 || (loaded == 10 && result != 0));
        assert_false(has_temporary());
        if (num_calls <= call) { /* the fault was never reached */
            break;
        }
        assert_int_equal(fixture_save(directory, 10, NULL), 0);
    }
    assert_true(kind == FAULT_SHORT_WRITE ? num_failed == 0 : num_failed > 15);
}

static void failing_at_any_call_is_an_error_and_loses_nothing(void **state)
{
    assert_int_equal(fixture_save(directory, 20, NULL), 0); /* in place: to be replaced */
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    fail_at_every_call(FAULT_ERROR, ENOSPC, "No space left on device");
    fail_at_every_call(FAULT_ERROR, EIO, "Input/output error");
}

static void a_short_write_is_continued(void **state)
{
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    fail_at_every_call(FAULT_SHORT_WRITE, 0, "");
}

static void a_file_size_limit_is_an_error_and_loses_nothing(void **state)
{
    struct rlimit limit, small;

    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = (struct rlimit){300, limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_int_equal(fixture_save(directory, 20, NULL), -1);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    assert_non_null(strstr(error_text(), "File too large"));
    assert_false(has_temporary());
    assert_int_equal(fixture_load(directory, -1), 10);
}

/* A real full disk and a real read-only one, where this user may mount one. */
static void a_full_and_a_read_only_disk_lose_nothing(void **state)
{
    char filler[PATH_LENGTH_MAX];

    if (mount("none", directory, "tmpfs", 0, "size=64k") != 0) {
        skip();
    }
    assert_int_equal(fixture_save(directory, 10, NULL), 0);
    assert_int_equal(path_format(filler, "%s/filler", directory), 0);
    for (int pages = 16; pages > 0; pages--) { /* fill all but ever fewer pages */
        char page[4096] = {0};
        const int fd = open(filler, O_WRONLY | O_CREAT | O_APPEND, 0666);

        if (write(fd, page, sizeof page) < 0) {
            close(fd);
            break;
        }
        close(fd);
    }
    assert_int_equal(fixture_save(directory, 20, NULL), -1);
    assert_non_null(strstr(error_text(), "No space left on device"));
    assert_int_equal(fixture_load(directory, -1), 10);
    assert_false(has_temporary());
    assert_int_equal(unlink(filler), 0);
    assert_int_equal(fixture_save(directory, 20, NULL), 0);
    assert_int_equal(mount("none", directory, NULL, MS_REMOUNT | MS_RDONLY, NULL), 0);
    assert_int_equal(fixture_save(directory, 30, NULL), -1);
    assert_non_null(strstr(error_text(), "Read-only file system"));
    assert_int_equal(fixture_load(directory, -1), 20);
    assert_int_equal(umount(directory), 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_directory, remove_directory)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(killed_at_any_call_the_previous_or_the_new_one_loads),
        TEST(killed_while_replacing_the_same_iteration_it_still_loads),
        TEST(killed_during_the_first_save_there_is_nothing_or_the_new_one),
        TEST(killed_at_each_stage_the_previous_or_the_new_one_loads),
        TEST(killed_at_random_times_the_last_complete_one_loads),
        TEST(killed_on_one_rank_the_previous_or_the_new_one_loads),
        TEST(failing_on_one_rank_the_save_is_given_up_by_both),
        TEST(failing_at_any_call_is_an_error_and_loses_nothing),
        TEST(a_short_write_is_continued),
        TEST(a_file_size_limit_is_an_error_and_loses_nothing),
        TEST(a_full_and_a_read_only_disk_lose_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
