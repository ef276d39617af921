/* Run attempts, each in a child: some end it, and some change it for good.
 *
 * probe [OPTIONS]          every system call of its table
 * probe [OPTIONS] ID       one; exit 0 worked, 1 blocked, 2 failed, 64 unknown id
 * probe [OPTIONS] -        what stdin names: lines of "ID ACT ARGUMENT...", blanks in arguments as %20. A line that
 *                          begins with '&' runs beside the following ones, "wait" waits for those; an empty line, or
 *                          the end, ends it all
 *   --scratch DIR          where attempts leave files (made when missing)      [/scratch]
 *   --mounts DIR           a mount that attempts may change                    [/mnt]
 *   --workspace DIR        the files that the policy is about                  [/workspace]
 *   --control              this container is the permissive one
 *
 * Prints one line each: "ID verdict detail".
 */
#include <grp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "probe.h"

enum { WORKED, BLOCKED, FAILED };
enum { NOBODY = 65534 };
enum { LINE = 8192, WORDS = 32, BESIDE = 256, ID = 96 };

/* What a child tells its parent; shared memory, since an attempt may lose every descriptor. */
struct slot {
    char note[160];
    int is_refusal;
};
struct job {
    pid_t pid;
    char id[ID];
    int is_killed_when_refused;
};

const char *mounts = "/mnt", *workspace = "/workspace";
static int in_control;
static struct slot *slots, *mine;
static struct job jobs[BESIDE];

_Noreturn void unprepared(const char *what)
{
    note("setup:%s:%s", what, strerrorname_np(errno) ? strerrorname_np(errno) : "?");
    _exit(FAILED);
}

void note(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(mine->note, sizeof mine->note, format, arguments);
    va_end(arguments);
    for (char *c = mine->note; *c; c++)
        if (*c <= ' ' || *c > '~')
            *c = '_';
}

long refusal(long result)
{
    mine->is_refusal = result < 0;
    return result;
}

long presence(int is_there)
{
    if (is_there)
        return 0;
    note("absent");
    return refusal(-ENOENT);
}

int is_control(void) { return in_control; }

void give_up_privileges(void)
{
    const gid_t none[1] = {NOBODY};
    if (!in_control)
        return;
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
            unprepared("bounding");
    if (setgroups(0, none) || setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY) ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        unprepared("nobody");
    if (setuid(0) == 0)
        unprepared("root");
}

const struct probe *find_probe(const char *id)
{
    for (size_t i = 0; i < system_calls_count; i++)
        if (strcmp(id, system_calls[i].id) == 0)
            return &system_calls[i];
    for (size_t i = 0; i < surroundings_count; i++)
        if (strcmp(id, surroundings[i].id) == 0)
            return &surroundings[i];
    return 0;
}

static _Noreturn void die(const char *what)
{
    perror(what);
    exit(70);
}

static _Noreturn void attempt(const struct probe *probe, const struct act *act, int argc, char **argv)
{
    alarm(20);
    errno = 0;
    long result = probe ? probe->run() : act->run(argc, argv);
    int verdict = FAILED;
    if (result == 0)
        verdict = WORKED;
    else if (mine->is_refusal || result == -EPERM || result == -EACCES || result == -ENOSYS)
        verdict = BLOCKED;
    for (int i = 0; probe && i < 5 && probe->reached[i]; i++)
        if (result == -probe->reached[i])
            verdict = WORKED;
    if (!*mine->note && result)
        note("%s", strerrorname_np((int)-result) ? strerrorname_np((int)-result) : "?");
    _exit(verdict);
}

/* Start one in slot number i. */
static void start(int i, const char *id, const struct probe *probe, const struct act *act, int argc, char **argv)
{
    memset(&slots[i], 0, sizeof *slots);
    snprintf(jobs[i].id, sizeof jobs[i].id, "%s", id);
    jobs[i].is_killed_when_refused = act && act->is_killed_when_refused;
    jobs[i].pid = fork();
    if (jobs[i].pid < 0)
        die("fork");
    if (jobs[i].pid == 0) {
        mine = &slots[i];
        attempt(probe, act, argc, argv);
    }
}

/* Print what came of a job that has ended; return its verdict. */
static int report(int i, int status)
{
    static const char *const words[] = {"worked", "blocked", "failed"};
    char text[sizeof slots->note + 1];
    int verdict = FAILED;
    /* Shared with whatever the attempt left running: a copy, so that its end stays one. */
    memcpy(text, slots[i].note, sizeof slots->note);
    text[sizeof slots->note] = 0;
    if (WIFSIGNALED(status)) {
        int number = WTERMSIG(status);
        /* Which filter action kills by SIGSYS and which with a plain death differs by kernel: name the signal. */
        if (number == SIGSYS || (number == SIGKILL && jobs[i].is_killed_when_refused))
            verdict = BLOCKED;
        snprintf(text, sizeof text, "SIG%s", sigabbrev_np(number) ? sigabbrev_np(number) : "?");
    } else if (WEXITSTATUS(status) <= FAILED) {
        verdict = WEXITSTATUS(status);
    }
    printf("%s %s %s\n", jobs[i].id, words[verdict], *text ? text : "-");
    fflush(stdout);
    jobs[i].pid = 0;
    return verdict;
}

