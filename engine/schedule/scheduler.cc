// SPDX-License-Identifier: Apache-2.0
#include "engine/schedule/scheduler.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/common/check.h"

namespace bebop {
namespace {

// Output values that a sample has memory for from its start; longer ones grow by doubling, the one allocation of a steady step.
constexpr int32_t kReservedOutput = 4096;
constexpr int32_t kWholeSequence = std::numeric_limits<int32_t>::max();

Rank RankOf(const ScoreWork& score) { return {score.priority, score.arrival, 0}; }

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      pages_(options.num_pages),
      state_slots_(options.num_state_slots),
      slots_(options.max_num_seqs),
      queue_(options.max_queued_requests, options.max_queued_bytes) {
  BEBOP_CHECK(options.max_num_seqs > 0 && options.page_tokens > 0 && options.max_step_tokens > 0);
  BEBOP_CHECK(options.prefill_cut_tokens > 0 && options.max_score_step_tokens >= options.prefill_cut_tokens);
  BEBOP_CHECK(options.prefill_cut_tokens == 1 || options.max_step_tokens >= options.max_num_seqs + options.prefill_cut_tokens);
  // Everything that a steady step appends to has its largest size from the start.
  const size_t num_seqs = static_cast<size_t>(options.max_num_seqs);
  running_.reserve(2 * num_seqs);
  ready_.reserve(num_seqs);
  planned_.reserve(num_seqs);
  page_copies_.reserve(num_seqs);
  token_arena_.reserve(static_cast<size_t>(options.max_step_tokens) + num_seqs);
}

absl::Status Scheduler::CheckRoom(const Group& group, bool* never) const {
  *never = true;
  const GenerateRequest& request = group.request;
  const int64_t positions =
      static_cast<int64_t>(request.prompt.size()) + request.stopping.max_new_tokens + group.num_draft_tokens;
  if (const int64_t needed = (positions + options_.page_tokens - 1) / options_.page_tokens; needed > options_.num_pages) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "request can never fit: prompt (", request.prompt.size(), ") + max_new_tokens (", request.stopping.max_new_tokens,
        ") + drafts (", group.num_draft_tokens, ") need ", needed, " KV pages of ", options_.page_tokens, " tokens, the pool has ",
        options_.num_pages));
  }
  if (options_.num_state_slots < 1) return absl::ResourceExhaustedError("request can never fit: the pool has 0 state slots");
  if (group.num_draft_tokens + 1 > options_.max_step_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat("request can never fit: 1 + num_draft_tokens (", group.num_draft_tokens,
                                                     ") exceeds max_step_tokens (", options_.max_step_tokens, ")"));
  }
  if (group.queued_bytes > queue_.max_bytes()) {
    return absl::ResourceExhaustedError(absl::StrCat("request can never fit: it has ", group.queued_bytes,
                                                     " bytes, the limit of queued bytes is ", queue_.max_bytes()));
  }
  *never = false;
  return queue_.CheckRoom(group.queued_bytes);
}

absl::Status Scheduler::CheckRoom(const ScoreWork& score, bool* never) const {
  *never = true;
  if (const int32_t needed = PagesFor(score.num_rows()); needed > options_.num_pages || options_.num_state_slots < 1) {
    return absl::ResourceExhaustedError(absl::StrCat("score can never fit: ", score.num_rows(), " tokens need ", needed,
                                                     " KV pages and 1 state slot, the pool has ", options_.num_pages, " and ",
                                                     options_.num_state_slots));
  }
  if (score.score_bytes > options_.max_score_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("score can never fit: it needs ", score.score_bytes,
                                                     " bytes of hidden states, the limit is ", options_.max_score_bytes));
  }
  if (score.queued_bytes > queue_.max_bytes()) {
    return absl::ResourceExhaustedError(absl::StrCat("score can never fit: it has ", score.queued_bytes,
                                                     " bytes, the limit of queued bytes is ", queue_.max_bytes()));
  }
  *never = false;
  return queue_.CheckRoom(score.queued_bytes);
}

void Scheduler::Add(Group* group) { queue_.Enter(group); }

void Scheduler::Add(ScoreWork* score) { queue_.Enter(score); }

void Scheduler::Remove(Group* group) {
  const auto release = [this](Sequence* sequence) {
    ReleaseMemory(sequence);
    ReleaseSlot(sequence);
    sequence->state = Sequence::State::kEnded;
  };
  for (Sequence& sample : group->samples) release(&sample);
  std::erase(ready_, &group->prefix);
  release(&group->prefix);
  group->num_waiting = group->num_fork_pending = 0;
  queue_.Leave(group);
  CompactRunning();
}

