/* What every process of the guest needs: last words, a clock, and a clean set of descriptors. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void die(const char *format, ...)
{
    char line[512] = "agent-runner guest: ";
    size_t used = strlen(line);
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    va_end(arguments);
    used = size < 0 ? used : used + (size_t)size < sizeof line - 1 ? used + (size_t)size : sizeof line - 2;
    line[used++] = '\n';
    if (write(2, line, used) < 0)
        _exit(2); /* Nobody listens. */
    _exit(1);
}

int64_t now_ms(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) < 0)
        die("clock_gettime: %s", strerror(errno));
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Close every descriptor from first on, now or when the process executes something. */
void close_from(int first, bool only_on_exec)
{
    struct rlimit limit;
    if (syscall(SYS_close_range, first, ~0u, only_on_exec ? 4 /* CLOSE_RANGE_CLOEXEC */ : 0) == 0)
        return;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        die("getrlimit: %s", strerror(errno));
    int end = limit.rlim_cur > 1048576 ? 1048576 : (int)limit.rlim_cur;
    for (int fd = first; fd < end; fd++) {
        if (only_on_exec)
            fcntl(fd, F_SETFD, FD_CLOEXEC); /* EBADF: not open. */
        else
            close(fd);
    }
}
