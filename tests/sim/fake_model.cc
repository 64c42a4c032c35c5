// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/fake_model.h"

#include <algorithm>
#include <array>

namespace bebop::sim {

uint32_t Place::Token(Purpose purpose) const {
  uint32_t token = static_cast<uint32_t>(Bits(purpose) % kVocab);
  while (banned && std::find(banned_ids->begin(), banned_ids->end(), token) != banned_ids->end()) token = (token + 1) % kVocab;
  return token;
}

Emission Emit(const Place& place, const uint32_t* draft, int32_t depth, bool any_draft) {
  Emission out;
  const bool coupled = place.request->speculation.mode == SpeculationMode::kCoupled;
  if (draft != nullptr) {
    if (coupled) {
      out.token = place.Token(Purpose::kCoupled);
      out.accepted = out.token == *draft;
    } else {
      out.accepted = place.Accepts();
      out.token = out.accepted ? *draft : place.Token(Purpose::kResidual);
    }
    out.source = out.accepted ? depth : -1;
  } else {
    out.token = place.Token(coupled ? Purpose::kCoupled : any_draft ? Purpose::kBonus : Purpose::kPlain);
    out.source = any_draft ? -2 : 0;
  }
  return out;
}

std::string_view TokenText(uint32_t token) {
  static const auto* const texts = [] {
    auto* all = new std::vector<std::string>;
    for (uint32_t t = 0; t < kVocab; ++t) {
      std::string text;
      for (uint32_t rest = t; rest > 0; rest /= 4) {
        if (rest % 4 != 0) text += static_cast<char>('a' + rest % 4 - 1);
      }
      all->push_back(text);  // "", "a", "b", "c", "a", "aa", ...
    }
    return all;
  }();
  return (*texts)[token % kVocab];
}

const std::vector<uint32_t>& EosIds() {
  static const auto* const ids = new std::vector<uint32_t>{46, 47};
  return *ids;
}

SampleResult Reference(const GenerateRequest& request, int32_t sample_index) {
  SampleResult out;
  out.sample_index = sample_index;
  const StoppingParams& stopping = request.stopping;
  std::vector<uint32_t> stop_ids = stopping.stop_token_ids;
  if (!stopping.ignore_eos) stop_ids.insert(stop_ids.end(), EosIds().begin(), EosIds().end());
  const int32_t gamma = request.speculation.mode == SpeculationMode::kOff ? 0 : request.speculation.num_draft_tokens;

  std::vector<uint32_t> tokens = request.prompt;
  uint64_t prefix = kEmptyPrefix;
  for (const uint32_t token : tokens) prefix = Extend(prefix, token);
  std::string text;
  std::vector<uint32_t> drafts;
  const auto place_at = [&](int32_t num_output, uint64_t before) {
    return Place{.request = &request,
                 .sample_index = static_cast<uint32_t>(sample_index),
                 .place = static_cast<int32_t>(request.prompt.size()) + num_output,
                 .prefix = before,
                 .banned = num_output < stopping.min_new_tokens,
                 .banned_ids = &stop_ids};
  };
  while (out.finish == FinishReason::kNone) {
    const int32_t remaining_before = stopping.max_new_tokens - static_cast<int32_t>(out.token_ids.size());
    const int32_t num_drafts = static_cast<int32_t>(drafts.size());
    // The verification, before any trimming.
    std::vector<Emission> emitted;
    std::vector<Place> places;
    bool non_finite = false;
    int32_t accepted = 0, reached = 0;
    uint64_t before = prefix;
    for (int32_t i = 0; i <= num_drafts; ++i) {
      const Place place = place_at(static_cast<int32_t>(out.token_ids.size()) + i, before);
      if (place.NonFinite()) {
        non_finite = true;
        break;
      }
      const Emission one = Emit(place, i < num_drafts ? &drafts[i] : nullptr, i + 1, num_drafts > 0);
      emitted.push_back(one);
      places.push_back(place);
      reached += i < num_drafts ? 1 : 0;
      if (!one.accepted) break;
      ++accepted;
      before = Extend(before, one.token);
    }
    int32_t kept = 0;
    for (size_t i = 0; i < emitted.size() && out.finish == FinishReason::kNone; ++i) {
      const uint32_t token = emitted[i].token;
      ++kept;
      out.token_ids.push_back(token);
      prefix = Extend(prefix, token);
      out.token_source.push_back(emitted[i].source);
      out.logprobs.push_back(places[i].Value(0));
      out.raw_logprobs.push_back(places[i].Value(1));
      out.entropy.push_back(places[i].Value(2));
      out.draft_logprobs.push_back(places[i].Value(3));
      const size_t old_length = text.size();
      text += TokenText(token);
      const int32_t count = static_cast<int32_t>(out.token_ids.size());
      if (count >= stopping.min_new_tokens) {
        if (std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end()) {
          out.finish = FinishReason::kStop;
          out.stop_token_id = token;
        }
        size_t best = std::string::npos;
        for (const std::string& stop : stopping.stop_strings) {
          if (out.stop_token_id.has_value()) break;
          const size_t from = old_length + 1 > stop.size() ? old_length + 1 - stop.size() : 0;
          const size_t at = text.find(stop, from);
          if (at != std::string::npos && at + stop.size() < best) {
            best = at + stop.size();
            out.finish = FinishReason::kStop;
            out.stop_string = stop;
          }
        }
      }
      if (out.finish == FinishReason::kNone && count == stopping.max_new_tokens) out.finish = FinishReason::kLength;
    }
    if (out.finish == FinishReason::kNone && non_finite) out.finish = FinishReason::kNonFinite;
    if (num_drafts > 0) {
      ++out.spec.num_spec_steps;
      out.spec.num_draft_tokens += num_drafts;
      out.spec.num_accepted_draft_tokens += accepted;
      out.spec.num_trimmed_tokens += std::max(0, accepted - kept);
      for (int32_t i = 0; i < reached; ++i) {
        ++out.spec.drafted_per_pos[i];
        out.spec.accepted_per_pos[i] += i < accepted ? 1 : 0;
        if (request.output.spec_detail) out.spec.overlap_per_pos[i] += 0.25 * (i + 1);
      }
    }
    // Drafts behind the last token.
    const int32_t base = static_cast<int32_t>(request.prompt.size() + out.token_ids.size()) - 1;
    const int32_t remaining = stopping.max_new_tokens - static_cast<int32_t>(out.token_ids.size());
    const int32_t wanted = std::max(0, std::min(gamma, remaining_before - 2));
    const int32_t made = std::min(wanted, DraftCap(request, static_cast<uint32_t>(sample_index), base));
    drafts.clear();
    before = prefix;
    for (int32_t i = 0; i < std::min(made, remaining - 1); ++i) {
      drafts.push_back(place_at(static_cast<int32_t>(out.token_ids.size()) + i, before).Token(Purpose::kDraft));
      before = Extend(before, drafts.back());
    }
  }
  if (!request.output.logprobs) out.logprobs.clear();
  if (!request.output.raw_logprobs) out.raw_logprobs.clear();
  if (!request.output.entropy) out.entropy.clear();
  if (!request.output.draft_logprobs) out.draft_logprobs.clear();
  if (!request.output.token_source) out.token_source.clear();
  return out;
}

}  // namespace bebop::sim
