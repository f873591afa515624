# cmake -P: builds the project in EMBED_DIR and runs it, against what the build in INSTALL_FROM installs into a fresh
# prefix or, without it, together with the library's sources in SOURCE_DIR. The program must print VERSION.
set(prefix "${WORK_DIR}/prefix")
set(build "${WORK_DIR}/build")
file(REMOVE_RECURSE "${WORK_DIR}")

function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY OUTPUT_VARIABLE output ECHO_OUTPUT_VARIABLE)
  set(output "${output}" PARENT_SCOPE)
endfunction()

set(config "")
if(CONFIG)
  set(config --config "${CONFIG}")
endif()
set(flags "")
if(SANITIZE)
  set(flags "-fsanitize=${SANITIZE}") # a sanitized library needs its runtime in the program
endif()

if(INSTALL_FROM)
  run("${CMAKE_COMMAND}" --install "${INSTALL_FROM}" --prefix "${prefix}" --component runtime ${config})
  set(library "-DCMAKE_PREFIX_PATH=${prefix}" "-DCMAKE_BUILD_TYPE=${CONFIG}")
else()
  # As quick to build as can be: what the compiler makes of the library is tested elsewhere.
  set(library "-DSPECTRALKV_SOURCE_DIR=${SOURCE_DIR}" -DSPECTRALKV_CUDA=OFF -DCMAKE_BUILD_TYPE=Debug)
  set(config --config Debug --parallel)
endif()
run("${CMAKE_COMMAND}" -S "${EMBED_DIR}" -B "${build}" -G "${GENERATOR}" ${library}
  "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}" "-DCMAKE_CXX_FLAGS=${flags}")
run("${CMAKE_COMMAND}" --build "${build}" ${config})

find_program(program NAMES embed PATHS "${build}" "${build}/Debug" "${build}/${CONFIG}" NO_DEFAULT_PATH REQUIRED)
function(expect pattern)
  if(NOT output MATCHES "${pattern}")
    message(FATAL_ERROR "embed was to print '${pattern}', but printed: ${output}")
  endif()
endfunction()

run("${program}")
expect("spectralkv ${VERSION},")
expect("500 tokens seen, (9[6-9]|1[01][0-9]|12[0-7]) held") # 96 to 127

# A budget that is never used up changes nothing.
run("${program}" --budget 0)
string(REGEX MATCH "last tokens:[ 0-9]+" whole "${output}")
run("${program}" --budget 600)
expect("${whole}\n500 tokens seen, 500 held")
