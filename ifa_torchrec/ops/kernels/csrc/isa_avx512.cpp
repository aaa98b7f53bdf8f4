// AVX-512.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define IFA_ISA avx512
#define IFA_VECTOR 16
#define IFA_PANEL 4
#define IFA_ACCUMULATORS 24
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
