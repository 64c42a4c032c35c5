// SPDX-License-Identifier: Apache-2.0
// Causal depthwise convolution and SiLU with the rolling history of lazy commit.
//
// A thread owns four neighbouring channels (8 bytes of bf16), keeps their last K-1 inputs in registers and walks down the rows.
// Two kinds of blocks share one launch:
//
//   head blocks, one per sequence and 512 channels: the first kHeadRows rows of the sequence and everything that touches the
//   slots. A thread
//     reads the K-1 history rows before it writes any, and no other thread sees those channels of that sequence, so src == dst is
//     safe. The new history is read from x, which nobody writes: rows of x that other blocks convolve are no hazard.
//   tail blocks, one per kTailRows rows of the batch and 512 channels: rows from the kHeadRows-th of their sequence on. Their
//   inputs lie in
//     x, right above them, so they need no slot. Launched only where max_sequence_rows says that there may be such rows.
//
// Bytes: T·C read and written once (the K-1 rows above a tail block come from L2), and (2(K-1) + drafts)·C of history per
// sequence. In a decode step with γ = 3 and 128 sequences of the 4B model: 36 MB a layer (estimated: 8 µs, beside 125 µs of
// delta rule). Each row's taps are added by one fused chain in the header's order whatever block it falls to, so its bits depend
// on nothing but its inputs.

#include "kernels/causal_conv/causal_conv.h"
#include "kernels/common/check.h"
#include "kernels/common/cuda_stream.h"
#include "kernels/common/gpu.h"
#include "kernels/common/gpu_vector.h"

namespace bebop::cuda {
namespace {

constexpr int kMaxConvWidth = 8;
constexpr int kThreads = 128;
constexpr int kHeadRows = 16;  // at least kMaxConvWidth - 1, so that rows beyond the head need no history
constexpr int kTailRows = 16;
static_assert(kHeadRows >= kMaxConvWidth - 1);
static_assert(kHeadRows >= kTailRows, "a tail block meets the tail of one sequence only");

// Neighbouring channels of one row as they are stored (float, or the bits of bf16), moved in one access.
template <typename T, int kChannels>
struct alignas(sizeof(T) * kChannels) Channels {
  T value[kChannels];
};

// The weights of a thread's channels and the inputs above the next row. Indices are constants of unrolled loops throughout:
// registers have no index. `width` is at most kMaxWidth, and a constant in the hot instance.
template <typename T, int kChannels, int kMaxWidth>
struct Convolution {
  using Row = Channels<T, kChannels>;
  float weight[kMaxWidth][kChannels];
  float past[kMaxWidth][kChannels];  // [j]: row -(width-1) + j from the next one

  __device__ void LoadWeights(const float* from, int width) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int j = 0; j < kMaxWidth; ++j) weight[j][c] = j < width ? from[c * width + j] : 0.0f;
    }
  }

  __device__ void SetPast(int j, const Row& row) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) past[j][c] = gpu::ToValue(row.value[c]);
  }

  // The output of the next row.
  __device__ Row Next(const Row& input, int width) {
    Row out;
#pragma unroll
    for (int j = 0; j < kMaxWidth; ++j) {
      if (j == width - 1) SetPast(j, input);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kMaxWidth; ++j) {
        if (j < width) sum = fmaf(weight[j][c], past[j][c], sum);
      }
      // Rounded explicitly, as head and tail blocks must not differ in what the compiler fuses. The quick quotient (2 ulp) has no
      // slow path, which would cost registers; where its divisor is too large for it (sums below -87), it gives 0 for a result
      // below 1e-35.
      gpu::Store(__fdividef(sum, __fadd_rn(1.0f, expf(-sum))), &out.value[c]);
    }
#pragma unroll
    for (int j = 0; j + 1 < kMaxWidth; ++j) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) past[j][c] = past[j + 1][c];
    }
    return out;
  }
};

template <typename T, int kChannels>
__device__ inline const Channels<T, kChannels>* RowAt(const TensorView& view, int64_t row, int64_t channel) {
  return reinterpret_cast<const Channels<T, kChannels>*>(static_cast<const T*>(view.data) + row * view.row_stride + channel);
}

template <typename T, int kChannels, int kMaxWidth>
__device__ void ConvolveHead(const CausalConvArgs& args, const SequenceRows& sequence, int width, int64_t num_channels,
                             int64_t channel) {
  using Row = Channels<T, kChannels>;
  const int past = width - 1;
  const int64_t slot_rows = past + args.state.window;
  T* const inputs = static_cast<T*>(args.state.conv_inputs) + channel;
  Convolution<T, kChannels, kMaxWidth> convolution;
  convolution.LoadWeights(args.weight + channel * width, width);

  // As stored, for the new history; `convolution` has the same as float.
  Row history[kMaxWidth];
  const T* const source =
      sequence.state_src < 0 ? nullptr : inputs + (sequence.state_src * slot_rows + sequence.num_replay_rows) * num_channels;
#pragma unroll
  for (int j = 0; j < kMaxWidth; ++j) {
    history[j] = Row{};
    if (j < past && source != nullptr) history[j] = *reinterpret_cast<const Row*>(source + j * num_channels);
    convolution.SetPast(j, history[j]);
  }

  const int rows = sequence.num_rows < kHeadRows ? sequence.num_rows : kHeadRows;
#pragma unroll 4
  for (int i = 0; i < rows; ++i) {
    const int64_t row = sequence.first_row + i;
    const Row out = convolution.Next(*RowAt<T, kChannels>(args.x, row, channel), width);
    *reinterpret_cast<Row*>(static_cast<T*>(args.y.data) + row * args.y.row_stride + channel) = out;
  }

  // The last known rows enter the history, then the draft rows follow it.
  for (int i = sequence.num_known_rows < past ? 0 : sequence.num_known_rows - past; i < sequence.num_known_rows; ++i) {
    const Row input = *RowAt<T, kChannels>(args.x, sequence.first_row + i, channel);
#pragma unroll
    for (int j = 0; j < kMaxWidth; ++j) {
      if (j == past) history[j] = input;
    }
#pragma unroll
    for (int j = 0; j + 1 < kMaxWidth; ++j) history[j] = history[j + 1];
  }
  T* const destination = inputs + sequence.state_dst * slot_rows * num_channels;
#pragma unroll
  for (int j = 0; j < kMaxWidth; ++j) {
    if (j < past) *reinterpret_cast<Row*>(destination + j * num_channels) = history[j];
  }
  for (int i = sequence.num_known_rows; i < sequence.num_rows; ++i) {
    *reinterpret_cast<Row*>(destination + (past + i - sequence.num_known_rows) * num_channels) =
        *RowAt<T, kChannels>(args.x, sequence.first_row + i, channel);
  }
}

