// The kernels of one instruction set, under names that end in it.
//
// isa_*.cpp says IFA_ISA (the ending), IFA_VECTOR (floats a vector), IFA_PANEL (vectors in a row of a
// block of a matrix product), IFA_ACCUMULATORS (vectors that such a block may hold), and lets the
// compiler use the instructions; then it includes this. Pointers are to what backend.py's
// _SIGNATURES says, all of it contiguous; a null pointer stands for None.
#define IFA_JOIN_(a, b) a##_##b
#define IFA_JOIN(a, b) IFA_JOIN_(a, b)
#define IFA_KERNEL(name) extern "C" __attribute__((visibility("default"))) void IFA_JOIN(ifa_##name, IFA_ISA)

#include "vector.h"
#include "dense.h"
#include "match.h"
