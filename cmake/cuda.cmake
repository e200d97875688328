# The kernels of the CUDA backend, for Hopper (sm_90a). They are compiled where nvcc is found, so that they keep
# compiling; the program does not link them yet: the experts' products are missing (docs/architecture.md).
# CADRE_CUDA: AUTO compiles them where nvcc is found, ON insists, OFF leaves them out.
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
    file(GLOB kernels CONFIGURE_DEPENDS src/ops/*.cu)
    foreach(kernel ${kernels})
        get_filename_component(stem ${kernel} NAME_WE)
        set(object ${CMAKE_BINARY_DIR}/cuda/${stem}.o)
        add_custom_command(OUTPUT ${object}
            COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
            COMMAND ${CADRE_NVCC} -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a
                --Werror=all-warnings -Xcompiler=-Wall -I${CMAKE_SOURCE_DIR}/src -DCADRE_CUDA
                -MD -MF ${object}.d -c ${kernel} -o ${object}
            DEPENDS ${kernel} DEPFILE ${object}.d)
        list(APPEND objects ${object})
    endforeach()
    add_custom_target(cadre_cuda_kernels ALL DEPENDS ${objects})
    message(STATUS "CUDA kernels: compiled by ${CADRE_NVCC} for sm_90a")
endfunction()
