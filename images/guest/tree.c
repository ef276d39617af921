/*
 * Kill every process of a command: daemonised, in sessions of their own, ignoring SIGTERM, forking all the while.
 *
 * Who is in the tree: the keeper is a child subreaper, so whatever a descendant does (setsid, double fork,
 * CLONE_PARENT, killing those in between), its ancestors lead to the keeper as long as the keeper lives.
 *
 * With Landlock scopes the keeper is in a domain (outer) and the command in one nested in it (inner). kill(-1) from
 * the keeper then means: all in the outer domain but the keeper, which is this tree and nothing else. The kernel
 * walks the processes under the lock that fork needs to add one, and a fork whose parent has a signal pending is
 * undone: so a fork bomb dies in one call, with no gap to slip through.
 *
 * Without it the tree is read from /proc, which takes time in which it can grow: so it is first stopped, until no new
 * process is found (stopped processes do not fork and go on counting against the pids limit), then killed, again and
 * again until none is left. Processes that wake one another with SIGCONT can draw this out; PID 1 then ends the
 * container, which is atomic again.
 */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROCESSES_MAX 32768 /* more cannot be killed in one pass; the next pass finds them */

struct process {
    pid_t pid, parent;
    bool is_doomed;
};

static struct process processes[PROCESSES_MAX]; /* untouched, and so no memory, until first needed */

static int by_pid(const void *left, const void *right)
{
    pid_t a = ((const struct process *)left)->pid, b = ((const struct process *)right)->pid;
    return (a > b) - (a < b);
}

static pid_t parent_of(int proc, const char *name)
{
    char path[32], stat[512];
    if (snprintf(path, sizeof path, "%s/stat", name) >= (int)sizeof path)
        return -1;
    int fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1; /* Gone meanwhile. */
    ssize_t got = read(fd, stat, sizeof stat - 1);
    close(fd);
    if (got <= 0)
        return -1;
    stat[got] = 0;
    /* The name in parentheses is the process's to choose; the last parenthesis is the kernel's. */
    const char *after = strrchr(stat, ')');
    int parent;
    return after && sscanf(after + 1, " %*c %d", &parent) == 1 ? parent : -1;
}

static size_t read_processes(void)
{
    size_t count = 0;
    DIR *directory = opendir("/proc");
    if (!directory)
        die("cannot read /proc to find the processes of a command: %s", strerror(errno));
    for (struct dirent *entry; count < PROCESSES_MAX && (entry = readdir(directory));) {
        pid_t pid = (pid_t)atoi(entry->d_name);
        pid_t parent = pid > 0 ? parent_of(dirfd(directory), entry->d_name) : -1;
        if (parent >= 0)
            processes[count++] = (struct process){pid, parent, false};
    }
    closedir(directory);
    qsort(processes, count, sizeof *processes, by_pid);
    return count;
}

/* Doom all descendants of root except the known children of root and what is under them. */
static size_t doom_descendants(size_t count, pid_t root, const pid_t *known, size_t known_count)
{
    size_t doomed = 0;
    for (bool is_changed = true; is_changed;) {
        is_changed = false;
        for (size_t i = 0; i < count; i++) {
            struct process *process = &processes[i];
            bool is_doomed = process->parent == root;
            for (size_t k = 0; is_doomed && k < known_count; k++)
                is_doomed = process->pid != known[k];
            if (!is_doomed) {
                struct process key = {.pid = process->parent};
                struct process *parent = bsearch(&key, processes, count, sizeof key, by_pid);
                is_doomed = parent && parent->is_doomed;
            }
            if (is_doomed && !process->is_doomed) {
                process->is_doomed = is_changed = true;
                doomed++;
            }
        }
    }
    return doomed;
}

static void signal_doomed(size_t count, int signal)
{
    for (size_t i = 0; i < count; i++)
        if (processes[i].is_doomed)
            kill(processes[i].pid, signal); /* ESRCH: it was faster. A pid is not reused before we reap it. */
}

static size_t stop_and_kill(pid_t root, const pid_t *known, size_t known_count)
{
    size_t count, doomed = 0, before;
    int pass = 0;
    do {
        before = doomed;
        count = read_processes();
        doomed = doom_descendants(count, root, known, known_count);
        signal_doomed(count, SIGSTOP);
    } while (doomed != before && ++pass < 16);
    signal_doomed(count, SIGKILL);
    return doomed;
}

/* Send SIGKILL to every descendant of the calling keeper. The caller reaps, and calls again if any is left. */
void kill_tree(bool is_scoped)
{
    if (!is_scoped)
        stop_and_kill(getpid(), NULL, 0);
    else if (kill(-1, SIGKILL) < 0 && errno != ESRCH && errno != EPERM)
        die("cannot kill the processes of a command: %s", strerror(errno));
}

/* In PID 1: kill the children it did not make, which are what a dead keeper left behind, and all under them.
 * Returns how many there were; those that died stay until they are reaped. */
size_t kill_strangers(const pid_t *known, size_t count)
{
    return stop_and_kill(getpid(), known, count);
}