void Scheduler::Remove(ScoreWork* score) {
  if (score->running) {
    std::erase(running_scores_, score);
    ReleaseScore(score);
  }
  queue_.Leave(score);
}

void Scheduler::ReleaseScore(ScoreWork* score) {
  running_score_bytes_ -= score->score_bytes;
  state_slots_.Release(score->state_slot);
  for (const int32_t page : score->pages) pages_.Release(page);
  // The executor knows the handle once it has seen work of it, and forgets it by itself after the last.
  if (score->num_rows_done > 0 && !score->done()) dropped_scores_.push_back(score->handle);
  score->pages.clear();
  score->state_slot = -1;
  score->running = false;
}

void Scheduler::RestartScores() {
  for (ScoreWork* score : running_scores_) {
    ReleaseScore(score);
    if (score->num_rows_done > 0) ++score->num_restarts;
    score->num_rows_done = score->num_bases_done = 0;
    queue_.Return(score);
  }
  running_scores_.clear();
}

bool Scheduler::RestartedScoreRuns() const {
  return std::any_of(running_scores_.begin(), running_scores_.end(), [](const ScoreWork* score) { return score->num_restarts > 0; });
}

void Scheduler::End(Sequence* sample) {
  Group* const group = sample->group();
  if (sample->state == Sequence::State::kWaiting && --group->num_waiting == 0) queue_.Remove(group);
  if (std::exchange(sample->fork_pending, false)) --group->num_fork_pending;
  ReleaseMemory(sample);
  ReleaseSlot(sample);
  sample->state = Sequence::State::kEnded;
  // A prefix that is being computed for nobody any more.
  if (group->num_waiting == 0 && group->prefix.state == Sequence::State::kRunning) TakeBack(&group->prefix);
  ReleasePrefixIfUnneeded(group);
  CompactRunning();
}

void Scheduler::Recompute(Sequence* sample) {
  if (sample->num_computed() > 0 && !sample->fork_pending) {
    Preempt(sample);
  } else {
    TakeBack(sample);
  }
  CompactRunning();
}

void Scheduler::DropPrefixes() {
  for (Sequence* sequence : running_) {
    if (sequence->is_prefix() || sequence->fork_pending) TakeBack(sequence);
  }
  while (!ready_.empty()) TakeBack(ready_.back());
  CompactRunning();
}

// ---- Memory ----

bool Scheduler::HasFree(const Need& need) const {
  return pages_.num_free() >= need.pages && state_slots_.num_free() >= need.state_slots && slots_.num_free() >= need.slots;
}

bool Scheduler::MayTake(const Requester& requester, const Sequence& holder) const {
  const Rank rank = holder.rank();
  if (rank == requester.rank || &holder == requester.keep) return false;
  const Group& group = *holder.group();
  if (holder.is_prefix() && group.num_fork_pending > 0) return false;  // its state slot is still to be read
  if (group.paused) return true;
  if (requester.running) return rank > requester.rank;
  if (!requester.is_score && group.priority > requester.rank.priority) return true;
  return holder.state == Sequence::State::kReady && rank > requester.rank;
}

bool Scheduler::MakeRoom(const Requester& requester, const Need& need) {
  if (HasFree(need)) return true;
  const auto for_each_victim = [&](const auto& visit) {
    for (Sequence* sequence : running_) {
      if (sequence->state == Sequence::State::kRunning && MayTake(requester, *sequence)) visit(sequence);
    }
    for (Sequence* prefix : ready_) {
      if (MayTake(requester, *prefix)) visit(prefix);
    }
  };
  // Take from nobody when even everything would not do. (Shared pages are counted once a holder, so this is an upper bound.)
  Need most{pages_.num_free(), state_slots_.num_free(), slots_.num_free()};
  for_each_victim([&](Sequence* victim) {
    most.pages += static_cast<int32_t>(victim->pages.size());
    most.state_slots += victim->state_slot >= 0 ? 1 : 0;
    most.slots += victim->slot >= 0 ? 1 : 0;
  });
  if (most.pages < need.pages || most.state_slots < need.state_slots || most.slots < need.slots) return false;
  while (!HasFree(need)) {
    Sequence* last = nullptr;
    for_each_victim([&](Sequence* victim) {
      const auto order = [](const Sequence& s) { return std::make_pair(s.group()->paused, s.rank()); };
      if (last == nullptr || order(*victim) > order(*last)) last = victim;
    });
    if (last == nullptr) return false;
    Preempt(last);
  }
  return true;
}

