/* Attempts whose objects the caller names: files, programs, amounts, places to connect to. */
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#include "probe.h"

/* ---- files ---- */
static long read_at(const char *path, int flags)
{
    char byte;
    int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0)
        return refusal(-errno);
    long result = read(fd, &byte, 1) < 0 && errno != EISDIR ? -errno : 0;
    close(fd);
    return refusal(result);
}
static long read_file(int argc, char **argv) { (void)argc; return read_at(argv[0], 0); }
static long list_name(int argc, char **argv)
{
    (void)argc;
    DIR *directory = opendir(argv[0]);
    struct dirent *entry;
    if (!directory)
        return refusal(-errno);
    while ((entry = readdir(directory)))
        if (strcmp(entry->d_name, argv[1]) == 0)
            return 0;
    return refusal(-ENOENT);
}
static long through_link(int argc, char **argv)
{
    (void)argc;
    unlink(argv[1]);
    if (symlink(argv[0], argv[1]))
        unprepared("symlink");
    long result = read_at(argv[1], 0);
    unlink(argv[1]);
    return result;
}
static long hard_link(int argc, char **argv)
{
    (void)argc;
    unlink(argv[1]);
    if (link(argv[0], argv[1]))
        return refusal(-errno);
    unlink(argv[1]);
    return 0;
}
static long write_file(int argc, char **argv)
{
    (void)argc;
    int fd = open(argv[0], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return refusal(-errno);
    long result = write(fd, "x", 1) == 1 ? 0 : -errno;
    close(fd);
    unlink(argv[0]);
    return refusal(result);
}

/* Look for a text in a file; in /proc, in what processes were started with. */
static int holds(const char *path, const char *text)
{
    static char content[1 << 20];
    size_t used = 0;
    ssize_t got;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY);
    if (fd < 0)
        return 0;
    while (used < sizeof content && (got = read(fd, content + used, sizeof content - used)) > 0)
        used += (size_t)got;
    close(fd);
    return memmem(content, used, text, strlen(text)) != 0;
}
static int holds_beneath(const char *directory, const char *text, int depth)
{
    char path[1024];
    struct dirent *entry;
    int found = 0;
    DIR *stream = depth > 0 ? opendir(directory) : 0;
    while (!found && stream && (entry = readdir(stream))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        if (entry->d_type == DT_DIR)
            found = holds_beneath(path, text, depth - 1);
        else if (entry->d_type == DT_REG)
            found = holds(path, text);
    }
    if (stream)
        closedir(stream);
    return found;
}
static int holds_process(const char *text)
{
    char path[300];
    struct dirent *entry;
    int found = holds("/proc/self/environ", text);
    DIR *stream = opendir("/proc");
    while (!found && stream && (entry = readdir(stream))) {
        if (*entry->d_name < '0' || *entry->d_name > '9')
            continue;
        snprintf(path, sizeof path, "/proc/%.200s/environ", entry->d_name);
        found = holds(path, text);
        snprintf(path, sizeof path, "/proc/%.200s/cmdline", entry->d_name);
        found = found || holds(path, text);
    }
    if (stream)
        closedir(stream);
    return found;
}
static long find_text(int argc, char **argv)
{
    int found = 0;
    for (int i = 1; i < argc && !found; i++)
        found = strcmp(argv[i], "/proc") == 0 ? holds_process(argv[0]) : holds_beneath(argv[i], argv[0], 8);
    return presence(found);
}

/* ---- programs ---- */
#define REFUSED 126
static const char by_policy[] = "is blocked by policy";

