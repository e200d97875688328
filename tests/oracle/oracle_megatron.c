/* oracle_megatron DIR: this build against the numbers of Megatron-Core itself. DIR holds any of
 * megatron-moe, megatron-head-router, megatron-data (folders of cases) and megatron-lr.json. A line
 * a case; exit 1 on a difference, or where there is no case. */
#include "megatron_data_case.h"
#include "megatron_lr_cases.h"
#include "megatron_moe_cases.h"
#include "megatron_router_cases.h"

/* A kind of cases that DIR may lack. */
struct kind {
    const char *name;
    int (*run)(const char *path); /* the number of cases, or -1 */
};

static int run_moe(const char *path)
{
    return oracle_for_each(path, megatron_moe_case);
}

static int run_router(const char *path)
{
    return oracle_for_each(path, megatron_router_case);
}

static int run_data(const char *path)
{
    const int num_failed = golden_run_directory(path, stdout);

    if (num_failed < 0) {
        return error_set("%s: no case", path);
    }
    oracle_tally.num_cases++;
    oracle_tally.num_failed += num_failed;
    return 1;
}

static void run_kind(const struct kind *kind, const char *directory)
{
    char path[PATH_LENGTH_MAX];

    if (path_format(path, "%s/%s", directory, kind->name) != 0 || !path_exists(path)) {
        printf("none %s/%s: not there\n", directory, kind->name);
        return;
    }
    if (kind->run(path) <= 0) {
        printf("FAIL %s: %s\n", path, error_text()[0] != '\0' ? error_text() : "no case");
        oracle_tally.num_cases++;
        oracle_tally.num_failed++;
    }
}

int main(int argc, char **argv)
{
    static const struct kind kinds[] = {{"megatron-moe", run_moe},
                                        {"megatron-head-router", run_router},
                                        {"megatron-data", run_data},
                                        {"megatron-lr.json", megatron_lr_cases}};

    if (argc != 2) {
        fprintf(stderr, "usage: oracle_megatron DIR\n");
        return 2;
    }
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        run_kind(&kinds[i], argv[1]);
    }
    if (oracle_tally.num_cases == 0) {
        printf("FAIL %s: no case\n", argv[1]);
        return 1;
    }
    if (oracle_tally.num_failed > 0) {
        printf("%d failed\n", oracle_tally.num_failed);
    }
    return oracle_tally.num_failed == 0 ? 0 : 1;
}
