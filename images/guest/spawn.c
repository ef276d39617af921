/*
 * The keeper: the worker of one command. Parent and subreaper of everything the command starts.
 *
 * Its life: enter the outer Landlock domain, start the command's main process, pump its output, feed its stdin, wait.
 * It ends with the command: when the main process has ended, when time is up, or when PID 1 passes on a KILL. In each
 * case whatever is left of the tree is killed and reaped before EXITED is sent: nothing outlives its command, as in a
 * CI runner, and the host may rely on it.
 *
 * The keeper never waits for the host: output that PID 1 has no room for stays in the pipe and holds up the command,
 * not the clock. Output over the cap is read and counted for as long as the command likes to print.
 *
 * Told of every program that is executed in the tree (observe.c), it answers at once and passes them on in batches.
 *
 * The command's processes cannot signal the keeper (it is outside their domain) nor trace it (it is not dumpable).
 * Where there is no Landlock they can kill it; then they become children of PID 1, which kills them (main.c). Where
 * there are no subreapers every orphan becomes one: PID 1 kills those that are left before it passes EXITED on.
 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define REAPED_AT_ONCE 256 /* then look at the clock again: zombies can be made faster than they are reaped */

struct exec_failure {
    int error;
    char what[64];
};

struct stream {
    int fd;
    uint8_t type;
    uint64_t size, kept;
};

struct keeper {
    const struct spawn *spawn;
    bool is_scoped;
    pid_t main_pid;
    bool is_main_alive;
    int main_status;
    int exec_fd; /* the main process says here that exec failed; end of file: it worked */
    int signal_fd, stdin_fd;
    struct stream streams[2];
    const uint8_t *input; /* of stdin, not yet written */
    size_t input_left;
    uint64_t input_to_come; /* of stdin, not yet sent by the host */
    bool wants_data;
    size_t packet_size; /* of a packet PID 1 had no room for; 0: none */
    uint8_t packet[1 + CHUNK_MAX];
};

static struct keeper keeper;
static uint8_t input_part[DATA_MAX]; /* what keeper.input points into after the first part */
static uint8_t dropped[DATA_MAX];    /* output over the cap */

/* --- the main process, between fork and exec --- */

static _Noreturn void give_up(int fd, const char *what)
{
    struct exec_failure failure = {.error = errno};
    snprintf(failure.what, sizeof failure.what, "%s", what);
    /* Atomic: smaller than PIPE_BUF. If it fails the keeper sees exit code 127, which it then reports. */
    if (write(fd, &failure, sizeof failure) < 0)
        _exit(126);
    _exit(127);
}

static void exec_on_path(const struct spawn *spawn)
{
    const char *path = DEFAULT_PATH, *name = spawn->argv[0];
    char candidate[PATH_LIMIT];
    int error = ENOENT;
    if (strchr(name, '/')) {
        observe_announce(name);
        execve(name, spawn->argv, spawn->env);
        return;
    }
    for (char *const *variable = spawn->env; *variable; variable++)
        if (strncmp(*variable, "PATH=", 5) == 0)
            path = *variable + 5;
    for (size_t size; *name && *path; path += size + (path[size] == ':')) {
        size = strcspn(path, ":");
        /* An empty element would mean the current directory; the workspace is the last place to search. */
        if (size == 0
            || snprintf(candidate, sizeof candidate, "%.*s/%s", (int)size, path, name) >= (int)sizeof candidate)
            continue;
        observe_announce(candidate);
        execve(candidate, spawn->argv, spawn->env);
        if (errno == EACCES)
            error = EACCES; /* Go on: a later directory may have one that runs. As in execvp. */
        else if (errno != ENOENT && errno != ENOTDIR)
            return;
    }
    errno = error;
}