void Scheduler::TakePages(int32_t count, std::vector<int32_t>* pages) {
  for (int32_t i = 0; i < count; ++i) {
    const int32_t page = pages_.Allocate();
    BEBOP_CHECK(page >= 0);
    pages->push_back(page);
  }
}

void Scheduler::ReleaseMemory(Sequence* sequence) {
  for (const int32_t page : sequence->pages) pages_.Release(page);
  sequence->pages.clear();
  if (sequence->state_slot >= 0) state_slots_.Release(std::exchange(sequence->state_slot, -1));
}

void Scheduler::ReleaseSlot(Sequence* sequence) {
  if (sequence->slot >= 0) slots_.Release(std::exchange(sequence->slot, -1));
}

void Scheduler::Preempt(Sequence* sequence) {
  if (!sequence->is_prefix()) {
    ++sequence->result.preemptions;
    ++num_preemptions_;
  }
  TakeBack(sequence);
}

// The same, but no preemption: nothing that the sample itself computed is lost.
void Scheduler::TakeBack(Sequence* sequence) {
  ReleaseMemory(sequence);
  ReleaseSlot(sequence);
  sequence->Reset();
  Group* const group = sequence->group();
  if (sequence->is_prefix()) {
    std::erase(ready_, sequence);
    sequence->state = Sequence::State::kIdle;
    return;
  }
  sequence->state = Sequence::State::kWaiting;
  ++group->num_waiting;
  if (std::exchange(sequence->fork_pending, false)) --group->num_fork_pending;
  queue_.Return(group);
}

bool Scheduler::MayStart(const Sequence& sample) const {
  return sample.state == Sequence::State::kWaiting && (!hold_samples_ || sample.has_begun());
}

// Samples that wait for nothing but room.
int32_t Scheduler::NumToStart(const Group& group) const {
  if (!hold_samples_) return group.num_waiting;
  return static_cast<int32_t>(std::count_if(group.samples.begin(), group.samples.end(), [this](const Sequence& s) { return MayStart(s); }));
}

// Also while its last ones are held: they would not free what others wait for.
void Scheduler::ReleasePrefixIfUnneeded(Group* group) {
  if (group->prefix.state != Sequence::State::kReady || group->num_fork_pending > 0 || NumToStart(*group) > 0) return;
  std::erase(ready_, &group->prefix);
  ReleaseMemory(&group->prefix);
  group->prefix.Reset();
  group->prefix.state = Sequence::State::kIdle;
}

void Scheduler::CompactRunning() {
  std::erase_if(running_, [](const Sequence* sequence) { return sequence->state != Sequence::State::kRunning; });
  const auto before = [](const Sequence* a, const Sequence* b) { return a->rank() < b->rank(); };
  if (!std::is_sorted(running_.begin(), running_.end(), before)) std::sort(running_.begin(), running_.end(), before);
  // What was preempted and started again in one step is in the list twice.
  running_.erase(std::unique(running_.begin(), running_.end()), running_.end());
}

// ---- Planning ----

void Scheduler::PlanNothing(StepPlan* plan) {
  plan->page_copies.clear();
  plan->scores.clear();
  plan->sequences.clear();
  plan->dropped_score_handles.clear();
  plan->dropped_score_handles.swap(dropped_scores_);
  planned_.clear();
  planned_scores_.clear();
}

void Scheduler::Plan(StepPlan* plan, std::vector<Work*>* admitted) {
  PlanNothing(plan);
  page_copies_.clear();
  token_arena_.clear();
  admitted->clear();

  GrowRunning();
  int32_t row_budget = options_.max_step_tokens;
  if (!running_scores_.empty() && score_steps_without_rows_ >= kScorePatience) {
    row_budget -= std::max(std::min((row_budget + 1) / 2, options_.max_score_step_tokens), options_.prefill_cut_tokens);
  }
  int32_t decode_rows = 0;
  for (const Sequence* sequence : running_) {
    if (!sequence->group()->paused && sequence->is_decoding()) decode_rows += 1 + sequence->num_drafts();
  }
  StartWaiting(row_budget - decode_rows, admitted);
  CompactRunning();
  plan->page_copies.assign(page_copies_.begin(), page_copies_.end());
  PlanSequences(row_budget, plan);
  PlanScores(options_.max_step_tokens, plan);
}

