// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/fake_executor.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"

namespace bebop::sim {

FakeExecutor::FakeExecutor(const SchedulerOptions& options)
    : options_(options),
      target_(static_cast<size_t>(options.num_pages) * options.page_tokens),
      mtp_(target_.size()),
      states_(static_cast<size_t>(options.num_state_slots)),
      drafts_(static_cast<size_t>(options.max_num_seqs)),
      stays_(static_cast<size_t>(options.max_num_seqs)) {}

bool FakeExecutor::Fail(const std::string& what) {
  if (violation_.empty()) violation_ = what;
  return false;
}

FakeExecutor::Entry* FakeExecutor::At(std::vector<Entry>* entries, std::span<const int32_t> pages, int32_t position) {
  return &(*entries)[static_cast<size_t>(pages[position / options_.page_tokens]) * options_.page_tokens +
                     position % options_.page_tokens];
}

std::vector<float> FakeExecutor::ScoreReference(const ScoreRequest& request) {
  std::vector<float> values;
  uint64_t prefix = kEmptyPrefix;
  for (const uint32_t token : request.token_ids) {
    prefix = Extend(prefix, token);
    values.push_back(static_cast<float>(prefix % 4096));
  }
  return values;
}

// What the entries of one plan do to each other.
bool FakeExecutor::CheckTogether(const StepPlan& plan) {
  std::set<int32_t> slots, written_states;
  std::map<int32_t, int32_t> page_readers;  // entries that have the page in their table
  int32_t num_rows = 0;
  bool decodes = false;
  const auto check_tables = [&](std::span<const int32_t> pages, int32_t src, int32_t dst, const char* what) {
    std::set<int32_t> unique;
    for (const int32_t page : pages) {
      if (page < 0 || page >= options_.num_pages) return Fail(absl::StrCat(what, ": page ", page, " out of range"));
      if (!unique.insert(page).second) return Fail(absl::StrCat(what, ": page ", page, " twice in one table"));
      ++page_readers[page];
    }
    if (dst < 0 || dst >= options_.num_state_slots) return Fail(absl::StrCat(what, ": state_dst ", dst));
    if (src < -1 || src >= options_.num_state_slots) return Fail(absl::StrCat(what, ": state_src ", src));
    if (!written_states.insert(dst).second) return Fail(absl::StrCat("state slot ", dst, " has two writers"));
    return true;
  };
  // Where a prompt or a score is cut may not depend on what else runs.
  const auto check_cut = [&](int32_t cut, int32_t end) {
    return cut >= end || cut % options_.prefill_cut_tokens == 0 ||
           Fail(absl::StrCat("cut at ", cut, ", not at a multiple of ", options_.prefill_cut_tokens));
  };
  int32_t score_rows = 0;
  for (const ScorePlan& score : plan.scores) {
    if (!score.draft_phase && !check_cut(score.end, static_cast<int32_t>(score.request->token_ids.size()))) return false;
    if (!score.draft_phase) score_rows += score.end - score.begin;
    if (!check_tables(score.pages, score.state_src, score.state_dst, "score")) return false;
    num_rows += (score.end - score.begin) * (score.draft_phase ? score.request->draft_depth : 1);
  }
  if (score_rows > options_.max_score_step_tokens) return Fail(absl::StrCat("scores take ", score_rows, " rows of a step"));
  int32_t decode_rows = 0;
  for (const SequencePlan& sequence : plan.sequences) {
    const int32_t cut = sequence.num_computed + static_cast<int32_t>(sequence.known_tokens.size());
    if (!check_cut(cut, static_cast<int32_t>(sequence.request->prompt.size()) - 1)) return false;
    if (!check_tables(sequence.pages, sequence.state_src, sequence.state_dst, "sequence")) return false;
    if (sequence.slot < 0 || sequence.slot >= options_.max_num_seqs) return Fail(absl::StrCat("slot ", sequence.slot));
    if (!slots.insert(sequence.slot).second) return Fail(absl::StrCat("executor slot ", sequence.slot, " twice in a step"));
    if (!CheckResidency(sequence) || !CheckLookahead(sequence)) return false;
    num_rows += static_cast<int32_t>(sequence.known_tokens.size()) + sequence.num_drafts;
    const bool decode = sequence.sample && sequence.num_output > 0 && sequence.known_tokens.size() == 1;
    if (!decode && decodes) return Fail("a prefill chunk comes after a decode");
    decodes = decodes || decode;
    decode_rows += sequence.num_drafts;
  }
  // One base of a score's draft phase may exceed what is left by its depth.
  if (num_rows > options_.max_step_tokens + (plan.scores.empty() ? 0 : kMaxDraftTokens)) {
    return Fail(absl::StrCat("step of ", num_rows, " rows, the limit is ", options_.max_step_tokens));
  }
  const auto check_source = [&](int32_t src, int32_t dst) {
    return src < 0 || src == dst || written_states.count(src) == 0 || Fail(absl::StrCat("state slot ", src, " is read and overwritten"));
  };
  const auto check_written = [&](std::span<const int32_t> pages, int32_t begin, int32_t end) {
    for (int32_t page = begin / options_.page_tokens; begin < end && page <= (end - 1) / options_.page_tokens; ++page) {
      if (page >= static_cast<int32_t>(pages.size())) return Fail(absl::StrCat("page table of ", pages.size(), " misses position ", end - 1));
      if (page_readers[pages[page]] > 1) return Fail(absl::StrCat("page ", pages[page], " is written while another entry has it"));
    }
    return true;
  };
  for (const ScorePlan& score : plan.scores) {
    if (!check_source(score.state_src, score.state_dst)) return false;
    const int32_t shift = score.draft_phase ? 1 : 0;
    if (!check_written(score.pages, score.begin + shift, score.end + shift)) return false;
  }
  for (const SequencePlan& sequence : plan.sequences) {
    if (!check_source(sequence.state_src, sequence.state_dst)) return false;
    const int32_t end = sequence.num_computed + static_cast<int32_t>(sequence.known_tokens.size()) + sequence.num_drafts +
                        std::max(sequence.num_drafts_next, sequence.keep_mtp ? 1 : 0);
    if (!check_written(sequence.pages, sequence.num_computed, end)) return false;
  }
  return true;
}

// A device knows by the residency alone whom it has in a slot: one value a stay, never used again, and the sequence goes on where it was, with
// a page table that only grows.
bool FakeExecutor::CheckResidency(const SequencePlan& plan) {
  Stay& stay = stays_[plan.slot];
  if (plan.residency == 0) return Fail("residency 0");
  if (plan.residency == stay.residency) {
    if (stay.request != plan.request || stay.sample_index != plan.sample_index || plan.num_computed <= stay.num_computed) {
      return Fail(absl::StrCat("residency ", plan.residency, " of slot ", plan.slot, " is another sequence's or an earlier stay's"));
    }
    if (plan.pages.size() < stay.pages.size() || !std::equal(stay.pages.begin(), stay.pages.end(), plan.pages.begin())) {
      return Fail(absl::StrCat("the page table in slot ", plan.slot, " has changed where it stood before"));
    }
  } else if (!residencies_.insert(plan.residency).second) {
    return Fail(absl::StrCat("residency ", plan.residency, " of slot ", plan.slot, " is not new"));
  }
  if (plan.residency != stay.residency) stay.first_epoch = stay.ahead_epoch = -1;
  stay.residency = plan.residency;
  stay.request = plan.request;
  stay.sample_index = plan.sample_index;
  stay.num_computed = plan.num_computed;
  stay.pages.assign(plan.pages.begin(), plan.pages.end());
  return true;
}

// The iteration that a device runs before the host has seen this pass's results: with enough lookahead it never lacks a page.
bool FakeExecutor::CheckLookahead(const SequencePlan& plan) {
  const GenerateRequest& request = *plan.request;
  const int32_t drafts = plan.keep_mtp ? request.speculation.num_draft_tokens : 0;
  if (options_.lookahead_tokens < 2 * (drafts + 1) || (!plan.sample && plan.num_drafts_next == 0)) return true;
  const int32_t most = static_cast<int32_t>(request.prompt.size()) + request.stopping.max_new_tokens + drafts;
  const int32_t computed = plan.num_computed + static_cast<int32_t>(plan.known_tokens.size()) + plan.num_drafts;
  const int32_t needed = std::min(most, computed + 1 + drafts + std::max(drafts, plan.keep_mtp ? 1 : 0));
  return static_cast<int32_t>(plan.pages.size()) * options_.page_tokens >= needed ||
         Fail(absl::StrCat("page table of ", plan.pages.size(), " misses position ", needed - 1, " of the iteration after this one"));
}

// Attention reads positions [0, num_tokens): each must hold the prefix that its predecessors say.
bool FakeExecutor::ReadPrefix(std::span<const int32_t> pages, int32_t num_tokens, bool mtp, int64_t earliest, int64_t epoch, uint64_t* prefix,
                              bool* mixed) {
  *prefix = kEmptyPrefix;
  *mixed = false;
  for (int32_t position = 0; position < num_tokens; ++position) {
    const Entry& entry = *At(&target_, pages, position);
    *prefix = Extend(*prefix, entry.token);
    if (entry.position != position || entry.prefix != *prefix) {
      return Fail(absl::StrCat("KV of position ", position, " is another's or stale (page ", pages[position / options_.page_tokens],
                               " holds position ", entry.position, ")"));
    }
    if (entry.epoch < earliest || entry.epoch > epoch) {
      return Fail(absl::StrCat("KV of position ", position, " is of epoch ", entry.epoch, ", not of ", earliest, " to ", epoch));
    }
    *mixed = *mixed || entry.epoch != epoch;
    if (!mtp || position == 0) continue;
    const Entry& draft = *At(&mtp_, pages, position);
    if (draft.position != position || draft.prefix != *prefix || !draft.certain) {
      return Fail(absl::StrCat("MTP entry of position ", position, " is another's, stale or a draft's"));
    }
    if (draft.epoch < earliest || draft.epoch > epoch) return Fail(absl::StrCat("MTP entry of position ", position, " is of epoch ", draft.epoch));
  }
  return true;
}

bool FakeExecutor::RunSequence(const SequencePlan& plan, SequenceOutcome* out) {
  *out = SequenceOutcome();
  const GenerateRequest& request = *plan.request;
  const int32_t known = static_cast<int32_t>(plan.known_tokens.size());
  const int32_t prompt = static_cast<int32_t>(request.prompt.size());
  const int32_t first = plan.num_computed;
  if (known < 1) return Fail("a pass without known tokens");
  if (plan.sample != plan.next_known_token.empty()) return Fail("next_known_token with, or its lack without, sampling");
  if (plan.sample && first + known != prompt + plan.num_output) return Fail("sampling before the end of the sequence");
  if (!plan.sample && first + known >= prompt + plan.num_output) return Fail("a chunk to the end of the sequence does not sample");
  if (plan.num_drafts > 0 && !plan.sample) return Fail("drafts without sampling");
  const bool may_draft = request.speculation.mode != SpeculationMode::kOff && request.speculation.num_draft_tokens > 0;
  if (plan.keep_mtp != may_draft) return Fail("keep_mtp is wrong");
  if (plan.num_drafts_next > 0 && !plan.keep_mtp) return Fail("drafts without an MTP cache");
  if (plan.seed != request.sampling.seed) return Fail("wrong seed");
  for (int32_t i = 0; i < known && first + i < prompt; ++i) {
    if (plan.known_tokens[i] != request.prompt[first + i]) return Fail("known tokens are not the prompt's");
  }

  // Recurrent state: committed tokens, then the accepted drafts of the window.
  State state;
  if (plan.state_src < 0) {
    state = State{.prefix = kEmptyPrefix, .num_tokens = 0, .window = {}};
  } else {
    state = states_[plan.state_src];
    if (plan.num_replay > static_cast<int32_t>(state.window.size())) return Fail("replays more than the window holds");
  }
  if (plan.state_src < 0 && plan.num_replay > 0) return Fail("replays without a state");
  for (int32_t i = 0; i < plan.num_replay; ++i) {
    state.prefix = Extend(state.prefix, state.window[i]);
    ++state.num_tokens;
  }
  uint64_t prefix = 0;
  const int64_t epoch = EpochOf(plan);
  Stay& stay = stays_[plan.slot];
  if (stay.first_epoch < 0) stay.first_epoch = epoch;
  stay.ahead_epoch = weight_epoch_;
  out->weight_epoch = epoch;
  bool mixed = false;
  if (!ReadPrefix(plan.pages, first, plan.keep_mtp, stay.first_epoch, epoch, &prefix, &mixed)) return false;
  if (state.num_tokens != first || state.prefix != prefix) {
    return Fail(absl::StrCat("state slot ", plan.state_src, " is at ", state.num_tokens, " tokens, the sequence at ", first,
                             state.num_tokens == first ? " with another prefix" : ""));
  }
  if (plan.keep_mtp && first > 0) {
    const Entry& entry = *At(&mtp_, plan.pages, first);
    if (entry.position != first || entry.prefix != Extend(prefix, plan.known_tokens[0]) || !entry.certain) {
      return Fail(absl::StrCat("MTP entry of position ", first, " (the first known token) is missing"));
    }
  }

  // Target rows.
  std::vector<uint32_t> rows(plan.known_tokens.begin(), plan.known_tokens.end());
  Drafts& drafts = drafts_[plan.slot];
  if (plan.num_drafts > 0) {
    if (drafts.request != plan.request || drafts.sample_index != plan.sample_index || drafts.base != first + known - 1 ||
        static_cast<int32_t>(drafts.tokens.size()) < plan.num_drafts) {
      return Fail(absl::StrCat("executor slot ", plan.slot, " does not hold the drafts to verify"));
    }
    rows.insert(rows.end(), drafts.tokens.begin(), drafts.tokens.begin() + plan.num_drafts);
  }
  std::vector<uint64_t> prefix_after(rows.size());
  uint64_t running = prefix;
  for (size_t i = 0; i < rows.size(); ++i) {
    running = Extend(running, rows[i]);
    prefix_after[i] = running;
    const int32_t position = first + static_cast<int32_t>(i);
    *At(&target_, plan.pages, position) =
        Entry{.prefix = running, .token = rows[i], .position = position, .certain = true, .epoch = epoch};
  }
  State& written = states_[plan.state_dst];
  written = State{.prefix = prefix_after[known - 1], .num_tokens = first + known, .window = {}};
  written.window.assign(rows.begin() + known, rows.end());

  // Verification.
  const std::vector<uint32_t> banned(plan.banned_before_min.begin(), plan.banned_before_min.end());
  const auto place_at = [&](int32_t place, uint64_t before) {
    return Place{.request = &request,
                 .sample_index = plan.sample_index,
                 .place = place,
                 .prefix = before,
                 .banned = place - prompt < request.stopping.min_new_tokens,
                 .banned_ids = &banned};
  };
  uint32_t last_token = 0;
  int32_t last_position = first + known;  // of the token after the last certain row
  bool has_last = false;
  if (plan.sample) {
    for (int32_t i = 0; i <= plan.num_drafts; ++i) {
      const Place place = place_at(first + known + i, prefix_after[known - 1 + i]);
      if (place.NonFinite()) {
        out->non_finite = true;
        break;
      }
      const uint32_t* const draft = i < plan.num_drafts ? &rows[known + i] : nullptr;
      const Emission one = Emit(place, draft, i + 1, plan.num_drafts > 0);
      const int32_t n = out->num_emitted++;
      std::vector<Drawn>& drawn = drawn_[{request.request_id, static_cast<int32_t>(plan.sample_index)}];
      const size_t at = static_cast<size_t>(plan.num_output + n);
      if (at == 0) drawn.clear();  // an id may run again
      if (drawn.size() <= at) drawn.resize(at + 1);
      if (drawn[at].epoch >= 0) return Fail("a token is drawn twice");
      drawn[at] = {epoch, mixed};
      out->tokens[n] = one.token;
      out->source[n] = one.source;
      out->logprob[n] = place.Value(0);
      out->raw_logprob[n] = place.Value(1);
      out->entropy[n] = place.Value(2);
      out->draft_logprob[n] = place.Value(3);
      if (draft != nullptr) {
        out->overlap[i] = 0.25 * (i + 1);
        ++out->num_reached;
        ++spec_.drafted_per_pos[i];
        spec_.accepted_per_pos[i] += one.accepted ? 1 : 0;
      }
      last_token = one.token;
      if (!one.accepted) {
        has_last = true;
        break;
      }
      ++out->num_accepted;
    }
    last_position = first + known + out->num_accepted;
    spec_.num_spec_steps += plan.num_drafts > 0 ? 1 : 0;
    spec_.num_draft_tokens += plan.num_drafts;
    spec_.num_accepted_draft_tokens += out->num_accepted;
  } else {
    last_token = plan.next_known_token[0];
    has_last = true;
  }
  if (!plan.keep_mtp) return true;

  // MTP extend over the certain rows: row t makes the entry of position t + 1.
  running = prefix;
  for (int32_t position = first; position <= last_position; ++position) {
    if (position == last_position && !has_last) break;
    const uint32_t token = position < last_position ? rows[position - first] : last_token;
    running = Extend(running, token);
    if (position > first) {
      *At(&mtp_, plan.pages, position) = Entry{.prefix = running, .token = token, .position = position, .certain = true, .epoch = epoch};
    }
  }
  drafts = Drafts{.request = plan.request, .sample_index = plan.sample_index, .base = last_position, .tokens = {}};
  if (!has_last) return true;
  const int32_t made = std::min(plan.num_drafts_next, DraftCap(request, plan.sample_index, last_position));
  for (int32_t i = 0; i < made; ++i) {
    if (i > 0) {
      *At(&mtp_, plan.pages, last_position + i) =
          Entry{.prefix = running, .token = drafts.tokens.back(), .position = last_position + i, .certain = false, .epoch = epoch};
    }
    const uint32_t token = place_at(last_position + 1 + i, running).Token(Purpose::kDraft);
    drafts.tokens.push_back(token);
    running = Extend(running, token);
  }
  out->num_drafts_made = made;
  return true;
}

bool FakeExecutor::RunScore(const ScorePlan& plan, StepResult* result) {
  const ScoreRequest& request = *plan.request;
  const int32_t num_rows = static_cast<int32_t>(request.token_ids.size());
  if (plan.first != (score_rows_.count(plan.handle) == 0)) return Fail("a score's `first` is wrong");
  int32_t& done = plan.draft_phase ? score_bases_[plan.handle] : score_rows_[plan.handle];
  const int32_t limit = plan.draft_phase ? num_rows - 1 : num_rows;
  if (plan.begin != done || plan.end <= plan.begin || plan.end > limit) return Fail("a score's rows are out of order");
  if (plan.draft_phase && (score_rows_[plan.handle] != num_rows || request.draft_depth == 0)) return Fail("draft phase too early");
  if ((plan.state_src < 0) != plan.first) return Fail("a score's state source is wrong");
  uint64_t prefix = 0;
  bool mixed = false;
  if (plan.draft_phase) {
    if (!ReadPrefix(plan.pages, num_rows, false, weight_epoch_, weight_epoch_, &prefix, &mixed)) return false;
    for (int32_t base = plan.begin; base < plan.end; ++base) {
      *At(&mtp_, plan.pages, base + 1) = Entry{.prefix = prefix, .token = 0, .position = base + 1, .certain = true, .epoch = weight_epoch_};
    }
  } else {
    if (!ReadPrefix(plan.pages, plan.begin, false, weight_epoch_, weight_epoch_, &prefix, &mixed)) return false;
    if (!plan.first && (states_[plan.state_src].num_tokens != plan.begin || states_[plan.state_src].prefix != prefix)) {
      return Fail("a score's state is another's");
    }
    for (int32_t position = plan.begin; position < plan.end; ++position) {
      const uint32_t token = request.token_ids[position];
      prefix = Extend(prefix, token);
      *At(&target_, plan.pages, position) =
          Entry{.prefix = prefix, .token = token, .position = position, .certain = true, .epoch = weight_epoch_};
    }
    states_[plan.state_dst] = State{.prefix = prefix, .num_tokens = plan.end, .window = {}};
  }
  done = plan.end;
  const bool last = score_rows_[plan.handle] == num_rows &&
                    (request.draft_depth == 0 || num_rows == 1 || score_bases_[plan.handle] == num_rows - 1);
  if (last != plan.last) return Fail("a score's `last` is wrong");
  if (last) {
    ScoreResult& score = result->finished_scores.emplace_back();
    for (int32_t position = 0; position < num_rows; ++position) {
      score.logprobs.push_back(static_cast<float>(At(&target_, plan.pages, position)->prefix % 4096));
    }
    score_rows_.erase(plan.handle);
    score_bases_.erase(plan.handle);
  }
  return true;
}

// A decode that ran ahead was enqueued when the pass before it had ended, with the weights of that time.
int64_t FakeExecutor::EpochOf(const SequencePlan& plan) const {
  const Stay& stay = stays_[plan.slot];
  const bool decode = plan.sample && plan.num_output > 0 && plan.known_tokens.size() == 1;
  const bool ahead = runs_ahead_ && decode && stay.ahead_epoch >= 0 && Mix(plan.residency, plan.num_computed) % 4 != 0;
  return ahead ? stay.ahead_epoch : weight_epoch_;
}

absl::Status FakeExecutor::SetWeights(const ModelWeights*, int64_t epoch) {
  if (epoch <= weight_epoch_) Fail(absl::StrCat("epoch ", epoch, " after ", weight_epoch_));
  if (!score_rows_.empty()) Fail("weights change under a score");
  weight_epoch_ = epoch;
  return absl::OkStatus();
}

absl::Status FakeExecutor::Quiesce() {
  std::fill(target_.begin(), target_.end(), Entry());
  std::fill(mtp_.begin(), mtp_.end(), Entry());
  std::fill(states_.begin(), states_.end(), State());
  std::fill(drafts_.begin(), drafts_.end(), Drafts());
  return absl::OkStatus();
}

absl::Status FakeExecutor::Execute(const StepPlan& plan, StepResult* result) {
  ++num_calls_;
  planned_ids_.clear();
  for (const SequencePlan& sequence : plan.sequences) planned_ids_.push_back(sequence.request->request_id);
  const auto violated = [this] { return absl::InternalError(absl::StrCat("violation: ", violation_)); };
  if (!fail_next_.ok()) return std::exchange(fail_next_, absl::OkStatus());
  for (const uint64_t handle : plan.dropped_score_handles) {
    if (score_rows_.erase(handle) == 0 && !Fail("an unknown score is dropped")) return violated();
    score_bases_.erase(handle);
  }
  std::set<int32_t> destinations;
  for (const PageCopy& copy : plan.page_copies) {
    if (copy.source == copy.destination || !destinations.insert(copy.destination).second || destinations.count(copy.source) > 0) {
      Fail("page copies collide");
      return violated();
    }
    const size_t size = static_cast<size_t>(options_.page_tokens);
    for (std::vector<Entry>* entries : {&target_, &mtp_}) {
      std::copy_n(entries->begin() + copy.source * size, size, entries->begin() + copy.destination * size);
    }
  }
  if (!CheckTogether(plan)) return violated();
  if (while_executing_ != nullptr) while_executing_();
  result->sequences.resize(plan.sequences.size());
  result->finished_scores.clear();
  for (const ScorePlan& score : plan.scores) {
    if (!RunScore(score, result)) return violated();
  }
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    if (!RunSequence(plan.sequences[i], &result->sequences[i])) return violated();
  }
  return absl::OkStatus();
}

}  // namespace bebop::sim
