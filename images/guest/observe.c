/*
 * See every program that the processes of a command start.
 *
 * The command's main process puts a seccomp filter on itself that stops each execve until its listener answers, and
 * hands the listener to the keeper. Every descendant inherits the filter; nothing can take it off. The keeper reads
 * from the caller's memory what is to be run, lets it go on, and queues what it read for the host.
 *
 * What this is: telemetry. The memory can be changed between our reading and the kernel's, so path and arguments are
 * claims. That something is executed, and by which process, is certain. A caller that made itself undumpable cannot be
 * read: its exec is reported without path and arguments.
 *
 * Why it cannot be hidden from: a second listener is refused (EBUSY) as long as this one lives; other filters can
 * only refuse an exec, since every action that lets it pass ranks below ours; foreign ABIs, whose execve has another
 * number, are refused whole. When the keeper is gone every exec fails (ENOSYS) until PID 1 has killed the rest.
 *
 * Why it cannot hold the keeper up: what is read is bounded and comes from memory, where nobody inside can place a
 * page that blocks (no userfaultfd, no FUSE); the queue is bounded, and what does not fit is only counted.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Own copies: the headers of the build machine may be older than the kernel of the running one. */
#define FLAG_NEW_LISTENER (1ul << 3)
#define FLAG_WAIT_KILLABLE_RECV (1ul << 5) /* Linux 5.19 */
#define PIDFD_OF_THREAD O_EXCL     /* Linux 6.9 */
#define INFO_PID 1ull

struct pidfd_facts { /* the first version of what the kernel calls pidfd_info */
    uint64_t mask, cgroup;
    uint32_t pid, process, parent, ids[9];
};

_Static_assert(sizeof(struct pidfd_facts) == 64, "the kernel knows the structure by its size");
#define IOCTL_PIDFD_GET_INFO _IOWR(0xff, 11, struct pidfd_facts) /* Linux 6.13 */

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#define FIRST_FOREIGN_NUMBER 0x40000000u /* x32: the same architecture, other numbers */
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#define FIRST_FOREIGN_NUMBER 0xffffffffu
#else
#error "which system calls start a program on this architecture has not been looked up"
#endif

#define NOTIFICATION_ROOM 512u /* the kernel's structure may grow; its size is asked for */
#define CHUNKS 8u              /* of the queue; each becomes one EXECS packet */
#define FLUSH_MS 100           /* one packet for many execs: waking the host for each would slow a build */
#define KNOWN_PATHS 256u       /* remembered paths, by hash */
#define KNOWN_PATH_MAX 96u

struct chunk {
    size_t used;
    uint8_t body[CHUNK_MAX];
};

static struct {
    int hand_fd;     /* the listener comes from here; -1: it came, or the main process ended before */
    int listener_fd; /* -1: none yet, or nobody is left to observe */
    char *announced; /* what the main process is about to execute; shared with it until it has */
    uint64_t reported, unreported;
    int64_t due; /* when the oldest in the queue is to be sent */
    unsigned first, count;
    struct chunk chunks[CHUNKS]; /* untouched, and so no memory, until first needed */
} observer = {.hand_fd = -1, .listener_fd = -1};

static union {
    struct seccomp_notif is;
    uint8_t room[NOTIFICATION_ROOM];
} notification;

static union {
    struct seccomp_notif_resp is;
    uint8_t room[NOTIFICATION_ROOM];
} response;

/* --- the filter --- */

static int install_filter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 0, 5),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, FIRST_FOREIGN_NUMBER, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_execve, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_execveat, 2, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    /* Killable: else each signal to a caller that waits would make it ask again, and be counted again. */
    long fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, FLAG_NEW_LISTENER | FLAG_WAIT_KILLABLE_RECV, &program);
    if (fd < 0 && errno == EINVAL)
        fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, FLAG_NEW_LISTENER, &program);
    return (int)fd;
}

/* Every call that the keeper depends on, with arguments that the kernel refuses in a way of its own: a profile that
 * lacks one says something else. Returns 0, or the error. */
