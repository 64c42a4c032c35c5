// SPDX-License-Identifier: Apache-2.0
#include "engine/training/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "engine/formats/strings.h"

namespace bebop {

absl::StatusOr<RunLock> RunLock::Acquire(const std::string& path) {
  // One file has many names; "folder/" and a link to it are the folder.
  std::error_code error;
  std::filesystem::path name = std::filesystem::weakly_canonical(path, error);
  if (error) return absl::ErrnoToStatus(error.value(), path);
  if (!name.has_filename()) name = name.parent_path();
  RunLock lock;
  lock.lock_path_ = name.string() + ".lock";
  while (true) {
    lock.descriptor_ = Descriptor(open(lock.lock_path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    if (!lock.descriptor_.valid()) return absl::ErrnoToStatus(errno, StrCat(path, ": cannot make ", lock.lock_path_));
    if (flock(lock.descriptor_.value(), LOCK_EX | LOCK_NB) != 0) {
      const int failure = errno;
      lock.descriptor_ = Descriptor();
      if (failure != EWOULDBLOCK) return absl::ErrnoToStatus(failure, StrCat(path, ": cannot lock ", lock.lock_path_));
      return absl::FailedPreconditionError(StrCat(path, ": another run uses it (it holds ", lock.lock_path_, ")"));
    }
    // The last owner may have removed the file between the two calls: then this is a lock that nobody else will see.
    struct stat ours, named;
    if (fstat(lock.descriptor_.value(), &ours) == 0 && stat(lock.lock_path_.c_str(), &named) == 0 &&
        ours.st_dev == named.st_dev && ours.st_ino == named.st_ino) {
      return lock;
    }
  }
}

RunLock::~RunLock() {
  if (!descriptor_.valid()) return;
  struct stat info;
  // Something in it is somebody's file that happens to have this name.
  if (fstat(descriptor_.value(), &info) == 0 && info.st_size == 0) unlink(lock_path_.c_str());
}

RunLock& RunLock::operator=(RunLock&& other) noexcept {
  std::swap(lock_path_, other.lock_path_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

}  // namespace bebop
