/*
 * The guest: PID 1 of the container.
 *
 * The processes, and who may harm whom:
 *
 *   PID 1            this file. Owns the channel to the host (its stdin and stdout). Moves whole frames, starts
 *    |               workers, reaps, keeps time. Parses nothing but frame heads and requests; waits for nobody.
 *    |- keeper       one per command (spawn.c): parent and subreaper of all the command starts, and told of each
 *    |   |           program that is executed there (observe.c).
 *    |   '- command  untrusted, in a Landlock domain of its own (landlock.c): cannot signal or trace any other box.
 *    |- file worker  one per file operation (files.c, walk.c): regular expressions and slow disks hold up only it.
 *    '- relay        one, when there is egress (relay.c).
 *
 * All but the command are this program after fork, without exec: not dumpable, so that no process of the same uid can
 * read their memory or descriptors (/proc/PID/mem, /proc/PID/fd, pidfd_getfd). The kernel keeps PID 1 from signals of
 * its own namespace for which it has no handler, SIGKILL included; this program has no handler at all.
 *
 * The end: when stdin ends, when the channel breaks, or when anything is not as it must be, PID 1 exits. The kernel
 * then kills every process of the namespace before the container is gone. That is also the last answer to a tree that
 * does not die: no timeout may go unenforced.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define SLOTS 64u
#define OUT_BYTES (512u * 1024)
#define OUT_RESERVE (64u * 1024) /* for PID 1's own short replies: below it, nothing new is read */
#define REAPED_AT_ONCE 256
#define SWEEP_MS 5
#define EXITED_ROOM 64

struct slot {
    bool is_used;
    uint32_t id;
    uint8_t type; /* of the request */
    pid_t pid;    /* 0: reaped */
    int socket;   /* -1: the worker closed its end, by ending */
    bool is_answered, is_killed;
    int64_t started, deadline;
    uint8_t kept[EXITED_ROOM]; /* the body of EXITED, until what the command left behind is dead; kept_size 0: none */
    size_t kept_size;
};

static struct guest guest;
static struct config config; /* points into in: good until the relay is forked, whose copy stays */
static struct spawn spawn_request; /* valid from decoding to the fork that follows it; the keeper has its own copy */
static struct slot slots[SLOTS];
static uint8_t in[FRAME_MAX + 4], out[OUT_BYTES];
static size_t in_used, out_start, out_end;
static uint32_t last_id;
static pid_t relay_pid;
static int signal_fd;
static bool is_configured;
static int64_t unblocked_at, sweep_deadline;

/* --- to the host --- */

static size_t out_room(void)
{
    return sizeof out - (out_end - out_start);
}

/* Make contiguous room at the end of out; the caller has seen that there is enough in all. */
static uint8_t *out_at(size_t size)
{
    if (sizeof out - out_end < size) {
        memmove(out, out + out_start, out_end - out_start);
        out_end -= out_start;
        out_start = 0;
    }
    if (sizeof out - out_end < size)
        die("the host sends requests but reads no replies");
    return out + out_end;
}

static void reply(uint8_t type, uint32_t id, const struct writer *body)
{
    uint8_t *at = out_at(FRAME_HEAD + body->used);
    encode_head(at, type, id, body->used);
    memcpy(at + FRAME_HEAD, body->at, body->used);
    out_end += FRAME_HEAD + body->used;
}

static void reply_failed(uint8_t request, uint32_t id, int error, const char *what)
{
    uint8_t room[256];
    struct writer body = {room, sizeof room, 0, false};
    encode_failed(&body, (uint32_t)error, what);
    reply(request == SPAWN ? SPAWN_FAILED : FAILED, id, &body);
}

static void flush_out(void)
{
    while (out_start < out_end) {
        ssize_t put = write(1, out + out_start, out_end - out_start);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && errno == EAGAIN)
            break;
        if (put < 0)
            _exit(0); /* Nobody reads any more: the host closed the session. */
        out_start += (size_t)put;
    }
    if (out_start == out_end)
        out_start = out_end = 0;
}