static int check_listener(void)
{
    uint64_t id = ~0ull;
    int listener = install_filter();
    if (listener < 0)
        return errno;
    notification.is.id = 1; /* Must be zero; else the call would wait. */
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &notification) >= 0 || errno != EINVAL)
        return errno;
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) >= 0 || errno != ENOENT)
        return errno;
    response.is = (struct seccomp_notif_resp){.id = id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response) >= 0 || errno != ENOENT)
        return errno; /* EINVAL: Linux 5.0 to 5.4 can notify, but not let go on. */
    return 0;
}

/* In PID 1: find out whether this kernel and runtime can do it, by doing it. 0, or the error. */
int observe_check(void)
{
    struct seccomp_notif_sizes sizes;
    if (syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes) < 0)
        return errno;
    if (sizes.seccomp_notif > NOTIFICATION_ROOM || sizes.seccomp_notif_resp > NOTIFICATION_ROOM)
        return EMSGSIZE;
    pid_t pid = fork();
    if (pid < 0)
        return errno;
    if (pid == 0)
        _exit(check_listener());
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : ENOSYS; /* A runtime that knows no filters may kill. */
}

/* --- the main process, between fork and exec --- */

int observe_self(int hand_fd)
{
    int listener = install_filter();
    if (listener < 0)
        return -1;
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {.room = {0}};
    char byte = 0;
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    *head = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), &listener, sizeof listener);
    if (sendmsg(hand_fd, &message, MSG_NOSIGNAL) < 0)
        return -1;
    /* The command must not have it: it could answer its own calls. Both are close-on-exec as well. */
    return close(listener) < 0 || close(hand_fd) < 0 ? -1 : 0;
}

/* Say what is executed next: until then this process is undumpable, so the keeper cannot read it. */
void observe_announce(const char *path)
{
    if (observer.announced)
        snprintf(observer.announced, PATH_LIMIT, "%s", path);
}

/* --- the keeper --- */

/* Before the fork. Returns the end for the main process, or -1. */
int observer_open(void)
{
    int pair[2];
    void *shared = mmap(NULL, PATH_LIMIT, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -1;
    observer.announced = shared;
    observer.hand_fd = pair[0];
    return pair[1];
}

int observer_fd(void)
{
    return observer.listener_fd >= 0 ? observer.listener_fd : observer.hand_fd;
}

uint64_t observer_unreported(void)
{
    return observer.unreported;
}

/* When something is to be sent; INT64_MAX: nothing. A full chunk does not wait for more. */
int64_t observer_due(void)
{
    return observer.count == 0 ? INT64_MAX : observer.count > 1 ? 0 : observer.due;
}

/* Take the body of the next EXECS packet, at most CHUNK_MAX bytes; 0: there is none. */
size_t observer_take(uint8_t *body)
{
    if (observer.count == 0)
        return 0;
    struct chunk *chunk = &observer.chunks[observer.first];
    size_t size = chunk->used;
    memcpy(body, chunk->body, size);
    chunk->used = 0;
    observer.first = (observer.first + 1) % CHUNKS;
    observer.count--;
    return size;
}

static void take_listener(void)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    char byte;
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    ssize_t got = recvmsg(observer.hand_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    struct cmsghdr *head = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS)
        memcpy(&observer.listener_fd, CMSG_DATA(head), sizeof observer.listener_fd);
    /* End of file: the main process ended before it could send it, and so before it could execute anything. */
    close(observer.hand_fd);
    observer.hand_fd = -1;
    /* Not SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: it makes the round trip ten times shorter, but wakes both sides on one
     * processor, from where the kernel then moves the caller at its exec. A parallel make lost more than it won. */
}

/* Read up to size bytes of a task's memory; what cannot be read ends it early. */
static size_t read_memory(int memory, uint64_t address, void *to, size_t size)
{
    ssize_t got;
    do
        got = pread(memory, to, size, (off_t)address);
    while (got < 0 && errno == EINTR);
    return got < 0 ? 0 : (size_t)got;
}

/* Read a string of less than size bytes; false when it is longer, or runs into what cannot be read. It is
 * terminated in any case. */
static bool read_string(int memory, uint64_t address, char *to, size_t size)
{
    size_t used = 0;
    while (used < size) {
        size_t want = size - used < 256 ? size - used : 256; /* Nearly all are shorter. */
        size_t got = read_memory(memory, address + used, to + used, want);
        if (memchr(to + used, 0, got))
            return true;
        used += got;
        if (got < want)
            break;
    }
    to[used < size ? used : size - 1] = 0;
    return false;
}

