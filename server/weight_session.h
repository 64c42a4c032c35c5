// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "engine/runtime/engine_interface.h"
#include "engine/weights/weight_files.h"
#include "engine/weights/weight_update.h"
#include "server/update_end.h"

namespace bebop {

struct WeightSessionOptions {
  // What the staged copy may take, beside 16 MiB to keep track of what has come. 0: as much as the weights themselves; less than that: no update fits.
  int64_t staging_limit_bytes = 0;
  std::optional<WeightRoot> root;  // none: no update is read from files
  // Told once of every update's end, under the session's lock: must return at once. May be empty.
  std::function<void(UpdateEnd, const UpdateTimes&)> on_end;
};

// The one weight update that a server may have open: from Start through chunks, or files, to Finish, Abort or its expiry. At most one
// exists, for at most limits::kWeightUpdateSeconds; whatever ends it gives its memory back before the next can start. Ids of finished updates are not taken again (the last 64 are known).
//
// Thread safe. Calls that use the staged copy take turns in the order in which they came; a file is read in turns of 4 MiB. Start, WriteChunk,
// Read and Finish may block for as long as the turns before them, Finish also for the swap; Abort, Progress and GetInfo never wait for a swap.
//
// Errors have reasons (status_reason.h), in brackets here and in weights.proto. Every call about an update that is not open is
// FAILED_PRECONDITION [NO_UPDATE] and says what became of it, if it was the last one.
class WeightSession {
 public:
  // What Start is asked for. Equality tells a repeated one from another.
  struct StartRequest {
    WeightUpdateSpec spec;
    InFlight in_flight = InFlight::kKeep;
    absl::Duration deadline = absl::Minutes(10);  // without a call; also the longest wait of a swap
    bool operator==(const StartRequest&) const = default;
  };

  struct State {
    std::string update_id;
    int64_t target_step = 0;
    WeightUpdateProgress progress;
  };

  // Without the open update and without tensors.
  struct Info {
    WeightVersion version;  // its `tensors` empty unless asked for
    std::string update_id;  // of the last one that was finished
    int64_t num_updates = 0, staging_bytes = 0, staging_limit_bytes = 0;
    std::optional<State> open;
  };

  struct FinishResult {
    Info info;  // right after the swap
    absl::Duration stage_time;  // from Start to Finish
    CommitResult commit;
  };
  using OnFinished = std::function<void(const absl::StatusOr<FinishResult>&)>;

  struct CheckResult {
    bool target_matches = false, draft_matches = false;
    WeightVersion now;
  };

  // `engine` and `clock` must outlive the session, and the engine must run or have ended when the session is destroyed.
  WeightSession(EngineInterface* engine, const Clock* clock, WeightSessionOptions options);
  // Ends what is open. REQUIRES: no call is in progress.
  ~WeightSession();
  WeightSession(const WeightSession&) = delete;
  WeightSession& operator=(const WeightSession&) = delete;

  // Opens an update, or returns the open one if it is the same. ALREADY_EXISTS [UPDATE_ID_REUSED]: open, but not the same;
  // ALREADY_EXISTS [UPDATE_FINISHED]: that one has been swapped in; ABORTED [UPDATE_IN_PROGRESS]: another one is open. Otherwise as
  // EngineInterface::StartWeightUpdate.
  absl::StatusOr<State> Start(const StartRequest& request);

  // As WeightUpdate::WriteChunk. FAILED_PRECONDITION [COMMITTING]: it is being finished.
  absl::Status WriteChunk(const std::string& update_id, std::string_view tensor, int64_t offset, std::string_view bytes,
                          const std::optional<Sha256Digest>& digest);
  // As WeightUpdate::WriteChunks, in one turn.
  absl::Status WriteChunks(const std::string& update_id, const TensorChunk& first, const TensorChunk& second);
  // As ReadWeights, beneath the root. Stops as CANCELLED soon after `cancelled` becomes true. PERMISSION_DENIED [NO_WEIGHTS_ROOT].
  absl::Status Read(const std::string& update_id, const std::string& path, const std::atomic<bool>& cancelled);
  // Where the update stands; keeps it from expiring.
  absl::StatusOr<State> Progress(const std::string& update_id);

