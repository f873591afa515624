# cmake -P: installs BUILD_DIR into a fresh prefix, builds the project in CONSUMER_DIR against it and runs it. The
# program must print VERSION.
set(prefix "${WORK_DIR}/prefix")
set(consumer_build "${WORK_DIR}/build")
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

run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${prefix}" --component runtime ${config})
run("${CMAKE_COMMAND}" -S "${CONSUMER_DIR}" -B "${consumer_build}" -G "${GENERATOR}"
  "-DCMAKE_PREFIX_PATH=${prefix}" "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}" "-DCMAKE_BUILD_TYPE=${CONFIG}"
  "-DCMAKE_CXX_FLAGS=${flags}")
run("${CMAKE_COMMAND}" --build "${consumer_build}" ${config})

find_program(program NAMES consumer PATHS "${consumer_build}" "${consumer_build}/${CONFIG}" NO_DEFAULT_PATH REQUIRED)
run("${program}")
string(FIND "${output}" "${VERSION}" at)
if(at EQUAL -1)
  message(FATAL_ERROR "the consumer did not print version ${VERSION}, but: ${output}")
endif()
if(NOT output MATCHES "500 tokens seen, (9[6-9]|1[01][0-9]|12[0-7]) held")
  message(FATAL_ERROR "the consumer did not keep its budget of 96 to 127 tokens, but printed: ${output}")
endif()
