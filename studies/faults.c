/* Preloaded (LD_PRELOAD) by studies/faults.py: fails, or ends the process at, the n-th change below a folder.

   Calls of the C library that change a file or a folder are counted where their path lies below the folder that
   faults_arm() was given. From the n-th on, they fail as a disk would:
     ENOSPC  what takes space fails from then on; the first write is done by half
     EIO     that one call fails
     EROFS   everything fails from then on, removals too
     SIGKILL half of a write is done, then the process is killed
   Every counted call is noted in a log that faults_arm() opens, so that a power loss can be played: what was written
   and not synced since. Other C libraries and direct system calls are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static size_t below_len;
static int log_fd = -1, fault;
static long at;
static atomic_long count;

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t raw_write(int fd, const void *data, size_t size) {
  static __typeof__(&write) real;
  if (!real) real = (__typeof__(&write))dlsym(RTLD_NEXT, "write");
  return real(fd, data, size);
}

void faults_arm(const char *folder, const char *log, int kind, long nth) {
  static __typeof__(&open) real;
  if (!real) real = (__typeof__(&open))dlsym(RTLD_NEXT, "open");
  snprintf(below, sizeof below, "%s/", folder);
  log_fd = real(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  fault = kind;
  at = nth;
  count = 0;
  below_len = strlen(below);
}

long faults_count(void) { return count; }

static int inside(const char *path) { return below_len && path && !strncmp(path, below, below_len); }

static int at_path(int dir, const char *path, char *out) {
  char base[PATH_MAX] = "";
  if (!below_len || !path) return 0;
  if (path[0] != '/') {
    char link[64];
    ssize_t got;
    if (dir == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
      if ((got = readlink(link, base, sizeof base - 1)) < 0) return 0;
      base[got] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
  } else if (snprintf(out, PATH_MAX, "%s", path) >= PATH_MAX) return 0;
  return inside(out);
}

static int at_fd(int fd, char *out) {
  char link[64];
  ssize_t got;
  if (!below_len || fd == log_fd) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if ((got = readlink(link, out, PATH_MAX - 1)) < 0) return 0;
  out[got] = 0;
  return inside(out);
}

static void note(char what, const char *path, const char *other) {
  char line[2 * PATH_MAX + 8];
  int size = snprintf(line, sizeof line, "%c\t%s\t%s\n", what, path, other);
  if (log_fd >= 0 && size > 0) (void)!raw_write(log_fd, line, (size_t)size);
}

/* Whether the call is to fail; `half` where it writes, so that the first one does a part of its work. */
static int fails(char what, const char *path, const char *other, int takes_space, int *half) {
  long number = ++count;
  int now = number == at, later = at && number > at;
  if (half) *half = 0;
  if (fault == SIGKILL + 1000 && now) {
    if (half) *half = 1;
    else { note('K', path, other); kill(getpid(), SIGKILL); }
    note(what, path, other);
    return half != NULL;
  }
  if ((fault == EIO && now) || (fault == EROFS && (now || later)) || (fault == ENOSPC && takes_space && (now || later))) {
    if (half && now && fault == ENOSPC) { *half = 1; note(what, path, other); }
    errno = fault;
    return 1;
  }
  note(what, path, other);
  return 0;
}

static void end_if_killed(void) {
  if (fault == SIGKILL + 1000) kill(getpid(), SIGKILL);
}

#define WRITES(name, params, call_all, call_half) \
  ssize_t name params { \
    REAL(name); \
    char path[PATH_MAX]; \
    int half; \
    if (!at_fd(fd, path) || !fails('W', path, "", 1, &half)) return call_all; \
    if (half) { ssize_t done = call_half; end_if_killed(); if (done > 0) return done; errno = fault; } \
    return -1; \
  }

WRITES(write, (int fd, const void *data, size_t size), real(fd, data, size), size > 1 ? real(fd, data, size / 2) : 0)
WRITES(pwrite, (int fd, const void *data, size_t size, off_t to), real(fd, data, size, to),
       size > 1 ? real(fd, data, size / 2, to) : 0)
WRITES(pwrite64, (int fd, const void *data, size_t size, off_t to), real(fd, data, size, to),
       size > 1 ? real(fd, data, size / 2, to) : 0)
WRITES(writev, (int fd, const struct iovec *parts, int many), real(fd, parts, many), many > 1 ? real(fd, parts, 1) : 0)
WRITES(sendfile, (int fd, int from, off_t *start, size_t size), real(fd, from, start, size),
       size > 1 ? real(fd, from, start, 64) : 0)