static _Noreturn void become_command(const struct guest *guest, int cwd, int in, int out, int err, int exec_fd,
                                     int hand_fd)
{
    const struct spawn *spawn = keeper.spawn;
    if (setsid() < 0)
        give_up(exec_fd, "setsid");
    if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0)
        give_up(exec_fd, "dup2");
    if (fchdir(cwd) < 0)
        give_up(exec_fd, "chdir");
    close(FD_PID1); /* PID 1 reads the death of the keeper from it: nobody else may keep it open. */
    close_from(3, true);
    struct rlimit none = {0, 0};
    if (setrlimit(RLIMIT_CORE, &none) < 0 || setrlimit(RLIMIT_NOFILE, &guest->nofile) < 0)
        give_up(exec_fd, "setrlimit");
    if (!become_user(guest))
        give_up(exec_fd, "become the sandbox's user");
    umask(022);
    /* By the system call: libc keeps 32 and 33 to itself, and whoever started the engine may have ignored them. */
    const unsigned long by_default[4] = {0}; /* SIG_DFL, no flags, no mask, as the kernel lays it out */
    for (int number = 1; number < NSIG; number++)
        syscall(SYS_rt_sigaction, number, by_default, NULL, sizeof(uint64_t)); /* EINVAL: KILL and STOP */
    sigset_t nothing;
    sigemptyset(&nothing);
    if (sigprocmask(SIG_SETMASK, &nothing, NULL) < 0)
        give_up(exec_fd, "sigprocmask");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        give_up(exec_fd, "no_new_privs");
    if ((guest->is_closed ? landlock_restrict(FD_RULES) : landlock_scope(guest->landlock_abi, false)) < 0)
        give_up(exec_fd, "landlock");
    /* Last: from here on each execve waits for the keeper. */
    if (guest->must_observe && observe_self(hand_fd) < 0)
        give_up(exec_fd, "seccomp listener");
    exec_on_path(spawn);
    give_up(exec_fd, "exec");
}

/* --- the keeper --- */

static void make_pipe(int ends[2], int kept_end)
{
    if (pipe2(ends, O_CLOEXEC) < 0 || fcntl(ends[kept_end], F_SETFL, O_NONBLOCK) < 0)
        worker_failed(SPAWN_FAILED, errno, "pipe");
}

static void start_main(const struct guest *guest)
{
    int in[2] = {FD_NULL, -1}, out[2], err[2], exec[2], hand = -1;
    act_as_command(guest, true);
    int cwd = open_beneath(keeper.spawn->cwd, O_PATH | O_DIRECTORY);
    if (cwd < 0)
        worker_failed(SPAWN_FAILED, errno, "working directory");
    if (keeper.spawn->stdin_size > 0)
        make_pipe(in, 1);
    make_pipe(out, 0);
    make_pipe(err, 0);
    act_as_command(guest, false);
    make_pipe(exec, 0); /* not the command's: it could say there that it never ran */
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD); /* Blocked since PID 1 started. */
    keeper.signal_fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    if (keeper.signal_fd < 0)
        worker_failed(SPAWN_FAILED, errno, "signalfd");
    if (guest->must_observe && (hand = observer_open()) < 0)
        worker_failed(SPAWN_FAILED, errno, "observer");
    keeper.main_pid = fork();
    if (keeper.main_pid < 0)
        worker_failed(SPAWN_FAILED, errno, "fork");
    if (keeper.main_pid == 0)
        become_command(guest, cwd, in[0], out[1], err[1], exec[1], hand);
    keeper.is_main_alive = true;
    close(cwd);
    if (in[0] != FD_NULL)
        close(in[0]);
    close(out[1]);
    close(err[1]);
    close(exec[1]);
    if (hand >= 0)
        close(hand);
    keeper.stdin_fd = in[1];
    keeper.exec_fd = exec[0];
    keeper.streams[0] = (struct stream){.fd = out[0], .type = STDOUT};
    keeper.streams[1] = (struct stream){.fd = err[0], .type = STDERR};
    keeper.input = keeper.spawn->stdin_first.at;
    keeper.input_left = keeper.spawn->stdin_first.size;
    keeper.input_to_come = keeper.spawn->stdin_size - keeper.input_left;
}

/* Send a packet now or keep it; only called when none is kept. */
static void post(uint8_t type, size_t body_size)
{
    keeper.packet[0] = type;
    keeper.packet_size = packet_try(keeper.packet, 1 + body_size) ? 0 : 1 + body_size;
}

/* At the end, when waiting for the host harms nobody. */
static void send_kept_packet(void)
{
    if (keeper.packet_size > 0)
        packet_send(keeper.packet[0], keeper.packet + 1, keeper.packet_size - 1);
    keeper.packet_size = 0;
}

static void post_execs(void)
{
    size_t size = observer_take(keeper.packet + 1);
    if (size > 0)
        post(EXECS, size);
}

/* At the end, when waiting for the host harms nobody. */
static void send_execs(void)
{
    send_kept_packet();
    for (size_t size; (size = observer_take(keeper.packet + 1)) > 0;)
        packet_send(EXECS, keeper.packet + 1, size);
}

/* Read once from a pipe, send what is still under the cap, count all. Returns what was read, 0 at the end. */
static size_t pump(struct stream *stream, size_t most)
{
    uint64_t room = keeper.spawn->max_output - stream->kept;
    bool is_cut = room == 0;
    uint8_t *at = is_cut ? dropped : keeper.packet + 1;
    size_t size = is_cut ? sizeof dropped : CHUNK_MAX;
    ssize_t got = read(stream->fd, at, size < most ? size : most);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return SIZE_MAX;
    if (got <= 0) {
        close(stream->fd);
        stream->fd = -1;
        return 0;
    }
    stream->size += (size_t)got;
    if (!is_cut) {
        size_t kept = (size_t)got < room ? (size_t)got : (size_t)room;
        stream->kept += kept;
        post(stream->type, kept);
    }
    return (size_t)got;
}

