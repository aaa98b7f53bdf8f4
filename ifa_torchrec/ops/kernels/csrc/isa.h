// The kernels of one instruction set, under names that end in it.
//
// isa_*.cpp says IFA_ISA (the ending), IFA_VECTOR (floats a vector), IFA_PANEL (vectors in a row of a
// block of a matrix product), IFA_ACCUMULATORS (vectors that such a block may hold), and lets the
// compiler use the instructions; then it includes this. Pointers are to what native.py's
// _SIGNATURES says, all of it contiguous; a null pointer stands for None. A namespace of its own keeps
// the linker from taking one instruction set's inline functions for another's.
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
