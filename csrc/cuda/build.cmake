# nsk_cuda: the kernels for devices, with the CUDA runtime inside, so that the module needs no CUDA library to load. nvcc
# is called as it is: what CMake knows of it differs too much between CMake's versions.
if(NOT NSK_CUDA_ARCHS)
  set(NSK_CUDA_ARCHS 80 86 89 90 100 120)
endif()
list(JOIN NSK_CUDA_ARCHS "," names)
list(LENGTH nsk_cuda_sources units)
message(STATUS "CUDA kernels: ${units} units for sm_${names}. NSK_CUDA_ARCHS, NSK_CUDA_HEAD_DIMS and NSK_CUDA_WIDTHS "
               "choose fewer, NSK_CUDA=off none.")

# Machine code for each; and for the last the intermediate code too, for what comes after it.
set(flags "")
foreach(arch ${NSK_CUDA_ARCHS})
  list(APPEND flags -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
list(GET NSK_CUDA_ARCHS -1 last)
list(APPEND flags -gencode=arch=compute_${last},code=compute_${last})
list(APPEND flags -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden,-O2
     -ccbin=${CMAKE_CXX_COMPILER} -DNSK_CUDA_ARCHITECTURES="${names}" -I${PROJECT_SOURCE_DIR}/csrc/cuda
     -I${nsk_cuda_include})
set(objects "")
foreach(source ${nsk_cuda_sources} ${PROJECT_SOURCE_DIR}/csrc/cuda/entries.cu)
  get_filename_component(name ${source} NAME_WE)
  set(object ${nsk_cuda_include}/${name}.o)
  add_custom_command(OUTPUT ${object} COMMAND ${NSK_NVCC} ${flags} -MD -MF ${object}.d -c ${source} -o ${object}
                     DEPENDS ${source} DEPFILE ${object}.d COMMENT "nvcc ${name}" VERBATIM)
  list(APPEND objects ${object})
endforeach()
add_custom_target(nsk_cuda_objects DEPENDS ${objects})

get_filename_component(root ${NSK_NVCC} REALPATH)
get_filename_component(root ${root} DIRECTORY)
find_library(NSK_CUDART cudart_static REQUIRED HINTS ${root}/.. ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
             PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
add_library(nsk_cuda INTERFACE)
add_dependencies(nsk_cuda nsk_cuda_objects)
target_link_libraries(nsk_cuda INTERFACE ${objects} ${NSK_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