static void close_stdin(void)
{
    close(keeper.stdin_fd);
    keeper.stdin_fd = -1;
    keeper.input_left = 0;
    keeper.wants_data = false;
}

static void feed_stdin(void)
{
    ssize_t put = write(keeper.stdin_fd, keeper.input, keeper.input_left);
    if (put < 0 && errno != EAGAIN && errno != EINTR) {
        close_stdin(); /* EPIPE: the command does not want the rest. */
        return;
    }
    if (put > 0) {
        keeper.input += put;
        keeper.input_left -= (size_t)put;
    }
    if (keeper.input_left > 0)
        return;
    if (keeper.input_to_come == 0)
        close_stdin();
    else
        keeper.wants_data = true;
}

/* Hear what PID 1 passes on; true when it is time to kill. */
static bool hear(void)
{
    uint8_t type;
    bool is_busy = keeper.input_left > 0;
    size_t size = packet_receive(&type, input_part, sizeof input_part, false);
    if (type == KILL)
        return true;
    if (type != DATA)
        return false;
    if (size > keeper.input_to_come || is_busy)
        die("the host sent more stdin than it announced or than was asked for");
    keeper.input_to_come -= size;
    if (keeper.stdin_fd >= 0) {
        keeper.input = input_part;
        keeper.input_left = size;
    }
    return false;
}

/* Reap some. Returns how many, REAPED_AT_ONCE when more may be waiting, -1 when there is no child left at all. */
static int reap(int flags)
{
    int count = 0;
    while (count < REAPED_AT_ONCE) {
        int status;
        pid_t pid = waitpid(-1, &status, flags | __WALL); /* __WALL: also children cloned without SIGCHLD */
        if (pid < 0 && errno == EINTR)
            continue;
        if (pid < 0)
            return -1;
        if (pid == 0)
            break;
        count++;
        if (pid == keeper.main_pid && keeper.is_main_alive) {
            keeper.is_main_alive = false;
            keeper.main_status = status;
        }
    }
    return count;
}

/* Kill and reap the tree, to the last process. PID 1 watches the time this takes. */
static void end_tree(void)
{
    kill_tree(keeper.is_scoped);
    while (reap(keeper.is_scoped ? 0 : WNOHANG) >= 0) {
        struct timespec nap = {0, 1000000};
        if (keeper.is_scoped)
            continue;
        kill_tree(false);
        nanosleep(&nap, NULL);
    }
}

/* Read what exec says. Nothing yet: go on. Failure: tell the host, end. End of file: started. */
static void hear_exec(void)
{
    struct exec_failure failure;
    ssize_t got = read(keeper.exec_fd, &failure, sizeof failure);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got == (ssize_t)sizeof failure) {
        end_tree();
        send_execs();
        failure.what[sizeof failure.what - 1] = 0;
        worker_failed(SPAWN_FAILED, failure.error, failure.what);
    }
    close(keeper.exec_fd);
    keeper.exec_fd = -1;
    struct writer body = {keeper.packet + 1, CHUNK_MAX, 0, false};
    put_number(&body, (uint64_t)keeper.main_pid, 4);
    post(STARTED, body.used);
}

