# The CUDA kernels as translation units: one for each op, pass and shape, written into the build folder, so that they
# compile side by side. Sets nsk_cuda_sources and nsk_cuda_include for whoever compiles them, nvcc or the emulator.
set(NSK_CUDA_HEAD_DIMS "64x64;80x80;96x96;128x128;192x192;192x128;256x256" CACHE STRING
    "Head dimensions of query and value for which attention kernels are built")
set(NSK_CUDA_WIDTHS "64;128;256" CACHE STRING "Widths for which kernels of residual MLPs are built")

set(here ${CMAKE_CURRENT_LIST_DIR})
set(nsk_cuda_include ${CMAKE_BINARY_DIR}/cuda)
set(nsk_cuda_sources ${here}/gated_sdpa.cu ${here}/gated_sdpa_rows.cu ${here}/residual_mlp.cu)

# Writes only what changes, lest all be compiled again.
function(nsk_write file text)
  file(CONFIGURE OUTPUT ${nsk_cuda_include}/${file} CONTENT "// Written by csrc/cuda/sources.cmake.\n${text}" @ONLY)
endfunction()

# As gated_sdpa_launch.cuh declares them.
set(problem "const GatedSdpaBackward<T>&")
set(signatures_of_forward "start_forward<T, Dims>(const GatedSdpa<T>&, Mask, const Launcher&)")
set(signatures_of_decode "start_decode<T, Dims>(const GatedSdpa<T>&, Mask, int, const Launcher&, Scratch&)")
set(signatures_of_dq "start_dq<T, Dims>(${problem}, Mask, const Launcher&)")
set(signatures_of_dkdv "start_dkdv<T, Dims>(${problem}, Mask, const Launcher&)")
set(signatures_of_mask "start_norm<T, Dims>(${problem}, const Launcher&)"
                       "start_mask_grad<T, Dims>(${problem}, const Launcher&)")

set(types_of_half bf16 f16)
set(types_of_tf32 tf32)
set(pairs "")
set(numbers "")
foreach(dims ${NSK_CUDA_HEAD_DIMS})
  string(REPLACE "x" ", " numbers_of_dims ${dims})
  list(APPEND pairs "HeadDims<${numbers_of_dims}>")
  string(APPEND numbers "${numbers_of_dims}, ")
  foreach(pass forward decode dq dkdv mask)
    foreach(kind half tf32)
      set(text "#include \"${here}/gated_sdpa_${pass}_start.cuh\"\nnamespace nsk::cuda {\n")
      foreach(type ${types_of_${kind}})
        foreach(signature ${signatures_of_${pass}})
          string(REPLACE "T, Dims" "${type}, HeadDims<${numbers_of_dims}>" signature ${signature})
          string(REPLACE "<T>" "<${type}>" signature ${signature})
          string(APPEND text "template nsk_status ${signature};\n")
        endforeach()
      endforeach()
      nsk_write(gated_sdpa_${pass}_${dims}_${kind}.cu "${text}}  // namespace nsk::cuda\n")
      list(APPEND nsk_cuda_sources ${nsk_cuda_include}/gated_sdpa_${pass}_${dims}_${kind}.cu)
    endforeach()
  endforeach()
endforeach()
list(JOIN pairs ", " pairs)
nsk_write(gated_sdpa_table.cuh "#pragma once
namespace nsk::cuda {
using BuiltHeadDims = HeadDimsList<${pairs}>;
inline constexpr int32_t kBuiltHeadDims[] = {${numbers}0};
}  // namespace nsk::cuda
")

foreach(width ${NSK_CUDA_WIDTHS})
  foreach(type bf16 f16 tf32)
    nsk_write(residual_mlp_forward_${width}_${type}.cu "#include \"${here}/residual_mlp_forward_start.cuh\"
template nsk_status nsk::cuda::start_forward<nsk::${type}, ${width}>(const nsk_residual_mlp&, const Launcher&);
")
    nsk_write(residual_mlp_backward_${width}_${type}.cu "#include \"${here}/residual_mlp_backward_start.cuh\"
template nsk_status nsk::cuda::start_backward<nsk::${type}, ${width}>(const nsk_residual_mlp_backward&, const Launcher&, Scratch&, bool);
")
    list(APPEND nsk_cuda_sources ${nsk_cuda_include}/residual_mlp_forward_${width}_${type}.cu
                                 ${nsk_cuda_include}/residual_mlp_backward_${width}_${type}.cu)
  endforeach()
endforeach()
list(JOIN NSK_CUDA_WIDTHS ", " widths)
nsk_write(residual_mlp_table.cuh "#pragma once
namespace nsk::cuda {
using BuiltWidths = WidthList<${widths}>;
}  // namespace nsk::cuda
")