void Scheduler::GrowRunning() {
  for (Sequence* sequence : running_) {
    if (sequence->state != Sequence::State::kRunning || sequence->group()->paused) continue;
    const int32_t missing =
        PagesFor(sequence->NumPositions(options_.lookahead_tokens)) - static_cast<int32_t>(sequence->pages.size());
    if (missing <= 0) continue;
    const Requester requester{.rank = sequence->rank(), .running = true};
    if (MakeRoom(requester, Need{.pages = missing})) {
      TakePages(missing, &sequence->pages);
    } else {
      // Nobody behind it is left to take from: it is the last, and what it holds may be what somebody before it waits for.
      Preempt(sequence);
    }
  }
  CompactRunning();
}

void Scheduler::StartWaiting(int32_t row_budget, std::vector<Work*>* admitted) {
  const auto& order = queue_.order();
  bool groups_wait = false;  // for an executor slot or for rows: scores need neither
  for (auto it = order.begin(); it != order.end();) {
    Work* const work = *it++;  // starting takes out only `work` itself, and what is preempted comes in
    if (hold_requests_ && !work->admitted) continue;
    StartResult result = StartResult::kSkipped;
    bool holds = false;
    if (work->is_score) {
      if (!hold_samples_ && !hold_scores_) result = StartScore(static_cast<ScoreWork*>(work));
      holds = static_cast<ScoreWork*>(work)->running;
    } else if (!groups_wait && !work->paused) {
      Group* const group = static_cast<Group*>(work);
      const int32_t waiting = group->num_waiting;
      result = StartGroup(group, row_budget);
      holds = group->num_waiting < waiting || group->prefix.state != Sequence::State::kIdle;
    }
    if (holds && !work->admitted) {
      queue_.Admit(work);
      admitted->push_back(work);
    }
    if (result == StartResult::kNoMemory) return;
    if (result == StartResult::kNoSlot) groups_wait = true;
  }
}

Scheduler::StartResult Scheduler::StartGroup(Group* group, int32_t row_budget) {
  for (Sequence& sample : group->samples) {
    if (!MayStart(sample)) continue;
    if (group->prefix.state == Sequence::State::kRunning) return StartResult::kSkipped;
    // A step has rows for it only behind the prefills before it in order.
    int64_t rows_before = 0;
    for (const Sequence* sequence : running_) {
      if (sequence->state != Sequence::State::kRunning || sequence->group()->paused || sequence->is_decoding()) continue;
      if (sequence->rank() < sample.rank()) rows_before += sequence->NextPass(kWholeSequence).num_known;
    }
    if (rows_before >= row_budget) return StartResult::kNoSlot;

    StartResult result = StartResult::kStarted;
    if (group->prefix.state == Sequence::State::kReady) {
      result = ForkSample(&sample);
    } else if (NumToStart(*group) >= 2 && group->request.prompt.size() > 1) {
      return StartPrefix(group);
    } else {
      result = StartSample(&sample);
    }
    if (result != StartResult::kStarted) return result;
    if (--group->num_waiting == 0) {
      queue_.Remove(group);
      break;
    }
  }
  return StartResult::kStarted;
}

int32_t Scheduler::Headroom(const Requester& requester) const {
  int32_t headroom = 0;
  for (const Sequence* sequence : running_) {
    if (sequence->state == Sequence::State::kRunning && !MayTake(requester, *sequence)) ++headroom;
  }
  return headroom;
}

bool Scheduler::NothingRuns() const {
  return running_scores_.empty() && std::none_of(running_.begin(), running_.end(), [](const Sequence* sequence) {
           return sequence->state == Sequence::State::kRunning && !sequence->group()->paused;
         });
}

void Scheduler::Run(Sequence* sequence) {
  sequence->slot = slots_.Allocate();
  BEBOP_CHECK(sequence->slot >= 0);
  sequence->residency = ++last_residency_;
  sequence->state = Sequence::State::kRunning;
  running_.push_back(sequence);
}

Scheduler::StartResult Scheduler::StartSample(Sequence* sample) {
  const Requester requester{.rank = sample->rank()};
  const int32_t pages = PagesFor(sample->NumPositions(options_.lookahead_tokens));
  if (!MakeRoom(requester, Need{.pages = pages + Headroom(requester), .state_slots = 1, .slots = 1})) {
    return slots_.num_free() == 0 ? StartResult::kNoSlot : StartResult::kNoMemory;
  }
  Reserve(sample);
  TakePages(pages, &sample->pages);
  sample->state_slot = state_slots_.Allocate();
  Run(sample);
  return StartResult::kStarted;
}

