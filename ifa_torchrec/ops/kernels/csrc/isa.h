// The kernels of one instruction set, under names that end in it.
//
// isa_*.cpp defines IFA_ISA (the ending), IFA_VECTOR (floats per vector), IFA_PANEL (vectors per row of a
// block of a matrix product) and IFA_ACCUMULATORS (vectors that such a block may hold), enables the
// instructions, and then includes this file. Arguments are listed in native.py's _SIGNATURES; all
// arrays are contiguous, and a null pointer stands for None. Each instruction set has its own namespace,
// so that the linker does not mix up their inline functions.
#define IFA_JOIN_(a, b) a##_##b
#define IFA_JOIN(a, b) IFA_JOIN_(a, b)
#define IFA_KERNEL(name) extern "C" __attribute__((visibility("default"))) void IFA_JOIN(ifa_##name, IFA_ISA)

namespace IFA_JOIN(ifa, IFA_ISA) {
#include "vector.h"
#include "products.h"
#include "layout.h"
#include "feature_maps.h"
#include "partition.h"
#include "encode.h"
#include "attend.h"
#include "attend_softmax.h"
#include "match.h"
}  // namespace