/* --- workers --- */

static struct slot *find_slot(uint32_t id)
{
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        if (slot->is_used && slot->id == id)
            return slot;
    return NULL;
}

/* In the new worker: keep its socket, /dev/null, the workspace and the rules; let go of the channel and of other
 * workers. */
static void settle_worker(int socket)
{
    if (dup2(socket, FD_PID1) < 0 || dup2(FD_NULL, 0) < 0 || dup2(FD_NULL, 1) < 0)
        die("a worker cannot settle: %s", strerror(errno));
    close_from(FD_FIRST_FREE, false);
}

static void limit_file_worker(void)
{
    /* A regular expression can ask for any amount of memory; time is PID 1's to watch, this is the second net. */
    struct rlimit memory = {256u << 20, 256u << 20}, cpu = {WRITE_LIMIT_MS / 1000, WRITE_LIMIT_MS / 1000};
    if (setrlimit(RLIMIT_AS, &memory) < 0 || setrlimit(RLIMIT_CPU, &cpu) < 0)
        die("a worker cannot limit itself: %s", strerror(errno));
    if (!become_user(&guest))
        die("a worker cannot become the sandbox's user: %s", strerror(errno));
    if (landlock_scope(guest.landlock_abi, false) < 0)
        die("a worker cannot enter a Landlock domain: %s", strerror(errno));
}

/* A body that cannot be read is the host's fault or an attack on the channel: either way the end. */
static _Noreturn void die_garbled(const struct frame *frame)
{
    die("garbled frame of type %u, %zu bytes", frame->type, frame->body.size);
}

static bool is_command_running(void)
{
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        if (slot->is_used && slot->type == SPAWN && !slot->is_answered)
            return true;
    return false;
}

static void start_worker(const struct frame *frame)
{
    struct read_request read_request;
    struct write_request write_request;
    struct list_request list_request;
    struct search_request search_request;
    bool is_read;
    switch (frame->type) {
    case SPAWN: is_read = decode_spawn(frame->body, &spawn_request); break;
    case READ: is_read = decode_read(frame->body, &read_request); break;
    case WRITE: is_read = decode_write(frame->body, &write_request); break;
    case LIST: is_read = decode_list(frame->body, &list_request); break;
    default: is_read = decode_search(frame->body, &search_request);
    }
    if (!is_read)
        die_garbled(frame);
    struct slot *slot = slots;
    while (slot < slots + SLOTS && slot->is_used)
        slot++;
    int pair[2];
    if (slot == slots + SLOTS) {
        reply_failed(frame->type, frame->id, EAGAIN, "too many requests in flight");
        return;
    }
    if (frame->type == SPAWN && !guest.has_subreaper && is_command_running()) {
        reply_failed(frame->type, frame->id, EBUSY,
                     "one command at a time: without subreapers nobody can tell whose orphans are whose");
        return;
    }
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        reply_failed(frame->type, frame->id, errno, "socketpair");
        return;
    }
    pid_t pid = fork();
    if (pid < 0) {
        int error = errno; /* EAGAIN: the commands use up the container's pids limit. */
        close(pair[0]);
        close(pair[1]);
        reply_failed(frame->type, frame->id, error, "fork");
        return;
    }
    if (pid == 0) {
        settle_worker(pair[1]);
        if (frame->type == SPAWN)
            keep_command(&guest, &spawn_request);
        limit_file_worker();
        switch (frame->type) {
        case READ: read_file(&read_request);
        case WRITE: write_file(&write_request);
        case LIST: list_files(&list_request);
        default: search_files(&search_request);
        }
    }
    close(pair[1]);
    int64_t limit = frame->type == SPAWN   ? (int64_t)spawn_request.timeout_ms + GRACE_MS
                    : frame->type == WRITE ? WRITE_LIMIT_MS
                                           : FILE_LIMIT_MS;
    int64_t now = now_ms();
    *slot = (struct slot){.is_used = true, .id = frame->id, .type = frame->type, .pid = pid, .socket = pair[0],
                          .started = now, .deadline = now + limit};
}

