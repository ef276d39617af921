/*
 * Put the calling process, and all it will start, into a Landlock domain of its own.
 *
 * What a domain gives here: nobody inside can signal, or reach through an abstract socket, anybody outside it, and
 * nobody inside can trace anybody outside it. Where the host sent rules (shell.mode: closed), nobody inside can
 * execute, read or write a file that no rule grants either, whatever name or link leads to it: Landlock judges the
 * file that is opened, not the name it was called by.
 *
 * What Landlock does not see, others refuse: memfd_create and execveat are refused by the seccomp profile, and a file
 * that was written here can be mapped executable only where its mount has no noexec.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#define __NR_landlock_add_rule 445
#define __NR_landlock_restrict_self 446
#endif

/* Own copies: the headers of the build machine may be older than the kernel of the running one. */
#define CREATE_RULESET_VERSION 1u
#define SCOPE_ABSTRACT_UNIX_SOCKET 1ull
#define SCOPE_SIGNAL 2ull
#define FIRST_ABI_WITH_SCOPES 6u
#define FIRST_ABI_WITH_REFER 2u
#define FIRST_ABI_WITH_TRUNCATE 3u
#define FIRST_ABI_WITH_IOCTL_DEV 5u
#define RULE_PATH_BENEATH 1

#define FS_EXECUTE (1ull << 0)
#define FS_WRITE_FILE (1ull << 1)
#define FS_READ_FILE (1ull << 2)
#define FS_READ_DIR (1ull << 3)
#define FS_OF_ABI_1 ((1ull << 13) - 1) /* these four, REMOVE_* and MAKE_* */
#define FS_REFER (1ull << 13)
#define FS_TRUNCATE (1ull << 14)
#define FS_IOCTL_DEV (1ull << 15)
#define FS_OF_FILES (FS_EXECUTE | FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE | FS_IOCTL_DEV)

struct ruleset {
    uint64_t handled_access_fs, handled_access_net, scoped;
};

struct path_beneath {
    uint64_t allowed_access;
    int32_t parent_fd;
} __attribute__((packed));

uint32_t landlock_abi(void)
{
    long abi = syscall(__NR_landlock_create_ruleset, NULL, 0, CREATE_RULESET_VERSION);
    return abi < 0 ? 0 : (uint32_t)abi; /* The host decides whether none is good enough. */
}

bool landlock_can_scope(uint32_t abi)
{
    return abi >= FIRST_ABI_WITH_SCOPES;
}

static uint64_t scopes(uint32_t abi)
{
    return landlock_can_scope(abi) ? SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL : 0;
}

static int create_ruleset(const struct ruleset *ruleset)
{
    /* An older kernel takes a longer structure as long as what it does not know is zero. */
    return (int)syscall(__NR_landlock_create_ruleset, ruleset, sizeof *ruleset, 0); /* close-on-exec */
}

static void grant(int rules, const char *path, uint64_t access, uint64_t handled)
{
    /* The last part is not followed: the host resolved all links, in an image that nobody can have changed since. */
    int fd = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    struct stat stat;
    if (fd < 0 && errno == EACCES)
        return; /* A directory of somebody else's, closed to this user: to its commands too, whatever is granted. */
    if (fd < 0 || fstat(fd, &stat) < 0)
        die("cannot enforce shell.mode closed: no '%s' to grant: %s", path, strerror(errno));
    if (S_ISLNK(stat.st_mode))
        die("cannot enforce shell.mode closed: '%s' is a link here; index the image again", path);
    access &= handled & (S_ISDIR(stat.st_mode) ? ~0ull : FS_OF_FILES);
    struct path_beneath rule = {access, fd};
    if (syscall(__NR_landlock_add_rule, rules, RULE_PATH_BENEATH, &rule, 0) < 0)
        die("cannot enforce shell.mode closed: no Landlock rule for '%s': %s", path, strerror(errno));
    close(fd);
}

static void grant_each(int rules, const struct path_list *list, uint64_t access, uint64_t handled)
{
    for (uint32_t i = 0; i < list->count; i++)
        grant(rules, list->paths[i], access, handled);
}

int landlock_rules(uint32_t abi, const struct exec_rules *rules)
{
    /* Before REFER there is no rename or link across directories inside any domain: git and compilers need both. */
    if (abi < FIRST_ABI_WITH_REFER)
        die("cannot enforce shell.mode closed: Landlock ABI %u here, %u is needed (Linux 5.19 or newer, booted with "
            "lsm=landlock); use such a kernel, or shell.mode: open",
            abi, FIRST_ABI_WITH_REFER);
    uint64_t handled = FS_OF_ABI_1 | FS_REFER | (abi >= FIRST_ABI_WITH_TRUNCATE ? FS_TRUNCATE : 0)
                       | (abi >= FIRST_ABI_WITH_IOCTL_DEV ? FS_IOCTL_DEV : 0);
    struct ruleset ruleset = {.handled_access_fs = handled, .scoped = scopes(abi)};
    int fd = create_ruleset(&ruleset);
    if (fd < 0)
        die("cannot enforce shell.mode closed: no Landlock ruleset: %s", strerror(errno));
    /* Names are no secret, and searches list directories. REFER alone lets nothing be made or removed. */
    grant(fd, "/", FS_READ_DIR | FS_REFER, handled);
    grant_each(fd, &rules->readable, FS_READ_FILE | FS_READ_DIR, handled);
    grant_each(fd, &rules->writable, handled & ~FS_EXECUTE, handled);
    grant_each(fd, &rules->executable, FS_READ_FILE | FS_READ_DIR | FS_EXECUTE, handled);
    return fd;
}

int landlock_restrict(int rules)
{
    return (int)syscall(__NR_landlock_restrict_self, rules, 0);
}

int landlock_scope(uint32_t abi, bool is_outer)
{
    if (!landlock_can_scope(abi))
        return 0;
    /* A domain that judges files at all denies REFER in each of its layers that does not grant it, and so every
     * rename across directories: around a closed shell, the outer layer has to. */
    struct ruleset ruleset = {.handled_access_fs = is_outer ? FS_REFER : 0, .scoped = scopes(abi)};
    int fd = create_ruleset(&ruleset);
    if (fd < 0)
        return -1;
    if (is_outer)
        grant(fd, "/", FS_REFER, FS_REFER);
    int result = (int)syscall(__NR_landlock_restrict_self, fd, 0);
    int error = errno;
    close(fd);
    errno = error;
    return result;
}