/* As find_parent; false where the kernel is too old. Saves the entry in /proc, half of what observing costs. */
static bool find_parent_by_pidfd(pid_t thread, uint32_t *process, uint32_t *parent)
{
    struct pidfd_facts facts = {.mask = INFO_PID};
    int fd = (int)syscall(SYS_pidfd_open, thread, PIDFD_OF_THREAD);
    bool is_known = fd >= 0 && ioctl(fd, IOCTL_PIDFD_GET_INFO, &facts) == 0 && facts.mask & INFO_PID;
    if (fd >= 0)
        close(fd);
    if (is_known) {
        *process = facts.process;
        *parent = facts.parent;
    }
    return is_known;
}

/* The process a thread belongs to, and that one's parent; 0 for what cannot be found out. */
static void find_parent(pid_t thread, uint32_t *process, uint32_t *parent)
{
    if (find_parent_by_pidfd(thread, process, parent))
        return;
    char path[32], status[1024];
    snprintf(path, sizeof path, "/proc/%d/status", (int)thread);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    ssize_t got = read(fd, status, sizeof status - 1);
    close(fd);
    status[got > 0 ? got : 0] = 0;
    /* The name comes first and is the process's to choose; line breaks in it are escaped by the kernel. */
    const char *group = strstr(status, "\nTgid:\t"), *above = strstr(status, "\nPPid:\t");
    if (group)
        *process = (uint32_t)strtoul(group + 7, NULL, 10);
    if (above)
        *parent = (uint32_t)strtoul(above + 7, NULL, 10);
}

/* Open a magic link of a task: its root, its working directory, a descriptor. */
static int open_of(pid_t thread, const char *what)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)thread, what);
    return open(path, O_PATH | O_CLOEXEC);
}

/*
 * Whether the kernel could find nothing at this path: then the answer is ENOENT from here, and the call does not go
 * on, whatever the caller's memory says by then. So a search along PATH is one exec, not one for each directory, and
 * nobody can hide an exec by naming a file that is not there. Only an answer that does not depend on who asks counts:
 * nothing beneath another mount (/proc/self), or no link at all.
 */
static bool is_missing(int from, const char *path)
{
    static const uint64_t ways[2] = {RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS};
    for (int i = 0; i < 2; i++) {
        struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = ways[i]};
        if (path[0] == '/')
            how.resolve |= RESOLVE_IN_ROOT; /* whose root it is, from says */
        int fd = (int)syscall(SYS_openat2, from, path, &how, sizeof how);
        if (fd < 0 && errno == ENOENT)
            return true;
        if (fd >= 0) {
            close(fd);
            return false;
        }
    }
    return false;
}

struct seen {
    uint32_t pid, parent;
    char path[PATH_LIMIT];
    char found[PATH_LIMIT]; /* where path leads, as far as can be seen from here; "" when it cannot */
    char arguments[EXEC_ARGS_MAX][EXEC_ARG_MAX + 1];
    unsigned count;
    bool is_cut;
};

/* Where paths lead that cannot lead elsewhere any more: all their way is on the root, which is mounted read-only.
 * Nearly every exec of a build is of such a one; the look saved is a quarter of what observing costs. */
struct known {
    char path[KNOWN_PATH_MAX], found[KNOWN_PATH_MAX];
};

static struct known known_paths[KNOWN_PATHS];

static struct known *known_slot(const char *path)
{
    uint32_t hash = 2166136261u; /* FNV-1a. Who provokes collisions makes its own execs slower. */
    for (; *path; path++)
        hash = (hash ^ (uint8_t)*path) * 16777619u;
    return &known_paths[hash % KNOWN_PATHS];
}

static bool is_root_read_only(void)
{
    static int answer = -1;
    struct statvfs facts;
    if (answer < 0)
        answer = statvfs("/", &facts) == 0 && facts.f_flag & ST_RDONLY;
    return answer == 1;
}

static void remember(const char *path, const char *found)
{
    if (strlen(path) >= KNOWN_PATH_MAX || strlen(found) >= KNOWN_PATH_MAX || !is_root_read_only())
        return;
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0)
        return; /* It leaves the root, for the workspace or for a program that the policy masks. */
    close(fd);
    struct known *slot = known_slot(path);
    snprintf(slot->path, sizeof slot->path, "%s", path);
    snprintf(slot->found, sizeof slot->found, "%s", found);
}

