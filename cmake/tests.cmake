# How tests become programs and ctest entries. Labels: unit, ops, layers, dist, oracle, fuzz,
# e2e.
# Sources are found by glob, so a new file needs no edit here.
function(cadre_tests)
    if(NOT CMOCKA_FOUND)
        message(STATUS "tests: left out (cmocka not found)")
        return()
    endif()
    cadre_cmocka_tests()
    cadre_dist_tests()
    cadre_oracles()
    cadre_fuzz_targets()
    cadre_e2e_tests()
endfunction()

# tests/unit/FOLDER/test_X.c links cadre_FOLDER (and so only what that folder may use), as do
# tests/ops (ops) and tests/layers (model).
function(cadre_cmocka_tests)
    file(GLOB sources CONFIGURE_DEPENDS tests/unit/*/test_*.c)
    foreach(source ${sources})
        get_filename_component(folder ${source} DIRECTORY)
        get_filename_component(folder ${folder} NAME)
        cadre_cmocka_test(${source} cadre_${folder} unit)
    endforeach()
    file(GLOB sources CONFIGURE_DEPENDS tests/ops/test_*.c)
    foreach(source ${sources})
        cadre_cmocka_test(${source} cadre_ops ops)
    endforeach()
    file(GLOB sources CONFIGURE_DEPENDS tests/layers/test_*.c)
    foreach(source ${sources})
        cadre_cmocka_test(${source} cadre_model layers)
    endforeach()
endfunction()

function(cadre_cmocka_test source library label)
    cadre_test_program(${source} ${library} PkgConfig::CMOCKA)
    cadre_test(${name} ${label} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
endfunction()

# Builds tests/.../X.c to BUILD/tests/X and sets name to X in the caller.
function(cadre_test_program source)
    get_filename_component(stem ${source} NAME_WE)
    add_executable(${stem} ${source})
    target_link_libraries(${stem} PRIVATE ${ARGN})
    target_compile_definitions(${stem} PRIVATE FIXTURES="${CMAKE_SOURCE_DIR}/tests/fixtures")
    set_target_properties(${stem} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
    set(name ${stem} PARENT_SCOPE)
endfunction()

# Threads that wait must not burn the cores the other tests run on.
function(cadre_test name label)
    add_test(NAME ${name} ${ARGN})
    set_tests_properties(${name} PROPERTIES LABELS ${label} TIMEOUT 600
        ENVIRONMENT "OMP_WAIT_POLICY=passive")
endfunction()

# tests/dist/dist_X.c is a program of several ranks; it runs on every number of ranks listed on its
# line "ranks: 2 3 4".
function(cadre_dist_tests)
    if(NOT TARGET MPI::MPI_C)
        return()
    endif()
    file(GLOB sources CONFIGURE_DEPENDS tests/dist/dist_*.c)
    foreach(source ${sources})
        cadre_test_program(${source} cadre_train)
        file(STRINGS ${source} ranks REGEX "ranks: [0-9 ]+")
        string(REGEX REPLACE ".*ranks: ([0-9 ]+).*" "\\1" ranks "${ranks}")
        separate_arguments(ranks)
        foreach(num_ranks ${ranks})
            cadre_dist_test(${name}_${num_ranks} ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG}
                ${num_ranks} $<TARGET_FILE:${name}>)
        endforeach()
    endforeach()
    file(GLOB sources CONFIGURE_DEPENDS tests/dist/fault_*.c)
    foreach(source ${sources})
        cadre_test_program(${source} cadre_train)
        cadre_dist_test(dist_faults ${CMAKE_SOURCE_DIR}/tests/dist/faults.sh ${MPIEXEC_EXECUTABLE}
            $<TARGET_FILE:${name}>)
    endforeach()
    cadre_test_program(tests/dist/compare_runs.c cadre_train)
    cadre_test_program(tests/dist/many_runs.c cadre_train)
    if(TARGET cadre)
        foreach(script launch mappings faults_pretrain row_limit emulation)
            cadre_dist_test(dist_${script} ${CMAKE_SOURCE_DIR}/tests/dist/${script}.sh
                ${MPIEXEC_EXECUTABLE} ${CMAKE_BINARY_DIR})
        endforeach()
    endif()
endfunction()

# What mpirun must know is in Open MPI's environment, so that MPICH's takes the command as well. The
# ranks share this machine's cores; what MPI itself never frees is no leak of ours.
function(cadre_dist_test name)
    set(environment OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        OMPI_MCA_rmaps_base_oversubscribe=true OMPI_MCA_hwloc_base_binding_policy=none
        OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none
        LSAN_OPTIONS=detect_leaks=0)
    cadre_test(${name} dist COMMAND ${ARGN} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(${name} PROPERTIES PROCESSORS 2 TIMEOUT 300 ENVIRONMENT "${environment}")
endfunction()

# tests/oracle/oracle_X.c are programs. Those that take a directory of golden files run on the ones
# in tests/fixtures; the rest are driven by scripts/check_*.py, where their peer is installed.
function(cadre_oracles)
    file(GLOB sources CONFIGURE_DEPENDS tests/oracle/oracle_*.c)
    foreach(source ${sources})
        cadre_test_program(${source} cadre_cmd)
        set(directories)
        if(name STREQUAL "oracle_hf")
            set(directories mixtral-tiny mixtral-tiny-sharded)
        elseif(name MATCHES "^oracle_megatron")
            set(directories .)
        endif()
        foreach(directory ${directories})
            string(REGEX REPLACE "_\\.$" "" test ${name}_${directory})
            cadre_test(${test} oracle COMMAND ${name} ${CMAKE_SOURCE_DIR}/tests/fixtures/${directory}
                WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
        endforeach()
    endforeach()
endfunction()

# tests/fuzz/fuzz_X.c has LLVMFuzzerTestOneInput. With CADRE_FUZZ (clang) libFuzzer drives it;
# otherwise tests/fuzz/replay.c runs it on tests/fuzz/corpus/X and on damaged copies of that.
function(cadre_fuzz_targets)
    file(GLOB sources CONFIGURE_DEPENDS tests/fuzz/fuzz_*.c)
    foreach(source ${sources})
        cadre_test_program(${source} cadre_ckpt cadre_data cadre_args)
        if(CADRE_FUZZ)
            target_link_options(${name} PRIVATE -fsanitize=fuzzer)
        else()
            target_sources(${name} PRIVATE tests/fuzz/replay.c)
            string(REPLACE fuzz_ "" corpus ${name})
            cadre_test(${name} fuzz COMMAND ${name} ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${corpus}
                WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
        endif()
    endforeach()
endfunction()

# tests/e2e/X.sh uses the program as a person does, in an empty folder (see scripts/run_e2e.sh).
function(cadre_e2e_tests)
    if(NOT TARGET cadre)
        return()
    endif()
    file(GLOB scripts CONFIGURE_DEPENDS tests/e2e/*.sh)
    foreach(script ${scripts})
        get_filename_component(name ${script} NAME_WE)
        cadre_test(e2e_${name} e2e
            COMMAND ${CMAKE_SOURCE_DIR}/scripts/run_e2e.sh ${CMAKE_BINARY_DIR} ${script})
    endforeach()
endfunction()
