// Preloaded into the processes of a run (LD_PRELOAD): calls on files fail once, where a plan says so.
//
// FAULTS/plan holds a file for each fault, with one line: ROLE CALL ERRNO SKIP PATTERN. A process of that role whose
// CALL (open, read, write, fsync, rename) is on a path that matches PATTERN (fnmatch) lets SKIP such calls pass, takes
// the file away, and fails with ERRNO; what was taken is appended to FAULTS/fired. Who comes second finds no file.
// Role: command (fp8slurm ...), rank or worker (a task, by its number and FAULTS_RANKS), or FAULTS_ROLE; none of these:
// nothing fails. The product knows nothing of this.
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Fault {
  std::string file, call, pattern, text;
  int error, skip;
};
std::vector<Fault> faults;
std::mutex guard;
thread_local bool inside = false;  // this library's own calls

std::string slurp(const char* path) {
  std::string text;
  char part[4096];
  int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return text;
  for (long n; (n = syscall(SYS_read, fd, part, sizeof part)) > 0;) text.append(part, n);
  syscall(SYS_close, fd);
  return text;
}

std::string role() {
  if (const char* set = getenv("FAULTS_ROLE")) return set;
  std::string command = slurp("/proc/self/cmdline");
  if (command.find("submitit.core._submit") != std::string::npos) {
    const char *index = getenv("SUBMITIT_LOCAL_GLOBALID"), *ranks = getenv("FAULTS_RANKS");
    return index && ranks && atoi(index) < atoi(ranks) ? "rank" : "worker";
  }
  return command.find("fp8slurm.cli") != std::string::npos ? "command" : "";
}

void read_plan() {
  inside = true;
  std::string mine = role(), folder = getenv("FAULTS") ? getenv("FAULTS") : "";
  DIR* plan = mine.empty() || folder.empty() ? nullptr : opendir((folder + "/plan").c_str());
  for (dirent* entry; plan && (entry = readdir(plan));) {
    if (entry->d_name[0] == '.') continue;
    Fault fault{folder + "/plan/" + entry->d_name, "", "", "", 0, 0};
    char who[32], call[32], pattern[512];
    fault.text = slurp(fault.file.c_str());
    if (sscanf(fault.text.c_str(), "%31s %31s %d %d %511s", who, call, &fault.error, &fault.skip, pattern) == 5 &&
        mine == who) {
      fault.call = call, fault.pattern = pattern;
      faults.push_back(fault);
    }
  }
  if (plan) closedir(plan);
  inside = false;
}

struct AtStart {
  AtStart() { read_plan(); }
} at_start;

// Whether this call fails; errno is set then.
bool fails(const char* call, const char* path) {
  if (faults.empty() || inside || !path) return false;
  std::lock_guard<std::mutex> lock(guard);
  for (size_t i = 0; i < faults.size(); i++) {
    Fault& fault = faults[i];
    if (fault.call != call || fnmatch(fault.pattern.c_str(), path, 0) || fault.skip-- > 0) continue;
    Fault taken = fault;
    faults.erase(faults.begin() + i);
    if (syscall(SYS_unlinkat, AT_FDCWD, taken.file.c_str(), 0)) return false;  // another process has met it
    std::string line = taken.text.substr(0, taken.text.find('\n')) + " " + path + "\n";
    std::string fired = taken.file.substr(0, taken.file.rfind("/plan/")) + "/fired";
    int fd = syscall(SYS_openat, AT_FDCWD, fired.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    syscall(SYS_write, fd, line.data(), line.size());
    syscall(SYS_close, fd);
    errno = taken.error;
    return true;
  }
  return false;
}

bool fails(const char* call, int fd) {
  if (faults.empty() || inside) return false;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  long n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  if (n <= 0) return false;
  path[n] = 0;
  return fails(call, path);
}

template <typename F>
F next(const char* name) { return reinterpret_cast<F>(dlsym(RTLD_NEXT, name)); }

}  // namespace

extern "C" {

#define OPEN(NAME)                                                              \
  int NAME(const char* path, int flags, ...) {                                  \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;   \
    va_end(more);                                                               \
    static auto real = next<int (*)(const char*, int, ...)>(#NAME);             \
    return fails("open", path) ? -1 : real(path, flags, mode);                  \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(NAME)                                                            \
  int NAME(int folder, const char* path, int flags, ...) {                      \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;   \
    va_end(more);                                                               \
    static auto real = next<int (*)(int, const char*, int, ...)>(#NAME);        \
    return fails("open", path) ? -1 : real(folder, path, flags, mode);          \
  }
OPENAT(openat)
OPENAT(openat64)

DIR* opendir(const char* path) {
  static auto real = next<DIR* (*)(const char*)>("opendir");
  return fails("open", path) ? nullptr : real(path);
}

ssize_t read(int fd, void* to, size_t bytes) {
  static auto real = next<ssize_t (*)(int, void*, size_t)>("read");
  return fails("read", fd) ? -1 : real(fd, to, bytes);
}

ssize_t write(int fd, const void* from, size_t bytes) {
  static auto real = next<ssize_t (*)(int, const void*, size_t)>("write");
  return fails("write", fd) ? -1 : real(fd, from, bytes);
}

int fsync(int fd) {
  static auto real = next<int (*)(int)>("fsync");
  return fails("fsync", fd) ? -1 : real(fd);
}

int rename(const char* from, const char* to) {
  static auto real = next<int (*)(const char*, const char*)>("rename");
  return fails("rename", to) ? -1 : real(from, to);
}

}
