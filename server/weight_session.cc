// SPDX-License-Identifier: Apache-2.0
#include "server/weight_session.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/base/status_reason.h"
#include "engine/formats/strings.h"
#include "kernels/common/check.h"
#include "server/limits.h"

namespace bebop {
namespace {

constexpr int64_t kTrackingBytes = 16 << 20;  // to keep track of what has come
// The clock may be another one than the system's, so its deadlines are looked at from time to time.
constexpr absl::Duration kLongestSleep = absl::Seconds(1);
constexpr absl::Duration kShortestSleep = absl::Milliseconds(1);
constexpr absl::Duration kLongestUpdate = absl::Seconds(limits::kWeightUpdateSeconds);
constexpr int kMaxCheckTries = 3;

absl::Status Precondition(absl::string_view reason, const std::string& message) {
  return StatusWithReason(absl::StatusCode::kFailedPrecondition, reason, message);
}

// The engine has room for a second copy if the setting is none or is enough for one (StagingBytes); else no update fits.
int64_t StagingLimit(int64_t setting, int64_t weight_bytes) {
  if (setting > 0 && setting < weight_bytes) return setting;
  return std::max(setting, weight_bytes) + kTrackingBytes;
}

std::string Label(const std::string& update_id) { return absl::StrCat("update ", Quoted(update_id)); }

// What a repeated Finish may be told.
absl::StatusOr<WeightSession::FinishResult> ForRepeat(const absl::StatusOr<WeightSession::FinishResult>& result, const ExpectedDigests& expected) {
  if (!result.ok()) return result;
  const WeightSession::Info& info = result->info;
  const auto check = [&info](const char* component, const std::optional<Sha256Digest>& wanted, const std::optional<Sha256Digest>& got) -> absl::Status {
    if (!wanted.has_value() || wanted == got) return absl::OkStatus();
    return StatusWithReason(absl::StatusCode::kAlreadyExists, "UPDATE_FINISHED",
                            absl::StrCat(Label(info.update_id), ": finished with ", component, " digest ", got.has_value() ? DigestHex(*got) : "of none",
                                         ", expected ", DigestHex(*wanted)));
  };
  BEBOP_RETURN_IF_ERROR(check("target", expected.target, info.version.target_digest));
  BEBOP_RETURN_IF_ERROR(check("draft", expected.draft, info.version.draft_digest));
  return result;
}

WeightVersion WithoutTensors(const WeightVersion& version) {
  WeightVersion result;
  result.target_step = version.target_step;
  result.draft_step = version.draft_step;
  result.label = version.label;
  result.target_digest = version.target_digest;
  result.draft_digest = version.draft_digest;
  return result;
}

}  // namespace

WeightSession::WeightSession(EngineInterface* engine, const Clock* clock, WeightSessionOptions options)
    : engine_(*engine),
      clock_(*clock),
      root_(std::move(options.root)),
      limit_bytes_(StagingLimit(options.staging_limit_bytes, engine->info().weight_bytes)),
      on_end_(std::move(options.on_end)),
      expiry_thread_([this] { WatchExpiry(); }) {}

WeightSession::~WeightSession() {
  {
    MutexLock lock(&mutex_);
    if (open_ != nullptr) End(open_, UpdateEnd::kAborted, "ended with the server", /*has_turn=*/false);
    stopping_ = true;
    expiry_changed_.NotifyAll();
  }
  expiry_thread_.join();
}

absl::StatusOr<WeightSession::State> WeightSession::Start(const StartRequest& request) {
  const std::string& id = request.spec.update_id;
  MutexLock lock(&mutex_);
  ExpireIfIdle();
  // One that is ending gives its memory back at once; one that starts is open in a moment.
  while (starting_ || (open_ != nullptr && open_->ended)) changed_.Wait(&mutex_);
  if (FindFinished(id) != nullptr) {
    return StatusWithReason(absl::StatusCode::kAlreadyExists, "UPDATE_FINISHED",
                            absl::StrCat(Label(id), ": has been swapped in already; another update needs another id"));
  }
  if (open_ != nullptr) {
    if (open_->request == request) {
      open_->last_call = clock_.Now();
      return open_->state;
    }
    if (open_->request.spec.update_id == id) {
      return StatusWithReason(absl::StatusCode::kAlreadyExists, "UPDATE_ID_REUSED",
                              absl::StrCat(Label(id), ": is open and was started otherwise; another update needs another id"));
    }
    return StatusWithReason(absl::StatusCode::kAborted, "UPDATE_IN_PROGRESS",
                            absl::StrCat(Label(id), ": ", Label(open_->request.spec.update_id), " is open; its last call was ",
                                         absl::FormatDuration(clock_.Now() - open_->last_call), " ago, and after ",
                                         absl::FormatDuration(open_->request.deadline), " it is forgotten"));
  }
  starting_ = true;
  mutex_.Unlock();
  absl::StatusOr<std::unique_ptr<WeightUpdate>> update = engine_.StartWeightUpdate(request.spec, limit_bytes_);
  mutex_.Lock();
  starting_ = false;
  changed_.NotifyAll();
  if (!update.ok()) return update.status();
  open_ = std::make_shared<Open>(request, clock_.Now());
  open_->update = *std::move(update);
  open_->state.update_id = id;
  open_->state.target_step = request.spec.target_step;
  open_->in_turn = true;
  EndTurn(*open_);
  expiry_changed_.NotifyAll();
  return open_->state;
}

absl::Status WeightSession::WriteChunk(const std::string& update_id, std::string_view tensor, int64_t offset, std::string_view bytes,
                                       const std::optional<Sha256Digest>& digest) {
  MutexLock lock(&mutex_);
  BEBOP_ASSIGN_OR_RETURN(const OpenPtr open, FindAndTakeTurn(update_id));
  mutex_.Unlock();
  const absl::Status status = open->update->WriteChunk(tensor, offset, bytes, digest);
  mutex_.Lock();
  EndTurn(*open);
  return status;
}

absl::Status WeightSession::WriteChunks(const std::string& update_id, const TensorChunk& first, const TensorChunk& second) {
  MutexLock lock(&mutex_);
  BEBOP_ASSIGN_OR_RETURN(const OpenPtr open, FindAndTakeTurn(update_id));
  mutex_.Unlock();
  const absl::Status status = open->update->WriteChunks(first, second);
  mutex_.Lock();
  EndTurn(*open);
  return status;
}

absl::Status WeightSession::Read(const std::string& update_id, const std::string& path, const std::atomic<bool>& cancelled) {
  if (!root_.has_value()) {
    return StatusWithReason(absl::StatusCode::kPermissionDenied, "NO_WEIGHTS_ROOT",
                            "path: this server reads no weights from files; it was started without --weights-root");
  }
  MutexLock lock(&mutex_);
  BEBOP_ASSIGN_OR_RETURN(const OpenPtr open, FindAndTakeTurn(update_id));
  bool has_turn = true;
  const auto between = [&]() -> absl::Status {
    if (cancelled) return absl::CancelledError("the call was cancelled, or its deadline passed");
    MutexLock turn_lock(&mutex_);
    EndTurn(*open);
    has_turn = TakeTurn(*open);
    return has_turn ? absl::OkStatus() : NotOpen(update_id);
  };
  mutex_.Unlock();
  const absl::Status status = ReadWeights(*root_, path, *open->update, between);
  mutex_.Lock();
  if (has_turn) EndTurn(*open);
  return status;
}

absl::StatusOr<WeightSession::State> WeightSession::Progress(const std::string& update_id) {
  MutexLock lock(&mutex_);
  ExpireIfIdle();
  BEBOP_ASSIGN_OR_RETURN(const OpenPtr open, Find(update_id));
  open->last_call = clock_.Now();
  return open->state;
}

void WeightSession::Finish(const std::string& update_id, const ExpectedDigests& expected, OnFinished done) {
  OpenPtr open;
  absl::StatusOr<FinishResult> result = absl::UnknownError("");
  {
    MutexLock lock(&mutex_);
    ExpireIfIdle();
    if (const FinishResult* before = FindFinished(update_id); before != nullptr) {
      result = ForRepeat(*before, expected);
    } else if (absl::StatusOr<OpenPtr> found = Find(update_id); !found.ok()) {
      result = found.status();
    } else if ((*found)->finishing) {
      (*found)->waiting.emplace_back(expected, std::move(done));
      return;
    } else {
      open = *std::move(found);
      open->finishing = true;
      BEBOP_CHECK(TakeTurn(*open));  // nothing but its Finish ends an update that is being finished
    }
  }
  if (open == nullptr) {
    done(result);
    return;
  }
  result = Swap(open, expected);
  std::vector<std::pair<ExpectedDigests, OnFinished>> waiting;
  {
    MutexLock lock(&mutex_);
    waiting.swap(open->waiting);
    if (result.ok()) {
      result->info.num_updates = ++num_updates_;
      finished_.push_back({update_id, *result});
      if (finished_.size() > kMaxFinished) finished_.pop_front();
      End(open, UpdateEnd::kCommitted, "was finished", /*has_turn=*/true);
    } else if (open->is_kept) {
      open->finishing = false;
      open->times = {};
      EndTurn(*open);
    } else {
      End(open, UpdateEnd::kFailed, absl::StrCat("ended when it was finished: ", result.status().message()), /*has_turn=*/true);
    }
  }
  done(result);
  for (const auto& [also_expected, also_done] : waiting) also_done(ForRepeat(result, also_expected));
}

absl::Status WeightSession::CheckSwappable(const Open& open) const {
  const EngineControl control = engine_.control();
  const std::string label = Label(open.request.spec.update_id);
  if (control.sleeping.weights) return Precondition("ASLEEP", absl::StrCat(label, ": the weights sleep; wake them up, then finish it"));
  if (open.request.in_flight == InFlight::kWait && control.paused && engine_.GetLoads().running_requests > 0) {
    return Precondition("PAUSED", absl::StrCat(label, ": waits for running samples (in_flight WAIT), which stand still while generation is paused; "
                                               "resume, then finish it"));
  }
  return absl::OkStatus();
}

absl::StatusOr<WeightSession::FinishResult> WeightSession::Swap(const OpenPtr& open, const ExpectedDigests& expected) {
  open->is_kept = true;
  BEBOP_RETURN_IF_ERROR(CheckSwappable(*open));
  FinishResult result;
  result.stage_time = clock_.Now() - open->started;
  open->times = {.stage = result.stage_time};
  absl::StatusOr<std::unique_ptr<ModelWeights>> weights = open->update->Finish(expected);
  open->times.check = clock_.Now() - open->started - result.stage_time;
  open->is_kept = !weights.ok() && StatusReason(weights.status()) == "INCOMPLETE";
  if (!weights.ok()) return weights.status();
  result.info.version = WithoutTensors((*weights)->version);
  result.info.update_id = open->request.spec.update_id;
  result.info.staging_limit_bytes = limit_bytes_;
  const absl::Time checked = clock_.Now();
  absl::StatusOr<CommitResult> commit = engine_.CommitWeights(*std::move(weights), open->request.in_flight, open->request.deadline);
  open->times.commit = clock_.Now() - checked;
  if (!commit.ok()) return commit.status();
  result.commit = *commit;
  return result;
}

absl::StatusOr<std::string> WeightSession::Abort(const std::string& update_id) {
  MutexLock lock(&mutex_);
  ExpireIfIdle();
  while (open_ != nullptr && open_->ended) changed_.Wait(&mutex_);
  if (open_ == nullptr || (!update_id.empty() && open_->request.spec.update_id != update_id)) return std::string();
  const std::string id = open_->request.spec.update_id;
  if (open_->finishing) {
    return Precondition("COMMITTING", absl::StrCat(Label(id), ": is being swapped in, or waits for running samples"));
  }
  End(open_, UpdateEnd::kAborted, "was aborted", /*has_turn=*/false);
  return id;
}

WeightSession::Info WeightSession::GetInfo(bool tensors) {
  MutexLock lock(&mutex_);
  ExpireIfIdle();
  // Under the lock, else a Finish in between would put a new update's id beside the version before it.
  WeightVersion version = engine_.weight_version();
  if (!tensors) version.tensors.clear();
  return MakeInfo(std::move(version));
}

absl::StatusOr<WeightSession::CheckResult> WeightSession::Check() {
  for (int i = 0; i < kMaxCheckTries; ++i) {
    // Held, so that no other weights can be at their address, and compared with their own version: digests alone would not tell a swap from damage.
    const std::shared_ptr<const ModelWeights> present = engine_.weights();
    CheckResult result;
    BEBOP_ASSIGN_OR_RETURN(result.now, engine_.RehashWeights());
    if (present == nullptr || engine_.weights() != present) continue;  // swapped meanwhile: perhaps the others were hashed
    result.target_matches = result.now.target_digest == present->version.target_digest;
    result.draft_matches = result.now.draft_digest == present->version.draft_digest;
    result.now.tensors.clear();
    return result;
  }
  return StatusWithReason(absl::StatusCode::kUnavailable, "WEIGHTS_CHANGED",
                          absl::StrCat("new weights came ", kMaxCheckTries, " times while the resident ones were hashed; ask again"));
}

absl::StatusOr<WeightSession::OpenPtr> WeightSession::Find(const std::string& update_id) {
  if (open_ == nullptr || open_->ended || open_->request.spec.update_id != update_id) return NotOpen(update_id);
  return open_;
}

absl::Status WeightSession::NotOpen(const std::string& update_id) const {
  std::string message = absl::StrCat(Label(update_id), ": is not open");
  if (FindFinished(update_id) != nullptr) {
    absl::StrAppend(&message, "; it was finished");
  } else if (update_id == last_ended_id_) {
    absl::StrAppend(&message, "; it ", last_ended_why_);
  } else if (open_ != nullptr) {
    absl::StrAppend(&message, ", ", Label(open_->request.spec.update_id), " is");
  }
  return Precondition("NO_UPDATE", message);
}

const WeightSession::FinishResult* WeightSession::FindFinished(const std::string& update_id) const {
  const auto found = std::find_if(finished_.begin(), finished_.end(), [&](const Finished& entry) { return entry.update_id == update_id; });
  return found == finished_.end() ? nullptr : &found->result;
}

bool WeightSession::TakeTurn(Open& open) {
  open.last_call = clock_.Now();
  const uint64_t turn = open.next_turn++;
  while (!open.ended && (open.in_turn || open.turn != turn)) changed_.Wait(&mutex_);
  if (open.ended) return false;
  open.in_turn = true;
  ++open.turn;
  return true;
}

void WeightSession::EndTurn(Open& open) {
  open.last_call = clock_.Now();
  open.state.progress = open.update->Progress(limits::kMissingTensors);
  open.staging_bytes = open.update->staging_bytes();
  open.in_turn = false;
  changed_.NotifyAll();
}

absl::StatusOr<WeightSession::OpenPtr> WeightSession::FindAndTakeTurn(const std::string& update_id) {
  ExpireIfIdle();
  BEBOP_ASSIGN_OR_RETURN(const OpenPtr open, Find(update_id));
  if (open->finishing) return Precondition("COMMITTING", absl::StrCat(Label(update_id), ": is being finished"));
  if (!TakeTurn(*open)) return NotOpen(update_id);
  return open;
}

void WeightSession::End(const OpenPtr& open, UpdateEnd how, const std::string& why, bool has_turn) {
  const OpenPtr keep = open;  // `open` may be open_ itself
  keep->ended = true;
  last_ended_id_ = keep->request.spec.update_id;
  last_ended_why_ = why;  // now: those who waited for a turn ask before the end of this one
  changed_.NotifyAll();
  if (!has_turn) {
    while (keep->in_turn) changed_.Wait(&mutex_);
  }
  if (on_end_ != nullptr) {
    if (keep->times.stage == absl::ZeroDuration()) keep->times.stage = clock_.Now() - keep->started;
    on_end_(how, keep->times);
  }
  mutex_.Unlock();
  keep->update.reset();  // gives much memory back
  mutex_.Lock();
  keep->in_turn = false;
  open_ = nullptr;
  changed_.NotifyAll();
}

absl::Time WeightSession::ExpiryTime() const { return std::min(open_->last_call + open_->request.deadline, open_->started + kLongestUpdate); }

bool WeightSession::IsBusy() const { return open_->ended || open_->finishing || open_->in_turn || open_->turn != open_->next_turn; }

void WeightSession::ExpireIfIdle() {
  if (open_ == nullptr || IsBusy() || clock_.Now() < ExpiryTime()) return;
  const bool is_long = clock_.Now() < open_->last_call + open_->request.deadline;
  End(open_, UpdateEnd::kExpired,
      is_long ? absl::StrCat("was forgotten ", absl::FormatDuration(kLongestUpdate), " after its start, the longest that an update may take")
              : absl::StrCat("was forgotten after ", absl::FormatDuration(open_->request.deadline), " without a call (deadline_ms)"),
      /*has_turn=*/false);
}

WeightSession::Info WeightSession::MakeInfo(WeightVersion version) const {
  Info info;
  info.version = std::move(version);
  if (!finished_.empty()) info.update_id = finished_.back().update_id;
  info.num_updates = num_updates_;
  info.staging_limit_bytes = limit_bytes_;
  if (open_ != nullptr) {
    info.open = open_->state;
    info.staging_bytes = open_->staging_bytes;
  }
  return info;
}

void WeightSession::WatchExpiry() {
  MutexLock lock(&mutex_);
  while (!stopping_) {
    ExpireIfIdle();
    if (stopping_) return;
    if (open_ == nullptr) {
      expiry_changed_.Wait(&mutex_);
      continue;
    }
    const absl::Duration left = IsBusy() ? kLongestSleep : ExpiryTime() - clock_.Now();
    expiry_changed_.WaitFor(&mutex_, absl::ToChronoNanoseconds(std::clamp(left, kShortestSleep, kLongestSleep)));
  }
}

}  // namespace bebop
