// SPDX-License-Identifier: Apache-2.0

// Times the CUDA operators at the shapes of the 4B and 27B models: bytes and FLOPs that must move, time, and the fraction of the bound given by
// the copy bandwidth and the matrix rate measured in the same run. One JSON line a cell.
//
//   ops_cuda_bench [--only ceilings|delta_rule|attention|linear|sampling|small]... [--samples N] [--smoke]
//
// The ceilings are measured and printed first, always. --smoke: tiny shapes, for a test of its logic.
// "verify" is not cold: it reads one row a sequence of the same logits in every call.

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "kernels/attention/attention.h"
#include "kernels/causal_conv/causal_conv.h"
#include "kernels/decode/decode.h"
#include "kernels/delta_rule/delta_rule.h"
#include "kernels/linear/linear.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/sampling/sampling.h"
#include "kernels/swiglu/swiglu.h"
#include "tests/bench/gpu/bench_device.h"

namespace bebop::bench {
namespace {

constexpr int64_t kColdBytes = 192 << 20;  // three times the L2 of the largest device in mind (60 MB)
constexpr int kMaxSets = 24;

struct Options {
  std::vector<std::string> only;
  int samples = 100;
  bool smoke = false;
};

class OpsBench {
 public:
  explicit OpsBench(const Options& options) : options_(options), stream_({.workspace_bytes = options.smoke ? 8 << 20 : 256 << 20}), plans_(&stream_) {}

  int Run() {
    if (!stream_.ok()) {
      std::fprintf(stderr, "error: %s\n", stream_.error().c_str());
      return 1;
    }
    MeasureCeilings();
    if (Wanted("delta_rule")) DeltaRules();
    if (Wanted("attention")) Attentions();
    if (Wanted("linear")) Linears();
    if (Wanted("sampling")) Samplings();
    if (Wanted("small")) SmallOps();
    return 0;
  }

 private:
  bool Wanted(std::string_view name) const {
    return options_.only.empty() || std::find(options_.only.begin(), options_.only.end(), name) != options_.only.end();
  }
  // How many sets of buffers make the caches cold.
  int Sets(int64_t bytes) const {
    return options_.smoke ? 1 : static_cast<int>(std::clamp<int64_t>(kColdBytes / std::max<int64_t>(bytes, 1) + 1, 2, kMaxSets));
  }
  void Report(const std::string& op, const std::string& shape, double bytes, double flops, double seconds) {
    const double bound = std::max(bytes / bandwidth_, flops / matrix_rate_);
    std::printf("{\"op\": \"%s\", \"shape\": \"%s\", \"MB\": %.3f, \"GFLOP\": %.3f, \"us\": %.2f, \"GB_per_s\": %.1f, "
                "\"TFLOP_per_s\": %.2f, \"bound_us\": %.2f, \"fraction\": %.3f}\n",
                op.c_str(), shape.c_str(), bytes / 1e6, flops / 1e9, seconds * 1e6, bytes / seconds / 1e9, flops / seconds / 1e12, bound * 1e6,
                bound / seconds);
    std::fflush(stdout);
  }