static void pass_on(struct slot *slot, uint8_t type, struct span body)
{
    struct iovec parts[2] = {{&type, 1}, {(void *)(uintptr_t)body.at, body.size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (slot->socket < 0 || sendmsg(slot->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return;
    if (errno == EAGAIN || errno == ENOBUFS)
        die("the host sent data that was not asked for");
    /* EPIPE: the worker has ended; its answer is on the way. */
}

static void kill_request(struct slot *slot)
{
    int64_t limit = now_ms() + GRACE_MS;
    if (slot->is_killed)
        return;
    slot->is_killed = true;
    if (slot->deadline > limit)
        slot->deadline = limit;
    if (slot->type == SPAWN || slot->type == WRITE)
        pass_on(slot, KILL, (struct span){(const uint8_t *)"", 0}); /* They have something to clean up. */
    else if (slot->pid > 0)
        kill(slot->pid, SIGKILL);
}

static bool may_send(uint8_t request, uint8_t type)
{
    switch (request) {
    case SPAWN:
        return type == STARTED || type == STDOUT || type == STDERR || type == WANT || type == EXECS
               || type == EXITED || type == SPAWN_FAILED;
    case READ: return type == CONTENT || type == READ_DONE || type == FAILED;
    case WRITE: return type == WANT || type == WRITE_DONE || type == FAILED;
    case LIST: return type == ENTRIES || type == LIST_DONE || type == FAILED;
    case SEARCH: return type == MATCHES || type == SEARCH_DONE || type == FAILED;
    default: return false;
    }
}

static bool is_last(uint8_t type)
{
    return type == EXITED || type == SPAWN_FAILED || type == READ_DONE || type == WRITE_DONE || type == LIST_DONE
           || type == SEARCH_DONE || type == FAILED;
}

/* Take one packet from a worker into out, as a frame of its request. */
static void hear_worker(struct slot *slot)
{
    uint8_t type;
    uint8_t *at = out_at(FRAME_HEAD + PACKET_MAX);
    struct iovec parts[2] = {{&type, 1}, {at + FRAME_HEAD, PACKET_MAX - 1}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t got = recvmsg(slot->socket, &message, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        close(slot->socket);
        slot->socket = -1;
        return;
    }
    /* A worker that handles hostile files may have been taken over: it can then lie about its own request, and that
     * is all. */
    bool must_wait = type == EXITED && !guest.has_subreaper; /* for a sweep: see settle_slots */
    if (message.msg_flags & MSG_TRUNC || slot->is_answered || slot->kept_size > 0 || !may_send(slot->type, type)
        || (must_wait && (size_t)got - 1 > sizeof slot->kept)) {
        if (slot->pid > 0)
            kill(slot->pid, SIGKILL);
        return;
    }
    if (must_wait) {
        slot->kept_size = (size_t)got - 1;
        memcpy(slot->kept, at + FRAME_HEAD, slot->kept_size);
        if (slot->pid > 0)
            kill(slot->pid, SIGKILL);
        return;
    }
    slot->is_answered = is_last(type);
    if (slot->is_answered && slot->pid > 0)
        kill(slot->pid, SIGKILL); /* It has nothing left to do but to end; its slot is wanted soon. */
    encode_head(at, type, slot->id, (size_t)got - 1);
    out_end += FRAME_HEAD + (size_t)got - 1;
}

/* Reap; true when more may be waiting. */
static bool reap(void)
{
    for (int i = 0; i < REAPED_AT_ONCE; i++) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG | __WALL);
        if (pid <= 0)
            return false;
        if (pid == relay_pid)
            die("the relay ended (%s %d); without it there is no egress", WIFSIGNALED(status) ? "signal" : "status",
                WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
            if (slot->is_used && slot->pid == pid)
                slot->pid = 0;
    }
    return true;
}

/* What a dead keeper left behind is now ours: kill it, for it belongs to no command any more. Only the OOM killer,
 * our own deadline or, where there is no Landlock, the command itself ends a keeper early; where there are no
 * subreapers, what a command left is ours in any case. True when all is dead. */
static bool sweep(int64_t now)
{
    pid_t known[SLOTS + 1];
    size_t count = 0;
    if (relay_pid > 0)
        known[count++] = relay_pid;
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        if (slot->is_used && slot->pid > 0)
            known[count++] = slot->pid;
    if (sweep_deadline == 0)
        sweep_deadline = now + GRACE_MS;
    if (kill_strangers(known, count) == 0) {
        sweep_deadline = 0;
        return true;
    }
    if (now >= sweep_deadline)
        die("processes of a command whose keeper died cannot be killed");
    return false;
}

static void report_lost(struct slot *slot, int64_t now)
{
    uint8_t room[64];
    struct writer body = {room, sizeof room, 0, false};
    struct exited exited = {
        .is_signal = 1,
        .value = SIGKILL,
        .flags = EXIT_KEEPER_LOST | (!slot->is_killed && now >= slot->deadline ? EXIT_TIMED_OUT : 0),
        .wall_ms = (uint32_t)(now - slot->started),
    };
    if (slot->type == SPAWN) {
        encode_exited(&body, &exited);
        reply(EXITED, slot->id, &body);
    } else if (slot->is_killed) {
        reply_failed(slot->type, slot->id, ECANCELED, "killed");
    } else {
        bool is_late = now >= slot->deadline;
        reply_failed(slot->type, slot->id, is_late ? ETIMEDOUT : EIO, is_late ? "took too long" : "worker died");
    }
}

/* Free the slots of workers that are gone, answering for those that did not; true while a sweep must go on. */
static bool settle_slots(int64_t now)
{
    bool must_sweep = false, is_swept;
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        must_sweep |= slot->is_used && slot->socket < 0 && slot->pid == 0 && !slot->is_answered && slot->type == SPAWN;
    is_swept = must_sweep && sweep(now);
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++) {
        if (!slot->is_used || slot->socket >= 0 || slot->pid > 0)
            continue;
        if (!slot->is_answered && slot->type == SPAWN && !is_swept)
            continue;
        if (!slot->is_answered && slot->kept_size > 0) {
            struct writer body = {slot->kept, sizeof slot->kept, slot->kept_size, false};
            reply(EXITED, slot->id, &body);
        } else if (!slot->is_answered) {
            report_lost(slot, now);
        }
        slot->is_used = false;
    }
    return must_sweep && !is_swept;
}

/* A worker that did not end in time, though PID 1 could take what it had to say, is killed. */
static void enforce_deadlines(int64_t now)
{
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        if (slot->is_used && slot->pid > 0 && now >= slot->deadline && now >= unblocked_at + GRACE_MS)
            kill(slot->pid, SIGKILL);
}

/* --- from the host --- */

static void configure(const struct frame *frame)
{
    int listeners[RELAYS_MAX];
    if (frame->id != 0 || !decode_config(frame->body, &config))
        die_garbled(frame);
    int fd = open(config.workspace, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || dup3(fd, FD_WORKSPACE, O_CLOEXEC) < 0)
        die("cannot open the workspace '%s': %s", config.workspace, strerror(errno));
    close(fd);
    int error = config.must_observe ? observe_check() : 0;
    if (error)
        die("cannot observe what commands execute: no seccomp user notification in this kernel, runtime or profile"
            " (%s); it needs Linux 5.5 and a profile that allows seccomp(2) and its ioctls, as the shipped one does",
            strerror(error));
    guest.must_observe = config.must_observe;
    if (config.rules.is_given) {
        fd = landlock_rules(guest.landlock_abi, &config.rules);
        if (dup3(fd, FD_RULES, O_CLOEXEC) < 0)
            die("cannot keep the Landlock rules: %s", strerror(errno));
        close(fd);
        guest.is_closed = true;
    }
    for (uint32_t i = 0; i < config.relay_count; i++)
        listeners[i] = relay_listen(&config.relays[i]);
    if (config.relay_count > 0) {
        relay_pid = fork();
        if (relay_pid < 0)
            die("cannot start the relay: %s", strerror(errno));
        if (relay_pid == 0) {
            if (dup2(FD_NULL, 0) < 0 || dup2(FD_NULL, 1) < 0)
                die("the relay cannot settle: %s", strerror(errno));
            drop_capabilities(&guest);
            relay_serve(&config, listeners);
        }
    }
    for (uint32_t i = 0; i < config.relay_count; i++)
        close(listeners[i]);
    uint8_t room[64];
    struct writer body = {room, sizeof room, 0, false};
    encode_ready(&body, guest.landlock_abi, guest.is_separate ? guest.uid : (uint32_t)geteuid());
    reply(READY, frame->id, &body);
    is_configured = true;
}

static void handle(const struct frame *frame)
{
    struct slot *slot;
    if (is_configured != (frame->type != CONFIG))
        die("frame of type %u out of turn", frame->type);
    switch (frame->type) {
    case CONFIG:
        configure(frame);
        break;
    case DATA:
    case KILL:
        slot = find_slot(frame->id);
        if (frame->id > last_id || (slot && frame->type == DATA && slot->type != SPAWN && slot->type != WRITE)
            || (frame->type == DATA ? frame->body.size == 0 || frame->body.size > DATA_MAX : frame->body.size > 0))
            die_garbled(frame);
        if (slot && frame->type == KILL)
            kill_request(slot);
        else if (slot)
            pass_on(slot, DATA, frame->body);
        break;
    case SPAWN:
    case READ:
    case WRITE:
    case LIST:
    case SEARCH:
        if (frame->id <= last_id)
            die("request id %u after %u", frame->id, last_id);
        last_id = frame->id;
        start_worker(frame);
        break;
    default:
        die_garbled(frame);
    }
}

static void hear_host(void)
{
    ssize_t got = read(0, in + in_used, sizeof in - in_used);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0)
        _exit(0); /* The session is over, or the channel broke. The kernel kills everything else. */
    in_used += (size_t)got;
}

/* All slots are used, and one will be free in a moment: its worker has answered. A host that counts answers may
 * rightly think that it is free already. */
static bool is_settling(void)
{
    bool is_any_answered = false;
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++) {
        if (!slot->is_used)
            return false;
        is_any_answered |= slot->is_answered;
    }
    return is_any_answered;
}

/* Handle the whole frames that are there, while there is room for replies. True when some may be left. */
static bool handle_frames(void)
{
    size_t used, done = 0;
    struct frame frame;
    int taken = 1;
    while (out_room() > 2 * OUT_RESERVE && !is_settling()
           && (taken = frame_take(in + done, in_used - done, &frame, &used)) > 0) {
        handle(&frame);
        done += used;
    }
    if (taken < 0)
        die("garbled frame head");
    memmove(in, in + done, in_used - done); /* Nothing, nearly always. */
    in_used -= done;
    return taken > 0 && in_used > 0;
}

static int wait_for(int64_t now, bool is_hurried)
{
    int64_t wake = INT64_MAX;
    if (is_hurried)
        return SWEEP_MS;
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++) {
        if (!slot->is_used || slot->pid == 0)
            continue;
        int64_t deadline = slot->deadline > unblocked_at + GRACE_MS ? slot->deadline : unblocked_at + GRACE_MS;
        wake = deadline < wake ? deadline : wake;
    }
    return wake == INT64_MAX ? -1 : wake <= now ? SWEEP_MS : wake - now > 60000 ? 60000 : (int)(wake - now);
}

