// Threads and scratch, shared by every kernel. Compiled once, not per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../include/nsk.h"

namespace nsk {

// Work on one unit. `scratch` is the calling thread's own and holds what was asked for, uninitialised.
using UnitBody = void (*)(const void* context, int64_t unit, char* scratch);

// Runs units 0 .. count - 1 on up to `threads` threads, the caller among them. Units are handed out in order, as
// threads come free; a unit's result must not depend on the thread that runs it. Returns when all are done.
//
// The threads are those of the OpenMP runtime that torch brought into the process, so that torch and nsk share one
// pool. Where there is none, and in a forked child (libgomp hangs there once the parent used it), threads are started
// for the call. Safe to call from several threads at once.
nsk_status parallel_for(int threads, int64_t count, size_t scratch_bytes, UnitBody body, const void* context);

// The same for a callable taking (int64_t unit, char* scratch).
template <class F>
nsk_status parallel_for(int threads, int64_t count, size_t scratch_bytes, const F& body) {
  return parallel_for(
      threads, count, scratch_bytes,
      [](const void* context, int64_t unit, char* scratch) { (*static_cast<const F*>(context))(unit, scratch); },
      &body);
}

// Work of one of several hands. They all run at the same time, so that they may wait for each other.
using HandBody = void (*)(const void* context, int64_t hand, int64_t hands);

// Runs hands 0 .. hands - 1, each once, on threads of their own, the caller's among them: as many as can be had, at most
// `threads`. Otherwise like parallel_for.
void team(int threads, HandBody body, const void* context);

// The same for a callable taking (int64_t hand, int64_t hands).
template <class F>
void team(int threads, const F& body) {
  team(
      threads, [](const void* context, int64_t hand, int64_t hands) { (*static_cast<const F*>(context))(hand, hands); },
      &body);
}

}  // namespace nsk