/* Fill found; true when nothing is there. */
static bool find_file(struct seen *seen, pid_t thread, int directory, bool is_ours)
{
    char name[32], where[32];
    if (seen->path[0] == 0)
        return false;
    snprintf(where, sizeof where, "fd/%d", directory);
    bool is_absolute = seen->path[0] == '/';
    const struct known *known = known_slot(seen->path);
    if (is_absolute && strcmp(known->path, seen->path) == 0) {
        snprintf(seen->found, sizeof seen->found, "%s", known->found);
        return false;
    }
    int from = is_absolute ? AT_FDCWD
               : is_ours   ? -1
                           : open_of(thread, directory == AT_FDCWD ? "cwd" : where);
    int file = is_absolute || from >= 0 ? openat(from, seen->path, O_PATH | O_CLOEXEC) : -1;
    bool is_gone = file < 0 && errno == ENOENT;
    if (file >= 0) {
        snprintf(name, sizeof name, "/proc/self/fd/%d", file);
        ssize_t size = readlink(name, seen->found, sizeof seen->found - 1);
        seen->found[size > 0 ? size : 0] = 0;
        close(file);
        if (is_absolute && size > 0)
            remember(seen->path, seen->found);
    } else if (is_gone) {
        if (is_absolute)
            from = is_ours ? open("/", O_PATH | O_CLOEXEC) : open_of(thread, "root");
        is_gone = from >= 0 && is_missing(from, seen->path);
    }
    if (from >= 0)
        close(from);
    return is_gone;
}

/* Read what a call is about; true when there is no such file. */
static bool read_call(struct seen *seen, const struct seccomp_notif *call, bool is_ours, char *const *argv)
{
    bool is_at = call->data.nr == SYS_execveat;
    uint64_t path = call->data.args[is_at], arguments = call->data.args[1 + is_at];
    int directory = is_at ? (int)call->data.args[0] : AT_FDCWD;
    pid_t thread = (pid_t)call->pid;
    seen->pid = call->pid;
    seen->parent = 0;
    seen->path[0] = seen->found[0] = 0;
    seen->count = 0;
    seen->is_cut = false;
    find_parent(thread, &seen->pid, &seen->parent);
    if (is_ours) {
        snprintf(seen->path, sizeof seen->path, "%s", observer.announced);
        for (; argv[seen->count]; seen->count++) {
            if (seen->count == EXEC_ARGS_MAX) {
                seen->is_cut = true;
                break;
            }
            size_t room = sizeof *seen->arguments;
            seen->is_cut |= snprintf(seen->arguments[seen->count], room, "%s", argv[seen->count]) >= (int)room;
        }
        return find_file(seen, thread, directory, true);
    }
    char name[32];
    snprintf(name, sizeof name, "/proc/%d/mem", (int)thread);
    int memory = open(name, O_RDONLY | O_CLOEXEC);
    if (memory < 0) {
        seen->is_cut = true;
        return false;
    }
    bool is_whole = read_string(memory, path, seen->path, sizeof seen->path);
    if (is_at && call->data.args[4] & AT_EMPTY_PATH && seen->path[0] == 0)
        snprintf(seen->path, sizeof seen->path, "/proc/self/fd/%d", directory);
    uint64_t pointers[EXEC_ARGS_MAX + 1];
    size_t have = read_memory(memory, arguments, pointers, sizeof pointers) / sizeof *pointers;
    seen->is_cut = arguments != 0; /* unless the end of the list is found */
    for (size_t i = 0; i < have && i < EXEC_ARGS_MAX; i++, seen->count++) {
        if (pointers[i] == 0)
            break;
    }
    if (seen->count < have && pointers[seen->count] == 0)
        seen->is_cut = false;
    for (unsigned i = 0; i < seen->count; i++)
        seen->is_cut |= !read_string(memory, pointers[i], seen->arguments[i], sizeof *seen->arguments);
    close(memory);
    /* A path that was not read to its end leads nowhere; the kernel would refuse it too. */
    return is_whole && find_file(seen, thread, directory, false);
}

