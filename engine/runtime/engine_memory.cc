// SPDX-License-Identifier: Apache-2.0
#include "engine/runtime/engine_memory.h"

#include <algorithm>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/model/model.h"
#include "engine/runtime/model_executor.h"
#include "engine/runtime/scorer.h"

namespace bebop {
namespace {

constexpr int32_t kMaxDefaultModelLen = 32768;

// Sizes that are for the backend to say.
struct Defaults {
  int32_t page_tokens, max_num_seqs, step_tokens;
  int32_t prefill_cut;        // SchedulerOptions::prefill_cut_tokens: a chunk of the device's delta rule
  int32_t score_step_tokens;  // SchedulerOptions::max_score_step_tokens
};
// A device reads a page at a time: larger pages make longer runs and shorter tables. Its weights are read at memory speed for hundreds
// of rows, where a CPU is soon bound by arithmetic. The logits of scores go over the bus to the host, a MiB a row of the largest
// vocabulary, and generation waits for them: so many rows in a step keep the products busy and the wait to some half a GB.
constexpr Defaults kHostDefaults{.page_tokens = 16,
                                 .max_num_seqs = 32,
                                 .step_tokens = 512,
                                 .prefill_cut = 1,
                                 .score_step_tokens = std::numeric_limits<int32_t>::max()};
constexpr Defaults kDeviceDefaults{
    .page_tokens = 64, .max_num_seqs = 256, .step_tokens = 8192, .prefill_cut = 64, .score_step_tokens = 512};

// Samples of a group share pages, so the page tables of a step may name a page more than once: room for this many times.
constexpr int64_t kPageTableShare = 4;
// Reference count and free list of the pool (8), the sequence's own table (4), kPageTableShare entries in each of a step's two tables.
constexpr int64_t kPageHostBytes = 8 + 4 + 2 * 4 * kPageTableShare;
// Share of free memory that KV pages take on a host when no size is given: the machine is not ours alone.
constexpr double kDefaultKvShare = 0.25;

absl::Status CheckRange(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", value, " is outside [", low, ", ", high, "]"));
}

int64_t PagesPerSequence(const EngineSizes& sizes) {
  const int32_t page_tokens = sizes.scheduler.page_tokens;
  return (int64_t{sizes.scheduler.max_model_len} + sizes.max_draft_tokens + 2 + page_tokens - 1) / page_tokens;
}

// More pages than all sequences at full length could use are of no use.
int64_t MostPages(const EngineSizes& sizes) { return PagesPerSequence(sizes) * (sizes.scheduler.max_num_seqs + 1); }

void SetPages(int64_t num_pages, EngineSizes* sizes) {
  sizes->scheduler.num_pages = static_cast<int32_t>(std::min<int64_t>(num_pages, std::numeric_limits<int32_t>::max()));
  sizes->state.num_pages = sizes->scheduler.num_pages;
}

// Everything but the number of pages.
absl::StatusOr<EngineSizes> SizesWithoutPages(const EngineOptions& options, const ModelConfig& config, const Defaults& defaults,
                                              DType activation_dtype) {
  EngineSizes sizes;
  sizes.max_draft_tokens = config.num_mtp_layers > 0 ? options.max_draft_tokens : 0;
  BEBOP_RETURN_IF_ERROR(CheckRange("max_draft_tokens", options.max_draft_tokens, 0, kMaxDraftTokens));
  BEBOP_RETURN_IF_ERROR(CheckRange("max_num_seqs", options.max_num_seqs, 0, 4096));
  BEBOP_RETURN_IF_ERROR(CheckRange("max_step_tokens", options.max_step_tokens, 0, 1 << 20));
  BEBOP_RETURN_IF_ERROR(CheckRange("max_model_len", options.max_model_len, 0, config.max_position_embeddings));
  BEBOP_RETURN_IF_ERROR(CheckRange("kv_cache_bytes", options.kv_cache_bytes, 0, std::numeric_limits<int64_t>::max()));
  BEBOP_RETURN_IF_ERROR(CheckRange("max_queued_requests", options.max_queued_requests, 1, 1 << 20));

  SchedulerOptions& scheduler = sizes.scheduler;
  scheduler.page_tokens = defaults.page_tokens;
  scheduler.max_num_seqs = options.max_num_seqs > 0 ? options.max_num_seqs : defaults.max_num_seqs;
  scheduler.max_model_len =
      options.max_model_len > 0 ? options.max_model_len : std::min(config.max_position_embeddings, kMaxDefaultModelLen);
  scheduler.prefill_cut_tokens = defaults.prefill_cut;
  scheduler.max_score_step_tokens = defaults.score_step_tokens;
  // Beside all decodes there must be room to cut a prompt where no bit changes.
  const int32_t decode_rows = scheduler.max_num_seqs * (sizes.max_draft_tokens + 1) + (defaults.prefill_cut > 1 ? defaults.prefill_cut : 0);
  if (options.max_step_tokens > 0 && options.max_step_tokens < decode_rows) {
    return absl::InvalidArgumentError(absl::StrCat("max_step_tokens: ", options.max_step_tokens, " is below the ", decode_rows,
                                                   " rows that max_num_seqs ", scheduler.max_num_seqs, " x (drafts ", sizes.max_draft_tokens,
                                                   " + 1)", defaults.prefill_cut > 1 ? " and a piece of a prompt" : "", " need"));
  }
  scheduler.max_step_tokens = options.max_step_tokens > 0 ? options.max_step_tokens : std::max(defaults.step_tokens, decode_rows);
  scheduler.max_queued_requests = options.max_queued_requests;
  scheduler.result_ttl = options.result_ttl;
  scheduler.score_bytes_per_token = config.hidden_size * ElementBytes(activation_dtype);
  // One slot a running sequence, and some for the shared prompts of groups that are about to fork.
  scheduler.num_state_slots = scheduler.max_num_seqs + std::max(2, scheduler.max_num_seqs / 4);

  sizes.state.kv_dtype = options.dtype;
  sizes.state.input_dtype = activation_dtype;
  sizes.state.page_tokens = defaults.page_tokens;
  sizes.state.num_slots = scheduler.num_state_slots;
  sizes.state.window = sizes.max_draft_tokens;
  return sizes;
}

}  // namespace

absl::StatusOr<EngineSizes> ResolveSizes(const EngineOptions& options, const ModelConfig& config, int64_t available_bytes) {
  BEBOP_ASSIGN_OR_RETURN(EngineSizes sizes, SizesWithoutPages(options, config, kHostDefaults, DType::kFloat32));
  const SchedulerOptions& scheduler = sizes.scheduler;
  // Beside its keys and values a page costs the pool and the page tables of a step some bytes on the host; for a model without attention
  // layers that is all.
  const int64_t page_bytes = PageBytes(config, sizes.state) + kPageHostBytes;
  const int64_t slot_bytes = SlotBytes(config, sizes.state) * scheduler.num_state_slots;
  const int64_t pages_per_sequence = PagesPerSequence(sizes), most_pages = MostPages(sizes);

  // Rows of V floats: logits, weights and scratch of a block of target rows, the drafts' distributions, and the scorer's (at first use).
  const int32_t decode_rows = scheduler.max_num_seqs * (sizes.max_draft_tokens + 1);
  const int64_t vocab_rows = 3LL * std::min(kMaxLogitRows, decode_rows) +
                             static_cast<int64_t>(scheduler.max_num_seqs) * sizes.max_draft_tokens + Scorer::kVocabRows;
  // Widest buffers of a pass, per row: hidden, residual, norm and MTP input; gate, up and product; q, gate, k/v and output; conv in and out.
  const int64_t row_floats = 4LL * config.hidden_size + 3LL * config.intermediate_size +
                             4LL * config.num_attention_heads * config.head_dim + 4LL * config.conv_channels();
  sizes.activation_bytes = 4 * (vocab_rows * config.vocab_size + row_floats * scheduler.max_step_tokens);

  const int64_t left = available_bytes - slot_bytes - sizes.activation_bytes;
  int64_t kv_bytes = options.kv_cache_bytes;
  if (kv_bytes == 0) {
    kv_bytes = std::min(page_bytes * most_pages, static_cast<int64_t>(std::max<int64_t>(0, left) * kDefaultKvShare));
  }
  const int64_t num_pages = std::min(kv_bytes / page_bytes, most_pages);
  if (kv_bytes > left || num_pages < pages_per_sequence) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "kv_cache_bytes: ", kv_bytes, " bytes hold ", num_pages, " pages of ", page_bytes, " bytes; one sequence of max_model_len ",
        scheduler.max_model_len, " needs ", pages_per_sequence, "; recurrent state ", slot_bytes, " bytes, activations ",
        sizes.activation_bytes, " bytes, available ", available_bytes,
        " bytes: lower max_model_len or max_num_seqs, or set kv_cache_bytes within what is available"));
  }
  SetPages(num_pages, &sizes);
  sizes.page_table_entries = std::min(most_pages, kPageTableShare * scheduler.num_pages);
  return sizes;
}

