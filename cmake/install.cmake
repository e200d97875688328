# cmake --install BUILD: the program with its man page and bash completion (both made from the rows
# of options by the program itself), and libcadre with its header and pkg-config file.
include(GNUInstallDirs)

function(cadre_install)
    if(TARGET cadre)
        cadre_install_program()
    endif()
    if(TARGET cadre_shared)
        cadre_install_library()
    endif()
endfunction()

function(cadre_install_program)
    set(man ${CMAKE_BINARY_DIR}/packaging/cadre.1)
    set(completion ${CMAKE_BINARY_DIR}/packaging/cadre.bash)
    add_custom_command(OUTPUT ${man} ${completion}
        COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/packaging
        COMMAND cadre docs man > ${man}
        COMMAND cadre docs completion > ${completion}
        DEPENDS cadre)
    add_custom_target(cadre_documents ALL DEPENDS ${man} ${completion})
    install(TARGETS cadre RUNTIME)
    install(FILES ${man} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
    install(FILES ${completion} DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions
        RENAME cadre)
endfunction()

# The pkg-config file finds its prefix from where it lies, so that --prefix at install time holds.
function(cadre_install_library)
    file(RELATIVE_PATH prefix_from_pc /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
    configure_file(packaging/libcadre.pc.in packaging/libcadre.pc @ONLY)
    install(TARGETS cadre_shared LIBRARY)
    install(FILES include/cadre.h TYPE INCLUDE)
    install(FILES ${CMAKE_BINARY_DIR}/packaging/libcadre.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()