  void MeasureCeilings() {
    const int64_t bytes = options_.smoke ? 1 << 16 : int64_t{2} << 30;
    DeviceBlock from(bytes, DeviceBlock::Fill::kFloat32), to(bytes, DeviceBlock::Fill::kNone);
    const double copy = SecondsPerCall(
        stream_, {[&] {
          BEBOP_CUDA_TRY(stream_, cudaMemcpyAsync(to.as<void>(), from.as<void>(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_.handle()));
        }}, 20);
    bandwidth_ = 2.0 * static_cast<double>(bytes) / copy;
    const int64_t n = options_.smoke ? 64 : 8192;
    DeviceBlock x(n * n * 2, DeviceBlock::Fill::kBFloat16), w(n * n * 2, DeviceBlock::Fill::kBFloat16, 0.01f), y(n * n * 2, DeviceBlock::Fill::kNone);
    const double product = SecondsPerCall(stream_, {[&] {
      cuda::Linear({.x = x.Matrix(DType::kBFloat16, n, n), .w = Rows(w, n, n), .y = y.Matrix(DType::kBFloat16, n, n)}, plans_, stream_);
    }}, 10);
    matrix_rate_ = 2.0 * static_cast<double>(n) * n * n / product;
    cudaDeviceProp properties{};
    CheckCuda(cudaGetDeviceProperties(&properties, stream_.device()), "cudaGetDeviceProperties");
    int driver = 0;
    CheckCuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    std::printf("{\"op\": \"ceilings\", \"device\": \"%s\", \"driver\": %d, \"copy_GB_per_s\": %.6g, \"bf16_TFLOP_per_s\": %.6g}\n",
                properties.name, driver, bandwidth_ / 1e9, matrix_rate_ / 1e12);
    std::fflush(stdout);
  }

  static PackedMatrix Rows(const DeviceBlock& block, int64_t rows, int64_t cols) {
    return {block.as<void>(), DType::kBFloat16, rows, cols, MatrixLayout::kRows};
  }

  void Linears() {
    struct Shape {
      const char* name;
      int64_t n, k;
    };
    std::vector<Shape> shapes = {{"4B in_proj", 12352, 2560}, {"4B out_proj", 2560, 4096}, {"4B gate_up", 18432, 2560}, {"4B down", 2560, 9216},
                                 {"4B head", 248320, 2560},   {"27B in_proj", 16480, 5120}, {"27B gate_up", 34816, 5120}, {"27B down", 5120, 17408}};
    std::vector<int64_t> rows = {1, 4, 8, 16, 32, 128, 512};
    if (options_.smoke) shapes = {{"smoke", 96, 64}}, rows = {1, 5, 40};
    for (const Shape& shape : shapes) {
      const int64_t weight_bytes = shape.n * shape.k * 2;
      std::vector<std::unique_ptr<DeviceBlock>> weights;
      for (int i = 0; i < Sets(weight_bytes); ++i) weights.push_back(std::make_unique<DeviceBlock>(weight_bytes, DeviceBlock::Fill::kBFloat16, 0.02f));
      for (const int64_t m : rows) {
        const bool head = shape.n > 200000;
        DeviceBlock x(m * shape.k * 2, DeviceBlock::Fill::kBFloat16), y(m * shape.n * 4, DeviceBlock::Fill::kNone);
        std::vector<std::function<void()>> calls;
        for (const auto& w : weights) {
          calls.push_back([&, w = w.get()] {
            cuda::Linear({.x = x.Matrix(DType::kBFloat16, m, shape.k), .w = Rows(*w, shape.n, shape.k),
                          .y = y.Matrix(head ? DType::kFloat32 : DType::kBFloat16, m, shape.n)}, plans_, stream_);
          });
        }
        Report("linear", std::string(shape.name) + " M=" + std::to_string(m),
               static_cast<double>(weight_bytes + m * shape.k * 2 + m * shape.n * (head ? 4 : 2)), 2.0 * static_cast<double>(m) * shape.n * shape.k,
               SecondsPerCall(stream_, calls, options_.samples));
      }
    }
  }

  // B sequences of `context` tokens with `rows` rows each; page tables over one pool.
  struct Batch {
    Batch(int32_t batch, int32_t rows, int32_t context, int32_t page_tokens, int32_t known) {
      std::vector<SequenceRows> sequences;
      std::vector<int32_t> pages, row_sequence, row_position;
      const int32_t per_sequence = (context + rows + page_tokens - 1) / page_tokens;
      num_pages = per_sequence * batch;
      for (int32_t b = 0; b < batch; ++b) {
        // A prompt chunk replays nothing; a verification replays half of the last one's drafts.
        const bool prompt = known == rows && rows > 1;
        sequences.push_back({.first_row = b * rows, .num_rows = rows, .num_known_rows = known, .num_prefill_rows = prompt ? known : 0,
                             .num_replay_rows = prompt ? 0 : rows / 2, .first_position = context, .state_src = b, .state_dst = b,
                             .first_page = b * per_sequence});
        // Pages of a sequence lie apart, as they do after a while of serving.
        for (int32_t page = 0; page < per_sequence; ++page) pages.push_back(page * batch + b);
        for (int32_t row = 0; row < rows; ++row) {
          row_sequence.push_back(b);
          row_position.push_back(context + row);
        }
      }
      arrays.push_back(std::make_unique<DeviceBlock>(sequences));
      arrays.push_back(std::make_unique<DeviceBlock>(pages));
      arrays.push_back(std::make_unique<DeviceBlock>(row_sequence));
      arrays.push_back(std::make_unique<DeviceBlock>(row_position));
      view = {.num_sequences = batch, .num_rows = batch * rows, .sequences = arrays[0]->as<SequenceRows>(), .page_ids = arrays[1]->as<int32_t>(),
              .row_sequence = arrays[2]->as<int32_t>(), .row_position = arrays[3]->as<int32_t>(), .max_sequence_rows = rows,
              .max_positions = context + rows};
    }
    std::vector<std::unique_ptr<DeviceBlock>> arrays;
    RaggedBatch view;
    int32_t num_pages = 0;
  };

  void Attentions() {
    struct Shape {
      const char* name;
      int32_t q_heads, kv_heads, head_dim;
    };
    std::vector<Shape> shapes = {{"4B", 16, 4, 256}, {"27B", 24, 4, 256}};
    std::vector<int32_t> batches = {1, 8, 32, 64, 128};
    int32_t context = 4096, page_tokens = 64;
    std::vector<int32_t> rows = {1, 4, 6};
    if (options_.smoke) shapes = {{"smoke", 4, 2, 64}}, batches = {1, 3}, context = 100, rows = {1, 4};
    for (const Shape& shape : shapes) {
      for (const int32_t batch : batches) {
        for (const int32_t num_rows : rows) Attention(shape.name, shape.q_heads, shape.kv_heads, shape.head_dim, batch, num_rows, context, page_tokens);
      }
      // Prefill: one chunk at the start of its sequence.
      const int32_t chunk = options_.smoke ? 70 : 2048;
      Attention(std::string(shape.name) + " prefill", shape.q_heads, shape.kv_heads, shape.head_dim, 1, chunk, 0, page_tokens);
    }
  }
  void Attention(const std::string& name, int32_t q_heads, int32_t kv_heads, int32_t head_dim, int32_t num_sequences, int32_t rows, int32_t context,
                 int32_t page_tokens) {
    const Batch batch(num_sequences, rows, context, page_tokens, 1);
    const int64_t page_bytes = int64_t{page_tokens} * kv_heads * head_dim * 2;
    const int64_t kv_bytes = 2 * page_bytes * batch.num_pages;
    const int64_t total_rows = int64_t{num_sequences} * rows, width = int64_t{q_heads} * head_dim;
    DeviceBlock q(total_rows * width * 2, DeviceBlock::Fill::kBFloat16), gate(total_rows * width * 4, DeviceBlock::Fill::kBFloat16);
    DeviceBlock out(total_rows * width * 2, DeviceBlock::Fill::kNone);
    std::vector<std::unique_ptr<DeviceBlock>> caches;
    std::vector<std::function<void()>> calls;
    for (int i = 0; i < Sets(kv_bytes); ++i) {
      caches.push_back(std::make_unique<DeviceBlock>(kv_bytes, DeviceBlock::Fill::kBFloat16));
      KvPagesView pages{.k = caches.back()->as<char>(), .v = caches.back()->as<char>() + kv_bytes / 2, .dtype = DType::kBFloat16,
                        .num_pages = batch.num_pages, .page_tokens = page_tokens, .num_kv_heads = kv_heads, .head_dim = head_dim};
      calls.push_back([&, pages] {
        cuda::Attention({.batch = batch.view, .q = q.Matrix(DType::kBFloat16, total_rows, width),
                         .q_gate = gate.Matrix(DType::kBFloat16, total_rows, 2 * width), .pages = pages, .num_q_heads = q_heads,
                         .out = out.Matrix(DType::kBFloat16, total_rows, width)}, stream_);
      });
    }
    const double keys = context + (rows + 1) / 2.0;
    Report("attention", name + " B=" + std::to_string(num_sequences) + " rows=" + std::to_string(rows) + " L=" + std::to_string(context),
           static_cast<double>(num_sequences) * (context + rows) * kv_heads * head_dim * 4.0 + static_cast<double>(total_rows * width) * 8.0,
           4.0 * static_cast<double>(total_rows) * static_cast<double>(width) * keys, SecondsPerCall(stream_, calls, options_.samples));
  }

  struct LinearState {
    LinearState(int32_t slots, int32_t window, int32_t key_heads, int32_t value_heads, int32_t dim) {
      const int64_t matrix = int64_t{slots} * value_heads * dim * dim * 4;
      const int64_t channels = int64_t{2 * key_heads + value_heads} * dim;
      blocks.push_back(std::make_unique<DeviceBlock>(matrix, DeviceBlock::Fill::kFloat32, 0.1f));
      blocks.push_back(std::make_unique<DeviceBlock>(slots * (3 + window) * channels * 2, DeviceBlock::Fill::kBFloat16));
      blocks.push_back(std::make_unique<DeviceBlock>(int64_t{slots} * window * key_heads * dim * 2, DeviceBlock::Fill::kBFloat16));
      blocks.push_back(std::make_unique<DeviceBlock>(int64_t{slots} * window * value_heads * dim * 2, DeviceBlock::Fill::kBFloat16));
      // exp(g) in (0, 1) whatever the sign of what is there: the gate of a window is only data to this benchmark.
      blocks.push_back(std::make_unique<DeviceBlock>(int64_t{slots} * window * value_heads * 2 * 4, DeviceBlock::Fill::kNone));
      view = {.matrix = blocks[0]->as<float>(), .conv_inputs = blocks[1]->as<void>(), .window_k = blocks[2]->as<void>(), .window_v = blocks[3]->as<void>(),
              .window_gate = blocks[4]->as<float>(), .input_dtype = DType::kBFloat16, .num_slots = slots, .window = window, .num_key_heads = key_heads,
              .num_value_heads = value_heads, .key_head_dim = dim, .value_head_dim = dim, .conv_width = 4};
    }
    std::vector<std::unique_ptr<DeviceBlock>> blocks;
    LinearStateView view;
  };

  void DeltaRules() {
    std::vector<int32_t> batches = {1, 8, 32, 64, 128};
    std::vector<int32_t> drafts = {0, 3, 5};
    int32_t key_heads = 16, dim = 128;
    std::vector<int32_t> heads = {32, 48};
    int32_t chunk = 2048;
    if (options_.smoke) batches = {1, 3}, drafts = {0, 3}, key_heads = 2, heads = {4}, dim = 16, chunk = 70;
    for (const int32_t value_heads : heads) {
      const std::string name = value_heads == 48 ? "27B" : "4B/9B";
      for (const int32_t batch : batches) {
        for (const int32_t gamma : drafts) DeltaRule(name, key_heads, value_heads, dim, batch, gamma + 1, 1);
      }
      DeltaRule(name + " prefill", key_heads, value_heads, dim, 1, chunk, chunk);
      DeltaRule(name + " prefill", key_heads, value_heads, dim, 8, chunk, chunk);
    }
  }
  void DeltaRule(const std::string& name, int32_t key_heads, int32_t value_heads, int32_t dim, int32_t num_sequences, int32_t rows, int32_t known) {
    const Batch batch(num_sequences, rows, known == rows && rows > 1 ? 0 : 4096, 64, known);
    const int64_t total_rows = int64_t{num_sequences} * rows;
    const int64_t channels = int64_t{2 * key_heads + value_heads} * dim, width = int64_t{value_heads} * dim;
    const int64_t state_bytes = int64_t{num_sequences} * value_heads * dim * dim * 4;
    const int32_t window = std::max(1, rows - known);
    DeviceBlock qkv(total_rows * channels * 2, DeviceBlock::Fill::kBFloat16), gates(total_rows * value_heads * 4, DeviceBlock::Fill::kBFloat16);
    DeviceBlock a_log(value_heads * 4, DeviceBlock::Fill::kNone), conv_weight(channels * 4 * 4, DeviceBlock::Fill::kFloat32);
    DeviceBlock raw(total_rows * channels * 2, DeviceBlock::Fill::kBFloat16), out(total_rows * width * 2, DeviceBlock::Fill::kNone);
    std::vector<std::unique_ptr<LinearState>> states;
    std::vector<std::function<void()>> delta, conv;
    for (int i = 0; i < Sets(state_bytes); ++i) {
      states.push_back(std::make_unique<LinearState>(num_sequences, window, key_heads, value_heads, dim));
      delta.push_back([&, state = states.back()->view] {
        cuda::DeltaRule({.batch = batch.view, .qkv = qkv.Matrix(DType::kBFloat16, total_rows, channels),
                         .a = gates.Matrix(DType::kBFloat16, total_rows, value_heads), .b = gates.Matrix(DType::kBFloat16, total_rows, value_heads),
                         .a_log = a_log.as<float>(), .dt_bias = a_log.as<float>(), .state = state, .out = out.Matrix(DType::kBFloat16, total_rows, width)},
                        stream_);
      });
      conv.push_back([&, state = states.back()->view] {
        cuda::CausalConv({.batch = batch.view, .x = raw.Matrix(DType::kBFloat16, total_rows, channels), .weight = conv_weight.as<float>(), .state = state,
                          .y = qkv.Matrix(DType::kBFloat16, total_rows, channels)}, stream_);
      });
    }
    const std::string shape = name + " B=" + std::to_string(num_sequences) + " rows=" + std::to_string(rows);
    const double io = static_cast<double>(total_rows) * static_cast<double>(channels + width) * 2.0;
    const double replayed = known == rows && rows > 1 ? 0 : rows / 2;
    Report("delta_rule", shape, 2.0 * static_cast<double>(state_bytes) + io,
           (7.0 * static_cast<double>(total_rows) + 5.0 * replayed * num_sequences) * value_heads * dim * dim, SecondsPerCall(stream_, delta, options_.samples));
    Report("causal_conv", shape, static_cast<double>(total_rows * channels) * 4.0 + static_cast<double>(num_sequences) * channels * 2.0 * (3 + 2 + rows), 0.0,
           SecondsPerCall(stream_, conv, options_.samples));
  }

  // The vocabulary passes of an iteration: transform of B (γ+1) rows, and the verification after it.
  void Samplings() {
    const int32_t vocab = options_.smoke ? 5000 : 248320;
    std::vector<int32_t> batches = {1, 8, 32, 128};
    if (options_.smoke) batches = {2};
    for (const int32_t batch : batches) {
      for (const int32_t gamma : {0, 3}) Sampling(vocab, batch, gamma);
    }
  }
  void Sampling(int32_t vocab, int32_t batch, int32_t gamma) {
    const int32_t rows = batch * (gamma + 1), blocks = NumSamplingBlocks(vocab), max_drafts = std::max(gamma, 1);
    std::vector<SlotRequest> requests(batch);
    std::vector<SlotState> states(batch);
    std::vector<int32_t> slot_of_row(batch);
    for (int32_t b = 0; b < batch; ++b) {
      requests[b].seed = 11 + b;
      requests[b].rule = gamma > 0 ? VerifyRule::kRejection : VerifyRule::kOff;
      requests[b].num_draft_tokens = gamma;
      requests[b].max_new_tokens = 1 << 20;
      requests[b].record = kRecordLogprob;
      states[b].residency = b + 1;
      states[b].stopped = 0;
      states[b].num_computed = 64;
      states[b].num_drafts = gamma;
      states[b].num_pages = 4;
      for (int32_t i = 0; i < gamma; ++i) states[b].drafts[i] = 7 * i + b;
      slot_of_row[b] = b;
    }
    SlotArrays slots{.num_slots = batch, .max_drafts = max_drafts, .vocab_size = vocab, .max_pages = 4, .page_tokens = 64};
    std::vector<std::unique_ptr<DeviceBlock>> memory;
    const auto array = [&]<typename T>(T** pointer, int64_t count) {
      memory.push_back(std::make_unique<DeviceBlock>(count * static_cast<int64_t>(sizeof(T)), DeviceBlock::Fill::kNone));
      *pointer = memory.back()->as<T>();
    };
    const DeviceBlock request_block(requests), state_block(states), slot_block(slot_of_row);
    slots.requests = request_block.as<SlotRequest>();
    slots.states = state_block.as<SlotState>();
    array(&slots.stop_ids, int64_t{batch} * kMaxStopIds);
    array(&slots.banned_ids, int64_t{batch} * kMaxBannedIds);
    array(&slots.page_ids, int64_t{batch} * slots.max_pages);
    DeviceBlock draft_logits(int64_t{batch} * max_drafts * vocab * 4, DeviceBlock::Fill::kFloat32, 3.0f);
    slots.draft_logits = draft_logits.as<float>();
    array(&slots.draft_rows, int64_t{batch} * max_drafts);
    array(&slots.draft_block_sums, int64_t{batch} * max_drafts * blocks);
    PassArrays pass{.num_sequences = batch, .num_rows = rows, .num_judged = rows, .num_drafts = gamma};
    array(&pass.sequences, batch);
    array(&pass.rows, batch);
    array(&pass.token_ids, rows);
    array(&pass.row_sequence, rows);
    array(&pass.row_position, rows);
    array(&pass.judged_row, rows);
    array(&pass.judged_sequence, rows);
    array(&pass.target_rows, rows);
    array(&pass.target_block_sums, int64_t{rows} * blocks);
    array(&pass.mtp_rows, batch);
    array(&pass.mtp_token_ids, rows);
    array(&pass.mtp_row_sequence, rows);
    array(&pass.mtp_row_position, rows);
    array(&pass.draft_from_row, batch);
    array(&pass.records, batch);
    DeviceBlock scratch(TransformScratchBytes(rows, vocab), DeviceBlock::Fill::kNone);
    cuda::BeginDecode(slots, pass, slot_block.as<int32_t>(), stream_);
    std::vector<std::unique_ptr<DeviceBlock>> logits;
    const int64_t logit_bytes = int64_t{rows} * vocab * 4;
    std::vector<std::function<void()>> transform, verify;
    for (int i = 0; i < std::min(Sets(logit_bytes), 8); ++i) {
      logits.push_back(std::make_unique<DeviceBlock>(logit_bytes, DeviceBlock::Fill::kFloat32, 3.0f));
      transform.push_back([&, data = logits.back()->as<float>()] {
        PassArrays with = pass;
        with.logits = data;
        cuda::TransformRows({.slots = slots, .pass = with, .draft_depth = -1, .logits = data, .scratch = scratch.as<void>()}, stream_);
      });
    }
    // Draft rows must be processed distributions, too.
    for (int32_t depth = 0; depth < gamma; ++depth) {
      DeviceBlock rows_of_depth(int64_t{batch} * vocab * 4, DeviceBlock::Fill::kFloat32, 3.0f);
      cuda::TransformRows({.slots = slots, .pass = pass, .draft_depth = depth, .logits = rows_of_depth.as<float>(), .scratch = scratch.as<void>()}, stream_);
      CheckCuda(cudaStreamSynchronize(stream_.handle()), "draft rows");
    }
    const std::string shape = "V=" + std::to_string(vocab) + " B=" + std::to_string(batch) + " gamma=" + std::to_string(gamma);
    Report("transform", shape, static_cast<double>(logit_bytes), 0.0, SecondsPerCall(stream_, transform, options_.samples));
    // target_rows name the logits of the last transform; the draft rows and they are what the caches may hold of the row that is read.
    PassArrays with = pass;
    with.logits = logits.back()->as<float>();
    verify.push_back([&, with] { cuda::VerifyRows(slots, with, stream_); });
    // The stopping row and its draft's once, where a draft is rejected.
    Report("verify", shape, static_cast<double>(batch) * vocab * (gamma > 0 ? 8.0 : 0.0), 0.0, SecondsPerCall(stream_, verify, options_.samples));
  }

  // Row-wise operators of a 4B iteration at B = 32, γ = 3.
  void SmallOps() {
    const int64_t rows = options_.smoke ? 5 : 128, hidden = options_.smoke ? 64 : 2560, ffn = options_.smoke ? 96 : 9216;
    DeviceBlock stream(rows * hidden * 4, DeviceBlock::Fill::kFloat32), update(rows * hidden * 2, DeviceBlock::Fill::kBFloat16);
    DeviceBlock weight(hidden * 4, DeviceBlock::Fill::kFloat32, 0.1f), out(rows * hidden * 2, DeviceBlock::Fill::kNone);
    Report("rms_norm", "add, rows=" + std::to_string(rows), static_cast<double>(rows * hidden) * 12.0, 0.0, SecondsPerCall(stream_, {[&] {
      cuda::RmsNorm({.x = stream.Matrix(DType::kFloat32, rows, hidden), .residual = update.Matrix(DType::kBFloat16, rows, hidden),
                     .weight = weight.as<float>(), .out = out.Matrix(DType::kBFloat16, rows, hidden)}, stream_);
    }}, options_.samples));
    DeviceBlock gate_up(rows * 2 * ffn * 2, DeviceBlock::Fill::kBFloat16);
    const TensorView both = gate_up.Matrix(DType::kBFloat16, rows, 2 * ffn);
    Report("swiglu", "rows=" + std::to_string(rows), static_cast<double>(rows * ffn) * 6.0, 0.0, SecondsPerCall(stream_, {[&] {
      cuda::SwiGlu({.gate = both.Columns(0, ffn), .up = both.Columns(ffn, ffn), .out = both.Columns(0, ffn)}, stream_);
    }}, options_.samples));
  }

  const Options options_;
  cuda::Stream stream_;
  cuda::LinearPlans plans_;
  double bandwidth_ = 0.0, matrix_rate_ = 0.0;
};

}  // namespace
}  // namespace bebop::bench

int main(int argc, char** argv) {
  bebop::bench::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    if (arg == "--smoke") {
      options.smoke = true;
      options.samples = 2;
    } else if ((arg == "--only" || arg == "--samples") && i + 1 < argc) {
      if (arg == "--only") options.only.push_back(argv[i + 1]); else options.samples = std::atoi(argv[i + 1]);
      ++i;
    } else {
      std::fprintf(stderr, "usage: ops_cuda_bench [--only ceilings|delta_rule|attention|linear|sampling|small]... [--samples N] [--smoke]\n");
      return 2;
    }
  }
  return bebop::bench::OpsBench(options).Run();
}