/* Run; tell the program itself from the one that stands in its place, and from a loader that found nothing to load. */
static long run(char **argv)
{
    static char said[4096];
    int error = 0, status, failure[2], errors[2];
    size_t used = 0;
    ssize_t got;
    if (pipe2(failure, O_CLOEXEC) || pipe2(errors, O_CLOEXEC))
        unprepared("pipe");
    pid_t pid = fork();
    if (pid < 0)
        unprepared("fork");
    if (pid == 0) {
        int nothing = open("/dev/null", O_RDWR);
        dup2(nothing, 0);
        dup2(nothing, 1);
        dup2(errors[1], 2);
        alarm(5);
        give_up_privileges();
        execv(argv[0], argv);
        error = errno;
        _exit(write(failure[1], &error, sizeof error) != sizeof error);
    }
    close(failure[1]);
    close(errors[1]);
    while (used < sizeof said - 1 && (got = read(errors[0], said + used, sizeof said - 1 - used)) > 0)
        used += (size_t)got;
    close(errors[0]);
    if (read(failure[0], &error, sizeof error) < 0 || waitpid(pid, &status, 0) != pid)
        unprepared("wait");
    if (error)
        return refusal(-error);
    if (WIFSIGNALED(status) && WTERMSIG(status) != SIGALRM && WTERMSIG(status) != SIGPIPE) {
        note("SIG%s", sigabbrev_np(WTERMSIG(status)) ? sigabbrev_np(WTERMSIG(status)) : "?");
        return -ECHILD;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == REFUSED && strstr(said, "agent-runner:")) {
        note(strstr(said, by_policy) ? "refused" : "refused:%.60s", said);
        return refusal(-EACCES);
    }
    /* What a loader, a shell or Python says when it may not open or execute. */
    if (WIFEXITED(status) && WEXITSTATUS(status) != 0 &&
        (strstr(said, "ermission denied") || strstr(said, "peration not permitted"))) {
        note("EACCES");
        return refusal(-EACCES);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
        note("exit127");
        return -ECHILD;
    }
    return 0;
}
static long run_program(int argc, char **argv) { (void)argc; return run(argv); }
/* A program that fails for want of arguments was run all the same; one that must do nothing is given --version. */
static void copy(const char *source, const char *target)
{
    char block[65536];
    ssize_t got;
    int from = open(source, O_RDONLY | O_CLOEXEC), to;
    unlink(target);
    to = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    if (to < 0)
        unprepared("copy");
    if (from < 0) {
        note("%s", strerrorname_np(errno));
        refusal(-EACCES);
        _exit(1); /* what cannot be read cannot be copied: blocked */
    }
    while ((got = read(from, block, sizeof block)) > 0)
        if (write(to, block, (size_t)got) != got)
            unprepared("copy");
    fchmod(to, 0755);
    close(from);
    close(to);
}
static long run_copy(int argc, char **argv)
{
    (void)argc;
    copy(argv[0], argv[1]);
    long result = run(argv + 1);
    unlink(argv[1]);
    return result;
}
static long run_link(int argc, char **argv)
{
    (void)argc;
    unlink(argv[1]);
    if (symlink(argv[0], argv[1]))
        unprepared("symlink");
    long result = run(argv + 1);
    unlink(argv[1]);
    return result;
}
static long run_shebang(int argc, char **argv)
{
    (void)argc;
    char text[512];
    ssize_t size = snprintf(text, sizeof text, "#!%s --version\n", argv[0]);
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    if (fd < 0 || write(fd, text, (size_t)size) != size)
        unprepared("script");
    fchmod(fd, 0755);
    close(fd);
    long result = run(argv + 1);
    unlink(argv[1]);
    return result;
}

