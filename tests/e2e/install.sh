# What is installed works from there: the program, its man page and completion, and libcadre found by pkg-config.
. "$SOURCE/tests/e2e/lib/expect.sh"

cmake --install "$BUILD" --prefix "$PWD/installed" >/dev/null
PATH=$PWD/installed/bin:$PATH
[[ $(cadre --version) == "cadre "[0-9]* ]] || fail "cadre --version says: $(cadre --version)"
grep -q '^\.TH' installed/share/man/man1/cadre.1 || fail "cadre.1 is no man page"
bash -n installed/share/bash-completion/completions/cadre

cat >program.c <<'EOC'
#include <cadre.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    const int64_t tokens[] = {1, 2, 3};
    struct cadre_model *model = cadre_model_open(argv[1], 3);
    float *logits;

    if (model == NULL) {
        fprintf(stderr, "%s\n", cadre_error_text());
        return 1;
    }
    logits = malloc(3 * (size_t)cadre_model_vocab_size(model) * sizeof(float));
    if (cadre_model_logits(model, tokens, 1, 3, logits) != 0) {
        return 1;
    }
    printf("%s %g\n", cadre_version(), (double)logits[0]);
    free(logits);
    cadre_model_close(model);
    return 0;
}
EOC
pc=$(dirname "$(find installed -name libcadre.pc)")
flags=$(PKG_CONFIG_PATH=$PWD/$pc pkg-config --cflags --libs libcadre)
# shellcheck disable=SC2086
cc -Wall -Werror program.c $flags -o program
export LD_LIBRARY_PATH=$PWD/${pc%/pkgconfig}
./program "$FIXTURES/mixtral-tiny" >program.out
grep -qE '^[0-9.]+ -?[0-9]' program.out || fail "the program says: $(cat program.out)"
expect_error "nowhere" ./program nowhere

# Nothing but include/cadre.h's functions is visible.
nm -D --defined-only "$LD_LIBRARY_PATH/libcadre.so" | awk '$2 ~ /[TBDR]/ && $3 !~ /^cadre_/ { print $3 }' >visible
[ ! -s visible ] || fail "libcadre.so also shows: $(head -n 5 visible)"
