/* Durable files and the error convention. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/check.h"
#include "base/path.h"

static char directory[] = "/tmp/cadre_path_XXXXXX";

static void atomic_write_replaces_the_whole_file(void **state)
{
    char path[PATH_LENGTH_MAX];
    size_t length;
    char *bytes;

    assert_int_equal(path_format(path, "%s/a/b/file", directory), 0);
    assert_int_equal(path_write_file_atomic(path, "x", 1), -1);
    assert_non_null(strstr(error_text(), "a/b/file"));
    char parent[PATH_LENGTH_MAX];
    assert_int_equal(path_parent(parent, path), 0);
    assert_int_equal(path_make_directories(parent), 0);
    assert_int_equal(path_write_file_atomic(path, "a longer text", 13), 0);
    assert_int_equal(path_write_file_atomic(path, "short", 5), 0);
    bytes = path_read_file(path, 100, &length);
    assert_non_null(bytes);
    assert_string_equal(bytes, "short");
    free(bytes);
    assert_null(path_read_file(path, 4, &length));
    assert_non_null(strstr(error_text(), "5 bytes"));
}

static void remove_tree_removes_all_and_accepts_nothing(void **state)
{
    char path[PATH_LENGTH_MAX];

    assert_int_equal(path_format(path, "%s/a", directory), 0);
    assert_int_equal(path_remove_tree(path), 0);
    assert_false(path_exists(path));
    assert_int_equal(path_remove_tree(path), 0);
}

static void error_text_is_one_line_and_gains_context(void **state)
{
    error_set("flag %d\nis wrong", 3);
    error_prepend("reading %s", "x");
    assert_string_equal(error_text(), "reading x: flag 3 is wrong");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(atomic_write_replaces_the_whole_file),
        cmocka_unit_test(remove_tree_removes_all_and_accepts_nothing),
        cmocka_unit_test(error_text_is_one_line_and_gains_context),
    };
    int result;

    if (mkdtemp(directory) == NULL) {
        return 1;
    }
    result = cmocka_run_group_tests(tests, NULL, NULL);
    return path_remove_tree(directory) != 0 ? 1 : result;
}