/* ---- limits ---- */
static long use_memory(int argc, char **argv)
{
    (void)argc;
    const size_t bytes = strtoull(argv[0], 0, 10), step = 2UL << 20;
    char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return refusal(-errno);
    madvise(memory, bytes, MADV_HUGEPAGE);
    /* The kernel chooses the largest; make sure that it is this one and not who watches it. */
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "1000", 4) < 0)
        note("oom_score_adj");
    for (size_t at = 0; at < bytes; at += step)
        for (size_t page = at; page < at + step && page < bytes; page += 4096)
            memory[page] = 1;
    note("-");
    return 0;
}
static long use_processes(int argc, char **argv)
{
    (void)argc;
    long wanted = strtol(argv[0], 0, 10), made = 0, result = 0;
    setpgid(0, 0);
    while (made < wanted) {
        pid_t pid = fork();
        if (pid == 0) {
            alarm(10);
            pause();
            _exit(0);
        }
        if (pid < 0) {
            result = -errno;
            break;
        }
        made++;
    }
    signal(SIGTERM, SIG_IGN);
    kill(0, SIGTERM);
    for (long left = made; left > 0 && wait(0) > 0; left--)
        continue;
    return refusal(result);
}
static long use_descriptors(int argc, char **argv)
{
    (void)argc;
    long wanted = strtol(argv[0], 0, 10);
    struct rlimit limit;
    if (is_control() && getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    for (long i = 0; i < wanted; i++)
        if (open("/dev/null", O_RDONLY | O_CLOEXEC) < 0)
            return refusal(-errno);
    return 0;
}
static long use_space(int argc, char **argv)
{
    (void)argc;
    char path[512];
    snprintf(path, sizeof path, "%s/.probe-space-%d", argv[0], (int)getpid());
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        unprepared("file");
    int error = posix_fallocate(fd, 0, (off_t)strtoull(argv[1], 0, 10));
    close(fd);
    unlink(path);
    return refusal(-error);
}
/* Be on CPUs for some seconds; refused is to be on more of them, on average, than a limit says (thousandths of one). */
static long use_cpus(int argc, char **argv)
{
    (void)argc;
    const double seconds = atof(argv[0]);
    long processes = strtol(argv[1], 0, 10);
    const double limit = strtol(argv[2], 0, 10) / 1000.0;
    struct timespec begun, now;
    struct rusage used;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (; processes > 0; processes--) {
        pid_t pid = fork();
        if (pid < 0)
            unprepared("fork");
        if (pid == 0) {
            do
                clock_gettime(CLOCK_MONOTONIC, &now);
            while ((double)(now.tv_sec - begun.tv_sec) + (double)(now.tv_nsec - begun.tv_nsec) / 1e9 < seconds);
            _exit(0);
        }
    }
    while (wait(0) > 0)
        continue;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (getrusage(RUSAGE_CHILDREN, &used))
        unprepared("rusage");
    const double wall = (double)(now.tv_sec - begun.tv_sec) + (double)(now.tv_nsec - begun.tv_nsec) / 1e9;
    const double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    if (cpu / wall > limit)
        return 0;
    note("throttled"); /* or the machine has no more: then the permissive container says the same */
    return refusal(-EAGAIN);
}
/* Make empty files, a thousand to a directory, and remove them again. */
static long use_files(int argc, char **argv)
{
    (void)argc;
    char top[512], path[600];
    const long wanted = strtol(argv[1], 0, 10);
    long made = 0, error = 0;
    snprintf(top, sizeof top, "%s/.probe-files-%d", argv[0], (int)getpid());
    if (mkdir(top, 0700))
        unprepared("directory");
    for (; made < wanted && !error; made++) {
        if (made % 1000 == 0) {
            snprintf(path, sizeof path, "%s/%ld", top, made / 1000);
            error = mkdir(path, 0700) ? errno : 0;
        }
        snprintf(path, sizeof path, "%s/%ld/%ld", top, made / 1000, made);
        int fd = error ? -1 : open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0)
            error = error ? error : errno;
        else
            close(fd);
    }
    for (long i = made - 1; i >= 0; i--) {
        snprintf(path, sizeof path, "%s/%ld/%ld", top, i / 1000, i);
        unlink(path);
        if (i % 1000 == 0) {
            snprintf(path, sizeof path, "%s/%ld", top, i / 1000);
            rmdir(path);
        }
    }
    rmdir(top);
    return refusal(-error);
}
/* Tell whether a file system says of itself that it takes more files than so many. */
static long count_files(int argc, char **argv)
{
    (void)argc;
    struct statvfs filesystem;
    if (statvfs(argv[0], &filesystem))
        unprepared("statvfs");
    if (filesystem.f_files > strtoull(argv[1], 0, 10))
        return 0;
    note("ENOSPC");
    return refusal(-ENOSPC);
}
static long take_time(int argc, char **argv)
{
    (void)argc;
    poll(0, 0, atoi(argv[0]));
    return 0;
}
static long write_output(int argc, char **argv)
{
    (void)argc;
    char block[4096];
    memset(block, 'x', sizeof block);
    for (long left = strtol(argv[0], 0, 10); left > 0; left -= sizeof block)
        if (write(1, block, sizeof block) < 0)
            return -errno;
    return 0;
}

