# The CUDA backend, for Hopper (sm_90a). One program holds it beside the CPU's and runs on machines
# without a GPU: the CUDA runtime is linked statically, cuBLASLt and cuDNN are loaded when a GPU is
# first used.
# CADRE_CUDA: AUTO builds it where nvcc and the toolkit's libraries are found; ON insists; OFF leaves
# it out.
set(CADRE_CUDA AUTO CACHE STRING "CUDA backend: AUTO, ON or OFF")
set_property(CACHE CADRE_CUDA PROPERTY STRINGS AUTO ON OFF)

# Adds the backend to cadre_device and cadre_ops.
function(cadre_cuda)
    if(CADRE_CUDA STREQUAL "OFF" OR CADRE_SANITIZE OR CADRE_FUZZ)
        return()
    endif()
    find_program(CADRE_NVCC nvcc HINTS /usr/local/cuda/bin)
    if(NOT CADRE_NVCC)
        cadre_cuda_missing("nvcc was not found")
        return()
    endif()
    set(CUDAToolkit_NVCC_EXECUTABLE ${CADRE_NVCC})
    find_package(CUDAToolkit QUIET)
    # CUDAToolkit_INCLUDE_DIRS may be a list.
    find_path(CADRE_CUBLASLT_INCLUDE cublasLt.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
    find_path(CADRE_CUDNN_INCLUDE cudnn.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
    mark_as_advanced(CADRE_CUBLASLT_INCLUDE CADRE_CUDNN_INCLUDE)
    if(NOT TARGET CUDA::cudart_static OR NOT CADRE_CUBLASLT_INCLUDE)
        cadre_cuda_missing("nvcc is there (${CADRE_NVCC}), but not libcudart_static.a or cublasLt.h")
        return()
    endif()
    cadre_cuda_kernels(objects)
    cadre_cuda_link(${objects})
endfunction()

function(cadre_cuda_missing what)
    if(CADRE_CUDA STREQUAL "ON")
        message(FATAL_ERROR "CADRE_CUDA=ON, but ${what}")
    endif()
    message(STATUS "CUDA: left out (${what}); --device cuda will be refused")
endfunction()

# Compiles src/ops/*.cu; `result` becomes the list of objects.
function(cadre_cuda_kernels result)
    set(source ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../src)
    set(objects)
    file(GLOB kernels CONFIGURE_DEPENDS ${source}/ops/*.cu)
    foreach(kernel ${kernels})
        get_filename_component(stem ${kernel} NAME_WE)
        set(object ${CMAKE_BINARY_DIR}/cuda/${stem}.o)
        add_custom_command(OUTPUT ${object}
            COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
            COMMAND ${CADRE_NVCC} -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a
                --Werror=all-warnings -Xcompiler=-Wall,-fPIC -I${source} -DCADRE_CUDA
                -MD -MF ${object}.d -c ${kernel} -o ${object}
            DEPENDS ${kernel} DEPFILE ${object}.d)
        list(APPEND objects ${object})
    endforeach()
    add_custom_target(cadre_cuda_kernels DEPENDS ${objects})
    set(${result} ${objects} PARENT_SCOPE)
endfunction()

function(cadre_cuda_link)
    target_sources(cadre_ops PRIVATE ${ARGN})
    set_source_files_properties(${ARGN} TARGET_DIRECTORY cadre_ops
        PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
    add_dependencies(cadre_ops cadre_cuda_kernels)
    foreach(library cadre_device cadre_ops)
        target_compile_definitions(${library} PRIVATE CADRE_CUDA)
        target_include_directories(${library} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    endforeach()
    target_compile_definitions(cadre_ops PRIVATE CADRE_CUDA_LIBRARIES="${CUDAToolkit_LIBRARY_DIR}")
    target_link_libraries(cadre_device PUBLIC $<LINK_ONLY:CUDA::cudart_static>)
    target_link_libraries(cadre_ops PUBLIC stdc++ ${CMAKE_DL_LIBS})
    if(CADRE_CUDNN_INCLUDE)
        target_include_directories(cadre_ops SYSTEM PRIVATE ${CADRE_CUDNN_INCLUDE})
        target_compile_definitions(cadre_ops PRIVATE CADRE_CUDNN)
        set(attention "cuDNN's and our own")
    else()
        set(attention "our own only (cudnn.h was not found), which is slow")
    endif()
    find_path(CADRE_NCCL_INCLUDE nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
    mark_as_advanced(CADRE_NCCL_INCLUDE)
    set(transport "MPI, if at all (NCCL needs nccl.h and MPI)")
    if(CADRE_NCCL_INCLUDE AND TARGET MPI::MPI_C)
        foreach(library cadre_ops cadre_comm)
            target_compile_definitions(${library} PRIVATE CADRE_CUDA CADRE_NCCL)
            target_include_directories(${library} SYSTEM PRIVATE ${CADRE_NCCL_INCLUDE}
                ${CUDAToolkit_INCLUDE_DIRS})
        endforeach()
        set(transport "NCCL")
    endif()
    message(STATUS "CUDA: kernels for sm_90a by ${CADRE_NVCC}; attention: ${attention}; GPUs "
        "exchange tensors over ${transport}")
endfunction()