  // Checks that everything came and swaps it in. `done` is called once, by this thread before Finish returns, or, if a Finish of that update is
  // under way, by its thread with the same result. Of an update that was finished before, the result is the one from then; ALREADY_EXISTS
  // [UPDATE_FINISHED] if it did not have the digests that are expected now. FAILED_PRECONDITION [INCOMPLETE], [ASLEEP] (the weights sleep) and [PAUSED]
  // (kWait: it would wait for samples that stand still) leave the update open; after every other error, and after these two if the engine was put to
  // sleep or paused only while the update was being checked, it is gone.
  void Finish(const std::string& update_id, const ExpectedDigests& expected, OnFinished done);

  // Forgets the update (empty: whichever is open) and returns its id; empty if there was nothing to forget. FAILED_PRECONDITION [COMMITTING].
  absl::StatusOr<std::string> Abort(const std::string& update_id);

  // Never counts as a call of the open update: whoever watches does not keep it alive.
  Info GetInfo(bool tensors);
  // Hashes what is resident and compares with what that claims to be. UNAVAILABLE [WEIGHTS_CHANGED]: updates came faster.
  absl::StatusOr<CheckResult> Check();

  static constexpr size_t kMaxFinished = 64;  // results that are kept

 private:
  // Members without a guard belong to whoever has the turn, or never change.
  struct Open {
    Open(const StartRequest& start_request, absl::Time now) : request(start_request), started(now), last_call(now) {}
    const StartRequest request;
    const absl::Time started;
    std::unique_ptr<WeightUpdate> update;
    UpdateTimes times;     // as far as a Finish has come
    bool is_kept = false;  // whether an error of this Finish leaves the update open
    // The session's mutex guards the rest.
    absl::Time last_call;
    State state;  // as after the last turn
    int64_t staging_bytes = 0;
    bool finishing = false;
    bool ended = false;    // no turn is given any more
    bool in_turn = false;  // somebody has it
    uint64_t next_turn = 0, turn = 0;
    std::vector<std::pair<ExpectedDigests, OnFinished>> waiting;  // for the Finish under way
  };
  using OpenPtr = std::shared_ptr<Open>;
  struct Finished {
    std::string update_id;
    FinishResult result;
  };

  absl::StatusOr<OpenPtr> Find(const std::string& update_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status NotOpen(const std::string& update_id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const FinishResult* FindFinished(const std::string& update_id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Waits for a turn with `open`'s update; false if it ended first.
  bool TakeTurn(Open& open) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Notes where the update stands.
  void EndTurn(Open& open) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<OpenPtr> FindAndTakeTurn(const std::string& update_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ends the update: waits for the turn under way, unless the caller has it, and gives all memory back. `why` completes "update X ...".
  void End(const OpenPtr& open, UpdateEnd how, const std::string& why, bool has_turn) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether the open update is in use, so that it cannot expire now.
  bool IsBusy() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Time ExpiryTime() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ExpireIfIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Whether the engine would take the weights now; asked before they are made, since that uses the staged copy up.
  absl::Status CheckSwappable(const Open& open) const ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<FinishResult> Swap(const OpenPtr& open, const ExpectedDigests& expected) ABSL_LOCKS_EXCLUDED(mutex_);
  Info MakeInfo(WeightVersion version) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WatchExpiry();

  EngineInterface& engine_;
  const Clock& clock_;
  const std::optional<WeightRoot> root_;
  const int64_t limit_bytes_;
  const std::function<void(UpdateEnd, const UpdateTimes&)> on_end_;

  Mutex mutex_;
  CondVar changed_, expiry_changed_;
  OpenPtr open_ ABSL_GUARDED_BY(mutex_);  // null: none
  bool starting_ ABSL_GUARDED_BY(mutex_) = false;  // a Start is with the engine
  std::string last_ended_id_ ABSL_GUARDED_BY(mutex_), last_ended_why_ ABSL_GUARDED_BY(mutex_);
  std::deque<Finished> finished_ ABSL_GUARDED_BY(mutex_);  // oldest first
  int64_t num_updates_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread expiry_thread_;
};

}  // namespace bebop
