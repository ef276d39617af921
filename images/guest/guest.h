/* What the processes of the guest share. See main.c for who they are. */
#ifndef AGENT_RUNNER_GUEST_H
#define AGENT_RUNNER_GUEST_H

#include "protocol.h"

#include <sys/resource.h>
#include <sys/types.h>

#define PACKET_MAX (1u + DATA_MAX) /* type and body, between PID 1 and a worker */
#define FILE_LIMIT_MS 10000        /* for one read, list or search; codec.py knows it too */
#define WRITE_LIMIT_MS 60000
#define GRACE_MS 10000 /* how long a tree may take to die before the whole container ends */

/* Descriptors at fixed places in every worker; higher ones are closed when it starts. */
enum { FD_PID1 = 3, FD_NULL = 4, FD_WORKSPACE = 5, FD_RULES = 6, FD_FIRST_FREE = 7 };

struct guest {
    uint32_t landlock_abi;
    bool has_subreaper;   /* false under gVisor: an orphan goes to PID 1, whatever command it belonged to */
    bool is_separate;     /* true: commands run as uid and gid, the guest as a user of its own (identity.c) */
    uint32_t uid, gid, processes; /* processes: the most that user may have */
    bool is_closed; /* FD_RULES holds what every command is restricted by */
    struct rlimit nofile; /* as the container came with it; what commands get back */
    bool must_observe;    /* every exec of a command is reported */
};

/* process.c */
/* Last words on stderr, then the end of this process. Of PID 1: the end of the container. */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
int64_t now_ms(void);
void close_from(int first, bool only_on_exec);

/* landlock.c */
uint32_t landlock_abi(void);
bool landlock_can_scope(uint32_t abi);
/* A domain of scopes alone; is_outer: the rules of a closed shell come inside it. */
int landlock_scope(uint32_t abi, bool is_outer);
/* The ruleset of a closed shell, scopes included; dies of what cannot be enforced. */
int landlock_rules(uint32_t abi, const struct exec_rules *rules);
int landlock_restrict(int rules);

/* observe.c: in PID 1; in the main process; in the keeper */
int observe_check(void);
int observe_self(int hand_fd);
void observe_announce(const char *path);
int observer_open(void);
int observer_fd(void);
void observer_hear(short events, pid_t main_pid, int exec_fd, char *const *argv);
int64_t observer_due(void);
size_t observer_take(uint8_t *body);
uint64_t observer_unreported(void);

/* beneath.c */
int open_beneath(const char *path, int flags);
int open_beneath_strict(const char *path, int flags);
int open_parent(const char *path, bool must_make, const char **name);

/* tree.c */
void kill_tree(bool is_scoped);
size_t kill_strangers(const pid_t *known, size_t count);

/* worker.c: the worker's end of its socket to PID 1 */
bool packet_try(uint8_t *packet, size_t size);
void packet_send(uint8_t type, const void *body, size_t size);
_Noreturn void worker_done(uint8_t type, const struct writer *body);
_Noreturn void worker_failed(uint8_t type, int error, const char *what);
size_t packet_receive(uint8_t *type, uint8_t *body, size_t size, bool may_wait);

/* The work of each worker; none returns. */
_Noreturn void keep_command(const struct guest *guest, const struct spawn *spawn);
_Noreturn void read_file(const struct read_request *request);
_Noreturn void write_file(const struct write_request *request);
_Noreturn void list_files(const struct list_request *request);
_Noreturn void search_files(const struct search_request *request);

/* identity.c */
void separate_from_commands(struct guest *guest, char *const *arguments);
void act_as_command(const struct guest *guest, bool is_begun);
bool become_user(const struct guest *guest);
void drop_capabilities(const struct guest *guest);

/* controls.c */
_Noreturn void report_controls(void);

/* relay.c */
int relay_listen(const struct relay_request *request);
_Noreturn void relay_serve(const struct config *config, const int *listeners);

#endif