template <typename T, int kChannels, int kMaxWidth>
__device__ void ConvolveTail(const CausalConvArgs& args, int64_t first_row, int width, int64_t channel) {
  const int past = width - 1;
  Convolution<T, kChannels, kMaxWidth> convolution;
  convolution.LoadWeights(args.weight + channel * width, width);
  bool loaded = false;  // the rows above `row` are in `convolution`
  const int64_t last_row = first_row + kTailRows < args.batch.num_rows ? first_row + kTailRows : args.batch.num_rows;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int32_t sequence = args.batch.row_sequence[row];
    if (sequence < 0 || row - args.batch.sequences[sequence].first_row < kHeadRows) continue;
    if (!loaded) {
#pragma unroll
      for (int j = 0; j < kMaxWidth; ++j) {
        if (j < past) convolution.SetPast(j, *RowAt<T, kChannels>(args.x, row - past + j, channel));
      }
      loaded = true;
    }
    *reinterpret_cast<Channels<T, kChannels>*>(static_cast<T*>(args.y.data) + row * args.y.row_stride + channel) =
        convolution.Next(*RowAt<T, kChannels>(args.x, row, channel), width);
  }
}

// Block y below num_sequences: that sequence's head; above: the tail rows from (y - num_sequences)·kTailRows on. kWidth taps, or
// any number up to kMaxConvWidth if 0.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads) CausalConvKernel(CausalConvArgs args, int64_t num_channels) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kChannels;
  if (channel >= num_channels) return;
  constexpr int kMaxWidth = kWidth > 0 ? kWidth : kMaxConvWidth;
  const int width = kWidth > 0 ? kWidth : args.state.conv_width;
  const int32_t block = static_cast<int32_t>(blockIdx.y);
  if (block < args.batch.num_sequences) {
    const SequenceRows sequence = args.batch.sequences[block];
    if (sequence.num_rows > 0) ConvolveHead<T, kChannels, kMaxWidth>(args, sequence, width, num_channels, channel);
  } else {
    ConvolveTail<T, kChannels, kMaxWidth>(args, static_cast<int64_t>(block - args.batch.num_sequences) * kTailRows, width,
                                          channel);
  }
}

template <typename T, int kChannels, int kWidth>
void LaunchConv(const CausalConvArgs& args, int64_t num_channels, Stream& stream) {
  const int64_t tails = args.batch.max_sequence_rows > kHeadRows ? (args.batch.num_rows + kTailRows - 1) / kTailRows : 0;
  const int64_t per_block = int64_t{kThreads} * kChannels;
  const dim3 grid(static_cast<unsigned>((num_channels + per_block - 1) / per_block),
                  static_cast<unsigned>(args.batch.num_sequences + tails));
  BEBOP_CUDA_TRY(
      stream, gpu::Launch(CausalConvKernel<T, kChannels, kWidth>, grid, dim3(kThreads), 0, stream.handle(), args, num_channels));
}

template <typename T>
void LaunchConv(const CausalConvArgs& args, Stream& stream) {
  constexpr int kChannels = 4;
  const int64_t num_channels = args.state.conv_channels();
  const auto aligned = [&](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % (kChannels * sizeof(T)) == 0 && stride % kChannels == 0;
  };
  if (args.state.conv_width == 4 && aligned(args.x.data, args.x.row_stride) && aligned(args.y.data, args.y.row_stride) &&
      aligned(args.state.conv_inputs, num_channels)) {
    LaunchConv<T, kChannels, 4>(args, num_channels, stream);
  } else {
    LaunchConv<T, 1, 0>(args, num_channels, stream);
  }
}

}  // namespace

void CausalConv(const CausalConvArgs& args, Stream& stream) {
  const RaggedBatch& batch = args.batch;
  BEBOP_CHECK(args.state.conv_width >= 1 && args.state.conv_width <= kMaxConvWidth && args.x.cols == args.state.conv_channels() &&
              args.y.cols == args.state.conv_channels() && args.x.rows >= batch.num_rows && args.y.rows >= batch.num_rows);
  BEBOP_CHECK(args.x.dtype == args.y.dtype && args.x.dtype == args.state.input_dtype);
  BEBOP_CHECK(batch.max_sequence_rows > 0 && (batch.max_sequence_rows <= kHeadRows || batch.row_sequence != nullptr));
  if (batch.num_sequences == 0) return;
  if (args.x.dtype == DType::kFloat32) {
    LaunchConv<float>(args, stream);
  } else {
    LaunchConv<uint16_t>(args, stream);
  }
}

}  // namespace bebop::cuda
