/*
 * Stands in the place of a shell of the image, for an agent that runs inside and starts its own shells.
 *
 * It asks the host about its own arguments before anything runs. Allowed: the real shell takes its place, with the
 * same arguments, process and environment. Refused: the host's words go to stderr, and the exit code is 126.
 *
 * This is guidance and a record, never the boundary: whoever looks for the real shell finds it. The container holds
 * without it. Whatever goes wrong here is a refusal.
 *
 * Wire, all numbers u32 in network order. Up: size of what follows | size, bytes of the ticket | count |
 * (size, bytes) for each argument. Down: 'a' allowed, 'r' refused, or 's' send the script; then size, bytes: the refusal,
 * or the script's path. Up, after 's': size of the script, its bytes, at most SCRIPT_MAX. Then an answer as before.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET "/.agent-runner/egress/shell.sock"
#define REAL "/.agent-runner/shell"
#define TICKET "AGENT_RUNNER_TICKET"
#define REQUEST_MAX (1024u * 1024)
#define SCRIPT_MAX (256u * 1024)
#define ANSWER_MAX (64u * 1024)
#define PATH_SPACE 4096
#define REFUSED 126

static _Noreturn void refuse(const char *what)
{
    fprintf(stderr, "agent-runner: this shell cannot be judged, so it does not run: %s (%s)\n", what, strerror(errno));
    exit(REFUSED);
}

static void send_all(int fd, const void *at, size_t size)
{
    for (const char *next = at; size > 0;) {
        ssize_t put = send(fd, next, size, MSG_NOSIGNAL);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            refuse("the policy does not listen");
        next += put;
        size -= (size_t)put;
    }
}

static void receive_all(int fd, void *at, size_t size)
{
    for (char *next = at; size > 0;) {
        ssize_t got = recv(fd, next, size, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            refuse("the policy does not answer");
        next += got;
        size -= (size_t)got;
    }
}

static void send_number(int fd, size_t number)
{
    uint32_t packed = htonl((uint32_t)number);
    send_all(fd, &packed, sizeof packed);
}

static void send_bytes(int fd, const void *at, size_t size)
{
    send_number(fd, size);
    send_all(fd, at, size);
}

static int connect_to_host(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        refuse("the policy cannot be reached");
    return fd;
}

static void ask(int fd, int argc, char **argv)
{
    /* Given once to the main process of a line that the host has judged already; worth nothing a second time. */
    const char *ticket = getenv(TICKET);
    if (!ticket)
        ticket = "";
    size_t size = 4 + strlen(ticket) + 4;
    for (int i = 0; i < argc; i++)
        size += 4 + strlen(argv[i]);
    if (size > REQUEST_MAX) {
        errno = E2BIG;
        refuse("its arguments are too long");
    }
    send_number(fd, size);
    send_bytes(fd, ticket, strlen(ticket));
    send_number(fd, (size_t)argc);
    for (int i = 0; i < argc; i++)
        send_bytes(fd, argv[i], strlen(argv[i]));
    unsetenv(TICKET);
}

/* The answer's kind; its text, NUL-terminated, in place. */
static char hear(int fd, char text[ANSWER_MAX + 1])
{
    char kind;
    uint32_t packed;
    receive_all(fd, &kind, 1);
    receive_all(fd, &packed, sizeof packed);
    size_t size = ntohl(packed);
    if (size > ANSWER_MAX) {
        errno = EPROTO;
        refuse("the policy's answer is too long");
    }
    receive_all(fd, text, size);
    text[size] = 0;
    return kind;
}

static void send_script(int fd, const char *path)
{
    static char script[SCRIPT_MAX + 1];
    struct stat found;
    /* A FIFO or a device would give the shell other bytes than the ones that are judged. */
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0 || fstat(file, &found) < 0)
        refuse("its script cannot be read");
    if (!S_ISREG(found.st_mode)) {
        errno = EINVAL;
        refuse("its script is not a regular file");
    }
    size_t size = 0;
    for (;;) {
        ssize_t got = read(file, script + size, sizeof script - size);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            refuse("its script cannot be read");
        if (got == 0)
            break;
        size += (size_t)got;
        if (size > SCRIPT_MAX) {
            errno = EFBIG;
            refuse("its script is too long to be judged");
        }
    }
    close(file);
    send_bytes(fd, script, size);
}

int main(int argc, char **argv)
{
    static char text[ANSWER_MAX + 1], real[PATH_SPACE];
    int fd = connect_to_host();
    ask(fd, argc, argv);
    char kind = hear(fd, text);
    if (kind == 's') {
        send_script(fd, text);
        kind = hear(fd, text);
    }
    if (kind != 'a') {
        fputs(text, stderr);
        return REFUSED;
    }
    close(fd);
    /* The path this program is mounted on: the real one keeps it beneath REAL. */
    size_t prefix = strlen(REAL);
    memcpy(real, REAL, prefix);
    ssize_t size = readlink("/proc/self/exe", real + prefix, sizeof real - prefix - 1);
    if (size <= 0 || (size_t)size >= sizeof real - prefix - 1)
        refuse("its own name cannot be read");
    real[prefix + (size_t)size] = 0;
    execv(real, argv);
    refuse("the real shell cannot be started");
}
