# Compiles a .cu file for one architecture. It must spill nothing, and the machine code must have the tensor core, the
# matrix load and the asynchronous copy in it: `instructions`, each somewhere in the file.
#   cmake -D nvcc=... [-D cuobjdump=...] -D arch=sm_80 -D source=device.cu -D instructions=HMMA.16816.F32,...
#         -P sass.cmake
string(REPLACE "," ";" instructions ${instructions})
get_filename_component(name ${source} NAME_WE)
set(cubin ${CMAKE_CURRENT_BINARY_DIR}/${name}.${arch}.cubin)
execute_process(COMMAND ${nvcc} -std=c++20 --expt-relaxed-constexpr -cubin -arch=${arch} -Werror all-warnings -Xptxas -v
                        ${source} -o ${cubin}
                OUTPUT_VARIABLE log ERROR_VARIABLE log RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${log}")
endif()
string(REGEX MATCHALL "[0-9]+ bytes spill (stores|loads)" spills "${log}")
list(FILTER spills EXCLUDE REGEX "^0 ")
if(spills OR NOT log MATCHES "0 bytes spill stores")
  message(FATAL_ERROR "spills:\n${log}")
endif()

if(NOT cuobjdump)
  message("no cuobjdump: the machine code was not looked at")
  return()
endif()
execute_process(COMMAND ${cuobjdump} -sass ${cubin} OUTPUT_VARIABLE sass RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "cuobjdump: ${failed}")
endif()
foreach(instruction IN LISTS instructions)
  string(REGEX MATCHALL "${instruction}" found "${sass}")
  list(LENGTH found count)
  if(count EQUAL 0)
    message(FATAL_ERROR "${arch}: no ${instruction}")
  endif()
  message("${arch}: ${count} ${instruction}")
endforeach()
