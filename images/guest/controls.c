/*
 * What is in force for a command, as the kernel inside says it: run as the first command of a container whose kernel
 * the host cannot ask (gVisor). A claim, made before any hostile code could have a hand in it.
 *
 * Three parts on stdout, each behind its name in brackets: the process's status and mounts as /proc has them, and what
 * three calls answer (0, or the errno).
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void write_all(const char *from, size_t size)
{
    for (ssize_t put; size > 0; from += put, size -= (size_t)put) {
        put = write(1, from, size);
        if (put < 0)
            die("cannot report: %s", strerror(errno));
    }
}

static void copy(const char *name, const char *path)
{
    char part[4096];
    ssize_t got;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die("cannot open %s: %s", path, strerror(errno));
    write_all(name, strlen(name));
    while ((got = read(fd, part, sizeof part)) > 0)
        write_all(part, (size_t)got);
    if (got < 0)
        die("cannot read %s: %s", path, strerror(errno));
    close(fd);
}

void report_controls(void)
{
    char calls[128];
    copy("[status]\n", "/proc/self/status");
    copy("[mounts]\n", "/proc/self/mountinfo");
    /* Moves nothing to a new namespace: without a filter it succeeds for anybody. */
    int unshare = syscall(SYS_unshare, 0) < 0 ? errno : 0;
    struct stat root; /* Old releases of gVisor refuse a flag that ls and stat always give. */
    int stat = fstatat(AT_FDCWD, "/", &root, AT_NO_AUTOMOUNT) < 0 ? errno : 0;
    int size = snprintf(calls, sizeof calls, "[calls]\nno_new_privs %d\nunshare %d\nstat %d\n",
                        prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), unshare, stat);
    write_all(calls, (size_t)size);
    _exit(0);
}
