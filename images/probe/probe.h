/* The self-test's program: tries one thing after another, each in a child of its own, and says what came of it.
 *
 * worked   it was done, or answered with an error that only what lies behind the gate can give
 * blocked  EPERM, EACCES, ENOSYS, killed by SIGSYS, or a refusal that the attempt itself knows as one
 * failed   anything else: this kernel or this container cannot show the difference
 *
 * "blocked" proves nothing alone: the same attempt must work in a permissive container.
 */
#ifndef PROBE_H
#define PROBE_H

#include <errno.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

/* One attempt without arguments. It returns 0 when it worked, else -errno. */
struct probe {
    const char *id;
    long (*run)(void);
    int reached[5]; /* errors that only the code behind the gate gives */
};

extern const struct probe system_calls[], surroundings[];
extern const size_t system_calls_count, surroundings_count;

/* One attempt with arguments, named by a line of the caller's. */
struct act {
    const char *name;
    int arguments; /* at least so many */
    long (*run)(int argc, char **argv);
    int is_killed_when_refused; /* the out-of-memory killer is a refusal */
};

extern const struct act acts[];
extern const size_t acts_count;

extern const char *mounts;    /* a mount that an attempt may change */
extern const char *workspace; /* where files are made that the policy is about */

/* 0 worked, else -errno: the shape of every attempt. */
static inline long outcome(long result) { return result < 0 ? -errno : 0; }
#define CALL(...) outcome(syscall(__VA_ARGS__))

/* Set-up that fails is not a refusal: say so and leave, whatever the errno was. */
_Noreturn void unprepared(const char *what);

/* What else came of it, one word; shown in place of the error's name. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The result of an attempt that was refused, whatever the error: result is 0 (it worked) or -errno. */
long refusal(long result);

/* The result of an attempt that looks for something that must not be there. */
long presence(int is_there);

/* True in the permissive container: whoever tries there may first set up what the attempt looks for. */
int is_control(void);

/* Before a program of the image is run. In the permissive container it must not have what that container has: an image
 * is nobody's to trust, and only the cover over a program is missing there, not the walls around it. */
void give_up_privileges(void);

/* Tell whether a name is one of the two tables' and run it; for main. */
const struct probe *find_probe(const char *id);

#endif
