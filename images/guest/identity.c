/*
 * Two users instead of one, where the kernel cannot keep a command from its guest otherwise (gVisor).
 *
 * Linux protects PID 1 from the commands by three things: signals without a handler do not reach it, what is not
 * dumpable has its /proc files owned by root, and Landlock scopes signals. gVisor has none of them: there a process of
 * the same user could kill PID 1, or open the channel to the host through /proc/1/fd and write answers of its own.
 * So PID 1, the keepers and the relay run as a user of their own; commands and file workers as the sandbox's user.
 *
 * It takes root and four capabilities, of gVisor's own kernel, for the first instructions of PID 1. What stays is
 * KILL, SETUID and SETGID, in PID 1 and the keepers; the bounding set is empty, so nothing executed gains any.
 */
#include "guest.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OWN_USER 64999u
#define KEPT (1u << CAP_KILL | 1u << CAP_SETUID | 1u << CAP_SETGID)

static void hold_capabilities(uint32_t held)
{
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2] = {{held, held, 0}, {0, 0, 0}};
    if (syscall(SYS_capset, &head, sets) < 0)
        die("cannot set capabilities: %s", strerror(errno));
}

static uint32_t number(const char *text)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno || *end || end == text || value < 1 || value > 0x7fffffff)
        die("'%s' is no user, group or number of processes for commands", text);
    return (uint32_t)value;
}

/* In PID 1, started as root: become the guest's own user, keeping what it takes to start and kill commands as another.
 * The arguments: user, group and most processes of commands. */
void separate_from_commands(struct guest *guest, char *const *arguments)
{
    guest->uid = number(arguments[0]);
    guest->gid = number(arguments[1]);
    guest->processes = number(arguments[2]);
    uid_t own = guest->uid == OWN_USER ? OWN_USER - 1 : OWN_USER;
    if (geteuid() != 0)
        die("must be started as root to give commands a user of their own");
    for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
            die("cannot empty the bounding set: %s", strerror(errno));
    if (setgroups(0, NULL) < 0 || prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0 || setresgid(own, own, own) < 0
        || setresuid(own, own, own) < 0)
        die("cannot become user %u: %s", (unsigned)own, strerror(errno));
    hold_capabilities(KEPT);
    guest->is_separate = true;
}

/* What a keeper makes for its command (pipes) or opens for it (the working directory) is the command's. Between the
 * two calls nothing can take the keeper for its own: signals are judged by its real and saved user. */
void act_as_command(const struct guest *guest, bool is_begun)
{
    if (!guest->is_separate)
        return;
    uid_t uid, gid, none;
    if (getresuid(&uid, &none, &none) < 0 || getresgid(&gid, &none, &none) < 0
        || setresgid((gid_t)-1, is_begun ? guest->gid : gid, (gid_t)-1) < 0
        || setresuid((uid_t)-1, is_begun ? guest->uid : uid, (uid_t)-1) < 0)
        die("cannot change user: %s", strerror(errno));
}

/* For good: the sandbox's user, with no capability. False with errno when it cannot be. */
bool become_user(const struct guest *guest)
{
    if (!guest->is_separate)
        return true;
    /* The container's pids limit counts gVisor's own threads, and ends the whole sandbox when it is reached. */
    struct rlimit processes = {guest->processes, guest->processes};
    if (setrlimit(RLIMIT_NPROC, &processes) < 0)
        return false;
    if (setresgid(guest->gid, guest->gid, guest->gid) < 0 || setresuid(guest->uid, guest->uid, guest->uid) < 0)
        return false;
    hold_capabilities(0);
    return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0;
}

/* The guest's own user, but no capability: for who handles a command's bytes and needs neither to start nor to kill. */
void drop_capabilities(const struct guest *guest)
{
    if (guest->is_separate)
        hold_capabilities(0);
}
