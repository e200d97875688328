/* Available memory, of machines made of a few files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/host_memory.h"

static char root[64];

/* Makes the folders on the way. */
static void write_file(const char *name, const char *text)
{
    char path[512];
    FILE *file;

    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *slash = path + strlen(root) + 1; *slash != '\0'; slash++) {
        if (*slash == '/') {
            *slash = '\0';
            mkdir(path, 0777);
            *slash = '/';
        }
    }
    file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static int make_root(void **state)
{
    snprintf(root, sizeof root, "/tmp/test_host_memory.XXXXXX");
    return mkdtemp(root) != NULL ? 0 : -1;
}

static int remove_root(void **state)
{
    char command[128];

    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command);
}

static void write_machine(void)
{
    write_file("proc/meminfo", "MemTotal:       16000000 kB\nMemFree:  100 kB\n"
                               "MemAvailable:    8000000 kB\nSwapFree:    500000 kB\n");
}

static void without_any_file_nothing_is_known(void **state)
{
    assert_int_equal(host_memory_available_bytes(root), INT64_MAX);
}

static void a_machine_gives_what_is_available_and_its_free_swap(void **state)
{
    write_machine();
    assert_int_equal(host_memory_available_bytes(root), 8500000LL * 1024);
}

static void a_group_without_a_limit_changes_nothing(void **state)
{
    write_machine();
    write_file("proc/self/cgroup", "0::/job\n");
    write_file("sys/fs/cgroup/job/memory.max", "max\n");
    write_file("sys/fs/cgroup/job/memory.current", "123456\n");
    assert_int_equal(host_memory_available_bytes(root), 8500000LL * 1024);
}

static void a_group_gives_what_its_limit_leaves_where_cached_files_do_not_count(void **state)
{
    write_machine();
    write_file("proc/self/cgroup", "0::/slurm/job\n");
    write_file("sys/fs/cgroup/slurm/job/memory.max", "1000000\n");
    write_file("sys/fs/cgroup/slurm/job/memory.current", "990000\n");
    assert_int_equal(host_memory_available_bytes(root), 10000);
    write_file("sys/fs/cgroup/slurm/job/memory.stat",
               "anon 1\nactive_file 300000\ninactive_file 400000\n");
    assert_int_equal(host_memory_available_bytes(root), 710000);
}

static void a_group_over_its_limit_gives_nothing(void **state)
{
    write_machine();
    write_file("sys/fs/cgroup/memory.max", "1000\n");
    write_file("sys/fs/cgroup/memory.current", "2000\n");
    assert_int_equal(host_memory_available_bytes(root), 0);
}

static void the_first_version_of_groups_is_read_too(void **state)
{
    write_machine();
    write_file("proc/self/cgroup", "9:cpu:/\n4:memory:/docker/abc\n0::/\n");
    write_file("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000000\n");
    write_file("sys/fs/cgroup/memory/memory.usage_in_bytes", "4000000\n");
    write_file("sys/fs/cgroup/memory/memory.stat",
               "active_file 7\ntotal_inactive_file 500000\ntotal_active_file 1000000\n");
    assert_int_equal(host_memory_available_bytes(root), 2500000);
}

static void this_machine_has_some(void **state)
{
    assert_true(host_memory_available_bytes("") > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(without_any_file_nothing_is_known, make_root, remove_root),
        cmocka_unit_test_setup_teardown(a_machine_gives_what_is_available_and_its_free_swap,
                                        make_root, remove_root),
        cmocka_unit_test_setup_teardown(a_group_without_a_limit_changes_nothing, make_root,
                                        remove_root),
        cmocka_unit_test_setup_teardown(
            a_group_gives_what_its_limit_leaves_where_cached_files_do_not_count, make_root,
            remove_root),
        cmocka_unit_test_setup_teardown(a_group_over_its_limit_gives_nothing, make_root,
                                        remove_root),
        cmocka_unit_test_setup_teardown(the_first_version_of_groups_is_read_too, make_root,
                                        remove_root),
        cmocka_unit_test(this_machine_has_some),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
