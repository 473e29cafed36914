// As much of CUDA C++ as a kernel needs to be compiled by g++, unchanged:  g++ -x c++ -include cuda_shim.h kernel.cu
//
// The kernel's translation unit sees these declarations only; cuda_shim.cpp runs its threads.
#pragma once
#include <stddef.h>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct Index {
    unsigned x, y, z;
};
extern __thread Index threadIdx, blockIdx;
extern Index blockDim, gridDim;

// Returns when every thread of the block has called it.
void __syncthreads();

template <typename T> static inline T __ldg(const T* address) { return *address; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
