/*
 * A worker: a process that PID 1 forks to serve one request, and its socket to PID 1.
 *
 * The socket keeps packets apart (SOCK_SEQPACKET): one packet is a type byte and a body, and becomes one frame.
 * PID 1 adds the request id, so a worker cannot speak for another request.
 */
#include "guest.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* Send a packet, or return false when PID 1 has no room for it now. */
bool packet_try(uint8_t *packet, size_t size)
{
    ssize_t sent;
    do
        sent = send(FD_PID1, packet, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS))
        return false;
    if (sent < 0)
        _exit(1); /* PID 1 is gone or gave us up; nothing is left to tell. */
    return true;
}

void packet_send(uint8_t type, const void *body, size_t size)
{
    struct iovec parts[2] = {{&type, 1}, {(void *)(uintptr_t)body, size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t sent;
    do
        sent = sendmsg(FD_PID1, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        _exit(1);
}

void worker_done(uint8_t type, const struct writer *body)
{
    if (body && body->is_full)
        die("a reply of type %d does not fit its buffer", type);
    packet_send(type, body ? body->at : NULL, body ? body->used : 0);
    _exit(0);
}

void worker_failed(uint8_t type, int error, const char *what)
{
    uint8_t room[512];
    struct writer body = {room, sizeof room, 0, false};
    encode_failed(&body, (uint32_t)error, what);
    worker_done(type, &body);
}

/* Receive one packet; returns the size of its body. KILL comes with none. When there is none to be had without
 * waiting, *type is 0. Ends the process when PID 1 is gone. */
size_t packet_receive(uint8_t *type, uint8_t *body, size_t size, bool may_wait)
{
    struct iovec parts[2] = {{type, 1}, {body, size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t got;
    do
        got = recvmsg(FD_PID1, &message, may_wait ? 0 : MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got < 0 && errno == EAGAIN) {
        *type = 0;
        return 0;
    }
    if (got <= 0 || message.msg_flags & MSG_TRUNC)
        _exit(1);
    return (size_t)got - 1;
}