/* ---- connections ---- */
/* What /etc/hosts says of a name; a static program asks no resolver. */
static int look_up(const char *name, struct in_addr *address)
{
    char line[1024];
    FILE *file = fopen("/etc/hosts", "re");
    while (file && fgets(line, sizeof line, file)) {
        char *rest = 0, *first = strtok_r(line, " \t\n", &rest);
        for (char *word; first && (word = strtok_r(0, " \t\n", &rest));)
            if (strcmp(word, name) == 0 && inet_pton(AF_INET, first, address) == 1)
                return 0;
    }
    errno = ENOENT;
    return -1;
}
static int connect_unix(const char *path)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(name.sun_path, sizeof name.sun_path, "%s", path);
    return fd >= 0 && connect(fd, (struct sockaddr *)&name, sizeof name) ? -1 : fd;
}
static int send_all(int fd, const char *data, ssize_t size)
{
    while (size > 0) {
        ssize_t sent = send(fd, data, (size_t)size, MSG_NOSIGNAL);
        if (sent < 0)
            return -1;
        data += sent;
        size -= sent;
    }
    return 0;
}
/* Send a file's content, as it is seen here. */
static long show(const char *path, int driver)
{
    char block[16384];
    ssize_t got;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    while ((got = read(fd, block, sizeof block)) > 0)
        if (send_all(driver, block, got))
            return -errno;
    return got < 0 ? -errno : 0;
}
/* Connect to "unix PATH" or "tcp NAME-OR-ADDRESS PORT" and carry bytes between that and who drives the conversation, or
 * show it a "file PATH": arguments are the driver's socket, a word that tells it which one this is, and the target. */
static long carry(int argc, char **argv)
{
    int target = -1;
    const int is_file = strcmp(argv[2], "file") == 0;
    if (is_file) {
        target = 0;
    } else if (strcmp(argv[2], "unix") == 0) {
        target = connect_unix(argv[3]);
    } else {
        struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)(argc > 4 ? atoi(argv[4]) : 0))};
        if (inet_pton(AF_INET, argv[3], &name.sin_addr) != 1 && look_up(argv[3], &name.sin_addr))
            return refusal(-errno); /* no such name: nowhere to go */
        target = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (target >= 0 && connect(target, (struct sockaddr *)&name, sizeof name)) {
            long result = -errno;
            return errno == ECONNREFUSED || errno == ENETUNREACH ? refusal(result) : result;
        }
    }
    if (target < 0)
        unprepared("connect");
    int driver = connect_unix(argv[0]);
    if (driver < 0 || send_all(driver, argv[1], (ssize_t)strlen(argv[1])) || send_all(driver, "\n", 1))
        unprepared("driver");
    if (is_file)
        return show(argv[3], driver);
    struct pollfd both[2] = {{driver, POLLIN, 0}, {target, POLLIN, 0}};
    char block[16384];
    while (poll(both, 2, -1) > 0)
        for (int from = 0; from < 2; from++) {
            if (!both[from].revents)
                continue;
            ssize_t got = read(both[from].fd, block, sizeof block);
            if (got <= 0 && from == 0)
                return 0; /* the driver has seen what it wanted */
            if (got <= 0) {
                shutdown(driver, SHUT_WR);
                both[1].fd = -1;
            } else if (send_all(both[!from].fd, block, got) && from == 1) {
                return 0;
            }
        }
    return 0;
}

const struct act acts[] = {
    {"read", 1, read_file, 0},
    {"list", 2, list_name, 0},
    {"through-link", 2, through_link, 0},
    {"hard-link", 2, hard_link, 0},
    {"write", 1, write_file, 0},
    {"find", 2, find_text, 0},
    {"run", 1, run_program, 0},
    {"run-copy", 2, run_copy, 0},
    {"run-link", 2, run_link, 0},
    {"run-shebang", 2, run_shebang, 0},
    {"memory", 1, use_memory, 1},
    {"processes", 1, use_processes, 0},
    {"descriptors", 1, use_descriptors, 0},
    {"space", 2, use_space, 0},
    {"cpus", 3, use_cpus, 0},
    {"files", 2, use_files, 0},
    {"count-files", 2, count_files, 0},
    {"time", 1, take_time, 0},
    {"output", 1, write_output, 0},
    {"carry", 4, carry, 0},
};
const size_t acts_count = sizeof acts / sizeof *acts;
