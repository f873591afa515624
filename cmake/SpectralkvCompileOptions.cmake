# Warnings and sanitizers, applied to our own targets only.

function(spectralkv_compile_options target)
  set(warnings -Wall -Wextra -Wconversion -Wshadow=local -Wnon-virtual-dtor -Woverloaded-virtual)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(REMOVE_ITEM warnings -Wshadow=local)
  endif()
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>:${warnings}>"
    # nvcc rewrites the host code: warnings about conversions would be about its output, not ours
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
endfunction()

if(SPECTRALKV_SANITIZE)
  # For the whole tree, googletest included: containers annotated in one half only give false alarms.
  add_compile_options(
    "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${SPECTRALKV_SANITIZE};-fno-omit-frame-pointer;-fno-sanitize-recover=all>")
  add_link_options("-fsanitize=${SPECTRALKV_SANITIZE}")
endif()