static struct span span_of(const char *text, size_t most)
{
    return (struct span){(const uint8_t *)text, strnlen(text, most)};
}

/* Take it into the queue, or count it. Returns the chunk it is the last in, and in *before that one's size without
 * it: until something else is queued, it can be taken back. NULL: it was counted. */
static struct chunk *queue(const struct seen *seen, size_t *before)
{
    struct exec_seen exec = {
        .pid = seen->pid, .parent = seen->parent, .argument_count = seen->count, .is_cut = seen->is_cut};
    exec.path = span_of(seen->path, EXEC_PATH_MAX);
    if (strcmp(seen->path, seen->found) != 0)
        exec.found = span_of(seen->found, EXEC_PATH_MAX);
    for (unsigned i = 0; i < seen->count; i++)
        exec.arguments[i] = span_of(seen->arguments[i], EXEC_ARG_MAX);
    if (observer.reported >= EXECS_MAX) {
        observer.unreported++;
        return NULL;
    }
    if (observer.count == 0) {
        observer.count = 1;
        observer.due = now_ms() + FLUSH_MS;
    }
    for (;;) {
        struct chunk *chunk = &observer.chunks[(observer.first + observer.count - 1) % CHUNKS];
        struct writer body = {chunk->body, sizeof chunk->body, chunk->used, false};
        encode_exec(&body, &exec);
        if (!body.is_full) {
            *before = chunk->used;
            chunk->used = body.used;
            observer.reported++;
            return chunk;
        }
        if (observer.count == CHUNKS) {
            observer.unreported++; /* The host does not keep up, and nobody in the container waits for it. */
            return NULL;
        }
        observer.count++; /* The next chunk is empty, and one exec always fits. */
    }
}

_Static_assert(4 * 5 + 2 * EXEC_PATH_MAX + EXEC_ARGS_MAX * (4 + EXEC_ARG_MAX) + 1 <= CHUNK_MAX, "one exec fits");

static void answer_call(pid_t main_pid, int exec_fd, char *const *argv)
{
    static struct seen seen;
    memset(&notification, 0, sizeof notification);
    if (ioctl(observer.listener_fd, SECCOMP_IOCTL_NOTIF_RECV, &notification) < 0) {
        if (errno == ENOENT || errno == EINTR)
            return; /* The caller was killed, or a signal made it ask again later. */
        die("a keeper cannot receive execs: %s", strerror(errno));
    }
    const struct seccomp_notif *call = &notification.is;
    /* The main process before its exec is still ours; its pipe closes when exec has worked, and not before. */
    struct pollfd pipe = {.fd = exec_fd, .events = POLLIN};
    bool is_ours = (pid_t)call->pid == main_pid && exec_fd >= 0 && poll(&pipe, 1, 0) == 0;
    bool is_gone = read_call(&seen, call, is_ours, argv);
    memset(&response, 0, sizeof response);
    response.is.id = call->id;
    if (is_gone)
        response.is.error = -ENOENT;
    else
        response.is.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    /* Queued before the answer: the caller runs at once after it, and the less is left to do here, the less often
     * the scheduler moves it to another processor. */
    size_t before = 0;
    struct chunk *chunk = is_gone ? NULL : queue(&seen, &before);
    if (ioctl(observer.listener_fd, SECCOMP_IOCTL_NOTIF_SEND, &response) == 0 || errno != ENOENT)
        return;
    /* The caller was killed while it waited. What was read may be of another process that got its number; whether
     * or not, nothing was executed. */
    if (chunk) {
        chunk->used = before;
        observer.reported--;
    } else if (!is_gone) {
        observer.unreported--;
    }
}

/* Serve what poll found on observer_fd. exec_fd: where the main process says that its exec failed, -1 when it worked;
 * argv: what it was told to execute. */
void observer_hear(short events, pid_t main_pid, int exec_fd, char *const *argv)
{
    if (observer.listener_fd < 0)
        take_listener();
    else if (events & POLLIN)
        answer_call(main_pid, exec_fd, argv);
    else if (events & (POLLHUP | POLLERR | POLLNVAL)) {
        close(observer.listener_fd); /* Nobody is left who has the filter. */
        observer.listener_fd = -1;
    }
}
