# How folders, the program and the tests become targets. Sources are found by glob, so a new file
# needs no edit here.
add_library(cadre_flags INTERFACE)
target_include_directories(cadre_flags INTERFACE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/include)
target_compile_definitions(cadre_flags INTERFACE _GNU_SOURCE CADRE_VERSION="${PROJECT_VERSION}")
target_link_libraries(cadre_flags INTERFACE OpenMP::OpenMP_C Threads::Threads m)
target_compile_options(cadre_flags INTERFACE
    $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Werror -Wshadow -Wpointer-arith -Wno-unused-parameter -Wno-format-truncation
    -fno-math-errno -fno-trapping-math>
    $<$<COMPILE_LANGUAGE:C>:-Wstrict-prototypes -Wmissing-prototypes -Wvla>)
if(CADRE_NATIVE)
    target_compile_options(cadre_flags INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:-march=native>)
endif()
if(CADRE_SANITIZE)
    target_compile_options(cadre_flags INTERFACE -fsanitize=address,undefined
        -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
    target_link_options(cadre_flags INTERFACE -fsanitize=address,undefined)
endif()
if(CADRE_FUZZ)
    target_compile_options(cadre_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()
if(CMAKE_C_COMPILER_ID MATCHES Clang)
    target_compile_options(cadre_flags INTERFACE -Wno-unknown-warning-option -Wno-pass-failed)
endif()

# cadre_folder(NAME folders... [LIBRARIES libs...]): the static library cadre_NAME of src/NAME.
function(cadre_folder name)
    cmake_parse_arguments(FOLDER "" "" "LIBRARIES" ${ARGN})
    file(GLOB sources CONFIGURE_DEPENDS src/${name}/*.c src/${name}/*.cpp src/${name}/*.proto)
    set(protos ${sources})
    list(FILTER protos INCLUDE REGEX "\\.proto$")
    list(FILTER sources EXCLUDE REGEX "\\.proto$")
    list(FILTER sources EXCLUDE REGEX "/main\\.c$")
    if(NOT sources)
        add_library(cadre_${name} INTERFACE)
        set(visibility INTERFACE)
    else()
        add_library(cadre_${name} STATIC ${sources})
        set(visibility PUBLIC)
        set_target_properties(cadre_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
        cadre_protobuf(cadre_${name} ${protos})
    endif()
    target_link_libraries(cadre_${name} ${visibility} cadre_flags ${FOLDER_LIBRARIES})
    foreach(below ${FOLDER_UNPARSED_ARGUMENTS})
        target_link_libraries(cadre_${name} ${visibility} cadre_${below})
    endforeach()
endfunction()

# Generates NAME.pb-c.[ch] from each .proto into the build folder and adds them to the target.
function(cadre_protobuf target)
    foreach(proto ${ARGN})
        get_filename_component(stem ${proto} NAME_WE)
        get_filename_component(folder ${proto} DIRECTORY)
        set(out ${CMAKE_BINARY_DIR}/protobuf/${stem}.pb-c)
        add_custom_command(OUTPUT ${out}.c ${out}.h
            COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/protobuf
            COMMAND ${PROTOC_C} --proto_path=${folder} --c_out=${CMAKE_BINARY_DIR}/protobuf ${proto}
            DEPENDS ${proto})
        target_sources(${target} PRIVATE ${out}.c ${out}.h)
        set_source_files_properties(${out}.c PROPERTIES COMPILE_OPTIONS "-w")
        target_include_directories(${target} PUBLIC ${CMAKE_BINARY_DIR}/protobuf)
    endforeach()
endfunction()

function(cadre_program)
    if(EXISTS ${CMAKE_SOURCE_DIR}/src/cmd/main.c)
        add_executable(cadre src/cmd/main.c)
        target_link_libraries(cadre PRIVATE cadre_cmd)
    endif()
endfunction()

# libcadre.so: src/library/*.c, which implement include/cadre.h, and what they need of the folders.
# Nothing but their own functions is visible.
function(cadre_library)
    file(GLOB sources CONFIGURE_DEPENDS src/library/*.c)
    if(sources)
        add_library(cadre_shared SHARED ${sources})
        target_link_libraries(cadre_shared PRIVATE cadre_cmd)
        target_link_options(cadre_shared PRIVATE -Wl,--exclude-libs,ALL)
        set_target_properties(cadre_shared PROPERTIES OUTPUT_NAME cadre VERSION ${PROJECT_VERSION}
            SOVERSION ${PROJECT_VERSION_MAJOR})
    endif()
endfunction()
