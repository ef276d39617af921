/*
 * Put the calling process, and all it will start, into a Landlock domain of its own.
 *
 * What a domain gives here: nobody inside can signal, or reach through an abstract socket, anybody outside it, and
 * nobody inside can trace anybody outside it. Files are not restricted here yet; handled_access_fs and the rules
 * belong between create and restrict.
 */
#include "guest.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#define __NR_landlock_restrict_self 446
#endif

/* Own copies: the headers of the build machine may be older than the kernel of the running one. */
#define CREATE_RULESET_VERSION 1u
#define SCOPE_ABSTRACT_UNIX_SOCKET 1ull
#define SCOPE_SIGNAL 2ull
#define FIRST_ABI_WITH_SCOPES 6u

struct ruleset {
    uint64_t handled_access_fs, handled_access_net, scoped;
};

uint32_t landlock_abi(void)
{
    long abi = syscall(__NR_landlock_create_ruleset, NULL, 0, CREATE_RULESET_VERSION);
    return abi < 0 ? 0 : (uint32_t)abi; /* The host decides whether none is good enough. */
}

bool landlock_can_scope(uint32_t abi)
{
    return abi >= FIRST_ABI_WITH_SCOPES;
}

int landlock_scope(uint32_t abi)
{
    if (!landlock_can_scope(abi))
        return 0;
    struct ruleset ruleset = {.scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL};
    int fd = (int)syscall(__NR_landlock_create_ruleset, &ruleset, sizeof ruleset, 0);
    if (fd < 0)
        return -1;
    int result = (int)syscall(__NR_landlock_restrict_self, fd, 0);
    int error = errno;
    close(fd);
    errno = error;
    return result;
}
