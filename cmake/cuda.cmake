# The kernels of the CUDA backend, for Hopper (sm_90a).
# CADRE_CUDA: AUTO compiles them where nvcc is found, so that they keep compiling; ON insists, and links
# them with the CUDA libraries into cadre_ops (tests/gpu does); OFF leaves them out.
set(CADRE_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON or OFF")
set_property(CACHE CADRE_CUDA PROPERTY STRINGS AUTO ON OFF)

function(cadre_cuda)
    if(CADRE_CUDA STREQUAL "OFF" OR CADRE_SANITIZE OR CADRE_FUZZ)
        return()
    endif()
    find_program(CADRE_NVCC nvcc HINTS /usr/local/cuda/bin)
    if(NOT CADRE_NVCC)
        if(CADRE_CUDA STREQUAL "ON")
            message(FATAL_ERROR "CADRE_CUDA=ON, but nvcc was not found")
        endif()
        message(STATUS "CUDA kernels: left out (nvcc not found)")
        return()
    endif()
    set(source ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../src)
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
    add_custom_target(cadre_cuda_kernels ALL DEPENDS ${objects})
    message(STATUS "CUDA kernels: compiled by ${CADRE_NVCC} for sm_90a")
    if(CADRE_CUDA STREQUAL "ON")
        cadre_cuda_link(${objects})
    endif()
endfunction()

function(cadre_cuda_link)
    find_package(CUDAToolkit REQUIRED)
    target_sources(cadre_ops PRIVATE ${ARGN})
    set_source_files_properties(${ARGN} TARGET_DIRECTORY cadre_ops
        PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
    add_dependencies(cadre_ops cadre_cuda_kernels)
    target_compile_definitions(cadre_device PUBLIC CADRE_CUDA)
    target_include_directories(cadre_device PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_include_directories(cadre_ops PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(cadre_device PUBLIC CUDA::cudart)
    target_link_libraries(cadre_ops PUBLIC CUDA::cublasLt CUDA::cudart stdc++)
endfunction()