Scheduler::StartResult Scheduler::StartPrefix(Group* group) {
  Sequence* const prefix = &group->prefix;
  // It is for the group's first waiting sample that it starts; its own rank is only for whoever takes from it.
  const Requester requester{.rank = prefix->rank()};
  const int32_t pages = PagesFor(prefix->NumPositions(options_.lookahead_tokens));
  if (!MakeRoom(requester, Need{.pages = pages + Headroom(requester), .state_slots = 1, .slots = 1})) {
    return slots_.num_free() == 0 ? StartResult::kNoSlot : StartResult::kNoMemory;
  }
  Reserve(prefix);
  TakePages(pages, &prefix->pages);
  prefix->state_slot = state_slots_.Allocate();
  group->prefix_forked = false;
  Run(prefix);
  return StartResult::kStarted;
}

Scheduler::StartResult Scheduler::ForkSample(Sequence* sample) {
  Group* const group = sample->group();
  Sequence* const prefix = &group->prefix;
  const int32_t num_shared_tokens = prefix->num_computed();
  const int32_t num_full_pages = num_shared_tokens / options_.page_tokens;
  const Requester requester{.rank = sample->rank(), .keep = prefix};
  sample->StartFrom(*prefix);
  const int32_t num_pages = PagesFor(sample->NumPositions(options_.lookahead_tokens));

  // In place of the prefix, with its pages and its slot. Not while a sibling has yet to read that slot.
  const auto take_over = [&] {
    const int32_t missing = std::max(0, num_pages - static_cast<int32_t>(prefix->pages.size()));
    if (!MakeRoom(requester, Need{.pages = missing, .slots = 1})) return false;
    std::erase(ready_, prefix);
    sample->pages.swap(prefix->pages);
    std::swap(sample->state_slot, prefix->state_slot);
    prefix->Reset();
    prefix->state = Sequence::State::kIdle;
    Reserve(sample);
    TakePages(missing, &sample->pages);
    return true;
  };
  const auto fork = [&] {
    const int32_t own = num_pages - num_full_pages;
    if (!MakeRoom(requester, Need{.pages = own + Headroom(requester), .state_slots = 1, .slots = 1})) return false;
    Reserve(sample);
    for (int32_t i = 0; i < num_full_pages; ++i) {
      pages_.AddReference(prefix->pages[i]);
      sample->pages.push_back(prefix->pages[i]);
    }
    TakePages(own, &sample->pages);
    if (static_cast<int32_t>(prefix->pages.size()) > num_full_pages) {
      page_copies_.push_back({.source = prefix->pages[num_full_pages], .destination = sample->pages[num_full_pages]});
    }
    sample->state_slot = state_slots_.Allocate();
    sample->fork_pending = true;
    ++group->num_fork_pending;
    return true;
  };

  const bool may_take_over = group->num_fork_pending == 0;
  const bool last = NumToStart(*group) == 1;
  bool started = may_take_over && last ? take_over() : fork();
  if (!started && may_take_over && !last && NothingRuns()) started = take_over();
  if (!started) {
    sample->Reset();
    return slots_.num_free() == 0 ? StartResult::kNoSlot : StartResult::kNoMemory;
  }
  if (!sample->resumed() && sample->result.preemptions == 0) sample->result.cached_tokens = group->prefix_forked ? num_shared_tokens : 0;
  group->prefix_forked = true;
  Run(sample);
  return StartResult::kStarted;
}

Scheduler::StartResult Scheduler::StartScore(ScoreWork* score) {
  // Waiting for the byte budget holds up nobody: only running scores can free it.
  if (running_score_bytes_ + score->score_bytes > options_.max_score_bytes) return StartResult::kSkipped;
  const Requester requester{.rank = RankOf(*score), .is_score = true};
  const int32_t pages = PagesFor(score->num_rows());
  if (!MakeRoom(requester, Need{.pages = pages + Headroom(requester), .state_slots = 1})) return StartResult::kNoMemory;
  TakePages(pages, &score->pages);
  score->state_slot = state_slots_.Allocate();
  score->running = true;
  running_score_bytes_ += score->score_bytes;
  const auto before = [](const ScoreWork* a, const ScoreWork* b) { return RankOf(*a) < RankOf(*b); };
  running_scores_.insert(std::upper_bound(running_scores_.begin(), running_scores_.end(), score, before), score);
  queue_.Remove(score);
  return StartResult::kStarted;
}

