// The instructions that every processor of the architecture has: SSE2, NEON.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define IFA_ISA plain
#define IFA_VECTOR 4
#define IFA_PANEL 2
#define IFA_ACCUMULATORS 12
#include "isa.h"

// The best instruction set that is compiled in and supported by this processor.
extern "C" __attribute__((visibility("default"))) const char* ifa_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? "avx512_bf16" : "avx512";
  if (avx2) return "avx2";
#endif
  return "plain";
}

// The default instruction set: not avx512_bf16 on Intel, which multiplies bfloat16 slower than float32.
extern "C" __attribute__((visibility("default"))) const char* ifa_default_instruction_set() {
  const char* best = ifa_instruction_set();
#if defined(__x86_64__)
  if (strcmp(best, "avx512_bf16") == 0 && __builtin_cpu_is("intel")) return "avx512";
#endif
  return best;
}

// Version of the functions' signatures; see native.py.
extern "C" __attribute__((visibility("default"))) int ifa_signatures() { return 4; }
