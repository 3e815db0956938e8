// The C ABI on the CPU: checks what only the core can see, then calls the kernels of the instruction set in use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(NSK_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace nsk {

#define NSK_DECLARE(isa) \
  namespace isa {        \
  extern const Kernels kernels; \
  }
NSK_DECLARE(portable)
#if defined(NSK_X86)
NSK_DECLARE(avx2)
NSK_DECLARE(avx512)
NSK_DECLARE(avx512_bf16)
#endif
#if defined(NSK_AMX)
NSK_DECLARE(avx512_amx)
#endif
#undef NSK_DECLARE

namespace {

#if defined(NSK_X86)
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}
#endif

#if defined(NSK_AMX)
// Whether the processor has AMX with bf16 and Linux lets this process use its tiles, for which it wants to be asked.
bool has_amx() {
  static const bool granted = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
    return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}
#endif

struct Choice {
  const Kernels* kernels;
  bool (*usable)();
};

// Best first.
const Choice choices[] = {
#if defined(NSK_AMX)
    {&avx512_amx::kernels, has_amx},
#endif
#if defined(NSK_X86)
    {&avx512_bf16::kernels, has_avx512_bf16},
    {&avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {&avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {&portable::kernels, [] { return true; }},
};

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Choice& c : choices)
    if (c.usable() && (!name || !std::strcmp(c.kernels->name, name))) return c.kernels;
  return nullptr;
}

namespace {

std::atomic<const Kernels*> current{nullptr};

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (!k) {
    const char* wish = std::getenv("NSK_CPU_ISA");
    k = wish && *wish ? find_kernels(wish) : nullptr;
    if (!k) k = find_kernels(nullptr);
    current.store(k, std::memory_order_release);
  }
  return *k;
}

bool monotone(const int32_t* c, int64_t n, int64_t total) {
  if (c[0] != 0 || c[n] != total) return false;
  for (int64_t i = 0; i < n; ++i)
    if (c[i + 1] < c[i]) return false;
  return true;
}

nsk_status check(const nsk_gated_sdpa& a) {
  if (a.threads < 1 || a.heads_kv < 1 || a.heads_q % a.heads_kv) return NSK_BAD_ARGUMENT;
  if (!a.cu_seqlens_q != !a.cu_seqlens_k) return NSK_BAD_ARGUMENT;
  if (a.cu_seqlens_q && !monotone(a.cu_seqlens_q, a.batch, a.seqlen_q)) return NSK_BAD_CU_SEQLENS_Q;
  if (a.cu_seqlens_k && !monotone(a.cu_seqlens_k, a.batch, a.seqlen_k)) return NSK_BAD_CU_SEQLENS_K;
  return NSK_OK;
}

nsk_status check(const nsk_residual_mlp& a) {
  const bool sizes = a.groups >= 0 && a.rows >= 0 && a.width >= 1 && a.depth >= 1;
  if (!sizes || a.threads < 1 || a.layers_per_block < 1 || a.depth % a.layers_per_block) return NSK_BAD_ARGUMENT;
  if (a.weight.stride[2] != a.width || !a.normalised.data != !a.rstd.data) return NSK_BAD_ARGUMENT;
  return a.activation >= NSK_SILU && a.activation <= NSK_GELU_TANH ? NSK_OK : NSK_BAD_ARGUMENT;
}

nsk_status check(const nsk_residual_mlp_backward& b) {
  const nsk_residual_mlp& a = b.forward;
  if (!a.normalised.data && !a.stream.data) return NSK_BAD_ARGUMENT;
  if (b.grad_weight.data && !a.stream.data) return NSK_BAD_ARGUMENT;
  return check(a);
}

}  // namespace
}  // namespace nsk

extern "C" {

nsk_status nsk_cpu_gated_sdpa_forward(const nsk_gated_sdpa* args) {
  const nsk_status status = nsk::check(*args);
  return status != NSK_OK ? status : nsk::kernels().gated_sdpa_forward(*args);
}

nsk_status nsk_cpu_gated_sdpa_backward(const nsk_gated_sdpa_backward* args) {
  const nsk_status status = nsk::check(args->forward);
  return status != NSK_OK ? status : nsk::kernels().gated_sdpa_backward(*args);
}

nsk_status nsk_cpu_residual_mlp_forward(const nsk_residual_mlp* args) {
  const nsk_status status = nsk::check(*args);
  return status != NSK_OK ? status : nsk::kernels().residual_mlp_forward(*args);
}

nsk_status nsk_cpu_residual_mlp_backward(const nsk_residual_mlp_backward* args) {
  const nsk_status status = nsk::check(*args);
  return status != NSK_OK ? status : nsk::kernels().residual_mlp_backward(*args);
}

const char* nsk_cpu_isa_name(int index) {
  for (const nsk::Choice& c : nsk::choices)
    if (c.usable() && index-- == 0) return c.kernels->name;
  return nullptr;
}

const char* nsk_cpu_isa(void) { return nsk::kernels().name; }

int nsk_cpu_set_isa(const char* name) {
  const nsk::Kernels* k = nsk::find_kernels(name);
  if (k) nsk::current.store(k, std::memory_order_release);
  return k != nullptr;
}

int nsk_cpu_has_bf16_dot(void) { return nsk::kernels().bf16_dot; }

double nsk_cpu_measure_fma(int32_t dtype, int32_t threads, double seconds) {
  return nsk::kernels().measure_fma(dtype, threads, seconds);
}

double nsk_cpu_measure_read(const void* buffer, int64_t bytes, int32_t threads, double seconds) {
  return nsk::kernels().measure_read(buffer, bytes, threads, seconds);
}

}  // extern "C"
