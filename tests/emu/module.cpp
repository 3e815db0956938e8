// The CUDA kernels in the emulator, for Python: the same launches as nsk._native.cuda, on the host's memory.
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/bind/cuda_calls.h"
#include "../../csrc/cuda/entries.cuh"

namespace py = pybind11;
using namespace nsk;

namespace {

enum Kind { input, output, in_out };
using Span = std::tuple<std::string, uintptr_t, size_t, int>;  // name, where, bytes, kind

// What a call may touch, how its threads take turns, and what the device is said to have.
struct Place {
  std::vector<Span> spans;
  emu::Options options;
  nsk_cuda_device device;
};

nsk_cuda_device& device_of(Place& place) { return place.device; }

struct Calls {
  static const int32_t* head_dims() { return cuda::gated_sdpa_head_dims(); }
  static const int32_t* widths() { return cuda::residual_mlp_widths(); }
  static int32_t residual_mlp_shared(int32_t width, int32_t weight) { return cuda::residual_mlp_shared(width, weight); }

  template <class F>
  static nsk_status run(const Place& place, const F& call) {
    emu::GlobalMemory memory;
    for (const auto& [name, at, bytes, kind] : place.spans) {
      if (bytes == 0) continue;
      auto* const data = reinterpret_cast<unsigned char*>(at);
      switch (Kind(kind)) {
        case input: memory.input(name, data, bytes); break;
        case output: memory.output(name, data, bytes); break;
        case in_out: memory.in_out(name, data, bytes); break;
      }
    }
    return call(cuda::Launcher{place.device, memory, place.options});
  }
  template <class F>
  static int64_t count(const Place& place, const F& call) {
    emu::GlobalMemory memory;
    cuda::Scratch scratch(nullptr);
    call(cuda::Launcher{place.device, memory, place.options}, scratch);
    return scratch.bytes();
  }

  static int64_t gated_sdpa_forward_scratch(const nsk_gated_sdpa& args, const Place& place) {
    return count(place, [&](const auto& launcher, auto& s) { cuda::gated_sdpa_forward(args, launcher, s, true); });
  }
  static nsk_status gated_sdpa_forward(const nsk_gated_sdpa& args, const Place& place, void* buffer) {
    cuda::Scratch scratch(buffer);
    return run(place, [&](const auto& launcher) { return cuda::gated_sdpa_forward(args, launcher, scratch, false); });
  }
  static int64_t gated_sdpa_backward_scratch(const nsk_gated_sdpa_backward& args, const Place& place) {
    return count(place, [&](const auto& launcher, auto& s) { cuda::gated_sdpa_backward(args, launcher, s, true); });
  }
  static nsk_status gated_sdpa_backward(const nsk_gated_sdpa_backward& args, const Place& place, void* buffer) {
    cuda::Scratch scratch(buffer);
    return run(place, [&](const auto& launcher) { return cuda::gated_sdpa_backward(args, launcher, scratch, false); });
  }
  static nsk_status residual_mlp_forward(const nsk_residual_mlp& args, const Place& place) {
    return run(place, [&](const auto& launcher) { return cuda::residual_mlp_forward(args, launcher); });
  }
  static int64_t residual_mlp_backward_scratch(const nsk_residual_mlp_backward& args, const Place& place) {
    return count(place, [&](const auto& launcher, auto& s) { cuda::residual_mlp_backward(args, launcher, s, true); });
  }
  static nsk_status residual_mlp_backward(const nsk_residual_mlp_backward& args, const Place& place, void* buffer) {
    cuda::Scratch scratch(buffer);
    return run(place, [&](const auto& launcher) { return cuda::residual_mlp_backward(args, launcher, scratch, false); });
  }
};

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  py::class_<Place>(m, "Place").def(py::init([](std::vector<Span> spans, int schedule, uint64_t seed,
                                                int multiprocessors, int shared_bytes, bool races) {
    const std::vector<emu::Options> all = emu::all_schedules(seed);
    emu::Options options = all[size_t(schedule) % all.size()];
    options.races = races;
    return Place{std::move(spans), options, {nullptr, multiprocessors, shared_bytes}};
  }));
  bind::define_cuda_calls<Calls, Place>(m);
}
