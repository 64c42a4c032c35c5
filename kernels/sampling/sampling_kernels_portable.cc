// SPDX-License-Identifier: Apache-2.0
#define BEBOP_SAMPLING_WIDTH 4
#define BEBOP_SAMPLING_TABLE PortableSamplingKernels
#include "kernels/sampling/sampling_kernels.inc"