void Scheduler::Reserve(Sequence* sequence) {
  const Group& group = *sequence->group();
  const int32_t output = sequence->is_prefix() ? 0 : group.request.stopping.max_new_tokens;
  const int32_t tokens = static_cast<int32_t>(group.request.prompt.size()) + output + group.num_draft_tokens;
  sequence->pages.reserve(static_cast<size_t>(PagesFor(tokens)));
  if (sequence->is_prefix()) return;
  const size_t values = static_cast<size_t>(std::min(output, kReservedOutput));
  const OutputParams& wanted = group.request.output;
  SampleResult& result = sequence->result;
  result.token_ids.reserve(values);
  if (wanted.logprobs) result.logprobs.reserve(values);
  if (wanted.raw_logprobs) result.raw_logprobs.reserve(values);
  if (wanted.entropy) result.entropy.reserve(values);
  if (wanted.draft_logprobs) result.draft_logprobs.reserve(values);
  if (wanted.token_source) result.token_source.reserve(values);
}

void Scheduler::PlanSequences(int32_t row_budget, StepPlan* plan) {
  int32_t left = row_budget;
  // Decodes have the first claim on rows, though the executor gets prefills first.
  int32_t decode_rows = 0;
  for (const Sequence* sequence : running_) {
    if (sequence->group()->paused || !sequence->is_decoding()) continue;
    if (const int32_t rows = 1 + sequence->num_drafts(); decode_rows + rows <= row_budget) decode_rows += rows;
  }
  left -= decode_rows;
  for (Sequence* sequence : running_) {
    if (sequence->group()->paused || sequence->is_decoding() || left == 0) continue;
    const int32_t rows = PrefillRows(*sequence, left);
    if (rows == 0) continue;  // what a shorter prompt behind it may still use
    PlanOne(sequence, rows, plan);
    left -= planned_.back().pass.num_rows();
  }
  left = row_budget;
  for (Sequence* sequence : running_) {
    if (sequence->group()->paused || !sequence->is_decoding()) continue;
    if (const int32_t rows = 1 + sequence->num_drafts(); rows <= left) {
      PlanOne(sequence, 1, plan);
      left -= rows;
    }
  }
}

// How many of `room` rows a chunk takes, so that it ends at a multiple of prefill_cut_tokens unless it reaches the prompt's last token, which
// is computed apart from the others. 0: less than a piece, the sequence waits.
int32_t Scheduler::PrefillRows(const Sequence& sequence, int32_t room) const {
  const int32_t prompt_end = static_cast<int32_t>(sequence.group()->request.prompt.size()) - 1;
  const int32_t begin = sequence.num_computed();
  if (begin + room >= prompt_end) return room;
  return CutDown(begin + room) - begin;
}

void Scheduler::PlanOne(Sequence* sequence, int32_t max_known, StepPlan* plan) {
  const Pass pass = sequence->NextPass(max_known);
  const Group& group = *sequence->group();
  const int32_t num_next = pass.sample ? 0 : 1;
  BEBOP_CHECK(pass.num_known > 0);
  BEBOP_CHECK(token_arena_.size() + pass.num_known + num_next <= token_arena_.capacity());
  BEBOP_CHECK(PagesFor(pass.num_positions) <= static_cast<int32_t>(sequence->pages.size()));
  const size_t first = token_arena_.size();
  for (int32_t i = 0; i < pass.num_known + num_next; ++i) token_arena_.push_back(sequence->token(sequence->num_computed() + i));
  const uint32_t* const tokens = token_arena_.data() + first;

  SequencePlan& out = plan->sequences.emplace_back();
  out.slot = sequence->slot;
  out.residency = sequence->residency;
  out.known_tokens = {tokens, static_cast<size_t>(pass.num_known)};
  out.num_computed = sequence->num_computed();
  out.num_replay = sequence->num_replay();
  out.num_drafts = pass.num_drafts;
  out.sample = pass.sample;
  out.num_drafts_next = pass.num_drafts_next;
  out.next_known_token = {tokens + pass.num_known, static_cast<size_t>(num_next)};
  out.keep_mtp = group.num_draft_tokens > 0;
  out.pages = sequence->pages;
  out.state_dst = sequence->state_slot;
  out.state_src = sequence->fork_pending ? group.prefix.state_slot : sequence->num_computed() > 0 ? sequence->state_slot : -1;
  out.num_output = sequence->num_output();
  out.request = &group.request;
  out.seed = group.request.sampling.seed;
  out.sample_index = static_cast<uint32_t>(sequence->result.sample_index);
  out.banned_before_min = group.banned_before_min;
  out.stop_ids = group.rules.stop_ids();
  planned_.push_back({sequence, pass});
}