/* Pump and feed until the main process ends, time is up or the host says so. Returns true when time was up. */
static bool run_main(int64_t deadline)
{
    bool may_reap_more = false;
    while (keeper.is_main_alive) {
        int64_t left = deadline - now_ms();
        if (left <= 0)
            return true;
        bool has_room = keeper.packet_size == 0, is_started = keeper.exec_fd < 0;
        if (has_room && keeper.wants_data && is_started) {
            keeper.wants_data = false;
            post(WANT, 0);
            continue;
        }
        int64_t due = observer_due() - now_ms();
        if (has_room && due <= 0) {
            post_execs();
            continue;
        }
        if (has_room && due < left)
            left = due;
        struct pollfd fds[7] = {
            {.fd = FD_PID1, .events = (short)(POLLIN | (has_room ? 0 : POLLOUT))},
            {.fd = keeper.signal_fd, .events = POLLIN},
            {.fd = has_room ? keeper.exec_fd : -1, .events = POLLIN},
            {.fd = has_room && is_started ? keeper.streams[0].fd : -1, .events = POLLIN},
            {.fd = has_room && is_started ? keeper.streams[1].fd : -1, .events = POLLIN},
            {.fd = keeper.input_left > 0 ? keeper.stdin_fd : -1, .events = POLLOUT},
            {.fd = observer_fd(), .events = POLLIN},
        };
        if (poll(fds, 7, may_reap_more ? 0 : left > 60000 ? 60000 : (int)left) < 0 && errno != EINTR)
            die("a keeper cannot poll: %s", strerror(errno));
        if (!has_room && fds[0].revents & POLLOUT && packet_try(keeper.packet, keeper.packet_size))
            keeper.packet_size = 0;
        if (fds[0].revents & (POLLIN | POLLHUP) && hear())
            return false;
        if (fds[6].revents)
            observer_hear(fds[6].revents, keeper.main_pid, keeper.exec_fd, keeper.spawn->argv);
        /* Before the children: a main process that failed to exec has said why, then ended. */
        if (fds[2].revents && keeper.packet_size == 0)
            hear_exec();
        for (int i = 0; i < 2; i++)
            if (fds[3 + i].revents && keeper.packet_size == 0)
                pump(&keeper.streams[i], SIZE_MAX);
        if (fds[5].revents && keeper.input_left > 0)
            feed_stdin();
        if (fds[1].revents || may_reap_more) {
            struct signalfd_siginfo ignored;
            /* Emptied before reaping: a child that ends after the last waitpid sets it again. */
            while (read(keeper.signal_fd, &ignored, sizeof ignored) > 0)
                ;
            may_reap_more = reap(WNOHANG) == REAPED_AT_ONCE;
        }
    }
    return false;
}

/* After the tree is dead: send what is still in the pipes. Not until end of file, which a process of another command
 * that was handed the write end could delay for ever, but what was in them when the last writer died. */
static void drain(struct stream *stream)
{
    int left = 0;
    if (stream->fd < 0 || ioctl(stream->fd, FIONREAD, &left) < 0)
        return;
    while (left > 0 && stream->fd >= 0) {
        size_t got = pump(stream, (size_t)left);
        if (got == SIZE_MAX)
            return;
        left -= (int)got;
        send_kept_packet();
    }
}

static uint32_t cpu_ms(const struct rusage *usage)
{
    int64_t us = (int64_t)(usage->ru_utime.tv_sec + usage->ru_stime.tv_sec) * 1000000 + usage->ru_utime.tv_usec
                 + usage->ru_stime.tv_usec;
    return us / 1000 > UINT32_MAX ? UINT32_MAX : (uint32_t)(us / 1000);
}

static _Noreturn void report(int64_t wall_ms, bool is_timed_out)
{
    struct rusage usage; /* of all that was reaped here: the whole tree */
    if (getrusage(RUSAGE_CHILDREN, &usage) < 0)
        die("getrusage: %s", strerror(errno));
    bool is_signal = WIFSIGNALED(keeper.main_status);
    struct exited exited = {
        .is_signal = is_signal,
        .value = (uint8_t)(is_signal ? WTERMSIG(keeper.main_status) : WEXITSTATUS(keeper.main_status)),
        .flags = is_timed_out ? EXIT_TIMED_OUT : 0,
        .stdout_size = keeper.streams[0].size,
        .stderr_size = keeper.streams[1].size,
        .wall_ms = (uint32_t)wall_ms,
        .cpu_ms = cpu_ms(&usage),
        .max_rss = (uint64_t)usage.ru_maxrss * 1024,
        .execs_left_out = observer_unreported(),
    };
    uint8_t room[64];
    struct writer body = {room, sizeof room, 0, false};
    encode_exited(&body, &exited);
    worker_done(EXITED, &body);
}

void keep_command(const struct guest *guest, const struct spawn *spawn)
{
    int64_t started = now_ms();
    keeper.spawn = spawn;
    keeper.is_scoped = landlock_can_scope(guest->landlock_abi);
    if (guest->has_subreaper && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
        worker_failed(SPAWN_FAILED, errno, "subreaper");
    if (landlock_scope(guest->landlock_abi, guest->is_closed) < 0)
        worker_failed(SPAWN_FAILED, errno, "landlock");
    start_main(guest);
    if (keeper.input_left == 0 && keeper.input_to_come > 0)
        keeper.wants_data = true;
    bool is_timed_out = run_main(started + spawn->timeout_ms);
    end_tree();
    int64_t wall_ms = now_ms() - started; /* From here on only the host's pace counts, which is not the command's. */
    send_kept_packet();
    if (keeper.exec_fd >= 0)
        hear_exec(); /* The main process ended before it was heard; also when killed before exec. */
    send_execs();
    drain(&keeper.streams[0]);
    drain(&keeper.streams[1]);
    report(wall_ms, is_timed_out);
}
