/* The loader looks where the system's loader looks, then in the toolkit that built the program. */
#ifdef CADRE_CUDA
#include "ops/libraries_cuda.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>

#include "base/check.h"
#include "base/log.h"

#define TEXT_OF_(x) #x
#define TEXT_OF(x) TEXT_OF_(x)

struct named_function {
    const char *name;
    void **address;
};

static void *open_library(const char *file)
{
    char path[512];
    void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);

    if (library == NULL) {
        snprintf(path, sizeof path, "%s/%s", CADRE_CUDA_LIBRARIES, file);
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    return library;
}

static int load(const char *file, const struct named_function *functions)
{
    void *library = open_library(file);

    if (library == NULL) {
        return error_set("%s was not found (%s)", file, dlerror());
    }
    for (; functions->name != NULL; functions++) {
        *functions->address = dlsym(library, functions->name);
        if (*functions->address == NULL) {
            return error_set("%s has no %s", file, functions->name);
        }
    }
    return 0;
}

#define NAMED(function) {#function, (void **)&table.function},

const struct cublaslt_library *cublaslt_library(void)
{
    static struct cublaslt_library table;
    static bool loaded;
    const struct named_function functions[] = {CUBLASLT_FUNCTIONS(NAMED){NULL, NULL}};

    if (!loaded && load("libcublasLt.so." TEXT_OF(CUBLAS_VER_MAJOR), functions) != 0) {
        error_prepend("the GPU needs cuBLASLt");
        return NULL;
    }
    loaded = true;
    return &table;
}

#ifdef CADRE_CUDNN
const struct cudnn_library *cudnn_library(void)
{
    static struct cudnn_library table;
    static enum { NOT_TRIED, LOADED, MISSING } state;
    const struct named_function functions[] = {CUDNN_FUNCTIONS(NAMED){NULL, NULL}};

    if (state == NOT_TRIED) {
        state = load("libcudnn.so." TEXT_OF(CUDNN_MAJOR), functions) == 0 ? LOADED : MISSING;
        if (state == MISSING) {
            log_warn("attention runs on cadre's own kernels, which are much slower: %s",
                     error_text());
        }
    }
    return state == LOADED ? &table : NULL;
}
#endif

#ifdef CADRE_NCCL
const struct nccl_library *nccl_library(void)
{
    static struct nccl_library table;
    static bool loaded;
    const struct named_function functions[] = {NCCL_FUNCTIONS(NAMED){NULL, NULL}};

    if (!loaded && load("libnccl.so." TEXT_OF(NCCL_MAJOR), functions) != 0) {
        return NULL;
    }
    loaded = true;
    return &table;
}
#endif
#endif
