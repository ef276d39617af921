/*
 * Relay loopback ports of the container to the gateway's Unix socket. A process of its own, forked from PID 1 before
 * any command runs: its load and its faults cannot hold up the control channel. When it ends, PID 1 ends the
 * container; a sandbox whose only door is stuck should say so at once.
 *
 * Bytes move inside the kernel, socket to pipe to socket, once a connection is relayed. A pipe is lent to a direction
 * while bytes are in it; when none is free, a buffer does.
 *
 * Every buffer and count is fixed. Each direction holds at most one pipe or buffer: a side is read only when what was
 * read from it before has been written on. Half-closes are passed on, in order, behind the data. When anything fails,
 * the client gets a reset, at once: a refused name must look like a refused connection, not like a timeout.
 */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECTIONS_MAX 256u /* more wait in the backlog of their listener */
#define BUFFER_BYTES (64u * 1024)
#define REPLY_HEAD_MAX 8192u
#define BACKLOG 128
#define DIAL_MS 5000 /* for the gateway to accept */
#define DIAL_AGAIN_MS 5
#define ASK_MS 60000 /* for the gateway to resolve, dial and answer a CONNECT */
/* Two descriptors each: with two sockets for each connection and the listeners, they stay below the 1024 we have. */
#define PIPES_MAX 48u
#define PIPE_BYTES (256 * 1024) /* asked for; all users' pipes together have a limit on the host */
#define TURNS 4                 /* fills of one direction in a row; then the others have theirs */

enum state { FREE, DIALLING, ASKING, RELAYING };

struct lent_pipe {
    int ends[2]; /* out, in; -1 while it was not made yet */
    bool is_lent;
};

struct side {
    int fd;
    struct lent_pipe *pipe; /* NULL unless bytes of this side may be in it */
    size_t piped;           /* how many are */
    bool is_at_end;   /* no more will be read from it */
    bool is_passed_on; /* and the other side has been told */
    size_t start, end; /* read from it, not yet written to the other side */
    uint8_t bytes[BUFFER_BYTES];
};

struct connection {
    enum state state;
    const char *connect;
    int64_t deadline;
    struct side sides[2]; /* the client, the gateway */
};

static struct connection connections[CONNECTIONS_MAX];
static struct lent_pipe pipes[PIPES_MAX];

static void make_pipes(void)
{
    for (size_t i = 0; i < PIPES_MAX; i++)
        pipes[i] = (struct lent_pipe){{-1, -1}, false};
}

/* gVisor has the call, but not for every kind of socket. */
static bool can_splice = true;

static bool is_no_splice(int error)
{
    return error == EINVAL || error == ENOSYS || error == EPERM || error == EOPNOTSUPP;
}

/* Return a free, empty pipe, or NULL: then bytes are copied, which is only slower. */
static struct lent_pipe *borrow_pipe(void)
{
    if (!can_splice)
        return NULL;
    struct lent_pipe *pipe = pipes;
    while (pipe->is_lent)
        if (++pipe == pipes + PIPES_MAX)
            return NULL;
    if (pipe->ends[0] < 0) {
        if (pipe2(pipe->ends, O_CLOEXEC | O_NONBLOCK) < 0) {
            pipe->ends[0] = pipe->ends[1] = -1;
            return NULL;
        }
        fcntl(pipe->ends[1], F_SETPIPE_SZ, PIPE_BYTES); /* An optimisation; the size it has will do. */
    }
    pipe->is_lent = true;
    return pipe;
}

static void return_pipe(struct side *side)
{
    if (!side->pipe)
        return;
    if (side->piped > 0) { /* Bytes of one connection must never come out of another. */
        close(side->pipe->ends[0]);
        close(side->pipe->ends[1]);
        side->pipe->ends[0] = side->pipe->ends[1] = -1;
    }
    side->pipe->is_lent = false;
    side->pipe = NULL;
    side->piped = 0;
}

/* In PID 1, before the relay is forked, so that a port that cannot be had is known before the guest is ready. */
int relay_listen(const struct relay_request *request)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(request->port)};
    int one = 1;
    if (inet_pton(AF_INET, request->address, &address.sin_addr) != 1)
        die("cannot relay from '%s': not an IPv4 address", request->address);
    if ((ntohl(address.sin_addr.s_addr) >> 24) != 127)
        die("cannot relay from '%s': not a loopback address", request->address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0
        || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, BACKLOG) < 0)
        die("cannot listen on %s:%u: %s", request->address, request->port, strerror(errno));
    return fd;
}

