/* libraries_cuda.h - NVIDIA's libraries, loaded when a GPU is first used: one program runs on
 * machines with and without them. Each table holds the library's own functions by their names. */
#ifndef CADRE_OPS_LIBRARIES_CUDA_H
#define CADRE_OPS_LIBRARIES_CUDA_H

#include <cublasLt.h>
#ifdef CADRE_CUDNN
#include <cudnn.h>
#endif
#ifdef CADRE_NCCL
#include <nccl.h>
#endif

#define CUBLASLT_FUNCTIONS(X)                                                                      \
    X(cublasLtCreate)                                                                              \
    X(cublasLtGetStatusString)                                                                     \
    X(cublasLtMatmul)                                                                              \
    X(cublasLtMatmulAlgoConfigGetAttribute)                                                        \
    X(cublasLtMatmulAlgoGetHeuristic)                                                              \
    X(cublasLtMatmulDescInit_internal)                                                             \
    X(cublasLtMatmulDescSetAttribute)                                                              \
    X(cublasLtMatmulPreferenceInit_internal)                                                       \
    X(cublasLtMatmulPreferenceSetAttribute)                                                        \
    X(cublasLtMatrixLayoutInit_internal)

#define CUDNN_FUNCTIONS(X)                                                                         \
    X(cudnnBackendCreateDescriptor)                                                                \
    X(cudnnBackendDestroyDescriptor)                                                               \
    X(cudnnBackendExecute)                                                                         \
    X(cudnnBackendFinalize)                                                                        \
    X(cudnnBackendGetAttribute)                                                                    \
    X(cudnnBackendSetAttribute)                                                                    \
    X(cudnnCreate)                                                                                 \
    X(cudnnGetErrorString)                                                                         \
    X(cudnnGetVersion)                                                                             \
    X(cudnnSetStream)

#define NCCL_FUNCTIONS(X)                                                                          \
    X(ncclAllGather)                                                                               \
    X(ncclAllReduce)                                                                               \
    X(ncclBroadcast)                                                                               \
    X(ncclCommAbort)                                                                               \
    X(ncclCommDestroy)                                                                             \
    X(ncclCommFinalize)                                                                            \
    X(ncclCommGetAsyncError)                                                                       \
    X(ncclCommInitRankConfig)                                                                      \
    X(ncclGetErrorString)                                                                          \
    X(ncclGetUniqueId)                                                                             \
    X(ncclGroupEnd)                                                                                \
    X(ncclGroupStart)                                                                              \
    X(ncclRecv)                                                                                    \
    X(ncclReduce)                                                                                  \
    X(ncclReduceScatter)                                                                           \
    X(ncclSend)

#define LIBRARY_FIELD(name) __typeof__(name) *name;
struct cublaslt_library {
    CUBLASLT_FUNCTIONS(LIBRARY_FIELD)
};
#ifdef CADRE_CUDNN
struct cudnn_library {
    CUDNN_FUNCTIONS(LIBRARY_FIELD)
};
#endif
#ifdef CADRE_NCCL
struct nccl_library {
    NCCL_FUNCTIONS(LIBRARY_FIELD)
};
#endif
#undef LIBRARY_FIELD

/* NULL with an error where the library is not installed. */
const struct cublaslt_library *cublaslt_library(void);
#ifdef CADRE_CUDNN
/* NULL where the library is not installed, after one warning. */
const struct cudnn_library *cudnn_library(void);
#endif
#ifdef CADRE_NCCL
/* NULL with an error where the library is not installed. */
const struct nccl_library *nccl_library(void);
#endif

#endif
