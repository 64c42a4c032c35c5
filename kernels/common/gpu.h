// SPDX-License-Identifier: Apache-2.0
#pragma once

// The one header of kernel files (`*_cuda.cu`): CUDA's own names for threads, warps, barriers, atomics and float intrinsics, plus the
// wrappers below. There are two definitions of it: nvcc's (gpu_nvcc.h, the only place with inline PTX), and the tests' (an emulated
// device on the CPU, tests/support/cuda_emulation). The same kernel source is built with both, so kernels keep to these rules:
//
//  1. Launch through gpu::Launch; no <<<>>>, no inline PTX, no CUB, no cooperative groups, no cuda_pipeline, no __CUDA_ARCH__ branch.
//  2. Dynamic shared memory through BEBOP_DYNAMIC_SHARED; types in shared memory are trivial.
//  3. Every warp operation names its lanes in the mask, all of them alive at that source line; no lockstep assumptions, no
//     __activemask, no lane returns before a later warp operation or barrier of its warp or block.
//  4. One barrier a source line, reached by all threads of the block. __syncwarp between lanes that share memory: shuffles order none.
//  5. No block waits for another. Spinning loops read volatile and call __nanosleep.
//  6. Arithmetic in float or double; bfloat16 is storage (BFloat16 of kernels/common/dtype.h, or packed pairs in uint32_t).
//  7. No float atomics: results do not depend on the order of threads.
//  8. Heads of files count bytes and operations. Times there are estimates and say so: bytes over 4.3e12 a second, the copy
//     bandwidth that tests/bench/gpu/roofline.py has for an H200. What a device gave is in docs/benchmarks.md.
//
// Wrappers (namespace bebop::gpu; all lanes of a warp take part in ldmatrix and mma):
//   Launch(kernel, grid, block, shared_bytes, stream, args...)   enqueues; cudaGetLastError-style result, for BEBOP_CUDA_TRY
//   BEBOP_DYNAMIC_SHARED(type, name)      `type* name`: the block's dynamic shared memory, 16-byte aligned
//   CpAsync16(shared, global, valid)      16 bytes global -> shared, asynchronous; zeros when !valid (then `global` is not read)
//   CpAsyncCommit(), CpAsyncWait<N>()     groups as cp.async.commit_group / wait_group N; readers still need a barrier after the wait
//   LdMatrixX4(r, row), LdMatrixX4Trans   four 8x8 b16 matrices; lane l gives the address of row l % 8 of matrix l / 8
//   LdMatrixX2(r, row), LdMatrixX2Trans   two; lanes 0..15 give addresses
//   MmaBf16(d, a, b)                      d += a b, m16n8k16 row.col, bf16 in, float accumulators (fragment layout of the PTX manual)
//   MmaTf32(d, a, b)                      d += a b, m16n8k8 row.col, tf32 in (float bits; low 13 mantissa bits ignored)
//   LoadStream16(pointer)                 16 bytes that nobody will read again soon (ld.global.nc, no L1 allocation)
//   StoreStream16(pointer, value)         16 bytes, evict first
//   PackBf16(low, high), LowBf16(pair), HighBf16(pair)   two bfloat16 in a uint32_t, round to nearest even
#if defined(BEBOP_CUDA_EMULATION)
#include "cuda_emulation.h"
#else
#include "kernels/common/gpu_nvcc.h"
#endif
