// AVX2 with FMA.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define IFA_ISA avx2
#define IFA_VECTOR 8
#define IFA_PANEL 2
#define IFA_ACCUMULATORS 12
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