WRITES(sendfile64, (int fd, int from, off_t *start, size_t size), real(fd, from, start, size),
       size > 1 ? real(fd, from, start, 64) : 0)

ssize_t copy_file_range(int from, off_t *a, int fd, off_t *b, size_t size, unsigned flags) {
  REAL(copy_file_range);
  char path[PATH_MAX];
  if (at_fd(fd, path) && fails('W', path, "", 1, NULL)) return -1;
  return real(from, a, fd, b, size, flags);
}

#define ON_FD(name, what, space) \
  int name(int fd) { \
    REAL(name); \
    char path[PATH_MAX]; \
    if (at_fd(fd, path) && fails(what, path, "", space, NULL)) return -1; \
    return real(fd); \
  }
ON_FD(fsync, 'S', 1)
ON_FD(fdatasync, 'S', 1)

#define TRUNCATES(name) \
  int name(int fd, off_t size) { \
    REAL(name); \
    char path[PATH_MAX]; \
    if (at_fd(fd, path) && fails('W', path, "", 1, NULL)) return -1; \
    return real(fd, size); \
  }
TRUNCATES(ftruncate)
TRUNCATES(ftruncate64)

static int opens(int dir, const char *path, int flags) {
  char full[PATH_MAX];
  if (!(flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) || !at_path(dir, path, full)) return 0;
  return fails(flags & O_TRUNC ? 'W' : 'O', full, "", flags & O_CREAT, NULL);
}

#define OPENS(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    return opens(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
  }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
  int name(int dir, const char *path, int flags, ...) { \
    REAL(name); \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    return opens(dir, path, flags) ? -1 : real(dir, path, flags, mode); \
  }
OPENS_AT(openat)
OPENS_AT(openat64)

static int flags_of(const char *mode) {
  if (strchr(mode, 'w')) return O_CREAT | O_TRUNC | O_WRONLY;
  if (strchr(mode, 'a')) return O_CREAT | O_WRONLY;
  return strchr(mode, '+') ? O_RDWR : O_RDONLY;
}

#define FOPENS(name) \
  FILE *name(const char *path, const char *mode) { \
    REAL(name); \
    return opens(AT_FDCWD, path, flags_of(mode)) ? NULL : real(path, mode); \
  }
FOPENS(fopen)
FOPENS(fopen64)

#define ON_TWO(name, what, params, call, d1, p1, d2, p2) \
  int name params { \
    REAL(name); \
    char from[PATH_MAX], to[PATH_MAX]; \
    int a = at_path(d1, p1, from), b = at_path(d2, p2, to); \
    if ((a || b) && fails(what, from, to, 1, NULL)) return -1; \
    return call; \
  }
ON_TWO(rename, 'R', (const char *a1, const char *a2), real(a1, a2), AT_FDCWD, a1, AT_FDCWD, a2)
ON_TWO(renameat, 'R', (int e1, const char *a1, int e2, const char *a2), real(e1, a1, e2, a2), e1, a1, e2, a2)
ON_TWO(renameat2, 'R', (int e1, const char *a1, int e2, const char *a2, unsigned f), real(e1, a1, e2, a2, f), e1, a1, e2, a2)
ON_TWO(link, 'L', (const char *a1, const char *a2), real(a1, a2), AT_FDCWD, a1, AT_FDCWD, a2)
ON_TWO(linkat, 'L', (int e1, const char *a1, int e2, const char *a2, int f), real(e1, a1, e2, a2, f), e1, a1, e2, a2)

#define ON_PATH(name, what, space, params, call, dir, path) \
  int name params { \
    REAL(name); \
    char full[PATH_MAX]; \
    if (at_path(dir, path, full) && fails(what, full, "", space, NULL)) return -1; \
    return call; \
  }
ON_PATH(mkdir, 'M', 1, (const char *p, mode_t m), real(p, m), AT_FDCWD, p)
ON_PATH(mkdirat, 'M', 1, (int d, const char *p, mode_t m), real(d, p, m), d, p)
ON_PATH(rmdir, 'D', 0, (const char *p), real(p), AT_FDCWD, p)
ON_PATH(unlink, 'D', 0, (const char *p), real(p), AT_FDCWD, p)
ON_PATH(unlinkat, 'D', 0, (int d, const char *p, int f), real(d, p, f), d, p)
ON_PATH(chmod, 'C', 0, (const char *p, mode_t m), real(p, m), AT_FDCWD, p)
ON_PATH(fchmodat, 'C', 0, (int d, const char *p, mode_t m, int f), real(d, p, m, f), d, p)
ON_PATH(symlink, 'M', 1, (const char *t, const char *p), real(t, p), AT_FDCWD, p)