void Scheduler::PlanScores(int32_t row_budget, StepPlan* plan) {
  if (running_scores_.empty()) {
    score_steps_without_rows_ = 0;
    return;
  }
  int32_t left = row_budget;
  for (const Planned& planned : planned_) left -= planned.pass.num_rows();
  left = std::min(left, options_.max_score_step_tokens);
  for (ScoreWork* score : running_scores_) {
    if (left <= 0) break;
    const int32_t begin = score->num_rows_done, num_rows = score->num_rows();
    const int32_t end = left < num_rows - begin ? CutDown(begin + left) : num_rows;
    // Less than a piece. Those behind it wait, too: rows for them would reset the patience that brings it its own.
    if (begin < num_rows && end == begin) break;
    ScorePlan& out = plan->scores.emplace_back();
    planned_scores_.push_back(score);
    out.handle = score->handle;
    out.request = &score->request;
    out.pages = score->pages;
    out.first = score->num_rows_done == 0;
    out.state_src = out.first ? -1 : score->state_slot;
    out.state_dst = score->state_slot;
    if (begin < num_rows) {
      out.begin = begin;
      out.end = end;
      out.last = end == num_rows && score->num_bases() == 0;
      left -= out.end - out.begin;
    } else {
      // A base takes a row in each of draft_depth steps.
      out.draft_phase = true;
      out.begin = score->num_bases_done;
      out.end = out.begin + std::min(std::max(1, left / score->request.draft_depth), score->num_bases() - out.begin);
      out.last = out.end == score->num_bases();
      left -= (out.end - out.begin) * score->request.draft_depth;
    }
  }
  score_steps_without_rows_ = planned_scores_.empty() ? score_steps_without_rows_ + 1 : 0;
}

// ---- Applying ----

int64_t Scheduler::EarliestEpoch() const {
  int64_t earliest = std::numeric_limits<int64_t>::max();
  // A first pass runs under the weights of its time; later ones may have run ahead, though not of the pass before them.
  for (const Sequence* sequence : running_) {
    if (sequence->num_computed() > 0) earliest = std::min(earliest, sequence->weight_epoch());
  }
  return earliest;
}

void Scheduler::Apply(const StepPlan& plan, StepResult* result, const WeightEpochs& epochs, std::vector<Progress>* progress,
                      std::vector<FinishedScore>* finished) {
  progress->clear();
  finished->clear();
  BEBOP_CHECK(plan.sequences.size() == planned_.size() && result->sequences.size() == planned_.size());
  for (size_t i = 0; i < planned_.size(); ++i) {
    Sequence* const sequence = planned_[i].sequence;
    Group* const group = sequence->group();
    if (std::exchange(sequence->fork_pending, false)) --group->num_fork_pending;
    const int32_t begin = sequence->num_output();
    const int32_t recomputed = sequence->result.recomputed_tokens;
    SpecCounts spec;
    const FinishReason finish = sequence->Apply(planned_[i].pass, result->sequences[i], epochs, &spec);
    num_recomputed_tokens_ += sequence->result.recomputed_tokens - recomputed;
    if (finish != FinishReason::kNone) {
      ReleaseMemory(sequence);
      ReleaseSlot(sequence);
      sequence->state = Sequence::State::kEnded;
    } else if (sequence->is_prefix() && sequence->num_computed() == sequence->num_tokens()) {
      ReleaseSlot(sequence);
      sequence->state = Sequence::State::kReady;
      ready_.push_back(sequence);
    }
    if (!sequence->is_prefix()) progress->push_back({sequence, begin, finish, result->sequences[i].weight_epoch, spec});
    ReleasePrefixIfUnneeded(group);
  }
  CompactRunning();

  size_t num_finished = 0;
  for (size_t i = 0; i < planned_scores_.size(); ++i) {
    ScoreWork* const score = planned_scores_[i];
    const ScorePlan& done = plan.scores[i];
    (done.draft_phase ? score->num_bases_done : score->num_rows_done) = done.end;
    if (!done.last) continue;
    BEBOP_CHECK(num_finished < result->finished_scores.size());
    finished->push_back({score, &result->finished_scores[num_finished++]});
  }
  BEBOP_CHECK(num_finished == result->finished_scores.size());
}

// ---- Audit ----

