/* Preloaded: lets the nth call that changes a file below a folder fail, or ends the process there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL, KILL_BEFORE, KILL_AFTER };
static char under[4096];
static long nth, seen;
static int action, number;

/* action: what happens at call `which` from now on, counted from 1; error: errno of FAIL. */
void faults_arm(const char *folder, long which, int what, int error) {
    snprintf(under, sizeof under, "%s", folder);
    nth = which;
    seen = 0;
    number = error;
    action = what;
}

long faults_seen(void) { return seen; }

static int is_below(const char *path) { return under[0] && strstr(path, under) == path; }

static int is_open_below(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* 1 if the call must fail. */
static int before(int counts) {
    if (!counts || !action || __sync_add_and_fetch(&seen, 1) != nth) return 0;
    if (action == KILL_BEFORE) kill(getpid(), SIGKILL);
    if (action == FAIL) errno = number;
    return action == FAIL;
}

static void after(int counts) {
    if (counts && action == KILL_AFTER && seen == nth) kill(getpid(), SIGKILL);
}

#define CALL(type, name, declared, passed, counted)                     \
    type name declared {                                                \
        static type (*real) declared;                                   \
        if (!real) real = dlsym(RTLD_NEXT, #name);                      \
        int counts = action ? (counted) : 0;                            \
        if (before(counts)) return -1;                                  \
        type done = real passed;                                        \
        int kept = errno;                                               \
        after(counts);                                                  \
        errno = kept;                                                   \
        return done;                                                    \
    }

CALL(ssize_t, write, (int d, const void *b, size_t n), (d, b, n), is_open_below(d))
CALL(ssize_t, writev, (int d, const struct iovec *v, int n), (d, v, n), is_open_below(d))
CALL(ssize_t, pwrite64, (int d, const void *b, size_t n, off64_t o), (d, b, n, o), is_open_below(d))
CALL(ssize_t, copy_file_range, (int d, off64_t *i, int e, off64_t *o, size_t n, unsigned f),
     (d, i, e, o, n, f), is_open_below(e))
CALL(ssize_t, sendfile64, (int e, int d, off64_t *o, size_t n), (e, d, o, n), is_open_below(e))
CALL(int, fsync, (int d), (d), is_open_below(d))
CALL(int, ftruncate64, (int d, off64_t n), (d, n), is_open_below(d))
CALL(int, fchmod, (int d, mode_t m), (d, m), is_open_below(d))
CALL(int, rename, (const char *a, const char *b), (a, b), is_below(b))
CALL(int, renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f),
     is_below(b))
CALL(int, mkdir, (const char *p, mode_t m), (p, m), is_below(p))
CALL(int, symlink, (const char *a, const char *b), (a, b), is_below(b))
CALL(int, unlink, (const char *p), (p), is_below(p))
CALL(int, rmdir, (const char *p), (p), is_below(p))

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        static int (*real)(const char *, int, ...);                     \
        if (!real) real = dlsym(RTLD_NEXT, #name);                      \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;       \
        va_end(rest);                                                   \
        int counts = action && flags & O_CREAT && is_below(path);       \
        if (before(counts)) return -1;                                  \
        int done = real(path, flags, mode);                             \
        int kept = errno;                                               \
        after(counts);                                                  \
        errno = kept;                                                   \
        return done;                                                    \
    }

OPEN(open)
OPEN(open64)