static void end_connection(struct connection *connection, bool must_reset)
{
    struct linger now = {1, 0};
    if (must_reset)
        setsockopt(connection->sides[0].fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    for (int i = 0; i < 2; i++) {
        return_pipe(&connection->sides[i]);
        if (connection->sides[i].fd >= 0)
            close(connection->sides[i].fd);
    }
    connection->state = FREE;
}

static void start_relaying(struct connection *connection)
{
    connection->state = RELAYING;
    connection->deadline = INT64_MAX;
}

static void dial(struct connection *connection, const char *path)
{
    struct side *client = &connection->sides[0];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = connection->sides[1].fd;
    if (fd < 0) {
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) {
            end_connection(connection, true);
            return;
        }
        connection->sides[1].fd = fd;
    }
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        /* A Unix socket whose backlog is full says EAGAIN and cannot be polled for: ask again shortly. */
        if (errno != EAGAIN && errno != EINTR)
            end_connection(connection, true);
        return;
    }
    if (connection->connect[0] == 0) {
        start_relaying(connection);
        return;
    }
    int size = snprintf((char *)client->bytes, sizeof client->bytes, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n",
                        connection->connect, connection->connect);
    client->end = (size_t)size; /* As if the client had sent it; nothing is read from it until the answer. */
    connection->state = ASKING;
    connection->deadline = now_ms() + ASK_MS;
}

static void accept_client(int listener, const char *connect)
{
    int one = 1;
    struct connection *connection = connections;
    while (connection->state != FREE)
        if (++connection == connections + CONNECTIONS_MAX)
            return;
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == EBADF || errno == EINVAL)
            die("cannot accept on a relayed port: %s", strerror(errno));
        return; /* The client went away again. */
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* An optimisation; nothing depends on it. */
    connection->state = DIALLING;
    connection->connect = connect;
    connection->deadline = now_ms() + DIAL_MS;
    for (int i = 0; i < 2; i++) {
        struct side *side = &connection->sides[i];
        side->fd = i == 0 ? fd : -1;
        side->is_at_end = side->is_passed_on = false;
        side->start = side->end = side->piped = 0;
        side->pipe = NULL;
    }
}

/* Read from a side into its empty (or, for a reply head, not full) buffer. False when the side failed. */
static bool fill(struct side *side, size_t most)
{
    ssize_t got = recv(side->fd, side->bytes + side->end, most - side->end, 0);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    if (got == 0)
        side->is_at_end = true;
    side->end += (size_t)got;
    return true;
}

static bool holds_bytes(const struct side *side)
{
    return side->piped > 0 || side->start < side->end;
}

/*
 * Move bytes from a side that holds none into a pipe, or into its buffer. False when the side failed. A side that was
 * just found readable and has nothing to splice has TCP's urgent byte at its front, which no splice gets past: we would
 * wake for ever. A read leaves it out.
 */