int64_t StagingBytes(const EngineOptions& options, int64_t weight_bytes) {
  return options.weight_staging_bytes == 0 || options.weight_staging_bytes >= weight_bytes ? weight_bytes : 0;
}

absl::StatusOr<EngineSizes> ResolveDeviceSizes(const EngineOptions& options, const ModelConfig& config, const DeviceBudget& budget) {
  // Written so that NaN is out of range.
  if (!(options.gpu_memory_utilization > 0.0 && options.gpu_memory_utilization <= 1.0)) {
    return absl::InvalidArgumentError(absl::StrCat("gpu_memory_utilization: ", options.gpu_memory_utilization, " is not in (0, 1]"));
  }
  BEBOP_ASSIGN_OR_RETURN(EngineSizes sizes, SizesWithoutPages(options, config, kDeviceDefaults, budget.activation_dtype));
  SchedulerOptions& scheduler = sizes.scheduler;
  scheduler.lookahead_tokens = budget.lookahead_tokens;
  sizes.page_table_entries = MostPages(sizes);

  const int64_t usable = static_cast<int64_t>(static_cast<double>(budget.free_bytes) * options.gpu_memory_utilization);
  const int64_t slot_bytes = SlotBytes(config, sizes.state) * scheduler.num_state_slots;
  const int64_t draft_bytes = 4LL * scheduler.max_num_seqs * sizes.max_draft_tokens * config.vocab_size;
  const int64_t activation_bytes = Model::ActivationBytes(config, scheduler.max_step_tokens, budget.activation_dtype);
  const int64_t executor_bytes = std::max(budget.executor_bytes(sizes), draft_bytes);
  const int64_t score_bytes =
      Scorer::DeviceBytes(config, scheduler.max_step_tokens, sizes.page_table_entries, budget.activation_dtype, options.dtype);
  sizes.activation_bytes = activation_bytes + executor_bytes + score_bytes;
  const int64_t left = usable - budget.weight_bytes - budget.staging_bytes - slot_bytes - sizes.activation_bytes - budget.workspace_bytes - budget.graph_bytes;

  const int64_t page_bytes = std::max<int64_t>(1, PageBytes(config, sizes.state));  // a model without attention layers has empty pages
  const int64_t kv_bytes = options.kv_cache_bytes > 0 ? options.kv_cache_bytes : std::min(std::max<int64_t>(0, left), page_bytes * MostPages(sizes));
  const int64_t num_pages = std::min(kv_bytes / page_bytes, MostPages(sizes));
  if (kv_bytes > left || num_pages < PagesPerSequence(sizes)) {
    const int64_t needed_bytes = page_bytes * PagesPerSequence(sizes);
    // Which of two things is wrong: the bytes asked for, or all the rest.
    const bool asks_too_much = options.kv_cache_bytes > 0 && kv_bytes > left && left >= needed_bytes;
    const bool asks_too_little = options.kv_cache_bytes > 0 && kv_bytes < needed_bytes && left >= needed_bytes;
    const std::string problem =
        asks_too_much || asks_too_little
            ? absl::StrCat("kv_cache_bytes: ", kv_bytes, " are asked for, one sequence of max_model_len ", scheduler.max_model_len, " needs ")
            : absl::StrCat("KV pages: one sequence of max_model_len ", scheduler.max_model_len, " needs ");
    const char* const remedy = asks_too_much     ? ": lower kv_cache_bytes, or raise gpu_memory_utilization"
                               : asks_too_little ? ": raise kv_cache_bytes, or lower max_model_len"
                              : budget.staging_bytes > needed_bytes
                                  ? ": lower max_num_seqs (recurrent state, logits), max_step_tokens (activations) or max_model_len (pages), raise "
                                    "gpu_memory_utilization, or do without weight updates (weight_staging_bytes 1)"
                                  : ": lower max_num_seqs (recurrent state, logits), max_step_tokens (activations) or "
                                    "max_model_len (pages), or raise gpu_memory_utilization";
    return absl::ResourceExhaustedError(absl::StrCat(
        problem, needed_bytes, " bytes, and ", std::max<int64_t>(0, left), " are left of ", usable, " (gpu_memory_utilization ", options.gpu_memory_utilization, " of ",
        budget.free_bytes, " free): weights ", budget.weight_bytes, ", room for new weights ", budget.staging_bytes, ", recurrent state ", slot_bytes, " (", scheduler.num_state_slots,
        " slots), activations ", activation_bytes, ", draft logits ", draft_bytes, ", logits and arrays ", executor_bytes - draft_bytes, ", scores ",
        score_bytes, ", workspace ", budget.workspace_bytes, ", graphs ", budget.graph_bytes, remedy));
  }
  SetPages(num_pages, &sizes);
  return sizes;
}

}  // namespace bebop