static _Noreturn void serve(void)
{
    static struct pollfd fds[3 + SLOTS];
    bool is_hurried = false;
    for (;;) {
        int64_t now = now_ms();
        bool has_room = out_room() > 2 * OUT_RESERVE + FRAME_HEAD + PACKET_MAX;
        if (!has_room)
            unblocked_at = now;
        fds[0] = (struct pollfd){.fd = has_room && in_used < sizeof in ? 0 : -1, .events = POLLIN};
        fds[1] = (struct pollfd){.fd = out_start < out_end ? 1 : -1, .events = POLLOUT};
        fds[2] = (struct pollfd){.fd = signal_fd, .events = POLLIN};
        for (size_t i = 0; i < SLOTS; i++) {
            bool is_heard = has_room && slots[i].is_used;
            fds[3 + i] = (struct pollfd){.fd = is_heard ? slots[i].socket : -1, .events = POLLIN};
        }
        if (poll(fds, 3 + SLOTS, wait_for(now, is_hurried)) < 0 && errno != EINTR)
            die("cannot poll: %s", strerror(errno));
        is_hurried = false;
        for (size_t i = 0; i < SLOTS; i++)
            if (fds[3 + i].revents && out_room() > OUT_RESERVE + FRAME_HEAD + PACKET_MAX)
                hear_worker(&slots[i]);
        if (fds[2].revents) {
            struct signalfd_siginfo ignored;
            /* Emptied before reaping: a child that ends after the last waitpid sets it again. */
            while (read(signal_fd, &ignored, sizeof ignored) > 0)
                ;
        }
        is_hurried |= reap();
        now = now_ms();
        is_hurried |= settle_slots(now);
        enforce_deadlines(now);
        if (fds[0].revents)
            hear_host();
        is_hurried |= handle_frames();
        flush_out();
    }
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "controls") == 0)
        report_controls();
    /* First of all: the channel is open already, and a process of the same uid could take it. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        die("cannot become undumpable: %s", strerror(errno));
    if (argc == 5 && strcmp(argv[1], "commands-as") == 0)
        separate_from_commands(&guest, argv + 2);
    if (getpid() != 1)
        die("is the first process of a container; it is not to be run otherwise");
    if (geteuid() == 0 || getuid() == 0)
        die("refuses to run as root: start the container with a user");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        die("cannot set no_new_privs: %s", strerror(errno));
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0)
            die("descriptor %d is not open: %s", fd, strerror(errno));
    close_from(3, false);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null != FD_PID1 || dup3(null, FD_NULL, O_CLOEXEC) < 0 || dup3(null, FD_WORKSPACE, O_CLOEXEC) < 0
        || dup3(null, FD_RULES, O_CLOEXEC) < 0)
        die("cannot open /dev/null: %s", strerror(errno));
    struct rlimit nofile;
    if (getrlimit(RLIMIT_NOFILE, &nofile) < 0)
        die("getrlimit: %s", strerror(errno));
    guest.nofile = nofile;
    nofile.rlim_cur = nofile.rlim_max;
    if (nofile.rlim_max < 1024)
        die("needs 1024 descriptors and may have %llu; raise the container's nofile limit",
            (unsigned long long)nofile.rlim_max);
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    /* SIGPIPE: a write to who is gone must be an error here; commands get the default back. */
    if (setrlimit(RLIMIT_NOFILE, &nofile) < 0 || sigprocmask(SIG_SETMASK, &child, NULL) < 0
        || signal(SIGPIPE, SIG_IGN) == SIG_ERR)
        die("cannot set limits and signals: %s", strerror(errno));
    signal_fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signal_fd < FD_FIRST_FREE)
        die("signalfd: %s", strerror(errno));
    umask(022);
    guest.landlock_abi = landlock_abi();
    guest.has_subreaper = prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0; /* of no effect: asks whether it is known */
    serve();
}