static bool take(struct side *side, bool was_readable)
{
    if (!side->pipe && !(side->pipe = borrow_pipe()))
        return fill(side, BUFFER_BYTES);
    ssize_t got = splice(side->fd, NULL, side->pipe->ends[1], NULL, PIPE_BYTES, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (got < 0 && is_no_splice(errno)) {
        can_splice = false;
        return_pipe(side);
        return fill(side, BUFFER_BYTES);
    }
    if (got < 0 && errno == EAGAIN && was_readable)
        return fill(side, BUFFER_BYTES);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    if (got == 0)
        side->is_at_end = true;
    side->piped = (size_t)got;
    return true;
}

/* A splice cannot be told, as a send can, that an error will do: SIGPIPE is ignored since PID 1 began.
 *
 * Write what was read from one side to the other; then, if that was all there will ever be, say so. */
static bool flush(struct side *from, const struct side *to)
{
    while (holds_bytes(from)) {
        ssize_t put;
        if (from->start < from->end) {
            put = send(to->fd, from->bytes + from->start, from->end - from->start, MSG_NOSIGNAL);
            if (put < 0)
                return errno == EAGAIN || errno == EINTR;
            from->start += (size_t)put;
            if (from->start < from->end)
                return true;
        } else if (can_splice) {
            put = splice(from->pipe->ends[0], NULL, to->fd, NULL, from->piped, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (put < 0 && !is_no_splice(errno))
                return errno == EAGAIN || errno == EINTR;
            can_splice = put >= 0;
            from->piped -= put < 0 ? 0 : (size_t)put;
        } else { /* What got into a pipe before it turned out that it cannot get out this way. */
            ssize_t got = read(from->pipe->ends[0], from->bytes, BUFFER_BYTES);
            if (got <= 0)
                return false;
            from->piped -= (size_t)got;
            from->start = 0;
            from->end = (size_t)got;
        }
    }
    if (from->start < from->end)
        return true;
    from->start = from->end = 0;
    if (from->is_at_end && !from->is_passed_on) {
        from->is_passed_on = true;
        return shutdown(to->fd, SHUT_WR) == 0 || errno == ENOTCONN;
    }
    return true;
}

/* Look for the whole head of the gateway's answer. What follows it belongs to the client. False: refused. */
static bool hear_answer(struct connection *connection)
{
    struct side *gateway = &connection->sides[1];
    const uint8_t *end = memmem(gateway->bytes, gateway->end, "\r\n\r\n", 4);
    if (!end)
        return !gateway->is_at_end && gateway->end < REPLY_HEAD_MAX;
    bool is_answer = gateway->end >= 13 && memcmp(gateway->bytes, "HTTP/1.", 7) == 0;
    if (!is_answer || memcmp(gateway->bytes + 8, " 200", 4) != 0
        || (gateway->bytes[12] != ' ' && gateway->bytes[12] != '\r'))
        return false;
    gateway->start = (size_t)(end - gateway->bytes) + 4;
    start_relaying(connection);
    return flush(gateway, &connection->sides[0]);
}

/*
 * Write on; where the other side takes no more, take no more either. It may have answered before it had heard all (a
 * refusal in the middle of an upload): what it said is in our hands or waits to be read, and is passed on first. False
 * when that cannot be: it is the client that is gone.
 */
static bool flush_or_give_up(struct connection *connection, int i)
{
    struct side *from = &connection->sides[i];
    if (flush(from, &connection->sides[1 - i]))
        return true;
    if (i == 1)
        return false;
    return_pipe(from);
    from->start = from->end = 0;
    from->is_at_end = from->is_passed_on = true;
    return true;
}

static bool serve(struct connection *connection, const short revents[2])
{
    struct side *client = &connection->sides[0], *gateway = &connection->sides[1];
    if (connection->state == DIALLING)
        return revents[0] == 0; /* Only errors were asked for. */
    if (connection->state == ASKING) {
        if (revents[0])
            return false;
        if (revents[1] & POLLOUT && !flush(client, gateway))
            return false;
        if (revents[1] & (POLLIN | POLLHUP | POLLERR))
            return fill(gateway, REPLY_HEAD_MAX) && hear_answer(connection);
        return true;
    }
    for (int i = 0; i < 2; i++) {
        struct side *from = &connection->sides[i];
        bool is_ready = revents[i] & (POLLIN | POLLHUP | POLLERR);
        if (!flush_or_give_up(connection, i))
            return false;
        for (int turn = 0; is_ready && turn < TURNS && !holds_bytes(from) && !from->is_at_end; turn++) {
            if (!take(from, turn == 0))
                return false;
            is_ready = holds_bytes(from);
            if (!flush_or_give_up(connection, i))
                return false;
        }
        if (from->piped == 0)
            return_pipe(from);
    }
    return true;
}

/* What to poll a side for; nothing means that the side is not polled, or a hang-up would wake us for ever. */
static short events_of(const struct connection *connection, int i)
{
    const struct side *side = &connection->sides[i], *other = &connection->sides[1 - i];
    short events = 0;
    if (connection->state == ASKING && i == 0)
        return 0;
    if (connection->state == ASKING || (!holds_bytes(side) && !side->is_at_end))
        events |= POLLIN;
    if (holds_bytes(other))
        events |= POLLOUT;
    return events;
}

void relay_serve(const struct config *config, const int *listeners)
{
    static struct pollfd fds[RELAYS_MAX + 2 * CONNECTIONS_MAX];
    size_t used = 0; /* Connections beyond it are free: what nobody uses costs no look at it. */
    make_pipes();
    for (;;) {
        bool has_room = used < CONNECTIONS_MAX;
        int64_t wake = INT64_MAX, now = now_ms();
        for (size_t i = 0; i < used; i++) {
            struct connection *connection = &connections[i];
            struct pollfd *pair = &fds[config->relay_count + 2 * i];
            pair[0] = pair[1] = (struct pollfd){.fd = -1};
            if (connection->state == DIALLING)
                dial(connection, config->egress);
            if (connection->state != FREE && now >= connection->deadline)
                end_connection(connection, true);
            if (connection->state == FREE) {
                has_room = true;
                continue;
            }
            int64_t next = connection->state == DIALLING ? now + DIAL_AGAIN_MS : connection->deadline;
            wake = next < wake ? next : wake;
            for (int side = 0; side < 2; side++) {
                short events = connection->state == DIALLING ? 0 : events_of(connection, side);
                /* Before the answer the client is polled for errors only, so that we learn when it gives up. */
                bool is_polled = events || (side == 0 && connection->state != RELAYING);
                pair[side] = (struct pollfd){.fd = is_polled ? connection->sides[side].fd : -1, .events = events};
            }
        }
        for (size_t i = 0; i < config->relay_count; i++)
            fds[i] = (struct pollfd){.fd = has_room ? listeners[i] : -1, .events = POLLIN};
        int wait = wake == INT64_MAX ? -1 : wake <= now ? 0 : wake - now > 60000 ? 60000 : (int)(wake - now);
        if (poll(fds, config->relay_count + 2 * used, wait) < 0 && errno != EINTR)
            die("the relay cannot poll: %s", strerror(errno));
        for (size_t i = 0; i < used; i++) {
            struct connection *connection = &connections[i];
            struct pollfd *pair = &fds[config->relay_count + 2 * i];
            if (connection->state == FREE || !(pair[0].revents || pair[1].revents))
                continue;
            const short revents[2] = {pair[0].revents, pair[1].revents};
            bool is_fine = serve(connection, revents);
            bool is_over = is_fine && connection->sides[0].is_passed_on && connection->sides[1].is_passed_on;
            if (!is_fine || is_over)
                end_connection(connection, !is_fine);
        }
        for (size_t i = 0; i < config->relay_count; i++)
            if (fds[i].revents)
                accept_client(listeners[i], config->relays[i].connect);
        for (used = CONNECTIONS_MAX; used > 0 && connections[used - 1].state == FREE; used--)
            ;
    }
}