/* Wait for the job in a slot, and report whatever else ends meanwhile. 0 waits for all. */
static int await(int i)
{
    int verdict = FAILED, status;
    for (;;) {
        int left = 0;
        for (int k = 0; k < BESIDE; k++)
            left += jobs[k].pid > 0;
        if (left == 0 || (i >= 0 && jobs[i].pid == 0))
            return verdict;
        pid_t pid = waitpid(-1, &status, 0);
        if (pid < 0 && errno == EINTR)
            continue;
        if (pid < 0)
            die("waitpid");
        for (int k = 0; k < BESIDE; k++)
            if (jobs[k].pid == pid) {
                int came = report(k, status);
                if (k == i)
                    verdict = came;
                break;
            }
    }
}

static int judge(const struct probe *probe)
{
    start(0, probe->id, probe, 0, 0, 0);
    return await(0);
}

static char *decoded(char *word)
{
    char *to = word;
    for (char *from = word; *from; from++, to++) {
        unsigned value;
        if (*from == '%' && sscanf(from + 1, "%2x", &value) == 1) {
            *to = (char)value;
            from += 2;
        } else {
            *to = *from;
        }
    }
    *to = 0;
    return word;
}

static void run_line(char *line)
{
    char *argv[WORDS + 1] = {0}, *rest = 0;
    int argc = 0, slot = 0, is_beside = *line == '&';
    for (char *word = strtok_r(line + is_beside, " \n", &rest); word && argc < WORDS; word = strtok_r(0, " \n", &rest))
        argv[argc++] = decoded(word);
    if (is_beside) {
        while (++slot < BESIDE && jobs[slot].pid)
            continue;
        if (slot == BESIDE) {
            printf("%s failed too-many-at-once\n", argv[0]);
            return;
        }
    }
    const struct act *act = 0;
    for (size_t i = 0; argc > 1 && i < acts_count; i++)
        if (strcmp(argv[1], acts[i].name) == 0 && argc - 2 >= acts[i].arguments)
            act = &acts[i];
    const struct probe *probe = argc == 2 && strcmp(argv[1], "probe") == 0 ? find_probe(argv[0]) : 0;
    if (!act && !probe) {
        printf("%s failed unknown\n", argc ? argv[0] : "?");
        fflush(stdout);
        return;
    }
    start(slot, argv[0], probe, act, argc - 2, argv + 2);
    if (!is_beside)
        await(0);
}

static void run_lines(void)
{
    static char line[LINE];
    while (fgets(line, sizeof line, stdin) && *line != '\n') {
        if (strcmp(line, "wait\n") == 0)
            await(-1);
        else
            run_line(line);
    }
    await(-1);
    printf("end\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const char *scratch = 0;
    int i = 1;
    for (; i < argc && strncmp(argv[i], "--", 2) == 0; i++) {
        if (strcmp(argv[i], "--control") == 0)
            in_control = 1;
        else if (i + 1 < argc && strcmp(argv[i], "--scratch") == 0)
            scratch = argv[++i];
        else if (i + 1 < argc && strcmp(argv[i], "--mounts") == 0)
            mounts = argv[++i];
        else if (i + 1 < argc && strcmp(argv[i], "--workspace") == 0)
            workspace = argv[++i];
        else {
            fprintf(stderr, "probe: unknown option %s\n", argv[i]);
            return 64;
        }
    }
    slots = mmap(0, BESIDE * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (slots == MAP_FAILED)
        die("mmap");
    if (scratch)
        mkdir(scratch, 0700);
    mkdir(mounts, 0755);
    if (in_control && mount("probe", mounts, "tmpfs", 0, ""))
        die(mounts);
    /* Only what was asked for must be there; one attempt alone often needs no files. */
    if (chdir(scratch ? scratch : "/scratch") && scratch)
        die(scratch);
    if (i < argc && strcmp(argv[i], "-") == 0) {
        run_lines();
        return 0;
    }
    if (i < argc) {
        const struct probe *probe = find_probe(argv[i]);
        if (probe)
            return judge(probe);
        fprintf(stderr, "probe: unknown id %s\n", argv[i]);
        return 64;
    }
    for (size_t k = 0; k < system_calls_count; k++)
        judge(&system_calls[k]);
    return 0;
}