absl::Status Scheduler::Audit(const std::vector<const Group*>& groups, const std::vector<const ScoreWork*>& scores) const {
  std::vector<int32_t> references(static_cast<size_t>(pages_.num_pages()), 0);
  std::vector<int32_t> state_holders(static_cast<size_t>(state_slots_.num_slots()), 0);
  std::vector<int32_t> slot_holders(static_cast<size_t>(slots_.num_slots()), 0);
  size_t num_running = 0, num_ready = 0, num_queued = 0, num_running_scores = 0;
  int32_t num_new = 0;
  int64_t new_bytes = 0, score_bytes = 0;
  const auto count = [&](const std::vector<int32_t>& pages, int32_t state_slot) {
    for (const int32_t page : pages) ++references.at(static_cast<size_t>(page));
    if (state_slot >= 0) ++state_holders.at(static_cast<size_t>(state_slot));
  };
  const auto count_new = [&](const Work& work) {
    if (work.admitted) return;
    ++num_new;
    new_bytes += work.queued_bytes;
  };
  for (const Group* group : groups) {
    count_new(*group);
    int32_t num_waiting = 0, num_fork_pending = 0, num_unfinished = 0;
    const auto visit = [&](const Sequence& sequence) {
      count(sequence.pages, sequence.state_slot);
      if (sequence.slot >= 0) ++slot_holders.at(static_cast<size_t>(sequence.slot));
      const bool running = sequence.state == Sequence::State::kRunning, ready = sequence.state == Sequence::State::kReady;
      num_running += running ? 1 : 0;
      num_ready += ready ? 1 : 0;
      num_fork_pending += sequence.fork_pending ? 1 : 0;
      return (sequence.slot >= 0) == running && (sequence.state_slot >= 0) == (running || ready) &&
             (!sequence.pages.empty() || !running) && (sequence.pages.empty() || running || ready);
    };
    for (const Sequence& sample : group->samples) {
      if (!visit(sample)) return absl::InternalError(absl::StrCat("sample ", sample.sample_index(), " holds what its state forbids"));
      num_waiting += sample.state == Sequence::State::kWaiting ? 1 : 0;
      num_unfinished += sample.state != Sequence::State::kEnded ? 1 : 0;
    }
    if (!visit(group->prefix)) return absl::InternalError("a shared prefix holds what its state forbids");
    if (num_waiting != group->num_waiting || num_fork_pending != group->num_fork_pending || num_unfinished != group->num_unfinished) {
      return absl::InternalError(absl::StrCat("group counts waiting ", group->num_waiting, ", recounted ", num_waiting, "; forking ",
                                              group->num_fork_pending, ", recounted ", num_fork_pending, "; unfinished ",
                                              group->num_unfinished, ", recounted ", num_unfinished));
    }
    if (group->prefix.state == Sequence::State::kReady && num_waiting == 0 && num_fork_pending == 0) {
      return absl::InternalError("a shared prefix is kept that no sample needs");
    }
    const bool queued = queue_.order().count(const_cast<Group*>(group)) > 0;
    if (queued != (num_waiting > 0)) return absl::InternalError("a group is queued without waiting samples, or the other way round");
    num_queued += queued ? 1 : 0;
  }
  for (const ScoreWork* score : scores) {
    count_new(*score);
    count(score->pages, score->state_slot);
    num_running_scores += score->running ? 1 : 0;
    score_bytes += score->running ? score->score_bytes : 0;
    num_queued += score->running ? 0 : 1;
  }
  for (int32_t page = 0; page < pages_.num_pages(); ++page) {
    if (references[page] != pages_.num_references(page)) {
      return absl::InternalError(absl::StrCat("page ", page, " has ", pages_.num_references(page), " references and ",
                                              references[page], " holders"));
    }
  }
  for (int32_t slot = 0; slot < state_slots_.num_slots(); ++slot) {
    if (state_holders[slot] != (state_slots_.in_use(slot) ? 1 : 0)) {
      return absl::InternalError(absl::StrCat("state slot ", slot, " has ", state_holders[slot], " holders"));
    }
  }
  for (int32_t slot = 0; slot < slots_.num_slots(); ++slot) {
    if (slot_holders[slot] != (slots_.in_use(slot) ? 1 : 0)) {
      return absl::InternalError(absl::StrCat("executor slot ", slot, " has ", slot_holders[slot], " holders"));
    }
  }
  if (num_running != running_.size() || num_ready != ready_.size() || num_queued != queue_.order().size() ||
      num_running_scores != running_scores_.size()) {
    return absl::InternalError(absl::StrCat("lists differ from states: running ", running_.size(), "/", num_running, ", ready ",
                                            ready_.size(), "/", num_ready, ", queued ", queue_.order().size(), "/", num_queued,
                                            ", scores ", running_scores_.size(), "/", num_running_scores));
  }
  if (num_new != queue_.num_requests() || new_bytes != queue_.num_bytes() || score_bytes != running_score_bytes_) {
    return absl::InternalError(absl::StrCat("budgets differ: queued ", queue_.num_requests(), "/", num_new, " requests, ",
                                            queue_.num_bytes(), "/", new_bytes, " bytes, scores ", running_score_bytes_, "/",
                                            score_bytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace bebop
